"""Folding, observing and quantizing weights on every backend."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

import tritonq
from op_tester import OpTester, operators
from quantizer_states import assert_same_state, moved, quantizer_state
from tolerances import EXACT, SUMS, assert_close
from tritonq import grid as grid_module
from tritonq.functional.fake_quant import fake_quantize
from tritonq.grid import Grid
from tritonq.quantized_type import QINT4, QINT8, QINT8_NARROW, QUINT8, QuantizedType
from tritonq.reference import weight as reference

SHAPES = [(5, 3, 3, 3), (7, 130), (1, 1), (33, 2, 1, 1), (3, 2100), (6, 1, 5)]
QTYPES = {
    "narrow": QINT8_NARROW.with_axis(0),
    "int8": QINT8.with_axis(0),
    "uint8": QUINT8.with_axis(0),
    "int4 per tensor": QINT4,
}


def problem(shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Rows of different sizes, one of them zero, and folds of either sign."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(shape, generator=generator)
    rows[-1] *= 0 if shape[0] > 1 else 1
    fold = torch.randn(shape[0], generator=generator)
    return rows, fold


def column(vector: Tensor, rows: Tensor) -> Tensor:
    return vector.view(-1, *[1] * (rows.dim() - 1))


class TestWeight(OpTester):
    @pytest.fixture(autouse=True)
    def short_tiles(self, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """Rows longer than a tile, without long rows."""
        if backend == "interpreter":
            from tritonq.kernels import weight

            monkeypatch.setattr(weight, "_MAX_ELEMENTS", 512)
            monkeypatch.setattr(weight, "_SHARED_ELEMENTS", 128)

    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    @pytest.mark.parametrize("name", QTYPES)
    @pytest.mark.parametrize(("rule", "averaging"), [("torch", 1.0), ("megengine", None), ("torch", 0.3)])
    def test_codes_units_and_state(
        self, shape: tuple[int, ...], name: str, rule: str, averaging: float | None, use: str, device: str
    ) -> None:
        qtype = QTYPES[name]
        mine = quantizer_state(qtype, shape[0], device=device, averaging=averaging, rule=rule)
        other = quantizer_state(qtype, shape[0], averaging=averaging, rule=rule)
        rows, fold = problem(shape)
        for factor in (1.0, 1.3, 0.5):
            codes, unit, _, frozen = operators("weight", use).quantize_folded(
                rows.to(device), factor * fold.to(device), *mine
            )
            expected = reference.quantize_folded(rows, factor * fold, *other)
            assert torch.equal(codes.cpu(), expected.codes)
            assert torch.equal(unit.cpu(), expected.unit)
            assert_same_state(mine, other)
            again, _, _, _ = operators("weight", use).folded_codes(rows.to(device), factor * fold.to(device), frozen)
            assert torch.equal(again, codes)
        # What the op's parts compute, written out.
        folded = rows * column(0.5 * fold, rows)
        axis = None if other.grid.scale.numel() == 1 else 0
        whole = fake_quantize(folded, Grid(other.grid.scale, other.grid.zero_point, qtype.with_axis(axis)))
        assert_close(codes.cpu() * column(unit.cpu(), rows), whole, EXACT)

    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    @pytest.mark.parametrize("name", QTYPES)
    def test_gradients(self, shape: tuple[int, ...], name: str, use: str, device: str) -> None:
        rows, fold = problem(shape)
        dcodes = torch.randn(shape, generator=torch.Generator().manual_seed(1))
        ops = operators("weight", use)
        other = quantizer_state(QTYPES[name], shape[0])
        _, unit, clips, frozen = reference.quantize_folded(rows, fold, *other)
        smaller = frozen.with_scale(frozen.scale * 0.6)  # some codes are clipped
        for state, known_clips in ((smaller, True), (frozen, clips), (None, False)):
            _, _, _, snapshot = ops.folded_codes(
                rows.to(device), fold.to(device), None if state is None else moved(state, device)
            )
            found = ops.folded_backward(
                dcodes.clone().to(device), rows.to(device), fold.to(device), unit.to(device), snapshot, known_clips
            )
            drows, dfold = reference.folded_backward(dcodes.clone(), rows, fold, unit, state, known_clips)
            assert torch.equal(found[0].cpu(), drows)
            assert_close(found[1].cpu(), dfold, SUMS, size=10 / float(unit.min()))
            if state is smaller and rows.numel() > 100:
                assert bool((drows == 0).any())
                assert bool((drows != 0).any())

    @pytest.mark.parametrize("active", [False, True])
    def test_snapshots_of_one_element_or_one_per_row_are_the_same(self, active: bool, use: str, device: str) -> None:
        rows, fold = (tensor.to(device) for tensor in problem((5, 3, 3, 3)))
        dcodes, unit = torch.ones_like(rows), torch.ones_like(fold)
        one = moved(
            Grid(torch.tensor([0.01]), torch.tensor([3], dtype=torch.int32), QUINT8, torch.tensor([active])),
            device,
        )
        per_row = one.with_buffers(one.scale.repeat(5), one.zero_point.repeat(5), one.enabled.repeat(5))
        ops = operators("weight", use)
        drows, dfold = ops.folded_backward(dcodes.clone(), rows, fold, unit, one, True)
        others = ops.folded_backward(dcodes.clone(), rows, fold, unit, per_row, True)
        assert torch.equal(drows, others[0])
        assert torch.equal(dfold, others[1])
        assert bool((drows == 0).any()) == active
        assert torch.equal(ops.folded_codes(rows, fold, one)[0], ops.folded_codes(rows, fold, per_row)[0])
        # A switch of its own for every row.
        mixed = replace(per_row, enabled=torch.tensor([True, False, True, False, True], device=device))
        drows, _ = ops.folded_backward(dcodes.clone(), rows, fold, unit, mixed, True)
        assert [bool((row == 0).any()) for row in drows[:4]] == [True, False, True, False]

    def test_switches(self, use: str, device: str) -> None:
        rows, fold = problem((5, 3, 3, 3))
        folded = rows * column(fold, rows)
        for observing, active in ((False, True), (True, False)):
            state = quantizer_state(QINT8_NARROW.with_axis(0), 5, device=device, observing=observing, active=active)
            codes, unit, _, frozen = operators("weight", use).quantize_folded(rows.to(device), fold.to(device), *state)
            assert torch.equal(codes.cpu(), folded)
            assert bool((unit == 1).all())
            assert not bool(frozen.enabled.any())
            assert bool(torch.isfinite(state.statistics.min_val).any()) == observing

    def test_not_finite_values_are_counted(self, use: str, device: str) -> None:
        rows, fold = problem((5, 3, 3, 3))
        rows[1, 0, 0, 0], rows[2, 1, 1, 1] = torch.nan, torch.inf
        mine, other = (
            quantizer_state(QINT8_NARROW.with_axis(0), 5, device=device),
            quantizer_state(QINT8_NARROW.with_axis(0), 5),
        )
        codes, _, _, _ = operators("weight", use).quantize_folded(rows.to(device), fold.to(device), *mine)
        expected = reference.quantize_folded(rows, fold, *other)
        assert_same_state(mine, other)
        assert int(mine.statistics.nonfinite_count) == 2
        assert_close(codes.cpu(), expected.codes, EXACT, equal_nan=True)

    @pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
    def test_ranges_leave_out_what_is_not_finite(self, bad: float, use: str, device: str) -> None:
        rows = torch.tensor([[-2.0, 1.0, 0.5], [3.0, -4.0, 0.0]], device=device)
        rows[0, 2] = bad
        state = quantizer_state(QINT8.with_axis(0), 2, device=device, averaging=1.0)
        operators("weight", use).quantize_folded(rows, torch.ones(2, device=device), *state)
        assert state.statistics.min_val.tolist() == [-2, -4]
        assert state.statistics.max_val.tolist() == [1, 3]
        assert int(state.statistics.nonfinite_count) == 1

    @pytest.mark.parametrize("sign", [1.0, -1.0])
    def test_one_end_that_clips_is_enough(self, sign: float, use: str, device: str) -> None:
        """Of fixed scales, with and without zero points: codes end, and the gradient beyond them is blocked."""
        rows = sign * torch.tensor([[3.0, 0.5], [0.25, -0.5]], device=device)
        fold, ops = torch.full((2,), 2.0, device=device), operators("weight", use)
        for zero_point in (None, torch.tensor([1, 1], dtype=torch.int32, device=device)):
            grid = Grid(torch.full((2,), 0.5, device=device), zero_point, QuantizedType(-8, 7, False, 0))
            zero = 0 if zero_point is None else 1
            codes, unit, clips, frozen = ops.quantize_folded(rows, fold, grid, None)
            plain = rows * 4
            expected = plain.clamp(-8 - zero, 7 - zero)
            assert torch.equal(codes, expected)
            assert clips
            drows, dfold = ops.folded_backward(torch.ones_like(rows), rows, fold, unit, frozen, clips)
            assert torch.equal(drows, (plain == expected).float() * 4)
            assert torch.equal(dfold, ((plain == expected) * rows).sum(1) * 2)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_low_precision_parameters(self, dtype: torch.dtype, use: str, device: str) -> None:
        rows, fold = problem((5, 3, 3, 3))
        state = quantizer_state(QINT8_NARROW.with_axis(0), 5, device=device)
        codes, _, _, _ = operators("weight", use).quantize_folded(rows.to(device, dtype), fold.to(device), *state)
        expected = reference.quantize_folded(
            rows.to(dtype).float(), fold, *quantizer_state(QINT8_NARROW.with_axis(0), 5)
        )
        assert torch.equal(codes.cpu(), expected.codes)

    def test_memoryless_scales_never_clip(self, use: str, device: str) -> None:
        """So that the CPU path can leave its mask out, and the fold cancels from the codes."""
        rows, fold = problem((5, 3, 3, 3))
        fold = fold.sign() * 2.0 ** torch.arange(5.0)
        state = quantizer_state(QINT8_NARROW.with_axis(0), 5, averaging=1.0)
        codes, _, clips, _ = reference.quantize_folded(rows, fold, *state)
        assert not clips
        plain = quantizer_state(QINT8_NARROW.with_axis(0), 5, averaging=1.0)
        expected, _, _, _ = reference.quantize_folded(rows, fold.sign(), *plain)
        assert torch.equal(codes, expected)


def test_the_state_of_a_module_is_updated_as_its_own_forward_would() -> None:
    """The operator and the module agree on range, scale and codes."""
    from tritonq.nn.fusable import observed_grid

    quantizer = tritonq.get_qconfig("tensorrt").weight()
    quantizer.allocate(5)
    twin = tritonq.get_qconfig("tensorrt").weight()
    twin.allocate(5)
    rows, fold = problem((5, 3, 3, 3))
    state = observed_grid(quantizer)
    assert state is not None
    codes, unit, _, _ = reference.quantize_folded(rows, fold, *state)
    assert torch.equal(codes * column(unit, rows), twin(rows * column(fold, rows)))
    for (name, value), expected in zip(quantizer.state_dict().items(), twin.state_dict().values(), strict=True):
        assert torch.equal(value, expected), name


@pytest.mark.parametrize("active", [False, True])
def test_gradients_where_the_switch_can_not_be_read(active, monkeypatch):
    """As on a GPU: both gradients are computed there, and the switch chooses."""
    shape = (64, 300, 3, 3)  # large enough for scratch memory
    rows, fold = problem(shape)
    dcodes = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    state = quantizer_state(QINT8_NARROW.with_axis(0), shape[0])
    _, unit, _, frozen = reference.quantize_folded(rows, fold, *state)
    frozen = frozen.with_buffers(frozen.scale * 0.6, None, torch.tensor([active]))
    expected = reference.folded_backward(dcodes.clone(), rows, fold, unit, frozen, True)
    monkeypatch.setattr(grid_module, "is_readable", lambda tensor: False)
    found = reference.folded_backward(dcodes.clone(), rows, fold, unit, frozen, True)
    for mine, theirs in zip(found, expected, strict=True):
        assert torch.equal(mine, theirs)
    assert bool((found[0] == 0).any()) == active


def test_codes_of_float64_stay_in_range() -> None:
    """The largest weight lies at 127.5 but for a rounding of the scale, whose reciprocal is float32's."""
    weights = torch.rand(300, 1, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for rows in weights:
        grid = Grid((rows.amax(1) / 127.5).float(), None, QINT8.with_axis(0))
        found = reference.quantize_folded(rows, torch.ones(1, dtype=torch.float64), grid, None)
        assert found.codes.amax() == 127
