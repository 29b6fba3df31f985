"""Small models for `prepare_qat`, and the checks that every prepared model must pass."""

import copy
import io

import torch
from torch import nn

import tritonq.nn as qnn
from tolerances import SUMS
from tritonq.fake_quantize_base import FakeQuantizeBase
from tritonq.prepare import disable_fake_quant, prepare_qat

# Folding a BatchNorm into a convolution rounds differently than applying it; seen: up to 1.3e-6 over 53 layers.
FOLDING = SUMS.rtol


def quantizers(model):
    """Return activation quantizers by name."""
    weights = {id(module.weight_fake_quant) for module in model.modules() if hasattr(module, "weight_fake_quant")}
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, FakeQuantizeBase) and id(module) not in weights
    }


def of_type(model, *types):
    return [name for name, module in model.named_modules() if isinstance(module, types)]


def saved_and_loaded(model):
    """Return what `torch.load` reads of what `torch.save` wrote."""
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def primary(output):
    """Return the tensor that a model returns, whatever it is wrapped in."""
    return output.logits if hasattr(output, "logits") else output


def assert_same_when_not_rounding(model, prepared, *args, **kwargs):
    model, prepared = copy.deepcopy(model).eval(), copy.deepcopy(prepared).eval()
    disable_fake_quant(prepared)
    with torch.no_grad():
        expected, got = primary(model(*args, **kwargs)), primary(prepared(*args, **kwargs))
    error = float((got - expected).abs().max() / expected.abs().max())
    assert error < FOLDING


def assert_inputs_on_their_grids(prepared, *args):
    """After a training step, what each layer reads in eval mode is what the quantizer that it names makes of it."""
    checked = []

    def check(layer, inputs):
        if hasattr(layer, "input_fake_quant"):
            assert layer.input_quantizer is layer.input_fake_quant
        else:
            assert torch.equal(layer.input_quantizer.quantize(inputs[0]), inputs[0])
        checked.append(layer)

    for layer in prepared.modules():
        if isinstance(layer, qnn.QATLayer) and layer.input_quantizer is not None:
            layer.register_forward_pre_hook(check)
    prepared.eval()
    with torch.no_grad():
        prepared(*args)
    return checked


class Net(nn.Module):
    """Parts for the small models below, and whatever forward a test gives it."""

    def __init__(self, run, **parts):
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)
        self.run = run

    def forward(self, x):
        return self.run(self, x)


class ThreeLayers(nn.Module):
    """Two convolutions and a linear layer; a subclass says how they are called."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1), nn.Linear(4, 2)


def conv(channels=4, **arguments):
    return nn.Conv2d(channels, channels, 3, padding=1, **arguments)


def norm(channels=4):
    made = nn.BatchNorm2d(channels)
    nn.init.uniform_(made.weight, 0.5, 1.5)
    nn.init.normal_(made.bias)
    made.running_mean.normal_()
    made.running_var.uniform_(0.5, 2)
    return made


X = torch.randn(2, 4, 6, 6)


def prepare(run, **parts):
    """Return a small model and what became of it, with the check that every model must pass."""
    torch.manual_seed(0)
    model = Net(run, **parts)
    prepared = prepare_qat(model, example_inputs=X)
    assert_same_when_not_rounding(model, prepared, X)
    primary(prepared.train()(X)).sum().backward()
    assert_inputs_on_their_grids(copy.deepcopy(prepared), X)
    return prepared
