"""Inputs without a batch axis, which torch's convolutions and linear layers take: the same codes, in every form."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import tritonq

pytestmark = pytest.mark.usefixtures("fresh_compiler")

LAYERS = {
    "conv1d": (lambda: nn.Conv1d(4, 6, 3), (4, 9)),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3, padding="same", groups=2), (4, 7, 8)),
    "conv3d": (lambda: nn.Conv3d(4, 6, 2), (4, 4, 5, 3)),
    "transposed": (lambda: nn.ConvTranspose2d(4, 6, 3, stride=2), (4, 5, 4)),
    "linear": (lambda: nn.Linear(4, 6), (4,)),
}


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_one_example_gives_its_codes_in_a_batch(name, relu):
    torch.manual_seed(0)
    make, shape = LAYERS[name]
    x = torch.randn(5, *shape)
    model = nn.Sequential(make(), nn.ReLU()) if relu else nn.Sequential(make())
    model = tritonq.prepare_qat(model, example_inputs=x).train()
    model(x)
    forms = {"eval": model.eval(), "converted": tritonq.convert(model)}
    forms["compiled"] = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        expected = model(x)[2]
        for form, called in forms.items():
            assert torch.equal(called(x[2]), expected), form
    assert len(expected.unique()) > 3
