"""Batches of no images, as detectors hand them to heads where they found nothing."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import tritonq


class Head(nn.Module):
    """Layers with and without BatchNorm, a product, a sum, a concatenation and functions."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU6())
        self.gate = nn.Conv2d(4, 4, 1)
        self.classes = nn.Linear(8, 3)

    def forward(self, x):
        y = self.conv(x)
        y = y + F.silu(y) * self.gate(y).sigmoid()
        return self.classes(torch.cat([y.mean((2, 3)), y.amax((2, 3))], 1))


def state_of(model):
    """What a batch changes; ranges of weights follow from the weights."""
    apart = ("num_batches", "weight_fake_quant")
    state = model.state_dict().items()
    return {name: tensor.clone() for name, tensor in state if not any(part in name for part in apart)}


def assert_same(found, expected):
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


QCONFIGS = {
    "ranges": tritonq.get_qconfig(),
    "learned": tritonq.get_qconfig("lsq_w4a4"),
}


@pytest.mark.parametrize("qconfig", QCONFIGS.values(), ids=QCONFIGS)
def test_they_change_no_state_and_have_gradients_of_zero(qconfig):
    torch.manual_seed(0)
    x, none = torch.randn(4, 3, 6, 6), torch.zeros(0, 3, 6, 6)
    prepared = tritonq.prepare_qat(Head(), qconfig=qconfig, example_inputs=0.1 * x).train()
    from_examples = state_of(prepared)
    prepared(none).sum().backward()
    assert_same(state_of(prepared), from_examples)
    assert all(parameter.grad is None or not parameter.grad.any() for parameter in prepared.parameters())
    prepared(x).sum().backward()
    trained = state_of(prepared)
    assert any("conv.0.activation" in name and not torch.equal(trained[name], from_examples[name]) for name in trained)
    prepared(none)
    assert_same(state_of(prepared), trained)
    converted = tritonq.convert(prepared.eval())
    assert torch.equal(converted(x), prepared(x))
    assert converted(none).shape == prepared(none).shape == (0, 3)
