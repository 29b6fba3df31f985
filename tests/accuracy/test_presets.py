"""Presets of few bits, and their mappings."""

import pytest
import torch
from torch import nn

import tritonq
from tritonq.qconfig import PRESETS
from tritonq.recipes import EIGHT_BITS, FEW_BITS, recipe_for

X = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(1))
LSQ = [name for name in PRESETS if name.startswith("lsq_")]


def net():
    torch.manual_seed(0)
    stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
    body = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
    return nn.Sequential(stem, body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))


@pytest.mark.parametrize("name", LSQ)
def test_inner_layers_have_few_bits_and_the_edges_eight(name):
    model = tritonq.prepare_qat(net(), qconfig=tritonq.get_qconfig_mapping(name), example_inputs=X)
    weights, activations = (int(bits) for bits in name.removeprefix("lsq_w").split("a"))
    layers = {layer: part for layer, part in model.named_modules() if isinstance(part, tritonq.nn.QATLayer)}
    bits = {layer: part.weight_fake_quant.qtype.bits for layer, part in layers.items()}
    assert bits == {"0.0": 8, "1.0": weights, "4": 8}
    found = {layer: part.activation_post_process.qtype.bits for layer, part in layers.items()}
    assert found == {"0.0": activations, "1.0": activations, "4": 8}
    assert layers["0.0"].input_fake_quant.qtype.bits == layers["4"].input_quantizer.qtype.bits == 8
    assert layers["1.0"].mode == "scale"
    for _ in range(2):
        model.train()(X).square().sum().backward()
    report = tritonq.verify(model.eval(), tritonq.convert(model), X)
    assert report.agrees()
    assert report.outputs.largest == 0


def test_other_presets_hold_everywhere_and_names_are_checked():
    assert tritonq.get_qconfig_mapping() == tritonq.QConfigMapping().set_global(tritonq.get_qconfig())
    with pytest.raises(ValueError, match=r"unknown preset .lsq_w5a5.*lsq_w4a4"):
        tritonq.get_qconfig_mapping("lsq_w5a5")


def test_recipes_follow_the_fewest_bits():
    eight = tritonq.get_qconfig()
    assert recipe_for(eight) == recipe_for(tritonq.get_qconfig_mapping("lsq_w8a8")) == EIGHT_BITS
    assert recipe_for(tritonq.get_qconfig("f8net")) == EIGHT_BITS
    for few in ("lsq_w4a8", "lsq_w2a2", "megengine_lowbit"):
        assert recipe_for(tritonq.get_qconfig_mapping(few)) == FEW_BITS
    mixed = tritonq.QConfigMapping().set_global(eight).set_last_layer(None)
    assert recipe_for(mixed) == EIGHT_BITS
    assert recipe_for(mixed.set_module_name("a", tritonq.get_qconfig("lsq_w4a4"))) == FEW_BITS
    with pytest.raises(TypeError, match="must be a QConfig"):
        recipe_for("lsq_w4a4")
