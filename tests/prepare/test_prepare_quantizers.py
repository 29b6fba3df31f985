"""`prepare_qat`: where quantizers go, and what becomes of additions and concatenations."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import tritonq.nn as qnn
import vision_models
from prepared_nets import X, conv, norm, of_type, prepare, quantizers
from tritonq.fake_quantize_base import FakeQuantizeBase
from tritonq.nn.original_class import original_class
from tritonq.prepare import prepare_qat


def test_quantizers_of_resnet18_are_those_of_a_hand_count():
    prepared = prepare_qat(vision_models.torchvision_model("resnet18"), example_inputs=torch.randn(1, 3, 32, 32))
    names = quantizers(prepared)
    # 20 convolutions and the head, 8 additions, the input, the pooled features
    assert len(names) == 31
    assert "conv1.input_fake_quant" in names
    assert "avgpool.activation_post_process" in names
    assert "layer1.0.add.activation_post_process" in names
    assert "maxpool.activation_post_process" not in names
    assert isinstance(prepared.layer1[0], type(vision_models.torchvision_model("resnet18").layer1[0]))
    assert prepared.layer1[0].add.ceiling == math.inf
    assert type(prepared.layer1[0].relu) is nn.Identity
    assert isinstance(prepared.bn1, nn.Identity)


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
    assert prepared.add.ceiling is None
    assert len(quantizers(prepared)) == 4


@pytest.mark.parametrize("act", [F.relu, nn.ReLU(), nn.ReLU(inplace=True)])
def test_addition_takes_the_relu(act):
    parts = {"act": act} if isinstance(act, nn.Module) else {}
    prepared = prepare(lambda m, x: (m.act if parts else act)(x + m.first(x)), first=conv(), **parts)
    assert prepared.add.ceiling == math.inf
    assert not of_type(prepared, nn.ReLU)


@pytest.mark.parametrize(
    "run",
    [
        lambda m, x: m.first(x) + 1,
        lambda m, x: torch.add(m.first(x), m.second(x), alpha=2),
        lambda m, x: m.first(x) + m.bias,
        lambda m, x: 2 - m.first(x) * m.bias,
    ],
)
@pytest.mark.filterwarnings("ignore:prepare_qat leaves")
def test_other_sums_stay_float(run):
    prepared = prepare(run, first=conv(), second=conv(), bias=nn.Parameter(torch.ones(1, 4, 1, 1)))
    assert not of_type(prepared, qnn.Joint)


@pytest.mark.filterwarnings("ignore:prepare_qat leaves")
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
    assert prepared.first.input_quantizer is prepared.second.input_quantizer is prepared.first.input_fake_quant


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
        lambda x: x / x.mean((2, 3), keepdim=True),
        lambda x: F.silu(x, inplace=True),
        lambda x: x.to(torch.float64).to(torch.float32),
        lambda x: torch.add(x, x, alpha=0.5),
        lambda x: 0 - x,
    ],
)
@pytest.mark.filterwarnings("ignore:prepare_qat leaves")
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


def test_addition_that_no_graph_reaches_is_answered_where_it_happens():
    prepared = prepare(lambda m, x: m.block(x), block=Untraceable())
    assert of_type(prepared, qnn.Add) == ["block.add"]
    assert prepared.block.second.input_quantizer is prepared.block.add.activation_post_process
    with pytest.raises(ValueError, match="too large"):  # the branch is still there
        prepared(torch.full_like(X, 1e12))


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


@pytest.mark.filterwarnings("ignore:prepare_qat leaves")
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
    reason = "it runs in training mode only, and would not be deployed"
    assert (record.status, record.reason) == ("float", reason)


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
    assert prepared.first.input_fake_quant is not prepared.second.input_fake_quant
    call = {
        "position": lambda: prepared(X, {"depth": depth}),
        "name": lambda: prepared(extra={"depth": depth}, image=X),
        "dict": lambda: prepared(X, extra={"depth": depth}),
    }[how]
    call()
    for quantizer, tensor in ((prepared.first.input_fake_quant, X), (prepared.second.input_fake_quant, depth)):
        assert float(quantizer.activation_post_process.max_val) == float(tensor.max())
    with pytest.raises(ValueError, match="argument scale was"):
        prepared(X, {"depth": depth}, scale=2.0)


def test_integer_input_is_left_alone():
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 2))
    prepared = prepare_qat(model, example_inputs=torch.tensor([[1, 2]]))
    assert sorted(quantizers(prepared)) == ["0.activation_post_process", "1.activation_post_process"]
    assert original_class(prepared[0]) is qnn.Embedding
    assert prepared[1].input_quantizer is prepared[0].activation_post_process
    prepared(torch.tensor([[3, 4]])).sum().backward()
