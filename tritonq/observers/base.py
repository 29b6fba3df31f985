"""What every observer shares: torch.ao's arguments, the quantized type they describe, buffers that keep their dtype."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import replace
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
from tritonq.quantized_type import QUANTIZED_TYPES, QuantizedType, Rounding

_PER_CHANNEL = (torch.per_channel_affine, torch.per_channel_symmetric)
_SYMMETRIC = (torch.per_tensor_symmetric, torch.per_channel_symmetric)
_QSCHEMES = (torch.per_tensor_affine, torch.per_tensor_symmetric, *_PER_CHANNEL)
_SIGNED_DTYPES = {torch.qint8: 8, torch.int8: 8, torch.int16: 16, torch.qint32: 32, torch.int32: 32}
# torch.ao halves the range of 8-bit types alone.
_REDUCIBLE_BITS = 8
_UNSIGNED_DTYPES = {torch.quint8: 8, torch.uint8: 8, torch.quint4x2: 4}


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


class ObserverBase(WithArgs, FixedDtypeBuffers, ABC):
    """Watches tensors and proposes scale and zero point for them.

    Args:
        dtype: ``torch.qint8``, ``torch.quint8`` and their plain integer twins, ``torch.qint32``, a
            :class:`~tritonq.quantized_type.QuantizedType`, or one of its names (``"qint8_narrow"``, ``"qint4"`` ...).
        qscheme: ``torch.per_tensor_affine`` (None means it), ``torch.per_tensor_symmetric`` or their per-channel
            twins. A QuantizedType says it itself.
        reduce_range: halve the code range of an 8-bit type, as torch.ao does for kernels that would overflow.
        quant_min: smallest code; needs ``quant_max``.
        quant_max: largest code.
        factory_kwargs: ``device`` for the buffers.
        eps: floor under the scale; None takes the rule's own (torch 1.19e-7, MegEngine 1e-5).
        is_dynamic: accepted for torch.ao's sake; only False is supported.
        ch_axis: channel axis for per-channel schemes; None means 0, or the axis of a QuantizedType.
        rounding: see QuantizedType; None means ``"half_even"``, or what a QuantizedType says.
        rule: see :func:`tritonq.qparams.range_to_qparams`.
        num_channels: length of the per-channel buffers, when known; else it is taken from the first tensor.

    Raises:
        ValueError: an unknown dtype, qscheme or rule, an empty or half-given code range, ``is_dynamic=True``, an eps
            that is not positive, or an argument that contradicts the QuantizedType given.

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
        self.qtype = quantized_type(dtype, qscheme, reduce_range, quant_min, quant_max, ch_axis, rounding)
        self.dtype = dtype
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
    def quant_min(self) -> int:
        """Smallest code."""
        return self.qtype.quant_min

    @property
    def quant_max(self) -> int:
        """Largest code."""
        return self.qtype.quant_max

    @property
    def ch_axis(self) -> int:
        """Channel axis, -1 per tensor (torch.ao's convention)."""
        return -1 if self.qtype.axis is None else self.qtype.axis

    @property
    def qscheme(self) -> torch.qscheme:
        """The torch name for symmetric or affine, per tensor or per channel."""
        if self.qtype.axis is None:
            return torch.per_tensor_symmetric if self.qtype.symmetric else torch.per_tensor_affine
        return torch.per_channel_symmetric if self.qtype.symmetric else torch.per_channel_affine

    @property
    def zero_point_is_zero(self) -> bool:
        """Whether every zero point that this observer can propose is 0."""
        # torch's fused operator turns a one-sided symmetric range into an affine one.
        return self.fixed_zero_point == 0 and self.rule != "torch_v1"

    @property
    def fixed_zero_point(self) -> int | None:
        """The zero point that the type and the rule decide alone, or None."""
        return fixed_zero_point(self.qtype, self.rule)

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """Observe ``x`` and return it unchanged."""

    @abstractmethod
    def calculate_qparams(self) -> QParams:
        """Scale (float32) and zero point (int32) that follow from what was observed so far: (1,) or (channels,)."""

    @abstractmethod
    def has_observed(self) -> Tensor:
        """0-d bool tensor: whether :meth:`calculate_qparams` rests on data."""

    def allocate(self, num_channels: int) -> None:
        """Give per-channel buffers their final length; a no-op per tensor.

        Raises:
            ValueError: they already have another length.
        """


class RangeObserver(ObserverBase):
    """An observer whose state is a range: buffers ``min_val`` and ``max_val`` (+inf and -inf before the first batch).

    ``nonfinite_count`` counts the NaN and infinities that were skipped: one overflowed batch must not poison a range.

    Args:
        *args: see :class:`ObserverBase`.
        process_group: the ranks whose batches make up one observation: None (this rank alone), ``"world"``, ``"auto"``
            (the world where torch.distributed is initialised), or a group.
        **kwargs: see :class:`ObserverBase`.

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
        """See base class."""
        if self.qtype.axis is None or self.num_channels == num_channels:
            return
        if self.num_channels is not None:
            raise ValueError(
                f"this observer keeps {self.num_channels} channels along axis {self.qtype.axis}, got {num_channels}"
            )
        self.num_channels = num_channels
        # The same objects, which others may hold: DDP lists buffers, nn.DataParallel copies from them.
        self.min_val.resize_(num_channels).fill_(torch.inf)
        self.max_val.resize_(num_channels).fill_(-torch.inf)

    def forward(self, x: Tensor) -> Tensor:
        """Update the range with ``x`` and return ``x``."""
        if not is_recomputing():
            self.observe(x, None, None)
        return x

    @abstractmethod
    def observe(self, x: Tensor, qparams: QParams | None, enabled: Tensor | None) -> None:
        """Update the state with ``x`` and then the qparams given; a device flag of 0 in ``enabled`` skips both.

        Nothing here reads a value back from the device.
        """

    def merge(self, other: RangeObserver) -> None:
        """Add what ``other`` observed.

        Raises:
            TypeError: ``other`` is of another class.
            ValueError: ``other`` keeps another number of channels.
        """
        if type(other) is not type(self):
            raise TypeError(f"cannot merge a {type(other).__name__} into a {type(self).__name__}")
        if other.min_val.numel() == 0 and self.qtype.axis is not None:
            return
        self.allocate(other.min_val.numel())
        torch.minimum(self.min_val, other.min_val, out=self.min_val)
        torch.maximum(self.max_val, other.max_val, out=self.max_val)
        self.nonfinite_count.add_(other.nonfinite_count)

    def _checked(self, x: Tensor) -> Tensor:
        """Return ``x`` detached, one group per row where there are groups, with the buffers allocated for it.

        TypeError unless it is floating point.
        """
        x = check_float_tensor("x", x).detach()
        if self.qtype.axis is not None:
            self.allocate(self.qtype.granularity.count(x.shape))
        rows = group_rows(x, self.qtype.granularity)
        return x if rows is None else rows.split(x)

    def search_range(self) -> tuple[Tensor, Tensor]:
        """Return the range that scale and zero point follow from: float32, 0-d or (channels,)."""
        return self.min_val, self.max_val

    def calculate_qparams(self) -> QParams:
        """See base class."""
        low, high = (end.reshape(-1) for end in self.search_range())
        return range_to_qparams(low, high, self.qtype, rule=self.rule, eps=self.eps)

    def has_observed(self) -> Tensor:
        """See base class."""
        if self.min_val.numel() == 0:
            return torch.zeros((), dtype=torch.bool, device=self.min_val.device)
        return (self.min_val <= self.max_val).any()

    def reset_min_max_vals(self) -> None:
        """Forget everything that was observed."""
        for buffer, empty in self.empty_state():
            buffer.fill_(empty)

    def reset_where(self, flag: Tensor) -> None:
        """Forget everything where ``flag``, a 0-d bool tensor, is set; without a look from the host."""
        for buffer, empty in self.empty_state():
            buffer.copy_(torch.where(flag, empty, buffer))

    def empty_state(self) -> list[tuple[Tensor, float]]:
        """Return the buffers that observation changes, and what they hold before it."""
        return [(self.min_val, torch.inf), (self.max_val, -torch.inf), (self.nonfinite_count, 0)]

    def extra_repr(self) -> str:
        """Return the range."""
        return f"min_val={_short(self.min_val)}, max_val={_short(self.max_val)}"

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Adopt the channel count of a checkpoint where none was known yet."""
        saved = state_dict.get(prefix + "min_val")
        if self.qtype.axis is not None and self.num_channels is None and isinstance(saved, Tensor) and saved.numel():
            self.allocate(saved.numel())
        super()._load_from_state_dict(state_dict, prefix, *args)


def write_if(enabled: Tensor | None, target: Tensor, value: Tensor) -> None:
    """Copy ``value`` into ``target`` unless the one-element flag ``enabled`` is 0; without a look from the host."""
    value = value.view_as(target)
    target.copy_(value if enabled is None else torch.where(enabled.view(()) != 0, value, target))


def known_off(enabled: Tensor | None) -> bool:
    """Whether ``enabled`` is a zero that costs nothing to read."""
    return enabled is not None and is_readable(enabled) and not bool(enabled)


def quantized_type(
    dtype: torch.dtype | QuantizedType | str,
    qscheme: torch.qscheme | None,
    reduce_range: bool,
    quant_min: int | None,
    quant_max: int | None,
    ch_axis: int | None,
    rounding: Rounding | None,
) -> QuantizedType:
    """Return the quantized type that torch.ao's observer arguments describe; errors as :class:`ObserverBase` states."""
    if (quant_min is None) != (quant_max is None):
        raise ValueError(f"quant_min and quant_max go together, got {quant_min} and {quant_max}")
    if qscheme is not None and qscheme not in _QSCHEMES:
        raise ValueError(
            f"unsupported qscheme {qscheme}: zero points are integers here; known: {', '.join(map(str, _QSCHEMES))}"
        )
    if isinstance(dtype, QuantizedType):
        _check_agreement(dtype, qscheme, reduce_range, ch_axis, rounding)
        return dtype if quant_min is None or quant_max is None else dtype.with_codes(quant_min, quant_max)
    axis = (ch_axis or 0) if qscheme in _PER_CHANNEL else None
    rounding = "half_even" if rounding is None else rounding
    if isinstance(dtype, str):
        if dtype not in QUANTIZED_TYPES:
            raise ValueError(f"unknown quantized type {dtype!r}; known: {', '.join(QUANTIZED_TYPES)}")
        named = replace(QUANTIZED_TYPES[dtype], axis=axis, rounding=rounding)
        return named if quant_min is None or quant_max is None else named.with_codes(quant_min, quant_max)
    signed = dtype in _SIGNED_DTYPES
    if not signed and dtype not in _UNSIGNED_DTYPES:
        known = ", ".join(map(str, (*_SIGNED_DTYPES, *_UNSIGNED_DTYPES)))
        raise ValueError(f"dtype must be one of {known}, a QuantizedType or its name, got {dtype}")
    full = QuantizedType.of(_SIGNED_DTYPES[dtype] if signed else _UNSIGNED_DTYPES[dtype], signed=signed)
    low, high = (full.quant_min, full.quant_max) if quant_min is None or quant_max is None else (quant_min, quant_max)
    if low < full.quant_min or high > full.quant_max:
        raise ValueError(
            f"quant_min..quant_max = {low}..{high} does not fit {dtype} ({full.quant_min}..{full.quant_max})"
        )
    if reduce_range and full.bits == _REDUCIBLE_BITS:
        low, high = low // 2, high // 2
    return QuantizedType(low, high, qscheme in _SYMMETRIC, axis, rounding)


def _check_agreement(
    qtype: QuantizedType,
    qscheme: torch.qscheme | None,
    reduce_range: bool,
    ch_axis: int | None,
    rounding: Rounding | None,
) -> None:
    """Raise where an argument contradicts a type that was given whole."""
    if qscheme is not None and (qscheme in _PER_CHANNEL) != (qtype.axis is not None):
        raise ValueError(
            f"qscheme={qscheme} contradicts dtype={qtype}: give the type an axis (with_axis), or name it by a string"
            if qtype.axis is None
            else f"qscheme={qscheme} contradicts dtype={qtype}, which has an axis"
        )
    if qscheme is not None and (qscheme in _SYMMETRIC) != qtype.symmetric:
        raise ValueError(f"qscheme={qscheme} contradicts dtype={qtype}, whose symmetric is {qtype.symmetric}")
    if ch_axis is not None and qtype.axis is not None and ch_axis != qtype.axis:
        raise ValueError(f"ch_axis={ch_axis} contradicts dtype={qtype}")
    if reduce_range:
        raise ValueError(
            f"reduce_range=True contradicts dtype={qtype}, which says its codes; make a type of fewer codes"
        )
    if rounding is not None and rounding != qtype.rounding:
        raise ValueError(f"rounding={rounding!r} contradicts dtype={qtype}")


def _short(values: Tensor) -> str:
    """Return a tensor as one number, or as the range that its elements span."""
    if values.numel() == 0 or bool(torch.isinf(values).all()):
        return "unset"
    if values.numel() == 1:
        return f"{float(values):.6g}"
    return f"[{float(values.min()):.6g} .. {float(values.max()):.6g}; {values.numel()} channels]"
