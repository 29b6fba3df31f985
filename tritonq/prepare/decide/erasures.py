"""How ReLUs that became part of a layer or join leave a model."""

from __future__ import annotations

from tritonq.prepare.decide.analysis import Analysis
from tritonq.prepare.decide.plan import Plan


def erasures(analysis: Analysis, erased: frozenset[int]) -> tuple[tuple[str, ...], tuple[tuple[str, str], ...]]:
    """Return how absorbed ReLU calls are removed: names of modules, and places in forwards.

    One that can't be removed stays, and changes nothing.
    """
    modules: dict[str, None] = {}
    nodes: dict[tuple[str, str], None] = {}
    for call in (analysis.flow.calls[index] for index in sorted(erased)):
        name = call.module_name
        if name is not None and all(other.index in erased for other in analysis.flow.calls_of(name)):
            modules[name] = None
            continue
        site = analysis.site(call)
        at_site = () if site is None else analysis.calls_at(call.owner, site.node)
        if site is not None and all(other.index in erased for other in at_site):
            nodes[call.owner, site.node] = None
    return tuple(modules), tuple(nodes)


def stuck_relus(analysis: Analysis, plan: Plan) -> frozenset[int]:
    """Return the absorbed calls of ReLU6 and its like that no erasure removes.

    Behind a quantizer a plain ReLU changes nothing, but 6 may lie between two codes.
    """
    at_nodes = {call.index for place in plan.erased_nodes for call in analysis.calls_at(*place)}
    calls = (analysis.flow.calls[index] for index in plan.erased - at_nodes)
    return frozenset(
        call.index for call in calls if not analysis.is_relu(call) and call.module_name not in plan.erased_modules
    )
