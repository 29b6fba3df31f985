"""From a trained fixed-point network to one that runs on 8-bit codes, 32-bit accumulators and shifts.

A *format* is the word length, sign and fractional length of a tensor's codes. An *accumulator* is the integer sum of a
layer.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from tritonq.deploy.fixed_point_modules import (
    FixedPointFormat,
    IntegerAdd,
    IntegerAvgPool2d,
    IntegerLayer,
    IntegerModule,
    PoolingWindow,
)
from tritonq.deploy.modules import DeployedModule
from tritonq.deploy.swap import swap_modules
from tritonq.nn.fixed_point import FixedPointLinear
from tritonq.nn.fixed_point_joins import FixedPointAdd, FixedPointAvgPool2d
from tritonq.nn.fixed_point_layer import ActivationFormat, FixedPointLayer
from tritonq.prepare.changes import ADDED, note_report, report_of, take_report
from tritonq.prepare.record.snapshot import copied
from tritonq.reference.int8_conv import ACCUMULATOR_MAX

_SIMULATED = (FixedPointLayer, FixedPointAdd, FixedPointAvgPool2d)
_WORD_LEN = 8


def has_fixed_point(model: nn.Module) -> bool:
    """Whether a model holds fixed-point layers that can be trained; False once it is converted."""
    return any(isinstance(module, FixedPointLayer) for module in model.modules())


@torch.no_grad()
def convert_fixed_point(model: nn.Module, inplace: bool = False) -> nn.Module:
    """Return the integer form of a fixed-point network: layers take 8-bit codes and shift their sums to codes.

    Its outputs equal those of ``model`` in eval mode, and so does every code between. The result is a copy in eval
    mode, or with ``inplace`` the model itself, changed (another module if the model is a single layer).

    Raises:
        ValueError: layers that ``set_fixed_point_phase`` put into another phase than "fixed", layers whose formats
            never observed anything, are switched off or wider than 8 bits, biases without a ``bias_word_len``, which
            stay in float, a module put into the model after preparation, or an addition or average pooling that
            ``prepare_qat`` did not make; the message names the module. Also a model that is converted already.
            ``model`` is then as it was.
    """
    if any(isinstance(module, DeployedModule) for module in model.modules()):
        raise ValueError("this model is converted already")
    for name, module in model.named_modules():
        if isinstance(module, FixedPointLayer):
            _check(name, module)
    added = [record.name for record in report_of(model) or () if record.reason == ADDED]
    if added:
        raise ValueError(
            f"{added[0]!r} was put into the model after prepare_qat: a fixed-point network is one of integers alone. "
            "Put the float parts together, then prepare the whole"
        )
    converted = model if inplace else copied(model)
    made: dict[nn.Module, IntegerModule] = {}
    for name, module in converted.named_modules():
        if isinstance(module, _SIMULATED):
            try:
                made[module] = _integer_form(module, made)
            except ValueError as error:
                raise ValueError(f"{name!r} can't be converted: {error}") from error
            made[module].name = name
    records = take_report(converted)
    converted = swap_modules(converted, made).eval()
    if records is not None:
        note_report(converted, records)
    return converted


def _check(name: str, layer: FixedPointLayer) -> None:
    source = layer.input_format
    if not layer.is_integer():
        why = "never observed anything" if not source.has_qparams() else "is switched off, or its bias is a float"
        raise ValueError(f"the layer {name!r} {why}: it doesn't compute in integers; train it in phase 'fixed' first")
    if max(source.word_len, layer.weight_fake_quant.word_len) > _WORD_LEN:
        raise ValueError(
            f"the layer {name!r} has words of more than {_WORD_LEN} bits, which 8-bit multipliers can't take"
        )


def _integer_form(module: nn.Module, made: dict[nn.Module, IntegerModule]) -> IntegerModule:
    if module in made:
        return made[module]
    if isinstance(module, FixedPointLayer):
        return _layer(module)
    if isinstance(module, FixedPointAdd):
        return _add(module, made)
    return _pool(cast(FixedPointAvgPool2d, module))


def _layer(layer: FixedPointLayer) -> IntegerLayer:
    integers = layer.integers()
    linear = isinstance(layer, FixedPointLinear)
    conv: Any = layer
    pairs = {"stride": (1, 1), "padding": (0, 0), "dilation": (1, 1), "groups": 1}
    if not linear:
        pairs = {name: getattr(conv, name) for name in pairs}
    weight = integers.weight.to(torch.int8)
    tensors = {
        "weight": weight[:, :, None, None] if linear else weight,
        "bias": integers.bias.to(torch.int32),
        "frac_len": integers.frac_len.to(torch.int32).clone(),
    }
    return IntegerLayer(
        tensors,
        pairs,
        _codes(layer.input_format),
        _output(layer),
        encodes=not layer.input_format.scaled,
        decodes=layer.following is None,
        linear=linear,
    )


def _add(add: FixedPointAdd, made: dict[nn.Module, IntegerModule]) -> IntegerAdd:
    following = cast(ActivationFormat, add.following)
    frac_lens: list[Tensor] = []
    bounds: list[int] = []
    for summand in range(2):
        own, source = add.format_of(summand), add.sources[summand]
        if own is not None:
            # Codes of one step count as codes of the sum's format.
            frac_lens.append(following.rounded_frac_len().clone())
            bounds.append(_codes(own).largest)
        elif source is None:
            raise ValueError("a FixedPointAdd doesn't know what makes its summands; prepare_qat tells it")
        else:
            made.setdefault(source, _integer_form(source, made))
            frac_lens.append(made[source].frac_len)
            bounds.append(min(cast(Any, made[source]).bound, ACCUMULATOR_MAX))
    return IntegerAdd((frac_lens[0], frac_lens[1]), (bounds[0], bounds[1]), _output(add))


def _pool(pool: FixedPointAvgPool2d) -> IntegerAvgPool2d:
    if pool.following is None:
        raise ValueError("an average pooling needs a following layer; prepare_qat finds it")
    frac_len = pool.following.rounded_frac_len() + pool.shift
    window = PoolingWindow(pool.kernel_size, pool.stride, pool.padding, pool.area, pool.keepdim)
    return IntegerAvgPool2d(window, frac_len, _codes(pool.input_format), _output(pool))


def _output(module: FixedPointLayer | FixedPointAdd | FixedPointAvgPool2d) -> FixedPointFormat | None:
    """Return the codes that leave a module, those that its reader takes; None: accumulators leave it.

    They do for a sum, and for the caller of the network.
    """
    return None if module.following is None or module.raw_output else _codes(module.following)


def _codes(source: ActivationFormat) -> FixedPointFormat:
    return FixedPointFormat(int(source.rounded_frac_len()), source.qtype.quant_min, source.qtype.quant_max)
