"""Quantization-aware models in eval mode under ``torch.compile(fullgraph=True)``: eager mode's codes and gradients."""

from __future__ import annotations

import contextlib
import copy
from dataclasses import replace

import pytest
import torch
from test_compile import OTHER_QUANTIZERS
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import tritonq
from qat_models import PRESETS, FloatPair, FloatResidual, images, set_mode, train, without_ranges
from tolerances import FLOAT32, SUMS, assert_close
from tritonq import nn as qnn
from tritonq.functional.integer import integer_affine, to_integers
from tritonq.functional.integer_joins import integer_add
from tritonq.functional.linear_map import Convolution
from tritonq.functional.traced import eval_mode, parts
from tritonq.grid import Grid
from tritonq.quantized_type import QUANTIZED_TYPES

pytestmark = pytest.mark.usefixtures("fresh_compiler")

QCONFIG = tritonq.get_qconfig("tensorrt")


def prepared(qconfig: tritonq.QConfig = QCONFIG, kind: type[nn.Module] = FloatResidual) -> nn.Module:
    torch.manual_seed(0)
    return tritonq.prepare_qat(kind(), qconfig=qconfig, example_inputs=images(2)).train()


def compiled(model: nn.Module, backend: str = "aot_eager") -> nn.Module:
    return torch.compile(model, fullgraph=True, backend=backend)


def gradients(model: nn.Module, called, x: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    called(x).square().mean().backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


def assert_as_in_eager(model: nn.Module, x: torch.Tensor, modes: tuple[bool, ...] = (False, True)) -> None:
    """Outputs without and with gradients (each is a graph of its own), and the gradients."""
    called = compiled(model)
    for enabled in modes:
        with torch.set_grad_enabled(enabled):
            assert torch.equal(called(x), model(x))
    found, expected = gradients(model, called, x), gradients(model, model, x)
    assert any(bool(gradient.any()) for gradient in expected.values())
    assert_close(found, expected, SUMS, size=0.001)


PRESET_NAMES = ("tensorrt", "fbgemm_v0", "fbgemm_v1", "qnnpack_v0", "megengine_lowbit")


@pytest.mark.parametrize("name", [*PRESET_NAMES, *OTHER_QUANTIZERS])
@pytest.mark.filterwarnings("ignore:a ClippedFakeQuantize")
def test_it_gives_eager_modes_codes_and_gradients(name):
    qconfig = PRESETS[name] if name in PRESETS else OTHER_QUANTIZERS[name]
    if name == "tensorrt":
        assert_as_in_eager(train(prepared(qconfig)), images(16))
    else:
        # Joins and several layers compile alike whatever the quantizers.
        assert_as_in_eager(train(prepared(qconfig, FloatPair)), images(16), modes=(True,))


class Geometries(nn.Module):
    """Layers whose input must be padded first, transposed, grouped, of other dimensions, or with other functions."""

    def __init__(self) -> None:
        super().__init__()
        self.input = QCONFIG.activation()
        self.reflect = qnn.Conv2d(4, 8, 3, padding=1, padding_mode="reflect", qconfig=QCONFIG)
        self.same = qnn.ConvBnReLU2d(8, 8, (2, 4), padding="same", groups=4, qconfig=QCONFIG)
        self.up = qnn.ConvTranspose2d(8, 4, 3, stride=2, output_padding=1, groups=2, qconfig=QCONFIG)
        self.block = qnn.QATRepVGGBlock(4, 4, activation=nn.SiLU(), qconfig=QCONFIG)
        self.row = qnn.ConvReLU1d(4, 6, 5, dilation=2, bias=False, qconfig=QCONFIG)
        self.head = qnn.LinearReLU(12, 5, qconfig=QCONFIG)
        layers = [self.reflect, self.same, self.up, self.block, self.row, self.head]
        sources = [self.input, *(layer.activation_post_process for layer in layers)]
        for layer, source in zip(layers, sources[:-1], strict=True):
            layer.set_input_quantizer(source)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.block(self.up(self.same(self.reflect(self.input(x)))))
        x = self.row(x.flatten(2)[..., :20])
        return self.head(x)


@pytest.mark.parametrize("channels_last", [False, True])
def test_geometries(channels_last):
    torch.manual_seed(0)
    x = torch.randn(3, 4, 6, 6)
    x = x.to(memory_format=torch.channels_last) if channels_last else x
    assert_as_in_eager(train(Geometries(), x), x)


def test_a_fused_relu6():
    torch.manual_seed(0)
    parts = (nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU6(), nn.Conv2d(8, 4, 1), nn.ReLU6())
    x = 9 * images(8)
    model = train(tritonq.prepare_qat(nn.Sequential(*parts), example_inputs=x), x)
    assert_as_in_eager(model, x)


def test_evaluation_in_the_middle_of_training():
    """The same compiled model, whose mode changes: two graphs, whatever was observed before."""
    model = prepared()
    eager = copy.deepcopy(model)
    counter = CompileCounterWithBackend("aot_eager")
    called, frames = compiled(model, counter), []
    for round_ in range(3):
        for module, function in ((model, called), (eager, eager)):
            module.train()
            function(images(8, seed=round_)).sum().backward()
            module.eval()
        # Training may add up in another order; eval mode may not.
        same = copy.deepcopy(model)
        with torch.no_grad():
            assert torch.equal(called(images(8)), same(images(8)))
        frames.append(counter.frame_count)
    assert frames == [2, 2, 2]
    assert_close(model.state_dict(), eager.state_dict(), SUMS, size=0.01)


@pytest.mark.parametrize("observed", [False, True])
@pytest.mark.parametrize("mode", ["approximate", "exact", "corrected"])
def test_frozen_statistics_in_training_and_all_modes_in_eval(mode, observed):
    model = prepared(kind=FloatPair)
    set_mode(model, mode)
    if observed:
        train(model).train()
    model.apply(tritonq.freeze_bn_stats)
    eager = copy.deepcopy(model)
    found, expected = gradients(model, compiled(model), images(8)), gradients(eager, eager, images(8))
    assert_close(found, expected, SUMS, size=0.001)
    assert_close(model.state_dict(), eager.state_dict(), FLOAT32, size=0)
    assert_as_in_eager(model.eval(), images(8), modes=(True,))


def test_frozen_biases_stay_float_where_nothing_was_observed():
    """A scale that rests on nothing rounds neither in eager mode nor in a graph."""
    model = without_ranges(prepared())
    with torch.no_grad():
        model.stem[0].bn.bias.uniform_(-0.4, 0.4)
    model.apply(tritonq.freeze_bn_stats).apply(tritonq.disable_observer)
    off = copy.deepcopy(model).apply(tritonq.disable_fake_quant)
    called = compiled(model)
    with torch.no_grad(), pytest.warns(UserWarning, match="observed nothing"):
        assert all(torch.equal(function(images(4)), off(images(4))) for function in (called, model))


def test_switches_and_ranges_are_asked_on_the_device():
    """One graph serves all of their states, the state of having observed nothing among them."""
    model, other = without_ranges(prepared()).eval(), train(prepared())
    counter = CompileCounterWithBackend("aot_eager")
    called, x = compiled(model, counter), images(4)
    with torch.no_grad():
        with pytest.warns(UserWarning, match="observed nothing"):
            expected = copy.deepcopy(model)(x)
        assert torch.equal(called(x), expected)
        graphs = counter.frame_count
        for name, value in other.state_dict().items():
            model.state_dict()[name].copy_(value)
        assert torch.equal(called(x), other(x))
        for part in ("stem.0", "head", "depthwise"):
            tritonq.disable_fake_quant(other.get_submodule(part))
            tritonq.disable_fake_quant(model.get_submodule(part))
            assert torch.equal(called(x), other(x))
    assert counter.frame_count == graphs


def test_a_given_scale_is_taken_up():
    quantizer = tritonq.get_qconfig("megengine_passive").activation().eval()
    quantizer.activation_post_process.set_qparams(torch.tensor([0.5]))
    called, x = compiled(quantizer), torch.tensor([0.3, 0.6])
    assert called(x).tolist() == [0.5, 0.5]
    quantizer.activation_post_process.scale = torch.tensor([0.25])
    assert called(x).tolist() == [0.25, 0.5]


def test_inductor_gives_the_same_codes():
    model = train(prepared())
    with torch.no_grad():
        assert torch.equal(compiled(model, "inductor")(images(16)), model(images(16)))


def grids(active: tuple[int, ...], device: str = "cpu") -> list[Grid]:
    """Grids of an input, a weight (or second summand) and an output."""
    per_channel = QUANTIZED_TYPES["qint8"].with_axis(0)
    made = [
        (torch.tensor([0.02]), torch.tensor([3]), QUANTIZED_TYPES["quint8"]),
        (torch.tensor([0.01, 0.02]), torch.tensor([0, 0]), per_channel),
        (torch.tensor([0.05]), torch.tensor([-4]), QUANTIZED_TYPES["qint8"]),
    ]
    return [
        Grid(scale.to(device), zero.int().to(device), qtype, torch.tensor([on], dtype=torch.uint8).to(device))
        for (scale, zero, qtype), on in zip(made, active, strict=True)
    ]


OP = Convolution((1, 2), (1, 0), (1, 1), (0, 0), False, 2)
SWITCHES = [(1, 1, 1), (1, 1, 0), (1, 0, 1), (0, 1, 1)]


def affine_arguments(device: str = "cpu"):
    generator = torch.Generator().manual_seed(0)
    x = (torch.randint(0, 256, (2, 4, 5, 6), generator=generator) - 3) * 0.02
    weight, bias = torch.randn(2, 2, 3, 3, generator=generator), torch.randn(2, generator=generator)
    return x.to(device), weight.to(device), bias.to(device), OP, 1


@pytest.mark.parametrize("active", SWITCHES)
def test_where_a_device_may_not_be_asked_both_answers_are_computed(active, monkeypatch):
    x, weight, bias, op, axis = affine_arguments()
    source, weights, output = grids(active)
    expected = eval_mode.run_affine(x, weight, bias, op, axis, source, weights, output)
    sums = (x, x.flip(0), source, replace(source, scale=torch.tensor([0.04])), output)
    expected_sum = eval_mode.run_join("add", *sums)
    if active[0] and active[1]:
        layer = to_integers(weight, bias, op, source, weights)
        assert torch.equal(expected, integer_affine(x, layer, op, axis, output if active[2] else None))
    if active[0] and active[2]:
        assert torch.equal(expected_sum, integer_add(*sums))
    monkeypatch.setattr(eval_mode, "is_readable", lambda values: False)
    assert torch.equal(eval_mode.run_affine(x, weight, bias, op, axis, source, weights, output), expected)
    assert torch.equal(eval_mode.run_join("add", *sums), expected_sum)


@pytest.mark.parametrize("readable", [True, False])
def test_sums_too_long_for_integers_are_refused_only_where_grids_are_on(readable, monkeypatch):
    monkeypatch.setattr(eval_mode, "is_readable", lambda values: readable)
    a = torch.zeros(1, 140_000)
    for active in SWITCHES[1:]:
        source, _, output = grids(active)
        operands = (a, a.mT, source, replace(source, enabled=torch.tensor([active[1]], dtype=torch.uint8)), output)
        assert torch.equal(eval_mode.run_join("matmul", *operands), a @ a.mT)
    source, _, output = grids((1, 1, 1))
    with pytest.raises(ValueError, match="140000 elements"):
        eval_mode.run_join("matmul", a, a.mT, source, source, output)


def test_nothing_is_read_back(monkeypatch):
    """On the meta device, which autocast does not know, there is nothing to read."""
    monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: contextlib.nullcontext())
    x, weight, bias, op, axis = affine_arguments("meta")
    source, weights, output = grids((1, 1, 1), "meta")
    assert eval_mode.run_affine(x, weight, bias, op, axis, source, weights, output).shape == (2, 2, 5, 2)
    assert eval_mode.run_join("add", x, x, source, source, output).is_meta


@pytest.mark.parametrize("conv", [OP, Convolution((2,), (1,), (3,), (1,), True, 4), None])
def test_convolutions_survive_as_plain_arguments(conv):
    described = [("conv", parts.describe("conv", Convolution | None))]
    rebuilt = parts.rebuild_all(described, parts.flatten_all(described, {"conv": conv}))["conv"]
    assert type(rebuilt) is type(conv)
    assert conv is None or vars(rebuilt) == vars(conv)


def test_a_compiled_model_is_deployed_as_the_model_that_it_wraps(tmp_path):
    model = train(prepared())
    called, x = compiled(model), images(8)
    expected = tritonq.convert(model)
    converted = tritonq.convert(called)
    assert list(converted.state_dict()) == list(expected.state_dict())
    assert str(tritonq.summary(called)) == str(tritonq.summary(model))
    tritonq.save_converted(compiled(converted), tmp_path / "m.pt")
    assert torch.equal(tritonq.load_converted(tmp_path / "m.pt", FloatResidual())(x), expected(x))
    tritonq.export_program(called, tmp_path / "m.pt2", x)
    tritonq.export_onnx(compiled(converted), tmp_path / "m.onnx", x)
    for deployed in (converted, compiled(converted), tmp_path / "m.pt2"):
        assert tritonq.verify(called, deployed, x) == tritonq.verify(model, expected, x)
    assert tritonq.verify(called, tmp_path / "m.onnx", x).agrees(0.001, 1)
    assert not called.training
