"""Read and write the graph of a ``torch.fx.GraphModule``, which torch makes copies and pickles of the module from."""

from __future__ import annotations

from typing import Any

from torch import fx

from tritonq.prepare.forwards.graph import DATA_VERSION, ForwardData, ForwardGraph
from tritonq.prepare.forwards.graph_data import graph_to_data
from tritonq.prepare.forwards.quantized import Read


def read_graph(module: fx.GraphModule) -> ForwardData | None:
    """Return the forward data of a GraphModule's graph; None if plain data can't hold it.

    Quantizers of arguments and results are calls in the graph, so there are no "reads" and "returns".
    """
    try:
        return {"version": DATA_VERSION, "eval": graph_to_data(module.graph), "train": None, "hidden": []}
    except ValueError:
        return None


def write_graph(module: fx.GraphModule, data: ForwardData) -> None:
    """Give a GraphModule the graph that forward data describe, with quantizers of arguments and results in it.

    Args:
        module: the GraphModule, changed in place. Other graphs that it keeps as attributes become the same graph.
        data: forward data, checked by ``apply_forward``; :mod:`~tritonq.prepare.forwards.edited` lists their keys. If
            "eval" is None, the module's own graph is kept, and only the quantizers are added.

    Raises:
        ValueError: the data have "answers" or a graph under "train", since a GraphModule has one graph for both modes;
            or they quantize an argument that has no position, one at a position that the graph does not have, or a
            tensor inside of an argument; or "eval" is None and plain data can't hold the module's own graph.
    """
    if "answers" in data or data.get("train") is not None:
        raise ValueError("the forward of a GraphModule is one graph")
    written = {**data, "version": DATA_VERSION, "eval": data["eval"] or graph_to_data(module.graph)}
    graph = ForwardGraph.from_data(written).eval_graph
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    for read in (Read.from_data(item) for item in data.get("reads", ())):
        if read.position is None or read.position >= len(placeholders) or read.path:
            raise ValueError("the arguments of a GraphModule are quantized by position")
        _pass_through(graph, placeholders[read.position], placeholders[-1], read.child)
    if data.get("returns") is not None:
        output = next(node for node in graph.nodes if node.op == "output")
        result: Any = output.args[0]
        with graph.inserting_before(output):
            output.args = (graph.call_module(data["returns"], (result,)),)
    for name in _further_graphs(module):
        setattr(module, name, graph)
    module.graph = graph


def differs_by_mode(module: fx.GraphModule) -> bool:
    """Whether a GraphModule keeps further graphs, such as one for training, which compute something else than its own.

    torchvision's feature extractors are such: ``train()`` sets the attribute ``graph`` to one of two that they keep.
    """
    code = module.graph.python_code("self").src
    return any(graph.python_code("self").src != code for graph in _further_graphs(module).values())


def _further_graphs(module: fx.GraphModule) -> dict[str, fx.Graph]:
    """Return the graphs that a GraphModule keeps besides its present one, by attribute."""
    return {name: held for name, held in vars(module).items() if isinstance(held, fx.Graph) and name != "_graph"}


def _pass_through(graph: fx.Graph, node: fx.Node, after: fx.Node, child: str) -> None:
    """Let all readers of ``node`` read the result of a child instead, which is called behind the node ``after``."""
    with graph.inserting_after(after):
        call = graph.call_module(child, (node,))
    node.replace_all_uses_with(call, delete_user_cb=lambda user: user is not call)
