"""Forwards as graphs: tracing that the record proves right, edits, plain data, modules with an edited forward."""

import copy
import inspect
import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from prepared_nets import saved_and_loaded
from tolerances import EXACT, assert_close
from traced_forwards import traced
from tritonq.nn.original_class import original_class
from tritonq.prepare.forwards.edited import EditedForward, apply_forward, forward_data
from tritonq.prepare.forwards.graph import node_operands, sequence_operand
from tritonq.prepare.forwards.trace import TraceError


def through_data(graph):
    return json.loads(json.dumps(graph.to_data()))


class Block(nn.Module):
    """Dropout by function, control flow on the mode, a size in the forward, an optional argument."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(6, 6)
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.register_buffer("shift", torch.tensor(0.5))

    def forward(self, x, mask=None, *, times=1, flag: bool = True):
        out = self.fc(x.reshape(x.size(0), -1))
        if self.training:
            out = out * self.scale
        out = F.dropout(out, 0.5, self.training)
        out += self.shift
        if mask is not None:
            out = out + mask
        if flag:
            out = out[:, :3]
        return {"out": F.relu(out), "sizes": (x.shape[0] // 1, times)}


def same(a, b):
    assert_close(a, b, EXACT)


@pytest.mark.parametrize("training", [True, False])
def test_traced_forward_computes_what_the_module_does(training):
    model = Block()
    edited = copy.deepcopy(model)
    apply_forward(edited, through_data(traced(model, torch.randn(2, 2, 3))[0]))
    model.train(training)
    edited.train(training)
    x = torch.randn(5, 3, 2)  # another batch and shape than recorded
    torch.manual_seed(0)
    expected = model(x)
    torch.manual_seed(0)
    got = edited(x)
    same(got["out"], expected["out"])
    assert got["sizes"] == expected["sizes"] == (5, 1)
    assert bool((edited(x)["out"] == edited(x)["out"]).all()) is not training  # dropout works in training alone


def test_argument_that_was_given_as_a_tensor_stays_one():
    model = Block()
    graph, _ = traced(model, torch.randn(2, 6), mask=torch.ones(2, 6))
    edited = copy.deepcopy(model).eval()
    apply_forward(edited, graph.to_data())
    x, mask = torch.randn(3, 6), torch.randn(3, 6)
    same(edited(x, mask)["out"], model.eval()(x, mask)["out"])


@pytest.mark.parametrize("arguments", [{"mask": torch.ones(2, 6)}, {"flag": False}, {"times": 2}, {"flag": 1}])
def test_argument_that_was_fixed_is_checked(arguments):
    model = Block()
    apply_forward(model, traced(Block(), torch.randn(2, 6))[0].to_data())
    (name,) = arguments
    with pytest.raises(ValueError, match=f"argument {name} was .* when the model was prepared"):
        model(torch.randn(2, 6), **arguments)


def test_number_other_than_the_default_stays_symbolic():
    class Pool(nn.Module):
        def forward(self, x, size):
            return x.reshape(-1, size)

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.pool = Pool()

        def forward(self, x):
            return self.pool(x, x.shape[1])

    model = Outer()
    graph, _ = traced(model, torch.randn(2, 3), owner="pool")
    apply_forward(model.pool, graph.to_data())
    assert model(torch.randn(4, 5)).shape == (4, 5)


def test_edited_module_keeps_its_class_attributes_and_signature():
    model = Block()
    signature, state = inspect.signature(model.forward), list(model.state_dict())
    apply_forward(model, traced(Block(), torch.randn(2, 6))[0].to_data())
    assert isinstance(model, Block)
    assert isinstance(model, EditedForward)
    assert type(model).__name__ == "Block"
    assert original_class(model) is Block
    assert inspect.signature(model.forward) == signature
    assert list(model.state_dict()) == state
    assert repr(model) == repr(Block())
    assert forward_data(Block()) is None


class Sum(nn.Module):
    def forward(self, a, b):
        return torch.relu(a + b)


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2)

    def forward(self, x):
        out = self.norm(self.conv(x))
        out += x
        out = F.relu(out, inplace=True)
        return torch.cat([out, x], dim=1)


def with_sum():
    model = Residual()
    graph, sites = traced(model, torch.randn(1, 2, 3, 3))
    graph.erase(sites["relu"].node)
    model.sum = Sum()
    graph.replace(sites["add"].node, "sum", node_operands, sites["add"].in_place)
    return model, graph


def test_addition_and_relu_become_a_child():
    expected, x = Residual(), torch.randn(2, 2, 5, 5)
    model, graph = with_sum()
    model.load_state_dict(expected.state_dict())
    apply_forward(model, through_data(graph))
    for training in (True, False):
        same(model.train(training)(x), expected.train(training)(x))
    targets = [node["target"] for node in forward_data(model)["eval"]]
    assert "sum" in targets
    assert not {"operator.add", "torch.nn.functional.relu"} & set(targets)


def test_concatenation_becomes_a_child():
    class Cat(nn.Module):
        def forward(self, tensors):
            return torch.cat(list(tensors), 1) * 2

    model, x = Residual().eval(), torch.randn(2, 2, 5, 5)
    expected = model(x)
    graph, sites = traced(model, x)
    model.cat = Cat()
    graph.replace(sites["cat"].node, "cat", sequence_operand)
    apply_forward(model, through_data(graph))
    same(model(x), expected * 2)


def test_insert_after_changes_every_later_reader():
    class Double(nn.Module):
        def forward(self, x):
            return 2 * x

    class Reader(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Identity()

        def forward(self, x):
            y = self.conv(x)
            y.relu_()
            return y + 1, y + 2

    model, x = Reader(), torch.tensor([-1.0, 3.0])
    graph, sites = traced(model, x)
    model.twice = Double()
    graph.insert_after(sites["relu"].node, "twice", sites["relu"].in_place)
    apply_forward(model, through_data(graph))
    first, second = model(x.clone())
    assert first.tolist() == [1, 7]
    assert second.tolist() == [2, 8]


def test_hooks_on_children_run():
    model, graph = with_sum()
    apply_forward(model, graph.to_data())
    seen = []
    model.conv.register_forward_hook(lambda module, args, output: seen.append(module))
    model(torch.randn(1, 2, 3, 3))
    assert seen == [model.conv]


def test_deepcopy_and_pickle_keep_the_forward():
    model, graph = with_sum()
    apply_forward(model, graph.to_data())
    x = torch.randn(2, 2, 3, 3)
    for again in (copy.deepcopy(model), saved_and_loaded(model)):
        assert type(again) is type(model)
        assert again.sum is not model.sum
        same(again.eval()(x), model.eval()(x))


def test_equal_forwards_share_a_class():
    (first, graph), (second, _) = with_sum(), with_sum()
    apply_forward(first, graph.to_data())
    apply_forward(second, graph.to_data())
    assert type(first) is type(second)


@pytest.mark.parametrize("training", [True, False])
def test_compiles_without_a_graph_break(training):
    torch._dynamo.reset()
    model, graph = with_sum()
    apply_forward(model, graph.to_data())
    block = Block()
    apply_forward(block, traced(Block(), torch.randn(2, 6))[0].to_data())
    for module, x in ((model, torch.randn(2, 2, 3, 3)), (block.eval(), torch.randn(3, 6))):
        module.train(training and module is model)
        compiled = torch.compile(copy.deepcopy(module), backend="eager", fullgraph=True)
        got, expected = compiled(x), module(x)
        same(got["out"] if isinstance(got, dict) else got, expected["out"] if isinstance(got, dict) else expected)


def test_call_with_different_constants_is_refused():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = Block()

        def forward(self, x):
            return self.block(x, flag=True)["out"], self.block(x, flag=False)["out"]

    with pytest.raises(TraceError, match="argument flag differs"):
        traced(Twice(), torch.randn(2, 6), owner="block")


def test_write_to_a_buffer_happens_at_each_call():
    class Counts(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("steps", torch.zeros(()))

        def forward(self, x):
            self.steps.add_(1)
            return x + self.steps

    model = Counts()
    apply_forward(model, through_data(traced(model, torch.zeros(1))[0]))
    assert model.steps.item() == 0
    assert [model(torch.zeros(1)).item() for _ in range(3)] == [1, 2, 3]


def good_data():
    return with_sum()[1].to_data()


def broken(change):
    data = good_data()
    change(data)
    return data


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data.update(version=99), "version"),
        (lambda data: data["eval"][0].pop("op"), "needs op"),
        (lambda data: data["eval"][1].update(op="call_function", target="os.system"), "unknown function"),
        (lambda data: data["eval"][1].update(op="call_function", target="torch.load"), "unknown function"),
        (lambda data: data["eval"][1].update(op="call_function", target="torch.os.system"), "unknown function"),
        (lambda data: data["eval"][1].update(op="call_method", target="__class__"), "not a method"),
        (lambda data: data["eval"][1].update(target='x"); import os; ("'), "not the path"),
        (lambda data: data["eval"][0].update(target="x=print()"), "not a Python name"),
        (lambda data: data["eval"][1].update(name="a; b"), "not a Python name"),
        (lambda data: data["eval"][1].update(kwargs={"a)": 1}), "not a Python name"),
        (lambda data: data["eval"][1].update(args=[{"node": "later"}]), "doesn't come before"),
        (lambda data: data["eval"][1].update(args=[{"exec": "1"}]), "not an argument"),
        (
            lambda data: data["eval"][1].update(
                op="call_function", target="getattr", args=[{"node": "x"}, "__class__"]
            ),
            "public attributes",
        ),
        (lambda data: data["eval"][1].update(target="absent"), "absent"),
        (lambda data: data.update(eval=5), "list of nodes"),
        (lambda data: data["eval"][1].update(kwargs=None), "not a node"),
        (lambda data: data["eval"][1].update(args=[{"node": ["x"]}]), "not a node"),
        (lambda data: data["eval"][1].update(args=[{"tuple": 3}]), "not a node"),
        (lambda data: data["eval"][1].update(args=[{"device": "pencil"}]), "not a node"),
        (lambda data: data.update(values={"depth": {"slice": []}}, otherwise=None), "not a constant"),
    ],
)
def test_foreign_data_is_refused_and_the_module_untouched(change, message):
    model = with_sum()[0]
    with pytest.raises(ValueError, match=message):
        apply_forward(model, broken(change))
    assert type(model) is Residual


def test_constants_survive_the_way_through_data():
    class Constants(nn.Module):
        def forward(self, x):
            x = x.to(torch.float64).to(memory_format=torch.contiguous_format)
            x = x.clamp(max=float("inf"))[..., 1:, None]
            return {"a": (x.sum(dim=[0, 1]), True), "device": x.to(device=torch.device("cpu"))}

    model, x = Constants(), torch.randn(3, 4)
    expected = model(x)
    apply_forward(model, through_data(traced(Constants(), x)[0]))
    got = model(x)
    same(got["a"][0], expected["a"][0])
    assert got["a"][1] is True
    same(got["device"], expected["device"])


def test_data_of_an_edited_forward_applies_to_a_fresh_module():
    model, graph = with_sum()
    apply_forward(model, graph.to_data())
    fresh = Residual()
    with pytest.raises(ValueError, match="'sum'"):
        apply_forward(fresh, forward_data(model))
    fresh.sum = Sum()
    apply_forward(fresh, forward_data(model))
    fresh.load_state_dict(model.state_dict())
    x = torch.randn(1, 2, 3, 3)
    same(fresh.eval()(x), model.eval()(x))
