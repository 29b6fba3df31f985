"""Layers whose quantizers round to floating point formats: no operator of integers takes them over."""

import pytest
import torch
from torch import nn

import tritonq
from tolerances import FLOAT32, assert_close
from tritonq.observers import MovingAverageMinMaxObserver
from tritonq.quantized_type import QuantizedType


@pytest.mark.parametrize("kind", ["activation", "weight"])
@pytest.mark.parametrize("training", [True, False])
def test_results_are_numbers_of_the_format(kind, training):
    float_type = QuantizedType.of_floats("e4m3")
    types = {"activation": QuantizedType.of(8), "weight": QuantizedType.of(8), kind: float_type}
    quantizers = {
        name: tritonq.FakeQuantize.with_args(observer=MovingAverageMinMaxObserver, dtype=qtype)
        for name, qtype in types.items()
    }
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    x = torch.randn(2, 3, 8, 8)
    model = tritonq.prepare_qat(net, qconfig=tritonq.QConfig(**quantizers), example_inputs=x).train(training)
    if not training:
        model.train()(x)
        model.eval()
    layer = next(module for module in model.modules() if isinstance(module, tritonq.nn.ConvBnReLU2d))
    y = model(x)
    if kind == "activation":
        values = (y / layer.activation_post_process.scale).detach()
        assert_close(values, values.to(torch.float8_e4m3fn).float(), FLOAT32, size=0)
    else:
        assert not layer.trains_in_one_operator
        assert not layer._knows_grids()
