"""The modes of folding, in float64, against torch.ao's modules and against docs/conv-bn.md written out."""

import copy

import pytest
import torch
import torch.ao.nn.intrinsic.qat as nniqat
import torch.nn.functional as F
from torch import nn

import tritonq
from conv_bn_cases import (
    FLOAT_OUT,
    GEOMETRIES,
    WRITTEN,
    assert_same_training,
    inputs,
    pair,
    randomise,
)
from tolerances import FLOAT64_LAYERS, assert_close
from tritonq.functional.bias import quantize_bias
from tritonq.functional.conv_bn import check_running_var
from written_quantizers import WrittenWeight, straight_through

MODES = ["approximate", "exact", "corrected"]
FLOAT = tritonq.QConfig(activation=nn.Identity, weight=nn.Identity)
VARIANTS = [(True, True, True), (False, True, False), (True, False, True)]


class WrittenExact(nn.Module):
    """docs/conv-bn.md, exact: the batch's statistics are folded; the bias goes to ``grid`` where there is one."""

    def __init__(self, conv, bn, relu, grid=None):
        super().__init__()
        self.conv, self.bn, self.relu, self.grid, self.weight_fake_quant = conv, bn, relu, grid, WrittenWeight()

    def forward(self, x):
        conv, bn = self.conv, self.bn
        column, along = (-1, *[1] * (conv.weight.dim() - 1)), (1, -1, *[1] * (conv.weight.dim() - 2))
        if self.training:
            c = conv(x)
            axes = [d for d in range(c.dim()) if d != 1]
            mean, var = c.mean(axes), c.var(axes, unbiased=False)
            with torch.no_grad():
                bn(c)
        else:
            mean, var = bn.running_mean, bn.running_var
        sigma = torch.sqrt(var + bn.eps)
        b = torch.zeros_like(mean) if conv.bias is None else conv.bias
        weight = self.weight_fake_quant(conv.weight * (bn.weight / sigma).view(column))
        bias = bn.bias + bn.weight * (b - mean) / sigma
        if self.grid is not None and self.training:
            scale = (self.grid.scale * self.weight_fake_quant.scale).double()
            bias = straight_through(bias, (bias / scale).round(), -(2**31), 2**31 - 1, scale)
        y = conv._conv_forward(x, weight, None) + bias.view(along)
        return F.relu(y) if self.relu else y


def float_parts(theirs, arguments):
    """The convolution and BatchNorm inside one of torch.ao's modules, with its parameters."""
    conv = theirs._FLOAT_CONV_MODULE(**arguments, bias=theirs.bias is not None).double()
    conv.weight = theirs.weight
    conv.bias = theirs.bias
    return conv, theirs.bn


def exact_pair(geometry, *, bias=True, affine=True, relu=True, grid=None):
    theirs, ours = pair(geometry, bias=bias, affine=affine, relu=relu, mode="exact")
    ours.set_input_quantizer(grid)
    conv, bn = float_parts(theirs, GEOMETRIES[geometry][1])
    written = WrittenExact(conv, bn, relu, grid)
    names = {"conv.weight": "weight", "conv.bias": "bias"}
    named = written.named_parameters
    written.named_parameters = lambda *a, **k: ((names.get(n, n), p) for n, p in named(*a, **k))
    return written, ours


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize(("bias", "affine", "relu"), VARIANTS)
def test_corrected_equals_torch_ao(geometry, bias, affine, relu):
    theirs, ours = pair(geometry, bias=bias, affine=affine, relu=relu, mode="corrected")
    theirs._enable_slow_path_for_better_numerical_stability = True
    assert_same_training(theirs, ours, inputs(geometry))


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize(("bias", "affine", "relu"), VARIANTS)
def test_frozen_equals_torch_ao(geometry, bias, affine, relu):
    theirs, ours = pair(geometry, bias=bias, affine=affine, relu=relu)
    theirs.freeze_bn_stats()
    ours.freeze_bn_stats()
    assert_same_training(theirs, ours, inputs(geometry))


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize(("bias", "affine", "relu"), VARIANTS)
def test_exact_equals_its_formula(geometry, bias, affine, relu):
    assert_same_training(*exact_pair(geometry, bias=bias, affine=affine, relu=relu), inputs(geometry))


@pytest.mark.parametrize("geometry", ["2d", "grouped"])
def test_exact_with_a_quantized_bias(geometry):
    grid = tritonq.get_qconfig("tensorrt").activation()
    grid(torch.tensor([-2.0, 2.0]))
    batches = [grid(x.float()).double() for x in inputs(geometry)]
    written, ours = exact_pair(geometry, grid=grid)
    x = batches[0]
    _, without = exact_pair(geometry)
    assert (ours(x) - without(x)).abs().max() > 1e-7, "a float bias would pass this test too"
    written, ours = exact_pair(geometry, grid=grid)
    ours.eval = written.eval = lambda: None  # eval is in exact integers, which other tests compare
    assert_same_training(written, ours, batches)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("geometry", ["2d", "depthwise", "1d"])
def test_all_modes_are_batch_norm_where_weights_are_float(mode, geometry):
    theirs, ours = pair(geometry, relu=False, qconfig=FLOAT, mode=mode)
    conv, bn = float_parts(theirs, GEOMETRIES[geometry][1])
    for x in inputs(geometry):
        assert_close(ours(x), bn(conv(x)), FLOAT64_LAYERS)
        assert_close(ours.bn.running_var, bn.running_var, FLOAT64_LAYERS)


def test_modes_differ():
    x = inputs("2d")[0]
    approximate, exact, corrected = (pair("2d", mode=mode)[1](x) for mode in MODES)
    assert (approximate - exact).norm() > 1e-4 * exact.norm()
    assert (approximate - corrected).norm() > 1e-5 * exact.norm()


@pytest.mark.parametrize("freeze", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_zero_gamma_is_finite_and_can_leave_zero(mode, freeze):
    _, ours = pair("2d", relu=False, qconfig=tritonq.get_qconfig("tensorrt"), mode=mode)
    with torch.no_grad():
        ours.bn.weight[::2] = 0
    if freeze:
        ours.freeze_bn_stats()
    for x in inputs("2d"):
        ours.zero_grad()
        y = ours(x)
        assert torch.isfinite(y).all()
        (y * torch.randn_like(y)).sum().backward()
        for name, parameter in ours.named_parameters():
            assert torch.isfinite(parameter.grad).all(), name
        assert (ours.bn.weight.grad[::2] != 0).all()
    assert torch.isfinite(ours.bn.running_var).all()
    with torch.no_grad():
        ours.bn.weight -= 0.1 * ours.bn.weight.grad
    assert torch.isfinite(ours(x)).all()
    assert torch.isfinite(ours.eval()(x)).all()


def test_zero_gamma_in_the_approximate_mode_has_batch_norms_gradient():
    _, ours = pair("2d", relu=False, qconfig=FLOAT)
    with torch.no_grad():
        ours.bn.weight.zero_()
    bn, x = copy.deepcopy(ours.bn), inputs("2d")[0]
    conv = ours._conv_forward(x, ours.weight, ours.bias).detach()
    dy = torch.randn_like(conv)
    ours(x).backward(dy)
    bn(conv).backward(dy)
    assert_close(ours.bn.weight.grad, bn.weight.grad, FLOAT64_LAYERS)


def test_linear():
    torch.manual_seed(0)
    theirs = nniqat.LinearBn1d(5, 7, qconfig=WRITTEN).double()
    nn.init.normal_(theirs.bias)  # torch.ao's constructor leaves it as the memory was
    ours = tritonq.nn.LinearBn1d(5, 7, qconfig=FLOAT_OUT).double()
    randomise(theirs.bn)
    ours.load_state_dict(theirs.state_dict(), strict=False)
    batches = [torch.randn(6, 5, dtype=torch.float64) for _ in range(3)]
    assert_same_training(theirs, ours, batches)
    with pytest.raises(ValueError, match="batch, features"):
        ours.train()(torch.randn(2, 3, 5))


def test_quantize_bias_is_what_eval_adds():
    bias = torch.tensor([0.26, -1.0, 1e9], requires_grad=True)
    y = quantize_bias(bias, torch.tensor([0.5]), torch.tensor([0.2, 0.25, 0.1]))
    assert torch.equal(y, torch.tensor([3, -8, 2**31 - 128]).double().mul(torch.tensor([0.1, 0.125, 0.05])).float())
    y.sum().backward()
    assert torch.equal(bias.grad, torch.ones(3))


class TestBadInput:
    def test_unknown_mode(self):
        with pytest.raises(ValueError, match=r"unknown mode 'fast'.*approximate, exact, corrected"):
            tritonq.nn.ConvBn2d(3, 4, 1, qconfig=FLOAT_OUT, mode="fast")
        with pytest.raises(ValueError, match="unknown mode"):
            tritonq.nn.ConvBn2d(3, 4, 1, qconfig=FLOAT_OUT).mode = "fast"

    @pytest.mark.parametrize("mode", MODES)
    def test_one_value_per_channel(self, mode):
        conv = tritonq.nn.ConvBn2d(3, 4, 1, qconfig=FLOAT_OUT, mode=mode)
        linear = tritonq.nn.LinearBn1d(3, 4, qconfig=FLOAT_OUT, mode=mode)
        for layer, x in ((conv, torch.randn(1, 3, 1, 1)), (linear, torch.randn(1, 3))):
            with pytest.raises(ValueError, match="more than one value per channel"):
                layer(x)

    @pytest.mark.parametrize("value", [-1.0, torch.nan, torch.inf])
    @pytest.mark.parametrize("mode", MODES)
    def test_bad_running_variance(self, mode, value):
        layer = tritonq.nn.ConvBn2d(3, 4, 1, qconfig=FLOAT_OUT, mode=mode)
        layer.bn.running_var[1] = value
        for each in (layer, copy.deepcopy(layer).freeze_bn_stats()):
            with pytest.raises(ValueError, match="running variance"):
                each(torch.randn(2, 3, 4, 4))

    def test_wrong_dimensions(self):
        with pytest.raises(ValueError, match="4 dimensions"):
            tritonq.nn.ConvBn2d(3, 4, 1, qconfig=FLOAT_OUT)(torch.randn(3, 4, 4))

    @pytest.mark.parametrize("scale", [0.0, -1.0, torch.nan, torch.inf, 1e-30])
    def test_bias_scale(self, scale):
        with pytest.raises(ValueError, match="positive and finite"):
            quantize_bias(torch.ones(2), torch.tensor(scale), torch.tensor([1.0, 1e-30]))

    def test_bias_shapes(self):
        with pytest.raises(ValueError, match="one element"):
            quantize_bias(torch.ones(2), torch.ones(2), torch.ones(2))
        with pytest.raises(ValueError, match="weight_scale"):
            quantize_bias(torch.ones(2), torch.ones(1), torch.ones(3))
        with pytest.raises(TypeError, match="bias"):
            quantize_bias([1.0], torch.ones(1), torch.ones(1))


def test_a_bias_of_nan_stays_nan():
    """An integer made of NaN is the smallest one."""
    bias = torch.tensor([float("nan"), 1.0, -1e-9], requires_grad=True)
    y = quantize_bias(bias, torch.tensor([0.5]), torch.tensor([0.5]))
    assert y[:1].isnan().tolist() == [True]
    assert y[1:].tolist() == [1.0, 0.0]
    assert not y[2].signbit()


def test_a_variance_of_no_channels_is_fine():
    check_running_var(torch.ones(0))
    with pytest.raises(ValueError, match="must be finite and not negative"):
        check_running_var(torch.tensor([-1.0]))


@pytest.mark.parametrize("mode", ["approximate", "exact", "corrected", "scale"])
def test_inputs_without_a_batch_are_refused_in_training(mode):
    layer = tritonq.nn.ConvBn2d(1, 4, 3, mode=mode, qconfig=tritonq.get_qconfig()).train()
    with pytest.raises(ValueError, match="expected"):
        layer(torch.rand(1, 6, 6))


def test_the_batch_norm_is_made_where_the_layer_is():
    layer = tritonq.nn.ConvBn2d(1, 4, 3, device="meta", dtype=torch.float64, qconfig=tritonq.get_qconfig())
    assert layer.bn.weight.device.type == "meta"
    assert layer.bn.running_mean.dtype == torch.float64
