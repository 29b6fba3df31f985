"""Whole numbers, flags and texts that a forward reads of its module, and that code changes after preparation."""

import copy
import pickle
import types
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from prepared_nets import X, conv
from tolerances import SUMS, assert_close
from tritonq import convert, export_onnx, load_converted, save_converted, verify
from tritonq.prepare import disable_fake_quant, prepare_qat
from tritonq.prepare.forwards.branches import fixed_values
from tritonq.prepare.forwards.edited import apply_forward, forward_data


class Changing(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.step, self.depth, self.skips, self.kind = conv(), conv(), 0, 2, True, "sum"
        self.config = types.SimpleNamespace(skips=True)
        self.axis, self.factor, self.none, self.rate = 1, 2, None, 0.5


class Step(Changing):
    def forward(self, x):
        x = F.relu(self.first(x))
        if self.step > 10:
            x = self.second(x) + x
        return self.second(x + F.relu(self.second(x)))


class Loop(Changing):
    def forward(self, x):
        x = F.relu(self.first(x))
        for _ in range(self.depth):
            x = F.relu(self.second(x) + x)
        return self.first(x)


class Flag(Changing):
    def forward(self, x):
        y = F.relu(self.first(x))
        return self.second(y + x) if self.skips else self.second(y)


class Text(Changing):
    def forward(self, x):
        y = F.relu(self.first(x))
        return self.second(y + x if self.kind == "sum" else torch.cat([y[:, :2], x[:, :2]], 1))


class OfConfiguration(Changing):
    def forward(module, x):  # noqa: N805 - the first argument may have any name
        y = F.relu(module.first(x))
        return module.second(y + x if module.config.skips else y)


class Axis(Changing):
    def forward(self, x):
        return self.second(torch.cat([F.relu(self.first(x)), x], self.axis).reshape(x.shape[0], 4, -1, 6))


CHANGES = [
    (Step, {"step": 11}),
    (Loop, {"depth": 3}),
    (Loop, {"depth": 1}),
    (Flag, {"skips": False}),
    (Text, {"kind": "parts"}),
    (OfConfiguration, {"config": types.SimpleNamespace(skips=False)}),
    (Axis, {"axis": 2}),
]


def prepared_and_float(build):
    torch.manual_seed(0)
    model = build()
    return prepare_qat(model, example_inputs=X, warn=False), model


@pytest.mark.parametrize(("build", "change"), CHANGES)
def test_changed_ones_are_followed_and_told(build, change):
    prepared, model = prepared_and_float(build)
    assert forward_data(prepared)["eval"] is not None
    disable_fake_quant(prepared)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_close(prepared(X), model(X), SUMS)
    for changed in (model, prepared):
        vars(changed).update(change)
    for training in (True, False):
        model.train(training), prepared.train(training)
        told = pytest.warns(
            UserWarning, match=f"reads {next(iter(change))}.*, which was .* when the model was prepared"
        )
        with told if training else warnings.catch_warnings():
            assert_close(prepared(X), model(X), SUMS)
    for copied in (copy.deepcopy(prepared), pickle.loads(pickle.dumps(prepared))):
        assert_close(copied(X), model(X), SUMS)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("build", "change"), CHANGES)
def test_what_runs_then_trains_converts_saves_and_exports(build, change, tmp_path):
    prepared, model = prepared_and_float(build)
    vars(prepared).update(change)
    prepared.train()(X).square().sum().backward()
    prepared.eval()
    converted = convert(prepared)
    assert torch.equal(converted(X), prepared(X))
    assert not torch.equal(converted(X), convert(prepared_and_float(build)[0].eval())(X))
    save_converted(converted, tmp_path / "model.pt")
    loaded = load_converted(tmp_path / "model.pt", model)
    vars(loaded).update(change)
    assert torch.equal(loaded(X), converted(X))
    export_onnx(converted, tmp_path / "model.onnx", X)
    # A layer on a path that was not recorded may read what lies on no grid, and computes in float.
    assert verify(prepared, tmp_path / "model.onnx", [X]).agrees() or build not in (Loop, Axis)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("build", "change"), CHANGES)
def test_compiled_forwards_follow_them(build, change):
    prepared, _ = prepared_and_float(build)
    prepared.eval()
    torch.compiler.reset()
    compiled = torch.compile(prepared, backend="aot_eager", fullgraph=True)
    before = compiled(X)
    assert_close(before, prepared(X), SUMS)
    vars(prepared).update(change)
    assert_close(compiled(X), prepared(X), SUMS)
    assert not torch.equal(compiled(X), before)


class Scaled(Changing):
    def forward(self, x):
        return self.second(F.relu(self.first(x) * self.factor))


class Clipped(Changing):
    def forward(self, x):
        return self.second(F.hardtanh(self.first(x), 0.0, self.rate))


@pytest.mark.parametrize(
    ("build", "name", "was", "becomes"),
    [(Scaled, "mul", {"factor": 2}, {"factor": 3}), (Clipped, "hardtanh", {"rate": 0.5}, {"rate": 0.75})],
)
@pytest.mark.filterwarnings("ignore:the forward of")
def test_a_number_of_several_operations_that_became_one_is_refused(build, name, was, becomes):
    prepared, _ = prepared_and_float(build)
    vars(prepared).update(was)
    before = prepared(X)
    vars(prepared).update(becomes)
    with pytest.raises(ValueError, match=f"{name} in the forward of {build.__name__} was recorded .*prepare the model"):
        prepared(X)
    vars(prepared).update(was)
    assert torch.equal(prepared(X), before)


class InPlace(Changing):
    def forward(self, x):
        y = self.first(x)
        y.add_(x)
        return self.second(y.relu()) if self.skips else self.second(y)


def test_a_forward_that_cannot_follow_refuses():
    prepared, _ = prepared_and_float(InPlace)
    prepared.skips = False
    with pytest.raises(ValueError, match=r"InPlace reads skips, .* False now\. Prepare the model again"):
        prepared(X)


class Reads(Changing):
    def forward(self, x):
        sizes = [self.first.kernel_size, self.rate, self.training, self.first.weight.shape, self.first]
        return x if self.none is None or self.kind or sizes else x + self.helper()

    def helper(self):
        return self.factor


def test_they_are_found_with_those_of_modules_inside_and_of_methods():
    assert fixed_values(Reads()) == {"first.kernel_size": (3, 3), "none": None, "kind": "sum", "factor": 2}


@pytest.mark.parametrize("values", [[], {"__class__": 1}, {"a.b c": 1}, {"depth": {"exec": 1}}])
def test_values_of_foreign_files_are_checked(values):
    prepared, _ = prepared_and_float(Loop)
    data = forward_data(prepared) | {"values": values}
    with pytest.raises(ValueError, match=r"path|not an argument"):
        apply_forward(prepared, data)
