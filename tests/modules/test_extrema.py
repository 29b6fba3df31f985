"""Minima and maxima of two tensors: the codes of every pair, and of a constant, in all forms of a model."""

from fractions import Fraction

import pytest
import torch
from torch import nn

import tritonq
from tritonq import nn as qnn
from tritonq.functional.integer_joins import integer_join

X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
SPELLINGS = {
    "torch.maximum": torch.maximum,
    "torch.max": torch.max,
    "method": lambda a, b: a.maximum(b),
    "torch.minimum": lambda a, b: torch.minimum(input=a, other=b),
    "min": lambda a, b: a.min(b),
}


def on_grid(scale, zero_point=0):
    quantizer = tritonq.get_qconfig("onnxruntime").activation()
    quantizer(torch.tensor([-1.0, 1.0]))
    quantizer.scale.fill_(scale)
    quantizer.zero_point.fill_(zero_point)
    return quantizer.eval()


@pytest.mark.parametrize("kind", [qnn.Minimum, qnn.Maximum])
def test_every_pair_of_codes(kind):
    sources, output = (on_grid(0.5, 100), on_grid(0.25, 30)), on_grid(1.0, 60)
    join = kind(qconfig=tritonq.get_qconfig("onnxruntime")).eval()
    join.activation_post_process = output
    a, b = (((torch.arange(256) - s.zero_point) * s.scale) for s in sources)
    pick = min if kind is qnn.Minimum else max
    y = join(a.view(-1, 1), b.view(1, -1))
    for i in range(0, 256, 5):
        for j in range(256):
            exact = pick(Fraction(float(a[i])), Fraction(float(b[j])))
            assert float(y[i, j]) == min(max(round(exact), -60), 195)  # to even, as QuantizeLinear does
    grids = [quantizer.grid() for quantizer in (*sources, output)]
    assert torch.equal(output(integer_join(kind.kind, a.view(-1, 1), b.view(1, -1), *grids)), y)


class Net(nn.Module):
    def __init__(self, extremum):
        super().__init__()
        self.first, self.second, self.last = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1)
        self.extremum, self.floor = extremum, nn.Parameter(torch.full((4, 1, 1), 0.25))

    def forward(self, x):
        both = self.extremum(self.first(x), self.second(x))
        return self.last(torch.maximum(both, self.floor))


@pytest.mark.parametrize("extremum", SPELLINGS.values(), ids=SPELLINGS)
def test_preparation_finds_it(extremum, tmp_path):
    torch.manual_seed(0)
    model = tritonq.prepare_qat(Net(extremum), example_inputs=X, strict=True).train()
    assert {row.status for row in tritonq.summary(model).layers} == {"quantized"}
    assert sum(isinstance(module, (qnn.Minimum, qnn.Maximum)) for module in model.modules()) == 2
    model(X).square().sum().backward()
    assert model.floor.grad.abs().sum() > 0
    converted, path = tritonq.convert(model.eval()), tmp_path / "m.onnx"
    tritonq.save_converted(converted, tmp_path / "m.pt")
    tritonq.export_onnx(converted, path, X)
    loaded = tritonq.load_converted(tmp_path / "m.pt", Net(extremum))
    for form in (converted, loaded, path, tritonq.export_program(converted, None, X)):
        assert tritonq.verify(model, form, X).total.differing == 0
    assert torch.equal(torch.compile(model, backend="eager", fullgraph=True)(X), model(X))
