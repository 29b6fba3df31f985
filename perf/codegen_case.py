"""What a code-generation case is, and meta tensors for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tritonq.grid import Grid, RangeStatistics
from tritonq.quantized_type import QuantizedType

DTYPES = (torch.float32, torch.float16, torch.bfloat16)

# Launches on meta tensors of a dtype.
Call = Callable[[torch.dtype], object]


@dataclass(frozen=True)
class CodegenCase:
    """One call of one launcher.

    Attributes:
        name: ``kernel/layout`` with options.
        call: launches on meta tensors of the given dtype.
        kernel: the kernel that moves the data; others of the call are small and only checked for spills. Empty: all of
            them are.
        reads: tensors of the dtype that each element is read from.
        writes: tensors of the dtype that each element is written to.
        budget: entry of ``codegen_budget.json`` that limits its instructions per element.
        dtypes: what to compile it for.
        width: bits of the widest access that its layout allows.
    """

    name: str
    call: Call
    kernel: str = ""
    reads: int = 1
    writes: int = 1
    budget: str = ""
    dtypes: tuple[torch.dtype, ...] = DTYPES
    width: int = 128


def meta(*shape: int, dtype: torch.dtype = torch.float32, channels_last: bool = False) -> Tensor:
    """Return a tensor of this shape on the device "meta", which has no data."""
    x = torch.empty(shape, dtype=dtype, device="meta")
    return x.to(memory_format=torch.channels_last) if channels_last else x


# A middle activation and weight of ResNet-50: rows of 56 * 56, which no tile divides, and 64 channels.
_ACTIVATION = (64, 64, 56, 56)
_WEIGHT = (512, 512, 3, 3)
# layout: shape, channels_last, axis
LAYOUTS: dict[str, tuple[tuple[int, ...], bool, int | None]] = {
    "flat": (_ACTIVATION, False, None),
    "channels first": (_ACTIVATION, False, 1),
    "channels last": (_ACTIVATION, True, 1),
    "weight": (_WEIGHT, False, 0),
}


def meta_qparams(shape: tuple[int, ...], axis: int | None) -> tuple[Tensor, Tensor]:
    """Return scale and zero point, without data, of a tensor of this shape.

    They have one element for each index of ``axis``; for None one.
    """
    channels = (1,) if axis is None else (shape[axis],)
    return meta(*channels), meta(*channels, dtype=torch.int32)


def meta_grid(qtype: QuantizedType, channels: int = 1) -> Grid:
    """Return a grid of meta tensors with a switch, and with a zero point if the type has one."""
    zero_point = None if qtype.fixed_zero_point == 0 else meta(channels, dtype=torch.int32)
    return Grid(meta(channels), zero_point, qtype, meta(1, dtype=torch.uint8))


def meta_range(qtype: QuantizedType, channels: int = 1) -> RangeStatistics:
    """Return a running range of meta tensors, which observes and averages over batches."""
    shape = () if qtype.axis is None else (channels,)
    return RangeStatistics(
        meta(*shape),
        meta(*shape),
        meta(dtype=torch.int64),
        qtype.granularity,
        meta(1, dtype=torch.uint8),
        averaging_constant=0.01,
        eps=1e-7,
    )
