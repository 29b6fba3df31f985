"""torch.ao's scripts by changing the import: names, arguments, and numbers of `tritonq.torch_ao`."""

from __future__ import annotations

import copy
import importlib
import inspect
import re
import warnings
from pathlib import Path

import pytest
import torch
import torch.ao.quantization as theirs
import torch.ao.quantization.quantize_fx as theirs_fx
from torch import nn

import tritonq
import tritonq.torch_ao as ours
from tolerances import EXACT, LONG_SUMS, assert_close

PAGE = (Path(__file__).parents[2] / "docs" / "coming-from-torch-ao.md").read_text()
# Where each of torch.ao's namespaces is found here.
NAMESPACES = {
    "torch.ao.quantization": (ours,),
    "torch.ao.nn.qat": (tritonq.nn,),
    "torch.ao.nn.intrinsic": (tritonq.nn.intrinsic,),
    "torch.ao.nn.intrinsic.qat": (tritonq.nn, tritonq),
    "torch.ao.nn.quantized": (tritonq.nn,),
    "torch.ao.nn.intrinsic.quantized": (tritonq.nn,),
}


def names_of(module):
    """Its public names that exist: torch.ao lists some that don't."""
    found = getattr(module, "__all__", dir(module))
    return {n for n in found if n[0] != "_" and hasattr(module, n) and not inspect.ismodule(getattr(module, n))}


@pytest.mark.parametrize("name", NAMESPACES)
def test_every_name_is_here_or_in_the_list(name):
    module = importlib.import_module(name)
    heading = "names of `torch.ao.quantization`" if name == "torch.ao.quantization" else "names of `torch.ao.nn`"
    section = PAGE[PAGE.index(f"| {heading}") :].partition("\n\n")[0]
    listed = {entry for row in section.splitlines()[2:] for entry in re.findall(r"`(\w+)`", row.split("|")[1])}
    here = {n for n in names_of(module) if any(hasattr(place, n) for place in NAMESPACES[name])}
    missing = names_of(module) - here
    if name == "torch.ao.nn.qat":
        assert not missing
    assert missing <= listed
    if name == "torch.ao.quantization":
        assert listed == missing, "the list names something that is here"


def classes_in_both():
    """Pairs of torch.ao's class and the one of its name here; deployed layers are made by `convert`, not by users."""
    for name, places in NAMESPACES.items():
        if name.endswith(".quantized"):
            continue
        for each in names_of(importlib.import_module(name)):
            theirs_too = getattr(importlib.import_module(name), each)
            mine = next((getattr(place, each) for place in places if hasattr(place, each)), None)
            if inspect.isclass(theirs_too) and inspect.isclass(mine):
                yield theirs_too, mine


def test_every_method_is_here_or_in_the_list():
    """Containers' own methods do not count: tritonq's fused layers are none."""
    listed = re.findall(r"`(\w+)`", PAGE.partition("| methods |")[2].partition("\n\n")[0])
    missing = {
        name
        for theirs_too, mine in classes_in_both()
        for name in dir(theirs_too)
        if name[0] != "_" and not hasattr(mine, name) and not hasattr(nn.Sequential, name)
        if inspect.isroutine(getattr(theirs_too, name))
    }
    assert missing <= set(listed)
    assert len(missing) > 3


SAME_ARGUMENTS = (
    *("QuantWrapper", "add_quant_dequant", "fuse_modules", "fuse_modules_qat", "get_default_qat_qconfig"),
    *("get_default_qat_qconfig_mapping", "get_default_qconfig", "get_default_qconfig_mapping", "prepare_qat"),
    *("convert", "quantize", "quantize_qat", "prepare_qat_fx", "convert_fx", "swap_module"),
)


@pytest.mark.parametrize("name", SAME_ARGUMENTS)
def test_order_of_arguments_and_defaults(name):
    both = getattr(theirs, name, None) or getattr(theirs_fx, name), getattr(ours, name)
    expected, found = ([p for p in inspect.signature(f).parameters.values()] for f in both)
    if name != "swap_module":
        assert [p.name for p in found[: len(expected)]] == [p.name for p in expected]
    for mine, other in zip(found, expected, strict=False):
        if other.default is not other.empty and other.name != "fuser_func":
            assert mine.default == other.default, other.name


DEFAULTS = [
    name for name in ours.__all__ if re.match("(default|fused|weight|per_channel).*(observer|quant|127)$", name)
]


def test_there_are_defaults():
    assert len(DEFAULTS) > 15


@pytest.mark.parametrize("name", DEFAULTS)
def test_numbers_of_defaults(name):
    x = torch.randn(3, 40, generator=torch.Generator().manual_seed(0))
    found, expected = getattr(ours, name)(), getattr(theirs, name)()
    if "histogram" in name:
        assert (found.qtype.quant_min, found.qtype.quant_max) == (expected.quant_min, expected.quant_max)
        return
    for module in (found, expected):
        module.train()
        y = module(x), module(x * 2)
        module.disable_observer() if hasattr(module, "disable_observer") else None
        module.eval()
        y += (module(x),)
        module.result = y
    for mine, other in zip(found.result, expected.result, strict=True):
        assert_close(mine, other, EXACT)
    if "fixed" not in name and "fused" not in name:  # theirs converts by another formula than it trains
        assert_close(found.calculate_qparams()[0], expected.calculate_qparams()[0], EXACT)


QCONFIGS = [name for name in ours.__all__ if re.search("qconfig(_v2)?$", name) and name.startswith("default")]


@pytest.mark.parametrize("name", QCONFIGS)
def test_qconfigs(name):
    found, expected = getattr(ours, name), getattr(theirs, name)
    for role in ("activation", "weight"):
        mine, other = getattr(found, role)(), getattr(expected, role)()
        other = getattr(other, "activation_post_process", other)
        assert (mine.qtype.quant_min, mine.qtype.quant_max) == (other.quant_min, other.quant_max)
        assert (mine.qtype.axis is not None) == ("per_channel" in str(other.qscheme))
        assert mine.activation_post_process.eps == other.eps


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.relu = nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU()
        self.flatten, self.head = nn.Flatten(), nn.Linear(6 * 16, 5)

    def forward(self, x):
        return self.head(self.flatten(self.relu(self.bn(self.conv(x)))))


X = torch.randn(8, 3, 6, 6, generator=torch.Generator().manual_seed(1))


def trained(names, model, steps=3):
    """Return outputs of some steps of gradient descent, and of eval mode, in which torch.ao would go on observing."""
    found, parameters = [], list(model.parameters())
    for step in range(steps):
        y = model(X * (1 + step))
        grads = torch.autograd.grad(y.square().mean(), parameters)
        with torch.no_grad():
            for parameter, grad in zip(parameters, grads, strict=True):
                parameter -= 0.01 * grad
        found.append(y.detach())
    model.apply(names.disable_observer)
    return [*found, model.eval()(X).detach()]


def test_script_in_fx_form():
    """The same script under both imports."""
    torch.manual_seed(0)
    net = Net().train()
    outputs = []
    for names, fx in ((ours, ours), (theirs, theirs_fx)):
        mapping = names.get_default_qat_qconfig_mapping("x86", version=0)
        activation = names.get_default_qat_qconfig("x86", version=0).activation
        mapping.set_module_name("head", names.QConfig(activation, names.default_weight_fake_quant))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            prepared = fx.prepare_qat_fx(copy.deepcopy(net), mapping, (X,))
        outputs.append(trained(names, prepared))
        if names is ours:
            assert isinstance(prepared.conv, tritonq.nn.ConvBnReLU2d)
            assert prepared.head.weight_fake_quant.qtype.axis is None
            converted = fx.convert_fx(prepared)
            assert torch.equal(converted(X), outputs[0][-1])
    for mine, other in zip(*outputs, strict=True):
        assert_close(mine, other, LONG_SUMS, size=0.1)


def test_options_without_counterpart_are_errors():
    net, mapping = Net().train(), ours.get_default_qat_qconfig_mapping()
    with pytest.raises(ValueError, match=r"no counterpart of backend_config=1: .*What differs"):
        ours.prepare_qat_fx(net, mapping, (X,), backend_config=1)
    with pytest.raises(ValueError, match="no counterpart of is_reference=True"):
        ours.convert(net, is_reference=True)
    with pytest.raises(ValueError, match="no counterpart of 'conv' in a dict of qconfigs; known: '', 'object_type'"):
        ours.prepare_qat_fx(net, {"": None, "conv": None}, (X,))
    with pytest.raises(ValueError, match="prepare_custom_config_dict"):
        ours.propagate_qconfig_(net, None, {"a": 1})
    with pytest.raises(AttributeError, match="set by a method"):
        mapping.names = ()


def test_a_mapping_changes():
    mapping = ours.QConfigMapping()
    qconfig = ours.get_default_qat_qconfig("x86")
    assert mapping.set_global(qconfig).set_object_type(nn.Linear, None) is mapping
    mapping.set_module_name_regex("conv.*", None)
    mapping.set_first_layer(None).set_last_layer(None).set_input(qconfig).set_module_name("head", qconfig)
    assert mapping.global_rule.qconfig is qconfig
    assert [rule.key for rule in (*mapping.types, *mapping.patterns, *mapping.names)] == [
        "torch.nn.modules.linear.Linear", "conv.*", "head"
    ]  # fmt: skip
    assert (mapping.first.qconfig, mapping.last.qconfig, mapping.inputs.qconfig) == (None, None, qconfig)


def test_a_dict_of_the_older_form():
    qconfig = ours.get_default_qat_qconfig("x86", 0)
    rules = {"": qconfig, "object_type": [(nn.Linear, None)], "module_name_regex": [("c.*", None)], "module_name": []}
    mapping = ours.QConfigMapping().set_global(qconfig).set_object_type(nn.Linear, None)
    assert ours.QConfigMapping.from_dict(rules) == mapping.set_module_name_regex("c.*", None)
    found = ours.prepare_qat_fx(Net().train(), {"": qconfig, "module_name": [("head", None)]}, (X,))
    assert isinstance(found.conv, tritonq.nn.ConvBnReLU2d)
    assert type(found.head) is nn.Linear


def eager(names, version=0):
    torch.manual_seed(0)
    net = names.QuantWrapper(Net().train())
    net.qconfig = names.get_default_qat_qconfig("fbgemm", version)
    return names.fuse_modules_qat(net, [["module.conv", "module.bn", "module.relu"]])


@pytest.mark.parametrize("flow", ["quantize", "quantize_qat"])
def test_one_call_leaves_the_model_as_it_was(flow):
    model = eager(ours).eval()
    before = copy.deepcopy(model.state_dict())
    getattr(ours, flow)(model, lambda prepared, x: prepared(x), [X])
    assert not any(module.training for module in model.modules())
    assert str(model) == str(eager(ours))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_wrapper_and_training_in_one_call():
    results = {ours: [], theirs: []}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for names, found in results.items():
            converted = names.quantize_qat(
                eager(names), lambda model, names, out: out.extend(trained(names, model)), [names, found]
            )
            found.append(converted(X))
    for mine, other in zip(results[ours][:-1], results[theirs][:-1], strict=True):
        assert_close(mine, other, LONG_SUMS, size=0.1)
    # Converted models requantize sums by formulas of their own: one code of the output.
    assert (results[ours][-1] - results[theirs][-1]).abs().max() < 1.01 * float(converted.module.head.scale)


def test_calibration_in_one_call():
    net = ours.fuse_modules(Net().eval(), [["conv", "bn", "relu"]])
    assert isinstance(net.conv, tritonq.nn.intrinsic.ConvReLU2d)
    model = ours.QuantWrapper(net)
    model.qconfig = ours.get_default_qconfig("x86")
    int8 = ours.quantize(model, lambda observed, data: [observed(x) for x in data], [[X, X / 2]])
    expected = net(X)
    assert (int8(X) - expected).norm() < 0.05 * expected.norm()
    with pytest.raises(ValueError, match="no finite value"):
        ours.quantize(model, lambda observed: None, [])


@pytest.mark.parametrize("row", [["conv", "bn"], ["conv", "bn", "relu"], ["head", "relu"], ["fc", "fcbn"]])
def test_fuse_modules_in_eval_mode(row):
    torch.manual_seed(0)
    net = nn.ModuleDict({
        **{"conv": nn.Conv2d(3, 4, 3), "bn": nn.BatchNorm2d(4), "relu": nn.ReLU()},
        **{"head": nn.Linear(3, 4), "fc": nn.Linear(3, 4), "fcbn": nn.BatchNorm1d(4)},
    })  # fmt: skip
    for bn in (net["bn"], net["fcbn"]):
        bn.running_mean.normal_()
        bn.running_var.uniform_(0.5, 2)
    x = X if row[0] == "conv" else torch.randn(5, 3)
    found, expected = (f.fuse_modules(net.eval(), [row]) for f in (ours, theirs))
    assert type(found[row[0]]).__name__ == type(expected[row[0]]).__name__
    assert all(isinstance(found[name], nn.Identity) for name in row[1:])
    assert_close(found[row[0]](x), expected[row[0]](x), EXACT)
    with pytest.raises(ValueError, match=r"call model\.eval\(\), or fuse_modules_qat"):
        ours.fuse_modules(net.train(), [row])


def test_stubs_and_qconfigs_by_hand():
    both = []
    for names in (ours, theirs):
        net = nn.Sequential(nn.Linear(3, 3), nn.Sequential(nn.Linear(3, 2), nn.ReLU()), nn.Linear(2, 2)).train()
        qconfig = names.get_default_qat_qconfig("x86", 0)
        names.propagate_qconfig_(net, {"1": qconfig, nn.Linear: None})
        both.append({name: part.qconfig is None for name, part in net.named_modules()})
        for part in (net[0], net[1], net[1][1]):
            part.qconfig = qconfig
        net[2].qconfig = None
        wrapped = names.add_quant_dequant(net)
        both.append([name for name, _ in wrapped.named_modules()])
        both.append(type(names.swap_module(wrapped[0].module, names.get_default_qat_module_mappings(), {})).__name__)
    assert both[:3] == both[3:]
    assert type(ours.add_quant_dequant(wrapped[0].module)) is ours.QuantWrapper
    assert ours.swap_module(nn.Linear(3, 3)).__class__ is nn.Linear


def test_a_state_dict_into_a_model_that_was_converted_without_data():
    """As scripts of torch.ao deploy: prepare, convert, load."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trained_model = ours.prepare_qat(eager(ours))
        trained(ours, trained_model)
        converted = ours.convert(trained_model)
        empty = ours.prepare_qat(eager(ours))
    before = {name: value.clone() for name, value in empty.state_dict().items()}
    with pytest.warns(
        UserWarning, match=r"5 quantizers, 'quant\.activation_post_process' first, have observed nothing"
    ):
        other = ours.convert(empty.eval())
    assert all(torch.equal(value, before[name]) for name, value in empty.state_dict().items())
    other.load_state_dict(converted.state_dict())
    assert torch.equal(other(X), converted(X))


def test_a_recurrent_layer_converts_without_data():
    """Its weights' quantizers, named after the weights, have a scale per row."""
    models = [ours.QuantWrapper(nn.LSTM(3, 5)).train() for _ in range(2)]
    x = torch.randn(4, 2, 3)
    for model in models:
        model.qconfig = model.quant.qconfig = tritonq.get_qconfig()
        ours.prepare_qat(model, inplace=True)
    models[0](x)
    converted = ours.convert(models[0].eval())
    with pytest.warns(UserWarning, match="have observed nothing"):
        other = ours.convert(models[1].eval())
    other.load_state_dict(converted.state_dict())
    assert torch.equal(other(x)[0], converted(x)[0])
