"""Convolutions and matrix products as values: what an operator with a backward of its own needs to know of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


class LinearMap(Protocol):
    """A map that is linear in its input and in its weight."""

    @property
    def output_axis(self) -> int:
        """Axis of the result that out channels lie on, counted from the end: a batch axis may be missing."""

    @property
    def conv2d(self) -> Convolution | None:
        """This map as a 2-d convolution of its own input, or None."""

    def as_conv2d(self, x: Tensor) -> Convolution | None:
        """The 2-d convolution that computes this map of ``x`` by way of :meth:`images`, or None."""

    def images(self, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Input (n, c, h, w) and weight (out, c/groups, kh, kw) of :meth:`as_conv2d`."""

    def from_images(self, y: Tensor, x: Tensor) -> Tensor:
        """The result for input ``x`` of what :meth:`as_conv2d` gave, (n, out, h, w)."""

    def padded(self, x: Tensor) -> tuple[Tensor, DifferentiableMap]:
        """Return ``x``, padded where an operator's own padding can't, and the map that remains."""

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """The result, in ``x``'s dtype, plus ``bias`` (out,)."""

    def to_rows(self, weight: Tensor) -> Tensor:
        """``weight`` with its out channels on axis 0."""

    def from_rows(self, rows: Tensor) -> Tensor:
        """Inverse of :meth:`to_rows`."""


class DifferentiableMap(LinearMap, Protocol):
    """A linear map whose gradients an operator can compute."""

    def backward(
        self, dy: Tensor, x: Tensor, weight: Tensor, needs_x: bool, needs_weight: bool, needs_bias: bool
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Gradients of input, weight and bias, None where not needed; of what isn't needed the shape alone matters."""


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

    @property
    def output_axis(self) -> int:
        """See :class:`LinearMap`."""
        return -len(self.stride) - 1

    @property
    def conv2d(self) -> Convolution | None:
        """See :class:`LinearMap`."""
        return self if len(self.stride) == 2 and not self.transposed else None

    def as_conv2d(self, x: Tensor) -> Convolution | None:
        """See :class:`LinearMap`. One over a single dimension has images of one line."""
        if self.transposed or len(self.stride) > 2 or x.dim() != len(self.stride) + 2:
            return None
        if len(self.stride) == 2:
            return self
        return Convolution((1, *self.stride), (0, *self.padding), (1, *self.dilation), (0, 0), False, self.groups)

    def images(self, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """See :class:`LinearMap`."""
        return (x, weight) if len(self.stride) == 2 else (x.unsqueeze(2), weight.unsqueeze(2))

    def from_images(self, y: Tensor, x: Tensor) -> Tensor:
        """See :class:`LinearMap`."""
        return y if len(self.stride) == 2 else y.squeeze(2)

    def padded(self, x: Tensor) -> tuple[Tensor, Convolution]:
        """See :class:`LinearMap`."""
        return x, self

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """See :class:`LinearMap`. These are the functions that autocast knows."""
        dimension = len(self.stride) - 1
        if self.transposed:
            arguments = (self.stride, self.padding, self.output_padding, self.groups, self.dilation)
            return _TRANSPOSED[dimension](x, weight, bias, *arguments)
        return _CONVOLUTIONS[dimension](x, weight, bias, self.stride, self.padding, self.dilation, self.groups)

    def backward(
        self, dy: Tensor, x: Tensor, weight: Tensor, needs_x: bool, needs_weight: bool, needs_bias: bool
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """See :class:`DifferentiableMap`."""
        mask = [needs_x, needs_weight, False]
        dx, dw, _ = torch.ops.aten.convolution_backward(dy, x, weight, None, *self._geometry, mask)
        return dx, dw, dy.sum((0, *range(2, dy.dim()))) if needs_bias else None

    def to_rows(self, weight: Tensor) -> Tensor:
        """See :class:`LinearMap`."""
        return self._swapped(weight) if self.transposed else weight

    def from_rows(self, rows: Tensor) -> Tensor:
        """See :class:`LinearMap`."""
        return self._swapped(rows) if self.transposed else rows

    def _swapped(self, weight: Tensor) -> Tensor:
        grouped = weight.reshape(self.groups, weight.shape[0] // self.groups, *weight.shape[1:])
        return grouped.transpose(1, 2).flatten(0, 1)


_CONVOLUTIONS: tuple[Callable[..., Tensor], ...] = (F.conv1d, F.conv2d, F.conv3d)
_TRANSPOSED: tuple[Callable[..., Tensor], ...] = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)


@dataclass(frozen=True, eq=False)
class PaddedConvolution:
    """A convolution that pads otherwise: by reflecting and the like, or unequally on both sides.

    Attributes:
        conv: the convolution of the padded input.
        pad: values on each side, last axis first, as in ``torch.nn.functional.pad``.
        pad_mode: ``mode`` of ``torch.nn.functional.pad``.
    """

    conv: Convolution
    pad: tuple[int, ...]
    pad_mode: str

    @property
    def output_axis(self) -> int:
        """See :class:`LinearMap`."""
        return self.conv.output_axis

    @property
    def conv2d(self) -> None:
        """None: the convolution is one of the padded input."""

    def as_conv2d(self, x: Tensor) -> Convolution | None:
        """See :class:`LinearMap`."""
        return self.conv.as_conv2d(x)

    def images(self, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """See :class:`LinearMap`."""
        return self.conv.images(F.pad(x, self.pad, self.pad_mode), weight)

    def from_images(self, y: Tensor, x: Tensor) -> Tensor:
        """See :class:`LinearMap`."""
        return self.conv.from_images(y, x)

    def padded(self, x: Tensor) -> tuple[Tensor, Convolution]:
        """See :class:`LinearMap`."""
        return F.pad(x, self.pad, self.pad_mode), self.conv

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """See :class:`LinearMap`."""
        return self.conv(F.pad(x, self.pad, self.pad_mode), weight, bias)

    def to_rows(self, weight: Tensor) -> Tensor:
        """See :class:`LinearMap`."""
        return self.conv.to_rows(weight)

    def from_rows(self, rows: Tensor) -> Tensor:
        """See :class:`LinearMap`."""
        return self.conv.from_rows(rows)


_PIXELS = Convolution((1, 1), (0, 0), (1, 1), (0, 0), False, 1)


@dataclass(frozen=True)
class MatrixProduct:
    """``x @ weight.T`` for (..., in) and (out, in); its backward takes (batch, ..., in)."""

    output_axis: ClassVar[int] = -1
    conv2d: ClassVar[None] = None

    def as_conv2d(self, x: Tensor) -> Convolution:
        """See :class:`LinearMap`. Each row is an image of one pixel."""
        return _PIXELS

    def images(self, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """See :class:`LinearMap`."""
        return x.reshape(-1, x.shape[-1], 1, 1), weight[:, :, None, None]

    def from_images(self, y: Tensor, x: Tensor) -> Tensor:
        """See :class:`LinearMap`."""
        return y.reshape(*x.shape[:-1], y.shape[1])

    def padded(self, x: Tensor) -> tuple[Tensor, MatrixProduct]:
        """See :class:`LinearMap`."""
        return x, self

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """See :class:`LinearMap`."""
        return F.linear(x, weight, bias)

    def backward(
        self, dy: Tensor, x: Tensor, weight: Tensor, needs_x: bool, needs_weight: bool, needs_bias: bool
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """See :class:`DifferentiableMap`."""
        rows = dy.flatten(0, -2)
        dx = (rows @ weight).view(*dy.shape[:-1], weight.shape[1]) if needs_x else None
        dw = rows.t() @ x.flatten(0, -2) if needs_weight else None
        return dx, dw, rows.sum(0) if needs_bias else None

    def to_rows(self, weight: Tensor) -> Tensor:
        """See :class:`LinearMap`."""
        return weight

    def from_rows(self, rows: Tensor) -> Tensor:
        """See :class:`LinearMap`."""
        return rows
