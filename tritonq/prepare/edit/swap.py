"""The quantization-aware form of one float module, and the quantizer of what one module returns."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from tritonq.prepare.edit.fuse import move_hooks
from tritonq.qconfig import QConfig


def swap(module: nn.Module, target: type[nn.Module], qconfig: QConfig) -> nn.Module:
    """The quantization-aware form of a float module: its parameters, hooks, device and mode."""
    swapped: nn.Module = from_float(target, module, qconfig)
    move_hooks(module, module, swapped)
    return swapped


def from_float(target: type[nn.Module], module: nn.Module, qconfig: QConfig) -> Any:
    """Call ``target.from_float(module)`` with ``qconfig`` as the module's attribute, where it is looked for."""
    had_own, before = "qconfig" in vars(module), vars(module).get("qconfig")
    module.qconfig = qconfig  # type: ignore[assignment]
    try:
        return target.from_float(module)  # type: ignore[attr-defined]
    finally:
        if had_own:
            module.qconfig = before  # type: ignore[assignment]
        else:
            del module.qconfig


def quantize_output(module: nn.Module, quantizer: nn.Module) -> None:
    """Pass the output of a module through ``quantizer``, its new child ``activation_post_process``."""
    module.add_module("activation_post_process", quantizer.train(module.training))
    module.register_forward_hook(quantize_output_hook, prepend=True)


def quantize_output_hook(module: nn.Module, args: tuple[object, ...], output: Tensor) -> Tensor:
    """Forward hook: fake quantize what the module returns."""
    quantized: Tensor = module.activation_post_process(output)  # type: ignore[operator]
    return quantized
