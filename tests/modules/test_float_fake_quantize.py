"""Fake quantizers to floats: amax history, switches, models of the four presets, torch.compile, refusals."""

from __future__ import annotations

import copy
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import tritonq
from tolerances import FLOAT32
from tritonq import FloatFakeQuantize, fake_quantize_float
from tritonq.formats import BLOCK_FORMATS, ELEMENT_FORMATS

PRESETS = ("fp8_e4m3", "mxfp8", "mxfp4", "nvfp4")


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def model() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 40, 3), nn.BatchNorm2d(40), nn.ReLU(), nn.Conv2d(40, 8, 3), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))


@pytest.fixture(scope="module", params=PRESETS)
def trained(request: pytest.FixtureRequest) -> nn.Module:
    """A model after three steps, in training mode."""
    x = normal(4, 3, 12, 12)
    qat = tritonq.prepare_qat(model(), qconfig=tritonq.get_qconfig(request.param), example_inputs=x).train()
    optimizer = torch.optim.SGD(qat.parameters(), 0.1)
    for _ in range(3):
        qat(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return qat


def test_the_scale_follows_from_the_history() -> None:
    quantizer = FloatFakeQuantize("fp8_e4m3", history=3)
    for step, largest in enumerate([8.0, 2.0, 1.0, 4.0]):
        x = normal(50).clamp(-1, 1) / 2
        x[3] = -largest
        y = quantizer(x)
        expected = max([8.0, 2.0, 1.0, 4.0][max(0, step - 2) : step + 1]) / 448
        assert quantizer.scale.item() == pytest.approx(expected, rel=FLOAT32.rtol)
        assert torch.equal(y, fake_quantize_float(x, "fp8_e4m3", quantizer.scale))
    before = quantizer.scale.clone()
    quantizer.disable_observer()
    quantizer(torch.full((3,), 100.0))
    quantizer.eval().enable_observer()
    quantizer(torch.full((3,), 100.0))
    assert torch.equal(quantizer.scale, before)


def test_a_scale_per_channel_and_values_that_are_not_finite() -> None:
    quantizer = FloatFakeQuantize("fp8_e5m2", ch_axis=1)
    x = normal(4, 3, 5)
    x[0, 1, 2], x[1, 2] = float("inf"), 0.0
    x[:, 2] = 0.0
    y = quantizer(x)
    largest = x.abs().nan_to_num(0, 0).amax((0, 2))
    assert torch.equal(quantizer.scale[:2], (largest / 57344)[:2])
    assert quantizer.scale[2] == 1
    assert torch.equal(y, fake_quantize_float(x, "fp8_e5m2", quantizer.scale, axis=1))
    loaded = FloatFakeQuantize("fp8_e5m2", ch_axis=1)
    loaded.load_state_dict(quantizer.state_dict())
    assert torch.equal(loaded.eval()(x), quantizer.eval()(x))


@pytest.mark.parametrize("format", [*ELEMENT_FORMATS, *BLOCK_FORMATS])
def test_switches_and_gradients(format: str) -> None:
    quantizer, x = FloatFakeQuantize(format, history=1), normal(3, 40).requires_grad_()
    y = quantizer(x)
    assert not torch.equal(y, x)
    y.sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))
    quantizer.disable_fake_quant()
    assert torch.equal(quantizer(x), x)
    half = quantizer.half()
    assert {buffer.dtype for buffer in half.buffers()} <= {torch.float32, torch.uint8}


def test_blocks_run_along_the_channels() -> None:
    for shape, axis in (((2, 40, 3, 3), 1), ((2, 5, 40), 2), ((3, 40), 1)):
        x = normal(*shape)
        assert torch.equal(FloatFakeQuantize("mxfp4")(x), fake_quantize_float(x, "mxfp4", axis=axis))


def test_what_has_observed_nothing_passes_values_and_says_so() -> None:
    quantizer = FloatFakeQuantize("fp8_e4m3").eval()
    with pytest.warns(UserWarning, match="observed nothing"):
        y = quantizer(torch.tensor([0.123]))
    assert y == 0.123
    assert FloatFakeQuantize("mxfp4").eval()(torch.tensor([0.1, 6.0])).tolist() == [0.0, 6.0]


def test_training_reaches_every_quantizer(trained: nn.Module) -> None:
    quantizers = [module for module in trained.modules() if isinstance(module, FloatFakeQuantize)]
    assert len(quantizers) >= 8
    scales = [quantizer.scale for quantizer in quantizers if quantizer.has_observed_scale]
    assert all(bool((scale != 1).any()) for scale in scales)
    evaluated = copy.deepcopy(trained).eval()
    x = normal(4, 3, 12, 12)
    rounded = evaluated(x)
    tritonq.disable_fake_quant(evaluated)
    assert 1e-4 < float((rounded - evaluated(x)).abs().max()) < 0.2
    assert quantizers[0].format in str(tritonq.summary(trained))


def test_compiled_models_compute_the_same(trained: nn.Module) -> None:
    x = normal(4, 3, 12, 12)
    for qat in (copy.deepcopy(trained), copy.deepcopy(trained).eval()):
        compiled = torch.compile(copy.deepcopy(qat), backend="aot_eager", fullgraph=True)
        assert torch.equal(compiled(x), qat(x))
    torch.compiler.reset()


def test_blocks_of_activations_have_no_deployed_form(trained: nn.Module) -> None:
    if trained[0].weight_fake_quant.qtype is not None:
        assert tritonq.convert(copy.deepcopy(trained)) is not None
        return
    with pytest.raises(ValueError, match="no deployed form"):
        tritonq.convert(copy.deepcopy(trained))


def test_more_bits_are_closer() -> None:
    x = normal(64, 64)
    errors = [float((fake_quantize_float(x, name) - x).norm()) for name in ("mxfp4", "nvfp4", "mxfp6_e2m3")]
    assert all(worse > better for worse, better in pairwise(errors))


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="mxfp4"):
        FloatFakeQuantize("fp5")
    with pytest.raises(ValueError, match="history"):
        FloatFakeQuantize("fp8_e4m3", history=0)
    with pytest.raises(ValueError, match="block formats"):
        FloatFakeQuantize("fp8_e4m3", scale_rounding="ceil")
    for format in ("fp8_e4m3", "mxfp4"):
        with pytest.raises(ValueError, match="axis 2 is out of range"):
            FloatFakeQuantize(format, ch_axis=2)(torch.ones(3, 4))


@pytest.mark.parametrize("preset", ["fp8_e4m3", "w_nvfp4"])
def test_a_layer_of_zeros_has_been_observed(preset: str) -> None:
    net, x = nn.Sequential(nn.Linear(16, 8)), normal(2, 16)
    nn.init.zeros_(net[0].weight)
    qat = tritonq.prepare_qat(net, qconfig=tritonq.get_qconfig(preset), example_inputs=x).train()
    qat(x)
    assert torch.equal(tritonq.convert(qat)(x), qat.eval()(x))
    quantizer = FloatFakeQuantize("fp8_e4m3")
    quantizer(torch.full((2,), torch.nan))
    assert not quantizer.rounds()
    quantizer(torch.zeros(2))
    assert quantizer.rounds()
    assert quantizer(torch.tensor([448.0, 0.3])).tolist() == [448.0, 0.3125]


def test_scales_per_channel_of_activations_are_found_after_preparing() -> None:
    make = FloatFakeQuantize.with_args(format="fp8_e4m3")
    qconfig = tritonq.QConfig(make.with_args(ch_axis=1), make.with_args(ch_axis=0))
    net = nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU(), nn.Conv2d(5, 4, 1))
    x = normal(2, 3, 6, 6)
    qat = tritonq.prepare_qat(net, qconfig=qconfig, example_inputs=x).train()
    qat(x)
    outputs = [module.activation_post_process for module in qat.modules() if isinstance(module, tritonq.nn.QATLayer)]
    assert [len(quantizer.scale) for quantizer in outputs] == [5, 4]


def test_another_number_of_channels_forgets_that_a_scale_is_known() -> None:
    quantizer = FloatFakeQuantize("fp8_e4m3", ch_axis=1)
    quantizer(1000 * normal(4, 3))
    quantizer.eval()(normal(4, 3))
    x = 1000 * normal(4, 5)
    with pytest.warns(UserWarning, match="has observed nothing"):
        assert torch.equal(quantizer(x), x)
    assert not quantizer.rounds()


def test_a_history_is_a_whole_number() -> None:
    assert len(FloatFakeQuantize("fp8_e4m3", history=np.int64(3)).amax_history) == 3  # type: ignore[arg-type]
    for history in (True, 2.0, 0):
        with pytest.raises(ValueError, match="history must be a positive number of batches"):
            FloatFakeQuantize("fp8_e4m3", history=history)  # type: ignore[arg-type]
