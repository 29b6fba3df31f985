"""Joins whose operands lie on no grid themselves, but follow from quantized tensors by constants or norms."""

import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import tritonq
from prepared_nets import assert_same_when_not_rounding
from tritonq.prepare.decide.float_operations import BETWEEN_GRIDS

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1)
        self.gamma, self.weights = nn.Parameter(torch.rand(4, 1, 1)), nn.Parameter(torch.rand(2))


class Residual(Scaled):
    def __init__(self):
        super().__init__()
        self.second = nn.Conv2d(4, 4, 1)


class LayerScale(Residual):
    """Between two norms, neither of the summands lies on a grid, nor does what reads the sum."""

    def forward(self, x):
        x = F.layer_norm(self.first(x), (8, 8))
        x = x + self.second(x) * self.gamma
        return self.last(F.layer_norm(x, (8, 8)))


class WeightedFeatures(Residual):
    """As EfficientDet and BiFPN fuse them; the sum is divided by a constant."""

    def forward(self, x):
        x = self.first(x)
        weights = self.weights.relu()
        return self.last((weights[0] * x + weights[1] * self.second(x)) / (weights.sum() + 1e-4))


class Rotated(Scaled):
    """Rotary embeddings: both summands are products with constants."""

    def forward(self, x):
        x = self.first(x).flatten(2).transpose(1, 2)
        turned = torch.cat((-x[..., 2:], x[..., :2]), -1)
        x = x * self.gamma.view(-1).cos() + turned * self.gamma.view(-1).sin()
        return self.last(F.layer_norm(x, (4,)).transpose(1, 2).reshape(-1, 4, 8, 8))


class ClassToken(Scaled):
    """A token that is expanded and put before others, which have their positions already."""

    def forward(self, x):
        x = self.first(x).flatten(2).transpose(1, 2) + self.gamma.view(-1)
        x = torch.cat((self.gamma.view(1, 1, 4).expand(x.shape[0], -1, -1), x), 1)
        return self.last(F.layer_norm(x, (4,))[:, 1:].transpose(1, 2).reshape(-1, 4, 8, 8))


@pytest.mark.parametrize("build", [LayerScale, WeightedFeatures, Rotated, ClassToken])
def test_the_sum_is_quantized_and_the_constant_is_not(build):
    torch.manual_seed(0)
    model = build()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prepared = tritonq.prepare_qat(model, example_inputs=X, strict=True)
    joins = [row for row in prepared.tritonq_report if row.kind in ("add", "cat")]
    in_float = {row.name: row.reason for row in joins if row.status != "quantized"}
    assert len(joins) > len(in_float)
    of_positions = {"add": f"{BETWEEN_GRIDS}: one of its operands is a constant"}
    assert in_float == (of_positions if build is ClassToken else {})
    assert_same_when_not_rounding(model, prepared, X)
    prepared.train()(X).square().sum().backward()
    assert prepared.gamma.grad is not None or build is WeightedFeatures
    converted = tritonq.convert(prepared.eval())
    assert torch.equal(converted(X), prepared(X))


class Inverses(Scaled):
    """A reciprocal is no scaled tensor: between two of them a sum stays in float."""

    def forward(self, x):
        x = self.first(x).sigmoid().exp()
        return self.last(1 / (1 / x + torch.div(2, self.gamma.sum() * x).exp()))


def test_reciprocals_are_no_scaled_tensors():
    with pytest.warns(UserWarning, match=r"add: nothing that it reads, and nothing that reads it, is quantized"):
        tritonq.prepare_qat(Inverses(), example_inputs=X)


class NormedAttention(nn.Module):
    """Cosine attention, or norms of queries and keys: both operands of the product come out of norms."""

    def __init__(self, norm):
        super().__init__()
        self.qkv, self.last, self.norm = nn.Linear(6, 12), nn.Linear(4, 2), norm

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)
        scores = self.norm(q) @ self.norm(k).transpose(-2, -1)
        return self.last((4 * scores).softmax(-1) @ v)


class Normalize(nn.Module):
    def forward(self, x):
        return F.normalize(x, dim=-1)


@pytest.mark.parametrize("norm", [Normalize(), nn.LayerNorm(4), nn.Softmax(-1)], ids=lambda norm: type(norm).__name__)
def test_products_behind_norms_are_quantized(norm):
    tokens = torch.randn(2, 5, 6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prepared = tritonq.prepare_qat(NormedAttention(norm), example_inputs=tokens, strict=True)
        prepared(tokens).square().sum().backward()
        converted = tritonq.convert(prepared.eval())
    assert sum(row.kind == "matmul" and row.status == "quantized" for row in prepared.tritonq_report) == 2
    assert torch.equal(converted(tokens), prepared(tokens))
