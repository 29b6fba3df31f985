"""Encodings of AIMET, which Qualcomm's converters read, beside an ONNX file of float operators."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from torch import nn

from tritonq.deploy.as_trained import ready_to_trace
from tritonq.deploy.convert import convert
from tritonq.deploy.example_inputs import tell_fixed_batch
from tritonq.deploy.files import atomic_files
from tritonq.deploy.fixed_point import has_fixed_point
from tritonq.deploy.fixed_point_description import has_integers
from tritonq.deploy.modules import DeployedModule
from tritonq.deploy.onnx_export import DEFAULT_OPSET, OLDEST_OPSET, check_float32, export_traced
from tritonq.deploy.onnx_files import checked, forget_source, require_onnx
from tritonq.deploy.onnx_opset17 import lower_opset
from tritonq.deploy.output_sizes import with_output_sizes
from tritonq.deploy.outputs import name_outputs, output_paths, return_tensors_alone
from tritonq.nn.compile_wrapper import uncompiled
from tritonq.version import __version__

if TYPE_CHECKING:
    from tritonq.deploy.encodings_form import Encoding

EncodingVersion = Literal["1.0.0", "2.0.0"]
"""The versions of AIMET's format that :func:`export_encodings` writes."""


def export_encodings(
    model: nn.Module,
    path: str | os.PathLike[str],
    example_inputs: Any,
    *,
    version: EncodingVersion = "1.0.0",
    int32_bias: bool | None = None,
    dynamic_batch: bool = False,
    opset: int = DEFAULT_OPSET,
) -> dict[str, Any]:
    """Write a float ONNX file, and beside it the grids of its tensors as AIMET's ``.encodings``.

    Qualcomm's converters read both (``qairt-converter --quantization_overrides model.encodings``). The ONNX file holds
    float operators only. Weights and biases lie on their grids, so that rounding gives the trained codes. The names in
    the encodings are those of the ONNX file's tensors.

    ``value = (code + offset) * scale`` with unsigned codes ``0 .. 2^bw - 1`` in version 1.0.0: the offset is
    ``-zero_point``, and for signed codes ``-zero_point - 2^(bw-1)``. ``value = (code - y_zero_point) * y_scale`` in
    version 2.0.0, where activations are unsigned and parameters as they were trained.

    A tensor without an encoding, other than a bias, was not quantized; ``--float_fallback`` computes what reads it in
    float. The result of an operation that only moves values has the encoding of its input. A tensor that is read on two
    grids is read through an Identity. Ties are rounded by the engine's rule, a narrow range (-127..127) becomes the
    whole one, and devices requantize by fixed point: expect single codes to differ by one. Embedding tables stay in
    float, with a UserWarning.

    Args:
        model: what :func:`tritonq.convert` takes, or returns; float32. Preset ``"qnn"`` suits these engines.
        path: the ONNX file to write; the encodings stand beside it, with ``.encodings`` in place of its suffix.
        example_inputs: a tensor, a tuple or list of arguments, or a dict of named ones. The file takes their sizes.
        version: ``"1.0.0"``, AIMET's default, or ``"2.0.0"``.
        int32_bias: whether to list biases, as 32-bit codes in units of input scale times weight scale; None: in version
            2.0.0 only, as AIMET does.
        dynamic_batch: leave the size of axis 0 of the inputs open.
        opset: version of the ONNX operators, at least 17.

    Returns:
        The content of the file of encodings: one dict per tensor, in the lists "activation_encodings" and
        "param_encodings" in version 1.0.0, in the list "encodings" in version 2.0.0.

    Raises:
        ValueError: an unknown version, an old opset, a path that ends in ``.encodings``, a grid that encodings can't
            describe or a recurrent layer (the message names it), a fixed-point network, parameters or inputs other than
            float32, a model that torch can't export or that raises an error on the example inputs, or what
            :func:`tritonq.convert` raises.
        TypeError: with ``dynamic_batch`` the forward does not take the example inputs.
        ImportError: onnx or onnxscript is not installed (the extra ``tritonq[onnx]``).
        OSError: a file can't be written.

    Source: the formats that aimet_torch 2.42 writes (``QuantizationSimModel.onnx.export``).

    Examples:
        >>> import os, tempfile
        >>> import torch, tritonq
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.ReLU())
        >>> x = torch.randn(4, 3, 8, 8)
        >>> qat = tritonq.prepare_qat(model, qconfig=tritonq.get_qconfig("qnn"), example_inputs=x).train()
        >>> _ = qat(x)                         # training steps
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     encodings = export_encodings(qat.eval(), f"{folder}/model.onnx", x)
        ...     sorted(os.listdir(folder))
        ['model.encodings', 'model.onnx']
        >>> [(entry["name"], entry["bw"], entry["enc_type"]) for entry in encodings["param_encodings"]]
        [('0.weight', 8, 'PER_CHANNEL')]
        >>> len(encodings["activation_encodings"])
        2
    """
    if version not in get_args(EncodingVersion):
        raise ValueError(f"unknown version {version!r}; known: {', '.join(get_args(EncodingVersion))}")
    if opset < OLDEST_OPSET:
        raise ValueError(f"opset must be at least {OLDEST_OPSET}, got {opset}")
    target = Path(path)
    if target.suffix == ".encodings":
        raise ValueError(f"path is the ONNX file's, got {str(path)!r}; the encodings get the suffix themselves")
    model = uncompiled(model)
    if has_fixed_point(model) or has_integers(model):
        raise ValueError("encodings have no form for fixed-point networks: use export_fixed_point_onnx")
    require_onnx("onnx", "onnxscript")
    check_float32(model, example_inputs)
    # Registers operators with torch, which importing tritonq should not do.
    from tritonq.deploy.encodings_form import encodings_form, take_marks

    deployed = model if any(isinstance(module, DeployedModule) for module in model.modules()) else convert(model)
    deployed = with_output_sizes(deployed, example_inputs)
    traced, marks = encodings_form(deployed)
    arguments, shapes, result = ready_to_trace(traced, deployed, example_inputs, dynamic_batch)
    return_tensors_alone(traced, result)
    program = export_traced(traced, *arguments, shapes, max(opset, DEFAULT_OPSET), None, None)
    if dynamic_batch:
        tell_fixed_batch(type(model).__name__, program.model.graph)
    name_outputs(program.model, output_paths(result))
    found = take_marks(program.model.graph, marks)
    parameters = set(program.model.graph.initializers)
    program.model.opset_imports.pop("tritonq", None)
    proto = program.model_proto
    if opset < DEFAULT_OPSET:
        lower_opset(proto)
    forget_source(proto)
    with_bias = version == "2.0.0" if int32_bias is None else int32_bias
    written = {name: grid for name, grid in found.items() if with_bias or grid.qtype.bits < 32}
    encodings = encodings_json(written, parameters, version)
    _write(proto, target, encodings)
    return encodings


def _write(proto: Any, target: Path, encodings: dict[str, Any]) -> None:
    content = checked(proto)
    with atomic_files(target, target.with_suffix(".encodings")) as (graph, listed):
        graph.write(content)
        listed.write(json.dumps(encodings, indent=2).encode())


def encodings_json(found: dict[str, Encoding], parameters: set[str], version: EncodingVersion) -> dict[str, Any]:
    """Return the content of a file of encodings as plain data, ready for JSON.

    Its keys are "producer" and "version", and for version 1.0.0 "activation_encodings", "param_encodings" and
    "excluded_layers" (empty); for version 2.0.0 "encodings". Each of the two lists of 1.0.0, and the one of 2.0.0, has
    an entry per tensor, in the order of ``found``, such as

    - in 1.0.0: ``{"name": "x", "dtype": "INT", "enc_type": "PER_TENSOR", "bw": 8, "is_sym": False, "scale": [0.1],
      "offset": [-3]}``;
    - in 2.0.0: ``{"name": "x", "output_dtype": "uint8", "y_scale": 0.1, "y_zero_point": 3}``.

    Args:
        found: the grids by the names of the file's tensors.
        parameters: which of these names are weights and biases: entries of "param_encodings" in version 1.0.0; in
            2.0.0 their signed codes stay signed, and those of other tensors are shifted to unsigned ones.
        version: of the format, ``"1.0.0"`` or ``"2.0.0"``.
    """
    head: dict[str, Any] = {"producer": {"package": "tritonq", "version": __version__}, "version": version}
    if version == "2.0.0":
        return head | {"encodings": [_newer(name, grid, name in parameters) for name, grid in found.items()]}
    return head | {
        "activation_encodings": [_older(name, grid) for name, grid in found.items() if name not in parameters],
        "param_encodings": [_older(name, grid) for name, grid in found.items() if name in parameters],
        "excluded_layers": [],
    }


def _older(name: str, grid: Encoding) -> dict[str, Any]:
    """Return the entry, in version 1.0.0, of the tensor ``name`` with this grid; ready for JSON.

    Its keys are "name", "dtype" ("INT"), "enc_type", "bw" (bits), "is_sym", "scale" and "offset". The offset is minus
    the zero point, counted from the smallest code; the grid is symmetric if that is ``-2^(bw-1)`` and its type is.
    """
    bits, middle = grid.qtype.bits, 2 ** (grid.qtype.bits - 1)
    offset = [-zero - (middle if grid.qtype.signed else 0) for zero in grid.zero_point]
    return {
        "name": name,
        "dtype": "INT",
        "enc_type": "PER_TENSOR" if grid.qtype.axis is None else "PER_CHANNEL",
        "bw": bits,
        "is_sym": grid.qtype.symmetric and set(offset) == {-middle},
        "scale": list(grid.scale),
        "offset": offset,
    }


def _newer(name: str, grid: Encoding, is_parameter: bool) -> dict[str, Any]:
    """Return the entry, in version 2.0.0, of the tensor ``name`` with this grid; ready for JSON.

    Its keys are "name", "output_dtype" ("int8", "uint8", …), "y_scale", "y_zero_point" (left out if 0) and, per
    channel, "axis". Signed codes stay signed for a weight or bias (``is_parameter``), and are shifted to unsigned ones
    otherwise.
    """
    bits, signed = grid.qtype.bits, grid.qtype.signed
    shift = 2 ** (bits - 1) if signed and not is_parameter else 0
    zero = [point + shift for point in grid.zero_point]
    entry: dict[str, Any] = {
        "name": name,
        "output_dtype": f"{'int' if signed and is_parameter else 'uint'}{bits}",
        "y_scale": grid.scale[0] if grid.qtype.axis is None else list(grid.scale),
    }
    if any(zero):
        entry["y_zero_point"] = zero[0] if grid.qtype.axis is None else zero
    if grid.qtype.axis is not None:
        entry["axis"] = grid.qtype.axis
    return entry
