"""Observers: modules that watch tensors and propose quantization parameters."""

from tritonq.observers.base import ObserverBase, RangeObserver
from tritonq.observers.histogram import HistogramObserver
from tritonq.observers.min_max import (
    MinMaxObserver,
    MovingAverageMinMaxObserver,
    MovingAveragePerChannelMinMaxObserver,
    PerChannelMinMaxObserver,
)
from tritonq.observers.passive import PassiveObserver

__all__ = [
    "HistogramObserver",
    "MinMaxObserver",
    "MovingAverageMinMaxObserver",
    "MovingAveragePerChannelMinMaxObserver",
    "ObserverBase",
    "PassiveObserver",
    "PerChannelMinMaxObserver",
    "RangeObserver",
]
