"""Quantization-aware layers in eval mode run by torch's 8-bit kernels, on weights that are packed once."""

import copy

import pytest
import torch
from torch import nn

import tritonq
from tritonq.functional import codes, integer_kernels
from tritonq.reference import eval_codes

pytestmark = pytest.mark.skipif(not integer_kernels.has_integer_kernels(), reason="needs exact 8-bit products")

PRESETS = ["onnxruntime", "tensorrt", "megengine_tqt", "megengine_ema"]


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU6())
        self.second = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False), nn.BatchNorm2d(8))
        self.third = nn.Conv2d(8, 6, 1)
        self.fc = nn.Linear(6 * 36, 5)

    def forward(self, x):
        return self.fc(self.third(self.second(self.first(x))).flatten(1))


def prepared(preset="onnxruntime"):
    torch.manual_seed(0)
    model = tritonq.prepare_qat(
        Net(), qconfig=tritonq.get_qconfig(preset), example_inputs=torch.randn(2, 3, 6, 6)
    ).train()
    for _ in range(2):
        model(torch.randn(8, 3, 6, 6))
    return model.eval()


def qat_layers(model):
    return [module for module in model.modules() if isinstance(module, tritonq.nn.QATLayer)]


def by_formula(model, x, monkeypatch):
    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr("tritonq.nn.eval_mode.can_use_codes", lambda x: False)
        return copy.deepcopy(model)(x)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("preset", PRESETS)
def test_eval_equals_formula(preset, channels_last, monkeypatch):
    model, x = prepared(preset), torch.randn(4, 3, 6, 6)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    expected = by_formula(model, x, monkeypatch)
    with torch.no_grad():
        assert torch.equal(model(x), expected)
    with torch.inference_mode():
        assert torch.equal(model(x), expected)
    assert all(layer.packed._value is not None for layer in qat_layers(model))


def test_a_gradient_takes_the_formula(monkeypatch):
    model, x = prepared(), torch.randn(4, 3, 6, 6)
    result = model(x)
    assert torch.equal(result, by_formula(model, x, monkeypatch))
    result.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert all(layer.packed._value is None for layer in qat_layers(model))


# What changes the result; each must be seen although the weight was packed before.
CHANGES = {
    "weight": lambda model: qat_layers(model)[0].weight.data.neg_(),
    "weight, in place": lambda model: qat_layers(model)[0].weight.mul_(-1),
    "statistics": lambda model: qat_layers(model)[0].bn.running_mean.add_(1),
    "statistics, through data": lambda model: qat_layers(model)[0].bn.running_var.data.mul_(3),
    "bias, through data": lambda model: setattr(qat_layers(model)[2].bias, "data", qat_layers(model)[2].bias + 1),
    "scale, through data": lambda model: qat_layers(model)[0].weight_fake_quant.scale.data.mul_(2),
    "gamma": lambda model: qat_layers(model)[1].bn.weight.mul_(2),
    "eps": lambda model: setattr(qat_layers(model)[0].bn, "eps", 1.0),
    "bias": lambda model: qat_layers(model)[2].bias.add_(1),
    "scale": lambda model: qat_layers(model)[0].weight_fake_quant.scale.mul_(2),
    "output": lambda model: qat_layers(model)[1].activation_post_process.scale.mul_(2),
    "switch": lambda model: qat_layers(model)[0].activation_post_process.disable_fake_quant(),
    "step": lambda model: model.train()(torch.randn(8, 3, 6, 6) * 3) is None or model.eval(),
    "state": lambda model: model.load_state_dict(
        {k: v * 2 for k, v in model.state_dict().items() if "bias" in k}, False
    ),
}


@pytest.mark.parametrize("change", CHANGES)
@torch.no_grad()
def test_packed_weights_follow_every_change(change, monkeypatch):
    model, x = prepared(), torch.randn(4, 3, 6, 6)
    before = model(x)
    CHANGES[change](model)
    assert torch.equal(model(x), by_formula(model, x, monkeypatch))
    assert not torch.equal(model(x), before)


@torch.no_grad()
def test_unchanged_weights_are_packed_once(monkeypatch):
    model, x = prepared(), torch.randn(4, 3, 6, 6)
    model(x)
    monkeypatch.setattr("tritonq.nn.eval_mode.pack", lambda *args: pytest.fail("a weight was packed again"))
    model(x)
    model(torch.randn(1, 3, 9, 9)[:, :, :6, :6])


@pytest.mark.parametrize(("batch", "parts"), [(1, [1]), (3, [3]), (4, [2, 2]), (5, [2, 2, 1])])
@torch.no_grad()
def test_large_batches_are_computed_a_few_images_at_a_time(batch, parts, monkeypatch):
    model, x = prepared(), torch.randn(batch, 3, 6, 6)
    expected = by_formula(model, x, monkeypatch)
    sums = 8 * 6 * 6  # of an image in the first layer
    monkeypatch.setattr(codes, "_MAX_VALUES_AT_ONCE", 3 * sums)
    monkeypatch.setattr(codes, "_VALUES_AT_ONCE", 2 * sums)
    computed, run = [], integer_kernels.PackedLayer._run
    monkeypatch.setattr(integer_kernels.PackedLayer, "_run", lambda self, x: computed.append(len(x)) or run(self, x))
    for same in (model, tritonq.convert(model)):
        assert torch.equal(same(x), expected)  # how many sums an image takes is known from here on
        computed.clear()
        assert torch.equal(same(x), expected)
        assert computed[: len(parts)] == parts
    monkeypatch.setattr(codes, "_MAX_VALUES_AT_ONCE", sums // 2)
    monkeypatch.setattr(codes, "_VALUES_AT_ONCE", 1)
    for _ in range(2):  # without a batch the first axis has channels, which belong together
        assert torch.equal(model.first(x[0]), model.first(x[:1])[0])


@pytest.mark.parametrize("channels", [1, 3, 8, 300])
@pytest.mark.parametrize("size", [(1, 1), (4, 4), (5, 3)])
def test_steps_in_rows_give_the_bits_of_steps_by_channel(channels, size):
    sums = torch.randn(2, channels, *size).contiguous(memory_format=torch.channels_last)
    steps = torch.rand(channels, 1, 1)
    assert torch.equal(eval_codes.multiply_(sums.clone(), eval_codes.repeated(steps)), sums * steps)


@torch.no_grad()
def test_training_holds_no_packed_weights():
    model = prepared()
    model(torch.randn(4, 3, 6, 6))
    model.train()
    assert all(layer.packed._value is None for layer in qat_layers(model))
