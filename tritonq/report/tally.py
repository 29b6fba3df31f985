"""Sums over the values that one quantizer rounds: noise, clipping, range and histogram."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from tritonq.fake_quantize_base import FakeQuantizeBase
from tritonq.fixed_point_fake_quantize import FixedPointFakeQuantize
from tritonq.functional.groups import aligned, group_rows
from tritonq.qparams import QParams, range_to_qparams
from tritonq.reference.fixed_point import power_of_two
from tritonq.report.summary import describe_grid

Role = Literal["input", "weight", "output"]
# Bins over the codes of a grid, and on each side of it again half as many; what is farther out counts in the end bins.
BINS = 256
MARGIN = 128


@dataclass(frozen=True)
class TensorMeasure:
    """What one quantizer does to the values that the float model has there.

    Attributes:
        role: what it quantizes: "input", "weight" or "output" of a layer.
        grid: its codes, in words such as "-127..127 per channel".
        scale: smallest and largest of its scales.
        sqnr: 10 log10 of signal power over the power of the rounding and clipping error, in dB; infinity without error,
            else -infinity without signal.
        clipped: fraction of values more than half a step outside of the grid.
        low: smallest value, not rounded; infinity without values.
        high: largest value, not rounded; -infinity without values.
        quant_min: smallest code.
        quant_max: largest code.
        counts: how many values fall into each of 512 bins of equal width, by code before rounding: 128 bins below the
            grid, 256 on it, 128 above it. The 256 reach from ``quant_min - 0.5`` to ``quant_max + 0.5``, whatever the
            number of codes. Values farther out than all bins count in the first or the last one.
    """

    role: Role
    grid: str
    scale: tuple[float, float]
    sqnr: float
    clipped: float
    low: float
    high: float
    quant_min: int
    quant_max: int
    counts: tuple[int, ...]


class Tally:
    """Sums over the batches of values that one quantizer rounds.

    :meth:`measure` turns them into a :class:`TensorMeasure`.

    Args:
        quantizer: rounds the values.
    """

    def __init__(self, quantizer: FakeQuantizeBase) -> None:
        self._quantizer = quantizer
        qtype = quantizer.qtype
        self._codes = qtype.quant_max - qtype.quant_min + 1
        self._signal = self._noise = 0.0
        self._clipped = self._count = 0
        # One element, or one per channel.
        self._low: Tensor | None = None
        self._high: Tensor | None = None
        self._counts = torch.zeros(BINS + 2 * MARGIN, dtype=torch.int64)

    def add(self, x: Tensor) -> None:
        """Add a batch of values, a float tensor as the quantizer reads it; values that are not finite do not count.

        The quantizer rounds them to find the error, and is switched off afterwards. One of fixed point keeps its switch
        (while it is 0, no error is found) and its ``phase``. It must be in eval mode, in which it observes nothing.
        """
        x, qtype = self._signal_in(x), self._quantizer.qtype
        rounded = self._rounded(x)
        finite = torch.isfinite(x)
        values = x[finite].double()
        if not values.numel():
            return
        self._signal += float(values.square().sum())
        self._noise += float((rounded[finite].double() - values).square().sum())
        scale, zero_point = self._qparams()
        if qtype.axis is not None:
            scale, zero_point = (aligned(values, x, qtype.granularity) for values in (scale, zero_point))
        codes = (x.float() / scale + zero_point)[finite]
        self._clipped += int(((codes < qtype.quant_min - 0.5) | (codes > qtype.quant_max + 0.5)).sum())
        self._count += codes.numel()
        self._extend_range(x.float(), finite)
        bins = ((codes - qtype.quant_min + 0.5) * (BINS / self._codes)).floor_().add_(MARGIN)
        bins = bins.clamp_(0, BINS + 2 * MARGIN - 1).long()
        self._counts += torch.bincount(bins.cpu(), minlength=BINS + 2 * MARGIN)

    def _extend_range(self, x: Tensor, finite: Tensor) -> None:
        low, high = (torch.where(finite, x, bound) for bound in (math.inf, -math.inf))
        rows = group_rows(x, self._quantizer.qtype.granularity)
        low, high = (low, high) if rows is None else (rows.split(low), rows.split(high))
        axis, x = self._quantizer.qtype.row_type.axis, low
        rest = tuple(dim for dim in range(x.dim()) if axis is None or dim != axis % x.dim())
        low, high = (low.amin(rest), high.amax(rest)) if rest else (low, high)
        self._low = low if self._low is None else torch.minimum(self._low, low)
        self._high = high if self._high is None else torch.maximum(self._high, high)

    def widest_qparams(self) -> QParams | None:
        """Return scale and zero point of the range of all values so far, with which none is clipped.

        They follow by the rule ``"torch"``, in the shape of the quantizer's. None: there was no value.
        """
        if self._low is None or self._high is None:
            return None
        low, high = (bound.reshape(self._qparams().scale.shape) for bound in (self._low, self._high))
        return range_to_qparams(low, high, self._quantizer.qtype)

    def _signal_in(self, x: Tensor) -> Tensor:
        """Return the values that the quantizer should preserve; here all of ``x``."""
        return x

    def _rounded(self, x: Tensor) -> Tensor:
        quantizer = self._quantizer
        quantizer.enable_fake_quant()
        rounded: Tensor = quantizer.forward(x)
        quantizer.disable_fake_quant()
        return rounded

    def _qparams(self) -> QParams:
        return self._quantizer.calculate_qparams()

    def _described(self) -> str:
        return describe_grid(self._quantizer.qtype)

    def measure(self, role: Role) -> TensorMeasure:
        """Return noise, clipping, range and histogram of the values that were added.

        ``role``, which is stored in the result, says what they are: "input", "weight" or "output".
        """
        scale, qtype = self._qparams().scale, self._quantizer.qtype
        return TensorMeasure(
            role=role,
            grid=self._described(),
            scale=(float(scale.min()), float(scale.max())),
            sqnr=_decibel(self._signal, self._noise),
            clipped=self._clipped / max(self._count, 1),
            low=math.inf if self._low is None else float(self._low.min()),
            high=-math.inf if self._high is None else float(self._high.max()),
            quant_min=qtype.quant_min,
            quant_max=qtype.quant_max,
            counts=tuple(self._counts.tolist()),
        )


class FixedPointTally(Tally):
    """Counts of a fixed-point quantizer, whose clamp at 0 of unsigned codes is a ReLU and does not count as clipping.

    Args:
        quantizer: the quantizer.
        frac_len: the fractional length that it rounds with; None: the quantizer's own, rounded as in eval mode.
    """

    def __init__(self, quantizer: FixedPointFakeQuantize, frac_len: Tensor | None = None) -> None:
        super().__init__(quantizer)
        self._format = quantizer
        self._frac_len = quantizer.rounded_frac_len() if frac_len is None else frac_len

    def _signal_in(self, x: Tensor) -> Tensor:
        return x if self._format.signed else F.relu(x)

    def _rounded(self, x: Tensor) -> Tensor:
        phase, self._format.phase = self._format.phase, "fixed"
        rounded = self._format.round_to(x, self._frac_len)
        self._format.phase = phase
        return rounded

    def _qparams(self) -> QParams:
        return QParams(power_of_two(-self._frac_len), torch.zeros_like(self._frac_len))

    def _described(self) -> str:
        shortest, longest = int(self._frac_len.min()), int(self._frac_len.max())
        lengths = f"{shortest}" if shortest == longest else f"{shortest} to {longest}"
        return f"{super()._described()}, fraction length {lengths}"


def _decibel(signal: float, noise: float) -> float:
    if not noise:
        return math.inf
    return 10 * math.log10(signal / noise) if signal else -math.inf
