"""Layers whose results a clip alone reads, and the quantizer behind that clip."""

from __future__ import annotations

from torch import nn

from tritonq.nn.reference import Reference


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
