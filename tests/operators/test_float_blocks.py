"""Small floats on every backend: the bits of `ml_dtypes`, the scales of the OCP and NVIDIA formats, any layout."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from op_tester import LAYOUTS, OpTester, operators
from tritonq import fake_quantize_float, fake_quantize_per_tensor_affine
from tritonq.backend import Backend
from tritonq.formats import BLOCK_FORMATS, FLOAT_FORMATS, BlockFormat
from tritonq.grid import Grid
from tritonq.qparams import range_to_qparams
from tritonq.quantized_type import QINT8, QuantizedType
from tritonq.reference import float_blocks as reference

ml_dtypes = pytest.importorskip("ml_dtypes")

DTYPES = {
    "e4m3": ml_dtypes.float8_e4m3fn,
    "e5m2": ml_dtypes.float8_e5m2,
    "e2m3": ml_dtypes.float6_e2m3fn,
    "e3m2": ml_dtypes.float6_e3m2fn,
    "e2m1": ml_dtypes.float4_e2m1fn,
}
ELEMENTS = {f"fp{FLOAT_FORMATS[name].bits}_{name}": name for name in FLOAT_FORMATS}


def equal_bits(actual: Tensor, expected: Tensor) -> bool:
    """Whether all bits agree, those of zeros too; one NaN is as good as another."""
    same = actual.view(torch.int32) == expected.view(torch.int32)
    return actual.shape == expected.shape and bool((same | (actual.isnan() & expected.isnan())).all())


def numbers(name: str) -> Tensor:
    """Every finite number of a format, from all of its codes."""
    codes = np.arange(2 ** FLOAT_FORMATS[name].bits, dtype=np.uint8).view(DTYPES[name])
    values = torch.from_numpy(codes.astype(np.float32))
    return values[values.isfinite()]


def rounded(x: Tensor, name: str) -> Tensor:
    """``ml_dtypes``' conversion, which does not saturate, after clamping. It has no NaN in 6 and 4 bits."""
    largest = float(ml_dtypes.finfo(DTYPES[name]).max)
    found = torch.from_numpy(x.nan_to_num(0.0).clamp(-largest, largest).numpy().astype(DTYPES[name]).astype(np.float32))
    return torch.where(x.isnan(), x, found)


def around(values: Tensor) -> Tensor:
    """Values, the ties between neighbours, and what lies next to either."""
    ordered = values.sort().values
    points = torch.cat([ordered, (ordered[1:] + ordered[:-1]) / 2])
    up, down = torch.tensor(math.inf), torch.tensor(-math.inf)
    return torch.cat([points, points.nextafter(up), points.nextafter(down)])


def special(name: str) -> Tensor:
    """What rounds at the ends: ties beyond the largest number, infinities, NaN, zeros, float32's subnormal numbers."""
    number = FLOAT_FORMATS[name]
    tie = (number.largest + number.overflow) / 2
    ends = [number.largest, tie, math.nextafter(tie, 0), math.nextafter(tie, 1e9), number.overflow, 3e38, math.inf]
    ends += [0.0, 1e-45, 1e-40, 1.2e-38, 2.0 ** (number.least_exponent - number.mantissa_bits - 1), math.nan]
    return torch.tensor([*ends, *(-end for end in ends)])


class TestElements(OpTester):
    @pytest.mark.parametrize("format", ELEMENTS)
    def test_every_code_tie_and_end(self, format: str, use: Backend, device: str) -> None:
        name = ELEMENTS[format]
        x = torch.cat([around(numbers(name)), special(name)])
        y = fake_quantize_float(x.to(device), format, backend=use).cpu()
        assert equal_bits(y, rounded(x, name))
        every = numbers(name)
        assert equal_bits(fake_quantize_float(every.to(device), format, backend=use).cpu(), every)
        assert len(every.unique()) == 2 * FLOAT_FORMATS[name].largest_code + 1

    @pytest.mark.parametrize("format", ELEMENTS)
    def test_gradient_passes_where_the_unsaturated_number_is_finite(
        self, format: str, use: Backend, device: str
    ) -> None:
        name = ELEMENTS[format]
        x = torch.cat([around(numbers(name)), special(name)])
        wide = x.double() if name != "e5m2" else x.float()
        moved = x.to(device).requires_grad_()
        fake_quantize_float(moved, format, backend=use).sum().backward()
        number = FLOAT_FORMATS[name]
        tie = (number.largest + number.overflow) / 2
        # A tie goes to the even mantissa: down for E4M3, whose largest ends in 0, up for all others.
        inside = (wide.abs() < tie) | ((wide.abs() == tie) & (name == "e4m3"))
        assert torch.equal(moved.grad.cpu() != 0, inside)

    def test_scales_along_an_axis(self, use: Backend, device: str) -> None:
        for layout in ("odd", "channels_last", "sliced", "permuted"):
            x = LAYOUTS[layout]().to(device)
            scale = torch.tensor([0.25, 0.5, 0.0625, 2.0, 1.0, 4.0], device=device)[: x.shape[1]]
            y = fake_quantize_float(x, "fp8_e4m3", scale, axis=1, backend=use)
            units = scale.view(1, -1, *[1] * (x.dim() - 2))
            assert equal_bits(y.cpu(), (rounded((x / units).cpu(), "e4m3") * units.cpu()))
            assert y.stride() == torch.empty_like(x).stride()

    def test_mask_codes_switch_and_halves(self, use: Backend, device: str, backend: str) -> None:
        ops = operators("fake_quant", use)
        x = torch.tensor([0.3, 500.0, math.nan, -470.0, 460.0], device=device)
        grid = Grid(torch.ones(1, device=device), None, QuantizedType.of_floats("e4m3"))
        y, mask = ops.fake_quantize_with_mask(x, grid)
        assert mask.tolist() == [True, False, False, False, True]
        assert equal_bits(y.cpu(), rounded(x.cpu(), "e4m3"))
        assert equal_bits(ops.quantize(x, grid).cpu(), rounded(x.cpu(), "e4m3"))
        blocked = ops.fake_quantize_backward(torch.ones_like(x), x, grid, True)
        assert blocked.tolist() == [1, 0, 0, 0, 0]
        off = Grid(grid.scale, None, grid.qtype, torch.zeros(1, dtype=torch.uint8, device=device))
        assert equal_bits(ops.fake_quantize(x, off).cpu(), x.cpu())
        for dtype in (torch.float16, torch.bfloat16):
            if backend != "interpreter" or dtype == torch.float16:
                half = ops.fake_quantize(x.to(dtype), grid).cpu()
                assert equal_bits(half.float(), rounded(x.cpu().to(dtype).float(), "e4m3").to(dtype).float())


def scaled_blocks(x: Tensor, blocks: BlockFormat, axis: int, tensor_scale: float | Tensor | None = None) -> Tensor:
    """The formats' definition block by block, with `ml_dtypes`' scales and elements."""
    x = x.movedim(axis, -1)
    number, result = blocks.element_format, torch.empty_like(x)
    for start in range(0, x.shape[-1], blocks.size):
        for index in np.ndindex(*x.shape[:-1]):
            block = x[index][start : start + blocks.size]
            if bool(block.isnan().any()):
                result[index][start : start + blocks.size] = math.nan
                continue
            largest = float(block.abs().clamp(max=torch.finfo(torch.float32).max).max())
            if tensor_scale is None:
                exponent = math.frexp(largest)[1] - 1 - number.greatest_exponent if largest else -127
                if blocks.scale_rounding == "ceil" and largest > math.ldexp(number.largest, exponent):
                    exponent += 1
                exponent = min(max(exponent, -127), 127 - number.greatest_exponent)
                scale = float(ml_dtypes.float8_e8m0fnu(math.ldexp(1.0, exponent)))
                assert scale == math.ldexp(1.0, exponent)
            else:
                steps = torch.tensor(largest) * (1 / (torch.tensor(number.largest) * tensor_scale))
                scale = float(rounded(steps, "e4m3") * tensor_scale)
            units = block * torch.tensor(1 / scale) if scale >= 2.0**-126 or tensor_scale is None else block * 0
            found = rounded(units.clamp(-1e30, 1e30), blocks.elements) * torch.tensor(scale)
            result[index][start : start + blocks.size] = found
    return result.movedim(-1, axis)


class TestBlocks(OpTester):
    @pytest.mark.parametrize("format", BLOCK_FORMATS)
    @pytest.mark.parametrize("scale_rounding", ["floor", "ceil"])
    def test_blocks_of_every_magnitude(self, format: str, scale_rounding: str, use: Backend, device: str) -> None:
        if format == "nvfp4" and scale_rounding == "ceil":
            return
        x = torch.randn(61, 80, generator=torch.Generator().manual_seed(0)) * 2.0 ** torch.arange(-30, 31)[:, None]
        x[7], x[8, :40], x[9, 3], x[10, 50], x[11, 70] = 0.0, -0.0, math.nan, math.inf, -math.inf
        x[12], x[13], x[14] = x[12] * 1e-38, x[13] * 2.0**-120, 3.3e38
        blocks = BlockFormat(
            BLOCK_FORMATS[format].elements, BLOCK_FORMATS[format].size, BLOCK_FORMATS[format].scale, scale_rounding
        )
        scale = 0.03125 if format == "nvfp4" else None
        y = fake_quantize_float(x.to(device), format, scale, scale_rounding=scale_rounding, backend=use).cpu()
        assert equal_bits(y, scaled_blocks(x, blocks, 1, scale))

    @pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "0-d"])
    def test_any_axis_in_every_layout(self, layout: str, use: Backend, device: str) -> None:
        ops = operators("float_blocks", use)
        x = LAYOUTS[layout]().to(device)
        before = x.clone()
        for axis in range(x.dim()):
            y = ops.fake_quantize_blocks(x, BlockFormat("e2m1", 4), axis)
            assert equal_bits(y.cpu(), scaled_blocks(x.cpu(), BlockFormat("e2m1", 4), axis))
            assert y.stride() == torch.empty_like(x).stride()
        axis = x.dim() - 1
        wide = ops.fake_quantize_blocks(x, BLOCK_FORMATS["mxfp8"], axis)
        assert equal_bits(wide.cpu(), reference.fake_quantize_blocks(x.cpu(), BLOCK_FORMATS["mxfp8"], axis))
        assert torch.equal(x, before)

    def test_halves(self, use: Backend, device: str, backend: str) -> None:
        x = torch.randn(6, 70, generator=torch.Generator().manual_seed(0))
        for dtype in (torch.float16, torch.bfloat16):
            if backend != "interpreter" or dtype == torch.float16:
                y = fake_quantize_float(x.to(dtype).to(device), "mxfp4", axis=0, backend=use)
                assert torch.equal(y.cpu().float(), scaled_blocks(x.to(dtype).float(), BLOCK_FORMATS["mxfp4"], 0))

    def test_tensor_scale_and_gradient(self, use: Backend, device: str) -> None:
        x = torch.randn(4, 33, generator=torch.Generator().manual_seed(0)).to(device).requires_grad_()
        y = fake_quantize_float(x, "nvfp4", backend=use)
        scale = (x.detach().abs().max() / (6 * 448)).cpu()
        assert equal_bits(y.detach().cpu(), scaled_blocks(x.detach().cpu(), BLOCK_FORMATS["nvfp4"], 1, scale))
        assert y.grad_fn.saved_tensors == ()
        dy = torch.randn(4, 33, device=device)
        y.backward(dy)
        assert torch.equal(x.grad, dy)
        for dtype in (torch.uint8, torch.bool):
            off = torch.zeros(1, dtype=dtype, device=device)
            given = (x.detach(), BLOCK_FORMATS["mxfp8"], 1, None)
            assert torch.equal(operators("float_blocks", use).fake_quantize_blocks(*given, off), x)
            on = operators("float_blocks", use).fake_quantize_blocks(*given, torch.ones_like(off))
            assert torch.equal(on, operators("float_blocks", use).fake_quantize_blocks(*given))
        zeros = fake_quantize_float(torch.zeros(2, 20, device=device), "nvfp4", backend=use)
        assert not zeros.any()


def test_a_scale_of_floats_follows_from_the_range() -> None:
    low, high = torch.tensor([-3.0, -1.0]), torch.tensor([2.0, 5.0])
    for name, number in FLOAT_FORMATS.items():
        scale, zero_point = range_to_qparams(low, high, QuantizedType.of_floats(name, 0))
        assert torch.equal(scale, torch.tensor([3.0, 5.0]) / number.largest)
        assert zero_point.tolist() == [0, 0]


def test_float64_is_rounded_once() -> None:
    x = torch.tensor([1.0 + 2.0**-4 + 2.0**-40, 1.0 + 2.0**-4], dtype=torch.float64)
    assert fake_quantize_float(x, "fp8_e4m3").tolist() == [1.125, 1.0]
    assert fake_quantize_float(x, "mxfp8").tolist() == [1.125, 1.0]


X = torch.ones(2, 3)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: fake_quantize_float(X, "fp7"), ValueError, "mxfp4"),
        (lambda: fake_quantize_float(X.int(), "mxfp4"), TypeError, "int32"),
        (lambda: fake_quantize_float(X, "mxfp4", 1.0), ValueError, "finds its scales"),
        (lambda: fake_quantize_float(X, "mxfp4", axis=2), ValueError, "axis 2"),
        (lambda: fake_quantize_float(torch.tensor(1.0), "mxfp4"), ValueError, "axis -1"),
        (lambda: fake_quantize_float(X, "mxfp4", scale_rounding="even"), ValueError, "even"),
        (lambda: fake_quantize_float(X, "nvfp4", scale_rounding="ceil"), ValueError, "e8m0"),
        (lambda: fake_quantize_float(X, "fp8_e4m3", scale_rounding="ceil"), ValueError, "block formats"),
        (lambda: fake_quantize_float(X, "fp8_e4m3", torch.ones(2), axis=1), ValueError, r"\(3,\)"),
        (lambda: fake_quantize_float(X, "fp8_e4m3", -1.0), ValueError, "positive"),
        (lambda: fake_quantize_float(X, "fp8_e4m3", torch.ones(1, requires_grad=True)), ValueError, "not trained"),
        (lambda: QuantizedType(-8, 7, codes="e2m1"), ValueError, "of_floats"),
        (lambda: QuantizedType(-8, 7, codes="e1m2"), ValueError, "e1m2"),
        (lambda: QuantizedType.of_floats("integer"), ValueError, "integer"),
        (lambda: range_to_qparams(X, X, QuantizedType.of_floats("e4m3"), rule="torch_v1"), ValueError, "torch_v1"),
        (lambda: BlockFormat("e2m1", 12), ValueError, "power of two"),
        (lambda: BlockFormat("e2m1", 32, "e5m2"), ValueError, "e5m2"),
    ],
)
def test_bad_arguments(call: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def test_integer_types_are_as_they_were() -> None:
    assert QINT8.codes == "integer"
    assert QINT8.float_format is None
    assert QINT8.reach == 127.5
    assert fake_quantize_per_tensor_affine(X, 0.3, 0, -8, 7).tolist() == [[0.9000000357627869] * 3] * 2
