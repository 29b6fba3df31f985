"""Equalization, bias correction and adaptive rounding of prepared models."""

import copy
from dataclasses import dataclass
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import tritonq
from qat_models import Named
from tolerances import FLOAT32, FLOAT64, FLOAT64_SUMS, HALF, LONG_SUMS, SUMS, TRAINED, assert_close
from tritonq.accuracy.adaptive_rounding import SoftRounding
from tritonq.accuracy.quantized_layers import inputs_of
from tritonq.grid import Grid
from tritonq.quantized_type import QINT4

X = torch.randn(48, 3, 8, 8, generator=torch.Generator().manual_seed(2))
PER_TENSOR = tritonq.QConfig(
    tritonq.get_qconfig().activation,
    tritonq.FakeQuantize.with_args(observer=tritonq.MinMaxObserver, dtype="qint4"),
)


class Net(nn.Module):
    """Three layers in a row, the second depthwise, an addition that reads the third, and a head behind a flattening."""

    def __init__(self):
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU())
        self.depth = nn.Sequential(nn.Conv2d(6, 6, 3, padding=1, groups=6, bias=False), nn.BatchNorm2d(6), nn.ReLU())
        self.point = nn.Conv2d(6, 6, 1)
        self.last = nn.Conv2d(6, 6, 1)
        self.pool, self.head = nn.MaxPool2d(8), nn.Linear(6, 4)

    def forward(self, x):
        y = self.point(self.depth(self.first(x)))
        return self.head(self.pool(self.last(y) + y).flatten(1))


def net(spread=30.0):
    torch.manual_seed(0)
    model = Net().train()
    with torch.no_grad():
        model.first[1].weight.copy_(torch.logspace(0, 1, 6) / spread**0.5 * 3)
        model.first[0].weight.mul_(torch.logspace(-1, 1, 6).view(-1, 1, 1, 1))
        for _ in range(30):
            model(X)
    return model.eval()


def prepared(qconfig=PER_TENSOR, **arguments):
    return tritonq.prepare_qat(net(**arguments), qconfig=qconfig, example_inputs=X)


def float_outputs(model):
    model = copy.deepcopy(model).eval()
    tritonq.disable_fake_quant(model)
    with torch.no_grad():
        return model(X)


def ranges(layer, axis):
    return layer.folded_parameters()[0].detach().abs().transpose(0, axis).flatten(1).amax(1)


def test_equalization_gives_like_ranges_and_the_same_function():
    model = prepared()
    before = float_outputs(model)
    factors = tritonq.equalize(model, X)
    # an addition reads the third layer's result too
    assert set(factors) == {("first.0", "depth.0"), ("depth.0", "point")}
    assert_close(float_outputs(model), before, LONG_SUMS, size=0.1)
    # Nagel et al., equation 11: both layers see the same range, sqrt(r1 r2)
    assert_close(ranges(model.first[0], 0), ranges(model.depth[0], 0), HALF, size=0.0001)
    assert_close(ranges(model.depth[0], 0), ranges(model.point, 1), HALF, size=0.0001)
    assert all(float(values.max() / values.min()) > 1.5 for values in factors.values())


def test_equalization_in_one_sweep_is_the_formula():
    torch.manual_seed(0)
    first, second = nn.Linear(3, 4).double(), nn.Linear(4, 2).double()
    model = nn.Sequential(first, nn.ReLU(), second).eval()
    x = torch.randn(8, 3, dtype=torch.float64)
    qat = tritonq.prepare_qat(model, qconfig=PER_TENSOR, example_inputs=x)
    expected = (first.weight.abs().amax(1) / second.weight.abs().amax(0)).sqrt()
    factors = tritonq.equalize(qat, x)["0", "2"]
    assert_close(factors.double(), expected.detach(), FLOAT32, size=0)
    assert_close(qat[0].bias, first.bias / expected, FLOAT64_SUMS, size=0)
    assert_close(qat[2].weight, second.weight * expected, FLOAT64_SUMS, size=0)


def test_channels_that_move_between_two_layers_are_left_alone():
    class Shuffled(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.shuffle = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1), nn.ChannelShuffle(2)

        def forward(self, x):
            return self.b(self.shuffle(self.a(x)))

    model = tritonq.prepare_qat(Shuffled().eval(), qconfig=PER_TENSOR, example_inputs=X)
    weights = model.a.weight.clone()
    assert tritonq.equalize(model, X) == {}
    assert torch.equal(model.a.weight, weights)


class _FrozenNorm(nn.Module):
    """A BatchNorm whose numbers are buffers, as detection models hold it."""

    def __init__(self):
        super().__init__()
        self.register_buffer("weight", torch.tensor([1.0, 0.3, 2.0, 0.7]))
        self.register_buffer("bias", torch.tensor([0.1, -0.2, 0.3, 0.0]))

    def forward(self, x):
        return x * self.weight.view(1, -1, 1, 1) + self.bias.view(1, -1, 1, 1)


def test_layers_with_a_frozen_norm_keep_their_function():
    net = nn.Sequential(nn.Conv2d(3, 4, 1), _FrozenNorm(), nn.ReLU(), nn.Conv2d(4, 2, 1)).eval()
    model = tritonq.prepare_qat(net, qconfig=PER_TENSOR, example_inputs=X)
    before = float_outputs(model)
    assert set(tritonq.equalize(model, X)) == {("0", "3")}
    assert_close(float_outputs(model), before, LONG_SUMS, size=0.1)


def test_equalization_helps_weights_with_one_scale():
    plain = tritonq.calibrate(prepared(), X)
    even = prepared()
    tritonq.equalize(even, X)
    tritonq.calibrate(even, X)
    wanted = float_outputs(plain)
    errors = [float((model.eval()(X).detach() - wanted).square().mean()) for model in (plain, even)]
    assert errors[1] < 0.7 * errors[0]


@torch.no_grad()
def mean_result(model, layer):
    """Mean per channel of a layer's results before its activation."""
    [x] = inputs_of(model, layer, [((X,), {})])
    weight, bias = layer.folded_parameters()
    y = layer.linear_map(x, layer.quantized_folded_weight(weight), bias)
    return y.movedim(layer.linear_map.output_axis, 0).flatten(1).mean(1)


@pytest.mark.parametrize("folding", ["approximate", "scale"])
def test_bias_correction_gives_each_layer_the_float_mean(folding):
    model = tritonq.calibrate(prepared(PER_TENSOR._replace(folding=folding)), X)
    unrounded, before = copy.deepcopy(model).eval(), model.depth[0].bn.bias.clone()
    tritonq.disable_fake_quant(unrounded)
    modes = [module.training for module in model.modules()]
    shifts = tritonq.correct_bias(model, X.split(16))
    assert set(shifts) == {"first.0", "depth.0", "point", "last", "head"}
    assert_close(model.depth[0].bn.bias - before, shifts["depth.0"], SUMS, size=0.1)
    assert [module.training for module in model.modules()] == modes
    for name in shifts:
        means = [mean_result(part.eval(), part.get_submodule(name)) for part in (unrounded, model)]
        assert_close(means[1], means[0], SUMS)
        assert float(shifts[name].abs().max()) > 1e-4


def test_bias_correction_is_the_formula():
    torch.manual_seed(1)
    linear = nn.Linear(5, 3).double()
    x = torch.randn(40, 5, dtype=torch.float64)
    qat = tritonq.calibrate(tritonq.prepare_qat(nn.Sequential(linear), qconfig=PER_TENSOR, example_inputs=x), x)
    x_q = qat[0].input_fake_quant(x)
    weight_q = qat[0].weight_fake_quant(linear.weight)
    expected = F.linear(x, linear.weight).mean(0) - F.linear(x_q, weight_q).mean(0)
    assert_close(tritonq.correct_bias(qat, x)["0"].double(), expected.detach(), SUMS, size=0.01)


def test_a_layer_without_bias_is_told():
    model = nn.Sequential(nn.Conv2d(3, 4, 1, bias=False))
    model = tritonq.calibrate(tritonq.prepare_qat(model, qconfig=PER_TENSOR, example_inputs=X), X)
    with pytest.warns(UserWarning, match="without a bias can't be corrected: 0") as told:
        assert tritonq.correct_bias(model, X) == {}
    assert told[0].filename == __file__


@dataclass
class Both:
    scores: torch.Tensor
    features: torch.Tensor


class InADataclass(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 4, 1)

    def forward(self, x):
        features = self.first(x)
        return Both(self.second(features), features)


def test_a_layer_whose_result_a_dataclass_returns_is_not_equalized():
    model = tritonq.prepare_qat(InADataclass().eval(), example_inputs=X)
    assert tritonq.equalize(model, X) == {}


def test_soft_rounding_is_the_formula():
    rows = torch.tensor([[0.26, -0.9, 5.0], [0.1, 0.2, -0.3]], dtype=torch.float64)
    rounding = SoftRounding(rows, Grid(torch.tensor([0.5, 0.2], dtype=torch.float64), None, QINT4.with_axis(0)))
    # it begins with the weights themselves, where these are in range
    assert_close(rounding.weight(rounding.share()), rows.clamp(-4, 3.5), FLOAT64_SUMS)
    v = torch.tensor([[3.0, -3.0, 0.0], [0.4, -0.4, 1.0]], dtype=torch.float64)
    rounding.variables = v
    share = (torch.sigmoid(v) * 1.2 - 0.1).clamp(0, 1)
    scale = torch.tensor([[0.5], [0.2]], dtype=torch.float64)
    expected = ((rows / scale).floor() + share).clamp(-8, 7) * scale
    assert_close(rounding.weight(rounding.share()), expected, FLOAT64, size=0)


@torch.no_grad()
def first_results(model):
    """Return the results of the first layer, which reads the same in all models, with its weight rounded."""
    layer = model.first[0]
    weight, bias = layer.folded_parameters()
    return F.conv2d(layer.input_fake_quant(X), layer.quantized_folded_weight(weight), bias, padding=1).relu()


@pytest.mark.parametrize("folding", ["approximate", "scale"])
def test_adaptive_rounding_is_better_than_the_nearest_code(folding):
    model = tritonq.calibrate(prepared(PER_TENSOR._replace(folding=folding)), X).eval()
    weights, scales = model.point.weight.detach().clone(), model.point.weight_fake_quant.scale.clone()
    layer = model.first[0]
    wanted = F.conv2d(X, *(part.detach() for part in layer.folded_parameters()), padding=1).relu()
    before = (first_results(model) - wanted).square().mean()
    ratios = tritonq.adaptive_round(model, X, steps=200, batch_size=16)
    assert set(ratios) == {"first.0", "depth.0", "point", "last", "head"}
    assert max(ratios.values()) <= 1
    assert min(ratios.values()) < 0.75
    after = (first_results(model) - wanted).square().mean()
    assert float(after / before) == pytest.approx(ratios["first.0"], rel=TRAINED.rtol)
    # each weight is on its grid now, one code from where it was at most
    assert torch.equal(model.point.weight_fake_quant.scale, scales)
    steps = (model.point.weight / scales).detach()
    assert_close(steps, steps.round(), LONG_SUMS)
    assert float((model.point.weight.detach() - weights).abs().max() / scales) < 1.001
    assert tritonq.verify(model, tritonq.convert(model), X).agrees()


@pytest.mark.parametrize(
    "method", [tritonq.correct_bias, tritonq.refine_scales, partial(tritonq.adaptive_round, steps=3)]
)
def test_layers_that_take_their_input_by_name(method):
    x, results = torch.rand(2, 3, 8, 8), []
    for named in (False, True):
        model = tritonq.calibrate(tritonq.prepare_qat(Named(named), example_inputs=x), [x])
        torch.manual_seed(1)
        method(model, [x])
        results.append(model(x))
    assert torch.equal(*results)


def test_what_can_not_be_done_is_said():
    model = tritonq.calibrate(prepared(), X)
    with pytest.raises(ValueError, match=r"inputs of one size, layer 'first.0' reads \(3, 8, 8\) and \(3, 9, 9\)"):
        tritonq.adaptive_round(model, [X, torch.rand(4, 3, 9, 9)])
    for function in (tritonq.equalize, tritonq.correct_bias, tritonq.adaptive_round):
        for empty in ([], X[:0], [X[:0]]):
            with pytest.raises(ValueError, match="data has no batch that holds a sample"):
                function(model, empty)
        with pytest.raises(ValueError, match="call prepare_qat"):
            function(nn.Linear(2, 2), torch.randn(4, 2))
    with pytest.raises(ValueError, match="must be positive"):
        tritonq.adaptive_round(model, X, steps=0)


class Chooses(nn.Module):
    """A head for the rows that exceed a bound, which may be none."""

    def __init__(self):
        super().__init__()
        self.first, self.head = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x, bound):
        x = self.first(x)
        return self.head(x[x[:, 0] > bound])


@pytest.mark.parametrize("method", [tritonq.correct_bias, partial(tritonq.adaptive_round, steps=2)])
def test_a_layer_that_reads_no_sample_stays_as_it_is(method):
    x, none, all_ = torch.randn(8, 4, generator=torch.Generator().manual_seed(0)), torch.tensor(9e9), torch.tensor(-9e9)
    example = {"x": x, "bound": all_}
    model = tritonq.calibrate(tritonq.prepare_qat(Chooses(), example_inputs=example), example)
    before = copy.deepcopy(model.head.state_dict())
    found = method(model, [{"x": x, "bound": none}, {"x": x, "bound": none}])
    assert list(found) == ["first", "head"]
    assert all(torch.equal(value, before[name]) for name, value in model.head.state_dict().items())
