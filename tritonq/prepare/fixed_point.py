"""`prepare_qat` for fixed point: the layers of an ordinary model, linked by the recorded dataflow."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from tritonq.fixed_point_fake_quantize import FixedPointFakeQuantize, set_fixed_point_phase
from tritonq.nn.fixed_point import (
    ActivationFormat,
    FixedPointConv2d,
    FixedPointConvBn2d,
    FixedPointLayer,
    FixedPointLinear,
)
from tritonq.nn.fixed_point_joins import FixedPointAdd, FixedPointAvgPool2d, FixedPointMaxPool2d, remaining_factor
from tritonq.prepare.analysis import Analysis
from tritonq.prepare.automatic import _arguments, _check_same_output, _free_name
from tritonq.prepare.dataflow import Call
from tritonq.prepare.fixed_point_links import Group, Links, Pooling, find_links
from tritonq.prepare.forward_graph import ForwardGraph, apply_forward, first_operand, node_operands
from tritonq.prepare.fuse import fuse_row, move_hooks
from tritonq.prepare.layers import Layer
from tritonq.prepare.recorder import Recorder
from tritonq.prepare.report import LayerRecord
from tritonq.prepare.snapshot import ModelSnapshot, preserved_random_state
from tritonq.prepare.structure import replace_tensors
from tritonq.qconfig import QConfig


def is_fixed_point(qconfig: QConfig | None) -> bool:
    """Whether a qconfig asks for fixed point."""
    return qconfig is not None and isinstance(qconfig.activation(), FixedPointFakeQuantize)


def prepare_fixed_point(model: nn.Module, qconfigs: Mapping[nn.Module, QConfig | None], example_inputs: Any) -> None:
    """Turn ``model`` into a fixed-point network in place; on any error it is left as it was.

    Convolutions with their BatchNorms, linear layers, residual additions and average poolings become their fixed-point
    forms, each with the formats of its inputs and the η of whatever reads its output. ReLUs stay: an unsigned format is
    one too. A ReLU6 becomes a ReLU, since the learned level clips. The formats of network inputs begin with the
    fractional length that suits the example inputs, and are signed where these are.

    Raises:
        ValueError: no example inputs, or a model that rejects them; a part without a fixed-point form: grouped but not
            depthwise, a following layer that can't be found and the like. The message names the layer.
        RuntimeError: the prepared model in its float phase would not compute what the float model does.

    Source: SEMANTICS section 6.
    """
    if example_inputs is None:
        raise ValueError("fixed point needs example_inputs: a layer's scaling factor depends on the layer that follows")
    args, kwargs = _arguments(example_inputs)
    recorder = Recorder(model)
    try:
        flow = recorder.run(args, kwargs)
    except Exception as error:
        raise ValueError(f"{type(model).__name__} rejects example_inputs: {type(error).__name__}: {error}") from error
    links = find_links(Analysis(model, flow))
    if any(layer.name == "" for layer in links.layers.values()):
        raise ValueError(
            f"the model is a single {type(model).__name__}; put it into a container, such as nn.Sequential"
        )
    inputs = _network_inputs(model, links, args, kwargs)
    snapshot = ModelSnapshot(model)
    try:
        _Editor(links, qconfigs, inputs).edit()
        set_fixed_point_phase(model, "floating_wo_clip")
        if not links.relus:
            _check_same_output(model, args, kwargs, recorder.result)
        set_fixed_point_phase(model, "fixed")
        model.tritonq_report = _report(links)  # type: ignore[assignment]
    except BaseException:
        snapshot.restore()
        raise


def _network_inputs(model: nn.Module, links: Links, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Tensor]:
    """What the layers that read no other layer's output get from the example inputs, by name."""
    found: dict[str, Tensor] = {}
    handles = []
    snapshot = ModelSnapshot(model)
    for index, layer in links.layers.items():
        if not links.groups[links.analysis.flow.calls[index].inputs[0]].scaled:

            def keep(module: nn.Module, given: tuple[Any, ...], name: str = layer.name) -> None:
                found[name] = given[0].detach()

            handles.append(links.analysis.modules[layer.name].register_forward_pre_hook(keep))
    try:
        with preserved_random_state(model), torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for module in model.modules():
                module.training = False
            model(*replace_tensors(args, Tensor.clone), **replace_tensors(kwargs, Tensor.clone))
    finally:
        for handle in handles:
            handle.remove()
        snapshot.restore()
    return found


class _Editor:
    """Builds what :class:`Links` found."""

    def __init__(
        self, links: Links, qconfigs: Mapping[nn.Module, QConfig | None], inputs: Mapping[str, Tensor]
    ) -> None:
        self._links, self._analysis = links, links.analysis
        self._qconfigs, self._inputs = qconfigs, inputs
        self._model = links.analysis.model
        self._modules = dict(links.analysis.modules)
        self._layers: dict[int, FixedPointLayer] = {}
        self._formats: dict[int, ActivationFormat] = {}
        self._makers: dict[int, nn.Module] = {}
        self._graphs: dict[str, ForwardGraph] = {}

    def edit(self) -> None:
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
        for name, module in list(self._modules.items()):
            self._replace_keeping(name, module)
        for call in self._links.relus:
            self._replace_relu(call)
        for owner, graph in self._graphs.items():
            apply_forward(self._modules[owner], graph.to_data())

    def _make_layer(self, layer: Layer) -> FixedPointLayer:
        module = self._modules[layer.name]
        qconfig = self._qconfigs[module]
        if qconfig is None or not is_fixed_point(qconfig):
            raise ValueError(f"the layer {layer.name!r} has another qconfig; a fixed-point network has no float layers")
        bn = None if layer.batch_norm is None else self._modules[layer.batch_norm]
        row = module if bn is None else fuse_row([module, bn])
        kinds: dict[type[nn.Module], Any] = {nn.Linear: FixedPointLinear, nn.Conv2d: FixedPointConv2d}
        try:
            made = _with_qconfig(kinds.get(type(row), FixedPointConvBn2d), row, qconfig)
        except ValueError as error:
            raise ValueError(f"the layer {layer.name!r} has no fixed-point form: {error}") from error
        move_hooks(module, module if bn is None else bn, made)
        if bn is not None and layer.batch_norm is not None:
            cast(nn.Module, made.bn).train(bn.training)
            # While the BatchNorm isn't yet in the network a second time, as part of its layer.
            self._replace(layer.batch_norm, nn.Identity())
        self._replace(layer.name, made)
        return made

    def _make_formats(self) -> None:
        """One format per group that has one, owned by its readers."""
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
            self._formats[id(group)] = made.train(self._model.training)

    def _some_format(self, group: Group) -> ActivationFormat:
        """A format with the qconfig's settings: that of a layer that reads the group, or of any layer."""
        for call, _ in group.readers:
            if call.index in self._layers:
                return self._layers[call.index].input_format
        return next(iter(self._layers.values())).input_format

    def _reader_names(self, group: Group) -> list[str]:
        return [self._links.layers[call.index].name for call, _ in group.readers if call.index in self._links.layers]

    def _each_group(self) -> list[Group]:
        return list({id(group): group for group in self._links.groups.values()}.values())

    def _units(self, value: int) -> ActivationFormat | None:
        """The format whose η a value is divided by."""
        group = self._links.units(self._links.groups[value])
        return None if group is None else self._formats[id(group)]

    def _share_steps(self) -> None:
        """Give the inputs of additions and poolings the step of what they make, transitively."""
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
        call = self._analysis.flow.calls[index]
        group = self._links.groups[call.inputs[0]]
        layer.input_format = self._formats[id(group)]
        layer.observes = group.readers[0] == (call, 0)
        layer.set_following(self._units(self._links.ends[index]))
        self._made(index, layer)
        factors = {self._factor(value) for value in group.values if value in self._links.ends.values()}
        if len(factors) > 1:
            name = self._links.layers[index].name
            raise ValueError(f"the input of layer {name!r} joins averages over windows of different sizes")
        layer.input_factor = factors.pop() if factors else 1.0

    def _factor(self, value: int) -> float:
        """What an average pooling left to be multiplied into the weights of whoever reads its output."""
        for index, pooling in self._links.poolings.items():
            if self._links.ends[index] == value:
                return remaining_factor(pooling.area)
        return 1.0

    def _add(self, call: Call) -> None:
        groups = [self._links.groups[value] for value in _summands(call)]
        for group in groups:
            if any(self._factor(value) != 1 for value in group.values):
                raise ValueError(
                    f"an average pooling feeds the sum in {call.owner!r}; only a layer can take its factor"
                )
        formats = tuple(self._formats.get(id(group)) for group in groups)
        observes = tuple(
            bool(group.readers) and group.readers[0] == (call, operand) for operand, group in enumerate(groups)
        )
        following = self._units(self._links.ends[call.index])
        made = FixedPointAdd(cast(Any, formats), cast(Any, observes), following)
        self._made(call.index, made)
        self._insert(call, made, "add", node_operands)

    def _made(self, index: int, module: Any) -> None:
        """Note what makes a value, and whether the value is rounded before it is read."""
        value = self._links.ends[index]
        self._makers[value] = module
        group = self._links.groups[value]
        module.raw_output = not group.has_format and not group.returned

    def _find_sources(self, call: Call) -> None:
        """Tell an addition what makes those summands that nothing rounds."""
        groups = [self._links.groups[value] for value in _summands(call)]
        makers = [
            next((self._makers[value] for value in group.values if value in self._makers), None) for group in groups
        ]
        add = cast(FixedPointAdd, self._makers[self._links.ends[call.index]])
        first, second = (None if group.has_format else made for group, made in zip(groups, makers, strict=True))
        add.sources = (first, second)

    def _pool(self, pooling: Pooling) -> None:
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
        self._made(call.index, made)
        if call.module_name is not None:
            self._replace(call.module_name, made)
        else:
            self._insert(call, made, "avg_pool", lambda node: (first_operand(node),))

    def _insert(self, call: Call, made: nn.Module, name: str, operands: Any) -> None:
        """Call ``made`` in the forward of the call's owner, in place of the call."""
        site = self._sites[call.index]
        if site is None:
            graph = self._analysis.forward(call.owner)
            reason = f": {graph}" if isinstance(graph, Exception) else ""
            raise ValueError(f"the forward of {call.owner or 'the model'!r} can't be edited at its {call.name}{reason}")
        owner = self._modules[call.owner]
        free = _free_name(owner, name)
        owner.add_module(free, made.train(owner.training))
        if call.owner not in self._graphs:
            self._graphs[call.owner] = cast(ForwardGraph, self._analysis.forward(call.owner))
        self._graphs[call.owner].replace(site.node, free, operands, site.in_place)

    def _replace_keeping(self, name: str, module: nn.Module) -> None:
        """Max poolings of codes have to take integers."""
        if type(module) is nn.MaxPool2d and self._modules[name] is module and not module.return_indices:
            made = FixedPointMaxPool2d(
                module.kernel_size, module.stride, module.padding, module.dilation, ceil_mode=module.ceil_mode
            )
            move_hooks(module, module, made)
            self._replace(name, made.train(module.training))

    def _replace_relu(self, call: Call) -> None:
        if call.module_name is not None:
            if self._modules[call.module_name] is call.target:
                self._replace(call.module_name, nn.ReLU().train(self._modules[call.module_name].training))
            return
        self._insert(call, nn.ReLU(), "relu", lambda node: (first_operand(node),))

    def _replace(self, name: str, new: nn.Module) -> None:
        """Put a module in the place of another, wherever that is a child."""
        old = self._modules[name]
        new.training = old.training
        for parent in [*self._model.modules(), *self._modules.values()]:
            for attribute, child in parent._modules.items():
                if child is old:
                    parent._modules[attribute] = new
        self._modules[name] = new


def _summands(call: Call) -> tuple[int, int]:
    """The two values that an addition adds, which may be one."""
    first, second = (*call.inputs, *call.inputs)[:2]
    return first, second


def _with_qconfig(kind: Any, row: nn.Module, qconfig: QConfig) -> FixedPointLayer:
    had_own, before = "qconfig" in vars(row), vars(row).get("qconfig")
    row.qconfig = qconfig  # type: ignore[assignment]  # from_float reads it there
    try:
        return cast(FixedPointLayer, kind.from_float(row))
    finally:
        if had_own:
            row.qconfig = before  # type: ignore[assignment]
        else:
            del row.qconfig


def _report(links: Links) -> tuple[LayerRecord, ...]:
    """A record for each layer, addition and average pooling."""
    records = []
    for layer in links.layers.values():
        kind = layer.row[0].__name__
        fused = () if layer.batch_norm is None else (layer.batch_norm,)
        records.append(LayerRecord(layer.name, kind, fused, "quantized", ""))
    calls = [*links.additions.values(), *(pooling.call for pooling in links.poolings.values())]
    for call in calls:
        name = call.module_name or f"{call.owner}.{call.name}".lstrip(".")
        records.append(LayerRecord(name, call.name, (), "quantized", ""))
    return tuple(records)
