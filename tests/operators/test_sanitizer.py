"""Kernels of tensors and reductions under triton-viz's sanitizer: no access outside their tensors, without a GPU.

The sanitizer takes a tensor's bytes to be contiguous from its first one, so it would call a slice's own elements
foreign: dense tensors only. The addresses within slices are compared one by one in `test_layout.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from grids import grid_of
from tritonq.bins import FloatPrefixBins
from tritonq.grid import Grid, RangeStatistics
from tritonq.quantized_type import QINT8_NARROW

pytestmark = pytest.mark.sanitizer

Sanitize = Callable[..., None]


INPUTS = {
    "odd": torch.randn(3, 5, 7),
    "channels_last": torch.randn(2, 5, 3, 3).to(memory_format=torch.channels_last),
    "one": torch.randn(1),
    "rows": torch.randn(67, 3),
}


def with_axis(name: str, axis: int | None) -> torch.Tensor:
    x = INPUTS[name]
    if axis is not None and axis >= x.dim():
        pytest.skip("no such axis")
    return x


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("name", INPUTS)
@pytest.mark.parametrize("axis", [None, 0, 1, 2])
def test_fake_quant(name: str, axis: int | None, sanitize: Sanitize) -> None:
    from tritonq.kernels import fake_quant

    sanitize(fake_quant)
    x = with_axis(name, axis)
    channels = 1 if axis is None else x.shape[axis]
    qparams = (torch.ones(channels), torch.ones(channels, dtype=torch.int32))
    grid = grid_of(*qparams, -8, 7, axis, enabled=torch.ones(1, dtype=torch.uint8))
    fake_quant.fake_quantize(x, grid)
    fake_quant.fake_quantize_with_mask(x, grid)
    fake_quant.quantize(x, grid_of(*qparams, -8, 7, axis, "half_away"))
    fake_quant.fake_quantize_backward(x, x, grid)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("name", INPUTS)
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_float_blocks(name: str, axis: int, sanitize: Sanitize) -> None:
    from tritonq.formats import BLOCK_FORMATS
    from tritonq.kernels import fake_quant, float_blocks
    from tritonq.quantized_type import QuantizedType

    sanitize(float_blocks, fake_quant)
    x = with_axis(name, axis)
    float_blocks.fake_quantize_blocks(x, BLOCK_FORMATS["mxfp8"], axis)
    float_blocks.fake_quantize_blocks(x, BLOCK_FORMATS["nvfp4"], axis, torch.ones(()))
    grid = Grid(torch.ones(x.shape[axis]), None, QuantizedType.of_floats("e4m3", axis))
    fake_quant.fake_quantize_with_mask(x, grid)
    fake_quant.fake_quantize_backward(x, x, grid)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("name", INPUTS)
@pytest.mark.parametrize("axis", [None, 0, 1, 2])
@pytest.mark.parametrize("rule", ["torch", "torch_v1"])
def test_min_max(name: str, axis: int | None, rule: str, sanitize: Sanitize) -> None:
    from tritonq.kernels import min_max
    from tritonq.quantized_type import QUINT8

    sanitize(min_max)
    x = with_axis(name, axis)
    channels = () if axis is None else (x.shape[axis],)
    state = (torch.zeros(channels), torch.zeros(channels), torch.zeros((), dtype=torch.int64))
    qparams = (torch.zeros(channels), torch.zeros(channels, dtype=torch.int32))
    enabled = torch.ones(1, dtype=torch.uint8)
    qtype = QUINT8.with_axis(axis)
    statistics = RangeStatistics(*state, qtype.granularity, enabled, averaging_constant=0.1, rule=rule, eps=1e-7)
    min_max.observe(x, statistics, Grid(*qparams, qtype))


def claim_one_column_more(monkeypatch: pytest.MonkeyPatch, module: Any) -> None:
    """Let views claim one column too many: those of reductions, and those that a module finds for several tensors."""
    from tritonq.kernels import reduction

    def wider(view: Any) -> Any:
        outer, rows, cols = view.sizes
        return view._replace(sizes=(outer, rows, cols + 1))

    def dishonest(*arguments: Any) -> Any:
        inputs, view = honest_common(*arguments)
        return inputs, wider(view)

    honest, honest_common = reduction.view, module.common_view
    monkeypatch.setattr(reduction, "view", lambda *arguments: wider(honest(*arguments)))
    monkeypatch.setattr(module, "common_view", dishonest)


@pytest.mark.usefixtures("small_tiles")
def test_finds_a_planted_access_out_of_bounds(
    sanitize: Sanitize, sanitize_loops: Sanitize, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A view that claims one column too many must be caught, or the tests above prove nothing."""
    from tritonq.kernels import fake_quant, min_max

    sanitize(fake_quant)
    sanitize_loops(min_max)
    x = torch.randn(65)
    fake_quant.fake_quantize(x, grid_of(torch.ones(1), None, -8, 7))
    min_max.min_max(x)

    claim_one_column_more(monkeypatch, fake_quant)
    with pytest.raises(SystemExit):
        min_max.min_max(x)
    with pytest.raises(SystemExit):
        fake_quant.fake_quantize(x, grid_of(torch.ones(1), None, -8, 7))


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("name", ["odd", "channels_last", "rows"])
@pytest.mark.parametrize("axis", [None, 0, 1])
@pytest.mark.parametrize("method", ["torch", "megengine", "tqt", "pact"])
def test_learned_scale(name: str, axis: int | None, method: str, sanitize_loops: Sanitize) -> None:
    from tritonq.kernels import learned_scale

    sanitize_loops(learned_scale)
    x = with_axis(name, axis)
    channels = 1 if axis is None else x.shape[axis]
    zero_point = torch.ones(channels, dtype=torch.int32) if method in ("torch", "megengine") else None
    grid = grid_of(torch.ones(channels), zero_point, 0, 7, axis, enabled=torch.ones(1, dtype=torch.uint8))
    learned_scale.learned_fake_quantize(x, grid, method)
    learned_scale.learned_fake_quantize_backward(x, x, grid, method)


@pytest.fixture
def every_bin_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sanitizer doesn't know tl.histogram: here each bin of a window holds one value.

    Where those are added depends on the data, which it does not follow either: the tests of the counts do.
    """
    import triton.language as tl

    def ones(values: Any, num_bins: int, mask: Any = None) -> Any:
        return tl.full([num_bins], 1, tl.int32)

    monkeypatch.setattr(tl, "histogram", ones)


@pytest.mark.usefixtures("small_tiles", "every_bin_counted")
@pytest.mark.parametrize("name", ["odd", "channels_last", "rows"])
@pytest.mark.parametrize("axis", [None, 0, 1])
def test_histograms(name: str, axis: int | None, sanitize_loops: Sanitize) -> None:
    from tritonq.kernels import histogram

    sanitize_loops(histogram)
    x = with_axis(name, axis)
    histogram.prefix_histogram(x, FloatPrefixBins(), axis)
    histogram.linear_histogram(x, 7, torch.tensor([-1.0, 1.0]), axis)


@pytest.mark.parametrize("name", ["odd", "channels_last", "rows"])
@pytest.mark.parametrize("axis", [None, 0, 1])
def test_search_of_fractional_lengths(
    name: str,
    axis: int | None,
    sanitize_loops: Sanitize,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from tritonq.kernels import fixed_point

    sanitize_loops(fixed_point)
    monkeypatch.setattr(fixed_point, "_BLOCK", 16)
    fixed_point.frac_len_errors(with_axis(name, axis), QINT8_NARROW.with_axis(axis), 8)


def convolve(groups: int, saturated: bool, x_channels: int = 6) -> None:
    from tritonq.kernels import int8_conv

    x = torch.randint(0, 256, (2, x_channels, 5, 6), dtype=torch.uint8)
    weight = torch.randint(-127, 128, (6, 6 // groups, 3, 2), dtype=torch.int8)
    bias, shift = torch.zeros(6, dtype=torch.int32), torch.full((6,), 5, dtype=torch.int32)
    counter = torch.zeros(1, dtype=torch.int64) if saturated else None
    geometry = ((2, 1), (1, 0), (1, 2), groups)
    int8_conv.int8_conv2d(x, weight, bias, shift, *geometry, 0, 255, torch.uint8, counter)


@pytest.mark.parametrize("groups", [1, 6])
@pytest.mark.parametrize("saturated", [False, True])
def test_int8_conv(groups: int, saturated: bool, sanitize_loops: Sanitize) -> None:
    from tritonq.kernels import int8_conv

    sanitize_loops(int8_conv)
    convolve(groups, saturated)


@pytest.mark.usefixtures("small_tiles", "every_bin_counted")
def test_finds_planted_accesses_of_reductions(
    sanitize_loops: Sanitize,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Views that claim one column too many, and a weight with more channels than the image."""
    from tritonq.kernels import fixed_point, histogram, int8_conv, learned_scale

    sanitize_loops(fixed_point, histogram, int8_conv, learned_scale)

    claim_one_column_more(monkeypatch, learned_scale)
    x = torch.randn(65)
    with pytest.raises(SystemExit):
        fixed_point.frac_len_errors(x, QINT8_NARROW, 8)
    with pytest.raises(SystemExit):
        histogram.prefix_histogram(x, FloatPrefixBins())
    with pytest.raises(SystemExit):
        learned_scale.learned_fake_quantize_backward(x, x, grid_of(torch.ones(1), None, 0, 7), "torch")
    with pytest.raises(SystemExit):
        convolve(6, False, x_channels=5)
