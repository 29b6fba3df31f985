"""Find where a quantizer of a recorded value can stand: behind what makes the value, or in its readers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch.jit import ScriptModule

from tritonq.prepare.decide.analysis import Analysis
from tritonq.prepare.decide.chains import Chains
from tritonq.prepare.decide.clips import limits_range
from tritonq.prepare.decide.plan import GridSource, Where
from tritonq.prepare.forwards.answered import AnsweredForward
from tritonq.prepare.forwards.proof import Site
from tritonq.prepare.record.dataflow import Call, CallIndex, Frame, Ref, ValueIndex


@dataclass(frozen=True)
class Origin:
    """A place where a quantizer can stand, with all values that it then quantizes.

    Attributes:
        where: ``"output"``: behind the module ``owner``; ``"node"``: behind a node in the forward of ``owner``;
            ``"consumer"``: in the layers and joins that read the value.
        owner: name of the module that ``where`` speaks of, "" for the model itself; for ``"consumer"`` always "".
        values: indices of the values.
        site: for ``"node"`` the :class:`~tritonq.prepare.forwards.proof.Site`, the place in that forward; else None.
    """

    where: Where
    owner: str
    values: list[ValueIndex]
    site: Site | None = None


def place_of(root: ValueIndex, analysis: Analysis) -> Origin:
    """Return where a quantizer of the value ``root`` can stand.

    That is where the value is made, if every recorded run makes it there and that place can be edited; else, and for
    inputs of the model, where it is read (``"consumer"``).
    """
    place = _origin_of(root, analysis)
    runs = {analysis.flow.values[value].run for value in place.values}
    return place if len(runs) == analysis.flow.runs else Origin("consumer", "", [root])


def grid_behind(
    ends: Iterable[CallIndex], analysis: Analysis, grids: Mapping[ValueIndex, GridSource], chains: Chains
) -> GridSource | None:
    """Return what gives the results of some calls their grid, if only clips (ReLU6, clamp) read these results.

    The quantizer of such a result stands behind the clip, whose range its grid covers.

    Args:
        ends: indices of the calls, such as the last calls of layers.
        analysis: the model and its record.
        grids: for each value that lies on a grid, by index, the layer, join or planned quantizer that gives it.
        chains: finds clips that follow each other, which become one.

    Returns:
        The one source of the grid behind all these clips; None: there are no calls, a call has no clip behind it, a
        clip's result lies on no grid, or the grids differ.
    """
    clips = [analysis.follower(analysis.flow.calls[index]) for index in ends]
    values = [analysis.value_of(chains.last_clip(clip)) for clip in clips if clip is not None and limits_range(clip)]
    found = [None if value is None else grids.get(value) for value in values]
    return found[0] if found and len(found) == len(clips) and all(grid is found[0] for grid in found) else None


def results(calls: Iterable[Call | Frame], analysis: Analysis) -> list[ValueIndex]:
    """Return the indices of the values that calls return, in order, without calls that return no single tensor.

    A frame stands for the call of its module. Of a recurrent layer's result the first tensor counts.
    """
    values = (analysis.value_of(call) for call in calls)
    return [value for value in values if value is not None]


def is_unread(ends: Iterable[CallIndex], analysis: Analysis) -> bool:
    """Whether nothing reads the results of some calls: an LSTM's sequence if only its last state is used.

    The model's outputs are read. Of a recurrent layer's result the first tensor counts. Other calls that return no
    single tensor are left out; False if all do so.

    Args:
        ends: indices of the calls in ``analysis.flow.calls``.
        analysis: the model and its record.
    """
    made = results((analysis.flow.calls[end] for end in ends), analysis)
    values = [analysis.flow.values[value] for value in made]
    return bool(values) and not any(value.consumers or value.is_output for value in values)


def _origin_of(root: ValueIndex, analysis: Analysis) -> Origin:
    """Return where the value ``root`` is made, as a place for a quantizer, whether or not every run makes it there."""
    flow = analysis.flow
    call = flow.producer(root)
    if call is None or not isinstance(call.output, Ref) or call.output.value != root:
        return Origin("consumer", "", [root])
    # Tracing takes time: only where the module's own result won't do.
    module_name = None if isinstance(call.target, ScriptModule) else call.module_name  # those take no children
    by_module = module_name is not None and _has_one_place(call, analysis)
    site = None if by_module else analysis.site(call)
    if site is not None and isinstance(analysis.forward(call.owner), AnsweredForward):
        # Its other branches return tensors too: a quantizer of what the module returns sees them all.
        site = None if returned_by(root, analysis) == call.owner else site
    if site is not None:
        return Origin("node", call.owner, results(analysis.calls_at(call.owner, site.node), analysis), site)
    if module_name is not None:
        return Origin("output", module_name, results(flow.calls_of(module_name), analysis))
    container = returned_by(root, analysis)
    if container is not None:
        return Origin("output", container, results(flow.frames_of(container), analysis))
    return Origin("consumer", "", [root])


def _has_one_place(call: Call, analysis: Analysis) -> bool:
    """Whether the called module is called once per run of its owner, so that its output is one tensor of the model."""
    calls = analysis.flow.calls_of(str(call.module_name))
    return len({other.owner for other in calls}) == 1 and len({other.frame for other in calls}) == len(calls)


def returned_by(value: ValueIndex, analysis: Analysis) -> str | None:
    """Return the name of the innermost module whose whole result is a value that nothing inside of it reads.

    Leaves (modules whose call counts as one operation, such as ``nn.Conv2d``) and the model itself do not count. None
    if there is no such module.
    """
    flow = analysis.flow
    for frame in reversed(flow.frames_returning(value)):
        inside = (flow.is_within(reader.frame, frame.index) for reader in flow.consumers(value))
        if frame.parent is not None and not any(inside):
            return frame.owner
    return None
