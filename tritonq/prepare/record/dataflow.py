"""The record of one run of a model: its calls, and the values between them.

A leaf module's call and a torch function called outside any leaf are one :class:`Call` each; a module called twice has
two calls. The record holds plain descriptions only. :func:`tritonq.prepare.record.recorder.record` makes it.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal, TypeVar

import torch
from torch import nn

from tritonq.prepare.record.place import Use
from tritonq.prepare.record.structure import Path

Key = TypeVar("Key", bound=Hashable)
Item = TypeVar("Item")
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
        run: as in :class:`Call`.
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
    run: int = 0

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
        place: for a function where the source calls it, and how often that place had called one in the same frame:
            ``"module:function:position#occurrence"``.
        use: what becomes of the result of a function that writes to its operand.
        run: the run that made it: 0, or 1 for the second of two that :meth:`Dataflow.joined` put together.
        transformed: whether it was made inside of `torch.vmap`, `torch.func.grad` or the like.
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
    place: str = ""
    use: Use = "used"
    run: int = 0
    transformed: bool = False


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
        training: the mode that the module was in.
        run: as in :class:`Call`.
    """

    index: int
    owner: str
    parent: int | None
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    output: Any
    events: tuple[tuple[Literal["call", "frame"], int], ...]
    training: bool = False
    run: int = 0


@dataclass(frozen=True)
class Dataflow:
    """The record of one run, or of two that were put together.

    Attributes:
        calls: all calls, in order of execution.
        values: all values, in the order in which they were made.
        frames: all runs of forwards, in order of their beginning.
        runs: how many runs it holds.
    """

    calls: tuple[Call, ...]
    values: tuple[Value, ...]
    frames: tuple[Frame, ...]
    runs: int = 1

    def joined(self, other: Dataflow) -> Dataflow:
        """Return the record of this run and of another run of the same model, as though it were called twice.

        What holds for every call of a module, or for every reader of its result, then holds in both runs.
        """
        calls, values, frames = len(self.calls), len(self.values), len(self.frames)
        tensors = 1 + max((value.tensor for value in self.values), default=-1)

        def shifted(item: Any) -> Any:
            if isinstance(item, Ref):
                return Ref(item.value + values)
            if isinstance(item, tuple):
                return tuple(map(shifted, item))
            return {key: shifted(child) for key, child in item.items()} if isinstance(item, dict) else item

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

    def runs_of(self, module_name: str) -> set[int]:
        """Return the runs that called a module, as a leaf or not."""
        return {call.run for call in self.calls_of(module_name)} | {frame.run for frame in self.frames_of(module_name)}

    def __str__(self) -> str:
        """Return one line per call, in order; ``v3`` is value 3, a parameter or buffer its name."""
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

    def _name(self, value: int) -> str:
        record = self.values[value]
        return str(record.path[0]) if record.source == "state" else f"v{value}"

    def producer(self, value: int) -> Call | None:
        """Return the call that produced a value; None for inputs, state and unknown values."""
        index = self.values[value].producer
        return None if index is None else self.calls[index]

    def producers(self, call: Call) -> tuple[Call, ...]:
        """Return the calls whose results a call reads, without repetition, in order of its arguments."""
        found = dict.fromkeys(self.values[value].producer for value in call.inputs)
        return tuple(self.calls[index] for index in found if index is not None)

    def consumers(self, value: int) -> tuple[Call, ...]:
        """Return the calls that read a value."""
        return tuple(self.calls[index] for index in self.values[value].consumers)

    def single_consumer(self, value: int) -> Call | None:
        """Return the only call that reads a value, or None: several, none, or the model returns it too."""
        record = self.values[value]
        if record.is_output or len(record.consumers) != 1:
            return None
        return self.calls[record.consumers[0]]

    def calls_of(self, module_name: str) -> tuple[Call, ...]:
        """Return every call of one leaf module."""
        return self._calls_by_module.get(module_name, ())

    def functions_of(self, owner: str) -> tuple[Call, ...]:
        """Return every call of a function in the forward of one module."""
        return self._functions_by_owner.get(owner, ())

    def frames_of(self, owner: str) -> tuple[Frame, ...]:
        """Return every run of one module that is not a leaf."""
        return self._frames_by_owner.get(owner, ())

    def frames_returning(self, value: int) -> tuple[Frame, ...]:
        """Return the frames whose result is this one value, in order of their beginning."""
        return self._frames_by_output.get(value, ())

    def first_call_in(self, frame: Frame) -> int | None:
        """Return the index of the first call that a frame, or one inside of it, made; None if it made none."""
        found = (index if kind == "call" else self.first_call_in(self.frames[index]) for kind, index in frame.events)
        return next((index for index in found if index is not None), None)

    def is_within(self, frame: int | None, outer: int) -> bool:
        """Whether a frame is ``outer`` or was opened, at any depth, inside of it."""
        while frame is not None and frame != outer:
            frame = self.frames[frame].parent
        return frame == outer

    def is_state(self, value: int) -> bool:
        """Whether the value is a parameter or buffer."""
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
    def _frames_by_output(self) -> Mapping[int, tuple[Frame, ...]]:
        return _grouped((frame.output.value, frame) for frame in self.frames if isinstance(frame.output, Ref))


def refs_in(structure: Any) -> tuple[int, ...]:
    """Return the values inside recorded arguments, in order."""
    if isinstance(structure, Ref):
        return (structure.value,)
    if isinstance(structure, dict):
        structure = tuple(structure.values())
    if isinstance(structure, tuple):
        return tuple(value for item in structure for value in refs_in(item))
    return ()


def _grouped(pairs: Iterable[tuple[Key, Item]]) -> dict[Key, tuple[Item, ...]]:
    found: dict[Key, list[Item]] = {}
    for key, item in pairs:
        found.setdefault(key, []).append(item)
    return {key: tuple(items) for key, items in found.items()}
