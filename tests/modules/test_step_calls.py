"""How many operator calls a training step makes: on small layers a step's time is theirs."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

import tritonq
from tritonq.arithmetic import as_dtype, operand

_LAYERS = 4


@cache
def calls_of_a_layer() -> dict[str, float]:
    """Calls per Conv-BN-ReLU layer, forward and backward, those inside of others counted too, by name."""
    rows = (m for _ in range(_LAYERS) for m in (nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()))
    x = torch.randn(2, 8, 8, 8)
    model = tritonq.prepare_qat(nn.Sequential(*rows), example_inputs=x).train()
    for _ in range(2):
        model(x).sum().backward()
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        model(x).sum().backward()
    events = [event for event in recorded.key_averages() if not event.key.startswith("tritonq")]
    return {event.key: event.count / _LAYERS for event in events}


def test_operator_calls_are_bounded():
    assert sum(calls_of_a_layer().values()) <= 350


@pytest.mark.parametrize(("name", "most"), [("aten::item", 27), ("aten::to", 16), ("aten::_to_copy", 6)])
def test_reads_and_conversions_are_bounded(name, most):
    """Values read on the host, and numbers or tensors that are converted: neither computes anything."""
    assert calls_of_a_layer()[name] <= most


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("number", [0.1, 1e-5, 1 / 3, 7.0])
def test_a_kept_number_gives_the_bits_of_a_number(dtype, number):
    x = torch.randn(1003, dtype=dtype)
    kept = operand(number, x)
    assert isinstance(kept, torch.Tensor)
    assert kept is operand(number, x)
    for actual, expected in ((x * kept, x * number), (x / kept, x / number), (x + kept, x + number)):
        assert torch.equal(actual, expected)
    assert operand(number, torch.ones(1, device="meta")) == number


def test_a_dtype_that_is_there_costs_no_call():
    x = torch.ones(2)
    assert as_dtype(x, torch.float32) is x
    assert as_dtype(x, torch.float64).dtype == torch.float64


def test_calls_of_a_join_are_bounded():
    """Its bits are packed and unpacked in one call for all eight planes."""
    x = torch.randn(2, 8, 8, 8, requires_grad=True)
    join = tritonq.nn.Add(float("inf"), qconfig=tritonq.get_qconfig()).train()
    for _ in range(2):
        join(x, x).sum().backward()
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        join(x, x).sum().backward()
    counts = {event.key: event.count for event in recorded.key_averages() if not event.key.startswith("tritonq")}
    assert counts["aten::bitwise_and"] == 1
    assert sum(counts.values()) <= 120, counts
