"""Programs in the form of PT2E: pairs around every operator, the trained numbers, int8 kernels of torch's Inductor."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import tritonq
from qat_models import after_one_batch, images, trained_float_form, trained_residual
from tritonq.deploy import export_program

QUANTIZE, DEQUANTIZE = "quantized_decomposed.quantize_per_tensor", "quantized_decomposed.dequantize_per_tensor"


class Moving(nn.Module):
    """Values move before layers read them, two layers read one tensor and the input."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(3, 4, 1)
        self.pool, self.last = nn.MaxPool2d(2), nn.Linear(64, 5)

    def forward(self, x):
        y = self.pool(torch.relu(self.first(x) + self.second(x)))
        return self.last(y.permute(0, 2, 3, 1).flatten(1))


@pytest.mark.parametrize("preset", ["tensorrt", "fbgemm_v1", "megengine_lowbit"])
@pytest.mark.parametrize("make", [trained_residual, trained_float_form])
def test_it_gives_the_trained_codes_in_memory_and_from_a_file(make, preset, tmp_path):
    model, path = make(preset), tmp_path / "m.pt2"
    program = export_program(model, path, images(2), form="pt2e")
    for deployed in (path, program):
        report = tritonq.verify(model, deployed, images(8))
        assert report.total.codes > 10_000
        assert report.total.differing == 0
    assert torch.equal(torch.export.load(path).module()(images(3)), program.module()(images(3)))


def test_every_layer_reads_a_dequantize_of_its_own_and_moves_keep_the_grid():
    torch.manual_seed(0)
    x = torch.randn(4, 3, 8, 8)
    model = after_one_batch(Moving(), x, qconfig=tritonq.get_qconfig("xnnpack"))
    program = export_program(model, None, x, form="pt2e")
    assert tritonq.verify(model, program, x).total.differing == 0
    dequantizes = 0
    for node in program.graph.nodes:
        name = str(node.target)
        if name in ("aten.conv2d.default", "aten.linear.default", "aten.max_pool2d.default", "aten.permute.default"):
            source = node.args[0]
            assert str(source.target).startswith(DEQUANTIZE)
            assert list(source.users) == [node]
            dequantizes += 1
        if name == "aten.permute.default":
            (after,) = node.users
            assert str(after.target).startswith(QUANTIZE)
            assert after.args[1:] == source.args[1:]
    assert dequantizes == 5
    weights = [tensor.dtype for name, tensor in program.state_dict.items() if name.endswith(".weight")]
    assert weights == [torch.int8] * 3


def test_presets_of_engines_differ_in_the_sign_of_activations():
    types = {name: tritonq.get_qconfig(name).activation().qtype for name in ("xnnpack", "openvino", "qnn")}
    assert (types["xnnpack"].quant_min, types["xnnpack"].quant_max, types["xnnpack"].symmetric) == (-128, 127, False)
    assert types["openvino"] == types["qnn"] == tritonq.get_qconfig("onnxruntime").activation().qtype
    for name in types:
        weight = tritonq.get_qconfig(name).weight().qtype
        assert (weight.quant_min, weight.quant_max, weight.axis) == (-127, 127, 0)


def test_inductor_lowers_each_layer_to_an_int8_kernel():
    # The import registers patterns that torch 2.14 has no more.
    pytest.importorskip("torchao.quantization.pt2e.quantizer.x86_inductor_quantizer")
    from torchao.quantization.pt2e.lowering import lower_pt2e_quantized_to_x86

    torch.manual_seed(0)
    x = torch.randn(2, 3, 8, 8)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.Conv2d(4, 4, 1))
    converted = tritonq.convert(after_one_batch(net, x))
    program = export_program(converted, None, x, dynamic_batch=False, form="pt2e")
    lowered = lower_pt2e_quantized_to_x86(program.module(), (x,))
    names = [str(node.target) for node in lowered.graph.nodes]
    assert sum("onednn.qconv" in name for name in names) == 3
    assert not any("aten.conv" in name for name in names)
    with torch.no_grad():
        difference = (lowered(x) - converted(x)).abs().max()
    assert difference <= 1.001 * converted[-1].activation_post_process.scale


def test_what_the_form_does_not_hold_is_refused():
    with pytest.raises(ValueError, match="unknown form 'onnx'; known: integers, pt2e"):
        export_program(trained_residual(), None, images(2), form="onnx")
    wide = tritonq.FakeQuantize.with_args(dtype=tritonq.QuantizedType.of(20))
    qconfig = tritonq.get_qconfig()._replace(activation=wide)
    model = after_one_batch(nn.Sequential(nn.Conv2d(3, 4, 1)), images(2), qconfig=qconfig)
    with pytest.raises(ValueError, match="the form of PT2E holds int8, uint8, int16, uint16"):
        export_program(model, None, images(2), form="pt2e")
