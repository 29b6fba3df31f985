"""What forwards of users do besides calling their modules: hooks, functional calls, writes in place."""

import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import tritonq
from prepared_nets import ThreeLayers, assert_same_when_not_rounding
from tritonq.prepare.decide.float_operations import BETWEEN_GRIDS

X = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))


class Net(ThreeLayers):
    def forward(self, x):
        x = self.first(x).relu()
        return self.head((x + self.second(x)).mean((2, 3)))


def doubled(module, args):
    return (args[0] * 2,)


class Hooked(Net):
    """An operation that is quantized stands in the hook of a child."""

    def __init__(self):
        super().__init__()
        self.head.register_forward_pre_hook(doubled)


class Functional(Net):
    """A layer with another weight than its own."""

    def __init__(self):
        super().__init__()
        self.delta = nn.Parameter(torch.ones(4, 4, 1, 1))

    def forward(self, x):
        x = self.first(x).relu()
        y = torch.func.functional_call(self.second, {"weight": self.second.weight + self.delta}, (x,))
        return self.head((x + y).mean((2, 3)))


class InPlace(Net):
    """Results that get the name of an operand, and one that is dropped: the source reads the operand."""

    def forward(self, x, *unused):
        x = self.first(x)
        x += self.second(x.relu())
        x.clamp_(min=0)
        y = torch.zeros_like(x)
        y[:, :2] = x[:, 2:]
        return self.head(y.mean((2, 3)))


class OtherName(Net):
    """The operand has another name, under which it is read."""

    def forward(self, x, *unused):
        x = same = self.first(x)
        x += self.second(x.relu())
        y = torch.zeros_like(x)
        y[:] = same
        return self.head(y.mean((2, 3)))


class WritesBuffer(Net):
    """In training the subtrahend is computed, in eval mode it is a constant."""

    def __init__(self):
        super().__init__()
        self.register_buffer("average", torch.zeros(1, 4, 1, 1))

    def forward(self, x):
        x = self.second(self.first(x).relu()).relu()
        if self.training:
            self.average.mul_(0.9).add_(x.detach().mean((0, 2, 3), keepdim=True), alpha=0.1)
        return self.head((x - self.average).mean((2, 3)))


class Inference(Net):
    """A frozen part that runs without any record for gradients."""

    def forward(self, x):
        with torch.inference_mode():
            x = self.first(x).relu()
            x = x + self.second(x)
        return self.head(x.clone().mean((2, 3)))


@pytest.mark.parametrize("build", [Inference, Hooked, Functional, InPlace, OtherName, WritesBuffer])
def test_it_trains_and_converts_without_a_warning(build):
    torch.manual_seed(0)
    model = build()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prepared = tritonq.prepare_qat(model, example_inputs=X, strict=build is not OtherName, warn=False)
        assert_same_when_not_rounding(model, prepared, X)
        prepared.train()(X).square().sum().backward()
        assert prepared.head.weight.grad is not None
        assert (prepared.first.weight.grad is None) == (build is Inference)
        converted = tritonq.convert(prepared.eval())
        assert torch.equal(converted(X), prepared(X))
    quantized = [row.name for row in prepared.tritonq_report if row.status == "quantized"]
    assert ("add" in quantized) == (build not in (OtherName, WritesBuffer))
    assert ("second.conv2d" in quantized) == (build is Functional)
    rows = (row for row in prepared.tritonq_report if row.status == "float")
    in_float = [row for row in rows if not row.reason.startswith(BETWEEN_GRIDS)]
    assert not in_float or build is OtherName


class Foreign(Net):
    """A module that is no child: its weight is none of the model's."""

    def __init__(self):
        super().__init__()
        self.hidden = [nn.Conv2d(4, 4, 1).requires_grad_(False)]

    def forward(self, x):
        return super().forward(x) + self.hidden[0](F.relu(self.first(x))).mean((2, 3))[:, :2]


def test_layers_of_modules_that_are_no_children_are_told_once():
    with pytest.warns(UserWarning, match="conv2d: its weight is none of the model's"):
        prepared = tritonq.prepare_qat(Foreign(), example_inputs=X)
    assert [row.name for row in prepared.tritonq_report if row.status == "float"] == ["conv2d", "mean_1"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prepared.train()(X).sum().backward()
        converted = tritonq.convert(prepared.eval())
    assert torch.equal(converted(X), prepared(X))


def test_parts_that_are_quantized_already_are_refused():
    part = tritonq.prepare_qat(nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU()), example_inputs=X)
    part(X)
    for quantized in (part, tritonq.convert(part)):
        with pytest.raises(ValueError, match=r"'0\.0' is a quantized layer or a fake quantizer\. Put the float parts"):
            tritonq.prepare_qat(nn.Sequential(quantized, nn.Conv2d(3, 2, 1)), example_inputs=X)


def test_a_forward_that_yields_is_refused_with_its_reason():
    class Yields(Net):
        def forward(self, x):
            yield super().forward(x)

    with pytest.raises(ValueError, match="returns a generator"):
        tritonq.prepare_qat(Yields(), example_inputs=X)
