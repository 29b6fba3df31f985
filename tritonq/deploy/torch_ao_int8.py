"""State dicts of models that torch.ao's eager mode converted, as those of tritonq's quantization-aware layers.

The names are torch.ao's own; nothing of it is imported. A layer's weight becomes the values of its codes, the
quantizers get the grids of the file and stop observing, and BatchNorms, which torch.ao folded away, become identities.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tritonq.fake_quantize import FakeQuantize
from tritonq.nn import QATLayer
from tritonq.quantized_type import QuantizedType

_OUTPUT, _WEIGHT = "activation_post_process", "weight_fake_quant"
_PACKED = "_packed_params._packed_params"
# What a packed layer says of itself beside its tensors.
_ABOUT_PACKED = "_packed_params.dtype"
# Modules whose converted forms have no tensor for the scale: a ReLU6 keeps the grid of its input, and the others keep
# the scale as a number that no state dict has.
_WITHOUT_GRID = (nn.ReLU6, nn.ELU, nn.PReLU)


class Translation(NamedTuple):
    """The state dict of a model that torch.ao converted, in tritonq's names.

    Attributes:
        state: for ``load_state_dict`` of the prepared model, with ``strict=False``.
        used: names of the file's entries that went into it.
        folded: names of the model's layers whose BatchNorm gets numbers from ``state`` that make it an identity.
        switched_off: names of the model's modules whose output quantizer ``state`` switches off, since the file has no
            grid of their results.
    """

    state: dict[str, Tensor]
    used: frozenset[str]
    folded: tuple[str, ...]
    switched_off: tuple[str, ...]


def is_converted(state: Mapping[str, Any]) -> bool:
    """Whether a state dict is that of a model which torch.ao's eager mode converted to integers."""
    return any(
        name.endswith(_PACKED) or (isinstance(value, Tensor) and value.is_quantized) for name, value in state.items()
    )


def translate(model: nn.Module, state: Mapping[str, Any]) -> Translation:
    """Translate the state of a model that torch.ao converted into the names of ``model``, which `prepare_qat` prepared.

    Where torch.ao keeps no grid of a result (of ReLU6, ELU and PReLU), the returned state switches the model's
    quantizer off. Elsewhere a quantizer of which the file has no grid keeps its own if it has a range: it has observed,
    or its range is known beforehand, as that of a sigmoid.

    Args:
        model: the prepared model; it is not changed.
        state: the state dict of torch.ao's model.

    Returns:
        A :class:`Translation`: the state for ``model``, and what became of the entries of ``state``.

    Raises:
        ValueError: a quantized layer, or the grid of a result, that the file lacks; a tensor of another shape; another
            number of weight scales; a bias where the model has none; a zero point that is none of the model's codes, or
            not its fixed one; or a scale that is not positive and finite. The message names layer or tensor.
    """
    new: dict[str, Tensor] = {}
    used: set[str] = set()
    folded: list[str] = []
    switched_off: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, QATLayer):
            taken = _translate_layer(name, module, state, new)
            used |= taken
            if getattr(module, "bn", None) is not None:
                folded.append(name)
        quantizer = module._modules.get(_OUTPUT)
        if isinstance(quantizer, FakeQuantize) and quantizer.qtype.axis is None:
            if isinstance(module, _WITHOUT_GRID) and f"{name}.scale" not in state:
                switches = ("fake_quant_enabled", "observer_enabled")
                new.update({f"{name}.{_OUTPUT}.{switch}": torch.zeros(1, dtype=torch.uint8) for switch in switches})
                switched_off.append(name)
            else:
                used |= _translate_output(name, quantizer, state, new)
    for name, tensor in model.state_dict().items():
        found = state.get(name)
        if name not in new and isinstance(found, Tensor) and not found.is_quantized:
            if found.shape != tensor.shape:
                shapes = f"{tuple(found.shape)} in the checkpoint and {tuple(tensor.shape)} in the model"
                raise ValueError(f"{name!r} has shape {shapes}")
            new[name] = found
            used.add(name)
    return Translation(new, frozenset(used), tuple(folded), tuple(switched_off))


def _translate_layer(name: str, layer: QATLayer, state: Mapping[str, Any], new: dict[str, Tensor]) -> set[str]:
    packed, plain = f"{name}.{_PACKED}", f"{name}.weight"
    if packed in state:
        weight, bias = state[packed]
        used = {packed, f"{name}.{_ABOUT_PACKED}"} & set(state)
    elif plain in state and isinstance(state[plain], Tensor) and state[plain].is_quantized:
        weight, bias = state[plain], state.get(f"{name}.bias")
        used = {plain, f"{name}.bias"} & set(state)
    else:
        raise ValueError(f"the checkpoint has no integer weight of {name!r}")
    if weight.shape != layer.weight.shape:
        shapes = f"{tuple(weight.shape)} in the checkpoint and {tuple(layer.weight.shape)} in the model"
        raise ValueError(f"the weight of {name!r} has shape {shapes}")
    new[plain] = weight.dequantize()
    quantizer = layer._modules.get(_WEIGHT)
    if isinstance(quantizer, FakeQuantize):
        if weight.qscheme() in (torch.per_tensor_affine, torch.per_tensor_symmetric):
            scale, zero = torch.tensor([weight.q_scale()]), torch.tensor([weight.q_zero_point()])
        else:
            scale, zero = weight.q_per_channel_scales(), weight.q_per_channel_zero_points()
        rows = weight.shape[0] if quantizer.qtype.axis is not None else 1
        if scale.numel() not in (1, rows):
            raise ValueError(f"{name!r} has {scale.numel()} weight scales in the checkpoint and {rows} in the model")
        _set_grid(f"{name}.{_WEIGHT}", quantizer, scale.expand(rows), zero.expand(rows), new)
    count = layer.linear_map.to_rows(layer.weight).shape[0]
    bias = torch.zeros(count) if bias is None else bias.detach().float()
    norm: Any = getattr(layer, "bn", None)
    if layer.bias is not None:
        new[f"{name}.bias"] = torch.zeros_like(bias) if norm is not None else bias
    elif norm is None and bool(bias.any()):
        raise ValueError(f"{name!r} has a bias in the checkpoint and none in the model")
    if norm is not None:
        one = torch.ones(count)
        identity = {"weight": (one + norm.eps).sqrt(), "bias": bias, "running_mean": 0 * one, "running_var": one}
        identity["num_batches_tracked"] = torch.ones((), dtype=torch.int64)
        held = norm.state_dict()
        new.update({f"{name}.bn.{key}": value for key, value in identity.items() if key in held})
    return used


def _translate_output(name: str, quantizer: FakeQuantize, state: Mapping[str, Any], new: dict[str, Tensor]) -> set[str]:
    scale, zero = state.get(f"{name}.scale"), state.get(f"{name}.zero_point")
    if not isinstance(scale, Tensor) or not isinstance(zero, Tensor):
        if bool(quantizer.activation_post_process.has_observed()):
            return set()  # its range is known, as that of a sigmoid
        raise ValueError(f"the checkpoint has no scale of the result of {name!r}")
    _set_grid(f"{name}.{_OUTPUT}", quantizer, scale.reshape(1), zero.reshape(1), new)
    return {f"{name}.scale", f"{name}.zero_point"}


def _set_grid(name: str, quantizer: FakeQuantize, scale: Tensor, zero: Tensor, new: dict[str, Tensor]) -> None:
    """Write the state of a quantizer with this grid into ``new``: scale, zero point, their range, and switches.

    It observes no more. ``name`` is the quantizer's name, with which the keys in ``new`` begin.

    Raises:
        ValueError: the grid is not possible for the quantizer's type.
    """
    qtype: QuantizedType = quantizer.qtype
    scale, zero = scale.to(torch.float32), zero.to(torch.int32)
    low, high = int(zero.min()), int(zero.max())
    fixed = quantizer.activation_post_process.fixed_zero_point
    if low < qtype.quant_min or high > qtype.quant_max or (fixed is not None and (low, high) != (fixed, fixed)):
        raise ValueError(
            f"the zero points {low}..{high} of {name!r} are none of the model's codes {qtype.quant_min}.."
            f"{qtype.quant_max}: the checkpoint was trained with another qconfig"
        )
    if not bool((torch.isfinite(scale) & (scale > 0)).all()):
        raise ValueError(f"a scale of {name!r} is not positive and finite")
    new[f"{name}.scale"], new[f"{name}.zero_point"] = scale.clone(), zero.clone()
    new[f"{name}.observer_enabled"] = torch.zeros(1, dtype=torch.uint8)
    new[f"{name}.fake_quant_enabled"] = torch.ones(1, dtype=torch.uint8)
    held = quantizer.activation_post_process.state_dict()
    ends = {"min_val": qtype.quant_min - zero, "max_val": qtype.quant_max - zero}
    for key, codes in ends.items():
        if key in held:
            value = codes * scale
            new[f"{name}.{_OUTPUT}.{key}"] = value.reshape(held[key].shape) if held[key].numel() else value
