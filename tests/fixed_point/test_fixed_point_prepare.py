"""Ordinary models become fixed-point networks: formats, links and what is refused."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from prepared_nets import Net
from qat_models import Named
from tolerances import SUMS, assert_close
from tritonq import convert, export_onnx, get_qconfig, set_fixed_point_phase, summary, verify
from tritonq.nn import FixedPointAdd, FixedPointAvgPool2d, FixedPointConvBn2d, FixedPointLinear, FixedPointMaxPool2d
from tritonq.prepare import prepare_qat

F8NET = get_qconfig("f8net")


def conv_bn(n_in, n_out, kernel=3, groups=1, stride=1):
    conv = nn.Conv2d(n_in, n_out, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(n_out))


class Residual(nn.Module):
    """Identity and downsampling shortcuts, functional and module ReLUs, two poolings, a signed bottleneck."""

    def __init__(self):
        super().__init__()
        self.stem = conv_bn(2, 4)
        self.max_pool = nn.MaxPool2d(2)
        self.a1, self.a2 = conv_bn(4, 4), conv_bn(4, 4)
        self.b1, self.b2, self.shortcut = conv_bn(4, 8, stride=2), conv_bn(8, 8), conv_bn(4, 8, 1, stride=2)
        self.bottleneck, self.expand = conv_bn(8, 4, 1), conv_bn(4, 6, 1)
        self.clipped = nn.ReLU6()
        self.drop = nn.Dropout(0.1)
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        x = self.max_pool(F.relu(self.stem(x)))
        y = self.a2(F.relu(self.a1(x)))
        x = F.relu(x + y)
        y = self.b2(F.relu_(self.b1(x)))
        y += self.shortcut(x)
        y = self.bottleneck(F.relu(y))
        y = self.clipped(self.expand(y))
        y = y.mean((2, 3))
        return F.log_softmax(self.head(self.drop(y)), 1)


def made(model=None, shape=(2, 2, 12, 12)):
    torch.manual_seed(0)
    model = Residual() if model is None else model
    for _ in range(3):
        model(torch.randn(shape))
    return model


def prepared(model=None, shape=(2, 2, 12, 12)):
    model = made(model, shape)
    return prepare_qat(model, qconfig=F8NET, example_inputs=torch.randn(shape))


def test_every_layer_knows_its_format_and_the_next_one():
    model = prepared()
    layers = {name: part for name, part in model.named_modules() if hasattr(part, "input_format")}
    assert {name for name, part in layers.items() if isinstance(part, FixedPointConvBn2d)} == {
        f"{name}.0" for name in ("stem", "a1", "a2", "b1", "b2", "shortcut", "bottleneck", "expand")
    }
    formats = {name: part.input_format for name, part in layers.items()}
    signed = {name for name, found in formats.items() if found.signed}
    assert signed == {"stem.0", "expand.0"}  # the network's input, and a bottleneck without ReLU
    assert [name for name, found in formats.items() if not found.scaled] == ["stem.0"]

    follows = {name: part.following for name, part in layers.items()}
    assert follows["stem.0"] is formats["a1.0"]
    assert follows["a1.0"] is formats["a2.0"]
    assert follows["a2.0"] is formats["b1.0"]  # through the sum: both summands in units of its reader
    assert follows["b1.0"] is formats["b2.0"]
    assert follows["b2.0"] is follows["shortcut.0"] is formats["bottleneck.0"]
    assert formats["b1.0"] is formats["shortcut.0"]
    assert [layers[name].observes for name in ("b1.0", "shortcut.0")] == [True, False]
    assert follows["bottleneck.0"] is formats["expand.0"]
    assert follows["head"] is None

    first, second = (part for part in model.modules() if isinstance(part, FixedPointAdd))
    assert first.format_of(0) is formats["a1.0"]
    assert first.observes[0] is False
    assert first.format_of(1) is None
    assert first.following is formats["b1.0"]
    assert formats["a1.0"].alpha is formats["b1.0"].alpha  # one step: a shift apart
    assert second.format_of(0) is second.format_of(1) is None
    pool = next(part for part in model.modules() if isinstance(part, FixedPointAvgPool2d))
    assert pool.area == 9
    assert pool.following is formats["head"]
    assert pool.input_format.alpha is formats["head"].alpha
    assert model.head.input_factor == pool.remaining_factor == 8 / 9
    assert isinstance(model.max_pool, FixedPointMaxPool2d)
    assert type(model.clipped) is nn.ReLU
    assert isinstance(model.head, FixedPointLinear)


def test_parameters_mode_and_the_float_model_stay():
    model = made()
    before = copy.deepcopy(model.state_dict())
    for mode in (True, False):
        quantized = prepare_qat(model.train(mode), qconfig=F8NET, example_inputs=torch.randn(2, 2, 12, 12))
        assert all(part.training is mode for part in quantized.modules())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    inplace = prepare_qat(model, inplace=True, qconfig=F8NET, example_inputs=torch.randn(2, 2, 12, 12))
    assert inplace is model
    names = [name for name, _ in made().named_parameters()]
    assert len(names) == len({id(p) for n, p in model.named_parameters() if "alpha" not in n})


def test_hooks_move_to_what_takes_a_modules_place():
    layers = nn.Conv2d(2, 4, 3, padding=1), nn.ReLU6(), nn.MaxPool2d(2), nn.AvgPool2d(2), nn.Flatten()
    model, seen = nn.Sequential(*layers, nn.Linear(36, 3)), []
    for name, part in model.named_children():
        part.register_forward_hook(lambda module, given, result, name=name: seen.append(name))
    quantized = prepare_qat(model, qconfig=F8NET, example_inputs=torch.randn(2, 2, 12, 12))
    seen.clear()
    quantized(torch.randn(2, 2, 12, 12))
    assert seen == ["0", "1", "2", "3", "4", "5"]
    assert isinstance(quantized[3], FixedPointAvgPool2d)
    integers = convert(quantized.eval())
    seen.clear()
    integers(torch.randn(2, 2, 12, 12))
    assert seen == ["0", "1", "2", "3", "4", "5"]


def test_layers_that_take_their_input_by_name():
    x, results = torch.rand(2, 3, 8, 8), []
    for named in (False, True):
        model = prepare_qat(Named(named), example_inputs=x, qconfig=F8NET).train()
        results.append(model(x))
        assert verify(model, convert(model.eval()), x).total.differing == 0
    assert torch.equal(*results)


def test_the_float_phase_is_the_float_network():
    model = made()
    model.clipped = nn.ReLU()
    quantized = prepare_qat(model, qconfig=F8NET, example_inputs=torch.randn(2, 2, 12, 12))
    set_fixed_point_phase(quantized, "floating_wo_clip")
    x = torch.randn(3, 2, 12, 12)
    assert_close(quantized.eval()(x), model.eval()(x), SUMS, size=0.1)


def test_residual_network_approximates_the_float_network():
    # Eight bits with a clipping level that fits: a few percent of the output's norm, links and factors being right.
    model = made()
    quantized = prepared(copy.deepcopy(model))
    x = torch.randn(16, 2, 12, 12, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        for _ in range(20):  # running statistics and fractional lengths settle
            quantized(x)
            model(x)
        got, expected = quantized.eval()(x), model.eval()(x)
    assert float((got - expected).norm() / expected.norm()) < 0.05


def test_training_moves_everything_and_runs_in_eval():
    model = prepared()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    for step in range(3):
        x = torch.randn(4, 2, 12, 12, generator=torch.Generator().manual_seed(step))
        loss = F.nll_loss(model(x), torch.tensor([0, 1, 2, 0]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    still = {name for name, value in model.named_parameters() if torch.equal(value, before[name])}
    assert still == {"stem.0.input_format.alpha"}  # the input is real: it has no clipping level
    out = model.eval()(x)
    assert out.dtype == torch.float32
    assert torch.equal(out, copy.deepcopy(model)(x))
    other = prepared()
    other.load_state_dict(model.state_dict())
    assert torch.equal(other.eval()(x), out)


def gate(m, x):
    y = m.one(x)
    return m.two(y * torch.sigmoid(y))


def input_sum(m, x):
    return m.two(F.relu(m.one(x) + x))


def returned_sum(m, x):
    y = m.one(x)
    return m.two(F.relu(y)) + y


def returned_twice(m, x):
    y = m.one(x)
    return m.two(F.relu(y)), y


def shared(m, x):
    return m.two(F.relu(m.two(F.relu(m.one(x)))))


def both_sides(m, x):
    y = m.one(x)
    return m.three(m.two(F.relu6(y)) + y)


CONVS = {"one": lambda: nn.Conv2d(2, 2, 3, padding=1), "two": lambda: nn.Conv2d(2, 2, 3, padding=1)}
GROUPED = {"one": lambda: nn.Conv2d(2, 4, 1), "two": lambda: nn.Conv2d(4, 4, 1, groups=2)}
GELU = "the output of layers 'one' and 'one_more' goes through gelu"


@pytest.mark.parametrize(
    ("function", "replace", "message"),
    [
        (gate, {}, "'one' goes through sigmoid"),
        (input_sum, {}, "comes from no layer to the output of layer 'one'; its"),
        (lambda m, x: m.two(F.relu(x + m.one(x))), {}, "comes from no layer to the output of layer 'one'; its"),
        (lambda m, x: m.two(F.gelu(m.one(x) + m.one_more(x))), {"one_more": CONVS["one"]}, GELU),
        (returned_sum, {}, "'one' is read by add besides"),
        (returned_twice, {}, "'one' is read by the model's caller"),
        (shared, {}, "'two' is called 2 times"),
        (both_sides, {"three": lambda: nn.Conv2d(2, 2, 1)}, "'one' is read both before and after relu6"),
        (lambda m, x: m.two(m.one(x)), GROUPED, "BatchNorm|groups"),
        (lambda m, x: m.two(m.one(x)), {"one": lambda: nn.Conv2d(2, 2, 3, padding_mode="reflect")}, "'one'.*zeros"),
        (lambda m, x: m.two(m.one(x)), {"one": lambda: nn.ConvTranspose2d(2, 2, 3)}, None),
        (lambda m, x: m.two(m.norm(m.one(x))), {"norm": lambda: nn.GroupNorm(1, 2)}, "'one' goes through GroupNorm"),
        (lambda m, x: x * 2, {}, "no Conv2d and no Linear"),
    ],
)
def test_what_has_no_fixed_point_form_is_refused_and_left_as_it_was(function, replace, message):
    torch.manual_seed(0)
    model = Net(function, **{name: make() for name, make in {**CONVS, **replace}.items()})
    before = {name: type(part) for name, part in model.named_modules()}
    if message is None:  # a layer before the first fixed-point one stays in float
        assert isinstance(
            prepare_qat(model, qconfig=F8NET, example_inputs=torch.ones(1, 2, 6, 6)).one, nn.ConvTranspose2d
        )
        return
    for inplace in (False, True):
        with pytest.raises(ValueError, match=message):
            prepare_qat(model, inplace=inplace, qconfig=F8NET, example_inputs=torch.ones(1, 2, 6, 6))
        assert {name: type(part) for name, part in model.named_modules()} == before


def test_examples_are_needed():
    with pytest.raises(ValueError, match="example_inputs"):
        prepare_qat(Residual(), qconfig=F8NET)
    with pytest.raises(ValueError, match="rejects"):
        prepare_qat(Residual(), qconfig=F8NET, example_inputs=torch.ones(1, 3, 12, 12))


def test_concatenation_shares_a_format():
    def forward(m, x):
        y = F.relu(m.one(x))
        return m.three(torch.cat([y, F.relu(m.two(y))], 1))

    model = Net(forward, **{name: make() for name, make in CONVS.items()}, three=nn.Conv2d(4, 3, 1))
    quantized = prepare_qat(model, qconfig=F8NET, example_inputs=torch.ones(1, 2, 6, 6))
    assert quantized.two.input_format is quantized.three.input_format
    assert not quantized.three.input_format.signed
    assert quantized.one.following is quantized.two.following is quantized.three.input_format


class Averages(nn.Module):
    """Two convolutions with a mean between them."""

    def __init__(self, mean):
        super().__init__()
        self.one, self.two, self.mean = nn.Conv2d(2, 4, 1), nn.Conv2d(4, 3, 1), mean

    def forward(self, x):
        return self.two(self.mean(F.relu(self.one(x))))


@pytest.mark.parametrize(
    "mean",
    [
        nn.AvgPool2d(2, padding=(0, 0), count_include_pad=False),
        lambda x: F.avg_pool2d(x, 2),
        lambda x: F.avg_pool2d(x, (3, 3), stride=2, padding=1),
        lambda x: F.adaptive_avg_pool2d(x, (None, 4)),
        lambda x: x.mean(axis=[2, 3], keepdims=True),
    ],
)
def test_means_are_recognised_however_they_are_spelled(mean):
    model = prepared(Averages(mean), (2, 2, 8, 8))
    pool = next(part for part in model.modules() if isinstance(part, FixedPointAvgPool2d))
    x = torch.rand(1, 4, 8, 8)
    set_fixed_point_phase(model, "floating_wo_clip")
    assert_close(pool(x), mean(x), SUMS)


@pytest.mark.parametrize(
    "mean",
    [
        nn.AvgPool2d(3, padding=1, count_include_pad=False),
        nn.AvgPool2d(2, ceil_mode=True),
        lambda x: F.avg_pool2d(x, 2, divisor_override=3),
        lambda x: F.avg_pool2d(x, x.shape[-1] // 4),
        lambda x: F.adaptive_avg_pool2d(x, 3),
        lambda x: x.mean((2, 3), True, dtype=torch.float32),
    ],
)
def test_means_over_numbers_of_values_that_differ_are_refused(mean):
    with pytest.raises(ValueError, match="which has no fixed-point form"):
        prepared(Averages(mean), (2, 2, 8, 8))


def test_a_window_that_follows_the_size_of_the_image_is_kept_for_that_size():
    model = prepared(Averages(lambda x: F.avg_pool2d(x, x.shape[-2:])), (2, 2, 8, 8))
    assert model(torch.randn(2, 2, 8, 8)).shape == (2, 3, 1, 1)
    with pytest.raises(ValueError, match="was prepared for images of 64 values, got 8 by 4"):
        model(torch.randn(2, 2, 8, 4))


class ByMode(nn.Module):
    """A forward that reads the mode and a whole number of its module."""

    def __init__(self):
        super().__init__()
        self.depth, self.first, self.last = 1, conv_bn(2, 8), nn.Linear(8, 4)

    def forward(self, x, drop=0.1):
        for _ in range(self.depth):
            x = torch.relu(self.first(x))
        return self.last(F.dropout(x.mean((2, 3)), drop, self.training))


def test_layers_of_a_forward_that_reads_its_mode_are_found_by_both_runs(tmp_path):
    network, images = prepared(ByMode()).train(), torch.rand(2, 2, 12, 12)
    network(images)
    converted = convert(network.eval())
    assert torch.equal(converted(images), network(images))
    assert summary(network).line == summary(converted).line
    assert "quantized 2 of 2 layers" in summary(converted).line
    pytest.importorskip("onnxruntime")
    export_onnx(converted, tmp_path / "model.onnx", images)
    assert verify(network, tmp_path / "model.onnx", images).agrees()
