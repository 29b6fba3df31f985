"""Conditions of a forward that a trace would freeze, and that another call may decide otherwise."""

import pytest
import torch
from torch import nn

from prepared_nets import X, conv
from tritonq.prepare import prepare_qat
from tritonq.prepare.forwards.branches import frozen_branch
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
