"""From a trained model to one that runs elsewhere: conversion, files, ONNX, and the proof that the numbers agree.

Words of these files:

- A *converted* (or deployed) model is what :func:`convert` returns: layers with integer weights, fixed quantizers.
- *Codes* are a quantizer's integers. `verify` compares them as floats, minus the zero point.
- A *form* of a model is a copy that is rewritten so that torch's exporters trace it to the operators of one engine; to
  *rewrite* a module is to replace its ``forward`` in such a copy.
- An *island* is an operation whose float sums have no defined order (softmax, LayerNorm), so that codes behind it may
  differ by one.
- A *join* is an operation of two or more tensors, such as a sum; its class is ``Joint``. The *producer* of an operand
  is the module that quantizes it.
- Values *lie on a grid* if they are ``(code - zero_point) · scale``. An operator *moves values* if its results are
  elements of its input, such as a reshape.
- *Q/DQ* is a QuantizeLinear and a DequantizeLinear, ONNX's operators to codes and back.
- *Plain data* is dicts, lists, text and numbers, as JSON holds them. A *proto* is the content of an ONNX file, an
  ``onnx.ModelProto``.
"""

from tritonq.deploy.convert import convert
from tritonq.deploy.converted_file import load_converted, load_metadata, save_converted
from tritonq.deploy.encodings import export_encodings
from tritonq.deploy.fixed_point_modules import overflow_report
from tritonq.deploy.fixed_point_onnx import export_fixed_point_onnx
from tritonq.deploy.onnx_export import export_onnx
from tritonq.deploy.program import export_program
from tritonq.deploy.verify import LayerComparison, OutputComparison, VerificationReport, verify

__all__ = [
    "LayerComparison",
    "OutputComparison",
    "VerificationReport",
    "convert",
    "export_encodings",
    "export_fixed_point_onnx",
    "export_onnx",
    "export_program",
    "load_converted",
    "load_metadata",
    "overflow_report",
    "save_converted",
    "verify",
]
