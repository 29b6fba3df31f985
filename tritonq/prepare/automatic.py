"""`prepare_qat` for a model as it is: one recorded run tells what to fuse and where quantizers go."""

from __future__ import annotations

import math
import warnings
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from tritonq.fake_quantize import FakeQuantizeBase
from tritonq.nn import Add, Cat, QATLayer
from tritonq.nn.conv_bn import QATBatchNormLayer
from tritonq.nn.elementwise import note_relus
from tritonq.prepare.analysis import Analysis
from tritonq.prepare.eager import quantize_output, swap
from tritonq.prepare.forward_graph import (
    ForwardGraph,
    apply_forward,
    hide_children,
    node_operands,
    sequence_operand,
)
from tritonq.prepare.fuse import fuse_row, move_hooks
from tritonq.prepare.inputs import (
    InputFakeQuants,
    InputPlace,
    input_place,
    quantize_first_argument_hook,
    quantize_inputs_hook,
)
from tritonq.prepare.joins import Join
from tritonq.prepare.layers import Layer
from tritonq.prepare.plan import Plan, Quantizer, make_plan
from tritonq.prepare.recorder import Recorder
from tritonq.prepare.report import make_report
from tritonq.prepare.snapshot import ModelSnapshot, preserved_random_state
from tritonq.prepare.structure import clone_tensors, tensors_in
from tritonq.qconfig import QConfig

# A prepared model with rounding off computes what the float model did, up to the rounding of folded BatchNorms; far
# more than that means that something else changed. Relative to the largest output.
_SAME_OUTPUT = {torch.float16: 0.1, torch.bfloat16: 0.3}
_SAME_OUTPUT_DEFAULT = 1e-3


def prepare_automatic(
    model: nn.Module,
    mapping: Mapping[type[nn.Module], type[nn.Module]],
    qconfigs: Mapping[nn.Module, QConfig | None],
    example_inputs: Any,
) -> None:
    """Prepare ``model`` in place; on any error it is left as it was.

    Raises:
        ValueError: the model rejects the example inputs, or has no layer to quantize.
        RuntimeError: the prepared model would not compute what the float model does.
    """
    args, kwargs = _arguments(example_inputs)
    recorder = Recorder(model)
    try:
        flow = recorder.run(args, kwargs)
    except Exception as error:
        raise ValueError(f"{type(model).__name__} rejects example_inputs: {type(error).__name__}: {error}") from error
    analysis = Analysis(model, flow)
    plan = make_plan(analysis, mapping, qconfigs)
    if not plan.layers:
        known = ", ".join(sorted(kind.__name__ for kind in mapping if kind.__module__.startswith("torch.nn")))
        why = "; ".join(f"{name}: {reason}" for name, reason in list(plan.float_reasons.items())[:5])
        raise ValueError(
            f"{type(model).__name__} has no quantizable layer ({known})" + (f"; left in float: {why}" if why else "")
        )
    if any(layer.name == "" for layer in plan.layers):
        raise ValueError(
            f"the model is a single {type(model).__name__}; put it into a container, such as nn.Sequential"
        )
    snapshot = ModelSnapshot(model)
    try:
        editor = _Editor(analysis, plan, mapping, qconfigs)
        editor.edit()
        report = make_report(analysis, plan, editor.join_names)
        _check_same_output(model, args, kwargs, recorder.result)
        model.tritonq_report = report  # type: ignore[assignment]
    except BaseException:
        snapshot.restore()
        raise


def _arguments(example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(example_inputs, Tensor):
        return (example_inputs,), {}
    if isinstance(example_inputs, (tuple, list)):
        return tuple(example_inputs), {}
    if isinstance(example_inputs, Mapping) and all(isinstance(key, str) for key in example_inputs):
        return (), dict(example_inputs)
    raise TypeError(
        "example_inputs must be a tensor, a tuple of positional arguments or a dict of named ones, got "
        f"{type(example_inputs).__qualname__}"
    )


class _Editor:
    """Carries out a plan.

    Attributes:
        join_names: qualified names of the modules that joins became.
    """

    def __init__(
        self,
        analysis: Analysis,
        plan: Plan,
        mapping: Mapping[type[nn.Module], type[nn.Module]],
        qconfigs: Mapping[nn.Module, QConfig | None],
    ) -> None:
        self.join_names: dict[Join, str] = {}
        self._analysis, self._plan = analysis, plan
        self._mapping, self._qconfigs = mapping, qconfigs
        self._model = analysis.model
        self._modules = dict(analysis.modules)
        self._quantizers: dict[int, nn.Module] = {}
        self._graphs: dict[str, ForwardGraph] = {}
        self._added: dict[str, list[str]] = {}

    def edit(self) -> None:
        self._erase_relus()
        for join in self._plan.joins:
            self._add_join(join)
        for layer in self._plan.layers:
            self._add_layer(layer)
        for quantizer in self._plan.quantizers:
            self._add_quantizer(quantizer)
        self._add_inputs([quantizer for quantizer in self._plan.quantizers if quantizer.where == "input"])
        for owner, graph in self._graphs.items():
            apply_forward(self._modules[owner], graph.to_data())
        for owner, names in self._added.items():
            module = self._modules[owner]
            if isinstance(module, nn.Sequential):
                hide_children(module, names)
        for layer in self._plan.layers:
            grid, module = self._plan.inputs.get(layer.name), self._modules[layer.name]
            if grid is not None and isinstance(module, QATLayer):
                quantizer_module = self._quantizers[id(grid)]
                known = isinstance(quantizer_module, FakeQuantizeBase)
                module.set_input_quantizer(cast(FakeQuantizeBase, quantizer_module) if known else None)
        for join, grids in self._plan.operands.items():
            add = self._model.get_submodule(self.join_names[join])
            if isinstance(add, Add) and len(grids) == 2:
                a, b = (None if grid is None else self._quantizers.get(id(grid)) for grid in grids)
                add.set_input_quantizers(a, b)
        note_relus(self._model)

    def _graph(self, owner: str) -> ForwardGraph:
        if owner not in self._graphs:
            self._graphs[owner] = cast(ForwardGraph, self._analysis.forward(owner))
        return self._graphs[owner]

    def _erase_relus(self) -> None:
        for name in self._plan.erased_modules:
            self._replace(name, nn.Identity())
        for owner, node in self._plan.erased_nodes:
            self._graph(owner).erase(node)

    def _add_join(self, join: Join) -> None:
        owner = self._modules[join.owner]
        qconfig = self._qconfigs[owner]
        module = Add(join.ceiling, qconfig=qconfig) if join.kind == "add" else Cat(join.dim, qconfig=qconfig)
        name = _free_name(owner, join.kind)
        self._add_child(join.owner, name, self._placed(module, join.owner).train(owner.training))
        operands = node_operands if join.kind == "add" else sequence_operand
        if join.site is not None:
            self._graph(join.owner).replace(join.site.node, name, operands, join.site.in_place)
        self._quantizers[id(join)] = module.activation_post_process
        self.join_names[join] = f"{join.owner}.{name}".lstrip(".")

    def _add_layer(self, layer: Layer) -> None:
        module = self._modules[layer.name]
        qconfig = cast(QConfig, self._qconfigs[module])
        if layer.name in self._plan.clipped:
            qconfig = QConfig(nn.Identity, qconfig.weight)
        if len(layer.row) == 1:
            quantized = swap(module, self._mapping[layer.row[0]], qconfig)
        else:
            quantized = self._fused(layer, module, qconfig)
        self._replace(layer.name, quantized)
        output = getattr(quantized, "activation_post_process", None)
        if isinstance(output, nn.Module):
            self._quantizers[id(layer)] = output

    def _fused(self, layer: Layer, module: nn.Module, qconfig: QConfig) -> nn.Module:
        parts = [module]
        bn = None if layer.batch_norm is None else self._modules[layer.batch_norm]
        if bn is not None:
            parts.append(_plain_batch_norm(cast(Any, bn), layer.row[1]))
        if layer.ceiling is not None:
            parts.append(nn.ReLU() if layer.ceiling == math.inf else nn.Hardtanh(0.0, layer.ceiling))
        frozen = bn is not None and module.training and not bn.training
        row = fuse_row(parts)
        quantized = swap(row, self._mapping[type(row)], qconfig)
        if bn is None or layer.batch_norm is None:
            move_hooks(module, module, quantized)
            return quantized
        if frozen and isinstance(quantized, QATBatchNormLayer):
            quantized.freeze_bn_stats()
        rest = self._remainder(bn, layer)
        if layer.remainder:
            move_hooks(module, module, quantized)
            move_hooks(bn, bn, rest)
        else:
            move_hooks(module, bn, quantized)
        self._replace(layer.batch_norm, rest)
        return quantized

    def _remainder(self, bn: nn.Module, layer: Layer) -> nn.Module:
        """What takes the place of an absorbed BatchNorm: the children that it called after normalising."""
        prefix = f"{layer.batch_norm}."
        children = [(name.removeprefix(prefix).replace(".", "_"), self._modules[name]) for name in layer.remainder]
        if all(type(child) is nn.Identity for _, child in children):
            return nn.Identity().train(bn.training)
        rest = nn.Sequential(OrderedDict(children))
        rest.training = bn.training
        return rest

    def _add_quantizer(self, quantizer: Quantizer) -> None:
        module = self._placed(quantizer.qconfig.activation(), quantizer.like)
        self._quantizers[id(quantizer)] = module
        owner = self._modules[quantizer.owner]
        if quantizer.where == "output":
            quantize_output(owner, module)
            self._added.setdefault(quantizer.owner, []).append("activation_post_process")
        elif quantizer.where == "node":
            name = _free_name(owner, f"{quantizer.node}_fake_quant")
            self._add_child(quantizer.owner, name, module.train(owner.training))
            self._graph(quantizer.owner).insert_after(quantizer.node, name, quantizer.in_place)
        elif quantizer.where == "consumer":
            for name in quantizer.consumers:
                layer = self._modules[name]
                layer.add_module("input_fake_quant", module.train(layer.training))
                layer.register_forward_pre_hook(quantize_first_argument_hook)

    def _add_inputs(self, inputs: list[Quantizer]) -> None:
        if not inputs:
            return
        if hasattr(self._model, "input_fake_quants"):
            raise ValueError("the model has an attribute input_fake_quants, which preparation needs")
        places: list[InputPlace] = []
        for quantizer in inputs:
            path = self._analysis.flow.values[quantizer.value].path
            places.append(input_place(self._model.forward, path, [place.key for place in places]))
        modules = [self._quantizers[id(quantizer)] for quantizer in inputs]
        self._add_child("", "input_fake_quants", InputFakeQuants(places, modules).train(self._model.training))
        self._model.register_forward_pre_hook(quantize_inputs_hook, with_kwargs=True)

    def _add_child(self, owner: str, name: str, child: nn.Module) -> None:
        self._modules[owner].add_module(name, child)
        self._added.setdefault(owner, []).append(name)

    def _placed(self, module: nn.Module, like: str) -> nn.Module:
        """``module`` on the device of the parameters of a module, or of the model where that has none."""
        tensor = next(self._modules[like].parameters(), None)
        tensor = next(self._model.parameters(), None) if tensor is None else tensor
        return module if tensor is None else module.to(tensor.device)

    def _replace(self, name: str, new: nn.Module) -> None:
        """Put a module in the place of another, wherever that is a child."""
        old = self._modules[name]
        if isinstance(new, nn.Identity):
            new.training = old.training
        for parent in [*self._model.modules(), *self._modules.values()]:
            for attribute, child in parent._modules.items():
                if child is old:
                    parent._modules[attribute] = new
        self._modules[name] = new


def _plain_batch_norm(bn: nn.modules.batchnorm._BatchNorm, kind: type[nn.Module]) -> nn.Module:
    """``bn`` itself if it is a plain BatchNorm, else a plain one with its parameters and statistics."""
    if type(bn) is kind:
        return bn
    plain = kind(bn.num_features, bn.eps, bn.momentum, device="meta")
    plain._parameters.update({name: bn._parameters[name] for name in plain._parameters})
    plain._buffers.update({name: bn._buffers[name] for name in plain._buffers})
    return plain.train(bn.training)


def _free_name(owner: nn.Module, base: str) -> str:
    """An attribute name that nothing in ``owner`` uses."""
    name, count = base, 0
    while hasattr(owner, name):
        count += 1
        name = f"{base}_{count}"
    return name


def _check_same_output(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], expected: Any) -> None:
    """Run the prepared model once with rounding off and compare with what the float model returned.

    Raises:
        RuntimeError: they differ by more than rounding errors.
    """
    snapshot = ModelSnapshot(model)
    try:
        with preserved_random_state(model), torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # quantizers that have observed nothing say so
            for module in model.modules():
                module.training = False
                if isinstance(module, FakeQuantizeBase):
                    module.disable_fake_quant()
            args, kwargs = clone_tensors(args, kwargs)
            result = model(*args, **kwargs)
    finally:
        snapshot.restore()
    differing = list(_differences(tensors_in(expected), tensors_in(result)))
    if differing:
        raise RuntimeError(
            f"the prepared {type(model).__name__} would not compute what the float model does ({differing[0]}); the "
            "model is as it was. Please report this model; a qconfig of None on its parts narrows the cause down"
        )


def _differences(expected: Iterable[Any], got: Iterable[Any]) -> Iterable[str]:
    wanted, found = dict(expected), dict(got)
    if list(wanted) != list(found):
        yield f"outputs {list(found)} instead of {list(wanted)}"
        return
    for path, tensor in wanted.items():
        other = found[path]
        if tensor.shape != other.shape or tensor.dtype != other.dtype:
            yield f"output {path} is {other.dtype} {tuple(other.shape)}"
        elif tensor.is_floating_point():
            close = torch.isclose(other.double(), tensor.double(), rtol=0, atol=_tolerance(tensor), equal_nan=True)
            if not bool(close.all()):
                yield f"output {path} differs by {float((other - tensor).abs().max()):.3g}"


def _tolerance(tensor: Tensor) -> float:
    finite = tensor[tensor.isfinite()]
    largest = float(finite.abs().max()) if finite.numel() else 0.0
    return _SAME_OUTPUT.get(tensor.dtype, _SAME_OUTPUT_DEFAULT) * largest + torch.finfo(tensor.dtype).tiny
