"""Running a model of this process in eval mode, and recording its codes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tritonq.calibration import modes_restored
from tritonq.deploy.codes import Codes, GivenCodes, Runner, take_given
from tritonq.deploy.fixed_point_verify import codes_read, fixed_point_layers, value_of_codes
from tritonq.deploy.float_quantizer import FloatQuantizer
from tritonq.deploy.modules import Quantizer
from tritonq.fake_quantize_base import FakeQuantizeBase
from tritonq.float_fake_quantize import FloatFakeQuantize
from tritonq.nn.call_arguments import by_position
from tritonq.nn.recurrent_forward import is_weight_quantizer
from tritonq.prepare.record.structure import replace_tensors, tensors_in
from tritonq.reference.float_rounding import codes_of_floats, floats_of_codes, round_to_float_

_QUANTIZERS = (FakeQuantizeBase, FloatFakeQuantize, Quantizer, FloatQuantizer)


def torch_runner(model: nn.Module) -> Runner:
    """Return a function that runs a trained or converted model in eval mode and returns its codes and outputs.

    It is a :class:`tritonq.deploy.codes.Runner`: ``(args, kwargs, given)`` to ``(codes, outputs)``. Codes, by the name
    of the quantizer, are lists with a tensor of codes minus zero points per call, float32 on the CPU; of a float format
    n stands for its n-th positive number, -n for the opposite. Of a fixed-point network they are the codes that each
    layer reads, by the layer's name. Quantizers of weights, those that do not round when ``torch_runner`` is called,
    and blocks of floats have none. ``given`` codes are used in place of the model's own. Tensors among the arguments
    are moved to the device of the model's first parameter or buffer. After each run the model's mode and hooks are as
    before.
    """
    quantizers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, _QUANTIZERS) and not is_weight_quantizer(name)
    }
    active = {name: module for name, module in quantizers.items() if _is_active(module)}
    layers = fixed_point_layers(model)
    device = next((tensor.device for tensor in [*model.parameters(), *model.buffers()]), torch.device("cpu"))

    def run(
        args: tuple[Any, ...], kwargs: dict[str, Any], given: GivenCodes | None = None
    ) -> tuple[Codes, list[Tensor]]:
        codes: Codes = {}
        given = given or {}
        if layers:
            handles = [
                layer.register_forward_pre_hook(_reader(codes, name, given), with_kwargs=True)
                for name, layer in layers.items()
            ]
        else:
            handles = [m.register_forward_hook(_recorder(codes, name, given)) for name, m in active.items()]
        try:
            with modes_restored(model), torch.no_grad():
                model.eval()
                args, kwargs = replace_tensors((args, kwargs), lambda tensor: tensor.to(device))
                result = model(*args, **kwargs)
        finally:
            for handle in handles:
                handle.remove()
        return codes, [tensor.detach().cpu() for _, tensor in tensors_in(result)]

    return run


def _is_active(quantizer: nn.Module) -> bool:
    """Whether a quantizer rounds to codes now: it is on and has observed. Block formats have none to compare."""
    if isinstance(quantizer, FloatFakeQuantize):
        return quantizer.qtype is not None and quantizer.rounds()
    return not isinstance(quantizer, FakeQuantizeBase) or quantizer.is_enabled_on_host()


def _recorder(codes: Codes, name: str, given: GivenCodes) -> Callable[[nn.Module, Any, Tensor], Tensor | None]:
    def record(module: Any, args: Any, output: Tensor) -> Tensor | None:
        scales = module.calculate_qparams().scale if isinstance(module, FakeQuantizeBase) else module.scale
        scale: Tensor = module.qtype.granularity.align(scales, output.dim())
        number = module.qtype.float_format
        steps = output.detach().float() / scale
        own = steps.round_().cpu() if number is None else codes_of_floats(round_to_float_(steps, number), number).cpu()
        other = take_given(given, codes, name, own.float())
        if other is None:
            return None
        steps = other.to(output.device) if number is None else floats_of_codes(other.to(output.device), number)
        return (steps * scale).to(output.dtype)

    return record


def _reader(codes: Codes, name: str, given: GivenCodes) -> Callable[[nn.Module, Any, Any], Any]:
    def record(layer: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        read, *others = by_position(layer, args, kwargs)
        other = take_given(given, codes, name, codes_read(layer, read.detach()).cpu())
        return None if other is None else ((value_of_codes(layer, other.to(read.device)), *others), {})

    return record
