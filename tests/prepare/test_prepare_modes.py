"""Forwards that differ between training and eval mode: what only one of them does is neither lost nor fused away."""

import copy
import functools
import logging
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import tritonq
import tritonq.nn as qnn
from prepared_nets import Net, X, conv, norm, of_type
from tolerances import EXACT, LONG_SUMS, assert_close
from tritonq.prepare import check, disable_fake_quant, prepare_qat

# What stays in float is the subject of tests of its own.
pytestmark = pytest.mark.filterwarnings("ignore:prepare_qat leaves")


def assert_trains_alike(model, prepared, *args, **kwargs):
    """In training mode and without rounding a prepared model returns what the float model does."""
    model, prepared = copy.deepcopy(model).train(), copy.deepcopy(prepared).train()
    disable_fake_quant(prepared)
    torch.manual_seed(0)
    expected = model(*args, **kwargs)
    torch.manual_seed(0)
    got = prepared(*args, **kwargs)
    assert_close(got, expected, LONG_SUMS)


def prepared_and_trained(model, x=X):
    prepared = prepare_qat(model, example_inputs=x)
    assert_trains_alike(model, prepared, x)
    prepared.train()
    for _ in range(2):
        out = prepared(x)
        sum(part.square().mean() for part in (out if isinstance(out, tuple) else (out,))).backward()
    prepared.eval()
    converted = tritonq.convert(prepared)
    assert_close(converted(x), prepared(x), EXACT)
    return prepared


def reasons(prepared):
    return {record.name: record.reason for record in prepared.tritonq_report if record.status == "float"}


def second_head(self, x):
    y = self.conv(x)
    out = self.head(self.relu(y))
    return (out, self.second(y)) if self.training else out


def test_relu_stays_where_training_reads_what_it_reads():
    prepared = prepared_and_trained(Net(second_head, conv=conv(), relu=nn.ReLU(), head=conv(), second=conv()))
    assert type(prepared.conv) is qnn.Conv2d
    assert type(prepared.relu) is nn.ReLU
    assert reasons(prepared)["second"] == "it runs in training mode only, and would not be deployed"


def second_norm(self, x):
    y = self.conv(x)
    return F.relu(self.norm(y)) + (self.conv(x[:1]).mean() if self.training else 0)


def test_norm_stays_where_training_calls_the_layer_without_it():
    prepared = prepared_and_trained(Net(second_norm, conv=conv(), norm=norm()))
    assert type(prepared.conv) is qnn.Conv2d
    assert type(prepared.norm) is nn.BatchNorm2d


def branches_or_merged(self, x):
    x = self.stem(x)
    if self.training:
        y = self.a(x) + self.b(x)
    else:
        self.merged.weight.data = self.a.weight.data + self.b.weight.data
        self.merged.bias.data = self.a.bias.data + self.b.bias.data
        y = self.merged(x)
    return self.head(self.relu(self.norm(y)))


def test_branches_in_training_and_their_merged_layer_in_eval_stay_in_float():
    parts = {name: conv() for name in ("stem", "a", "b", "merged", "head")}
    prepared = prepared_and_trained(Net(branches_or_merged, norm=norm(), relu=nn.ReLU(), **parts))
    assert of_type(prepared, qnn.QATLayer) == ["stem", "head"]
    assert type(prepared.norm) is nn.BatchNorm2d
    assert prepared.head.input_quantizer.has_qparams()  # it reads a tensor that both modes make
    why = reasons(prepared)
    assert why["merged"] == "it runs in eval mode only, so that training would not teach its range"
    assert why["a"] == why["b"] == "it runs in training mode only, and would not be deployed"


def other_sources(self, x):
    y = self.a(x)
    return self.head(y.sigmoid() if self.training else y.tanh())


def test_layer_that_reads_another_tensor_in_each_mode_has_its_own_quantizer():
    prepared = prepared_and_trained(Net(other_sources, a=conv(), head=conv()))
    assert "input_fake_quant" in dict(prepared.head.named_children())


def decoder(self, x):
    y = self.body(x)
    return y if self.training else self.decode(y.softmax(1)) + y[:, :1]


def test_model_with_a_decoder_converts_after_training():
    prepared = prepared_and_trained(Net(decoder, body=conv(), decode=nn.Conv2d(4, 1, 1)))
    assert type(prepared.decode) is nn.Conv2d
    assert not of_type(prepared, qnn.Add)


class Detector(nn.Module):
    """Wants targets in training; its body does something else there."""

    def __init__(self):
        super().__init__()
        self.body = Net(second_head, conv=conv(), relu=nn.ReLU(), head=conv(), second=conv())
        self.last = Net(lambda self, x: self.relu(self.conv(x)), conv=conv(), relu=nn.ReLU())

    def forward(self, x, targets=None):
        if self.training and targets is None:
            raise ValueError("targets are missing")
        y = self.body(x)
        y = self.last(y[0] if isinstance(y, tuple) else y)
        return (y - targets).square().mean() if self.training else y


def test_training_forward_that_wants_targets_is_told_and_runs_without(caplog):
    with caplog.at_level(logging.WARNING, "tritonq"):
        prepared = prepare_qat(model := Detector(), example_inputs=X)
    (line,) = caplog.messages
    assert "Detector does not run on example_inputs (ValueError: targets are missing)" in line
    assert "training_inputs=" in line
    assert type(prepared.body.conv) is qnn.Conv2d  # its children were recorded in training all the same
    assert type(prepared.last.conv) is qnn.ConvReLU2d
    targets = torch.randn(2, 4, 6, 6)
    assert_trains_alike(model, prepared, X, targets)


def test_training_inputs_serve_it(caplog):
    with caplog.at_level(logging.WARNING, "tritonq"):
        prepared = prepare_qat(Detector(), example_inputs=X, training_inputs={"x": X, "targets": torch.zeros(1)})
    assert not caplog.messages
    assert type(prepared.last.conv) is qnn.ConvReLU2d
    model = Detector()
    with pytest.raises(ValueError, match=r"Detector rejects training_inputs in training mode: ValueError: targets"):
        prepare_qat(model, example_inputs=X, training_inputs=X)
    assert type(model.last.conv) is nn.Conv2d


def test_nothing_is_fused_on_trust():
    """Where a forward can't run in training and asks for the mode, its ReLU may not be there in training."""
    prepared = prepare_qat(Mode(), example_inputs=X)
    assert type(prepared.conv) is qnn.Conv2d
    assert type(prepare_qat(Wrapped(), example_inputs=X).conv) is qnn.Conv2d
    assert type(prepare_qat(Plain(), example_inputs=X).conv) is qnn.ConvReLU2d


class Mode(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = conv()

    def forward(self, x, targets=None):
        y = self.conv(x)
        if self.training:
            return (y - targets).square().mean()
        return F.relu(y)


def logged(method):
    @functools.wraps(method)
    def run(*args, **kwargs):
        return method(*args, **kwargs)

    return run


class Wrapped(Mode):
    forward = logged(Mode.forward)


class Plain(Mode):
    def forward(self, x, targets=None):
        return F.relu(self.conv(x))


def test_batch_of_one_behind_a_global_pool_is_no_obstacle(caplog):
    model = nn.Sequential(conv(), nn.AdaptiveAvgPool2d(1), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.Flatten())
    with caplog.at_level(logging.WARNING, "tritonq"):
        prepared = prepare_qat(model.train(), example_inputs=X[:1])
    assert not caplog.messages
    assert type(prepared[2]) is qnn.ConvBn2d


def test_random_numbers_of_training_are_the_same_in_both_runs_and_restored():
    import random

    import numpy as np

    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = conv(), norm()

        def forward(self, x):
            x = self.norm(self.conv(x))
            if self.training:
                x = x * torch.rand(1) + random.random() + float(np.random.rand())
            return x

    states = random.getstate(), np.random.get_state()[1].tolist()
    prepare_qat(Noisy(), example_inputs=X)
    assert random.getstate() == states[0]
    assert np.random.get_state()[1].tolist() == states[1]


class Swapped(nn.Module):
    """Changes what it trains by itself, behind the back of a record."""

    def forward(self, x):
        return x + 1 if self.training and getattr(self, "prepared", False) else x


def test_difference_in_training_alone_is_an_error_and_leaves_the_model(monkeypatch):
    from tritonq.prepare import driver

    model = nn.Sequential(conv(), norm(), Swapped())
    edit = driver.FakeQuantScheme.edit

    def edit_wrongly(self, editor):
        records = edit(self, editor)
        model[2].prepared = True
        return records

    monkeypatch.setattr(driver.FakeQuantScheme, "edit", edit_wrongly)
    with pytest.raises(RuntimeError, match="would not compute in training mode what the float model does"):
        prepare_qat(model, example_inputs=X, inplace=True)
    assert type(model[0]) is nn.Conv2d


def test_modules_that_stay_in_eval_mode_are_recorded_so():
    class Frozen(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = Net(second_head, conv=conv(), relu=nn.ReLU(), head=conv(), second=conv())

        def train(self, mode=True):
            super().train(mode)
            self.body.eval()
            return self

        def forward(self, x):
            return self.body(x)

    assert type(prepare_qat(Frozen().eval(), example_inputs=X).body.conv) is qnn.ConvReLU2d


@pytest.mark.parametrize("fails_in", [True, False])
def test_errors_name_the_submodule_and_leave_the_model_alone(fails_in):
    class Fails(nn.Module):
        def forward(self, x):
            if self.training == fails_in:
                raise RuntimeError("not in this mode")
            return x

    model = nn.Sequential(conv(), nn.Sequential(Fails(), conv()))
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    given = {"example_inputs": X, "training_inputs": X, "inplace": True}
    with pytest.raises(ValueError, match=r"not in this mode \(in '1\.0', a Fails\)"):
        prepare_qat(model, **given)
    assert {name: dict(vars(module)) for name, module in model.named_modules()} == before


def test_what_stays_in_float_unasked_is_told_once(caplog):
    model = nn.Sequential(Net(decoder, body=conv(), decode=nn.Conv2d(4, 1, 1)))
    with (
        caplog.at_level(logging.INFO, "tritonq"),
        pytest.warns(UserWarning, match=r"0\.decode.*eval mode only") as told,
    ):
        prepare_qat(model, example_inputs=X)
    assert len([warning for warning in told if "prepare_qat leaves" in str(warning.message)]) == 1
    assert "Sequential: quantized 1 of 2 layers, 0 of 1 joins" in caplog.messages
    with pytest.raises(ValueError, match=r"0\.decode.*strict=True"):
        prepare_qat(model, example_inputs=X, strict=True, inplace=True)
    assert type(model[0].body) is nn.Conv2d
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prepare_qat(model, example_inputs=X, warn=False)
        model[0].decode.qconfig = None
        prepare_qat(nn.Sequential(conv(), norm()), example_inputs=X, strict=True)


class FarJoins(nn.Module):
    """Adds and multiplies where nothing near is quantized, and says so in the order of use."""

    def __init__(self):
        super().__init__()
        self.head, self.stem = nn.Linear(4, 2), nn.Linear(4, 4)
        self.norms = nn.ModuleList(nn.LayerNorm(4) for _ in range(3))

    def forward(self, x):
        x = self.norms[0](self.stem(x))
        x = self.norms[1](x + torch.softmax(x, -1))
        x = self.norms[2](x * torch.softmax(x, -1))
        return self.head(x)


def test_joins_far_from_layers_are_told_with_their_reason():
    with pytest.warns(UserWarning, match=r"leaves 1 layers and joins of FarJoins in float: add: nothing that it reads"):
        prepared = prepare_qat(FarJoins(), example_inputs=torch.randn(2, 4))
    rows = [(row.name, row.status) for row in tritonq.summary(prepared).layers]
    joins = {"add": "float", "mul": "float"}
    assert [name for name, _ in rows] == ["stem", "norms.0", "add", "norms.1", "mul", "norms.2", "head"]
    assert joins.items() <= dict(rows).items()
    assert all(row.reason for row in tritonq.summary(prepared).in_float)
    with pytest.raises(ValueError, match=r"add: nothing that it reads.*strict=True"):
        prepare_qat(FarJoins(), example_inputs=torch.randn(2, 4), strict=True)


def test_joins_of_parts_without_a_qconfig_are_told_as_asked_for():
    model = FarJoins()
    model.qconfig, model.head.qconfig = None, tritonq.get_qconfig("onnxruntime")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prepared = prepare_qat(model, example_inputs=torch.randn(2, 4), strict=True)
    assert {reasons(prepared)[name] for name in ("add", "mul", "stem")} == {"its qconfig is None"}


class Chaotic(nn.Module):
    """Multiplies what rounding does to a BatchNorm's result."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.head = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1)

    def forward(self, x):
        return self.head(torch.sin(2e4 * self.bn(self.conv(x))))


def test_noise_of_float32_is_no_difference(monkeypatch):
    torch.manual_seed(0)
    model = Chaotic()
    model.bn.running_var.uniform_(0.2, 0.9)
    x = torch.randn(4, 3, 12, 12)
    prepared = tritonq.prepare_qat(model, example_inputs=x, warn=False)
    assert tritonq.summary(prepared).layers
    # A difference of that size between models without such noise is told.
    monkeypatch.setattr(check, "_NOISE_FACTOR", 1e-9)
    with pytest.raises(RuntimeError, match="would not compute in eval mode what the float model does"):
        tritonq.prepare_qat(model, example_inputs=x, warn=False)


def test_outputs_of_another_shape_are_no_noise():
    model, x = nn.Linear(3, 4), torch.ones(1, 3)
    run = check.Run(None, (x.expand(4, 3),), {}, model(x), {})
    with pytest.raises(RuntimeError, match="would not compute in eval mode"):
        check.check_same_output(model, run)
