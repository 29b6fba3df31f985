"""Bits by budget."""

import itertools
from dataclasses import dataclass

import pytest
import torch
from torch import nn

import tritonq
from tritonq.accuracy.bit_allocation import allocate_bits, choose_widths

X = torch.randn(32, 3, 6, 6, generator=torch.Generator().manual_seed(4))


def net():
    """Small layers that matter much, and a large one that matters little."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 64, 3), nn.ReLU(), nn.Conv2d(64, 4, 1))
    return model.append(nn.Flatten()).append(nn.Linear(64, 3)).eval()


SIZES = {"0": 12, "2": 4 * 64 * 9, "4": 256, "6": 192}


def widths_of(mapping):
    return {rule.key: rule.qconfig.weight().qtype.bits for rule in mapping.names}


@torch.no_grad()
def output_noise(mapping):
    """Of the model with its weights alone rounded, relative to the outputs."""
    model = net()
    prepared = tritonq.calibrate(tritonq.prepare_qat(model, qconfig=mapping, example_inputs=X), X).eval()
    for name, module in prepared.named_modules():
        if hasattr(module, "disable_fake_quant") and not name.endswith("weight_fake_quant"):
            module.disable_fake_quant()
    return float((prepared(X) - model(X)).square().mean() / model(X).square().mean())


def test_it_beats_a_uniform_width_of_the_same_size():
    budget = sum(SIZES.values()) * 4 / 8
    mapping = allocate_bits(net(), X, budget)
    widths = widths_of(mapping)
    assert sum(SIZES[name] * bits / 8 for name, bits in widths.items()) <= budget
    assert len(set(widths.values())) > 1
    uniform = tritonq.QConfigMapping().set_global(tritonq.get_qconfig("lsq_w4a8"))
    assert output_noise(mapping) < 0.6 * output_noise(uniform)


@dataclass
class Scores:
    scores: torch.Tensor


class InADataclass(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = net()

    def forward(self, x):
        return Scores(self.net(x))


def test_outputs_in_a_dataclass_are_measured():
    budget = sum(SIZES.values()) * 4 / 8
    widths = widths_of(allocate_bits(InADataclass().eval(), X, budget))
    assert {name.removeprefix("net."): bits for name, bits in widths.items()} == widths_of(
        allocate_bits(net(), X, budget)
    )


class WithAFunction(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight, self.last = nn.Parameter(torch.randn(4, 3, 1, 1)), nn.Conv2d(4, 2, 1)

    def forward(self, x):
        return self.last(nn.functional.conv2d(x, self.weight))


def test_a_layer_that_is_not_counted_is_told():
    with pytest.warns(UserWarning, match="are not counted, and keep 8 bits: conv2d") as told:
        mapping = allocate_bits(WithAFunction().eval(), X, 8 * 4 / 8)
    assert told[0].filename == __file__
    assert widths_of(mapping) == {"last": 4}


def test_bit_operations_count_positions():
    # 6×6, 4×4, 4×4 and one position
    operations = {"0": 12 * 36, "2": 2304 * 16, "4": 256 * 16, "6": 192}
    budget = sum(operations.values()) * 3 * 8
    widths = widths_of(allocate_bits(net(), X, budget, unit="bit_operations", widths=(2, 3, 8)))
    spent = sum(operations[name] * bits * 8 for name, bits in widths.items())
    assert 0.85 * budget < spent <= budget
    with pytest.raises(ValueError, match="the smallest widths cost"):
        allocate_bits(net(), X, sum(operations.values()) * 2 * 8 - 1, unit="bit_operations", widths=(2, 3))


def test_float_formats_are_rounded_as_integers_are():
    formats = {4: "fp4_e2m1", 8: "fp8_e4m3"}

    def qconfig(bits, activation_bits):
        weight = tritonq.FloatFakeQuantize.with_args(format=formats[bits])
        return tritonq.QConfig(tritonq.get_qconfig().activation, weight)

    mapping = allocate_bits(net(), X, sum(SIZES.values()), widths=(4, 8), make_qconfig=qconfig)
    assert {rule.qconfig.weight().format for rule in mapping.names} == {"fp8_e4m3"}


def test_the_choice_is_the_best_of_all():
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        sizes = torch.randint(1, 40, (5,), generator=generator).tolist()
        costs = {str(i): {bits: size * bits for bits in (2, 4, 8)} for i, size in enumerate(sizes)}
        noise = torch.rand(5, generator=generator).tolist()
        errors = {str(i): {bits: value * 4.0**-bits for bits in (2, 4, 8)} for i, value in enumerate(noise)}
        budget = 4 * sum(sizes)

        def total(table, choice):
            return sum(table[str(i)][bits] for i, bits in enumerate(choice))

        allowed = [c for c in itertools.product((2, 4, 8), repeat=5) if total(costs, c) <= budget]
        best = min(total(errors, choice) for choice in allowed)
        found = choose_widths(costs, errors, budget)
        assert total(costs, found.values()) <= budget
        assert total(errors, found.values()) <= best * 1.02


def test_wrong_arguments():
    for arguments, message in (({"unit": "bits"}, "unit must be"), ({"widths": ()}, "widths must be")):
        with pytest.raises(ValueError, match=message):
            allocate_bits(net(), X, 1e9, **arguments)
    with pytest.raises(ValueError, match="more than the budget of nan"):
        allocate_bits(net(), X, float("nan"))
