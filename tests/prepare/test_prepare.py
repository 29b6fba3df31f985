"""`prepare_qat`: the model stays the user's model; choices, reports, errors, and the eager flow."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import tritonq.nn as qnn
from prepared_nets import Net, X, conv, norm, of_type, prepare, quantizers, saved_and_loaded
from tolerances import SUMS, TRAINED, assert_close
from tritonq.fake_quantize_base import FakeQuantizeBase
from tritonq.nn.original_class import original_class
from tritonq.prepare import (
    disable_fake_quant,
    disable_observer,
    enable_fake_quant,
    enable_observer,
    freeze_bn_stats,
    prepare_qat,
    update_bn_stats,
)
from tritonq.qconfig import QConfig, get_default_qat_qconfig, get_qconfig


@pytest.mark.parametrize("training", [True, False])
def test_model_is_otherwise_as_it_was(training):
    model = Net(lambda m, x: m.fc(m.norm(m.conv(x)).mean((2, 3))), conv=conv(), norm=norm(), fc=nn.Linear(4, 2))
    model.train(training)
    model.fc.eval()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    kinds = [type(module) for module in model.modules()]
    numbers = torch.get_rng_state()
    prepared = prepare_qat(model, example_inputs=X)
    assert torch.equal(torch.get_rng_state(), numbers)
    assert [type(module) for module in model.modules()] == kinds
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert model.training is prepared.training is prepared.conv.training is prepared.conv.bn.training is training
    assert prepared.conv.activation_post_process.training is prepared.norm.training is training
    assert not prepared.fc.training
    assert not prepared.fc.weight_fake_quant.training
    assert torch.equal(prepared.conv.bn.running_mean, model.norm.running_mean)
    assert prepared.conv.bn.running_mean is not model.norm.running_mean


def test_inplace_keeps_the_parameters():
    model = Net(lambda m, x: m.fc(m.norm(m.conv(x)).mean((2, 3))), conv=conv(), norm=norm(), fc=nn.Linear(4, 2))
    parameters = list(model.parameters())
    prepared = prepare_qat(model, inplace=True, example_inputs=X)
    assert prepared is model
    assert [id(parameter) for parameter in prepared.parameters()] == [id(parameter) for parameter in parameters]


def test_frozen_batch_norm_stays_frozen():
    model = nn.Sequential(conv(), norm(), conv())
    model[1].eval()
    prepared = prepare_qat(model, example_inputs=X)
    mean = prepared[0].bn.running_mean.clone()
    prepared.train()(X)
    assert prepared[0].freeze_bn
    assert torch.equal(prepared[0].bn.running_mean, mean)


def test_hooks_move_with_their_place():
    model, seen = nn.Sequential(conv(), norm(), nn.ReLU()), []
    before = model[0].register_forward_pre_hook(lambda module, args: seen.append("before"))
    after = model[1].register_forward_hook(lambda module, args, output: seen.append("after"))
    prepared = prepare_qat(model, inplace=True, example_inputs=X)
    assert type(prepared[0]) is qnn.ConvBn2d  # the hook stands between BatchNorm and ReLU
    seen.clear()
    prepared(X)
    assert seen == ["before", "after"]
    before.remove()
    after.remove()
    prepared(X)
    assert seen == ["before", "after"]


@pytest.mark.parametrize("name", ["0", "1", "2", "3"])
def test_hooks_on_gradients_see_those_of_their_module(name):
    torch.manual_seed(0)
    model, seen = nn.Sequential(conv(bias=False), norm(), nn.ReLU(), conv()), []

    def hook(module, grad_input, grad_output):
        seen.append((grad_input[0], grad_output[0]))

    model.get_submodule(name).register_full_backward_hook(hook)
    prepared = prepare_qat(model, example_inputs=X)
    disable_fake_quant(prepared)
    for part in (model, prepared):
        part.train()(X.clone().requires_grad_()).square().sum().backward()
    (expected_in, expected_out), (got_in, got_out) = seen
    assert_close(got_in, expected_in, TRAINED, size=0.1)
    assert_close(got_out, expected_out, TRAINED, size=0.1)


@pytest.mark.parametrize("where", [0, 1])
def test_hook_between_convolution_and_norm_keeps_them_apart(where):
    """Someone listens there, and would hear something else."""
    model, heard = nn.Sequential(conv(), norm()), []
    if where == 0:
        model[0].register_forward_hook(lambda module, args, output: heard.append(output))
    else:
        model[1].register_forward_pre_hook(lambda module, args: heard.append(args[0]))
    prepared = prepare_qat(model, inplace=True, example_inputs=X)
    assert type(prepared[1]) is nn.BatchNorm2d
    (record,) = [record for record in prepared.tritonq_report if record.name == "1"]
    assert (record.status, record.reason) == ("float", "hooks stand between the two")
    heard.clear()
    prepared(X)
    assert len(heard) == 1


class Clips(nn.Module):
    """A ReLU behind an addition, and clips and functions that would become one operation."""

    def __init__(self):
        super().__init__()
        self.first, self.second = conv(), conv()
        self.relu, self.relu6, self.hardtanh, self.silu = nn.ReLU(), nn.ReLU6(), nn.Hardtanh(0, 3), nn.SiLU()

    def forward(self, x):
        x = self.relu(self.first(x) + x)
        return self.silu(self.hardtanh(self.relu6(self.second(x)))) * 2.0


@pytest.mark.parametrize("kind", ["register_forward_hook", "register_forward_pre_hook"])
@pytest.mark.parametrize("name", ["relu", "relu6", "hardtanh", "silu"])
def test_modules_with_hooks_stay_apart_from_joins_and_clips(name, kind):
    model, heard = Clips(), []
    getattr(model.get_submodule(name), kind)(lambda module, *values: heard.append(values[-1]))
    float_model = copy.deepcopy(model).eval()
    prepared = prepare_qat(model, example_inputs=X).eval()
    disable_fake_quant(prepared)
    heard.clear()
    assert_close(prepared(X), float_model(X), SUMS)
    got, expected = heard
    assert_close(*(value[0] if isinstance(value, tuple) else value for value in (got, expected)), SUMS)


def test_deepcopy_pickle_and_state_dict():
    model = Net(block_run, conv=conv(), norm=norm(), second=conv())
    prepared = prepare_qat(model, example_inputs=X)
    prepared(X)
    prepared.eval()
    expected = prepared(X)
    loaded = prepare_qat(copy.deepcopy(model), example_inputs=X).eval()
    loaded.load_state_dict(prepared.state_dict(), strict=True)
    for again in (copy.deepcopy(prepared), saved_and_loaded(prepared), loaded):
        assert torch.equal(again(X), expected)
        assert again.second.input_quantizer is again.gelu_fake_quant
        assert again.second.input_quantizer is not prepared.second.input_quantizer


def block_run(m, x):
    return m.second(F.gelu(F.relu(m.norm(m.conv(x))) + x))


def test_qconfig_by_attribute():
    eight_bits = get_default_qat_qconfig("qnnpack", version=0)
    model = nn.Sequential(conv(), nn.Sequential(conv(), conv()), conv())
    model.qconfig = get_qconfig("tensorrt")
    model[1].qconfig = None
    model[1][1].qconfig = eight_bits
    prepared = prepare_qat(model, example_inputs=X)
    assert original_class(prepared[1][0]) is nn.Conv2d
    assert prepared[1][1].activation_post_process.quant_max == 255
    assert prepared[2].weight_fake_quant.quant_min == -127
    (record,) = [record for record in prepared.tritonq_report if record.name == "1.0"]
    assert record.reason == "its qconfig is None"


@pytest.mark.parametrize("example", [X, None])
def test_qconfig_argument_stands_for_the_models_own(example):
    model = nn.Sequential(conv(), conv())
    model.qconfig = get_default_qat_qconfig("qnnpack", version=0)
    model[1].qconfig = None
    prepared = prepare_qat(model, qconfig=get_qconfig("megengine_lowbit"), example_inputs=example)
    assert prepared[0].weight_fake_quant.quant_max == 7
    assert type(prepared[1]) is nn.Conv2d


@pytest.mark.parametrize("example", [X, None])
def test_without_qconfig_the_preset_is_onnxruntime(example):
    prepared = prepare_qat(nn.Sequential(conv()), example_inputs=example)
    assert prepared[0].qconfig == get_qconfig("onnxruntime")


def test_report_tells_two_additions_apart():
    prepared = prepare(lambda m, x: m.second(m.first(x) + x) + x, first=conv(), second=conv())
    assert of_type(prepared, qnn.Add) == ["add", "add_1"]
    assert [record.name for record in prepared.tritonq_report] == ["first", "add", "second", "add_1"]


def test_report_names_every_layer():
    model = Net(
        lambda m, x: m.fc(m.pool(m.act(m.norm(m.conv(x)) + x)).flatten(1)),
        conv=conv(),
        norm=norm(),
        act=nn.ReLU(),
        pool=nn.AdaptiveAvgPool2d(1),
        fc=nn.Linear(4, 2),
    )
    report = {record.name: record for record in prepare_qat(model, example_inputs=X).tritonq_report}
    assert list(report) == ["conv", "norm", "add", "act", "pool", "fc"]
    assert report["conv"].fused_with == ("norm",)
    assert report["act"].fused_with == ("add",)
    assert all(record.status == "quantized" for record in report.values())


class Raises(qnn.Linear):
    @classmethod
    def from_float(cls, mod, use_precomputed_fake_quant=False):
        raise ValueError("not today")


class Wrong(qnn.Linear):
    def forward(self, x):
        return super().forward(x) + 1


@pytest.mark.parametrize(("target", "error"), [(Raises, "not today"), (Wrong, "would not compute")])
def test_failure_in_the_middle_undoes_everything(target, error):
    model = Net(
        lambda m, x: m.fc((F.relu(m.norm(m.conv(x))) + x).mean((2, 3))), conv=conv(), norm=norm(), fc=nn.Linear(4, 2)
    )
    model.conv.register_forward_pre_hook(lambda module, args: None)
    before = {name: (module, type(module), dict(vars(module))) for name, module in model.named_modules()}
    expected = model.eval()(X)
    hooks = len(model.conv._forward_pre_hooks)
    with pytest.raises((ValueError, RuntimeError), match=error):
        prepare_qat(model, {**qnn.DEFAULT_QAT_MAPPING, nn.Linear: target}, inplace=True, example_inputs=X)
    for name, module in model.named_modules():
        assert module is before[name][0]
        assert type(module) is before[name][1]
        assert set(vars(module)) == set(before[name][2])
    assert len(model.conv._forward_pre_hooks) == hooks
    assert not model._forward_pre_hooks
    assert torch.equal(model(X), expected)


@pytest.mark.parametrize(
    ("model", "arguments", "error", "message"),
    [
        (nn.Sequential(nn.ReLU()), {"example_inputs": X}, ValueError, "no quantizable layer"),
        (nn.Sequential(conv()), {"example_inputs": "image"}, TypeError, "got str"),
        (nn.Sequential(conv()), {"mapping": get_qconfig("tensorrt"), "example_inputs": X}, TypeError, "as qconfig="),
        (
            nn.Sequential(conv()),
            {"example_inputs": X, "qconfig": "tensorrt"},
            TypeError,
            "tritonq.get_qconfig..tensorrt.. gives",
        ),
        (conv(), {"example_inputs": X}, ValueError, "single Conv2d"),
        ("resnet18", {"example_inputs": X}, TypeError, "Module, got str"),
        (nn.Sequential(conv()).eval(), {}, ValueError, "training mode"),
        (nn.Sequential(nn.LazyConv2d(2, 1)), {"example_inputs": X}, ValueError, "no shape before"),
        (nn.Sequential(conv()).to("meta"), {"example_inputs": X}, ValueError, r"'0\.weight' is on the device meta"),
    ],
)
def test_bad_input(model, arguments, error, message):
    with pytest.raises(error, match=message):
        prepare_qat(model, **arguments)


def test_rejected_inputs_chain_the_models_own_error():
    with pytest.raises(ValueError, match="Sequential rejects example_inputs") as caught:
        prepare_qat(nn.Sequential(conv()), example_inputs=torch.randn(1, 3, 6, 6))
    assert isinstance(caught.value.__cause__, RuntimeError)


@pytest.mark.parametrize("example", [X, None])
def test_preparing_twice_is_an_error(example):
    prepared = prepare_qat(nn.Sequential(conv()), example_inputs=X)
    with pytest.raises(ValueError, match="prepared already: '0'"):
        prepare_qat(prepared, example_inputs=example)


class Stubs(nn.Module):
    """A torch.ao script's model."""

    def __init__(self):
        super().__init__()
        self.quant, self.dequant = qnn.QuantStub(), qnn.DeQuantStub()
        self.conv, self.act = conv(), nn.ReLU6()
        self.join = qnn.FloatFunctional()
        self.fc = nn.Linear(4, 2)

    def forward(self, x):
        x = self.quant(x)
        y = self.join.add(self.act(self.conv(x)), x)
        return self.dequant(self.fc(y.mean((2, 3))))


def test_eager_flow_quantizes_where_torch_ao_does():
    model = Stubs()
    model.qconfig = get_default_qat_qconfig("qnnpack", version=0)
    prepared = prepare_qat(model)
    assert type(model.conv) is nn.Conv2d
    assert type(prepared.conv) is qnn.Conv2d
    assert type(prepared.fc) is qnn.Linear
    assert sorted(quantizers(prepared)) == [
        f"{name}.activation_post_process" for name in ("act", "conv", "fc", "join", "quant")
    ]
    assert prepared.conv.qconfig == model.qconfig
    out = prepared(X)
    out.sum().backward()
    assert float(prepared.quant.activation_post_process.activation_post_process.max_val) == float(X.max())
    disable_fake_quant(prepared)
    torch.testing.assert_close(prepared(X), model(X))


def test_eager_flow_respects_none_and_inplace():
    model = nn.Sequential(conv(), conv())
    model.qconfig = get_qconfig("tensorrt")
    model[1].qconfig = None
    assert prepare_qat(model, inplace=True) is model
    assert type(model[0]) is qnn.Conv2d
    assert type(model[1]) is nn.Conv2d


def test_eager_flow_swaps_a_shared_module_once():
    shared = conv()
    prepared = prepare_qat(nn.Sequential(nn.Sequential(shared), nn.Sequential(shared)))
    assert type(prepared[0][0]) is qnn.Conv2d
    assert prepared[0][0] is prepared[1][0]


def test_eager_flow_needs_a_qconfig_of_the_right_type():
    model = nn.Sequential(conv())
    model[0].qconfig = "tensorrt"
    with pytest.raises(TypeError, match="qconfig of 0 must be a QConfig"):
        prepare_qat(model)


@pytest.mark.parametrize("apply", [True, False])
def test_switches_reach_every_quantizer(apply):
    prepared = prepare_qat(nn.Sequential(conv(), norm(), nn.ReLU(), conv()), example_inputs=X)
    found = [module for module in prepared.modules() if isinstance(module, FakeQuantizeBase)]

    def switch(function):
        prepared.apply(function) if apply else function(prepared)

    switch(disable_observer)
    assert not any(bool(module.observer_enabled) for module in found)
    switch(enable_observer)
    assert all(bool(module.observer_enabled) for module in found)
    switch(disable_fake_quant)
    assert not any(bool(module.fake_quant_enabled) for module in found)
    switch(enable_fake_quant)
    assert all(bool(module.fake_quant_enabled) for module in found)
    switch(freeze_bn_stats)
    assert prepared[0].freeze_bn
    switch(update_bn_stats)
    assert not prepared[0].freeze_bn


def test_training_step_equals_the_float_models_when_nothing_is_rounded():
    nothing = QConfig(nn.Identity, nn.Identity)
    model = Net(block_run, conv=conv(), norm=norm(), second=conv()).double()
    prepared = prepare_qat(model, qconfig=nothing, example_inputs=X.double())
    for module in (model, prepared):
        module.train()(X.double()).square().sum().backward()
    assert type(prepared.conv) is qnn.ConvBnReLU2d
    torch.testing.assert_close(prepared.conv.bn.running_var, model.norm.running_var)
    torch.testing.assert_close(prepared.conv.weight.grad, model.conv.weight.grad)
    torch.testing.assert_close(prepared.conv.bn.weight.grad, model.norm.weight.grad)


@pytest.mark.parametrize("preset", ["onnxruntime", "megengine_tqt", "megengine_passive", "f8net"])
def test_preparation_leaves_running_statistics_alone(preset):
    """Runs that record and check the model, also in training mode, are undone: batch_norm does not count its writes."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 2)).train()
    before = (model[1].running_mean.clone(), model[1].running_var.clone())
    prepared = prepare_qat(model, qconfig=get_qconfig(preset), example_inputs=torch.rand(4, 3, 8, 8) + 1)
    (norm,) = (module for module in prepared.modules() if isinstance(module, nn.BatchNorm2d))
    assert all(torch.equal(a, b) for a, b in zip(before, (norm.running_mean, norm.running_var), strict=True))
