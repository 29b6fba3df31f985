"""Operations that stay in float between quantized tensors are told; others move values or lead from grid to grid."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import tritonq

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Between(nn.Module):
    """An operation between two convolutions of eight channels."""

    def __init__(self, operation) -> None:
        super().__init__()
        self.first, self.last, self.operation = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1), operation
        self.register_buffer("mask", torch.rand(8, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.operation(self.first(x), self.mask))


def rows(operation) -> list[tuple[str, str]]:
    """Return kind and status of whatever stands between the convolutions."""
    prepared = tritonq.prepare_qat(Between(operation), example_inputs=X, strict=True)
    found = tritonq.summary(prepared).layers
    told = {row.reason for row in found if row.status == "float"}
    assert all(reason.startswith("computed in float between quantized tensors") for reason in told)
    return [(row.kind, row.status) for row in found if row.kind != "Conv2d"]


@pytest.mark.parametrize(
    ("operation", "names"),
    [
        (lambda x, mask: x + 1.5 * x.shape[2] * mask, ["add"]),
        (lambda x, mask: (x * mask).sqrt(), ["mul", "sqrt"]),
        (lambda x, mask: x * x.shape[3] ** -0.5, ["mul"]),
        (lambda x, mask: (x**3 + 0.1).cos(), ["pow", "add", "cos"]),
        (lambda x, mask: torch.where(x > 0, x, 0.1 * x), ["mul", "where"]),
        (lambda x, mask: F.interpolate(x, scale_factor=2, mode="bilinear"), ["interpolate"]),
        (lambda x, mask: F.layer_norm(x, x.shape[1:]).transpose(2, 3), ["layer_norm"]),
        (lambda x, mask: F.pad(x, (1, 1), value=0.5), ["pad"]),
        (lambda x, mask: torch.fft.rfft(x).abs(), ["fft_rfft", "abs"]),
    ],
)
def test_operations_in_float_are_told(operation, names):
    assert rows(operation) == [(name, "float") for name in names]


def test_operations_before_a_function_of_float_values_are_told():
    found = rows(lambda x, mask: 3 - (x * mask).sqrt())
    assert found == [("mul", "float"), ("sqrt", "float"), ("sub", "quantized")]


@pytest.mark.parametrize(
    "operation",
    [
        *(lambda x, mask: x.flip(1).roll(1, 2), lambda x, mask: F.pad(x, (1, 1, 1, 1), mode="reflect")),
        *(lambda x, mask: x[:, :1].expand_as(x), lambda x, mask: x.max(2, keepdim=True)[0].repeat(1, 1, 8, 1)),
        *(lambda x, mask: x.amin(3, keepdim=True), lambda x, mask: x.sort(1)[0].movedim(2, 3)),
        lambda x, mask: F.pixel_shuffle(F.pixel_unshuffle(x, 2), 2).unfold(2, 4, 4).flatten(3).view_as(x),
    ],
)
def test_operations_that_move_values_keep_the_grid(operation):
    prepared = tritonq.prepare_qat(Between(operation), example_inputs=X, strict=True)
    assert rows(operation) == []
    assert prepared.last.input_quantizer is prepared.first.activation_post_process


def test_a_chain_from_grid_to_grid_is_quantized_at_each_step():
    kinds = rows(lambda x, mask: F.leaky_relu(F.avg_pool2d(F.silu(x), 2)).mean(3, keepdim=True))
    assert kinds == [(name, "quantized") for name in ("silu", "avg_pool2d", "leaky_relu", "mean")]


@pytest.mark.parametrize(
    ("operation", "names"),
    [
        (lambda x, mask: x.argmax(1, keepdim=True) / 8 + x, ["add"]),
        (lambda x, mask: 2 * (x.round().long() / 3 - 1), ["mul"]),
        (lambda x, mask: x.int().abs().sigmoid(), []),
    ],
)
def test_functions_of_whole_numbers_stay_in_float(operation, names):
    found = rows(operation)
    assert [name for name, status in found if status == "quantized"] == names
    prepared = tritonq.prepare_qat(Between(operation), example_inputs=X).train()
    prepared(X)
    assert torch.equal(prepared.eval()(X), tritonq.convert(prepared)(X))
