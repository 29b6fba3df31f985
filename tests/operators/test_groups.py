"""A scale per group along an axis: each group rounds, and trains its scale, as a tensor of its own does."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from op_tester import OpTester
from tolerances import SUMS, assert_close
from tritonq import fake_quantize_learnable, fake_quantize_per_channel_affine, fake_quantize_per_tensor_affine
from tritonq.backend import Backend
from tritonq.granularity import Granularity

SHAPES = {"linear": ((6, 64), 1), "conv": ((3, 64, 3, 2), 1), "first": ((64, 5), 0), "negative": ((2, 3, 64), -1)}


def problem(name: str, device: str, low: int, high: int) -> tuple[Tensor, Tensor, Tensor, int]:
    """Values, scales and zero points of groups of 32, and their axis."""
    shape, axis = SHAPES[name]
    generator = torch.Generator().manual_seed(0)
    scales = Granularity(axis % len(shape), 32).scale_shape(shape)
    scale = torch.rand(scales, generator=generator) * 0.3 + 0.05
    zero_point = torch.randint(low, high, scales, generator=generator, dtype=torch.int32)
    x = torch.randn(shape, generator=generator) * 2
    return x.to(device), scale.to(device), zero_point.to(device), axis


class TestGroups(OpTester):
    @pytest.mark.parametrize("name", SHAPES)
    @pytest.mark.parametrize("bits", [2, 4, 8])
    def test_each_group_is_a_tensor_of_its_own(self, name: str, bits: int, use: Backend, device: str) -> None:
        low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
        x, scale, zero_point, axis = problem(name, device, low, high)
        x.requires_grad_()
        y = fake_quantize_per_channel_affine(x, scale, zero_point, axis, low, high, group_size=32, backend=use)
        y.sum().backward()
        for index in np.ndindex(*scale.shape):
            start = 32 * index[axis]
            at = list(index)
            at[axis] = slice(start, start + 32)
            group = x.detach()[tuple(at)].clone().requires_grad_()
            expected = fake_quantize_per_tensor_affine(group, scale[index], zero_point[index], low, high)
            assert torch.equal(y[tuple(at)], expected)
            expected.sum().backward()
            assert torch.equal(x.grad[tuple(at)], group.grad)

    @pytest.mark.parametrize("name", ["linear", "conv"])
    def test_scales_of_groups_are_trained(self, name: str, use: Backend, device: str) -> None:
        x, scale, _, axis = problem(name, device, -8, 7)
        x.requires_grad_()
        scale.requires_grad_()
        y = fake_quantize_learnable(x, scale, 0, -8, 7, axis, group_size=32, backend=use)
        y.backward(x.detach())
        index = (1,) * scale.dim()
        at = list(index)
        at[axis] = slice(32, 64)
        own, group = scale.detach()[index].clone().view(1).requires_grad_(), x.detach()[tuple(at)].clone()
        fake_quantize_learnable(group, own, 0, -8, 7).backward(group)
        assert_close(scale.grad[index], own.grad[0], SUMS)


X, SCALE = torch.ones(2, 64), torch.ones(2, 2)
ZERO = torch.zeros(2, 2, dtype=torch.int32)


@pytest.mark.parametrize(
    ("arguments", "group_size", "error", "message"),
    [
        ((X, SCALE, ZERO, 1), 24, ValueError, "no multiple"),
        ((X, SCALE, ZERO, 1), 64, ValueError, r"\(2, 1\)"),
        ((X, torch.ones(4), ZERO, 1), 32, ValueError, r"scale must have shape \(2, 2\)"),
        ((X, SCALE, ZERO[0], 1), 32, ValueError, "zero_point must have shape"),
        ((X, SCALE, ZERO, 2), 32, ValueError, "axis 2"),
        ((X, SCALE, ZERO, 1), 32.0, TypeError, "group_size"),
        ((X, SCALE, ZERO, 1), 0, ValueError, "at least one"),
        ((X, -SCALE, ZERO, 1), 32, ValueError, "positive"),
    ],
)
def test_bad_groups(arguments: tuple[object, ...], group_size: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        fake_quantize_per_channel_affine(*arguments, -8, 7, group_size=group_size)


def test_groups_need_an_axis() -> None:
    with pytest.raises(ValueError, match="axis=None"):
        fake_quantize_learnable(X, SCALE, 0, -8, 7, group_size=32)
    with pytest.raises(ValueError, match="broadcasts"):
        Granularity(0, 32).align(SCALE, 2)
    with pytest.raises(ValueError, match=r"shape \(64,\) has no axis 1"):
        Granularity(1, 32).scale_shape((64,))
    with pytest.raises(ValueError, match=r"shape \(2, 64\) has no axis 2"):
        Granularity(2).scale_shape((2, 64))
