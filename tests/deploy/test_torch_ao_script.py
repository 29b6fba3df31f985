"""A script in the form of torch.ao's eager-mode QAT tutorial runs with its imports changed, and with nothing else."""

from __future__ import annotations

import warnings

import pytest
import torch

# Inverted residuals with stubs, a fusion list per block, observers and statistics frozen on the way, conversion.
SCRIPT = """
import torch
from torch import nn
from torch.ao.nn.intrinsic.qat import freeze_bn_stats
from torch.ao.nn.quantized import FloatFunctional
from torch.ao.quantization import (
    DeQuantStub,
    QuantStub,
    convert,
    disable_observer,
    fuse_modules_qat,
    get_default_qat_qconfig,
    prepare_qat,
)


class ConvBNReLU(nn.Sequential):
    def __init__(self, in_planes, out_planes, kernel_size=3, stride=1, groups=1):
        super().__init__(
            nn.Conv2d(in_planes, out_planes, kernel_size, stride, kernel_size // 2, groups=groups, bias=False),
            nn.BatchNorm2d(out_planes, momentum=0.1),
            nn.ReLU(inplace=False),
        )


class InvertedResidual(nn.Module):
    def __init__(self, planes, expand):
        super().__init__()
        hidden = planes * expand
        self.conv = nn.Sequential(
            ConvBNReLU(planes, hidden, kernel_size=1),
            ConvBNReLU(hidden, hidden, groups=hidden),
            nn.Conv2d(hidden, planes, 1, bias=False),
            nn.BatchNorm2d(planes, momentum=0.1),
        )
        self.skip_add = FloatFunctional()

    def forward(self, x):
        return self.skip_add.add(x, self.conv(x))


class MobileNetV2(nn.Module):
    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(ConvBNReLU(3, 8, stride=2), InvertedResidual(8, 2), InvertedResidual(8, 2))
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(8, 4))
        self.quant = QuantStub()
        self.dequant = DeQuantStub()

    def forward(self, x):
        x = self.features(self.quant(x))
        return self.dequant(self.classifier(x.mean([2, 3])))

    def fuse_model(self):
        for m in self.modules():
            if type(m) is ConvBNReLU:
                fuse_modules_qat(m, ["0", "1", "2"], inplace=True)
            if type(m) is InvertedResidual:
                fuse_modules_qat(m.conv, ["2", "3"], inplace=True)


torch.manual_seed(0)
qat_model = MobileNetV2().train()
qat_model.fuse_model()
qat_model.qconfig = get_default_qat_qconfig("x86")
prepare_qat(qat_model, inplace=True)

optimizer = torch.optim.SGD(qat_model.parameters(), lr=0.05)
images, target = torch.randn(16, 3, 16, 16), torch.arange(16) % 4
losses = []
for nepoch in range(6):
    loss = nn.functional.cross_entropy(qat_model(images), target)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
    if nepoch > 3:
        qat_model.apply(disable_observer)
    if nepoch > 2:
        qat_model.apply(freeze_bn_stats)
quantized_model = convert(qat_model.eval(), inplace=False)
quantized_model.eval()
outputs = quantized_model(images)
"""
CHANGES = {
    "from torch.ao.nn.intrinsic.qat import": "from tritonq import",
    "from torch.ao.nn.quantized import": "from tritonq.nn import",
    "from torch.ao.quantization import": "from tritonq import",
}


def run(script: str) -> dict:
    found: dict = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exec(compile(script, "script", "exec"), found)
    return found


def test_the_script_runs_with_its_imports_changed():
    theirs, ours = SCRIPT, SCRIPT
    for line, changed in CHANGES.items():
        assert line in ours
        ours = ours.replace(line, changed)
    assert ours.split("class ConvBNReLU")[1] == theirs.split("class ConvBNReLU")[1]
    assert "torch.ao" not in ours
    old, new = run(theirs), run(ours)
    # The first step is the same but for codes that fall beside each other; later ones drift apart.
    assert new["losses"][0] == pytest.approx(old["losses"][0], rel=0.01)
    assert new["losses"] == pytest.approx(old["losses"], rel=0.1)
    assert new["losses"][-1] < new["losses"][0]
    one, other = (found["outputs"].flatten() for found in (new, old))
    assert float(torch.corrcoef(torch.stack((one, other)))[0, 1]) > 0.9
