"""`tritonq.reference.histogram` for ``torch.compile``, as far as observers call it."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from tritonq.backend import implementation
from tritonq.bins import FloatPrefixBins
from tritonq.functional.traced.text import qtype_of, qtype_text
from tritonq.qparams import QuantizedType, RangeRule
from tritonq.reference import search as range_search
from tritonq.reference.search import Search


def observe(
    x: Tensor,
    histogram: Tensor,
    min_val: Tensor,
    max_val: Tensor,
    nonfinite_count: Tensor,
    enabled: Tensor | None,
    bins: FloatPrefixBins,
    axis: int | None,
) -> None:
    """See the reference."""
    _observe(x, histogram, min_val, max_val, nonfinite_count, enabled, list(dataclasses.astuple(bins)), axis)


def prefix_histogram(
    x: Tensor, bins: FloatPrefixBins, axis: int | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See the reference."""
    counts, low, high, nonfinite = _prefix_histogram(x, list(dataclasses.astuple(bins)), axis)
    return counts, low, high, nonfinite


def search_range(
    counts: Tensor,
    low: Tensor,
    high: Tensor,
    bins: FloatPrefixBins,
    qtype: QuantizedType,
    search: Search,
    rule: RangeRule = "torch",
    eps: float | None = None,
    percentile: float = 99.99,
) -> tuple[Tensor, Tensor]:
    """See `tritonq.reference.search`: one operator, whose hundreds of steps no compiler makes faster."""
    text = f"{search} {rule} {qtype_text(qtype)}"
    lo, hi = _search_range(counts, low, high, list(dataclasses.astuple(bins)), text, eps, percentile)
    return lo, hi


@torch.library.custom_op("tritonq::search_range", mutates_args=())
def _search_range(
    counts: Tensor, low: Tensor, high: Tensor, bins: list[int], text: str, eps: float | None, percentile: float
) -> tuple[Tensor, Tensor]:
    kind: Any
    rule: Any
    kind, rule, grid = text.split(" ", 2)
    lo, hi = range_search.search_range(
        counts, low, high, FloatPrefixBins(*bins), qtype_of(grid), kind, rule, eps, percentile
    )
    return lo.clone(), hi.clone()


@_search_range.register_fake
def _(
    counts: Tensor, low: Tensor, high: Tensor, bins: list[int], text: str, eps: float | None, percentile: float
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(low), torch.empty_like(high)


@torch.library.custom_op(
    "tritonq::observe_histogram", mutates_args=("histogram", "min_val", "max_val", "nonfinite_count")
)
def _observe(
    x: Tensor,
    histogram: Tensor,
    min_val: Tensor,
    max_val: Tensor,
    nonfinite_count: Tensor,
    enabled: Tensor | None,
    bins: list[int],
    axis: int | None,
) -> None:
    state = (histogram, min_val, max_val, nonfinite_count)
    implementation("histogram", x).observe(x, *state, enabled, FloatPrefixBins(*bins), axis)


@_observe.register_fake
def _(
    x: Tensor,
    histogram: Tensor,
    min_val: Tensor,
    max_val: Tensor,
    nonfinite_count: Tensor,
    enabled: Tensor | None,
    bins: list[int],
    axis: int | None,
) -> None:
    return None


@torch.library.custom_op("tritonq::prefix_histogram", mutates_args=())
def _prefix_histogram(x: Tensor, bins: list[int], axis: int | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    counts, low, high, nonfinite = implementation("histogram", x).prefix_histogram(x, FloatPrefixBins(*bins), axis)
    return counts.contiguous(), low.clone(), high.clone(), nonfinite.clone()


@_prefix_histogram.register_fake
def _(x: Tensor, bins: list[int], axis: int | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    channels = () if axis is None else (x.shape[axis],)
    counts = x.new_empty((*channels, FloatPrefixBins(*bins).count), dtype=torch.int64)
    low = x.new_empty(channels, dtype=torch.float32)
    return counts, low, torch.empty_like(low), x.new_empty((), dtype=torch.int64)
