"""Tensors on a grid as codes of one byte, and back, on every backend."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from op_tester import LAYOUTS, OpTester, operators
from quantizer_states import moved
from tritonq.grid import Grid
from tritonq.quantized_type import QINT4, QINT8, QUINT8, QuantizedType
from tritonq.reference import input_codes as reference

QTYPES = {"int8": QINT8, "uint8": QUINT8, "int4": QINT4, "16 codes": QuantizedType(3, 18, False)}


def problem(
    qtype: QuantizedType, like: Tensor, dtype: torch.dtype = torch.float32, zero_at_top: bool = False
) -> tuple[Tensor, Grid]:
    """Return values on all codes of a grid, first and last one included, laid out as ``like``, and the grid."""
    scale = torch.tensor([0.0173])
    zero = qtype.quant_max - 3 if zero_at_top else qtype.quant_min + 3
    zero_point = None if qtype.fixed_zero_point == 0 else torch.tensor([zero], dtype=torch.int32)
    count = qtype.quant_max - qtype.quant_min + 1
    codes = (torch.arange(like.numel()) * 37 % count + qtype.quant_min).float().view(like.shape)
    steps = codes if zero_point is None else codes - float(zero_point)
    values = (steps * float(scale)).to(dtype)
    return torch.empty_strided(like.shape, like.stride(), dtype=dtype).copy_(values), Grid(scale, zero_point, qtype)


class TestInputCodes(OpTester):
    @pytest.mark.parametrize("layout", ["one element", "empty", "odd", "channels_last", "sliced", "transposed"])
    @pytest.mark.parametrize("name", ["int8", "uint8"])
    def test_layouts(self, layout: str, name: str, use: str, device: str) -> None:
        x, grid = problem(QTYPES[name], LAYOUTS[layout]())
        self.check(x, grid, use, device)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("name", QTYPES)
    def test_every_code(self, name: str, dtype: torch.dtype, use: str, device: str, backend: str) -> None:
        if backend == "interpreter" and dtype == torch.bfloat16:
            pytest.skip("the interpreter truncates float32 to bfloat16")
        # The far end of the grid, where bfloat16 is coarser than it, may be either one.
        for zero_at_top in (False, True):
            x, grid = problem(QTYPES[name], torch.empty(300), dtype, zero_at_top)
            self.check(x, grid, use, device)

    @pytest.mark.parametrize("layout", ["empty", "odd"])
    def test_codes_above_127_without_a_zero_point(self, layout: str, use: str, device: str) -> None:
        like, scale = LAYOUTS[layout](), torch.tensor([0.0173])
        codes = torch.arange(like.numel(), dtype=torch.float32) * 37 % 256
        x = torch.empty_like(like).copy_((codes * float(scale)).view(like.shape))
        self.check(x, Grid(scale, None, QuantizedType(0, 255, False)), use, device)

    def check(self, x: Tensor, grid: Grid, use: str, device: str) -> None:
        ops, expected = operators("input_codes", use), reference.encode(x, grid, True)
        for trusted in (True, False):
            found = ops.encode(x.to(device), moved(grid, device), trusted)
            assert torch.equal(found.codes.cpu(), expected.codes)
            assert found.codes.stride() == torch.empty_like(x).stride()
            assert torch.equal(found.scale.cpu(), grid.scale)
            assert found.scale is not grid.scale
            assert (found.shift is None) == (expected.shift is None)
            if expected.shift is not None:
                assert float(found.shift) == float(expected.shift)
        restored = ops.decode(found, x.dtype)
        assert restored.dtype == x.dtype
        assert torch.equal(restored.cpu(), x)

    def test_values_off_the_grid_have_no_codes(self, use: str, device: str) -> None:
        ops = operators("input_codes", use)
        x, grid = problem(QUINT8, torch.empty(70))
        grid = moved(grid, device)
        for value in (float(x[69]) + 0.005, torch.nan, torch.inf):
            x[69] = value
            assert ops.encode(x.to(device), grid, False) is None
