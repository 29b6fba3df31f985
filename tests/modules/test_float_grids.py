"""Layers whose quantizers round to floating point formats: no operator of integers takes them over."""

import pytest
import torch
from torch import nn

import tritonq
from tolerances import FLOAT32, assert_close
from tritonq.nn.folding_modes import bias_on_grid
from tritonq.observers import MovingAverageMinMaxObserver
from tritonq.quantized_type import QuantizedType

FLOATS = QuantizedType.of_floats("e4m3")
MAKE = tritonq.FakeQuantize.with_args(observer=MovingAverageMinMaxObserver, dtype=FLOATS)


@pytest.mark.parametrize("kind", ["activation", "weight"])
@pytest.mark.parametrize("training", [True, False])
def test_results_are_numbers_of_the_format(kind, training):
    integers = MAKE.with_args(dtype=QuantizedType.of(8))
    quantizers = {"activation": integers, "weight": integers, kind: MAKE}
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


class TwoInputs(nn.Module):
    def __init__(self, joins):
        super().__init__()
        self.joins, self.layer = joins, nn.Linear(8, 8)

    def forward(self, a, b):
        return self.layer(a + b) if self.joins else self.layer(a)


@pytest.mark.parametrize("joins", [False, True])
def test_graphs_compute_in_float_as_eval_mode_does(joins):
    torch.manual_seed(0)
    inputs = torch.randn(4, 8), torch.randn(4, 8)
    qat = tritonq.prepare_qat(TwoInputs(joins), qconfig=tritonq.QConfig(MAKE, MAKE), example_inputs=inputs)
    qat.train()(*inputs)
    with torch.no_grad():
        expected = qat.eval()(*inputs)
        torch.compiler.reset()
        assert torch.equal(torch.compile(qat, backend="eager")(*inputs), expected)


def test_a_bias_behind_float_codes_is_not_rounded():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))
    qat = tritonq.prepare_qat(net, qconfig=tritonq.QConfig(MAKE, MAKE), example_inputs=torch.randn(2, 1, 8, 8))
    bias = torch.randn(4)
    assert torch.equal(bias_on_grid(qat[2], bias), bias)


@pytest.mark.parametrize("producer", ["float codes", "floats", "integers"])
def test_a_quantizer_is_its_own_output_quantizer(producer):
    quantizer = {
        "float codes": lambda: tritonq.FakeQuantize(dtype=FLOATS),
        "floats": lambda: tritonq.FloatFakeQuantize("fp8_e4m3"),
        "integers": tritonq.FakeQuantize,
    }[producer]()
    add = tritonq.nn.Add()
    add.set_producers(quantizer, None)
    assert add.input_quantizers == (quantizer, None)
