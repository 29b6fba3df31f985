"""Damping and freezing of oscillating weights."""

import copy

import pytest
import torch
from torch import nn

import tritonq
from tolerances import TRAINED, assert_close
from tritonq.accuracy.oscillation import OscillationFreezing, oscillation_dampening

WEIGHT = tritonq.LearnedStepFakeQuantize.with_args(dtype="qint4", qscheme=torch.per_channel_symmetric)


def linear(values, scale=(0.5, 0.25)):
    layer = tritonq.nn.Linear(3, 2, bias=False, qconfig=tritonq.QConfig(nn.Identity, WEIGHT))
    layer(torch.ones(1, 3))
    with torch.no_grad():
        layer.weight.copy_(torch.tensor(values))
        layer.weight_fake_quant.scale.copy_(torch.tensor(scale))
    return layer


def test_damping_is_the_formula():
    layer = linear([[0.3, -0.6, 9.0], [0.1, 0.26, -5.0]])
    loss = oscillation_dampening(layer)
    scale = torch.tensor([[0.5], [0.25]])
    weight = layer.weight.detach().clone().requires_grad_()
    rounded = ((weight / scale).round().clamp(-8, 7) * scale).detach()
    expected = (rounded - weight.clamp(-8 * scale, 7 * scale)).square().sum()
    torch.testing.assert_close(loss, expected)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(layer.weight.grad, weight.grad)
    assert layer.weight_fake_quant.scale.grad is None
    assert layer.weight.grad[0, 2] == 0


@pytest.mark.parametrize("folding", ["approximate", "scale"])
def test_damping_draws_weights_to_their_codes_through_a_batch_norm(folding):
    torch.manual_seed(0)
    qconfig = tritonq.QConfig(nn.Identity, WEIGHT, folding=folding)
    layer = tritonq.nn.ConvBn2d(3, 4, 1, qconfig=qconfig)
    with torch.no_grad():
        layer.bn.weight.copy_(torch.tensor([1.0, -0.5, 2.0, 0.3]))
    layer(torch.randn(8, 3, 4, 4))
    before = float(oscillation_dampening(layer))
    optimizer = torch.optim.SGD([layer.weight], 0.3)
    for _ in range(60):
        optimizer.zero_grad()
        oscillation_dampening(layer).backward()
        optimizer.step()
    assert float(oscillation_dampening(layer)) < 0.05 * before


def test_freezing_is_the_algorithm():
    layer = linear([[0.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    freezing = OscillationFreezing(layer, threshold=0.3, momentum=0.2)
    # codes of one weight that turns in every step, of one that climbs, and of one that turns once
    paths = [[1, 0, 1, 0, 1, 0, 1, 0], [0, 1, 2, 3, 4, 5, 6, 7], [0, 1, 1, 0, 0, 0, 0, 0]]
    frequency, average, last, direction, frozen_at = 0.0, 1.0, 1, 0, None
    for step, codes in enumerate(zip(*paths, strict=True)):
        with torch.no_grad():
            layer.weight[0] = 0.5 * torch.tensor([float(code) for code in codes])
        freezing.step()
        if step and frozen_at is None:  # the algorithm, by hand, for the first weight
            change = codes[0] - last
            turned = float(change != 0 and direction != 0 and change != direction)
            last, direction = codes[0], change or direction
            frequency = 0.2 * turned + 0.8 * frequency
            average = 0.2 * codes[0] + 0.8 * average
            if frequency > 0.3:
                frozen_at = (step, round(average))
    assert frozen_at is not None
    assert frozen_at[0] < 7
    assert freezing.frozen_share() == 1 / 6
    assert layer.weight[0].tolist() == [0.5 * frozen_at[1], 3.5, 0.0]
    with torch.no_grad():
        layer.weight_fake_quant.scale[0] = 0.7
        layer.weight[0, 0] = -3.0
    again = OscillationFreezing(layer, threshold=0.3, momentum=0.2)
    again.load_state_dict(copy.deepcopy(freezing.state_dict()))
    again.step()
    assert float(layer.weight[0, 0].detach()) == pytest.approx(0.7 * frozen_at[1])


@pytest.mark.parametrize("folding", ["approximate", "scale"])
def test_frozen_weights_keep_their_codes_in_training(folding):
    torch.manual_seed(0)
    qconfig = tritonq.get_qconfig("lsq_w2a2")._replace(folding=folding, activation=nn.Identity)
    layer = tritonq.nn.ConvBn2d(3, 4, 3, qconfig=qconfig)
    freezing, base = OscillationFreezing(layer, threshold=0.05, momentum=0.1), layer.weight.detach().clone()
    x = torch.randn(8, 3, 6, 6)
    for step in range(8):
        layer(x)  # the statistics move
        with torch.no_grad():
            layer.weight.copy_(base * (-1) ** step)
        freezing.step()
    assert freezing.frozen_share() > 0.2
    memory = freezing.state_dict()[""]
    rows, grid = layer.weight_to_quantize().detach(), layer.weight_fake_quant.grid()
    codes = rows / grid.scale.detach().view(-1, 1, 1, 1)
    assert_close(codes[memory["frozen"]], memory["codes"][memory["frozen"]], TRAINED)


def test_a_kept_state_is_of_its_step_and_loads_to_the_models_device():
    layer = linear([[0.5, 1.0, 1.5]] * 2)
    freezing = OscillationFreezing(layer, threshold=1.0, momentum=0.2)
    for turned in range(3):
        with torch.no_grad():
            layer.weight[0, 0] = 0.5 * (turned % 2)
        freezing.step()
    kept = freezing.state_dict()
    before = copy.deepcopy(kept)
    with torch.no_grad():
        layer.weight[0, 0] = 0.5
    freezing.step()
    assert all(torch.equal(kept[""][name], value) for name, value in before[""].items())
    layer.to("meta")
    freezing.load_state_dict(kept)
    assert {value.device.type for value in freezing.state_dict()[""].values()} == {"meta"}
    with pytest.raises(ValueError, match="no layer 'head'"):
        freezing.load_state_dict({"head": kept[""]})


def test_wrong_arguments():
    with pytest.raises(ValueError, match="threshold must be in"):
        OscillationFreezing(linear([[0.0] * 3] * 2), threshold=0)
    with pytest.raises(ValueError, match="call prepare_qat"):
        OscillationFreezing(nn.Linear(2, 2))


def test_weights_that_are_not_rounded_to_the_nearest_code_are_refused() -> None:
    x = torch.rand(8, 3, 6, 6)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1))
    model = tritonq.prepare_qat(net, qconfig=tritonq.get_qconfig_mapping("dorefa_w2a2"), example_inputs=x)
    model(x)
    for attempt in (
        lambda: tritonq.oscillation_dampening(model),
        lambda: tritonq.OscillationFreezing(model),
        lambda: tritonq.adaptive_round(model, x, steps=2),
    ):
        with pytest.raises(ValueError, match="DoReFaWeight, of layer '2'"):
            attempt()
