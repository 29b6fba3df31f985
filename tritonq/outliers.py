"""Batches that tell an observer nothing, and telling of one whose outlier took a range up."""

from __future__ import annotations

from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from tritonq.observers import MinMaxObserver, ObserverBase, RangeObserver
from tritonq.qparams import is_readable
from tritonq.reference.min_max import FALL
from tritonq.warn_once import warn_once

_FOUND = (
    "one batch took the range of a FakeQuantize up more than a hundredfold: an outlier in the data, or a step that "
    "diverged. "
)
# A copy from a GPU takes three launches, so that one call of so many makes one.
_PERIOD = 16


def tells_range(x: Tensor, observer: ObserverBase) -> bool:
    """Whether observing ``x`` is of use: an empty batch tells nothing, unless other ranks' batches count, too."""
    if torch.compiler.is_compiling() or x.numel():
        return True
    return isinstance(observer, RangeObserver) and observer.process_group.resolve() is not None


def tell_outlier(observer: ObserverBase, before: float) -> float:
    """Return the largest magnitude in a running range; warn, once per observer, where the last batch blew it up.

    A GPU is not waited for: one range in 16 is copied, and compared once it has arrived, in a later step. A range that
    falls again before may go untold there.

    Args:
        observer: of one range per tensor; others are left alone.
        before: what the call before returned; minus infinity where there was none.
    """
    if not isinstance(observer, MinMaxObserver) or observer.min_val.dim():
        return before
    magnitude = _magnitude(observer)
    if magnitude is None:
        return before
    if 0 < before < magnitude / FALL:
        if observer.copy_above is not None:
            outcome = "The range follows the next batches down again"
        elif observer.averaging_constant is not None:
            outcome = "Its average stays up for many batches; an observer with copy_above follows at once"
        else:
            outcome = "It stays up: a running maximum forgets nothing"
        warn_once(observer, _FOUND + outcome, stacklevel=6)
    return magnitude


def _magnitude(observer: MinMaxObserver) -> float | None:
    """Return the largest magnitude in a range, or None where it is not on the host yet."""
    low, high = observer.min_val, observer.max_val
    if is_readable(low):
        return max(-float(low), float(high))
    if not low.is_cuda or torch.compiler.is_compiling() or torch.cuda.is_current_stream_capturing():
        return None
    return _readings.setdefault(observer, LateReading()).latest(low, high)


class LateReading:
    """The largest magnitude in a device's range, copied to the host without waiting and read by a later call."""

    def __init__(self, period: int = _PERIOD) -> None:
        self._period, self._calls = period, 0
        self._host: Tensor | None = None
        self._arrival: torch.cuda.Event | None = None
        self._is_under_way = False

    def latest(self, low: Tensor, high: Tensor) -> float | None:
        """Return the larger end that an earlier call sent to the host, once it has arrived; send these in turn."""
        found: float | None = None
        if self._host is not None and self._is_under_way and self._has_arrived():
            found = max(-float(self._host[0]), float(self._host[1]))
            self._is_under_way = False
        if not self._is_under_way and self._calls % self._period == 0:
            self._send(low, high)
        self._calls += 1
        return found

    def _has_arrived(self) -> bool:
        return self._arrival is None or self._arrival.query()

    def _send(self, low: Tensor, high: Tensor) -> None:
        if self._host is None:
            self._host = torch.empty(2, pin_memory=low.is_cuda)
        self._host.copy_(torch.stack((low.detach(), high.detach())), non_blocking=True)
        if low.is_cuda:
            self._arrival = torch.cuda.Event()
            self._arrival.record()
        self._is_under_way = True


# Beside the observers, which are copied and pickled, as events can't be.
_readings: WeakKeyDictionary[MinMaxObserver, LateReading] = WeakKeyDictionary()
