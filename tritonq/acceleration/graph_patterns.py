"""Find what tritonq can compute in graphs of aten operators and fake quantizers (torchao's PT2E, torch.ao's FX).

A graph is a ``torch.fx.Graph``. The *target* of a node that calls a submodule is the submodule's path, such as
``"features.0.conv"``. In formulas FQ is the fake quantization by a submodule, ``relu?`` a ReLU if there is one. A ReLU
is described by its *ceiling*: infinity for a plain one, 6.0 for ReLU6, None for no ReLU. ``known`` is what tritonq can
compute. A private function that yields matches searches one pattern, in the graph's order.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch.fx import Graph, Node

from tritonq.acceleration.graph_calls import graph_add, graph_conv_bn, graph_layer, graph_quantize
from tritonq.nn.fusable import bound_of_clip

_ATEN = torch.ops.aten
_CONVOLUTIONS = {
    _ATEN.conv1d.default: 1,
    _ATEN.conv2d.default: 2,
    _ATEN.conv3d.default: 3,
}
_ADDITIONS = (_ATEN.add.Tensor, _ATEN.add_.Tensor, operator.add, operator.iadd, torch.add)
_RELUS = (_ATEN.relu.default, _ATEN.relu_.default, F.relu, torch.relu)
_CLIPS = (_ATEN.hardtanh.default, _ATEN.hardtanh_.default, _ATEN.clamp.default, _ATEN.clamp_.default)
_RELU6S = (_ATEN.relu6.default, _ATEN.relu6_.default)
_INPLACE_OPERATORS = (operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.setitem)


@dataclass(frozen=True)
class KnownParts:
    """What :func:`matches` and :func:`keep_constants` have to know of a graph's submodules and constants.

    Attributes:
        quantizers: targets of the fake quantizers that tritonq can compute.
        layers: targets of layers of torch.ao (such as ``ConvBn2d``) that tritonq computes together with the fake
            quantizer of their result.
        relus: pairs of the target of a ReLU module and its ceiling, such as ``("act", 6.0)``.
        constants: what :func:`constants` returned when the model was accelerated: ``(p,)`` of each dropout and
            ``(momentum, eps)`` of each BatchNorm.
        writing: targets of modules of any class that write into their input, such as ``nn.ReLU(inplace=True)``.
    """

    quantizers: frozenset[str] = frozenset()
    layers: frozenset[str] = frozenset()
    relus: tuple[tuple[str, float], ...] = ()
    constants: tuple[tuple[float, ...], ...] = ()
    writing: frozenset[str] = frozenset()


@dataclass
class Match:
    """Nodes of a graph that one call of a function of tritonq can replace.

    Attributes:
        kind: the operations in words, for the report, such as ``"convolution, BatchNorm, ReLU, quantizer"``.
        call: the function: one of `graph_calls`, or ``run_with`` of `torch_ao`.
        arguments: its arguments by position: nodes, constants, submodules as :class:`Module`, and tuples of these.
        nodes: what the call replaces, each behind those that it reads; the last one is the result.
        quantizers: targets of the fake quantizers that the call runs, the weight's first.
    """

    kind: str
    call: Callable[..., Any]
    arguments: tuple[Any, ...]
    nodes: list[Node]
    quantizers: list[str]


@dataclass(frozen=True)
class Module:
    """A submodule among the arguments of a :class:`Match`, by its target; :func:`fuse` adds a ``get_attr`` node."""

    target: str


def matches(graph: Graph, known: KnownParts) -> list[Match]:
    """Return matches in ``graph``, larger patterns first; one that shares a node with an earlier one is left out."""
    taken: set[Node] = set()
    found = []
    for search in (_conv_bns, _layers, _module_layers, _sums, _quantizers):
        for match in search(graph, known):
            if not taken & set(match.nodes):
                taken.update(match.nodes)
                found.append(match)
    return found


def fuse(graph: Graph, known: KnownParts) -> None:
    """Replace the nodes of each match that :func:`matches` finds by one call of its ``Match.call``, in place."""
    calls: dict[Node, Node] = {}
    for match in matches(graph, known):
        last = match.nodes[-1]
        with graph.inserting_before(last):
            calls[last] = call = graph.call_function(match.call, _resolved(graph, match.arguments, calls))
        last.replace_all_uses_with(call)
        for node in reversed(match.nodes):
            if not node.users:
                graph.erase_node(node)


def constants(graph: Graph) -> tuple[tuple[float, ...], ...]:
    """Return ``(p,)`` and ``(momentum, eps)`` of the calls of aten's dropout and batch_norm, in ``graph``'s order."""
    return tuple(_read(node, places) for node, places in _with_constants(graph))


def keep_constants(graph: Graph, known: KnownParts) -> list[str]:
    """Give the dropouts and BatchNorms of ``graph`` the numbers in ``known.constants`` back, in place.

    torchao's switches between training and eval mode write torch's defaults over them.

    Returns:
        One text for each dropout or BatchNorm that had changed, with the numbers put back, then those replaced, such
        as ``"BatchNorm momentum 0.01 and eps 0.001, and not momentum 0.1 and eps 1e-05"``; empty also for a graph with
        another number of dropouts and BatchNorms than ``known``, which stays as it is.
    """
    now = list(_with_constants(graph))
    if len(now) != len(known.constants):
        return []
    changed = []
    for (node, places), kept in zip(now, known.constants, strict=True):
        found = _read(node, places)
        if found != kept:
            kind = "dropout" if len(places) == 1 else "BatchNorm"
            changed.append(f"{kind} {_in_words(kept)}, and not {_in_words(found)}")
            for place, value in zip(places, kept, strict=True):
                node.update_arg(place, value)
    return changed


def is_in_eval(graph: Graph) -> bool:
    """Whether at least one call of aten's dropout or batch_norm in ``graph`` is in eval mode; False without any."""
    flags = [node.args[2 if places == (1,) else 5] for node, places in _with_constants(graph)]
    return not all(flags)


def _with_constants(graph: Graph) -> Iterator[tuple[Node, tuple[int, ...]]]:
    for node in graph.nodes:
        if node.target in (_ATEN.dropout.default, _ATEN.dropout_.default):
            yield node, (1,)
        elif node.target is _ATEN.batch_norm.default:
            yield node, (6, 7)


def _read(node: Node, places: tuple[int, ...]) -> tuple[float, ...]:
    return tuple(cast(float, node.args[place]) for place in places)


def _in_words(values: tuple[float, ...]) -> str:
    return f"p {values[0]:g}" if len(values) == 1 else "momentum {:g} and eps {:g}".format(*values)


def _resolved(graph: Graph, value: Any, calls: dict[Node, Node]) -> Any:
    """Turn an argument of a :class:`Match` into one of a node.

    Args:
        graph: where a ``get_attr`` node is added for a :class:`Module`.
        value: the argument; tuples are searched.
        calls: for nodes that were replaced before, the call that took their place.
    """
    if isinstance(value, Module):
        return graph.create_node("get_attr", value.target)
    if isinstance(value, Node):
        return calls.get(value, value)
    return tuple(_resolved(graph, each, calls) for each in value) if isinstance(value, tuple) else value


def _conv_bns(graph: Graph, known: KnownParts) -> Iterator[Match]:
    """Yield matches of ``FQ(relu?(batch_norm(conv(x, FQ(W s), 0) / s + b)))`` with ``s = γ/sqrt(running_var+eps)``."""
    for node in graph.nodes:
        if node.target is not _ATEN.batch_norm.default:
            continue
        source, gamma, beta, mean, var, training, momentum, eps = node.args[:8]
        inner, bias, nodes = source, None, []
        if _is_call(inner, _ATEN.add.Tensor) and _is_call(inner.args[1], _ATEN.reshape.default):
            bias = inner.args[1].args[0]
            nodes += [inner.args[1], inner]
            inner = inner.args[0]
        if not _is_call(inner, _ATEN.div.Tensor) or not _is_call(inner.args[1], _ATEN.reshape.default):
            continue
        conv, spread = inner.args
        scale = spread.args[0]
        if conv.target not in _CONVOLUTIONS or not _is_fold(scale, gamma, var, eps):
            continue
        x, quantizer, zero = (*conv.args, None)[:3]
        if not _is_quantizer(quantizer, known) or not _is_call(quantizer.args[0], _ATEN.mul.Tensor):
            continue
        weight, weight_spread = quantizer.args[0].args
        is_scaled = _is_call(weight_spread, _ATEN.reshape.default) and weight_spread.args[0] is scale
        if not is_scaled or (zero is not None and not _is_call(zero, _ATEN.zeros_like.default)):
            continue
        nodes = [
            *(scale.args[1].args[0], scale.args[1], scale, weight_spread, quantizer.args[0], quantizer),
            *([] if zero is None else [zero]),
            *(conv, spread, inner, *nodes, node),
        ]
        inside = set(nodes)
        if any(not set(each.users) <= inside for each in nodes[:-1]):
            continue
        tail = _tail(node, known)
        norm = (gamma, beta, mean, var, momentum, eps, training)
        arguments = (x, weight, bias, norm, Module(quantizer.target), *tail.arguments, _geometry(conv))
        kind = "convolution, BatchNorm" + tail.kind
        match = Match(kind, graph_conv_bn, arguments, nodes + tail.nodes, [quantizer.target, *tail.quantizers])
        if _is_safe(match, x, known):
            yield match


def _is_fold(scale: Any, gamma: Node, var: Node, eps: float) -> bool:
    """Whether ``scale`` is the node of ``γ / sqrt(var + eps)``, for these nodes of γ and of the variance."""
    if not _is_call(scale, _ATEN.div.Tensor) or scale.args[0] is not gamma:
        return False
    root = scale.args[1]
    return (
        _is_call(root, _ATEN.sqrt.default)
        and _is_call(root.args[0], _ATEN.add.Tensor)
        and root.args[0].args[0] is var
        and root.args[0].args[1] == eps
    )


def _layers(graph: Graph, known: KnownParts) -> Iterator[Match]:
    """Yield matches of ``FQ(relu?(op(x, FQ(W), b)))``, ``op`` being a convolution or matrix product."""
    for node in graph.nodes:
        is_product = node.target is _ATEN.linear.default
        if not is_product and node.target not in _CONVOLUTIONS:
            continue
        x, quantizer, bias = (*node.args, None)[:3]
        if not _is_quantizer(quantizer, known) or set(quantizer.users) != {node}:
            continue
        tail = _tail(node, known)
        geometry = None if is_product else _geometry(node)
        arguments = (x, quantizer.args[0], bias, Module(quantizer.target), *tail.arguments, geometry)
        kind = ("linear" if is_product else "convolution") + tail.kind
        nodes = [quantizer, node, *tail.nodes]
        match = Match(kind, graph_layer, arguments, nodes, [quantizer.target, *tail.quantizers])
        if _is_safe(match, x, known):
            yield match


def _module_layers(graph: Graph, known: KnownParts) -> Iterator[Match]:
    """Yield matches of a layer module of torch.ao and the fake quantizer that alone reads its result."""
    if not known.layers:
        return
    from tritonq.acceleration.torch_ao import run_with

    for node in graph.nodes:
        if node.op == "call_module" and node.target in known.layers and len(node.users) == 1 and len(node.args) == 1:
            quantizer = next(iter(node.users))
            if _is_quantizer(quantizer, known):
                arguments = (Module(node.target), node.args[0], Module(quantizer.target))
                match = Match("layer, quantizer", run_with, arguments, [node, quantizer], [quantizer.target])
                if _is_safe(match, node.args[0], known):
                    yield match


def _sums(graph: Graph, known: KnownParts) -> Iterator[Match]:
    """Yield matches of ``FQ(relu?(a + b))``."""
    for node in graph.nodes:
        if node.target not in _ADDITIONS or not all(isinstance(each, Node) for each in node.args) or node.kwargs:
            continue
        if len(node.args) != 2 or (_is_inplace(node, known) and len(node.args[0].users) > 1):
            continue
        tail = _tail(node, known)
        if tail.quantizers:
            arguments = (*node.args, *tail.arguments)
            match = Match("addition" + tail.kind, graph_add, arguments, [node, *tail.nodes], tail.quantizers)
            if all(_is_safe(match, each, known) for each in node.args):
                yield match


def _quantizers(graph: Graph, known: KnownParts) -> Iterator[Match]:
    """Yield matches of ``FQ(relu?(x))``, and of each fake quantizer alone."""
    for node in graph.nodes:
        ceiling = _ceiling(node, known)
        if ceiling is not None and len(node.users) == 1 and _is_quantizer(next(iter(node.users)), known):
            quantizer, x = next(iter(node.users)), node.args[0]
            if not _is_inplace(node, known) or len(x.users) == 1:
                arguments = (x, Module(quantizer.target), ceiling)
                match = Match("ReLU, quantizer", graph_quantize, arguments, [node, quantizer], [quantizer.target])
                if _is_safe(match, x, known):
                    yield match
        if _is_quantizer(node, known):
            target = str(node.target)
            yield Match("quantizer", graph_quantize, (node.args[0], Module(target), None), [node], [target])


@dataclass
class _Tail:
    """The ReLU and the fake quantizer that follow a node, as far as one node alone reads each value.

    Attributes:
        nodes: of the ReLU and of the quantizer, in order.
        quantizers: the path of the fake quantizer in the graph module, or empty.
        ceiling: upper bound of the ReLU, infinity for a plain one; None without a ReLU.
        kind: what follows, for the report, such as ``", ReLU, quantizer"``.
    """

    nodes: list[Node]
    quantizers: list[str]
    ceiling: float | None
    kind: str

    @property
    def arguments(self) -> tuple[Any, float | None]:
        return Module(self.quantizers[0]) if self.quantizers else None, self.ceiling


def _tail(node: Node, known: KnownParts) -> _Tail:
    tail, last = _Tail([], [], None, ""), node
    after = _only_user(last)
    if after is not None and (ceiling := _ceiling(after, known)) is not None:
        tail = _Tail([after], [], ceiling, ", ReLU")
        last, after = after, _only_user(after)
    if after is not None and _is_quantizer(after, known):
        tail.nodes.append(after)
        tail.quantizers.append(str(after.target))
        tail.kind += ", quantizer"
    return tail


def _only_user(node: Node) -> Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _is_call(value: Any, target: Any) -> bool:
    return isinstance(value, Node) and value.op == "call_function" and value.target is target


def _is_quantizer(value: Any, known: KnownParts) -> bool:
    return isinstance(value, Node) and value.op == "call_module" and value.target in known.quantizers


def _ceiling(node: Node, known: KnownParts) -> float | None:
    """Return the ceiling of the ReLU that ``node`` is: infinity, or a bound such as 6.0. None: it is no ReLU."""
    if node.op == "call_module":
        return dict(known.relus).get(str(node.target))
    if node.op != "call_function" or not node.args or not isinstance(node.args[0], Node):
        return None
    if node.target in _RELUS:
        return math.inf
    if node.target in _RELU6S:
        return 6.0
    return bound_of_clip(*node.args[1:3]) if node.target in _CLIPS and len(node.args) > 1 else None


def _geometry(conv: Node) -> tuple[Any, ...]:
    stride, padding, dilation, groups = (*conv.args[3:], *(1, 0, 1, 1)[len(conv.args) - 3 :])[:4]
    every = (tuple(each) if isinstance(each, (list, tuple)) else each for each in (stride, padding, dilation))
    return (*every, groups, _CONVOLUTIONS[cast(Any, conv.target)])


def _is_inplace(node: Node, known: KnownParts) -> bool:
    """Whether ``node`` writes its result into its first argument."""
    target: Any = node.target
    if node.op == "call_module":
        return target in known.writing
    if isinstance(target, torch._ops.OpOverload):
        return any(each.alias_info is not None and each.alias_info.is_write for each in target._schema.arguments[:1])
    if node.kwargs.get("inplace") or target in _INPLACE_OPERATORS:
        return True
    name = target if isinstance(target, str) else getattr(target, "__name__", "")
    # Not a method such as __and__, and not operator.and_.
    return bool(name.endswith("_") and not name.endswith("__") and not hasattr(operator, name))


def _is_safe(match: Match, x: Node, known: KnownParts) -> bool:
    """Whether the call may stand at the last node of ``match`` and still read the same ``x``.

    That is false if a node outside of the match, between its first reader of ``x`` and its last node, writes into ``x``
    in place.
    """
    inside, node = set(match.nodes), match.nodes[-1]
    first = next(each for each in match.nodes if x in each.all_input_nodes)
    while node is not first:
        node = node.prev
        if node not in inside and node.args and node.args[0] is x and _is_inplace(node, known):
            return False
    return True
