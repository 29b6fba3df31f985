"""torch.ao's eager mode: modules are marked as tritonq's, and observer hooks move into the operator before them."""

from __future__ import annotations

import sys
from collections.abc import Collection
from typing import Any, cast

import torch
from torch import nn

from tritonq.acceleration.library_layers import HOOK, MARK
from tritonq.acceleration.quantizers import (
    attach,
    detach,
    is_attached,
    is_fake_quantizer,
    unknown_reason,
)
from tritonq.acceleration.report import AccelerationReport, Row

_OBSERVER_HOOK = ("torch.ao.quantization.quantize", "_observer_forward_hook")


def finds(model: nn.Module) -> bool:
    """Whether torch.ao's eager mode prepared a part of ``model``."""
    return "torch.ao.quantization" in sys.modules and any(
        type(module).__module__.startswith(("torch.ao.quantization.", "torch.ao.nn.qat.", "torch.ao.nn.intrinsic.qat."))
        and (is_fake_quantizer(module) or hasattr(module, "weight_fake_quant"))
        for module in model.modules()
    )


def package(model: nn.Module) -> str:
    """Return the package whose version decides what ``model`` computes."""
    return "torch"


def accelerate(model: nn.Module) -> AccelerationReport:
    """Mark torch.ao's modules in ``model``."""
    from tritonq.acceleration.torch_ao import CLASSES, mark

    report = AccelerationReport(f"torch.ao (torch {torch.__version__})")
    modules = dict(model.named_modules())
    for name, module in modules.items():
        if is_fake_quantizer(module):
            reason = None if type(module) in CLASSES else f"a class of its own, {type(module).__name__}"
            reason = reason or attach(module)
            report.rows.append(_row(name, module, "observing and rounding", reason))
            if reason is None:
                mark(module)
    for name, module in modules.items():
        if is_fake_quantizer(module) or not _is_quantized(module):
            continue
        reason = _why_not(module, CLASSES)
        outcome = "operator"
        if reason is None:
            mark(module)
            outcome += " with its quantizers" if _take_hook(module) else " with its quantizer"
        report.rows.append(_row(name, module, outcome, reason))
    return report


def restore(model: nn.Module) -> None:
    """Take the mark from every module, and give it its observer hook back."""
    if not is_accelerated(model):
        return
    from tritonq.acceleration.torch_ao import unmark

    for module in model.modules():
        if MARK not in module.__dict__:
            continue
        if HOOK in module.__dict__:
            key, hook = module.__dict__.pop(HOOK)
            module._forward_hooks[key] = hook
            cast(Any, module._forward_hooks).move_to_end(key, last=False)
        detach(module)
        unmark(module)


def is_accelerated(model: nn.Module) -> bool:
    """Whether a module of ``model`` has the mark."""
    return any(MARK in module.__dict__ for module in model.modules())


def _row(name: str, module: nn.Module, outcome: str, reason: str | None) -> Row:
    return Row(name, type(module).__name__, outcome if reason is None else "", reason or "")


def _is_quantized(module: nn.Module) -> bool:
    """Whether ``module`` computes with a quantized weight, which tables do not, or has a quantized result."""
    if hasattr(module, "weight_fake_quant"):
        return not isinstance(module, (nn.Embedding, nn.EmbeddingBag))
    held = getattr(module, "activation_post_process", None)
    return type(module).__name__ == "FloatFunctional" and isinstance(held, nn.Module) and is_fake_quantizer(held)


def _why_not(module: nn.Module, classes: Collection[type[nn.Module]]) -> str | None:
    """Return why a layer or operation is left alone, or None."""
    held: Any = module
    if type(module) not in classes:
        known = is_attached(getattr(held, "weight_fake_quant", None))
        return "only its quantizers are known" if known else f"a class of its own, {type(module).__name__}"
    quantizer = getattr(held, "weight_fake_quant", None) or held.activation_post_process
    if not is_attached(quantizer):
        return f"its quantizer is left alone: {unknown_reason(quantizer)}"
    return None


def _take_hook(module: nn.Module) -> bool:
    """Take over the hook that lets the result's quantizer run, where the operator can run it."""
    if not hasattr(module, "weight_fake_quant"):
        return True  # an operation calls its quantizer itself
    if not is_attached(getattr(module, "activation_post_process", None)):
        return False
    found = _observer_hook(module)
    if found is not None:
        module.__dict__[HOOK] = found
        del module._forward_hooks[found[0]]
    return found is not None


def _observer_hook(module: nn.Module) -> tuple[int, Any] | None:
    """Return key and function of the hook that lets the quantizer of the module's result run."""
    for key, hook in module._forward_hooks.items():
        if (getattr(hook, "__module__", ""), getattr(hook, "__name__", "")) == _OBSERVER_HOOK:
            return key, hook
    return None
