"""Arguments of calls in forwards that are edited or answered: by name in any order, and left out later."""

import pytest
import torch
from torch import nn

from prepared_nets import X, conv
from tritonq.prepare import disable_fake_quant, prepare_qat


class Parts(nn.Module):
    def __init__(self, branches):
        super().__init__()
        self.first, self.second, self.branches = conv(), conv(), branches

    def forward(self, x):
        x = self.first(x)
        if self.branches and x.sum() > 1e9:
            x = x * 2
        return torch.cat(dim=1, tensors=[x, self.second(x)])


@pytest.mark.parametrize("branches", [False, True])
def test_a_concatenation_with_its_parts_by_name_behind_the_axis(branches):
    net = Parts(branches).eval()
    expected = net(X)
    model = prepare_qat(net, example_inputs=X).eval()
    model(X)
    model.apply(disable_fake_quant)
    assert torch.equal(model(X), expected)


class Clamps(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.bounds = conv(), conv(), {"min": -0.5, "max": 0.5}

    def forward(self, x):
        x = self.first(x)
        if x.sum() > 1e9:
            x = x * 2
        return self.second(torch.clamp(x, **self.bounds))


def test_a_call_that_leaves_a_recorded_bound_out_is_not_answered_with_it():
    net = Clamps().eval()
    model = prepare_qat(net, example_inputs=X).eval()
    model(X)
    model.apply(disable_fake_quant)
    for changed in (net, model):
        changed.bounds = {"min": -0.5}
    with pytest.warns(UserWarning, match=r"with other arguments \(clamp\)"):
        result = model(X)
    assert torch.equal(result, net(X))
