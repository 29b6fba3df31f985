"""Inputs, reference and names of the cases of fake quantization."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tritonq.perf.case import Inputs

# The grid ends at 1.5 to 3 standard deviations, so that clipping and its gradient are exercised.
_SHORTEST_RANGE, _LONGEST_RANGE = 1.5, 3.0


@dataclass(frozen=True)
class FakeQuantization:
    """One fake quantization: what the input looks like and which grid it is rounded to.

    Attributes:
        axis: axis of the scales; None for one scale.
        backward: include the gradient of the input.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    axis: int | None
    channels_last: bool
    backward: bool
    quant_min: int = -128
    quant_max: int = 127

    @property
    def name(self) -> str:
        """The name of the case, such as ``fake_quant/tensor/16x64x24x24/float32/forward``."""
        parts = ["fake_quant", "tensor" if self.axis is None else f"channel{self.axis}"]
        parts += ["x".join(map(str, self.shape)), str(self.dtype).removeprefix("torch.")]
        parts += ["channels_last"] if self.channels_last else []
        return "/".join([*parts, "forward+backward" if self.backward else "forward"])

    def make_inputs(self, generator: torch.Generator, device: torch.device) -> Inputs:
        """Return normal values ``x``, for the backward also ``dy``, and the grid.

        The grid is ``scale`` float32 and ``zero_point`` int32, one element or one per channel.
        """
        channels = 1 if self.axis is None else self.shape[self.axis]
        spread = torch.rand(channels, generator=generator, device=device) * (_LONGEST_RANGE - _SHORTEST_RANGE)
        inputs = {
            "x": self._normal(generator, device).requires_grad_(self.backward),
            "scale": (_SHORTEST_RANGE + spread) / self.quant_max,
            "zero_point": torch.zeros(channels, dtype=torch.int32, device=device),
        }
        if self.backward:
            inputs["dy"] = self._normal(generator, device)
        return inputs

    def reference(self, inputs: Inputs) -> tuple[Tensor, ...]:
        """Return ``(clamp(round(x * (1/s)) + z) - z) * s`` in float32.

        For the backward also the gradient: ``dy`` where the code before clamping is in range, else 0.
        """
        x, scale, zero_point = inputs["x"].detach().float(), inputs["scale"], inputs["zero_point"]
        if self.axis is not None:
            shape = [1] * x.dim()
            shape[self.axis] = -1
            scale, zero_point = scale.view(shape), zero_point.view(shape)
        code = torch.round(x * (1.0 / scale)) + zero_point
        y = ((code.clamp(self.quant_min, self.quant_max) - zero_point) * scale).to(self.dtype)
        if not self.backward:
            return (y,)
        inside = (code >= self.quant_min) & (code <= self.quant_max)
        return y, torch.where(inside, inputs["dy"], torch.zeros_like(inputs["dy"]))

    def _normal(self, generator: torch.Generator, device: torch.device) -> Tensor:
        values = torch.randn(self.shape, generator=generator, device=device).to(self.dtype)
        return values.contiguous(memory_format=torch.channels_last) if self.channels_last else values
