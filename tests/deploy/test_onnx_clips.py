"""Clips behind layers, whose bounds are bounds of codes in files for ONNX Runtime."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import tritonq
from qat_models import after_one_batch

pytest.importorskip("onnxruntime")


class Clipped(nn.Module):
    """A layer with a ReLU, whose result is clipped again."""

    def __init__(self, ceiling, bounds):
        super().__init__()
        self.layer = nn.Conv2d(3, 4, 3)
        self.ceiling, self.bounds = ceiling, bounds

    def forward(self, x):
        y = self.layer(x)
        return F.hardtanh(torch.relu(y) if self.ceiling is None else y.clamp(0, self.ceiling), *self.bounds)


@pytest.mark.parametrize(
    ("ceiling", "bounds"),
    [(None, (-1.0, -0.5)), (6.0, (-1.0, -0.5)), (1.0, (2.0, 3.0)), (1.0, (-1.0, 0.5)), (None, (0.2, 0.5))],
)
def test_a_clip_behind_a_relu_has_the_bounds_of_both(ceiling, bounds, tmp_path):
    torch.manual_seed(0)
    x = torch.randn(4, 3, 6, 6)
    model = after_one_batch(Clipped(ceiling, bounds), x)
    tritonq.export_onnx(model, tmp_path / "m.onnx", x)
    assert tritonq.verify(model, tmp_path / "m.onnx", x).total.differing == 0
