"""Code that knows the classes, methods and hooks of its float modules goes on working when these are replaced."""

import copy
import operator
import re

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import tritonq
from prepared_nets import saved_and_loaded
from qat_models import train
from tritonq import nn as qnn

X = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))


class GainedConv(nn.Conv2d):
    """A convolution with methods, a property and a parameter of its own."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.gain = nn.Parameter(torch.tensor(0.5))
        self.tag = "gained"

    @property
    def fan_in(self):
        return self.weight[0].numel()

    def scaled(self, x):
        return self(x) * self.gain / self.fan_in**0.5


class CallsMethods(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = GainedConv(3, 4, 3), GainedConv(4, 4, 1), nn.Linear(4, 2)

    def forward(self, x):
        assert isinstance(self.first, GainedConv)
        assert self.first.tag == "gained"
        x = self.first.scaled(x).relu()
        return self.head(self.second.scaled(x).mean((2, 3)))


class AsksClasses(nn.Module):
    """A forward that does with each of its layers what its class says."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.SiLU()])
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        for layer in self.layers:
            if isinstance(layer, nn.Conv2d):
                x = layer(input=x)
            elif isinstance(layer, (nn.BatchNorm2d, nn.ReLU, nn.SiLU)):
                x = layer(x)
            else:
                raise TypeError(type(layer))
        return self.head(input=x.mean((2, 3)))


class NormalisedWeights(nn.Sequential):
    """Weights that are computed with attributes of tensors, such as ``weight.mT``."""

    def __init__(self):
        super().__init__(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.append(parametrizations.orthogonal(nn.Linear(4, 2)))


class KeepsFeatures(nn.Module):
    """A hook that hands a layer's result to the forward."""

    def __init__(self):
        super().__init__()
        self.conv, self.head, self.features = nn.Conv2d(3, 4, 3), nn.Linear(4, 2), []
        self.conv.register_forward_hook(self.keep)

    def keep(self, module, args, result):
        self.features.append(result)

    def forward(self, x):
        self.conv(x)
        return self.head(self.features.pop().mean((2, 3)))


@pytest.mark.parametrize("build", [CallsMethods, AsksClasses, NormalisedWeights, KeepsFeatures])
@torch.no_grad()
def test_it_trains_and_every_copy_and_file_computes_the_same(build, tmp_path):
    torch.manual_seed(0)
    with torch.enable_grad():
        prepared = train(tritonq.prepare_qat(build(), example_inputs=X, strict=True), X)
    expected = prepared(X)
    converted = tritonq.convert(prepared)
    tritonq.save_converted(converted, tmp_path / "model.pt")
    loaded = tritonq.load_converted(tmp_path / "model.pt", build())
    for model in (prepared, converted, loaded):
        assert torch.equal(model(X), expected)
        assert torch.equal(copy.deepcopy(model)(X), expected)
        if build is not NormalisedWeights:  # torch pickles no parametrized module
            assert torch.equal(saved_and_loaded(model)(X), expected)
    again = tritonq.prepare_qat(build(), example_inputs=X).eval()
    again.load_state_dict(prepared.state_dict())
    assert torch.equal(again(X), expected)
    assert tritonq.verify(prepared, converted, X).agrees()


def test_classes_and_attributes_are_kept_where_they_are_asked_for():
    prepared = tritonq.prepare_qat(CallsMethods(), example_inputs=X)
    assert type(prepared.first).__name__ == "Conv2d"
    assert isinstance(prepared.first, GainedConv)
    assert prepared.first.gain.requires_grad
    plain = tritonq.prepare_qat(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()), example_inputs=X)
    assert type(plain[0]) is qnn.ConvBnReLU2d
    assert type(plain[2]) is nn.Identity
    assert not isinstance(plain[1], nn.BatchNorm2d)
    asked = tritonq.prepare_qat(AsksClasses(), example_inputs=X)
    assert isinstance(asked.layers[0], qnn.ConvBnReLU2d)
    assert isinstance(asked.layers[1], nn.BatchNorm2d)
    with pytest.raises(AttributeError, match="part of the layer"):
        nn.SyncBatchNorm.convert_sync_batchnorm(asked)


def test_attributes_of_modules_stay_on_what_replaces_them():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.SiLU(), nn.AvgPool2d(2), nn.Flatten())
    model.append(nn.Linear(16, 2))
    for index, layer in enumerate(model):
        layer.index = index
    prepared = tritonq.prepare_qat(model, example_inputs=X)
    for found in (prepared, tritonq.convert(train(prepared, X))):
        assert [layer.index for layer in found] == list(range(7))
    with pytest.raises(AttributeError, match="merge BatchNorms"):
        operator.attrgetter("running_mean")(prepared[1])


class Names(nn.Module):
    def __init__(self):
        super().__init__()
        convolutions = nn.Conv2d(3, 4, 3), nn.SiLU(), nn.ConvTranspose2d(4, 4, 3), nn.GELU()
        self.layers = nn.ModuleList([*convolutions, nn.AvgPool2d(2), nn.Linear(3, 2)])

    def forward(self, x):
        for layer in self.layers:
            x = layer(input=x)
        return x


def test_the_input_may_be_given_by_name(tmp_path):
    prepared = train(tritonq.prepare_qat(Names(), example_inputs={"x": X}, strict=True), X)
    converted = tritonq.convert(prepared)
    assert torch.equal(prepared(X), converted(X))
    tritonq.export_onnx(converted, tmp_path / "model.onnx", {"x": X}, dynamic_batch=False)


@pytest.mark.parametrize("qconfig", ["onnxruntime", "f8net"])
@torch.no_grad()
def test_a_float_checkpoint_fills_layers_and_their_batch_norms(qconfig):
    def build():
        block = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU())
        return nn.ModuleDict({"net": nn.Sequential(block, nn.Conv2d(4, 2, 1))})

    trained, holder = build(), build()
    trained["net"][0][1].running_mean.normal_()
    trained["net"][0][1].weight.uniform_(0.5, 2)
    holder["net"] = tritonq.prepare_qat(holder["net"].train(), qconfig=tritonq.get_qconfig(qconfig), example_inputs=X)
    found = holder.load_state_dict(trained.state_dict(), strict=False)
    assert not found.unexpected_keys
    assert all(re.search("fake_quant|process|format|alpha", key) for key in found.missing_keys)
    bn, loaded = trained["net"][0][1], holder["net"][0][0].bn
    assert all(torch.equal(bn.state_dict()[key], loaded.state_dict()[key]) for key in bn.state_dict())
    again = copy.deepcopy(holder)
    again.load_state_dict(holder.state_dict())
