"""`prepare_qat`: what becomes one layer with what."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import tritonq.nn as qnn
from prepared_nets import Net, X, assert_same_when_not_rounding, conv, norm, prepare, quantizers
from tritonq.nn.functions import FunctionLayer
from tritonq.prepare import prepare_qat
from tritonq.prepare.forwards.edited import EditedForward


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
    assert isinstance(prepared.norm, nn.Identity)
    assert len(quantizers(prepared)) == 2
    if parts:
        assert type(prepared.act) is nn.Identity
    else:
        assert isinstance(prepared, EditedForward)


@pytest.mark.parametrize("act", [nn.SiLU(), nn.Hardswish(), nn.GELU()])
def test_another_activation_becomes_a_layer_of_its_own(act):
    prepared = prepare(
        lambda m, x: m.second(m.act(m.norm(m.conv(x)))), conv=conv(), norm=norm(), act=act, second=conv()
    )
    assert type(prepared.conv) is qnn.ConvBn2d
    assert isinstance(prepared.act, FunctionLayer)
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
    assert isinstance(prepared.norm, nn.BatchNorm2d)


def test_no_fusion_where_the_model_returns_the_convolution():
    model = Net(lambda m, x: (lambda y: {"feature": y, "out": m.norm(y)})(m.conv(x)), conv=conv(), norm=norm())
    prepared = prepare_qat(model, example_inputs=X)
    assert isinstance(prepared.norm, nn.BatchNorm2d)
    assert list(prepared(X)) == ["feature", "out"]


def test_fusion_across_containers_and_identities():
    prepared = prepare(
        lambda m, x: m.tail(m.head(x)),
        head=nn.Sequential(conv(), nn.Identity(), nn.Sequential()),
        tail=nn.ModuleDict({"a": norm()})["a"],
    )
    assert type(prepared.head[0]) is qnn.ConvBn2d
    assert isinstance(prepared.tail, nn.Identity)


def test_nothing_is_fused_across_what_may_act_in_training():
    class StochasticDepth(nn.Module):
        def forward(self, x):
            return x * torch.rand(1) if self.training else x

    prepared = prepare(lambda m, x: m.norm(m.drop(m.conv(x))), conv=conv(), norm=norm(), drop=StochasticDepth())
    assert type(prepared.conv) is qnn.Conv2d
    assert isinstance(prepared.norm, nn.BatchNorm2d)


def test_shared_pair_is_fused_once():
    prepared = prepare(lambda m, x: m.norm(m.conv(F.relu(m.norm(m.conv(x))))), conv=conv(), norm=norm())
    assert type(prepared.conv) is qnn.ConvBn2d
    assert isinstance(prepared.norm, nn.Identity)


def test_shared_convolution_with_one_norm_is_not_fused():
    prepared = prepare(lambda m, x: m.conv(m.norm(m.conv(x))), conv=conv(), norm=norm())
    assert type(prepared.conv) is qnn.Conv2d
    assert isinstance(prepared.norm, nn.BatchNorm2d)
    # It quantizes what it reads itself: the model's input, and what the norm returns.
    assert prepared.conv.input_quantizer is prepared.conv.input_fake_quant


@pytest.mark.filterwarnings("ignore:prepare_qat leaves")
def test_norm_of_two_convolutions_is_not_fused():
    prepared = prepare(lambda m, x: m.norm(m.first(x)) + m.norm(m.second(x)), first=conv(), second=conv(), norm=norm())
    assert type(prepared.first) is type(prepared.second) is qnn.Conv2d
    assert isinstance(prepared.norm, nn.BatchNorm2d)


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
    assert isinstance(prepared.norm, rest)
    assert type(prepared.conv.bn) is nn.BatchNorm2d
    if rest is nn.Sequential:
        assert type(prepared.norm.act) is nn.SiLU


def test_norm_that_contains_its_activation_alone_stays():
    prepared = prepare(lambda m, x: m.conv(m.norm(x)), conv=conv(), norm=NormAct(4, nn.ReLU()))
    assert isinstance(prepared.norm, NormAct)
    assert isinstance(prepared.norm.act, nn.ReLU)


def test_norm_act_shares_parameters_and_statistics():
    model = Net(lambda m, x: m.norm(m.conv(x)), conv=conv(), norm=NormAct(4, nn.ReLU()))
    weight, mean = model.norm.weight, model.norm.running_mean
    prepared = prepare_qat(model, inplace=True, example_inputs=X)
    assert prepared.conv.bn.weight is weight
    assert prepared.conv.bn.running_mean is mean
