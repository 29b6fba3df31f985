"""Find the summand that makes a grid of the sum useless for the other, because that is so much smaller."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from tritonq.prepare.record.dataflow import ValueIndex
from tritonq.prepare.record.operations import in_transform

_SUMS = frozenset({"add", "sub"})
# With 8 bits, the other summand lies within one code of a grid that reaches this summand's values.
_RATIO = 256.0
# Masks are written -10,000 at least, which float16 holds; a residual branch that begins at 0 is no reason either.
_LARGE = 1e4


def dwarfing_value(name: str, inputs: Sequence[Tensor], values: Sequence[ValueIndex]) -> ValueIndex | None:
    """Return the index of the value of the summand that dwarfs the other one; None if neither does.

    A summand dwarfs the other if its largest magnitude, which may be infinite, is at least 10,000 and at least 256
    times that of the other, which must be finite. None inside of ``torch.vmap`` and the like, where tensors hold no
    numbers to read.

    Args:
        name: the operation; only "add" and "sub" count.
        inputs: its tensors, before it runs; only two float tensors with elements count.
        values: indices of their values in the record, in the same order.
    """
    if name not in _SUMS or len(inputs) != 2 or in_transform():  # tensors of a transform hold no numbers to look at
        return None
    if not all(x.is_floating_point() and x.numel() for x in inputs):
        return None
    magnitudes = [_magnitude(tensor) for tensor in inputs]
    small, large = sorted(range(2), key=magnitudes.__getitem__)
    is_dwarfed = magnitudes[large] >= max(_LARGE, _RATIO * magnitudes[small]) and math.isfinite(magnitudes[small])
    return values[large] if is_dwarfed else None


def _magnitude(x: Tensor) -> float:
    return float(x.detach().abs().max())
