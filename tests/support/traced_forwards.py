"""Forwards as graphs, for the tests of what traces them."""

from tritonq.prepare.forwards.graph import ForwardGraph
from tritonq.prepare.forwards.proof import Recorded, match_frame
from tritonq.prepare.record.recorder import record


def traced(model, *args, owner="", **kwargs):
    """Return the forward of one module of a recorded model, matched against the record; with its sites by call."""
    flow = record(model, args, kwargs)
    graph = ForwardGraph.trace(model.get_submodule(owner), flow.frames_of(owner))
    sites = {}
    for frame in flow.frames_of(owner):
        sites |= match_frame(graph.eval_graph, Recorded.of(model, flow), frame)
    return graph, {flow.calls[index].name: site for index, site in sites.items()}
