"""Folded convolutions: the kernel against the specification."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from grids import grid_of
from op_tester import OpTester, operators
from tolerances import assert_matches
from tritonq.grid import Grid
from tritonq.quantized_type import QINT8, QUINT8, QuantizedType, Rounding
from tritonq.reference import conv2d as reference
from tritonq.reference.fake_quant import fake_quantize

# channels, outs, groups, kernel
CONVOLUTIONS = {
    "1x1": (20, 18, 1, (1, 1)),
    "3x3": (5, 7, 1, (3, 3)),
    "7x7": (3, 17, 1, (7, 7)),
    "2x3": (33, 5, 1, (2, 3)),
    "grouped": (12, 9, 3, (3, 3)),
    "wide groups": (40, 34, 2, (1, 2)),
    "depthwise": (18, 18, 18, (3, 3)),
    "depthwise, multiplier 3": (6, 18, 6, (3, 2)),
}
# stride, padding, dilation
GEOMETRIES = {
    "same": ((1, 1), (1, 1), (1, 1)),
    "stride": ((2, 3), (1, 2), (1, 1)),
    "dilation": ((1, 2), (4, 7), (2, 3)),
}


def steps_of_an_eighth(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Values whose products, and sums of them, no accumulator of 24 bits has to round, in any order."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randint(-16, 17, shape, generator=generator) / 8).to(dtype)


def quantizers(device: str) -> dict[str, Grid | None]:
    scale, zero_point = torch.tensor([0.3], device=device), torch.tensor([3], dtype=torch.int32, device=device)
    on, off = (torch.tensor([value], dtype=torch.uint8, device=device) for value in (1, 0))
    away = QuantizedType(-7, 7, symmetric=True, rounding="half_away")
    return {
        "none": None,
        "int8": Grid(scale, None, QINT8, on),
        "uint8": Grid(scale, zero_point, QUINT8),
        "off": Grid(scale, zero_point, QUINT8, off),
        "half_away": Grid(scale / 0.3, None, away, on),
    }


class TestKernel(OpTester):
    architecture = 80

    @pytest.fixture(autouse=True)
    def float32_products(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """As the specification's; a GPU may use tf32 otherwise."""
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)

    @pytest.fixture(autouse=True)
    def small_tiles(self, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """Several programs along each axis, several steps, and ragged ends."""
        if backend == "interpreter":
            from tritonq.kernels import conv2d
            from tritonq.kernels.conv_tile import ConvTile

            monkeypatch.setattr(conv2d, "_default_tile", lambda *_: ConvTile(64, 16, 16, 4, 1))

    @pytest.mark.parametrize(
        ("turn", "geometry", "channels_last"),
        [(0, "same", False), (2, "same", True), (4, "stride", True), (6, "dilation", False)],
    )
    @pytest.mark.parametrize("name", CONVOLUTIONS)
    def test_equals_the_specification(
        self, name: str, turn: int, geometry: str, channels_last: bool, use: str, device: str
    ) -> None:
        channels, outs, groups, kernel = CONVOLUTIONS[name]
        ops = operators("conv2d", use)
        x = steps_of_an_eighth(2, channels, 5, 6, seed=0)
        weight = steps_of_an_eighth(outs, channels // groups, *kernel, seed=1)
        bias = steps_of_an_eighth(outs, seed=2) * 3
        # Each kind of convolution meets each of these, in one layout or geometry or another.
        options = [
            ("int8", 1.3, True),
            ("uint8", None, False),
            ("none", math.inf, False),
            ("off", 0.7, True),
            ("half_away", None, True),
        ]
        dtypes = [torch.float32, torch.float16, *([torch.bfloat16] if device == "cuda" else [])]
        for index in (turn, turn + 1):
            quantizer, ceiling, with_bias = options[index % len(options)]
            dtype = dtypes[(index + index // len(options)) % len(dtypes)]
            given = [tensor.to(device, dtype) for tensor in (x, weight, bias)]
            if channels_last:
                given[0] = given[0].contiguous(memory_format=torch.channels_last)
            y = ops.conv2d(
                *given[:2],
                given[2] if with_bias else None,
                *GEOMETRIES[geometry],
                groups,
                ceiling,
                quantizers(device)[quantizer],
            )
            exact = F.conv2d(
                x.double(), weight.double(), bias.double() if with_bias else None, *GEOMETRIES[geometry], groups
            )
            expected = exact.to(dtype) if ceiling is None else exact.to(dtype).clamp(0, ceiling)
            end = quantizers("cpu")[quantizer]
            if end is not None:
                expected = fake_quantize(expected, end)
            assert y.dtype == dtype
            # Memory format of x, wherever the two differ in memory at all.
            assert y.is_contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
            assert torch.equal(y.cpu(), expected), (quantizer, dtype)

    @pytest.mark.parametrize("name", CONVOLUTIONS)
    def test_integers_are_exact(self, name: str, use: str, device: str) -> None:
        channels, outs, groups, kernel = CONVOLUTIONS[name]
        generator = torch.Generator().manual_seed(0)
        codes = torch.randint(-255, 256, (2, channels, 5, 6), generator=generator).float()
        weight = torch.randint(-128, 128, (outs, channels // groups, *kernel), generator=generator).float()
        # Sums with the large biases do not fit 24 bits: they are rounded once, after the addition.
        large = torch.randint(-(2**27), 2**27, (outs,), generator=generator).int()
        small = torch.randint(-999, 999, (outs,), generator=generator).int()
        # Quarters make ties.
        multiplier = torch.tensor([0.25, 0.37]).repeat(outs)[:outs]
        ops = operators("conv2d", use)
        for index, (rounding, grid, bias) in enumerate(
            (("half_even", 0.5, small), ("half_away", 0.5, small), ("half_even", None, large), ("half_even", 0.5, None))
        ):
            arguments = [codes, weight, bias, multiplier]
            given = [None if value is None else value.to(device) for value in arguments]
            here, there = (
                None if grid is None else grid_of(torch.tensor([grid], device=where), None, -8, 7, rounding=rounding)
                for where in (device, "cpu")
            )
            end = (torch.float32, (1, 2), (1, 1), (1, 1), groups, 40.3 if index == 1 else None)
            y = ops.integer_conv2d(*given, here, *end)
            assert torch.equal(y.cpu(), reference.integer_conv2d(*arguments, there, *end))

    @pytest.mark.parametrize(("onto", "last"), [("half_even", "half_away"), ("half_away", "half_even")])
    def test_each_grid_rounds_ties_as_its_own_type_says(
        self, onto: Rounding, last: Rounding, use: str, device: str
    ) -> None:
        codes, weight = torch.arange(-9.0, 9).view(1, 1, 3, 6), torch.ones(1, 1, 1, 1)
        halves = torch.tensor([0.5])

        def arguments(where: str) -> tuple[Any, ...]:
            one = torch.ones(1, device=where)
            grids = (grid_of(one, None, -8, 7, rounding=onto), grid_of(2 * one, None, -8, 7, rounding=last))
            given = (codes.to(where), weight.to(where), None, halves.to(where), grids[0], torch.float32)
            return *given, (1, 1), (0, 0), (1, 1), 1, None, grids[1]

        y = operators("conv2d", use).integer_conv2d(*arguments(device))
        assert torch.equal(y.cpu(), reference.integer_conv2d(*arguments("cpu")))

    @pytest.mark.parametrize(("channels", "groups", "kernel"), [(600, 1, (1, 1)), (90, 1, (3, 3)), (3, 3, (24, 25))])
    def test_sums_that_float32_does_not_hold_are_exact(
        self, channels: int, groups: int, kernel: tuple[int, int], use: str, device: str
    ) -> None:
        outs, size = 3, 25 if groups > 1 else 4
        generator = torch.Generator().manual_seed(0)
        codes = torch.randint(240, 256, (1, channels, size, size), generator=generator).float()
        weight = torch.randint(120, 128, (outs, channels // groups, *kernel), generator=generator).float()
        # Odd sums, of which float32 loses the last bit beyond 2^24, as bias takes them back to where it shows.
        total = F.conv2d(codes.double(), weight.double(), groups=groups)
        assert float(total.min()) > 2**24
        bias = (1 - total.amin((0, 2, 3))).int()
        end = (bias, torch.ones(outs), None, torch.float32, (1, 1), (0, 0), (1, 1), groups)
        given = [value.to(device) if isinstance(value, torch.Tensor) else value for value in (codes, weight, *end)]
        limits = {} if use == "torch" else {"largest_product": 255 * 127}
        y = operators("conv2d", use).integer_conv2d(*given, **limits)
        assert torch.equal(y.cpu(), (total + bias.double().view(-1, 1, 1)).float())

    @pytest.mark.parametrize("sign", [1, -1])
    def test_sums_with_bias_may_pass_32_bits(self, sign: int, use: str, device: str) -> None:
        """A bias at the end of int32, and one product more."""
        bias = sign * torch.tensor([2**31 - 1], dtype=torch.int32)
        arguments = (
            torch.full((1, 1, 1, 1), 100.0),
            torch.full((1, 1, 1, 1), sign * 20.0),
            bias,
            torch.ones(1) / 2**30,
        )
        y = operators("conv2d", use).integer_conv2d(
            *(value.to(device) for value in arguments), None, torch.float32, (1, 1), (0, 0), (1, 1), 1
        )
        # 2^31 + 1999 is not a float32; 2^31 + 2048 is, as 256 divides it.
        assert y.item() == sign * (2**31 + 2048) / 2**30

    def test_real_values(self, use: str, device: str) -> None:
        generator = torch.Generator().manual_seed(0)
        x, weight = (torch.randn(shape, generator=generator) for shape in ((2, 20, 7, 5), (9, 20, 3, 3)))
        x[0, 3, 2, 1], x[1, 0, 0, 0] = torch.nan, torch.inf
        ops = operators("conv2d", use)
        arguments = (None, (1, 1), (1, 1), (1, 1), 1, math.inf)
        y = ops.conv2d(x.to(device), weight.to(device), *arguments)
        assert_matches(y.cpu(), reference.conv2d(x.double(), weight.double(), *arguments).float(), "conv2d")

    def test_slices_and_nothing(self, use: str, device: str) -> None:
        x, weight = steps_of_an_eighth(2, 8, 9, 11, seed=0), steps_of_an_eighth(6, 4, 3, 3, seed=1)
        ops = operators("conv2d", use)
        arguments = (None, (1, 1), (0, 0), (1, 1), 1)
        sliced = x.to(device)[:, ::2, 1:, ::2]
        expected = reference.conv2d(x[:, ::2, 1:, ::2].double(), weight.double(), *arguments).float()
        assert torch.equal(ops.conv2d(sliced, weight.to(device), *arguments).cpu(), expected)
        transposed = weight.to(device).mT
        expected = reference.conv2d(x[:, ::2].double(), weight.mT.double(), *arguments).float()
        assert torch.equal(ops.conv2d(x.to(device)[:, ::2], transposed, *arguments).cpu(), expected)
        assert ops.conv2d(sliced[:0], weight.to(device), *arguments).shape == (0, 6, 6, 4)

    def test_same_bits_twice(self, use: str, device: str) -> None:
        generator = torch.Generator().manual_seed(0)
        x, weight = (torch.randn(s, generator=generator).to(device) for s in ((1, 33, 6, 6), (5, 33, 3, 3)))
        ops = operators("conv2d", use)
        first, again = (ops.conv2d(x, weight, None, (1, 1), (1, 1), (1, 1), 1) for _ in range(2))
        assert torch.equal(first, again)
