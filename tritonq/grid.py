"""The one type for a grid that may be switched on, and the one for what observing updates."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tritonq.arithmetic import as_now
from tritonq.granularity import Granularity
from tritonq.qparams import RangeRule, is_readable
from tritonq.quantized_type import QuantizedType

# Switches of snapshots, whose values are known without reading them. Never written to.
SWITCH = {value: torch.tensor([value]) for value in (False, True)}


@dataclass(frozen=True, eq=False)
class Grid:
    """The values that a quantized tensor can take, and the switch that says whether tensors are rounded to them.

    ``value = (code - zero_point) * scale`` for every code of ``qtype``. Operators take grids; modules build them from
    their buffers, which operators that observe update in place.

    Attributes:
        scale: float32; one element, or one per scale of ``granularity``.
        zero_point: int32, as ``scale``; None stands for zero everywhere.
        qtype: which codes there are, which elements share a scale, and how values are rounded.
        enabled: uint8 or bool, one element; 0 passes values through. None: always on. It is on the device of
            ``scale``; a snapshot's may be on a CPU.

    Examples:
        >>> from tritonq.quantized_type import QINT4
        >>> grid = Grid(torch.tensor([0.5]), None, QINT4, torch.zeros(1, dtype=torch.uint8))
        >>> grid.granularity, grid.is_enabled_on_host()
        (Granularity(axis=None, group=None), False)
    """

    scale: Tensor
    zero_point: Tensor | None
    qtype: QuantizedType
    enabled: Tensor | None = None

    @property
    def granularity(self) -> Granularity:
        """The elements that share a scale, as ``qtype`` says."""
        return self.qtype.granularity

    def is_enabled_on_host(self) -> bool:
        """Return the switch as a bool; True without one. Synchronises with the device if the switch is not on a CPU."""
        switch = self.enabled
        return switch is None or switch is SWITCH[True] or (switch is not SWITCH[False] and bool(switch))

    def enabled_on_device(self) -> Tensor:
        """Return the switch as a 0-d bool tensor on its device, or without one True on that of ``scale``.

        Never synchronises.
        """
        if self.enabled is None:
            return torch.ones((), dtype=torch.bool, device=self.scale.device)
        return self.enabled.view(()) != 0

    def enabled_flag(self) -> bool | Tensor:
        """Return the switch as a bool if it is on a CPU, else as a 0-d bool tensor on its device; without one True.

        While ``torch.compile`` traces, the result is a tensor for a switch on a CPU, too.
        """
        if self.enabled is None or is_readable(self.enabled):
            return self.is_enabled_on_host()
        return self.enabled_on_device()

    def with_scale(self, scale: Tensor) -> Grid:
        """Return a grid with this ``scale``, and this grid's type, zero point and switch, which are shared."""
        return Grid(scale, self.zero_point, self.qtype, self.enabled)

    def with_buffers(self, scale: Tensor, zero_point: Tensor | None, enabled: Tensor | None) -> Grid:
        """Return a grid of the same type with these tensors, such as those that a forward pass saved for its backward.

        They are not copied. None: a zero point of 0, and a grid that is always on.
        """
        return Grid(scale, zero_point, self.qtype, enabled)

    def copy(self) -> Grid:
        """Return a grid with copies of scale, zero point and switch (None stays None), for a backward pass.

        Later steps change the tensors of this grid in place.
        """
        if torch.compiler.is_compiling():
            copies = iter(as_now(*(held for held in (self.scale, self.zero_point, self.enabled) if held is not None)))
            scale = next(copies)
            zero_point = None if self.zero_point is None else next(copies)
            return self.with_buffers(scale, zero_point, None if self.enabled is None else next(copies))
        return Grid(
            self.scale.clone(),
            None if self.zero_point is None else self.zero_point.clone(),
            self.qtype,
            None if self.enabled is None else self.enabled.clone(),
        )


@dataclass(frozen=True, eq=False)
class RangeStatistics:
    """The running range behind a grid, and how a batch changes it. Operators update the tensors in place.

    Attributes:
        min_val: float32 running minimum, 0-d or (channels,); +inf before the first batch.
        max_val: running maximum, as ``min_val``; -inf before the first batch.
        nonfinite_count: int64, 0-d; grows by the number of NaN and infinite values, which are skipped.
        granularity: which elements share a range.
        enabled: uint8, one element; 0 leaves range, count and grid as they are. None: always on.
        frozen: True: neither range, count nor grid is updated, whatever ``enabled`` says; the range is only read, to
            see whether anything was observed.
        averaging_constant: weight of a batch in a moving average; None: the range holds the extremes of all batches.
        copy_above: a batch whose magnitude ``max(-low, high)`` is more than this times that of the running range
            replaces a moving average, and so does one whose magnitude is below 1/100 of it and not 0; None: only the
            first batch does.
        rule: how a range becomes scale and zero point: ``"torch"``, ``"torch_v1"`` or ``"megengine"``; formulas in
            :func:`tritonq.qparams.range_to_qparams`.
        eps: smallest scale.
        has_data: True: whoever built this has found on the host that something was observed (``min_val <= max_val``),
            so that the operator need not check it. False: nobody looked, and the operator decides on the device.
    """

    min_val: Tensor
    max_val: Tensor
    nonfinite_count: Tensor
    granularity: Granularity
    enabled: Tensor | None = None
    frozen: bool = False
    averaging_constant: float | None = None
    copy_above: float | None = None
    rule: RangeRule = "torch"
    eps: float = 0.0
    has_data: bool = False

    def with_data(self) -> RangeStatistics:
        """Return the statistics with ``has_data=True``, for operators after the first observation.

        If ``has_data`` is True already, the object itself is returned, else a copy that shares its tensors.
        """
        return self if self.has_data else replace(self, has_data=True)
