"""Calibration and what follows it, with quantizers to float formats: alone, and beside integers."""

import pytest
import torch
from torch import nn

import tritonq
from tritonq.calibration import everything_float
from tritonq.float_fake_quantize import FloatFakeQuantize
from tritonq.recipes import EIGHT_BITS, FEW_BITS

PRESET = tritonq.get_qconfig()
BLOCKS = tritonq.get_qconfig("w_mxfp4").weight
MIXED = PRESET._replace(weight=BLOCKS)
X = torch.rand(40, 32, 5, 5, generator=torch.Generator().manual_seed(1)) * torch.linspace(5, 1, 40).view(-1, 1, 1, 1)


def float_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(32, 32, 1), nn.ReLU(), nn.Conv2d(32, 8, 1)).eval()


def prepared(qconfig):
    return tritonq.prepare_qat(float_model(), qconfig=qconfig, example_inputs=X[:2])


def test_scales_of_fp8_cover_all_the_data():
    """There are more batches than the history holds, and the first ones are the largest."""
    model = tritonq.calibrate(prepared(tritonq.get_qconfig("fp8_e4m3")), X.split(2))
    assert float(model[0].input_fake_quant.scale) == pytest.approx(float(X.max()) / 448)
    expected = float_model()[:2](X).max() / 448
    assert float(model[0].activation_post_process.scale) == pytest.approx(float(expected), rel=1e-5)
    quantizers = [module for module in model.modules() if isinstance(module, FloatFakeQuantize)]
    assert all(q.rounds() and not bool(q.observer_enabled) for q in quantizers)
    assert tritonq.verify(model, tritonq.convert(model), X).agrees()


def test_data_that_say_nothing_leave_float_formats_as_they_were():
    model = prepared(tritonq.get_qconfig("fp8_e4m3"))
    with pytest.raises(ValueError, match=r"saw no finite value.*0\.input_fake_quant"):
        tritonq.calibrate(model, torch.full_like(X, torch.nan))
    assert bool(model[0].weight_fake_quant.observer_enabled)
    assert not bool(model[0].input_fake_quant.amax_history.any())


@pytest.mark.parametrize("qconfig", [tritonq.get_qconfig("w_mxfp4"), tritonq.get_qconfig("nvfp4"), MIXED])
def test_no_quantizer_rounds_in_what_counts_as_float(qconfig):
    model = tritonq.calibrate(prepared(qconfig), X)
    rounded, expected = model.eval()(X), float_model()(X)
    with everything_float(model):
        torch.testing.assert_close(model(X), expected)
    assert torch.equal(model(X), rounded)
    assert (rounded - expected).abs().max() > 0.01


def test_biases_make_up_for_weights_in_blocks():
    model = tritonq.calibrate(prepared(MIXED), X).eval()
    expected = float_model()(X).mean((0, 2, 3))
    before = (model(X).mean((0, 2, 3)) - expected).abs().max()
    tritonq.correct_bias(model, X)
    assert (model(X).mean((0, 2, 3)) - expected).abs().max() < 0.2 * before


def test_what_is_for_integers_alone_says_so():
    model = tritonq.calibrate(prepared(tritonq.get_qconfig("w_mxfp4")), X)
    with pytest.raises(ValueError, match="adaptive_round is for integer codes, and layer '0' has weights in mxfp4"):
        tritonq.adaptive_round(model, X)
    with pytest.raises(ValueError, match=r"no quantizer of integers with a range to refine.*scales of float formats"):
        tritonq.refine_scales(model, X)
    with pytest.raises(ValueError, match="no fake quantizer of integers"):
        tritonq.QuantizerHistory(model)


@pytest.mark.parametrize(
    ("name", "recipe"), [("w_mxfp4", FEW_BITS), ("nvfp4", FEW_BITS), ("mxfp8", EIGHT_BITS), ("fp8_e4m3", EIGHT_BITS)]
)
def test_recipes_count_the_bits_of_elements(name, recipe):
    assert tritonq.recipe_for(tritonq.get_qconfig(name)) == recipe
