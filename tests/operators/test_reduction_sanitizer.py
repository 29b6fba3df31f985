"""Histograms, learned scales and fixed point under triton-viz's sanitizer: nothing outside their tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_conv_bn_sanitizer import trace  # noqa: F401 (a fixture: loops nest here too)
from test_sanitizer import INPUTS, small_tiles, traced  # noqa: F401 (a fixture)
from test_sanitizer import trace as symbolic_trace  # noqa: F401 (a fixture)

from grids import grid_of
from tritonq.bins import FloatPrefixBins
from tritonq.qparams import QINT8_NARROW

pytestmark = pytest.mark.sanitizer

Trace = Callable[[Any], Any]


def with_axis(name: str, axis: int | None) -> torch.Tensor:
    x = INPUTS[name]
    if axis is not None and axis >= x.dim():
        pytest.skip("no such axis")
    return x


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("name", ["odd", "channels_last", "rows"])
@pytest.mark.parametrize("axis", [None, 0, 1])
@pytest.mark.parametrize("method", ["torch", "megengine", "tqt", "pact"])
def test_learned_scale(
    name: str,
    axis: int | None,
    method: str,
    trace: Trace,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from tritonq.kernels import learned_scale

    traced(trace, learned_scale, monkeypatch)
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
def test_histograms(
    name: str,
    axis: int | None,
    trace: Trace,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from tritonq.kernels import histogram

    traced(trace, histogram, monkeypatch)
    x = with_axis(name, axis)
    histogram.prefix_histogram(x, FloatPrefixBins(), axis)
    histogram.linear_histogram(x, 7, -1.0, 1.0, axis)


@pytest.mark.parametrize("name", ["odd", "channels_last", "rows"])
@pytest.mark.parametrize("axis", [None, 0, 1])
def test_search_of_fractional_lengths(
    name: str,
    axis: int | None,
    trace: Trace,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from tritonq.kernels import fixed_point

    traced(trace, fixed_point, monkeypatch)
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
def test_int8_conv(
    groups: int,
    saturated: bool,
    trace: Trace,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from tritonq.kernels import int8_conv

    traced(trace, int8_conv, monkeypatch)
    convolve(groups, saturated)


@pytest.mark.usefixtures("small_tiles", "every_bin_counted")
def test_finds_a_planted_access_out_of_bounds(
    trace: Trace,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Views that claim one column too many, and a weight with more channels than the image."""
    from tritonq.kernels import fixed_point, histogram, int8_conv, learned_scale, reduction

    for module in (fixed_point, histogram, int8_conv, learned_scale):
        traced(trace, module, monkeypatch)

    def wider(seen: Any) -> Any:
        outer, rows, cols = seen.sizes
        return seen._replace(sizes=(outer, rows, cols + 1))

    honest_view = reduction.view
    monkeypatch.setattr(reduction, "view", lambda *arguments: wider(honest_view(*arguments)))
    honest_common = learned_scale.common_view

    def dishonest(*arguments: Any) -> Any:
        inputs, seen = honest_common(*arguments)
        return inputs, wider(seen)

    monkeypatch.setattr(learned_scale, "common_view", dishonest)
    x = torch.randn(65)
    with pytest.raises(SystemExit):
        fixed_point.frac_len_errors(x, QINT8_NARROW, 8)
    with pytest.raises(SystemExit):
        histogram.prefix_histogram(x, FloatPrefixBins())
    with pytest.raises(SystemExit):
        learned_scale.learned_fake_quantize_backward(x, x, grid_of(torch.ones(1), None, 0, 7), "torch")
    with pytest.raises(SystemExit):
        convolve(6, False, x_channels=5)
