"""Running minimum and maximum, and their moving averages, per tensor and per channel."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tritonq.functional.dispatch import implementation
from tritonq.grid import Grid, RangeStatistics
from tritonq.observers.base import RangeObserver, known_off, write_if
from tritonq.process_group import ProcessGroup, reduce_range
from tritonq.qparams import QParams
from tritonq.quantized_type import QUANTIZED_TYPES, QuantizedType
from tritonq.reference.min_max import update_range


class MinMaxObserver(RangeObserver):
    """Running range: ``min_val <- min(min_val, min(x))``, ``max_val <- max(max_val, max(x))``.

    Non-finite values are skipped and counted. Arguments: :class:`~tritonq.observers.base.RangeObserver`.

    Source: torch.ao.quantization.MinMaxObserver; docs/numbers.md, "Observers".

    Examples:
        >>> observer = MinMaxObserver(dtype=torch.qint8, qscheme=torch.per_tensor_symmetric)
        >>> _ = observer(torch.tensor([-1.0, 2.0, torch.nan]))
        >>> observer.calculate_qparams().scale, int(observer.nonfinite_count)
        (tensor([0.0157]), 1)
    """

    # None: running extremes. A number c: m <- m + c (batch - m).
    averaging_constant: float | None = None
    # A batch with more than this many times the running magnitude is copied, as the first one is; None: none is.
    copy_above: float | None = None
    # Takes the place of `averaging_constant` after the next update, in `observe` alone; None: nothing does.
    later_constant: float | None = None

    def observe(self, x: Tensor, qparams: QParams | None, enabled: Tensor | None) -> None:
        """Update the range with ``x``, and then scale and zero point in ``qparams`` unless that is None.

        ``enabled``: one element on the device, 0 leaves everything as it is; None: as 1. With a process group the range
        is updated with ``x`` of all ranks in it, and each of them must call this; ``nonfinite_count`` counts the values
        of this rank only.

        Raises:
            TypeError: ``x`` is no floating point tensor.
            ValueError: ``x`` has another number of channels than the observer.
            RuntimeError: a process group is wanted, and torch.distributed is not initialised.
        """
        x = self._checked(x)
        group = self.process_group.resolve()
        if group is not None:
            self._observe_in_group(x, qparams, enabled, group)
            return
        grid = None if qparams is None else Grid(*qparams, self.qtype.row_type)
        implementation("min_max", x).observe(x, self.statistics(enabled), grid)

    def statistics(self, enabled: Tensor | None, frozen: bool = False, has_data: bool = False) -> RangeStatistics:
        """Return a `RangeStatistics`: the running range and how a batch changes it, for operators that observe.

        Its tensors are the observer's own buffers, which such an operator updates in place. It holds no process group.

        Args:
            enabled: one element on the device; 0 leaves the range as it is. None: always on.
            frozen: True: the operator only reads the range.
            has_data: True: the host knows that something was observed; False: the operator checks it.
        """
        return RangeStatistics(
            self.min_val,
            self.max_val,
            self.nonfinite_count,
            self.qtype.row_type.granularity,
            enabled,
            frozen,
            self.averaging_constant,
            self.copy_above,
            self.rule,
            self.eps,
            has_data,
        )

    def _observe_in_group(
        self, x: Tensor, qparams: QParams | None, enabled: Tensor | None, group: ProcessGroup
    ) -> None:
        """Update range and ``qparams`` in place with the range of ``x`` over all ranks in ``group``.

        Nothing changes if ``enabled`` is 0. Every rank must call it, also one whose batch is empty.
        """
        if known_off(enabled):
            return
        low, high, nonfinite = implementation("min_max", x).min_max(x, self.qtype.row_type.axis)
        low, high = reduce_range(low, high, group)
        running = (self.min_val, self.max_val)
        new_min, new_max = update_range(low, high, *running, self.averaging_constant, self.copy_above)
        write_if(enabled, self.min_val, new_min)
        write_if(enabled, self.max_val, new_max)
        write_if(enabled, self.nonfinite_count, self.nonfinite_count + nonfinite)
        self._write_qparams(qparams, enabled)


class MovingAverageMinMaxObserver(MinMaxObserver):
    """Exponential moving average of each batch's range; the first batch is copied.

    ``m <- m + averaging_constant * (batch - m)``. MegEngine's momentum is ``1 - averaging_constant``.

    Args:
        averaging_constant: weight of the new batch, in (0, 1].
        copy_above: a factor of at least 1. A batch whose largest magnitude is more than this many times the running
            range's is copied too: growth is followed at once, as in a residual branch whose last γ starts at 0.
            Averaged, the range would lag behind for hundreds of steps and clip what the branch learns. A batch whose
            largest magnitude is less than a hundredth of the running range's is copied as well, unless it is all zeros:
            an outlier before it is forgotten at once. Each channel is judged for itself. None (torch.ao): only the
            first batch is copied.
        *args: arguments of :class:`~tritonq.observers.base.ObserverBase`.
        **kwargs: named arguments of :class:`~tritonq.observers.base.RangeObserver`.

    Raises:
        ValueError: averaging constant outside (0, 1], ``copy_above`` below 1, or what the base classes refuse.

    Source: torch.ao.quantization.MovingAverageMinMaxObserver; docs/numbers.md, "Observers".

    Examples:
        >>> observer = MovingAverageMinMaxObserver(copy_above=1.5)
        >>> for largest in (0.0, 0.1, 0.12):
        ...     _ = observer(torch.tensor([largest]))
        >>> observer.max_val
        tensor(0.1002)
    """

    averaging_constant: float

    def __init__(
        self, averaging_constant: float = 0.01, *args: Any, copy_above: float | None = None, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self._set_averaging_constant(averaging_constant)
        if copy_above is not None and not copy_above >= 1:
            raise ValueError(f"copy_above must be at least 1, or None, got {copy_above}")
        self.copy_above = copy_above

    def set_momentum(self, momentum: float) -> None:
        """Set the fraction of the old range that is kept, ``1 - averaging_constant``, in [0, 1), as in MegEngine.

        With ``rule="megengine"`` it may also be 1, which keeps the range, and the next update still uses the momentum
        before, as in MegEngine.

        Raises:
            ValueError: a momentum outside of these bounds.
        """
        if self.rule != "megengine":
            self._set_averaging_constant(1.0 - momentum)
            return
        if not 0.0 <= momentum <= 1.0:
            raise ValueError(f"momentum must be in [0, 1], got {momentum}")
        self.later_constant = 1.0 - momentum

    def observe(self, x: Tensor, qparams: QParams | None, enabled: Tensor | None) -> None:
        """Update the averaged range with ``x``, and then scale and zero point in ``qparams`` unless that is None.

        ``enabled``: one element on the device, 0 leaves everything as it is; None: as 1. A momentum that
        :meth:`set_momentum` set for ``rule="megengine"`` is not used in this call yet, but from the next one on.
        Process groups and errors are as in :meth:`MinMaxObserver.observe`.
        """
        super().observe(x, qparams, enabled)
        if self.later_constant is not None and not known_off(enabled):
            self.averaging_constant, self.later_constant = self.later_constant, None

    def _set_averaging_constant(self, averaging_constant: float) -> None:
        if not 0.0 < averaging_constant <= 1.0:
            raise ValueError(f"averaging_constant must be in (0, 1], got {averaging_constant}")
        self.averaging_constant = averaging_constant


def _per_channel(ch_axis: int | None, dtype: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the keyword arguments of :class:`MinMaxObserver` for an observer per channel: ``kwargs`` and these two.

    Without a ``qscheme`` and a QuantizedType the scheme is ``torch.per_channel_affine``, or symmetric for the name of a
    symmetric type.

    Raises:
        ValueError: a scheme per tensor.
    """
    if isinstance(dtype, QuantizedType):
        if dtype.axis is None:
            raise ValueError(f"a per-channel observer needs a type with an axis, got {dtype}: use with_axis")
        return {**kwargs, "dtype": dtype, "ch_axis": ch_axis}
    named = QUANTIZED_TYPES.get(dtype) if isinstance(dtype, str) else None
    default = torch.per_channel_affine if named is None or not named.symmetric else torch.per_channel_symmetric
    qscheme = kwargs.get("qscheme") or default
    if qscheme not in (torch.per_channel_affine, torch.per_channel_symmetric):
        raise ValueError(f"a per-channel observer needs a per-channel qscheme, got {qscheme}")
    return {**kwargs, "dtype": dtype, "qscheme": qscheme, "ch_axis": ch_axis}


class PerChannelMinMaxObserver(MinMaxObserver):
    """Running minimum and maximum for each index of ``ch_axis``: :class:`MinMaxObserver` per channel.

    Args:
        ch_axis: the channel axis; None: 0, or the axis of a QuantizedType.
        dtype: a torch dtype, a name of a type (``"qint4"``), or a QuantizedType with an axis.
        **kwargs: named arguments of :class:`MinMaxObserver`. ``qscheme``, if not given, is
            ``torch.per_channel_affine``, or ``torch.per_channel_symmetric`` for the name of a symmetric type; a
            QuantizedType brings its own.

    Raises:
        ValueError: a scheme or type per tensor, or what :class:`MinMaxObserver` refuses.

    Examples:
        >>> observer = PerChannelMinMaxObserver(dtype=torch.qint8, qscheme=torch.per_channel_symmetric)
        >>> _ = observer(torch.tensor([[-1.0, 0.5], [2.0, 4.0]]))
        >>> observer.min_val, observer.max_val
        (tensor([-1.,  2.]), tensor([0.5000, 4.0000]))
    """

    def __init__(self, ch_axis: int | None = None, dtype: Any = torch.quint8, **kwargs: Any) -> None:
        super().__init__(**_per_channel(ch_axis, dtype, kwargs))


class MovingAveragePerChannelMinMaxObserver(MovingAverageMinMaxObserver):
    """Moving average of each batch's range for each index of ``ch_axis``: ``m <- m + averaging_constant (batch - m)``.

    The first batch is copied; what is not said here is as in :class:`MovingAverageMinMaxObserver`.

    Args:
        averaging_constant: weight of the new batch, in (0, 1].
        ch_axis: the channel axis; None: 0, or the axis of a QuantizedType.
        dtype: a torch dtype, a name of a type (``"qint4"``), or a QuantizedType with an axis.
        **kwargs: named arguments of :class:`MovingAverageMinMaxObserver`. ``qscheme``, if not given, is
            ``torch.per_channel_affine``, or ``torch.per_channel_symmetric`` for the name of a symmetric type; a
            QuantizedType brings its own.

    Raises:
        ValueError: a scheme or type per tensor, or what :class:`MovingAverageMinMaxObserver` refuses.

    Examples:
        >>> observer = MovingAveragePerChannelMinMaxObserver(averaging_constant=0.5, qscheme=torch.per_channel_affine)
        >>> for largest in (1.0, 3.0):
        ...     _ = observer(torch.tensor([[0.0, largest]]))
        >>> observer.max_val
        tensor([2.])
    """

    def __init__(
        self, averaging_constant: float = 0.01, ch_axis: int | None = None, dtype: Any = torch.quint8, **kwargs: Any
    ) -> None:
        super().__init__(averaging_constant, **_per_channel(ch_axis, dtype, kwargs))
