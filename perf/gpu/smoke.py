"""Smoke test: every preset trains, and its eval mode and its converted model give the CPU's bits."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tritonq
from tritonq.perf.gpu.part import Visit
from tritonq.perf.placement import placed
from tritonq.qconfig import PRESETS, QConfig

_STEPS = 3
# Training sums in another order on a GPU, and rounding turns the difference into codes. One step changes the loss by
# more than this.
_LOSS_TOLERANCE = 0.01
# Where scales are given, not observed.
_GIVEN_SCALE = 0.02
_SECONDS_PER_PRESET = 6.0


class TinyNet(nn.Module):
    """A network with the parts of a ResNet.

    Conv-BN-ReLU, a depthwise convolution, a residual addition and a classifier.
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.conv2, self.norm2 = nn.Conv2d(16, 16, 3, padding=1, groups=16, bias=False), nn.BatchNorm2d(16)
        self.relu, self.classifier = nn.ReLU(), nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (batch, 10) of images (batch, 3, h, w)."""
        x = self.relu(self.norm1(self.conv1(x)))
        x = self.relu(x + self.norm2(self.conv2(x)))
        logits: Tensor = self.classifier(x.mean((2, 3)))
        return logits


def run(visit: Visit) -> None:
    """Note one finding per preset. TF32 is off: float convolutions then differ from the CPU's by their order only."""
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    presets = {**PRESETS, "fbgemm": tritonq.get_default_qat_qconfig("fbgemm")}
    for name, qconfig in presets.items():
        if visit.has_time_for(name, 0 if visit.small else _SECONDS_PER_PRESET):
            with visit.finding(name):
                check_preset(visit, name, qconfig)


def check_preset(visit: Visit, name: str, qconfig: QConfig) -> None:
    """Train three models of the preset in the same way, two on the device and one on the CPU; note the differences."""
    torch.manual_seed(0)
    net, x, y = TinyNet(), torch.randn(16, 3, 12, 12), torch.randint(10, (16,))
    here, cpu = visit.device, torch.device("cpu")

    def prepared(device: torch.device) -> nn.Module:
        placed_net = copy.deepcopy(net).to(device)
        model = tritonq.prepare_qat(placed_net, qconfig=qconfig, example_inputs=x[:2].to(device)).train()
        for module in model.modules():
            if isinstance(module, tritonq.PassiveObserver):
                module.set_qparams(torch.full((1,), _GIVEN_SCALE, device=device))
        return model

    models = {"first": prepared(here), "second": prepared(here), "cpu": prepared(cpu)}
    losses = {
        label: train(model, x.to(device), y.to(device), autocast=False)
        for (label, model), device in zip(models.items(), (here, here, cpu), strict=True)
    }
    last = placed(copy.deepcopy(models["first"]), channels_last=True)
    amp = train(last, x.to(here, memory_format=torch.channels_last), y.to(here), autocast=True)
    faults = [] if torch.tensor(amp).isfinite().all() else ["the loss under autocast is not finite"]
    if losses["first"] != losses["second"]:
        faults.append("the same input gave other losses")
    if not all(abs(a - b) <= _LOSS_TOLERANCE for a, b in zip(losses["first"], losses["cpu"], strict=True)):
        faults.append("the losses are not the CPU's")
    if name == "megengine_calibration":
        tritonq.calibrate(models["first"], [x.to(here)])
    faults += deployment_faults(models["first"], x)
    visit.note(name, "wrong" if faults else "ok", faults=faults, losses=losses["first"], cpu=losses["cpu"], amp=amp)


def deployment_faults(model: nn.Module, x: Tensor) -> list[str]:
    """Return how eval mode and the converted model on the device differ from eval mode on the CPU, one sentence each.

    They must agree bit for bit.
    """
    device = next(model.parameters()).device
    twin = copy.deepcopy(model).cpu().eval()
    with torch.no_grad():
        expected, found = twin(x), model.eval()(x.to(device)).cpu()
        converted = tritonq.convert(model)(x.to(device)).cpu()
    faults = []
    if not torch.equal(found, expected):
        faults.append(f"eval mode differs from the CPU's by up to {float((found - expected).abs().max()):.3g}")
    if not torch.equal(converted, found):
        faults.append(f"the converted model differs by up to {float((converted - found).abs().max()):.3g}")
    return faults


def train(model: nn.Module, x: Tensor, y: Tensor, *, autocast: bool) -> list[float]:
    """Train for a few steps of SGD; return the losses."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    losses = []
    for _ in range(_STEPS):
        optimizer.zero_grad()
        with torch.autocast(x.device.type, dtype=torch.bfloat16, enabled=autocast):
            loss = F.cross_entropy(model(x).float(), y)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses
