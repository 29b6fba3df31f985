"""Editing the forward of one module, and giving a module an edited forward.

The forward becomes a torch.fx graph with the module's children as single calls: one graph, or one per mode where train
and eval differ. Edits insert calls of new children. The result is plain data, from which the forward is compiled when
it is put on a module; the module keeps its class (as a subclass of it), attributes, hooks and signature.
"""

from __future__ import annotations

import copyreg
import inspect
import itertools
import json
import linecache
from collections import OrderedDict
from collections.abc import Callable, Iterable
from types import FunctionType
from typing import Any
from weakref import WeakValueDictionary

from torch import fx, nn

from tritonq.prepare.dataflow import Frame
from tritonq.prepare.graph_data import GraphData, data_to_graph, graph_to_data
from tritonq.prepare.trace import TraceError, classify_arguments, forward_signature, trace

DATA_VERSION = 1
ForwardData = dict[str, Any]
Operands = Callable[[fx.Node], tuple[Any, ...]]


class ForwardGraph:
    """The forward of one module, open for edits. Nodes are named as in the eval graph.

    Attributes:
        eval_graph: what runs in eval mode.
    """

    def __init__(self, eval_graph: fx.Graph, train_graph: fx.Graph | None = None) -> None:
        self.eval_graph = eval_graph
        self._train_graph = train_graph
        self._train_nodes = {} if train_graph is None else _correspondence(eval_graph, train_graph)

    @classmethod
    def trace(cls, module: nn.Module, frames: Iterable[Frame]) -> ForwardGraph:
        """The forward of ``module`` as it was called in the recorded ``frames``.

        Raises:
            TraceError: no graph can stand for it; the message says why.
        """
        arguments = classify_arguments(forward_signature(module), frames)
        in_eval, in_train = trace(module, arguments, training=False), trace(module, arguments, training=True)
        try:
            same = graph_to_data(in_eval) == graph_to_data(in_train)
            graph = cls(in_eval, None if same else in_train)
            for copied in graph._graphs():
                _compile(copied, type(module).__name__)
        except (ValueError, SyntaxError) as error:
            raise TraceError(str(error)) from error
        return graph

    @classmethod
    def from_data(cls, data: ForwardData) -> ForwardGraph:
        """The graph that :meth:`to_data` described.

        Raises:
            ValueError: data of another version, or that doesn't describe a forward.
        """
        version = data.get("version") if isinstance(data, dict) else None
        if version != DATA_VERSION:
            raise ValueError(f"expected forward data of version {DATA_VERSION}, got {version!r}")
        train = data.get("train")
        return cls(data_to_graph(data["eval"]), None if train is None else data_to_graph(train))

    def to_data(self) -> ForwardData:
        """Plain data that JSON can hold: ``{"version", "eval": nodes, "train": nodes or None}``."""
        train: GraphData | None = None if self._train_graph is None else graph_to_data(self._train_graph)
        return {"version": DATA_VERSION, "eval": graph_to_data(self.eval_graph), "train": train}

    def can_edit(self, node: str) -> bool:
        """Whether the node exists in the graphs of both modes."""
        return self._train_graph is None or node in self._train_nodes

    def replace(self, node: str, child: str, operands: Operands, in_place: bool = False) -> None:
        """Replace a node by a call of the child module ``child`` on ``operands(node)``.

        ``in_place`` says that the node overwrites its first operand: later readers of that get the new result.
        """
        for graph, found in self._find(node):
            with graph.inserting_after(found):
                call = graph.call_module(child, operands(found))
            _redirect(graph, found, call, in_place)
            graph.erase_node(found)

    def insert_after(self, node: str, child: str, in_place: bool = False) -> None:
        """Pass the result of a node through the child module ``child`` on its way to all later readers."""
        for graph, found in self._find(node):
            with graph.inserting_after(found):
                call = graph.call_module(child, (found,))
            _redirect(graph, found, call, in_place)

    def erase(self, node: str) -> None:
        """Remove a node; its readers get its first operand instead."""
        for graph, found in self._find(node):
            found.replace_all_uses_with(first_operand(found))
            graph.erase_node(found)

    def _graphs(self) -> list[fx.Graph]:
        return [self.eval_graph] if self._train_graph is None else [self.eval_graph, self._train_graph]

    def _find(self, name: str) -> list[tuple[fx.Graph, fx.Node]]:
        found = [(self.eval_graph, _node(self.eval_graph, name))]
        if self._train_graph is not None:
            found.append((self._train_graph, _node(self._train_graph, self._train_nodes[name])))
        return found


def first_operand(node: fx.Node) -> fx.Node:
    """The first node that a node reads.

    Raises:
        ValueError: it reads none.
    """
    for argument in (*node.args, *node.kwargs.values()):
        if isinstance(argument, fx.Node):
            return argument
    raise ValueError(f"{node.name} reads no other node")


def node_operands(node: fx.Node) -> tuple[Any, ...]:
    """The arguments of a node that are nodes: the operands of an addition."""
    return tuple(argument for argument in (*node.args, *node.kwargs.values()) if isinstance(argument, fx.Node))


def sequence_operand(node: fx.Node) -> tuple[Any, ...]:
    """The first argument of a node as a whole: the list that a concatenation takes."""
    return ((*node.args, *node.kwargs.values())[0],)


class EditedForward:
    """Mixin of the classes that carry an edited forward; each is a subclass of the module's own class."""

    _tritonq_class: type[nn.Module]
    _tritonq_forward: str

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced = super().__reduce_ex__(protocol)
        # The class is made at run time, so a pickle (and deepcopy) names what it was made from.
        if isinstance(reduced, tuple) and reduced[0] is copyreg.__newobj__:  # type: ignore[attr-defined]
            return (_rebuild, (self._tritonq_class, self._tritonq_forward), *reduced[2:])
        return reduced


def forward_data(module: nn.Module) -> ForwardData | None:
    """The plain data of a module's edited forward, or None where the forward is the class's own."""
    return json.loads(module._tritonq_forward) if isinstance(module, EditedForward) else None


def apply_forward(module: nn.Module, data: ForwardData, hidden: Iterable[str] = ()) -> None:
    """Give ``module`` the forward that ``data`` describes, in place; its type stays a subclass of its class.

    Args:
        module: the module.
        data: from :meth:`ForwardGraph.to_data` or :func:`forward_data`.
        hidden: children that a Sequential should not run, count or index, besides those that ``data`` names.

    Raises:
        ValueError: data that doesn't describe a forward, or one that calls children which ``module`` doesn't have.
    """
    names = sorted({*data.get("hidden", ()), *hidden}) if isinstance(data, dict) else []
    plain: ForwardData = {"version": DATA_VERSION, "eval": None, "train": None, "hidden": names}
    if not isinstance(data, dict) or data.get("eval") is not None or data.get("version") != DATA_VERSION:
        graph = ForwardGraph.from_data(data)
        children = dict(module.named_modules(remove_duplicate=False))
        for node in itertools.chain.from_iterable(part.nodes for part in graph._graphs()):
            if node.op == "call_module" and node.target not in children:
                raise ValueError(
                    f"the forward calls the child {node.target!r}, which {type(module).__name__} doesn't have"
                )
        plain |= graph.to_data()
    module.__class__ = _edited_class(original_class(module), json.dumps(plain, sort_keys=True))


def hide_children(module: nn.Sequential, names: Iterable[str]) -> None:
    """Let a Sequential hold children that it does not run, count or index: quantizers that hooks call."""
    apply_forward(module, forward_data(module) or {"version": DATA_VERSION, "eval": None}, names)


def original_class(module: nn.Module) -> type[nn.Module]:
    """The class of a module as its author wrote it, also after its forward was edited."""
    return module._tritonq_class if isinstance(module, EditedForward) else type(module)


# Modules of one class with equal forwards share the class, and so what torch.compile makes of it.
_classes: WeakValueDictionary[tuple[type, str], type[nn.Module]] = WeakValueDictionary()
_sources = itertools.count()


def _edited_class(original: type[nn.Module], encoded: str) -> type[nn.Module]:
    known = _classes.get((original, encoded))
    if known is not None:
        return known
    data: ForwardData = json.loads(encoded)
    namespace = {
        "_tritonq_class": original,
        "_tritonq_forward": encoded,
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
        "__doc__": original.__doc__,
    }
    if data["eval"] is not None:
        forwards = [_compile(part, original.__name__) for part in ForwardGraph.from_data(data)._graphs()]
        forward = forwards[0] if len(forwards) == 1 else _by_mode(*forwards)
        forward.__signature__ = inspect.signature(original.forward)  # type: ignore[attr-defined]
        namespace["forward"] = forward
    if data["hidden"] and issubclass(original, nn.Sequential):
        namespace |= _sequence_without(frozenset(data["hidden"]))
    metaclass: Any = type(original)
    made: type[nn.Module] = metaclass(original.__name__, (EditedForward, original), namespace)
    _classes[original, encoded] = made
    return made


def _by_mode(in_eval: FunctionType, in_train: FunctionType) -> Callable[..., Any]:
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return in_train(self, *args, **kwargs) if self.training else in_eval(self, *args, **kwargs)

    return forward


def _sequence_without(hidden: frozenset[str]) -> dict[str, Callable[..., Any]]:
    """What makes a Sequential a sequence, without some of its children."""

    def visible(self: nn.Sequential) -> nn.Sequential:
        return nn.Sequential(OrderedDict((name, child) for name, child in self._modules.items() if name not in hidden))

    def iterate(self: nn.Sequential) -> Any:
        return iter([child for name, child in self._modules.items() if name not in hidden])

    return {
        "__iter__": iterate,
        "__len__": lambda self: len(self._modules) - len(hidden),
        "__getitem__": lambda self, index: visible(self)[index],
    }


def _rebuild(original: type[nn.Module], encoded: str) -> nn.Module:
    cls = _edited_class(original, encoded)
    return cls.__new__(cls)


def _compile(graph: fx.Graph, name: str) -> FunctionType:
    code = graph.python_code("self")
    filename = f"<tritonq forward {next(_sources)} of {name}>"
    namespace = dict(code.globals)
    exec(compile(code.src, filename, "exec"), namespace)  # names and functions in it passed the checks of graph_data
    # So that tracebacks show the source.
    linecache.cache[filename] = (len(code.src), None, code.src.splitlines(keepends=True), filename)
    return namespace["forward"]  # type: ignore[no-any-return]


def _node(graph: fx.Graph, name: str) -> fx.Node:
    found: fx.Node | None = next((node for node in graph.nodes if node.name == name), None)
    if found is None:
        raise ValueError(f"no node {name!r} in the graph")
    return found


def _redirect(graph: fx.Graph, node: fx.Node, new: fx.Node, in_place: bool) -> None:
    node.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)
    if in_place:
        overwritten = first_operand(node)
        order = {found: position for position, found in enumerate(graph.nodes)}
        for user in list(overwritten.users):
            if order[user] > order[new]:
                user.replace_input_with(overwritten, new)


def _correspondence(in_eval: fx.Graph, in_train: fx.Graph) -> dict[str, str]:
    """For nodes of the eval graph those of the train graph that do the same, by name.

    Same means: same operation on corresponding nodes; else the k-th of its kind where both have equally many.
    """
    found: dict[str, str] = {}
    free = {node.name: node for node in in_train.nodes}
    for node in in_eval.nodes:
        operands = [found.get(operand.name) for operand in node.all_input_nodes]
        for candidate in free.values():
            if _kind(candidate) == _kind(node) and [n.name for n in candidate.all_input_nodes] == operands:
                found[node.name] = candidate.name
                del free[candidate.name]
                break
    for kind in {_kind(node) for node in in_eval.nodes}:
        mine = [node.name for node in in_eval.nodes if _kind(node) == kind]
        others = [node.name for node in in_train.nodes if _kind(node) == kind]
        if len(mine) == len(others) and not all(name in found for name in mine):
            found |= dict(zip(mine, others, strict=True))
    return found


def _kind(node: fx.Node) -> tuple[str, Any]:
    return node.op, node.target
