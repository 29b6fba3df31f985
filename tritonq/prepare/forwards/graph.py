"""The forward of one module as a torch.fx graph that can be edited.

The module's children are single calls in the graph. There is one graph, or one per mode if train and eval differ. Edits
insert calls of new children. ``to_data`` returns the edited graph as plain data, and
:func:`tritonq.prepare.forwards.edited.apply_forward` compiles these and puts them on a module.

An *operands* function takes a node of the graph and returns the arguments for the child that replaces it.
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
    """The forward of one module as a graph, to be edited. Nodes are named as in the graph of eval mode.

    Edits and checks of a node raise ValueError if the eval graph has no node of that name. Call them only for nodes for
    which :meth:`can_edit` is True, and no more once the node was replaced or erased. Both graphs are changed in place.

    Args:
        eval_graph: the graph of eval mode.
        train_graph: the graph of training mode; None if it is the same.

    Attributes:
        eval_graph: the graph that runs in eval mode.
    """

    def __init__(self, eval_graph: fx.Graph, train_graph: fx.Graph | None = None) -> None:
        self.eval_graph = eval_graph
        self._train_graph = train_graph
        self._train_names = {} if train_graph is None else _correspondence(eval_graph, train_graph)
        self._eval_names = {train: name for name, train in self._train_names.items()}
        self._nodes = [{node.name: node for node in graph.nodes} for graph in self.graphs()]

    @classmethod
    def trace(cls, module: nn.Module, frames: Iterable[Frame]) -> Self:
        """Return the forward of ``module``, traced in both modes, with arguments as in the recorded ``frames``.

        The module is left as it is.

        Args:
            module: the module.
            frames: all recorded runs of its forward, one at least.

        Raises:
            TraceError: no graph can stand for the forward; the message says why.
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
        """Return the graph that forward data describe, ready to be edited further.

        Args:
            data: what :meth:`to_data` returned: ``{"version", "eval": nodes, "train": nodes or None}``. Other entries,
                such as "values" and "otherwise" of a guarded graph, are not read.

        Raises:
            ValueError: data of another version, or that don't describe a forward.
        """
        version = data.get("version") if isinstance(data, dict) else None
        if version not in (DATA_VERSION, QUANTIZING_VERSION):
            raise ValueError(f"expected forward data of version {DATA_VERSION}, got {version!r}")
        if "eval" not in data:
            raise ValueError("forward data of a graph have the nodes of eval mode under 'eval'")
        train = data.get("train")
        return cls(data_to_graph(data["eval"]), None if train is None else data_to_graph(train))

    def to_data(self) -> ForwardData:
        """Return plain data for JSON: ``{"version", "eval": nodes, "train": nodes, or None if it is the same}``.

        ``nodes`` is a list with one dict per node of the graph, such as ``{"name": "x", "op": "placeholder", …}``.
        """
        train: GraphData | None = None if self._train_graph is None else graph_to_data(self._train_graph)
        return {"version": DATA_VERSION, "eval": graph_to_data(self.eval_graph), "train": train}

    def graph_of(self, training: bool) -> fx.Graph:
        """Return the graph that runs in training mode if ``training``, else that of eval mode."""
        return self.eval_graph if self._train_graph is None or not training else self._train_graph

    def eval_name(self, node: str, training: bool) -> str | None:
        """Return the name that a node has in the eval graph; None if only the training graph has such a node.

        Args:
            node: name of the node in the graph of one mode.
            training: whether that is the graph of training mode.
        """
        if self._train_graph is None or not training:
            return node
        return self._eval_names.get(node)

    @property
    def differs_in_training(self) -> bool:
        """Whether training mode runs another graph than eval mode."""
        return self._train_graph is not None

    def can_edit(self, node: str) -> bool:
        """Whether a node of the eval graph exists in the training graph, too, so that it can be edited.

        ``node`` is its name in the eval graph. True for any name if both modes run the same graph.
        """
        return self._train_graph is None or node in self._train_names

    def has_constant_arguments(self, node: str) -> bool:
        """Whether a node reads only one other node, in the graph of each mode, so that nothing else is computed.

        Numbers, texts and flags are constants. Parameters, buffers and the forward's arguments are nodes. A node that
        is read twice, as in ``x + x``, counts once. ``node`` is a name in the eval graph.
        """
        return all(len(found.all_input_nodes) == 1 for _, found in self._find(node))

    def check_geometry(self, node: str, recorded: Mapping[str, Any]) -> None:
        """Insert checks before a call of a convolution or ``F.linear``: its stride and the like must be as recorded.

        A check is inserted for each argument that the forward computes and ``recorded`` has. It raises ValueError when
        the forward runs and the argument differs.

        Args:
            node: name of the call's node.
            recorded: the recorded arguments by name, such as ``{"padding": 1, "groups": 4}``.
        """
        for graph, found in self._find(node):
            function = operation_name(found.target) if callable(found.target) else str(found.target)
            for name, value in geometry_of(function, found.args, found.kwargs).items():
                if name in recorded and _reads_nodes(value):
                    with graph.inserting_before(found):
                        graph.call_function(check_argument, (value, recorded[name], f"{name} of {function}"))

    def replace(self, node: str, child: str, operands: Operands, in_place: bool = False, joined: bool = False) -> None:
        """Replace a node by a call of a child module, in the graphs of both modes.

        Args:
            node: name of the node.
            child: name of the child module.
            operands: returns the child's arguments, given the node.
            in_place: whether the node overwrites its first operand; later readers of that operand then get the new
                result.
            joined: not used here: whether the child computes other calls, too, which were erased.

        Raises:
            ValueError: the eval graph has no such node.
        """
        for graph, found in self._find(node):
            with graph.inserting_after(found):
                call = graph.call_module(child, operands(found))
            _redirect(found, call, in_place)
            graph.erase_node(found)

    def insert_after(self, node: str, child: str, in_place: bool = False) -> None:
        """Pass the result of a node through a child module, so that all readers of the node get the child's result.

        Args:
            node: name of the node.
            child: name of the child module.
            in_place: whether the node overwrites its first operand; later readers of that operand get the new result,
                too.
        """
        for graph, found in self._find(node):
            with graph.inserting_after(found):
                call = graph.call_module(child, (found,))
            _redirect(found, call, in_place)

    def erase(self, node: str) -> None:
        """Remove a node from the graphs; its readers get its :func:`first_operand`; ValueError without one."""
        for graph, found in self._find(node):
            found.replace_all_uses_with(first_operand(found))
            graph.erase_node(found)

    def graphs(self) -> list[fx.Graph]:
        """Return the graph of eval mode and, if training differs, also that of training mode."""
        return [self.eval_graph] if self._train_graph is None else [self.eval_graph, self._train_graph]

    def _find(self, name: str) -> list[tuple[fx.Graph, fx.Node]]:
        """Return ``(graph, node)`` for each mode's graph, given the node's name in the eval graph.

        Raises:
            ValueError: there is no such node.
        """
        if name not in self._nodes[0]:
            raise ValueError(f"no node {name!r} in the graph")
        names = [name, self._train_names.get(name, "")]
        return [(graph, nodes[here]) for graph, nodes, here in zip(self.graphs(), self._nodes, names, strict=False)]


def _reads_nodes(argument: Any) -> bool:
    """Whether an argument is a node of the graph or holds one, and so is no constant."""
    found: list[fx.Node] = []
    fx.map_arg(argument, found.append)
    return bool(found)


def first_operand(node: fx.Node) -> fx.Node:
    """Return the first node among the arguments of a node. Nodes inside of lists, as ``cat`` takes them, do not count.

    Positional arguments come first, then named ones in the order in which the call has them.

    Raises:
        ValueError: no argument is a node.
    """
    for argument in (*node.args, *node.kwargs.values()):
        if isinstance(argument, fx.Node):
            return argument
    raise ValueError(f"{node.name} reads no other node")


def node_operands(node: fx.Node) -> tuple[Any, ...]:
    """Return all arguments of a node that are nodes themselves, named ones last: for an addition its two operands.

    A node that is read twice, as in ``x + x``, is there twice. Nodes inside lists are not among them.
    """
    return tuple(argument for argument in (*node.args, *node.kwargs.values()) if isinstance(argument, fx.Node))


def first_node(node: fx.Node) -> tuple[Any, ...]:
    """Return ``(first_operand(node),)``; ValueError if no argument is a node."""
    return (first_operand(node),)


def layer_operands(node: fx.Node) -> tuple[Any, ...]:
    """Return ``(input, weight, bias)`` of a node that calls a convolution or ``F.linear``; bias is None without one."""
    return layer_arguments(node.args, node.kwargs)


def layer_arguments(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return ``(input, weight, bias)`` from the arguments of a convolution or ``F.linear``.

    Bias is None without one.
    """
    given = {**dict(zip(("input", "weight", "bias"), args, strict=False)), **kwargs}
    return given["input"], given["weight"], given.get("bias")


def attention_operands(node: fx.Node) -> tuple[Any, ...]:
    """Return all eight arguments of a node that calls ``F.scaled_dot_product_attention``, in its order.

    Those that the call does not give are torch's defaults.
    """
    return attention_arguments(node.args, node.kwargs)


def product_operands(node: fx.Node) -> tuple[Any, ...]:
    """Return the operands of a node that calls ``torch.einsum``: ``(a, b)`` for ``einsum("ij,jk", a, b)``.

    The call may also give them as a list, or each with a list of indices behind it.
    """
    return einsum_operands(node.args)


def sequence_operand(node: fx.Node) -> tuple[Any, ...]:
    """Return the sequence that a concatenation is given, in a tuple of one: ``([a, b],)`` for ``cat([a, b])``."""
    return (node.args[0] if node.args else node.kwargs["tensors"],)


def compile_graph(graph: fx.Graph, name: str) -> FunctionType:
    """Return the function ``forward(self, …)`` that a graph describes.

    ``name`` is the module's class name, for tracebacks: they show the file ``"<tritonq forward 0 of Net>"``. The number
    counts the compiled graphs of this process.
    """
    code = graph.python_code("self")
    filename = f"<tritonq forward {next(_sources)} of {name}>"
    namespace = dict(code.globals)
    exec(compile(code.src, filename, "exec"), namespace)  # names and functions in it passed the checks of graph_data
    # So that tracebacks show the source.
    linecache.cache[filename] = (len(code.src), None, code.src.splitlines(keepends=True), filename)
    return namespace["forward"]  # type: ignore[no-any-return]


def _redirect(node: fx.Node, new: fx.Node, in_place: bool) -> None:
    """Let the nodes that read ``node`` read ``new`` instead.

    With ``in_place`` the later readers of the first operand of ``node``, which it overwrites, read ``new``, too.
    """
    node.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)
    if in_place:
        overwritten = first_operand(node)
        for user in list(overwritten.users):
            if new < user:
                user.replace_input_with(overwritten, new)


def _correspondence(in_eval: fx.Graph, in_train: fx.Graph) -> dict[str, str]:
    """Return for names of nodes in the eval graph the names of the same nodes in the training graph.

    Two nodes correspond if they apply one operation to corresponding nodes. Of the remaining nodes, the k-th of an
    operation corresponds to the k-th of the same operation, if both graphs have equally many.
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
    """Return what a node calls: its opcode of torch.fx and its target."""
    return node.op, node.target
