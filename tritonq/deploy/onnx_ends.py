"""Integers at the ends of an ONNX file: pixels in, codes or the index of the largest class out.

The code of each pixel value is computed once, at export: the value after mean and standard deviation, on the grid of
the input's quantizer. The file looks the code up in a table, so no float value stands before the first layer and none
is rounded twice. What a file takes and returns is noted in its metadata, as JSON under the key ``tritonq.ends``.
``proto`` is always an ``onnx.ModelProto``.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn

from tritonq.deploy.modules import Quantizer
from tritonq.deploy.onnx_files import ENDS_KEY, code_entries, drop_unread
from tritonq.prepare.record.structure import replace_tensors

Returned = Literal["values", "codes", "argmax"]
_PIXELS = 256
# Of what a quantizer consists in a file.
_QUANTIZING = frozenset(
    [
        *("Abs", "Add", "Cast", "Clip", "Constant", "Div", "Floor", "GreaterOrEqual", "Identity", "Mul"),
        *("QuantizeLinear", "Round", "Sign", "Sub"),
    ]
)


@dataclass(frozen=True)
class PixelNormalization:
    """How uint8 pixels become the values that a model reads: ``(pixel / 255 - mean) / std``, in float32.

    Attributes:
        mean: one number per channel, or one for all.
        std: as ``mean``.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, pixels: Tensor) -> Tensor:
        """Return the values of ``pixels`` (n, channels, …), float32."""
        shape = (1, -1, *[1] * (pixels.dim() - 2))
        mean, std = (torch.tensor(values, device=pixels.device).view(shape) for values in (self.mean, self.std))
        return (pixels.float() / 255 - mean) / std


@dataclass(frozen=True)
class Ends:
    """What a file takes and returns in place of float values.

    Attributes:
        pixels: how the pixels that it takes become values; None: it takes values.
        returned: what it returns: ``"values"``, their ``"codes"``, or ``"argmax"``, the index of the largest.
        grids: for ``"codes"`` a pair ``(scale, zero point)`` for each output, in their order; else empty.
    """

    pixels: PixelNormalization | None = None
    returned: Returned = "values"
    grids: tuple[tuple[float, int], ...] = ()

    @classmethod
    def of(cls, properties: dict[str, str]) -> Ends:
        """Return the ends that a file's metadata (key to text) describe, as :meth:`to_json` wrote them.

        Without the key ``tritonq.ends`` that is ``Ends()``: values in and out.
        """
        data = json.loads(properties.get(ENDS_KEY, "{}"))
        pixels = data.get("pixels")
        return cls(
            None if pixels is None else PixelNormalization(*map(tuple, pixels)),
            data.get("returned", "values"),
            tuple((scale, zero) for scale, zero in data.get("grids", ())),
        )

    def to_json(self) -> str:
        """Return the text for a file's metadata, which :meth:`of` reads: the attributes as a JSON object.

        Examples:
            >>> Ends(PixelNormalization((0.5,), (0.25,)), "codes", ((0.1, 3),)).to_json()
            '{"pixels": [[0.5], [0.25]], "returned": "codes", "grids": [[0.1, 3]]}'
        """
        pixels = None if self.pixels is None else [self.pixels.mean, self.pixels.std]
        return json.dumps({"pixels": pixels, "returned": self.returned, "grids": self.grids})

    def values(self, arguments: Any) -> Any:
        """Return the arguments for the trained model, given those for the file: uint8 pixels become float values.

        ``arguments`` may nest tensors (n, channels, …) in tuples, lists and dicts; each is taken for pixels and becomes
        a float32 tensor. If ``pixels`` is None, ``arguments`` are returned as they are.
        """
        return arguments if self.pixels is None else replace_tensors(arguments, self.pixels)

    def results(self, outputs: list[Tensor]) -> list[Tensor]:
        """Return the outputs that the file should have if the trained model returns ``outputs``.

        For ``"argmax"`` the index of the largest value along axis 1, int64, without that axis; for ``"codes"``
        ``round(output / scale) + zero point`` by ``grids``, int32; else the outputs themselves.
        """
        if self.returned == "argmax":
            return [output.argmax(1) for output in outputs]
        if self.returned == "codes":
            grids = zip(outputs, self.grids, strict=True)
            return [(output / scale).round().int() + zero for output, (scale, zero) in grids]
        return outputs


def check_ends(pixels: Any, returned: Any) -> PixelNormalization | None:
    """Check the arguments ``pixels`` and ``returns`` of :func:`tritonq.export_onnx`; return how pixels become values.

    Args:
        pixels: ``(mean, std)``, two numbers for all channels, or two sequences with one number per channel. A number
            counts as a sequence of one. None: the result is None.
        returned: what the file returns: ``"values"``, ``"codes"`` or ``"argmax"``.

    Raises:
        ValueError: ``pixels`` are something else, or have another number of means than of deviations, or none; a number
            is not finite in float32, or a deviation not positive; or ``returned`` is unknown.
    """
    if returned not in get_args(Returned):
        raise ValueError(f"unknown returns {returned!r}; known: {', '.join(get_args(Returned))}")
    if pixels is None:
        return None
    try:
        mean, std = map(_numbers, pixels)
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"pixels must be (mean, std), each a number or one per channel, got {pixels!r}") from error
    if not mean or len(mean) != len(std):
        raise ValueError(f"pixels must hold as many deviations as means, at least one, got {pixels!r}")
    held = torch.tensor([mean, std])  # in float32, in which they are applied
    if not (held.isfinite().all() and (held[1] > 0).all()):
        raise ValueError(f"pixels must hold finite numbers, all deviations positive, got {pixels!r}")
    return PixelNormalization(mean, std)


def _numbers(given: Any) -> tuple[float, ...]:
    """Return a number, or each of a sequence, as float; TypeError, ValueError or OverflowError for anything else."""
    if isinstance(given, (str, bytes)):
        raise TypeError(f"text is no number: {given!r}")
    return (float(given),) if isinstance(given, (int, float)) else tuple(map(float, given))


def take_pixels(proto: Any, normalization: PixelNormalization, model: nn.Module) -> None:
    """Make a file take uint8 pixels, whose codes it looks up in a table instead of quantizing its input.

    Args:
        proto: the file's content; changed in place.
        normalization: how pixels become values.
        model: the converted model, in which the file's quantizers are found by name.

    Raises:
        ValueError: several inputs; an input without an axis of channels; means for another number of channels; an input
            that anything but a quantizer reads, or one whose quantizer has a grid per channel or a float format.
    """
    import onnx

    graph = proto.graph
    if len(graph.input) != 1:
        raise ValueError(f"pixels are for models with one input, and this one has {len(graph.input)}")
    (source,) = graph.input
    axes = source.type.tensor_type.shape.dim
    if len(axes) < 2:
        raise ValueError("pixels are for inputs (n, channels, …), and this model's has no axis of channels")
    channels = axes[1].dim_value
    if len(normalization.mean) not in (1, channels):
        raise ValueError(f"pixels has {len(normalization.mean)} means, and the input has {channels} channels")
    quantizers = {entry["tensor"]: entry for entry in code_entries(proto)}
    between, made = _nodes_up_to_codes(graph, source.name, set(quantizers))
    pixels = torch.arange(_PIXELS).view(1, 1, _PIXELS).expand(1, channels, _PIXELS)
    kinds = {value.name: value.type.tensor_type.elem_type for value in graph.value_info}
    for node in between:
        graph.node.remove(node)
    new: list[Any] = []
    for name in made:
        entry = quantizers[name]
        quantizer = model.get_submodule(entry["quantizer"])
        if not isinstance(quantizer, Quantizer) or entry["axis"] is not None:
            raise ValueError(f"pixels need one grid for the input, and {entry['quantizer']!r} has one per channel")
        values = quantizer(normalization(pixels.to(quantizer.scale.device)))
        codes = (values / quantizer.scale).round() + entry["zero_point"]
        dtype = onnx.helper.tensor_dtype_to_np_dtype(kinds[name])
        new += _look_up(graph, source.name, name, codes[0].cpu().numpy().astype(dtype))
    for index, node in enumerate(new):
        graph.node.insert(index, node)
    source.type.tensor_type.elem_type = onnx.TensorProto.UINT8


def _nodes_up_to_codes(graph: Any, source: str, codes: set[str]) -> tuple[list[Any], list[str]]:
    """Return the nodes that make codes of an input, and the names of these codes.

    Args:
        graph: an ``onnx.GraphProto``.
        source: name of the input.
        codes: names of all tensors of codes.

    Raises:
        ValueError: something besides quantizers reads the input.
    """
    constants = {tensor.name for tensor in graph.initializer}
    reached, nodes, made = {source}, [], []
    for node in graph.node:
        if node.op_type == "Constant":
            constants.add(node.output[0])
        if reached.isdisjoint(node.input):
            continue
        others = [name for name in node.input if name and name not in reached and name not in constants]
        if node.op_type not in _QUANTIZING or others:
            raise ValueError(f"pixels need a model whose quantizers alone read its input; a {node.op_type} reads it")
        nodes.append(node)
        if node.output[0] in codes:
            made.append(node.output[0])
        else:
            reached.update(node.output)
    outputs = reached & {output.name for output in graph.output}
    if outputs or not made:
        raise ValueError("pixels need a model whose quantizers alone read its input; it is read as it is")
    return nodes, made


def _look_up(graph: Any, source: str, result: str, codes: Any) -> list[Any]:
    """Return nodes that look the codes of pixels up in a table; ``codes`` is (channels, 256) or (1, 256).

    ``source`` is the name of the pixels, ``result`` that of the codes.
    """
    import onnx

    make, named = onnx.helper.make_node, onnx.numpy_helper.from_array
    if codes.dtype == np.uint8 and (codes == np.arange(_PIXELS)).all():
        return [make("Identity", [source], [result])]
    index = f"{result}.pixels"
    nodes = [make("Cast", [source], [index], to=onnx.TensorProto.INT32)]
    if (codes == codes[:1]).all():
        codes = codes[:1]
    else:
        dimensions = len(graph.input[0].type.tensor_type.shape.dim)
        rows = np.arange(len(codes), dtype=np.int32) * _PIXELS
        graph.initializer.append(named(rows.reshape(1, -1, *[1] * (dimensions - 2)), f"{result}.rows"))
        nodes.append(make("Add", [index, f"{result}.rows"], [f"{result}.index"]))
        index = f"{result}.index"
    graph.initializer.append(named(np.ascontiguousarray(codes.reshape(-1)), f"{result}.table"))
    return [*nodes, make("Gather", [f"{result}.table", index], [result])]


def return_whole_numbers(proto: Any, returned: Returned) -> tuple[tuple[float, int], ...]:
    """Make a file return the codes of its outputs, or the index of the largest value along axis 1, in place of values.

    Each output is replaced and keeps its name. Indices are int64, without axis 1; codes have the dtype that they have
    in the file, such as uint8.

    Args:
        proto: the file's content; changed in place.
        returned: "codes" or "argmax".

    Returns:
        For "codes" ``(scale, zero point)`` of each output, in their order; for "argmax" an empty tuple.

    Raises:
        ValueError: codes of an output that no quantizer with one grid rounds, or argmax of one without an axis 1.
    """
    import onnx

    graph = proto.graph
    makers = {name: node for node in graph.node for name in node.output}
    held = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    known = {entry["tensor"] for entry in code_entries(proto)}
    grids: list[tuple[float, int]] = []
    for output in graph.output:
        name = output.name
        maker: Any = makers.get(name)
        # Codes of several grids have another order than their values.
        has_codes = maker is not None and maker.op_type == "DequantizeLinear" and maker.input[0] in known
        has_codes = has_codes and held[maker.input[1]].ndim == 0
        if returned == "argmax":
            if len(output.type.tensor_type.shape.dim) < 2:
                raise ValueError(f"argmax looks along axis 1, which the output {name!r} does not have")
            # ONNX Runtime's ArgMax takes codes of 8 bits only.
            has_codes = has_codes and held[maker.input[2]].dtype.itemsize == 1
        else:
            if not has_codes:
                raise ValueError(f"the output {name!r} has no codes: no quantizer with one grid stands before it")
            grids.append((float(held[maker.input[1]]), int(held[maker.input[2]])))
        source = maker.input[0] if has_codes else f"{name}.values"
        for node in graph.node:
            _rename(node.input, name, f"{name}.values")
            _rename(node.output, name, f"{name}.values")
        if returned == "codes":
            graph.node.append(onnx.helper.make_node("Identity", [source], [name]))
            output.type.tensor_type.elem_type = onnx.helper.np_dtype_to_tensor_dtype(held[maker.input[2]].dtype)
        else:
            graph.node.append(onnx.helper.make_node("ArgMax", [source], [name], axis=1, keepdims=0))
            output.type.tensor_type.elem_type = onnx.TensorProto.INT64
            del output.type.tensor_type.shape.dim[1]
    drop_unread(graph)
    return tuple(grids)


def _rename(names: Any, old: str, new: str) -> None:
    for index, name in enumerate(names):
        if name == old:
            names[index] = new


def whole_ends(proto: Any, normalization: PixelNormalization | None, returned: Returned, model: nn.Module) -> None:
    """Make a file take pixels or return integers, and note both in its metadata; ``proto`` is changed in place.

    Nothing changes if ``normalization`` is None and ``returned`` is ``"values"``.

    Args:
        proto: the file's content, which takes and returns values.
        normalization: how uint8 pixels become values; None: the file goes on taking values.
        returned: what the file returns for each output: ``"values"``, as before; ``"codes"``, the codes of its
            quantizer; ``"argmax"``, the index of the largest value along axis 1, int64.
        model: the converted model, in which the file's quantizers are found by name.

    Raises:
        ValueError: pixels for a model with several inputs, with another number of channels, or with an input that
            anything but quantizers of one grid of integers reads; codes of an output that no quantizer with one grid
            rounds, or argmax of one without an axis 1.
    """
    if normalization is None and returned == "values":
        return
    if normalization is not None:
        take_pixels(proto, normalization, model)
    grids: Sequence[tuple[float, int]] = () if returned == "values" else return_whole_numbers(proto, returned)
    entry = proto.metadata_props.add()
    entry.key, entry.value = ENDS_KEY, Ends(normalization, returned, tuple(grids)).to_json()
