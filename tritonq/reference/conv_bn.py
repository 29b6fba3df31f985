"""The tail of a convolution with BatchNorm in PyTorch: the specification of `tritonq.kernels.conv_bn` and the CPU path.

The *tail* is what follows the convolution. In the approximate mode of folding it (divide by the fold, add the bias,
normalise with the batch's statistics, ReLU, observe, fake quantize) is affine per channel until the ReLU, where ``c``
is the convolution's output. So it takes the statistics of the convolution's output and one more pass, and saves nothing
but that output and a few vectors. Derivation: docs/conv-bn.md, "The tail of a step". Vectors are (channels,) in the
dtype of the arithmetic: float32, or float64 for a float64 input.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tritonq.arithmetic import as_dtype, operand
from tritonq.grid import Grid, RangeStatistics
from tritonq.reference.activation import observe, observe_ends, quantize_, rectify_, straight_through_
from tritonq.reference.operator import CopyOf, Like, operator
from tritonq.reference.ranges import OBSERVED, snapshot
from tritonq.reference.scratch import borrow, is_dense


class BatchNormState(NamedTuple):
    """A BatchNorm's running statistics, which a step updates in place, and its constants.

    Attributes:
        running_mean: (channels,).
        running_var: (channels,).
        momentum: weight of the new batch, 0..1; for a cumulative average a 0-d tensor, 1 / number of batches so far.
        eps: added to the variance.
    """

    running_mean: Tensor
    running_var: Tensor
    momentum: float | Tensor
    eps: float


class Normalization(NamedTuple):
    """What a backward needs of a step's BatchNorm besides the convolution's output c; vectors (channels,).

    c is computed with the folded weight's codes; ``c / ratio`` is the output for the unfolded weight.

    Attributes:
        mean: of c.
        inverse_std: ``1 / sqrt(var + eps · ratio²)``, with the biased variance of c.
        gain: |γ|, 1 without γ; ``c`` has the sign of γ already.
        slope: ``gain · inverse_std``: the result before the ReLU is ``slope · c + shift``.
        shift: ``β - slope · mean``.
        eps_share: ``eps / (var / ratio² + eps)``, how much of the normalised variance is eps; 0..1.
    """

    mean: Tensor
    inverse_std: Tensor
    gain: Tensor
    slope: Tensor
    shift: Tensor
    eps_share: Tensor


class TailResult(NamedTuple):
    """The result of :func:`forward`, and what its backward needs.

    Attributes:
        y: the layer's output, behind ReLU and quantizer.
        normalization: mean, slope, shift and other vectors (channels,) of this step, as a :class:`Normalization`.
        grid: a snapshot: a copy of the grid as this step used it, for the backward; None without a quantizer.
    """

    y: Tensor
    normalization: Normalization
    grid: Grid | None


class TailGradients(NamedTuple):
    """Gradients of :func:`backward`, with ``g`` the part of the gradient that ReLU and quantizer let pass.

    Attributes:
        c: gradient of the convolution's output c, in the shape and dtype of c.
        sum_g: ``Σ g`` per channel: the gradient of β.
        sum_g_normalized: ``Σ g (c - mean) inverse_std`` per channel.
    """

    c: Tensor
    sum_g: Tensor
    sum_g_normalized: Tensor


_OUTPUT: Any = Like("c", prepare=lambda c: dense(c))
_VECTOR: Any = Like("ratio")
_SUM: Any = Like("result.mean")
_SNAPSHOT: Any = CopyOf("grid")


@operator(
    returns=TailResult(_OUTPUT, Normalization(*[_VECTOR] * len(Normalization._fields)), _SNAPSHOT),
    mutates=("norm.running_mean", "norm.running_var", *OBSERVED),
    visible=True,
    made_again=True,
)
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
    """Return ``FQ(relu?(BN(c / ratio + bias)))``, normalised by this batch's statistics; updates those of ``norm``.

    Args:
        c: (batch, channels, ...), the convolution's output; with one element per channel ZeroDivisionError is raised.
        ratio: (channels,), what ``c`` is to be divided by: the fold over the unit of the weight codes. Not zero, and
            positive where γ is zero; elsewhere it has the sign of γ.
        gamma: (channels,) or None, for 1.
        beta: (channels,) or None, for 0.
        bias: the convolution's, (channels,) or None; normalising takes it out of the result, so it changes the running
            mean only.
        norm: the BatchNorm.
        grid: per tensor; the result is rounded to it. None leaves it in float.
        statistics: running range; ``relu?(BN(...))`` updates it and the grid. None, or no grid: nothing is observed.
        ceiling: upper bound of the ReLU before the quantizer, infinity for a plain one, 6 for ReLU6; None: no ReLU.

    Returns:
        The result in the dtype and memory format of ``c``, and what the backward needs.

    Source: docs/conv-bn.md, "The tail of a step".
    """
    c = dense(c)
    wide = as_dtype(c, ratio.dtype)
    mean, var, scratch = moments(wide)
    result = finish(mean, var, c.numel() // max(1, c.shape[1]), ratio, gamma, beta, bias, norm)
    if torch.compiler.is_compiling():
        return _visible_result(c, wide, result, grid, statistics, ceiling)
    y = affine(wide, result.slope, result.shift, scratch)
    if grid is None:
        return TailResult(rectify_(y, ceiling).to(c.dtype), result, None)
    frozen = snapshot(grid, observe(y, grid, statistics, ceiling).statistics)
    return TailResult(as_dtype(quantize_(y, frozen, ceiling), c.dtype), result, frozen)


def _visible_result(
    c: Tensor,
    wide: Tensor,
    result: Normalization,
    grid: Grid | None,
    statistics: RangeStatistics | None,
    ceiling: float | None,
) -> TailResult:
    """Return :func:`forward`'s result, ``FQ(relu?(slope · c + shift))``, such that a compiler keeps only ``c``."""
    # Imported here, so that its operator is registered when something is compiled, and not before.
    from tritonq.remember import made_again

    frozen = None
    if grid is not None:
        frozen = snapshot(grid, observe_ends(*_ends(wide, result), grid, statistics, ceiling))
    with made_again():
        y = affine(wide, result.slope, result.shift)
        y = rectify_(y, ceiling) if frozen is None else quantize_(y, frozen, ceiling)
        return TailResult(as_dtype(y, c.dtype), result, frozen)


def _ends(c: Tensor, result: Normalization) -> tuple[Tensor, Tensor, Tensor]:
    """Return smallest and largest normalised value, and the count of those that are not finite, from the ends of ``c``.

    A multiple and a sum keep the order of values, so no pass over the normalised values is needed. All values of a
    channel whose slope or shift is not finite count as not finite.
    """
    dims, count = _all_but_channels(c), c.numel() // max(1, c.shape[1])
    low, high = (torch.addcmul(result.shift, end(c, dims), result.slope) for end in (torch.amin, torch.amax))
    finite = torch.isfinite(low) & torch.isfinite(high)
    low, high = torch.where(finite, low, torch.inf).amin(), torch.where(finite, high, -torch.inf).amax()
    return low.float(), high.float(), (~finite).sum() * count


@operator(returns=_OUTPUT, visible=True, made_again=True)
def apply(c: Tensor, slope: Tensor, shift: Tensor, grid: Grid | None, ceiling: float | None) -> Tensor:
    """Return ``FQ(relu?(slope · c + shift))``, in ``c``'s dtype: the last pass of :func:`forward`.

    ``slope`` and ``shift`` are (channels,); ``grid`` is per tensor, and the result is not rounded if it is None or
    switched off; ``ceiling`` is the ReLU's upper bound, None without one. Nothing is observed.
    """
    c = dense(c)
    y = affine(c.to(slope.dtype), slope, shift)
    y = rectify_(y, ceiling) if grid is None else quantize_(y, grid, ceiling)
    return y.to(c.dtype)


def finish(
    mean: Tensor,
    var: Tensor,
    count: int,
    ratio: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    bias: Tensor | None,
    norm: BatchNormState,
) -> Normalization:
    """Return the vectors that normalise c, given its mean and variance, and update the running statistics.

    These take the mean ``mean / ratio + bias`` and the unbiased variance, ``var / ratio² · count / (count - 1)``.

    Args:
        mean: (channels,), of c, the convolution's output; the result holds this tensor, not a copy.
        var: (channels,), its biased variance.
        count: elements per channel, at least 2; 1 raises ZeroDivisionError.
        ratio: (channels,), what c is divided by to give the convolution with the unfolded weight; not zero.
        gamma: (channels,), or None for 1.
        beta: (channels,), or None for 0.
        bias: of the convolution, (channels,), or None.
        norm: the BatchNorm's buffers, updated in place.
    """
    dtype = ratio.dtype
    squared = ratio * ratio
    eps_part = squared * operand(norm.eps, squared)
    total = var + eps_part
    inverse_std = total.rsqrt()
    if gamma is None:
        gain, slope = torch.ones_like(ratio), inverse_std
    else:
        gain = as_dtype(gamma.detach().abs(), dtype)
        slope = gain * inverse_std
    shift = -slope * mean if beta is None else torch.addcmul(as_dtype(beta.detach(), dtype), slope, mean, value=-1)
    batch_mean = mean / ratio
    if bias is not None:
        batch_mean += bias.detach()
    update_running_statistics(norm, batch_mean, var / squared, count)
    return Normalization(mean, inverse_std, gain, slope, shift, eps_part / total)


def update_running_statistics(norm: BatchNormState, mean: Tensor, var: Tensor, count: int) -> None:
    """Update running mean and variance in place: ``r + momentum (batch - r)``, with the unbiased variance.

    Args:
        norm: the BatchNorm.
        mean: (channels,), of this batch, of the convolution with the unfolded weight and its bias.
        var: (channels,), its biased variance.
        count: elements per channel, at least 2; 1 raises ZeroDivisionError.
    """
    momentum = norm.momentum if isinstance(norm.momentum, Tensor) else operand(norm.momentum, norm.running_mean)
    unbiased = var * operand(count / (count - 1), var)
    for running, batch in ((norm.running_mean, mean), (norm.running_var, unbiased)):
        running.add_((batch - running) * momentum)


@operator(returns=TailGradients(_OUTPUT, _SUM, _SUM), scratch=("out",), visible=True)
def backward(
    dy: Tensor,
    c: Tensor,
    result: Normalization,
    grid: Grid | None,
    ceiling: float | None,
    out: Tensor | None = None,
) -> TailGradients:
    """Return the gradient of ``c``, and per channel ``Σ g``, which is that of β, and ``Σ g n``.

    With g the gradient where neither ReLU nor the clip blocks it, and ``n = (c - mean) inverse_std``:
    ``dc = slope (g - mean(g) - n · mean(g n))``.

    Args:
        dy: gradient of ``TailResult.y``, shaped as ``c``; not changed.
        c: output of the convolution, as the forward got it.
        result: ``TailResult.normalization`` of the forward.
        grid: ``TailResult.grid``: scale, zero point and switch as the forward used them; None: it did not round.
        ceiling: upper bound of the ReLU before the quantizer, infinity for a plain one, 6 for ReLU6; None: no ReLU.
        out: memory for the gradient of ``c``, laid out as ``c``, in the dtype of ``result``; None: new memory.
    """
    c = dense(c)
    wide = as_dtype(c, result.mean.dtype)
    dy = _like(as_dtype(dy, wide.dtype), wide)
    g = dy
    if ceiling is not None or grid is not None:
        y = affine(wide, result.slope, result.shift, borrow("local", wide))
        g = straight_through_(dy, y, grid, ceiling)
    if torch.compiler.is_compiling():
        return _visible_backward(g, wide, result, c.dtype)
    if _channels_are_outer(c):
        sums_only = [out is None, True, True]
        dc, sum_gn, sum_g = torch.ops.aten.native_batch_norm_backward(
            g, wide, result.gain, None, None, result.mean, result.inverse_std, True, 0.0, sums_only
        )
        if out is not None:
            pull, offset = _pull_and_offset(result, sum_g, sum_gn, c)
            centred = torch.sub(wide, _column(result.mean, wide), out=out)
            dc = affine(centred, pull, offset, centred).addcmul_(g, _column(result.slope, g))
        return TailGradients(as_dtype(dc, c.dtype), sum_g, sum_gn)
    # Channels lie innermost: broadcasting vectors is fast, BatchNorm's own backward is not.
    g, flat = _rows(g), _rows(wide)
    centred = torch.sub(flat, result.mean, out=None if out is None else _rows(out))
    sum_g = g.sum(0)
    product = borrow("product", g)
    sum_gn = torch.mul(g, centred, out=product).sum(0).mul_(result.inverse_std)
    pull, offset = _pull_and_offset(result, sum_g, sum_gn, c)
    dc = torch.addcmul(offset, centred, pull, out=centred).addcmul_(g, result.slope)
    return TailGradients(_unrows(dc, c).to(c.dtype), sum_g, sum_gn)


def _visible_backward(g: Tensor, c: Tensor, result: Normalization, dtype: torch.dtype) -> TailGradients:
    """Return :func:`backward`'s gradients from g for a compiler: no tensor is written twice, which makes two loops."""
    dims, centred = _all_but_channels(c), c - _column(result.mean, c)
    sum_g, sum_gn = g.sum(dims), (g * centred).sum(dims) * result.inverse_std
    pull, offset = _pull_and_offset(result, sum_g, sum_gn, c)
    dc = _column(offset, c) + centred * _column(pull, c) + g * _column(result.slope, c)
    return TailGradients(dc.to(dtype), sum_g, sum_gn)


def _pull_and_offset(result: Normalization, sum_g: Tensor, sum_gn: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``pull`` and ``offset``, (channels,), of the gradient of c, ``slope · g + pull · (c - mean) + offset``."""
    share = result.slope / operand(-float(c.numel() // c.shape[1]), result.slope)
    return share * result.inverse_std * sum_gn, share * sum_g


def moments(c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return mean and biased variance per channel (axis 1) of a dense ``c``, and a tensor like it as scratch memory."""
    count = operand(float(max(1, c.numel() // max(1, c.shape[1]))), c)
    if torch.compiler.is_compiling():
        dims = _all_but_channels(c)
        mean = c.sum(dims) / count
        centred = c - _column(mean, c)
        return mean, centred.square().sum(dims) / count, centred
    centred = torch.empty_like(c)
    if _channels_are_outer(c):
        flat, out = c.flatten(2), centred.flatten(2)
        mean = flat.sum(2).sum(0) / count
        torch.sub(flat, mean[:, None], out=out)
        return mean, torch.linalg.vector_norm(out, dim=2).square_().sum(0) / count, centred
    rows, out = _rows(c), _rows(centred)
    mean = rows.sum(0) / count
    torch.sub(rows, mean, out=out)
    return mean, torch.mul(out, out, out=out).sum(0) / count, centred


def affine(c: Tensor, slope: Tensor, shift: Tensor, out: Tensor | None = None) -> Tensor:
    """Return ``slope · c + shift`` per channel, rounded once if the processor has fused multiply-adds.

    ``slope``, ``shift``: (channels,). The result is ``out``, laid out as ``c``; new if that is None or torch compiles.
    """
    if torch.compiler.is_compiling():
        return torch.addcmul(_column(shift, c), c, _column(slope, c))
    if out is None:
        out = torch.empty_like(c)
    if not _channels_are_outer(c):
        torch.addcmul(shift, _rows(c), slope, out=_rows(out))
        return out
    # The fastest per-channel affine there is on CPUs, bit for bit addcmul.
    make = _standard_statistics if type(slope) is Tensor else _standard_statistics.__wrapped__
    mean, var, unused = make(len(slope), slope.dtype, slope.device)
    torch.ops.aten.native_batch_norm.out(
        c, slope, shift, mean, var, False, 0.0, 0.0, out=out, save_mean=unused, save_invstd=unused
    )
    return out


@cache
def _standard_statistics(channels: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Return mean 0 and variance 1, (channels,) each, and an empty tensor for results that are not computed."""
    with torch.inference_mode(False):
        mean, var = torch.zeros(channels, dtype=dtype, device=device), torch.ones(channels, dtype=dtype, device=device)
        return mean, var, torch.empty(0, dtype=dtype, device=device)


def _all_but_channels(c: Tensor) -> list[int]:
    return [0, *range(2, c.dim())]


def _column(vector: Tensor, c: Tensor) -> Tensor:
    """Return a vector per channel, shaped to broadcast against ``c``."""
    return vector.view(-1, *[1] * (c.dim() - 2))


def dense(c: Tensor) -> Tensor:
    """Return ``c``; a contiguous copy if it is neither contiguous nor channels last."""
    return c if is_dense(c) else c.contiguous()


def _channels_are_outer(c: Tensor) -> bool:
    """Whether each channel's elements lie together in memory, and are more than one."""
    return c.is_contiguous() and math.prod(c.shape[2:]) > 1


def _rows(c: Tensor) -> Tensor:
    """Return (batch · ..., channels): a view of ``c`` whose channels lie innermost in memory."""
    return c.movedim(1, -1).flatten(0, -2)


def _unrows(rows: Tensor, like: Tensor) -> Tensor:
    """Return ``rows`` (batch · ..., channels) in the shape of ``like``, (batch, channels, ...)."""
    return rows.view(like.shape[0], *like.shape[2:], like.shape[1]).movedim(-1, 1)


def _like(dy: Tensor, c: Tensor) -> Tensor:
    """Return ``dy`` with the strides of ``c``."""
    return dy if dy.stride() == c.stride() else torch.empty_like(c).copy_(dy)
