"""Fake quantizers with learned scales, offsets and thresholds: first values, training, deployment, bad arguments."""

import copy
import math

import pytest
import torch
from torch import nn

import tritonq
from tritonq.learned_fake_quantize import (
    ClippedFakeQuantize,
    LearnedStepFakeQuantize,
    TrainedThresholdFakeQuantize,
)
from tritonq.observers import HistogramObserver, MinMaxObserver
from tritonq.qparams import QParams
from tritonq.quantized_type import QuantizedType

MODULES = {
    "lsq": lambda **k: LearnedStepFakeQuantize(dtype="qint8", **k),
    "lsq_init": lambda **k: LearnedStepFakeQuantize(dtype="qint4", init="lsq", **k),
    "lsq_plus": lambda **k: LearnedStepFakeQuantize(dtype="quint8", learn_zero_point=True, **k),
    "lsq_megengine": lambda **k: LearnedStepFakeQuantize(dtype="qint8", method="megengine", **k),
    "lsq_megengine_affine": lambda **k: LearnedStepFakeQuantize(dtype="quint4", method="megengine", **k),
    "lsq_binary": lambda **k: LearnedStepFakeQuantize(dtype="qint1", **k),
    "lsq_2_bits": lambda **k: LearnedStepFakeQuantize(dtype="qint2", observer=HistogramObserver, **k),
    "tqt": lambda **k: TrainedThresholdFakeQuantize(**k),
    "tqt_4_bits": lambda **k: TrainedThresholdFakeQuantize(dtype="qint4", observer=HistogramObserver, **k),
    "pact": lambda **k: ClippedFakeQuantize(**k),
    "pact_2_bits": lambda **k: ClippedFakeQuantize(dtype="quint2", **k),
}


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.filterwarnings("ignore:a ClippedFakeQuantize")
def test_module_trains_and_deploys(name):
    torch.manual_seed(3)
    quantizer = MODULES[name]()
    optimizer = torch.optim.SGD(quantizer.parameters(), lr=0.05)
    x = torch.randn(64, 10) * 2
    quantizer(x)
    x, first = 1.5 * x, None
    for _ in range(15):
        optimizer.zero_grad()
        loss = (quantizer(x) - x).square().mean()
        first = float(loss) if first is None else first
        loss.backward()
        optimizer.step()
        changed = any(float(parameter.grad.abs().sum()) > 0 for parameter in quantizer.parameters())
    assert changed
    assert float(loss) <= 1.05 * first
    assert quantizer.is_active()
    scale, zero_point = quantizer.calculate_qparams()
    assert (scale.dtype, zero_point.dtype, scale.shape) == (torch.float32, torch.int32, zero_point.shape)
    qtype = quantizer.qtype
    deployed = tritonq.functional.fake_quantize_per_tensor_affine(
        x, scale, zero_point, qtype.quant_min, qtype.quant_max, rounding=qtype.rounding
    )
    assert torch.equal(quantizer.eval()(x), deployed)


@pytest.mark.parametrize("kind", [LearnedStepFakeQuantize, TrainedThresholdFakeQuantize])
def test_per_channel(kind):
    quantizer = kind(MinMaxObserver, dtype="qint8", qscheme=torch.per_channel_symmetric, ch_axis=0, num_channels=4)
    parameter = next(quantizer.parameters())
    assert parameter.shape == (4,)
    weight = torch.randn(4, 3, 3, 3) * torch.tensor([1.0, 2.0, 3.0, 4.0]).view(4, 1, 1, 1)
    y = quantizer(weight)
    y.square().sum().backward()
    for channel in range(4):
        alone = kind(MinMaxObserver, dtype="qint8")
        alone.batch_axis = None
        z = alone(weight[channel])
        z.square().sum().backward()
        assert torch.equal(y[channel], z)
        torch.testing.assert_close(parameter.grad[channel], next(alone.parameters()).grad[0])


def test_learned_length_from_data_keeps_the_parameter():
    quantizer = LearnedStepFakeQuantize(dtype="qint8", qscheme=torch.per_channel_symmetric)
    parameter = quantizer.scale
    quantizer(torch.randn(5, 7))
    assert quantizer.scale is parameter
    assert parameter.shape == (5,)
    restored = LearnedStepFakeQuantize(dtype="qint8", qscheme=torch.per_channel_symmetric)
    restored.load_state_dict(quantizer.state_dict())
    x = torch.randn(5, 7)
    assert torch.equal(restored.eval()(x), quantizer.eval()(x))


def test_first_values():
    x = torch.tensor([-1.0, 2.0, 0.5])
    quantizer = LearnedStepFakeQuantize(dtype="qint8")
    quantizer(x)
    assert float(quantizer.scale) == pytest.approx(2 / 127.5)
    quantizer = LearnedStepFakeQuantize(dtype="qint8", init="lsq")
    quantizer(x)
    assert float(quantizer.scale) == pytest.approx(2 * (3.5 / 3) / math.sqrt(127))
    quantizer = TrainedThresholdFakeQuantize(dtype="qint8")
    quantizer(x)
    assert float(quantizer.scale) == pytest.approx(2 / 127.5)
    quantizer = ClippedFakeQuantize(dtype="quint4")
    quantizer(x.relu())
    assert float(quantizer.alpha) == pytest.approx(2)


def test_lsq_counts_the_values_of_one_sample():
    """N of Esser et al.: the weights, or the features, that share a scale."""
    x = torch.linspace(-3, 3, 2 * 3 * 20).view(2, 3, 20)
    for batch_axis, values in ((0, 60), (None, 120)):
        quantizers = [LearnedStepFakeQuantize(dtype="qint4", grad_factor=factor) for factor in (None, 1.0)]
        for quantizer in quantizers:
            quantizer.batch_axis = batch_axis
            quantizer(x).square().sum().backward()
        ours, plain = (quantizer.scale.grad for quantizer in quantizers)
        torch.testing.assert_close(ours, plain / math.sqrt(values * 7))
    layer = tritonq.nn.Conv2d(3, 4, 1, qconfig=tritonq.QConfig(*(LearnedStepFakeQuantize,) * 2))
    assert (layer.weight_fake_quant.batch_axis, layer.activation_post_process.batch_axis) == (None, 0)


def test_lsq_plus_moves_the_zero_point_as_its_offset():
    """Bhalgat et al. train the offset ``b = -s z``, whose gradient is the sum of dy over what is clipped."""
    x = torch.cat([torch.linspace(-2, 1, 40), torch.tensor([5.0, 6.0])]).view(1, -1)
    quantizer = LearnedStepFakeQuantize(dtype="quint4", learn_zero_point=True)
    quantizer.initialize(QParams(torch.tensor([0.1]), torch.tensor([10])))
    y = quantizer(x)
    dy = torch.linspace(1, 2, 42)[None]
    y.backward(dy)
    clipped = (x / 0.1).round() != (y.detach() / 0.1).round()
    torch.testing.assert_close(quantizer.zero_point.grad, -dy[clipped].sum().view(1) / 0.1)


@pytest.mark.parametrize("name", ["lsq", "lsq_plus", "lsq_megengine_affine", "tqt", "pact"])
def test_an_allocated_quantizer_holds_what_one_of_known_length_does(name):
    """Trained parameters and buffers per channel, before any of them are set."""
    scheme = torch.per_channel_symmetric if name in ("lsq", "tqt") else torch.per_channel_affine
    known = MODULES[name](qscheme=scheme, ch_axis=0, num_channels=3)
    later = MODULES[name](qscheme=scheme, ch_axis=0)
    later.allocate(3)
    expected = known.state_dict()
    assert later.state_dict().keys() == expected.keys()
    for key, tensor in later.state_dict().items():
        assert torch.equal(tensor, expected[key]), key


def test_lsq_plus_finds_another_zero_point_in_two_short_epochs():
    """200 steps at the rate of weights: a factor that counts the values would leave it where it begins."""
    generator = torch.Generator().manual_seed(0)
    quantizer = LearnedStepFakeQuantize(dtype="quint2", learn_zero_point=True)
    quantizer.initialize(QParams(torch.tensor([0.8]), torch.tensor([0])))
    optimizer = torch.optim.SGD(quantizer.parameters(), lr=0.02, momentum=0.9)
    for _ in range(200):
        x = torch.randn(4, 16, 14, 14, generator=generator)
        optimizer.zero_grad()
        (quantizer(x) - x).square().mean().backward()
        optimizer.step()
    assert 1 <= int(quantizer.calculate_qparams().zero_point) <= 2  # of four codes, for values on both sides of 0


def test_lsq_initialisation_of_all_batches_and_its_zero_point():
    """`calibrate` takes the mean size over all it saw, and codes still begin at the smallest value."""
    batches = [torch.rand(8, 5) * size - 1 for size in (2, 4)]
    quantizer = LearnedStepFakeQuantize(MinMaxObserver, dtype="quint4", init="lsq")
    model = nn.Sequential(quantizer)
    tritonq.calibrate(model, batches)
    values = torch.cat(batches)
    zero_point = round(15 * float(-values.min() / (values.max() - values.min())))
    assert int(quantizer.zero_point) == zero_point
    scale = 2 * float(values.abs().mean()) / math.sqrt(max(zero_point, 15 - zero_point))
    assert float(quantizer.scale) == pytest.approx(scale)


def test_lsq_initialisation_leaves_codes_above_zero():
    """Of a heavy-tailed signed batch a range from its low end would take all four codes for what is below 0."""
    x = torch.cat([torch.linspace(-1, 1, 99), torch.tensor([-9.0, 9.0])])
    quantizer = LearnedStepFakeQuantize(dtype="quint2", init="lsq")
    assert (quantizer(x) > 0).any()


@pytest.mark.parametrize("dtype", ["qint2", "qint4", "quint2", "qint8"])
def test_first_scales_of_the_least_squared_error(dtype):
    """No scale of a finer search errs less by more than a fraction; outliers of another row change nothing."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 400, generator=generator)
    x = x.abs() if dtype.startswith("qu") else x
    x[1, 0] = 40.0
    qscheme = torch.per_channel_affine if dtype.startswith("qu") else torch.per_channel_symmetric
    quantizer = LearnedStepFakeQuantize(dtype=dtype, qscheme=qscheme, ch_axis=0, init="mse")
    quantizer(x)
    codes = (quantizer.qtype.quant_min - quantizer.zero_point, quantizer.qtype.quant_max - quantizer.zero_point)
    for row, scale, low, high in zip(x, quantizer.scale.detach(), *codes, strict=True):
        tried = torch.linspace(0.01, 1.5, 600)[:, None] * row.abs().max() / max(-int(low), int(high))
        errors = ((row / tried).round().clamp(int(low), int(high)) * tried - row).square().sum(1)
        ours = ((row / scale).round().clamp(int(low), int(high)) * scale - row).square().sum()
        assert float(ours) <= 1.03 * float(errors.min())
    # The mean over batches; what is not finite counts nowhere.
    x[0, 3] = math.nan
    one, both = (LearnedStepFakeQuantize(dtype=dtype, init="mse") for _ in range(2))
    tritonq.calibrate(nn.Sequential(one), [x[:1]])
    tritonq.calibrate(nn.Sequential(both), [x[:1], 2 * x[:1]])
    assert float(both.scale) == pytest.approx(1.5 * float(one.scale))


@pytest.mark.parametrize("kind", [TrainedThresholdFakeQuantize, ClippedFakeQuantize])
def test_unsigned_schemes(kind):
    x = torch.linspace(0, 3, 13)
    quantizer = kind(dtype="quint4")
    quantizer(x)
    assert float(quantizer.scale) == pytest.approx(3 / 15)
    assert int(quantizer.zero_point) == 0
    with pytest.warns(UserWarning, match=f"{kind.__name__} of .* sets what is below zero to 0, and its values go down"):
        kind(dtype="quint4")(x - 1)
    with pytest.warns(UserWarning, match="below zero"):
        tritonq.calibrate(nn.Sequential(kind(dtype="quint4")), [x - 1])


def test_a_batch_without_finite_values_sets_nothing():
    quantizer = LearnedStepFakeQuantize(dtype="qint8")
    x = torch.full((3,), torch.inf)
    with pytest.warns(UserWarning, match="without parameters passes its input through"):
        assert quantizer(x) is x
    with pytest.raises(ValueError, match="LearnedStepFakeQuantize has seen no finite value"):
        quantizer.initialize()
    quantizer.initialize(QParams(torch.tensor([0.5]), torch.tensor([0])))
    assert quantizer(torch.tensor([0.6])) == 0.5


def test_switches():
    quantizer = LearnedStepFakeQuantize(dtype="qint8")
    x = torch.randn(50)
    quantizer(x)
    quantizer.disable_fake_quant()
    leaf = (10 * x).requires_grad_()
    y = quantizer(leaf)
    y.sum().backward()
    assert torch.equal(y, leaf)
    assert torch.equal(leaf.grad, torch.ones(50))
    assert quantizer.scale.grad.abs().sum() == 0
    assert not quantizer.is_active()
    before = quantizer.scale.detach().clone()
    quantizer.enable_fake_quant()
    quantizer(10 * x)
    assert torch.equal(quantizer.scale, before)


def test_scale_survives_what_optimizers_and_casts_do():
    quantizer = LearnedStepFakeQuantize(dtype="qint8")
    quantizer(torch.randn(50))
    quantizer.half()
    assert quantizer.scale.dtype == torch.float32
    with torch.no_grad():
        quantizer.scale.fill_(-3.0)
    y = quantizer(torch.ones(4))
    y.sum().backward()
    assert y.isfinite().all()
    assert quantizer.scale.grad != 0
    assert quantizer.calculate_qparams().scale > 0
    assert torch.equal(copy.deepcopy(quantizer)(torch.ones(4)), y)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LearnedStepFakeQuantize(method="lsq"), "unknown method"),
        (lambda: LearnedStepFakeQuantize(init="random"), "unknown init"),
        (lambda: LearnedStepFakeQuantize(dtype="qint8", learn_zero_point=True), "affine types"),
        (
            lambda: LearnedStepFakeQuantize(dtype="qint8", grad_factor=-1.0),
            "grad_factor must be a finite number from 0",
        ),
        (lambda: LearnedStepFakeQuantize(dtype="quint8", learn_zero_point=True, method="megengine"), "affine types"),
        (
            lambda: TrainedThresholdFakeQuantize(dtype=QuantizedType(0, 255, rounding="half_away")),
            "zero point 0",
        ),
        (lambda: TrainedThresholdFakeQuantize(dtype=QuantizedType.of(8)), "rounds half_away, got rounding='half_even'"),
        (lambda: ClippedFakeQuantize(dtype="qint8"), "codes start at 0"),
        (lambda: ClippedFakeQuantize(dtype=QuantizedType.of(8, signed=False)), "codes start at 0"),
    ],
)
def test_bad_modules(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_in_a_qconfig():
    torch.manual_seed(4)
    qconfig = tritonq.QConfig(
        activation=ClippedFakeQuantize.with_args(dtype="quint8"),
        weight=LearnedStepFakeQuantize.with_args(dtype="qint8_narrow", qscheme=torch.per_channel_symmetric),
    )
    model = nn.Sequential(tritonq.nn.ConvReLU2d(3, 4, 3, qconfig=qconfig), nn.Flatten(), nn.LazyLinear(2))
    x = torch.randn(8, 3, 6, 6)
    model(x)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    layer = model[0]
    before = [
        parameter.detach().clone() for parameter in (layer.weight_fake_quant.scale, layer.activation_post_process.alpha)
    ]
    for _ in range(5):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
    assert layer.weight_fake_quant.scale.shape == (4,)
    assert not torch.equal(layer.weight_fake_quant.scale, before[0])
    assert not torch.equal(layer.activation_post_process.alpha, before[1])


@pytest.mark.parametrize(
    "make",
    [
        tritonq.LearnedBitsFakeQuantize,
        lambda: LearnedStepFakeQuantize(tritonq.HistogramObserver, dtype="qint8", qscheme=torch.per_channel_symmetric),
        lambda: LearnedStepFakeQuantize(tritonq.MovingAveragePerChannelMinMaxObserver, dtype="qint8"),
        lambda: tritonq.FakeQuantize(tritonq.HistogramObserver, dtype="qint8", qscheme=torch.per_channel_symmetric),
    ],
)
def test_buffers_stay_the_same_objects(make):
    quantizer = make()
    buffers, parameters = dict(quantizer.named_buffers()), dict(quantizer.named_parameters())
    quantizer(torch.randn(3, 5))
    quantizer.activation_post_process(torch.randn(3, 5))
    for name, after in [*quantizer.named_buffers(), *quantizer.named_parameters()]:
        assert after is {**buffers, **parameters}[name], f"{name}: DDP and nn.DataParallel hold buffers"
    assert quantizer.scale.shape == quantizer.zero_point.shape == (3,)
