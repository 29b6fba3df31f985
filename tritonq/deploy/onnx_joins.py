"""Sums, differences and products as ONNX operators that give the trained codes.

ONNX Runtime runs ``DequantizeLinear → Add → QuantizeLinear`` as QLinearAdd, the same with Mul as QLinearMul and with
MatMul as QLinearMatMul. It has no integer subtraction: a difference is the sum with a second DequantizeLinear of the
subtrahend's codes, whose scale is negative.
"""

from __future__ import annotations

from functools import partial
from typing import Any, cast

from torch import Tensor, nn

from tritonq.deploy.onnx_ops import negate_codes
from tritonq.functional.integer_joins import float_join, is_second
from tritonq.nn import Joint
from tritonq.reference.activation import rectify


def rewrite_join(join: Joint, subtrahend: nn.Module | None) -> None:
    """Make a join trace to its float operation, then its ReLU, if it has one, and its output quantizer.

    In a sum the operand that is broadcast comes second. With ``subtrahend`` a difference becomes a sum: the codes of
    its second operand are dequantized with the negative scale.

    Args:
        join: a sum, difference, product (of matrices, too), minimum or maximum, whose output quantizer is already one
            that traces to the file's operators; changed in place.
        subtrahend: for a difference the :class:`TracedQuantizer` of its second operand; None: it stays a difference, in
            float. Ignored for other operations.
    """
    if join.kind == "sub" and subtrahend is not None:
        scale, zero_point = cast(Tensor, subtrahend.scale), cast(Tensor, subtrahend.zero_point)
        join.register_buffer("scale", scale)
        join.register_buffer("negative_scale", -scale)
        join.register_buffer("zero_point", zero_point)
    join.joined = partial(_joined, join, subtrahend is not None)  # type: ignore[method-assign]


def _joined(join: Any, negates: bool, a: Tensor, b: Tensor) -> Tensor:
    kind = join.kind
    if kind == "sub" and negates:
        kind, b = "add", negate_codes(b, join.scale, join.negative_scale, join.zero_point)
    if kind == "add" and is_second(a, b):
        a, b = b, a
    return cast(Tensor, join.activation_post_process(rectify(float_join(kind, a, b), join.ceiling)))
