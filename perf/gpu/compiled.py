"""``torch.compile`` of a training step, and evaluation of float, QAT and converted models."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

import tritonq
from tritonq.perf.cases.vision_models import torchvision_model
from tritonq.perf.gpu.part import Visit
from tritonq.perf.gpu.smoke import TinyNet, train
from tritonq.perf.measure import step_times
from tritonq.perf.placement import placed

# A compiler may add up in another order, which rounding turns into whole codes in a few places.
_CLOSE = 0.05
_EVAL_CALLS = 5


def compile_step(visit: Visit) -> None:
    """Compile a training step of a prepared model as one graph; note whether it agrees with the plain step."""
    for training in (True, False):
        name = "training step" if training else "eval"
        with visit.finding(name):
            model, x, y = _prepared(visit)
            train(model, x, y, autocast=False)
            model.train(training)
            twin = copy.deepcopy(model)
            expected = twin(x)
            found = torch.compile(model, fullgraph=True, dynamic=False, backend=_backend(visit))(x)
            if training:
                found.square().mean().backward()
            distance = float((found - expected).detach().norm() / expected.detach().norm())
            # Compiled eval must give the same codes.
            is_right = distance <= _CLOSE if training else torch.equal(found, expected)
            visit.note(name, "ok" if is_right else "wrong", relative_distance=distance)


def evaluate(visit: Visit) -> None:
    """Note the time of a batch in eval mode of the float, the prepared and the converted model."""
    batch, size, name = (2, 32, "resnet18") if visit.small else (64, 224, "resnet50")
    x = torch.randn(batch, 3, size, size, device=visit.device).contiguous(memory_format=torch.channels_last)
    model = placed(torchvision_model(name, 10), visit.device, channels_last=True)
    qat = tritonq.prepare_qat(copy.deepcopy(model), example_inputs=x[:2]).train()
    qat(x)
    qat.eval()
    outputs = {}
    for label, make in (("float", model.eval), ("QAT", lambda: qat), ("converted", lambda: tritonq.convert(qat))):
        with visit.finding(label), torch.no_grad():
            network = make()

            def step(_: dict[str, Tensor], network: nn.Module = network) -> tuple[Tensor, ...]:
                return (network(x),)

            outputs[label] = step({})[0]
            finished, launched = step_times(step, {}, visit.device, 1 if visit.small else _EVAL_CALLS)
            is_right = label != "converted" or torch.equal(outputs["converted"], outputs["QAT"])
            visit.note(
                label,
                "ok" if is_right else "wrong: other bits than the QAT model's",
                batch=batch,
                ms=finished.median * 1e3,
                launched_after_ms=launched.median * 1e3,
            )


def _prepared(visit: Visit) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    torch.compiler.reset()
    batch, size = (4, 12) if visit.small else (16, 96)
    net = TinyNet() if visit.small else torchvision_model("resnet18", 10)
    x = torch.randn(batch, 3, size, size, device=visit.device)
    y = torch.randint(10, (batch,), device=visit.device)
    return tritonq.prepare_qat(net.to(visit.device), example_inputs=x[:2]).train(), x, y


def _backend(visit: Visit) -> str:
    """Return the backend of ``torch.compile``; for a small trial one that needs no C++ compiler, which is slow."""
    return "aot_eager" if visit.small else "inductor"
