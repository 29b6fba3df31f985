"""Averages of prepared models (EMA as timm and YOLO trainers keep it, SWA), made before the first step."""

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import tritonq
from tolerances import EXACT, assert_close
from tritonq.fake_quantize_base import FakeQuantizeBase
from tritonq.observers import RangeObserver

IMAGES = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(0))
DECAY = 0.99


_WEIGHT = tritonq.get_qconfig("onnxruntime").weight
_LSQ, _PACT, _TQT = tritonq.LearnedStepFakeQuantize, tritonq.ClippedFakeQuantize, tritonq.TrainedThresholdFakeQuantize
_HISTOGRAM = tritonq.FakeQuantize.with_args(observer=tritonq.HistogramObserver, dtype="quint8")
_SIGNED_STEP = _LSQ.with_args(dtype="qint8_narrow")
QCONFIGS = {
    "LSQ": tritonq.QConfig(_LSQ.with_args(dtype="quint8", init="lsq"), _SIGNED_STEP),
    "LSQ+": tritonq.QConfig(_LSQ.with_args(dtype="quint8", learn_zero_point=True), _SIGNED_STEP),
    "PACT": tritonq.QConfig(_PACT.with_args(), _WEIGHT),
    "TQT": tritonq.QConfig(_TQT.with_args(), _TQT.with_args()),
    "histogram": tritonq.QConfig(_HISTOGRAM, _WEIGHT),
    "MegEngine's LSQ": tritonq.QConfig(_LSQ.with_args(dtype="quint8", method="megengine"), _SIGNED_STEP),
}


def prepared(qconfig="onnxruntime", examples=2):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Softplus(), nn.Flatten(), nn.Linear(288, 4)
    )
    return tritonq.prepare_qat(
        model.train(), qconfig=QCONFIGS.get(qconfig) or tritonq.get_qconfig(qconfig), example_inputs=IMAGES[:examples]
    )


def every_entry(average, model):
    """As timm's ModelEmaV2 does, with integers too."""
    for mine, its in zip(average.state_dict().values(), model.state_dict().values(), strict=True):
        mine.copy_(DECAY * mine + (1 - DECAY) * its)


def float_entries(average, model):
    """As Ultralytics' ModelEMA does."""
    new = model.state_dict()
    for name, mine in average.state_dict().items():
        if mine.is_floating_point():
            mine.mul_(DECAY).add_(new[name], alpha=1 - DECAY)


def torch_own(average, model):
    average.update_parameters(model)


KINDS = {
    "every entry": (copy.deepcopy, every_entry),
    "float entries": (copy.deepcopy, float_entries),
    "AveragedModel": (
        lambda model: AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(DECAY), use_buffers=True),
        torch_own,
    ),
    "SWA": (lambda model: AveragedModel(model, use_buffers=True), torch_own),
}


def ranges(model):
    """The lengths of all ranges of activations."""
    return torch.stack(
        [
            module.max_val - module.min_val
            for name, module in model.named_modules()
            if isinstance(module, RangeObserver) and module.qtype.axis is None
        ]
    )


@pytest.mark.parametrize("kind", KINDS)
def test_an_average_from_before_the_first_step_is_quantized_and_converts(kind):
    make, update = KINDS[kind]
    model = prepared()
    average = make(model).eval().requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), 1e-5)
    for _ in range(200 if kind != "SWA" else 20):
        optimizer.zero_grad()
        model(IMAGES).square().mean().backward()
        optimizer.step()
        with torch.no_grad():
            update(average, model)
    torch.testing.assert_close(ranges(average), ranges(model), rtol=0.05, atol=0)
    for module in average.modules():
        if isinstance(module, FakeQuantizeBase):
            assert module.is_enabled_on_host()
            expected = module.activation_post_process.calculate_qparams()
            torch.testing.assert_close(module.calculate_qparams().scale, expected.scale.view(-1), rtol=0.02, atol=0)
            assert torch.equal(module.calculate_qparams().zero_point, expected.zero_point.view(-1))
    unrounded = copy.deepcopy(average)
    tritonq.disable_fake_quant(unrounded)
    assert not torch.equal(average(IMAGES), unrounded(IMAGES))
    inner = average.module if isinstance(average, AveragedModel) else average
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        converted = tritonq.convert(inner)
    assert tritonq.verify(inner, converted, IMAGES).agrees()


@pytest.mark.filterwarnings("ignore:a ClippedFakeQuantize of")  # the model's input has values below zero
@pytest.mark.parametrize("qconfig", QCONFIGS)
def test_averages_of_learned_quantizers_and_histograms_follow_the_model(qconfig):
    model = prepared(qconfig, examples=6)
    average = copy.deepcopy(model).eval().requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), 1e-7)
    for _ in range(200):
        optimizer.zero_grad()
        model(1.1 * IMAGES).square().mean().backward()
        optimizer.step()
        with torch.no_grad():
            every_entry(average, model)
    torch.testing.assert_close(ranges_of(average), ranges_of(model.eval()), rtol=0.05, atol=0)
    assert all(module.is_enabled_on_host() for module in average.modules() if isinstance(module, FakeQuantizeBase))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        converted = tritonq.convert(average)
    assert tritonq.verify(average, converted, IMAGES).agrees()


@pytest.mark.parametrize("qconfig", ["LSQ", "LSQ+", "PACT", "TQT"])
def test_the_first_batch_sets_learned_parameters_and_a_loaded_state_keeps_them(qconfig):
    model, other = prepared(qconfig), prepared(qconfig)
    assert "begins" not in str(list(model.state_dict()))
    before = ranges_of(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model(3 * IMAGES)
        after = ranges_of(model)
        assert float((after / before).max()) > 2
        model(IMAGES)
        assert torch.equal(ranges_of(model), after)
        other.load_state_dict(model.state_dict())
        other(5 * IMAGES)
    assert torch.equal(ranges_of(other), after)


@pytest.mark.filterwarnings("ignore:a ClippedFakeQuantize of")  # the model's input has values below zero
@pytest.mark.parametrize("qconfig", QCONFIGS)
def test_every_quantizer_knows_that_its_range_is_that_of_examples(qconfig):
    model = prepared(qconfig)
    quantizers = [m for m in model.modules() if isinstance(m, FakeQuantizeBase) and m.batch_axis is not None]
    assert quantizers
    assert all(quantizer.rests_on_examples() for quantizer in quantizers)
    with pytest.warns(UserWarning, match=r"no training step reached \d quantizers"):
        tritonq.convert(model.eval())
    model.train()(3 * IMAGES)
    assert not any(quantizer.rests_on_examples() for quantizer in quantizers)


def test_a_first_batch_without_finite_values_leaves_learned_parameters_to_the_next():
    quantizer = prepared("LSQ")[0].input_fake_quant
    before = float(quantizer.scale)
    quantizer(torch.full_like(IMAGES, torch.nan))
    assert float(quantizer.scale) == before
    assert quantizer.rests_on_examples()
    quantizer(3 * IMAGES)
    assert float(quantizer.scale) > 2 * before
    assert not quantizer.rests_on_examples()


def ranges_of(model):
    """The scales of all activations."""
    found = (module for name, module in model.named_modules() if name.endswith(("_process", "input_fake_quant")))
    return torch.cat([module.calculate_qparams().scale for module in found if isinstance(module, FakeQuantizeBase)])


@pytest.mark.parametrize(
    "through", [lambda model: model, copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))]
)
def test_the_first_training_batch_replaces_what_the_example_inputs_gave(through):
    model = through(prepared())
    fresh = prepared()
    for module in fresh.modules():
        if isinstance(module, FakeQuantizeBase):
            module.begin_anew()
    for trained in (model, fresh):
        trained(3 * IMAGES).sum().backward()
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), fresh.state_dict().values(), strict=True))


def test_state_is_finite_from_the_start_and_a_loaded_one_goes_on():
    model = prepared()
    assert all(tensor.isfinite().all() for tensor in model.state_dict().values())
    model(IMAGES).sum().backward()
    other = prepared()
    other.load_state_dict(model.state_dict())
    for trained in (model, other):
        trained(1.2 * IMAGES).sum().backward()
    assert_close(ranges(model), ranges(other), EXACT)


def test_converting_a_model_that_no_step_trained_warns():
    model = prepared().eval()
    with pytest.warns(UserWarning, match=r"no training step reached 6 quantizers \(0\.weight_fake_quant"):
        converted = tritonq.convert(model)
    assert tritonq.verify(model, converted, IMAGES).agrees()
    calibrated = tritonq.calibrate(model, IMAGES)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tritonq.convert(calibrated)


def test_an_observer_that_is_off_keeps_what_the_example_inputs_gave():
    model = prepared()
    before = ranges(model)
    tritonq.disable_observer(model)
    model(3 * IMAGES)
    assert torch.equal(ranges(model), before)


def test_a_scale_that_was_set_by_hand_stays():
    model = prepared()
    model(IMAGES)
    quantizer = model.eval()[0].input_fake_quant
    scale = quantizer.scale.mul_(0.5).clone()
    model(IMAGES)
    assert torch.equal(quantizer.calculate_qparams().scale, scale)


def labelled(count, seed):
    """Images of four classes, each a pattern under noise."""
    generator = torch.Generator().manual_seed(seed)
    patterns = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(9))
    labels = torch.randint(4, (count,), generator=generator)
    return patterns[labels] + 5 * torch.randn(count, 3, 8, 8, generator=generator), labels


def accuracy(model):
    x, labels = labelled(2000, 1)
    with torch.no_grad():
        return float((model(x).argmax(1) == labels).float().mean())


def test_accuracy_of_averages_after_200_steps():
    """At a decay of 0.99: within a point of the model's, or above it."""
    model = prepared()
    averages = {kind: KINDS[kind][0](model).eval().requires_grad_(False) for kind in KINDS if kind != "SWA"}
    optimizer = torch.optim.SGD(model.parameters(), 0.02, momentum=0.9)
    for step in range(200):
        x, labels = labelled(32, 100 + step)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), labels).backward()
        optimizer.step()
        with torch.no_grad():
            for kind, average in averages.items():
                KINDS[kind][1](average, model)
    expected = accuracy(model.eval())
    assert 0.5 < expected < 0.99
    for kind, average in averages.items():
        assert accuracy(average) >= expected - 0.01, kind


class Gated(nn.Module):
    """A residual addition and a gate, which keep grids from one evaluation to the next."""

    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.second, self.last = nn.Conv2d(8, 8, 1), nn.Linear(8, 4)

    def forward(self, x):
        x = torch.relu(self.norm(self.first(x)))
        return self.last((nn.functional.silu(self.second(x)) + x).mean((2, 3)))


@pytest.mark.parametrize("preset", ["onnxruntime", "tensorrt"])
@torch.no_grad()
def test_an_average_in_eval_mode_follows_what_is_written_through_data(preset):
    torch.manual_seed(0)
    model = tritonq.prepare_qat(Gated(), qconfig=tritonq.get_qconfig(preset), example_inputs=IMAGES).train()
    model(IMAGES)
    average = copy.deepcopy(model).eval()
    for round in range(3):
        average(IMAGES)
        model(IMAGES * (round + 2))
        for mine, its in zip(average.buffers(), model.buffers(), strict=True):
            mine.data.copy_(its.data)
        assert torch.equal(average(IMAGES), copy.deepcopy(average)(IMAGES))
        assert torch.equal(average(IMAGES), tritonq.convert(average)(IMAGES))


@torch.no_grad()
def test_eval_mode_leaves_tensors_that_can_be_resized():
    """A NumPy array of a tensor's memory would keep torch from it, and a quantizer from more scales."""
    model = tritonq.prepare_qat(nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU()), example_inputs=IMAGES).train()
    model(IMAGES)
    converted = tritonq.convert(model.eval())
    for each in (model, converted):
        each(IMAGES)
        for buffer in each.buffers():
            buffer.resize_(buffer.numel() + 1)
