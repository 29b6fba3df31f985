"""Arithmetic in place on results without a name, in forwards that keep their branches; the rest is told."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import tritonq
from prepared_nets import X, assert_same_when_not_rounding, conv


class Ending(nn.Module):
    """Ends in a function of its input; ``isinstance`` keeps its branches."""

    def __init__(self, function):
        super().__init__()
        self.gamma, self.function = 1.7, function

    def forward(self, x):
        if not isinstance(x, torch.Tensor):
            return x
        return self.function(self, x)


class Between(Ending):
    def __init__(self, function):
        super().__init__(function)
        self.last = conv()

    def forward(self, x):
        if not isinstance(x, torch.Tensor):
            return x
        return self.last(self.function(self, x))


FUNCTIONS = {
    "scaled": lambda self, x: F.gelu(x).mul_(self.gamma),
    "scaled twice": lambda self, x: F.silu(x).mul_(2.0).add_(0.5),
    "of an operator": lambda self, x: (x * 2.0).sigmoid_(),
    "not in place": lambda self, x: F.gelu(x) * self.gamma,
}


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS.keys())
@pytest.mark.parametrize("returned", [False, True])
def test_functions_are_quantized_but_for_those_that_end_a_forward_with_branches(function, returned, tmp_path):
    model = nn.Sequential(conv(), Ending(function) if returned else Between(function), conv())
    prepared = tritonq.prepare_qat(model, example_inputs=X, strict=True).train()
    assert_same_when_not_rounding(model, prepared, X)
    prepared(X).square().mean().backward()
    reasons = {row.reason for row in tritonq.summary(prepared.eval()).in_float}
    between = "computed in float between quantized tensors: its forward keeps its branches, and what these return is "
    assert (f"{between}rounded behind it" in reasons) == bool(reasons) == returned
    assert torch.equal(tritonq.convert(prepared)(X), prepared(X))
    tritonq.export_onnx(tritonq.convert(prepared), tmp_path / "model.onnx", X)
    assert tritonq.verify(prepared, tmp_path / "model.onnx", X).agrees()


class Joins(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = conv(), conv()

    def forward(self, x):
        y = self.first(x) if isinstance(x, torch.Tensor) else x
        return self.second(self.first(y).add_(y).mul_(y))


def test_joins_in_place_of_results_without_a_name():
    model = Joins()
    prepared = tritonq.prepare_qat(model, example_inputs=X, strict=True)
    assert {row.kind for row in tritonq.summary(prepared).quantized} == {"Conv2d", "add", "mul"}
    assert_same_when_not_rounding(model, prepared, X)


class Overwrites(Joins):
    """Overwrites what has another name, which is read."""

    def forward(self, x):
        y = self.first(x) if isinstance(x, torch.Tensor) else x
        z = F.relu(y, inplace=True).mul_(3.0)
        return self.second(z + y)


def test_a_result_that_has_a_name_is_overwritten_as_written():
    model = Overwrites()
    prepared = tritonq.prepare_qat(model, example_inputs=X)
    assert_same_when_not_rounding(model, prepared, X)
    reasons = {row.kind: row.reason for row in tritonq.summary(prepared).in_float}
    assert reasons["mul"] == "computed in float between quantized tensors: it changes a tensor in place"


def test_a_functional_batch_norm_is_told_with_what_to_write_instead():
    class Normalises(Joins):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm2d(4)

        def forward(self, x):
            norm = self.norm
            x = F.batch_norm(self.first(x), norm.running_mean, norm.running_var, norm.weight, norm.bias, self.training)
            return self.second(x)

    prepared = tritonq.prepare_qat(Normalises(), example_inputs=X)
    reasons = {row.kind: row.reason for row in tritonq.summary(prepared).in_float}
    assert reasons["batch_norm"].endswith("a nn.BatchNorm in its place would become part of the layer before it")
