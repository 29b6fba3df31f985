"""Gradient checkpointing: a forward that runs again inside a backward repeats the first one and changes no state."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

# Where `step_memory_of` keeps a module's memory.
_ATTRIBUTE = "_tritonq_memory"


def is_recomputing() -> bool:
    """Whether the caller runs inside a backward pass, where ``torch.utils.checkpoint`` runs a forward again.

    False while ``torch.compile`` traces. Inside a backward modules observe nothing and leave running statistics alone.
    The repeated forward equals the first bit for bit if, between the two, no module of it was called in training mode,
    switched or loaded: it then finds the state that the first forward left. (A step that runs two forwards through one
    checkpointed layer before their backwards repeats the first with the scales of the second, which move by the
    observer's averaging constant.)
    """
    # A graph that is being traced runs in the forward; a compiler that recomputes parts of it repeats no update.
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


class StepMemory:
    """What a layer's last training step read and then changed, kept for a recomputation; empty in copies and pickles.

    Attributes:
        fold: ``γ/σ`` and ``1/σ``, each (channels,), from the running variance before the step; None: not kept.
        running_var: copy of the running variance before the step; None: not kept.
        ready: the weight, quantized ahead of the coming step (`tritonq.functional.conv_bn.ReadyWeight`), which takes it
            out; None: that step quantizes the weight itself.
    """

    def __init__(self) -> None:
        self.fold: tuple[Tensor, Tensor] | None = None
        self.running_var: Tensor | None = None
        self.ready: Any = None

    def __reduce__(self) -> tuple[Any, ...]:
        return StepMemory, ()


def step_memory_of(module: nn.Module) -> StepMemory:
    """Return the :class:`StepMemory` kept on a module that is no layer of tritonq; the first call makes it there.

    Its caller keeps there what a rerun of the step by gradient checkpointing needs. While ``torch.compile`` traces,
    nothing is remembered: the memory is a new one.
    """
    if torch.compiler.is_compiling():
        return StepMemory()
    memory: StepMemory = module.__dict__.setdefault(_ATTRIBUTE, StepMemory())
    return memory


def forget_step_memory(module: nn.Module) -> None:
    """Delete the :class:`StepMemory` that :func:`step_memory_of` keeps on ``module``, if there is one."""
    module.__dict__.pop(_ATTRIBUTE, None)


def normalize_once(bn: nn.modules.batchnorm._BatchNorm, x: Tensor) -> Tensor:
    """Return ``bn(x)``; in a recomputation running statistics and ``num_batches_tracked`` are left as they are."""
    if not (is_recomputing() and bn.training):
        return cast(Tensor, bn(x))
    momentum, counter = bn.momentum, bn.num_batches_tracked
    bn.momentum = 0.0
    # Whether this forward counts the batch depends on the module: it does so in a copy.
    bn.num_batches_tracked = None if counter is None else counter.clone()
    try:
        return cast(Tensor, bn(x))
    finally:
        bn.momentum, bn.num_batches_tracked = momentum, counter
