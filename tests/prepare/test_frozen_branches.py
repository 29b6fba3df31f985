"""Conditions of a forward that a trace would freeze, and that another call may decide otherwise."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from prepared_nets import X, conv
from tolerances import SUMS, assert_close
from tritonq import summary
from tritonq.prepare import disable_fake_quant, prepare_qat
from tritonq.prepare.forwards.branches import fixed_number, frozen_branch
from tritonq.prepare.forwards.edited import forward_data


def on_an_argument(self, x, flag=None):
    return x if flag is None else x + 1


def on_the_module(self, x):
    return x if self.flag is None and len(self.sizes) == 2 else x + 1


def never_reached(self, x):
    return x if not self.sizes and x.sum() > 0 else x + 1


def by_a_helper(self, x):
    return on_an_argument(self, x)


@pytest.mark.parametrize(
    ("forward", "condition"),
    [
        (on_an_argument, "`flag is None`"),
        (on_the_module, None),
        (never_reached, None),
        (by_a_helper, "`flag is None`"),
        (lambda self, x: x + 1, None),
        (lambda self, x: x if isinstance(x, torch.Tensor) else x[0], "`isinstance(x, torch.Tensor)`"),
    ],
)
def test_conditions_that_another_call_may_decide_otherwise_are_found(forward, condition):
    module = type("Module", (nn.Module,), {"forward": forward, "flag": None, "sizes": (1, 2)})()
    assert frozen_branch(module) == condition


class Sum(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.skip = conv(), None

    def forward(self, x):
        return self.conv(x) + (x if self.skip is None else self.skip(x))


def test_forward_without_such_conditions_stays_a_graph():
    assert forward_data(prepare_qat(Sum(), example_inputs=X))["eval"] is not None


def test_forward_with_one_keeps_its_branches():
    class Skipped(Sum):
        def forward(self, x, skip=False):
            y = self.conv(x)
            return y if skip else y + x

    assert "answers" in forward_data(prepare_qat(Skipped(), example_inputs=X))


class Inner(nn.Module):
    def __init__(self):
        super().__init__()
        self.rate, self.sizes = 0.25, (1, 2)


def of_the_module(self, x):
    return x * self.flag


def of_a_child(self, x):
    return x * self.child.rate if self.training else x


def of_a_list(module, x):
    return x * module.weights[0] + module.weights[1]


def of_a_helper(self, x):
    return of_the_module(self, x)


def of_none(self, x):
    return x.reshape(self.child.sizes) * self.parameter * self.flag.bit_length()


@pytest.mark.parametrize(
    ("forward", "flag", "number"),
    [
        (of_the_module, 0.5, "`self.flag`"),
        (of_a_child, 1, "`self.child.rate`"),
        (of_a_list, 1, "`module.weights`"),
        (of_a_helper, 0.5, "`self.flag`"),
        (of_none, 1, None),
    ],
)
def test_numbers_that_training_code_may_change_are_found(forward, flag, number):
    module = type("Module", (nn.Module,), {"forward": forward, "flag": flag, "weights": [0.5, 1.0]})()
    module.child, module.parameter = Inner(), nn.Parameter(torch.ones(2))
    assert fixed_number(module) == number


class Annealed(nn.Module):
    """A residual branch whose share grows, and whose dropout rises, while the model trains."""

    def __init__(self):
        super().__init__()
        self.conv, self.head, self.share, self.rate = conv(), conv(), 0.5, 0.0

    def forward(self, x):
        x = self.conv(x)
        branch = nn.functional.dropout(self.head(x).sigmoid(), self.rate, self.training)
        return self.head(x + branch * self.share)


@pytest.mark.parametrize("training", [False, True])
def test_numbers_that_change_after_preparation_count(training):
    torch.manual_seed(0)
    model = Annealed()
    prepared = prepare_qat(model, example_inputs=X)
    assert {row.kind: row.status for row in summary(prepared).layers if row.kind in ("add", "mul")} == {
        "add": "quantized",
        "mul": "quantized",
    }
    disable_fake_quant(prepared)
    for changed in (model, prepared):
        changed.train(training)
        changed.share, changed.rate = 2.0, 1.0
    with pytest.warns(UserWarning, match="a number in it changed"):
        got = prepared(X)
    assert_close(got, model(X), SUMS)


class DrawsNumPy(Annealed):
    def forward(self, x):
        return self.conv(x) + self.head(x) * float(np.random.rand())


def test_numbers_that_numpy_draws_are_drawn_in_each_call_and_its_state_is_left_alone():
    np.random.seed(0)
    before = np.random.get_state()[1].copy()
    prepared = prepare_qat(DrawsNumPy(), example_inputs=X).eval()
    assert (np.random.get_state()[1] == before).all()
    np.random.seed(1)
    with pytest.warns(UserWarning, match="a number in it changed"):
        first = prepared(X)
    assert not torch.equal(prepared(X), first)


class InPlaceWithoutGradient(nn.Module):
    """Overwrites a layer's result where no gradient needs it, as prepare_qat records it."""

    def __init__(self, by_name):
        super().__init__()
        self.conv, self.head, self.by_name = conv(), conv(), by_name

    def forward(self, x):
        if x.sum() > 1e9:  # keeps its branches
            return x
        x = self.conv(x)
        in_place = not torch.is_grad_enabled()
        return self.head(F.relu(x, inplace=in_place) if self.by_name else F.relu(x, in_place))


@pytest.mark.parametrize("by_name", [False, True])
def test_whether_a_call_overwrites_its_input_may_change_after_preparation(by_name):
    torch.manual_seed(0)
    model = InPlaceWithoutGradient(by_name)
    prepared = prepare_qat(model, example_inputs=X)
    (answer,) = forward_data(prepared)["answers"].values()
    assert (answer[0], len(answer)) == ("erase", 4)  # no number is compared
    disable_fake_quant(prepared)
    assert_close(prepared(X), model(X), SUMS)
    with torch.no_grad():
        assert_close(prepared(X), model(X), SUMS)
