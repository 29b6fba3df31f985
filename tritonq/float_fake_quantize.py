"""The module that rounds a tensor to a floating point format of few bits."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor

from tritonq.arithmetic import whole_number
from tritonq.formats import BLOCK_FORMATS, ELEMENT_FORMATS, FLOAT_FORMATS, FloatFormat, ScaleRounding
from tritonq.functional.dispatch import implementation
from tritonq.functional.fake_quant import fake_quantize
from tritonq.functional.float_blocks import fake_quantize_blocks
from tritonq.functional.recomputation import is_recomputing
from tritonq.functional.validate import check_axis, check_float_tensor
from tritonq.grid import Grid
from tritonq.qparams import is_readable
from tritonq.quantized_type import QuantizedType
from tritonq.rank_ranges import RankState, join_ranks
from tritonq.switched_quantizer import SwitchedQuantizer
from tritonq.warn_once import warn_once

# What a batch of zeros has for its largest magnitude, so that a history of them differs from one of no batch.
_LEAST = torch.finfo(torch.float32).tiny


class FloatFakeQuantize(SwitchedQuantizer):
    """Fake quantize to a float format: ``round(x/s) * s``, see :func:`tritonq.fake_quantize_float`.

    The scale follows from the largest magnitudes of the last ``history`` training batches, the present one included:
    ``s = max(history) / L``, with ``L`` the format's largest number (6 · 448 for ``"nvfp4"``, whose blocks have scales
    of their own). Eval mode uses the last scale. Until a finite value was observed, values pass through, with one
    warning in eval mode. Blocks with powers of two as scales observe nothing: they find their scales in each tensor.

    Args:
        format: of single elements: ``"fp8_e4m3"``, ``"fp8_e5m2"``, ``"fp6_e2m3"``, ``"fp6_e3m2"``, ``"fp4_e2m1"``; of
            blocks: ``"mxfp8"``, ``"mxfp4"`` and other keys of :data:`tritonq.formats.BLOCK_FORMATS` (scales are powers
            of two), or ``"nvfp4"``.
        ch_axis: formats of single elements: one scale per index of this axis, or None, one for the tensor. Block
            formats: the axis that blocks run along; None is 1 for tensors of four or five dimensions (channels), else
            the last.
        history: number of training batches whose largest magnitudes are kept.
        scale_rounding: of block scales that are powers of two: ``"floor"`` (the largest elements of a block may
            saturate) or ``"ceil"`` (none does).
        num_channels: length of ``ch_axis``; 0: the first batch or state dict gives it. Unused with one scale per
            tensor, and by block formats.

    Attributes:
        scale: float32 buffer, (1,) or (channels,); of block formats with powers of two it stays 1.
        amax_history: float32 buffer (history, 1) or (history, channels), the latest batch first.

    Raises:
        ValueError: an unknown format or rounding, ``"ceil"`` for a format without block scales that are powers of two,
            or a history that is no positive int.

    Source: NVIDIA Transformer Engine, delayed scaling; formats: those of :func:`tritonq.fake_quantize_float`.

    Examples:
        >>> quantizer = FloatFakeQuantize("fp8_e4m3", history=2)
        >>> quantizer(torch.tensor([448.0, 17.1]))
        tensor([448.,  18.])
        >>> quantizer(torch.tensor([44.8, 17.1])), float(quantizer.scale)
        (tensor([44., 18.]), 1.0)
    """

    scale: Tensor
    amax_history: Tensor

    def __init__(
        self,
        format: str,
        ch_axis: int | None = None,
        history: int = 16,
        scale_rounding: ScaleRounding = "floor",
        num_channels: int = 0,
    ) -> None:
        super().__init__()
        if format not in ELEMENT_FORMATS and format not in BLOCK_FORMATS:
            raise ValueError(f"unknown format {format!r}; known: {', '.join((*ELEMENT_FORMATS, *BLOCK_FORMATS))}")
        batches = whole_number(history)
        if batches is None or batches < 1:
            raise ValueError(f"history must be a positive number of batches, got {history!r}")
        self.format, self.ch_axis = format, ch_axis
        self.blocks = None
        if format in BLOCK_FORMATS:
            self.blocks = replace(BLOCK_FORMATS[format], scale_rounding=scale_rounding)
        elif scale_rounding != "floor":
            raise ValueError(f"scale_rounding is of block formats with powers of two as scales, got {format!r}")
        channels = 1 if self.blocks is not None or ch_axis is None else num_channels
        self.register_buffer("scale", torch.ones(channels))
        self.register_buffer("amax_history", torch.zeros(batches, channels))
        # Whether the scale is known to rest on data.
        self._scale_known = not self.has_observed_scale

    @property
    def qtype(self) -> QuantizedType | None:
        """The type whose values are the format's numbers times the scale; None for formats of blocks."""
        return None if self.blocks is not None else QuantizedType.of_floats(ELEMENT_FORMATS[self.format], self.ch_axis)

    @property
    def element_format(self) -> FloatFormat:
        """The format of each element, with or without blocks."""
        return FLOAT_FORMATS[ELEMENT_FORMATS[self.format]] if self.blocks is None else self.blocks.element_format

    @property
    def has_observed_scale(self) -> bool:
        """Whether the format takes a scale that is observed; the same before and after data have been seen.

        False for blocks whose scales are powers of two: each call computes them from the tensor alone.
        """
        return self.blocks is None or self.blocks.scale != "e8m0"

    @property
    def tensor_scale(self) -> Tensor | None:
        """The buffer ``scale``, (1,), by which the scales of blocks are multiplied (``"nvfp4"``).

        None if the scales of blocks are powers of two. Without blocks it is the buffer, too: (1,) or (channels,).
        """
        return self.scale if self.has_observed_scale else None

    @property
    def reach(self) -> float:
        """The largest magnitude that the format holds at a scale of 1: 448 for FP8 E4M3, 6 · 448 for ``"nvfp4"``.

        It has no meaning for blocks whose scales are powers of two.
        """
        largest = self.element_format.largest
        return largest if self.blocks is None else largest * FLOAT_FORMATS["e4m3"].largest

    def rounds(self) -> bool:
        """Whether :meth:`rounded` rounds: switched on, and the scale is observed, loaded or found in each tensor.

        May synchronise with the device.
        """
        self._scale_known = self._scale_known or bool(self.amax_history.any())
        return self._scale_known and bool(self.fake_quant_enabled)

    def grid(self) -> Grid:
        """Return the grid of a format of single elements: the buffers ``scale`` and ``fake_quant_enabled``, not copies.

        Until something was observed, its scale is 1.

        Raises:
            ValueError: a format of blocks, whose scales depend on the tensor.
        """
        if self.qtype is None:
            raise ValueError(f"{self.format} has no grid: its blocks find their scales in each tensor")
        return Grid(self.scale, None, self.qtype, self.fake_quant_enabled)

    def allocate(self, num_channels: int) -> None:
        """Give per-channel buffers the length ``num_channels``, if they have another.

        Those of another length are emptied, without an error: the scale becomes 1 and the history of magnitudes 0. A
        quantizer with one scale per tensor, or of blocks, stays as it is.
        """
        if self.blocks is None and self.ch_axis is not None and self.scale.numel() != num_channels:
            self.scale.resize_(num_channels).fill_(1)
            self.amax_history.resize_(len(self.amax_history), num_channels).zero_()
            self._scale_known = False

    def forward(self, x: Tensor) -> Tensor:
        """Observe (training only) and fake quantize ``x``; same shape, dtype and memory format.

        While switched off, the values of ``x`` are returned. So they are with an observed scale
        (:attr:`has_observed_scale`) until a finite value was observed or a history loaded; in eval mode a UserWarning
        then says once that nothing was observed. Per-channel buffers of another length than ``x`` has channels are
        emptied first, see :meth:`allocate`. Gradients pass straight through; where single elements saturate they are 0.

        Raises:
            TypeError: ``x`` is no float tensor.
            ValueError: ``x`` has no axis ``ch_axis``.
        """
        check_float_tensor("x", x)
        if self.has_observed_scale:
            if self.blocks is None and self.ch_axis is not None:
                self.allocate(x.shape[check_axis(x, self.ch_axis)])
            if self.training and not is_recomputing():
                self.observe(x.detach())
            if is_readable(x) or not (self.training or torch.compiler.is_compiling()):
                self._scale_known = self._scale_known or bool(self.amax_history.any())
            # A training step does not wait for the device: there the switch that rounds says it.
            if not (self._scale_known or self.training or torch.compiler.is_compiling()):
                warn_once(
                    self,
                    f"a {type(self).__name__} that has observed nothing passes its input through; run it in training "
                    "mode with its observer enabled, or load a checkpoint",
                    stacklevel=2,
                )
                return x
        return self.rounded(x)

    @torch.no_grad()
    def observe(self, x: Tensor) -> None:
        """Put the largest finite magnitudes of ``x`` in front of the history, and compute the scale from it.

        The oldest batch drops out. Without a finite value the magnitude is 0, which counts as not observed; if all
        finite values are 0, it is float32's smallest normal number. While the history holds nothing larger than that,
        the scale is 1. Nothing changes while ``observer_enabled`` is 0. :meth:`forward` calls it in training, after
        :meth:`allocate`, and only for formats with an observed scale (:attr:`has_observed_scale`).
        """
        join_ranks()
        history = torch.cat([self._largest(x), self.amax_history[:-1]])
        self.amax_history.copy_(torch.where(self.observer_enabled != 0, history, self.amax_history))
        self._follow_history()

    @torch.no_grad()
    def gather(self, x: Tensor) -> None:
        """Let ``x`` raise the largest magnitudes of the latest batch in the history, instead of adding a batch.

        Calibration calls it for all its data, which count as one batch. Per-channel buffers of another length than
        ``x`` has channels are emptied first. The scale follows unless ``observer_enabled`` is 0; the history changes in
        any case. Nothing is done for blocks whose scales are powers of two.
        """
        if not self.has_observed_scale:
            return
        if self.blocks is None and self.ch_axis is not None:
            self.allocate(x.shape[check_axis(x, self.ch_axis)])
        self.amax_history[0].copy_(torch.maximum(self.amax_history[0], self._largest(x)[0]))
        self._follow_history()

    def _largest(self, x: Tensor) -> Tensor:
        """Return the largest finite magnitudes in ``x``: (1, 1), or (1, channels).

        It is 0 without a finite value, and ``_LEAST`` if all are zeros.
        """
        axis = None if self.blocks is not None else self.ch_axis
        low, high, _ = implementation("min_max", x).min_max(x, axis)
        largest = torch.maximum(-low, high).view(1, -1)
        # Zeros were seen, too; of a batch without a finite value this is -infinity.
        return torch.where(largest >= 0, largest.clamp(min=_LEAST), 0.0)

    def rank_state(self) -> RankState:
        """Return ``amax_history``, the buffer, of which all ranks will take the largest values; nothing is merged here.

        For blocks whose scales are powers of two the result has no tensors.
        """
        return RankState(highest=[self.amax_history] if self.has_observed_scale else [])

    def follow_ranks(self) -> None:
        """Compute the scale from the history, which the caller has made the same on all ranks.

        The scale is 1 where only zeros, or no finite values, were seen. Nothing changes while ``observer_enabled`` is
        0, and for blocks whose scales are powers of two.
        """
        if self.has_observed_scale:
            self._follow_history()

    def _follow_history(self) -> None:
        """Write ``max(history) / reach`` to the scale, per channel, unless ``observer_enabled`` is 0.

        It is 1 where all values were zeros, or none was seen.
        """
        largest = self.amax_history.amax(0)
        # A channel of zeros may have any scale.
        scale = torch.where(largest > _LEAST, largest / self.reach, 1.0)
        self.scale.copy_(torch.where(self.observer_enabled != 0, scale, self.scale))

    def block_axis(self, x: Tensor) -> int:
        """Return the axis of ``x`` that blocks run along, counted from 0: ``-1`` of four axes gives 3.

        It is ``ch_axis``; if that is None, 1 for a tensor of four or five dimensions, else the last.

        Raises:
            ValueError: ``x`` has no such axis.
        """
        return check_axis(x, self.ch_axis if self.ch_axis is not None else (1 if x.dim() in (4, 5) else -1))

    def rounded(self, x: Tensor) -> Tensor:
        """Return ``x`` rounded with the present scale; a copy of ``x`` while rounding is off or nothing was observed.

        This call observes nothing. Per-channel scales must be as many as ``x`` has channels.
        """
        enabled = self.fake_quant_enabled
        if self.has_observed_scale and not self._scale_known:
            enabled = enabled * self.amax_history.any()
        if self.blocks is None:
            return fake_quantize(x, Grid(self.scale, None, cast(QuantizedType, self.qtype), enabled))
        return fake_quantize_blocks(x, self.blocks, self.block_axis(x), self.tensor_scale, enabled=enabled)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Load a state dict; if the number of channels was unknown, take it from there.

        Forget whether the scale rests on data.
        """
        saved = state_dict.get(f"{prefix}scale")
        if isinstance(saved, Tensor) and saved.dim() == 1 and saved.numel():
            self.allocate(saved.numel())
        self._scale_known = not self.has_observed_scale
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        """Return text for ``repr``: ``fp8_e4m3, ch_axis=0, fake_quant=True, observer=True``."""
        axis = "" if self.ch_axis is None else f", ch_axis={self.ch_axis}"
        return (
            f"{self.format}{axis}, fake_quant={bool(self.fake_quant_enabled)}, observer={bool(self.observer_enabled)}"
        )
