"""Modules with an output quantizer, and what is known of the tensors that they return.

A *producer* of a tensor is such a module, or a quantizer.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any, Protocol, TypeGuard, cast, runtime_checkable

import torch
from torch import Tensor, nn

from tritonq.functional.fake_quant import fake_quantize
from tritonq.grid import Grid
from tritonq.nn.fusable import ceiling_of
from tritonq.nn.reference import Reference, ReferringModule
from tritonq.qconfig import QConfig
from tritonq.qconfig_mapping import check_qconfig
from tritonq.quantized_type import QuantizedType
from tritonq.switched_quantizer import SwitchedQuantizer


class WithOutputQuantizer(ReferringModule):
    """A module with an output quantizer, its child ``activation_post_process``.

    Args:
        qconfig: makes the quantizer of the output; None: an Identity.
    """

    def __init__(self, qconfig: QConfig | None = None) -> None:
        super().__init__()
        if qconfig is not None:
            check_qconfig(qconfig, f"qconfig of {type(self).__name__}")
        self.activation_post_process: nn.Module = nn.Identity() if qconfig is None else qconfig.activation()


@runtime_checkable
class GridSource(Protocol):
    """A module that puts values on a grid of integers: a fake quantizer, or what it becomes in deployment.

    It has the attribute ``qtype``, the type of its grid, and two methods: ``grid()`` returns the grid, and
    ``is_enabled_on_host()`` says whether it rounds.
    """

    qtype: QuantizedType

    def is_enabled_on_host(self) -> bool:
        """Whether it rounds: it is switched on and has a scale. To find out may synchronise with the device."""

    def grid(self) -> Grid:
        """Return the grid, whose ``enabled`` is the switch of rounding; its tensors may be the module's own buffers."""


def is_grid_source(module: object) -> TypeGuard[GridSource]:
    """Whether ``module`` puts values on a grid of integers: a fake quantizer, or what it becomes in deployment.

    False for a quantizer to a float format, such as FP8, and for None. A :class:`GridSource` is found by its methods,
    faster than by ``isinstance``.
    """
    kind = type(module)
    if not callable(getattr(kind, "is_enabled_on_host", None)) or not callable(getattr(kind, "grid", None)):
        return False
    # What computes on codes takes integers.
    return cast(GridSource, module).qtype.float_format is None


def quantizer_of(producer: nn.Module | None) -> nn.Module | None:
    """Return the output quantizer of ``producer``, a module that puts a tensor on a grid.

    That is the producer itself if it is a quantizer, else its child ``activation_post_process``, which is an
    ``nn.Identity`` if the output stays in float. None for a producer without such a child, and for None.
    """
    if producer is None or isinstance(producer, SwitchedQuantizer) or is_grid_source(producer):
        return cast("nn.Module | None", producer)
    return producer._modules.get("activation_post_process")


def ends_in_relu(producer: nn.Module | None) -> bool:
    """Whether ``producer``, a module that puts a tensor on a grid, computes a ReLU before its quantizer.

    That is so for a module whose ``ceiling`` is not None (infinity for a plain ReLU, 6 for ReLU6), and for a ReLU,
    ReLU6 or ``Hardtanh(0, b)`` module. False for None.
    """
    ceiling = getattr(producer, "ceiling", None)
    return ceiling is not None or ceiling_of(producer) is not None


def deployed_grid(grid: Grid, relu: bool) -> Grid:
    """Return the grid with the codes that deployment uses: behind a ReLU only those from the code of zero on.

    ``relu`` says whether a ReLU comes before the quantizer. Then, if the type fixes the zero point (such as 0 of codes
    -128..127), the result is a new grid with the same tensors, whose type has it as ``quant_min`` (codes 0..127) and
    is not symmetric; else it is ``grid`` itself.
    """
    zero = grid.qtype.fixed_zero_point
    if zero is None or not relu:
        return grid
    return Grid(grid.scale, grid.zero_point, replace(grid.qtype, quant_min=zero, symmetric=False), grid.enabled)


def meet_hooks(references: Iterable[Reference[Any]], operands: Iterable[Tensor], training: bool) -> None:
    """Watch hooks that users put, since preparation, on modules between each operand's quantizer and its reader.

    To watch a hook is to note whether it changes what it is given. Once a hook between the two has, the ``module`` of
    the Reference is None until that hook is removed, so that the reader computes in float.

    What a new hook did to these operands was not watched yet. Outside of training, if an operand is off its quantizer's
    grid, all new hooks between the two count as hooks that change it. Otherwise a new hook counts as changing nothing
    until it changes a tensor in a later call. Under ``torch.compile`` nothing is watched, and every hook
    that is not watched yet counts as one that changes the operand.

    Args:
        references: for each operand the Reference to its producer, which may be empty.
        operands: the tensors that the reader was given.
        training: whether the reader is in training mode.
    """
    for reference, operand in zip(references, operands, strict=True):
        reference.meet(operand, None if training else lies_on_grid)


def lies_on_grid(producer: nn.Module, x: Tensor) -> bool:
    """Whether the float32 tensor ``x`` has only values that the quantizer of ``producer`` can return.

    Values up to a hundredth of the scale off count. True if the producer has no per-tensor grid of integers that is
    switched on, for other dtypes, and for an empty ``x``. Waits for the device of ``x``.
    """
    quantizer = quantizer_of(producer)
    if not is_grid_source(quantizer) or quantizer.qtype.axis is not None or x.dtype != torch.float32 or not x.numel():
        return True
    if not quantizer.is_enabled_on_host():
        return True
    grid, values = quantizer.grid(), x.detach()
    return bool(((fake_quantize(values, grid) - values).abs() <= grid.scale / 100).all())
