"""Elementary functions of tensors and of single numbers under one name, so that a formula is written once.

On a CPU an operator on a tensor of one element costs as much as one on a thousand: what is one number is computed as a
NumPy scalar, in the same precision and with the same roundings.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor


class Arithmetic(Protocol):
    """What a formula needs besides ``+``, ``-``, ``*`` and ``/`` between its values."""

    def constant(self, value: float, like: Any) -> Any:
        """Return a Python number as an operand beside ``like``."""

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


class Tensors:
    """Arithmetic of float tensors."""

    def constant(self, value: float, like: Tensor) -> float | Tensor:
        """See :class:`Arithmetic`."""
        return operand(value, like)

    def larger(self, x: Tensor, y: Tensor) -> Tensor:
        """See :class:`Arithmetic`."""
        return torch.maximum(x, y)

    def at_least(self, x: Tensor, floor: float) -> Tensor:
        """See :class:`Arithmetic`."""
        return x.clamp(min=floor)

    def at_most(self, x: Tensor, ceiling: float) -> Tensor:
        """See :class:`Arithmetic`."""
        return x.clamp(max=ceiling)

    def round(self, x: Tensor) -> Tensor:
        """See :class:`Arithmetic`."""
        return x.round()

    def round_half_away(self, x: Tensor) -> Tensor:
        """Exact, unlike ``floor(x + 0.5)``, which rounds 0.49999997 to 1 in float32; NaN and infinities pass."""
        # The largest number below 1/2: with 1/2 itself, the largest number below 1/2 would round to 1. Torch's floor is
        # vectorised on CPUs, its trunc is not.
        below_half = 0.5 - torch.finfo(x.dtype).eps / 4
        return x.abs().add_(below_half).floor_().copysign_(x)


class Numbers:
    """Arithmetic of NumPy float32 scalars that are finite."""

    def constant(self, value: float, like: np.float32 | None = None) -> np.float32:
        """See :class:`Arithmetic`."""
        number: np.float32 = np.float32(value)
        return number

    def larger(self, x: np.float32, y: np.float32) -> np.float32:
        """See :class:`Arithmetic`."""
        return x if x >= y else y

    def at_least(self, x: np.float32, floor: float) -> np.float32:
        """See :class:`Arithmetic`."""
        return self.larger(x, self.constant(floor))

    def at_most(self, x: np.float32, ceiling: float) -> np.float32:
        """See :class:`Arithmetic`."""
        top = self.constant(ceiling)
        return x if x <= top else top

    def round(self, x: np.float32) -> np.float32:
        """See :class:`Arithmetic`."""
        return self.constant(np.rint(x))

    def round_half_away(self, x: np.float32) -> np.float32:
        """See :class:`Arithmetic`."""
        size = np.abs(x)
        whole = np.floor(size)
        return self.constant(np.copysign(whole + (size - whole >= 0.5), x))


def as_dtype(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return ``x.to(dtype)``: ``x`` itself, without a call of PyTorch, where it has that dtype."""
    return x if x.dtype is dtype else x.to(dtype)


def as_now(*values: Tensor) -> Sequence[Tensor]:
    """Return ``values``; in a traced graph copies, which a backward pass finds as they are now (`tritonq.remember`).

    The forward pass must use the copies too: what the backward alone uses is made there.
    """
    if not torch.compiler.is_compiling():
        return values
    # Imported here, so that its operator is registered when something is compiled, and not before.
    from tritonq.remember import remember

    return remember(*values)


def operand(number: float, like: Tensor) -> float | Tensor:
    """Return ``number`` as the other operand of an operator on ``like``: on a CPU as a tensor that is kept.

    PyTorch would make one, and convert it to ``like``'s dtype, in each call: twice to thrice the time of an operator on
    some hundred channels. The bits are the same.
    """
    if type(like) is not Tensor or not like.is_cpu or torch.compiler.is_compiling():
        return number
    return _kept_number(number, like.dtype)


@lru_cache(maxsize=4096)
def _kept_number(number: float, dtype: torch.dtype) -> Tensor:
    # Not of inference mode, even if that is on: the next call may come outside of it.
    with torch.inference_mode(False):
        return torch.tensor(number, dtype=dtype)


TENSORS, NUMBERS = Tensors(), Numbers()


def round_half_away(x: Tensor) -> Tensor:
    """Round to the nearest integer, ties away from zero; NaN and infinities pass.

    Exact, unlike ``floor(x + 0.5)``, which rounds 0.49999997 to 1 in float32.

    Examples:
        >>> round_half_away(torch.tensor([-2.5, -0.5, 0.49999997, 1.5]))
        tensor([-3., -1.,  0.,  2.])
    """
    return TENSORS.round_half_away(x)


def round_steps_(steps: Tensor, rounding: str) -> Tensor:
    """Return the nearest integers, ties by a type's ``rounding``; overwrites ``steps``.

    Examples:
        >>> round_steps_(torch.tensor([-2.5, 0.5]), "half_even"), round_steps_(torch.tensor([-2.5, 0.5]), "half_away")
        (tensor([-2.,  0.]), tensor([-3.,  1.]))
    """
    return steps.round_() if rounding == "half_even" else round_half_away(steps)
