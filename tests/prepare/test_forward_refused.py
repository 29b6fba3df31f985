"""Forwards that no graph can stand for, and calls that a traced forward refuses."""

import random
import re
from typing import NamedTuple

import pytest
import torch
from torch import nn

from traced_forwards import traced
from tritonq.prepare.forwards.graph import ForwardGraph
from tritonq.prepare.forwards.trace import TraceError


class Pair(NamedTuple):
    first: torch.Tensor
    second: torch.Tensor


class Untraceable(nn.Module):
    """One forward that can't be a graph, chosen by name."""

    def __init__(self, how):
        super().__init__()
        self.how = how
        self.fc = nn.Linear(2, 2)
        self.register_buffer("steps", torch.zeros(()))
        self.constant = torch.ones(2)
        self.seen = []

    def forward(self, x, *rest, **named):
        return getattr(self, self.how)(x, *rest, **named)

    def branch(self, x):
        return self.fc(x) if x.sum() > 0 else x

    def no_grad(self, x):
        with torch.no_grad():
            x = x + 1
        return self.fc(x)

    def autocast(self, x):
        with torch.autocast("cpu", torch.bfloat16):
            return self.fc(x)

    def noise(self, x):
        return self.fc(x) + torch.rand(2)

    def python_noise(self, x):
        return self.fc(x) * random.random()

    def replaces_buffer(self, x):
        self.steps = self.steps + 1
        return self.fc(x)

    def plain_tensor(self, x):
        return self.fc(x) + self.constant

    def named_tensors(self, x, **named):
        return self.fc(x) + named["y"]

    def own_class(self, x):
        return Pair(self.fc(x), x)

    def remembers(self, x):
        self.last = x
        return self.fc(x)

    def appends(self, x):
        self.seen.append(x)
        return self.fc(x)

    def is_tensor(self, x):
        return self.fc(x) + 1 if isinstance(x, torch.Tensor) else x

    def alias(self, x):
        y = self.fc(x)
        z = y
        y += 1
        return z * y

    def changes_argument(self, x):
        x += 1
        return self.fc(x)


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("branch", "control flow"),
        ("no_grad", "set_grad_enabled"),
        ("autocast", "autocast"),
        ("noise", "rand on nothing that it was given"),
        ("python_noise", "random numbers in Python"),
        ("replaces_buffer", "changes attributes (_buffers)"),
        ("remembers", "changes attributes (last)"),
        ("appends", "changes attributes (seen)"),
        ("plain_tensor", "neither parameter nor buffer"),
        ("own_class", "it builds a Pair"),
        ("is_tensor", "leaves out calls"),
        ("alias", "leaves out calls"),
        ("changes_argument", "changes its argument in place"),
    ],
)
def test_forward_that_no_graph_can_stand_for_says_why(how, reason):
    model = Untraceable(how)
    state, numbers = random.getstate(), torch.get_rng_state()
    with pytest.raises(TraceError, match=re.escape(reason)):
        traced(model, torch.ones(2, 2))
    assert type(model) is Untraceable
    assert model.steps.item() == 0
    assert not hasattr(model, "last")
    assert model.seen == []
    assert random.getstate() == state
    assert torch.equal(torch.get_rng_state(), numbers)


def test_tensors_in_free_keyword_arguments_are_refused():
    with pytest.raises(TraceError, match="named"):
        traced(Untraceable("named_tensors"), torch.ones(2, 2), y=torch.ones(2))


def test_forward_data_without_the_graph_of_eval_mode_are_refused():
    class Double(nn.Module):
        def forward(self, x):
            return x * 2

    data = traced(Double(), torch.ones(2))[0].to_data()
    del data["eval"]
    with pytest.raises(ValueError, match="have the nodes of eval mode under 'eval'"):
        ForwardGraph.from_data(data)
