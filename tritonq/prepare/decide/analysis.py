"""Answer questions about a recorded model: which call follows which, what keeps a grid, where a forward can be edited.

A *grid* is the set of values that a quantized tensor can take. An operation *keeps the grid* if it returns only values
of its input, such as a reshape or a max pool, so that its result needs no quantizer. A *site* is the place of a call in
a forward that can be edited. An *island* is a softmax or norm that stays in float between quantized tensors. A *mask*
is what attention adds to its scores before the softmax.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Iterable, Sequence
from functools import cached_property
from typing import TypeAlias

import torch
from torch import nn
from torch.fx import GraphModule

from tritonq.nn import RepVGGBlock
from tritonq.prepare.decide.clips import ceiling_of_call
from tritonq.prepare.decide.constants import Constants
from tritonq.prepare.decide.masks import is_softmax, summands, values_without_layers
from tritonq.prepare.forwards.answered import AnsweredForward
from tritonq.prepare.forwards.branches import fixed_number, fixed_values, frozen_branch
from tritonq.prepare.forwards.graph import ForwardGraph
from tritonq.prepare.forwards.guarded import GuardedGraph, takes_any_arguments
from tritonq.prepare.forwards.mode import reads_mode
from tritonq.prepare.forwards.proof import Recorded, Site, match_frame
from tritonq.prepare.forwards.trace import TraceError
from tritonq.prepare.record.dataflow import Call, CallIndex, Dataflow, Frame, Ref, ValueIndex, refs_in
from tritonq.prepare.record.operations import is_leaf

# Modules and functions whose output holds only values of their input (and zero, which is on every grid).
_KEEPING_MODULES = (
    *(nn.Identity, nn.Flatten, nn.Unflatten, nn.PixelShuffle, nn.PixelUnshuffle, nn.ChannelShuffle),
    *(nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d),
    # In eval; in training they scale, as in torch.ao.
    *(nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d),
    *(nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d, nn.ReflectionPad1d, nn.ReflectionPad2d, nn.ReflectionPad3d),
    *(nn.ReplicationPad1d, nn.ReplicationPad2d, nn.ReplicationPad3d, nn.CircularPad1d, nn.CircularPad2d),
    *(nn.CircularPad3d, nn.UpsamplingNearest2d),
)
_KEEPING_NAMES = """
    flatten unflatten reshape view view_as permute transpose swapaxes swapdims movedim moveaxis t T mT squeeze unsqueeze
    contiguous clone detach getitem select narrow chunk split tensor_split unbind expand expand_as repeat tile flip roll
    repeat_interleave stack index_select gather take_along_dim fliplr flipud rot90 unfold atleast_3d ravel
    split_with_sizes unsafe_chunk unsafe_split hsplit vsplit dsplit broadcast_to
    max_pool1d max_pool2d max_pool3d adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d amax amin max min
    aminmax topk sort msort kthvalue cummax cummin
    pack_padded_sequence dropout dropout1d dropout2d dropout3d cat pixel_shuffle pixel_unshuffle channel_shuffle
"""
_KEEPING_FUNCTIONS = frozenset(_KEEPING_NAMES.split())
# Of their further tensors these read the shape alone.
_SHAPED_LIKE = frozenset({"expand_as", "view_as", "reshape_as"})
# With a number or a constant these scale or shift; a sum of such values is a sum of quantized tensors all the same.
_AFFINE = frozenset({"mul", "div", "add", "sub"})
# Islands in float between quantized tensors: a product of two activations behind one is worth quantizing all the same.
_NORMS = frozenset({"normalize", "layer_norm", "rms_norm", "group_norm", "instance_norm", "softmax"})
_NORM_MODULES = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.modules.instancenorm._InstanceNorm, nn.Softmax)
_RECURRENT = (nn.RNNBase, nn.RNNCellBase)
# These keep a grid unless they change the dtype.
_CASTS = frozenset({"to", "type_as", "float", "half", "bfloat16", "cpu", "cuda"})
_NEAREST = ("nearest", "nearest-exact")

# Why a call inside of a function that torch.func transforms stays in float.
IN_TRANSFORM = "it runs inside of torch.vmap, torch.func.grad or the like, where ranges can't be observed"

EditableForward: TypeAlias = ForwardGraph | AnsweredForward


class Analysis:
    """A model, the record of one or two runs of it, and what follows from them.

    With two runs (eval mode and training mode) each module and each place in a forward has the calls of both.

    Args:
        model: the model.
        flow: the record, in which calls and values have indices.
        held: names of modules whose own forward ran in eval mode in the training run.
        cautious: whether to leave alone, among forwards that keep their branches, ``x += y`` (``x`` may have another
            name there) and a ``forward`` that a module itself holds, not its class.

    Attributes:
        constants: its ``values`` are the indices of the values that follow only from parameters and buffers.
        modules: the model's modules by name, except those inside of a RepVGG block.
        leaves: names of the modules whose calls were recorded as one operation.
    """

    def __init__(self, model: nn.Module, flow: Dataflow, held: Container[str] = (), cautious: bool = False) -> None:
        self.model = model
        self.flow = flow
        self.constants = Constants(model, flow)
        self._held, self._cautious = held, cautious
        self._recorded = Recorded.of(model, flow)
        blocks = tuple(f"{name}." for name, module in self._recorded.modules.items() if type(module) is RepVGGBlock)
        # What is inside of a RepVGG block is the block's own.
        self.modules = {name: module for name, module in self._recorded.modules.items() if not name.startswith(blocks)}
        # Asked now: quantizers will become children of leaves.
        looked_into = {frame.owner for frame in flow.frames}
        self.leaves = frozenset(
            name for name, module in self.modules.items() if is_leaf(module) and name not in looked_into
        )
        self._forwards: dict[str, EditableForward | TraceError] = {}
        # Names of graph nodes for calls that are answered all the same: children are named after them.
        self._labels: dict[CallIndex, str] = {}
        self._sites: dict[CallIndex, Site] = {}
        self._calls_at: dict[tuple[str, str], list[Call]] = {}
        self._masks: dict[CallIndex, ValueIndex | None] = {}

    def value_of(self, call: Call | Frame) -> ValueIndex | None:
        """Return the index of the value that a call returns; None unless it returns a single tensor.

        For a recurrent layer that is the first tensor of its result: the sequence, or the hidden state of a cell.
        """
        if isinstance(call, Call) and isinstance(call.target, _RECURRENT):
            return next(iter(refs_in(call.output)), None)
        return call.output.value if isinstance(call.output, Ref) else None

    def follower(self, call: Call) -> Call | None:
        """Return the only call that reads the result of ``call``; None if several or none do.

        None, too, if the model returns the result, or if that is no single tensor. ``nn.Identity`` is skipped.
        """
        value = self.value_of(call)
        reader = None if value is None else self.flow.single_consumer(value)
        return self.follower(reader) if reader is not None and self.is_identity(reader) else reader

    def calls_like(self, call: Call) -> tuple[Call, ...]:
        """Return every call of the same module, or of the same place in the same forward, ``call`` included."""
        if call.module_name is not None:
            return self.flow.calls_of(call.module_name)
        functions, site = self.flow.functions_of(call.owner), self.site(call)
        alike = {other.index: other for other in functions if (other.run, other.ordinal) == (call.run, call.ordinal)}
        if site is not None:
            alike |= {other.index: other for other in self.calls_at(call.owner, site.node)}
        else:  # it stays in float: once for both runs, where these do the same
            same = (other for other in functions if (other.name, other.ordinal) == (call.name, call.ordinal))
            alike |= {other.index: other for other in same if self.site(other) is None}
        return tuple(alike[index] for index in sorted(alike))

    def forward(self, owner: str) -> EditableForward | TraceError:
        """Return the forward of the module ``owner``, to be edited, or a ``TraceError`` that says why it can't be.

        It is a ``ForwardGraph`` if the graph is proven to be the forward: it makes the recorded calls and has no other
        branches. Otherwise it is an ``AnsweredForward``: the forward runs as written, and single calls can be answered
        by modules. The same object is returned each time.
        """
        if owner not in self._forwards:
            self._forwards[owner] = self._editable(owner)
        return self._forwards[owner]

    def site(self, call: Call) -> Site | None:
        """Return the site of a call in the forward of its owner; None if that forward can't be edited there."""
        forward = self.forward(call.owner)
        site = self._sites.get(call.index)
        if isinstance(forward, TraceError) or site is None:
            return None
        if isinstance(forward, ForwardGraph) and not forward.can_edit(site.node):
            return None
        # More than one write means that a view of the overwritten tensor lives on.
        return None if site.in_place and len(call.writes) > 1 else site

    def calls_at(self, owner: str, node: str) -> tuple[Call, ...]:
        """Return all calls that one site in the forward of the module ``owner`` made in the recorded runs.

        ``node`` is ``Site.node`` of that site.
        """
        return tuple(self._calls_at.get((owner, node), ()))

    def runs_in_all_modes(self, calls: Iterable[Call | Frame]) -> bool:
        """Whether some of the calls belong to each recorded run.

        If the model could not be recorded in training mode, the run in eval mode is enough.
        """
        return {call.run for call in calls} == set(range(self.flow.runs))

    def missing_mode(self, calls: Iterable[Call | Frame]) -> str:
        """Return why calls of one run stay in float: "it runs in training mode only, and would not be deployed"."""
        if {call.run for call in calls} == {0}:
            return "it runs in eval mode only, so that training would not teach its range"
        return "it runs in training mode only, and would not be deployed"

    def may_fuse_in(self, owner: str) -> bool:
        """Whether the record of the forward of ``owner`` holds in training mode too, so that calls in it may be fused.

        That is so if it was recorded in training mode, or if the forward does not depend on the mode.
        """
        if self.flow.runs > 1 and owner not in self._held:
            return True
        module = self.modules[owner]
        if "forward" not in vars(module) and not reads_mode(type(module)):
            return True
        graph = self.forward(owner)
        return isinstance(graph, ForwardGraph) and not graph.differs_in_training

    def is_identity(self, call: Call) -> bool:
        """Whether a call is that of an ``nn.Identity`` or of an empty ``nn.Sequential``."""
        target = call.target
        return type(target) is nn.Identity or (type(target) is nn.Sequential and len(target) == 0)

    def unwrapped(self, value: ValueIndex) -> ValueIndex:
        """Return the value that was given to the ``nn.Identity`` calls which returned ``value``.

        Without such calls ``value``.
        """
        call = self.flow.producer(value)
        return self.unwrapped(call.inputs[0]) if call is not None and self.is_identity(call) else value

    def is_relu(self, call: Call) -> bool:
        """Whether a call is a plain ReLU (no ReLU6), as a module or a function."""
        return ceiling_of_call(call) == math.inf

    def keeps_grid(self, call: Call) -> bool:
        """Whether a call returns only values of its first input (and 0), so that its result lies on the input's grid.

        Further inputs must be indices, or tensors that give only a shape. A plain ReLU counts: 0 is on every grid.
        So does dropout, which scales in training. False without an input, or if the first is a parameter or buffer.
        """
        target = call.target
        moved, *indices = call.inputs or (None,)
        if moved is None or self.flow.is_state(moved):
            return False
        if call.kind == "function" and call.name in _SHAPED_LIKE:
            return True
        if not all(map(self._is_index, indices)):
            return False
        if self.is_relu(call):
            return True
        if isinstance(target, nn.Module):
            nearest = isinstance(target, nn.Upsample) and target.mode in _NEAREST
            zeros = isinstance(target, (nn.ConstantPad1d, nn.ConstantPad2d, nn.ConstantPad3d)) and target.value == 0
            # A module that returned its input and did nothing: stochastic depth, which scales in training as Dropout.
            return isinstance(target, _KEEPING_MODULES) or nearest or zeros or call.module_name not in self.leaves
        if call.name == "pad":
            value = call.kwargs.get("value", call.args[3] if len(call.args) > 3 else None)
            return value is None or value == 0
        if call.name == "pad_packed_sequence":
            return call.args[3:4] == (0.0,)
        if call.name == "add":  # sum() begins with 0 + x
            constants = [argument for argument in call.args if not isinstance(argument, Ref)]
            return len(call.args) == 2 and len(constants) == 1 and constants[0] == 0 and not call.kwargs
        if call.name == "interpolate":
            return call.kwargs.get("mode", call.args[3] if len(call.args) > 3 else "nearest") in _NEAREST
        if call.name in _CASTS:
            value = self.value_of(call)
            return value is not None and self.flow.values[value].dtype == self.flow.values[call.inputs[0]].dtype
        return call.name in _KEEPING_FUNCTIONS

    def is_island(self, call: Call) -> bool:
        """Whether a call is a softmax or a norm, which stays in float between quantized tensors."""
        return isinstance(call.target, _NORM_MODULES) or (call.kind == "function" and call.name in _NORMS)

    def source_of(self, call: Call, through_norms: bool = False) -> ValueIndex | None:
        """Return the index of the input whose grid a call keeps, or that it scales or shifts by constants or a mask.

        Args:
            call: any recorded call; others than these give None.
            through_norms: whether to return the input of a softmax or norm, too.
        """
        if self.keeps_grid(call):
            return call.inputs[0]
        mask = self.mask_of(call)
        computed = [value for value in call.inputs if value not in self.constants.values and value != mask]
        if through_norms and len(computed) == 1 and self.is_island(call):
            return computed[0]
        if call.kind != "function" or call.name not in _AFFINE or len(computed) != 1:
            return None
        is_reversed = call.args[:1] != (Ref(computed[0]),) or getattr(call.target, "__name__", "") == "__rdiv__"
        return None if call.name == "div" and is_reversed else computed[0]

    def mask_of(self, call: Call) -> ValueIndex | None:
        """Return the index of the value that a call adds to attention scores as their mask; None for other calls.

        A mask follows from the model's inputs without a layer between. Besides, only a softmax reads the sum (moved,
        scaled or shifted on the way), or the mask dwarfed the other summand in the recorded run: its largest magnitude
        was at least 10,000, and at least 256 times that of the other. A sum that a mask dwarfed can be a mask itself.
        """
        if call.dwarfing is not None and call.dwarfing in self._masking:
            return call.dwarfing
        if call.index not in self._masks:
            found = summands(call, self._without_layers)
            is_masking = found is not None and self.enters(self.value_of(call), is_softmax)
            self._masks[call.index] = found[1] if found is not None and is_masking else None
        return self._masks[call.index]

    def enters(self, value: ValueIndex | None, is_end: Callable[[Call], bool]) -> bool:
        """Whether only one call reads a value, as its first input, and ``is_end`` holds for that call.

        The value may be moved, scaled and shifted by constants on the way, each time with one reader. False for None,
        or if the model returns it.
        """
        call = None if value is None else self.flow.single_consumer(value)
        if call is None:
            return False
        if is_end(call):
            return call.inputs[:1] == (value,)
        return self.source_of(call) == value and self.enters(self.value_of(call), is_end)

    @cached_property
    def _without_layers(self) -> frozenset[ValueIndex]:
        return values_without_layers(self.flow, self.constants)

    @cached_property
    def _masking(self) -> frozenset[ValueIndex]:
        """Values that are masks where they dwarf a summand: what follows from inputs, and sums with such a mask."""
        masking = set(self._without_layers)
        for call in self.flow.calls:
            is_masked = call.dwarfing in masking or (self.keeps_grid(call) and call.inputs[0] in masking)
            if call.inputs and is_masked:
                masking.update(call.outputs)
        return frozenset(masking)

    def _is_index(self, value: ValueIndex) -> bool:
        """Whether a value holds whole numbers, as indices do."""
        record = self.flow.values[value]
        return not record.dtype.is_floating_point and not record.dtype.is_complex and record.dtype != torch.bool

    def _editable(self, owner: str) -> EditableForward | TraceError:
        """Return the forward of a module, to be edited, or the error why it can't be; note the sites in it."""
        found = self._trace(owner)
        if isinstance(found, ForwardGraph):
            return found
        module, frames = self.modules[owner], self.flow.frames_of(owner)
        # Cautious, since one that calls its class's forward would call the edited one.
        if not frames or (self._cautious and "forward" in vars(module)):
            return found
        answered, calls = self._answered(frames, str(found))
        for call in calls:
            self._note_site(owner, call, Site(call.place, False, self._labels.get(call.index, call.name)))
        return answered

    def _answered(self, frames: Sequence[Frame], reason: str = "") -> tuple[AnsweredForward, list[Call]]:
        """Return a forward that runs as written, and its recorded calls that can be answered.

        ``frames`` are the recorded runs of the forward; ``reason`` says why no graph stands for it.
        """
        answered, found = AnsweredForward(reason), []
        for frame in frames:
            calls = (self.flow.calls[index] for kind, index in frame.events if kind == "call")
            for call in calls:
                if call.place and (not call.writes or self._rebinds(call)):
                    answered.expect(call, frame.training)
                    found.append(call)
        return answered, found

    def _rebinds(self, call: Call) -> bool:
        """Whether the forward goes on with the result of a call in place.

        That is so for ``x *= y``, for ``f(x).mul_(y)``, and for a plain ReLU whose result is used.
        """
        if len(call.writes) > 1:
            return False
        if self.is_relu(call) and call.use != "dropped":
            return True
        return (call.use == "rebound" or self._overwrites_result(call)) and not self._cautious

    def _overwrites_result(self, call: Call) -> bool:
        """Whether a call overwrites what another one made, before that has a name."""
        if call.use != "temporary":
            return False
        made = self.flow.producer(call.inputs[0])
        # What overwrites its operand returns that, which may have one.
        return made is not None and (not made.writes or self._overwrites_result(made))

    def _note_site(self, owner: str, call: Call, site: Site) -> None:
        """Note that ``call`` is made at ``site``, in the forward of the module ``owner``."""
        self._sites[call.index] = site
        self._calls_at.setdefault((owner, site.node), []).append(call)

    def _trace(self, owner: str) -> ForwardGraph | TraceError:
        """Return the graph of a module's forward and note the sites in it.

        If no graph can stand for the forward, a ``TraceError`` is returned (not raised).
        """
        module, frames = self.modules[owner], self.flow.frames_of(owner)
        try:
            graph = GuardedGraph.trace(module, frames)
            sites = [match_frame(graph.graph_of(frame.training), self._recorded, frame) for frame in frames]
        except TraceError as error:
            return error
        named = [
            (self.flow.calls[index], Site(node, site.in_place, node))
            for frame, found in zip(frames, sites, strict=True)
            for index, site in found.items()
            if (node := graph.eval_name(site.node, frame.training)) is not None
        ]
        branch, number = frozen_branch(module), fixed_number(module)
        if branch is not None or number is not None:
            self._labels.update({call.index: site.node for call, site in named})
            has = f"one branch of {branch}" if branch is not None else f"one value of {number}"
            return TraceError(f"its trace has {has}")
        for call, site in named:
            self._note_site(owner, call, site)
        values = fixed_values(module)
        if not isinstance(module, GraphModule) and (values or takes_any_arguments(type(module).forward)):
            forward, calls = self._answered(frames)
            answerable = {call.index for call in calls}
            graph.guard(values, forward, ((site.node, call.place) for call, site in named if call.index in answerable))
        return graph
