"""Record one run of a model by hooks on its modules and a torch function mode.

Tensors are followed by the identity of their objects, which works in forwards that no tracer can follow. A *leaf* is a
module whose call is one operation. Calls in it, and calls that read no elements and return no tensor, are left out.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from types import FrameType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.jit import ScriptModule
from torch.overrides import TorchFunctionMode

from tritonq.prepare.record.dataflow import Call, Dataflow, Frame, Ref, Source, Value, ValueIndex
from tritonq.prepare.record.magnitudes import dwarfing_value
from tritonq.prepare.record.operations import METADATA, has_own_weight, in_transform, is_leaf, operation_name
from tritonq.prepare.record.place import is_call_of, place_in_forward, use_of_result
from tritonq.prepare.record.scripted import listening_to_scripted
from tritonq.prepare.record.snapshot import ModelSnapshot, preserved_random_state, tensor_storage, tensor_version
from tritonq.prepare.record.structure import (
    Path,
    clone_tensors,
    describe,
    replace_tensors,
    shares_tensor,
    tensors_in,
    unique_tensors,
)

SEED = 0  # runs that are compared draw the same random numbers


def record(model: nn.Module, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None) -> Dataflow:
    """Run ``model(*args, **kwargs)`` once in eval mode without gradients and return the record of the run.

    Modes, buffers, attributes, hooks, random state and inputs are afterwards what they were, also after an error.

    Raises:
        ValueError: the model has lazy parameters, whose shapes a first run would decide.
        Exception: whatever the model raises on these inputs.
    """
    return Recorder(model).run(args, dict(kwargs or {}))


@dataclass
class _Tracked:
    """A live tensor: its number, its current value and its version. It is kept, so that no other tensor gets its id."""

    tensor: Tensor
    index: int
    value: ValueIndex
    version: int

    @property
    def geometry(self) -> tuple[Any, ...]:
        tensor = self.tensor
        strides = tensor.stride() if tensor.layout == torch.strided else ()
        return (tensor.shape, strides, tensor.storage_offset() if strides else 0, tensor.dtype)


@dataclass
class _OpenFrame:
    index: int
    module: nn.Module | None
    owner: str
    parent: int | None
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    inputs: list[Tensor]
    events: list[tuple[Literal["call", "frame"], int]] = field(default_factory=list)
    functions: int = 0
    places: dict[str, int] = field(default_factory=dict)  # how often each place in the source called a function
    leaf: bool = False  # whether this stands for a leaf: nothing inside is recorded


@dataclass
class _OpenValue:
    source: Source
    producer: int | None
    path: Path
    tensor: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    consumers: dict[int, None] = field(default_factory=dict)
    output_paths: list[Path] = field(default_factory=list)


class Recorder:
    """Record one run of one model, without gradients. :meth:`run`, called once, leaves the model as it was.

    Args:
        model: the model.
        modes: for every module, the model itself too, whether it runs in training mode; None: all run in eval mode.
        passing: names (``"layer1.0"``) of modules that returned their input in another run: recorded as leaves.

    Attributes:
        result: what the model returned; None before :meth:`run`, and if it failed.

    Raises:
        ValueError: the model has lazy parameters, whose shapes a first run would decide.
    """

    def __init__(
        self, model: nn.Module, modes: Mapping[nn.Module, bool] | None = None, passing: Container[str] = ()
    ) -> None:
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if nn.parameter.is_lazy(tensor):
                raise ValueError(f"{name} has no shape before a first forward; run the model once, then prepare it")
        self.model = model
        self.result: Any = None
        self._names = {module: name for name, module in model.named_modules()}
        self._state = {id(t): name for name, t in [*model.named_parameters(), *model.named_buffers()]}
        self._tracked: dict[int, _Tracked] = {}
        self._by_storage: dict[int, list[_Tracked]] = {}
        self._values: list[_OpenValue] = []
        self._calls: list[Call] = []
        self._frames: dict[int, Frame] = {}
        self._stack: list[_OpenFrame] = []
        self._module_calls: dict[nn.Module, int] = {}
        self._paused = False
        self._modes = dict.fromkeys(self._names, False) if modes is None else dict(modes)
        self._passing = passing

    def running(self) -> list[nn.Module]:
        """Return the modules whose forwards were not over when :meth:`run` failed, innermost first; else ``[]``."""
        return [frame.module for frame in reversed(self._stack) if frame.module is not None]

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Dataflow:
        """Run the model with clones of tensors and fixed seeds; return the record. What the model raises is raised."""
        snapshot = ModelSnapshot(self.model)
        handles = []
        try:
            with preserved_random_state(self.model, SEED), torch.no_grad():
                args, kwargs = clone_tensors(args, kwargs)
                for path, tensor in [*tensors_in(args), *tensors_in(kwargs)]:
                    self._track(tensor, "input", path=path)
                for module in self._names:
                    module.training = self._modes[module]
                    if isinstance(module, ScriptModule):
                        continue  # takes no hooks of its own
                    # Innermost: what users' own hooks compute belongs to the caller, unless it is a weight.
                    first = not has_own_weight(module)
                    handles.append(module.register_forward_pre_hook(self._enter, prepend=first, with_kwargs=True))
                    handles.append(module.register_forward_hook(self._leave, with_kwargs=True, prepend=True))
                if is_leaf(self.model):
                    self._push(None, "", args, kwargs)
                with _FunctionRecorder(self), listening_to_scripted(self._names, self._leave_scripted):
                    self.result = self.model(*args, **kwargs)
                if self._stack:
                    self._close(self._stack.pop(), self.result)
                for path, tensor in tensors_in(self.result):
                    self._values[self._value_of(tensor)].output_paths.append(path)
        finally:
            for handle in handles:
                handle.remove()
            snapshot.restore()
            self._tracked.clear()
            self._by_storage.clear()
        values = tuple(
            Value(
                i, v.source, v.producer, v.path, v.tensor, v.shape, v.dtype, tuple(v.consumers), tuple(v.output_paths)
            )
            for i, v in enumerate(self._values)
        )
        return Dataflow(tuple(self._calls), values, tuple(self._frames[i] for i in sorted(self._frames)))

    def call_function(
        self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], caller: FrameType
    ) -> Any:
        """Call a function; note it and its place in ``caller``, if not left out; return its result, inputs as views."""
        if self._paused or not self._stack or self._stack[-1].leaf:
            return function(*args, **kwargs)
        frame = self._stack[-1]
        place = place_in_forward(caller, partial(is_call_of, frame.module))
        occurrence = frame.places[place] = frame.places.get(place, -1) + 1
        name = operation_name(function)
        inputs = unique_tensors((args, kwargs))
        described = {"args": self._describe(args), "kwargs": self._describe(kwargs)}
        values = [self._value_of(tensor) for tensor in inputs]
        dwarfing = dwarfing_value(name, inputs, values)
        versions = list(map(tensor_version, inputs))
        result = function(*args, **kwargs)
        if (not inputs or name in METADATA) and next(tensors_in(result), None) is None:
            return result
        call = Call(
            index=len(self._calls),
            kind="function",
            name=name,
            module_name=None,
            target=function,
            frame=frame.index,
            owner=frame.owner,
            ordinal=frame.functions,
            **described,
            output=None,
            inputs=tuple(values),
            outputs=(),
            place=f"{place}#{occurrence}" if place else "",
            use=use_of_result(caller) if versions != list(map(tensor_version, inputs)) else "used",
            dwarfing=dwarfing,
        )
        frame.functions += 1
        return self._finish(call, inputs, result)

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._stack and self._stack[-1].leaf:
            return
        with self._unrecorded():
            self._push(module, self._names[module], args, kwargs)

    def _leave(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> Any:
        with self._unrecorded():
            return self._pop(module, result)

    def _leave_scripted(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> Any:
        """Record a call of a torch.jit module as one operation, in a forward hook; return its result."""
        if not isinstance(module, ScriptModule) or module not in self._names:
            return result
        self._enter(module, args, kwargs)
        return self._leave(module, args, kwargs, result)

    @contextmanager
    def _unrecorded(self) -> Iterator[None]:
        """Keep torch functions that the recorder itself calls, inside of the block, out of the record."""
        self._paused = True
        try:
            yield
        finally:
            self._paused = False

    def _pop(self, module: nn.Module, result: Any) -> Any:
        if not self._stack or all(frame.module is not module for frame in self._stack):
            return result
        if self._stack[-1].leaf and self._stack[-1].module is not module:
            return result
        # A forward that raised and was caught by its caller left its frame behind.
        while self._stack[-1].module is not module:
            self._close(self._stack.pop(), None)
        frame = self._stack.pop()
        # One that returned its input and called nothing (stochastic depth in eval mode) counts as one operation too:
        # what it does in other circumstances can't be seen from here.
        if frame.leaf or (not frame.events and shares_tensor(frame.inputs, result)):
            return self._finish_module(frame, module, result)
        self._close(frame, result)
        return result

    def _push(self, module: nn.Module | None, owner: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        leaf = module is not None and ((is_leaf(module) and self._holds_state(module)) or owner in self._passing)
        parent = self._stack[-1] if self._stack else None
        index = len(self._frames) + sum(not frame.leaf for frame in self._stack)
        inputs = unique_tensors((args, kwargs))
        described = self._describe(args), self._describe(kwargs)
        self._stack.append(
            _OpenFrame(index, module, owner, None if parent is None else parent.index, *described, inputs, leaf=leaf)
        )

    def _holds_state(self, module: nn.Module) -> bool:
        """Whether a module's parameters are the model's own: ``torch.func.functional_call`` puts others there."""
        return all(tensor is None or id(tensor) in self._state for tensor in module._parameters.values())

    def _close(self, frame: _OpenFrame, result: Any) -> None:
        self._frames[frame.index] = Frame(
            frame.index,
            frame.owner,
            frame.parent,
            frame.args,
            frame.kwargs,
            self._describe(result),
            tuple(frame.events),
            frame.module is not None and self._modes[frame.module],
        )
        if self._stack:
            self._stack[-1].events.append(("frame", frame.index))

    def _finish_module(self, frame: _OpenFrame, module: nn.Module, result: Any) -> Any:
        parent = self._stack[-1] if self._stack else frame
        times = self._module_calls.get(module, 0)
        self._module_calls[module] = times + 1
        call = Call(
            index=len(self._calls),
            kind="module",
            name=type(module).__name__,
            module_name=frame.owner,
            target=module,
            frame=parent.index,
            owner=parent.owner,
            ordinal=times,
            args=frame.args,
            kwargs=frame.kwargs,
            output=None,
            inputs=tuple(self._value_of(tensor, before_writes=True) for tensor in frame.inputs),
            outputs=(),
        )
        return self._finish(call, frame.inputs, result)

    def _finish(self, call: Call, inputs: list[Tensor], result: Any) -> Any:
        """Record a call with the values that it read and made; return its result, with views for returned inputs."""
        for value in call.inputs:
            self._values[value].consumers[call.index] = None
        writes = self._note_writes(call, inputs)
        outputs = list(dict.fromkeys(after for _, after in writes))
        written = set(outputs)

        def fresh(tensor: Tensor) -> Tensor:
            known = self._tracked.get(id(tensor))
            if known is not None and known.value in written:
                return tensor
            if known is not None or id(tensor) in self._state:
                # The same object came out: an alias tells apart what flows on from what went in.
                tensor = tensor.view_as(tensor)
            outputs.append(self._track(tensor, "call", producer=call.index).value)
            return tensor

        result = replace_tensors(result, fresh)
        for _, tensor in tensors_in(result):  # inside containers that can't be rebuilt
            known = self._tracked.get(id(tensor))
            if known is None or known.value not in outputs:
                outputs.append(self._track(tensor, "call", producer=call.index).value)
        made = {"output": self._describe(result), "outputs": tuple(outputs), "writes": tuple(writes)}
        self._calls.append(replace(call, **made, transformed=in_transform()))
        if self._stack:
            self._stack[-1].events.append(("call", call.index))
        return result

    def _note_writes(self, call: Call, inputs: list[Tensor]) -> list[tuple[int, int]]:
        """Give each tensor that the call wrote to a new value; return pairs ``(value before, value after)``."""
        writes: list[tuple[int, int]] = []
        for tensor in inputs:
            known = self._tracked[id(tensor)]
            if known.version == tensor_version(tensor):
                continue
            # Tensors that see the same elements share the new value; other views get one of their own.
            by_geometry: dict[tuple[Any, ...], int] = {}
            for alias in [known, *self._by_storage[tensor_storage(tensor)]]:
                if alias.version == tensor_version(alias.tensor):
                    continue
                alias.version = tensor_version(alias.tensor)
                shared = by_geometry.get(alias.geometry)
                if shared is None:
                    shared = self._new_value(alias.tensor, alias.index, "call", call.index, ())
                    by_geometry[alias.geometry] = shared
                writes.append((alias.value, shared))
                alias.value = shared
        return writes

    def _track(self, tensor: Tensor, source: Source, producer: int | None = None, path: Path = ()) -> _Tracked:
        known = self._tracked.get(id(tensor))
        if known is not None and source == "input":
            return known  # the same tensor passed twice
        index = len(self._tracked) if known is None else known.index
        value = self._new_value(tensor, index, source, producer, path)
        tracked = _Tracked(tensor, index, value, tensor_version(tensor))
        if known is None:
            self._by_storage.setdefault(tensor_storage(tensor), []).append(tracked)
            self._tracked[id(tensor)] = tracked
        else:
            known.value, known.version = value, tracked.version
        return self._tracked[id(tensor)]

    def _new_value(self, tensor: Tensor, index: int, source: Source, producer: int | None, path: Path) -> int:
        self._values.append(_OpenValue(source, producer, path, index, tuple(tensor.shape), tensor.dtype))
        return len(self._values) - 1

    def _value_of(self, tensor: Tensor, before_writes: bool = False) -> int:
        known = self._tracked.get(id(tensor))
        if known is None:
            name = self._state.get(id(tensor))
            if name is not None:
                return self._track(tensor, "state", path=(name,)).value
            return self._track(tensor, "unknown").value
        if known.version != tensor_version(tensor) and not before_writes:
            # Written to by code that torch functions can't see.
            return self._track(tensor, "unknown").value
        return known.value

    def _describe(self, item: Any) -> Any:
        return describe(item, lambda tensor: Ref(self._value_of(tensor)))


class _FunctionRecorder(TorchFunctionMode):
    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self._recorder = recorder

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        return self._recorder.call_function(func, args, kwargs or {}, sys._getframe(1))
