"""What counts as a layer is the computation: subclasses, computed weights, functions, every kind of BatchNorm."""

import pytest
import torch
from torch import nn

import tritonq
import tritonq.nn as qnn
from prepared_nets import assert_same_when_not_rounding
from tritonq.prepare import prepare_qat

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def trained(model, x=X, steps=2):
    """Prepare a model, train it for some steps, and check its outputs, gradients and conversion on the way."""
    prepared = prepare_qat(model, example_inputs=x, strict=True)
    assert_same_when_not_rounding(model, prepared, x)
    prepared.train()
    optimizer = torch.optim.SGD(prepared.parameters(), 0.01)
    for _ in range(steps):
        optimizer.zero_grad()
        prepared(x).square().mean().backward()
        assert all(parameter.grad is not None for parameter in prepared.parameters())
        optimizer.step()
    prepared.eval()
    converted = tritonq.convert(prepared)
    with torch.no_grad():
        torch.testing.assert_close(converted(x), prepared(x), rtol=0, atol=0)
    return prepared, converted


def rows(prepared):
    return {record.name: (record.kind, record.status) for record in tritonq.summary(prepared).layers}


class Depthwise(nn.Conv2d):
    """Constructs, and nothing else."""

    hint = "depthwise"

    def __init__(self, channels):
        super().__init__(channels, channels, 3, padding=1, groups=channels, bias=False)
        self.multiplier = 1


class Norm(nn.BatchNorm2d):
    """An alias."""


class Wide(nn.Linear):
    """An alias with a buffer."""

    def __init__(self, inputs, outputs):
        super().__init__(inputs, outputs)
        self.register_buffer("steps", torch.zeros(1))


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, Norm, nn.SyncBatchNorm])
def test_subclasses_that_only_construct_become_layers(norm):
    model = nn.Sequential(
        nn.Conv2d(3, 8, 1), Depthwise(8), norm(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), Wide(8, 4)
    )
    prepared, _ = trained(model)
    assert type(prepared[1]) is qnn.ConvBnReLU2d
    assert type(prepared[6]) is qnn.Linear
    assert (prepared[1].hint, prepared[1].multiplier) == ("depthwise", 1)
    assert prepared[6].steps.shape == (1,)
    assert set(rows(prepared)["1"]) == {"Depthwise", "quantized"}
    assert prepared.train()[1].trains_in_one_operator


def test_a_class_that_overrides_its_convolution_is_no_plain_layer():
    class Scaled(nn.Conv2d):
        def _conv_forward(self, input, weight, bias):
            return 2 * super()._conv_forward(input, weight, bias)

    prepared = prepare_qat(nn.Sequential(Scaled(3, 4, 1), nn.Conv2d(4, 4, 1)), example_inputs=X, warn=False)
    assert type(prepared[0]) is not qnn.Conv2d
