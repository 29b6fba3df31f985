"""Weights of few bits in small files."""

import copy

import pytest
import torch
from torch import nn

import tritonq
from tritonq.deploy.modules import CodeTypes, QuantizedLinear
from tritonq.deploy.packing import pack_codes, pack_weights, unpack_codes, unpack_weights
from tritonq.quantized_type import QuantizedType

X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("low", "width"), [(-8, 4), (0, 4), (-4, 4), (-2, 2), (0, 2), (0, 1)])
@pytest.mark.parametrize("shape", [(3, 5, 3), (8,), (1, 1), (0, 3), ()])
def test_codes_come_back(low, width, shape):
    codes = torch.randint(low, low + 2**width, shape, generator=torch.Generator().manual_seed(1)).to(torch.int8)
    packed = pack_codes(codes, low, width)
    assert packed.numel() == -(-codes.numel() * width // 8)
    assert torch.equal(unpack_codes(packed, shape, low, width).to(torch.int8), codes)


def converted(name):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 64, 3), nn.BatchNorm2d(64), nn.ReLU(), nn.Conv2d(64, 64, 3), nn.ReLU())
    model.append(nn.Conv2d(64, 4, 3))
    qat = tritonq.prepare_qat(copy.deepcopy(model), qconfig=tritonq.get_qconfig_mapping(name), example_inputs=X)
    qat.train()(X)
    return model, tritonq.convert(qat.eval())


@pytest.mark.parametrize(("name", "most"), [("lsq_w4a4", 0.6), ("lsq_w3a3", 0.6), ("lsq_w2a2", 0.36)])
def test_files_are_small_and_give_the_same_model(name, most, tmp_path):
    sizes = {}
    for which in (name, "lsq_w8a8"):
        model, deployed = converted(which)
        tritonq.save_converted(deployed, tmp_path / which)
        sizes[which] = (tmp_path / which).stat().st_size
        loaded = tritonq.load_converted(tmp_path / which, model)
        assert torch.equal(loaded(X), deployed(X))
        state, expected = loaded.state_dict(), deployed.state_dict()
        assert state["3.weight"].dtype == torch.int8
        assert torch.equal(state["3.weight"], expected["3.weight"])
    assert sizes[name] < most * sizes["lsq_w8a8"] + 4096


def test_damage_is_found(tmp_path):
    model, deployed = converted("lsq_w2a2")
    tritonq.save_converted(deployed, tmp_path / "m.pt")
    content = torch.load(tmp_path / "m.pt", weights_only=True)
    for change in ({"low": -1}, {"width": 4}, {"shape": [1]}, {"dtype": "float"}):
        damaged = copy.deepcopy(content)
        damaged["packed"]["3.weight"].update(change)
        torch.save(damaged, tmp_path / "damaged.pt")
        with pytest.raises(ValueError, match="is damaged"):
            tritonq.load_converted(tmp_path / "damaged.pt", model)


def test_codes_beyond_a_byte_stay_as_they_are():
    """Eleven codes are four bits, but those from 1000 on are int16."""
    types = CodeTypes(QuantizedType(1000, 1010, symmetric=False, axis=0), None)
    codes = torch.randint(1000, 1011, (2, 3), generator=torch.Generator().manual_seed(0)).to(torch.int16)
    tensors = {"weight": codes, "weight_scale": torch.ones(2)}
    layer = QuantizedLinear({"in_features": 3, "out_features": 2}, types, tensors)
    state = layer.state_dict()
    unpacked = unpack_weights(*pack_weights(layer, state))
    assert unpacked["weight"].dtype == torch.int16
    assert torch.equal(unpacked["weight"], codes)
