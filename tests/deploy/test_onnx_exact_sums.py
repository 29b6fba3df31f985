"""Convolutions whose result stays in float values, as before a residual addition, are exact in ONNX Runtime."""

import warnings

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from onnx import helper
from torch import nn

import tritonq
from optimised_graph import optimised_graph
from qat_models import train
from tritonq.deploy.onnx_exact_sums import write_exact_sums


class Residual(nn.Module):
    """A stem, a block whose two branches end in an addition, and a head."""

    def __init__(self, groups=1, stride=1, bias=True):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.main = nn.Conv2d(8, 8, 3, stride, padding=1, groups=groups, bias=bias)
        self.side = nn.Conv2d(8, 8, 1, stride, bias=bias)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        x = self.stem(x)
        return self.head(torch.relu(self.main(x) + self.side(x)).mean((2, 3)))


class Lines(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.main = nn.Conv1d(3, 8, 3), nn.Conv1d(8, 8, 3, padding=2, dilation=2)
        self.last = nn.Conv1d(8, 4, 1)

    def forward(self, x):
        x = torch.relu(self.stem(x))
        return self.last(torch.relu(self.main(x) + x))


def trained(net, preset, x):
    torch.manual_seed(0)
    qconfig = tritonq.get_qconfig_mapping(preset) if preset.startswith("lsq") else tritonq.get_qconfig(preset)
    return train(tritonq.prepare_qat(net, qconfig=qconfig, example_inputs=x[:2]), x)


def operators(path):
    return [node.op_type for node in onnx.load(path).graph.node]


@pytest.mark.filterwarnings("ignore:layer .* has no quantizer")
@pytest.mark.parametrize("shape", [{}, {"groups": 8}, {"stride": 2}, {"bias": False}], ids=str)
@pytest.mark.parametrize("preset", ["lsq_w4a4", "lsq_w2a2", "lsq_w8a8"])
def test_summands_that_are_not_rounded_are_sums_of_codes(preset, shape, tmp_path):
    x, path = torch.randn(16, 3, 12, 12), tmp_path / "model.onnx"
    qat = trained(Residual(**shape), preset, x)
    tritonq.export_onnx(qat, path, x[:2])
    assert operators(path).count("ConvInteger") >= 1
    assert "ConvInteger" in {node.op_type for node in optimised_graph(path).node}
    result = tritonq.verify(qat, path, torch.randn(64, 3, 12, 12))
    assert result.agrees()
    assert not any(layer.island for layer in result.layers)
    assert not any(layer.differing for layer in result.layers)
    assert result.outputs.largest == 0


def test_a_weight_that_reads_inputs_of_two_scales():
    tensors = {"w": np.int8([[[[3]], [[-2]]]]), "ws": np.float32([0.5]), "wz": np.int8([0]), "z": np.uint8(0)}
    tensors |= {"s": np.float32(0.25), "t": np.float32(2.0)}
    nodes = [helper.make_node("DequantizeLinear", ["w", "ws", "wz"], ["weight"], axis=0)]
    for scale in "st":
        nodes.append(helper.make_node("DequantizeLinear", [f"x{scale}", scale, "z"], [f"v{scale}"]))
        nodes.append(helper.make_node("Conv", [f"v{scale}", "weight"], [f"y{scale}"]))
    graph = helper.make_graph(
        nodes,
        "two",
        [helper.make_tensor_value_info(f"x{s}", onnx.TensorProto.UINT8, [1, 2, 3, 3]) for s in "st"],
        [helper.make_tensor_value_info(f"y{s}", onnx.TensorProto.FLOAT, [1, 1, 3, 3]) for s in "st"],
        [onnx.numpy_helper.from_array(np.asarray(held), name) for name, held in tensors.items()],
    )
    model = ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8))
    write_exact_sums(model.graph)
    assert [node.op_type for node in model.graph].count("ConvInteger") == 2
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString())
    x = np.arange(18, dtype=np.uint8).reshape(1, 2, 3, 3)
    sums = (3.0 * x[:, :1] - 2.0 * x[:, 1:]) * 0.5
    first, second = session.run(["ys", "yt"], {"xs": x, "xt": x})
    assert np.array_equal(first, sums * 0.25)
    assert np.array_equal(second, sums * 2.0)


def test_a_sum_of_floats_is_rounded_as_in_eval_mode(tmp_path):
    # Times the reciprocal of the scale, where QuantizeLinear divides: some ties fall to the other side.
    x, path = torch.randn(16, 3, 12, 12), tmp_path / "model.onnx"
    tritonq.export_onnx(trained(Residual(), "lsq_w4a4", x), path, x[:2])
    graph = onnx.load(path).graph
    readers = {name: node for node in graph.node for name in node.input}
    [added] = [node for node in graph.node if node.op_type == "Add" and "bias_of_sums" not in str(node.input)]
    scaled = readers[added.output[0]]
    assert [scaled.op_type, readers[scaled.output[0]].op_type] == ["Mul", "QuantizeLinear"]


def test_convolutions_of_one_dimension(tmp_path):
    x, path = torch.randn(16, 3, 20), tmp_path / "model.onnx"
    qat = trained(Lines(), "lsq_w4a4", x)
    tritonq.export_onnx(qat, path, x[:2])
    assert operators(path).count("ConvInteger") == 1
    result = tritonq.verify(qat, path, torch.randn(64, 3, 20))
    assert result.agrees()
    assert not any(layer.island for layer in result.layers)


def test_the_file_holds_one_copy_of_a_weight(tmp_path):
    x, path = torch.randn(4, 3, 12, 12), tmp_path / "model.onnx"
    tritonq.export_onnx(trained(Residual(), "lsq_w4a4", x), path, x[:2])
    graph = onnx.load(path).graph
    read = {name for node in graph.node for name in node.input}
    assert {tensor.name for tensor in graph.initializer} <= read


def test_a_function_behind_exact_sums_may_still_differ_by_one_code(tmp_path):
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.SiLU(), nn.Conv2d(8, 4, 1))
    x, path = torch.randn(8, 3, 12, 12), tmp_path / "model.onnx"
    qat = trained(net, "tensorrt", x)
    tritonq.export_onnx(qat, path, x[:2], target="onnxruntime")
    assert "ConvInteger" in operators(path)
    result = tritonq.verify(qat, path, x)
    assert result.agrees()
    islands = {layer.name: layer.island for layer in result.layers if layer.island}
    assert list(islands.values()) == [("Sigmoid",)]


@pytest.mark.parametrize("options", [{"target": "openvino"}, {"pack": True}, {"target": "qdq"}], ids=str)
def test_files_of_other_kinds_keep_their_pairs(options, tmp_path):
    x, path = torch.randn(4, 3, 12, 12), tmp_path / "model.onnx"
    qat = trained(Residual(), "lsq_w4a4", x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        tritonq.export_onnx(qat, path, x[:2], **options)
    assert "ConvInteger" not in operators(path)
    assert "Conv" in operators(path)
