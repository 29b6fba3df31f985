"""The tolerances of all tests, each with its reason.

A tolerance that is no constant (a step of a grid, a share of the largest value) stands in its test, and so do bounds
on what training or an estimate is worth.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Tolerance:
    """How far a result may lie from what is expected, and why that far."""

    rtol: float
    atol: float
    why: str


def _values_of_size_one(rtol: float, why: str) -> Tolerance:
    return Tolerance(rtol, rtol, why)


EXACT = _values_of_size_one(0, "one formula of IEEE operations in one order, or whole numbers")
FLOAT64 = _values_of_size_one(1e-12, "a few float64 operations in another order")
FLOAT64_SUMS = _values_of_size_one(1e-9, "sums of float64 products in another order, or several steps with them")
FLOAT64_LAYERS = _values_of_size_one(1e-10, "one layer and its gradients in float64, sums in another order")
FLOAT32 = _values_of_size_one(1e-6, "a few float32 operations in another order, or rounded once more")
SUMS = _values_of_size_one(1e-5, "sums of some hundred float32 products in another order")
AFFINE_SUMS = _values_of_size_one(2e-5, "sums of some hundred float32 products, and one rounding more or less")
LONG_SUMS = _values_of_size_one(1e-4, "sums of thousands of float32 products, or sums of sums through several layers")
TRAINED = _values_of_size_one(1e-3, "what several training steps make of sums in another order")
HALF = _values_of_size_one(1e-2, "results of 16 bits, or many training steps")

BFLOAT16 = Tolerance(2**-7, 0, "the interpreter truncates where a GPU rounds to bfloat16")

# By operator: reference, kernels and peers must agree so far.
OPERATORS = {
    "fake_quant": EXACT,
    "min_max": Tolerance(
        0, 0, "minimum and maximum are exact in any order, qparams are one formula of IEEE operations"
    ),
    "histogram": Tolerance(0, 0, "counts are integers, and the minimum and maximum are exact in any order"),
    "scale_grad": Tolerance(1e-5, 1e-4, "sums of up to a few thousand float32 terms of size 8 in another order"),
    "conv2d": Tolerance(1e-5, 1e-4, "sums of some hundred float32 products of size 1 in another order"),
    "grad": Tolerance(0, 0, "the gradient is the incoming one, or zero"),
}


def assert_close(
    actual: object,
    expected: object,
    tolerance: Tolerance,
    size: float = 1.0,
    *,
    equal_nan: bool = False,
    msg: str | Callable[[str], str] | None = None,
) -> None:
    """Equal within a tolerance, with the same shape and dtype.

    Args:
        actual: tensors, or nested lists and dicts of them.
        expected: the same.
        tolerance: one of this file.
        size: of the values that small ones are made of: what is allowed beside the share of each value.
        equal_nan: whether NaN equals NaN.
        msg: replaces torch's message, or makes one of it.
    """
    torch.testing.assert_close(
        actual, expected, rtol=tolerance.rtol, atol=tolerance.atol * size, equal_nan=equal_nan, msg=msg
    )


def assert_matches(actual: Tensor, expected: Tensor, op: str) -> None:
    """Equal within ``op``'s tolerance, with the same shape and dtype; NaN equals NaN, and the sign of zero is free.

    (torch's operator goes through integers and so returns +0 for small negative values, float operators return -0.)
    """
    assert_close(actual, expected, OPERATORS[op], equal_nan=True)
