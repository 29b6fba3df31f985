"""Float and int8 ONNX files in ONNX Runtime, with the same session options.

``python -m tritonq.perf.deployed`` times all of them, and says which nodes take the time if a goal is not met.
"""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tritonq.perf.case import Case, Implementation, Inputs, Step, Tolerance
from tritonq.perf.cases.dense_nets import Detector, UNet
from tritonq.perf.cases.vision_models import torchvision_model

_CLASSES = 10
# How many times as fast as the float file the int8 file is to be.
GOALS = {"resnet18": 3.5, "mobilenet_v2": 2.5, "mobilenet_v3_small": 1.5, "unet": 2.0, "yolo": 2.0}
_SIZES = {"unet": 128, "yolo": 256}
_IMAGE_SIZE = 224
DENSE_NETS: dict[str, Callable[[], nn.Module]] = {"unet": UNet, "yolo": Detector}
_STEPS = 2

_CLOSE_TO_FLOAT = Tolerance(
    "the reference is the float model, and 8-bit noise moves the outputs of a network with random weights; a result of "
    "chance is at distance 1.4",
    distance=0.9,
)


@dataclass(frozen=True)
class Setting:
    """A model, and the number of threads that run it on one image."""

    model: str
    threads: int
    size: int = _IMAGE_SIZE
    quick: bool = False

    @property
    def name(self) -> str:
        """The name of the case, such as ``deployed/resnet18/1x3x224x224/1 thread``."""
        threads = "1 thread" if self.threads == 1 else f"{self.threads} threads"
        return f"deployed/{self.model}/1x3x{self.size}x{self.size}/{threads}"

    def make_inputs(self, generator: torch.Generator, device: torch.device) -> Inputs:
        """Return ``images`` (1, 3, size, size), normal."""
        return {"images": torch.randn(1, 3, self.size, self.size, generator=generator, device=device)}

    def float_model(self) -> nn.Module:
        """Return the float model: fixed random weights, BatchNorm statistics of fixed images."""
        return self._seen(self._made())

    def trained_model(self) -> nn.Module:
        """Return the float model prepared with preset ``onnxruntime``."""
        import tritonq

        qconfig = tritonq.get_qconfig("onnxruntime")
        return self._seen(tritonq.prepare_qat(self._made(), qconfig=qconfig, example_inputs=self._images(), warn=False))

    def write(self, folder: Path, int8: bool) -> Path:
        """Write the float or the int8 file; return its path."""
        import tritonq

        path, images = folder / ("int8.onnx" if int8 else "float.onnx"), self._images()[:1]
        if int8:
            tritonq.export_onnx(self.trained_model(), path, images, dynamic_batch=False)
        else:
            torch.onnx.export(self.float_model(), (images,), path, dynamo=True, opset_version=18, verbose=False)
        return path

    def open(self, path: Path, profile: Path | None = None) -> Any:
        """Open a session with this many threads; with a profile it writes one there at its end."""
        import onnxruntime

        from tritonq.deploy.onnx_session import open_session

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = self.threads, 1
        if profile is not None:
            options.enable_profiling, options.profile_file_prefix = True, str(profile)
        return open_session(str(path), options)

    def build(self, inputs: Inputs, int8: bool) -> Step:
        """Return a step that runs the float or the int8 file."""
        with tempfile.TemporaryDirectory() as folder:
            session = self.open(self.write(Path(folder), int8))
        source = session.get_inputs()[0].name

        def step(inputs: Inputs) -> tuple[torch.Tensor, ...]:
            return tuple(map(torch.from_numpy, session.run(None, {source: inputs["images"].numpy()})))

        return step

    def case(self) -> Case:
        """Return the case."""
        return Case(
            name=self.name,
            family="deployed",
            make_inputs=self.make_inputs,
            reference=self._reference,
            implementations={
                "float": Implementation(partial(self.build, int8=False), "onnxruntime", "onnxruntime"),
                "tritonq": Implementation(partial(self.build, int8=True), "onnxruntime", "onnxruntime"),
            },
            baseline="float",
            bytes_moved=0,
            operations=0,
            tolerance=_CLOSE_TO_FLOAT,
            devices=("cpu",),
            quick=self.quick,
        )

    def _reference(self, inputs: Inputs) -> tuple[torch.Tensor, ...]:
        with torch.no_grad():
            return (self.float_model()(inputs["images"]),)

    def _made(self) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            made = DENSE_NETS.get(self.model)
            return torchvision_model(self.model, num_classes=_CLASSES) if made is None else made()

    def _images(self) -> torch.Tensor:
        return torch.randn(4, 3, self.size, self.size, generator=torch.Generator().manual_seed(0))

    def _seen(self, model: nn.Module) -> nn.Module:
        """Run ``model`` in training so that it has statistics and ranges; return it in eval mode."""
        with torch.no_grad():
            for _ in range(_STEPS):
                model.train()(self._images())
        return model.eval()


def settings() -> Iterator[Setting]:
    """Yield each model with one thread and with two."""
    for model in GOALS:
        for threads in (1, 2):
            yield Setting(model, threads, _SIZES.get(model, _IMAGE_SIZE))


def cases() -> Iterator[Case]:
    """Yield all settings, and a small one."""
    if importlib.util.find_spec("onnxruntime") is None:
        return
    yield from (setting.case() for setting in settings())
    yield Setting("resnet18", 1, 64, quick=True).case()
