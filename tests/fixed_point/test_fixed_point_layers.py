"""Fixed-point layers against the formulas of F8Net's double forward, written out here in float64."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tolerances import FLOAT32, FLOAT64, FLOAT64_LAYERS, assert_close
from tritonq import get_qconfig
from tritonq.fixed_point_fake_quantize import FixedPointFakeQuantize, set_fixed_point_phase
from tritonq.nn import intrinsic
from tritonq.nn.fixed_point import FixedPointConv2d, FixedPointConvBn2d, FixedPointLinear
from tritonq.nn.fixed_point_joins import FixedPointAvgPool2d, FixedPointMaxPool2d, pooling_shift
from tritonq.qconfig import QConfig


class Rounded(torch.autograd.Function):
    """fix_quant of docs/fixed-point.md: forward and strict mask, for one power of two per row or in all."""

    @staticmethod
    def forward(ctx, x, power, low, high):
        code = torch.clamp(torch.round(x * power), low, high)
        ctx.save_for_backward((code > low) & (code < high))
        return code / power

    @staticmethod
    def backward(ctx, dy):
        return dy * ctx.saved_tensors[0], None, None, None


def fix_quant(x, frac_len, signed):
    low, high = (-127, 127) if signed else (0, 255)
    return Rounded.apply(x, torch.as_tensor(2.0**frac_len, dtype=x.dtype), low, high)


def grid_search(x, signed):
    errors = [((x - fix_quant(x, k, signed)) ** 2).mean() for k in range(9 - signed)]
    return min(range(len(errors)), key=lambda k: (errors[k], k))


class ByHand:
    """Two layers, a convolution with BatchNorm and the layer that follows, with the formulas written out."""

    def __init__(self, conv, following, per_channel):
        self.w, self.b = conv.weight.detach().clone(), None if conv.bias is None else conv.bias.detach().clone()
        self.gamma, self.beta = conv.bn.weight.detach().clone(), conv.bn.bias.detach().clone()
        self.mean, self.var, self.eps = torch.zeros_like(self.beta), torch.ones_like(self.beta), conv.bn.eps
        self.alpha = torch.tensor(8.0, dtype=torch.float64)
        self.alpha_next = torch.tensor(8.0, dtype=torch.float64)
        self.v, self.c = following.weight.detach().clone(), following.bias.detach().clone()
        self.signed, self.per_channel = conv.input_format.signed, per_channel
        self.groups, self.padding = conv.groups, conv.padding
        self.fl, self.fl_next = float(8 - self.signed), 8.0
        for parameter in self.parameters():
            parameter.requires_grad_()

    def parameters(self):
        found = [self.w, self.gamma, self.beta, self.alpha, self.alpha_next, self.v, self.c]
        return found if self.b is None else [*found, self.b]

    def weight(self, w):
        if not self.per_channel:
            return fix_quant(w, grid_search(w.detach(), True), True)
        powers = torch.tensor([2.0 ** grid_search(row, True) for row in w.detach()], dtype=w.dtype)
        return Rounded.apply(w, powers.view(-1, *[1] * (w.dim() - 1)), -127, 127)

    def conv(self, x, w, b=None):
        return F.conv2d(x, w, b, padding=self.padding, groups=self.groups)

    def eta(self, fl, alpha, signed):
        return 2.0 ** min(max(round(fl), 0), 8 - signed) * alpha.abs() / (2 ** (8 - signed) - 1)

    def fold(self, mean, var, eta, eta_next):
        t = self.gamma / torch.sqrt(var + self.eps)
        b = 0 if self.b is None else self.b
        return self.weight(self.w * (t * eta / eta_next).view(-1, 1, 1, 1)), (self.beta + t * (b - mean)) / eta_next

    def step(self, x):
        """One training forward of both layers; returns the first layer's output and the second one's."""
        eta_next = self.eta(self.fl_next, self.alpha_next, False)  # before the following layer sees this batch
        fl = grid_search(x.detach(), self.signed)
        self.fl = 0.1 * fl + 0.9 * self.fl
        eta = self.eta(self.fl, self.alpha, self.signed)
        xq = fix_quant(x, fl, self.signed)
        y0 = self.conv(eta * xq, self.w, self.b)
        n = y0.numel() / y0.shape[1]
        mean = y0.mean((0, 2, 3))
        var = ((y0 - mean.view(1, -1, 1, 1)) ** 2).mean((0, 2, 3))
        self.mean = 0.9 * self.mean + 0.1 * mean.detach()
        self.var = 0.9 * self.var + 0.1 * var.detach() * n / (n - 1)
        weight, bias = self.fold(mean, var, eta, eta_next)
        y = self.conv(xq, weight) + bias.view(1, -1, 1, 1)

        z = y.amax((2, 3))
        fl_next = grid_search(z.detach(), False)
        self.fl_next = 0.1 * fl_next + 0.9 * self.fl_next
        zq = fix_quant(z, fl_next, False)
        eta_next = self.eta(self.fl_next, self.alpha_next, False)
        return y, F.linear(zq, self.weight(self.v * eta_next), self.c)

    def eval(self, x):
        eta, eta_next = self.eta(self.fl, self.alpha, self.signed), self.eta(self.fl_next, self.alpha_next, False)
        xq = fix_quant(x, round(self.fl), self.signed)
        weight, bias = self.fold(self.mean, self.var, eta, eta_next)
        y = self.conv(xq, weight) + bias.view(1, -1, 1, 1)
        zq = fix_quant(y.amax((2, 3)), round(self.fl_next), False)
        return y, F.linear(zq, self.weight(self.v * eta_next), self.c)


def layers(groups, bias, signed, per_channel, bias_word_len=None):
    torch.manual_seed(7)
    preset = get_qconfig("f8net")
    qconfig = QConfig(preset.activation, preset.weight.with_args(axis=0 if per_channel else None))
    options = {"qconfig": qconfig, "bias_word_len": bias_word_len}
    conv = FixedPointConvBn2d(4, 4, 3, padding=1, groups=groups, bias=bias, signed_input=signed, **options).double()
    with torch.no_grad():
        conv.bn.weight.uniform_(0.5, 1.5)
        conv.bn.bias.uniform_(-0.5, 0.5)
    following = FixedPointLinear(4, 3, **options).double()
    conv.set_following(following)
    return conv, following


def run(conv, following, x):
    y = conv(x)
    return y, following(y.amax((2, 3)))


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize(("bias", "signed"), [(False, False), (True, True)])
def test_double_forward_over_several_steps(groups, bias, signed, per_channel):
    conv, following = layers(groups, bias, signed, per_channel)
    hand = ByHand(conv, following, per_channel)
    mine = [conv.weight, conv.bn.weight, conv.bn.bias, conv.input_format.alpha, following.input_format.alpha]
    mine += [following.weight, following.bias, *([conv.bias] if bias else [])]
    optimizers = [torch.optim.SGD(parameters, lr=0.01) for parameters in (mine, hand.parameters())]
    generator = torch.Generator().manual_seed(3)
    for step in range(4):
        x = torch.randn(3, 4, 5, 5, generator=generator, dtype=torch.float64) * (1 + step)
        ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
        for optimizer in optimizers:
            optimizer.zero_grad()
        outputs, expected = run(conv, following, ours), hand.step(theirs)
        for out, ref in zip(outputs, expected, strict=True):
            assert_close(out, ref, FLOAT64_LAYERS)
        target = torch.randn(expected[1].shape, generator=generator, dtype=torch.float64)
        for out in (outputs, expected):
            ((out[1] - target).square().sum() + (out[0] * x.sign()).sum() * 0.1).backward()
        assert_close(ours.grad, theirs.grad, FLOAT64_LAYERS)
        for parameter, ref in zip(mine, hand.parameters(), strict=True):
            assert_close(parameter.grad.view_as(ref), ref.grad, FLOAT64_LAYERS)
        assert_close(conv.bn.running_mean, hand.mean, FLOAT64_LAYERS)
        assert_close(conv.bn.running_var, hand.var, FLOAT64_LAYERS)
        assert float(conv.input_format.frac_len) == pytest.approx(hand.fl, abs=FLOAT64.atol)
        assert float(following.input_format.frac_len) == pytest.approx(hand.fl_next, abs=FLOAT64.atol)
        for optimizer in optimizers:
            optimizer.step()
    conv.eval(), following.eval()
    for out, ref in zip(run(conv, following, x), hand.eval(x), strict=True):
        assert_close(out, ref, FLOAT64_LAYERS)


def trained(per_channel=True, steps=3, **kwargs):
    conv, following = layers(1, False, False, per_channel, bias_word_len=32, **kwargs)
    for step in range(steps):
        run(conv, following, torch.randn(3, 4, 5, 5, generator=torch.Generator().manual_seed(step)).double())
    return conv.eval(), following.eval()


@pytest.mark.parametrize("per_channel", [False, True])
def test_eval_computes_with_integers(per_channel):
    conv, _ = trained(per_channel)
    layer = conv.integers()
    assert layer.weight.abs().max() <= 127
    for values in (layer.weight, layer.bias):
        assert torch.equal(values, values.round())
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64)
    accumulators = conv(x) * (2.0 ** layer.frac_len.double()).view(1, -1, 1, 1)
    assert torch.equal(accumulators, accumulators.round())
    # The 32-bit bias is the only difference to the float bias.
    exact = conv(x)
    conv.bias_word_len = None
    step = 2.0 ** -layer.frac_len.double().min()
    assert 0 < (exact - conv(x)).abs().max() <= step / 2


def test_eval_gradient_is_that_of_the_rounded_layer():
    conv, _ = trained()
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64)
    gradients = []
    for bits in (32, None):
        conv.bias_word_len = bits
        conv.zero_grad()
        conv(x).sum().backward()
        gradients.append(conv.weight.grad.clone())
    assert torch.equal(*gradients)
    assert gradients[0].abs().sum() > 0


def test_a_large_accumulator_saturates():
    following = FixedPointLinear(1, 1)
    layer = FixedPointLinear(2, 1, signed_input=True)
    layer.set_following(following)
    layer.input_format.observed.fill_(1)
    layer.input_format.scaled = False
    layer.input_format.frac_len.zero_()
    layer.eval()
    with torch.no_grad():
        layer.weight.fill_(1.0)
        layer.bias.fill_(1e30)
    frac_len = int(layer.integers().frac_len)
    assert float(layer(torch.ones(1, 2)).detach()) == (2**31 - 1) / 2**frac_len


def test_float_phases():
    conv, following = trained()
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64)
    for module in (conv, following):
        set_fixed_point_phase(module, "floating_wo_clip")
    y = conv(x)
    expected = conv.bn(F.conv2d(F.relu(x), conv.weight, padding=1))
    assert_close(y, expected, FLOAT64_LAYERS)
    torch.testing.assert_close(
        following(y.amax((2, 3))), F.linear(F.relu(y.amax((2, 3))), following.weight, following.bias)
    )


@pytest.mark.parametrize("signed", [True, False])
def test_floating_stops_the_gradient_at_both_bounds(signed):
    """F8Net's masks are strict: ``|x| < bound``, and without a sign ``0 < x < bound``."""
    quantizer = FixedPointFakeQuantize(8, signed)
    set_fixed_point_phase(quantizer, "floating")
    quantizer.disable_observer()
    largest = 127 if signed else 255
    codes = torch.tensor([0.0, largest, -largest, largest / 2, largest + 1, torch.nan])
    x = (codes / 2.0 ** int(quantizer.rounded_frac_len())).requires_grad_()
    quantizer(x).nan_to_num().sum().backward()
    assert x.grad.tolist() == [float(signed), 0, 0, 1, 0, 0]


def test_floating_clips_and_does_not_round():
    conv, following = trained()
    for module in (conv, following):
        set_fixed_point_phase(module, "floating")
    conv.train()
    x = torch.rand(2, 4, 5, 5, dtype=torch.float64) - 0.1
    x[0, 0, 0, 0] = 1.01  # outside of the range of 8 fraction bits, which suits the others
    with torch.no_grad():
        conv.input_format.observe(x)
        high = 255 / 2.0 ** int(conv.input_format.batch_frac_len)
        clipped = x.clamp(0, high)
        assert not torch.equal(clipped, x.clamp(0))
        frozen = copy.deepcopy(conv)
        y = frozen(x)
        # Weights are far inside of their range, so that clipping leaves the BatchNorm of a convolution.
        eta = conv.input_format.eta()
        y0 = F.conv2d(clipped * frozen.input_format.eta(), conv.weight, padding=1)
        assert eta > 0
        expected = F.batch_norm(y0, None, None, conv.bn.weight, conv.bn.bias, True, eps=conv.bn.eps)
        assert_close(y, expected / conv.eta_next(), FLOAT64_LAYERS)


def test_convolution_without_batch_norm_and_linear():
    torch.manual_seed(0)
    conv = FixedPointConv2d(2, 3, 3, signed_input=True).double()
    assert conv(torch.randn(2, 2, 5, 5, dtype=torch.float64)).shape == (2, 3, 3, 3)
    eta = conv.input_format.eta()
    x = torch.randn(2, 2, 5, 5, dtype=torch.float64)
    y = conv(x)
    xq = fix_quant(x, grid_search(x, True), True)
    weight = conv.weight * eta
    assert_close(
        y, F.conv2d(xq, fix_quant(weight, grid_search(weight.detach(), True), True), conv.bias), FLOAT64_LAYERS
    )


def test_from_float_shares_parameters():
    conv, bn = nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4)
    row = intrinsic.ConvBnReLU2d(conv, bn, nn.ReLU())
    row.qconfig = get_qconfig("f8net")
    layer = FixedPointConvBn2d.from_float(row)
    assert layer.weight is conv.weight
    assert layer.bn is bn
    with pytest.raises(TypeError, match="ConvBn2d"):
        FixedPointConvBn2d.from_float(conv)
    with pytest.raises(TypeError, match="Linear"):
        FixedPointLinear.from_float(conv)
    linear = nn.Linear(2, 3)
    assert FixedPointLinear.from_float(linear).bias is linear.bias


@pytest.mark.parametrize("area", [1, 2, 3, 4, 5, 6, 9, 16, 25, 49, 64, 196])
def test_average_pooling_sums_and_shifts(area):
    assert pooling_shift(area) == round(torch.log2(torch.tensor(float(area))).item())
    following = FixedPointLinear(2, 2)
    pool_format = FixedPointLinear(2, 2).input_format
    pool_format.share_step(following.input_format)
    pool = FixedPointAvgPool2d(None, area=area, input_format=pool_format, following=following.input_format)
    x = torch.rand(1, 2, 1, area) * 3
    y = pool(x)
    xq = fix_quant(x, grid_search(x, False), False)
    fl, fl_next = round(float(pool_format.frac_len)), round(float(following.input_format.frac_len))
    assert torch.equal(y, xq.sum((2, 3), keepdim=True) * 2.0 ** (fl - fl_next - pool.shift))
    ratio = float(y.detach().double().sum() * pool.remaining_factor / xq.double().mean((2, 3)).sum())
    assert ratio == pytest.approx(2.0 ** (fl - fl_next), rel=FLOAT32.rtol)


def test_average_pooling_by_windows_and_wrong_sizes():
    source = FixedPointLinear(2, 2).input_format
    pool = FixedPointAvgPool2d((2, 2), (1, 2), (1, 0), input_format=source).eval()
    source.observed.fill_(1)
    x = torch.randint(0, 256, (1, 2, 4, 6)).float() / 256
    assert torch.equal(pool(x), F.avg_pool2d(x, 2, (1, 2), (1, 0)))
    whole = FixedPointAvgPool2d(None, area=24, input_format=source)
    with pytest.raises(ValueError, match="24 values"):
        whole(torch.rand(1, 2, 4, 4))
    with pytest.raises(ValueError, match="area"):
        FixedPointAvgPool2d(None, input_format=source)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int32])
def test_max_pooling_of_codes(dtype):
    x = torch.randint(0, 100, (1, 2, 6, 6))
    pool = FixedPointMaxPool2d(3, 2, 1)
    assert torch.equal(pool(x.to(dtype)).long(), pool(x.float()).long())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FixedPointConvBn2d(4, 4, 3, groups=2), "depthwise"),
        (lambda: FixedPointConvBn2d(4, 4, 3, padding_mode="reflect"), "zeros"),
        (lambda: FixedPointConvBn2d(4, 4, 2, padding="same"), "unequally"),
        (lambda: FixedPointLinear(4, 4, qconfig=get_qconfig("tensorrt")), "fixed-point quantizers"),
        (lambda: FixedPointLinear(4, 4, bias_word_len=33), "bias_word_len"),
        (lambda: FixedPointFakeQuantize(17), "word_len"),
        (lambda: FixedPointFakeQuantize(momentum=1.5), "momentum"),
        (lambda: FixedPointFakeQuantize(choice="median"), "choice"),
        (lambda: set_fixed_point_phase(nn.ReLU(), "float"), "phase"),
        (lambda: FixedPointConvBn2d(1, 1, 3)(torch.ones(1, 1, 3, 3)), "more than 1 value"),
    ],
)
def test_bad_input_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_quantizer_switches_and_state():
    quantizer = FixedPointFakeQuantize(signed=False)
    x = torch.tensor([-1.0, 0.3, 2.0])
    with pytest.warns(UserWarning, match="observed nothing"):
        assert torch.equal(quantizer.eval()(x), x)
    quantizer.train()
    quantizer(x)
    running = quantizer.frac_len.clone()
    assert float(running) == pytest.approx(0.1 * 6 + 0.9 * 8)
    quantizer.disable_observer()
    quantizer(x * 100)
    assert torch.equal(quantizer.frac_len, running)
    quantizer.disable_fake_quant()
    assert torch.equal(quantizer(x), x)
    other = FixedPointFakeQuantize(signed=False)
    other.load_state_dict(quantizer.state_dict())
    assert other.has_qparams()
    assert torch.equal(other.frac_len, running)
    assert other.half().frac_len.dtype == torch.float64
    assert float(other.calculate_qparams().scale) == 2.0**-8


def test_per_channel_quantizer_takes_its_channels_from_the_first_tensor():
    quantizer = FixedPointFakeQuantize(axis=1, momentum=1.0)
    x = torch.randn(8, 3, 2) * torch.tensor([0.1, 1.0, 30.0]).view(1, 3, 1)
    quantizer(x)
    assert quantizer.frac_len.tolist() == [float(grid_search(x[:, c], True)) for c in range(3)]
    empty = FixedPointFakeQuantize(axis=1)
    empty.load_state_dict(quantizer.state_dict())
    assert torch.equal(empty.eval()(x), quantizer.eval()(x))
    with pytest.raises(ValueError, match="3 channels"):
        quantizer.train()(torch.ones(2, 4))
