"""Results of differentiable functions that ``torch.compile`` traces: none is also the result of an earlier step.

Torch 2.11 returns every step of a traced ``forward`` beside its results. A result that is the same tensor as an earlier
step, such as ``y.to(y.dtype)``, then gets a gradient of zeros.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, fx, nn

import tritonq
from qat_models import PRESETS, FloatPair, FloatResidual, images, train

pytestmark = pytest.mark.usefixtures("fresh_compiler")


class Joins(nn.Module):
    """Additions, products and functions of several kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = (nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8)) for _ in range(2))
        self.gate, self.head = nn.Conv2d(8, 8, 1), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.first(x), self.second(x)
        y = torch.relu(a - b) * torch.sigmoid(self.gate(a))
        y = torch.cat([nn.functional.silu(y + b), nn.functional.avg_pool2d(y, 3, 1, 1)])
        return self.head(torch.maximum(y, b.repeat(2, 1, 1, 1)).mean((2, 3)))


@pytest.fixture
def results(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, list[str]]]:
    """Collect, for each result of a traced forward that runs, its name and those of earlier steps that it is."""
    collected: list[tuple[str, list[str]]] = []
    run = fx.Interpreter.run

    def watched(self: fx.Interpreter, *args: object, **kwargs: object) -> object:
        self.garbage_collect_values = False
        result = run(self, *args, **kwargs)
        returned = next(node for node in self.module.graph.nodes if node.op == "output").args[0]
        if isinstance(returned, tuple) and len(returned) == 2 and isinstance(returned[0], tuple):
            for node in returned[0]:
                if isinstance(node, fx.Node):
                    same = [str(n) for n, value in self.env.items() if n is not node and value is self.env[node]]
                    collected.append((str(node), same))
        return result

    monkeypatch.setattr(fx.Interpreter, "run", watched)
    return collected


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("preset", ["tensorrt", "onnxruntime", "megengine_lowbit"])
@pytest.mark.parametrize("kind", [FloatResidual, FloatPair, Joins])
def test_no_result_is_an_earlier_step(kind, preset, dtype, training, results):
    torch.manual_seed(0)
    x = images(8)
    model = train(tritonq.prepare_qat(kind(), qconfig=PRESETS[preset], example_inputs=x)).train(training)
    if dtype != torch.float32:
        model, x = model.to(dtype), x.to(dtype)
    torch.compile(model, fullgraph=True, backend="eager")(x).float().square().mean().backward()
    if not results:
        pytest.skip("this torch runs traced functions in another way")
    assert [(name, same) for name, same in results if same] == []
