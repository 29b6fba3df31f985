"""`accelerate` and `restore` of models that torch.ao's eager mode prepared, against the same models untouched."""

from __future__ import annotations

import copy
import io
import warnings

import pytest
import torch
from torch import nn
from torch.ao import quantization as ao
from torch.ao.nn.intrinsic import qat as intrinsic
from torch.ao.nn.quantized import FloatFunctional
from torch.ao.quantization import _learnable_fake_quantize as learnable
from torch.ao.quantization import quantization_mappings
from torch.profiler import ProfilerActivity, profile

import tritonq
from saved_bytes import saved_bytes
from tolerances import FLOAT32, FLOAT64_SUMS, SUMS, TRAINED, assert_close
from torch_ao_nets import OtherDimensions, in_float64, prepared
from tritonq.acceleration import report_of

pytestmark = pytest.mark.filterwarnings("ignore")
SLOW = "_enable_slow_path_for_better_numerical_stability"


def qconfig(backend="x86", version=0):
    return ao.get_default_qat_qconfig(backend, version)


def learned():
    weight = learnable._LearnableFakeQuantize.with_args(
        observer=ao.PerChannelMinMaxObserver,
        quant_min=-128,
        quant_max=127,
        dtype=torch.qint8,
        qscheme=torch.per_tensor_symmetric,
        scale=0.05,
        zero_point=0.0,
        use_grad_scaling=True,
    ).with_args(observer=ao.MovingAverageMinMaxObserver)
    return ao.QConfig(activation=qconfig().activation, weight=weight)


def images(step, dtype=torch.float32):
    generator = torch.Generator().manual_seed(step)
    return torch.randn(4, 3, 8, 8, generator=generator, dtype=torch.float64).to(dtype)


def step_of(model, optimizer, step, dtype=torch.float32):
    optimizer.zero_grad()
    result = model(images(step, dtype))
    result.square().mean().backward()
    optimizer.step()
    return result.detach()


def assert_same_training(theirs, ours, dtype=torch.float64, steps=10):
    """Train both; outputs, and in the end parameters, statistics and ranges agree, and so does eval mode."""
    optimizers = [torch.optim.SGD(model.parameters(), 0.05, momentum=0.9) for model in (theirs, ours)]
    for step in range(steps):
        results = [
            step_of(model, optimizer, step, dtype) for model, optimizer in zip((theirs, ours), optimizers, strict=True)
        ]
        assert_close(*results, FLOAT64_SUMS)
    assert_same_state(theirs, ours, FLOAT64_SUMS)
    theirs.eval(), ours.eval()
    assert_close(theirs(images(99, dtype)), ours(images(99, dtype)), FLOAT64_SUMS)


def assert_same_state(theirs, ours, tolerance):
    expected, state = theirs.state_dict(), ours.state_dict()
    assert list(state) == list(expected)
    for name, value in expected.items():
        assert_close(state[name], value, tolerance, msg=lambda m, n=name: f"{n}: {m}")


def test_arguments_by_name():
    theirs = prepared(qconfig())
    ours = tritonq.accelerate(theirs)
    x, y = images(0), images(1)
    assert_close(ours.conv(input=x), theirs.conv(input=x), FLOAT32)
    assert_close(ours.join.add_relu(x, y=y), theirs.join.add_relu(x, y=y), FLOAT32)
    assert_close(ours.join.add(y=y, x=x), theirs.join.add(y=y, x=x), FLOAT32)
    assert_same_state(theirs, ours, FLOAT32)
    with pytest.raises(TypeError, match="unexpected keyword argument 'inputs'"):
        ours.conv(inputs=x)


@pytest.mark.parametrize("operands", [lambda x: (x, 2.0), lambda x: (2.0, x)], ids=["behind", "in front"])
def test_sums_with_numbers(operands):
    theirs = nn.ModuleList([FloatFunctional()]).train()
    theirs.qconfig = qconfig()
    theirs = ao.prepare_qat(theirs)
    ours = tritonq.accelerate(theirs)
    for x in (images(0), images(1)):
        assert_close(ours[0].add_relu(*operands(x)), theirs[0].add_relu(*operands(x)), FLOAT32)
    assert_same_state(theirs, ours, FLOAT32)


@pytest.mark.parametrize("setting", ["x86", "qnnpack", "slow", "frozen", "ranges"])
def test_ten_steps_in_float64(setting):
    extremes = ao.FakeQuantize.with_args(observer=ao.MinMaxObserver, quant_min=0, quant_max=255)
    chosen = qconfig("qnnpack" if setting == "qnnpack" else "x86")
    model = in_float64(prepared(chosen if setting != "ranges" else ao.QConfig(extremes, chosen.weight)))
    if setting == "slow":
        for module in model.modules():
            if hasattr(module, SLOW):
                setattr(module, SLOW, True)
    if setting == "frozen":
        model(images(0, torch.float64))
        model.apply(torch.ao.nn.intrinsic.qat.freeze_bn_stats)
    ours = tritonq.accelerate(model)
    assert not report_of(ours).left_alone
    assert_same_training(model, ours, steps=4 if setting in ("slow", "ranges") else 10)


def test_layers_of_one_and_three_dimensions():
    """torch.ao rounds no weight of a convolution of one dimension without BatchNorm."""
    torch.manual_seed(0)
    model = prepared(qconfig(), OtherDimensions())
    ours = tritonq.accelerate(in_float64(model))
    report = report_of(ours)
    assert not report.left_alone
    kinds = {row.kind for row in report.rows}
    assert kinds >= {"ConvBnReLU1d", "ConvBn1d", "ConvBnReLU3d", "ConvBn3d", "ConvReLU3d", "Conv3d"}
    assert_same_training(model, ours, steps=4)
    state = {name: value.clone() for name, value in ours.state_dict().items()}
    model.load_state_dict(state)
    with torch.no_grad():
        converted = [ao.convert(each.float().eval()) for each in (model, tritonq.restore(ours))]
    assert torch.equal(*(each(images(1)) for each in converted))


class Tables(nn.Module):
    """Embedding tables before a linear layer; reads the images' pixels as indices."""

    def __init__(self):
        super().__init__()
        self.words, self.bags = nn.Embedding(20, 4, padding_idx=1), nn.EmbeddingBag(20, 4, mode="mean")
        self.quant, self.head, self.dequant = ao.QuantStub(), nn.Linear(8, 3), ao.DeQuantStub()

    def forward(self, x):
        index = (x.flatten(1) * 5).long() % 20
        return self.dequant(self.head(self.quant(torch.cat([self.words(index).mean(1), self.bags(index)], 1))))


def test_embedding_tables_in_float64():
    """Their quantizers are left to torch.ao: zero points of its tables are no integers."""
    torch.manual_seed(0)
    model, mapping = Tables().train(), quantization_mappings.get_embedding_qat_module_mappings()
    model.qconfig, model.words.qconfig = qconfig(), ao.default_embedding_qat_qconfig
    model.bags.qconfig = ao.default_embedding_qat_qconfig_4bit
    model = in_float64(ao.prepare_qat(model, {**ao.get_default_qat_module_mappings(), **mapping}))
    ours = tritonq.accelerate(model)
    report = report_of(ours)
    assert [row.name for row in report.left_alone] == ["words.weight_fake_quant", "bags.weight_fake_quant"]
    assert "zero points that are no integers" in str(report)
    assert_same_training(model, ours)
    restored = tritonq.restore(ours)
    assert [type(module) for module in restored.modules()] == [type(module) for module in model.modules()]


def test_the_fused_quantizers_of_version_1():
    # torch's fused operator takes no float64: one step in float32, before a tie can part the two.
    model = prepared(qconfig(version=1))
    ours = tritonq.accelerate(model)
    results = [each(images(0)) for each in (model, ours)]
    assert_close(*results, FLOAT32)
    assert_same_state(model, ours, SUMS)


def test_learned_scales():
    model = prepared(learned())
    for each in model.modules():
        if isinstance(each, learnable._LearnableFakeQuantize):
            each.enable_param_learning()
    ours = tritonq.accelerate(model)
    assert not report_of(ours).left_alone
    for each in (model, ours):
        each(images(0)).square().mean().backward()
    theirs = dict(model.named_parameters())
    for name, parameter in ours.named_parameters():
        assert (parameter.grad is None) == (theirs[name].grad is None), name
        if parameter.grad is not None:
            assert_close(parameter.grad, theirs[name].grad, TRAINED, size=0.01, msg=name)


@pytest.mark.parametrize("version", [0, 1])
def test_convert_after_restore_gives_what_it_would_have_given(version):
    model = prepared(qconfig("fbgemm", version))
    ours = tritonq.accelerate(model)
    for each in (model, ours):
        each(images(0))
    state = {name: value.clone() for name, value in ours.state_dict().items()}
    restored = tritonq.restore(ours)
    assert restored is ours
    assert [type(module) for module in ours.modules()] == [type(module) for module in model.modules()]
    for theirs, module in zip(model.modules(), ours.modules(), strict=True):
        assert list(module._forward_hooks.values()) == list(theirs._forward_hooks.values())
        assert not [name for name in module.__dict__ if name.startswith("_tritonq")]
    model.load_state_dict(state)
    converted = [ao.convert(each.eval()) for each in (model, ours)]
    assert torch.equal(converted[0](images(1)), converted[1](images(1)))


@pytest.mark.parametrize("version", [0, 1])
@pytest.mark.parametrize("net", [None, OtherDimensions])
def test_convert_needs_no_restore(version, net):
    ours = tritonq.accelerate(prepared(qconfig("fbgemm", version), net and net()))
    ours(images(0))
    converted = ao.convert(ours.eval())
    expected = ao.convert(tritonq.restore(ours))
    assert torch.equal(converted(images(1)), expected(images(1)))
    assert [type(module) for module in converted.modules()] == [type(module) for module in expected.modules()]
    assert not [name for module in converted.children() for name in vars(module) if name.startswith("_tritonq")]


def test_no_operator_of_torch_quantizes():
    model = tritonq.accelerate(prepared(qconfig()))
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        model(images(0)).sum().backward()
    names = {event.key for event in recorded.key_averages()}
    assert not [name for name in names if name.startswith("aten::") and "fake_quant" in name]


def test_saves_less_than_half():
    model = prepared(qconfig())
    ours = tritonq.accelerate(model)
    theirs, own = (saved_bytes(each, images(0)) for each in (model, ours))
    assert own < 0.5 * theirs


def test_inplace_keeps_every_object():
    model = prepared(qconfig())
    before = [*model.modules()], [*model.parameters()], [*model.buffers()]
    ours = tritonq.accelerate(model, inplace=True)
    assert ours is model
    after = [*ours.modules()], [*ours.parameters()], [*ours.buffers()]
    assert all(a is b for old, new in zip(before, after, strict=True) for a, b in zip(old, new, strict=True))


def test_switches_and_the_librarys_own_functions_work():
    model = prepared(qconfig())
    ours = tritonq.accelerate(model)
    for each in (model, ours):
        each(images(0))
        each.apply(ao.disable_observer)
    ranges = {name: value.clone() for name, value in ours.state_dict().items() if name.endswith("max_val")}
    model(images(1)), ours(images(1))
    assert all(torch.equal(ours.state_dict()[name], value) for name, value in ranges.items())
    for each in (model, ours):
        each.apply(ao.disable_fake_quant).eval()
    assert_close(model(images(2)), ours(images(2)), SUMS, size=0.1)


def test_modules_keep_their_exact_classes():
    model = prepared(qconfig())
    ours = tritonq.accelerate(model)
    assert all(type(module) is type(other) for module, other in zip(model.modules(), ours.modules(), strict=True))


@pytest.mark.parametrize("walk", ["apply", "loop"])
def test_freezing_after_a_few_steps_in_float64(walk):
    model = in_float64(prepared(qconfig()))
    ours = tritonq.accelerate(model)
    assert_same_training(model, ours, steps=2)
    for each in (model, ours):
        each.train()
        if walk == "apply":
            each.apply(intrinsic.freeze_bn_stats)
        else:
            for module in each.modules():
                intrinsic.freeze_bn_stats(module)
    assert ours.conv.freeze_bn
    assert_same_training(model, ours, steps=3)


@pytest.mark.parametrize("accelerated", [False, True])
def test_our_switches_reach_the_librarys_modules(accelerated):
    model = prepared(qconfig())
    model = tritonq.accelerate(model) if accelerated else model
    model(images(0))
    for switch in (tritonq.freeze_bn_stats, tritonq.disable_observer, tritonq.disable_fake_quant):
        switch(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert not [name for name, value in before.items() if name.endswith("_enabled") and bool(value.any())]
    model.train()(images(1))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    for switch in (tritonq.update_bn_stats, tritonq.enable_observer, tritonq.enable_fake_quant):
        switch(model)
    model(images(1))
    after = model.state_dict()
    for kind in ("running_mean", "max_val", "scale"):
        moved = [name for name in before if name.endswith(kind) and not torch.equal(after[name], before[name])]
        assert moved, kind


def test_copies_and_pickles_stay_accelerated():
    ours = tritonq.accelerate(prepared(qconfig()))
    ours(images(0))
    ours.apply(ao.disable_observer)  # which goes on in eval mode
    for module in ours.modules():
        vars(module).pop("qconfig", None)  # torch.ao's own can't be pickled
    file = io.BytesIO()
    torch.save(ours, file)
    file.seek(0)
    shallow = copy.copy(ours.eval().conv)  # as DataParallel makes replicas
    shallow._parameters = {**shallow._parameters, "weight": -shallow.weight}
    assert not torch.equal(shallow(images(1)), ours.conv(images(1)))
    for each in (copy.deepcopy(ours), torch.load(file, weights_only=False)):
        assert [type(module) for module in each.modules()] == [type(module) for module in ours.modules()]
        assert torch.equal(each.eval()(images(1)), ours.eval()(images(1)))
        tritonq.restore(each)


class OwnFakeQuantize(ao.FakeQuantize):
    def forward(self, x):
        return super().forward(x) * 1


def test_what_is_not_known_is_left_alone_and_named():
    chosen = qconfig()
    model = prepared(ao.QConfig(chosen.activation, OwnFakeQuantize.with_args(**chosen.weight.p.keywords)))
    with pytest.warns(UserWarning, match=r"conv\.weight_fake_quant \(OwnFakeQuantize\): a class of its own"):
        ours = tritonq.accelerate(model)
    left = {row.name for row in report_of(ours).left_alone}
    assert {"conv.weight_fake_quant", "conv"} <= left
    assert "join" not in left
    assert "a class of its own" in str(report_of(ours))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.testing.assert_close(model(images(0)), ours(images(0)))
    # with all parts left alone there is a report all the same, which restore takes back
    everywhere = OwnFakeQuantize.with_args(observer=ao.MinMaxObserver)
    nothing = prepared(ao.QConfig(everywhere, everywhere))
    for _ in range(2):
        assert len(report_of(tritonq.accelerate(nothing, inplace=True)).left_alone) > 1
        assert report_of(tritonq.restore(nothing)) is None


def test_a_channel_without_gain_trains():
    model = prepared(qconfig())
    with torch.no_grad():
        model.conv.bn.weight[0] = 0
    ours = tritonq.accelerate(model)
    ours(images(0)).square().mean().backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in ours.parameters() if parameter.grad is not None)


def test_a_hook_on_a_layer_sees_the_rounded_result():
    seen = []
    model = prepared(qconfig())
    model.conv.register_forward_hook(lambda module, inputs, result: seen.append(result))
    ours = tritonq.accelerate(model)
    for each in (model, ours):
        each(images(0))
    torch.testing.assert_close(*seen)


@pytest.mark.parametrize("inplace", [False, True])
def test_mistakes_leave_the_model_as_it_was(inplace):
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
    with pytest.raises(ValueError, match=r"no library .* prepared this model .* Conv2d, ReLU, Sequential"):
        tritonq.accelerate(plain, inplace)
    own = tritonq.prepare_qat(plain, example_inputs=images(0))
    with pytest.raises(ValueError, match=r"the 3 quantizers of this model, '.*' first, are tritonq's"):
        tritonq.accelerate(own, inplace)
    with pytest.raises(ValueError, match="not accelerated"):
        tritonq.restore(plain)
    with pytest.raises(TypeError, match="got int"):
        tritonq.accelerate(3)
    with pytest.raises(TypeError, match="got NoneType"):
        tritonq.restore(None)
    ours = tritonq.accelerate(prepared(qconfig()), inplace)
    kinds = [type(module) for module in ours.modules()]
    with pytest.raises(ValueError, match="accelerated already"):
        tritonq.accelerate(ours, inplace)
    assert kinds == [type(module) for module in ours.modules()]


def test_our_conversions_of_an_accelerated_model_are_refused(tmp_path):
    ours = tritonq.accelerate(prepared(qconfig()))
    ours(images(0))
    kinds, before = [type(module) for module in ours.modules()], copy.deepcopy(ours.eval().state_dict())
    deployments = (
        tritonq.convert,
        lambda model: tritonq.export_onnx(model, tmp_path / "m.onnx", images(1)),
        lambda model: tritonq.export_program(model, None, images(1)),
    )
    for deploy in deployments:
        with pytest.raises(ValueError, match=r"torch\.ao prepared this model, and its own convert .* tritonq\.restore"):
            deploy(ours)
    assert kinds == [type(module) for module in ours.modules()]
    assert all(torch.equal(value, before[name]) for name, value in ours.state_dict().items())
    ao.convert(tritonq.restore(ours))
