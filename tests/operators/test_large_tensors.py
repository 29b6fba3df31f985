"""Tensors whose offsets need 64 bits, and that take more programs than a later axis of a grid has.

Tensors of few elements stand for large ones: their elements lie so far apart that offsets pass 2^31, in memory of which
nothing but the pages of those elements is ever touched.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from grids import grid_of
from op_tester import OpTester, clear_plans, operators
from quantizer_states import quantizer_state
from tolerances import SUMS, assert_close
from tritonq.backend import Backend
from tritonq.bins import FloatPrefixBins
from tritonq.formats import BLOCK_FORMATS
from tritonq.grid import Grid
from tritonq.quantized_type import QINT8, QUINT8, QuantizedType
from tritonq.reference.conv_bn import BatchNormState

Given = Callable[[Tensor], Tensor]
# Of the channels. Two of them lie beyond 2^31, and multiples of 16 keep accesses aligned.
APART = 2**30 + 2**20
CHANNELS = 3


def values(*shape: int) -> Tensor:
    """Return whole eighths, so that sums are exact in any order."""
    return torch.randint(-40, 41, shape, generator=torch.Generator().manual_seed(0)) / 8


def far_apart(x: Tensor) -> Tensor:
    """Return ``x`` with channels that lie far apart, and images within them: a huge image in channels_first."""
    images, channels, height, width = x.shape
    strides = (height * width, APART, width, 1)
    memory = torch.empty((channels - 1) * APART + images * height * width, dtype=x.dtype, device=x.device)
    return memory.as_strided(x.shape, strides).copy_(x)


def grids(channels: int, axis: int | None, device: str) -> Grid:
    count = 1 if axis is None else channels
    zero_point = torch.ones(count, dtype=torch.int32, device=device)
    return grid_of(torch.full((count,), 0.25, device=device), zero_point, -8, 7, axis)


def elementwise(ops: Any, given: Given, x: Tensor, device: str) -> list[Tensor]:
    found = []
    for axis in (None, 1):
        grid = grids(x.shape[1], axis, device)
        found += ops("fake_quant").fake_quantize_with_mask(given(x), grid)
        found.append(ops("fake_quant").fake_quantize_backward(given(x + 1), given(x), grid))
        found += ops("learned_scale").learned_fake_quantize_backward(given(x + 1), given(x), grid, "torch")
        found.append(ops("learned_scale").learned_fake_quantize(given(x), grid, "megengine"))
    found.append(ops("float_blocks").fake_quantize_blocks(given(x), BLOCK_FORMATS["mxfp8"], 1))
    return [*found, ops("input_codes").encode(given(x), grids(1, None, device), True).codes]


def reductions(ops: Any, given: Given, x: Tensor, device: str) -> list[Tensor]:
    found = []
    for axis in (None, 1):
        found += ops("min_max").min_max(given(x), axis)
        found += ops("histogram").prefix_histogram(given(x), FloatPrefixBins(), axis)
        found.append(ops("histogram").linear_histogram(given(x), 5, torch.tensor([-4.0, 4.0], device=device), axis))
        found.append(ops("fixed_point").frac_len_errors(given(x), QuantizedType(-8, 7, axis=axis), 4))
    return found


def tails(ops: Any, given: Given, x: Tensor, device: str) -> list[Tensor]:
    vectors = [torch.full((x.shape[1],), 0.5 + i, device=device) for i in range(6)]
    norm = BatchNormState(*vectors[:2], 0.5, 1e-5)
    y, normalization, frozen = ops("conv_bn").forward(
        given(x), *vectors[2:], norm, *quantizer_state(QUINT8, device=device), math.inf
    )
    return [y, *ops("conv_bn").backward(given(x), given(x + 1), normalization, frozen, math.inf)]


def rounded(ops: Any, given: Given, x: Tensor, device: str) -> list[Tensor]:
    y, mask = ops("residual").forward(given(x), given(x + 1), *quantizer_state(QINT8, device=device), None)
    return [y, ops("residual").backward(y, mask)]


def convolutions(ops: Any, given: Given, x: Tensor, device: str) -> list[Tensor]:
    weight = values(4, x.shape[1], 2, 2).to(device, x.dtype)
    geometry = ((1, 1), (1, 0), (1, 1), 1)
    codes, ones = (x * 8).to(torch.int8), torch.ones(4, dtype=torch.int32, device=device)
    int8_weight = (weight * 8).to(torch.int8)
    depthwise = values(x.shape[1], 1, 2, 2).to(device, x.dtype)
    return [
        ops("conv2d").conv2d(given(x), weight, None, *geometry),
        ops("conv2d").conv2d(given(x), depthwise, None, *geometry[:3], x.shape[1]),
        ops("int8_conv").int8_conv2d(given(codes), int8_weight, ones, ones, *geometry, -127, 127, torch.int8),
    ]


CALLS = (elementwise, reductions, tails, rounded, convolutions)


class TestOffsets(OpTester):
    # Of convolutions; all others compile for it as well.
    architecture = 80
    check_races = False

    @pytest.mark.parametrize("call", CALLS)
    def test_beyond_32_bits(self, call: Callable[..., list[Tensor]], use: Backend, device: str, backend: str) -> None:
        if backend == "interpreter":
            pytest.skip("the interpreter makes Python's numbers of what loops count in 64 bits, and 32 bits of those")

        def run(given: Given) -> list[Tensor]:
            x = values(2, CHANNELS, 3, 4).to(device, torch.float16)
            return call(lambda family: operators(family, use), given, x, device)

        for found, expected in zip(run(far_apart), run(lambda x: x), strict=True):
            # In either, the sums of the normalized are in an order of their own.
            assert_close(found, expected, SUMS)


class TestGrids(OpTester):
    architecture = 80

    @pytest.mark.parametrize("call", CALLS)
    def test_more_programs_than_a_later_axis_takes(
        self, call: Callable[..., list[Tensor]], use: Backend, device: str, backend: str, monkeypatch: Any
    ) -> None:
        """As if an axis took four: nine channels, and as many images, are more."""

        def run() -> list[Tensor]:
            x = values(9, 9, 3, 2).to(device, torch.float16)
            return call(lambda family: operators(family, use), lambda given: given, x, device)

        expected = run()
        if backend == "emulator":
            from emulator import driver
            from tritonq.kernels import fixed_point, int8_conv, layout

            monkeypatch.setattr(driver, "_GRID_LIMITS", (2**31 - 1, 4, 4))
            monkeypatch.setattr(layout, "_GRID_LIMIT", 4)
            monkeypatch.setattr(int8_conv, "_MAX_IMAGES", 4)
            monkeypatch.setattr(fixed_point, "programs_that_fill", lambda device: 4)
            clear_plans()
        for found, one in zip(run(), expected, strict=True):
            assert_close(found, one, SUMS)
        clear_plans()
