"""Running ranges on every backend: exact extremes, counted non-finite values, qparams of the one rule."""

from __future__ import annotations

import math
from contextlib import nullcontext

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from op_tester import LAYOUTS, OpTester, axes, clear_plans, few_programs, operators, strided_tensors
from tolerances import assert_matches
from tritonq.grid import Grid, RangeStatistics
from tritonq.qparams import RangeRule, range_to_qparams
from tritonq.quantized_type import QINT1, QINT8, QINT8_NARROW, QINT32, QUINT8, QuantizedType
from tritonq.reference import min_max as reference

E4M3 = QuantizedType.of_floats("e4m3")
BAD = (math.nan, math.inf, -math.inf)


class State:
    """What an observer keeps."""

    def __init__(self, channels: tuple[int, ...], device: str) -> None:
        self.min_val = torch.full(channels, math.inf, device=device)
        self.max_val = torch.full(channels, -math.inf, device=device)
        self.nonfinite = torch.zeros((), dtype=torch.int64, device=device)
        self.scale = torch.ones(channels, device=device)
        self.zero_point = torch.zeros(channels, dtype=torch.int32, device=device)

    def tensors(self) -> tuple[Tensor, ...]:
        return self.min_val, self.max_val, self.nonfinite, self.scale, self.zero_point

    def observed(
        self,
        enabled: Tensor | None,
        qtype: QuantizedType,
        averaging: float | None,
        rule: RangeRule,
        eps: float,
        copy_above: float | None = None,
    ) -> tuple[RangeStatistics, Grid]:
        """What the operator takes besides the batch."""
        switches = (qtype.granularity, enabled, False)
        constants = (averaging, copy_above, rule, eps)
        statistics = RangeStatistics(self.min_val, self.max_val, self.nonfinite, *switches, *constants)
        return statistics, Grid(self.scale, self.zero_point, qtype)


def channels_of(x: Tensor, axis: int | None) -> tuple[int, ...]:
    return () if axis is None else (x.shape[axis],)


def extremes_by_hand(x: Tensor, axis: int | None) -> tuple[Tensor, Tensor, int]:
    """Minimum and maximum of the finite values, one Python number at a time."""
    rows = [x.flatten()] if axis is None else list(x.movedim(axis, 0).reshape(x.shape[axis], -1)) if x.numel() else []
    finite = [[v for v in row.tolist() if math.isfinite(v)] for row in rows]
    low = torch.tensor([min(row, default=math.inf) for row in finite]).view(channels_of(x, axis))
    high = torch.tensor([max(row, default=-math.inf) for row in finite]).view(channels_of(x, axis))
    return low, high, x.numel() - sum(map(len, finite))


class TestMinMax(OpTester):
    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_finds_extremes_in_every_layout(self, layout: str, use: str, device: str) -> None:
        for axis in axes(LAYOUTS[layout]()):
            # Off zero, so that a missing element taken for zero would show.
            for x in (LAYOUTS[layout]() + 100, LAYOUTS[layout]() - 100):
                low, high, count = operators("min_max", use).min_max(x.to(device), axis)
                if x.numel():
                    expected_low, expected_high, _ = extremes_by_hand(x, axis)
                    assert_matches(low.cpu(), expected_low, "min_max")
                    assert_matches(high.cpu(), expected_high, "min_max")
                assert low.shape == channels_of(x, axis)
                assert low.dtype == high.dtype == torch.float32
                assert count.dtype == torch.int64
                assert int(count) == 0

    @pytest.mark.parametrize("layout", ["vector", "odd", "channels_last", "transposed", "0-d"])
    def test_skips_and_counts_what_is_not_finite(self, layout: str, use: str, device: str) -> None:
        for axis in axes(LAYOUTS[layout]()):
            x = LAYOUTS[layout]() + 50
            flat = x.view(-1) if x.is_contiguous() else x.permute(0, *range(2, x.dim()), 1).reshape(-1)
            for i, value in enumerate(BAD * 3):
                flat[i * 7 % flat.numel()] = value
            low, high, count = operators("min_max", use).min_max(x.to(device), axis)
            expected_low, expected_high, expected_count = extremes_by_hand(x, axis)
            assert_matches(low.cpu(), expected_low, "min_max")
            assert_matches(high.cpu(), expected_high, "min_max")
            assert int(count) == expected_count

    @pytest.mark.parametrize("bad", BAD)
    def test_nothing_finite(self, bad: float, use: str, device: str) -> None:
        x = torch.full((3, 40), bad, device=device)
        for axis in (None, 0, 1):
            low, high, count = operators("min_max", use).min_max(x, axis)
            assert bool((low == math.inf).all())
            assert bool((high == -math.inf).all())
            assert int(count) == 120

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_half_precision(self, dtype: torch.dtype, use: str, device: str) -> None:
        x = LAYOUTS["odd"]().to(dtype)
        x[0, 0, 0, 0] = math.nan
        for axis in axes(x):
            found = operators("min_max", use).min_max(x.to(device), axis)
            for actual, expected in zip(found, extremes_by_hand(x, axis), strict=True):
                assert_matches(actual.cpu(), torch.as_tensor(expected), "min_max")

    @given(data=st.data(), x=strided_tensors())
    def test_anything(self, data: st.DataObject, x: Tensor, use: str, device: str) -> None:
        axis = data.draw(st.sampled_from(axes(x)))
        x = x + data.draw(st.sampled_from([0.0, 1e3, -1e3]))
        for value in data.draw(st.lists(st.sampled_from(BAD), max_size=2)):
            x = torch.where(torch.arange(x.numel()).view(x.shape) % 11 == 3, value, x)
        found = operators("min_max", use).min_max(x.to(device), axis)
        for actual, expected in zip(found, reference.min_max(x, axis), strict=True):
            assert_matches(actual.cpu(), expected, "min_max")


class TestObserve(OpTester):
    @pytest.mark.parametrize("rule", ["torch", "torch_v1", "megengine"])
    @pytest.mark.parametrize(
        "qtype",
        [QINT8, QUINT8, QINT8_NARROW, QINT1, QINT32, QuantizedType(0, 127, False), QuantizedType(0, 255, True), E4M3],
        ids=["int8", "uint8", "narrow", "one bit", "int32", "reduced", "unsigned symmetric", "e4m3"],
    )
    def test_state_after_each_batch(self, qtype: QuantizedType, rule: str, use: str, device: str) -> None:
        """Ranges on one side of zero, tiny ones, with gaps; then the qparams that the one function gives for them."""
        generator = torch.Generator().manual_seed(1)
        spread = torch.tensor([1.0, 0.2, 3e-6, 0.0, 40.0, 7.7, 3e-6, 3e-6, 5e-38])
        if qtype in (QINT32, E4M3) and rule == "torch_v1":
            return  # that operator has 8-bit types only, of integers; a zero point of 32 bits would not fit
        centre = torch.tensor([0.0, 5.0, 0.0, 0.0, -90.0, 0.3, 1e-4, -1e-4, 0.0])
        batches = [torch.randn(5, 9, 4, generator=generator) * spread[:, None] + centre[:, None] for _ in range(3)]
        batches[2] *= 1.6  # by which some channels outgrow what was seen before, and others do not
        batches[1][:, 4] = math.nan
        batches[2][0, 0, 0] = math.inf
        for axis in (None, 1):
            for averaging, copy_above in ((None, None), (0.1, None), (0.1, 1.5)):
                ours, theirs = (State(channels_of(batches[0], axis), device) for _ in range(2))
                arguments = (None, qtype.with_axis(axis), averaging, rule, 1e-7, copy_above)
                for batch in (b.to(device) for b in batches):
                    operators("min_max", use).observe(batch, *ours.observed(*arguments))
                    reference.observe(batch, *theirs.observed(*arguments))
                    for actual, expected in zip(ours.tensors(), theirs.tensors(), strict=True):
                        assert_matches(actual, expected, "min_max")
                assert int(ours.nonfinite) == 21
                expected = range_to_qparams(ours.min_val, ours.max_val, qtype, rule=rule, eps=1e-7)
                assert_matches(ours.scale, expected.scale, "min_max")
                assert_matches(ours.zero_point, expected.zero_point, "min_max")

    def test_moving_average(self, use: str, device: str) -> None:
        """The first batch is copied, a batch without finite values changes nothing."""
        state = State((), device)
        for values, low, high in (([1.0, 3.0], 1.0, 3.0), ([math.nan, math.inf], 1.0, 3.0), ([-1.0, 5.0], 0.5, 3.5)):
            x = torch.tensor(values, device=device)
            observe = operators("min_max", use).observe
            observe(x, *state.observed(None, QINT8, 0.25, "torch", 1e-7))
            assert (float(state.min_val), float(state.max_val)) == (low, high)
        assert int(state.nonfinite) == 2

    @pytest.mark.parametrize("axis", [None, 0])
    def test_a_range_of_one_value_is_averaged_too(self, axis: int | None, use: str, device: str) -> None:
        state = State((2,)[: 0 if axis is None else 1], device)
        for value, expected in ((2.0, 2.0), (6.0, 3.0)):
            x = torch.full((2, 3), value, device=device)
            operators("min_max", use).observe(x, *state.observed(None, QINT8.with_axis(axis), 0.25, "torch", 1e-7))
            assert state.min_val.unique().tolist() == state.max_val.unique().tolist() == [expected]

    def test_growth_is_followed_at_once(self, use: str, device: str) -> None:
        """More than ``copy_above`` times the running magnitude is copied, anything after zeros too."""
        state = State((2,), device)
        batches = [
            ([[0.0, 0.0], [-2.0, 1.0]], [0.0, -2.0], [0.0, 1.0]),
            ([[0.0, 0.125], [0.0, 3.0]], [0.0, -1.5], [0.125, 1.5]),
            ([[-0.25, 0.0], [0.0, 2.0]], [-0.25, -1.125], [0.0, 1.625]),
            ([[-0.25, 0.125], [0.0, 2.4375]], [-0.25, -0.84375], [0.03125, 1.828125]),
            ([[-0.25, 0.125], [0.0, 2.75]], [-0.25, 0.0], [0.0546875, 2.75]),
            ([[math.nan, math.inf], [-8.0, 0.0]], [-0.25, -8.0], [0.0546875, 0.0]),
        ]
        for values, low, high in batches:
            x = torch.tensor(values, device=device)
            operators("min_max", use).observe(x, *state.observed(None, QINT8.with_axis(0), 0.25, "torch", 1e-7, 1.5))
            assert_matches(state.min_val.cpu(), torch.tensor(low), "min_max")
            assert_matches(state.max_val.cpu(), torch.tensor(high), "min_max")

    def test_growth_of_one_range(self, use: str, device: str) -> None:
        """The magnitude counts, on either side of zero."""
        state = State((), device)
        batches = [
            ([-2.0, 1.0], (-2.0, 1.0)),
            ([0.0, 3.0], (-1.5, 1.5)),
            ([-2.25, 0.0], (-1.6875, 1.125)),
            ([-2.75, 0.5], (-2.75, 0.5)),
        ]
        for values, expected in batches:
            x = torch.tensor(values, device=device)
            operators("min_max", use).observe(x, *state.observed(None, QINT8, 0.25, "torch", 1e-7, 1.5))
            assert (float(state.min_val), float(state.max_val)) == expected

    def test_running_extremes(self, use: str, device: str) -> None:
        state = State((), device)
        batches = [([1.0, 3.0], 1.0, 3.0), ([math.nan], 1.0, 3.0), ([2.0, 7.0], 1.0, 7.0), ([-4.0], -4.0, 7.0)]
        for values, low, high in batches:
            x = torch.tensor(values, device=device)
            observe = operators("min_max", use).observe
            observe(x, *state.observed(None, QUINT8, None, "torch", 1e-7))
            assert (float(state.min_val), float(state.max_val)) == (low, high)

    @pytest.mark.parametrize(("rule", "zero_point"), [("torch", 0), ("megengine", 1)])
    def test_zero_point_at_a_tie(self, rule: str, zero_point: int, use: str, device: str) -> None:
        """The scale is 1 and zero lies half a step above the smallest code."""
        state = State((), device)
        x = torch.tensor([-0.5, 254.5], device=device)
        operators("min_max", use).observe(x, *state.observed(None, QUINT8, None, rule, 1e-7))
        assert (float(state.scale), int(state.zero_point)) == (1.0, zero_point)

    def test_switch(self, use: str, device: str) -> None:
        x = LAYOUTS["vector"]().to(device)
        x[3] = math.nan
        observe = operators("min_max", use).observe
        off, on, always = (State((), device) for _ in range(3))
        observe(x, *off.observed(torch.tensor([0], dtype=torch.uint8, device=device), QINT8, None, "torch", 1e-7))
        observe(x, *on.observed(torch.tensor([1], dtype=torch.uint8, device=device), QINT8, None, "torch", 1e-7))
        observe(x, *always.observed(None, QINT8, None, "torch", 1e-7))
        for actual, expected in zip(off.tensors(), State((), device).tensors(), strict=True):
            assert_matches(actual, expected, "min_max")
        for actual, expected in zip(on.tensors(), always.tensors(), strict=True):
            assert_matches(actual, expected, "min_max")

    def test_ranges_alone(self, use: str, device: str) -> None:
        x = LAYOUTS["odd"]().to(device)
        for axis in axes(x):
            state = State(channels_of(x, axis), device)
            kept = (state.min_val, state.max_val, state.nonfinite)
            observe = operators("min_max", use).observe
            observe(x, state.observed(None, QINT8.with_axis(axis), None, "torch", 1e-7)[0])
            for actual, expected in zip(kept, reference.min_max(x, axis), strict=True):
                assert_matches(actual, expected, "min_max")

    def test_empty_batch(self, use: str, device: str) -> None:
        for averaging in (None, 0.1):
            state = State((3,), device)
            x = torch.zeros(3, 0, device=device)
            observe = operators("min_max", use).observe
            observe(x, *state.observed(None, QINT8.with_axis(0), averaging, "torch", 1e-7))
            for actual, expected in zip(state.tensors(), State((3,), device).tensors(), strict=True):
                assert_matches(actual, expected, "min_max")

    def test_one_program_takes_several_blocks_of_tiles(self, use: str, device: str) -> None:
        """Along columns, rows and outer; the largest values of each channel come last, the smallest first."""
        for x, axis in (
            (torch.arange(15000.0).view(3, 2, 2500), 1),
            (torch.arange(12600.0).view(3, 21, 50, 4), 3),
            (torch.arange(1080.0).view(9, 40, 3), 1),
            (torch.arange(9000.0), None),
        ):
            with few_programs() if use == "triton" else nullcontext():
                found = operators("min_max", use).min_max(x.to(device), axis)
            for actual, wanted in zip(found, reference.min_max(x, axis), strict=True):
                assert_matches(actual.cpu(), wanted, "min_max")

    def test_same_input_same_bits(self, use: str, device: str) -> None:
        """However the work is shared out; and with 64-bit offsets."""
        x = LAYOUTS["many rows"]().to(device)
        x[2, 1, 1] = math.nan
        for axis in axes(x):
            expected = reference.min_max(x, axis)
            for settings in ({}, {"_MIN_ELEMENTS_PER_PROGRAM": 1, "_JOINED_ELEMENTS": 32}, {"_WIDE_EXTENT": 1}):
                with pytest.MonkeyPatch.context() as patch:
                    if use == "triton":
                        from tritonq.kernels import layout, reduction

                        for name, value in settings.items():
                            patch.setattr(layout if hasattr(layout, name) else reduction, name, value)
                        clear_plans()
                    found = operators("min_max", use).min_max(x, axis)
                for actual, wanted in zip(found, expected, strict=True):
                    assert_matches(actual, wanted, "min_max")
