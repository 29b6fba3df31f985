"""The tolerances that operators' tests share, each with its reason; a tolerance of one test stands in that test."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Tolerance:
    """How far a result may lie from what is expected, and why that far."""

    rtol: float
    atol: float
    why: str


TOLERANCES = {
    "fake_quant": Tolerance(0, 0, "one formula of IEEE operations in one order, rounded once to the result's dtype"),
    "min_max": Tolerance(
        0, 0, "minimum and maximum are exact in any order, qparams are one formula of IEEE operations"
    ),
    "histogram": Tolerance(0, 0, "counts are integers, and the minimum and maximum are exact in any order"),
    "scale_grad": Tolerance(1e-5, 1e-4, "sums of up to a few thousand float32 terms of size 8 in another order"),
    "conv2d": Tolerance(1e-5, 1e-4, "sums of some hundred float32 products of size 1 in another order"),
    "grad": Tolerance(0, 0, "the gradient is the incoming one, or zero"),
}


def assert_matches(actual: Tensor, expected: Tensor, op: str) -> None:
    """Equal within ``op``'s tolerance, with the same shape and dtype; NaN equals NaN, and the sign of zero is free.

    (torch's operator goes through integers and so returns +0 for small negative values, float operators return -0.)
    """
    tolerance = TOLERANCES[op]
    torch.testing.assert_close(actual, expected, rtol=tolerance.rtol, atol=tolerance.atol, equal_nan=True)
