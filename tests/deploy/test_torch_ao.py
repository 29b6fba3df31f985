"""Checkpoints of torch.ao's eager QAT go on in tritonq, or are refused with the model untouched."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import torch.ao.quantization as ao
from torch import nn

import tritonq
from qat_models import assert_same_state, state_of
from tolerances import FLOAT32
from tritonq.deploy.torch_ao import load_torch_ao_state_dict

pytestmark = pytest.mark.filterwarnings("ignore")
FUSED = [["conv", "bn", "relu"], ["pool.0", "pool.1"]]


class Net(nn.Module):
    """An eager-mode model, with torch.ao's or tritonq's stubs."""

    def __init__(self, kit, width=4, bias=True):
        super().__init__()
        torch.manual_seed(0)
        self.quant, self.dequant = kit.QuantStub(), kit.DeQuantStub()
        self.conv = nn.Conv2d(3, width, 3, padding=1, bias=bias)
        self.bn, self.relu = nn.BatchNorm2d(width), nn.ReLU()
        self.pool = nn.Sequential(nn.Conv2d(width, width, 1, bias=False), nn.BatchNorm2d(width))
        self.skip = kit.FloatFunctional()
        self.fc = nn.Linear(width, 5)

    def forward(self, x):
        x = self.relu(self.bn(self.conv(self.quant(x))))
        x = self.skip.add(self.pool(x), x)
        return self.dequant(self.fc(x.mean((2, 3))))


class AoKit:
    QuantStub, DeQuantStub = ao.QuantStub, ao.DeQuantStub
    FloatFunctional = torch.ao.nn.quantized.FloatFunctional


def torch_model(backend="fbgemm", version=0, steps=3):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = ao.fuse_modules_qat(Net(AoKit).train(), FUSED)
        model.qconfig = ao.get_default_qat_qconfig(backend, version)
        model = ao.prepare_qat(model)
        optimizer = torch.optim.SGD(model.parameters(), 0.05)
        for step in range(steps):
            optimizer.zero_grad()
            model(images(step)).square().mean().backward()
            optimizer.step()
    return model


def our_model(backend="fbgemm", version=0, **arguments):
    model = tritonq.fuse_modules_qat(Net(tritonq.nn, **arguments).train(), FUSED)
    return tritonq.prepare_qat(model, qconfig=tritonq.get_default_qat_qconfig(backend, version))


def images(seed):
    return torch.randn(8, 3, 6, 6, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("version", [0, 1])
@pytest.mark.parametrize("backend", ["fbgemm", "qnnpack"])
def test_training_goes_on_where_torch_ao_stopped(backend, version):
    theirs, ours = torch_model(backend, version), our_model(backend, version)
    report = load_torch_ao_state_dict(ours, theirs.state_dict())
    assert (report.unmapped, report.missing, report.notes) == ((), (), ())
    values = ours.state_dict()
    for name, value in theirs.state_dict().items():
        if not name.endswith(".eps"):
            assert torch.equal(values[name].float(), value.float().reshape(values[name].shape)), name
    theirs.train()
    ours.train()
    x = images(9)
    # The batch's statistics are summed in another order: a value on the edge of two codes may fall to the other one.
    step = float(theirs.fc.activation_post_process.scale)
    assert float((theirs(x) - ours(x)).abs().max()) <= 1.01 * step
    torch.testing.assert_close(
        ours.quant.activation_post_process.activation_post_process.max_val,
        theirs.quant.activation_post_process.activation_post_process.max_val,
    )


def test_a_checkpoint_from_before_the_first_step_loads():
    ours = our_model()
    trained = our_model()
    trained(images(0))
    report = load_torch_ao_state_dict(trained, torch_model(steps=0).state_dict())
    assert not report.unmapped
    assert not report.missing
    assert_same_state({"modules": 0, "modes": 0, "hooks": 0, "tensors": ours.state_dict()},
                      {"modules": 0, "modes": 0, "hooks": 0, "tensors": trained.state_dict()})  # fmt: skip
    assert not trained.conv.weight_fake_quant.has_qparams()


def aged(state):
    """The spelling of torch 1.5: BatchNorm beside the convolution, plural per-channel ranges, no observer eps."""
    renamed = {}
    for name, value in state.items():
        for new, old in (("bn.weight", "gamma"), ("bn.bias", "beta"), ("bn.running_", "running_"), ("bn.num_", "num_")):
            if name.startswith(("conv.", "pool.0.")):
                name = name.replace(new, old)
        if "weight_fake_quant" in name:
            name = name.replace("min_val", "min_vals").replace("max_val", "max_vals")
        if not name.endswith(".eps"):
            renamed[f"module.{name}"] = value
    return renamed


def test_old_names_and_prefixes_are_understood():
    state = torch_model().state_dict()
    one, other = our_model(), our_model()
    load_torch_ao_state_dict(one, state)
    report = load_torch_ao_state_dict(other, aged(state))
    assert "module.conv.gamma" in aged(state)
    assert "module.fc.weight_fake_quant.activation_post_process.min_vals" in aged(state)
    assert not report.unmapped
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


def test_a_path_and_a_nested_file(tmp_path):
    state = torch_model().state_dict()
    torch.save({"epoch": 3, "state_dict": state}, tmp_path / "ao.pt")
    by_path, by_dict = our_model(), our_model()
    assert load_torch_ao_state_dict(by_path, tmp_path / "ao.pt") == load_torch_ao_state_dict(by_dict, state)
    for a, b in zip(by_path.state_dict().values(), by_dict.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_only_tensors_are_loaded(tmp_path):
    torch.save(Net(AoKit), tmp_path / "whole.pt")
    refused(our_model(), tmp_path / "whole.pt", "save the model's state_dict")


def test_what_cannot_be_mapped_is_listed():
    state = torch_model().state_dict()
    state["relu.activation_post_process.scale"] = torch.ones(1)
    state["quant.activation_post_process.activation_post_process.histogram"] = torch.zeros(2048)
    state["conv.activation_post_process.activation_post_process.eps"] = torch.tensor([1e-3])
    state["epoch"] = 3
    del state["fc.activation_post_process.scale"]
    report = load_torch_ao_state_dict(our_model(), state)
    assert dict(report.unmapped) == {
        "relu.activation_post_process.scale": "the model has no quantizer there",
        "quant.activation_post_process.activation_post_process.histogram": "the model's observer has no such state",
        "conv.activation_post_process.activation_post_process.eps": "it is 0.001 there and 1.19209e-07 in the model's "
        "qconfig",
        "epoch": "it is no tensor but a int",
    }
    assert report.missing == ("fc.activation_post_process.scale",)
    assert "4 not mapped, 1 not in the file" in str(report)


def test_another_version_is_noted():
    assert "version=1" in str(load_torch_ao_state_dict(our_model(version=0), torch_model(version=1).state_dict()))


def test_float_zero_points_are_reported():
    theirs = nn.Sequential(nn.Embedding(7, 3)).train()
    theirs.qconfig = ao.default_embedding_qat_qconfig
    theirs = ao.prepare_qat(theirs, mapping={nn.Embedding: torch.ao.nn.qat.Embedding})
    theirs(torch.tensor([1, 2]))
    ours = nn.Sequential(nn.Embedding(7, 3)).train()
    ours = tritonq.prepare_qat(ours, qconfig=tritonq.default_embedding_qat_qconfig)
    report = load_torch_ao_state_dict(ours, theirs.state_dict())
    assert "0.weight_fake_quant.zero_point" in dict(report.unmapped)
    assert torch.equal(ours[0].weight, theirs[0].weight)


def refused(model, state, message):
    before = copy.deepcopy(state_of(model))
    with pytest.raises(ValueError, match=message):
        load_torch_ao_state_dict(model, state)
    assert_same_state(before, state_of(model))


def without(key):
    state = torch_model().state_dict()
    del state[key]
    return state


def with_zero_point(value):
    state = torch_model().state_dict()
    state["fc.activation_post_process.zero_point"] = torch.tensor([value], dtype=torch.int32)
    return state


@pytest.mark.parametrize(
    ("make", "state", "message"),
    [
        (lambda: our_model(width=8), torch_model, r"'conv.weight' has shape \(4, 3, 3, 3\) in .* \(8, 3, 3, 3\)"),
        (lambda: our_model(bias=False), torch_model, "no tensor 'conv.bias', which the checkpoint holds"),
        (
            our_model,
            lambda: without("pool.0.bn.running_var"),
            "no tensor 'pool.0.bn.running_var', which the model needs",
        ),
        (our_model, lambda: with_zero_point(200), r"zero point 200 of 'fc.activation_post_process' .* 0\.\.127"),
        (our_model, lambda: {}, "no state dict"),
        (lambda: Net(tritonq.nn), torch_model, "call prepare_qat first"),
    ],
)
def test_foreign_checkpoints_are_refused(make, state, message):
    found = state()
    refused(make(), found.state_dict() if isinstance(found, nn.Module) else found, message)


def test_per_channel_shapes_are_checked():
    state = torch_model().state_dict()
    state["fc.weight_fake_quant.scale"] = torch.ones(3)
    refused(our_model(), state, r"'fc.weight_fake_quant.scale' has shape \(3,\) in the checkpoint and \(5,\)")


@pytest.mark.parametrize("backend", ["fbgemm", "qnnpack"])
def test_a_converted_checkpoint(backend, tmp_path):
    """Codes and grids are the file's; sums are requantized by tritonq's formula, which may part single codes by one."""
    theirs = ao.convert(torch_model(backend).eval())
    torch.save(theirs.state_dict(), tmp_path / "int8.pt")
    model = our_model(backend)
    report = load_torch_ao_state_dict(model, tmp_path / "int8.pt" if backend == "fbgemm" else theirs.state_dict())
    assert not report.unmapped
    assert not report.missing, report
    assert "2 BatchNorms, that of conv first, are identities" in str(report)
    int8 = tritonq.convert(model.eval())
    for name in ("conv", "pool.0", "fc"):
        layer, other = int8.get_submodule(name), theirs.get_submodule(name)
        assert torch.equal(layer.stored_weight, other.weight().int_repr())
        assert float(layer.activation_post_process.scale) == pytest.approx(float(other.scale), rel=FLOAT32.rtol)
        bias = other.bias() if callable(other.bias) else other.bias
        unit = 0.0 if layer.multiplier is None else float(layer.multiplier.max())
        torch.testing.assert_close(layer.bias, bias.detach(), rtol=0, atol=unit)
    assert float(int8.skip.activation_post_process.scale) == float(theirs.skip.scale)
    results = {}
    for each in (int8, theirs):
        for name in ("conv", "pool.0"):
            found = results.setdefault(name, [])
            each.get_submodule(name).register_forward_hook(lambda module, args, y, found=found: found.append(y))
        each(images(9))
    for name, (mine, other) in results.items():
        assert (mine - other.dequantize()).abs().max() < 1.01 * theirs.get_submodule(name).scale


@pytest.mark.parametrize("kind", [nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.ELU, nn.Hardswish])
def test_a_converted_checkpoint_with_activations(kind):
    """torch.ao's state dicts lack the scales of ReLU6, ELU and PReLU, and PReLU's weight."""

    def net(kit):
        torch.manual_seed(0)
        return nn.Sequential(kit.QuantStub(), nn.Conv2d(3, 4, 3), kind(), kit.DeQuantStub()).train()

    theirs, ours = net(AoKit), net(tritonq.nn)
    theirs.qconfig, ours.qconfig = (
        ao.get_default_qat_qconfig("qnnpack", 0),
        tritonq.get_default_qat_qconfig("qnnpack", 0),
    )
    theirs, ours = ao.prepare_qat(theirs), tritonq.prepare_qat(ours)
    theirs(images(0))
    theirs = ao.convert(theirs.eval())
    report = load_torch_ao_state_dict(ours, theirs.state_dict())
    assert not report.unmapped
    off = kind in (nn.ReLU6, nn.ELU, nn.PReLU)
    assert ours[2].activation_post_process.is_enabled_on_host() != off
    assert ("no grid of the results of 2:" in str(report)) == off
    if kind is nn.PReLU:
        assert "2.weight" in report.missing
        return
    step = float(theirs[1].scale) if off else float(theirs[2].scale)
    assert (ours.eval()(images(1)) - theirs(images(1))).abs().max() < 1.01 * step
    int8 = tritonq.convert(ours, allow_unquantized=off)
    assert (int8(images(1)) - theirs(images(1))).abs().max() < 1.01 * step


def test_a_converted_checkpoint_with_another_float_layer_is_refused():
    def net(kit, classes):
        return nn.Sequential(
            kit.QuantStub(), nn.Conv2d(3, 4, 3), kit.DeQuantStub(), nn.Flatten(), nn.Linear(64, classes)
        )

    def qconfigs(model, qconfig):
        model.train().qconfig = qconfig
        model[4].qconfig = None
        return model

    theirs = ao.prepare_qat(qconfigs(net(AoKit, 5), ao.get_default_qat_qconfig("qnnpack", 0)))
    theirs(images(0))
    state = ao.convert(theirs.eval()).state_dict()
    same, other = (
        tritonq.prepare_qat(qconfigs(net(tritonq.nn, classes), tritonq.get_default_qat_qconfig("qnnpack", 0)))
        for classes in (5, 7)
    )
    report = load_torch_ao_state_dict(same, state)
    assert (report.unmapped, report.missing) == ((), ())
    assert torch.equal(same[4].weight, theirs[4].weight)
    refused(other, state, r"'4.weight' has shape \(5, 64\) in the checkpoint and \(7, 64\) in the model")


def test_a_converted_checkpoint_of_another_model_is_refused():
    state = dict(ao.convert(torch_model().eval()).state_dict())
    for change, make, message in (
        (lambda s: s.pop("fc._packed_params._packed_params"), our_model, "no integer weight of 'fc'"),
        (lambda s: s.pop("skip.scale"), our_model, "no scale of the result of 'skip'"),
        (lambda s: s.update({"skip.zero_point": torch.tensor(200)}), our_model, "the zero points 200..200 of 'skip"),
        (lambda s: s.update({"skip.scale": torch.tensor(0.0)}), our_model, "a scale of 'skip"),
        (lambda s: None, lambda: our_model(width=5), "the weight of 'conv' has shape"),
    ):
        model, changed = make(), dict(state)
        change(changed)
        before = state_of(model)
        with pytest.raises(ValueError, match=message):
            load_torch_ao_state_dict(model, changed)
        assert_same_state(state_of(model), before)
