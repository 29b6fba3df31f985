"""The statistics with which a measurement is reported: median, and the middle 60 % of the samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Spread:
    """Median and the band that holds the middle 60 % of the samples."""

    median: float
    p20: float
    p80: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Return the spread of some values.

        Raises:
            ValueError: no values.

        Examples:
            >>> Spread.of([4.0, 1.0, 3.0, 2.0]).median
            2.5
        """
        if not values:
            raise ValueError("no values to take a spread of")
        p20, median, p80 = np.quantile(values, (0.2, 0.5, 0.8)).tolist()
        return cls(median, p20, p80)


def speed_up(baseline: Sequence[float], other: Sequence[float]) -> Spread:
    """Return how many times faster ``other`` is: the spread of ``baseline[i] / other[i]`` over the rounds.

    Samples of one round were taken next to each other, so that a machine that is slow for a while slows both.

    Raises:
        ValueError: not the same number of rounds.
    """
    if len(baseline) != len(other):
        raise ValueError(f"{len(baseline)} and {len(other)} rounds can't be paired")
    return Spread.of([a / b for a, b in zip(baseline, other, strict=True)])
