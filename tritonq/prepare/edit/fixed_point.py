"""Build a fixed-point network: layers, additions and poolings, and a format for each group of tensors between them.

A *format* says how a fixed-point tensor is stored: its bits, its sign and its fractional length. Values are divided by
the factor η of the format in which they are read.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from torch import Tensor, nn

from tritonq.nn.fixed_point import FixedPointConv2d, FixedPointConvBn2d, FixedPointLinear
from tritonq.nn.fixed_point_joins import FixedPointAdd, FixedPointAvgPool2d, FixedPointMaxPool2d, remaining_factor
from tritonq.nn.fixed_point_layer import ActivationFormat, FixedPointLayer
from tritonq.nn.folded import FoldedBatchNorm
from tritonq.prepare.decide.fixed_point import Group, Links, Pooling, is_fixed_point
from tritonq.prepare.decide.layers import Layer
from tritonq.prepare.edit.editor import ModelEditor
from tritonq.prepare.edit.float_keys import note_batch_norms
from tritonq.prepare.edit.fuse import fuse_row, move_hooks
from tritonq.prepare.edit.swap import from_float
from tritonq.prepare.forwards.graph import Operands, first_node, node_operands
from tritonq.prepare.record.dataflow import Call, CallIndex, ValueIndex
from tritonq.qconfig import QConfig


def build_fixed_point(
    editor: ModelEditor,
    links: Links,
    qconfigs: Mapping[nn.Module, QConfig | None],
    inputs: Mapping[str, Tensor],
) -> None:
    """Put the fixed-point forms of a network's layers, additions and poolings into the model, with an editor.

    Each group of tensors that something rounds gets one format, made here. A BatchNorm becomes part of its layer.
    Clipped ReLUs such as ReLU6 become plain ones, since a format clips at its learned level, and max poolings become
    ones that take integers. After an error the model may be half edited: the editor undoes that.

    Args:
        editor: edits the model.
        links: the network's layers, additions and poolings, and the groups of tensors between them.
        qconfigs: the qconfig of each module of the float model. Those of layers must be fixed point.
        inputs: for each layer that reads an input of the network, by the layer's name, that tensor in the run on the
            example inputs. It decides whether the input's format is signed, and with which fractional length it begins.
            Other formats are signed unless all their readers come after a ReLU.

    Raises:
        ValueError: a layer without a fixed-point qconfig, a part without a fixed-point form, an average pooling whose
            factor no single layer can take, or a forward that can't be edited. The message names the module.
    """
    _Builder(editor, links, qconfigs, inputs).build()


class _Builder:
    """The work of :func:`build_fixed_point`, with its arguments."""

    def __init__(
        self,
        editor: ModelEditor,
        links: Links,
        qconfigs: Mapping[nn.Module, QConfig | None],
        inputs: Mapping[str, Tensor],
    ) -> None:
        self._editor, self._links, self._analysis = editor, links, links.analysis
        self._qconfigs, self._inputs = qconfigs, inputs
        self._layers: dict[CallIndex, FixedPointLayer] = {}
        self._formats: dict[int, ActivationFormat] = {}
        self._makers: dict[int, nn.Module] = {}

    def build(self) -> None:
        """Put the fixed-point forms of all layers, additions and poolings into the model.

        Clipped ReLUs become plain ones.
        """
        # Forwards are traced while the children are still those that were recorded.
        functions = [*self._links.additions.values(), *self._links.relus]
        functions += [pooling.call for pooling in self._links.poolings.values()]
        self._sites = {call.index: self._analysis.site(call) for call in functions if call.kind == "function"}
        for index, layer in self._links.layers.items():
            self._layers[index] = self._make_layer(layer)
        self._make_formats()
        self._share_steps()
        for index, made in self._layers.items():
            self._link(index, made)
        for call in self._links.additions.values():
            self._add(call)
        for pooling in self._links.poolings.values():
            self._pool(pooling)
        for call in self._links.additions.values():
            self._find_sources(call)
        for name, module in list(self._editor.modules.items()):
            self._replace_max_pool(name, module)
        for call in self._links.relus:
            self._replace_relu(call)
        self._editor.apply()
        note_batch_norms(self._editor.model, self._links.layers.values())

    def _make_layer(self, layer: Layer) -> FixedPointLayer:
        """Put the fixed-point form of a layer, with its BatchNorm, in its place, and return it; hooks move to it.

        A ``FoldedBatchNorm`` takes the place of the BatchNorm. Raises ValueError without a fixed-point qconfig or form.
        """
        module = self._editor.modules[layer.name]
        qconfig = self._qconfigs[module]
        if qconfig is None or not is_fixed_point(qconfig):
            raise ValueError(f"the layer {layer.name!r} has another qconfig; a fixed-point network has no float layers")
        bn = None if layer.batch_norm is None else self._editor.modules[layer.batch_norm]
        row = module if bn is None else fuse_row([module, bn])
        kinds: dict[type[nn.Module], Any] = {nn.Linear: FixedPointLinear, nn.Conv2d: FixedPointConv2d}
        try:
            made = cast(FixedPointLayer, from_float(kinds.get(type(row), FixedPointConvBn2d), row, qconfig))
        except ValueError as error:
            raise ValueError(f"the layer {layer.name!r} has no fixed-point form: {error}") from error
        move_hooks(module, module if bn is None else bn, made)
        if bn is not None and layer.batch_norm is not None:
            cast(nn.Module, made.bn).train(bn.training)
            # While the BatchNorm isn't yet in the network a second time, as part of its layer.
            self._editor.replace(layer.batch_norm, FoldedBatchNorm(type(bn).__name__, layer.name))
        self._editor.replace(layer.name, made)
        return made

    def _make_formats(self) -> None:
        """Make one format for each group that something rounds.

        Its codes are unsigned if all readers of the group come after a ReLU. If layers read inputs of the network in
        the group, the codes are signed if one of these has a negative value, and the first of them decides the
        fractional length.
        """
        for group in self._each_group():
            if not group.has_format:
                continue
            like = self._some_format(group)
            examples = [self._inputs[name] for name in self._reader_names(group) if name in self._inputs]
            signed = not group.rectified
            if examples:
                signed = any(bool((x < 0).any()) for x in examples)
            made = ActivationFormat(like, signed, group.scaled).to(like.alpha.device, like.alpha.dtype)
            if examples:
                made.frac_len.copy_(made.choose(examples[0]))
            self._formats[id(group)] = made.train(self._editor.model.training)

    def _some_format(self, group: Group) -> ActivationFormat:
        """Return a format with the qconfig's settings: that of a layer that reads the group, or of any layer."""
        for call, _ in group.readers:
            if call.index in self._layers:
                return self._layers[call.index].input_format
        return next(iter(self._layers.values())).input_format

    def _reader_names(self, group: Group) -> list[str]:
        """Return the names of the layers that read a group."""
        return [self._links.layers[call.index].name for call, _ in group.readers if call.index in self._links.layers]

    def _each_group(self) -> list[Group]:
        """Return each group of tensors once; ``links.groups`` has it once for each of its values."""
        return list({id(group): group for group in self._links.groups.values()}.values())

    def _units(self, value: ValueIndex) -> ActivationFormat | None:
        """Return the format by whose η a value is divided; None if the value is real."""
        group = self._links.units(self._links.groups[value])
        return None if group is None else self._formats[id(group)]

    def _share_steps(self) -> None:
        """Let formats whose tensors meet in an addition or pooling share one step, also along chains of these.

        A step is ``|α| / levels``, the distance between two codes; the η of such formats then differ by powers of two.
        """
        leaders: dict[int, ActivationFormat] = {}

        def leader(found: ActivationFormat) -> ActivationFormat:
            while id(found) in leaders:
                found = leaders[id(found)]
            return found

        calls = [*self._links.additions.values(), *(pooling.call for pooling in self._links.poolings.values())]
        for call in calls:
            target = self._units(self._links.ends[call.index])
            for value in call.inputs:
                group = self._links.groups.get(value)
                if group is None or not group.has_format or target is None:
                    continue
                first, second = leader(target), leader(self._formats[id(group)])
                if first is not second:
                    leaders[id(second)] = first
        for found in self._formats.values():
            if leader(found) is not found:
                found.share_step(leader(found))

    def _link(self, index: int, layer: FixedPointLayer) -> None:
        """Give a layer the format of its input, that of its output's reader, and the factor of poolings before it.

        Raises ValueError if its input joins averages with different factors.
        """
        call = self._analysis.flow.calls[index]
        group = self._links.groups[call.inputs[0]]
        layer.input_format = self._formats[id(group)]
        layer.observes = group.readers[0] == (call, 0)
        layer.set_following(self._units(self._links.ends[index]))
        self._note_maker(index, layer)
        factors = {self._factor(value) for value in group.values if value in self._links.ends.values()}
        if len(factors) > 1:
            name = self._links.layers[index].name
            raise ValueError(f"the input of layer {name!r} joins averages over windows of different sizes")
        layer.input_factor = factors.pop() if factors else 1.0

    def _factor(self, value: ValueIndex) -> float:
        """Return the factor that a layer takes into its weight, if an average pooling made ``value``; else 1.

        It is ``remaining_factor`` of the pooling's area, such as 8/9 for 9 values: a shift divides by the power of two.
        """
        for index, pooling in self._links.poolings.items():
            if self._links.ends[index] == value:
                return remaining_factor(pooling.area)
        return 1.0

    def _add(self, call: Call) -> None:
        """Put a fixed-point addition in the place of a call; raise ValueError if an average with a factor feeds it."""
        groups = [self._links.groups[value] for value in _summands(call)]
        for group in groups:
            if any(self._factor(value) != 1 for value in group.values):
                raise ValueError(
                    f"an average pooling feeds the sum in {call.owner!r}; only a layer can take its factor"
                )
        formats = tuple(self._formats.get(id(group)) for group in groups)
        observes = tuple(group.readers[:1] == [(call, operand)] for operand, group in enumerate(groups))
        following = self._units(self._links.ends[call.index])
        made = FixedPointAdd(cast(Any, formats), cast(Any, observes), following)
        self._note_maker(call.index, made)
        self._insert(call, made, "add", node_operands)

    def _note_maker(self, index: int, module: Any) -> None:
        """Note which module makes a value, and tell it to return the value unrounded if a reader needs it so."""
        value = self._links.ends[index]
        self._makers[value] = module
        group = self._links.groups[value]
        module.raw_output = not group.has_format and not group.returned

    def _find_sources(self, call: Call) -> None:
        """Tell an addition which module makes each summand; None for a summand that is rounded to a format before."""
        groups = [self._links.groups[value] for value in _summands(call)]
        makers = [
            next((self._makers[value] for value in group.values if value in self._makers), None) for group in groups
        ]
        add = cast(FixedPointAdd, self._makers[self._links.ends[call.index]])
        first, second = (None if group.has_format else made for group, made in zip(groups, makers, strict=True))
        add.set_sources(first, second)

    def _pool(self, pooling: Pooling) -> None:
        """Put a fixed-point average pooling in the place of a module or call.

        Codes are divided by a power of two in place of the number of elements; layers behind it multiply by the rest,
        its factor. Raises ValueError if that isn't 1 and something else than layers reads the result.
        """
        call = pooling.call
        group = self._links.groups[call.inputs[0]]
        result = self._links.groups[self._links.ends[call.index]]
        others = any(reader.index not in self._links.layers for reader, _ in result.readers)
        if others and remaining_factor(pooling.area) != 1:
            raise ValueError(f"the average in {call.owner!r} isn't followed by a layer alone, which takes its factor")
        made = FixedPointAvgPool2d(
            pooling.kernel_size,
            pooling.stride,
            pooling.padding,
            input_format=self._formats[id(group)],
            area=pooling.area,
            observes=group.readers[0] == (call, 0),
            following=self._units(self._links.ends[call.index]),
            keepdim=pooling.keepdim,
        )
        self._note_maker(call.index, made)
        if call.module_name is not None:
            self._replace(call.module_name, made)
        else:
            self._insert(call, made, "avg_pool", first_node)

    def _insert(self, call: Call, made: nn.Module, name: str, operands: Operands) -> None:
        """Call ``made`` in the forward of a call's owner, in place of the call.

        Raises ValueError if that forward can't be edited there.

        Args:
            call: the recorded call.
            made: the module, which becomes a child of the owner.
            name: name of that child; a number is added if it is taken.
            operands: returns the arguments of ``made``, given the node of the call.
        """
        site = self._sites[call.index]
        if site is None:
            graph = self._analysis.forward(call.owner)
            reason = f": {graph}" if isinstance(graph, Exception) else ""
            raise ValueError(f"the forward of {call.owner or 'the model'!r} can't be edited at its {call.name}{reason}")
        child = self._editor.add_child(self._editor.modules[call.owner], name, made)
        self._editor.rewrite(call.owner).replace(site.node, child, operands, site.in_place)

    def _replace_max_pool(self, name: str, module: nn.Module) -> None:
        """Replace the module ``name`` by one that takes integers, if it is a max pooling without return_indices."""
        if type(module) is nn.MaxPool2d and self._editor.modules[name] is module and not module.return_indices:
            made = FixedPointMaxPool2d(
                module.kernel_size, module.stride, module.padding, module.dilation, ceil_mode=module.ceil_mode
            )
            self._replace(name, made)

    def _replace_relu(self, call: Call) -> None:
        """Replace a clipped ReLU, given by its call, by a plain ``nn.ReLU``: the format behind it clips."""
        if call.module_name is None:
            self._insert(call, nn.ReLU(), "relu", first_node)
        elif self._editor.modules[call.module_name] is call.target:
            self._replace(call.module_name, nn.ReLU())

    def _replace(self, name: str, made: nn.Module) -> None:
        """Put ``made`` in the place of the module ``name``; that module's hooks move to it."""
        module = self._editor.modules[name]
        move_hooks(module, module, made)
        self._editor.replace(name, made)


def _summands(call: Call) -> tuple[int, int]:
    """Return the two values that an addition adds; both are the same for ``x + x``."""
    first, second = (*call.inputs, *call.inputs)[:2]
    return first, second
