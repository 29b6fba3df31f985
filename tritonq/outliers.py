"""Warnings of an outlier that made a running range much larger, and the test whether a batch can change a range."""

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
    """Whether observing ``x`` can change a range or its scale.

    The answer is True for each batch that is not empty: its values are not looked at. An empty batch can't, unless the
    observer shares its range with other ranks, whose batches count. While ``torch.compile`` traces the answer is True.
    """
    if torch.compiler.is_compiling() or x.numel():
        return True
    return isinstance(observer, RangeObserver) and observer.process_group.resolve() is not None


def tell_outlier(observer: ObserverBase, before: float) -> float:
    """Return the largest magnitude of an observer's running range, ``max(-min_val, max_val)``; warn if it leapt up.

    If it is more than 100 times ``before``, and ``before`` is positive, a UserWarning says so, once per observer. A GPU
    is not waited for: in every 16th call the range is copied to the host, and compared in a later call, when it has
    arrived. A range that is small again by the next copy causes no warning there.

    Args:
        observer: a MinMaxObserver with one range for the tensor; for others ``before`` is returned.
        before: what the call before returned; minus infinity at first. It is returned if no range has arrived.
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
        warn_once(observer, _FOUND + outcome, stacklevel=5)
    return magnitude


def _magnitude(observer: MinMaxObserver) -> float | None:
    """Return the largest magnitude in a running range, or None if it is not on the host yet."""
    low, high = observer.min_val, observer.max_val
    if is_readable(low):
        return max(-float(low), float(high))
    if not low.is_cuda or torch.compiler.is_compiling() or torch.cuda.is_current_stream_capturing():
        return None
    return _readings.setdefault(observer, LateReading()).latest(low, high)


class LateReading:
    """The largest magnitude in a device's range, copied to the host without waiting and read by a later call.

    The calls are those of :meth:`latest`, which takes the range, and returns None if no copy has arrived.

    Args:
        period: in one of so many calls a copy of the range to the host is begun.
    """

    def __init__(self, period: int = _PERIOD) -> None:
        self._period, self._calls = period, 0
        self._host: Tensor | None = None
        self._arrival: torch.cuda.Event | None = None
        self._is_under_way = False

    def latest(self, low: Tensor, high: Tensor) -> float | None:
        """Return ``max(-low, high)`` of a range that an earlier call began to copy, if its copy has just arrived.

        None if none has arrived since the last call. In every ``period``-th call a copy of ``low`` and ``high`` to the
        host is begun, unless one is still under way.

        Args:
            low: minimum of a range of the whole tensor, 0-d, on the device.
            high: its maximum.
        """
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
