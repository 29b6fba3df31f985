"""A graph that runs for as long as what its trace read of the module is what it was.

A trace fixes whole numbers, flags and texts of a module that its forward reads: how often a loop runs, which branch is
taken. It also leaves out ``*args`` and ``**kwargs`` that were empty. Beside the graph the forward itself is edited: it
runs, with its recorded calls answered, where one of these values has changed or such an argument is given.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import fx, nn

from tritonq.prepare.forwards.answered import AnsweredForward, answering
from tritonq.prepare.forwards.forward_warnings import tell_once
from tritonq.prepare.forwards.graph import ForwardData, ForwardGraph, Operands
from tritonq.prepare.forwards.graph_data import constant_from_data, constant_to_data

_GONE = object()


class GuardedGraph(ForwardGraph):
    """The forward of one module as a graph, and beside it the forward itself, open for the same edits.

    Attributes:
        values: what the graph was made for, by the paths of attributes of the module.
        places: the places in the source that made the calls of each node.
    """

    def __init__(self, eval_graph: fx.Graph, train_graph: fx.Graph | None = None) -> None:
        super().__init__(eval_graph, train_graph)
        self.values: Mapping[str, Any] = {}
        self.places: dict[str, tuple[str, ...]] = {}
        self._is_guarded = False
        self._forward: AnsweredForward | None = None

    def guard(self, values: Mapping[str, Any], forward: AnsweredForward, calls: Iterable[tuple[str, str]]) -> None:
        """Run the forward itself once one of the values has changed.

        Args:
            values: what the graph was made for, by the paths of attributes of the module.
            forward: the forward itself.
            calls: the node and the place of each recorded call that can be answered.
        """
        self.values, self._forward, self._is_guarded = values, forward, True
        for node, place in dict.fromkeys(calls):
            self.places[node] = (*self.places.get(node, ()), place)

    def replace(self, node: str, child: str, operands: Operands, in_place: bool = False, joined: bool = False) -> None:
        """See base class."""
        super().replace(node, child, operands, in_place, joined)
        self._also(node, lambda forward, place: forward.replace(place, child, operands, in_place, joined))

    def insert_after(self, node: str, child: str, in_place: bool = False) -> None:
        """See base class."""
        super().insert_after(node, child, in_place)
        self._also(node, lambda forward, place: forward.insert_after(place, child, in_place))

    def erase(self, node: str) -> None:
        """See base class."""
        super().erase(node)
        self._also(node, lambda forward, place: forward.erase(place))

    def _also(self, node: str, edit: Callable[[AnsweredForward, str], None]) -> None:
        """Edit the forward itself; one that can't be edited there will not run."""
        places = self.places.get(node, ())
        if self._forward is not None:
            for place in places:
                edit(self._forward, place)
        self._forward = self._forward if places else None

    def to_data(self) -> ForwardData:
        """See base class."""
        data = super().to_data()
        if self._is_guarded:
            data["values"] = {path: constant_to_data(value) for path, value in self.values.items()}
            data["otherwise"] = None if self._forward is None else self._forward.to_data()
        return data


def guarded(graph: Callable[..., Any], original: Callable[..., Any], data: ForwardData) -> Callable[..., Any]:
    """Return a forward that runs ``graph`` while the module is as the graph was made for, and ``original`` otherwise.

    Args:
        graph: the forward of the graph.
        original: the forward as its author wrote it.
        data: what :meth:`GuardedGraph.to_data` made.
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
    """Return how many arguments a forward takes by position, self among them, and their names; None: no others."""
    parameters = inspect.signature(forward).parameters
    kinds = [parameter.kind for parameter in parameters.values()]
    if inspect.Parameter.VAR_POSITIONAL not in kinds and inspect.Parameter.VAR_KEYWORD not in kinds:
        return None
    by_position = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return sum(kind in by_position for kind in kinds), frozenset(parameters)


def _gives_more(takes: tuple[int, frozenset[str]], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    count, names = takes
    return len(args) >= count or any(name not in names for name in kwargs)


def _value(module: Any, names: Iterable[str]) -> Any:
    """Return the attribute at a path of names, or ``_GONE``, which counts as unchanged: quantized modules lack some."""
    for name in names:
        module = getattr(module, name, _GONE)
    return module


def _changed(module: nn.Module, path: str, expected: Any, found: Any) -> str:
    return (
        f"the forward of {type(module).__name__} reads {path}, which was {expected!r} when the model was prepared and "
        f"is {found!r} now"
    )


def check_values(data: Any) -> None:
    """Raise unless these are values by the paths of attributes, as :meth:`GuardedGraph.to_data` makes them.

    Raises:
        ValueError: anything else.
    """
    if not isinstance(data, Mapping):
        raise ValueError(f"values that a forward reads must be a mapping of paths, got {type(data).__qualname__}")
    for path, value in data.items():
        if not isinstance(path, str) or not all(
            name.isidentifier() and not name.startswith("__") for name in path.split(".")
        ):
            raise ValueError(f"not the path of an attribute: {path!r}")
        constant_from_data(value)
