"""torch.ao's eager mode: modules are marked as tritonq's, and observer hooks move into the operator before them.

torch.ao lets the quantizer of a layer's result run in a forward hook of the layer, its *observer hook*. An operator of
tritonq computes layer and quantizer together, so that the hook is taken out of ``_forward_hooks`` and kept under
``HOOK`` until :func:`restore` puts it back.
"""

from __future__ import annotations

import sys
from collections.abc import Collection
from typing import Any, cast

import torch
from torch import nn

from tritonq.acceleration.library_layers import HOOK, MARK
from tritonq.acceleration.quantizers import (
    forget_formula,
    has_formula,
    is_fake_quantizer,
    remember_formula,
    unknown_reason,
)
from tritonq.acceleration.report import AccelerationReport, Row

_OBSERVER_HOOK = ("torch.ao.quantization.quantize", "_observer_forward_hook")


def is_prepared(model: nn.Module) -> bool:
    """Whether ``model`` has a fake quantizer of torch.ao, or one of its layers with one, of eager or FX graph mode.

    Only torch.ao's own classes count, not those that others derive from them.
    """
    return "torch.ao.quantization" in sys.modules and any(
        type(module).__module__.startswith(("torch.ao.quantization.", "torch.ao.nn.qat.", "torch.ao.nn.intrinsic.qat."))
        and (is_fake_quantizer(module) or hasattr(module, "weight_fake_quant"))
        for module in model.modules()
    )


def package(model: nn.Module) -> str:
    """Return ``"torch"``, the Python package that prepared ``model``.

    :func:`tritonq.accelerate` compares the package's installed version with those that it knows. ``model`` is not read:
    call it if :func:`is_prepared` is true.
    """
    return "torch"


def accelerate(model: nn.Module) -> AccelerationReport:
    """Mark those modules of torch.ao in ``model`` that tritonq can compute, in place, and return the report.

    A marked module keeps its class; its forward runs tritonq's operators. A marked fake quantizer gets a formula
    (:func:`remember_formula`). The observer hook of a marked layer is taken out if the quantizer that it runs has a
    formula. :func:`restore` undoes all three. The report has one row for each fake quantizer,
    each layer with a quantized weight (but embedding tables), and each ``FloatFunctional`` with a fake quantizer, with
    the reason for those that are not marked.
    """
    from tritonq.acceleration.torch_ao import CLASSES, mark

    report = AccelerationReport(f"torch.ao (torch {torch.__version__})")
    modules = dict(model.named_modules())
    for name, module in modules.items():
        if is_fake_quantizer(module):
            reason = None if type(module) in CLASSES else f"a class of its own, {type(module).__name__}"
            reason = reason or remember_formula(module)
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
    """Undo :func:`accelerate` in place: remove marks and formulas, and put back the observer hooks that it took out.

    A model without a marked module stays as it is.
    """
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
        forget_formula(module)
        unmark(module)


def is_accelerated(model: nn.Module) -> bool:
    """Whether at least one module of ``model`` has the mark of :func:`accelerate`."""
    return any(MARK in module.__dict__ for module in model.modules())


def _row(name: str, module: nn.Module, outcome: str, reason: str | None) -> Row:
    return Row(name, type(module).__name__, outcome if reason is None else "", reason or "")


def _is_quantized(module: nn.Module) -> bool:
    """Whether ``module`` is a layer with a quantized weight, or a ``FloatFunctional`` with a quantized result.

    False for embedding tables, which have a quantized weight but compute no product.
    """
    if hasattr(module, "weight_fake_quant"):
        return not isinstance(module, (nn.Embedding, nn.EmbeddingBag))
    held = getattr(module, "activation_post_process", None)
    return type(module).__name__ == "FloatFunctional" and isinstance(held, nn.Module) and is_fake_quantizer(held)


def _why_not(module: nn.Module, classes: Collection[type[nn.Module]]) -> str | None:
    """Return why tritonq does not compute this layer or ``FloatFunctional``, in words for the report; None: it does.

    Reasons are a class that is not in ``classes``, and a quantizer without a formula.

    Args:
        module: a module for which :func:`_is_quantized` is true.
        classes: the classes of torch.ao that tritonq computes, exactly; a subclass is left alone.
    """
    held: Any = module
    if type(module) not in classes:
        known = has_formula(getattr(held, "weight_fake_quant", None))
        return "only its quantizers are known" if known else f"a class of its own, {type(module).__name__}"
    quantizer = getattr(held, "weight_fake_quant", None) or held.activation_post_process
    if not has_formula(quantizer):
        return f"its quantizer is left alone: {unknown_reason(quantizer)}"
    return None


def _take_hook(module: nn.Module) -> bool:
    """Move the observer hook of ``module`` to ``module.__dict__[HOOK]``.

    Return whether tritonq now runs the result's quantizer. A ``FloatFunctional`` has no such hook, since it calls its
    quantizer itself: the result is True. It is False for a layer without a hook, or with a quantizer that tritonq does
    not know.
    """
    if not hasattr(module, "weight_fake_quant"):
        return True  # an operation calls its quantizer itself
    if not has_formula(getattr(module, "activation_post_process", None)):
        return False
    found = _observer_hook(module)
    if found is not None:
        module.__dict__[HOOK] = found
        del module._forward_hooks[found[0]]
    return found is not None


def _observer_hook(module: nn.Module) -> tuple[int, Any] | None:
    """Return the key of torch.ao's observer hook in ``module._forward_hooks``, and the hook; None if there is none."""
    for key, hook in module._forward_hooks.items():
        if (getattr(hook, "__module__", ""), getattr(hook, "__name__", "")) == _OBSERVER_HOOK:
            return key, hook
    return None
