"""Running an exported file in ONNX Runtime, with its codes."""

from __future__ import annotations

import json
import os
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tritonq.deploy.codes import Codes, Runner
from tritonq.deploy.onnx_files import CODES_KEY, TARGET_KEY, require_onnx
from tritonq.deploy.onnx_session import open_session
from tritonq.prepare.record.structure import tensors_in


def onnx_runner(
    path: str | os.PathLike[str],
) -> Runner:
    """A function that runs the file and returns its codes and outputs.

    The outputs come from the file as it is, the codes from a second session, over a copy in memory that returns them.

    Raises:
        ValueError: not an ONNX file, or not one of :func:`tritonq.export_onnx`.
        ImportError: onnx or onnxruntime is not installed.
    """
    require_onnx("onnx", "onnxruntime")
    import onnx

    try:
        model = onnx.load(os.fspath(path))
    except OSError:
        raise
    except Exception as error:  # protobuf's own exception types
        raise ValueError(f"{os.fspath(path)} is not an ONNX file") from error
    properties = {entry.key: entry.value for entry in model.metadata_props}
    if CODES_KEY not in properties:
        raise ValueError(f"{os.fspath(path)} was not written by export_onnx: it does not say where its codes are")
    entries = json.loads(properties[CODES_KEY])
    target = properties.get(TARGET_KEY)
    plain = _session(model.SerializeToString(), target)
    output_names = [output.name for output in plain.get_outputs()]
    # Layers of a fixed-point network may share their codes.
    tensors = list(dict.fromkeys(entry["tensor"] for entry in entries))
    for tensor in tensors:
        model.graph.output.append(onnx.helper.make_empty_tensor_value_info(tensor))
    with_codes = _session(model.SerializeToString(), target)

    def run(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Codes, list[Tensor]]:
        feeds = _feeds(plain, args, kwargs)
        codes: Codes = {}
        raw = dict(zip(tensors, with_codes.run(tensors, feeds), strict=True))
        for entry in entries:
            values = _centred(raw[entry["tensor"]], entry["zero_point"], entry["axis"])
            codes.setdefault(entry["quantizer"], []).append(values)
        return codes, [torch.from_numpy(np.array(output)) for output in plain.run(output_names, feeds)]

    return run


def _session(model: bytes, target: str | None) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    if target != "onnxruntime":
        # As written: ONNX Runtime's fusions, which quantize float weights beside Q/DQ once more, are not the target's.
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    return open_session(model, options)


def _feeds(session: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    tensors = [tensor for _, tensor in tensors_in((args, kwargs))]
    names = [entry.name for entry in session.get_inputs()]
    if len(names) != len(tensors):
        raise ValueError(f"the ONNX file takes {len(names)} inputs ({', '.join(names)}), got {len(tensors)}")
    return {name: tensor.detach().cpu().numpy() for name, tensor in zip(names, tensors, strict=True)}


def _centred(codes: Any, zero_point: Any, axis: int | None) -> Tensor:
    zero = np.asarray(zero_point, dtype=np.int32)
    if axis is not None:
        shape = [1] * codes.ndim
        shape[axis] = -1
        zero = zero.reshape(shape)
    return torch.from_numpy(codes.astype(np.int32) - zero).float()
