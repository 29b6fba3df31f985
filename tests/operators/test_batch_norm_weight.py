"""The weight of a step with BatchNorm in one operator, on every backend."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from op_tester import OpTester, operators
from quantizer_states import assert_same_state, moved, quantizer_state
from tolerances import SUMS, assert_close
from tritonq.grid import Grid
from tritonq.quantized_type import QINT4, QINT8_NARROW, QUINT8
from tritonq.reference import batch_norm_weight as reference

QTYPES = {"narrow": QINT8_NARROW.with_axis(0), "uint8": QUINT8.with_axis(0), "int4 per tensor": QINT4}
EPS = 1e-3


def problem(last: bool = False, channels: int = 6) -> tuple[Tensor, Tensor, Tensor]:
    """Return rows, a running variance, and γ of both signs, with a zero and one that is nearly zero."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(channels, 5, 3, 3, generator=generator)
    running_var, gamma = torch.rand(channels, generator=generator) * 3, torch.randn(channels, generator=generator)
    gamma[1], gamma[2] = 0, 1e-13
    return rows.to(memory_format=torch.channels_last) if last else rows, running_var, gamma


class TestBatchNormWeight(OpTester):
    @pytest.mark.parametrize("code_dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("name", [*QTYPES, None])
    @pytest.mark.parametrize("last", [False, True], ids=["channels_first", "channels_last"])
    def test_codes_and_vectors(
        self, name: str | None, code_dtype: torch.dtype, last: bool, use: str, device: str, backend: str
    ) -> None:
        if backend == "interpreter" and code_dtype == torch.bfloat16 and name is None:
            pytest.skip("the interpreter truncates float32 to bfloat16")
        ops, dtypes = operators("batch_norm_weight", use), (code_dtype, torch.float32)
        rows, running_var, gamma = problem(last)
        mine = other = (None, None)
        if name is not None:
            mine, other = (quantizer_state(QTYPES[name], 6, device=where) for where in (device, "cpu"))
        for given in (gamma, None):
            # Units of several powers of two, as float16's codes need.
            for factor in (1.0, 40.0):
                arguments = [factor * rows, running_var, given]
                on_device = [None if tensor is None else tensor.to(device) for tensor in arguments]
                found = ops.quantize(*on_device, EPS, *dtypes, *mine)
                expected = reference.quantize(*arguments, EPS, *dtypes, *other)
                for part in ("codes", "unit", "ratio", "fold", "inverse_std"):
                    ours, theirs = (getattr(reference.StepWeight(*each), part) for each in (found, expected))
                    assert torch.equal(ours.cpu(), theirs), part
                    assert ours.dtype == theirs.dtype
                found = reference.StepWeight(*found)
                assert found.codes.is_contiguous(memory_format=torch.channels_last) == last
                again = ops.codes_again(on_device[0], found.fold, found.grid, code_dtype)
                assert torch.equal(again, found.codes)
                if name is not None:
                    assert_same_state(mine, other)

    def test_a_step_that_is_repeated_takes_the_fold_that_it_had(self, use: str, device: str) -> None:
        ops = operators("batch_norm_weight", use)
        rows, running_var, gamma = (tensor.to(device) for tensor in problem())
        state = quantizer_state(QTYPES["narrow"], 6, device=device)
        dtypes = (torch.float32, torch.float32)
        first = reference.StepWeight(*ops.quantize(rows, running_var, gamma, EPS, *dtypes, *state))
        known = (first.fold, first.inverse_std)
        again = reference.StepWeight(*ops.quantize(rows, 2 * running_var, gamma, EPS, *dtypes, first.grid, None, known))
        for part in ("codes", "unit", "ratio", "fold", "inverse_std"):
            assert torch.equal(getattr(again, part), getattr(first, part))

    @pytest.mark.parametrize("last", [False, True], ids=["channels_first", "channels_last"])
    @pytest.mark.parametrize("affine", [True, False])
    def test_gradients(self, affine: bool, last: bool, use: str, device: str) -> None:
        ops = operators("batch_norm_weight", use)
        rows, running_var, gamma = problem(last)
        generator = torch.Generator().manual_seed(1)
        dcodes = torch.randn(rows.shape, generator=generator)
        eps_share, sum_gn = torch.rand(6, generator=generator), torch.randn(6, generator=generator)
        gamma = gamma if affine else None
        made = reference.quantize(
            *(rows, running_var, gamma, EPS, torch.float32, torch.float32),
            *quantizer_state(QTYPES["narrow"], 6, averaging=1.0),
        )
        assert made.grid is not None
        smaller = made.grid.with_scale(made.grid.scale * 0.6)
        for grid, clips in ((smaller, True), (made.grid, False), (None, False)):
            vectors = [gamma, made.fold, made.inverse_std, made.unit, eps_share, sum_gn]
            expected = reference.gradients(dcodes.clone(), rows, *vectors, grid, clips)
            found = ops.gradients(
                *(dcodes.clone().to(device), rows.to(device)),
                *(None if vector is None else vector.to(device) for vector in vectors),
                *(None if grid is None else moved(grid, device), clips),
            )
            assert torch.equal(found[0].cpu(), expected[0])
            assert use == "torch" or found[0].stride() == rows.stride()
            assert_close(found[1].cpu(), expected[1], SUMS, size=10 / float(made.unit.min()))


class TestTinyFolds(OpTester):
    def test_the_smallest_that_counts(self, use: str, device: str) -> None:
        """At 1e-12 a fold is no zero yet: the gradient of γ has the part that comes through the weight."""
        gamma = torch.tensor([1e-12, 0.9e-12, -1e-12], device=device)
        ones, rows = torch.ones(3, device=device), torch.full((3, 2), 2.0, device=device)
        vectors = (gamma, gamma, ones, ones, 0.25 * ones, 4 * ones)
        _, found = operators("batch_norm_weight", use).gradients(rows.clone(), rows, *vectors, None, False)
        # Σ g x̂, of the fold's sign; with the fold's gradient, 2 · 2 + 2 · 2, less a quarter of the first.
        assert found.tolist() == [4 + 8 - 1, 4, -4 + 8 + 1]


class TestCodesOfFloat16(OpTester):
    def test_the_power_of_two_changes_at_the_root_of_two(self, use: str, device: str) -> None:
        """Which lies between two float32: the one below goes with the power below."""
        root = 2.0**0.5
        below = torch.tensor(root).item()
        assert below < root
        above = torch.nextafter(torch.tensor(below), torch.tensor(2.0)).item()
        scales, ones = torch.tensor([below, above, 4 * below, 4 * above], device=device), torch.ones(4, device=device)
        codes = operators("batch_norm_weight", use).codes_again(
            scales.view(4, 1) * 3, ones, Grid(scales, None, QTYPES["narrow"]), torch.float16
        )
        assert codes.flatten().tolist() == [3, 6, 12, 24]


@pytest.mark.parametrize("exponent", [-30, -24, -8, 0, 6, 9])
def test_codes_of_float16_take_the_nearest_power_of_two(exponent: int) -> None:
    root = 2.0**0.5
    for factor, power in ((1.0, 0), (root - 1e-6, 0), (root + 1e-6, 1), (1.999, 1)):
        unit = torch.tensor([factor * 2.0**exponent])
        codes, rest = reference.fit_codes(torch.ones(1, 3), unit, torch.float16)
        expected = min(max(exponent + power, -24), 7)
        assert codes.tolist() == [[2.0**expected] * 3]
        assert float(rest) == float(unit) / 2.0**expected
