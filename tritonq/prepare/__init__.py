"""Turn a float model into one for quantization-aware training.

The folders are the steps, and each imports only those before it:

- ``record/``: run the model, and note the calls that it makes and the values between them.
- ``forwards/``: make the forward of one module editable, as a graph that is proven to make the recorded calls.
- ``decide/``: decide what becomes one layer and where quantizers go; nothing is changed yet.
- ``edit/``: carry the decisions out, with one editor that can undo them.

``driver.py`` runs the steps in this order, and ``check.py`` compares the result with the float model.
``python -m tritonq.prepare.explain`` prints them for a model of three lines.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule
from torch.fx.graph import CodeGen
from torch.jit import ScriptModule

from tritonq.fake_quantize_base import FakeQuantizeBase
from tritonq.nn import DEFAULT_QAT_MAPPING
from tritonq.nn.compile_wrapper import uncompile_children, uncompiled
from tritonq.nn.one_sided import one_sided_layers, warn_of_weight_zero_points
from tritonq.nn.own_input import QuantizesInput
from tritonq.prepare.decide.fixed_point import is_fixed_point
from tritonq.prepare.decide.layer_records import LayerRecord
from tritonq.prepare.decide.qconfigs import mapped_qconfigs, resolve_qconfigs
from tritonq.prepare.driver import prepare_recorded
from tritonq.prepare.earlier_paths import register_earlier_paths
from tritonq.prepare.edit.eager import prepare_eager
from tritonq.prepare.edit.fuse import fuse_known_modules, fuse_modules_qat
from tritonq.prepare.forwards.graph_module import differs_by_mode
from tritonq.prepare.forwards.open_attention import compute_openly
from tritonq.prepare.record.example import record_examples
from tritonq.prepare.record.snapshot import copied, undone_on_error
from tritonq.prepare.switches import (
    disable_fake_quant,
    disable_observer,
    enable_fake_quant,
    enable_observer,
    freeze_bn_stats,
    update_bn_stats,
)
from tritonq.qconfig import DEFAULT_PRESET, QConfig, get_qconfig
from tritonq.qconfig_mapping import QConfigMapping, check_qconfig

register_earlier_paths()


def prepare_qat(
    model: nn.Module,
    mapping: Mapping[type[nn.Module], type[nn.Module]] | None = None,
    inplace: bool = False,
    *,
    qconfig: QConfig | QConfigMapping | None = None,
    example_inputs: Any = None,
    training_inputs: Any = None,
    strict: bool = False,
    warn: bool = True,
) -> nn.Module:
    """Prepare a float model for quantization-aware training.

    With ``example_inputs`` the model needs no stubs and no fusion. It runs on them twice, in eval mode and in training
    mode. These runs decide what becomes one layer (convolution, BatchNorm, ReLU and the like) and where activations are
    quantized. Only what both runs fuse is fused, and layers that one of them leaves out stay in float. The result is
    called exactly like the model, and is in the mode that the model was in.

    Without ``example_inputs`` it is torch.ao's eager flow: modules are replaced by ``mapping`` and their outputs are
    quantized. The user writes the stubs and calls ``fuse_modules_qat``.

    Args:
        model: a float model. A ``qconfig`` attribute of a module, None included, counts for the module and all in it.
            If ``torch.compile`` made the model, the module inside of it is prepared; compile the result again.
        mapping: float type to quantization-aware type; None: ``tritonq.nn.DEFAULT_QAT_MAPPING``.
        inplace: change ``model`` itself instead of a copy; its parameters stay the same objects.
        qconfig: the qconfig of the model, or a mapping that chooses one for each layer. None: the ``qconfig``
            attributes, or preset "onnxruntime" if no module has one.
        example_inputs: a tensor, a tuple of positional arguments, or a dict of named ones.
        training_inputs: the same for the run in training mode, if that needs others, such as targets. Without them a
            module whose training forward fails on ``example_inputs`` runs in eval mode in that run, and a line of the
            log (logger ``tritonq``) says so.
        strict: raise ValueError if a layer with weights, an addition or a concatenation stays in float unasked. A
            qconfig of None asks for it. Ignored without ``example_inputs``.
        warn: warn of such layers, with names and reasons; and of weights with zero points that engines don't run fast.

    Returns:
        The prepared model. With ``example_inputs`` its ``tritonq_report`` holds a
        :class:`~tritonq.prepare.decide.layer_records.LayerRecord` for each layer of the float model.

    Raises:
        ValueError: no quantizable layer, a model that is prepared already, that torch.jit or torch.export made, or that
            rejects the example inputs, a rule of a mapping that fits no module, with ``strict`` a layer left in float,
            or, without example inputs, a model in eval mode or a fixed-point qconfig. After any error ``model`` is as
            it was.
        RuntimeError: with rounding off the prepared model would not compute what the float model does.
        TypeError: a model, qconfig, mapping or example_inputs of the wrong type.

    Source: torch.ao.quantization.prepare_qat.

    Examples:
        >>> import torch, tritonq
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2))
        >>> qat = tritonq.prepare_qat(model, example_inputs=torch.randn(2, 3, 8, 8))
        >>> [type(module).__name__ for module in qat]
        ['ConvBnReLU2d', 'FoldedBatchNorm', 'Identity', 'Flatten', 'Linear']
        >>> qat[0].weight is model[0].weight   # a copy was prepared
        False
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__qualname__}")
    if mapping is not None and not isinstance(mapping, Mapping):
        raise TypeError(
            f"mapping must be a dict from float to quantization-aware types, got {type(mapping).__qualname__}; a "
            "QConfig or QConfigMapping is passed as qconfig=…, and example inputs as example_inputs=…"
        )
    if qconfig is not None and not isinstance(qconfig, QConfigMapping):
        check_qconfig(qconfig, "qconfig", "a QConfig, a QConfigMapping or None")
    model = uncompiled(model)
    _refuse_what_has_no_modules(model)
    prepared = [name for name, part in model.named_modules() if isinstance(part, (QuantizesInput, FakeQuantizeBase))]
    if prepared:
        raise ValueError(
            f"the model is prepared already: {prepared[0]!r} is a quantized layer or a fake quantizer. Put the float "
            "parts together, then prepare the whole"
        )
    if example_inputs is None and not model.training:
        raise ValueError("prepare_qat without example_inputs needs a model in training mode; call model.train() first")
    if qconfig is None and not any(hasattr(part, "qconfig") for part in model.modules()):
        qconfig = get_qconfig(DEFAULT_PRESET)
    types = DEFAULT_QAT_MAPPING if mapping is None else dict(mapping)
    # What is made in inference mode can't be trained.
    with torch.inference_mode(False):
        model = model if inplace else copied(model)
    with torch.inference_mode(False), undone_on_error(model):
        uncompile_children(model)
        if example_inputs is not None:
            compute_openly(model)
        recording = None if example_inputs is None else record_examples(model, example_inputs, training_inputs)
        if isinstance(qconfig, QConfigMapping):
            qconfigs = mapped_qconfigs(model, qconfig, types, None if recording is None else recording.in_eval.flow)
        else:
            qconfigs = resolve_qconfigs(model, qconfig)
        if recording is not None:
            inputs = qconfig.inputs if isinstance(qconfig, QConfigMapping) else None
            prepare_recorded(model, types, qconfigs, recording, warn, strict, inputs)
        elif is_fixed_point(qconfigs[model]):
            raise ValueError("fixed point needs example_inputs: a layer's factor depends on the layer that follows")
        else:
            prepare_eager(model, types, qconfigs)
    if warn:
        warn_of_weight_zero_points(one_sided_layers(model), stacklevel=2)
    return model


def _refuse_what_has_no_modules(model: nn.Module) -> None:
    """Raise ValueError if torch.jit or torch.export made the model: its layers are functions of one graph.

    Also if a part of it has one graph for training and another for eval mode.
    """
    maker = "torch.jit" if isinstance(model, ScriptModule) else ""
    if isinstance(model, GraphModule) and type(model.graph._codegen) is not CodeGen:
        maker = "torch.export"
    if maker:
        raise ValueError(
            f"{maker} made this {type(model).__name__}, in which layers are functions of one graph: prepare the model "
            f"itself, and hand the converted one to {maker}"
        )
    for name, module in model.named_modules():
        if isinstance(module, GraphModule) and differs_by_mode(module):
            raise ValueError(
                f"{name or 'the model'} is a {type(module).__name__} with one graph for training and another for eval "
                "mode: prepare the model that they were made of, or a torch.fx.GraphModule with one of them"
            )


__all__ = [
    "LayerRecord",
    "disable_fake_quant",
    "disable_observer",
    "enable_fake_quant",
    "enable_observer",
    "freeze_bn_stats",
    "fuse_known_modules",
    "fuse_modules_qat",
    "prepare_qat",
    "update_bn_stats",
]
