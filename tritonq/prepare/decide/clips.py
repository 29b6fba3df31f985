"""Recognise recorded calls that clip values to constant bounds: ReLU, ReLU6, Hardtanh, clamp.

The private functions read the arguments of one torch function each, and have its parameters.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from tritonq.nn.clip import Clipping, clipping_of
from tritonq.nn.fusable import ceiling_of
from tritonq.prepare.decide.read_call import read_call
from tritonq.prepare.record.dataflow import Call, Ref


def clipping_of_call(call: Call, shape: tuple[int, ...] = (), has_fixed_arguments: bool = True) -> Clipping | None:
    """Return the bounds of a call that clips, unless it is a plain ReLU; None for a plain ReLU and for other calls.

    Args:
        call: any recorded call.
        shape: not used; the readers of all operations of one tensor have this parameter.
        has_fixed_arguments: not used: a forward that keeps its branches compares the bounds when it runs.
    """
    found = bounds_of_call(call)
    return None if found is None or found == _RELU else found


def ceiling_of_call(call: Call) -> float | None:
    """Return the upper bound of a call that clips at 0 from below: infinity for a plain ReLU, 6.0 for ReLU6.

    None for other calls.
    """
    if isinstance(call.target, nn.Module):
        return ceiling_of(call.target)
    found = bounds_of_call(call)
    return None if found is None else found.ceiling


def limits_range(call: Call) -> bool:
    """Whether a call clips values and does nothing else (ReLU, ReLU6, Hardtanh, a clamp), its bounds being numbers."""
    return bounds_of_call(call) is not None


def bounds_of_call(call: Call) -> Clipping | None:
    """Return the bounds of a call that clips, a plain ReLU included; None for other calls.

    They are the numbers of this call; the forward may compute others in the next (`Chains.has_fixed_number`). A clamp
    to bounds that are tensors, or whose lower bound exceeds the upper or is NaN, is no such call.
    """
    if isinstance(call.target, nn.Module):
        return clipping_of(call.target)
    return read_call(call, _READERS) if call.kind == "function" else None


def _clamp(input: Ref, min: Any = None, max: Any = None) -> Clipping:
    """Return the bounds of a clamp, infinite where ``min`` or ``max`` is None.

    Raises:
        ValueError: no value lies between the bounds.
    """
    low, high = -math.inf if min is None else float(min), math.inf if max is None else float(max)
    # Not a clip but a constant, and torch lets NaN pass.
    if not low <= high:
        raise ValueError(f"the bounds {low} and {high} hold no values")
    return Clipping(low, high)


def _clamp_max(input: Ref, max: Any) -> Clipping:
    return _clamp(input, None, max)


def _hardtanh(input: Ref, min_val: Any = -1.0, max_val: Any = 1.0, inplace: bool = False) -> Clipping:
    return _clamp(input, min_val, max_val)


def _relu6(input: Ref, inplace: bool = False) -> Clipping:
    return Clipping(0.0, 6.0)


def _relu(input: Ref, inplace: bool = False) -> Clipping:
    return _RELU


_RELU = Clipping(0.0, math.inf)
_READERS: Mapping[str, Callable[..., Clipping]] = {
    "clamp": _clamp,
    "clip": _clamp,
    "clamp_min": _clamp,
    "clamp_max": _clamp_max,
    "hardtanh": _hardtanh,
    "relu": _relu,
    "relu6": _relu6,
}
