"""Formulas computed on single numbers give the bits that they give on tensors."""

import numpy as np
import pytest
import torch

from tritonq.arithmetic import NUMBERS, TENSORS
from tritonq.grid import Grid, RangeStatistics
from tritonq.qparams import number_to_qparams, range_to_qparams
from tritonq.quantized_type import QINT8, QINT8_NARROW, QUINT4, QUINT8
from tritonq.reference.min_max import merge_range_, update_number, update_range

SPECIAL = [0.0, 1.0, 0.5, 1.5, 2.5, 127.5, 0.49999997, 1e-30, 3e38, 8388609.0]


def values(count=400):
    generator = torch.Generator().manual_seed(0)
    spread = 10.0 ** torch.randint(-8, 8, (count,), generator=generator)
    drawn = torch.randn(count, generator=generator) * spread
    return torch.cat((drawn, torch.tensor(SPECIAL), -torch.tensor(SPECIAL)))


def same(numbers, tensor):
    return np.array_equal(np.array(numbers, dtype=tensor.numpy().dtype), tensor.numpy())


@pytest.mark.parametrize("name", ["round", "round_half_away"])
def test_rounding(name):
    x = values()
    assert same([getattr(NUMBERS, name)(v) for v in x.numpy()], getattr(TENSORS, name)(x))


@pytest.mark.parametrize("name", ["at_least", "at_most"])
@pytest.mark.parametrize("bound", [0.0, 1e-7, 127.5])
def test_bounds(name, bound):
    x = values()
    assert same([getattr(NUMBERS, name)(v, bound) for v in x.numpy()], getattr(TENSORS, name)(x, bound))


def test_larger():
    x, y = values(), values().flip(0)
    assert same([NUMBERS.larger(a, b) for a, b in zip(x.numpy(), y.numpy(), strict=True)], TENSORS.larger(x, y))


def ranges():
    ends = torch.stack((values(), values().flip(0)))
    return ends.amin(0), ends.amax(0)


@pytest.mark.parametrize("qtype", [QINT8, QINT8_NARROW, QUINT8, QUINT4])
@pytest.mark.parametrize("rule", ["torch", "megengine"])
@pytest.mark.parametrize("eps", [1e-7, 1e-5])
def test_qparams(qtype, rule, eps):
    low, high = ranges()
    scale, zero_point = range_to_qparams(low, high, qtype, rule=rule, eps=eps)
    found = [number_to_qparams(*ends, qtype, rule, eps) for ends in zip(low.tolist(), high.tolist(), strict=True)]
    assert same([number for number, _ in found], scale)
    inside = torch.isfinite(scale)  # a range that overflows has no zero point worth the name
    assert [zero for (_, zero), ok in zip(found, inside, strict=True) if ok] == zero_point[inside].tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("averaging", [None, 0.01, 0.1, 1.0])
@pytest.mark.parametrize("copy_above", [None, 1.5])
def test_running_range(dtype, averaging, copy_above):
    low, high = ranges()
    min_val, max_val = low.roll(7).to(dtype), high.roll(7).to(dtype)
    min_val[::9], max_val[::9] = torch.inf, -torch.inf
    expected = update_range(low, high, min_val, max_val, averaging, copy_above)
    kind = min_val.numpy().dtype.type
    with np.errstate(over="ignore"):
        found = [
            update_number(*map(kind, ends), averaging, copy_above)
            for ends in zip(low.numpy(), high.numpy(), min_val.numpy(), max_val.numpy(), strict=True)
        ]
    finite = torch.isfinite(expected[0]) & torch.isfinite(expected[1])
    assert finite.sum() > 300
    for mine, theirs in zip(zip(*found, strict=True), expected, strict=True):
        assert same([v for v, ok in zip(mine, finite, strict=True) if ok], theirs[finite])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("rule", ["torch", "torch_v1", "megengine"])
def test_merging_one_range_equals_merging_a_channel(dtype, rule):
    qtype = QUINT8
    low, high = torch.tensor(-0.3), torch.tensor(1.7)

    def merged(shape):
        state = [torch.full(shape, value).to(dtype) for value in (-0.1, 2.0)]
        qparams = torch.ones(1), torch.zeros(1, dtype=torch.int32)
        count = torch.zeros((), dtype=torch.int64)
        statistics = RangeStatistics(*state, count, qtype.granularity, averaging_constant=0.1, rule=rule, eps=1e-7)
        merge_range_(low.view(shape), high.view(shape), statistics, Grid(*qparams, qtype))
        return [*state, *qparams]

    for one, channel in zip(merged(()), merged((1,)), strict=True):
        assert torch.equal(one.view(1), channel)
