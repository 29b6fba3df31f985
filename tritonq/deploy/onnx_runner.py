"""Running an ONNX file of :func:`tritonq.export_onnx` in ONNX Runtime, with its codes."""

from __future__ import annotations

import json
import os
from collections import Counter
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tritonq.deploy.codes import Codes, GivenCodes, Runner
from tritonq.deploy.onnx_ends import Ends
from tritonq.deploy.onnx_files import CODES_KEY, TARGET_KEY, require_onnx
from tritonq.deploy.onnx_floats import float_codes, float_values
from tritonq.deploy.onnx_layers_apart import find_islands, given_name, separated
from tritonq.deploy.onnx_packed import widen_floats
from tritonq.deploy.onnx_session import open_session
from tritonq.granularity import Granularity
from tritonq.prepare.record.structure import tensors_in


def onnx_runner(path: str | os.PathLike[str]) -> tuple[Runner, dict[str, tuple[str, ...]], Ends, int]:
    """Return what `verify` needs of an ONNX file: ``(runner, islands, ends, inputs)``.

    The runner takes the outputs from the file as it is, and the codes from a second session, on a copy in memory that
    returns the codes. Codes given to the runner go to a third session, on a copy in which readers of codes read inputs;
    its list of outputs is then empty. It raises ValueError if its arguments have not as many tensors as the file has
    inputs.

    Args:
        path: path of the file.

    Returns:
        A :class:`tritonq.deploy.codes.Runner`; for quantizers behind islands, by name, the types of the islands'
        operators, such as ``("Softmax",)``; the :class:`Ends`, which say what the file takes and returns in place of
        float values; and the file's number of inputs.

    Raises:
        OSError: the file can't be read.
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
    widen_floats(model)
    properties = {entry.key: entry.value for entry in model.metadata_props}
    if CODES_KEY not in properties:
        raise ValueError(f"{os.fspath(path)} was not written by export_onnx: it does not say where its codes are")
    entries = json.loads(properties[CODES_KEY])
    target = properties.get(TARGET_KEY)
    # Layers of a fixed-point network may share their codes.
    tensors = list(dict.fromkeys(entry["tensor"] for entry in entries))
    islands = find_islands(model.graph, tensors, target)
    return (
        _Runner(model, entries, tensors, target),
        {entry["quantizer"]: islands[entry["tensor"]] for entry in entries if islands[entry["tensor"]]},
        Ends.of(properties),
        len(model.graph.input),
    )


class _Runner:
    """A file, run by ONNX Runtime; called as a :class:`tritonq.deploy.codes.Runner`.

    It has three sessions: the file as it is, a copy that returns its codes, and, once codes are given, a copy that
    reads them. An entry of the file's list of codes names their quantizer and tensor, zero point and axis.
    """

    def __init__(self, model: Any, entries: list[dict[str, Any]], tensors: list[str], target: str | None) -> None:
        self._model, self._entries, self._tensors, self._target = model, entries, tensors, target
        self._plain = _session(model.SerializeToString(), target)
        self._with_codes = self._plain if not tensors else _session(_returning(model, tensors), target)
        self._separated: Any = None

    def __call__(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], given: GivenCodes | None = None
    ) -> tuple[Codes, list[Tensor]]:
        """Return ``(codes, outputs)`` of one call: codes minus zero points by quantizer, one float32 tensor per use.

        With ``given`` codes each layer computes on these, in place of what the layers before it made; the outputs are
        then an empty list. None: the file runs as it is.
        """
        feeds = _feeds(self._plain, args, kwargs)
        raw = self._run_for_codes(self._with_codes, feeds)
        if given is None:
            outputs = self._plain.run([output.name for output in self._plain.get_outputs()], feeds)
            return self._codes(raw), [torch.from_numpy(np.array(output)) for output in outputs]
        if self._separated is None:
            kinds = {name: (values.dtype, values.ndim) for name, values in raw.items()}
            self._separated = _session(separated(self._model, kinds), self._target)
        for name, values in self._raw_codes(given, raw).items():
            feeds[given_name(name)] = values
        wanted = {entry.name for entry in self._separated.get_inputs()}
        feeds = {name: values for name, values in feeds.items() if name in wanted}
        return self._codes(self._run_for_codes(self._separated, feeds)), []

    def _run_for_codes(self, session: Any, feeds: dict[str, Any]) -> dict[str, Any]:
        # ONNX Runtime takes an empty list for all outputs.
        values = session.run(self._tensors, feeds) if self._tensors else []
        return dict(zip(self._tensors, values, strict=True))

    def _codes(self, raw: dict[str, Any]) -> Codes:
        codes: Codes = {}
        for entry in self._entries:
            values = raw[entry["tensor"]]
            if "format" in entry:
                codes.setdefault(entry["quantizer"], []).append(float_codes(entry, torch.from_numpy(values)))
                continue
            centred = values.astype(np.int32) - _zero_point(entry, values.ndim)
            codes.setdefault(entry["quantizer"], []).append(torch.from_numpy(centred).float())
        return codes

    def _raw_codes(self, given: GivenCodes, raw: dict[str, Any]) -> dict[str, Any]:
        """Return the codes to put in, as the file's tensors hold them.

        They are the given ones, to which the zero point is added; the file's own for calls without any, and for NaN.
        ``raw`` has the file's own codes, by the name of their tensor.
        """
        made, calls = dict(raw), Counter[str]()
        for entry in self._entries:
            quantizer, own = entry["quantizer"], raw[entry["tensor"]]
            known = given.get(quantizer, ())
            other = known[calls[quantizer]] if calls[quantizer] < len(known) else None
            calls[quantizer] += 1
            if other is None:
                continue
            if "format" in entry:
                made[entry["tensor"]] = float_values(entry, other.reshape(own.shape)).numpy()
                continue
            codes = other.numpy().reshape(own.shape) + _zero_point(entry, own.ndim)
            if own.dtype.kind != "f":
                info = np.iinfo(own.dtype)
                codes = np.where(np.isnan(codes), own, codes).clip(info.min, info.max)
            made[entry["tensor"]] = codes.astype(own.dtype)
        return made


def _returning(model: Any, tensors: list[str]) -> bytes:
    """Return the content of a copy of the file that also returns these tensors."""
    import onnx

    copied = onnx.ModelProto()
    copied.CopyFrom(model)
    present = {output.name for output in copied.graph.output}
    copied.graph.output.extend(
        onnx.helper.make_empty_tensor_value_info(name) for name in tensors if name not in present
    )
    content: bytes = copied.SerializeToString()
    return content


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


def _zero_point(entry: dict[str, Any], dimensions: int) -> Any:
    zero = torch.tensor(entry["zero_point"], dtype=torch.int32)
    return Granularity(entry["axis"]).align(zero, dimensions).numpy()
