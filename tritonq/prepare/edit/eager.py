"""`prepare_qat` as torch.ao has it: the user writes the stubs and fuses modules; qconfigs come from attributes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch
from torch import nn

from tritonq.fake_quantize import FakeQuantize
from tritonq.nn import FloatFunctional, QuantStub
from tritonq.nn.intrinsic import FusedModule
from tritonq.observers import PassiveObserver
from tritonq.prepare.decide.qconfigs import QConfigs
from tritonq.prepare.edit.swap import quantize_output, swap
from tritonq.qconfig import QConfig
from tritonq.quantized_type import QUINT8

# Float modules whose outputs torch.ao quantizes in place; the swapped ones have output quantizers of their own.
QUANTIZED_OUTPUTS: tuple[type[nn.Module], ...] = (
    QuantStub,
    nn.BatchNorm2d,
    nn.BatchNorm3d,
    nn.ReLU6,
    nn.LeakyReLU,
    nn.PReLU,
    nn.ELU,
    nn.Hardswish,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.InstanceNorm1d,
    nn.InstanceNorm2d,
    nn.InstanceNorm3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose3d,
)

# Outputs whose range is known: scale and zero point of their 8-bit grid, as in torch.ao.
FIXED_OUTPUTS: dict[type[nn.Module], tuple[float, int]] = {
    nn.Sigmoid: (1 / 256, 0),
    nn.Hardsigmoid: (1 / 256, 0),
    nn.Softmax: (1 / 256, 0),
    nn.Tanh: (2 / 256, 128),
}


def prepare_eager(model: nn.Module, mapping: Mapping[type[nn.Module], type[nn.Module]], qconfigs: QConfigs) -> None:
    """Replace float modules by ``mapping`` and add output quantizers, in place, as torch.ao's ``prepare_qat`` does.

    ``model`` itself gets neither. Direct children of fused modules and of ``nn.MultiheadAttention`` don't, either. Each
    module of the float model gets its qconfig, or None, as attribute ``qconfig``.

    Args:
        model: the float model.
        mapping: float type to quantization-aware type; a module of a subclass is not replaced.
        qconfigs: the qconfig of each module of ``model``; None, or no entry, leaves it in float.
    """
    swapped: dict[nn.Module, nn.Module] = {}
    for module in list(model.modules()):
        module.qconfig = qconfigs.get(module)  # type: ignore[assignment]  # torch.ao leaves it there too
        if isinstance(module, (FusedModule, nn.MultiheadAttention)):
            continue  # the one is swapped as a whole, the other reads its projection's weight and never calls it
        for name, child in list(module.named_children()):
            qconfig, target = qconfigs.get(child), mapping.get(type(child))
            if child in swapped:
                module._modules[name] = swapped[child]
            elif qconfig is not None and target is not None:
                module._modules[name] = swapped[child] = swap(child, target, qconfig)
            elif qconfig is not None and isinstance(child, FloatFunctional):
                child.activation_post_process = _quantizer(qconfig, model)
            elif qconfig is not None and type(child) in QUANTIZED_OUTPUTS:
                quantize_output(child, _quantizer(qconfig, model))
            elif qconfig is not None and type(child) in FIXED_OUTPUTS:
                quantize_output(child, _on_device_of(model, fixed_quantizer(*FIXED_OUTPUTS[type(child)])))


def _quantizer(qconfig: QConfig, like: nn.Module) -> nn.Module:
    """Return a new activation quantizer of ``qconfig`` on the device of a module's parameters."""
    return _on_device_of(like, qconfig.activation())


def fixed_quantizer(scale: float, zero_point: int) -> FakeQuantize:
    """Return a new quantizer on the CPU, with codes 0 to 255, that never observes: its grid stays as given."""
    quantizer = FakeQuantize(PassiveObserver, dtype=QUINT8)
    observer = cast(PassiveObserver, quantizer.activation_post_process)
    observer.set_qparams(scale, torch.tensor([zero_point], dtype=torch.int32))
    return quantizer


def _on_device_of(like: nn.Module, quantizer: nn.Module) -> nn.Module:
    """Move a quantizer to the device of the parameters of ``like``, if it has any, and return the quantizer."""
    parameter = next(like.parameters(), None)
    return quantizer if parameter is None else quantizer.to(parameter.device)
