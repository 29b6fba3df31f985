"""Gated linear units: a sigmoid of one half of a tensor times the other half."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

import tritonq
from optimised_graph import optimised_kinds
from tolerances import SUMS

X = torch.randn(4, 3, 6, 6)


class Functional(nn.Module):
    def __init__(self, **arguments):
        super().__init__()
        self.first, self.second, self.arguments = nn.Conv2d(3, 8, 3), nn.Conv2d(4, 4, 1), arguments

    def forward(self, x):
        return self.second(F.glu(self.first(x), **self.arguments))


class Branching(Functional):
    def forward(self, x):
        x = self.first(x)
        return self.second(F.glu(x, 1) if isinstance(x, torch.Tensor) else x)


MODELS = {
    "module": lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.GLU(1), nn.Conv2d(4, 4, 1)),
    "function": lambda: Functional(dim=1),
    "answered": lambda: Branching(),
    "behind a ReLU": lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.GLU(dim=-3), nn.Conv2d(4, 4, 1)),
}


@pytest.mark.parametrize("build", MODELS.values(), ids=MODELS.keys())
def test_it_is_quantized_converted_saved_and_exported(build, tmp_path):
    model = build()
    prepared = tritonq.prepare_qat(model, example_inputs=X, strict=True).train()
    prepared(X).square().mean().backward()
    assert all(parameter.grad is not None for parameter in prepared.parameters())
    assert not tritonq.summary(prepared.eval()).in_float
    converted = tritonq.convert(prepared)
    assert torch.equal(converted(X), prepared(X))
    tritonq.save_converted(converted, tmp_path / "model.pt")
    assert torch.equal(tritonq.load_converted(tmp_path / "model.pt", build())(X), prepared(X))
    tritonq.export_onnx(converted, tmp_path / "model.onnx", X)
    assert tritonq.verify(prepared, tmp_path / "model.onnx", X).total.differing == 0
    kinds = optimised_kinds(tmp_path / "model.onnx")
    assert kinds["QLinearMul"] == kinds["QLinearSigmoid"] == 1


def test_without_a_qconfig_it_is_torchs():
    x = torch.randn(3, 6, requires_grad=True)
    found, expected = tritonq.nn.GLU(1)(x), F.glu(x, 1)
    assert_close(found, expected, rtol=SUMS.rtol, atol=SUMS.atol)
    assert_close(*torch.autograd.grad(found.sum() - expected.sum(), x), torch.zeros_like(x), rtol=0, atol=SUMS.atol)


def test_the_gate_is_read_by_a_linear_layer_of_another_axis():
    model = nn.Sequential(nn.Linear(6, 8), nn.GLU(), nn.Linear(4, 2))
    prepared = tritonq.prepare_qat(model, example_inputs=torch.randn(5, 6), strict=True)
    assert prepared[1].glu.dim == -1


@pytest.mark.parametrize("size", [1, 3])
def test_odd_sizes_are_refused(size):
    with pytest.raises(ValueError, match=f"a GLU halves axis -1, got the odd size {size}"):
        tritonq.nn.GLU(-1)(torch.ones(2, size))
