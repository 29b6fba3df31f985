"""Forwards that were replaced on an instance, and calls inside of functions that torch.func transforms."""

import copy
import functools
import types
import warnings

import onnx
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import tritonq
from prepared_nets import ThreeLayers, assert_same_when_not_rounding
from tritonq import nn as qnn
from tritonq.prepare.decide.float_operations import BETWEEN_GRIDS

X = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))


class Net(ThreeLayers):
    def forward(self, x):
        raise AssertionError("this forward was replaced")

    def body(self, x):
        return F.softplus(self.first(x))


def residual(self, x):
    x = self.body(x)
    return self.head((x + self.second(x)).relu().mean((2, 3)))


def bound():
    model = Net()
    model.forward = types.MethodType(residual, model)
    return model


def partial():
    model = Net()
    model.forward = functools.partial(residual, model)
    return model


def wrapped():
    """A decorator around the forward of the class, as Accelerate's autocast."""

    def decorated(self, x):
        return type(self).residual(self, x)

    class Residual(Net):
        residual = residual

    model = Residual()
    model.forward = types.MethodType(decorated, model)
    return model


class Outer(nn.Module):
    """What the inner forward returns needs a quantizer behind it."""

    def __init__(self):
        super().__init__()
        self.inner, self.last = bound(), nn.Conv2d(4, 2, 1)
        self.inner.forward = types.MethodType(Net.body, self.inner)

    def forward(self, x):
        return self.last(self.inner(x))


@pytest.mark.parametrize("build", [bound, partial, wrapped, Outer])
def test_they_are_edited_copied_saved_and_exported(build, tmp_path):
    torch.manual_seed(0)
    model = build()
    prepared = tritonq.prepare_qat(model, example_inputs=X, warn=False)
    assert "forward" in vars(model if build is not Outer else model.inner)
    assert_same_when_not_rounding(model, prepared, X)
    reached = [row for row in prepared.tritonq_report if "reach" not in row.reason]
    in_float = {row.name: row.reason.partition(":")[0] for row in reached if row.status != "quantized"}
    assert in_float == ({"inner.softplus": BETWEEN_GRIDS} if build is Outer else {})
    assert ("add" in [row.name for row in reached]) == (build is not Outer)
    prepared.train()(X).square().sum().backward()
    prepared.eval()
    if build is Outer:
        quantized, kept = [], prepared.inner.activation_post_process
        kept.register_forward_hook(lambda *_: quantized.append(1))
        prepared(X)
        assert quantized
        kept._forward_hooks.clear()
    assert torch.equal(copy.deepcopy(prepared)(X), prepared(X))
    converted = tritonq.convert(prepared)
    assert torch.equal(converted(X), prepared(X))
    tritonq.save_converted(converted, tmp_path / "model.pt")
    assert torch.equal(tritonq.load_converted(tmp_path / "model.pt", build())(X), converted(X))
    tritonq.export_onnx(converted, tmp_path / "model.onnx", X)
    assert [item.name for item in onnx.load(tmp_path / "model.onnx").graph.input] == ["x"]
    assert tritonq.verify(prepared, tmp_path / "model.onnx", [X]).agrees()


def test_one_that_calls_the_forward_of_its_class_keeps_its_joins_in_float():
    class Own(Net):
        forward = residual

    model = Own()
    model.forward = types.MethodType(lambda self, x: type(self).forward(self, x), model)
    prepared = tritonq.prepare_qat(model, example_inputs=X, warn=False)
    assert isinstance(prepared.first, qnn.Conv2d)
    assert [row.reason for row in prepared.tritonq_report if row.name == "add"] == [
        "the forward of the model can't be edited: its forward was replaced on the instance"
    ]
    assert_same_when_not_rounding(model, prepared, X)


@pytest.mark.parametrize("inplace", [False, True])
def test_one_that_holds_the_model_holds_its_copy_in_a_copy(inplace):
    model = Net()
    model.forward = lambda x: residual(model, x)
    prepared = tritonq.prepare_qat(model, example_inputs=X, inplace=inplace, strict=True)
    prepared(X).sum().backward()
    assert all(parameter.grad is not None for parameter in prepared.parameters())
    assert inplace or all(parameter.grad is None for parameter in model.parameters())
    prepared.eval()
    assert torch.equal(tritonq.convert(prepared, inplace=inplace)(X), prepared(X))


class PerImage(Net):
    def forward(self, x):
        x = self.first(x).relu()
        x = x + torch.vmap(lambda image: F.conv2d(image, self.second.weight) + image)(x)
        return torch.vmap(self.head)(x.mean((2, 3)))


class Gradient(Net):
    def forward(self, x):
        x = self.first(x).relu()
        x = x + torch.func.grad(lambda image: self.second(image).square().sum())(x)
        return self.head(x.mean((2, 3)))


@pytest.mark.parametrize(
    ("build", "left"), [(PerImage, {"head", "conv2d"}), (Gradient, {"second"})], ids=["vmap", "grad"]
)
def test_layers_in_transformed_functions_stay_in_float_and_are_told(build, left):
    torch.manual_seed(0)
    model = build()
    with pytest.warns(UserWarning, match=r"runs inside of torch\.vmap, torch\.func\.grad or the like"):
        prepared = tritonq.prepare_qat(model, example_inputs=X)
    assert_same_when_not_rounding(model, prepared, X)
    assert {row.name for row in prepared.tritonq_report if "torch.vmap" in row.reason} == left
    quantized = {row.name for row in prepared.tritonq_report if row.status == "quantized"}
    assert "first" in quantized
    assert {"add", "add_1"} & quantized
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prepared.train()(X).square().sum().backward()
        assert prepared.second.weight.grad is not None
        converted = tritonq.convert(prepared.eval())
    assert torch.equal(converted(X), prepared(X))
