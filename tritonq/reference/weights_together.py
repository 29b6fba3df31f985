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
    """Fold, observe and quantize several weights, one after the other.

    Each weight times its fold updates range and grid, in place. Its codes are ``clip(round(rows · fold / s) + z) - z``
    with scale s and zero point z of the updated grid.

    Args:
        rows: one (out, ...) per weight, float32.
        fold: (all out channels,) float32, a factor per out channel, in the order of ``rows``.
        grids: one per weight, per out channel (axis 0).
        statistics: per weight the running range of its grid; None observes nothing.

    Returns:
        Per weight its codes (float32, shaped as its rows), their unit (the scale of each row), one bool, and a copy of
        its grid. The bool says whether any value was clipped; it is True if that is not known. While a grid is switched
        off or its range has no data, codes are ``rows · fold``, and units are 1.
    """
    folds = torch.split(fold, [len(weight) for weight in rows])
    return [quantize_folded(*of_one) for of_one in zip(rows, folds, grids, statistics, strict=True)]
