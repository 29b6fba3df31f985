"""Sums, differences, products, matrix products and concatenations of quantized tensors, as integer runtimes do them.

A *join* is an operation of two or more tensors. The order of the float32 operations below decides ties, and a tie that
falls otherwise changes every layer behind it. The formulas are those of ONNX Runtime's kernels on x86 and Arm, compared
over all pairs of codes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal

import torch
from torch import Tensor

from tritonq.arithmetic import round_steps_
from tritonq.functional.integer import BYTE_BITS, FLOAT32_EXACT, centred_codes
from tritonq.grid import Grid

# Operations of two tensors: element by element with broadcasting, and the product of (batches of) matrices.
JoinKind = Literal["add", "sub", "mul", "matmul", "minimum", "maximum"]

# What the sums of an integer matrix product stay below: those of codes of up to 8 bits in int32, of wider ones in
# int64, as far as float64 holds them.
_INT32_END = 2**31
_INT64_END = 2**53


def float_join(kind: JoinKind, a: Tensor, b: Tensor) -> Tensor:
    """Return ``a + b``, ``a - b``, ``a * b``, ``a @ b``, or their elementwise minimum or maximum, as torch does.

    ``kind`` is, in this order, ``"add"``, ``"sub"``, ``"mul"``, ``"matmul"``, ``"minimum"`` or ``"maximum"``.
    """
    result: Tensor = _IN_FLOAT[kind](a, b)
    return result


def joint_dtype(a: Tensor, b: Tensor) -> torch.dtype:
    """Return the dtype of :func:`float_join` of two float tensors: the wider one, or float32 for float16 and bfloat16.

    A 0-d tensor does not count beside one with axes. It is the dtype of ``torch.result_type``, which no graph of
    ``torch.compile`` can hold.
    """
    counted = [operand.dtype for operand in (a, b) if operand.dim()] or [a.dtype, b.dtype]
    return torch.promote_types(counted[0], counted[-1])


def integer_join(kind: JoinKind, a: Tensor, b: Tensor, grid_a: Grid, grid_b: Grid, output: Grid) -> Tensor:
    """Return ``round(v / s) · s``, with v the join of ``a`` and ``b`` and s the output's scale; not clipped yet.

    v is computed from the codes of both operands (minimum and maximum: from values). The float32 operations, whose
    order decides ties, stand at the function of each kind.

    Args:
        kind: ``"add"`` (:func:`integer_add`), ``"sub"`` (:func:`integer_subtract`), ``"mul"``
            (:func:`integer_multiply`), ``"matmul"`` (:func:`integer_matmul`), ``"minimum"`` or ``"maximum"``, which
            engines compute in float32 (:func:`divided`).
        a: float tensor of values on ``grid_a``.
        b: float tensor of values on ``grid_b``; broadcasts against ``a`` except for ``"matmul"``.
        grid_a: grid of ``a``, per tensor.
        grid_b: grid of ``b``, per tensor.
        output: grid of the quantizer behind the operation, per tensor; its type says how ties are rounded. (A ReLU
            between operation and quantizer keeps values on it.)

    Returns:
        float32, without gradient.

    Raises:
        ValueError: a ``"matmul"`` whose sums may be too large, as :func:`integer_matmul` says.
    """
    with torch.no_grad():
        return _IN_INTEGERS[kind](a, b, grid_a, grid_b, output)


def integer_add(a: Tensor, b: Tensor, grid_a: Grid, grid_b: Grid, output: Grid) -> Tensor:
    """Return ``a + b`` on the output's grid, before clipping.

    The result is ``(code - z_out) · s_out``. With ratios ``r = scale / s_out``, all in float32, and fma rounded once:
    ``code = round(fma(u, r_a, fma(v, r_b, z_out - fma(z_a, r_a, r_b z_b))))``. u, v are the operands' codes, counted
    from 0 (the smallest code of their type), and z zero points counted likewise; the output's type says how ties are
    rounded. A summand that is broadcast to the other's shape takes the part of b; if both have one shape of one element
    the first does; :func:`is_second` has the rule.

    Args:
        a: float tensor of values on ``grid_a``.
        b: float tensor of values on ``grid_b`` that broadcasts against ``a``.
        grid_a: grid of ``a``, per tensor.
        grid_b: grid of ``b``, per tensor.
        output: grid of the quantizer behind the operation.

    Returns:
        float32.

    Source: QLinearAdd of ONNX Runtime.
    """
    if is_second(a, b):
        a, b, grid_a, grid_b = b, a, grid_b, grid_a
    ratio_a, ratio_b = grid_a.scale / output.scale, grid_b.scale / output.scale
    offset_a, offset_b, offset = (_offset(grid) for grid in (grid_a, grid_b, output))
    fixed = offset - _multiply_add(offset_a, ratio_a, offset_b * ratio_b)
    inner = _multiply_add(centred_codes(b, grid_b.scale) + offset_b, ratio_b, fixed)
    total = _multiply_add(centred_codes(a, grid_a.scale) + offset_a, ratio_a, inner)
    return round_steps_(total, output.qtype.rounding).sub_(offset).mul_(output.scale)


def integer_subtract(a: Tensor, b: Tensor, grid_a: Grid, grid_b: Grid, output: Grid) -> Tensor:
    """Return ``a - b`` on the output's grid, before clipping: :func:`integer_add` of ``-b`` with a negative scale.

    The result is ``(code - z_out) · s_out``. With ``r_a = s_a / s_out``, ``r_b = -s_b / s_out`` in float32, and fma
    rounded once: ``code = round(fma(u, r_a, fma(v, r_b, z_out - fma(z_a, r_a, r_b z_b))))``; u, v are the operands'
    codes counted from 0 (the smallest code of their type), z zero points counted likewise. Ties and broadcasting are
    those of :func:`integer_add`.

    Args:
        a: float tensor of values on ``grid_a``.
        b: float tensor of values on ``grid_b`` that broadcasts against ``a``.
        grid_a: grid of ``a``, per tensor.
        grid_b: grid of ``b``, per tensor.
        output: grid of the quantizer behind the operation.

    Returns:
        float32.

    Source: QLinearAdd of ONNX Runtime, which has no subtraction and takes negative scales.
    """
    return integer_add(a, -b, grid_a, grid_b.with_scale(-grid_b.scale), output)


def integer_multiply(a: Tensor, b: Tensor, grid_a: Grid, grid_b: Grid, output: Grid) -> Tensor:
    """Return ``a * b`` on the output's grid, before clipping.

    The result is ``(code - z) · s_out``. With u, v the codes minus zero points, z the output's zero point counted from
    its smallest code, and fl rounding to float32: ``code = round(fl(fl(u v · fl(fl(s_a s_b) / s_out)) + z))``. The
    output's type says how ties are rounded.

    Args:
        a: float tensor of values on ``grid_a``.
        b: float tensor of values on ``grid_b`` that broadcasts against ``a``.
        grid_a: grid of ``a``, per tensor.
        grid_b: grid of ``b``, per tensor.
        output: grid of the quantizer behind the operation.

    Returns:
        float32.

    Source: QLinearMul of ONNX Runtime.

    Examples:
        >>> from tritonq.quantized_type import QINT8
        >>> grids = [Grid(torch.tensor([scale]), None, QINT8) for scale in (0.5, 0.25, 0.5)]
        >>> integer_multiply(torch.tensor([1.5, 2.5]), torch.tensor([0.5, 0.5]), *grids)  # 1.5 and 2.5 steps: ties
        tensor([1., 1.])
    """
    steps_per_code = grid_a.scale * grid_b.scale / output.scale
    offset = _offset(output)
    steps = (centred_codes(a, grid_a.scale) * centred_codes(b, grid_b.scale)).mul_(steps_per_code).add_(offset)
    return round_steps_(steps, output.qtype.rounding).sub_(offset).mul_(output.scale)


def integer_matmul(a: Tensor, b: Tensor, grid_a: Grid, grid_b: Grid, output: Grid) -> Tensor:
    """Return ``a @ b`` on the output's grid, before clipping: sums in integers, then one requantization.

    The result is ``(code - z) · s_out`` with the output's zero point z. With u, v the operands' codes minus zero points
    and fl rounding to float32: ``code = round(fl(Σ u v) · fl(fl(s_a s_b) / s_out)) + z``. The sums are exact, in
    whatever order they are added. The output's type says how ties are rounded.

    Args:
        a: (..., m, k) or (k,) of values on ``grid_a``, as :func:`torch.matmul` takes it.
        b: (..., k, n) or (k,) of values on ``grid_b``.
        grid_a: grid of ``a``, per tensor.
        grid_b: grid of ``b``, per tensor.
        output: grid of the quantizer behind the product.

    Returns:
        float32 (..., m, n); without m or n where ``a`` or ``b`` is (k,).

    Raises:
        ValueError: a sum of k products may reach 2^31 by the types of the grids (2^53 if one has more than 8 bits).

    Source: QLinearMatMul of ONNX.

    Examples:
        >>> from tritonq.quantized_type import QINT8
        >>> grids = [Grid(torch.tensor([scale]), None, QINT8) for scale in (0.5, 0.25, 0.5)]
        >>> integer_matmul(torch.tensor([[1.5, 0.5]]), torch.tensor([[0.5], [1.0]]), *grids)  # 6 + 4 products of 1/8
        tensor([[1.]])
    """
    length = a.shape[-1]
    bound = length * largest_magnitude(grid_a) * largest_magnitude(grid_b)
    is_wide = max(grid_a.qtype.bits, grid_b.qtype.bits) > BYTE_BITS
    if bound >= (_INT64_END if is_wide else _INT32_END):
        sums = "sums of 53 bits" if is_wide else "int32 sums of integer runtimes"
        raise ValueError(
            f"a matrix product over {length} elements of {grid_a.qtype.bits} and {grid_b.qtype.bits} bits may pass the "
            f"{sums}: use fewer bits, or leave the product in float"
        )
    # A GPU may multiply float32 as TF32, which holds codes of 8 bits, and not those of 16.
    dtype = torch.float32 if bound < FLOAT32_EXACT and not is_wide else torch.float64
    u, v = (centred_codes(x, grid.scale).to(dtype) for x, grid in ((a, grid_a), (b, grid_b)))
    # Autocast would round the sums to 8 or 11 bits.
    with torch.autocast(a.device.type, enabled=False):
        total = torch.matmul(u, v).float()
    steps_per_code = grid_a.scale * grid_b.scale / output.scale
    return round_steps_(total.mul_(steps_per_code), output.qtype.rounding).mul_(output.scale)


def largest_magnitude(grid: Grid) -> int:
    """Return the largest magnitude of ``code - zero_point`` that a grid's type allows.

    It is the distance from 0 to the farther end of the codes if the grid has no zero point. Else any code may be the
    zero point, of symmetric types too (`tritonq.qparams`), and it is ``quant_max - quant_min``.
    """
    lowest, highest = grid.qtype.quant_min, grid.qtype.quant_max
    return max(-lowest, highest) if grid.zero_point is None else highest - lowest


def integer_concatenation(tensors: tuple[Tensor, ...], dim: int, output: Grid) -> Tensor:
    """Return the concatenation along ``dim`` as ``round(x / s) · s`` with the output's scale s, not clipped.

    The output's type says how ties are rounded. Training multiplies by 1 / s, which rounds some ties to the other side.

    Args:
        tensors: float tensors of values on grids, of shapes that torch.cat takes.
        dim: the axis of the concatenation; may be negative.
        output: grid of the quantizer behind it, per tensor.

    Returns:
        float32, without gradient.

    Source: QLinearConcat of ONNX Runtime.
    """
    with torch.no_grad():
        return divided(torch.cat(tensors, dim), output)


def divided(x: Tensor, output: Grid) -> Tensor:
    """Return ``round(x / s) · s`` in float32 with the output's scale s, which ONNX's QuantizeLinear divides by, too.

    The output's type says how ties are rounded; nothing is clipped.
    """
    return round_steps_(x.float() / output.scale, output.qtype.rounding).mul_(output.scale)


def is_second(a: Tensor, b: Tensor) -> bool:
    """Whether ONNX Runtime adds ``a`` as the second summand of ``a + b``.

    That is so if ``a`` is broadcast to the shape of ``b``, or if both have one shape of one element. If both are
    broadcast, the runtime's innermost loop decides: along the last axis of more than one element, a summand that has
    one element counts as the second.
    """
    if a.shape == b.shape:
        return a.numel() == 1
    shape: torch.Size = torch.broadcast_shapes(a.shape, b.shape)
    if shape in (a.shape, b.shape):
        return shape == b.shape
    for size_a, size_b in zip(reversed(a.shape), reversed(b.shape), strict=False):
        if max(size_a, size_b) > 1:
            return size_a == 1
    return False


_IN_FLOAT: Mapping[str, Callable[..., Tensor]] = {
    "add": torch.add,
    "sub": torch.sub,
    "mul": torch.mul,
    "matmul": torch.matmul,
    "minimum": torch.minimum,
    "maximum": torch.maximum,
}
_IN_INTEGERS: Mapping[str, Callable[..., Tensor]] = {
    "add": integer_add,
    "sub": integer_subtract,
    "mul": integer_multiply,
    "matmul": integer_matmul,
    "minimum": lambda a, b, grid_a, grid_b, output: divided(torch.minimum(a, b), output),
    "maximum": lambda a, b, grid_a, grid_b, output: divided(torch.maximum(a, b), output),
}


def _offset(grid: Grid) -> Tensor:
    """Return a grid's zero point counted from its smallest code, ``zero_point - quant_min``, float32."""
    if grid.zero_point is None:
        return torch.full_like(grid.scale, -grid.qtype.quant_min)
    return (grid.zero_point - grid.qtype.quant_min).float()


def _multiply_add(codes: Tensor, ratio: Tensor, addend: Tensor) -> Tensor:
    """Return ``codes · ratio + addend``, rounded to float32 once: the product is exact in float64."""
    return (codes.double() * ratio.double() + addend.double()).float()
