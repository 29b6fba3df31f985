"""Convolutions and matrix products as values: what an operator with a backward of its own needs to know of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LinearMap(Protocol):
    """A map that is linear in its input and in its weight; the out channels lie on axis 1 of the result."""

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """The result, in ``x``'s dtype, plus ``bias`` (out,)."""

    def backward(
        self, dy: Tensor, x: Tensor, weight: Tensor, needs_x: bool, needs_weight: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        """Gradients of input and weight, None where not needed. Only the shape of what isn't needed matters."""

    def to_rows(self, weight: Tensor) -> Tensor:
        """``weight`` with its out channels on axis 0."""

    def from_rows(self, rows: Tensor) -> Tensor:
        """Inverse of :meth:`to_rows`."""


# Compared by identity: torch.compile of torch 2.11 hashes an instance before it has attributes.
@dataclass(frozen=True, eq=False)
class Convolution:
    """A convolution of one to three dimensions that pads with zeros, equally on both sides.

    Attributes:
        stride: one per dimension, as are the others.
        padding: zeros on each side.
        dilation: between taps.
        output_padding: of a transposed convolution.
        transposed: whether it is one; its weight is (in, out/groups, ...), else (out, in/groups, ...).
        groups: groups of channels.
    """

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    output_padding: tuple[int, ...]
    transposed: bool
    groups: int

    @property
    def _geometry(self) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], bool, tuple[int, ...], int]:
        return self.stride, self.padding, self.dilation, self.transposed, self.output_padding, self.groups

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """See :class:`LinearMap`."""
        if x.dim() == len(self.stride) + 1:  # without a batch axis
            return self(x.unsqueeze(0), weight, bias).squeeze(0)
        return torch.ops.aten.convolution(x, weight, bias, *self._geometry)  # type: ignore[no-any-return]

    def backward(
        self, dy: Tensor, x: Tensor, weight: Tensor, needs_x: bool, needs_weight: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        """See :class:`LinearMap`."""
        mask = [needs_x, needs_weight, False]
        dx, dw, _ = torch.ops.aten.convolution_backward(dy, x, weight, None, *self._geometry, mask)
        return dx, dw

    def to_rows(self, weight: Tensor) -> Tensor:
        """See :class:`LinearMap`."""
        return self._swapped(weight) if self.transposed else weight

    def from_rows(self, rows: Tensor) -> Tensor:
        """See :class:`LinearMap`."""
        return self._swapped(rows) if self.transposed else rows

    def _swapped(self, weight: Tensor) -> Tensor:
        grouped = weight.reshape(self.groups, weight.shape[0] // self.groups, *weight.shape[1:])
        return grouped.transpose(1, 2).flatten(0, 1)


@dataclass(frozen=True)
class MatrixProduct:
    """``x @ weight.T`` for (..., in) and (out, in); its backward takes (batch, in) alone."""

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """See :class:`LinearMap`."""
        return F.linear(x, weight, bias)

    def backward(
        self, dy: Tensor, x: Tensor, weight: Tensor, needs_x: bool, needs_weight: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        """See :class:`LinearMap`."""
        return dy @ weight if needs_x else None, dy.t() @ x if needs_weight else None

    def to_rows(self, weight: Tensor) -> Tensor:
        """See :class:`LinearMap`."""
        return weight

    def from_rows(self, rows: Tensor) -> Tensor:
        """See :class:`LinearMap`."""
        return rows


def pad_input(conv: nn.modules.conv._ConvNd, x: Tensor) -> tuple[Tensor, Convolution]:
    """``x`` padded where the convolution's own padding cannot do it, and the convolution that remains.

    That is so for reflecting, replicating and circular padding, and for ``padding="same"`` with an odd total.
    """
    padding = conv.padding
    if conv.padding_mode != "zeros":
        x = F.pad(x, conv._reversed_padding_repeated_twice, mode=conv.padding_mode)
        padding = (0,) * len(conv.kernel_size)
    elif isinstance(padding, str):
        pairs = conv._reversed_padding_repeated_twice
        befores, afters = pairs[0::2], pairs[1::2]
        common = [min(before, after) for before, after in zip(befores, afters, strict=True)]
        if befores != afters:
            x = F.pad(x, [side - common[i // 2] for i, side in enumerate(pairs)])
        padding = tuple(reversed(common))
    plain = Convolution(conv.stride, padding, conv.dilation, conv.output_padding, conv.transposed, conv.groups)
    return x, plain


def plain_conv2d(conv: nn.Conv2d) -> Convolution | None:
    """The convolution of a module that pads with zeros, equally on both sides; None where it pads otherwise."""
    if conv.padding_mode != "zeros" or isinstance(conv.padding, str):
        return None
    return Convolution(conv.stride, conv.padding, conv.dilation, (0, 0), False, conv.groups)
