"""The module that finds a tensor's fractional length and rounds the tensor to fixed point."""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tritonq.fake_quantize_base import FakeQuantizeBase
from tritonq.functional.dispatch import implementation
from tritonq.functional.fixed_point import (
    Statistic,
    fixed_point_type,
    largest_frac_len,
    quantize_fixed_point,
    search_frac_len,
    statistic_frac_len,
)
from tritonq.functional.recomputation import is_recomputing
from tritonq.functional.validate import check_axis, check_float_tensor
from tritonq.qparams import QParams
from tritonq.rank_ranges import RankState, join_ranks
from tritonq.reference.fixed_point import power_of_two
from tritonq.warn_once import warn_once

Phase = Literal["fixed", "floating", "floating_wo_clip"]
Choice = Literal["search", "std", "mean_abs", "rms"]


class FixedPointFakeQuantize(FakeQuantizeBase):
    """Find the fractional length in training, then round: ``clamp(round(x * 2^fl), lo, hi) * 2^-fl``.

    In training a batch is rounded with its own choice ``fl_batch``, and the running one follows:
    ``fl <- momentum * fl_batch + (1 - momentum) * fl``. Eval rounds with ``clamp(round(fl), 0, word_len - signed)``.
    Nothing waits for a GPU in training.

    Args:
        word_len: bits of a code, 2..16.
        signed: codes ``±(2^(word_len-1) - 1)``; else ``0..2^word_len - 1``, and the clamp at 0 is a ReLU.
        axis: one fractional length per index of this axis; None: one for the tensor.
        momentum: share of the batch in the running fractional length.
        choice: how a batch's ``fl`` is found. ``"search"``: the one of ``0..word_len - signed`` that rounds the batch
            with the least squared error, of equals the smallest. ``"std"``, ``"mean_abs"``, ``"rms"``: from that
            statistic of the batch, by the formula of :func:`tritonq.statistic_frac_len`.
        num_channels: length of ``axis``, when known; else it is taken from the first tensor.

    Attributes:
        frac_len: float64 buffer, (1,) or (channels,), which is (0,) while their number is unknown; begins as
            ``word_len - signed``.
        batch_frac_len: int32 buffer, as ``frac_len``: what the last training batch was rounded with.
        scale: float32 buffer, as ``frac_len``: ``2^-fl`` with the fractional length of eval.
        zero_point: int32 buffer, as ``frac_len``: 0.
        observed: uint8 buffer (1,): 1 once a training batch was observed; while it is 0, eval doesn't round or clip.
        phase: ``"fixed"`` rounds; ``"floating"`` clips to the format's range and doesn't round; ``"floating_wo_clip"``
            is a ReLU where codes are unsigned, and else passes values through. It begins as ``"fixed"``, and is in no
            state dict; :func:`set_fixed_point_phase` sets it.

    Raises:
        TypeError: an axis that is no integer.
        ValueError: a word length that is no integer in 2..16, a momentum outside 0..1, an unknown choice.

    Source: docs/fixed-point.md.

    Examples:
        >>> quantizer = FixedPointFakeQuantize(word_len=4)
        >>> quantizer(torch.tensor([-1.5, 0.3, 0.5]))
        tensor([-1.5000,  0.2500,  0.5000])
        >>> int(quantizer.batch_frac_len)
        2
    """

    frac_len: Tensor
    batch_frac_len: Tensor
    observed: Tensor

    def __init__(
        self,
        word_len: int = 8,
        signed: bool = True,
        axis: int | None = None,
        momentum: float = 0.1,
        choice: Choice = "search",
        *,
        num_channels: int | None = None,
    ) -> None:
        super().__init__()
        self.qtype = fixed_point_type(word_len, signed, axis)
        if not 0 <= momentum <= 1:
            raise ValueError(f"momentum must be in 0..1, got {momentum}")
        if choice not in get_args(Choice):
            raise ValueError(f"unknown choice {choice!r}; known: {', '.join(get_args(Choice))}")
        self.word_len, self.signed, self.momentum, self.choice = word_len, signed, momentum, choice
        self.phase: Phase = "fixed"
        self.register_buffer("observed", torch.zeros(1, dtype=torch.uint8))
        self.register_buffer("frac_len", torch.empty(0, dtype=torch.float64))
        self.register_buffer("batch_frac_len", torch.empty(0, dtype=torch.int32))
        self.register_buffer("scale", torch.empty(0))
        self.register_buffer("zero_point", torch.empty(0, dtype=torch.int32))
        self._give_length(1 if axis is None else num_channels or 0)

    def _give_length(self, length: int) -> None:
        # The same objects, which others may hold: DDP lists buffers, nn.DataParallel copies from them.
        for buffer in (self.frac_len, self.batch_frac_len):
            buffer.resize_(length).fill_(self.largest)
        self.scale.resize_(length).fill_(2.0**-self.largest)
        self.zero_point.resize_(length).zero_()

    @property
    def largest(self) -> int:
        """The largest fractional length, ``word_len - signed`` (7 for 8 bits signed, 8 unsigned)."""
        return largest_frac_len(self.word_len, self.signed)

    @property
    def codes(self) -> tuple[int, int]:
        """Smallest and largest code, such as ``(-127, 127)`` or ``(0, 255)``."""
        return self.qtype.quant_min, self.qtype.quant_max

    def allocate(self, num_channels: int) -> None:
        """Give per-channel buffers of unknown length, (0,), the length ``num_channels``, in place.

        Fractional lengths begin as ``word_len - signed``. A quantizer with one per tensor, or whose buffers have this
        length, stays as it is.

        Raises:
            ValueError: the buffers have another length already.
        """
        if self.qtype.axis is None or self.frac_len.numel() == num_channels:
            return
        if self.frac_len.numel():
            raise ValueError(f"this quantizer keeps {self.frac_len.numel()} channels, got {num_channels}")
        self._give_length(num_channels)

    def rests_on_data(self) -> Tensor:
        """Return the buffer ``observed`` itself, uint8 (1,): 1 once a training batch was observed, or so loaded."""
        return self.observed

    def is_enabled_on_host(self) -> bool:
        """Whether :meth:`forward` rounds in eval mode.

        That is so in phase ``"fixed"``, if it is switched on and has seen a training batch or loaded a fractional
        length.
        """
        return self.phase == "fixed" and super().is_enabled_on_host()

    def enabled_on_device(self) -> Tensor:
        """Return a uint8 tensor (1,) on the device: 1 if :meth:`forward` rounds in eval mode.

        It does in phase ``"fixed"``, while switched on, once a fractional length was observed or loaded. In training
        mode forward rounds even before that.
        """
        return super().enabled_on_device() if self.phase == "fixed" else torch.zeros_like(self.fake_quant_enabled)

    def rounded_frac_len(self) -> Tensor:
        """Return the fractional length of eval, ``clamp(round(fl), 0, word_len - signed)``: int32, as ``frac_len``."""
        return self.frac_len.round().clamp(0, self.largest).to(torch.int32)

    def calculate_qparams(self) -> QParams:
        """Return scale and zero point of eval mode: ``2^-fl``, a new float32 tensor, and the buffer ``zero_point``."""
        return QParams(power_of_two(-self.rounded_frac_len()), self.zero_point)

    def forward(self, x: Tensor) -> Tensor:
        """Observe (training only) and round ``x``, or clip it, as the phase says; same shape, dtype and memory format.

        In phase ``"floating_wo_clip"`` nothing is observed: where codes are unsigned, the result is the ReLU of ``x``,
        else ``x`` itself, whatever the switches are. In the other phases eval mode returns ``x`` until a training batch
        was observed, or a fractional length loaded, and a UserWarning says so once; while ``fake_quant_enabled`` is 0,
        ``x`` is observed and its values are returned. Activation checkpointing's second forward observes nothing.

        Raises:
            TypeError: ``x`` is observed and no float tensor.
            ValueError: ``x`` is observed and has another number of channels than ``frac_len``, or no such axis.
        """
        if self.phase == "floating_wo_clip":
            return x if self.signed else F.relu(x)
        if self.training:
            if not is_recomputing():
                self.observe(x)
        elif not torch.compiler.is_compiling() and not self.has_qparams():
            self._warn_unobserved()
            return x
        return self.quantize(x)

    def choose(self, x: Tensor) -> Tensor:
        """Return the fractional length that ``choice`` finds for ``x``: int32, (1,) or (channels,).

        Per-channel buffers of unknown length get that of ``x``; else the running fractional length stays as it is.

        Raises:
            TypeError: ``x`` is no float tensor.
            ValueError: ``x`` has another number of channels than ``frac_len``, or no such axis.
        """
        axis = self.qtype.axis
        self.allocate(1 if axis is None else x.shape[check_axis(x, axis)])
        if self.choice == "search":
            return search_frac_len(x, self.word_len, self.signed, axis=axis).view(-1)
        statistic: Statistic = self.choice
        return statistic_frac_len(x, self.word_len, self.signed, statistic=statistic, axis=axis).view(-1)

    @torch.no_grad()
    def observe(self, x: Tensor) -> None:
        """Write the fractional length of this batch to ``batch_frac_len``, and move ``frac_len`` towards it.

        ``observed`` becomes 1. While ``observer_enabled`` is 0, and of a batch or channel without a finite value,
        ``frac_len`` and ``observed`` stay, and ``batch_frac_len`` becomes :meth:`rounded_frac_len`. ``scale`` becomes
        ``2^-rounded_frac_len()`` in any case. All are changed in place, in any mode and phase.

        Raises:
            TypeError: ``x`` is no float tensor.
            ValueError: ``x`` has another number of channels than ``frac_len``, or no such axis.
        """
        join_ranks()
        batch, axis = self.choose(x), self.qtype.axis
        low, high, _ = implementation("min_max", x).min_max(x, None if axis is None else check_axis(x, axis))
        counts = (self.observer_enabled != 0) & (low <= high).view(-1)
        running = self.momentum * batch.double() + (1 - self.momentum) * self.frac_len
        self.frac_len.copy_(torch.where(counts, running, self.frac_len))
        self.batch_frac_len.copy_(torch.where(counts, batch, self.rounded_frac_len()))
        self.observed.logical_or_(counts.any())
        self.scale.copy_(power_of_two(-self.rounded_frac_len()))

    def rank_state(self) -> RankState:
        """Return a `RankState` with the buffers ``frac_len`` and ``scale``: all ranks take the first rank's values.

        ``scale`` is ``2^-fl`` with the fractional length of eval mode.
        """
        return RankState(first=[self.frac_len, self.scale])

    def quantize(self, x: Tensor) -> Tensor:
        """Return ``x`` rounded with the latest batch's fractional length (training), or the running one (eval).

        Nothing is observed. In phase ``"floating"`` values are clipped only; while switched off they stay as they are.
        Phase ``"floating_wo_clip"``, in which :meth:`forward` does not call this method, counts as ``"fixed"``. In eval
        mode ``x`` is rounded even if nothing was observed yet; compiled code returns the values of ``x`` then.
        """
        if self.training:
            return self.round_to(x, self.batch_frac_len)
        seen = None
        if torch.compiler.is_compiling():
            # What forward asks on the host, where there is one.
            seen = self.rests_on_data()
        return self.round_to(x, self.rounded_frac_len(), seen)

    def round_to(self, x: Tensor, frac_len: Tensor, seen: Tensor | None = None) -> Tensor:
        """Round ``x`` to fixed point with a given fractional length; return its values while switched off.

        In phase ``"floating"`` ``x`` is clipped to the format's range instead; both other phases round.

        Args:
            x: float tensor; the result has its shape and dtype.
            frac_len: int32, (1,) or (channels,).
            seen: uint8, one element on the device; 0: the values of ``x`` are returned. None: as 1.
        """
        active = self.fake_quant_enabled if seen is None else self.fake_quant_enabled * seen
        if self.phase == "floating":
            return self._clip(x, frac_len, active)
        return quantize_fixed_point(x, frac_len, self.qtype, enabled=active)

    def _clip(self, x: Tensor, frac_len: Tensor, active: Tensor) -> Tensor:
        check_float_tensor("x", x)
        step = power_of_two(-frac_len, torch.float64).to(x.dtype)
        if self.qtype.axis is not None:
            step = self.qtype.granularity.align(step, x.dim())
        low, high = self.codes
        bounds = (low * step, high * step)
        # The gradient stops at both bounds too; that of torch.clamp does not.
        clipped = torch.where((x > bounds[0]) & (x < bounds[1]), x, torch.clamp(x.detach(), *bounds))
        return torch.where(active != 0, clipped, x)

    def _warn_unobserved(self) -> None:
        warn_once(
            self,
            "a FixedPointFakeQuantize that has observed nothing passes its input through; run it in training mode "
            "with its observer enabled, or load a checkpoint",
            stacklevel=3,
        )

    def extra_repr(self) -> str:
        """Return format, fractional length, choice and phase as text for ``repr``.

        Such as ``"8-bit signed, frac_len=7, choice=search, phase=fixed"``; per channel ``"frac_len=16 channels"``.
        """
        kind = "signed" if self.signed else "unsigned"
        length = self.frac_len
        shown = f"{float(length):.3g}" if length.numel() == 1 else f"{length.numel()} channels"
        return f"{self.word_len}-bit {kind}, frac_len={shown}, choice={self.choice}, phase={self.phase}"

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Load a state dict; if the number of channels was unknown, take it from there."""
        saved = state_dict.get(prefix + "frac_len")
        if self.qtype.axis is not None and self.frac_len.numel() == 0 and isinstance(saved, Tensor) and saved.numel():
            self._give_length(saved.numel())
        self._qparams_known = False
        super()._load_from_state_dict(state_dict, prefix, *args)


def set_fixed_point_phase(module: nn.Module, phase: Phase) -> None:
    """Set the attribute ``phase`` of every fixed-point quantizer in ``module``, or of ``module`` if it is one.

    ``"floating_wo_clip"``: plain ReLU, float weights, no scaling factors η: the float network. ``"floating"``: clipping
    to the formats' ranges without rounding. ``"fixed"``: fixed point. The phase counts in training and in eval mode.

    Raises:
        ValueError: an unknown phase.

    Source: docs/fixed-point.md.

    Examples:
        >>> import tritonq
        >>> layer = tritonq.nn.FixedPointLinear(3, 2, qconfig=tritonq.get_qconfig("f8net"))
        >>> set_fixed_point_phase(layer, "floating")
        >>> layer.weight_fake_quant.phase
        'floating'
    """
    if phase not in get_args(Phase):
        raise ValueError(f"unknown phase {phase!r}; known: {', '.join(get_args(Phase))}")
    for part in module.modules():
        if isinstance(part, FixedPointFakeQuantize):
            part.phase = phase
