"""Operations of one or two values, their derivatives, and the loads of operands, as device functions.

The names of functions are those of `tritonq.reference.functions`; results agree except for the last bits. Nothing here
uses libdevice, which Triton's interpreter lacks; only the exponential is the hardware's approximation.
`tritonq.kernels` explains the constants that have no comment.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .rounding import clamp

_ROOT_HALF = tl.constexpr(0.7071067811865476)
_ROOT_TWO_OVER_PI = tl.constexpr(0.7978845608028654)
# Half of the factor in front of the normal density: sqrt(2 / pi) / 2.
_DENSITY = tl.constexpr(0.3989422804014327)
_CUBE = tl.constexpr(0.044715)
_THIRD = tl.constexpr(0.3333333333333333)
_SIXTH = tl.constexpr(0.16666666666666666)


@triton.jit
def load_operand(ptr, offsets, mask, other, scale_ptr, shift_ptr):
    """Load a block as float32: the values as stored, or ``(code - shift) · scale`` with ``scale_ptr``.

    Args:
        ptr: values of any float dtype, or integer codes.
        offsets: of the block's elements.
        mask: which of them exist.
        other: what stands for missing elements; with ``scale_ptr`` it is a code, and is shifted and scaled, too.
        scale_ptr: one float32; None: ``ptr`` holds values.
        shift_ptr: one number of any dtype, the zero point; None stands for zero. Not read without ``scale_ptr``.
    """
    value = tl.load(ptr + offsets, mask=mask, other=other).to(tl.float32)
    if scale_ptr is not None:
        if shift_ptr is not None:
            value = value - tl.load(shift_ptr).to(tl.float32)
        value = value * tl.load(scale_ptr)
    return value


@triton.jit
def operate(a, b, OPERATION: tl.constexpr, NUMBER: tl.constexpr, OTHER_NUMBER: tl.constexpr):
    """Return ``a + b`` ("add"), ``a * b`` ("mul"), ``a`` ("none"), or a function of ``a``, as OPERATION names it.

    :func:`function_value` has the functions' names, and what NUMBER and OTHER_NUMBER are; they are not read for "add",
    "mul" and "none". ``b`` is read for "add" and "mul" only.
    """
    if OPERATION == "none":
        return a
    elif OPERATION == "add":
        return a + b
    elif OPERATION == "mul":
        return a * b
    else:
        return function_value(a, OPERATION, NUMBER, OTHER_NUMBER)


@triton.jit
def function_value(x, FUNCTION: tl.constexpr, NUMBER: tl.constexpr, OTHER_NUMBER: tl.constexpr):
    """Return FUNCTION of float32 values ``x``; NaN stays NaN.

    The names, with their numbers: sigmoid, tanh, silu, hardsigmoid, hardswish, gelu, tanh_gelu, mish, square, abs,
    leaky_relu (slope), elu (alpha), softplus (beta, threshold), clip (low, high), plus (``x + a``), times (``x · a``),
    over (``x / a``), from (``a - x``), ratio (``a / x``). NUMBER is the first number (such as a), OTHER_NUMBER the
    second; each is None where the function has no such number.
    """
    if FUNCTION == "sigmoid":
        return _sigmoid(x)
    elif FUNCTION == "tanh":
        return _tanh(x)
    elif FUNCTION == "silu":
        return x * _sigmoid(x)
    elif FUNCTION == "hardsigmoid":
        return tl.div_rn(clamp(x + 3.0, 0.0, 6.0), 6.0)
    elif FUNCTION == "hardswish":
        return tl.div_rn(x * clamp(x + 3.0, 0.0, 6.0), 6.0)
    elif FUNCTION == "gelu":
        return x * 0.5 * (1.0 + _erf(x * _ROOT_HALF))
    elif FUNCTION == "tanh_gelu":
        return 0.5 * x * (1.0 + _tanh((x + x * x * x * _CUBE) * _ROOT_TWO_OVER_PI))
    elif FUNCTION == "leaky_relu":
        return tl.where(x > 0, x, x * NUMBER)
    elif FUNCTION == "elu":
        return tl.where(x > 0, x, (tl.exp(tl.minimum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)) - 1.0) * NUMBER)
    elif FUNCTION == "softplus":
        return tl.where(x * NUMBER > OTHER_NUMBER, x, tl.div_rn(_softplus(x * NUMBER), NUMBER))
    elif FUNCTION == "clip":
        return clamp(x, NUMBER, OTHER_NUMBER)
    elif FUNCTION == "plus":
        return x + NUMBER
    elif FUNCTION == "times":
        return x * NUMBER
    elif FUNCTION == "over":
        return tl.div_rn(x, NUMBER)
    elif FUNCTION == "from":
        return NUMBER - x
    elif FUNCTION == "ratio":
        return tl.div_rn(1.0, x) * NUMBER
    elif FUNCTION == "square":
        return x * x
    elif FUNCTION == "abs":
        return tl.abs(x)
    else:
        tl.static_assert(FUNCTION == "mish")
        return x * _tanh(_softplus(x))


@triton.jit
def function_derivative(x, FUNCTION: tl.constexpr, NUMBER: tl.constexpr, OTHER_NUMBER: tl.constexpr):
    """Return the derivative of FUNCTION, with its numbers as in :func:`function_value`, at float32 values ``x``.

    Where it jumps: at 0 it is 0 for "abs" and NUMBER for "leaky_relu" and "elu"; at both ends it is 1 for "clip" and 0
    for "hardsigmoid"; for "hardswish" it is 0 at -3 and 1 at 3; for "softplus" sigmoid(threshold) at the threshold.
    """
    if FUNCTION == "sigmoid":
        y = _sigmoid(x)
        return y * (1.0 - y)
    elif FUNCTION == "tanh":
        y = _tanh(x)
        return 1.0 - y * y
    elif FUNCTION == "silu":
        y = _sigmoid(x)
        return y * (1.0 + x * (1.0 - y))
    elif FUNCTION == "hardsigmoid":
        return tl.where((x > -3.0) & (x < 3.0), _SIXTH, 0.0)
    elif FUNCTION == "hardswish":
        return tl.where(x <= -3.0, 0.0, tl.where(x < 3.0, x * _THIRD + 0.5, 1.0))
    elif FUNCTION == "gelu":
        return 0.5 * (1.0 + _erf(x * _ROOT_HALF)) + x * (tl.exp(-0.5 * x * x) * _DENSITY)
    elif FUNCTION == "tanh_gelu":
        y = _tanh((x + x * x * x * _CUBE) * _ROOT_TWO_OVER_PI)
        inner = (x * x * 3.0 * _CUBE + 1.0) * _ROOT_TWO_OVER_PI
        return 0.5 * (1.0 + y) + 0.5 * x * (1.0 - y * y) * inner
    elif FUNCTION == "leaky_relu":
        return tl.where(x > 0, 1.0, NUMBER)
    elif FUNCTION == "elu":
        return tl.where(x > 0, 1.0, tl.exp(tl.minimum(x, 0.0)) * NUMBER)
    elif FUNCTION == "softplus":
        return tl.where(x * NUMBER > OTHER_NUMBER, 1.0, _sigmoid(x * NUMBER))
    elif FUNCTION == "clip":
        return tl.where((x >= NUMBER) & (x <= OTHER_NUMBER), 1.0, 0.0)
    elif FUNCTION == "plus":
        return tl.full(x.shape, 1.0, tl.float32)
    elif FUNCTION == "times":
        return tl.full(x.shape, NUMBER, tl.float32)
    elif FUNCTION == "over":
        return tl.div_rn(tl.full(x.shape, 1.0, tl.float32), NUMBER)
    elif FUNCTION == "from":
        return tl.full(x.shape, -1.0, tl.float32)
    elif FUNCTION == "ratio":
        return -NUMBER * tl.div_rn(1.0, x) * tl.div_rn(1.0, x)
    elif FUNCTION == "square":
        return 2.0 * x
    elif FUNCTION == "abs":
        return tl.where(x > 0, 1.0, tl.where(x < 0, -1.0, 0.0))
    else:
        tl.static_assert(FUNCTION == "mish")
        y = _tanh(_softplus(x))
        return y + x * _sigmoid(x) * (1.0 - y * y)


@triton.jit
def _sigmoid(x):
    return tl.div_rn(1.0, 1.0 + tl.exp(-x))


@triton.jit
def _tanh(x):
    # Of the magnitude, so that the exponential never overflows.
    power = tl.exp(-2.0 * tl.abs(x))
    size = tl.div_rn(1.0 - power, 1.0 + power)
    return tl.where(x < 0, -size, size)


@triton.jit
def _softplus(x):
    """Return ``log(1 + exp(x))``.

    It is ``max(x, 0) + log(1 + p)`` with ``p = exp(-|x|)``, the logarithm a series of ``2 artanh(p / (2 + p))``.
    """
    power = tl.exp(-tl.abs(x))
    ratio = tl.div_rn(power, 2.0 + power)
    square = ratio * ratio
    series = 1.0 / 15 * square + 1.0 / 13
    series = series * square + 1.0 / 11
    series = series * square + 1.0 / 9
    series = series * square + 1.0 / 7
    series = series * square + 1.0 / 5
    series = series * square + 1.0 / 3
    series = series * square + 1.0
    return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL) + 2.0 * ratio * series


@triton.jit
def _erf(x):
    """Return the error function of ``x`` by the polynomials of Eigen and XLA; the last 3 bits may differ."""
    x = clamp(x, -4.0, 4.0)
    square = x * x
    upper = square * -2.72614225801306e-10 + 2.77068142495902e-08
    upper = upper * square + -2.10102402082508e-06
    upper = upper * square + -5.69250639462346e-05
    upper = upper * square + -7.34990630326855e-04
    upper = upper * square + -2.95459980854025e-03
    upper = upper * square + -1.60960333262415e-02
    lower = square * -1.45660718464996e-05 + -2.13374055278905e-04
    lower = lower * square + -1.68282697438203e-03
    lower = lower * square + -7.37332916720468e-03
    lower = lower * square + -1.42647390514189e-02
    return tl.div_rn(x * upper, lower)
