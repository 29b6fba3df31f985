"""The forward of one module as a graph that can be edited.

The forward becomes a torch.fx graph with the module's children as single calls: one graph, or one per mode where train
and eval differ. Edits insert calls of new children. The result is plain data;
:func:`tritonq.prepare.forwards.edited.apply_forward` compiles it and puts it on a module.
"""

from __future__ import annotations

import itertools
import linecache
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from types import FunctionType
from typing import Any, Self

from torch import fx, nn

from tritonq.nn.einsum import einsum_operands
from tritonq.nn.products import attention_arguments
from tritonq.prepare.forwards.geometry import geometry_of
from tritonq.prepare.forwards.graph_data import GraphData, check_argument, data_to_graph, graph_to_data
from tritonq.prepare.forwards.trace import TraceError, classify_arguments, forward_signature, trace
from tritonq.prepare.record.dataflow import Frame
from tritonq.prepare.record.operations import operation_name

DATA_VERSION = 1
# Data of this version names quantized arguments and results, around a graph or without one.
QUANTIZING_VERSION = 3
ForwardData = dict[str, Any]
_sources = itertools.count()
Operands = Callable[[fx.Node], tuple[Any, ...]]


class ForwardGraph:
    """The forward of one module, open for edits. Nodes are named as in the eval graph.

    Attributes:
        eval_graph: what runs in eval mode.
    """

    def __init__(self, eval_graph: fx.Graph, train_graph: fx.Graph | None = None) -> None:
        self.eval_graph = eval_graph
        self._train_graph = train_graph
        self._train_names = {} if train_graph is None else _correspondence(eval_graph, train_graph)
        self._eval_names = {train: name for name, train in self._train_names.items()}
        self._nodes = [{node.name: node for node in graph.nodes} for graph in self.graphs()]

    @classmethod
    def trace(cls, module: nn.Module, frames: Iterable[Frame]) -> Self:
        """Return the forward of ``module`` as it was called in the recorded ``frames``.

        Raises:
            TraceError: no graph can stand for it; the message says why.
        """
        arguments = classify_arguments(forward_signature(module), frames)
        in_eval, in_train = trace(module, arguments, training=False), trace(module, arguments, training=True)
        try:
            same = graph_to_data(in_eval) == graph_to_data(in_train)
            graph = cls(in_eval, None if same else in_train)
            for copied in graph.graphs():
                compile_graph(copied, type(module).__name__)
        except (ValueError, SyntaxError) as error:
            raise TraceError(str(error)) from error
        return graph

    @classmethod
    def from_data(cls, data: ForwardData) -> ForwardGraph:
        """Return the graph that :meth:`to_data` described.

        Raises:
            ValueError: data of another version, or that doesn't describe a forward.
        """
        version = data.get("version") if isinstance(data, dict) else None
        if version not in (DATA_VERSION, QUANTIZING_VERSION):
            raise ValueError(f"expected forward data of version {DATA_VERSION}, got {version!r}")
        train = data.get("train")
        return cls(data_to_graph(data["eval"]), None if train is None else data_to_graph(train))

    def to_data(self) -> ForwardData:
        """Return plain data that JSON can hold: ``{"version", "eval": nodes, "train": nodes or None}``."""
        train: GraphData | None = None if self._train_graph is None else graph_to_data(self._train_graph)
        return {"version": DATA_VERSION, "eval": graph_to_data(self.eval_graph), "train": train}

    def graph_of(self, training: bool) -> fx.Graph:
        """Return the graph of one mode."""
        return self.eval_graph if self._train_graph is None or not training else self._train_graph

    def eval_name(self, node: str, training: bool) -> str | None:
        """Return the name in the eval graph of a node of one mode's graph, or None if only training has it."""
        if self._train_graph is None or not training:
            return node
        return self._eval_names.get(node)

    @property
    def differs_in_training(self) -> bool:
        """Whether training runs another graph than eval mode."""
        return self._train_graph is not None

    def can_edit(self, node: str) -> bool:
        """Whether the node exists in the graphs of both modes."""
        return self._train_graph is None or node in self._train_names

    def has_constant_arguments(self, node: str) -> bool:
        """Whether a node reads one other node: its further arguments are constants."""
        return all(len(found.all_input_nodes) == 1 for _, found in self._find(node))

    def check_geometry(self, node: str, recorded: Mapping[str, Any]) -> None:
        """Let each call of a convolution or product raise where what the forward computes is not as recorded.

        Args:
            node: the call.
            recorded: its arguments by name, such as padding and groups.
        """
        for graph, found in self._find(node):
            function = operation_name(found.target) if callable(found.target) else str(found.target)
            for name, value in geometry_of(function, found.args, found.kwargs).items():
                if name in recorded and _reads_nodes(value):
                    with graph.inserting_before(found):
                        graph.call_function(check_argument, (value, recorded[name], f"{name} of {function}"))

    def replace(self, node: str, child: str, operands: Operands, in_place: bool = False, joined: bool = False) -> None:
        """Replace a node by a call of the child module ``child`` on ``operands(node)``.

        ``in_place`` says that the node overwrites its first operand: later readers of that get the new result.
        ``joined`` says that the child computes other nodes, too, which were erased.
        """
        for graph, found in self._find(node):
            with graph.inserting_after(found):
                call = graph.call_module(child, operands(found))
            _redirect(found, call, in_place)
            graph.erase_node(found)

    def insert_after(self, node: str, child: str, in_place: bool = False) -> None:
        """Pass the result of a node through the child module ``child`` on its way to all later readers."""
        for graph, found in self._find(node):
            with graph.inserting_after(found):
                call = graph.call_module(child, (found,))
            _redirect(found, call, in_place)

    def erase(self, node: str) -> None:
        """Remove a node; its readers get its first operand instead."""
        for graph, found in self._find(node):
            found.replace_all_uses_with(first_operand(found))
            graph.erase_node(found)

    def graphs(self) -> list[fx.Graph]:
        """Return the graph of eval mode and, where training differs, that of training."""
        return [self.eval_graph] if self._train_graph is None else [self.eval_graph, self._train_graph]

    def _find(self, name: str) -> list[tuple[fx.Graph, fx.Node]]:
        if name not in self._nodes[0]:
            raise ValueError(f"no node {name!r} in the graph")
        names = [name, self._train_names.get(name, "")]
        return [(graph, nodes[here]) for graph, nodes, here in zip(self.graphs(), self._nodes, names, strict=False)]


def _reads_nodes(argument: Any) -> bool:
    found: list[fx.Node] = []
    fx.map_arg(argument, found.append)
    return bool(found)


def first_operand(node: fx.Node) -> fx.Node:
    """Return the first node that a node reads.

    Raises:
        ValueError: it reads none.
    """
    for argument in (*node.args, *node.kwargs.values()):
        if isinstance(argument, fx.Node):
            return argument
    raise ValueError(f"{node.name} reads no other node")


def node_operands(node: fx.Node) -> tuple[Any, ...]:
    """Return the arguments of a node that are nodes: the operands of an addition."""
    return tuple(argument for argument in (*node.args, *node.kwargs.values()) if isinstance(argument, fx.Node))


def first_node(node: fx.Node) -> tuple[Any, ...]:
    """Return the first node that a node reads, as the one operand."""
    return (first_operand(node),)


def layer_operands(node: fx.Node) -> tuple[Any, ...]:
    """Return input, weight and bias of a convolution or product."""
    return layer_arguments(node.args, node.kwargs)


def layer_arguments(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return input, weight and bias among the arguments of a convolution or product."""
    given = {**dict(zip(("input", "weight", "bias"), args, strict=False)), **kwargs}
    return given["input"], given["weight"], given.get("bias")


def attention_operands(node: fx.Node) -> tuple[Any, ...]:
    """Return the arguments of scaled dot-product attention, by position."""
    return attention_arguments(node.args, node.kwargs)


def product_operands(node: fx.Node) -> tuple[Any, ...]:
    """Return the operands of an einsum, in whatever spelling."""
    return einsum_operands(node.args)


def sequence_operand(node: fx.Node) -> tuple[Any, ...]:
    """Return the first argument of a node as a whole: the list that a concatenation takes."""
    return ((*node.args, *node.kwargs.values())[0],)


def compile_graph(graph: fx.Graph, name: str) -> FunctionType:
    """Return the function that a graph describes, ``forward(self, …)``; ``name`` appears in tracebacks."""
    code = graph.python_code("self")
    filename = f"<tritonq forward {next(_sources)} of {name}>"
    namespace = dict(code.globals)
    exec(compile(code.src, filename, "exec"), namespace)  # names and functions in it passed the checks of graph_data
    # So that tracebacks show the source.
    linecache.cache[filename] = (len(code.src), None, code.src.splitlines(keepends=True), filename)
    return namespace["forward"]  # type: ignore[no-any-return]


def _redirect(node: fx.Node, new: fx.Node, in_place: bool) -> None:
    node.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)
    if in_place:
        overwritten = first_operand(node)
        for user in list(overwritten.users):
            if new < user:
                user.replace_input_with(overwritten, new)


def _correspondence(in_eval: fx.Graph, in_train: fx.Graph) -> dict[str, str]:
    """Return, for names of nodes of the eval graph, the name of the node of the train graph that corresponds.

    Nodes correspond that apply one operation to corresponding nodes. Of what remains, the k-th nodes of a kind
    correspond where both graphs have equally many of it.
    """
    found: dict[str, str] = {}
    free: dict[tuple[Any, ...], deque[str]] = {}
    of_kind: list[dict[Any, list[str]]] = [{}, {}]
    for node in in_train.nodes:
        operands = tuple(operand.name for operand in node.all_input_nodes)
        free.setdefault((_kind(node), operands), deque()).append(node.name)
        of_kind[1].setdefault(_kind(node), []).append(node.name)
    for node in in_eval.nodes:
        same = free.get((_kind(node), tuple(found.get(operand.name) for operand in node.all_input_nodes)))
        if same:
            found[node.name] = same.popleft()
        of_kind[0].setdefault(_kind(node), []).append(node.name)
    for kind, mine in of_kind[0].items():
        others = of_kind[1].get(kind, [])
        if len(mine) == len(others) and not all(name in found for name in mine):
            found |= dict(zip(mine, others, strict=True))
    return found


def _kind(node: fx.Node) -> tuple[str, Any]:
    return node.op, node.target
