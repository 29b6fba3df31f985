"""The base classes of observers, and of modules whose buffers keep their dtype."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, get_args

import torch
from torch import Tensor, nn

from tritonq.factory import WithArgs
from tritonq.functional.groups import group_rows
from tritonq.functional.recomputation import is_recomputing
from tritonq.functional.validate import check_float_tensor
from tritonq.process_group import GroupReference, ProcessGroupLike
from tritonq.qparams import (
    MEGENGINE_EPS,
    TORCH_EPS,
    QParams,
    RangeRule,
    fixed_zero_point,
    is_readable,
    range_to_qparams,
)
from tritonq.quantized_type import QuantizedType, Rounding, WithQuantizedType, type_from_arguments


class FixedDtypeBuffers(nn.Module):
    """A module whose buffers keep their dtype through ``.half()``, ``.bfloat16()`` and ``.double()``.

    Scales, zero points and ranges are float32 and int32 in a model of any dtype.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FixedDtypeBuffers:
        before = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, old in before.items():
            new = self._buffers[name]
            if new is not None and new.dtype != old.dtype:
                self._buffers[name] = old.to(device=new.device)
        return self


class ObserverBase(WithQuantizedType, WithArgs, FixedDtypeBuffers, ABC):
    """Watches tensors and proposes scale and zero point for them.

    Args:
        dtype: ``torch.qint8``, ``torch.quint8`` and their plain integer twins, ``torch.qint32``, a
            :class:`~tritonq.quantized_type.QuantizedType`, or one of its names (``"qint8_narrow"``, ``"qint4"`` ...).
        qscheme: ``torch.per_tensor_affine``, ``torch.per_tensor_symmetric`` or their per-channel twins. None: what a
            QuantizedType says; per tensor, and symmetric or affine as the type is, for its name; else
            ``torch.per_tensor_affine``.
        reduce_range: halve smallest and largest code of an 8-bit torch dtype, as torch.ao does for kernels that would
            overflow. Wider torch dtypes ignore it; a QuantizedType or its name contradicts it.
        quant_min: smallest code, given together with ``quant_max``; None for both: all codes of the type.
        quant_max: largest code.
        factory_kwargs: a dict whose ``"device"`` the buffers are created on, such as ``{"device": "cuda"}``; other keys
            are ignored. None: torch's default device.
        eps: floor under the scale; None takes the rule's own (torch 1.19e-7, MegEngine 1e-5). The rule ``"torch_v1"``
            ignores it.
        is_dynamic: accepted for torch.ao's sake; only False is supported.
        ch_axis: channel axis for per-channel schemes; None means 0, or the axis of a QuantizedType.
        rounding: how ties are rounded: ``"half_even"`` or ``"half_away"``; None: the former, or what a QuantizedType
            says.
        rule: how a range becomes scale and zero point: ``"torch"``, ``"torch_v1"`` or ``"megengine"``; formulas in
            :func:`tritonq.qparams.range_to_qparams`.
        num_channels: length of the per-channel buffers; None: that of the first tensor. Ignored per tensor.

    Raises:
        ValueError: an unknown dtype, qscheme, rounding or rule, a code range that is empty, half-given or wider than
            the torch dtype, ``is_dynamic=True``, an eps that is not positive and finite, a negative ``num_channels``,
            or an argument that contradicts the QuantizedType given or named.

    Examples:
        >>> import tritonq
        >>> issubclass(tritonq.MinMaxObserver, ObserverBase)
        True
        >>> tritonq.MinMaxObserver(dtype="qint4").quant_min
        -8
    """

    is_dynamic = False
    library_bases = (
        ("torch.ao.quantization.observer", "ObserverBase"),
        ("torchao.quantization.pt2e.observer", "ObserverBase"),
    )

    def __init__(
        self,
        dtype: torch.dtype | QuantizedType | str = torch.quint8,
        qscheme: torch.qscheme | None = None,
        reduce_range: bool = False,
        quant_min: int | None = None,
        quant_max: int | None = None,
        factory_kwargs: dict[str, Any] | None = None,
        eps: float | None = None,
        is_dynamic: bool = False,
        *,
        ch_axis: int | None = None,
        rounding: Rounding | None = None,
        rule: RangeRule = "torch",
        num_channels: int | None = None,
    ) -> None:
        super().__init__()
        if is_dynamic:
            raise ValueError("is_dynamic=True is not supported: tritonq trains models with static activation ranges")
        self.qtype = type_from_arguments(dtype, qscheme, reduce_range, quant_min, quant_max, ch_axis, rounding)
        self.dtype = dtype if isinstance(dtype, torch.dtype) else self.qtype.torch_dtype or dtype
        if rule not in get_args(RangeRule):
            raise ValueError(f"unknown rule {rule!r}; known: {', '.join(get_args(RangeRule))}")
        self.rule = rule
        self.eps = (MEGENGINE_EPS if rule == "megengine" else TORCH_EPS) if eps is None else float(eps)
        if not 0 < self.eps < math.inf:
            raise ValueError(f"eps must be positive and finite, got {eps}")
        if num_channels is not None and num_channels < 0:
            raise ValueError(f"num_channels must not be negative, got {num_channels}")
        self.num_channels = num_channels if self.qtype.axis is not None else None
        self.device = (factory_kwargs or {}).get("device")

    @property
    def zero_point_is_zero(self) -> bool:
        """Whether every zero point that this observer can propose is 0, so that operators need not read it."""
        # torch's fused operator turns a one-sided symmetric range into an affine one.
        return self.fixed_zero_point == 0 and self.rule != "torch_v1"

    @property
    def fixed_zero_point(self) -> int | None:
        """The zero point of a symmetric type, which does not depend on data; None for an affine type.

        With ``rule="torch_v1"`` a range with values of one sign still gets another zero point.
        """
        return fixed_zero_point(self.qtype, self.rule)

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """Observe ``x``, a float tensor of any shape, and return ``x`` itself.

        An implementation updates the observer's buffers in place, without gradient; per channel the first tensor gives
        their length (:meth:`allocate`) if it isn't known. NaN and infinities are left out.
        """

    @abstractmethod
    def calculate_qparams(self) -> QParams:
        """Return scale (float32) and zero point (int32) for what was observed so far: (1,) or (channels,).

        Before anything was observed (:meth:`has_observed` is False) they are valid numbers without meaning, or empty
        while the number of channels is unknown.
        """

    @abstractmethod
    def has_observed(self) -> Tensor:
        """Return a 0-d bool tensor: whether anything was observed, so that :meth:`calculate_qparams` rests on data."""

    def allocate(self, num_channels: int) -> None:
        """Give per-channel buffers their final length, in subclasses that have such buffers; here nothing is done.

        Args:
            num_channels: number of ranges: channels, or all groups of all channels.

        Raises:
            ValueError: in subclasses: the buffers have another length already.
        """


class RangeObserver(ObserverBase):
    """An observer whose state is a range: buffers ``min_val`` and ``max_val`` (+inf and -inf before the first batch).

    They are 0-d, or (channels,), which is (0,) while the number of channels is unknown. ``nonfinite_count``
    counts the NaN and infinities that were skipped: one overflowed batch must not poison a range.

    Args:
        *args: arguments of :class:`ObserverBase`.
        process_group: the ranks whose batches make up one observation: None, the default (only this rank),
            ``"world"`` (all ranks; torch.distributed must be initialised before the first batch), ``"auto"`` (all ranks
            where it is initialised, else only this one), or a group of torch.distributed.
        **kwargs: named arguments of :class:`ObserverBase`.

    Raises:
        ValueError: another string as ``process_group``, or what :class:`ObserverBase` refuses.

    Examples:
        >>> class LastBatch(RangeObserver):
        ...     def observe(self, x, qparams, enabled):
        ...         self.min_val.copy_(x.detach().min())
        ...         self.max_val.copy_(x.detach().max())
        >>> observer = LastBatch(quant_min=0, quant_max=255)
        >>> _ = observer(torch.tensor([-1.0, 4.1]))
        >>> observer.calculate_qparams().scale
        tensor([0.0200])
    """

    min_val: Tensor
    max_val: Tensor
    nonfinite_count: Tensor

    def __init__(self, *args: Any, process_group: ProcessGroupLike = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.process_group = GroupReference(process_group)
        shape = () if self.qtype.axis is None else (self.num_channels or 0,)
        self.register_buffer("min_val", torch.full(shape, torch.inf, device=self.device))
        self.register_buffer("max_val", torch.full(shape, -torch.inf, device=self.device))
        self.register_buffer("nonfinite_count", torch.zeros((), dtype=torch.int64, device=self.device))

    def allocate(self, num_channels: int) -> None:
        """Give ``min_val`` and ``max_val`` the length ``num_channels``, with +inf and -inf.

        An observer with one range per tensor stays as it is, and so does one that has this length, or none yet if
        ``num_channels`` is 0.

        Raises:
            ValueError: they already have another length, other than 0.
        """
        if self.qtype.axis is None or (self.num_channels or 0) == num_channels:
            return
        if self.num_channels:
            raise ValueError(
                f"this observer keeps {self.num_channels} channels along axis {self.qtype.axis}, got {num_channels}"
            )
        self.num_channels = num_channels
        # The same objects, which others may hold: DDP lists buffers, nn.DataParallel copies from them.
        self.min_val.resize_(num_channels).fill_(torch.inf)
        self.max_val.resize_(num_channels).fill_(-torch.inf)

    def forward(self, x: Tensor) -> Tensor:
        """Update the range with ``x``, and return ``x`` itself.

        The range is updated in training and in eval mode, and whatever the switches of a quantizer say, since a
        FakeQuantize calls :meth:`observe` instead. Nothing is observed while activation checkpointing runs a forward
        again.
        """
        if not is_recomputing():
            self.observe(x, None, None)
        return x

    @abstractmethod
    def observe(self, x: Tensor, qparams: QParams | None, enabled: Tensor | None) -> None:
        """Update the range with ``x``, and then scale and zero point in ``qparams``. The host reads no GPU tensor.

        Buffers are updated in place, without gradient. Values that are not finite are counted and left out.

        Args:
            x: float tensor of any shape, on the buffers' device.
            qparams: scale and zero point to update in place, as :meth:`calculate_qparams` returns them, unless a
                subclass says otherwise; None: there are none.
            enabled: a switch, one element on that device; 0 leaves everything as it is. None: as 1.
        """

    def merge(self, other: RangeObserver) -> None:
        """Widen this range to contain that of ``other``, and add its ``nonfinite_count``.

        ``other`` stays as it is. Moving averages take the extremes of both, too. Subclasses merge their counts as well.

        Raises:
            TypeError: ``other`` is of another class.
            ValueError: both know their numbers of channels and these differ, or only one of the two observers keeps a
                range per channel.
        """
        if type(other) is not type(self):
            raise TypeError(f"cannot merge a {type(other).__name__} into a {type(self).__name__}")
        if (other.qtype.axis is None) != (self.qtype.axis is None):
            raise ValueError("cannot merge a range per channel and one per tensor")
        if other.min_val.numel() == 0 and self.qtype.axis is not None:
            return
        self.allocate(other.min_val.numel())
        torch.minimum(self.min_val, other.min_val, out=self.min_val)
        torch.maximum(self.max_val, other.max_val, out=self.max_val)
        self.nonfinite_count.add_(other.nonfinite_count)

    def _checked(self, x: Tensor) -> Tensor:
        """Return ``x`` detached, with one group per row if there are groups; allocate buffers per channel for it.

        Raises:
            TypeError: ``x`` is no floating point tensor.
        """
        x = check_float_tensor("x", x).detach()
        if self.qtype.axis is not None:
            self.allocate(self.qtype.granularity.count(x.shape))
        rows = group_rows(x, self.qtype.granularity)
        return x if rows is None else rows.split(x)

    def search_range(self) -> tuple[Tensor, Tensor]:
        """Return the range ``(low, high)`` that scale and zero point are computed from, float32, 0-d or (channels,).

        Here it is the buffers ``min_val`` and ``max_val`` themselves; histogram observers search for a better one.
        """
        return self.min_val, self.max_val

    def calculate_qparams(self) -> QParams:
        """Return scale and zero point for what was observed so far, (1,) or (channels,).

        They follow, by the observer's ``rule``, from the range of :meth:`search_range`. A range that has seen no value
        gives scale 1, and as zero point the one that type and rule fix, or else 0, clamped into the code range. Both
        are empty, (0,), while the number of channels is unknown.
        """
        low, high = (end.reshape(-1) for end in self.search_range())
        return range_to_qparams(low, high, self.qtype, rule=self.rule, eps=self.eps)

    def _write_qparams(self, qparams: QParams | None, enabled: Tensor | None) -> None:
        """Copy the present scale and zero point into ``qparams``, if given, unless the flag ``enabled`` is 0."""
        if qparams is not None:
            for target, value in zip(qparams, self.calculate_qparams(), strict=True):
                write_if(enabled, target, value)

    def has_observed(self) -> Tensor:
        """Return a 0-d bool tensor on the buffers' device: whether any channel has seen a finite value."""
        if self.min_val.numel() == 0:
            return torch.zeros((), dtype=torch.bool, device=self.min_val.device)
        return (self.min_val <= self.max_val).any()

    def reset_min_max_vals(self) -> None:
        """Forget everything that was observed.

        Buffers, ``nonfinite_count`` too, get the numbers of :meth:`empty_state`, in place; they keep their length.
        """
        for buffer, empty in self.empty_state():
            buffer.fill_(empty)

    def reset_where(self, flag: Tensor) -> None:
        """Forget everything that was observed if ``flag``, a 0-d bool tensor on the device, is True.

        All buffers of :meth:`empty_state` are reset, also ``nonfinite_count``. The host does not read ``flag``.
        """
        for buffer, empty in self.empty_state():
            buffer.copy_(torch.where(flag, empty, buffer))

    def empty_state(self) -> list[tuple[Tensor, float]]:
        """Return pairs of a buffer, or a view of a part, that observing changes and its number before the first batch.

        Here: ``[(min_val, inf), (max_val, -inf), (nonfinite_count, 0)]``.
        """
        return [(self.min_val, torch.inf), (self.max_val, -torch.inf), (self.nonfinite_count, 0)]

    def extra_repr(self) -> str:
        """Return the range as text, for ``repr``: ``"min_val=-1, max_val=2"``, or ``unset`` for each without a value.

        Several channels are told by their extremes: ``"min_val=[-1 .. 0.5; 8 channels], ..."``.
        """
        return f"min_val={_short(self.min_val)}, max_val={_short(self.max_val)}"

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Load a state dict; if the number of channels was unknown, take it from there."""
        saved = state_dict.get(prefix + "min_val")
        if self.qtype.axis is not None and self.num_channels is None and isinstance(saved, Tensor) and saved.numel():
            self.allocate(saved.numel())
        super()._load_from_state_dict(state_dict, prefix, *args)


def write_if(enabled: Tensor | None, target: Tensor, value: Tensor) -> None:
    """Copy ``value`` into ``target``, unless the flag ``enabled`` is 0.

    The flag is one element on the device of ``target``, which the host does not read; None stands for 1. ``value`` may
    have another shape of as many elements, and another dtype, which is converted.
    """
    value = value.view_as(target)
    target.copy_(value if enabled is None else torch.where(enabled.view(()) != 0, value, target))


def known_off(enabled: Tensor | None) -> bool:
    """Whether the host sees ``enabled`` to be 0; False for None, for a GPU's tensor and under ``torch.compile``."""
    return enabled is not None and is_readable(enabled) and not bool(enabled)


def _short(values: Tensor) -> str:
    """Return a tensor as text: ``"unset"``, one number, or ``"[-1 .. 2; 8 channels]"``."""
    if values.numel() == 0 or bool(torch.isinf(values).all()):
        return "unset"
    if values.numel() == 1:
        return f"{float(values):.6g}"
    return f"[{float(values.min()):.6g} .. {float(values.max()):.6g}; {values.numel()} channels]"
