"""What flows where: one run of a model, recorded as calls and the values between them.

``record`` runs the model once and follows its tensors by identity, through modules that no tracer can follow. A leaf
module's call and a torch function called outside any leaf are one :class:`Call` each; a module called twice has two
calls. Nothing is kept but plain descriptions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from tritonq.nn import RepVGGBlock
from tritonq.prepare.structure import Path

Source = Literal["call", "input", "state", "unknown"]


@dataclass(frozen=True)
class Ref:
    """Stands for a tensor inside recorded arguments: the index of its value."""

    value: int


@dataclass(frozen=True)
class Value:
    """What a tensor held between two writes.

    Attributes:
        index: position in ``Dataflow.values``.
        source: ``"call"``; ``"input"`` (an example input); ``"state"`` (a parameter or buffer); ``"unknown"`` (made by
            code that torch can't see).
        producer: index of the call that produced it, for source ``"call"``.
        path: for an input the keys that lead to it, the first a position or an argument name; for state its name.
        tensor: which tensor object held it; an in-place operation gives the same tensor a new value.
        shape: shape at the time.
        dtype: dtype at the time.
        consumers: indices of the calls that read it, in order.
        output_paths: where the model's output holds it.
    """

    index: int
    source: Source
    producer: int | None
    path: Path
    tensor: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    consumers: tuple[int, ...]
    output_paths: tuple[Path, ...]

    @property
    def is_output(self) -> bool:
        """Whether the model returns it."""
        return bool(self.output_paths)


@dataclass(frozen=True)
class Call:
    """One call of a leaf module, or of a torch function outside of leaf modules.

    Attributes:
        index: position in ``Dataflow.calls``, in order of execution.
        kind: ``"module"`` or ``"function"``.
        name: the operation without its spelling: ``add`` for ``+``, ``+=``, ``torch.add``, ``Tensor.add_``; for modules
            the class name.
        module_name: qualified name of the called module (the first one, if it is shared), else None.
        target: the module or function.
        frame: index of the frame it was called from.
        owner: qualified name of the innermost module, not a leaf, whose forward was running.
        ordinal: how many function calls (for a function) its frame had made before, or how often this module (for a
            module) had been called before.
        args: positional arguments, tensors as ``Ref``.
        kwargs: named arguments, tensors as ``Ref``.
        output: the result, tensors as ``Ref``.
        inputs: values read, in order of the arguments.
        outputs: values produced, including those of tensors that it changed in place.
        writes: what in-place changes replaced, as pairs of values (before, after).
    """

    index: int
    kind: Literal["module", "function"]
    name: str
    module_name: str | None
    target: nn.Module | Callable[..., Any]
    frame: int
    owner: str
    ordinal: int
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    output: Any
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    writes: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class Frame:
    """One run of the forward of a module that is not a leaf.

    Attributes:
        index: position in ``Dataflow.frames``; frame 0 is the model's.
        owner: qualified name of the module ("" is the model).
        parent: frame that called it, None for the model.
        args: positional arguments, tensors as ``Ref``.
        kwargs: named arguments, tensors as ``Ref``.
        output: the result, tensors as ``Ref``.
        events: what it called, in order: ``("call", index)`` or ``("frame", index)``.
    """

    index: int
    owner: str
    parent: int | None
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    output: Any
    events: tuple[tuple[Literal["call", "frame"], int], ...]


@dataclass(frozen=True)
class Dataflow:
    """The record of one run."""

    calls: tuple[Call, ...]
    values: tuple[Value, ...]
    frames: tuple[Frame, ...]

    def producer(self, value: int) -> Call | None:
        """The call that produced a value; None for inputs, state and unknown values."""
        index = self.values[value].producer
        return None if index is None else self.calls[index]

    def producers(self, call: Call) -> tuple[Call, ...]:
        """The calls whose results a call reads, without repetition, in order of its arguments."""
        found = dict.fromkeys(self.values[value].producer for value in call.inputs)
        return tuple(self.calls[index] for index in found if index is not None)

    def consumers(self, value: int) -> tuple[Call, ...]:
        """The calls that read a value."""
        return tuple(self.calls[index] for index in self.values[value].consumers)

    def single_consumer(self, value: int) -> Call | None:
        """The only call that reads a value, or None: several, none, or the model returns it too."""
        record = self.values[value]
        if record.is_output or len(record.consumers) != 1:
            return None
        return self.calls[record.consumers[0]]

    def calls_of(self, module_name: str) -> tuple[Call, ...]:
        """Every call of one leaf module."""
        return tuple(call for call in self.calls if call.module_name == module_name)

    def frames_of(self, owner: str) -> tuple[Frame, ...]:
        """Every run of one module that is not a leaf."""
        return tuple(frame for frame in self.frames if frame.owner == owner)

    def is_state(self, value: int) -> bool:
        """Whether the value is a parameter or buffer."""
        return self.values[value].source == "state"


def refs_in(structure: Any) -> tuple[int, ...]:
    """The values inside recorded arguments, in order."""
    if isinstance(structure, Ref):
        return (structure.value,)
    if isinstance(structure, dict):
        structure = tuple(structure.values())
    if isinstance(structure, tuple):
        return tuple(value for item in structure for value in refs_in(item))
    return ()


def is_leaf(module: nn.Module) -> bool:
    """Whether a module's call is one operation: a module of torch.nn without children, attention, or a RepVGG block.

    A user's class counts where it inherits its forward from torch.nn unchanged. Everything else is looked into, so that
    the functions which it calls are seen.
    """
    if isinstance(module, (torch.jit.ScriptModule, nn.MultiheadAttention)) or type(module) is RepVGGBlock:
        return True
    if isinstance(module, (nn.Sequential, nn.ModuleList, nn.ModuleDict)) or next(module.children(), None) is not None:
        return False
    return getattr(type(module).forward, "__module__", "").startswith("torch.nn.modules.")


def operation_name(function: Callable[..., Any]) -> str:
    """A function's name without its spelling: in place, operator, reflected, method or function."""
    name = str(getattr(function, "__name__", type(function).__name__))
    if name == "__get__":  # an attribute of Tensor, such as x.T
        return str(getattr(function, "__self__").__name__)  # noqa: B009 - a method wrapper has no static type
    if isinstance(function, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
        name = name.split(".")[0]
    # The operator module spells += as iadd.
    return plain_name(name, is_operator=getattr(function, "__module__", None) == "_operator")


def plain_name(name: str, is_operator: bool = False) -> str:
    """``add`` for ``add_``, ``__iadd__``, ``__radd__`` and, among operators, ``iadd``."""
    bare = name.strip("_")
    if (is_operator or name.startswith("__")) and bare[:1] in ("i", "r") and bare[1:] in _ARITHMETIC:
        bare = bare[1:]
    return _SYNONYMS.get(bare, bare)


_ARITHMETIC = frozenset(
    [
        "add",
        "sub",
        "mul",
        "truediv",
        "floordiv",
        "div",
        "mod",
        "pow",
        "matmul",
        "and",
        "or",
        "xor",
        "lshift",
        "rshift",
        "concat",
    ]
)
_SYNONYMS = {"truediv": "div", "true_divide": "div", "divide": "div", "multiply": "mul", "subtract": "sub"}
_SYNONYMS |= {"concat": "cat", "concatenate": "cat", "floordiv": "floor_divide", "absolute": "abs", "rsub": "sub"}


def record(model: nn.Module, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None) -> Dataflow:
    """Run ``model(*args, **kwargs)`` once in eval mode without gradients and record its dataflow.

    Modes, buffers, attributes, hooks and the random state are afterwards what they were, also after an error; the
    example inputs are not written to.

    Raises:
        ValueError: the model has parameters that a first run would create.
        Exception: whatever the model raises on these inputs.
    """
    from tritonq.prepare.recorder import Recorder

    return Recorder(model).run(args, dict(kwargs or {}))
