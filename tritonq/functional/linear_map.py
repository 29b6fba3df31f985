"""Convolutions and matrix products as objects: what an operator with a backward of its own needs to know of them.

A *linear map* computes a result from an input ``x`` and a weight, and knows how the weight lies: its *rows* are the
weight with out channels on axis 0. It also says how to run as a 2-d convolution, for which there is a kernel: the
*images* are input and weight, reshaped for that.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


class LinearMap(Protocol):
    """A convolution or matrix product without its weight and bias: called as ``map(x, weight, bias)``.

    A protocol that :class:`Convolution`, :class:`PaddedConvolution` and :class:`MatrixProduct` follow.
    """

    @property
    def output_axis(self) -> int:
        """Axis of the result with the out channels, counted from the end: -3 of a 2-d convolution.

        It is the same with and without a batch axis.
        """

    @property
    def conv2d(self) -> Convolution | None:
        """This map, if it is a :class:`Convolution` of two dimensions and not transposed; else None."""

    def as_conv2d(self, x: Tensor) -> Convolution | None:
        """Return a 2-d convolution that computes this map of ``x`` from what :meth:`images` returns.

        None for a convolution that is transposed or 3-d, or whose ``x`` has no batch axis.
        """

    def images(self, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Return input (n, c, h, w) and weight (out, c/groups, kh, kw) for the convolution of :meth:`as_conv2d`.

        Call it only if :meth:`as_conv2d` returns a convolution; that is not checked.
        """

    def from_images(self, y: Tensor, x: Tensor) -> Tensor:
        """Return ``y`` (n, out, h, w), computed by :meth:`as_conv2d`, in the shape of this map's result for ``x``."""

    def padded(self, x: Tensor) -> tuple[Tensor, DifferentiableMap]:
        """Return ``x``, padded where torch's convolution can't, and the map that gives this map's result from it."""

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return the map's result, plus ``bias`` (out,) if given, in ``x``'s dtype."""

    def to_rows(self, weight: Tensor) -> Tensor:
        """Return ``weight`` with its out channels on axis 0; it may be ``weight`` itself, or a view of it."""

    def from_rows(self, rows: Tensor) -> Tensor:
        """Return ``rows`` laid out as the map's weight: the inverse of :meth:`to_rows`; may share their memory."""


class DifferentiableMap(LinearMap, Protocol):
    """A linear map that also computes the gradients of its input, weight and bias, by :meth:`backward`."""

    def backward(
        self, dy: Tensor, x: Tensor, weight: Tensor, needs_x: bool, needs_weight: bool, needs_bias: bool
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Return the gradients of input, weight and bias, shaped as these, in ``dy``'s dtype; None if not needed.

        Args:
            dy: gradient of the result, in the dtype of ``x`` and ``weight``.
            x: the input, with a batch axis; its values are read only if ``needs_weight``.
            weight: the weight; its values are read only if ``needs_x``.
            needs_x: whether to compute the input's gradient.
            needs_weight: whether to compute the weight's.
            needs_bias: whether to compute the bias's, ``Σ dy`` per out channel.
        """


def per_axis(value: Any, rank: int) -> tuple[Any, ...]:
    """Return one entry per axis: ``3``, ``(3,)`` and ``(3, 3)`` give ``(3, 3)`` for rank 2.

    Args:
        value: an argument as torch's convolutions and pools take it: one entry, or a tuple or list of one or ``rank``
            entries. A tuple or list of another length is not refused, but returned as a tuple of that length.
        rank: number of axes.
    """
    entries = tuple(value) if isinstance(value, (tuple, list)) else (value,)
    return entries * rank if len(entries) == 1 else entries


def as_autocast(x: Tensor) -> Tensor:
    """Return ``x`` in autocast's dtype for its device; as it is if it is float64, or autocast is off there."""
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        return x.to(torch.get_autocast_dtype(x.device.type))
    return x


# Compared by identity: torch.compile of torch 2.11 hashes an instance that is called, before it has attributes.
@dataclass(frozen=True, eq=False)
class Convolution:
    """A convolution of one to three dimensions that pads with zeros, equally on both sides; may be transposed.

    Attributes:
        stride: one number per dimension.
        padding: zeros on each side, one number per dimension; transposed: torch's ``padding``, which cuts the result.
        dilation: distance between taps of the kernel, one number per dimension.
        output_padding: of a transposed convolution, one number per dimension: how much longer its result is.
        transposed: whether it is transposed: its weight is (in, out/groups, ...), else (out, in/groups, ...).
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
        """Axis of the result with the out channels, counted from the end: -3 in two dimensions."""
        return -len(self.stride) - 1

    @property
    def conv2d(self) -> Convolution | None:
        """This convolution, if it has two dimensions and is not transposed; else None."""
        return self if len(self.stride) == 2 and not self.transposed else None

    def as_conv2d(self, x: Tensor) -> Convolution | None:
        """Return a 2-d convolution for :meth:`images` of ``x``; None if transposed, 3-d, or ``x`` has no batch axis.

        A 1-d convolution becomes one of images of height 1.
        """
        if self.transposed or len(self.stride) > 2 or x.dim() != len(self.stride) + 2:
            return None
        if len(self.stride) == 2:
            return self
        return Convolution((1, *self.stride), (0, *self.padding), (1, *self.dilation), (0, 0), False, self.groups)

    def images(self, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Return input and weight for :meth:`as_conv2d`: (n, c, 1, w) and (out, c/groups, 1, k) of a 1-d convolution.

        Those of a 2-d convolution are returned as they are. Call it only where :meth:`as_conv2d` returns a convolution:
        not for a transposed or 3-d one, which is not checked.
        """
        return (x, weight) if len(self.stride) == 2 else (x.unsqueeze(2), weight.unsqueeze(2))

    def from_images(self, y: Tensor, x: Tensor) -> Tensor:
        """Return ``y``, computed by :meth:`as_conv2d`; of a 1-d convolution (n, out, 1, w) becomes (n, out, w).

        That of a 2-d convolution is returned as it is. Where :meth:`as_conv2d` is None, as for three dimensions, this
        is not called. The map's input ``x`` is not used.
        """
        return y if len(self.stride) == 2 else y.squeeze(2)

    def padded(self, x: Tensor) -> tuple[Tensor, Convolution]:
        """Return ``x`` and this map: torch's operator pads by itself."""
        return x, self

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return the convolution plus ``bias``, by the functions of torch that autocast knows."""
        dimension = len(self.stride) - 1
        if self.transposed:
            arguments = (self.stride, self.padding, self.output_padding, self.groups, self.dilation)
            return _TRANSPOSED[dimension](x, weight, bias, *arguments)
        return _CONVOLUTIONS[dimension](x, weight, bias, self.stride, self.padding, self.dilation, self.groups)

    def backward(
        self, dy: Tensor, x: Tensor, weight: Tensor, needs_x: bool, needs_weight: bool, needs_bias: bool
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Return the gradients of input, weight and bias by torch's own backward, None for those not needed.

        ``dy`` is the gradient of the result, in the dtype of ``x`` and ``weight``; ``needs_x``, ``needs_weight`` and
        ``needs_bias`` say which are needed. The values of ``x`` are read only if ``needs_weight``, those of ``weight``
        only if ``needs_x``. The bias's gradient is ``Σ dy`` per out channel.
        """
        mask = [needs_x, needs_weight, False]
        dx, dw, _ = torch.ops.aten.convolution_backward(dy, x, weight, None, *self._geometry, mask)
        return dx, dw, dy.sum((0, *range(2, dy.dim()))) if needs_bias else None

    def to_rows(self, weight: Tensor) -> Tensor:
        """Return ``weight`` as (out, in/groups, ...): if transposed, with the channel axes of each group swapped."""
        return self._swapped(weight) if self.transposed else weight

    def from_rows(self, rows: Tensor) -> Tensor:
        """Return ``rows`` (out, in/groups, ...) as the layer's weight: the inverse of :meth:`to_rows`."""
        return self._swapped(rows) if self.transposed else rows

    def _swapped(self, weight: Tensor) -> Tensor:
        grouped = weight.reshape(self.groups, weight.shape[0] // self.groups, *weight.shape[1:])
        return grouped.transpose(1, 2).flatten(0, 1)


_CONVOLUTIONS: tuple[Callable[..., Tensor], ...] = (F.conv1d, F.conv2d, F.conv3d)
_TRANSPOSED: tuple[Callable[..., Tensor], ...] = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)


@dataclass(frozen=True, eq=False)
class PaddedConvolution:
    """A convolution that pads otherwise: by reflection, circularly, or differently on both sides.

    Attributes:
        conv: the convolution of the padded input; may itself pad with zeros, equally on both sides.
        pad: how many values to add on each side, last axis first, as ``torch.nn.functional.pad`` takes them.
        pad_mode: ``mode`` of ``torch.nn.functional.pad``, such as ``"reflect"``; ``"constant"`` adds zeros.
    """

    conv: Convolution
    pad: tuple[int, ...]
    pad_mode: str

    @property
    def output_axis(self) -> int:
        """Axis of the result with the out channels, counted from the end: that of :attr:`conv`."""
        return self.conv.output_axis

    @property
    def conv2d(self) -> None:
        """None, always, since the input must be padded before torch's operator convolves it."""

    def as_conv2d(self, x: Tensor) -> Convolution | None:
        """Return the 2-d convolution that gives the result from what :meth:`images` returns for ``x``.

        None if :attr:`conv` is transposed or 3-d, or if ``x`` has no batch axis.
        """
        return self.conv.as_conv2d(x)

    def images(self, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Return the padded input and the weight for :meth:`as_conv2d`; in 1-d both get a height of 1 as axis 2."""
        return self.conv.images(F.pad(x, self.pad, self.pad_mode), weight)

    def from_images(self, y: Tensor, x: Tensor) -> Tensor:
        """Return ``y``, computed by :meth:`as_conv2d`, in the shape of this map's result; ``x`` is not used."""
        return self.conv.from_images(y, x)

    def padded(self, x: Tensor) -> tuple[Tensor, Convolution]:
        """Return the padded ``x``, and the convolution of it."""
        return F.pad(x, self.pad, self.pad_mode), self.conv

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """Pad ``x``, and return its convolution plus ``bias``."""
        return self.conv(F.pad(x, self.pad, self.pad_mode), weight, bias)

    def to_rows(self, weight: Tensor) -> Tensor:
        """Return ``weight`` with its out channels on axis 0."""
        return self.conv.to_rows(weight)

    def from_rows(self, rows: Tensor) -> Tensor:
        """Return ``rows`` laid out as the layer's weight: the inverse of :meth:`to_rows`."""
        return self.conv.from_rows(rows)


_PIXELS = Convolution((1, 1), (0, 0), (1, 1), (0, 0), False, 1)


@dataclass(frozen=True)
class MatrixProduct:
    """``x @ weight.T`` for x (..., in) and weight (out, in): a linear layer. A call may add a bias (out,).

    The argument x of :meth:`backward` has at least one axis before the last: (batch, ..., in).
    """

    output_axis: ClassVar[int] = -1
    conv2d: ClassVar[None] = None

    def as_conv2d(self, x: Tensor) -> Convolution:
        """Return a 2-d convolution with a 1 × 1 kernel: each vector ``x[..., :]`` is an image of one pixel."""
        return _PIXELS

    def images(self, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``x`` as (vectors, in, 1, 1) and ``weight`` as (out, in, 1, 1), for :meth:`as_conv2d`."""
        return x.reshape(-1, x.shape[-1], 1, 1), weight[:, :, None, None]

    def from_images(self, y: Tensor, x: Tensor) -> Tensor:
        """Return ``y`` (vectors, out, 1, 1), computed by :meth:`as_conv2d`, as (..., out) with ``x``'s leading axes."""
        return y.reshape(*x.shape[:-1], y.shape[1])

    def padded(self, x: Tensor) -> tuple[Tensor, MatrixProduct]:
        """Return ``x`` and this map: a matrix product pads nothing."""
        return x, self

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return ``x @ weight.T + bias``."""
        return F.linear(x, weight, bias)

    def backward(
        self, dy: Tensor, x: Tensor, weight: Tensor, needs_x: bool, needs_weight: bool, needs_bias: bool
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Return the gradients of x ``dy @ weight``, in its shape, of the weight ``dy.T @ x`` and of the bias ``Σ dy``.

        For ``dy.T @ x`` and ``Σ dy`` the leading axes count as one.

        ``needs_x``, ``needs_weight`` and ``needs_bias`` say which are needed; the others are None.
        """
        rows = dy.flatten(0, -2)
        dx = (rows @ weight).view(*dy.shape[:-1], weight.shape[1]) if needs_x else None
        dw = rows.t() @ x.flatten(0, -2) if needs_weight else None
        return dx, dw, rows.sum(0) if needs_bias else None

    def to_rows(self, weight: Tensor) -> Tensor:
        """Return ``weight``: its out channels lie on axis 0 already."""
        return weight

    def from_rows(self, rows: Tensor) -> Tensor:
        """Return ``rows``: a weight has out channels on axis 0."""
        return rows
