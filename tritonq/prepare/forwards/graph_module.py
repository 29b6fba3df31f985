"""The forward of a ``torch.fx.GraphModule``, which is a graph already: copies and pickles are made from it alone."""

from __future__ import annotations

from typing import Any

from torch import fx

from tritonq.prepare.forwards.graph import DATA_VERSION, ForwardData, ForwardGraph
from tritonq.prepare.forwards.graph_data import graph_to_data
from tritonq.prepare.forwards.quantized import Read


def read_graph(module: fx.GraphModule) -> ForwardData | None:
    """Return the data of its graph; None where plain data can't hold that, so that it was never edited."""
    try:
        return {"version": DATA_VERSION, "eval": graph_to_data(module.graph), "train": None, "hidden": []}
    except ValueError:
        return None


def write_graph(module: fx.GraphModule, data: ForwardData) -> None:
    """Give it the graph that ``data`` describes, as ``apply_forward`` has checked it.

    Raises:
        ValueError: a forward that is no single graph.
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
    module.graph = graph


def _pass_through(graph: fx.Graph, node: fx.Node, after: fx.Node, child: str) -> None:
    with graph.inserting_after(after):
        call = graph.call_module(child, (node,))
    node.replace_all_uses_with(call, delete_user_cb=lambda user: user is not call)
