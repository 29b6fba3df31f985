"""Train, evaluate, capture and convert a small model of every preset on the device, beside the same on the CPU.

Prints a JSON object for each preset. ``run.py`` starts this process, since the device's libraries must be preloaded.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import cast

import torch
from device import CudaOnCpu
from emulated_cuda import cuda_without_gpu
from torch import Tensor, nn

import tritonq
from tritonq.qconfig import PRESETS, TORCH_BACKENDS, get_default_qat_qconfig

# Where scales are given, not observed.
_GIVEN_SCALE = 0.05


class Net(nn.Module):
    """Conv-BN-ReLU, a residual addition, a function of one tensor, a mean and a linear layer."""

    def __init__(self, width: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Sequential(nn.Conv2d(3, width, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        self.second = nn.Sequential(nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width))
        self.activation, self.head = nn.SiLU(), nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        """Return the scores of images."""
        x = self.first(x)
        x = torch.relu(self.second(x) + x)
        return cast(Tensor, self.head(self.activation(x).mean((2, 3))))


class PlainNet(Net):
    """A network of what the fixed-point scheme can quantize."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the scores of images."""
        return cast(Tensor, self.head(torch.relu(self.second(self.first(x))).mean((2, 3))))


def compare(name: str, device: CudaOnCpu) -> dict[str, str]:
    """Train and deploy one preset on the device and on the CPU; return the differences, as a row of the table."""
    torch.manual_seed(0)
    x = torch.randn(4, 3, 6, 6)
    if name in TORCH_BACKENDS:
        mapping = tritonq.QConfigMapping().set_global(get_default_qat_qconfig(name))
    else:
        mapping = tritonq.get_qconfig_mapping(name)
    group = re.search(r"_g(\d+)$", name)
    net = (PlainNet if name == "f8net" else Net)(int(group[1]) if group else 32)
    host = tritonq.prepare_qat(net, qconfig=mapping, example_inputs=x, warn=False).train()
    on_device = tritonq.prepare_qat(net, qconfig=mapping, example_inputs=x, warn=False).cuda().train()
    for module in (*host.modules(), *on_device.modules()):
        if isinstance(module, tritonq.PassiveObserver):
            module.set_qparams(torch.full_like(module.scale, _GIVEN_SCALE))
    y = x.cuda()
    outputs = []
    for _ in range(2):
        device.waits.clear()
        outputs = [model(images) for model, images in ((host, x), (on_device, y))]
        for output in outputs:
            output.square().mean().backward()
    waits = in_words(device)
    row = {"preset": name, "largest difference of outputs": f"{difference(*outputs):.1e}"}
    row["waits in a training step"] = waits
    if name == "megengine_calibration":
        # Its steps round nothing: they count, until a calibration ends with rounding.
        tritonq.calibrate(host, [x])
    on_device.load_state_dict(host.state_dict())
    host.eval(), on_device.eval()
    with torch.no_grad():
        on_device(y)
        device.waits.clear()
        results = [host(x), on_device(y)]
    row["eval"] = "equal" if torch.equal(results[0], results[1].cpu()) else f"{difference(*results):.1e}"
    device.waits.clear()
    with torch.no_grad():
        on_device(y)
    row["waits in eval"] = in_words(device)
    row["converted"] = tried(lambda: converted(on_device, y, results[0]))
    row["captured"] = tried(lambda: captured(on_device.train(), y))
    return row


def difference(a: Tensor, b: Tensor) -> float:
    """Return the largest absolute difference."""
    return float((a.detach() - b.detach().cpu()).abs().max())


def in_words(device: CudaOnCpu) -> str:
    """Return which operators waited for the device, and how often."""
    return ", ".join(f"{count} {name}" for name, count in device.waits.items()) or "none"


def converted(model: nn.Module, x: Tensor, expected: Tensor) -> str:
    """Convert the model; return in words how it differs from ``expected``, eval mode's result on the CPU."""
    found = tritonq.convert(model)(x).cpu()
    return "equal" if torch.equal(found, expected) else f"{float((found - expected).abs().max()):.1e}"


def captured(model: nn.Module, x: Tensor) -> str:
    """Capture a training step in a CUDA graph, and return "yes"; an error says why that is not possible."""
    tritonq.graphed(model, x)
    return "yes"


def tried(action: Callable[[], str]) -> str:
    """Return what ``action`` returns, or the first line of the error that it raises."""
    try:
        return action()
    except (ValueError, RuntimeError) as error:
        return str(error).splitlines()[0].replace("|", "/")


def main() -> None:
    """Print a line for each preset."""
    device = CudaOnCpu()
    for name in (*PRESETS, *TORCH_BACKENDS):
        # The emulator knows the matrix products of sm_80, which codes take in eval mode, not those of sm_90. What is
        # compiled for sm_90 runs in the operators' tests.
        with cuda_without_gpu(80, device):
            print(json.dumps(compare(name, device)), flush=True)


if __name__ == "__main__":
    main()
