"""Say why a model can't be converted, and warn of what was not trained, before anything is changed."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from tritonq.deploy.modules import DeployedModule
from tritonq.deploy.weight_codes import QUANTIZERS, rounds, why_no_blocks
from tritonq.fake_quantize_base import FakeQuantizeBase
from tritonq.float_fake_quantize import FloatFakeQuantize
from tritonq.nn import Embedding, EmbeddingBag, QATLayer, QATRecurrent
from tritonq.nn.recurrent_forward import is_weight_quantizer
from tritonq.switched_quantizer import SwitchedQuantizer

# Layers with weights, which conversion replaces.
WEIGHTED = (QATLayer, QATRecurrent, Embedding, EmbeddingBag)
# By what the names of the modules begin with that define their quantized layers and fake quantizers.
_OTHERS = {
    "torch.ao": ("torch.ao.quantization.fake_quantize", "torch.ao.nn.qat", "torch.ao.nn.intrinsic.qat"),
    "torchao": ("torchao.quantization.pt2e.fake_quantize",),
    "Model-Optimizer": ("modelopt.torch.quantization.nn",),
}


def why_not_deployable(model: nn.Module, *, trained: bool = False) -> str | None:
    """Return why ``convert`` refuses a prepared model, however it is trained, as a sentence; None: no such reason.

    The sentence names a quantizer that rounds activations in blocks of floats (``"mxfp8"``, ``"nvfp4"``), such as
    ``"the quantizer '0.input_fake_quant' rounds to mxfp8, which has no deployed form: …"``, or a layer whose weight has
    such blocks along another axis than its input channels, or of a size that doesn't divide these. For other reasons,
    such as missing training, ``convert`` may refuse too.

    Args:
        model: the prepared model.
        trained: whether training is over: weights whose quantizer has observed nothing are then left in float, and
            their blocks are no reason.
    """
    for name, module in model.named_modules():
        if isinstance(module, FloatFakeQuantize) and module.qtype is None and not is_weight_quantizer(name):
            return (
                f"the quantizer {name!r} rounds to {module.format}, which has no deployed form: its blocks find their "
                "scales while the model runs; those of weights have one, and single elements, such as fp8_e4m3"
            )
    for name, layer in model.named_modules():
        quantizer = layer.weight_fake_quant if isinstance(layer, QATLayer) else None
        if isinstance(layer, QATLayer) and isinstance(quantizer, FloatFakeQuantize):
            if not (rounds(quantizer) if trained else bool(quantizer.fake_quant_enabled)):
                continue
            reason = why_no_blocks(layer.linear_map.to_rows(layer.float_parameters()[0]), quantizer)
            if reason is not None:
                return f"{name!r} can't be converted: {reason}"
    return None


def check_convertible(model: nn.Module, allow_unquantized: bool) -> None:
    """Check that a model is prepared, not converted yet, and rounds wherever it has a quantizer.

    Args:
        model: the model, which is not changed.
        allow_unquantized: whether the rounding of quantizers may be switched off, or they may have observed nothing.

    Raises:
        ValueError: the model is not prepared, was prepared by another library, or is converted already; or, without
            ``allow_unquantized``, a quantizer's rounding is switched off or it has observed nothing; or the activations
            of a quantizer or a weight have no deployed form (:func:`why_not_deployable`); or a quantized layer has a
            float64 weight. For a quantizer or a weight the message has the module's name.
    """
    kinds = (*WEIGHTED, SwitchedQuantizer)
    if any(isinstance(module, DeployedModule) for module in model.modules()):
        raise ValueError("this model is converted already")
    if not any(isinstance(module, kinds) for module in model.modules()):
        other = _other_library(model)
        if other is not None:
            raise ValueError(
                f"{other} prepared this model, and its own convert and export deploy it: of an accelerated model "
                "convert what tritonq.restore(model) returns"
            )
        raise ValueError(
            f"{type(model).__name__} has no quantization-aware layer and no fake quantizer: use prepare_qat first"
        )
    reason = why_not_deployable(model, trained=True)
    if reason is not None:
        raise ValueError(f"{reason}; evaluate the trained model itself, in eval mode")
    for name, module in model.named_modules():
        if isinstance(module, QUANTIZERS) and not rounds(module) and not allow_unquantized:
            why = "has never observed anything" if bool(module.fake_quant_enabled) else "is switched off"
            raise ValueError(
                f"the quantizer {name!r} {why}, so the model that was trained does not round there; train or calibrate "
                "it, or pass allow_unquantized=True to leave that tensor in float"
            )
        if isinstance(module, WEIGHTED) and _weight_dtype(module) == torch.float64:
            raise ValueError(
                f"{name!r} has float64 parameters; deployed arithmetic is float32: call model.float() first"
            )


def _other_library(model: nn.Module) -> str | None:
    """Return the name of another library that prepared the model, such as ``"torch.ao"``, or None.

    An accelerated model counts as that library's, too.
    """
    modules = {base.__module__ for module in model.modules() for base in type(module).__mro__}
    return next((name for name, start in _OTHERS.items() if any(each.startswith(start) for each in modules)), None)


def warn_if_untrained(model: nn.Module, stacklevel: int) -> None:
    """Warn (one UserWarning) of quantizers whose ranges are still those of the example inputs of ``prepare_qat``.

    Args:
        model: the prepared model.
        stacklevel: to whose line the warning points: 1 is the function that calls this one, 2 the caller of that.
    """
    named = ((name, module) for name, module in model.named_modules() if isinstance(module, FakeQuantizeBase))
    untrained = [name for name, quantizer in named if quantizer.rests_on_examples()]
    if untrained:
        shown = ", ".join(untrained[:3]) + (" and others" if len(untrained) > 3 else "")
        warnings.warn(
            f"no training step reached {len(untrained)} quantizers ({shown}): their ranges are those of prepare_qat's "
            "example inputs",
            stacklevel=stacklevel + 1,
        )


def _weight_dtype(layer: QATLayer | QATRecurrent | Embedding | EmbeddingBag) -> torch.dtype:
    with torch.no_grad():
        weight = layer.float_parameters()[0] if isinstance(layer, QATLayer) else next(layer.parameters())
        return weight.dtype


def check_finite(model: nn.Module) -> None:
    """Raise ValueError, with the tensor's name, unless parameters, BatchNorm statistics and scales are finite.

    Not looked at are scales of quantizers that don't round, because they are switched off or have observed nothing, and
    of those that round to floats (:class:`FloatFakeQuantize`).
    """
    for name, module in model.named_modules():
        held: list[tuple[str, Tensor]] = list(module.named_parameters(recurse=False))
        if isinstance(module, _BatchNorm):
            held += module.named_buffers(recurse=False)
        if isinstance(module, FakeQuantizeBase) and module.is_enabled_on_host():
            held.append(("scale", module.calculate_qparams().scale))
        for key, tensor in held:
            bad = int((~tensor.isfinite()).sum()) if tensor.is_floating_point() else 0
            if bad:
                raise ValueError(
                    f"{f'{name}.{key}'.lstrip('.')!r} holds NaN or infinity in {bad} of {tensor.numel()} elements: the "
                    "training diverged, and integers have no such values"
                )
