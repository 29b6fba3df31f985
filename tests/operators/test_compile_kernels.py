"""``torch.compile`` of training steps where kernels run."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import tritonq
from tolerances import LONG_SUMS, SUMS, assert_close

pytest.importorskip("triton")

# One for each kind of quantizer: ranges per channel and per tensor, learned thresholds, fixed point.
_PRESETS = ("tensorrt", "megengine_ema", "megengine_tqt", "f8net")


def step(model: nn.Module, called: nn.Module, x: Tensor) -> Tensor:
    model.zero_grad()
    y = called(x)
    y.square().sum().backward()
    return y.detach()


@pytest.mark.interpreter
@pytest.mark.parametrize("preset", _PRESETS)
def test_a_compiled_step_equals_the_eager_one(preset: str) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4)),
    )
    x = torch.randn(2, 3, 4, 4)
    qat = tritonq.prepare_qat(model, qconfig=tritonq.get_qconfig(preset), example_inputs=x).train()
    step(qat, qat, x)
    eager = copy.deepcopy(qat)
    compiled = torch.compile(qat, backend="aot_eager", fullgraph=True)
    assert_close(step(qat, compiled, x), step(eager, eager, x), SUMS)
    others = eager.state_dict()
    for name, value in qat.state_dict().items():
        assert_close(value, others[name], LONG_SUMS, size=0.01, msg=f"{name} differs")
    for parameter, other in zip(qat.parameters(), eager.parameters(), strict=True):
        assert_close(parameter.grad, other.grad, LONG_SUMS, size=0.01)
