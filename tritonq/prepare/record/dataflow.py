"""The record of one run of a model: plain data classes that say what was called, with which tensors, in which order.

- A *leaf* is a module whose call counts as one operation, such as ``nn.Conv2d``.
- A :class:`Call` is one call of a leaf, or of a torch function outside of leaves. A module called twice has two calls.
- A :class:`Value` is the content of one tensor. A tensor that is changed in place gets a second value.
- A :class:`Frame` is one run of the forward of a module that is not a leaf. The *owner* of a call is the module whose
  forward makes it.

Calls, values and frames name each other by index. Modules have their qualified names ("" is the model). Two runs, in
eval mode (run 0) and in training mode (run 1), can be put together to one record; each part then has its run.
:func:`tritonq.prepare.record.recorder.record` makes the record.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal, TypeAlias, TypeVar

import torch
from torch import nn

from tritonq.prepare.record.place import Use
from tritonq.prepare.record.structure import Path

Key = TypeVar("Key", bound=Hashable)
Item = TypeVar("Item")
Source = Literal["call", "input", "state", "unknown"]
# Positions in `Dataflow.values`, `calls` and `frames`, and the number of a run.
ValueIndex: TypeAlias = int
CallIndex: TypeAlias = int
FrameIndex: TypeAlias = int
RunIndex: TypeAlias = int


@dataclass(frozen=True)
class Ref:
    """Stand for a tensor inside recorded arguments and results.

    Attributes:
        value: index of the tensor's value in ``Dataflow.values``.
    """

    value: ValueIndex


@dataclass(frozen=True)
class Value:
    """The content of a tensor between two writes to it.

    Attributes:
        index: position in ``Dataflow.values``.
        source: where it comes from: ``"call"`` (a recorded call); ``"input"`` (an example input); ``"state"`` (a
            parameter or buffer); ``"unknown"`` (code that torch functions can't see, such as NumPy).
        producer: index of the call that produced it, for source ``"call"``; else None.
        path: for an input the keys that lead to it, the first a position or an argument name, such as ``(0,)`` or
            ``("x", "mask")``; for state the qualified name, as ``("conv.weight",)``; else empty.
        tensor: number of the tensor object that held it, counted in the record from 0. An in-place operation gives the
            same tensor a new value.
        shape: shape of the tensor at that time.
        dtype: dtype of the tensor at that time.
        consumers: indices of the calls that read it, each once, in order.
        output_paths: each path of keys under which the model's result holds it, such as ``((0, "boxes"),)``; ``((),)``
            if it is the result; empty if the model does not return it.
        run: 0; in a record of two runs 1 for the values of the second.
    """

    index: ValueIndex
    source: Source
    producer: CallIndex | None
    path: Path
    tensor: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    consumers: tuple[CallIndex, ...]
    output_paths: tuple[Path, ...]
    run: RunIndex = 0

    @property
    def is_output(self) -> bool:
        """Whether the model returns this value, by itself or inside of a container."""
        return bool(self.output_paths)


@dataclass(frozen=True)
class Call:
    """One call of a leaf module, or of a torch function outside of leaf modules.

    Attributes:
        index: position in ``Dataflow.calls``, in order of execution.
        kind: ``"module"`` or ``"function"``.
        name: for a function the plain name of the operation: ``add`` for ``+``, ``+=``, ``torch.add`` and
            ``Tensor.add_``; for a module its class name.
        module_name: qualified name of the called module (the first name, if it is shared); None for a function.
        target: the module or function itself.
        frame: index of the frame that made the call.
        owner: qualified name of the module whose forward made the call: the innermost running one that is no leaf.
        ordinal: for a function, how many functions its frame had called before; for a module, how often the module had
            been called before in this run.
        args: positional arguments, with a :class:`Ref` for each tensor; other objects that are no constants have an
            :class:`~tritonq.prepare.record.structure.Opaque`.
        kwargs: named arguments, likewise.
        output: the result, likewise.
        inputs: indices of the values read, in order of the arguments, one for each tensor object.
        outputs: indices of the values produced, including new values of tensors that it changed in place.
        writes: for each tensor changed in place, views too, the indices ``(value before, value after)``.
        place: for a function, the position in the source that called it, and how often the same position had called one
            in this frame before: ``"models.net:Net.forward:3.8-3.20#0"``. Empty for a module, or if not known.
        use: for a function that writes to its operand, how the source uses the result: ``"dropped"`` (not at all),
            ``"rebound"`` (as ``x += y``), ``"temporary"`` (the operand has no name) or ``"used"``, as for all others.
        run: 0, or 1 for calls of the second run that :meth:`Dataflow.joined` added.
        transformed: whether it was made inside of `torch.vmap`, `torch.func.grad` or the like.
        dwarfing: for a sum of two tensors the value that dwarfs the other, by index: its largest magnitude is at least
            10,000, and at least 256 times the other's. None if there is none, and for other calls.
    """

    index: CallIndex
    kind: Literal["module", "function"]
    name: str
    module_name: str | None
    target: nn.Module | Callable[..., Any]
    frame: FrameIndex
    owner: str
    ordinal: int
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    output: Any
    inputs: tuple[ValueIndex, ...]
    outputs: tuple[ValueIndex, ...]
    writes: tuple[tuple[ValueIndex, ValueIndex], ...] = ()
    place: str = ""
    use: Use = "used"
    run: RunIndex = 0
    transformed: bool = False
    dwarfing: ValueIndex | None = None


@dataclass(frozen=True)
class Frame:
    """One run of the forward of a module that is not a leaf.

    Attributes:
        index: position in ``Dataflow.frames``; frame 0 is the model's in run 0.
        owner: qualified name of the module (the first name, if it is shared).
        parent: index of the frame that called the module; None for the model's frame.
        args: positional arguments, with a :class:`Ref` for each tensor.
        kwargs: named arguments, with a :class:`Ref` for each tensor.
        output: the result, with a :class:`Ref` for each tensor; None if the forward raised an error that was caught.
        events: what the forward called, in order: ``("call", index in calls)`` or ``("frame", index in frames)``.
        training: whether the module was in training mode.
        run: 0; in a record of two runs 1 for the frames of the second.
    """

    index: FrameIndex
    owner: str
    parent: FrameIndex | None
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    output: Any
    events: tuple[tuple[Literal["call", "frame"], CallIndex | FrameIndex], ...]
    training: bool = False
    run: RunIndex = 0


@dataclass(frozen=True)
class Dataflow:
    """The record of one run, or of two runs put together by :meth:`joined`.

    Attributes:
        calls: all calls, in order of execution.
        values: all values, in the order in which they were made.
        frames: all runs of forwards, in the order in which they began.
        runs: how many runs it holds: 1 or 2.
    """

    calls: tuple[Call, ...]
    values: tuple[Value, ...]
    frames: tuple[Frame, ...]
    runs: int = 1

    def joined(self, other: Dataflow) -> Dataflow:
        """Return one record that holds this run and, after it, another run of the same model.

        Each of the two holds one run and stays as it is. In the result the indices of ``other`` are shifted, and its
        parts have ``run=1``. A module that each run calls once then has two calls.
        """
        calls, values, frames = len(self.calls), len(self.values), len(self.frames)
        tensors = 1 + max((value.tensor for value in self.values), default=-1)

        def shifted(item: Any) -> Any:
            return replace_refs(item, lambda ref: Ref(ref.value + values))

        def by(amount: int, indices: tuple[int, ...]) -> tuple[int, ...]:
            return tuple(index + amount for index in indices)

        more_calls = [
            replace(
                call,
                index=call.index + calls,
                frame=call.frame + frames,
                args=shifted(call.args),
                kwargs=shifted(call.kwargs),
                output=shifted(call.output),
                inputs=by(values, call.inputs),
                outputs=by(values, call.outputs),
                writes=tuple((before + values, after + values) for before, after in call.writes),
                dwarfing=None if call.dwarfing is None else call.dwarfing + values,
                run=self.runs,
            )
            for call in other.calls
        ]
        more_values = [
            replace(
                value,
                index=value.index + values,
                producer=None if value.producer is None else value.producer + calls,
                tensor=value.tensor + tensors,
                consumers=by(calls, value.consumers),
                run=self.runs,
            )
            for value in other.values
        ]
        more_frames = [
            replace(
                frame,
                index=frame.index + frames,
                parent=None if frame.parent is None else frame.parent + frames,
                args=shifted(frame.args),
                kwargs=shifted(frame.kwargs),
                output=shifted(frame.output),
                events=tuple((kind, index + (calls if kind == "call" else frames)) for kind, index in frame.events),
                run=self.runs,
            )
            for frame in other.frames
        ]
        return Dataflow(
            (*self.calls, *more_calls), (*self.values, *more_values), (*self.frames, *more_frames), self.runs + 1
        )

    def runs_of(self, module_name: str) -> set[RunIndex]:
        """Return the numbers of the runs (0, 1) that called a module, as a leaf or not.

        An empty set says that no run called it.
        """
        return {call.run for call in self.calls_of(module_name)} | {frame.run for frame in self.frames_of(module_name)}

    def __str__(self) -> str:
        """Return one line per call, in order, such as ``v3 = conv(v0, conv.weight)``.

        ``v3`` is the value with index 3; a parameter or buffer has its name.
        """
        lines = [
            f"v{value.index} = {'example input ' if value.source == 'input' else 'unknown '}"
            + (".".join(map(str, value.path)) or str(value.tensor))
            for value in self.values
            if value.source in ("input", "unknown")
        ]
        calls = [
            f"{', '.join(map(self._name, call.outputs))} = {call.module_name or call.name}"
            f"({', '.join(map(self._name, call.inputs))})"
            for call in self.calls
        ]
        width = max(map(len, calls), default=0)
        for call, text in zip(self.calls, calls, strict=True):
            place = f"the forward of {call.owner}" if call.owner else "the model's forward"
            lines.append(f"{text:{width}}  # call {call.index}: {call.name}, in {place}")
        returned = [self._name(value.index) for value in self.values if value.is_output]
        return "\n".join([*lines, f"return {', '.join(returned)}"])

    def _name(self, value: ValueIndex) -> str:
        """Return ``v3`` for value 3; for a parameter or buffer its name."""
        record = self.values[value]
        return str(record.path[0]) if record.source == "state" else f"v{value}"

    def producer(self, value: ValueIndex) -> Call | None:
        """Return the call that produced a value; None for inputs, parameters, buffers and unknown values."""
        index = self.values[value].producer
        return None if index is None else self.calls[index]

    def producers(self, call: Call) -> tuple[Call, ...]:
        """Return the calls whose results a call reads: each once, in order of the call's arguments."""
        found = dict.fromkeys(self.values[value].producer for value in call.inputs)
        return tuple(self.calls[index] for index in found if index is not None)

    def consumers(self, value: ValueIndex) -> tuple[Call, ...]:
        """Return the calls that read a value, in order of execution."""
        return tuple(self.calls[index] for index in self.values[value].consumers)

    def single_consumer(self, value: ValueIndex) -> Call | None:
        """Return the only call that reads a value.

        None if no call or several calls read it, or if the model returns it too.
        """
        record = self.values[value]
        if record.is_output or len(record.consumers) != 1:
            return None
        return self.calls[record.consumers[0]]

    def calls_of(self, module_name: str) -> tuple[Call, ...]:
        """Return every call of one leaf module, in order; empty if it was not called or is no leaf."""
        return self._calls_by_module.get(module_name, ())

    def functions_of(self, owner: str) -> tuple[Call, ...]:
        """Return every call of a function that the forward of the module ``owner`` made, in order; empty if none."""
        return self._functions_by_owner.get(owner, ())

    def frames_of(self, owner: str) -> tuple[Frame, ...]:
        """Return every run of the forward of the module ``owner``, in order; empty if not called, or a leaf."""
        return self._frames_by_owner.get(owner, ())

    def frames_returning(self, value: ValueIndex) -> tuple[Frame, ...]:
        """Return the frames whose result is this value, not a container of it, in the order in which they began."""
        return self._frames_by_output.get(value, ())

    def first_call_in(self, frame: Frame) -> CallIndex | None:
        """Return the index of the first call that a frame or a frame inside of it made; None if there is none."""
        found = (index if kind == "call" else self.first_call_in(self.frames[index]) for kind, index in frame.events)
        return next((index for index in found if index is not None), None)

    def is_within(self, frame: FrameIndex | None, outer: FrameIndex) -> bool:
        """Whether the frame with index ``frame`` is the frame ``outer``, or was opened inside of it at any depth.

        False for None, which stands for no frame.
        """
        while frame is not None and frame != outer:
            frame = self.frames[frame].parent
        return frame == outer

    def is_state(self, value: ValueIndex) -> bool:
        """Whether a value is a parameter or buffer as the run found it, before any write to it."""
        return self.values[value].source == "state"

    @cached_property
    def _calls_by_module(self) -> Mapping[str, tuple[Call, ...]]:
        return _grouped((call.module_name, call) for call in self.calls if call.module_name is not None)

    @cached_property
    def _functions_by_owner(self) -> Mapping[str, tuple[Call, ...]]:
        return _grouped((call.owner, call) for call in self.calls if call.kind == "function")

    @cached_property
    def _frames_by_owner(self) -> Mapping[str, tuple[Frame, ...]]:
        return _grouped((frame.owner, frame) for frame in self.frames)

    @cached_property
    def _frames_by_output(self) -> Mapping[ValueIndex, tuple[Frame, ...]]:
        return _grouped((frame.output.value, frame) for frame in self.frames if isinstance(frame.output, Ref))


def refs_in(structure: Any) -> tuple[ValueIndex, ...]:
    """Return the indices of the values inside recorded arguments, in order, repetitions included.

    ``structure`` holds :class:`Ref` objects in tuples and dicts at any depth: ``(Ref(4), {"mask": Ref(7)}, 2)`` gives
    ``(4, 7)``.
    """
    if isinstance(structure, Ref):
        return (structure.value,)
    if isinstance(structure, dict):
        structure = tuple(structure.values())
    if isinstance(structure, tuple):
        return tuple(value for item in structure for value in refs_in(item))
    return ()


def replace_refs(structure: Any, leaf: Callable[[Ref], Any]) -> Any:
    """Return a copy of recorded arguments with ``leaf(ref)`` in place of each :class:`Ref`, which stands for a tensor.

    Tuples and dicts are searched at any depth. A record holds no other containers: lists are recorded as tuples,
    other mappings and dataclasses as dicts.
    """
    if isinstance(structure, Ref):
        return leaf(structure)
    if isinstance(structure, tuple):
        return tuple(replace_refs(item, leaf) for item in structure)
    if isinstance(structure, dict):
        return {key: replace_refs(item, leaf) for key, item in structure.items()}
    return structure


def _grouped(pairs: Iterable[tuple[Key, Item]]) -> dict[Key, tuple[Item, ...]]:
    """Return the items of ``(key, item)`` pairs by key, in their order."""
    found: dict[Key, list[Item]] = {}
    for key, item in pairs:
        found.setdefault(key, []).append(item)
    return {key: tuple(items) for key, items in found.items()}
