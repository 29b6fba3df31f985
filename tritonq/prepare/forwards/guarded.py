"""A graph that runs only while the module is as it was when the graph was traced.

A trace keeps the whole numbers, flags and texts of the module that its forward reads: how often a loop runs, which
branch is taken. It also leaves out ``*args`` and ``**kwargs`` that were empty. So the forward itself is edited, too
(:mod:`tritonq.prepare.forwards.answered`). It runs in place of the graph once one of these values has changed, or if
such an argument is given.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import fx, nn

from tritonq.nn.call_arguments import names_taken
from tritonq.prepare.forwards.answered import AnsweredForward, answering
from tritonq.prepare.forwards.forward_warnings import tell_once
from tritonq.prepare.forwards.graph import ForwardData, ForwardGraph, Operands
from tritonq.prepare.forwards.graph_data import constant_from_data, constant_to_data

_GONE = object()


class GuardedGraph(ForwardGraph):
    """The forward of one module as a graph, with the forward itself beside it.

    *The forward itself* runs as its author wrote it, and children answer some of its calls. Every edit is made to both.
    If a node has no known place in the source, the forward itself cannot be edited as the graph is, and is dropped:
    once one of the values has changed, the prepared module then raises ValueError.

    Args:
        eval_graph: the graph of eval mode.
        train_graph: the graph of training mode; None if it is the same.

    Attributes:
        values: the values for which the graph was traced, by the paths of attributes, such as ``{"config.depth": 4}``.
        places: by the name of a node, the places in the source (``Call.place``) that made its recorded calls, such as
            ``{"relu": ("net:Net.forward:3.8-3.20#0",)}``.
    """

    def __init__(self, eval_graph: fx.Graph, train_graph: fx.Graph | None = None) -> None:
        super().__init__(eval_graph, train_graph)
        self.values: Mapping[str, Any] = {}
        self.places: dict[str, tuple[str, ...]] = {}
        self._is_guarded = False
        self._forward: AnsweredForward | None = None

    def guard(self, values: Mapping[str, Any], forward: AnsweredForward, calls: Iterable[tuple[str, str]]) -> None:
        """Let the forward itself run once one of the values has changed. Call this before any edit.

        Args:
            values: the values for which the graph was traced, by the paths of attributes.
            forward: the forward itself, not edited yet; later edits change this object.
            calls: ``(name of a node, place)`` of each recorded call that can be answered.
        """
        self.values, self._forward, self._is_guarded = values, forward, True
        for node, place in dict.fromkeys(calls):
            self.places[node] = (*self.places.get(node, ()), place)

    def replace(self, node: str, child: str, operands: Operands, in_place: bool = False, joined: bool = False) -> None:
        """Replace a node in the graph, and its calls in the forward itself, by calls of the child ``child``.

        A node without a known place drops the forward itself; see the class.

        Args:
            node: name of the node in the eval graph.
            child: name of the child.
            operands: returns the child's arguments, given the node.
            in_place: whether the node overwrites its first operand; later readers of that operand in the graph then get
                the child's result, too.
            joined: whether the child computes other calls, too, which were erased. The forward itself then raises
                ValueError for a call whose numbers or flags are not the recorded ones; without ``joined`` it runs such
                a call as written, and the output quantizer of ``child`` rounds the result. Calls are compared only if
                numbers or flags were recorded, and ``operands`` is ``node_operands``, ``first_node`` or
                ``sequence_operand``.
        """
        super().replace(node, child, operands, in_place, joined)
        self._edit_forward(node, lambda forward, place: forward.replace(place, child, operands, in_place, joined))

    def insert_after(self, node: str, child: str, in_place: bool = False) -> None:
        """Pass a node's result through a child, in the graph and in the forward itself.

        All readers of the node then get the child's result. A node without a known place drops the forward itself; see
        the class.

        Args:
            node: name of the node in the eval graph.
            child: name of the child.
            in_place: whether the node overwrites its first operand; later readers of that operand in the graph then get
                the child's result, too.
        """
        super().insert_after(node, child, in_place)
        self._edit_forward(node, lambda forward, place: forward.insert_after(place, child, in_place))

    def erase(self, node: str) -> None:
        """Remove a node from the graphs, and its calls from the forward itself; readers get its first operand.

        A node without a known place drops the forward itself; see the class.
        """
        super().erase(node)
        self._edit_forward(node, lambda forward, place: forward.erase(place))

    def _edit_forward(self, node: str, edit: Callable[[AnsweredForward, str], None]) -> None:
        """Call ``edit(forward, place)`` for the forward itself and each place of a node.

        If the node has no known place, the forward itself is dropped: it could not be edited as the graph is.
        """
        places = self.places.get(node, ())
        if self._forward is not None:
            for place in places:
                edit(self._forward, place)
        self._forward = self._forward if places else None

    def to_data(self) -> ForwardData:
        """Return forward data of the graph; after :meth:`guard` with "values" and "otherwise", too.

        "otherwise" has the edits of the forward itself, as ``AnsweredForward.to_data`` returns them:
        ``{"answers": …, "expected": …}``; None if it was dropped.
        """
        data = super().to_data()
        if self._is_guarded:
            data["values"] = {path: constant_to_data(value) for path, value in self.values.items()}
            data["otherwise"] = None if self._forward is None else self._forward.to_data()
        return data


def guarded(graph: Callable[..., Any], original: Callable[..., Any], data: ForwardData) -> Callable[..., Any]:
    """Return a forward that runs ``graph`` while the module has the values for which it was traced, else ``original``.

    ``original`` also runs for a call with ``*args`` or ``**kwargs`` that were empty when the graph was traced. An
    attribute that the module has no more counts as unchanged. The first time that ``original`` runs for a changed
    value, the module warns (UserWarning).

    Args:
        graph: the function compiled from the graph.
        original: the forward as its author wrote it; calls that are edited are answered when it runs.
        data: what :meth:`GuardedGraph.to_data` returned after :meth:`GuardedGraph.guard`. If its "otherwise" is
            None, ``original`` never runs: the forward then raises ValueError for a changed value, and TypeError for
            such ``*args`` or ``**kwargs``.
    """
    values = [(path, path.split("."), constant_from_data(value)) for path, value in data["values"].items()]
    otherwise = data["otherwise"]
    own = None if otherwise is None else answering(original, otherwise["answers"], otherwise["expected"])

    takes = _named_parameters(original)

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if takes is not None and own is not None and _gives_more(takes, args, kwargs):
            return own(self, *args, **kwargs)
        for path, names, expected in values:
            found = _value(self, names)
            if found is not _GONE and found != expected:
                if own is None:
                    raise ValueError(f"{_changed(self, path, expected, found)}. Prepare the model again")
                tell_once(self, _changed(self, path, expected, found) + _RUNS_ITSELF)
                return own(self, *args, **kwargs)
        return graph(self, *args, **kwargs)

    return forward


_RUNS_ITSELF = ": it runs as its author wrote it, and what prepare_qat did not record runs in float"


def takes_any_arguments(forward: Callable[..., Any]) -> bool:
    """Whether a forward has ``*args`` or ``**kwargs``."""
    return _named_parameters(forward) is not None


def _named_parameters(forward: Callable[..., Any]) -> tuple[int, frozenset[str]] | None:
    """Return ``(count, names)`` for a forward with ``*args`` or ``**kwargs``; None for any other.

    ``count`` is how many arguments it takes by position, the module included; ``names`` are those of the parameters
    that take arguments by name.
    """
    signature = inspect.signature(forward)
    kinds = [parameter.kind for parameter in signature.parameters.values()]
    if inspect.Parameter.VAR_POSITIONAL not in kinds and inspect.Parameter.VAR_KEYWORD not in kinds:
        return None
    by_position = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return sum(kind in by_position for kind in kinds), names_taken(signature)


def _gives_more(takes: tuple[int, frozenset[str]], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether a call gives arguments that end up in ``*args`` or ``**kwargs``.

    ``takes`` is from :func:`_named_parameters`.
    """
    count, names = takes
    return len(args) >= count or any(name not in names for name in kwargs)


def _value(module: Any, names: Iterable[str]) -> Any:
    """Return the attribute of a module at a path of names, such as ``["config", "depth"]``; ``_GONE`` if there is none.

    Quantized modules lack some attributes.
    """
    for name in names:
        module = getattr(module, name, _GONE)
    return module


def _changed(module: nn.Module, path: str, expected: Any, found: Any) -> str:
    """Return the text that an attribute of the module has another value than when the model was prepared."""
    return (
        f"the forward of {type(module).__name__} reads {path}, which was {expected!r} when the model was prepared and "
        f"is {found!r} now"
    )


def check_values(data: Any) -> None:
    """Check that data are the "values" of :meth:`GuardedGraph.to_data`: constants by the paths of attributes.

    A path is a text of attribute names, joined by dots, such as ``"config.depth"``. A constant is what
    :func:`constant_to_data` writes: ``4``, or ``{"tuple": [1, None]}`` for ``(1, None)``.

    Raises:
        ValueError: the data are no mapping, a path is no such text or has a name that begins with two underscores, or
            :func:`constant_from_data` refuses a constant.
    """
    if not isinstance(data, Mapping):
        raise ValueError(f"values that a forward reads must be a mapping of paths, got {type(data).__qualname__}")
    for path, value in data.items():
        if not isinstance(path, str) or not all(
            name.isidentifier() and not name.startswith("__") for name in path.split(".")
        ):
            raise ValueError(f"not the path of an attribute: {path!r}")
        constant_from_data(value)
