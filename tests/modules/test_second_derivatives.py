"""Gradients of gradients: quantized layers have none, and say so."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tritonq import get_qconfig, prepare_qat

X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Of(nn.Module):
    def __init__(self, join):
        super().__init__()
        self.conv, self.join = nn.Conv2d(3, 3, 1), join

    def forward(self, x):
        return self.join(self.conv(x), x)


CRITICS = {
    "layer": lambda: nn.Sequential(nn.Conv2d(3, 4, 3)),
    "conv, norm, relu": lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()),
    "two layers": lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 1)),
    "function": lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.SiLU()),
    "pool": lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1)),
    "add": lambda: Of(lambda a, b: F.relu(a + b)),
    "cat": lambda: Of(lambda a, b: torch.cat([a, b], 1)),
    "mul": lambda: Of(lambda a, b: a * b),
    "matmul": lambda: Of(lambda a, b: a @ b.transpose(-1, -2)),
}


@pytest.mark.parametrize("preset", ["onnxruntime", "lsq_w4a4"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("critic", CRITICS)
def test_a_penalty_of_gradients_is_refused(critic, training, preset):
    torch.manual_seed(0)
    prepared = prepare_qat(CRITICS[critic](), qconfig=get_qconfig(preset), example_inputs=X, warn=False)
    prepared(X)
    prepared.train(training)
    x = X.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(prepared(x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="quantized layers have no second derivative"):
        (prepared(x).mean() + gradient.square().sum()).backward()


def test_a_graph_of_gradients_that_nothing_differentiates_changes_none():
    torch.manual_seed(0)
    prepared = prepare_qat(CRITICS["two layers"](), example_inputs=X).eval()
    parameters = list(prepared.parameters())
    plain, kept = (
        torch.autograd.grad(prepared(X).square().sum(), parameters, create_graph=create_graph)
        for create_graph in (False, True)
    )
    assert all(map(torch.equal, plain, kept))
