"""A trained tritonq model as a file: its answers in ONNX Runtime, and its size."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

import tritonq
from tritonq.deploy.onnx_session import open_session
from tritonq.perf.accuracy.training import outputs_of


@dataclass(frozen=True)
class Deployed:
    """The outputs of a deployed model for some images, and the sizes of its files.

    Attributes:
        outputs: of the ONNX file in ONNX Runtime, or of the converted model if onnx is not installed.
        engine: ``"onnxruntime"`` and its version, or ``"tritonq"``.
        onnx_bytes: size of the file; None without one.
        file_bytes: size of what :func:`tritonq.save_converted` writes.
        most_values: the largest number of values in an output channel of each layer's weight, by name.
    """

    outputs: Tensor
    engine: str
    onnx_bytes: int | None
    file_bytes: int
    most_values: dict[str, int]


def deploy(model: nn.Module, images: Tensor) -> Deployed:
    """Convert, save and export a trained model, and run it on ``images``."""
    converted = tritonq.convert(model.eval())
    values = _most_values(converted)
    with tempfile.TemporaryDirectory() as folder:
        saved = Path(folder) / "model.pt"
        tritonq.save_converted(converted, saved)
        try:
            import onnxruntime
        except ModuleNotFoundError:
            return Deployed(outputs_of(converted, images), "tritonq", None, saved.stat().st_size, values)
        path = Path(folder) / "model.onnx"
        tritonq.export_onnx(converted, path, images[:2])
        session = open_session(path)
        outputs = outputs_of(_runner(session), images)
        engine = f"onnxruntime {onnxruntime.__version__}"
        return Deployed(outputs, engine, path.stat().st_size, saved.stat().st_size, values)


def _runner(session: Any) -> Callable[[Tensor], Tensor]:
    name = session.get_inputs()[0].name

    def run(images: Tensor) -> Tensor:
        return torch.from_numpy(cast(Any, session.run(None, {name: images.numpy()})[0]))

    return run


def _most_values(converted: nn.Module) -> dict[str, int]:
    return {
        name.removesuffix(".weight"): max(len(row.unique()) for row in codes.flatten(1))
        for name, codes in converted.state_dict().items()
        if name.endswith("weight") and codes.dtype == torch.int8
    }
