"""An observer whose scale is given by the user, not observed."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from tritonq.observers.base import ObserverBase
from tritonq.qparams import QParams

ArrayLike = Tensor | np.ndarray | float


class PassiveObserver(ObserverBase):
    """Holds a scale and a zero point that come from elsewhere; assigning to ``scale`` replaces the scale later.

    Attributes:
        scale: float32, one element or (channels,); the buffer ``current_scale``. Per channel it is empty until a scale
            is given or loaded, unless ``num_channels`` was given.
        zero_point: int32 buffer of the same shape.
        original_scale: buffer with a copy of the scale that ``set_qparams`` was given last; 1 before the first.

    Source: MegEngine's PassiveObserver; docs/numbers.md, "Observers".

    Examples:
        >>> observer = PassiveObserver(dtype=torch.qint8, qscheme=torch.per_tensor_symmetric)
        >>> observer.set_qparams(0.25)
        >>> observer.calculate_qparams()
        QParams(scale=tensor([0.2500]), zero_point=tensor([0], dtype=torch.int32))
    """

    current_scale: Tensor
    zero_point: Tensor
    original_scale: Tensor
    is_set: Tensor

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        shape = (1,) if self.qtype.axis is None else (self.num_channels or 0,)
        self.register_buffer("current_scale", torch.ones(shape, device=self.device))
        self.register_buffer("original_scale", torch.ones(shape, device=self.device))
        self.register_buffer("zero_point", torch.zeros(shape, dtype=torch.int32, device=self.device))
        self.register_buffer("is_set", torch.zeros((), dtype=torch.bool, device=self.device))
        # Counts replacements, so that a fake quantizer notices them without reading the device.
        self.revision = 0

    def set_qparams(self, scale: ArrayLike, zero_point: ArrayLike | None = None) -> None:
        """Set scale and zero point: tensors, NumPy arrays or numbers, one each or one per channel.

        One scale or zero point serves all channels, too. Without ``zero_point`` it is the type's fixed one, or 0 for an
        affine type.

        Raises:
            ValueError: a scale that is not positive and finite, another number of scales than one or one per channel, a
                zero point that is not whole, outside the code range or not the type's fixed one, or another number of
                zero points than one or one per scale.
        """
        scale = self._checked_scale(scale)
        fixed = self.fixed_zero_point
        zero_point = torch.as_tensor((fixed or 0) if zero_point is None else zero_point)
        if zero_point.numel() not in (1, scale.numel()):
            raise ValueError(f"scale has {scale.numel()} elements, zero_point {zero_point.numel()}; one is enough")
        if bool((zero_point != zero_point.round()).any()):
            raise ValueError(f"zero_point must be a whole number, got {zero_point}")
        if bool(((zero_point < self.quant_min) | (zero_point > self.quant_max)).any()):
            raise ValueError(f"zero_point must be in {self.quant_min}..{self.quant_max}, got {zero_point}")
        if fixed is not None and bool((zero_point != fixed).any()):
            raise ValueError(f"this symmetric type has the zero point {fixed}, got {zero_point}")
        self.current_scale = scale
        self.original_scale = scale.clone()
        self.zero_point = zero_point.to(self.zero_point).reshape(-1).expand_as(self.scale).clone()
        self.is_set.fill_(True)
        self.revision += 1

    @property
    def scale(self) -> Tensor:
        """The scale in use, float32, one element or (channels,); assigning tensors or numbers replaces it.

        The zero points stay, one per scale.

        Raises:
            ValueError: a scale that is not positive and finite is assigned, or another number of scales than one or one
                per channel, or of zero points that were set.
        """
        return self.current_scale

    @scale.setter
    def scale(self, scale: ArrayLike) -> None:
        scale, held = self._checked_scale(scale), self.zero_point
        if held.numel() != scale.numel() and bool((held != held[:1]).any()):
            raise ValueError(f"got {scale.numel()} scales for {held.numel()} zero points: call set_qparams with both")
        self.current_scale = scale
        self.zero_point = held if held.numel() == scale.numel() else _repeated(held, scale.numel())
        self.revision += 1

    def _checked_scale(self, scale: ArrayLike) -> Tensor:
        """Return ``scale`` in a new float32 tensor, (1,) or (channels,), on this observer's device.

        Raises:
            ValueError: it is not positive and finite, or has another number of elements than one or one per channel.
        """
        scale = torch.as_tensor(scale)
        if not bool((torch.isfinite(scale) & (scale > 0)).all()):
            raise ValueError(f"scale must be positive and finite, got {scale}")
        if self.qtype.axis is None and scale.numel() != 1:
            raise ValueError(f"this is a type with one scale for the tensor, got {scale.numel()}")
        if scale.numel() not in (1, self.num_channels or scale.numel() or 1):
            raise ValueError(self._other_number(scale.numel()))
        scale = scale.detach().to(self.current_scale).reshape(-1)
        return scale.expand(self.num_channels or scale.numel()).clone()

    def _other_number(self, number: int) -> str:
        channels = self.num_channels or self.current_scale.numel()
        return f"this observer keeps {channels} channels along axis {self.qtype.axis}, got {number} scales"

    def allocate(self, num_channels: int) -> None:
        """Set the number of channels; one scale that was given before becomes that of all channels.

        Without a scale the buffers stay empty. An observer with one scale for the tensor stays as it is.

        Raises:
            ValueError: another number of scales was given, or is known.
        """
        # What a quantizer has from here is no news: one scale may still become that of many channels.
        if self.qtype.axis is None or num_channels in (self.num_channels, self.current_scale.numel()):
            return
        if self.num_channels is not None or self.current_scale.numel() > 1:
            raise ValueError(self._other_number(num_channels))
        self.num_channels = num_channels
        self.revision += 1
        for name in ("current_scale", "original_scale", "zero_point"):
            # An empty one has its first value to come, from a call or from a checkpoint.
            held = self.get_buffer(name)
            if held.numel():
                repeated = _repeated(held, num_channels)
                held.resize_(num_channels).copy_(repeated)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x``; nothing is observed."""
        return x

    def calculate_qparams(self) -> QParams:
        """Return the scale in use and the zero point that :meth:`set_qparams` set last.

        Before :meth:`set_qparams` is called or a state dict loaded, the zero point is 0, the scale 1 or what was
        assigned; per channel both may be empty. Both are the observer's buffers, not copies.
        """
        return QParams(self.current_scale, self.zero_point)

    def has_observed(self) -> Tensor:
        """Return a 0-d bool tensor, a buffer: whether :meth:`set_qparams` was called, or a state dict loaded says so.

        Assigning to ``scale`` does not count.
        """
        return self.is_set

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Load a state dict, and let the quantizer that holds this observer take its scale over.

        If the number of channels was unknown, it is taken from there.
        """
        self.revision += 1
        for name in ("current_scale", "original_scale", "zero_point"):
            saved, held = state_dict.get(prefix + name), self.get_buffer(name)
            if self.qtype.axis is not None and held.numel() == 0 and isinstance(saved, Tensor):
                held.resize_(saved.shape)
        super()._load_from_state_dict(state_dict, prefix, *args)


def _repeated(values: Tensor, number: int) -> Tensor:
    """Return the first of ``values``, or 0 if there is none, ``number`` times in a new tensor."""
    return values[:1].expand(number).clone() if values.numel() else values.new_zeros(number)
