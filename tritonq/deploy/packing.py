"""Weights of 4 bits and fewer in tritonq's files: several codes per byte."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tritonq.deploy.embedding_tables import QuantizedTable
from tritonq.deploy.modules import QuantizedLayer
from tritonq.quantized_type import QuantizedType

# Widths that divide a byte.
_WIDTHS = (1, 2, 4)
_DTYPES = {"int8": torch.int8, "uint8": torch.uint8}


def pack_weights(model: nn.Module, state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Pack the weight codes of a converted model's layers and tables that have 4 bits or fewer.

    Those of recurrent layers stay as they are, and so do codes that neither int8 nor uint8 holds, such as 1000 to 1010.

    Args:
        model: the converted model.
        state: its state dict; not changed.

    Returns:
        The state with such weights as uint8 (bytes,) and with the other tensors of ``state`` themselves; and by the
        packed weight's name in it how to unpack that weight, as plain data: "shape" (a list), "dtype" (``"int8"``),
        "low" (the type's smallest code) and "width" (1, 2 or 4 bits).
    """
    packed_state, how = dict(state), {}
    for module_name, module in model.named_modules(remove_duplicate=False):
        name = f"{module_name}.weight".lstrip(".")
        qtype = _weight_type(module)
        weight = state.get(name)
        if qtype is None or weight is None or qtype.bits > max(_WIDTHS) or weight.dtype not in _DTYPES.values():
            continue
        width = next(width for width in _WIDTHS if width >= qtype.bits)
        packed_state[name] = pack_codes(weight, qtype.quant_min, width)
        how[name] = {
            "shape": list(weight.shape),
            "dtype": str(weight.dtype).removeprefix("torch."),
            "low": qtype.quant_min,
            "width": width,
        }
    return packed_state, how


def unpack_weights(state: Mapping[str, Tensor], how: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return a copy of a packed state dict in which each packed weight has its shape, dtype and codes again.

    The other tensors are those of ``state`` themselves.

    Args:
        state: the packed state.
        how: the second result of :func:`pack_weights`.

    Raises:
        KeyError, TypeError, ValueError: ``how`` does not fit the state.
    """
    unpacked = dict(state)
    for name, each in how.items():
        codes = unpack_codes(state[name], tuple(each["shape"]), each["low"], each["width"])
        unpacked[name] = codes.to(_DTYPES[each["dtype"]])
    return unpacked


def pack_codes(codes: Tensor, low: int, width: int) -> Tensor:
    """Return integers ``low .. low + 2^width - 1`` packed into bytes, ``width`` bits each: uint8 (bytes,).

    ``codes`` are on the CPU, in any shape; ``width`` is 1, 2 or 4. A byte holds ``code - low`` of ``8 / width``
    neighbours, the first in the lowest bits; the last byte is filled with 0.

    Examples:
        >>> pack_codes(torch.tensor([-2, 1, 0, -1, 1], dtype=torch.int8), low=-2, width=2)
        tensor([108,   3], dtype=torch.uint8)
    """
    per_byte = 8 // width
    steps = (codes.reshape(-1).to(torch.int16) - low).to(torch.uint8)
    steps = torch.nn.functional.pad(steps, (0, -steps.numel() % per_byte)).view(-1, per_byte)
    packed = torch.zeros(len(steps), dtype=torch.uint8)
    for place in range(per_byte):
        packed |= steps[:, place] << (place * width)
    return packed


def unpack_codes(packed: Tensor, shape: tuple[int, ...], low: int, width: int) -> Tensor:
    """Return the integers that :func:`pack_codes` packed: int16 of this shape.

    ``low``, the smallest integer, and ``width``, the bits of each, must be those given to :func:`pack_codes`.

    Raises:
        ValueError: ``packed`` is not uint8 (bytes,) with as many bytes as ``shape`` and ``width`` need.
    """
    per_byte, count = 8 // width, math.prod(shape)
    if packed.dtype != torch.uint8 or packed.shape != (-(-count // per_byte),):
        raise ValueError(f"{tuple(packed.shape)} bytes of {packed.dtype} don't hold {count} codes of {width} bits")
    places = [(packed >> (place * width)) & (2**width - 1) for place in range(per_byte)]
    return (torch.stack(places, 1).reshape(-1)[:count].to(torch.int16) + low).view(shape)


def _weight_type(module: nn.Module) -> QuantizedType | None:
    if isinstance(module, QuantizedLayer):
        return module.types.weight
    return module.qtype if isinstance(module, QuantizedTable) else None
