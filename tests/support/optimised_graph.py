"""The graph that ONNX Runtime makes of a file, before it runs it."""

from collections import Counter
from pathlib import Path

import pytest


def optimised_graph(path):
    """Write the graph beside the file, and return it."""
    onnx, onnxruntime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    target = Path(path).with_suffix(".optimised.onnx")
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath, options.log_severity_level = str(target), 4
    onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return onnx.load(target).graph


def optimised_kinds(path):
    """Return how often each operator occurs in it."""
    return Counter(node.op_type for node in optimised_graph(path).node)
