"""Decide how ReLUs that became part of a layer or join are removed from a model."""

from __future__ import annotations

from tritonq.prepare.decide.analysis import Analysis
from tritonq.prepare.decide.plan import Plan
from tritonq.prepare.record.dataflow import CallIndex


def erasures(analysis: Analysis, erased: frozenset[CallIndex]) -> tuple[tuple[str, ...], tuple[tuple[str, str], ...]]:
    """Return which ReLU modules are replaced, and which calls are taken out of forwards, to remove some ReLU calls.

    ``erased`` holds the indices of the calls. A module is replaced if all its calls are among them. A call is taken out
    if all calls at its place in the forward are. Others stay in the model: behind a quantizer a plain ReLU has no
    effect.

    Returns:
        Names of the modules that are replaced by ``nn.Identity``, and the places that are taken out of forwards:
        ``(name of the module whose forward it is, Site.node)``, such as ``("block", "relu_1")``.
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


def stuck_relus(analysis: Analysis, plan: Plan) -> frozenset[CallIndex]:
    """Return the indices of ReLU6 calls and the like that a plan makes part of a layer or join but can't remove.

    The plan removes a call if its module is in ``plan.erased_modules``, or its place in ``plan.erased_nodes``.

    Unlike a plain ReLU, a ReLU6 behind a quantizer may have an effect: 6 may lie between two codes.
    """
    at_nodes = {call.index for place in plan.erased_nodes for call in analysis.calls_at(*place)}
    calls = (analysis.flow.calls[index] for index in plan.erased - at_nodes)
    return frozenset(
        call.index for call in calls if not analysis.is_relu(call) and call.module_name not in plan.erased_modules
    )
