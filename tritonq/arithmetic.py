"""Elementary functions of tensors and of single numbers under the same names, so that a formula is written once.

A formula such as `range_to_qparams` takes one of two objects, ``TENSORS`` or ``NUMBERS``, and calls its methods. On a
CPU an operator on a tensor of one element costs as much as one on a thousand. A single number is therefore computed as
a NumPy scalar, in the same precision and with the same roundings.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor


class Arithmetic(Protocol):
    """The operations that a formula needs besides ``+``, ``-``, ``*`` and ``/``.

    :class:`TensorArithmetic` and :class:`NumberArithmetic` implement them. Rounded values keep their float dtype.
    """

    def constant(self, value: float, like: Any) -> Any:
        """Return the number ``value`` as an operand that can stand beside ``like`` in ``+``, ``-``, ``*`` and ``/``."""

    def larger(self, x: Any, y: Any) -> Any:
        """Return the larger of two values, elementwise."""

    def at_least(self, x: Any, floor: float) -> Any:
        """Return ``x``, or ``floor`` where that is larger."""

    def at_most(self, x: Any, ceiling: float) -> Any:
        """Return ``x``, or ``ceiling`` where that is smaller."""

    def round(self, x: Any) -> Any:
        """Round to the nearest integer, ties to even."""

    def round_half_away(self, x: Any) -> Any:
        """Round to the nearest integer, ties away from zero."""


class TensorArithmetic:
    """:class:`Arithmetic` of float tensors, elementwise, where NaN stays NaN; ``TENSORS`` is the one instance."""

    def constant(self, value: float, like: Tensor) -> float | Tensor:
        """Return ``value`` as a 0-d tensor of the dtype of ``like`` if that is a plain tensor on a CPU, else unchanged.

        It is unchanged, too, while ``torch.compile`` traces. The tensor is shared by all calls: do not write to it.
        """
        return operand(value, like)

    def larger(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the larger of two values, elementwise."""
        return torch.maximum(x, y)

    def at_least(self, x: Tensor, floor: float) -> Tensor:
        """Return ``x``, or ``floor`` where that is larger."""
        return x.clamp(min=floor)

    def at_most(self, x: Tensor, ceiling: float) -> Tensor:
        """Return ``x``, or ``ceiling`` where that is smaller."""
        return x.clamp(max=ceiling)

    def round(self, x: Tensor) -> Tensor:
        """Round to the nearest integer, ties to even."""
        return x.round()

    def round_half_away(self, x: Tensor) -> Tensor:
        """Round to the nearest integer, ties away from zero; NaN and infinities stay as they are.

        It is exact. ``floor(x + 0.5)`` would round 0.49999997 to 1 in float32.
        """
        # The largest number below 1/2: with 1/2 itself, the largest number below 1/2 would round to 1. Torch's floor is
        # vectorised on CPUs, its trunc is not.
        below_half = 0.5 - torch.finfo(x.dtype).eps / 4
        return x.abs().add_(below_half).floor_().copysign_(x)


class NumberArithmetic:
    """:class:`Arithmetic` of finite float32 numbers, as NumPy scalars; ``NUMBERS`` is the one instance."""

    def constant(self, value: float, like: np.float32 | None = None) -> np.float32:
        """Return ``value`` as a float32 scalar; ``like`` is not used."""
        number: np.float32 = np.float32(value)
        return number

    def larger(self, x: np.float32, y: np.float32) -> np.float32:
        """Return the larger of two numbers."""
        return x if x >= y else y

    def at_least(self, x: np.float32, floor: float) -> np.float32:
        """Return ``x``, or ``floor`` if that is larger."""
        return self.larger(x, self.constant(floor))

    def at_most(self, x: np.float32, ceiling: float) -> np.float32:
        """Return ``x``, or ``ceiling`` if that is smaller."""
        top = self.constant(ceiling)
        return x if x <= top else top

    def round(self, x: np.float32) -> np.float32:
        """Round to the nearest integer, ties to even."""
        return self.constant(np.rint(x))

    def round_half_away(self, x: np.float32) -> np.float32:
        """Round to the nearest integer, ties away from zero."""
        size = np.abs(x)
        whole = np.floor(size)
        return self.constant(np.copysign(whole + (size - whole >= 0.5), x))


def as_dtype(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return ``x.to(dtype)``, or ``x`` itself if it has that dtype, without a call of PyTorch."""
    return x if x.dtype is dtype else x.to(dtype)


def as_now(*values: Tensor) -> Sequence[Tensor]:
    """Return ``values``, the same tensors in a tuple.

    While ``torch.compile`` traces, return a list of copies, so that a backward pass finds the present values. A
    compiler may compute a value again in the backward pass, after its inputs have changed (`tritonq.remember`). Both
    the forward and the backward pass must use what is returned.
    """
    if not torch.compiler.is_compiling():
        return values
    # Imported here, so that its operator is registered when something is compiled, and not before.
    from tritonq.remember import remember

    return remember(*values)


def operand(number: float, like: Tensor) -> float | Tensor:
    """Return ``number`` as the second operand of an operator on the float tensor ``like``: as what costs least.

    For an ordinary tensor on a CPU that is a 0-d tensor of its dtype, made once for each number and dtype and kept,
    so that PyTorch converts nothing in each call. It must not be written to. On other devices, for subclasses of
    Tensor and while ``torch.compile`` traces it is the number itself. With float32 and float64 the operator's result
    has the same bits either way.
    """
    # 0.0 and -0.0 are the same key of a cache.
    if number == 0 or type(like) is not Tensor or not like.is_cpu or torch.compiler.is_compiling():
        return number
    return _kept_number(number, like.dtype)


@lru_cache(maxsize=4096)
def _kept_number(number: float, dtype: torch.dtype) -> Tensor:
    # Not of inference mode, even if that is on: the next call may come outside of it.
    with torch.inference_mode(False):
        return torch.tensor(number, dtype=dtype)


TENSORS, NUMBERS = TensorArithmetic(), NumberArithmetic()


def round_half_away(x: Tensor) -> Tensor:
    """Round to the nearest integer, ties away from zero; NaN and infinities stay as they are.

    It is exact. ``floor(x + 0.5)`` would round 0.49999997 to 1 in float32.

    Examples:
        >>> round_half_away(torch.tensor([-2.5, -0.5, 0.49999997, 1.5]))
        tensor([-3., -1.,  0.,  2.])
    """
    return TENSORS.round_half_away(x)


def round_steps_(steps: Tensor, rounding: str) -> Tensor:
    """Return ``steps`` rounded to the nearest integers; ``steps`` itself may be overwritten.

    ``rounding`` says where ties go: ``"half_even"`` to the even neighbour, ``"half_away"`` away from zero.

    Examples:
        >>> round_steps_(torch.tensor([-2.5, 0.5]), "half_even"), round_steps_(torch.tensor([-2.5, 0.5]), "half_away")
        (tensor([-2.,  0.]), tensor([-3.,  1.]))
    """
    return steps.round_() if rounding == "half_even" else round_half_away(steps)


def whole_number(value: object, *, of_floats: bool = False) -> int | None:
    """Return an integer of Python or NumPy as an int; None for anything else, bools among them.

    Args:
        value: what a caller gave.
        of_floats: take floats without a fraction too.

    Examples:
        >>> import numpy
        >>> whole_number(numpy.int64(3)), whole_number(3.0), whole_number(3.0, of_floats=True), whole_number(True)
        (3, None, 3, None)
    """
    if type(value) is int:
        return value
    if isinstance(value, bool) or not isinstance(value, numbers.Real if of_floats else numbers.Integral):
        return None
    if isinstance(value, numbers.Integral):
        return int(value)
    number = float(value)
    return int(number) if number.is_integer() else None


def real_number(value: object) -> float | None:
    """Return a real number of Python or NumPy as a float; None for anything else, bools and tensors among them.

    An int beyond float64's range becomes an infinity.

    Examples:
        >>> import numpy
        >>> real_number(numpy.float32(0.5)), real_number(2), real_number(True)
        (0.5, 2.0, None)
    """
    if type(value) is float:
        return value
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return None
    try:
        return float(value)
    except OverflowError:
        return -math.inf if value < 0 else math.inf


def keep_whole_numbers(record: object, **fields: int | None) -> None:
    """Write fields of the frozen dataclass ``record`` that are NumPy's integers as ints, in place.

    Ints and None stay as they are. The caller has checked that ``fields``, values by name, are whole numbers or None.
    """
    for name, value in fields.items():
        if value is not None and type(value) is not int:
            object.__setattr__(record, name, whole_number(value))
