"""Parts of a forward that `torch.utils.checkpoint` runs again: their joins are answered in the backward, too."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import tritonq
from tritonq.functional import recomputation


class Block(nn.Module):
    """Joins before, in and behind a function that is run again; `branch` keeps its forward from becoming a graph."""

    def __init__(self, reentrant):
        super().__init__()
        self.first = nn.Conv2d(4, 4, 3, padding=1)
        self.second = nn.Conv2d(8, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.reentrant = reentrant

    def part(self, x, y):
        z = self.norm(self.second(torch.cat([x, y], 1)))
        return F.relu(z + x)

    def forward(self, x, branch=False):
        y = self.first(x)
        y = self.part(y, x)  # the first occurrence of the same calls
        if self.reentrant is None or not torch.is_grad_enabled():
            return self.part(y, x)
        return checkpoint(self.part, y, x, use_reentrant=self.reentrant)


class Traceable(Block):
    """The same without a condition."""

    def forward(self, x):
        return checkpoint(self.part, self.first(x), x, use_reentrant=False)


def trained(kind, reentrant):
    torch.manual_seed(0)
    stem = nn.Conv2d(3, 4, 1)
    model = nn.Sequential(stem, kind(reentrant), nn.Conv2d(4, 2, 1))
    x = torch.randn(4, 3, 6, 6)
    prepared = tritonq.prepare_qat(model, example_inputs=x).train()
    calls = []
    prepared[1].second.register_forward_hook(lambda *_: calls.append(1))
    for _ in range(2):
        prepared.zero_grad()
        prepared(x).square().sum().backward()
    return prepared, len(calls)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_function_that_is_run_again_gives_the_gradients_of_one_that_is_not(reentrant):
    once, calls = trained(Block, None)
    twice, more_calls = trained(Block, reentrant)
    assert (calls, more_calls) == (4, 6)
    for (name, expected), got in zip(once.named_parameters(), twice.parameters(), strict=True):
        assert torch.equal(expected.grad, got.grad), name
    for (name, expected), got in zip(once.named_buffers(), twice.buffers(), strict=True):
        assert torch.equal(expected, got), name


def test_no_graph_takes_the_place_of_a_function_that_is_run_again():
    prepared, calls = trained(Traceable, False)
    assert calls == 4
    assert {row.kind: row.status for row in tritonq.summary(prepared).layers}["cat"] == "quantized"


@pytest.mark.parametrize("tracks", [True, False])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_a_batch_norm_that_is_run_again_keeps_its_state(tracks, momentum, monkeypatch):
    norm, x = nn.BatchNorm1d(4, momentum=momentum).train(), torch.randn(3, 4)
    norm(x)
    norm.track_running_stats = tracks
    buffers, state = dict(norm.named_buffers()), copy.deepcopy(norm.state_dict())
    monkeypatch.setattr(recomputation, "is_recomputing", lambda: True)
    assert torch.equal(recomputation.normalize_once(norm, x), copy.deepcopy(norm)(x))
    with pytest.raises(ValueError, match="expected 2D or 3D input"):
        recomputation.normalize_once(norm, torch.randn(3, 4, 1, 1))
    assert norm.momentum == momentum
    for name, buffer in norm.named_buffers():
        assert buffer is buffers[name]
        assert torch.equal(buffer, state[name])
