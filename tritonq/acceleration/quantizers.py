"""Fake quantizers of torch.ao and torchao as grids and ranges, which tritonq's operators take.

The modules keep their buffers and parameters. :func:`remember_formula` reads once what does not change in training, and
stores it on the module as a :class:`QuantizerFormula`. A quantizer with a formula is *known*; the others run as the
library wrote them.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn

from tritonq.functional.dispatch import implementation
from tritonq.functional.fake_quant import fake_quantize
from tritonq.functional.learned_scale import learned_fake_quantize
from tritonq.functional.marks import mark_source
from tritonq.functional.recomputation import is_recomputing
from tritonq.functional.residual import rounded_result
from tritonq.functional.saved_input import mark_on_grid
from tritonq.grid import Grid, RangeStatistics
from tritonq.nn.fusable import has_hooks
from tritonq.qparams import RangeRule, fixed_zero_point
from tritonq.quantized_type import QuantizedType
from tritonq.reference.activation import rectify

_LIBRARIES = ("torch.ao.quantization.", "torchao.quantization.pt2e.")
_SYMMETRIC = (torch.per_tensor_symmetric, torch.per_channel_symmetric)
_PER_CHANNEL = (torch.per_channel_symmetric, torch.per_channel_affine)
_PER_TENSOR = (torch.per_tensor_symmetric, torch.per_tensor_affine)
# Observers whose state is a running range, and whether they average.
_RANGES = {
    "MinMaxObserver": False,
    "PerChannelMinMaxObserver": False,
    "MovingAverageMinMaxObserver": True,
    "MovingAveragePerChannelMinMaxObserver": True,
}
_ATTRIBUTE = "_tritonq_formula"


@dataclass(frozen=True)
class QuantizerFormula:
    """The part of a fake quantizer's computation that does not change in training.

    Scale, zero point and range stay in its buffers.

    Attributes:
        kind: ``"range"`` follows a running range, ``"learned"`` trains its scale, ``"observed"`` lets the library's own
            observer find scale and zero point, ``"fixed"`` keeps them.
        qtype: codes and axis.
        rule: name of the rule by which a range becomes scale and zero point: ``"torch"``, that of torch's observers, or
            ``"torch_v1"``, that of torch's fused operator; see :func:`tritonq.qparams.range_to_qparams`.
        eps: smallest scale; 0.0: no bound.
        averaging_constant: weight of a new batch in the range; None for running extremes, and for the other kinds.
    """

    kind: Literal["range", "learned", "observed", "fixed"]
    qtype: QuantizedType
    rule: RangeRule = "torch"
    eps: float = 0.0
    averaging_constant: float | None = None


class State(NamedTuple):
    """The part of a quantizer that an operator takes; scale, zero point and range share its buffers' memory.

    Attributes:
        grid: scale, zero point, type and switch.
        statistics: the range that the operator updates; None for a quantizer that follows no range.
    """

    grid: Grid
    statistics: RangeStatistics | None


def is_fake_quantizer(module: nn.Module) -> bool:
    """Whether ``module`` is a fake quantizer of torch.ao or torchao, or of a class that a user derived from one."""
    names = {base.__name__ for base in type(module).__mro__ if base.__module__.startswith(_LIBRARIES)}
    return "FakeQuantizeBase" in names


def remember_formula(quantizer: nn.Module) -> str | None:
    """Store on ``quantizer`` what it computes, as a :class:`QuantizerFormula`, which operators read.

    Returns:
        None if it was stored. Otherwise the reason in words, such as ``"dynamic quantization"``; nothing is stored
        then.
    """
    formula = _formula(quantizer)
    if isinstance(formula, str):
        return formula
    object.__setattr__(quantizer, _ATTRIBUTE, formula)
    return None


def forget_formula(quantizer: nn.Module) -> None:
    """Remove what :func:`remember_formula` stored on ``quantizer``, if anything."""
    quantizer.__dict__.pop(_ATTRIBUTE, None)


def has_formula(quantizer: nn.Module | None) -> bool:
    """Whether :func:`remember_formula` stored a formula on ``quantizer``; False for None."""
    return quantizer is not None and _ATTRIBUTE in quantizer.__dict__


def formula_of(quantizer: nn.Module) -> QuantizerFormula:
    """Return the formula that :func:`remember_formula` stored on ``quantizer``.

    Raises:
        KeyError: it stored none.
    """
    return cast(QuantizerFormula, quantizer.__dict__[_ATTRIBUTE])


def unknown_reason(quantizer: nn.Module) -> str | None:
    """Return the first reason why tritonq can't compute ``quantizer``, such as ``"dynamic quantization"``; else None.

    Reasons are: a class of the user's own or an unknown one; dynamic quantization; zero points that are no integers, or
    an unknown qscheme; hooks on the quantizer or its observer; a fused quantizer over another observer than torch's
    min-max ones; a symmetric range whose observer takes another zero point than tritonq does for these codes. Nothing
    is stored.
    """
    formula = _formula(quantizer)
    return formula if isinstance(formula, str) else None


def _formula(quantizer: nn.Module) -> QuantizerFormula | str:
    kind = type(quantizer)
    if not kind.__module__.startswith(_LIBRARIES):
        return f"a class of its own, {kind.__module__}.{kind.__name__}"
    held: Any = quantizer
    observer = held.activation_post_process
    observer_name = type(observer).__name__ if type(observer).__module__.startswith(_LIBRARIES) else ""
    if getattr(held, "is_dynamic", False):
        return "dynamic quantization"
    if held.qscheme == torch.per_channel_affine_float_qparams:
        return "zero points that are no integers (per_channel_affine_float_qparams)"
    if held.qscheme not in _PER_CHANNEL + _PER_TENSOR:
        return f"qscheme {held.qscheme}"
    if has_hooks(quantizer) or has_hooks(observer):
        return "hooks on the quantizer, which an operator would skip"
    low, high = int(held.quant_min), int(held.quant_max)
    if kind.__name__ != "_LearnableFakeQuantize" and hasattr(observer, "quant_min"):
        low, high = int(observer.quant_min), int(observer.quant_max)
    qtype = _qtype(low, high, held.qscheme in _SYMMETRIC, held.ch_axis if held.qscheme in _PER_CHANNEL else None)
    if kind.__name__ == "_LearnableFakeQuantize":
        return QuantizerFormula("learned", qtype, eps=float(held.eps))
    if kind.__name__ == "FixedQParamsFakeQuantize":
        return QuantizerFormula("fixed", qtype)
    if kind.__name__ not in ("FakeQuantize", "FusedMovingAvgObsFakeQuantize"):
        return f"an unknown kind of fake quantizer, {kind.__name__}"
    is_fused = kind.__name__ == "FusedMovingAvgObsFakeQuantize"
    if observer_name not in _RANGES:
        return "a fused quantizer over another observer" if is_fused else QuantizerFormula("observed", qtype)
    if not is_fused and qtype.symmetric and _torch_zero_point(observer) != fixed_zero_point(qtype, "torch"):
        return f"a symmetric range with zero point {_torch_zero_point(observer)} on codes {low} to {high}"
    averaging = float(observer.averaging_constant) if _RANGES[observer_name] else None
    rule: tuple[RangeRule, float] = ("torch_v1", 0.0) if is_fused else ("torch", float(observer.eps))
    return QuantizerFormula("range", qtype, *rule, averaging)


@lru_cache(maxsize=256)
def _qtype(low: int, high: int, symmetric: bool, axis: int | None) -> QuantizedType:
    return QuantizedType(low, high, symmetric, axis)


def _torch_zero_point(observer: Any) -> int:
    """Return the zero point that the library's observer gives a symmetric range.

    It is 0 for signed codes, else the middle of the codes, such as 128.
    """
    if observer.dtype not in (torch.quint8, torch.uint8):
        return 2**15 if observer.dtype == torch.uint16 else 0
    return (observer.quant_min + observer.quant_max) // 2 if observer.has_customized_qrange else 128


def can_compute(quantizer: nn.Module, x: Tensor) -> bool:
    """Whether tritonq can round ``x`` in place of ``quantizer`` now.

    It has a formula, neither it nor its observer has hooks, which may be put there after the formula was stored, and
    its buffers have the dtypes that operators take: scale float32, zero point int32 (float32 for a trained scale).
    Casting a whole model (``model.half()``) changes them. An empty ``x`` is left to the library, except with a trained
    scale.
    """
    held: Any = quantizer
    if not has_formula(quantizer) or has_hooks(quantizer) or has_hooks(held.activation_post_process):
        return False
    if formula_of(quantizer).kind == "learned":
        return bool(held.scale.dtype == held.zero_point.dtype == torch.float32)
    return bool(held.scale.dtype == torch.float32 and held.zero_point.dtype == torch.int32 and x.numel() > 0)


def state(quantizer: nn.Module, x: Tensor) -> State | None:
    """Return grid and range of ``quantizer``, for an operator that observes and rounds ``x``; neither is done here.

    Before the first batch, buffers per channel get the length of ``x`` on their axis, in place, as in the library.

    Returns:
        None if :func:`can_compute` is false, or the kind of the formula is "learned" (a trained scale) or "observed"
        (the library's own observer finds the scale): then the caller rounds the operator's result by :func:`quantize`.
    """
    if not can_compute(quantizer, x) or formula_of(quantizer).kind not in ("range", "fixed"):
        return None
    return _state(quantizer, formula_of(quantizer), x)


def _state(quantizer: Any, formula: QuantizerFormula, x: Tensor) -> State:
    """Return :func:`state` of a quantizer of kind "range" or "fixed" that :func:`can_compute` accepts."""
    if formula.kind == "range":
        _allocate(quantizer, formula.qtype.axis, x)
    # With a fixed zero point of 0 there is none to add; torch's fused operator gives one-sided ranges one.
    is_zero = formula.rule != "torch_v1" and formula.kind == "range" and fixed_zero_point(formula.qtype, "torch") == 0
    zero_point = None if is_zero and formula.qtype.symmetric else quantizer.zero_point.view(-1)
    grid = Grid(quantizer.scale, zero_point, formula.qtype, quantizer.fake_quant_enabled.to(torch.uint8))
    return State(grid, _statistics(quantizer, formula) if formula.kind == "range" else None)


def _statistics(quantizer: Any, formula: QuantizerFormula) -> RangeStatistics:
    observer = quantizer.activation_post_process
    shape = () if formula.qtype.axis is None else (-1,)
    return RangeStatistics(
        observer.min_val.view(shape),
        observer.max_val.view(shape),
        torch.zeros((), dtype=torch.int64, device=observer.min_val.device),
        formula.qtype.granularity,
        quantizer.observer_enabled.to(torch.uint8),
        frozen=is_recomputing(),
        averaging_constant=formula.averaging_constant,
        rule=formula.rule,
        eps=formula.eps,
        # The libraries round with whatever scale there is, observed or not.
        has_data=True,
    )


def _allocate(quantizer: Any, axis: int | None, x: Tensor) -> None:
    """Give buffers per channel the length of ``x`` on ``axis``, as the library does with the first batch.

    Nothing is done if ``axis`` is None.
    """
    if axis is None:
        return
    channels, observer = x.shape[axis], quantizer.activation_post_process
    if observer.min_val.numel() == 0:
        observer.min_val.resize_(channels).fill_(torch.inf)
        observer.max_val.resize_(channels).fill_(-torch.inf)
    if quantizer.scale.numel() != channels:
        quantizer.scale.resize_(channels).fill_(1)
        quantizer.zero_point.resize_(channels).zero_()


def quantize(quantizer: nn.Module, x: Tensor) -> Tensor:
    """Observe and round ``x`` as ``quantizer`` does, by its switches; the result has the shape and dtype of ``x``.

    If :func:`can_compute` is false, the quantizer's own forward runs. Else the backward keeps ``x`` and the grid, and
    no mask, and nothing is observed while activation checkpointing runs a forward again.
    """
    if not can_compute(quantizer, x):
        return cast(Tensor, quantizer(x))
    formula = formula_of(quantizer)
    if formula.kind == "learned":
        return _quantize_learned(quantizer, formula, x)
    if formula.kind == "observed":
        return _quantize_observed(quantizer, formula, x)
    grid, statistics = _state(quantizer, formula, x)
    if statistics is not None:
        implementation("min_max", x).observe(x.detach(), statistics, grid)
    return marked(fake_quantize(x, grid), grid)


def quantize_rectified(quantizer: nn.Module, y: Tensor, ceiling: float | None) -> Tensor:
    """Observe and round ``relu?(y)``, as ``quantizer`` does with it; the result has the shape and dtype of ``y``.

    If ``y`` requires a gradient and :func:`state` gives a grid with one scale, the backward keeps one bit per element
    instead of a tensor.

    Args:
        quantizer: any fake quantizer of torch.ao or torchao.
        y: any shape; not changed.
        ceiling: of the ReLU: infinity for a plain one, 6.0 for ReLU6, None for none.
    """
    known = state(quantizer, y)
    if known is None or known.grid.qtype.axis is not None or not (torch.is_grad_enabled() and y.requires_grad):
        return quantize(quantizer, rectify(y, ceiling))
    return marked(rounded_result(y, known.grid, known.statistics, ceiling), known.grid)


def marked(y: Tensor, grid: Grid) -> Tensor:
    """Return ``y`` marked as lying on ``grid``, so that a layer that reads it can save 8-bit codes for its backward.

    The mark is an attribute on the same tensor object. ``y`` is returned without one on a grid with several scales,
    while ``torch.compile`` traces, and in inference mode. With one scale, a float64 ``y`` gives a float64 copy without
    a mark, traced or not; its values are rounded to float32, as by torch's operator, unless the grid is switched off.
    """
    if y.dtype == torch.float64 and grid.qtype.axis is None:
        return cast(Tensor, _Float32Values.apply(y, grid.enabled_on_device()))  # type: ignore[no-untyped-call]
    if grid.qtype.axis is None and not torch.compiler.is_compiling():
        mark_on_grid(y, grid.scale, grid)
        mark_source(y, grid)
    return y


class _Float32Values(torch.autograd.Function):
    """Round float64 values to float32 and return float64, as torch's operator per tensor does.

    The gradient passes unchanged.
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor, enabled: Tensor) -> Tensor:
        return torch.where(enabled, y.float().double(), y)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        return dy, None


def _quantize_observed(quantizer: Any, formula: QuantizerFormula, x: Tensor) -> Tensor:
    """Round ``x`` by the quantizer's scale and zero point, as the library's FakeQuantize does.

    While ``observer_enabled`` is 1, its own observer sees ``x`` first, and what it finds is written to both.
    """
    if bool(quantizer.observer_enabled) and not is_recomputing():
        quantizer.activation_post_process(x.detach())
        scale, zero_point = quantizer.calculate_qparams()
        for buffer, value in ((quantizer.scale, scale), (quantizer.zero_point, zero_point)):
            if buffer.shape != value.shape:
                buffer.resize_(value.shape)
            buffer.copy_(value)
    enabled = quantizer.fake_quant_enabled.to(torch.uint8)
    grid = Grid(quantizer.scale, quantizer.zero_point.view(-1), formula.qtype, enabled)
    return marked(fake_quantize(x, grid), grid)


def _quantize_learned(quantizer: Any, formula: QuantizerFormula, x: Tensor) -> Tensor:
    """Return ``x`` as torch.ao's ``_LearnableFakeQuantize`` rounds it: LSQ by torch's method.

    While ``static_enabled`` is 1, its observer sees ``x`` and gives scale and zero point; afterwards they are trained
    parameters, the scale at least ``eps``. The zero point of a symmetric type is set to 0. Gradients of both are
    multiplied by ``1/sqrt(values · quant_max)`` if ``use_grad_scaling``.
    """
    scale, zero_point = quantizer.scale, quantizer.zero_point
    with torch.no_grad():
        if bool(quantizer.static_enabled):
            if not is_recomputing():
                quantizer.activation_post_process(x.detach())
            found, zero = quantizer.activation_post_process.calculate_qparams()
            scale.data.copy_(found)
            zero_point.data.copy_(zero)
        else:
            scale.data.clamp_(min=formula.eps)
        if formula.qtype.symmetric and bool(quantizer.fake_quant_enabled):
            zero_point.data.zero_()
    low, high = formula.qtype.quant_min, formula.qtype.quant_max
    factor = (x.numel() * high) ** -0.5 if quantizer.use_grad_scaling else 1.0
    codes = zero_point.detach().round().clamp(low, high).to(torch.int32).view(-1)
    grid = Grid(scale, codes, formula.qtype, quantizer.fake_quant_enabled)
    return learned_fake_quantize(x, grid, "torch", factor, shift=zero_point)
