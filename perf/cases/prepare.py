"""Preparing a model, timed in units of one float training forward on the same images."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tritonq.perf.case import Case, Implementation, Inputs, Step, Tolerance
from tritonq.perf.cases.vision_models import torchvision_model
from tritonq.perf.memory import peak_cpu_bytes

_EXACT = Tolerance("both leave the parameters as they are, and results are their norms, sorted")


@dataclass(frozen=True)
class Setting:
    """A model, and the images on which it is recorded."""

    model: str
    batch: int = 2
    size: int = 224
    quick: bool = False

    def make_inputs(self, generator: torch.Generator, device: torch.device) -> Inputs:
        """Return ``images`` (batch, 3, size, size), normal."""
        return {"images": torch.randn(self.batch, 3, self.size, self.size, generator=generator, device=device)}

    def float_model(self) -> nn.Module:
        """Return the float model in training mode."""
        return torchvision_model(self.model, num_classes=10).train()

    def forward(self, inputs: Inputs) -> Step:
        """Return a step that runs the float model on the images."""
        model = self.float_model().to(inputs["images"].device)

        def step(inputs: Inputs) -> tuple[Tensor, ...]:
            model(inputs["images"])
            return (_norms(model),)

        return step

    def prepare(self, inputs: Inputs) -> Step:
        """Return a step that prepares a copy of the float model."""
        import tritonq

        model = self.float_model().to(inputs["images"].device)

        def step(inputs: Inputs) -> tuple[Tensor, ...]:
            return (_norms(tritonq.prepare_qat(model, example_inputs=(inputs["images"],), warn=False)),)

        return step

    def case(self) -> Case:
        """Return the case; its memory is the most that is allocated at a time."""
        return Case(
            name=f"prepare/{self.model}/{self.batch}x3x{self.size}x{self.size}/float32",
            family="prepare",
            make_inputs=self.make_inputs,
            reference=lambda inputs: (_norms(self.float_model()),),
            implementations={
                "float training forward": Implementation(self.forward),
                "tritonq": Implementation(self.prepare, distribution="tritonq", module="tritonq"),
            },
            baseline="float training forward",
            bytes_moved=0,
            operations=0,
            tolerance=_EXACT,
            devices=("cpu",),
            quick=self.quick,
            memory=peak_cpu_bytes,
        )


def cases() -> Iterator[Case]:
    """Yield a model of few large layers and one of many small ones."""
    for model in ("resnet18", "mobilenet_v2"):
        yield Setting(model).case()
    yield Setting("resnet18", size=64, quick=True).case()


def _norms(model: nn.Module) -> Tensor:
    """Return the norms of all parameters, the smallest first: equal for a model and its prepared form."""
    with torch.no_grad():
        norms = [parameter.norm() for key, parameter in model.named_parameters() if "fake_quant" not in key]
        return torch.stack(norms).sort().values
