"""Quantizing many weights at once, in PyTorch: the specification of `tritonq.kernels.weights_together`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tritonq.grid import Grid, RangeStatistics
from tritonq.reference.weight import WeightCodes, quantize_folded


def quantize_all(
    rows: Sequence[Tensor], fold: Tensor, grids: Sequence[Grid], statistics: Sequence[RangeStatistics | None]
) -> list[WeightCodes]:
    """Fold, observe and quantize several weights: :func:`tritonq.reference.weight.quantize_folded` of each, in order.

    Args:
        rows: one (out, ...) per weight, float32.
        fold: (all out channels,) float32, in the order of ``rows``.
        grids: one per weight, per channel.
        statistics: per weight the running range of its grid, which the folded weight updates; None observes nothing.
    """
    folds = torch.split(fold, [len(weight) for weight in rows])
    return [quantize_folded(*of_one) for of_one in zip(rows, folds, grids, statistics, strict=True)]
