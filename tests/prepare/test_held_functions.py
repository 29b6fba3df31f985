"""Functions on a model that hold its modules: hooks, attributes; copies are made to hold their own."""

from functools import partial

import pytest
import torch
from torch import nn

import tritonq
from prepared_nets import X, conv


def net():
    return nn.Sequential(conv(), nn.ReLU(), conv())


def call(x, layer):
    return layer(x)


class ByFunction(nn.Module):
    """Calls its layers by functions that hold them."""

    def __init__(self, how):
        super().__init__()
        self.first, self.second = conv(), conv()
        second = self.second
        self.run = {
            "closure": lambda x: self.second(x),
            "default": lambda x, layer=second: layer(x),
            "keyword": partial(lambda layer, x: layer(x), self.second),
            "partial in a closure": (lambda inner: lambda x: inner(x=x))(partial(call, layer=second)),
            "partial of a layer": (lambda inner: lambda x: inner(x))(partial(second)),
            "method": second.forward,
            "nested": (lambda inner: lambda x: inner(x))(lambda x: second(x)),
        }[how]

    def forward(self, x):
        return self.run(torch.relu(self.first(x)))


@pytest.mark.parametrize(
    "how", ["closure", "default", "keyword", "partial in a closure", "partial of a layer", "method", "nested"]
)
def test_functions_in_attributes_call_the_copys_layers(how):
    model = ByFunction(how)
    prepared = tritonq.prepare_qat(model, example_inputs=X, strict=True).train()
    prepared(X).sum().backward()
    assert prepared.second.weight.grad is not None
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(tritonq.convert(prepared.eval())(X), prepared(X))


def test_hooks_hold_the_copys_modules_and_their_authors_dicts():
    model, seen = net(), {}

    def hook(module, given, made):
        seen["of"] = model
        model.last = made.detach()

    model[0].register_forward_hook(hook)
    prepared = tritonq.prepare_qat(model, example_inputs=X)
    seen.clear()
    prepared(X)
    assert seen["of"] is prepared
    assert not hasattr(model, "last")
    assert prepared.last.shape == X.shape


def test_a_hook_that_calls_itself_holds_the_copys_modules():
    model = net()

    def hook(module, given, made, depth=2):
        if depth:
            hook(module, given, made, depth - 1)
        else:
            model.last = made.detach()

    model[0].register_forward_hook(hook)
    prepared = tritonq.prepare_qat(model, example_inputs=X)
    prepared(X)
    assert hasattr(prepared, "last")
    assert not hasattr(model, "last")


def test_hooks_that_share_a_variable_go_on_sharing_it():
    model = net()
    shared = model[2]

    def remember(module, given):
        nonlocal shared
        shared = module

    def compare(module, given, made):
        module.is_first = shared is module

    model[0].register_forward_pre_hook(remember)
    model[0].register_forward_hook(compare)
    prepared = tritonq.prepare_qat(model, example_inputs=X)
    prepared(X)
    assert prepared[0].is_first


@pytest.mark.parametrize("inplace", [False, True])
def test_a_table_of_modules_is_named(inplace):
    model = net()
    names = {module: name for name, module in model.named_modules()}

    def look_up(module, given, made):
        names[module]

    for module in model.modules():
        module.register_forward_hook(look_up)
    error = RuntimeError if inplace else ValueError
    with pytest.raises(
        error, match=r"look_up, line \d+ of test_held_functions.py looks a Conv2d up in a table of modu"
    ):
        tritonq.prepare_qat(model, example_inputs=X, inplace=inplace)
    assert type(model[0]) is nn.Conv2d
