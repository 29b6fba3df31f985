"""Whole models in eval mode: float, quantization-aware, and converted."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tritonq.perf.case import Case, Implementation, Inputs, Step, Tolerance
from tritonq.perf.cases.compiled_code import compiled_rows
from tritonq.perf.cases.vision_models import quantizable, torchvision_model
from tritonq.perf.placement import memory_format, placed

_CLASSES = 10
# Batches in training mode: enough for the statistics of batches that are all alike.
_STEPS = 2

_CLOSE_TO_FLOAT = Tolerance(
    "the reference is the float model, and 8-bit noise moves the logits of a network with random weights, in "
    "torch.ao's MobileNetV2 by 0.7; a result of chance is at distance 1.4",
    distance=0.9,
)


@dataclass(frozen=True)
class Setting:
    """A model, and the batch that it classifies."""

    model: str
    batch: int
    size: int
    channels_last: bool = False
    quick: bool = False

    @property
    def name(self) -> str:
        """The name of the case, such as ``evaluate/resnet18/8x3x128x128/float32``."""
        parts = ["evaluate", self.model, f"{self.batch}x3x{self.size}x{self.size}", "float32"]
        return "/".join(parts + (["channels_last"] if self.channels_last else []))

    def make_inputs(self, generator: torch.Generator, device: torch.device) -> Inputs:
        """Return ``images`` (batch, 3, size, size), normal."""
        images = torch.randn(self.batch, 3, self.size, self.size, generator=generator, device=device)
        return {"images": images.contiguous(memory_format=memory_format(self.channels_last))}

    def float_model(self, images: Tensor) -> nn.Module:
        """Return the float model: fixed random weights, BatchNorm statistics of ``images``."""
        return self._seen(self._placed(_normalised(torchvision_model(self.model, num_classes=_CLASSES))), images)

    def qat_model(self, images: Tensor) -> nn.Module:
        """Return the float model prepared with the default preset, its ranges observed on ``images``."""
        import tritonq

        model = self._placed(_normalised(torchvision_model(self.model, num_classes=_CLASSES)))
        return self._seen(tritonq.prepare_qat(model, example_inputs=(images[:2],)), images)

    def converted_model(self, images: Tensor) -> nn.Module:
        """Return the prepared model, converted."""
        import tritonq

        return tritonq.convert(self.qat_model(images))

    def torch_ao_model(self, images: Tensor) -> nn.Module:
        """Return torch.ao's converted model, in the form that torch.ao needs, for its x86 engine."""
        from torch.ao.quantization import convert, get_default_qat_qconfig, prepare_qat

        model: Any = _normalised(quantizable(self.model, num_classes=_CLASSES))
        model.load_state_dict(torchvision_model(self.model, num_classes=_CLASSES).state_dict())
        model.train().fuse_model(is_qat=True)
        model.qconfig = get_default_qat_qconfig("x86")
        converted: nn.Module = convert(self._seen(prepare_qat(self._placed(model)), images))
        return converted

    def case(self) -> Case:
        """Return the case. Arithmetic limits it as much as memory does."""
        return Case(
            name=self.name,
            family="evaluate",
            make_inputs=self.make_inputs,
            reference=lambda inputs: _step(self.float_model, inputs)(inputs),
            implementations=_implementations(self),
            baseline="float",
            bytes_moved=0,
            operations=0,
            tolerance=_CLOSE_TO_FLOAT,
            devices=("cpu",),
            quick=self.quick,
        )

    def _placed(self, model: nn.Module) -> nn.Module:
        return placed(model, channels_last=self.channels_last)

    def _seen(self, model: nn.Module, images: Tensor) -> nn.Module:
        """Run ``model`` in training on ``images`` so that it has statistics and ranges; return it in eval mode."""
        with torch.no_grad():
            for _ in range(_STEPS):
                model.train()(images)
        return model.eval()


def cases() -> Iterator[Case]:
    """Yield ResNet-18 and MobileNetV2, in both layouts."""
    for model in ("resnet18", "mobilenet_v2"):
        for channels_last in (False, True):
            yield Setting(model, 8, 128, channels_last).case()
    yield Setting("resnet18", 2, 64, quick=True).case()


def _implementations(setting: Setting) -> dict[str, Implementation]:
    def tritonq(make: Callable[[Tensor], nn.Module]) -> Implementation:
        return Implementation(partial(_step, make), distribution="tritonq", module="tritonq")

    models = {"tritonq, compiled": setting.converted_model, "tritonq, compiled, QAT in eval": setting.qat_model}
    return {
        "float": Implementation(partial(_step, setting.float_model)),
        "torch.ao": Implementation(
            partial(_step, setting.torch_ao_model),
            leaves_out="its codes differ from those of its model in eval mode; needs a model written for it",
        ),
        "tritonq": tritonq(setting.converted_model),
        "tritonq, QAT in eval": tritonq(setting.qat_model),
        **compiled_rows({name: partial(_step, make) for name, make in models.items()}),
    }


def _step(make: Callable[[Tensor], nn.Module], inputs: Inputs) -> Step:
    model = make(inputs["images"])

    def step(inputs: Inputs) -> tuple[Tensor, ...]:
        with torch.no_grad():
            return (model(inputs["images"]),)

    return step


def _normalised(model: nn.Module) -> nn.Module:
    """Set the momentum of BatchNorms so that running statistics are those of the last batch; return the model."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = 1.0
    return model
