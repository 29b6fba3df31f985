"""Fake quantization whose scale is trained: LSQ, LSQ+, TQT and PACT."""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from torch import Tensor

from tritonq.backend import Backend
from tritonq.functional.differentiable_once import differentiable_once
from tritonq.functional.dispatch import implementation
from tritonq.functional.groups import as_rows, group_rows, in_groups
from tritonq.functional.validate import (
    check_axis,
    check_float_tensor,
    check_scale,
    check_zero_point,
)
from tritonq.grid import Grid
from tritonq.qparams import is_readable
from tritonq.quantized_type import QuantizedType, check_code_range
from tritonq.reference.learned_scale import LearnedScale

StepGradient = Literal["torch", "megengine"]
# MegEngine's floor under a learned step.
MEGENGINE_FLOOR = 1e-5
# First scales that are tried, as shares of the one whose grid just reaches the largest magnitude.
_SHARES = tuple(0.1 + 0.025 * step for step in range(57))


def fake_quantize_learnable(
    x: Tensor,
    scale: Tensor,
    zero_point: int | Tensor,
    quant_min: int,
    quant_max: int,
    axis: int | None = None,
    grad_factor: float = 1.0,
    *,
    group_size: int | None = None,
    method: StepGradient = "torch",
    backend: Backend = "auto",
) -> Tensor:
    """Fake quantize with a scale, and perhaps a zero point, that receive gradients (LSQ, LSQ+).

    ``"torch"``: ``y = (clip(round(x/s) + z) - z) s``, ties to even; ``dx = dy`` where the unclipped code is in range,
    else 0; ``ds = f Σ dy {quant_min - z below | quant_max - z above | (y - x)/s inside}`` (below, above and inside of
    the range of codes); ``dz = f Σ dy {-s outside | 0}``. Forward and backward use the same z, rounded and clamped
    (torch's own per-tensor backward does not).

    ``"megengine"``: ``s = |scale| + 1e-5``, ``v = x/s + z``, ``y = (round(clip(v)) - z) s``, ties away from zero;
    ``dx = dy`` where v is in range, else 0; ``ds = f Σ dy {quant_min below | quant_max above | round(v) - v inside}``,
    and the gradient of ``scale`` is ``ds`` times the sign of ``scale``; ``dz = 0``.

    Args:
        x: any shape; float32, float16, bfloat16 or float64.
        scale: float tensor, one element or (x.shape[axis],).
        zero_point: an int, or a tensor shaped as ``scale``. A floating point one is rounded, clamped to the codes and
            receives the gradient ``dz``.
        quant_min: smallest code.
        quant_max: largest code.
        axis: channel axis, or None for one scale.
        grad_factor: ``f``; LSQ proposes ``1/sqrt(values per scale * quant_max)``.
        group_size: one scale per so many neighbouring elements along ``axis``, at each index of the other axes; scales
            are then shaped as ``x``, with one index per group along ``axis``. None: no groups.
        method: ``"torch"`` or ``"megengine"``: which of the formulas above.
        backend: ``"triton"``, ``"torch"``, or ``"auto"``: kernels for CUDA tensors, else PyTorch.

    Returns:
        Tensor of ``x``'s shape and dtype.

    Raises:
        TypeError: ``x`` or ``scale`` is not a floating point tensor; the zero point is neither an int (a bool is none)
            nor a tensor of integers or floats; or ``quant_min``, ``quant_max``, ``axis`` or
            ``group_size`` is no int.
        ValueError: ``quant_min`` not below ``quant_max``, an axis out of range, a scale or zero point of wrong shape or
            device, an unknown method or backend, a scale or floating point zero point that is not finite, an integer
            zero point outside the code range, for ``"torch"`` a scale that is not positive, or groups without an axis
            or whose size is not positive or does not divide the axis's length. Values of tensors are checked on a CPU
            only, and not while ``torch.compile`` traces.
        RuntimeError: ``backend="triton"`` where no kernel can run.

    Source: docs/numbers.md, "Learned scales"; Esser et al., "Learned Step Size Quantization" (2020); Bhalgat et al.,
        "LSQ+" (2020).

    Examples:
        >>> scale = torch.tensor([0.5], requires_grad=True)
        >>> fake_quantize_learnable(torch.tensor([0.6, 9.0]), scale, 0, -8, 7).sum().backward()
        >>> scale.grad
        tensor([6.8000])
    """
    check_float_tensor("x", x)
    if group_size is not None:

        def per_row(rows: Tensor, row_scale: Tensor, row_zero: int | Tensor) -> Tensor:
            codes = (quant_min, quant_max)
            return fake_quantize_learnable(
                rows, row_scale, row_zero, *codes, 0, grad_factor, method=method, backend=backend
            )

        return in_groups(per_row, x, scale, zero_point, axis, group_size)
    check_code_range(quant_min, quant_max)
    if method not in get_args(StepGradient):
        raise ValueError(f"unknown method {method!r}; known: {', '.join(get_args(StepGradient))}")
    axis, channels = _axis_and_channels(x, axis)
    qtype = QuantizedType(quant_min, quant_max, False, axis, "half_away" if method == "megengine" else "half_even")
    _check_parameter("scale", scale, x, channels, positive=method == "torch")
    if method == "megengine":
        scale = scale.abs() + MEGENGINE_FLOOR
    shift: Tensor | None = None
    codes: Tensor | None
    if isinstance(zero_point, Tensor) and zero_point.is_floating_point():
        _check_parameter("zero_point", zero_point, x, channels, positive=False)
        shift, codes = zero_point, zero_point.detach().round().clamp(quant_min, quant_max).to(torch.int32)
    else:
        codes = check_zero_point(zero_point, x, channels, quant_min, quant_max)
    return learned_fake_quantize(x, Grid(scale, codes, qtype), method, grad_factor, shift=shift, backend=backend)


def trained_threshold_quantize(
    x: Tensor,
    log2_threshold: Tensor,
    quant_min: int,
    quant_max: int,
    *,
    axis: int | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Fake quantize with scale ``2^t``, where ``t`` receives a gradient (TQT); ties away from zero.

    ``code = clip(round(x/s))`` and ``y = code · s``. A value is inside if ``x/s`` is in
    ``[quant_min - 0.5, quant_max + 0.5]``; ``dx = dy`` inside, else 0;
    ``dt = Σ dy s ln2 {code - x/s inside | code outside}``.

    Args:
        x: any shape; float32, float16, bfloat16 or float64.
        log2_threshold: ``t``, float tensor, one element or (x.shape[axis],).
        quant_min: smallest code.
        quant_max: largest code.
        axis: channel axis, or None for one ``t``.
        backend: ``"triton"``, ``"torch"``, or ``"auto"``: kernels for CUDA tensors, else PyTorch.

    Returns:
        Tensor of ``x``'s shape and dtype.

    Raises:
        TypeError: ``x`` or ``log2_threshold`` is not a floating point tensor; or ``quant_min``, ``quant_max`` or
            ``axis`` is no int.
        ValueError: ``quant_min`` not below ``quant_max``, an axis out of range, an unknown backend, a threshold of
            another shape or device, or one that is not finite or whose ``2^t`` is 0 or infinite in float32. Values are
            checked on a CPU only and not while ``torch.compile`` traces.
        RuntimeError: ``backend="triton"`` where no kernel can run.

    Source: docs/numbers.md, "Learned scales"; Jain et al., "Trained Quantization Thresholds" (2020); MegEngine's TQT.

    Examples:
        >>> trained_threshold_quantize(torch.tensor([0.6, -9.0]), torch.tensor(-1.0), -8, 7)
        tensor([ 0.5000, -4.0000])
    """
    check_float_tensor("x", x)
    check_code_range(quant_min, quant_max)
    axis, channels = _axis_and_channels(x, axis)
    qtype = QuantizedType(quant_min, quant_max, False, axis, "half_away")
    _check_parameter("log2_threshold", log2_threshold, x, channels, positive=False)
    scale = torch.exp2(log2_threshold)
    _check_parameter("2 ** log2_threshold", scale, x, channels, positive=True)
    return learned_fake_quantize(x, Grid(scale, None, qtype), "tqt", backend=backend)


def clipped_quantize(
    x: Tensor, alpha: Tensor, quant_max: int = 255, *, axis: int | None = None, backend: Backend = "auto"
) -> Tensor:
    """Clip to ``[0, alpha]`` and fake quantize to the codes ``0..quant_max``; ``alpha`` receives a gradient (PACT).

    ``y = round(clip(x, 0, α)/s) s`` with ``s = α/quant_max``, ties to even; ``dx = dy`` where ``0 <= x < α``, else 0;
    ``dα = Σ dy {1 where x >= α}``.

    Args:
        x: any shape; float32, float16, bfloat16 or float64.
        alpha: float tensor, one element or (x.shape[axis],), positive.
        quant_max: largest code.
        axis: channel axis, or None for one ``alpha``.
        backend: ``"triton"``, ``"torch"``, or ``"auto"``: kernels for CUDA tensors, else PyTorch.

    Returns:
        Tensor of ``x``'s shape and dtype.

    Raises:
        TypeError: ``x`` or ``alpha`` is not a floating point tensor; or ``quant_max`` or ``axis`` is no int.
        ValueError: ``quant_max`` below 1, an axis out of range, an unknown backend, or an ``alpha`` of another shape or
            device, or not positive and finite, which is checked on a CPU only and not while ``torch.compile`` traces.
        RuntimeError: ``backend="triton"`` where no kernel can run.

    Source: docs/numbers.md, "Learned scales"; Choi et al., "PACT: Parameterized Clipping Activation" (2018).

    Examples:
        >>> clipped_quantize(torch.tensor([-1.0, 0.4, 5.0]), torch.tensor(3.0), 3)
        tensor([0., 0., 3.])
    """
    check_float_tensor("x", x)
    check_code_range(0, quant_max)
    axis, channels = _axis_and_channels(x, axis)
    _check_parameter("alpha", alpha, x, channels, positive=True)
    grid = Grid(alpha, None, QuantizedType(0, quant_max, False, axis))
    return learned_fake_quantize(x, grid, "pact", backend=backend)


def learned_fake_quantize(
    x: Tensor,
    grid: Grid,
    method: LearnedScale,
    grad_factor: float = 1.0,
    *,
    shift: Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Round ``x`` to a grid whose scale receives a gradient, without checks: for the public functions and the modules.

    The result is ``(code - z) · s`` with the code ``clip(round(x/s) + z)`` for ``"torch"``, ``round(clip(x/s + z))``
    for ``"megengine"``, ``clip(round(x/s))`` for ``"tqt"`` and ``"pact"``. Gradients of the grid's scale s, or of the
    level α of ``"pact"``, with ``grad_factor`` f:

    - ``"torch"``: ``ds = f Σ dy {quant_min - z below | quant_max - z above | code - z - x/s inside}``, and of ``shift``
      ``f Σ dy {-s outside}``.
    - ``"megengine"``, with ``v = x/s + z``: ``ds = f Σ dy {quant_min below | quant_max above | round(v) - v inside}``;
      0 of ``shift``.
    - ``"tqt"``: ``ds = f Σ dy {code - x/s inside | code outside}``.
    - ``"pact"``: ``dα = f Σ dy {1 where x >= α}``.

    Inside is where the clip changes nothing (``"tqt"``: up to half a code beyond the ends; ``"pact"``: ``0 <= x < α``);
    ``dx = dy`` there, else 0. While the grid is switched off, ``x`` and its gradient pass unchanged, and the other
    gradients are 0.

    Args:
        x: any shape; float32, float16, bfloat16 or float64.
        grid: its scale is the tensor that receives the gradient:

            - ``"torch"``: the scale.
            - ``"megengine"``: the scale, to which the caller has added MegEngine's floor, ``abs(s) + 1e-5``.
            - ``"tqt"``: the scale, which the caller has computed as ``2^t`` from the trained t.
            - ``"pact"``: the clipping level; the scale is this level divided by the largest code.

            The grid's type rounds ties away from zero for ``"megengine"`` and ``"tqt"``, and either way for the others.
            ``"tqt"`` and ``"pact"`` have no zero point; the codes of ``"pact"`` begin at 0.
        method: ``"torch"``, ``"megengine"``, ``"tqt"`` or ``"pact"``.
        grad_factor: multiplies the gradients of ``grid.scale`` and ``shift``, not that of ``x``.
        shift: the trained zero point, a float tensor of as many elements as the scale; ``grid.zero_point`` is it,
            rounded and clamped to the codes by the caller. None: the zero point is not trained.
        backend: ``"triton"``, ``"torch"``, or ``"auto"``: kernels for CUDA tensors, else PyTorch.

    Returns:
        Tensor of ``x``'s shape and dtype.
    """
    rows = group_rows(x, grid.granularity)
    if rows is not None:
        y = learned_fake_quantize(*as_rows(x, grid), method, grad_factor, shift=shift, backend=backend)
        return rows.join(y)
    parameter = grid.scale.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    constant = Grid(parameter.detach(), grid.zero_point, grid.qtype, grid.enabled)
    result: Tensor = _LearnedFakeQuantize.apply(  # type: ignore[no-untyped-call]
        x, parameter, shift, constant, method, grad_factor, backend
    )
    return result


class _LearnedFakeQuantize(torch.autograd.Function):
    """:func:`learned_fake_quantize` with its gradients, as an autograd function.

    ``parameter`` is the grid's scale once more: the tensor that gets the gradient. For the backward ``x`` and a copy of
    the grid are saved; codes and masks are computed again.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        parameter: Tensor,
        shift: Tensor | None,
        grid: Grid,
        method: LearnedScale,
        grad_factor: float,
        backend: Backend,
    ) -> Tensor:
        # A switch may be thrown, and an optimizer may step, between forward and backward.
        kept = grid.copy()
        ctx.save_for_backward(x, kept.scale, kept.zero_point, kept.enabled)
        ctx.qtype, ctx.method, ctx.grad_factor = grid.qtype, method, grad_factor
        ctx.shift_like = None if shift is None else (shift.shape, shift.dtype)
        ctx.ops = implementation("learned_scale", x, backend)
        y: Tensor = ctx.ops.learned_fake_quantize(x, kept, method)
        return y

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, zero_point, enabled = ctx.saved_tensors
        grid = Grid(scale, zero_point, ctx.qtype, enabled)
        dx, dparameter, dshift = ctx.ops.learned_fake_quantize_backward(dy, x, grid, ctx.method)
        dparameter = dparameter.to(scale.dtype).mul_(ctx.grad_factor)
        if ctx.shift_like is None:
            return dx, dparameter, None, None, None, None, None
        shape, dtype = ctx.shift_like
        return dx, dparameter, dshift.view(shape).to(dtype).mul_(ctx.grad_factor), None, None, None, None


def _axis_and_channels(x: Tensor, axis: int | None) -> tuple[int | None, int | None]:
    if axis is None:
        return None, None
    axis = check_axis(x, axis)
    return axis, x.shape[axis]


def _check_parameter(name: str, value: Tensor, x: Tensor, channels: int | None, positive: bool) -> None:
    """Check a trained parameter's shape, device and, if they can be read without waiting, that its values are finite.

    With ``positive`` values must be positive, too. ``channels`` is the expected length; None: one element.

    Raises:
        TypeError: not a floating point tensor.
        ValueError: wrong shape, device or values; ``name`` is in the message.
    """
    check_float_tensor(name, value)
    detached = value.detach()
    if positive:
        check_scale(detached, x, channels, name)
        return
    # Of a parameter that may have any sign, shape and device count, and that it is finite.
    check_scale(torch.ones_like(detached), x, channels, name)
    if is_readable(detached) and not bool(torch.isfinite(detached).all()):
        raise ValueError(f"{name} must be finite, got {detached.flatten()[:8].tolist()}")


def least_error_scale(rows: Tensor, lowest: Tensor, highest: Tensor) -> Tensor:
    """Return for each row the scale s of the least squared error ``Σ (s · clip(round(x / s), lowest, highest) - x)²``.

    57 scales are tried: 0.1 to 1.5 times ``max|x|`` over the larger of ``-lowest`` and ``highest``, in equal steps.

    Args:
        rows: (rows, values), finite float values; those of a row share a scale.
        lowest: (rows, 1), the smallest code minus the zero point.
        highest: (rows, 1), the largest code minus the zero point.

    Returns:
        (rows,), in the dtype of ``rows``; 0 for a row of zeros.

    Examples:
        >>> rows = torch.tensor([[-1.0, 1.0, 2.0, -2.0]])
        >>> round(float(least_error_scale(rows, torch.tensor([[-2]]), torch.tensor([[2]]))), 4)
        1.0
    """
    reach = torch.maximum(-lowest, highest).clamp(min=1)
    full = rows.abs().amax(1, keepdim=True) / reach
    best, least = full[:, 0].clone(), torch.full_like(full[:, 0], torch.inf)
    for share in _SHARES:
        scale = share * full
        steps = torch.where(scale == 0, 0, rows / scale).round_()
        error = (torch.minimum(torch.maximum(steps, lowest), highest) * scale).sub_(rows).square_().sum(1)
        better = error < least
        best, least = torch.where(better, scale[:, 0], best), torch.where(better, error, least)
    return best
