"""Learned scales against the formulas, value by value in float64, and torch's operators where those are right."""

import math

import pytest
import torch

from grids import grid_of
from op_tester import LAYOUTS, OpTester, axes, operators
from tolerances import FLOAT32, FLOAT64, SUMS, assert_close, assert_matches
from tritonq.functional import clipped_quantize, fake_quantize_learnable, trained_threshold_quantize
from tritonq.reference import learned_scale as reference

GRIDS = [(-8, 7), (-127, 127), (0, 3), (-2, 1), (0, 1)]


def away(v):
    return math.copysign(math.floor(abs(v) + 0.5), v)


def torch_lsq(x, s, z, low, high):
    """(y, dx, ds, dz) per unit of dy."""
    z = min(max(round(z), low), high)
    code = round(x / s) + z
    if low <= code <= high:
        return (code - z) * s, 1, code - z - x / s, 0
    code = min(max(code, low), high)
    return (code - z) * s, 0, code - z, -s


def megengine_lsq(x, step, z, low, high):
    s = abs(step) + 1e-5
    sign = math.copysign(1, step)
    v = x / s + z
    if v < low or v > high:
        bound = low if v < low else high
        return (bound - z) * s, 0, bound * sign, 0
    return (away(v) - z) * s, 1, (away(v) - v) * sign, 0


def tqt(x, t, z, low, high):
    s = 2.0**t
    v = x / s
    code = min(max(away(v), low), high)
    inside = low - 0.5 <= v <= high + 0.5
    return code * s, int(inside), s * math.log(2) * (code - v if inside else code), 0


def pact(x, alpha, z, low, high):
    s = alpha / high
    return round(min(max(x, 0), alpha) / s) * s, int(0 <= x < alpha), int(x >= alpha), 0


def run(method, x, parameter, zero_point, grid, axis):
    if method == "tqt":
        return trained_threshold_quantize(x, parameter, *grid, axis=axis)
    if method == "pact":
        return clipped_quantize(x, parameter, grid[1], axis=axis)
    return fake_quantize_learnable(x, parameter, zero_point, *grid, axis=axis, method=method)


FORMULAS = {"torch": torch_lsq, "megengine": megengine_lsq, "tqt": tqt, "pact": pact}


@pytest.mark.parametrize("axis", [None, 0, 2, -2])
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("method", FORMULAS)
def test_value_by_value(method, grid, axis):
    if method == "pact" and grid[0] != 0:
        pytest.skip("clipping starts at 0")
    torch.manual_seed(1)
    x = torch.randn(3, 4, 5, dtype=torch.float64) * (grid[1] - grid[0]) / 3
    channels = 1 if axis is None else x.shape[axis]
    parameter = torch.rand(channels, dtype=torch.float64) + 0.3
    shift = torch.randint(grid[0], grid[1] + 1, (channels,))
    if method == "torch":
        shift = shift + 0.9 * torch.rand(channels, dtype=torch.float64) - 0.45
    if method == "pact":
        parameter = parameter * grid[1]
    if method == "megengine":
        parameter[0] *= -1
    x.requires_grad_()
    parameter.requires_grad_()
    leaves = [x, parameter]
    if shift.is_floating_point():
        leaves.append(shift.requires_grad_())
    dy = torch.randn_like(x)
    y = run(method, x, parameter, shift, grid, axis)
    gradients = torch.autograd.grad(y, leaves, dy)

    expected = [torch.zeros_like(leaf) for leaf in (y, x, parameter, parameter)]
    for index in torch.cartesian_prod(*(torch.arange(n) for n in x.shape)).tolist():
        index = tuple(index)
        channel = 0 if axis is None else index[axis]
        scalars = float(x[index]), float(parameter[channel]), float(shift[channel])
        value, dx, dparameter, dshift = FORMULAS[method](*scalars, *grid)
        expected[0][index] = value
        expected[1][index] = dx * dy[index]
        expected[2][channel] += dparameter * dy[index]
        expected[3][channel] += dshift * dy[index]
    for got, wanted in zip((y, *gradients), expected, strict=False):
        assert_close(got, wanted, FLOAT64)


@pytest.mark.parametrize("axis", [None, 1])
def test_as_torchs_operators(axis):
    """At zero points from 0 up: at negative ones torch's per-tensor backward uses another z than its forward."""
    torch.manual_seed(2)
    x, dy = torch.randn(6, 5, 7), torch.randn(6, 5, 7)
    channels = 1 if axis is None else 5
    scale, shift = torch.rand(channels) * 0.2 + 0.05, torch.randint(0, 8, (channels,)).float()
    results = []
    for ours in (True, False):
        leaves = [leaf.clone().requires_grad_() for leaf in (x, scale, shift)]
        if ours:
            y = fake_quantize_learnable(*leaves, -8, 7, axis, 0.3)
        elif axis is None:
            y = torch._fake_quantize_learnable_per_tensor_affine(*leaves, -8, 7, 0.3)
        else:
            y = torch._fake_quantize_learnable_per_channel_affine(*leaves, axis, -8, 7, 0.3)
        results.append((y, *torch.autograd.grad(y, leaves, dy)))
    for got, wanted in zip(*results, strict=True):
        assert_close(got, wanted, SUMS, size=0.1)
    assert torch.equal(results[0][0], results[1][0])


def test_saturated_values_by_finite_differences():
    """Where every value saturates, y is a smooth function of the parameter."""
    x = torch.tensor([50.0, -60.0, 70.0], dtype=torch.float64)
    for method, value in (("torch", 0.5), ("tqt", -1.0), ("megengine", 0.5), ("pact", 2.0)):
        parameter = torch.tensor([value], dtype=torch.float64, requires_grad=True)
        grid = (0, 7) if method == "pact" else (-8, 7)

        def weighted(p, method=method, grid=grid):
            y = run(method, x, p, 0, grid, None)
            return (y * torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)).sum()

        (gradient,) = torch.autograd.grad(weighted(parameter), parameter)
        with torch.no_grad():
            slope = (weighted(parameter + 1e-5) - weighted(parameter - 1e-5)) / 2e-5
        assert float(gradient) == pytest.approx(float(slope), rel=FLOAT32.rtol)


def test_gradient_factor():
    for shift in (0, torch.tensor([0.0], requires_grad=True)):
        gradients = []
        for factor in (1.0, 0.25):
            scale = torch.tensor([0.3], requires_grad=True)
            leaves = [scale, *([shift] if isinstance(shift, torch.Tensor) else [])]
            y = fake_quantize_learnable(torch.linspace(-9, 9, 50), scale, shift, -8, 7, None, factor)
            gradients.append(torch.autograd.grad(y.sum(), leaves))
        for full, part in zip(*gradients, strict=True):
            torch.testing.assert_close(part, full / 4)


@pytest.mark.parametrize("method", FORMULAS)
def test_what_is_not_finite(method):
    x = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.2], requires_grad=True)
    parameter = torch.tensor([0.5], requires_grad=True)
    y = run(method, x, parameter, 0, (0, 3) if method == "pact" else (-8, 7), None)
    y.nan_to_num().sum().backward()
    assert y[0].isnan()
    assert y[1:].isfinite().all()
    assert x.grad.tolist() == [0, 0, 0, 1]
    assert parameter.grad.isfinite().all()


def learned_grid(scale, zero_point, low, high, axis, method, enabled=None):
    """A grid that rounds as the method does."""
    rounding = "half_even" if method in ("torch", "pact") else "half_away"
    return grid_of(scale, zero_point, low, high, axis, rounding, enabled)


@pytest.mark.parametrize("method", FORMULAS)
def test_nan_counts_for_no_gradient(method):
    x, dy = torch.tensor([0.2, 9.0, -9.0, 1.3, torch.nan]), torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0])
    zero_point = torch.tensor([1], dtype=torch.int32) if method in ("torch", "megengine") else None
    grid = learned_grid(torch.tensor([0.5]), zero_point, 0 if method == "pact" else -8, 7, None, method)
    dirty = reference.learned_fake_quantize_backward(dy, x, grid, method)
    clean = reference.learned_fake_quantize_backward(dy[:4], x[:4], grid, method)
    assert torch.equal(dirty[0], torch.cat([clean[0], torch.zeros(1)]))
    assert torch.equal(dirty[1], clean[1])
    assert torch.equal(dirty[2], clean[2])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_computes_in_float32(dtype):
    x = torch.randn(200).to(dtype)
    scale = torch.tensor([0.11], requires_grad=True)
    y = fake_quantize_learnable(x, scale, 0, -8, 7)
    wide = fake_quantize_learnable(x.float(), scale, 0, -8, 7)
    assert torch.equal(y, wide.to(dtype))
    (narrow,) = torch.autograd.grad(y.float().sum(), scale)
    torch.testing.assert_close(narrow, torch.autograd.grad(wide.sum(), scale)[0])


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x, s: fake_quantize_learnable(x.int(), s, 0, -8, 7), TypeError, "x must be"),
        (lambda x, s: fake_quantize_learnable(x, 0.1, 0, -8, 7), TypeError, "scale must be a torch.Tensor"),
        (lambda x, s: fake_quantize_learnable(x, -s, 0, -8, 7), ValueError, "positive and finite"),
        (lambda x, s: fake_quantize_learnable(x, s, 9, -8, 7), ValueError, "zero_point must be in"),
        (lambda x, s: fake_quantize_learnable(x, s, 0, 7, -8), ValueError, "quant_min"),
        (lambda x, s: fake_quantize_learnable(x, s, 0, -8, 7, 0), ValueError, "shape"),
        (lambda x, s: fake_quantize_learnable(x, s, torch.zeros(2), -8, 7), ValueError, "one element"),
        (lambda x, s: fake_quantize_learnable(x, s, 0, -8, 7, method="lsq"), ValueError, "unknown method 'lsq'"),
        (lambda x, s: fake_quantize_learnable(x, s * math.nan, 0, -8, 7, method="megengine"), ValueError, "finite"),
        (lambda x, s: trained_threshold_quantize(x, s * math.inf, -8, 7), ValueError, "must be finite"),
        (lambda x, s: fake_quantize_learnable(x, 0.1, 0, -8, 7, 0, group_size=3), TypeError, "scale must be a tensor"),
        (lambda x, s: trained_threshold_quantize(x, s * 200, -8, 7), ValueError, r"2 \*\* log2_threshold must be"),
        (lambda x, s: trained_threshold_quantize(x, s * -200, -8, 7), ValueError, r"2 \*\* log2_threshold must be"),
        (lambda x, s: trained_threshold_quantize(x, s.expand(2), -8, 7), ValueError, "log2_threshold must have one"),
        (lambda x, s: clipped_quantize(x, s * 0, 15), ValueError, "alpha must be positive and finite"),
        (lambda x, s: clipped_quantize(x, s, 0), ValueError, "quant_min must be below quant_max"),
    ],
)
def test_bad_arguments(call, error, message):
    with pytest.raises(error, match=message):
        call(torch.ones(3), torch.ones(1))


class TestKernels(OpTester):
    @pytest.mark.parametrize(
        ("method", "layout"),
        [(method, "odd") for method in FORMULAS]
        + [("torch", layout) for layout in ("0-d", "empty", "empty channels", "channels_last", "sliced", "copied")],
    )
    def test_forward_and_backward(self, method, layout, use, device):
        x = LAYOUTS[layout]()
        codes = (0, 7) if method == "pact" else (-8, 7)
        for axis in axes(x)[:3]:
            channels = 1 if axis is None else x.shape[axis]
            generator = torch.Generator().manual_seed(5)
            parameter = torch.rand(channels, generator=generator) + 0.3
            shift = torch.randint(0, 5, (channels,), generator=generator, dtype=torch.int32)
            dy = torch.randn(x.shape, generator=generator)
            for zero_point in (None, shift) if method in ("torch", "megengine") else (None,):
                there = learned_grid(parameter, zero_point, *codes, axis, method)
                here = learned_grid(
                    *(None if a is None else a.to(device) for a in (parameter, zero_point)), *codes, axis, method
                )
                ops = operators("learned_scale", use)
                y = ops.learned_fake_quantize(x.to(device), here, method)
                assert_matches(y.cpu(), reference.learned_fake_quantize(x, there, method), "fake_quant")
                found = ops.learned_fake_quantize_backward(dy.to(device), x.to(device), here, method)
                expected = reference.learned_fake_quantize_backward(dy, x, there, method)
                assert_matches(found[0].cpu(), expected[0], "grad")
                for actual, wanted in zip(found[1:], expected[1:], strict=True):
                    assert_matches(actual.cpu(), wanted, "scale_grad")

    @pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
    def test_what_is_not_finite_and_switches(self, dtype, use, device):
        x = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.2, 60.0] * 15).to(dtype)
        dy = torch.linspace(-1, 1, len(x)).to(dtype)
        for on in (None, 0, 1):
            active = None if on is None else torch.full((1,), on, dtype=torch.uint8)
            for method in FORMULAS:
                zero_point = torch.tensor([1], dtype=torch.int32) if method in ("torch", "megengine") else None
                tensors = (torch.tensor([0.5]), zero_point, active)
                there, here = (
                    learned_grid(scale, zero, 0 if method == "pact" else -8, 7, None, method, enabled)
                    for scale, zero, enabled in (tensors, [None if t is None else t.to(device) for t in tensors])
                )
                found = operators("learned_scale", use).learned_fake_quantize_backward(
                    dy.to(device), x.to(device), here, method
                )
                expected = reference.learned_fake_quantize_backward(dy, x, there, method)
                assert_matches(found[0].cpu(), expected[0], "grad")
                for actual, wanted in zip(found[1:], expected[1:], strict=True):
                    assert_matches(actual.cpu(), wanted, "scale_grad")

    @pytest.mark.parametrize(
        ("method", "values", "passes"),
        [
            ("pact", [-0.25, 0.0, 1.75, 2.0, 9.0], [0, 1, 1, 0, 0]),
            ("megengine", [-4.25, -4.0, 0.125, 3.5, 3.75], [0, 1, 1, 1, 0]),
            ("tqt", [-4.5, -4.25, 0.125, 3.75, 4.0], [0, 1, 1, 1, 0]),
        ],
    )
    def test_gradient_at_the_ends(self, method, values, passes, use, device):
        """The last values that pass, on both sides, and the first that don't."""
        low, high, parameter = (0, 7, 2.0) if method == "pact" else (-8, 7, 0.5)
        x, dy = torch.tensor(values), torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0])
        v = x / parameter
        rounded = torch.sign(v) * (v.abs() + 0.5).floor()
        inside = torch.tensor(passes) == 1
        code = (v if method == "megengine" else rounded).clamp(low, high)
        terms = (
            (x >= parameter).float() if method == "pact" else torch.where(inside, rounded.clamp(low, high) - v, code)
        )
        grid = learned_grid(torch.tensor([parameter], device=device), None, low, high, None, method)
        found = operators("learned_scale", use).learned_fake_quantize_backward(
            dy.to(device), x.to(device), grid, method
        )
        assert torch.equal(found[0].cpu(), dy * inside)
        assert float(found[1]) == float((terms * dy).sum())

    @pytest.mark.parametrize("axis", [None, 0])
    def test_many_shares(self, axis, use, device):
        """The kernel that adds their sums takes several rounds; whole eighths are exact in any order."""
        x, dy = (torch.randint(-40, 40, (2, 5000), generator=torch.Generator().manual_seed(n)) / 8 for n in (0, 1))
        channels = 1 if axis is None else 2
        scale, zero_point = torch.full((channels,), 0.5), torch.ones(channels, dtype=torch.int32)
        there, here = (
            learned_grid(scale.to(where), zero_point.to(where), -8, 7, axis, "torch") for where in ("cpu", device)
        )
        found = operators("learned_scale", use).learned_fake_quantize_backward(
            dy.to(device), x.to(device), here, "torch"
        )
        for ours, theirs in zip(found, reference.learned_fake_quantize_backward(dy, x, there, "torch"), strict=True):
            assert torch.equal(ours.cpu(), theirs)

    def test_torch_gradient_with_ties_away(self, use, device):
        """Ties among inner codes, between the outermost code and what is clipped, and beside a zero point."""
        x = torch.arange(-21, 20) * 0.25
        dy = torch.linspace(-1, 1, len(x))
        zero_point = torch.tensor([2], dtype=torch.int32)
        there, here = (
            grid_of(torch.tensor([0.5], device=place), zero_point.to(place), -8, 7, None, "half_away")
            for place in ("cpu", device)
        )
        v = x / 0.5
        code = torch.sign(v) * (v.abs() + 0.5).floor() + 2
        inside = (code >= -8) & (code <= 7)
        ops = operators("learned_scale", use)
        y = ops.learned_fake_quantize(x.to(device), here, "torch").cpu()
        assert torch.equal(y, (code.clamp(-8, 7) - 2) * 0.5)
        found = [grad.cpu() for grad in ops.learned_fake_quantize_backward(dy.to(device), x.to(device), here, "torch")]
        assert torch.equal(found[0], torch.where(inside, dy, 0))
        terms = torch.where(inside, code - 2 - v, code.clamp(-8, 7) - 2)
        assert_matches(found[1], (terms * dy).sum().view(1), "scale_grad")
        expected = reference.learned_fake_quantize_backward(dy, x, there, "torch")
        for actual, wanted in zip(found[1:], expected[1:], strict=True):
            assert_matches(actual, wanted, "scale_grad")

    def test_same_input_same_bits(self, use, device):
        x, dy = torch.randn(3, 7, 31, device=device), torch.randn(3, 7, 31, device=device)
        for axis, channels in ((None, 1), (1, 7)):
            scale = torch.full((channels,), 0.1, device=device)
            ops = operators("learned_scale", use)
            first, again = (
                ops.learned_fake_quantize_backward(dy, x, learned_grid(scale, None, -8, 7, axis, "torch"), "torch")
                for _ in range(2)
            )
            assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
