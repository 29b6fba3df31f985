"""Operators show in a profile by their names, and cost nothing where no profiler runs."""

from __future__ import annotations

import torch

import tritonq
from tritonq.backend import implementation
from tritonq.reference import fake_quant


def test_an_operator_is_a_range() -> None:
    x = torch.ones(4, requires_grad=True)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        tritonq.fake_quantize_per_tensor_affine(x, 0.1, 0, -128, 127).sum().backward()
    names = {event.key for event in profile.key_averages()}
    assert "tritonq.fake_quant.fake_quantize (torch)" in names
    assert "tritonq.fake_quant.fake_quantize_backward (torch)" in names


def test_without_a_profiler_the_module_is_the_module() -> None:
    assert implementation("fake_quant", torch.ones(1)) is fake_quant
