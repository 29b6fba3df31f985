"""RepVGG blocks in eval mode: branches are merged, and the result is packed, once."""

import copy

import pytest
import torch
from torch import nn

import tritonq
from tritonq.functional import integer_kernels
from tritonq.nn import RepVGGBlock


def prepared():
    torch.manual_seed(0)
    net = nn.Sequential(RepVGGBlock(4, 4), RepVGGBlock(4, 6, stride=2))
    model = tritonq.prepare_qat(net, example_inputs=torch.randn(2, 4, 6, 6)).train()
    model(torch.randn(4, 4, 6, 6))
    return model.eval()


@pytest.fixture
def merges(monkeypatch):
    """How many times branches were merged."""
    calls = []
    merge = RepVGGBlock.merged_parameters
    monkeypatch.setattr(RepVGGBlock, "merged_parameters", lambda self: calls.append(1) or merge(self))
    return calls


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_branches_are_merged_once(mode, merges):
    model, x = prepared(), torch.randn(2, 4, 6, 6)
    merges.clear()
    with mode():
        first = model(x)
        after_first = len(merges)
        assert torch.equal(model(x), first)
    assert len(merges) == after_first


@pytest.mark.skipif(not integer_kernels.has_integer_kernels(), reason="needs exact 8-bit products")
def test_weights_are_packed_once(monkeypatch):
    packs = []
    pack = tritonq.nn.eval_mode.pack
    monkeypatch.setattr("tritonq.nn.eval_mode.pack", lambda *args: packs.append(1) or pack(*args))
    model, x = prepared(), torch.randn(2, 4, 6, 6)
    with torch.no_grad():
        for _ in range(3):
            model(x)
    assert len(packs) == 2


@pytest.mark.parametrize(
    "change",
    [
        lambda block: block.conv3.weight.mul_(2),
        lambda block: block.conv1.weight.data.mul_(2),
        lambda block: block.bn3.running_var.mul_(2),
        lambda block: setattr(block.bn1, "eps", 0.5),
        lambda block: block.bn_identity.weight.mul_(0.3),
        lambda block: setattr(block, "conv3", copy.deepcopy(block.conv3)) or block.conv3.weight.data.neg_(),
    ],
    ids=["in place", "data", "statistics", "eps", "identity", "another module"],
)
def test_a_changed_branch_is_merged_anew(change):
    model, x = prepared(), torch.randn(2, 4, 6, 6)
    with torch.no_grad():
        before = model(x)
        change(next(module for module in model.modules() if isinstance(module, RepVGGBlock)))
        after = model(x)
        assert not torch.equal(after, before)
        # A copy keeps nothing.
        assert torch.equal(copy.deepcopy(model)(x), after)


def test_gradients_pass_in_eval_mode():
    model = prepared()
    with torch.no_grad():
        model(torch.randn(2, 4, 6, 6))
    model(torch.randn(2, 4, 6, 6)).sum().backward()
    assert all(bool(p.grad.abs().sum() > 0) for name, p in model.named_parameters() if name.endswith("conv3.weight"))
