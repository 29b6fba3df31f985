"""`prepare_qat`: what is fused, where quantizers go, and that the model stays the user's model."""

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import tritonq.nn as qnn
import vision_models
from tritonq.fake_quantize import FakeQuantizeBase
from tritonq.prepare import (
    disable_fake_quant,
    disable_observer,
    enable_fake_quant,
    enable_observer,
    freeze_bn_stats,
    prepare_qat,
    update_bn_stats,
)
from tritonq.prepare.forward_graph import EditedForward
from tritonq.qconfig import QConfig, get_default_qat_qconfig, get_qconfig

# Folding a BatchNorm into a convolution rounds differently than applying it; seen: up to 1.3e-6 over 53 layers.
FOLDING = 1e-5


def quantizers(model):
    """Activation quantizers by name."""
    weights = {id(module.weight_fake_quant) for module in model.modules() if hasattr(module, "weight_fake_quant")}
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, FakeQuantizeBase) and id(module) not in weights
    }


def of_type(model, *types):
    return [name for name, module in model.named_modules() if isinstance(module, types)]


def primary(output):
    """The tensor that a model returns, whatever it is wrapped in."""
    return output.logits if hasattr(output, "logits") else output


def assert_same_when_not_rounding(model, prepared, *args, **kwargs):
    model, prepared = copy.deepcopy(model).eval(), copy.deepcopy(prepared).eval()
    disable_fake_quant(prepared)
    with torch.no_grad():
        expected, got = primary(model(*args, **kwargs)), primary(prepared(*args, **kwargs))
    error = float((got - expected).abs().max() / expected.abs().max())
    assert error < FOLDING


def assert_inputs_on_their_grids(prepared, *args):
    """After a training step, what each layer reads in eval mode is what the quantizer that it names makes of it."""
    checked = []

    def check(layer, inputs):
        quantized = layer.input_quantizer.quantize(inputs[0])
        assert torch.equal(quantized, inputs[0])
        checked.append(layer)

    for layer in prepared.modules():
        if isinstance(layer, qnn.QATLayer) and layer.input_quantizer is not None:
            layer.register_forward_pre_hook(check)
    prepared.eval()
    with torch.no_grad():
        prepared(*args)
    return checked


def test_quantizers_of_resnet18_are_those_of_a_hand_count():
    prepared = prepare_qat(vision_models.torchvision_model("resnet18"), example_inputs=torch.randn(1, 3, 32, 32))
    names = quantizers(prepared)
    # 20 convolutions and the head, 8 additions, the input, the pooled features
    assert len(names) == 31
    assert "input_fake_quants.x" in names
    assert "avgpool.activation_post_process" in names
    assert "layer1.0.add.activation_post_process" in names
    assert "maxpool.activation_post_process" not in names
    assert isinstance(prepared.layer1[0], type(vision_models.torchvision_model("resnet18").layer1[0]))
    assert prepared.layer1[0].add.relu
    assert type(prepared.layer1[0].relu) is nn.Identity
    assert type(prepared.bn1) is nn.Identity


class Net(nn.Module):
    """Parts for the small models below, and whatever forward a test gives it."""

    def __init__(self, run, **parts):
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)
        self.run = run

    def forward(self, x):
        return self.run(self, x)


def conv(channels=4, **arguments):
    return nn.Conv2d(channels, channels, 3, padding=1, **arguments)


def norm(channels=4):
    made = nn.BatchNorm2d(channels)
    nn.init.uniform_(made.weight, 0.5, 1.5)
    nn.init.normal_(made.bias)
    made.running_mean.normal_()
    made.running_var.uniform_(0.5, 2)
    return made


X = torch.randn(2, 4, 6, 6)


def prepare(run, **parts):
    """A small model and what became of it, with the check that every model must pass."""
    torch.manual_seed(0)
    model = Net(run, **parts)
    prepared = prepare_qat(model, example_inputs=X)
    assert_same_when_not_rounding(model, prepared, X)
    primary(prepared.train()(X)).sum().backward()
    assert_inputs_on_their_grids(copy.deepcopy(prepared), X)
    return prepared


@pytest.mark.parametrize(
    "relu",
    [
        *(F.relu, torch.relu, torch.relu_, lambda x: x.relu(), lambda x: x.relu_(), lambda x: F.relu(x, inplace=True)),
        *(nn.ReLU(), nn.ReLU(inplace=True)),
    ],
)
def test_relu_is_fused_in_every_spelling(relu):
    parts = {"act": relu} if isinstance(relu, nn.Module) else {}
    prepared = prepare(
        lambda m, x: (m.act if parts else relu)(m.norm(m.conv(x))), conv=conv(bias=False), norm=norm(), **parts
    )
    assert type(prepared.conv) is qnn.ConvBnReLU2d
    assert type(prepared.norm) is nn.Identity
    assert len(quantizers(prepared)) == 2
    if parts:
        assert type(prepared.act) is nn.Identity
    else:
        assert isinstance(prepared, EditedForward)


@pytest.mark.parametrize("act", [nn.ReLU6(), nn.SiLU(), nn.Hardswish(), nn.GELU()])
def test_other_activation_stays_a_float_operation(act):
    prepared = prepare(
        lambda m, x: m.second(m.act(m.norm(m.conv(x)))), conv=conv(), norm=norm(), act=act, second=conv()
    )
    assert type(prepared.conv) is qnn.ConvBn2d
    assert type(prepared.act) is type(act)
    assert prepared.second.input_quantizer is prepared.act.activation_post_process


@pytest.mark.parametrize(
    ("parts", "shape", "kind"),
    [
        ((nn.Conv1d(4, 4, 1), nn.BatchNorm1d(4), nn.ReLU()), (2, 4, 5), qnn.ConvBnReLU1d),
        ((nn.Conv3d(4, 4, 1), nn.BatchNorm3d(4)), (2, 4, 2, 2, 2), qnn.ConvBn3d),
        ((nn.Conv2d(4, 4, 1), nn.ReLU()), (2, 4, 3, 3), qnn.ConvReLU2d),
        ((nn.ConvTranspose2d(4, 4, 2), nn.BatchNorm2d(4)), (2, 4, 3, 3), qnn.ConvTransposeBn2d),
        ((nn.Linear(4, 4), nn.ReLU()), (2, 4), qnn.LinearReLU),
        ((nn.Linear(4, 4), nn.BatchNorm1d(4)), (2, 4), qnn.LinearBn1d),
        # this one normalises the middle axis, which is no feature axis, though as long
        ((nn.Linear(4, 3), nn.BatchNorm1d(3)), (2, 3, 4), qnn.Linear),
    ],
)
def test_rows(parts, shape, kind):
    model, x = nn.Sequential(*parts), torch.randn(shape)
    prepared = prepare_qat(model, example_inputs=x)
    assert type(prepared[0]) is kind
    assert_same_when_not_rounding(model, prepared, x)


def test_no_fusion_where_someone_else_reads_the_convolution():
    prepared = prepare(lambda m, x: (lambda y: m.norm(y) * y)(m.conv(x)), conv=conv(), norm=norm())
    assert type(prepared.conv) is qnn.Conv2d
    assert type(prepared.norm) is nn.BatchNorm2d


def test_no_fusion_where_the_model_returns_the_convolution():
    model = Net(lambda m, x: (lambda y: {"feature": y, "out": m.norm(y)})(m.conv(x)), conv=conv(), norm=norm())
    prepared = prepare_qat(model, example_inputs=X)
    assert type(prepared.norm) is nn.BatchNorm2d
    assert list(prepared(X)) == ["feature", "out"]


def test_fusion_across_containers_and_identities():
    prepared = prepare(
        lambda m, x: m.tail(m.head(x)),
        head=nn.Sequential(conv(), nn.Identity(), nn.Sequential()),
        tail=nn.ModuleDict({"a": norm()})["a"],
    )
    assert type(prepared.head[0]) is qnn.ConvBn2d
    assert type(prepared.tail) is nn.Identity


def test_nothing_is_fused_across_what_may_act_in_training():
    class StochasticDepth(nn.Module):
        def forward(self, x):
            return x * torch.rand(1) if self.training else x

    prepared = prepare(lambda m, x: m.norm(m.drop(m.conv(x))), conv=conv(), norm=norm(), drop=StochasticDepth())
    assert type(prepared.conv) is qnn.Conv2d
    assert type(prepared.norm) is nn.BatchNorm2d


def test_shared_pair_is_fused_once():
    prepared = prepare(lambda m, x: m.norm(m.conv(F.relu(m.norm(m.conv(x))))), conv=conv(), norm=norm())
    assert type(prepared.conv) is qnn.ConvBn2d
    assert type(prepared.norm) is nn.Identity


def test_shared_convolution_with_one_norm_is_not_fused():
    prepared = prepare(lambda m, x: m.conv(m.norm(m.conv(x))), conv=conv(), norm=norm())
    assert type(prepared.conv) is qnn.Conv2d
    assert type(prepared.norm) is nn.BatchNorm2d
    assert prepared.conv.input_quantizer is None  # two quantizers feed it


def test_norm_of_two_convolutions_is_not_fused():
    prepared = prepare(lambda m, x: m.norm(m.first(x)) + m.norm(m.second(x)), first=conv(), second=conv(), norm=norm())
    assert type(prepared.first) is type(prepared.second) is qnn.Conv2d
    assert type(prepared.norm) is nn.BatchNorm2d


def test_shared_module_is_replaced_everywhere():
    shared = conv()
    model = nn.ModuleDict({"a": nn.Sequential(shared), "b": nn.Sequential(shared)})
    prepared = prepare(lambda m, x: m.both["b"](m.both["a"](x)), both=model)
    assert type(prepared.both["a"][0]) is qnn.Conv2d
    assert prepared.both["a"][0] is prepared.both["b"][0]


def test_relu_that_others_use_too_stays_for_them():
    prepared = prepare(lambda m, x: m.act(m.second(m.act(m.first(x))) * 2), first=conv(), second=conv(), act=nn.ReLU())
    assert type(prepared.first) is qnn.ConvReLU2d
    assert type(prepared.second) is qnn.Conv2d
    assert type(prepared.act) is nn.ReLU
    calls = []
    prepared.act.register_forward_hook(lambda *args: calls.append(args))
    prepared(X)
    assert len(calls) == 1


def in_place(m, x):
    y = m.second(x)
    y += m.first(x)
    return y


@pytest.mark.parametrize(
    "run",
    [
        lambda m, x: m.first(x) + m.second(x),
        in_place,
        lambda m, x: torch.add(m.first(x), m.second(x)),
        lambda m, x: torch.add(m.first(x), other=m.second(x), alpha=1),
        lambda m, x: m.first(x).add(m.second(x)),
        lambda m, x: m.first(x).add_(m.second(x)),
        lambda m, x: sum([m.first(x), m.second(x)]),
    ],
)
def test_addition_becomes_a_module_in_every_spelling(run):
    prepared = prepare(run, first=conv(), second=conv())
    assert of_type(prepared, qnn.Add) == ["add"]
    assert not prepared.add.relu
    assert len(quantizers(prepared)) == 4


@pytest.mark.parametrize("act", [F.relu, nn.ReLU(), nn.ReLU(inplace=True)])
def test_addition_takes_the_relu(act):
    parts = {"act": act} if isinstance(act, nn.Module) else {}
    prepared = prepare(lambda m, x: (m.act if parts else act)(x + m.first(x)), first=conv(), **parts)
    assert prepared.add.relu
    assert not of_type(prepared, nn.ReLU)


@pytest.mark.parametrize(
    "run",
    [
        lambda m, x: m.first(x) + 1,
        lambda m, x: torch.add(m.first(x), m.second(x), alpha=2),
        lambda m, x: m.first(x) + m.bias,
        lambda m, x: m.first(x) - m.second(x),
    ],
)
def test_other_sums_stay_float(run):
    prepared = prepare(run, first=conv(), second=conv(), bias=nn.Parameter(torch.ones(1, 4, 1, 1)))
    assert not of_type(prepared, qnn.Add)


def test_addition_away_from_quantized_layers_stays_float():
    prepared = prepare(lambda m, x: m.first(x).softmax(1) + x.sigmoid(), first=conv())
    assert not of_type(prepared, qnn.Add)


def test_concatenation_becomes_a_module():
    prepared = prepare(
        lambda m, x: m.out(torch.cat([m.first(x), F.relu(m.second(x)), x], dim=1)),
        first=conv(),
        second=conv(),
        out=nn.Conv2d(12, 4, 1),
    )
    assert prepared.cat.dim == 1
    assert prepared.out.input_quantizer is prepared.cat.activation_post_process
    # input, three layers, concatenation
    assert len(quantizers(prepared)) == 5


def test_one_quantizer_serves_all_readers():
    prepared = prepare(
        lambda m, x: m.first(m.pool(x)) + m.second(m.pool(x)).mul(2), first=conv(), second=conv(), pool=nn.Identity()
    )
    assert prepared.first.input_quantizer is prepared.second.input_quantizer is prepared.input_fake_quants["x"]


@pytest.mark.parametrize(
    "keep",
    [
        nn.MaxPool2d(2),
        nn.Dropout(0.5),
        nn.ZeroPad2d(1),
        lambda x: F.max_pool2d(x, 2),
        lambda x: x.transpose(2, 3).contiguous(),
        lambda x: x[:, :, 1:],
        lambda x: x.chunk(2, dim=2)[1],
        lambda x: F.pad(x, (1, 1)),
        lambda x: F.interpolate(x, scale_factor=2),
        lambda x: x.reshape(2, 4, -1).view(2, 4, 6, 6),
        lambda x: x.to(memory_format=torch.channels_last),
    ],
)
def test_what_keeps_a_grid_gets_no_quantizer(keep):
    parts = {"keep": keep} if isinstance(keep, nn.Module) else {}
    prepared = prepare(
        lambda m, x: m.second((m.keep if parts else keep)(m.first(x))), first=conv(), second=conv(), **parts
    )
    assert len(quantizers(prepared)) == 3
    assert prepared.second.input_quantizer is prepared.first.activation_post_process


@pytest.mark.parametrize(
    "change",
    [
        nn.AvgPool2d(2),
        nn.GELU(),
        lambda x: x * 0.5,
        lambda x: F.pad(x, (1, 1), value=0.3),
        lambda x: F.interpolate(x, scale_factor=2, mode="bilinear"),
        lambda x: x * x.mean((2, 3), keepdim=True),
        lambda x: F.silu(x, inplace=True),
        lambda x: x.to(torch.float64).to(torch.float32),
        lambda x: torch.add(x, x, alpha=0.5),
        lambda x: 0 - x,
    ],
)
def test_what_leaves_a_grid_gets_a_quantizer(change):
    parts = {"change": change} if isinstance(change, nn.Module) else {}
    prepared = prepare(
        lambda m, x: m.second((m.change if parts else change)(m.first(x))), first=conv(), second=conv(), **parts
    )
    assert len(quantizers(prepared)) == 4
    assert prepared.second.input_quantizer not in (None, prepared.first.activation_post_process)


def test_relu_before_a_quantizer_is_quantized_after_it():
    """Pre-activation: one ReLU module serves two places, each with its own range."""
    prepared = prepare(
        lambda m, x: m.second(m.act(m.norm2(m.first(m.act(m.norm1(x)))) * 2)),
        norm1=norm(),
        norm2=norm(),
        first=conv(),
        second=conv(),
        act=nn.ReLU(),
    )
    assert prepared.first.input_quantizer is not prepared.second.input_quantizer
    assert not of_type(prepared.norm1, FakeQuantizeBase)
    # two inputs and two layers
    assert len(quantizers(prepared)) == 4


def test_no_two_quantizers_follow_each_other():
    """A float result that is read before and after its ReLU has one quantizer, before."""
    prepared = prepare(lambda m, x: (lambda y: m.first(y) + m.second(F.relu(y)))(x * 2), first=conv(), second=conv())
    assert prepared.first.input_quantizer is prepared.second.input_quantizer
    assert len(quantizers(prepared)) == 4


class NormAct(nn.BatchNorm2d):
    """A BatchNorm that contains its activation, as timm's."""

    def __init__(self, channels, act):
        super().__init__(channels)
        self.drop, self.act = nn.Identity(), act
        nn.init.uniform_(self.weight, 0.5, 1.5)
        nn.init.normal_(self.bias)
        self.running_mean.normal_()

    def forward(self, x):
        x = F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, self.training, self.momentum, self.eps
        )
        return self.act(self.drop(x))


@pytest.mark.parametrize(("act", "rest"), [(nn.ReLU(), nn.Identity), (nn.SiLU(), nn.Sequential)])
def test_norm_that_contains_its_activation(act, rest):
    prepared = prepare(lambda m, x: m.norm(m.conv(x)), conv=conv(), norm=NormAct(4, act))
    assert type(prepared.conv) is (qnn.ConvBnReLU2d if rest is nn.Identity else qnn.ConvBn2d)
    assert type(prepared.norm) is rest
    assert type(prepared.conv.bn) is nn.BatchNorm2d
    if rest is nn.Sequential:
        assert type(prepared.norm.act) is nn.SiLU


def test_norm_that_contains_its_activation_alone_stays():
    prepared = prepare(lambda m, x: m.conv(m.norm(x)), conv=conv(), norm=NormAct(4, nn.ReLU()))
    assert isinstance(prepared.norm, NormAct)
    assert type(prepared.norm.act) is nn.ReLU


def test_norm_act_shares_parameters_and_statistics():
    model = Net(lambda m, x: m.norm(m.conv(x)), conv=conv(), norm=NormAct(4, nn.ReLU()))
    weight, mean = model.norm.weight, model.norm.running_mean
    prepared = prepare_qat(model, inplace=True, example_inputs=X)
    assert prepared.conv.bn.weight is weight
    assert prepared.conv.bn.running_mean is mean


class Untraceable(nn.Module):
    """An addition in a forward that branches on its data."""

    def __init__(self):
        super().__init__()
        self.first, self.second = conv(), conv()

    def forward(self, x):
        y = self.first(x) + x
        if y.sum() > 1e9:
            raise ValueError("too large")
        return self.second(y)


def test_addition_that_no_graph_reaches_stays_float_and_its_reader_quantizes():
    prepared = prepare(lambda m, x: m.block(x), block=Untraceable())
    assert not of_type(prepared, qnn.Add)
    assert prepared.block.second.input_quantizer is prepared.block.second.input_fake_quant
    (record,) = [record for record in prepared.tritonq_report if record.kind == "add"]
    assert (record.name, record.status) == ("block.add", "float")
    assert "control flow" in record.reason


class Doubles(nn.Module):
    def forward(self, x):
        return x * 2 if x.sum() < 1e9 else x


def test_result_of_an_untraceable_module_is_quantized_where_it_leaves():
    prepared = prepare(
        lambda m, x: (lambda y: m.first(y) + m.second(y))(m.double_(x)), double_=Doubles(), first=conv(), second=conv()
    )
    quantizer = prepared.double_.activation_post_process
    assert prepared.first.input_quantizer is prepared.second.input_quantizer is quantizer


class Auxiliary(nn.Module):
    """A head that only training uses, dropout by function, and a returned dict."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.aux = conv(), norm(), conv()

    def forward(self, x):
        y = F.relu(self.norm(self.conv(x)))
        out = {"out": F.dropout(y + x, 0.5, self.training)}
        if self.training:
            out["aux"] = self.aux(y)
        return out


def test_control_flow_that_depends_on_the_mode_survives():
    model = Auxiliary()
    prepared = prepare_qat(model, example_inputs=X)
    assert sorted(prepared.train()(X)) == ["aux", "out"]
    assert not torch.equal(prepared(X)["out"], prepared(X)["out"])
    assert sorted(prepared.eval()(X)) == ["out"]
    assert torch.equal(prepared(X)["out"], prepared(X)["out"])
    assert type(prepared.conv) is qnn.ConvBnReLU2d
    assert type(prepared.aux) is nn.Conv2d
    (record,) = [record for record in prepared.tritonq_report if record.name == "aux"]
    assert (record.status, record.reason) == ("float", "the example inputs don't reach it")


@pytest.mark.parametrize("how", ["position", "name", "dict"])
def test_inputs_are_quantized_however_they_are_passed(how):
    class TwoInputs(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = conv(), conv()

        def forward(self, image, extra=None, *, scale: float = 1.0):
            return self.first(image) * scale + self.second(extra["depth"])

    model, depth = TwoInputs(), torch.randn(2, 4, 6, 6)
    example = {"image": X, "extra": {"depth": depth}} if how == "dict" else (X, {"depth": depth})
    prepared = prepare_qat(model, example_inputs=example)
    assert sorted(prepared.input_fake_quants) == ["extra_depth", "image"]
    call = {
        "position": lambda: prepared(X, {"depth": depth}),
        "name": lambda: prepared(extra={"depth": depth}, image=X),
        "dict": lambda: prepared(X, extra={"depth": depth}),
    }[how]
    call()
    for quantizer, tensor in (
        (prepared.input_fake_quants["image"], X),
        (prepared.input_fake_quants["extra_depth"], depth),
    ):
        assert float(quantizer.activation_post_process.max_val) == float(tensor.max())
    with pytest.raises(ValueError, match="argument scale was"):
        prepared(X, {"depth": depth}, scale=2.0)


def test_integer_input_is_left_alone():
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 2))
    prepared = prepare_qat(model, example_inputs=torch.tensor([[1, 2]]))
    assert not hasattr(prepared, "input_fake_quants")
    assert type(prepared[0]) is qnn.Embedding
    assert prepared[1].input_quantizer is prepared[0].activation_post_process
    prepared(torch.tensor([[3, 4]])).sum().backward()


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


def test_deepcopy_pickle_and_state_dict():
    model = Net(block_run, conv=conv(), norm=norm(), second=conv())
    prepared = prepare_qat(model, example_inputs=X)
    prepared(X)
    prepared.eval()
    expected = prepared(X)
    buffer = io.BytesIO()
    torch.save(prepared, buffer)
    buffer.seek(0)
    loaded = prepare_qat(copy.deepcopy(model), example_inputs=X).eval()
    loaded.load_state_dict(prepared.state_dict(), strict=True)
    for again in (copy.deepcopy(prepared), torch.load(buffer, weights_only=False), loaded):
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
    assert type(prepared[1][0]) is nn.Conv2d
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


def test_without_qconfig_the_preset_is_tensorrt():
    prepared = prepare_qat(nn.Sequential(conv()), example_inputs=X)
    assert prepared[0].qconfig == get_qconfig("tensorrt")


def test_report_tells_two_additions_apart():
    prepared = prepare(lambda m, x: m.second(m.first(x) + x) + x, first=conv(), second=conv())
    assert of_type(prepared, qnn.Add) == ["add", "add_1"]
    assert [record.name for record in prepared.tritonq_report] == ["first", "second", "add", "add_1"]


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
    assert list(report) == ["conv", "norm", "act", "pool", "fc", "add"]
    assert report["conv"].fused_with == ("norm",)
    assert report["act"].fused_with == ("add",)
    assert {name for name, record in report.items() if record.status == "float"} == {"pool"}
    assert "no quantized form" in report["pool"].reason


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
        (nn.Sequential(conv()), {"example_inputs": torch.randn(1, 3, 6, 6)}, ValueError, "rejects example_inputs"),
        (nn.Sequential(conv()), {"example_inputs": "image"}, TypeError, "got str"),
        (nn.Sequential(conv()), {"example_inputs": X, "qconfig": "tensorrt"}, TypeError, "got str"),
        (conv(), {"example_inputs": X}, ValueError, "single Conv2d"),
        ("resnet18", {"example_inputs": X}, TypeError, "Module, got str"),
        (nn.Sequential(conv()).eval(), {}, ValueError, "training mode"),
        (nn.Sequential(nn.LazyConv2d(2, 1)), {"example_inputs": X}, ValueError, "no shape before"),
    ],
)
def test_bad_input(model, arguments, error, message):
    with pytest.raises(error, match=message):
        prepare_qat(model, **arguments)


def test_rejected_inputs_chain_the_models_own_error():
    with pytest.raises(ValueError, match="Sequential rejects") as caught:
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


def test_eager_flow_without_any_qconfig_uses_the_default():
    prepared = prepare_qat(nn.Sequential(conv()))
    assert prepared[0].qconfig == get_qconfig("tensorrt")


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
