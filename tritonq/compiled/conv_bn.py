"""The tail of a convolution with BatchNorm in C++: three passes over the convolution's output forward, two backward.

Functions are those of `tritonq.reference.conv_bn`, which computes what the compiled code can't. c is the convolution's
output, (batch, channels, ...); FQ rounds to the grid of the quantizer; ``relu?`` is a ReLU with the upper bound
``ceiling`` (infinity for a plain one), or none for None.
"""

from __future__ import annotations

import ctypes
import math

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from tritonq.compiled.arguments import are_vectors, grid_arguments, is_plain, note_observed, tail_of, takes_grid
from tritonq.compiled.build import library
from tritonq.grid import Grid, RangeStatistics
from tritonq.reference import conv_bn as reference
from tritonq.reference.conv_bn import BatchNormState, Normalization, TailGradients, TailResult, dense
from tritonq.reference.ranges import snapshot_of

# Vectors that the statistics and what follows from them take; the last five and the first are kept for the backward.
_VECTORS = 9


def forward(
    c: Tensor,
    ratio: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    bias: Tensor | None,
    norm: BatchNormState,
    grid: Grid | None,
    statistics: RangeStatistics | None,
    ceiling: float | None,
) -> TailResult:
    """Return ``FQ(relu?(BN(c / ratio + bias)))`` by the statistics of this batch, with what the backward needs.

    The result of BN is ``slope · c + shift`` with ``slope = |γ| / sqrt(var + eps · ratio²)`` and ``shift = β - slope ·
    mean``, where mean and biased variance are those of c.

    Args:
        c: (batch, channels, ...), any float dtype, contiguous or channels last, with two or more values per channel.
        ratio: (channels,), what ``c`` is divided by; that gives the convolution with the unfolded weight. Not zero; it
            has the sign of γ, and is positive where γ is zero.
        gamma: (channels,); None for 1.
        beta: (channels,); None for 0.
        bias: of the convolution, (channels,), which changes the running mean only; None for 0.
        norm: the BatchNorm, whose running statistics are updated in place.
        grid: per tensor, updated in place. The result stays in float if it is None or switched off, or the running
            range has no data.
        statistics: the running range of the grid, updated in place; None observes nothing.
        ceiling: upper bound of the ReLU before the quantizer, infinity for a plain one; None without one.

    Returns:
        The result, in the dtype and memory format of ``c``; a `Normalization` of six vectors like ``ratio``: mean of c,
        ``1/std``, |γ|, slope, shift and ``eps · ratio² / std²``, with ``std² = var + eps · ratio²``; and a copy of the
        grid as this step used it, or None.
    """
    c = dense(c)
    vectors = (ratio, gamma, beta, bias, norm.running_mean, norm.running_var)
    if not (c.numel() and is_plain(c) and are_vectors(*vectors) and takes_grid(grid, statistics)):
        return reference.forward(c, ratio, gamma, beta, bias, norm, grid, statistics, ceiling)
    found, y = torch.empty((_VECTORS, c.shape[1])), torch.empty_like(c)
    given = grid_arguments(grid, statistics, ceiling)
    is_finite = library().tail_forward(
        *(c.data_ptr(), *_view(c), found.data_ptr(), *map(_address, vectors)),
        *(norm.momentum, norm.eps, *given, y.data_ptr()),
    )
    if not is_finite:
        return reference.forward(c, ratio, gamma, beta, bias, norm, grid, statistics, ceiling)
    increment_version((norm.running_mean, norm.running_var))
    if given.observes:
        note_observed(grid, statistics)
    mean, _, _, _, *rest = found.unbind(0)
    return TailResult(y, Normalization(mean, *rest), None if grid is None else snapshot_of(grid, given.rounds))


def apply(c: Tensor, slope: Tensor, shift: Tensor, grid: Grid | None, ceiling: float | None) -> Tensor:
    """Return ``FQ(relu?(slope · c + shift))``, in ``c``'s dtype: the last pass of :func:`forward`. Observes nothing.

    Args:
        c: (batch, channels, ...), the convolution's output.
        slope: (channels,).
        shift: (channels,).
        grid: per tensor, as one step used it; None, or one that is switched off, leaves the result in float.
        ceiling: upper bound of the ReLU, infinity for a plain one; None without one.
    """
    c = dense(c)
    if not (c.numel() and is_plain(c) and are_vectors(slope, shift) and takes_grid(grid, None)):
        return reference.apply(c, slope, shift, grid, ceiling)
    y, tail = torch.empty_like(c), tail_of(grid, ceiling)
    addresses = (slope.data_ptr(), shift.data_ptr(), ctypes.addressof(tail), y.data_ptr())
    library().tail_apply(c.data_ptr(), *_view(c), *addresses)
    return y


def backward(
    dy: Tensor,
    c: Tensor,
    result: Normalization,
    grid: Grid | None,
    ceiling: float | None,
    out: Tensor | None = None,
) -> TailGradients:
    """Return the gradients of ``c`` and of β (``Σ g`` per channel), and ``Σ g n``, with ``n = (c - mean) / std``.

    g is the part of ``dy`` that ReLU and quantizer let pass; ``dc = slope (g - mean(g) - n · mean(g n))``.

    Args:
        dy: gradient of the result, shaped as ``c``.
        c: output of the convolution, as the forward got it.
        result: the vectors of the forward, mean, ``1/std``, slope and shift among them.
        grid: the copy of the grid that :func:`forward` returned; None without a quantizer.
        ceiling: upper bound of the ReLU, infinity for a plain one; None without one.
        out: memory for the gradient of ``c``, laid out as ``c``, in the dtype of ``result``'s vectors. If that is not
            the dtype of ``c``, the gradient is converted into new memory. None: new memory.
    """
    c = dense(c)
    vectors = (result.mean, result.inverse_std, result.slope, result.shift)
    if not (c.numel() and is_plain(c, dy, out) and are_vectors(*vectors) and takes_grid(grid, None)):
        return reference.backward(dy, c, result, grid, ceiling, out)
    if dy.stride() != c.stride():
        dy = torch.empty_like(c).copy_(dy)
    dc = torch.empty_like(c) if out is None else out
    sums, tail = torch.empty((2, c.shape[1])), tail_of(grid, ceiling)
    library().tail_backward(
        *(dy.data_ptr(), c.data_ptr(), *_view(c), *map(_address, vectors)),
        *(ctypes.addressof(tail), sums.data_ptr(), dc.data_ptr()),
    )
    return TailGradients(dc, *sums.unbind(0))


def _view(c: Tensor) -> tuple[int, int, int, int]:
    """Return ``c``'s sizes for C++: (batch, channels, elements per channel, 1).

    If channels lie innermost in memory: (elements per channel in the batch, channels, 1, 0).
    """
    channels, inner = c.shape[1], math.prod(c.shape[2:])
    if inner > 1 and c.is_contiguous():
        return c.shape[0], channels, inner, 1
    return c.shape[0] * inner, channels, 1, 0


def _address(vector: Tensor | None) -> int | None:
    return None if vector is None else vector.data_ptr()
