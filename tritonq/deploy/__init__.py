"""From a trained model to one that runs elsewhere: conversion, files, ONNX, and the proof that the numbers agree."""

from tritonq.deploy.checkpoint import load_converted, load_metadata, save_converted
from tritonq.deploy.convert import convert
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
