"""Mode "scale": weights are rounded before the BatchNorm, which deployment folds into the weight's scale."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import tritonq
import tritonq.nn as qnn
from tolerances import FLOAT32, FLOAT64, LONG_SUMS, SUMS, assert_close

STEP = tritonq.LearnedStepFakeQuantize.with_args(init="lsq")
WEIGHTS = {
    "per channel": STEP.with_args(dtype="qint4", qscheme=torch.per_channel_symmetric),
    "per tensor": STEP.with_args(dtype="qint2", qscheme=torch.per_tensor_symmetric),
}
FLOAT = tritonq.QConfig(nn.Identity, nn.Identity, folding="scale")
X = torch.randn(16, 3, 7, 7, generator=torch.Generator().manual_seed(3))


def layer(weight, activation=None, relu=True):
    """A layer whose γ has both signs and a zero."""
    torch.manual_seed(0)
    activation = activation or tritonq.get_qconfig().activation
    kind = qnn.ConvBnReLU2d if relu else qnn.ConvBn2d
    made = kind(3, 6, 3, bias=True, qconfig=tritonq.QConfig(activation, weight, folding="scale"))
    with torch.no_grad():
        made.bn.weight.copy_(torch.tensor([1.5, -0.7, 0.2, 1.0, -2.0, 0.0]))
        made.bn.bias.normal_()
        made.bn.running_var.uniform_(0.5, 2)
    return made


@pytest.mark.parametrize("name", WEIGHTS)
def test_training_is_batch_norm_of_the_rounded_weight(name):
    made = layer(WEIGHTS[name], activation=nn.Identity, relu=False).double()
    made(X.double())  # the scales' first values
    bn = copy.deepcopy(made.bn)
    y = made(X.double())
    y.square().mean().backward()
    # by hand, with the sign of γ in the weight: codes of -8..7 are those of the folded weight
    weight, quantizer = made.weight.detach().requires_grad_(), made.weight_fake_quant
    signs = torch.where(bn.weight < 0, -1.0, 1.0).double().view(-1, 1, 1, 1)
    grid = quantizer.grid()
    rounded = learnable_by_hand(weight * signs, grid) * signs
    expected = bn(F.conv2d(X.double(), rounded, made.bias.detach()))
    expected.square().mean().backward()
    assert_close(y, expected, FLOAT64)
    assert_close(made.weight.grad, weight.grad, FLOAT32, size=0.001)
    torch.testing.assert_close(made.bn.running_var, bn.running_var)
    assert (quantizer.scale.grad != 0).any()


def learnable_by_hand(x, grid):
    scale = grid.scale.double().view(-1, 1, 1, 1) if grid.scale.numel() > 1 else grid.scale.double()
    codes = x / scale
    clipped = codes.clamp(grid.qtype.quant_min, grid.qtype.quant_max)
    return (clipped + (clipped.round() - clipped).detach()) * scale


@pytest.mark.parametrize("name", WEIGHTS)
def test_eval_rounds_the_same_codes_with_the_folded_scale(name):
    made = layer(WEIGHTS[name])
    made.train()(X)
    made.eval()
    fold = made.bn.weight / torch.sqrt(made.bn.running_var + made.bn.eps)
    codes = learnable_by_hand(made.weight_to_quantize().double(), made.weight_fake_quant.grid())
    expected = codes.detach() * fold.detach().abs().double().view(-1, 1, 1, 1)
    folded, bias = made.folded_parameters()
    assert_close(made.quantized_folded_weight(folded).double(), expected, SUMS, size=0.01)
    assert made.weight_grid().qtype.axis == 0
    y = F.relu(F.conv2d(X.double(), expected, bias.double())).detach()
    torch.testing.assert_close(made(X).double(), y, rtol=0, atol=0.51 * float(made.activation_post_process.scale))


@pytest.mark.parametrize("name", WEIGHTS)
def test_the_deployed_model_gives_the_same_codes(name, tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 5, 3), nn.BatchNorm2d(5))
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([1.5, -0.7, 0.2, 1.0, -2.0, 0.0]))
    qconfig = tritonq.QConfig(tritonq.get_qconfig().activation, WEIGHTS[name], folding="scale")
    model = tritonq.prepare_qat(model, qconfig=qconfig, example_inputs=X)
    model.train()(X)
    converted = tritonq.convert(model.eval())
    report = tritonq.verify(model, converted, X)
    assert report.agrees()
    assert report.outputs.largest == 0
    assert converted[0].multiplier is not None
    tritonq.export_onnx(converted, tmp_path / "m.onnx", example_inputs=X)
    assert tritonq.verify(model, tmp_path / "m.onnx", X).agrees()


def test_frozen_training_is_eval_and_teaches_scale_and_gamma():
    made = layer(WEIGHTS["per channel"])
    made.train()(X)
    made.freeze_bn_stats()
    made.activation_post_process.disable_observer()
    y = made(X)
    y.sum().backward()
    assert (made.weight_fake_quant.scale.grad != 0).any()
    assert (made.bn.weight.grad != 0).any()
    step = float(made.activation_post_process.scale)
    assert float((made.eval()(X) - y.detach()).abs().max()) <= 1.01 * step


def test_running_statistics_leave_the_codes_alone():
    made = layer(WEIGHTS["per channel"])
    made.train()(X)
    made.eval()
    before = made.weight_grid(), made.quantized_folded_weight(made.folded_parameters()[0])
    made.bn.running_var.mul_(3)
    after = made.weight_grid(), made.quantized_folded_weight(made.folded_parameters()[0])
    codes = [(weight / grid.scale.view(-1, 1, 1, 1)).round() for grid, weight in (before, after)]
    assert torch.equal(*codes)


def test_calibration_sees_the_weight_before_the_fold():
    made = layer(WEIGHTS["per channel"])
    with torch.no_grad():
        made.bn.weight[5] = 0.3
    tritonq.calibrate(made, X)
    mean = made.weight.detach().abs().mean((1, 2, 3))
    assert_close(made.weight_fake_quant.scale.detach(), 2 * mean / 7**0.5, LONG_SUMS, size=0.01)


def test_float_layers_are_plain_batch_norm():
    made = qnn.ConvBn2d(3, 4, 3, qconfig=FLOAT)
    expected = copy.deepcopy(made.bn)(F.conv2d(X, made.weight))
    torch.testing.assert_close(made(X), expected)
    assert_close(made.eval()(X), made.bn(F.conv2d(X, made.weight)), SUMS)


def test_weights_with_zero_points_are_refused():
    affine = tritonq.FakeQuantize.with_args(dtype=torch.quint8)
    with pytest.raises(ValueError, match="symmetric signed weight"):
        qnn.ConvBn2d(3, 4, 3, qconfig=tritonq.QConfig(nn.Identity, affine, folding="scale"))
    plain = qnn.ConvBn2d(3, 4, 3, qconfig=tritonq.QConfig(nn.Identity, affine))
    with pytest.raises(ValueError, match="symmetric signed weight"):
        plain.mode = "scale"
