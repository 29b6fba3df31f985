"""Calibration without rounding, and EasyQuant's refinement of the scales."""

import copy
import warnings

import pytest
import torch
from torch import nn

import tritonq
from tolerances import FLOAT32, SUMS, assert_close
from tritonq.calibration import calibrate, refine_scales
from tritonq.fake_quantize_base import FakeQuantizeBase
from tritonq.learned_fake_quantize import ClippedFakeQuantize, LearnedStepFakeQuantize
from tritonq.observers import HistogramObserver, MinMaxObserver, PassiveObserver
from tritonq.qparams import range_to_qparams


def small_model(qconfig):
    torch.manual_seed(0)
    model = nn.Sequential(
        tritonq.nn.ConvBnReLU2d(3, 6, 3, padding=1, qconfig=qconfig),
        tritonq.nn.ConvReLU2d(6, 5, 3, qconfig=qconfig),
        nn.Flatten(),
        tritonq.nn.Linear(5 * 6 * 6, 4, qconfig=qconfig),
    )
    model[0].bn.running_var.uniform_(0.5, 2)
    return model


def loader(count=3):
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(4, 3, 8, 8, generator=generator), torch.zeros(4)) for _ in range(count)]


def histogram_qconfig(**arguments):
    return tritonq.QConfig(
        tritonq.FakeQuantize.with_args(observer=HistogramObserver, dtype="quint8", **arguments),
        tritonq.FakeQuantize.with_args(
            observer=MinMaxObserver, dtype="qint8_narrow", qscheme=torch.per_channel_symmetric
        ),
    )


def quantizers(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, FakeQuantizeBase)}


def float_outputs(model, data):
    """Each activation quantizer's inputs in the float model in eval mode."""
    model = copy.deepcopy(model).eval()
    seen = {}
    for name, quantizer in quantizers(model).items():
        quantizer.disable_fake_quant()
        quantizer.disable_observer()
        if name.endswith("activation_post_process"):
            quantizer.register_forward_hook(lambda m, args, y, name=name: seen.setdefault(name, []).append(args[0]))
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for x, _ in data:
            model(x)
    return {name: torch.cat([x.flatten() for x in found]) for name, found in seen.items()}


@pytest.mark.parametrize("search", ["mse", "l2", "percentile", "kl"])
def test_ranges_are_those_of_the_float_model(search):
    model, data = small_model(histogram_qconfig(search=search)), loader()
    model.train()
    expected = float_outputs(model, data)
    statistics = model[0].bn.running_mean.clone()
    assert calibrate(model, iter(data)) is model
    assert model.training
    assert torch.equal(model[0].bn.running_mean, statistics)
    assert len(expected) == 3
    for name, quantizer in quantizers(model).items():
        assert quantizer.is_active()
        assert not bool(quantizer.observer_enabled)
        if name in expected:
            observer = HistogramObserver(dtype="quint8", search=search)
            observer(expected[name])
            scale, zero_point = observer.calculate_qparams()
            assert torch.equal(quantizer.scale, scale)
            assert torch.equal(quantizer.zero_point, zero_point)


@pytest.mark.parametrize(
    "preset", ["tensorrt", "megengine_calibration", "megengine_min_max", "megengine_tqt", "megengine_lowbit"]
)
def test_every_observing_preset(preset):
    model, data = small_model(tritonq.get_qconfig(preset)), loader()
    x = data[0][0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        calibrate(model, data)
        y = model.eval()(x)
    for quantizer in quantizers(model).values():
        quantizer.disable_fake_quant()
    expected = model(x)
    assert not torch.equal(y, expected)
    assert (y - expected).norm() < (0.6 if preset == "megengine_lowbit" else 0.1) * expected.norm()


def test_the_calibration_preset_rounds_nothing_before():
    model = small_model(tritonq.get_qconfig("megengine_calibration"))
    x = loader()[0][0]
    y = model(x)
    for quantizer in quantizers(model).values():
        assert bool(quantizer.activation_post_process.has_observed())
        assert not quantizer.is_active()
        quantizer.disable_observer()
    assert_close(model(x), y, SUMS, size=0.1)


def test_learned_scales_start_from_all_the_data():
    qconfig = tritonq.QConfig(
        ClippedFakeQuantize.with_args(observer=MinMaxObserver, dtype="quint8"),
        LearnedStepFakeQuantize.with_args(observer=MinMaxObserver, dtype="qint8"),
    )
    layer = tritonq.nn.ConvReLU2d(3, 4, 3, qconfig=qconfig)
    small, large = torch.rand(2, 3, 6, 6), 10 * torch.rand(2, 3, 6, 6)
    calibrate(layer, [small, large])
    with torch.no_grad():
        float_output = torch.relu(layer.linear_map(large, layer.weight, layer.bias))
    assert float(layer.activation_post_process.alpha) == pytest.approx(float(float_output.max()), rel=SUMS.rtol)
    weight = layer.weight.detach()
    expected = range_to_qparams(weight.min(), weight.max(), layer.weight_fake_quant.qtype).scale
    assert float(layer.weight_fake_quant.scale) == pytest.approx(float(expected))
    layer(small).sum().backward()
    assert layer.weight_fake_quant.scale.grad is not None


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (torch.empty(0, 3, 8, 8), "data has no batch that holds a sample"),
        (
            torch.full((2, 3, 8, 8), torch.nan),
            r"saw no finite value.*0\.activation_post_process, 1\.activation_post_process",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:a FakeQuantize that has observed nothing")
def test_data_that_say_nothing(bad, message):
    model = small_model(histogram_qconfig())
    model[1].activation_post_process.disable_observer()
    with pytest.raises(ValueError, match=message):
        calibrate(model, bad)
    assert not bool(model[1].activation_post_process.observer_enabled)
    assert all(bool(quantizer.fake_quant_enabled) for quantizer in quantizers(model).values())
    assert model.training
    assert not model[0].activation_post_process.has_qparams()


def test_bad_arguments():
    model = small_model(histogram_qconfig())
    with pytest.raises(ValueError, match="no fake quantizer"):
        calibrate(nn.Linear(2, 2), loader())
    with pytest.raises(ValueError, match="no batch"):
        calibrate(model, [])
    with pytest.raises(ValueError, match="iterable of batches, got int"):
        calibrate(model, 3)
    calibrate(model, loader())
    with pytest.raises(ValueError, match="no quantized layer"):
        refine_scales(nn.Linear(2, 2), loader())
    with pytest.raises(ValueError, match="candidates must be positive"):
        refine_scales(model, loader(), candidates=0)
    with pytest.raises(ValueError, match="span"):
        refine_scales(model, loader(), span=(1.2, 0.8))
    with pytest.raises(ValueError, match="no batch"):
        refine_scales(model, [])


class Sum(nn.Module):
    """Adds the results of one layer for all its inputs."""

    def __init__(self):
        super().__init__()
        self.layer = tritonq.nn.Linear(4, 2, qconfig=histogram_qconfig())

    def forward(self, *inputs, scale=1.0):
        return sum(self.layer(x) for x in inputs) * scale


def test_a_forward_of_any_number_of_arguments_gets_them_all():
    model, x = Sum(), torch.rand(8, 4)
    calls = []
    model.layer.register_forward_pre_hook(lambda layer, args: calls.append(args[0]))
    calibrate(model, [(x, x + 1, x + 2)])
    assert [float((call - x).mean().round()) for call in calls] == [0, 1, 2]


def test_one_dict_of_arguments_is_a_batch():
    class Named(Sum):
        def forward(self, image):
            return super().forward(image)

    model, x = Named(), torch.rand(8, 4)
    calibrate(model, {"image": x})
    assert float(model.layer.weight_fake_quant.scale.max()) != 1
    refine_scales(model, {"image": x})


def cosine(a, b):
    a, b = a.double().flatten(), b.double().flatten()
    return float(a @ b / (a.norm() * b.norm()))


def test_easyquant_by_hand():
    """One layer, one scale: every candidate tried with plain operators."""
    qconfig = tritonq.QConfig(nn.Identity, tritonq.FakeQuantize.with_args(observer=MinMaxObserver, dtype="qint4"))
    layer = tritonq.nn.Linear(20, 10, qconfig=qconfig)
    x = torch.randn(64, 20)
    calibrate(layer, [x])
    # A scale that is too wide, so that there is something to find.
    layer.weight_fake_quant.scale.mul_(1.2)
    scale = layer.weight_fake_quant.scale.clone()
    chosen = refine_scales(layer, [x])
    with torch.no_grad():
        expected = nn.functional.linear(x, layer.weight, layer.bias)

        def similarity(factor):
            weight = torch.fake_quantize_per_tensor_affine(layer.weight, float(scale * factor), 0, -8, 7)
            return cosine(nn.functional.linear(x, weight, layer.bias), expected)

    candidates = [1.0, *torch.linspace(0.8, 1.2, 40).tolist()]
    best = max(candidates, key=similarity)
    assert list(chosen) == ["weight_fake_quant"]
    assert float(chosen["weight_fake_quant"]) == pytest.approx(best)
    assert torch.allclose(layer.weight_fake_quant.scale, scale * best)
    assert similarity(best) > similarity(1.0)
    # No quantizer was left switched off.
    assert layer.weight_fake_quant.is_active()


def test_easyquant_leaves_a_scale_that_no_candidate_betters():
    """Channels whose output is 0 whatever their scale."""
    quantizer = tritonq.FakeQuantize.with_args(
        observer=MinMaxObserver, dtype="qint8", qscheme=torch.per_channel_symmetric
    )
    layer = tritonq.nn.Linear(6, 3, bias=False, qconfig=tritonq.QConfig(nn.Identity, quantizer))
    with torch.no_grad():
        layer.weight[1] = 0
    x = torch.randn(16, 6)
    calibrate(layer, [x])
    scale = layer.weight_fake_quant.scale.clone()
    chosen = refine_scales(layer, [x])["weight_fake_quant"]
    assert chosen[1] == 1
    assert layer.weight_fake_quant.scale[1] == scale[1]


def test_easyquant_brings_every_layer_closer():
    model, data = calibrate(small_model(histogram_qconfig()), loader()), loader()
    x = data[0][0]
    before = copy.deepcopy(model)
    chosen = refine_scales(model, data, candidates=8)
    assert len(chosen) == 6
    assert chosen["0.weight_fake_quant"].shape == (6,)
    assert all(((factors >= 0.8) & (factors <= 1.2)).all() for factors in chosen.values())
    assert any((factors != 1).any() for factors in chosen.values())
    float_model = copy.deepcopy(model).eval()
    for quantizer in quantizers(float_model).values():
        quantizer.disable_fake_quant()
    expected = float_model(x)
    assert model.training
    assert cosine(model.eval()(x), expected) > cosine(before.eval()(x), expected) - 1e-4


@pytest.mark.parametrize("preset", ["w4_g32", "w4a8_g32"])
@pytest.mark.parametrize("outputs", [1, 6])
def test_easyquant_gives_all_groups_of_a_channel_one_factor(preset, outputs):
    layer = tritonq.nn.Linear(64, outputs, qconfig=tritonq.get_qconfig(preset))
    x = torch.randn(32, 64)
    calibrate(layer, [x])
    expected = nn.functional.linear(x, layer.weight, layer.bias).detach()
    before = layer.weight_fake_quant.scale.clone()
    factors = refine_scales(layer, [x])["weight_fake_quant"]
    rows = factors.view(outputs, 2)
    assert torch.equal(rows[:, 0], rows[:, 1])
    assert (factors != 1).any()
    assert torch.equal(layer.weight_fake_quant.scale, before * factors)
    refined = nn.functional.linear(x, layer.weight_fake_quant.eval()(layer.weight), layer.bias)
    layer.weight_fake_quant.scale.copy_(before)
    plain = nn.functional.linear(x, layer.weight_fake_quant(layer.weight), layer.bias)
    for channel in range(outputs):
        assert cosine(refined[:, channel], expected[:, channel]) >= cosine(plain[:, channel], expected[:, channel])


def test_easyquant_leaves_scales_that_are_computed_from_each_weight():
    """They are those of a paper's formula; the output's is refined."""
    layer = tritonq.nn.Linear(16, 4, qconfig=tritonq.get_qconfig("bwn_w1a8"))
    x = torch.randn(32, 16)
    calibrate(layer, [x])
    before = layer.weight_fake_quant.scale.clone()
    assert list(refine_scales(layer, [x])) == ["activation_post_process"]
    assert torch.equal(layer.weight_fake_quant.scale, before)


def test_easyquant_refines_the_grid_of_a_trained_width():
    layer = tritonq.nn.Linear(32, 4, qconfig=tritonq.get_qconfig("learned_bits_a8"))
    x = torch.randn(64, 32)
    calibrate(layer, [x])
    with torch.no_grad():
        layer.weight_fake_quant.bits.fill_(3.2)
    before = layer.weight_fake_quant.calculate_qparams().scale
    factors = refine_scales(layer, [x])["weight_fake_quant"]
    assert_close(layer.weight_fake_quant.calculate_qparams().scale, before * factors, FLOAT32)
    assert (factors != 1).any()


def test_easyquant_keeps_a_passive_observers_original_scale():
    qconfig = tritonq.QConfig(nn.Identity, tritonq.FakeQuantize.with_args(observer=PassiveObserver, dtype="qint8"))
    layer = tritonq.nn.Linear(8, 8, qconfig=qconfig)
    observer = layer.weight_fake_quant.activation_post_process
    observer.set_qparams(torch.tensor([0.01]))
    layer.weight_fake_quant.refresh_qparams()
    factor = refine_scales(layer, torch.randn(32, 8))["weight_fake_quant"]
    assert float(factor) != 1
    assert float(observer.original_scale) == pytest.approx(0.01)
    assert torch.equal(observer.scale, layer.weight_fake_quant.scale)
    assert float(observer.scale) == pytest.approx(0.01 * float(factor))
