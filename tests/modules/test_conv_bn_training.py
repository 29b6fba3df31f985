"""Training with folded BatchNorms: transposed layers written out, γ that starts at zero, the same bits twice."""

import copy

import pytest
import torch
import torch.nn.functional as F
from test_conv_bn_modes import MODES
from torch import nn

import tritonq
from conv_bn_cases import FLOAT_OUT, assert_same_training, inputs, pair, randomise
from tolerances import FLOAT64_LAYERS, assert_close
from written_quantizers import WrittenWeight, straight_through


class WrittenTransposed(nn.Module):
    """docs/conv-bn.md for a transposed convolution, whose out channels lie on the second axis of its weight."""

    def __init__(self, layer, mode):
        super().__init__()
        self.weight, self.bias = nn.Parameter(layer.weight.detach().clone()), nn.Parameter(layer.bias.detach().clone())
        self.bn = randomise(nn.BatchNorm2d(layer.out_channels).double())
        self.groups, self.mode, self.quantizer = layer.groups, mode, WrittenWeight()

    def swapped(self, weight):
        parts = weight.chunk(self.groups)
        return torch.cat([part.transpose(0, 1) for part in parts])

    def quantized(self, scale):
        return self.swapped(self.quantizer(self.swapped(self.weight) * scale.view(-1, 1, 1, 1)))

    def conv(self, x, weight):
        return F.conv_transpose2d(x, weight, None, 2, groups=self.groups)

    def forward(self, x):
        bn, (b, along) = self.bn, (self.bias, (1, -1, 1, 1))
        frozen = not self.training or self.mode == "frozen"
        if self.mode == "approximate" and not frozen:
            scale = bn.weight / torch.sqrt(bn.running_var + bn.eps)
            return bn(self.conv(x, self.quantized(scale)) / scale.view(along) + b.view(along))
        mean, var = bn.running_mean, bn.running_var
        if not frozen:
            c = self.conv(x, self.weight) + b.view(along)
            mean, var = c.mean((0, 2, 3)), c.var((0, 2, 3), unbiased=False)
            with torch.no_grad():
                bn(c)
        scale = bn.weight / torch.sqrt(var + bn.eps)
        folded = bn.weight / torch.sqrt(bn.running_var + bn.eps) if self.mode == "corrected" else scale
        y = self.conv(x, self.quantized(folded)) * (scale / folded).view(along)
        return y + (bn.bias + scale * (b - mean)).view(along)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("mode", [*MODES, "frozen"])
def test_transposed_convolutions_equal_their_formulas(mode, groups):
    torch.manual_seed(0)
    arguments = {"in_channels": 4, "out_channels": 6, "kernel_size": 3, "stride": 2, "groups": groups}
    given = {} if mode == "frozen" else {"mode": mode}
    ours = tritonq.nn.ConvTransposeBn2d(**arguments, qconfig=FLOAT_OUT, **given).double()
    written = WrittenTransposed(ours, mode)
    ours.load_state_dict(written.state_dict(), strict=False)
    if mode == "frozen":
        ours.freeze_bn_stats()
    assert_same_training(written, ours, [torch.randn(2, 4, 5, 4, dtype=torch.float64) for _ in range(3)])


@pytest.mark.parametrize("mode", ["exact", "corrected"])
def test_cumulative_average_in_the_modes_that_run_twice(mode):
    _, ours = pair("2d", relu=False, momentum=None, qconfig=FLOAT_OUT, mode=mode)
    bn = nn.BatchNorm2d(6, momentum=None).double()
    bn.load_state_dict(ours.bn.state_dict())
    for x in inputs("2d"):
        bn(F.conv2d(x, ours.weight, ours.bias, padding=1))
        ours(x)
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        assert_close(getattr(ours.bn, name), getattr(bn, name), FLOAT64_LAYERS)


@pytest.mark.parametrize("geometry", ["2d", "depthwise", "1d"])
@pytest.mark.parametrize("relu", [False, True])
def test_the_composition_equals_the_operator(geometry, relu):
    """Where someone listens to the BatchNorm, the approximate mode is composed of modules; γ is zero in one channel."""
    _, ours = pair(geometry, relu=relu, qconfig=tritonq.get_qconfig("tensorrt"))
    _, composed = pair(geometry, relu=relu, qconfig=tritonq.get_qconfig("tensorrt"))
    calls = []
    composed.bn.register_forward_hook(lambda *_: calls.append(1))
    for layer in (ours, composed):
        with torch.no_grad():
            layer.bn.weight[1] = 0
    assert_same_training(composed, ours, inputs(geometry))
    assert len(calls) == 3


def test_frozen_training_quantizes_the_bias():
    grid = tritonq.get_qconfig("tensorrt").activation()
    grid(torch.tensor([-2.0, 2.0]))
    _, ours = pair("2d", relu=False)
    ours.freeze_bn_stats().set_input_quantizer(grid)
    bn, quantizer = ours.bn, WrittenWeight()
    for x in inputs("2d"):
        scale = bn.weight / torch.sqrt(bn.running_var + bn.eps)
        weight = quantizer(ours.weight * scale.view(-1, 1, 1, 1))
        bias = bn.bias + scale * (ours.bias - bn.running_mean)
        steps = (grid.scale * quantizer.scale).double()
        rounded = straight_through(bias, (bias / steps).round(), -(2**31), 2**31 - 1, steps)
        y = ours(x)
        assert_close(y, F.conv2d(x, weight, rounded, padding=1), FLOAT64_LAYERS)
        assert (rounded - bias).abs().max() > 1e-6, "a float bias would pass this test too"
        found = torch.autograd.grad(y.square().sum(), (ours.bias, bn.bias, bn.weight))
        z = F.conv2d(x, weight, rounded, padding=1)
        expected = torch.autograd.grad(z.square().sum(), (ours.bias, bn.bias, bn.weight))
        for mine, other in zip(found, expected, strict=True):
            assert_close(mine, other, FLOAT64_LAYERS)


class Residual(nn.Module):
    """Two blocks whose last BatchNorm starts at γ = 0, as torchvision's ``zero_init_residual``."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.blocks = nn.ModuleList(
            nn.Sequential(
                *(nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()),
                *(nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)),
            )
            for _ in range(2)
        )
        for block in self.blocks:
            nn.init.zeros_(block[-1].weight)
        self.head = nn.Linear(8 * 36, 4)

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = F.relu(x + block(x))
        return self.head(x.flatten(1))


def trained(mode, steps=12):
    """A model with residual blocks after some steps, the loss of each, and the layers whose γ started at zero.

    With each of these layers, the largest gradient that its weight got.
    """
    torch.manual_seed(0)
    target = torch.arange(16) % 4
    x = torch.randn(16, 3, 6, 6) + torch.randn(4, 3, 6, 6)[target]
    qat = tritonq.prepare_qat(Residual().train(), example_inputs=(x,))
    layers = [m for m in qat.modules() if isinstance(m, tritonq.nn.ConvBn2d)]
    ends = [layer for layer in layers if bool((layer.bn.weight == 0).all())]
    for layer in layers:
        layer.mode = mode
    optimizer = torch.optim.SGD(qat.parameters(), lr=0.01, momentum=0.9)
    losses, largest = [], dict.fromkeys(ends, 0.0)
    for _ in range(steps):
        loss = F.cross_entropy(qat(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
        largest = {layer: max(size, float(layer.weight.grad.abs().max())) for layer, size in largest.items()}
    return qat, losses, largest


@pytest.mark.parametrize("mode", MODES)
def test_zero_initialised_residual_blocks_train_and_two_runs_give_the_same_bits(mode):
    model, losses, largest = trained(mode)
    assert len(largest) == 2
    for layer, size in largest.items():
        assert (layer.bn.weight != 0).all(), "gamma stays at zero"
        assert layer.bn.weight.abs().max() > 1e-3
        assert size > 0, "the weight behind gamma learns nothing"
    assert losses[-1] < 0.7 * losses[0]
    again, losses_again, _ = trained(mode)
    assert losses == losses_again
    for (name, value), other in zip(model.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.isfinite(value.float()).all() or "val" in name, name
        assert torch.equal(value, other), name
    for one, two in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(one.grad, two.grad)


def test_autocast_leaves_float64_alone():
    """As torch's convolutions do."""
    layer = tritonq.nn.ConvBn2d(3, 4, 3, qconfig=tritonq.get_qconfig()).double()
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    expected = copy.deepcopy(layer)(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(x), expected)
