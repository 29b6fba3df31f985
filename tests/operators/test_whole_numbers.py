"""NumPy's integers are taken where ints are, as torch's operators take them, and kept as ints."""

from __future__ import annotations

import json

import numpy
import pytest
import torch

import tritonq

X = torch.tensor([[0.3, -1.0], [0.7, 2.0]])
ONES, ZEROS = torch.ones(2), torch.zeros(2, dtype=torch.int32)
CALLS = {
    "per tensor": lambda i: tritonq.fake_quantize_per_tensor_affine(X, 0.1, i(1), i(0), i(255)),
    "per channel": lambda i: tritonq.fake_quantize_per_channel_affine(X, ONES, ZEROS, i(1), i(-8), i(7)),
    "learnable": lambda i: tritonq.fake_quantize_learnable(X, ONES[:1], torch.zeros(1), i(-8), i(7)),
    "fixed point": lambda i: tritonq.fixed_point_quantize(X, i(3), i(8)),
    "search": lambda i: tritonq.search_frac_len(X, i(8), axis=i(0)),
    "histogram": lambda i: tritonq.histogram(X, i(8), -1.0, 1.0),
    "observer": lambda i: tritonq.FakeQuantize(quant_min=i(0), quant_max=i(127))(X),
    "histogram observer": lambda i: tritonq.HistogramObserver(bins=i(128))(X),
    "interpolating": lambda i: tritonq.InterpolatingHistogramObserver(bins=i(64), upsample_rate=i(16))(X),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_functions_and_observers(call):
    assert torch.equal(call(numpy.int64), call(int))


def test_types_keep_ints():
    i = numpy.int32
    found = tritonq.QuantizedType(i(-8), i(7), axis=i(0), group=i(2))
    assert found == tritonq.QuantizedType.of(i(4), axis=0, group=2)
    assert json.loads(json.dumps(found.to_data()))["quant_max"] == 7
    assert "int32" not in repr(found)


@pytest.mark.parametrize("value", [4.0, numpy.float32(4), torch.tensor([4.0])])
def test_whole_numbers_of_fraction_bits(value):
    assert torch.equal(tritonq.fixed_point_quantize(X, value), tritonq.fixed_point_quantize(X, 4))


@pytest.mark.parametrize("value", [4.5, numpy.float64(4.5), float("inf"), float("nan"), True, numpy.bool_(True), "4"])
def test_other_fraction_bits(value):
    with pytest.raises(ValueError, match=r"frac_len must be a whole number in 0\.\.7"):
        tritonq.fixed_point_quantize(X, value)


@pytest.mark.parametrize("number", [numpy.float16, numpy.float32, numpy.float64, numpy.int64])
def test_numbers_of_numpy_are_numbers(number):
    assert torch.equal(
        tritonq.fake_quantize_per_tensor_affine(X, number(2), 0, -8, 7),
        tritonq.fake_quantize_per_tensor_affine(X, 2.0, 0, -8, 7),
    )
    assert torch.equal(
        tritonq.LearnedBitsFakeQuantize(number(4)).bits.detach(), tritonq.LearnedBitsFakeQuantize(4.0).bits.detach()
    )
    assert tritonq.nn.Add(number(6)).ceiling == 6.0
