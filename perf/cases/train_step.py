"""Whole training steps (forward, loss, backward, SGD): their time, and the memory that they keep for the backward."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tritonq.compiled.build import obstacle
from tritonq.perf.case import Case, Implementation, Inputs, Step, Tolerance
from tritonq.perf.cases.train_step_peers import ACCELERATED_PEERS, PEERS, Peer, accelerate, peer_model
from tritonq.perf.cases.vision_models import quantizable, torchvision_model
from tritonq.perf.memory import peak_bytes, saved_bytes
from tritonq.perf.placement import memory_format, placed

_CLASSES = 10

# Any network that trains at all; the rate is small, so that hundreds of timed steps on noise stay finite.
_LEARNING_RATE = 1e-3

_CLOSE_TO_FLOAT = Tolerance(
    "the reference is the float model: 8-bit noise moves logits, the classifier's gradient and the norm of the first "
    "layer's gradient, in MobileNetV2 by half; a missing gradient is at distance 1, one of the wrong sign at 2",
    distance=0.7,
)


@dataclass(frozen=True)
class Setting:
    """A model, the batches it trains on, and how.

    Attributes:
        autocast: dtype of torch.autocast, or None for float32.
    """

    model: str
    batch: int
    size: int
    channels_last: bool = False
    autocast: torch.dtype | None = None
    devices: tuple[str, ...] = ("cpu", "cuda")
    quick: bool = False

    @property
    def name(self) -> str:
        """The name of the case, such as ``train_step/resnet18/16x3x96x96/float32``."""
        dtype = "float32" if self.autocast is None else f"amp-{str(self.autocast).removeprefix('torch.')}"
        parts = ["train_step", self.model, f"{self.batch}x3x{self.size}x{self.size}", dtype]
        return "/".join(parts + (["channels_last"] if self.channels_last else []))

    def make_inputs(self, generator: torch.Generator, device: torch.device) -> Inputs:
        """Return ``images`` (batch, 3, size, size) normal, ``labels`` (batch,)."""
        images = torch.randn(self.batch, 3, self.size, self.size, generator=generator, device=device)
        labels = torch.randint(_CLASSES, (self.batch,), generator=generator, device=device)
        return {"images": images.contiguous(memory_format=memory_format(self.channels_last)), "labels": labels}

    def float_model(self, device: torch.device) -> nn.Module:
        """Return the float model with fixed random weights."""
        return self._placed(torchvision_model(self.model, num_classes=_CLASSES), device)

    def torch_ao_model(self, device: torch.device, version: int) -> nn.Module:
        """Return torchvision's form for torch.ao, with stubs and functional additions, fused and prepared."""
        from torch.ao.quantization import get_default_qat_qconfig, prepare_qat

        model: Any = quantizable(self.model, num_classes=_CLASSES)
        model.load_state_dict(torchvision_model(self.model, num_classes=_CLASSES).state_dict())
        model.train().fuse_model(is_qat=True)
        model.qconfig = get_default_qat_qconfig("fbgemm", version=version)
        return self._placed(prepare_qat(model), device)

    def tritonq_model(self, device: torch.device) -> nn.Module:
        """Return the float model, prepared by its example input alone, with the default preset."""
        import tritonq

        example = self.make_inputs(torch.Generator(device).manual_seed(0), device)["images"]
        # The preset that all measurements of steps were made with.
        qconfig = tritonq.get_qconfig("tensorrt")
        return tritonq.prepare_qat(self.float_model(device), qconfig=qconfig, example_inputs=(example[:2],))

    def together_model(self, device: torch.device) -> nn.Module:
        """Return the prepared model, with all weights quantized in one launch."""
        import tritonq

        model = self.tritonq_model(device)
        tritonq.quantize_weights_together(model)
        return model

    def peer_model(self, peer: Peer, device: torch.device) -> nn.Module:
        """Return the float model as another library trains it; images of the first seed serve as its example."""
        images = self.make_inputs(torch.Generator(device).manual_seed(0), device)["images"]
        with torch.autocast(device.type, dtype=self.autocast, enabled=self.autocast is not None):
            return peer_model(peer, self.float_model(device), images)

    def case(self) -> Case:
        """Return the case. No least traffic is given, since convolutions bound a step; memory is counted instead."""
        return Case(
            name=self.name,
            family="train_step",
            make_inputs=self.make_inputs,
            reference=partial(_reference, self),
            implementations=_implementations(self),
            baseline="float",
            bytes_moved=0,
            operations=0,
            tolerance=_CLOSE_TO_FLOAT,
            devices=self.devices,
            quick=self.quick,
            memory=_memory,
        )

    def _placed(self, model: nn.Module, device: torch.device) -> nn.Module:
        return placed(model, device, channels_last=self.channels_last).train()


@dataclass
class TrainStep:
    """A function that takes one SGD step per call.

    It returns logits, the classifier's gradient, and the norm of the first layer's gradient.
    """

    model: nn.Module
    autocast: torch.dtype | None
    forward: Callable[[Tensor], Tensor] = field(init=False)

    def __post_init__(self) -> None:
        self.forward = self.model
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=_LEARNING_RATE, momentum=0.9)
        self.first = next(weight for weight in self.model.parameters() if weight.dim() == 4)
        # Quantizers may have parameters of two dimensions too, one value per row.
        self.last = [weight for weight in self.model.parameters() if weight.dim() == 2 and weight.shape[1] > 1][-1]

    def __call__(self, inputs: Inputs) -> tuple[Tensor, ...]:
        images, labels = inputs["images"], inputs["labels"]
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(images.device.type, dtype=self.autocast, enabled=self.autocast is not None):
            logits = self.forward(images)
            loss = F.cross_entropy(logits.float(), labels)
        loss.backward()
        self.optimizer.step()
        return logits.detach().float(), cast(Tensor, self.last.grad), cast(Tensor, self.first.grad).norm()


class StepInTorch(TrainStep):
    """A step under `use_in_torch`; half a millisecond of it is spent on entering and leaving that."""

    def __call__(self, inputs: Inputs) -> tuple[Tensor, ...]:
        import tritonq

        with tritonq.use_in_torch():
            return super().__call__(inputs)


class CompiledStep(TrainStep):
    """A step with operators that are compiled for this CPU."""

    def __call__(self, inputs: Inputs) -> tuple[Tensor, ...]:
        import tritonq

        with tritonq.use_backend("compiled"):
            return super().__call__(inputs)


class GraphedStep:
    """A training step captured in a CUDA graph once and replayed."""

    def __init__(self, step: TrainStep, inputs: Inputs) -> None:
        self.step = step
        self.inputs = {name: tensor.clone() for name, tensor in inputs.items()}
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        self.graph = torch.cuda.CUDAGraph()
        # Capture needs gradients and optimizer state to exist, on a stream other than the default one. The first steps
        # are undone below, so that the check sees the step that the others take.
        start = {name: value.clone() for name, value in step.model.state_dict().items()}
        with torch.cuda.stream(aside):
            for _ in range(3):
                step(self.inputs)
        torch.cuda.current_stream().wait_stream(aside)
        with torch.cuda.graph(self.graph):
            self.outputs = step(self.inputs)
        step.model.load_state_dict(start)
        for state in step.optimizer.state.values():
            state["momentum_buffer"].zero_()

    def __call__(self, inputs: Inputs) -> tuple[Tensor, ...]:
        for name, tensor in inputs.items():
            self.inputs[name].copy_(tensor)
        self.graph.replay()
        return self.outputs


def cases() -> Iterator[Case]:
    """Yield ResNet-18, MobileNetV2 and ResNet-50; small batches; both layouts."""
    cuda = ("cuda",)
    yield Setting("resnet18", 16, 96, quick=True).case()
    yield Setting("resnet18", 16, 96, channels_last=True).case()
    yield Setting("resnet18", 2, 96).case()
    yield Setting("mobilenet_v2", 16, 96).case()
    yield Setting("mobilenet_v2", 16, 96, channels_last=True).case()
    yield Setting("resnet50", 4, 96, devices=("cpu",)).case()
    for channels_last in (False, True):
        yield Setting("resnet18", 256, 224, channels_last, torch.bfloat16, cuda).case()
        yield Setting("mobilenet_v2", 256, 224, channels_last, torch.bfloat16, cuda).case()
        yield Setting("resnet50", 128, 224, channels_last, torch.bfloat16, cuda).case()
    yield Setting("resnet50", 128, 224, devices=cuda).case()
    yield Setting("resnet50", 2, 224, True, torch.bfloat16, cuda).case()


def _implementations(setting: Setting) -> dict[str, Implementation]:
    def torch_ao(version: int) -> Callable[[torch.device], nn.Module]:
        return lambda device: setting.torch_ao_model(device, version)

    def accelerated(make: Callable[[torch.device], nn.Module]) -> Implementation:
        return tritonq(lambda inputs: _eager(setting, lambda device: accelerate(make(device)), inputs), quick=False)

    def tritonq(build: Callable[[Inputs], Step], **fields: Any) -> Implementation:
        return Implementation(build, distribution="tritonq", module="tritonq", **fields)

    def graphed(inputs: Inputs) -> Step:
        return GraphedStep(_eager(setting, setting.tritonq_model, inputs), inputs)

    def peer(library: Peer) -> Implementation:
        return Implementation(
            partial(_eager, setting, partial(setting.peer_model, library)),
            distribution=library.distribution,
            module=library.module,
            devices=library.devices,
            quick=False,
            leaves_out=library.leaves_out,
        )

    compiled = tritonq(partial(_compiled_step, setting), quick=False, devices=("cpu",))
    return {
        "float": Implementation(partial(_eager, setting, setting.float_model)),
        "torch.ao v0": Implementation(partial(_eager, setting, torch_ao(0))),
        "torch.ao v1": Implementation(partial(_eager, setting, torch_ao(1))),
        "torch.ao v0, use_in_torch": tritonq(partial(_in_torch, setting, torch_ao(0)), quick=False),
        "torch.ao v1, use_in_torch": tritonq(partial(_in_torch, setting, torch_ao(1)), quick=False),
        "torch.ao v0, accelerated": accelerated(torch_ao(0)),
        "torch.ao v1, accelerated": accelerated(torch_ao(1)),
        "tritonq": tritonq(partial(_eager, setting, setting.tritonq_model)),
        **({"tritonq, compiled": compiled} if obstacle() is None else {}),
        **{name: peer(library) for name, library in (PEERS | ACCELERATED_PEERS).items()},
        "torch.compile(float)": Implementation(partial(_compiled, setting, setting.float_model), quick=False),
        "torch.compile(torch.ao v0)": Implementation(partial(_compiled, setting, torch_ao(0)), quick=False),
        "torch.compile(torch.ao v1)": Implementation(partial(_compiled, setting, torch_ao(1)), quick=False),
        "torch.compile(tritonq)": tritonq(partial(_compiled, setting, setting.tritonq_model), quick=False),
        "tritonq, weights together": tritonq(partial(_eager, setting, setting.together_model), devices=("cuda",)),
        "tritonq, CUDA graph": tritonq(graphed, devices=("cuda",)),
    }


def _eager(setting: Setting, make: Callable[[torch.device], nn.Module], inputs: Inputs) -> TrainStep:
    return TrainStep(make(inputs["images"].device), setting.autocast)


def _in_torch(setting: Setting, make: Callable[[torch.device], nn.Module], inputs: Inputs) -> TrainStep:
    return StepInTorch(make(inputs["images"].device), setting.autocast)


def _compiled_step(setting: Setting, inputs: Inputs) -> CompiledStep:
    return CompiledStep(setting.tritonq_model(inputs["images"].device), setting.autocast)


def _compiled(setting: Setting, make: Callable[[torch.device], nn.Module], inputs: Inputs) -> TrainStep:
    step = _eager(setting, make, inputs)
    step.forward = torch.compile(step.model, dynamic=False)
    return step


def _reference(setting: Setting, inputs: Inputs) -> tuple[Tensor, ...]:
    return _eager(setting, setting.float_model, inputs)(inputs)


def _memory(step: Step, inputs: Inputs) -> int:
    """Return the bytes that one step keeps or allocates.

    On CUDA these are the most that it allocates beyond those at its start, on a CPU those that autograd keeps.
    """
    device = inputs["images"].device
    if device.type == "cuda":
        return peak_bytes(step, inputs, device)
    model = cast(TrainStep, step).model
    return saved_bytes(step, inputs, [*model.parameters(), *model.buffers()])
