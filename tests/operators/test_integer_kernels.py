"""Layers by torch's 8-bit kernels give the codes of the formula in floating point, bit for bit."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

import tritonq
from tritonq.deploy.modules import (
    CodeTypes,
    QuantizedConv1d,
    QuantizedConv2d,
    QuantizedConv3d,
    QuantizedLinear,
    Quantizer,
)
from tritonq.functional import integer_kernels
from tritonq.functional.codes import can_use_codes, code_range, give_codes, take_codes
from tritonq.functional.host_grid import host_grid
from tritonq.grid import Grid
from tritonq.quantized_type import QuantizedType
from tritonq.reference.eval_codes import codes_of_steps

UNSIGNED, SIGNED = QuantizedType(0, 255, False), QuantizedType(-128, 127)
WEIGHT = QuantizedType.of(8, narrow=True, axis=0)

pytestmark = pytest.mark.skipif(
    not integer_kernels.has_integer_kernels(), reason="this CPU's 8-bit products saturate, or torch has no kernels"
)

# Class, arguments, input shape.
LAYERS = {
    "1x1": (QuantizedConv2d, {"in_channels": 8, "out_channels": 6, "kernel_size": 1}, (2, 8, 5, 4)),
    "3x3 strided": (
        QuantizedConv2d,
        {"in_channels": 8, "out_channels": 5, "kernel_size": 3, "stride": 2, "padding": 1},
        (2, 8, 7, 6),
    ),
    "depthwise": (
        QuantizedConv2d,
        {"in_channels": 8, "out_channels": 8, "kernel_size": 3, "padding": 1, "groups": 8},
        (2, 8, 7, 6),
    ),
    "dilated groups": (
        QuantizedConv2d,
        {"in_channels": 8, "out_channels": 4, "kernel_size": 3, "dilation": 2, "padding": 2, "groups": 2},
        (1, 8, 9, 6),
    ),
    "same": (
        QuantizedConv2d,
        {"in_channels": 3, "out_channels": 4, "kernel_size": 4, "padding": "same"},
        (1, 3, 9, 6),
    ),
    "unbatched": (QuantizedConv2d, {"in_channels": 3, "out_channels": 4, "kernel_size": 3}, (3, 9, 6)),
    "1d": (QuantizedConv1d, {"in_channels": 6, "out_channels": 4, "kernel_size": 3, "padding": 1}, (2, 6, 9)),
    "3d": (QuantizedConv3d, {"in_channels": 3, "out_channels": 4, "kernel_size": 2, "padding": 1}, (2, 3, 4, 5, 3)),
    "linear": (QuantizedLinear, {"in_features": 40, "out_features": 7}, (2, 3, 40)),
    "wide sums": (QuantizedConv2d, {"in_channels": 1600, "out_channels": 3, "kernel_size": 1}, (1, 1600, 3, 3)),
    "wide linear": (QuantizedLinear, {"in_features": 2000, "out_features": 4}, (5, 2000)),
}
# Type and zero point of input and output, and the ceiling of a ReLU.
ENDS = {
    "affine": ((UNSIGNED, 77), (UNSIGNED, 121), None),
    "relu": ((UNSIGNED, 0), (UNSIGNED, 0), float("inf")),
    "signed relu6": ((SIGNED, 0), (SIGNED, 0), 6.0),
    "narrow relu": ((UNSIGNED, 3), (QuantizedType(-7, 7), 0), float("inf")),
    "half away": ((UNSIGNED, 9), (QuantizedType(-128, 127, rounding="half_away"), 0), None),
    "values": ((UNSIGNED, 77), None, 6.0),
}


def quantizer(qtype, zero, scale=0.05):
    return Quantizer(qtype, torch.tensor([scale]), torch.tensor([zero], dtype=torch.int32))


def make_layer(name, ends, largest_bias=40000, spread=127):
    """A layer of random codes whose results fill the output's range, and a float input on its grid."""
    cls, geometry, shape = LAYERS[name]
    source, output, ceiling = ENDS[ends]
    torch.manual_seed(0)
    with torch.device("meta"):
        weight = cls.float_type(**geometry).weight
    codes = torch.randint(-spread, spread + 1, weight.shape, dtype=torch.int8)
    bias = torch.randint(-largest_bias, largest_bias + 1, (len(codes),), dtype=torch.int32)
    scale, input_scale = torch.rand(len(codes)) * 1e-3 + 1e-4, torch.tensor([0.03])
    tensors = {
        "weight": codes,
        "weight_scale": scale,
        "bias": bias,
        "multiplier": scale * input_scale,
        "input_scale": input_scale,
        "input_zero_point": torch.tensor([source[1]], dtype=torch.int32),
    }
    out = None if output is None else quantizer(*output)
    layer = cls(geometry, CodeTypes(WEIGHT, source[0]), tensors, ceiling, out)
    return layer, quantizer(*source, scale=0.03)(torch.randn(shape) * 3)


def by_formula(layer, x, monkeypatch):
    """What the layer gives by the operators on floating-point integers."""
    with monkeypatch.context() as patch:
        patch.setattr("tritonq.deploy.modules.can_use_codes", lambda x: False)
        return layer(x)


@pytest.mark.parametrize("ends", ENDS)
@pytest.mark.parametrize("name", LAYERS)
def test_layer_equals_formula(name, ends, monkeypatch):
    layer, x = make_layer(name, ends)
    expected, found = by_formula(layer, x, monkeypatch), layer(x)
    assert layer._packed._value is not None
    assert torch.equal(expected, found)
    assert found.stride() == expected.stride()
    assert found.std() > 0


@pytest.mark.parametrize("bias", [2**24 + 1, 2**30])
@pytest.mark.parametrize("name", ["3x3 strided", "wide sums", "linear"])
def test_large_biases_are_added_exactly(name, bias, monkeypatch):
    layer, x = make_layer(name, "values", bias)
    assert torch.equal(by_formula(layer, x, monkeypatch), layer(x))


def test_sums_beyond_float32_are_exact(monkeypatch):
    layer, x = make_layer("wide sums", "values")
    assert layer.integer_layer().sum_bound > 2**24
    layer.ceiling = None
    layer.stored_weight.fill_(127)
    x = x.fill_(float(x.max()))
    expected, found = by_formula(layer, x, monkeypatch), layer(x)
    assert float(expected.max() / layer.multiplier.max()) > 2**24
    assert torch.equal(expected, found)


@pytest.mark.parametrize("value", [1e3, -1e3, float("nan"), float("inf")])
def test_values_beyond_the_grid_are_not_clipped(value, monkeypatch):
    layer, x = make_layer("1x1", "affine")
    x[0, 0, 0, 0] = value
    assert torch.equal(by_formula(layer, x, monkeypatch).isnan(), layer(x).isnan())
    assert torch.equal(by_formula(layer, x, monkeypatch).nan_to_num(), layer(x).nan_to_num())


@pytest.mark.parametrize("name", ["3x3 strided", "depthwise"])
def test_memory_format_follows_the_input(name, monkeypatch):
    layer, x = make_layer(name, "affine")
    x = x.contiguous(memory_format=torch.channels_last)
    found = layer(x)
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(by_formula(layer, x, monkeypatch), found)


@pytest.mark.parametrize("name", ["1x1", "3x3 strided", "depthwise", "1d", "linear", "wide linear"])
def test_weights_may_lie_in_any_order(name, monkeypatch):
    # An orthogonal parametrization makes transposed matrices, and so do users who tie layers.
    layer, x = make_layer(name, "affine")
    backwards = tuple(reversed(range(layer.stored_weight.dim())))
    layer.keep(weight=layer.stored_weight.permute(backwards).contiguous().permute(backwards))
    assert torch.equal(by_formula(layer, x, monkeypatch), layer(x))


def test_inputs_of_many_sizes(monkeypatch):
    layer, _ = make_layer("3x3 strided", "affine")
    for size in [*range(3, 14), 3]:
        x = quantizer(*ENDS["affine"][0], scale=0.03)(torch.randn(2, 8, size, size) * 3)
        assert torch.equal(by_formula(layer, x, monkeypatch), layer(x))


def test_packed_weight_follows_its_sources():
    layer, x = make_layer("3x3 strided", "affine")
    before = layer(x)
    layer.stored_weight.neg_()
    changed = layer(x)
    assert not torch.equal(before, changed)
    layer.load_state_dict({**layer.state_dict(), "weight": -layer.stored_weight})
    assert torch.equal(layer(x), before)
    layer.activation_post_process.scale.mul_(2)
    assert not torch.equal(layer(x), before)
    layer.ceiling = float("inf")
    assert layer(x).min() >= 0


def test_packed_weight_is_no_state():
    layer, x = make_layer("3x3 strided", "affine")
    keys, before = list(layer.state_dict()), layer(x)
    assert list(layer.state_dict()) == keys
    file = io.BytesIO()
    torch.save(layer, file)
    loaded = torch.load(io.BytesIO(file.getvalue()), weights_only=False)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), loaded, layer.to(torch.float32)):
        assert torch.equal(twin(x), before)
    twin = copy.deepcopy(layer)
    twin.stored_weight.neg_()
    assert not torch.equal(twin(x), before)
    assert torch.equal(layer(x), before)


def test_hooks_of_the_output_quantizer_run():
    layer, x = make_layer("3x3 strided", "affine")
    before, heard = layer(x), []
    handle = layer.activation_post_process.register_forward_hook(lambda module, args, result: heard.append(result))
    assert torch.equal(layer(x), before)
    handle.remove()
    assert torch.equal(heard[0], before)
    layer.activation_post_process.register_forward_pre_hook(lambda module, args: (args[0] * 0,))
    assert layer(x).abs().max() == 0


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.filterwarnings("ignore:Converting a tensor to a Python")
def test_gradients_and_transforms_take_the_formula():
    layer, x = make_layer("3x3 strided", "affine")
    assert can_use_codes(x)
    assert not can_use_codes(x.clone().requires_grad_())
    assert not can_use_codes(x.double())
    assert torch.equal(torch.vmap(layer)(x.unsqueeze(1)).squeeze(1), layer(x))
    assert torch.equal(torch.jit.trace(layer, x)(x), layer(x))


def test_codes_carried_by_a_tensor_count_while_it_is_unchanged():
    grid = host_grid(Grid(torch.tensor([0.5]), torch.tensor([3], dtype=torch.int32), UNSIGNED))
    codes = torch.tensor([0, 3, 255], dtype=torch.uint8)
    x = give_codes(codes, grid, torch.empty(3))
    assert x.tolist() == [-1.5, 0.0, 126.0]
    assert take_codes(x, grid) is codes
    assert take_codes(x, grid._replace(scale=1.0)) is not codes
    x.mul_(0)
    assert take_codes(x, grid).tolist() == [3, 3, 3]


@pytest.mark.parametrize("rounding", ["half_even", "half_away"])
@pytest.mark.parametrize("in_one_pass", [True, False])
@pytest.mark.parametrize("far", [1e9, 3e38])
def test_codes_round_as_the_quantizer(rounding, in_one_pass, far, monkeypatch):
    if not in_one_pass:
        monkeypatch.setattr("tritonq.reference.eval_codes.has_one_pass_rounding", lambda bounded: False)
    qtype = QuantizedType(-20, 200, False, rounding=rounding)
    fixed = Quantizer(qtype, torch.ones(1), torch.tensor([7], dtype=torch.int32))
    steps = torch.cat([torch.arange(-600, 600) / 2, torch.tensor([far, -far])])
    to = code_range(host_grid(fixed.grid()), low=4, high=210, largest_step=far)
    codes = codes_of_steps(steps.clone(), to)
    expected = ((fixed(steps) + 7) + 20).clamp(4, 210)
    assert torch.equal(codes.float(), expected)


def test_ordinary_layers_and_sums_are_known_to_fit_int32(monkeypatch):
    # Without that some versions of torch take two passes more.
    asked = []
    monkeypatch.setattr("tritonq.reference.eval_codes.has_one_pass_rounding", lambda bounded: asked.append(bounded))

    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)

        def forward(self, x):
            x = self.first(x)
            return x + self.second(x)

    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    model = tritonq.prepare_qat(Residual(), example_inputs=x).train()
    model(x)
    tritonq.convert(model.eval())(x)
    assert len(asked) >= 3
    assert all(asked)


def test_a_cpu_without_exact_products_computes_by_formula(monkeypatch):
    layer, x = make_layer("3x3 strided", "affine")
    expected = layer(x)
    monkeypatch.setattr(integer_kernels, "has_integer_kernels", lambda: False)
    twin = copy.deepcopy(layer)
    assert torch.equal(twin(x), expected)
    assert twin._packed._value is None


def test_no_convolution_in_float64():
    layer, x = make_layer("wide sums", "affine")
    layer = nn.Sequential(layer)
    with torch.profiler.profile() as profile:
        layer(x)
    names = {event.key for event in profile.key_averages()}
    assert "onednn::qconv2d_pointwise" in names
    assert not any("slow_conv" in name or name == "aten::convolution" for name in names)
