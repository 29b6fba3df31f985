"""Convolution, BatchNorm, ReLU and fake quantization as one operator: a training step in the approximate mode.

The *approximate mode* folds the weight with the running variance from before the step and divides the result by the
fold again, so that one convolution per step suffices (docs/conv-bn.md). The *fold* is γ/σ per out channel.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tritonq.arithmetic import as_dtype
from tritonq.functional.channel_moments import check_count
from tritonq.functional.differentiable_once import differentiable_once
from tritonq.functional.dispatch import implementation
from tritonq.functional.linear_map import DifferentiableMap, as_autocast
from tritonq.functional.recomputation import StepMemory, is_recomputing
from tritonq.functional.saved_input import SavedInput, load_input, mark_on_grid, save_input
from tritonq.grid import Grid, RangeStatistics
from tritonq.qparams import is_readable
from tritonq.reference.batch_norm_weight import StepWeight, fit_codes
from tritonq.reference.conv_bn import BatchNormState, Normalization
from tritonq.reference.scratch import borrow
from tritonq.reference.weight import WeightCodes


@dataclass(frozen=True)
class ConvBnStep:
    """The settings and states of one training step, besides the tensors that receive gradients.

    Attributes:
        op: the convolution or matrix product, without weight and bias.
        norm: the BatchNorm's running statistics, which are updated in place, momentum and eps.
        weight_grid: of the quantizer of the folded weight, per tensor or per out channel; None leaves the weight in
            float.
        weight_statistics: the running range of ``weight_grid``, which the folded weight updates; None observes nothing.
        output_grid: of the quantizer of the result, per tensor; None leaves the result in float.
        output_statistics: the running range of ``output_grid``, which the result behind the ReLU updates; None observes
            nothing.
        input_grid: the grid that the input lies on, or None if unknown. If codes of one byte on it give the input back
            exactly, they are what is kept for the backward.
        ceiling: upper bound of the ReLU before the quantizer, infinity for a plain one, 6 for ReLU6; None: no ReLU.
        memory: the fold of this step, kept for when gradient checkpointing runs the step again, and the
            :class:`ReadyWeight` for it, if there is one.
    """

    op: DifferentiableMap
    norm: BatchNormState
    weight_grid: Grid | None = None
    weight_statistics: RangeStatistics | None = None
    output_grid: Grid | None = None
    output_statistics: RangeStatistics | None = None
    input_grid: Grid | None = None
    ceiling: float | None = None
    memory: StepMemory = field(default_factory=StepMemory)


class ReadyWeight(NamedTuple):
    """A weight that was observed, folded and quantized before its layer's step, together with other weights.

    Attributes:
        fold: (out,), the BatchNorm's ``γ/σ``, or ``1/σ`` where ``|γ/σ| < 1e-12``.
        inverse_std: (out,), ``1/σ``.
        codes: codes of the folded weight, their unit (codes times unit are its rounded values), and a copy of the grid.
        version: :func:`version_of` the unfolded weight at that time; if the weight's is another by now, the step makes
            all of this anew.
    """

    fold: Tensor
    inverse_std: Tensor
    codes: WeightCodes
    version: tuple[int, int]


def version_of(weight: Tensor) -> tuple[int, int]:
    """Return a key ``(address, version)`` of a tensor, which differs once its values were changed in place or moved.

    Raises:
        RuntimeError: a tensor of inference mode, which has no version.
    """
    return weight.data_ptr(), weight._version


def conv_bn(
    x: Tensor, weight: Tensor, bias: Tensor | None, gamma: Tensor | None, beta: Tensor | None, step: ConvBnStep
) -> Tensor:
    """Return ``FQ(relu?(BN(op(x, FQ_w(W s)) / s + b)))``, with BN's statistics those of the batch; differentiable.

    ``s = γ/σ`` with ``σ = sqrt(running_var + eps)`` from before this step; ``1/σ`` where ``|γ/σ| < 1e-12``. Running
    statistics, and range and grid of both quantizers, are updated in place: the quantizers' before they round. Clips
    and ReLU block gradients. For the backward it saves x (or its codes), the convolution's output, the weight, and
    vectors per channel.

    Args:
        x: (batch, in, ...); under autocast cast to its dtype, unless float64.
        weight: W, not folded, as ``step.op`` takes it.
        bias: b, (out,) or None. Its gradient is zero: it moves the running mean only.
        gamma: γ, (out,) or None for 1.
        beta: β of BN, (out,) or None for 0.
        step: convolution or matrix product, BatchNorm's statistics, grids, running ranges and ReLU.

    Returns:
        (batch, out, ...), in the dtype of ``x`` after that cast.

    Raises:
        ValueError: fewer than two values per channel.

    Source: docs/conv-bn.md, "The tail of a step".
    """
    result: Tensor = _ConvBn.apply(as_autocast(x), weight, bias, gamma, beta, step)  # type: ignore[no-untyped-call]
    return result


def check_running_var(running_var: Tensor) -> None:
    """Raise ValueError if a running variance, (channels,), is negative or not finite.

    It passes unread if it is not on a CPU, and while ``torch.compile`` traces.
    """
    if not is_readable(running_var) or running_var.numel() == 0:
        return
    low, high = torch.aminmax(running_var)
    if not (float(low) >= 0 and float(high) < math.inf):
        raise ValueError("the BatchNorm's running variance must be finite and not negative")


class _ConvBn(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        gamma: Tensor | None,
        beta: Tensor | None,
        step: ConvBnStep,
    ) -> Tensor:
        ctx.weights, ctx.tail = implementation("batch_norm_weight", x), implementation("conv_bn", x)
        ready = _take_ready(step.memory, weight)
        made = _quantized(x, weight, gamma, step) if ready is None else _fitted(ready, x.dtype)
        del ready
        codes, unit, ratio, fold, inverse_std, clips, weight_grid = made
        del made
        if not torch.compiler.is_compiling():
            step.memory.fold = fold, inverse_std
        c = step.op(x, step.op.from_rows(codes))
        del codes
        check_count(c)
        y, normalization, output_grid = ctx.tail.forward(
            *(c, ratio, gamma, beta, bias, step.norm),
            *(step.output_grid, step.output_statistics, step.ceiling),
        )
        if output_grid is not None and step.output_grid is not None:
            mark_on_grid(y, step.output_grid.scale, output_grid)
        if any(ctx.needs_input_grad):
            kept = save_input(x, step.input_grid)
            ctx.step, ctx.clips, ctx.x_dtype = step, clips, x.dtype
            ctx.bias_dtype, ctx.beta_dtype = (t.dtype if t is not None else None for t in (bias, beta))
            ctx.save_for_backward(
                *(weight, gamma, c, fold, unit, inverse_std),
                *kept.tensors,
                *normalization,
                *_tensors(weight_grid),
                *_tensors(output_grid),
            )
        return y  # type: ignore[no-any-return]

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        weight, gamma, c, fold, unit, inverse_std = saved[:6]
        kept, normalization = SavedInput(saved[6], saved[7], saved[8], ctx.x_dtype), Normalization(*saved[9:15])
        step: ConvBnStep = ctx.step
        weight_grid = _with_tensors(step.weight_grid, saved[15:18])
        output_grid = _with_tensors(step.output_grid, saved[18:])
        needs_x, needs_weight, needs_bias, needs_gamma, needs_beta, _ = ctx.needs_input_grad

        dc, sum_g, sum_gn = ctx.tail.backward(
            dy, c, normalization, output_grid, step.ceiling, borrow("gradient", c, fold.dtype)
        )
        dx = dweight = dgamma = None
        if needs_x or needs_weight or needs_gamma:
            rows = step.op.to_rows(weight)
            codes = weight
            if needs_x:
                codes = step.op.from_rows(
                    ctx.weights.codes_again(rows, fold, weight_grid, c.dtype, borrow("weight", rows, fold.dtype))
                )
            needs_input = needs_weight or needs_gamma
            x = load_input(kept, borrow("input", kept.values, torch.float32)) if needs_input else kept.values
            dx, dcodes, _ = step.op.backward(dc, x, codes, needs_x, needs_input, False)
            if dcodes is not None:
                drows, of_gamma = ctx.weights.gradients(
                    *(step.op.to_rows(dcodes), rows, None if gamma is None else gamma.detach(), fold, inverse_std),
                    *(unit, normalization.eps_share, sum_gn, weight_grid, ctx.clips),
                )
                dweight = as_dtype(step.op.from_rows(drows), weight.dtype) if needs_weight else None
                dgamma = as_dtype(of_gamma, gamma.dtype) if needs_gamma and gamma is not None else None
        dbias = torch.zeros_like(sum_g, dtype=ctx.bias_dtype) if needs_bias else None
        dbeta = as_dtype(sum_g, ctx.beta_dtype) if needs_beta else None
        return dx, dweight, dbias, dgamma, dbeta, None


def _quantized(x: Tensor, weight: Tensor, gamma: Tensor | None, step: ConvBnStep) -> StepWeight:
    """Fold, observe and quantize ``weight``; return codes, unit and what the backward needs. Updates ``step``'s grid.

    ``gamma`` is the BatchNorm's γ (None: 1); of ``x``, the layer's input, only dtype and device count.

    A step that is run again (checkpointing) takes the fold that it had the first time.
    """
    rows, dtype = step.op.to_rows(weight), torch.promote_types(x.dtype, torch.float32)
    made: StepWeight = implementation("batch_norm_weight", x).quantize(
        *(rows, step.norm.running_var, None if gamma is None else gamma.detach(), step.norm.eps, x.dtype, dtype),
        *(step.weight_grid, step.weight_statistics),
        known=step.memory.fold if is_recomputing() else None,
        out=borrow("weight", rows, dtype),
    )
    return made


def _fitted(ready: ReadyWeight, dtype: torch.dtype) -> StepWeight:
    """Return a weight that was quantized before its layer's step, with codes in the dtype of the convolution."""
    codes, unit = fit_codes(ready.codes.codes, ready.codes.unit, dtype)
    fold, clips, grid = ready.fold, ready.codes.clips, ready.codes.grid
    return StepWeight(codes, unit, fold / unit, fold, ready.inverse_std, clips, grid)


def _take_ready(memory: StepMemory, weight: Tensor) -> ReadyWeight | None:
    """Take the weight that `quantize_weights_together` made for this step out of ``memory``, and return it.

    None if there is none, if ``weight`` changed since, in a recomputation, and while ``torch.compile`` traces.
    """
    if torch.compiler.is_compiling() or is_recomputing() or memory.ready is None:
        return None
    ready: ReadyWeight = memory.ready
    memory.ready = None
    return ready if ready.version == version_of(weight) else None


def _tensors(grid: Grid | None) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    return (None, None, None) if grid is None else (grid.scale, grid.zero_point, grid.enabled)


def _with_tensors(grid: Grid | None, saved: Sequence[Tensor]) -> Grid | None:
    return None if grid is None else grid.with_buffers(*saved)
