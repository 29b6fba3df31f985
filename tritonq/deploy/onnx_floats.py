"""Quantizers and weights of eight-bit floats in ONNX files: FLOAT8E4M3FN and FLOAT8E5M2 (opset 19).

A *code* of a float format counts its numbers: n stands for the n-th positive number, -n for its opposite, 0 for zero.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tritonq.deploy.float_quantizer import FloatQuantizer
from tritonq.deploy.onnx_ops import quantize_dequantize_float, round_to_float
from tritonq.formats import FLOAT_FORMATS, FloatCodes
from tritonq.granularity import Granularity
from tritonq.reference.float_rounding import codes_of_floats, floats_of_codes, round_to_float_

# The oldest with Q/DQ of eight-bit floats.
FLOATS_OPSET = 19
FLOAT_DTYPES: dict[str, torch.dtype] = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
_FORMATS: dict[str, FloatCodes] = {"FLOAT8E4M3FN": "e4m3", "FLOAT8E5M2": "e5m2"}


class TracedFloatQuantizer(nn.Module):
    """A quantizer to 8-bit floats, as QuantizeLinear and DequantizeLinear or as products by scales around a cast.

    Args:
        source: the converted model's quantizer.
        name: its name in the model.
        divides: whether QuantizeLinear divides by the scale. If not, the file multiplies by the reciprocal scale before
            a Cast, as in training, and by the scale behind it: that is for ONNX Runtime (1.31), which would move
            DequantizeLinear behind operations that it lacks for 8-bit floats, and then refuse its own graph.

    Raises:
        ValueError: a format other than E4M3 and E5M2.
    """

    scale: Tensor
    inverse: Tensor
    zero_point: Tensor
    one: Tensor

    def __init__(self, source: FloatQuantizer, name: str, divides: bool) -> None:
        super().__init__()
        self.divides = divides
        dtype = FLOAT_DTYPES.get(source.qtype.codes)
        if dtype is None:
            raise ValueError(
                f"the quantizer {name!r} rounds to {source.qtype.codes}, for which ONNX Runtime has no Q/DQ; known: "
                f"{', '.join(FLOAT_DTYPES)}"
            )
        self.name = name
        self.axis = source.qtype.axis
        shape = () if divides and self.axis is None else (-1,)
        self.register_buffer("scale", source.scale.reshape(shape))
        self.register_buffer("inverse", self.scale.reciprocal())
        self.register_buffer("zero_point", torch.zeros_like(self.scale if divides else torch.ones(())).to(dtype))
        self.register_buffer("one", torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        """Return ``number · scale`` with the number of the format nearest to ``x / scale``; larger magnitudes saturate.

        ``x`` is float32 of any shape, and so is the result. Without ``divides`` the quotient is ``x · (1 / scale)``.
        """
        y: Tensor
        if self.divides:
            y = quantize_dequantize_float(x, self.scale, self.zero_point, self.axis or 0, self.name)
            return y
        # One axis where there is one scale, or ONNX Runtime would multiply it into the weights before.
        shape = [1] if self.axis is None else [1] * x.dim()
        if self.axis is not None:
            shape[self.axis] = -1
        y = round_to_float(x * self.inverse.view(shape), self.one, self.zero_point, self.name)
        return y * self.scale.view(shape)


def describe_floats(node: Any) -> dict[str, Any]:
    """Return ``{"format", "scale", "zero_point": 0, "axis"}`` of a DequantizeLinear of floats, for the file's metadata.

    "format" is ``"e4m3"`` or ``"e5m2"``, "scale" a number, or a list with one per channel. "axis" is that of the
    channels, None for one scale. `verify` computes codes from the file's values with them.

    Args:
        node: an ``onnx_ir.Node``.
    """
    scale, zero_point = (node.inputs[index].const_value for index in (1, 2))
    axis = node.attributes["axis"].as_int() if scale.numpy().ndim else None
    return {"format": _FORMATS[zero_point.dtype.name], "scale": scale.numpy().tolist(), "zero_point": 0, "axis": axis}


def float_codes(entry: dict[str, Any], values: Tensor) -> Tensor:
    """Return the codes of ``values`` that a float quantizer of a file made: n for the format's n-th positive number.

    They are whole numbers as float32, shaped as ``values``, negative for negative values. ``values`` are float32
    ``number · scale``; ``entry`` is the quantizer's description, from :func:`describe_floats`.
    """
    number = FLOAT_FORMATS[entry["format"]]
    return codes_of_floats(round_to_float_(values / _scale(entry, values.dim()), number), number).float()


def float_values(entry: dict[str, Any], codes: Tensor) -> Tensor:
    """Return the float32 values ``number · scale`` that codes stand for: the inverse of :func:`float_codes`.

    Args:
        entry: the quantizer's description, from :func:`describe_floats`.
        codes: whole numbers in any dtype, of the shape of the quantized tensor: n for the format's n-th positive
            number.
    """
    return floats_of_codes(codes, FLOAT_FORMATS[entry["format"]]) * _scale(entry, codes.dim())


def _scale(entry: dict[str, Any], dimensions: int) -> Tensor:
    return Granularity(entry["axis"]).align(torch.tensor(entry["scale"]), dimensions)
