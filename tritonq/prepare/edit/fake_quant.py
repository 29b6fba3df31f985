"""Carry out a plan: put quantized layers, joins and quantizers into a model.

A *join* is an operation of several tensors, such as an addition. A *unary* is an operation of one tensor, such as a
pool, that is computed on codes.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from typing import Any, cast

from torch import nn

from tritonq.fake_quantize_base import FakeQuantizeBase
from tritonq.nn import Joint, QATLayer
from tritonq.nn.batch_norm_layer import QATBatchNormLayer
from tritonq.nn.clip import Clip, Clipping
from tritonq.nn.folded import BATCH_NORM_NAMES, FoldedBatchNorm
from tritonq.nn.functions import FunctionLayer
from tritonq.nn.kept_class import keep_class
from tritonq.nn.own_input import INPUT_QUANTIZER, QuantizesInput
from tritonq.nn.reference import Reference
from tritonq.nn.unary import UnaryLayer
from tritonq.prepare.decide.analysis import Analysis
from tritonq.prepare.decide.joins import Join, operands
from tritonq.prepare.decide.layers import Layer
from tritonq.prepare.decide.plan import GridSource, Plan, PlannedQuantizer
from tritonq.prepare.decide.readers import Reader
from tritonq.prepare.decide.unary import QUANTIZED_FORMS, PlannedUnary, layer_for
from tritonq.prepare.edit.batch_norms import frozen_batch_norm, plain_batch_norm
from tritonq.prepare.edit.called_layers import computed_parameters, float_layer
from tritonq.prepare.edit.earlier_inputs import note_earlier_names
from tritonq.prepare.edit.earlier_outputs import note_earlier_output
from tritonq.prepare.edit.editor import ModelEditor
from tritonq.prepare.edit.float_keys import note_batch_norms
from tritonq.prepare.edit.fuse import fuse_row, move_hooks
from tritonq.prepare.edit.routes import Routes
from tritonq.prepare.edit.swap import keep_attributes, plain_form, swap, take_place
from tritonq.prepare.forwards.graph import ForwardGraph, first_node, layer_operands
from tritonq.prepare.forwards.quantized import Read
from tritonq.prepare.record.dataflow import Call, ValueIndex
from tritonq.prepare.record.structure import Path
from tritonq.qconfig import QConfig, with_one_weight_scale
from tritonq.reference.functions import Function

Types = Mapping[type[nn.Module], type[nn.Module]]


def apply_plan(
    editor: ModelEditor,
    analysis: Analysis,
    plan: Plan,
    types: Types,
    qconfigs: Mapping[nn.Module, QConfig | None],
    keep_classes: bool = False,
) -> tuple[dict[Join, str], dict[ValueIndex, str]]:
    """Carry out a plan with an editor.

    Args:
        editor: edits the model.
        analysis: the record of the float model, and what follows from it.
        plan: the plan that was made from it.
        types: float type to quantization-aware type.
        qconfigs: the qconfig of each module of the float model; None leaves it in float.
        keep_classes: whether each replacement is of the replaced module's class, too, for ``isinstance`` in forwards.

    Returns:
        The qualified names of the new modules: those that joins became, by join; and those that operations of one
            tensor in a forward became, by the index of the value that they return.

    Raises:
        ValueError: a layer can't be quantized; the message names the layer.
    """
    work = _PlanWork(editor, analysis, plan, types, qconfigs, keep_classes)
    work.do()
    return work.join_names, work.unary_names


class _PlanWork:
    """Puts layers, joins and quantizers of a plan into a model, by :meth:`do`, for :func:`apply_plan`.

    The constructor takes the arguments of that function.

    Attributes:
        join_names: qualified name of the module that each join became, by the ``Join``; filled by :meth:`do`.
        unary_names: qualified name of the module that each operation of one tensor in a forward became, by the index of
            its result among the recorded values.
    """

    def __init__(
        self,
        editor: ModelEditor,
        analysis: Analysis,
        plan: Plan,
        types: Types,
        qconfigs: Mapping[nn.Module, QConfig | None],
        keep_classes: bool,
    ) -> None:
        self.join_names: dict[Join, str] = {}
        self.unary_names: dict[ValueIndex, str] = {}
        self._editor, self._analysis, self._plan = editor, analysis, plan
        self._types, self._qconfigs, self._keep_classes = types, qconfigs, keep_classes
        self._float_modules = dict(editor.modules)
        # The quantizer modules, by the identity of what was planned.
        self._quantizers: dict[int, nn.Module] = {}
        self._unary: dict[ValueIndex, tuple[UnaryLayer, nn.Module]] = {}
        # For each input of the model the names of the quantizer that its readers share.
        self._input_names: dict[Path, list[str]] = {}

    def do(self) -> None:
        """Carry out the whole plan; ValueError, naming the layer, if one can't be quantized."""
        self._erase_relus()
        for join in self._plan.joins:
            self._add_join(join)
        for layer in self._plan.layers:
            self._add_layer(layer)
        for quantizer in self._plan.quantizers:
            self._add_quantizer(quantizer)
        self._editor.apply()
        self._link()
        note_earlier_names(self._editor.model, self._input_names)
        note_batch_norms(self._editor.model, self._plan.layers)

    def _erase_relus(self) -> None:
        """Remove the ReLUs that became part of a layer or join: modules become ``nn.Identity``, calls are taken out."""
        for name in self._plan.erased_modules:
            relu, rest = self._editor.modules[name], nn.Identity()
            keep_attributes(relu, rest)
            self._keep_class(relu, rest)
            self._editor.replace(name, rest)
        for owner, node in self._plan.erased_nodes:
            self._editor.rewrite(owner).erase(node)

    def _add_join(self, join: Join) -> None:
        """Make the module of a join, and call it in the forward in place of the operation."""
        qconfig = self._qconfigs[self._float_modules[join.owner]]
        if qconfig is not None and join in self._plan.float_results:
            qconfig = qconfig._replace(activation=nn.Identity)
        module = join.module(qconfig)
        owner = self._editor.modules[join.owner]
        name = self._editor.add_child(owner, join.kind, self._placed(module, join.owner))
        if join.site is not None:
            joined = bool(join.relus)
            self._editor.rewrite(join.owner).replace(join.site.node, name, join.operands, join.site.in_place, joined)
        self._quantizers[id(join)] = cast(nn.Module, module.activation_post_process)
        self.join_names[join] = f"{join.owner}.{name}".lstrip(".")

    def _add_layer(self, layer: Layer) -> None:
        """Put a quantized layer in the place of a module, or of a function in a forward; else raise ValueError."""
        module = self._editor.modules[layer.home]
        qconfig = cast(QConfig, self._qconfigs[module])
        if layer.function is not None:
            module = float_layer(layer.function, self._editor.model, module.training)
        if layer.name in self._plan.clipped | self._plan.summands:
            qconfig = qconfig._replace(activation=nn.Identity)
        if (
            issubclass(layer.row[0], nn.modules.conv._ConvTransposeNd)
            and not qconfig.find_target().scales_transposed_channels
        ):
            qconfig = with_one_weight_scale(qconfig)
        try:
            if len(layer.row) == 1:
                quantized = swap(module, self._types[layer.row[0]], qconfig, layer.row[0])
            else:
                quantized = self._fused(layer, module, qconfig)
        except ValueError as error:
            raise ValueError(f"{layer.name!r} can't be quantized: {error}") from error
        if layer.name in self._plan.unread:
            quantized.activation_post_process = nn.Identity()
        if layer.function is None:
            self._keep_class(module, quantized)
            self._editor.replace(layer.name, quantized)
        else:
            owner = self._editor.modules[layer.function.owner]
            self._editor.add_child(owner, layer.function.child, quantized)
            self._editor.modules[layer.name] = quantized
            forward = self._editor.rewrite(layer.function.owner)
            if isinstance(forward, ForwardGraph):
                forward.check_geometry(layer.function.site.node, layer.function.given)
            forward.replace(layer.function.site.node, layer.function.child, layer_operands)
        if layer.name in self._plan.summands and qconfig.find_target().fuses_joins:
            note_earlier_output(quantized, cast(QConfig, self._qconfigs[self._float_modules[layer.home]]).activation)
        output = getattr(quantized, "activation_post_process", None)
        if isinstance(output, nn.Module):
            self._quantizers[id(layer)] = output

    def _fused(self, layer: Layer, module: nn.Module, qconfig: QConfig) -> nn.Module:
        """Return the quantized layer of a row of modules, the first is ``module``; replace the BatchNorm in the model.

        The layer gets the hooks of the modules, and the quantizers of ``qconfig``.
        """
        parts = [plain_form(module, layer.row[0])]
        bn = None if layer.batch_norm is None else self._editor.modules[layer.batch_norm]
        if layer.frozen is not None:
            parts.append(frozen_batch_norm(layer.frozen, self._editor.model))
        elif bn is not None:
            parts.append(plain_batch_norm(cast(Any, bn), layer.row[1]))
        if layer.ceiling is not None:
            parts.append(nn.ReLU() if layer.ceiling == math.inf else nn.Hardtanh(0.0, layer.ceiling))
        frozen = layer.frozen is not None or (bn is not None and module.training and not bn.training)
        row = fuse_row(parts, layer.row)
        quantized = swap(row, self._types[type(row)], qconfig)
        take_place(module, quantized)
        if bn is None or layer.batch_norm is None:
            move_hooks(module, module, quantized)
            return quantized
        if frozen and isinstance(quantized, QATBatchNormLayer):
            quantized.freeze_bn_stats()
        rest = self._remainder(bn, layer)
        if isinstance(quantized, QATBatchNormLayer):
            quantized.batch_norm_place = Reference(rest)
        if layer.remainder:
            move_hooks(module, module, quantized)
            move_hooks(bn, bn, rest)
        else:
            move_hooks(module, bn, quantized)
        self._editor.replace(layer.batch_norm, rest)
        return quantized

    def _remainder(self, bn: nn.Module, layer: Layer) -> nn.Module:
        """Return the module that takes the place of a BatchNorm which became part of a layer.

        It runs the children that the BatchNorm called after normalising, such as an activation.
        """
        prefix = f"{layer.batch_norm}."
        modules = self._editor.modules
        children = [(name.removeprefix(prefix).replace(".", "_"), modules[name]) for name in layer.remainder]
        if all(type(child) is nn.Identity for _, child in children):
            folded = FoldedBatchNorm(type(bn).__name__, layer.name)
            keep_attributes(bn, folded, without=BATCH_NORM_NAMES)
            self._keep_class(bn, folded)
            return folded.train(bn.training)
        rest = nn.Sequential(OrderedDict(children))
        rest.training = bn.training
        return rest

    def _keep_class(self, module: nn.Module, made: nn.Module) -> None:
        """Let ``made`` be of the class of ``module`` too, if classes are to be kept."""
        if self._keep_classes:
            keep_class(type(module), made)

    def _add_quantizer(self, quantizer: PlannedQuantizer) -> None:
        """Make a planned quantizer and put it in its place: behind a module or a call, or in what reads the tensor.

        An operation of one tensor before it becomes a module that computes on codes, with this quantizer.
        """
        module = self._placed(quantizer.qconfig.activation(), quantizer.like)
        self._quantizers[id(quantizer)] = module
        if quantizer.where == "output" and quantizer.value in self._plan.unary:
            self._replace_unary(quantizer, module)
        elif quantizer.where == "output":
            owner = self._editor.modules[quantizer.owner]
            self._editor.quantize_result(owner, self._editor.add_child(owner, "activation_post_process", module))
        elif quantizer.where == "node":
            owner, planned = self._editor.modules[quantizer.owner], self._plan.unary.get(quantizer.value)
            name = self._editor.add_child(owner, f"{quantizer.label}_fake_quant", module)
            if planned is not None and isinstance(planned.operation, (Function, Clipping)):
                # Its module runs the quantizer itself, and saves less for the backward.
                self._add_unary(quantizer, planned, module, quantizer.in_place, joined=bool(planned.absorbed))
                return
            self._editor.rewrite(quantizer.owner).insert_after(quantizer.node, name, quantizer.in_place)
            if planned is not None:
                self._add_unary(quantizer, planned, module)
        elif quantizer.where == "consumer":
            for reader in quantizer.consumers:
                self._add_to_reader(reader, quantizer, module)

    def _add_to_reader(self, reader: Reader, quantizer: PlannedQuantizer, module: nn.Module) -> None:
        """Let a layer or join (``reader``) quantize what it reads, by ``module``: the quantizer that was planned."""
        part = reader.part
        owner_name = part.name if isinstance(part, Layer) else self.join_names[part]
        owner = self._quantized_module(part)
        if isinstance(owner, QuantizesInput):
            child = INPUT_QUANTIZER
            self._editor.set_child(owner, child, module)
            owner.observes_input = reader.observes
        else:
            child = self._editor.add_child(owner, f"{INPUT_QUANTIZER}_{reader.operand}", module)
            is_list = isinstance(part, Join) and not part.knows_operands
            position, path = (0, (reader.operand,)) if is_list else (reader.operand, ())
            self._editor.quantize_argument(owner, Read(child, position, None, path, reader.observes))
        if quantizer.input_path:
            self._input_names.setdefault(quantizer.input_path, []).append(f"{owner_name}.{child}")

    def _quantized_module(self, part: Layer | Join) -> nn.Module:
        """Return the quantized module of a layer or join."""
        if isinstance(part, Layer):
            return self._editor.modules[part.name]
        return self._editor.model.get_submodule(self.join_names[part])

    def _replace_unary(self, quantizer: PlannedQuantizer, own: nn.Module) -> None:
        """Replace a module such as a pool by its quantized form, whose output quantizer is ``own``."""
        module = self._editor.modules[quantizer.owner]
        planned, quantized = self._plan.unary[quantizer.value], QUANTIZED_FORMS[type(module)].from_float(module)
        if isinstance(planned.operation, Function):
            quantized = FunctionLayer(planned.operation, source_type=type(module).__name__).train(module.training)
        elif isinstance(quantized, Clip):
            quantized.absorb(planned.earlier)
        quantized.activation_post_process = own.train(module.training)
        take_place(module, quantized)
        self._keep_class(module, quantized)
        move_hooks(module, module, quantized)
        self._editor.replace(quantizer.owner, quantized)
        self._unary[quantizer.value] = (quantized, own)

    def _add_unary(
        self,
        quantizer: PlannedQuantizer,
        planned: PlannedUnary,
        own: nn.Module,
        in_place: bool = False,
        joined: bool = False,
    ) -> None:
        """Make a module of the operation at a node, in front of its quantizer ``own``, which is a child of the owner.

        ``in_place`` and ``joined`` are as in :meth:`ForwardGraph.replace`.
        """
        made = layer_for(planned.operation, planned.earlier)
        owner = self._editor.modules[quantizer.owner]
        name = self._editor.add_child(owner, self._analysis.flow.calls[planned.calls[0]].name.lower(), made)
        self._editor.rewrite(quantizer.owner).replace(quantizer.node, name, first_node, in_place, joined)
        self._unary[quantizer.value] = (made, own)
        self.unary_names[quantizer.value] = f"{quantizer.owner}.{name}".lstrip(".")

    def _link(self) -> None:
        """Tell layers, operations of one tensor and joins which quantizers put their inputs on grids."""
        calls, routes = self._analysis.flow.calls, Routes(self._analysis, self._editor.model)
        for value, (unary, own) in self._unary.items():
            planned = self._plan.unary[value]
            source, steps = self._quantizers.get(id(planned.source)), (*planned.absorbed, *planned.calls)
            if source is not None:
                reads = [(calls[index], calls[index].inputs[0]) for index in steps]
                unary.set_quantizers(Reference(source, routes.to_reader(unary, source, reads)), own)
            else:
                unary.set_quantizers(None, own)
        exclusive = self._plan.exclusive_state
        for layer in self._plan.layers:
            if layer.function is not None:
                computed = computed_parameters(layer.function.program, self._editor.model, exclusive)
                cast(QATLayer, self._editor.modules[layer.name]).take_computed(computed)
            grid, module = self._plan.inputs.get(layer.name), self._editor.modules[layer.name]
            if grid is not None and isinstance(module, QATLayer):
                quantizer = self._quantizers[id(grid)]
                if isinstance(quantizer, FakeQuantizeBase):
                    reads = [(calls[index], calls[index].inputs[0]) for index in layer.calls]
                    module.set_input_quantizer(Reference(quantizer, routes.to_reader(module, quantizer, reads)))
            behind = self._quantizers.get(id(self._plan.outputs.get(layer.name)))
            if isinstance(module, QATLayer) and isinstance(behind, FakeQuantizeBase):
                ends = [calls[index] for index in layer.ends]
                module.set_quantizer_behind_clip(Reference(behind, routes.to_clip(module, behind, ends)))
        for join, grids in self._plan.operands.items():
            module = self._quantized_module(join)
            if isinstance(module, Joint):
                made = [None if grid is None else self._producer(grid) for grid in grids]
                module.set_operand_producers(
                    *(
                        None if source is None else Reference(source, routes.to_reader(module, source, reads))
                        for source, reads in zip(made, self._reads(join), strict=False)
                    )
                )

    def _reads(self, join: Join) -> Iterator[list[tuple[Call, ValueIndex]]]:
        """Yield, for each operand of a join, its calls with the values that they read there."""
        calls = [self._analysis.flow.calls[index] for index in join.calls]
        read = [operands(call, self._analysis) for call in calls]
        for operand in range(min(map(len, read))):
            yield [(call, values[operand]) for call, values in zip(calls, read, strict=True)]

    def _producer(self, grid: GridSource) -> nn.Module:
        """Return the module whose output lies on a planned grid.

        That is a layer, a join, or a module with an output quantizer; for any other place the quantizer itself.
        """
        if isinstance(grid, (Join, Layer)):
            return self._quantized_module(grid)
        return self._editor.modules[grid.owner] if grid.where == "output" else self._quantizers[id(grid)]

    def _placed(self, module: nn.Module, like: str) -> nn.Module:
        """Move ``module`` to the device of the parameters of ``like``, or of the model's without; return ``module``."""
        tensor = next(self._editor.modules[like].parameters(), None)
        tensor = next(self._editor.model.parameters(), None) if tensor is None else tensor
        return module if tensor is None else module.to(tensor.device)
