"""Observers: modules that watch tensors and propose quantization parameters."""

from tritonq.observers.base import ObserverBase, RangeObserver
from tritonq.observers.histogram import HistogramObserver
from tritonq.observers.interpolating import InterpolatingHistogramObserver
from tritonq.observers.min_max import (
    MinMaxObserver,
    MovingAverageMinMaxObserver,
    MovingAveragePerChannelMinMaxObserver,
    PerChannelMinMaxObserver,
)
from tritonq.observers.passive import PassiveObserver

__all__ = [
    "HistogramObserver",
    "InterpolatingHistogramObserver",
    "MinMaxObserver",
    "MovingAverageMinMaxObserver",
    "MovingAveragePerChannelMinMaxObserver",
    "ObserverBase",
    "PassiveObserver",
    "PerChannelMinMaxObserver",
    "RangeObserver",
]
