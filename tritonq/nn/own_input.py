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

    ``observes`` False: the range stays, since another reader of ``x`` updates it. It has no effect on a quantizer whose
    forward is not that of `FakeQuantize`, such as a subclass that overrides it.
    """
    if not observes and type(quantizer).forward is FakeQuantize.forward:
        return cast(Tensor, quantizer(x, observe=False))
    return cast(Tensor, quantizer(x))


class QuantizesInput(nn.Module):
    """A layer that rounds what it reads with its child ``input_fake_quant``, if it has one.

    Layers that read the same tensor share the child. Only tensors that no quantized module makes, such as inputs of the
    model, are rounded so.

    Attributes:
        observes_input: whether the child observes in this layer's calls in training; `prepare_qat` sets it to False
            where another layer that shares the child lets it observe.
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
        """The quantizer of the clip that follows the layer.

        None if no clip follows, or if a module or hook that changes the tensor was put between them.

        Eval mode rounds the layer's sums to its grid at once, and the clip then changes codes; in training only the
        clip calls it.
        """
        return self._behind_clip.module

    def set_quantizer_behind_clip(self, quantizer: Referred) -> None:
        """Set the quantizer of the clip that follows, or a Reference to it, not as a child; None: no clip follows."""
        self._behind_clip = Reference.to(quantizer)

    def last_quantizer(self, own: nn.Module) -> nn.Module | None:
        """Return the quantizer that rounds the layer's output: its own, or that of the clip behind it.

        ``own`` is the layer's child ``activation_post_process``. If that is an Identity, :attr:`quantizer_behind_clip`
        is returned, which may be None.
        """
        return self.quantizer_behind_clip if isinstance(own, nn.Identity) else own
