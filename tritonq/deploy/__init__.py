"""From a trained model to one that runs elsewhere: conversion, files, ONNX, and the proof that the numbers agree."""

from tritonq.deploy.checkpoint import load_converted, save_converted
from tritonq.deploy.convert import convert
from tritonq.deploy.onnx_export import export_onnx
from tritonq.deploy.verify import LayerComparison, OutputComparison, VerificationReport, verify

__all__ = [
    "LayerComparison",
    "OutputComparison",
    "VerificationReport",
    "convert",
    "export_onnx",
    "load_converted",
    "save_converted",
    "verify",
]
