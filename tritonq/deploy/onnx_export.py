"""Exporting a model as an ONNX file with QuantizeLinear and DequantizeLinear where engines fuse them."""

from __future__ import annotations

import inspect
import json
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tritonq.deploy.as_trained import ready_to_trace
from tritonq.deploy.convert import convert
from tritonq.deploy.example_inputs import check_sizes, name_sizes, tell_fixed_batch
from tritonq.deploy.files import atomic_file
from tritonq.deploy.fixed_point import has_fixed_point
from tritonq.deploy.fixed_point_description import has_integers
from tritonq.deploy.fixed_point_onnx import export_fixed_point_onnx
from tritonq.deploy.modules import DeployedModule
from tritonq.deploy.onnx_ends import Returned, check_ends, whole_ends
from tritonq.deploy.onnx_exact_sums import write_exact_sums
from tritonq.deploy.onnx_files import (
    CODES_KEY,
    TARGET_KEY,
    add_metadata,
    checked,
    code_entries,
    forget_source,
    require_onnx,
    separate_weights,
)
from tritonq.deploy.onnx_float_layers import quantize_layers_at_once, tell_float_convolutions
from tritonq.deploy.onnx_functions import CodeTable, check_functions
from tritonq.deploy.onnx_moves import quantize_behind_moves
from tritonq.deploy.onnx_opset17 import lower_opset
from tritonq.deploy.onnx_packed import PACKED_OPSET, pack_weights
from tritonq.deploy.output_sizes import with_output_sizes
from tritonq.deploy.outputs import name_outputs, output_paths, return_tensors_alone
from tritonq.nn.compile_wrapper import uncompiled
from tritonq.prepare.record.example import example_arguments
from tritonq.prepare.record.structure import tensors_in
from tritonq.targets import convolves_codes, onnx_form_named, onnx_form_of

OLDEST_OPSET = 17
# The oldest that torch writes.
DEFAULT_OPSET = 18


def export_onnx(
    model: nn.Module,
    path: str | os.PathLike[str],
    example_inputs: Any,
    *,
    target: str | None = None,
    opset: int = DEFAULT_OPSET,
    dynamic_batch: bool = True,
    dynamic_sizes: bool = False,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    pixels: tuple[float | Sequence[float], float | Sequence[float]] | None = None,
    returns: Returned = "values",
    pack: bool = False,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a quantization-aware or converted model as an ONNX file.

    ``target`` says in which form:

    - ``"onnxruntime"``: integer weights and int32 biases as initialisers with DequantizeLinear; activations as uint8,
      which is what ONNX Runtime turns into integer convolutions on x86 and Arm, signed trained codes shifted by their
      minimum. On x86 without VNNI its int8 kernels saturate 16-bit sums: set the session's option
      ``session.x64quantprecision`` to "1" there, as tritonq's own sessions do, or train with 7-bit activations
      (``get_default_qat_qconfig("x86")``). A warning names convolutions that ONNX Runtime will run in float.
    - ``"tensorrt"``: float weights through QuantizeLinear and DequantizeLinear, float biases, all zero points 0. What
      TensorRT's integers can't hold is written as float arithmetic; a warning names the layers that it runs in float.
    - ``"qdq"``: for converters that match pairs. Each quantizer is a QuantizeLinear and a DequantizeLinear of the
      trained grid with nothing between; weights are int8 and biases int32 initialisers behind DequantizeLinear.
      Functions, pools and sums stand in float between pairs, so that an engine's own arithmetic decides ties: expect
      single codes to differ by one. Activations may have 16 bits; ONNX Runtime computes in float beside these.

    Activations with a grid per channel are float arithmetic in the first two forms, since these engines take such grids
    for weights alone. In ``"qdq"`` they are pairs, which ONNX Runtime (1.31) runs only without graph optimizations.

    Grids that round ties away from zero (MegEngine's) round them to even in the file; ties are rare behind a
    convolution. Fixed-point networks are written by :func:`tritonq.deploy.export_fixed_point_onnx`, which has none of
    the options below but ``metadata``.

    Args:
        model: what :func:`tritonq.convert` takes or returns, with float32 parameters; left as it is.
        path: file to write (under a temporary name, then renamed).
        example_inputs: a tensor, a tuple or list of arguments, or a dict of named ones. Sizes, but for the batch, are
            those of the file.
        target: ``"onnxruntime"``, ``"tensorrt"``, ``"qdq"``, or another engine that presets are made for, such as
            ``"openvino"``, whose form is one of these; None: what the preset of the model was made for.
        opset: at least 17; by default 18. 17 is the newest whose means TensorRT 8 reads with their axes. Activations of
            16 bits, which ``target="qdq"`` alone holds, and weights with a scale per group make it 21 at least;
            eight-bit floats 19.
        dynamic_batch: leave the size of axis 0 of the inputs open, for all tensors that share it with the first.
        dynamic_sizes: leave the sizes of all axes behind the first two open, of inputs with 3 to 5 axes, and name them
            ``height``, ``width``; for fully convolutional networks.
        input_names: names of the inputs; by default those of the forward's arguments.
        output_names: names of the outputs; by default ``"output"`` for one tensor, ``"output_0"`` and so on for
            several, and the keys of a dict or the fields of a dataclass. Text and numbers in a result are left out.
        pixels: ``(mean, std)``, each a number or one per channel: the file takes uint8 images, and looks up the code of
            ``(pixel / 255 - mean) / std``, which is the value that the trained model takes. For models with one input
            that only quantizers read.
        returns: ``"values"``; ``"codes"`` of the outputs, uint8 or int8, with 16 bits uint16 or int16 (their scales and
            zero points stand in the file's metadata); or ``"argmax"``, the index of the largest value along axis 1,
            int64, without that axis.
        pack: store weights of four bits and fewer as INT4 and UINT4, two codes per byte, in a file of opset 21 at
            least. ONNX Runtime computes their layers in float, which takes longer, and in no defined order, so that
            :func:`tritonq.verify` lets codes differ by one there. Floats of four bits become FLOAT4E2M1 (opset 23),
            which ONNX Runtime (1.31) has not: ``verify`` runs them as FLOAT8E4M3FN, which holds the same numbers.
        metadata: what else a reader must know (preprocessing, class names), as texts by name; ONNX Runtime returns them
            as ``session.get_modelmeta().custom_metadata_map``. None: nothing.

    Raises:
        ValueError: an unknown target, or None for layers that were prepared for targets with different forms; an opset
            below 17, or 17 for a model that it can't express; something the target can't represent (the message names
            the quantizer), or ``pack`` for ``"tensorrt"``; an option that fixed-point networks lack; ``pixels`` or
            ``returns`` other than described, or that the ends of the model don't allow, such as codes of an output
            without a quantizer; more or fewer names than inputs or outputs; metadata that are no texts, or have
            a key of the file's own; parameters or inputs of another float dtype than float32, or autocast around a
            forward; a model that torch can't export, or not with open sizes; or what :func:`tritonq.convert` raises.
        TypeError: ``example_inputs`` of another type.
        ImportError: onnx or onnxscript is not installed (the extra ``tritonq[onnx]``).

    Examples:
        >>> import os, tempfile
        >>> import torch, tritonq
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.ReLU())
        >>> x = torch.randn(4, 3, 8, 8)
        >>> qat = tritonq.prepare_qat(model, example_inputs=x).train()
        >>> _ = qat(x)                         # training steps
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     export_onnx(qat.eval(), f"{folder}/model.onnx", x)
        ...     os.listdir(folder)
        ['model.onnx']
    """
    form = None if target is None else onnx_form_named(target)
    if opset < OLDEST_OPSET:
        raise ValueError(f"opset must be at least {OLDEST_OPSET}, got {opset}")
    normalization = check_ends(pixels, returns)
    model = uncompiled(model)
    if has_fixed_point(model) or has_integers(model):
        options: dict[str, Any] = {"target": form, "opset": opset, "pixels": pixels, "returns": returns}
        options |= {"dynamic_batch": dynamic_batch, "dynamic_sizes": dynamic_sizes, "pack": pack}
        options |= {"input_names": input_names, "output_names": output_names}
        _export_fixed_point(model, path, example_inputs, options, metadata)
        return
    require_onnx("onnx", "onnxscript")
    check_float32(model, example_inputs)
    # Registers operators with torch, which importing tritonq should not do.
    from tritonq.deploy.onnx_graph import onnx_form
    from tritonq.deploy.onnx_quantizers import least_opset

    deployed = model if any(isinstance(module, DeployedModule) for module in model.modules()) else convert(model)
    deployed = with_output_sizes(deployed, example_inputs)
    form = onnx_form_of(deployed.modules()) if form is None else form
    if pack and form == "tensorrt":
        raise ValueError('pack=True takes integer weights, and files for target="tensorrt" have float ones')
    if dynamic_sizes:
        check_sizes(deployed, example_arguments(example_inputs))
    traced, tables = onnx_form(deployed, form)
    arguments, shapes, result = ready_to_trace(traced, deployed, example_inputs, dynamic_batch, dynamic_sizes)
    return_tensors_alone(traced, result)
    opset = max(opset, least_opset(traced), PACKED_OPSET if pack else 0)
    program = export_traced(traced, *arguments, shapes, max(opset, DEFAULT_OPSET), input_names, output_names)
    _check_names("input_names", input_names, program.model.graph.inputs)
    _check_names("output_names", output_names, program.model.graph.outputs)
    if dynamic_batch:
        tell_fixed_batch(type(model).__name__, program.model.graph)
    if output_names is None:
        name_outputs(program.model, output_paths(result))
    _name_codes(program.model)
    if form == "onnxruntime":
        quantize_layers_at_once(program.model.graph)
        quantize_behind_moves(program.model.graph)
        if not pack and convolves_codes(target, deployed.modules()):
            write_exact_sums(program.model.graph)
    program.model.metadata_props[TARGET_KEY] = form
    proto = program.model_proto
    if dynamic_sizes:
        name_sizes(proto.graph)
    if opset < DEFAULT_OPSET:
        lower_opset(proto)
    whole_ends(proto, normalization, returns, deployed)
    add_metadata(proto, metadata)
    _write(proto, Path(path), tables, pack)
    if form == "onnxruntime":
        tell_float_convolutions(proto)


def _export_fixed_point(
    model: nn.Module,
    path: str | os.PathLike[str],
    example_inputs: Any,
    options: dict[str, Any],
    metadata: Mapping[str, str] | None,
) -> None:
    """Write a fixed-point network for :func:`export_onnx`, whose options it must not have.

    Args:
        model: the network, trained or converted.
        path: file to write.
        example_inputs: its one input: a tensor, or a tuple or dict with one.
        options: the arguments of :func:`export_onnx` by name, but for the others here.
        metadata: texts by name that the file's metadata hold besides; None: none.

    Raises:
        ValueError: options other than the default ones and ``target="onnxruntime"``, or more than one input.
    """
    defaults = {key: value.default for key, value in inspect.signature(export_onnx).parameters.items()}
    if options.get("target") == "onnxruntime":
        options = {**options, "target": None}
    given = [f"{key}={value!r}" for key, value in options.items() if value != defaults[key]]
    if given:
        raise ValueError(
            "a fixed-point network is written by export_fixed_point_onnx, for ONNX Runtime, with an open batch axis "
            f"and names of its own; it has no option {', '.join(given)}"
        )
    args, kwargs = example_arguments(example_inputs)
    inputs = [*args, *kwargs.values()]
    if len(inputs) != 1 or not isinstance(inputs[0], Tensor):
        raise ValueError(f"export_fixed_point_onnx takes one tensor as example, got {len(inputs)} arguments")
    export_fixed_point_onnx(model, path, inputs[0], metadata=metadata)


def _is_autocast(forward: Any) -> bool:
    """Whether a function was wrapped by ``torch.autocast``, possibly inside other wrappers."""
    while forward is not None:
        if getattr(getattr(forward, "__code__", None), "co_name", "") == "decorate_autocast":
            return True
        forward = getattr(forward, "__wrapped__", None)
    return False


def check_float32(model: nn.Module, example_inputs: Any) -> None:
    """Check that no parameter or example input has another float dtype than float32, and autocast wraps no forward.

    Args:
        model: the model; buffers may have any dtype.
        example_inputs: a tensor, a tuple or list of arguments, or a dict of named ones.

    Raises:
        ValueError: a parameter, an example input or a module's forward doesn't comply.
        TypeError: ``example_inputs`` of another type.
    """
    for name, module in model.named_modules():
        if _is_autocast(vars(module).get("forward")):
            raise ValueError(
                f"the forward of {name or type(module).__name__!r} is wrapped in autocast, and integers need float32: "
                "unwrap it (accelerate: accelerator.unwrap_model(model, keep_fp32_wrapper=False)), then export"
            )
    held: list[tuple[str, Tensor]] = [(f"the parameter {name!r}", tensor) for name, tensor in model.named_parameters()]
    held += [("an example input", tensor) for _, tensor in tensors_in(example_arguments(example_inputs))]
    for what, tensor in held:
        if tensor.is_floating_point() and tensor.dtype != torch.float32:
            raise ValueError(
                f"ONNX files are float32, and {what} is {tensor.dtype}: "
                "call model.float() and pass float32 example_inputs"
            )


def _check_names(what: str, given: Sequence[str] | None, tensors: Sequence[Any]) -> None:
    if given is not None and (isinstance(given, str) or len(given) != len(tensors)):
        raise ValueError(f"{what} must be a sequence of {len(tensors)} names, got {given!r}")


def export_traced(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    shapes: Any,
    opset: int,
    input_names: Sequence[str] | None,
    output_names: Sequence[str] | None,
) -> Any:
    """Return the ONNX program that ``torch.onnx.export`` makes of a model which was rewritten for it.

    Args:
        model: the model, in which modules trace to operators of `onnx_ops` and `onnx_recurrent`.
        args: positional arguments to trace with.
        kwargs: named arguments to trace with.
        shapes: ``dynamic_shapes`` of torch.export; None: all sizes are those of the arguments.
        opset: version of the operators, 18 or later.
        input_names: names of the inputs, or None for torch's.
        output_names: names of the outputs, or None for torch's.

    Raises:
        ValueError: torch can't export it.

    Returns:
        A ``torch.onnx.ONNXProgram``.
    """
    from tritonq.deploy.onnx_ops import translations
    from tritonq.deploy.onnx_recurrent import recurrent_translations

    if args and isinstance(args[-1], dict) and not kwargs:
        args = (*args, {})  # torch takes a dict at the end for the named arguments
    with torch.no_grad(), warnings.catch_warnings():
        # Deprecations inside torch's exporter are not the caller's.
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
        # Of several inputs with one open size, the name of the first is taken.
        warnings.filterwarnings("ignore", "# The axis name: .* will not be used, since it shares")
        try:
            return torch.onnx.export(
                model,
                args,
                kwargs=kwargs,
                dynamo=True,
                dynamic_shapes=shapes,
                opset_version=opset,
                custom_translation_table=translations() | recurrent_translations(),
                input_names=input_names,
                output_names=output_names,
                verbose=False,
            )
        except torch.onnx.errors.OnnxExporterError as error:
            cause = error.__cause__ or error
            hint = "" if shapes is None else "; dynamic_batch=False may help"
            raise ValueError(f"{type(model).__name__} can't be exported{hint}: {cause}") from error


def _name_codes(model: Any) -> None:
    """Name the tensors of codes after their quantizers, and list the names in the file's metadata, in order.

    The list is JSON under :data:`CODES_KEY`: dicts with "quantizer", "tensor", "zero_point" and "axis" (None: one
    grid); for floats also "format" and "scale". ``model`` is an ``onnx_ir.Model``, changed in place.
    """
    from tritonq.deploy.onnx_floats import describe_floats
    from tritonq.deploy.onnx_ops import QUANTIZER_KEY

    found: list[dict[str, Any]] = []
    for node in model.graph:
        quantizer = node.outputs[0].metadata_props.pop(QUANTIZER_KEY, None)
        if quantizer is None:
            continue
        codes = node.outputs[0]
        earlier = sum(entry["quantizer"] == quantizer for entry in found)
        if node.op_type == "DequantizeLinear":  # of floats, whose codes no session returns
            if not codes.is_graph_output():
                codes.name = f"{quantizer}.values" + (f".{earlier}" if earlier else "")
            found.append({"quantizer": quantizer, "tensor": codes.name, **describe_floats(node)})
            continue
        codes.name = f"{quantizer}.codes" + (f".{earlier}" if earlier else "")
        reader = codes.uses()[0].node
        if reader.op_type == "DequantizeLinear":
            zero_point = reader.inputs[2].const_value.numpy()
            zero, axis = zero_point.tolist(), reader.attributes["axis"].as_int() if zero_point.ndim else None
        else:  # codes in float, from which the exporter subtracts a zero point unless that is 0
            zero, axis = 0, None
            if reader.op_type == "Sub":
                zero_point = reader.inputs[1].const_value.numpy()
                axis = next((axis for axis, size in enumerate(zero_point.shape) if size > 1), None)
                zero = zero_point.item() if axis is None else zero_point.flatten().tolist()
        found.append({"quantizer": quantizer, "tensor": codes.name, "zero_point": zero, "axis": axis})
    model.metadata_props[CODES_KEY] = json.dumps(found)


def _write(proto: Any, target: Path, tables: list[CodeTable], pack: bool) -> None:
    forget_source(proto)
    codes: dict[str, list[str]] = {}
    for entry in code_entries(proto):
        codes.setdefault(entry["quantizer"], []).append(entry["tensor"])
    check_functions(proto, tables, codes)
    if pack:
        pack_weights(proto)
    separate_weights(proto)
    content = checked(proto)
    with atomic_file(target) as file:
        file.write(content)
