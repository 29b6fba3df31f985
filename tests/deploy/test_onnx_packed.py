"""Weights of few bits in ONNX files with two codes per byte."""

import logging
import warnings

import numpy as np
import onnx
import onnx.reference
import pytest
import torch
from torch import nn

import tritonq
from qat_models import after_one_batch
from tritonq.deploy.onnx_packed import pack_weights


@pytest.fixture(scope="module")
def trained():
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(1, 5, 3, bias=False), nn.BatchNorm2d(5), nn.ReLU()),
        *(nn.Conv2d(5, 7, 3, bias=False), nn.BatchNorm2d(7), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(7, 3)),
    )
    images = torch.randn(8, 1, 8, 8)
    return after_one_batch(model, images, qconfig=tritonq.get_qconfig_mapping("lsq_w4a4")), images


def test_codes_of_four_bits_take_half_a_byte(trained, tmp_path, caplog):
    qat, images = trained
    plain, packed = tmp_path / "plain.onnx", tmp_path / "packed.onnx"
    tritonq.export_onnx(qat, plain, images)
    with caplog.at_level(logging.INFO, "tritonq"):
        tritonq.export_onnx(qat, packed, images, pack=True)
    assert "(1 constants, 157 bytes less)" in caplog.text
    file = onnx.load(packed)
    assert next(entry.version for entry in file.opset_import if entry.domain == "") == 21
    kinds = {tensor.name: tensor for tensor in file.graph.initializer if tensor.data_type == onnx.TensorProto.INT4}
    codes = kinds["3.weight"]
    before = {tensor.name: tensor for tensor in onnx.load(plain).graph.initializer}["3.weight"]
    assert len(codes.raw_data) == 158  # 7 * 5 * 3 * 3 = 315 codes
    assert (onnx.numpy_helper.to_array(codes).astype(int) == onnx.numpy_helper.to_array(before)).all()
    report = tritonq.verify(qat, packed, images)
    assert report.agrees()
    assert "island: Conv" in str(report)
    assert "island" not in str(tritonq.verify(qat, plain, images))


def test_packing_is_refused_where_weights_are_not_integers(trained, tmp_path):
    qat, images = trained
    with pytest.raises(ValueError, match="pack=True takes integer weights"):
        tritonq.export_onnx(qat, tmp_path / "model.onnx", images, target="tensorrt", pack=True)
    layer = after_one_batch(nn.Sequential(nn.Linear(4, 4)), torch.randn(2, 4), qconfig=tritonq.get_qconfig("f8net"))
    with pytest.raises(ValueError, match="no option pack=True"):
        tritonq.export_onnx(layer, tmp_path / "model.onnx", torch.randn(2, 4), pack=True)


@pytest.mark.parametrize(("zero_point", "kind"), [(3, onnx.TensorProto.UINT4), (128, onnx.TensorProto.UINT8)])
def test_small_codes_are_packed_where_their_zero_point_is_small_too(zero_point, kind):
    constants = [
        onnx.numpy_helper.from_array(np.array([0, 1, 15], np.uint8), "codes"),
        onnx.numpy_helper.from_array(np.float32(0.5), "scale"),
        onnx.numpy_helper.from_array(np.uint8(zero_point), "zero_point"),
    ]
    node = onnx.helper.make_node("DequantizeLinear", [constant.name for constant in constants], ["y"])
    output = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [3])
    model = onnx.helper.make_model(onnx.helper.make_graph([node], "constant", [], [output], constants))
    before = onnx.reference.ReferenceEvaluator(model).run(None, {})[0]
    pack_weights(model)
    onnx.checker.check_model(model, full_check=True)
    assert model.graph.initializer[0].data_type == kind
    assert (onnx.reference.ReferenceEvaluator(model).run(None, {})[0] == before).all()


def test_packed_floats_of_four_bits_are_not_told_as_integers(tmp_path, recwarn):
    weight = tritonq.FakeQuantize.with_args(
        observer=tritonq.PerChannelMinMaxObserver, dtype=tritonq.QuantizedType.of_floats("e2m1", axis=0)
    )
    qconfig = tritonq.get_qconfig()._replace(weight=weight)
    images = torch.randn(4, 1, 6, 6)
    qat = after_one_batch(nn.Sequential(nn.Conv2d(1, 4, 3)), images, qconfig=qconfig)
    tritonq.export_onnx(qat, tmp_path / "m.onnx", images, pack=True)
    kinds = {tensor.data_type for tensor in onnx.load(tmp_path / "m.onnx").graph.initializer}
    assert onnx.TensorProto.FLOAT4E2M1 in kinds
    assert not [str(warning.message) for warning in recwarn if "run in float" in str(warning.message)]


def opset_of(path):
    return next(entry.version for entry in onnx.load(path).opset_import if entry.domain == "")


@pytest.mark.parametrize(
    ("net", "x"),
    [(lambda: nn.LSTM(32, 32), torch.randn(5, 2, 32)), (lambda: nn.Linear(32, 4), torch.randn(5, 32))],
    ids=["LSTM", "Linear"],
)
def test_groups_ask_for_an_opset_where_the_file_has_their_codes(net, x, tmp_path):
    qat = after_one_batch(nn.Sequential(net()), x, qconfig=tritonq.get_qconfig("w4_g32"))
    tritonq.export_onnx(qat, tmp_path / "codes.onnx", x)
    assert opset_of(tmp_path / "codes.onnx") == 21
    assert tritonq.verify(qat, tmp_path / "codes.onnx", [x]).agrees()
    # Its weights are floats there, which an old engine reads.
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "TensorRT takes int8 codes")
        tritonq.export_onnx(qat, tmp_path / "floats.onnx", x, target="tensorrt", opset=18)
    assert opset_of(tmp_path / "floats.onnx") == 18
