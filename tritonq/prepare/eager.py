"""`prepare_qat` as torch.ao has it: the user writes the stubs and fuses, qconfigs come from attributes."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from tritonq.nn import FloatFunctional, QuantStub
from tritonq.nn.intrinsic import FusedModule
from tritonq.prepare.fuse import move_hooks
from tritonq.qconfig import QConfig

Mapping_ = Mapping[type[nn.Module], type[nn.Module]]
QConfigs = dict[nn.Module, QConfig | None]

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


def resolve_qconfigs(model: nn.Module, qconfig: QConfig | None) -> QConfigs:
    """The qconfig of every module: its own attribute, else its parent's; ``qconfig`` stands for the model's own.

    Raises:
        TypeError: a ``qconfig`` attribute that is neither a QConfig nor None.
    """
    found: QConfigs = {}

    def visit(module: nn.Module, name: str, inherited: QConfig | None) -> None:
        if module in found:
            return
        own = inherited if module is model and qconfig is not None else getattr(module, "qconfig", inherited)
        if own is not None and not isinstance(own, QConfig):
            raise TypeError(f"qconfig of {name or 'the model'} must be a QConfig or None, got {type(own).__qualname__}")
        found[module] = own
        for child_name, child in module.named_children():
            visit(child, f"{name}.{child_name}".lstrip("."), own)

    visit(model, "", qconfig)
    return found


def swap(module: nn.Module, target: type[nn.Module], qconfig: QConfig) -> nn.Module:
    """The quantization-aware form of a float module: its parameters, hooks, device and mode."""
    had_own = "qconfig" in vars(module)
    before = vars(module).get("qconfig")
    module.qconfig = qconfig  # type: ignore[assignment]  # from_float reads it there
    try:
        swapped: nn.Module = target.from_float(module)  # type: ignore[attr-defined]
    finally:
        if had_own:
            module.qconfig = before  # type: ignore[assignment]
        else:
            del module.qconfig
    move_hooks(module, module, swapped)
    return swapped


def prepare_eager(model: nn.Module, mapping: Mapping_, qconfigs: QConfigs) -> None:
    """Swap float modules by ``mapping`` and attach output quantizers, in place, as torch.ao's ``prepare_qat`` does."""
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


def quantize_output(module: nn.Module, quantizer: nn.Module) -> None:
    """Pass the output of a module through ``quantizer``, its new child ``activation_post_process``."""
    module.add_module("activation_post_process", quantizer.train(module.training))
    module.register_forward_hook(quantize_output_hook, prepend=True)


def quantize_output_hook(module: nn.Module, args: tuple[object, ...], output: Tensor) -> Tensor:
    """Forward hook: fake quantize what the module returns."""
    quantized: Tensor = module.activation_post_process(output)  # type: ignore[operator]
    return quantized


def _quantizer(qconfig: QConfig, like: nn.Module) -> nn.Module:
    """A new activation quantizer on the device of a module's parameters."""
    parameter = next(like.parameters(), None)
    quantizer = qconfig.activation()
    return quantizer if parameter is None else quantizer.to(parameter.device)
