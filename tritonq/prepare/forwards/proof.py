"""Prove that a traced forward does what the module did: each recorded call must have its node in the graph."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

from torch import fx, nn

from tritonq.prepare.forwards.trace import TraceError, bind_frame
from tritonq.prepare.record.dataflow import Call, CallIndex, Dataflow, Frame, Ref, RunIndex, ValueIndex, refs_in
from tritonq.prepare.record.operations import operation_name, plain_name


@dataclass(frozen=True)
class Site:
    """The node of a graph, or the place in a forward, that makes a recorded call.

    Attributes:
        node: name of the node in the eval graph (from :func:`match_frame` in the graph that it was given); for a
            forward without a graph ``Call.place`` of the call, such as ``"models.net:Net.forward:3.8-3.20#0"``.
        in_place: whether the node overwrites an operand; False for ``+=``, of which a trace makes ``+``, and for a
            forward without a graph.
        label: what a child that is added for the call is named after, such as "add"; "" if not set.
    """

    node: str
    in_place: bool
    label: str = ""


@dataclass(frozen=True)
class Recorded:
    """A record together with the model that was recorded.

    Attributes:
        flow: the record.
        modules: the model's modules by qualified name.
        state: for each parameter or buffer that a run read the :class:`Ref` of its value, by ``(run, id(tensor))``.
    """

    flow: Dataflow
    modules: Mapping[str, nn.Module]
    state: Mapping[tuple[RunIndex, int], Ref]

    @classmethod
    def of(cls, model: nn.Module, flow: Dataflow) -> Recorded:
        """Return the record ``flow`` together with ``model``, which must be the object that was recorded."""
        tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        held = [value for value in flow.values if value.source == "state"]
        state = {(value.run, id(tensors[str(value.path[0])])): Ref(value.index) for value in held}
        return cls(flow, dict(model.named_modules()), state)


def match_frame(graph: fx.Graph, recorded: Recorded, frame: Frame) -> Mapping[CallIndex, Site]:
    """Find the node that makes each call of one recorded frame; return its :class:`Site` by the index of the call.

    The graph is followed with recorded values in place of tensors; nothing is computed. Each call must agree with the
    recorded one in its operation and its operands. A child that was recorded as one call, such as a layer, has a site;
    calls that were made within the recorded forward of a child have none.

    Args:
        graph: the traced forward, in the mode of the frame.
        recorded: the record and its model.
        frame: one recorded run of the forward.

    Raises:
        TraceError: the graph doesn't make the recorded calls or returns other tensors, or the forward changes its
            argument in place and doesn't return it.
    """
    return _Follower(graph, recorded, frame).sites()


class _NoTensor:
    """Stand for the result of a node that made no recorded call: a size, a flag, a number."""


class _Follower:
    """Run a graph on recorded values, and match its nodes with the events of a frame one by one."""

    def __init__(self, graph: fx.Graph, recorded: Recorded, frame: Frame) -> None:
        self._graph, self._flow, self._frame = graph, recorded.flow, frame
        self._recorded = recorded
        self._owner = recorded.modules[frame.owner]
        self._events = list(frame.events)
        self._results: dict[fx.Node, Any] = {}
        # What in-place changes made of a value, in the order of the graph.
        self._successors: dict[ValueIndex, ValueIndex] = {}
        self._sites: dict[CallIndex, Site] = {}

    def sites(self) -> Mapping[CallIndex, Site]:
        """Match the nodes of the graph with the frame's events (its calls and its children's frames); call it once.

        Returns:
            For each call of the frame, by its index in the record, the :class:`Site` with its node.

        Raises:
            TraceError: as :func:`match_frame` does.
        """
        arguments = bind_frame(inspect.signature(self._owner.forward), self._frame)
        for node in self._graph.nodes:
            if node.op == "placeholder":
                self._results[node] = arguments.get(str(node.target).lstrip("*"))
            elif node.op == "get_attr":
                tensor = attrgetter(str(node.target))(self._owner)
                self._results[node] = self._recorded.state.get((self._frame.run, id(tensor)), _NoTensor())
            elif node.op == "call_module":
                self._results[node] = self._module(node)
            elif node.op == "output":
                self._output(node)
            else:
                self._results[node] = self._function(node)
        return self._sites

    def _module(self, node: fx.Node) -> Any:
        """Match a node that calls a child with the next recorded event; return the recorded result.

        Raises:
            TraceError: the event is another one, or read other tensors.
        """
        child = self._owner.get_submodule(str(node.target))
        if not self._events:
            raise TraceError(f"its trace calls {node.target}, which it did not")
        kind, index = self._events.pop(0)
        record = self._flow.calls[index] if kind == "call" else self._flow.frames[index]
        name = record.module_name if isinstance(record, Call) else record.owner
        if name is None or self._recorded.modules[name] is not child:
            raise TraceError(f"its trace calls {node.target} where it did something else")
        if sorted(self._read(node)) != sorted(refs_in((*record.args, *record.kwargs.values()))):
            raise TraceError(f"its trace calls {node.target} on other tensors than it did")
        if isinstance(record, Call):
            self._sites[record.index] = Site(node.name, bool(record.writes))
        for call in self._calls_within(kind, index):
            self._successors.update(call.writes)
        return record.output

    def _function(self, node: fx.Node) -> Any:
        """Match a node that calls a function with the next recorded call; return the recorded result."""
        call = self._next_function()
        if call is None or call.name != self._name(node):
            return self._python(node)
        if sorted(self._read(node)) != sorted(refs_in((*call.args, *call.kwargs.values()))):
            return self._python(node)
        return self._matched(node, call)

    def _matched(self, node: fx.Node, call: Call) -> Any:
        """Note that a node made a recorded call; return the recorded result."""
        self._events.pop(0)
        # A trace turns += into +, which leaves the old tensor as it was; whoever reads that afterwards won't match.
        is_copy = getattr(node.target, "__module__", None) == "_operator"
        if is_copy:
            self._check_argument_returned(call)
        else:
            self._successors.update(call.writes)
        self._sites[call.index] = Site(node.name, bool(call.writes) and not is_copy)
        return call.output

    def _check_argument_returned(self, call: Call) -> None:
        """Raise TraceError if the forward changes its argument in place and does not return it.

        If it returns it, its caller goes on with the result, as it does with a result that was not written in place.
        """
        given = set(refs_in((*self._frame.args, *self._frame.kwargs.values())))
        returned = set(refs_in(self._frame.output))
        for before, after in call.writes:
            if before in given and after not in returned:
                raise TraceError("it changes its argument in place and doesn't return it")

    def _python(self, node: fx.Node) -> Any:
        """Return what a node without a recorded call reads from a container; for any other such node a _NoTensor."""
        if node.target is getattr or self._name(node) == "getitem":
            container, key = (self._resolve(argument) for argument in node.args[:2])
            if isinstance(container, Mapping) and isinstance(key, str) and key in container:
                return container[key]
            if isinstance(container, Mapping) and isinstance(key, int) and node.target is not getattr:
                container = tuple(container.values())
            if isinstance(container, tuple) and isinstance(key, (int, slice)):
                return container[key]
        return _NoTensor()

    def _output(self, node: fx.Node) -> None:
        """Raise TraceError if a recorded call is left over, or if the graph returns other tensors than recorded."""
        if self._events:
            raise TraceError("its trace leaves out calls that it made")
        if self._read(node) != refs_in(self._frame.output):
            raise TraceError("its trace returns other tensors than it did")

    def _next_function(self) -> Call | None:
        """Return the next recorded event if it is the call of a function, else None."""
        if self._events and self._events[0][0] == "call":
            call = self._flow.calls[self._events[0][1]]
            return call if call.kind == "function" else None
        return None

    def _name(self, node: fx.Node) -> str:
        if node.op == "call_method":
            return plain_name(str(node.target))
        if node.target is getattr:
            return str(node.args[1])
        return operation_name(node.target) if callable(node.target) else ""

    def _read(self, node: fx.Node) -> tuple[ValueIndex, ...]:
        """Return the indices of the values that a node reads, after all in-place changes before it."""
        refs = refs_in(tuple(self._resolve(argument) for argument in (*node.args, *node.kwargs.values())))
        return tuple(self._latest(value) for value in refs)

    def _resolve(self, argument: Any) -> Any:
        """Return an argument of a node with recorded values in place of nodes."""
        if isinstance(argument, fx.Node):
            return self._results[argument]
        if isinstance(argument, (tuple, list)):
            return tuple(self._resolve(item) for item in argument)
        if isinstance(argument, dict):
            return {key: self._resolve(item) for key, item in argument.items()}
        return argument

    def _latest(self, value: ValueIndex) -> ValueIndex:
        """Return the value that in-place changes have made of a value so far."""
        while value in self._successors:
            value = self._successors[value]
        return value

    def _calls_within(self, kind: str, index: int) -> list[Call]:
        """Return the recorded calls of an event: one call, or all calls of a frame."""
        if kind == "call":
            return [self._flow.calls[index]]
        return [call for event in self._flow.frames[index].events for call in self._calls_within(*event)]
