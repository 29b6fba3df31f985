"""State dicts at any phase of training: strict, without a forward first, and resuming changes no bit."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

import tritonq
from qat_models import FloatResidual, images
from tritonq.prepare import disable_fake_quant, disable_observer, freeze_bn_stats, update_bn_stats

PRESETS = {
    "tensorrt": tritonq.get_qconfig("tensorrt"),
    "fbgemm_v0": tritonq.get_default_qat_qconfig("fbgemm", 0),
    "qnnpack_v1": tritonq.get_default_qat_qconfig("qnnpack", 1),
    **{name: tritonq.get_qconfig(name) for name in ("megengine_tqt", "megengine_sync_ema", "f8net")},
    "lsq": tritonq.QConfig(
        tritonq.LearnedStepFakeQuantize.with_args(dtype=torch.qint8, qscheme=torch.per_tensor_symmetric),
        tritonq.LearnedStepFakeQuantize.with_args(dtype=torch.qint8, qscheme=torch.per_channel_symmetric,
                                                  observer=tritonq.PerChannelMinMaxObserver),
    ),
    "pact": tritonq.QConfig(tritonq.ClippedFakeQuantize.with_args(), tritonq.get_qconfig("tensorrt").weight),
    "histogram": tritonq.QConfig(
        tritonq.FakeQuantize.with_args(observer=tritonq.HistogramObserver, dtype=torch.qint8, bins=128,
                                       qscheme=torch.per_tensor_symmetric),
        tritonq.get_qconfig("tensorrt").weight,
    ),
}  # fmt: skip


PHASES = {
    "training": lambda model: None,
    "frozen statistics": freeze_bn_stats,
    "frozen ranges": disable_observer,
    "rounding off": disable_fake_quant,
}


def prepared(preset):
    torch.manual_seed(0)
    model = FloatResidual()
    return tritonq.prepare_qat(model, qconfig=PRESETS[preset], example_inputs=images(2)).train()


def optimizer_of(model):
    return torch.optim.Adam(model.parameters(), 1e-3)


def steps(model, optimizer, first, count):
    for step in range(first, first + count):
        optimizer.zero_grad()
        model(images(4, seed=step)).square().mean().backward()
        optimizer.step()


def assert_same_bits(one, other):
    one, other = one.state_dict(), other.state_dict()
    assert list(one) == list(other)
    differing = [name for name in one if not torch.equal(one[name], other[name])]
    assert not differing


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.filterwarnings("ignore:a ClippedFakeQuantize")
def test_resuming_gives_the_bits_of_not_stopping(preset, phase, tmp_path):
    whole = prepared(preset)
    optimizer = optimizer_of(whole)
    steps(whole, optimizer, 0, 2)
    PHASES[phase](whole)
    steps(whole, optimizer, 2, 1)
    torch.save({"model": whole.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "half.pt")
    steps(whole, optimizer, 3, 3)

    content = torch.load(tmp_path / "half.pt", weights_only=True)
    resumed = prepared(preset)
    resumed.load_state_dict(content["model"], strict=True)
    again = optimizer_of(resumed)
    again.load_state_dict(content["optimizer"])
    steps(resumed, again, 3, 3)
    assert_same_bits(whole, resumed)
    x = images(4, seed=99)
    assert torch.equal(whole.eval()(x), resumed.eval()(x))
    saved = [tensor for state in optimizer.state.values() for tensor in state.values()]
    found = [tensor for state in again.state.values() for tensor in state.values()]
    assert all(torch.equal(a, b) for a, b in zip(saved, found, strict=True))


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.filterwarnings("ignore:a ClippedFakeQuantize")
def test_a_model_that_never_ran_saves_and_loads(preset):
    one, other = prepared(preset), prepared(preset)
    steps(one, optimizer_of(one), 0, 1)
    one.load_state_dict(other.state_dict(), strict=True)
    assert_same_bits(one, other)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_train_on_alike(copied):
    model = prepared("tensorrt")
    steps(model, optimizer_of(model), 0, 2)
    freeze_bn_stats(model)
    other = copied(model)
    for each in (model, other):
        steps(each, optimizer_of(each), 2, 2)
    assert_same_bits(model, other)


def test_a_frozen_checkpoint_freezes_and_another_does_not_thaw():
    frozen, plain = prepared("tensorrt"), prepared("tensorrt")
    keys = list(plain.state_dict())
    freeze_bn_stats(frozen)
    assert [key for key in frozen.state_dict() if key not in keys] == ["stem.0.freeze_bn", "depthwise.freeze_bn"]
    unfrozen_state = plain.state_dict()
    plain.load_state_dict(frozen.state_dict())
    assert plain.stem[0].freeze_bn
    assert not plain.stem[0].bn.training
    plain.load_state_dict(unfrozen_state)
    assert plain.stem[0].freeze_bn
    update_bn_stats(plain)
    assert list(plain.state_dict()) == keys


def test_a_foreign_checkpoint_is_named():
    state = prepared("tensorrt").state_dict()
    state["surprise"] = torch.ones(1)
    with pytest.raises(RuntimeError, match="surprise"):
        prepared("tensorrt").load_state_dict(state)
