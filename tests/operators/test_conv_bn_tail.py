"""The tail of convolution and BatchNorm on every backend, against the PyTorch path and against float64."""

from __future__ import annotations

import math
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor

from op_tester import OpTester, few_programs, memory_formats, operators
from quantizer_states import NO_QUANTIZER, assert_same_state, moved, quantizer_state
from tolerances import AFFINE_SUMS, FLOAT32, HALF, LONG_SUMS, SUMS, assert_close
from tritonq.grid import Grid
from tritonq.quantized_type import QINT4, QINT8, QUINT8, QuantizedType
from tritonq.reference import conv_bn as reference
from tritonq.reference.conv_bn import BatchNormState
from tritonq.reference.min_max import min_max

# Elements per channel are multiples of four.
SHAPES = [(4, 5, 7, 3), (2, 3, 130), (8, 6), (1, 7, 4, 9), (16, 1, 3, 1), (2, 3, 2, 3, 4)]
# Rows that begin anywhere, in planes that begin at multiples of 8 elements or of 4; the last two have no backward.
SHAPES += [(4, 8, 7, 7), (4, 4, 3, 3), (1, 8, 4, 5), (4, 37, 1, 1), (4, 2, 9, 8)]
QTYPES = {"float": None, "int8": QINT8, "uint8": QUINT8, "int4": QINT4}
# A grid, and the upper bound of the ReLU before it: none, a plain one, and bounds below and beyond the last code.
ENDS = [("float", math.inf), ("float", 1.5), ("int8", None), ("int8", 2.5), ("uint8", math.inf)]
ENDS += [("int4", None), ("int4", 9.0)]


def exact_input(shape: tuple[int, ...], offset: float = 0.0) -> Tensor:
    """Each channel holds -3, -1, 1, 3 equally often, shuffled, plus a whole offset: its variance is exactly 5."""
    generator = torch.Generator().manual_seed(3)
    count = math.prod(shape) // shape[1]
    values = torch.tensor([-3.0, -1.0, 1.0, 3.0]).repeat(count // 4)
    rows = torch.stack([values[torch.randperm(count, generator=generator)] + offset + ch for ch in range(shape[1])])
    return rows.view(shape[1], shape[0], *shape[2:]).transpose(0, 1).contiguous()


class Problem:
    """Vectors and buffers of one call; two of them start alike."""

    def __init__(self, channels: int, *, exact: bool, device: str, affine: bool = True, bias: bool = True) -> None:
        generator = torch.Generator().manual_seed(4)
        sign = torch.tensor([1.0, -1.0]).repeat(channels)[:channels]
        halves = torch.randint(1, 5, (channels,), generator=generator) / 2
        vectors = halves if exact else torch.rand(channels, generator=generator) + 0.5
        self.ratio = (sign if exact else sign * vectors).to(device)
        self.gamma = (sign * vectors).to(device) if affine else None
        self.beta = (vectors.flip(0) - 1).to(device) if affine else None
        self.bias = (vectors - 1).to(device) if bias else None
        # 5 + 11 is the square of 4: every number of the exact problem is a short binary fraction.
        eps = 11.0 if exact else 1e-5
        self.norm = BatchNormState(vectors.to(device).clone(), vectors.to(device).clone(), 0.25, eps)

    def arguments(self) -> tuple[object, ...]:
        return self.ratio, self.gamma, self.beta, self.bias, self.norm


def assert_nearly_codes(actual: Tensor, expected: Tensor, scale: float) -> None:
    """Equal but for a few values within rounding of a tie, which land on the next code."""
    difference = (actual.float() - expected.float()).abs()
    assert float(difference.max()) <= 1.001 * scale + 1e-5 + 0.01 * float(expected.abs().max())
    assert float((difference > 1e-5 + 0.01 * expected.float().abs()).float().mean()) < 0.02


def assert_codes_but_for_ties(actual: Tensor, expected: Tensor, exact: Tensor, scale: float) -> None:
    """Equal, or one code apart where ``exact`` (not rounded) is so near a tie that one rounding more moves it over."""
    difference = (actual - expected).abs()
    assert float(difference.max()) <= 1.001 * scale
    is_tie = ((exact / scale).remainder(1) - 0.5).abs() < 1e-4
    assert bool((is_tie | (difference < 1e-3 * scale)).all())


class TestForward(OpTester):
    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    @pytest.mark.parametrize(("grid", "ceiling"), ENDS)
    def test_apply_is_exact(
        self, shape: tuple[int, ...], grid: str, ceiling: float | None, use: str, device: str
    ) -> None:
        """Slopes and shifts are short binary fractions, so that one rounding and two are the same; ties and rails."""
        for memory_format in memory_formats(shape):
            c = exact_input(shape, 1000.0).to(memory_format=memory_format)
            slope = torch.tensor([0.25, 0.5, 2.0]).repeat(shape[1])[: shape[1]]
            shift = -slope * (torch.arange(float(shape[1])) + 1000) + 0.5
            state = None if QTYPES[grid] is None else quantizer_state(QTYPES[grid]).grid
            given = (c.to(device), slope.to(device), shift.to(device), None if state is None else moved(state, device))
            y = operators("conv_bn", use).apply(*given, ceiling)
            z = reference.apply(c, slope, shift, state, ceiling)
            assert torch.equal(y.cpu(), z)
            along = (1, -1, *[1] * (len(shape) - 2))
            plain = c.double() * slope.view(along).double() + shift.view(along).double()
            plain = plain if ceiling is None else plain.clamp(0, ceiling)
            if state is not None:
                plain = plain.round().clamp(state.qtype.quant_min, state.qtype.quant_max)
            assert torch.equal(z.double(), plain)
            assert y.is_contiguous(memory_format=memory_format)

    @pytest.mark.parametrize("ceiling", [None, math.inf, 2.5])
    @pytest.mark.parametrize("on", [True, False])
    @pytest.mark.parametrize(
        ("low", "high", "zero"), [(0, 15, 9), (-8, 7, -8), (-(2**22), 2**22 - 1, 5)], ids=["mid", "end", "wide"]
    )
    def test_apply_counts_from_the_zero_point(
        self, low: int, high: int, zero: int, on: bool, ceiling: float | None, use: str, device: str
    ) -> None:
        """By the definition, in float64: of few codes, of more than are rounded by adding, and switched off."""
        c = exact_input((2, 3, 4, 4), 1000.0)
        slope, shift = torch.tensor([0.25, 2.0, 8.0]), torch.tensor([-250.0, -2002.0, -8016.0])
        number = torch.tensor([zero], dtype=torch.int32)
        grid = Grid(
            torch.tensor([0.5]), number, QuantizedType(low, high, symmetric=False), torch.tensor([int(on)]).byte()
        )
        y = operators("conv_bn", use).apply(
            c.to(device), slope.to(device), shift.to(device), moved(grid, device), ceiling
        )
        plain = c.double() * slope.view(1, 3, 1, 1).double() + shift.view(1, 3, 1, 1).double()
        plain = plain if ceiling is None else plain.clamp(0, ceiling)
        rounded = ((plain / 0.5).round() + zero).clamp(low, high).sub(zero) * 0.5
        assert torch.equal(y.cpu().double(), rounded if on else plain)

    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    @pytest.mark.parametrize("offset", [0.0, 1000.0])
    def test_known_statistics(self, shape: tuple[int, ...], offset: float, use: str, device: str) -> None:
        """Mean and variance are whole numbers, at an offset too, where squares of float32 sums would lose them."""
        for memory_format in memory_formats(shape):
            c = exact_input(shape, offset).to(device=device, memory_format=memory_format)
            ours, theirs = (Problem(shape[1], exact=True, device=device) for _ in range(2))
            mine, other = quantizer_state(QUINT8, device=device), quantizer_state(QUINT8, device=device)
            for _ in range(2):
                y, vectors, frozen = operators("conv_bn", use).forward(c, *ours.arguments(), *mine, math.inf)
                z, _, _ = reference.forward(c, *theirs.arguments(), *other, math.inf)
            mean = torch.arange(float(shape[1])) + offset
            assert_close(vectors[0].cpu(), mean, FLOAT32)
            assert_close(vectors[1].cpu(), torch.full((shape[1],), 0.25), FLOAT32, size=0)
            exact, _, _ = reference.forward(
                c, *Problem(shape[1], exact=True, device=device).arguments(), None, None, math.inf
            )
            assert_codes_but_for_ties(y.cpu(), z.cpu(), exact.cpu(), float(other.grid.scale))
            assert_close(ours.norm.running_mean, theirs.norm.running_mean, FLOAT32)
            assert_close(ours.norm.running_var, theirs.norm.running_var, FLOAT32, size=0)
            assert_close(mine.grid.scale, other.grid.scale, SUMS, size=0)
            assert torch.equal(frozen.scale, mine.grid.scale)
            assert torch.equal(frozen.zero_point, mine.grid.zero_point)

    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
    def test_random_numbers(self, shape: tuple[int, ...], dtype: torch.dtype, use: str, device: str) -> None:
        for memory_format in memory_formats(shape):
            c = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 3 + 5
            c = c.to(dtype=dtype, memory_format=memory_format)
            for affine, ceiling in ((True, math.inf), (False, 1.5)):
                ours = Problem(shape[1], exact=False, device=device, affine=affine, bias=affine)
                theirs = Problem(shape[1], exact=False, device="cpu", affine=affine, bias=affine)
                mine, other = quantizer_state(QINT8, device=device), quantizer_state(QINT8)
                ops = operators("conv_bn", use)
                y, vectors, _ = ops.forward(c.to(device), *ours.arguments(), *mine, ceiling)
                z, expected, _ = reference.forward(c, *theirs.arguments(), *other, ceiling)
                assert y.dtype == dtype
                assert_nearly_codes(y.cpu(), z, float(other.grid.scale))
                for name, a, b in zip(expected._fields, vectors, expected, strict=True):
                    assert_close(a.cpu(), b, AFFINE_SUMS, msg=name)
                assert_close(mine.grid.scale.cpu(), other.grid.scale, AFFINE_SUMS)
                assert_close(ours.norm.running_var.cpu(), theirs.norm.running_var, AFFINE_SUMS)

    @pytest.mark.parametrize("offset", [0.0, 1000.0, -1e5])
    def test_statistics_at_an_offset(self, offset: float, use: str, device: str) -> None:
        """Against float64, to what the input's own float32 resolution at that offset allows."""
        c = torch.randn(8, 5, 11, 13, generator=torch.Generator().manual_seed(0)) + offset
        problem = Problem(5, exact=False, device=device)
        _, vectors, _ = operators("conv_bn", use).forward(c.to(device), *problem.arguments(), None, None, None)
        mean = c.double().mean((0, 2, 3))
        var = c.double().var((0, 2, 3), unbiased=False)
        resolution = max(1e-6, abs(offset) * 2.0**-23)
        torch.testing.assert_close(vectors[0].cpu().double(), mean, rtol=0, atol=resolution)
        torch.testing.assert_close(
            vectors[1].cpu().double(),
            (var + 1e-5 * problem.ratio.cpu().double() ** 2).rsqrt(),
            rtol=max(3e-6, 10 * resolution**2),
            atol=0,
        )

    @pytest.mark.parametrize("ceiling", [None, math.inf, 1.5])
    @pytest.mark.parametrize("shape", [(4, 5, 7, 3), (8, 6)], ids=str)
    def test_range_is_that_of_the_output(
        self, shape: tuple[int, ...], ceiling: float | None, use: str, device: str
    ) -> None:
        """The range that follows from the channels' extremes is what observing the float output finds, bit for bit."""
        c = (torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 2 + 1).to(device)
        ops = operators("conv_bn", use)
        state = quantizer_state(QINT8, device=device, averaging=None)
        with few_programs() if use == "triton" else nullcontext():
            ops.forward(c, *Problem(shape[1], exact=False, device=device).arguments(), *state, ceiling)
            y, _, _ = ops.forward(c, *Problem(shape[1], exact=False, device=device).arguments(), None, None, ceiling)
        low, high, _ = min_max(y.cpu())
        assert float(state.statistics.min_val) == float(low)
        assert float(state.statistics.max_val) == float(high)

    @pytest.mark.parametrize(("beta", "expected"), [(-1.0, 0.0), (9.0, 2.5)])
    def test_range_of_one_value_is_clipped_too(self, beta: float, expected: float, use: str, device: str) -> None:
        """All outputs are β, below the ReLU's zero or above its bound."""
        one = torch.ones(1, device=device)
        norm = BatchNormState(one.clone(), one.clone(), 0.25, 1.0)
        state = quantizer_state(QINT8, device=device, averaging=None)
        c = torch.full((2, 1, 2, 4), 3.0, device=device)
        operators("conv_bn", use).forward(c, one, one, beta * one, None, norm, *state, 2.5)
        assert float(state.statistics.min_val) == float(state.statistics.max_val) == expected

    def test_switches(self, use: str, device: str) -> None:
        c = exact_input((4, 5, 4, 4)).to(device)
        ops = operators("conv_bn", use)
        plain, _, _ = ops.forward(c, *Problem(5, exact=True, device=device).arguments(), None, None, math.inf)
        cases = {
            "never observed": quantizer_state(QINT8, device=device, observing=False),
            "off": quantizer_state(QINT8, device=device, active=False),
        }
        for name, state in cases.items():
            y, _, frozen = ops.forward(c, *Problem(5, exact=True, device=device).arguments(), *state, math.inf)
            assert torch.equal(y, plain), name
            assert not bool(frozen.enabled), name
        assert float(cases["never observed"].statistics.min_val) == math.inf
        assert float(cases["off"].statistics.max_val) == float(plain.max())
        known = cases["never observed"].with_range(has_data=True)
        y, _, _ = ops.forward(c, *Problem(5, exact=True, device=device).arguments(), *known, math.inf)
        assert torch.equal(y, plain.round().clamp(0, 127))

    @pytest.mark.parametrize("bad", [math.nan, math.inf])
    def test_a_channel_that_is_not_finite_is_not_observed(self, bad: float, use: str, device: str) -> None:
        c = exact_input((4, 5, 4, 4))
        c[1, 2, 3, 0] = bad
        ours, theirs = quantizer_state(QINT8, device=device), quantizer_state(QINT8)
        y, _, _ = operators("conv_bn", use).forward(
            c.to(device), *Problem(5, exact=True, device=device).arguments(), *ours, None
        )
        z, _, _ = reference.forward(c, *Problem(5, exact=True, device="cpu").arguments(), *theirs, None)
        assert torch.equal(y.cpu().isnan(), z.isnan())
        assert bool(y[:, 2].isnan().all())
        assert_same_state(ours, theirs)
        assert int(ours.statistics.nonfinite_count) == 64

    def test_cumulative_average_and_half_precision_buffers(self, use: str, device: str) -> None:
        c = exact_input((4, 5, 4, 4)).to(device)
        problem = Problem(5, exact=True, device=device)
        norm = problem.norm._replace(
            running_mean=torch.zeros(5, dtype=torch.bfloat16, device=device),
            momentum=torch.tensor(0.5, dtype=torch.float64, device=device),
        )
        operators("conv_bn", use).forward(c, problem.ratio, None, None, None, norm, None, None, None)
        expected = torch.arange(5.0) / problem.ratio.cpu() / 2
        assert torch.equal(norm.running_mean.cpu().float(), expected)


# Shape and whether channels are next to each other: more than one block of tiles, the last one not full.
BLOCKS = {"columns": ((3, 2, 2500), False), "rows": ((3, 4, 21, 50), True), "outer": ((9, 40, 3), False)}
BLOCKS["channels"] = ((2, 140, 5, 7), True)


class TestBlocks(OpTester):
    @pytest.mark.parametrize("along", BLOCKS)
    def test_one_program_takes_several(self, along: str, use: str, device: str) -> None:
        shape, last = BLOCKS[along]
        c, dy = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0)).unbind(0)
        if last:
            c, dy = (x.to(memory_format=torch.channels_last) for x in (c, dy))
        ours, theirs = (Problem(shape[1], exact=False, device=where) for where in (device, "cpu"))
        with few_programs() if use == "triton" else nullcontext():
            ops = operators("conv_bn", use)
            y, vectors, _ = ops.forward(c.to(device), *ours.arguments(), *NO_QUANTIZER, math.inf)
            found = ops.backward(dy.to(device), c.to(device), reference.Normalization(*vectors), None, math.inf)
        z, expected, _ = reference.forward(c, *theirs.arguments(), *NO_QUANTIZER, math.inf)
        wanted = reference.backward(dy, c, expected, None, math.inf)
        for actual, other in zip((y, *vectors, *found), (z, *expected, *wanted), strict=True):
            # Sums of thousands of terms in another order.
            assert_close(actual.cpu(), other, LONG_SUMS)


class TestBackward(OpTester):
    @pytest.mark.parametrize("shape", SHAPES[:-2], ids=str)
    @pytest.mark.parametrize(("grid", "ceiling"), ENDS)
    @pytest.mark.parametrize("stretch", [0.5, 2.0])
    def test_equals_the_pytorch_path(
        self, shape: tuple[int, ...], grid: str, ceiling: float | None, stretch: float, use: str, device: str
    ) -> None:
        for memory_format in memory_formats(shape):
            c = exact_input(shape, 2.0).to(memory_format=memory_format)
            dy = torch.randn(shape, generator=torch.Generator().manual_seed(5))
            qtype = QTYPES[grid]
            other = NO_QUANTIZER if qtype is None else quantizer_state(qtype, averaging=None)
            _, vectors, frozen = reference.forward(
                c, *Problem(shape[1], exact=True, device="cpu").arguments(), *other, ceiling
            )
            if frozen is not None:  # another scale, so that either the last code or the ceiling is what clips
                frozen = frozen.with_scale(frozen.scale * stretch)
            expected = reference.backward(dy, c, vectors, frozen, ceiling)
            found = operators("conv_bn", use).backward(
                dy.to(device),
                c.to(device),
                reference.Normalization(*(v.to(device) for v in vectors)),
                None if frozen is None else moved(frozen, device),
                ceiling,
            )
            for actual, wanted in zip(found, expected, strict=True):
                assert_close(actual.cpu(), wanted, AFFINE_SUMS)
            assert found[0].is_contiguous(memory_format=memory_format)

    def test_an_infinite_value_passes_a_relu(self, use: str, device: str) -> None:
        """It is positive: of its channel, the sum of the unblocked gradient has it."""
        c, dy = torch.full((1, 2, 1, 4), 1.0, device=device), torch.tensor([1.0, 2.0, 4.0, 8.0], device=device)
        c[0, 1] = torch.tensor([torch.inf, -1.0, -torch.inf, 1.0])
        for ceiling, expected in ((math.inf, 9), (2.0, 8)):
            vectors = reference.Normalization(*(torch.ones(2, device=device) for _ in range(6)))
            vectors = vectors._replace(shift=torch.zeros(2, device=device))
            _, plain, _ = operators("conv_bn", use).backward(dy.expand_as(c), c, vectors, None, ceiling)
            assert plain.tolist() == [15, expected]

    def test_gradient_at_the_last_tie(self, use: str, device: str) -> None:
        """What rounds beyond the last code is blocked: below a ceiling of the same quotient, and in wide types."""
        ceiling = torch.tensor(1.9)
        below = torch.nextafter(ceiling, torch.tensor(0.0))
        scale = torch.tensor([1.2666666507720947])
        assert below * (1 / scale) == ceiling * (1 / scale) == 1.5
        ends = 2.0**22 - 1
        cases = [
            (QuantizedType(-2, 1), scale, float(ceiling), [float(below), 1.0, 1.8, 2.0], 6),
            (QuantizedType(-int(ends), int(ends)), torch.ones(1), None, [-ends - 0.5, -ends, ends, ends + 0.5], 6),
            (QuantizedType(-(2**21), 2**21), torch.ones(1), None, [-(2**21) - 0.5, 2**21 + 1, 2**21 + 0.5, 0], 13),
        ]
        dy = torch.tensor([1.0, 2.0, 4.0, 8.0], device=device).view(1, 1, 4)
        for qtype, unit, top, values, expected in cases:
            vectors = reference.Normalization(*(torch.ones(1, device=device) for _ in range(6)))
            vectors = vectors._replace(shift=torch.zeros(1, device=device))
            c, grid = torch.tensor(values, device=device).view(1, 1, 4), Grid(unit.to(device), None, qtype)
            _, plain, _ = operators("conv_bn", use).backward(dy, c, vectors, grid, top)
            assert plain.tolist() == [expected], qtype

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_low_precision(self, dtype: torch.dtype, use: str, device: str) -> None:
        c = exact_input((4, 5, 4, 4)).to(dtype)
        dy = torch.randn(c.shape, generator=torch.Generator().manual_seed(5)).to(dtype)
        problem = Problem(5, exact=True, device="cpu")
        _, vectors, frozen = reference.forward(c.float(), *problem.arguments(), *quantizer_state(QINT8), math.inf)
        wanted, _, _ = reference.backward(dy.float(), c.float(), vectors, frozen, math.inf)
        found, _, _ = operators("conv_bn", use).backward(
            dy.to(device),
            c.to(device),
            reference.Normalization(*(v.to(device) for v in vectors)),
            moved(frozen, device),
            math.inf,
        )
        assert found.dtype == dtype
        assert_close(found.cpu().float(), wanted, HALF)

    def test_same_bits_twice(self, use: str, device: str) -> None:
        c = torch.randn(4, 5, 7, 9, device=device)
        ops = operators("conv_bn", use)
        runs = []
        for _ in range(2):
            state = quantizer_state(QINT8, device=device)
            y, vectors, frozen = ops.forward(c, *Problem(5, exact=False, device=device).arguments(), *state, math.inf)
            runs.append((y, *vectors, *ops.backward(y.cos(), c, reference.Normalization(*vectors), frozen, math.inf)))
        assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("ceiling", [None, math.inf])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
class TestSpecification:
    """Forms of the PyTorch path that are chosen by where it runs."""

    def test_into_given_memory(self, shape: tuple[int, ...], ceiling: float | None) -> None:
        for memory_format in memory_formats(shape):
            c = exact_input(shape, 2.0).to(memory_format=memory_format)
            dy = torch.randn(shape, generator=torch.Generator().manual_seed(5)).to(memory_format=memory_format)
            problem = Problem(shape[1], exact=True, device="cpu")
            _, vectors, frozen = reference.forward(c, *problem.arguments(), *quantizer_state(QINT8), ceiling)
            expected = reference.backward(dy, c, vectors, frozen, ceiling)
            out = torch.empty_like(c)
            found = reference.backward(dy.clone(), c, vectors, frozen, ceiling, out)
            assert found[0].data_ptr() == out.data_ptr()
            for actual, wanted in zip(found, expected, strict=True):
                assert_close(actual, wanted, SUMS)

    def test_as_compilers_trace_it(
        self, shape: tuple[int, ...], ceiling: float | None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        c, dy = exact_input(shape, 2.0), torch.randn(shape, generator=torch.Generator().manual_seed(5))
        found = []
        for is_compiling in (False, True):
            monkeypatch.setattr(torch.compiler, "is_compiling", lambda value=is_compiling: value)
            problem = Problem(shape[1], exact=True, device="cpu")
            y, vectors, frozen = reference.forward(c, *problem.arguments(), *quantizer_state(QINT8), ceiling)
            found.append((y, *vectors, *reference.backward(dy.clone(), c, vectors, frozen, ceiling)))
        for actual, wanted in zip(*found, strict=True):
            assert_close(actual, wanted, SUMS)
