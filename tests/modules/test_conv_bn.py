"""Training steps of convolution and BatchNorm in the approximate mode, in float64, against torch.ao's modules."""

import copy

import pytest
import torch
import torch.nn.functional as F

import tritonq
from conv_bn_cases import FLOAT_OUT, GEOMETRIES, assert_same_training, inputs, pair
from written_quantizers import WrittenActivation


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize(("bias", "affine", "relu"), [(True, True, True), (False, True, False), (True, False, True)])
def test_approximate_training_equals_torch_ao(geometry, bias, affine, relu):
    theirs, ours = pair(geometry, bias=bias, affine=affine, relu=relu)
    assert_same_training(theirs, ours, inputs(geometry))


@pytest.mark.parametrize("geometry", ["2d", "depthwise", "pointwise", "one pixel"])
def test_channels_last(geometry):
    assert_same_training(*pair(geometry), inputs(geometry), channels_last=True)


def test_cumulative_average():
    assert_same_training(*pair("2d", momentum=None), inputs("2d"))


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("geometry", ["1d", "2d", "one pixel"])
def test_with_activation_quantizer(geometry, relu):
    theirs, ours = pair(geometry, relu=relu, qconfig=tritonq.get_qconfig("tensorrt"))
    written = WrittenActivation()
    theirs.register_forward_hook(lambda module, args, y: written.train(module.training)(y))
    assert_same_training(theirs, ours, inputs(geometry))


@pytest.mark.parametrize("quantized", [True, False])
@pytest.mark.parametrize("mode", ["approximate", "exact", "corrected"])
@pytest.mark.parametrize("ceiling", [0.7, 6.0])
@pytest.mark.parametrize(
    ("geometry", "channels_last"), [("1d", False), ("2d", False), ("2d", True), ("depthwise", True)]
)
def test_a_relu_with_an_upper_bound(geometry, channels_last, ceiling, mode, quantized):
    """Against the same layer without ReLU, with hardtanh and fake quantization written behind it."""
    theirs = pair(geometry, relu=False, mode=mode)[0 if mode == "approximate" else 1]
    _, ours = pair(geometry, relu=True, qconfig=tritonq.get_qconfig("tensorrt") if quantized else FLOAT_OUT, mode=mode)
    ours.ceiling = ceiling
    written = WrittenActivation()

    def end(module, args, y):
        y = F.hardtanh(y, 0.0, ceiling)
        return written.train(module.training)(y) if quantized else y

    theirs.register_forward_hook(end)
    assert_same_training(theirs, ours, inputs(geometry), channels_last)


@pytest.mark.parametrize("channels_last", [False, True])
def test_the_result_may_be_changed_in_place(channels_last):
    """An in-place ReLU6 behind the layer, as in MobileNetV2."""
    torch.manual_seed(0)
    layer = tritonq.nn.ConvBn2d(3, 6, 3, qconfig=tritonq.get_qconfig("tensorrt"))
    x = torch.randn(2, 3, 8, 8)
    x = x.to(memory_format=torch.channels_last) if channels_last else x
    expected = torch.nn.functional.relu6(copy.deepcopy(layer)(x))
    y = torch.nn.functional.relu6(layer(x), inplace=True)
    assert torch.equal(y, expected)
    y.sum().backward()
    assert layer.weight.grad.abs().sum() > 0
