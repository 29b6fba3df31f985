"""Sums, products and means of codes are those of the formula, over all pairs of codes."""

import pytest
import torch
from torch import nn

from tritonq import nn as qnn
from tritonq.deploy.modules import Quantizer
from tritonq.functional import coded_joins, codes
from tritonq.functional.coded_tensor import memory_format_of
from tritonq.functional.codes import give_codes, take_codes
from tritonq.functional.host_grid import host_grid
from tritonq.nn.functions import FunctionLayer
from tritonq.quantized_type import QuantizedType
from tritonq.reference.average_pool import AxesAverage
from tritonq.reference.functions import Function

UNSIGNED, SIGNED = QuantizedType(0, 255, False), QuantizedType(-128, 127)
KINDS = {"add": qnn.Add, "sub": qnn.Sub, "mul": qnn.Mul}
# Scales of the operands and the result; some make ties.
SCALES = [(0.5, 0.25, 0.5), (0.1, 0.07, 0.13), (0.031, 0.0072, 0.02), (1.0, 3.0, 2.0)]


def quantizer(qtype, scale, zero=0):
    return Quantizer(qtype, torch.tensor([scale]), torch.tensor([zero], dtype=torch.int32))


def producer(quantizer, ceiling):
    """A layer whose output lies on a grid, behind a ReLU or not."""
    layer = nn.Identity()
    layer.activation_post_process, layer.ceiling = quantizer, ceiling
    return layer


def all_pairs(one, other):
    a, b = torch.meshgrid(torch.arange(256), torch.arange(256), indexing="ij")
    grids = [host_grid(one.grid()), host_grid(other.grid())]
    # Lengths that fill no vector.
    return [
        give_codes(codes.to(torch.uint8).reshape(1, -1, 16)[:, :-1], grid, torch.empty(0))
        for codes, grid in zip((a, b), grids, strict=True)
    ]


def by_formula(module, inputs, monkeypatch):
    with monkeypatch.context() as patch:
        for name in ("elementwise", "concatenation", "unary"):
            patch.setattr(f"tritonq.nn.{name}.can_use_codes", lambda x: False)
        return module(*inputs)


def test_a_large_sum_is_computed_a_few_images_at_a_time(monkeypatch):
    a, b = torch.randint(0, 256, (2, 5, 3, 4), dtype=torch.uint8)
    grids = [quantizer(UNSIGNED, scale, 3).grid() for scale in SCALES[1]]
    join = coded_joins.coded_join("add", tuple(grids), grids, None)
    expected = join(a, b)
    monkeypatch.setattr(codes, "_MAX_VALUES_AT_ONCE", 30)
    monkeypatch.setattr(codes, "_VALUES_AT_ONCE", 24)
    computed, run = [], coded_joins.CodedJoin._run
    monkeypatch.setattr(coded_joins.CodedJoin, "_run", lambda self, a, b: computed.append(len(a)) or run(self, a, b))
    assert torch.equal(join(a, b), expected)
    assert computed == [2, 2, 1]


@pytest.mark.parametrize("ceiling", [None, float("inf"), 6.0])
@pytest.mark.parametrize("scales", SCALES)
@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_join_equals_formula(kind, signed, scales, ceiling, monkeypatch):
    types = [(SIGNED, 0)] * 3 if signed else [(UNSIGNED, 7), (UNSIGNED, 130), (UNSIGNED, 0 if ceiling else 101)]
    a, b, output = (quantizer(qtype, scale, zero) for (qtype, zero), scale in zip(types, scales, strict=True))
    join = KINDS[kind](ceiling).eval()
    join.activation_post_process = output
    after_relu = signed and kind == "add"
    join.set_producers(producer(a, float("inf") if after_relu else None), b)
    inputs = all_pairs(a, b)
    if after_relu:
        inputs[0] = inputs[0].relu()
    expected, found = by_formula(join, inputs, monkeypatch), join(*inputs)
    assert join._coded._value is not None
    assert torch.equal(expected, found)
    assert torch.equal(take_codes(found, host_grid(output.grid())), take_codes(expected, host_grid(output.grid())))
    output.scale.mul_(2)
    assert torch.equal(by_formula(join, inputs, monkeypatch), join(*inputs))


def test_a_gate_broadcasts(monkeypatch):
    a, b, output = (quantizer(UNSIGNED, scale, 9) for scale in SCALES[1])
    gate = qnn.Mul().eval()
    gate.activation_post_process = output
    gate.set_producers(a, b)
    inputs = a(torch.randn(2, 4, 5, 5) * 3), b(torch.randn(2, 4, 1, 1) * 3)
    expected = by_formula(gate, inputs, monkeypatch)
    assert torch.equal(expected, gate(*inputs))
    assert gate._coded._value is not None
    gate.set_producers(b, a)
    monkeypatch.setattr(qnn.Mul, "_exact", lambda *args: pytest.fail("the gate was not computed on codes"))
    assert torch.equal(gate(*inputs[::-1]), expected)


def test_without_fused_addition_sums_take_the_formula(monkeypatch):
    monkeypatch.setattr(coded_joins, "adds_fused", lambda: False)
    a, b, output = (quantizer(UNSIGNED, scale, 9) for scale in SCALES[1])
    join = qnn.Add().eval()
    join.activation_post_process = output
    join.set_producers(a, b)
    inputs = all_pairs(a, b)
    assert torch.equal(by_formula(join, inputs, monkeypatch), join(*inputs))
    assert join._coded._value is None


@pytest.mark.parametrize("types", [(UNSIGNED, 30), (SIGNED, 0)])
@pytest.mark.parametrize("pool", [qnn.AvgPool2d(3, 2, 1, ceil_mode=True), qnn.AdaptiveAvgPool2d(1)])
def test_average_equals_formula(pool, types, monkeypatch):
    source, output = quantizer(types[0], 0.1, types[1]), quantizer(types[0], 0.031, types[1])
    pool.set_quantizers(source)
    pool.activation_post_process = output
    pool.eval()
    x = source(torch.randn(3, 5, 8, 8) * 5)
    called = []
    exact_codes = type(pool).exact_codes
    monkeypatch.setattr(type(pool), "exact_codes", lambda *args: called.append(1) or exact_codes(*args))
    assert torch.equal(by_formula(pool, (x,), monkeypatch), pool(x))
    assert called


@pytest.mark.parametrize("types", [(UNSIGNED, 90), (SIGNED, 0), (QuantizedType(-8, 7, rounding="half_away"), 0)])
@pytest.mark.parametrize("function", [Function("hardswish"), Function("silu"), Function("leaky_relu", (0.1,))])
def test_function_equals_formula(function, types, monkeypatch):
    source, output = quantizer(types[0], 0.1, types[1]), quantizer(types[0], 0.043, types[1])
    layer = FunctionLayer(function).eval()
    layer.set_quantizers(source, output)
    x = source(torch.randn(3, 5, 8, 8).mul_(5).contiguous(memory_format=torch.channels_last))
    for values in (x, x[:, :, ::2, 1:]):
        expected, found = by_formula(layer, (values,), monkeypatch), layer(values)
        assert torch.equal(expected, found)
        assert take_codes(found, host_grid(output.grid())) is not None
        assert found.is_contiguous(memory_format=memory_format_of(values))


@pytest.mark.parametrize("rounding", ["half_even", "half_away"])
@pytest.mark.parametrize("channels_last", [False, True])
def test_concatenation_equals_formula(channels_last, rounding, monkeypatch):
    qtype = QuantizedType(0, 255, False, rounding=rounding)
    sources = [quantizer(qtype, scale, 99) for scale in (0.5, 0.25, 0.125, 0.031)]
    cat = qnn.Cat(1).eval()
    cat.activation_post_process = quantizer(qtype, 0.25, 99)
    form = torch.channels_last if channels_last else torch.contiguous_format
    parts = [source(torch.randn(2, 3, 8, 8).mul_(20).contiguous(memory_format=form)) for source in sources]
    expected, found = by_formula(cat, (parts,), monkeypatch), cat(parts)
    assert torch.equal(expected, found)
    assert found.stride() == expected.stride()
    called = []
    monkeypatch.setattr("tritonq.nn.concatenation.integer_concatenation", lambda *args: called.append(1))
    cat(parts)
    assert not called


def test_a_mean_over_axes_of_a_channels_last_tensor(monkeypatch):
    mean = qnn.Average(AxesAverage((2, 3))).eval()
    mean.set_quantizers(quantizer(SIGNED, 0.1), quantizer(SIGNED, 0.03))
    x = quantizer(SIGNED, 0.1)(torch.randn(3, 5, 8, 8).contiguous(memory_format=torch.channels_last))
    assert torch.equal(quantizer(SIGNED, 0.03)(by_formula(mean, (x,), monkeypatch)), mean(x))
