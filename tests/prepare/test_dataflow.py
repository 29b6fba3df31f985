"""The record of a run: calls, values and frames, and that recording leaves no trace on the model."""

import dataclasses
import gc
import operator
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import vision_models
from tritonq.prepare.record.dataflow import Ref
from tritonq.prepare.record.operations import is_leaf, operation_name
from tritonq.prepare.record.recorder import record


def names(calls):
    return [call.name for call in calls]


class StochasticDepth(nn.Module):
    def forward(self, x):
        return x * 2 if self.training else x


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)
        self.norm = nn.BatchNorm2d(3)
        self.relu = nn.ReLU(inplace=True)
        self.skip = StochasticDepth()

    def forward(self, x, scale=None):
        out = self.norm(self.conv(x))
        out = self.relu(out)
        out = self.skip(self.conv(out))
        out += x
        return {"out": self.relu(out), "flat": out.flatten(1)}


@pytest.fixture
def flow():
    return record(Residual(), (torch.randn(2, 3, 4, 4),))


def test_calls_are_in_order_of_execution(flow):
    assert names(flow.calls) == [
        *("Conv2d", "BatchNorm2d", "ReLU", "Conv2d", "StochasticDepth", "add", "ReLU", "flatten")
    ]


def test_module_called_twice_has_two_calls(flow):
    first, second = flow.calls_of("conv")
    assert (first.ordinal, second.ordinal) == (0, 1)
    assert first.target is second.target
    assert flow.values[first.inputs[0]].source == "input"
    assert flow.producer(second.inputs[0]).name == "ReLU"


def test_values_connect_producer_and_consumers(flow):
    conv, norm = flow.calls[0], flow.calls[1]
    (value,) = conv.outputs
    assert flow.producer(value) is conv
    assert flow.consumers(value) == (norm,)
    assert flow.single_consumer(value) is norm
    assert flow.producers(norm) == (conv,)
    assert flow.values[value].shape == (2, 3, 4, 4)
    assert flow.values[value].dtype == torch.float32


def test_input_has_its_path_and_all_its_consumers(flow):
    (value,) = flow.calls[0].inputs
    assert flow.values[value].path == (0,)
    assert names(flow.consumers(value)) == ["Conv2d", "add"]
    assert flow.single_consumer(value) is None


def test_in_place_operation_gives_the_same_tensor_a_new_value(flow):
    relu = flow.calls[2]
    (before,), (after,) = relu.inputs, relu.outputs
    assert before != after
    assert flow.values[before].tensor == flow.values[after].tensor
    assert relu.writes == ((before, after),)
    assert flow.single_consumer(before) is relu


def test_later_readers_of_an_overwritten_tensor_read_the_new_value(flow):
    relu, flatten = flow.calls[6], flow.calls[7]
    assert flatten.inputs == relu.outputs


def test_outputs_are_marked_with_their_keys(flow):
    marked = {value.output_paths for value in flow.values if value.is_output}
    assert marked == {(("out",),), (("flat",),)}


def test_output_is_no_single_consumer():
    flow = record(nn.Sequential(nn.Conv2d(1, 1, 1), nn.Flatten()), (torch.randn(1, 1, 2, 2),))
    assert flow.single_consumer(flow.calls[0].outputs[0]) is flow.calls[1]
    assert flow.single_consumer(flow.calls[1].outputs[0]) is None


def test_module_that_returned_its_input_is_one_call(flow):
    skip = flow.calls[4]
    assert skip.module_name == "skip"
    assert skip.inputs != skip.outputs
    assert flow.single_consumer(skip.outputs[0]).name == "add"


class ReadsBoth(nn.Module):
    def __init__(self):
        super().__init__()
        self.drop = nn.Dropout()

    def forward(self, x):
        return x * 2, self.drop(x).mul(3), x * 4


def test_what_a_module_returns_and_what_it_was_given_are_told_apart():
    """In eval mode dropout returns the very tensor that it was given; in training it does not."""
    flow = record(ReadsBoth(), (torch.randn(2),))
    (given,), (returned,) = flow.calls_of("drop")[0].inputs, flow.calls_of("drop")[0].outputs
    assert names(flow.consumers(given)) == ["mul", "Dropout", "mul"]
    assert names(flow.consumers(returned)) == ["mul"]


def test_owner_and_frames():
    model = nn.Sequential(Residual())
    flow = record(model, (torch.randn(2, 3, 4, 4),))
    root, inner = flow.frames
    assert (root.owner, inner.owner, inner.parent) == ("", "0", 0)
    assert {call.owner for call in flow.calls} == {"0"}
    assert root.events == (("frame", 1),)
    assert [kind for kind, _ in inner.events] == ["call"] * len(flow.calls)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2)

    def forward(self, x):
        return self.attention(x, x, x)[0]


def test_what_a_leaf_does_inside_is_not_recorded():
    (call,) = record(Attention(), (torch.randn(3, 1, 4),)).calls
    assert call.name == "MultiheadAttention"
    assert len(call.outputs) == 2


class Reads(nn.Module):
    def __init__(self, read):
        super().__init__()
        self.conv, self.read = nn.Conv2d(1, 1, 1), read

    def forward(self, x):
        out = self.conv(x)
        self.read(out)
        return out.relu()


@pytest.mark.parametrize("read", [lambda t: t.shape, lambda t: t.size(0), lambda t: t.dtype, len, lambda t: t.is_cuda])
def test_reading_metadata_is_no_dataflow(read):
    flow = record(Reads(read), (torch.randn(1, 1, 2, 2),))
    assert names(flow.calls) == ["Conv2d", "relu"]


def test_reading_elements_is_dataflow():
    flow = record(Reads(lambda tensor: tensor.sum().item()), (torch.randn(1, 1, 2, 2),))
    assert names(flow.calls) == ["Conv2d", "sum", "item", "relu"]
    assert flow.single_consumer(flow.calls[0].outputs[0]) is None


class Views(nn.Module):
    def forward(self, x):
        x = x + 1
        row = x[0]
        row.relu_()
        return x * 2


def test_write_through_a_view_changes_the_tensor_behind_it():
    flow = record(Views(), (torch.randn(2, 3),))
    add, getitem, relu, mul = flow.calls
    assert names(flow.calls) == ["add", "getitem", "relu", "mul"]
    assert flow.producer(mul.inputs[0]) is relu
    assert mul.inputs != add.outputs
    assert getitem.outputs != relu.outputs


class WithState(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))
        self.register_buffer("mean", torch.zeros(3))

    def forward(self, x):
        return F.linear(x - self.mean, self.weight.diag())


def test_parameters_and_buffers_are_state():
    flow = record(WithState(), (torch.randn(2, 3),))
    state = {value.path for value in flow.values if value.source == "state"}
    assert state == {("mean",), ("weight",)}


@dataclasses.dataclass
class Result:
    logits: torch.Tensor
    hidden: list


class ReturnsDataclass(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(2, 2)

    def forward(self, x, *, pair):
        return Result(self.fc(x), [self.fc(pair[0])])


def test_nested_inputs_and_dataclass_outputs():
    flow = record(ReturnsDataclass(), (torch.randn(1, 2),), {"pair": (torch.randn(1, 2), None)})
    assert [value.path for value in flow.values if value.source == "input"] == [(0,), ("pair", 0)]
    assert [value.output_paths for value in flow.values if value.is_output] == [(("logits",),), (("hidden", 0),)]
    assert flow.frames[0].kwargs["pair"] == (Ref(1), None)


def test_one_tensor_passed_twice_is_one_value():
    class Sum(nn.Module):
        def forward(self, a, b):
            return a + b

    x = torch.randn(2)
    (call,) = record(Sum(), (x,), {"b": x}).calls
    assert len(call.inputs) == 1
    assert call.args == (Ref(0), Ref(0))


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (operator.add, "add"),
        (operator.iadd, "add"),
        (torch.add, "add"),
        (torch.Tensor.add_, "add"),
        (torch.Tensor.__radd__, "add"),
        (torch.Tensor.__rsub__, "sub"),
        (torch.concat, "cat"),
        (F.relu, "relu"),
        (torch.relu_, "relu"),
        (torch.Tensor.T.__get__, "T"),
        (torch.ops.aten.relu.default, "relu"),
        (operator.truediv, "div"),
        (operator.getitem, "getitem"),
        (torch.Tensor.__getitem__, "getitem"),
        (torch.Tensor.__invert__, "invert"),
    ],
)
def test_operation_name_ignores_spelling(function, name):
    assert operation_name(function) == name


def test_leaves():
    class Renamed(nn.ReLU):
        pass

    class Overridden(nn.Conv2d):
        def forward(self, x):
            return super().forward(x)

    assert is_leaf(nn.ReLU())
    assert is_leaf(Renamed())
    assert not is_leaf(Overridden(1, 1, 1))
    assert not is_leaf(nn.Sequential())
    assert not is_leaf(Residual())
    assert is_leaf(nn.MultiheadAttention(2, 1))


class Restless(nn.Module):
    """Changes everything that a forward can change."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(2)
        self.frozen = nn.BatchNorm1d(2).eval()
        self.register_buffer("steps", torch.zeros(()))
        self.count = 0

    def forward(self, x, fail=False):
        self.steps.add_(1)
        self.steps = self.steps + 0
        self.count += 1
        self.last = x
        x.mul_(torch.rand(2))
        if fail:
            raise OSError("no")
        return self.frozen(self.norm(x))


@pytest.mark.parametrize("fail", [False, True])
def test_recording_leaves_the_model_as_it_was(fail):
    model = Restless()
    buffers = {name: (buffer, buffer.clone()) for name, buffer in model.named_buffers()}
    attributes = set(vars(model))
    x = torch.randn(4, 2)
    x_before = x.clone()
    random_state = torch.get_rng_state()
    if fail:
        with pytest.raises(OSError, match="no"):
            record(model, (x,), {"fail": True})
    else:
        record(model, (x,))
    assert model.training
    assert model.norm.training
    assert not model.frozen.training
    for name, buffer in model.named_buffers():
        assert buffer is buffers[name][0]
        assert torch.equal(buffer, buffers[name][1])
    assert set(vars(model)) == attributes
    assert model.count == 0
    assert torch.equal(x, x_before)
    assert torch.equal(torch.get_rng_state(), random_state)
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


def test_users_hooks_survive_and_run():
    model, seen = Residual(), []
    handle = model.conv.register_forward_hook(lambda module, args, output: seen.append(1))
    record(model, (torch.randn(1, 3, 2, 2),))
    assert len(seen) == 2
    assert list(model.conv._forward_hooks.values())
    handle.remove()
    assert not model.conv._forward_hooks


def test_no_tensor_outlives_the_recording():
    kept = []

    class Spy(nn.Module):
        def forward(self, x):
            out = x + 1
            kept.append(weakref.ref(out))
            return out * 2

    flow = record(Spy(), (torch.randn(2),))
    gc.collect()
    assert kept[0]() is None
    assert len(flow.calls) == 2


def test_lazy_parameters_are_refused():
    with pytest.raises(ValueError, match=r"0\.weight has no shape"):
        record(nn.Sequential(nn.LazyLinear(2)), (torch.randn(1, 2),))


def test_no_gradients_and_eval_mode():
    seen = []

    class Asks(nn.Module):
        def forward(self, x):
            seen.append((self.training, torch.is_grad_enabled()))
            return x * 2

    record(Asks(), (torch.randn(1),))
    assert seen == [(False, False)]


def test_transformers_model_output_and_every_addition():
    model = vision_models.transformers_resnet()
    flow = record(model, (torch.randn(1, 3, 32, 32),))
    additions = [call for call in flow.calls if call.name == "add"]
    assert [call.owner for call in additions] == [
        f"resnet.encoder.stages.{stage}.layers.{layer}" for stage, layer in ((0, 0), (1, 0), (1, 1))
    ]
    assert [value.output_paths for value in flow.values if value.is_output] == [(("logits",),)]
    assert all(value.source != "unknown" for value in flow.values)
