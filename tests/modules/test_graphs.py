"""Graphed models, with a double of torch's capture that replays as a graph does: unseen by version counters."""

import copy
import pickle

import pytest
import torch
from torch import nn

import tritonq
from qat_models import FloatResidual, images
from tritonq import graphs
from tritonq.learned_base import LearnedFakeQuantize


def recorded(model, inputs, num_warmup_iters):
    """Warm up; then a forward that runs behind the back of tensors' versions, on inputs of the recorded shape only."""
    for _ in range(num_warmup_iters):
        loss = model(*inputs).sum()
        torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad], allow_unused=True)
    eager = model.forward

    def replay(*args):
        assert [x.shape for x in args] == [x.shape for x in inputs]
        model.replays = getattr(model, "replays", 0) + 1
        with torch.autograd._unsafe_preserve_version_counter(tuple(model.buffers())):
            return eager(*args)

    model.forward = replay


LEARNED = tritonq.LearnedStepFakeQuantize.with_args
QCONFIGS = {
    "onnxruntime": tritonq.get_qconfig("onnxruntime"),
    "learned": tritonq.QConfig(LEARNED(dtype="quint8"), LEARNED(dtype="qint8")),
}


@pytest.fixture(params=list(QCONFIGS))
def model(request, monkeypatch):
    monkeypatch.setattr(torch.cuda, "make_graphed_callables", recorded)
    monkeypatch.setattr(graphs, "_DEVICE", "cpu")
    torch.manual_seed(0)
    return tritonq.prepare_qat(FloatResidual(), qconfig=QCONFIGS[request.param], example_inputs=images(2)).train()


def test_warm_up_leaves_no_trace(model):
    model(images(4))
    state = copy.deepcopy(model.state_dict())
    assert tritonq.graphed(model, images(4)) is model
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_trains_as_the_model_does(model):
    other = copy.deepcopy(model)
    tritonq.graphed(model, images(4))
    for step in range(3):
        torch.manual_seed(step)
        x = images(4)
        for trained in (model, other):
            optimizer = torch.optim.SGD(trained.parameters(), 0.01)
            trained(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    assert model.replays == 2, "all but the first"
    states = model.state_dict(), other.state_dict()
    assert [name for name in states[0] if not torch.equal(states[0][name], states[1][name])] == []


def test_replays_mark_buffers_as_changed(model):
    """What eval mode derives from statistics it keeps until their versions change."""
    tritonq.graphed(model, images(4))(images(4))
    versions = {name: buffer._version for name, buffer in model.named_buffers()}
    model(images(4))
    assert [name for name, buffer in model.named_buffers() if buffer._version == versions[name]] == []
    model.eval()
    assert torch.equal(model(images(4)), copy.deepcopy(model)(images(4)))
    assert model.replays == 1


def test_other_inputs_run_as_before_and_are_told_once(model):
    tritonq.graphed(model, images(4))(images(4))
    with pytest.warns(
        UserWarning, match=r"FloatResidual runs without its graph: it was captured for torch.float32 \(4, "
    ):
        model(images(3))
    model(images(2))
    assert not hasattr(model, "replays")


def test_copies_run_without_the_graph(model):
    tritonq.graphed(model, images(4))
    copied = copy.deepcopy(model)
    before = copy.deepcopy(model.state_dict())
    copied(images(4))
    pickle.loads(pickle.dumps(copied))(images(4))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not hasattr(copied, "replays")
    with pytest.raises(TypeError, match=r"save its state_dict\(\)"):
        pickle.dumps(model)


def test_a_failed_capture_leaves_the_model_as_it_was(model, monkeypatch):
    def fail(model, inputs, num_warmup_iters):
        model(*inputs)
        raise RuntimeError("out of memory")

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", fail)
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match="out of memory"):
        tritonq.graphed(model, images(4))
    assert "forward" not in vars(model)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_bad_arguments(model, monkeypatch):
    with pytest.raises(ValueError, match="warmup_steps must be at least 1"):
        tritonq.graphed(model, images(4), warmup_steps=0)
    with pytest.raises(ValueError, match="example_inputs must be tensors"):
        tritonq.graphed(model, (images(4), 3))
    tritonq.graphed(model, images(4))
    with pytest.raises(ValueError, match="graphed already"):
        tritonq.graphed(model, images(4))
    monkeypatch.undo()
    with pytest.raises(ValueError, match="on one CUDA device; these are on cpu"):
        tritonq.graphed(nn.Linear(2, 2), torch.zeros(1, 2))


def test_a_range_that_a_compiled_step_gave_is_kept(model):
    quantizers = [m for m in model.modules() if isinstance(m, tritonq.FakeQuantize | LearnedFakeQuantize)]
    for quantizer in quantizers:
        if quantizer.begins_with_next_batch():
            quantizer.begins.zero_()  # all that a step does in a graph
    assert not any(quantizer.begins_with_next_batch() for quantizer in quantizers)
    before = [(quantizer, quantizer.begins.clone()) for quantizer in quantizers]
    tritonq.graphed(model, images(4))
    assert all(torch.equal(quantizer.begins, begins) for quantizer, begins in before)


def test_a_compiled_step_ends_the_beginning():
    quantizer = tritonq.FakeQuantize(dtype=torch.qint8)
    quantizer.begin_with({"scale": torch.ones(1)})
    assert quantizer.begins_with_next_batch()
    torch.compile(quantizer, backend="eager")(torch.randn(5))
    assert not quantizer.begins_with_next_batch()
