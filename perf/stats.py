"""The few statistics a measurement is reported in."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


def quantile(values: Sequence[float], q: float) -> float:
    """The ``q`` quantile with linear interpolation between order statistics; ``q`` in [0, 1].

    Examples:
        >>> quantile([4.0, 1.0, 3.0, 2.0], 0.5)
        2.5
    """
    if not values:
        raise ValueError("no values to take a quantile of")
    if not 0 <= q <= 1:
        raise ValueError(f"a quantile lies in [0, 1], got {q}")
    ordered = sorted(values)
    position = q * (len(ordered) - 1)
    below, above = math.floor(position), math.ceil(position)
    return ordered[below] + (ordered[above] - ordered[below]) * (position - below)


@dataclass(frozen=True)
class Spread:
    """Median and the band that holds the middle 60 % of the samples."""

    median: float
    p20: float
    p80: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(quantile(values, 0.5), quantile(values, 0.2), quantile(values, 0.8))


def speed_up(baseline: Sequence[float], other: Sequence[float]) -> Spread:
    """How many times faster ``other`` is: the spread of ``baseline[i] / other[i]`` over the rounds.

    Samples of one round were taken next to each other, so that a machine that is slow for a while slows both.

    Raises:
        ValueError: not the same number of rounds.
    """
    if len(baseline) != len(other):
        raise ValueError(f"{len(baseline)} and {len(other)} rounds can't be paired")
    return Spread.of([a / b for a, b in zip(baseline, other, strict=True)])
