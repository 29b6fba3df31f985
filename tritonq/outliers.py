"""Telling of a batch whose outlier took a range up."""

from __future__ import annotations

from tritonq.observers import MinMaxObserver, ObserverBase
from tritonq.qparams import is_readable
from tritonq.reference.min_max import FALL
from tritonq.warn_once import warn_once

_FOUND = (
    "one batch took the range of a FakeQuantize up more than a hundredfold: an outlier in the data, or a step that "
    "diverged. "
)


def tell_outlier(observer: ObserverBase, before: float) -> float:
    """Return the largest magnitude in a running range; warn, once per observer, where the last batch blew it up.

    Args:
        observer: of one range per tensor, on a CPU: a GPU is not waited for, and others are left alone.
        before: what the call before returned; minus infinity where there was none.
    """
    if not isinstance(observer, MinMaxObserver) or observer.min_val.dim() or not is_readable(observer.min_val):
        return before
    magnitude = max(-float(observer.min_val), float(observer.max_val))
    if 0 < before < magnitude / FALL:
        if observer.copy_above is not None:
            outcome = "The range follows the next batches down again"
        elif observer.averaging_constant is not None:
            outcome = "Its average stays up for many batches; an observer with copy_above follows at once"
        else:
            outcome = "It stays up: a running maximum forgets nothing"
        warn_once(observer, _FOUND + outcome, stacklevel=6)
    return magnitude
