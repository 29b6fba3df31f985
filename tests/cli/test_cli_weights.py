"""Float weights as trainers save them."""

import copy
import io
import math

import pytest
import torch
from torch import nn

import tritonq
from tritonq.cli.checkpoints import load_state, load_weights


def model():
    return nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))


def prefixed(prefix, state):
    return {prefix + name: value for name, value in state.items()}


@pytest.mark.parametrize(
    "save",
    [
        lambda state: state,
        lambda state: prefixed("module.", state),
        lambda state: prefixed("_orig_mod.module.", state),
        lambda state: {"state_dict": {**prefixed("model.", state), "criterion.weight": torch.ones(2)}, "epoch": 3},
        lambda state: {"model_state_dict": state, "epoch": 3},
        lambda state: {"model": prefixed("module.", state), "args": None},
        lambda state: {"state_dict_ema": state},
        lambda state: {name: value.half() if value.is_floating_point() else value for name, value in state.items()},
    ],
)
def test_weights_as_trainers_save_them(save, tmp_path):
    trained = model()
    nn.init.constant_(trained[0].weight, 0.25)
    torch.save(save(trained.state_dict()), tmp_path / "float.pt")
    loaded = model()
    load_weights(loaded, tmp_path / "float.pt")
    assert torch.equal(loaded[0].weight, trained[0].weight)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_not_finite(value, tmp_path):
    trained = model()
    nn.init.constant_(trained[1].weight, value)
    torch.save(trained.state_dict(), tmp_path / "float.pt")
    with pytest.raises(ValueError, match=r"float.pt can't be used: '1.weight' is not finite"):
        load_weights(model(), tmp_path / "float.pt")


def test_a_prefix_of_some_names_alone_is_none(tmp_path):
    state = prefixed("module.", model().state_dict())
    del state["module.1.bias"]
    torch.save(state, tmp_path / "float.pt")
    with pytest.raises(ValueError, match=r"of another architecture: it lacks '0.weight'"):
        load_weights(model(), tmp_path / "float.pt")


@pytest.mark.parametrize(
    ("state", "reason"),
    [
        ({**model().state_dict(), "0.weight": 3}, "of another architecture: '0.weight' is of type int, not a tensor"),
        ({**model().state_dict(), "0.bias": [1.0, 2.0]}, "'0.bias' is of type list, not a tensor"),
        ({0: torch.zeros(3, 2), 1: torch.zeros(3)}, "holds entries without names, such as 0"),
    ],
)
def test_entries_that_are_no_named_tensors(state, reason, tmp_path):
    torch.save(state, tmp_path / "float.pt")
    with pytest.raises(ValueError, match=reason):
        load_weights(model(), tmp_path / "float.pt")


def test_the_mark_of_frozen_statistics_is_for_layers_with_a_batch_norm():
    layer = tritonq.nn.ConvBn2d(1, 2, 1, qconfig=tritonq.get_qconfig())
    frozen = copy.deepcopy(layer).freeze_bn_stats()
    load_state(layer, frozen.state_dict(), "last.pt")
    assert layer.freeze_bn
    plain = model()
    before = {name: tensor.clone() for name, tensor in plain.state_dict().items()}
    foreign = {**model().state_dict(), "0.freeze_bn": torch.ones(1)}
    with pytest.raises(ValueError, match=r"last.pt is of another architecture: the model has no '0.freeze_bn'"):
        load_state(plain, foreign, "last.pt")
    assert all(torch.equal(tensor, before[name]) for name, tensor in plain.state_dict().items())


@pytest.mark.parametrize(
    ("save", "reason"),
    [
        (lambda path: torch.save(model(), path), "an object of torch.nn.modules.container.Sequential.*state_dict"),
        (lambda path: torch.jit.script(model()).save(path), "a TorchScript program"),
        (lambda path: path.write_text("epoch,loss"), "damaged, or no file that torch.save wrote"),
        (lambda path: path.write_bytes(saved_bytes()[:-99]), "damaged, or no file that torch.save wrote"),
        (lambda path: path.write_bytes(long_bytes()[:5000]), "damaged, or no file that torch.save wrote"),
        (lambda path: path.mkdir(), "Is a directory"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*torch:UserWarning", "ignore:.*torch.jit:DeprecationWarning")
def test_files_that_are_no_weights_say_why(save, reason, tmp_path):
    """Without torch's advice to load the file without ``weights_only``, which would run the code in it."""
    save(tmp_path / "weights.pt")
    with pytest.raises(ValueError, match=f"weights.pt can't be read: .*{reason}") as told:
        load_weights(model(), tmp_path / "weights.pt")
    assert "weights_only" not in str(told.value)
    assert "\n" not in str(told.value)


def saved_bytes():
    buffer = io.BytesIO()
    torch.save(model().state_dict(), buffer)
    return buffer.getvalue()


def long_bytes():
    """Return a file of which torch looks for the end where a cut one has none."""
    stream = io.BytesIO()
    torch.save({str(k): torch.zeros(100) for k in range(200)}, stream)
    return stream.getvalue()


def test_a_converted_model_holds_no_float_weights(tmp_path):
    torch.save({"format": "tritonq.converted", "version": 1}, tmp_path / "model.int8.pt")
    with pytest.raises(ValueError, match=r"model.int8.pt is a converted model, not the weights of a float model"):
        load_weights(model(), tmp_path / "model.int8.pt")
