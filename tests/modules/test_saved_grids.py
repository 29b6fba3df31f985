"""A state dict of one preset is not loaded into a model that was prepared with another, whose codes differ."""

import copy

import pytest
import torch
from torch import nn

import tritonq

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def prepared(preset):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1))
    qconfig = tritonq.get_default_qat_qconfig(preset) if preset == "fbgemm" else tritonq.get_qconfig(preset)
    return tritonq.prepare_qat(net, qconfig=qconfig, example_inputs=X)


@pytest.mark.parametrize(("one", "other"), [("onnxruntime", "tensorrt"), ("fbgemm", "onnxruntime")])
@pytest.mark.parametrize("strict", [True, False])
def test_the_state_of_another_preset_is_refused(one, other, strict, tmp_path):
    torch.save(prepared(one).state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    with pytest.raises(RuntimeError, match=r"0\.activation_post_process: saved for codes .*preset that it was trained"):
        prepared(other).load_state_dict(state, strict=strict)
    prepared(one).load_state_dict(state)


def test_keys_are_as_before_and_a_plain_dict_is_loaded():
    model = prepared("onnxruntime")
    state = model.state_dict()
    assert not [key for key in state if "codes" in key or "extra" in key]
    prepared("tensorrt").load_state_dict(dict(state))
    copied = copy.deepcopy(model)
    copied.load_state_dict(state)
    assert all(torch.equal(tensor, state[key]) for key, tensor in copied.state_dict().items())


def test_a_module_of_its_own_says_what_it_is():
    one = tritonq.get_qconfig("onnxruntime").activation()
    with pytest.raises(RuntimeError, match=r"FakeQuantize: saved for codes 0\.\.255, affine.*-128\.\.127, symmetric"):
        tritonq.get_qconfig("tensorrt").activation().load_state_dict(one.state_dict())
