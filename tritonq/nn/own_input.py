"""Layers that quantize what they read, and layers whose result is quantized behind a clip."""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn

from tritonq.fake_quantize import FakeQuantize
from tritonq.nn.reference import Reference, Referred

# The child's name.
INPUT_QUANTIZER = "input_fake_quant"


def quantize_read(quantizer: nn.Module, x: Tensor, observes: bool) -> Tensor:
    """Return ``x`` rounded by ``quantizer``, whose range is updated with it in training.

    ``observes`` False: the range stays, since another reader of ``x`` updates it. A quantizer with a forward of its own
    is called all the same, and decides itself.
    """
    if not observes and type(quantizer).forward is FakeQuantize.forward:
        return cast(Tensor, quantizer(x, observe=False))
    return cast(Tensor, quantizer(x))


class QuantizesInput(nn.Module):
    """A layer that rounds what it reads with its child ``input_fake_quant``, if it has one.

    Layers that read the same tensor share the child. Only tensors that no quantized module makes, such as inputs of the
    model, are rounded so.

    Attributes:
        observes_input: whether the child observes in this layer's calls; if several layers share it, it observes in
            one.
    """

    observes_input: bool = True

    def quantized_input(self, x: Tensor) -> Tensor:
        """Return ``x`` rounded by ``input_fake_quant``, or as it is if the layer has no such child."""
        quantizer = self._modules.get(INPUT_QUANTIZER)
        return x if quantizer is None else quantize_read(quantizer, x, self.observes_input)


class QuantizedBehindClip(nn.Module):
    """Base class of layers whose output may be rounded by the quantizer of a clip behind them, such as a ReLU6 module.

    ``prepare_qat`` finds the clip and calls :meth:`set_quantizer_behind_clip`; the layer's own output quantizer is then
    an Identity.
    """

    # Shared by all that have none; models that earlier versions pickled have none.
    _behind_clip: Reference[nn.Module] = Reference()

    @property
    def quantizer_behind_clip(self) -> nn.Module | None:
        """The quantizer of the clip that follows the layer, which rounds the layer's output, too.

        None if there is none.

        With it, eval mode rounds the layer's sums to the quantizer's grid at once, and the clip then changes codes.
        """
        return self._behind_clip.module

    def set_quantizer_behind_clip(self, quantizer: Referred) -> None:
        """Set the quantizer of the clip that follows the layer, or a Reference to it; None: no clip follows."""
        self._behind_clip = Reference.to(quantizer)

    def last_quantizer(self, own: nn.Module) -> nn.Module | None:
        """Return the quantizer that rounds the layer's output: its own, or that of the clip behind it.

        ``own`` is the child for the output; if it is an Identity, the clip's quantizer is returned, None without one.
        """
        return self.quantizer_behind_clip if isinstance(own, nn.Identity) else own
