"""Layers that own the quantizer of the tensor that they read, or have that of their result behind a clip."""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn

from tritonq.fake_quantize import FakeQuantize
from tritonq.nn.reference import Reference

# The child's name.
INPUT_QUANTIZER = "input_fake_quant"


def quantize_read(quantizer: nn.Module, x: Tensor, observes: bool) -> Tensor:
    """Return ``quantizer(x)``; without ``observes`` the range stays, since another reader of ``x`` observes it."""
    # A quantizer with a forward of its own decides itself.
    if not observes and type(quantizer).forward is FakeQuantize.forward:
        return cast(Tensor, quantizer(x, observe=False))
    return cast(Tensor, quantizer(x))


class QuantizesInput(nn.Module):
    """A layer that rounds what it reads with its child ``input_fake_quant``, where it has one.

    The layers that read a tensor which no quantized module makes, such as an input of the model, share the child.

    Attributes:
        observes_input: whether this layer's calls observe; where several share the child, those of one layer do.
    """

    observes_input: bool = True

    def quantized_input(self, x: Tensor) -> Tensor:
        """Return ``x`` as the layer's operation reads it."""
        quantizer = self._modules.get(INPUT_QUANTIZER)
        return x if quantizer is None else quantize_read(quantizer, x, self.observes_input)


class QuantizedBehindClip(nn.Module):
    """A layer that may have its output's quantizer behind a clip, in another module."""

    # Shared by all that have none; models that earlier versions pickled have none.
    _behind_clip: Reference[nn.Module] = Reference()

    @property
    def quantizer_behind_clip(self) -> nn.Module | None:
        """The quantizer that rounds the output of a layer without one of its own, behind a clip; None: there is none.

        With it, eval mode takes sums to the quantizer's grid at once, and the clip then changes codes.
        """
        return self._behind_clip.module

    def set_quantizer_behind_clip(self, quantizer: nn.Module | None) -> None:
        """Set :attr:`quantizer_behind_clip`."""
        self._behind_clip = Reference(quantizer)

    def last_quantizer(self, own: nn.Module) -> nn.Module | None:
        """Return ``own``, or the quantizer behind the clip where ``own`` rounds nothing."""
        return self.quantizer_behind_clip if isinstance(own, nn.Identity) else own
