"""Inputs kept for the backward as 8-bit codes: only where they can be rebuilt exactly, and without looking where an
operator has just rounded them."""

import copy

import pytest
import torch
from torch import nn

import tritonq
from quantizer_states import quantizer_state
from tritonq.functional import saved_input
from tritonq.functional.residual import residual_join
from tritonq.functional.saved_input import load_input, mark_on_grid, save_input
from tritonq.grid import Grid
from tritonq.nn.batch_norm_layer import QATBatchNormLayer
from tritonq.quantized_type import QINT8, QUINT8, QuantizedType
from tritonq.reference import input_codes


def on_grid(qtype, dtype=torch.float32, seed=0):
    """Values on a grid, and the grid."""
    generator = torch.Generator().manual_seed(seed)
    scale, zero = torch.tensor([0.0173]), torch.tensor([3], dtype=torch.int32)
    codes = torch.randint(qtype.quant_min, qtype.quant_max + 1, (4, 6, 5, 7), generator=generator)
    return ((codes - zero) * scale).to(dtype), Grid(scale, zero, qtype)


def seen(qtype):
    """A quantizer whose qparams rest on data."""
    return quantizer_state(qtype).with_range(has_data=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("qtype", [QINT8, QUINT8])
@pytest.mark.parametrize("marked", [False, True])
def test_codes_rebuild_the_input_exactly(qtype, dtype, marked):
    x, grid = on_grid(qtype, dtype)
    if marked:
        mark_on_grid(x, grid.scale, *seen(qtype))
    kept = save_input(x, grid)
    assert kept.values.dtype == torch.int8
    assert torch.equal(load_input(kept), x)
    assert torch.equal(load_input(kept, torch.empty_like(x, dtype=torch.float32)), x)


def test_an_input_off_the_grid_is_kept_itself():
    x, grid = on_grid(QINT8)
    x[0, 0, 0, 0] += 0.4 * grid.scale.item()
    assert save_input(x, grid).values is x
    x[0, 0, 0, 0] = torch.nan
    assert save_input(x.clone(), grid).scale is None


def test_an_input_on_a_grid_of_floats_is_kept_itself():
    """Marked or not: its codes are no integers."""
    grid = Grid(torch.tensor([0.1]), None, QuantizedType.of_floats("e4m3"))
    x = tritonq.functional.fake_quant.fake_quantize(torch.randn(50), grid)
    mark_on_grid(x, grid.scale, grid)
    assert save_input(x, grid).values is x


@pytest.fixture
def verified(monkeypatch):
    """How many times an input was compared with its codes."""
    calls = []
    is_exact = input_codes._is_exact
    monkeypatch.setattr(input_codes, "_is_exact", lambda *args: calls.append(1) or is_exact(*args))
    return calls


def test_a_marked_input_is_trusted(verified):
    x, grid = on_grid(QINT8)
    mark_on_grid(x, grid.scale, *seen(QINT8))
    save_input(x, grid)
    assert not verified
    save_input(x.clone(), grid)
    assert len(verified) == 1


def test_a_mark_does_not_outlive_the_values_or_the_scale(verified):
    x, grid = on_grid(QINT8)
    mark_on_grid(x, grid.scale, *seen(QINT8))
    x[0, 0, 0, 0] += 0.4 * grid.scale.item()
    assert save_input(x, grid).values is x
    x, grid = on_grid(QINT8)
    mark_on_grid(x, grid.scale, *seen(QINT8))
    grid.scale.mul_(1.01)
    assert save_input(x, grid).values is x
    x, grid = on_grid(QINT8)
    mark_on_grid(x, grid.scale.clone(), *seen(QINT8))
    save_input(x, grid)
    assert len(verified) == 3


def test_a_quantizer_that_is_off_marks_nothing(verified):
    x, grid = on_grid(QINT8)
    state = seen(QINT8)
    mark_on_grid(x, grid.scale, *state.with_grid(enabled=torch.zeros(1, dtype=torch.uint8)))
    unobserved = state.with_range(has_data=False, min_val=torch.tensor(torch.inf), max_val=torch.tensor(-torch.inf))
    mark_on_grid(x, grid.scale, *unobserved)
    save_input(x, grid)
    assert len(verified) == 1


def test_a_residual_join_marks_its_result(verified):
    state = quantizer_state(QINT8)
    a, b = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    y = residual_join(a.requires_grad_(), b, *state, None)
    kept = save_input(y, state.grid)
    assert not verified
    assert torch.equal(load_input(kept), y)


@pytest.fixture
def unreadable(monkeypatch):
    """As on a GPU, where looking at values waits for the device."""
    monkeypatch.setattr(saved_input, "is_readable", lambda tensor: False)


def test_where_nothing_can_be_read_only_marked_inputs_become_codes(unreadable, verified):
    x, grid = on_grid(QINT8)
    assert save_input(x, grid).values is x
    mark_on_grid(x, grid.scale, seen(QINT8))
    assert torch.equal(load_input(save_input(x, grid)), x)
    pooled = torch.nn.functional.max_pool2d(x, 2)
    assert save_input(pooled, grid).values is pooled
    assert not verified


@pytest.mark.parametrize("readable", [True, False])
@pytest.mark.parametrize("hooked", ["quantizer", "layer"])
def test_what_a_hook_makes_of_a_quantized_tensor_is_kept_itself(hooked, readable, monkeypatch):
    """Else the gradient of the next layer's weight would be that of another input."""
    torch.manual_seed(0)
    monkeypatch.setattr(saved_input, "is_readable", lambda tensor: readable)
    model = tritonq.prepare_qat(
        nn.Sequential(*(m for _ in range(2) for m in (nn.Conv2d(4, 4, 1, bias=False), nn.BatchNorm2d(4)))),
        example_inputs=torch.randn(2, 4, 5, 5),
    ).train()
    layers = [module for module in model.modules() if isinstance(module, QATBatchNormLayer)]
    source = layers[0].activation_post_process if hooked == "quantizer" else layers[0]
    model(torch.randn(2, 4, 5, 5))
    scale = layers[0].activation_post_process.scale
    source.register_forward_hook(lambda module, given, y: y + 0.3 * scale)
    gradients = []
    for saves_codes in (True, False):
        copied = copy.deepcopy(model)
        for layer in copied.modules():
            if isinstance(layer, QATBatchNormLayer):
                layer.save_input_codes = saves_codes
        copied(torch.randn(2, 4, 5, 5, generator=torch.Generator().manual_seed(1))).square().sum().backward()
        gradients.append([parameter.grad for parameter in copied.parameters()])
    for mine, expected in zip(*gradients, strict=True):
        assert torch.equal(mine, expected)


def test_a_chain_of_layers_keeps_codes_where_nothing_can_be_read(unreadable):
    torch.manual_seed(0)
    float_model = nn.Sequential(
        *(m for _ in range(3) for m in (nn.Conv2d(4, 4, 1, bias=False), nn.BatchNorm2d(4), nn.ReLU()))
    )
    x = torch.randn(2, 4, 5, 5)
    model = tritonq.prepare_qat(float_model, example_inputs=x).train()
    model(x)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.dtype) or t, lambda t: t):
        model(x)
    assert saved.count(torch.int8) == 3


def test_quantizers_made_in_inference_mode_run_outside_of_it():
    """Their buffers count no versions, as marks do."""
    x = torch.randn(2, 3, 4, 4)
    with torch.inference_mode():
        layer = tritonq.nn.Conv2d(3, 4, 3, qconfig=tritonq.get_qconfig())
        layer(x)
        expected = layer.eval()(x)
    with torch.no_grad():
        assert torch.equal(layer(x), expected)
