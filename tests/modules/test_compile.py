"""``torch.compile(fullgraph=True)`` of training steps: no graph break, and the numbers of eager mode.

Eval mode has a file of its own, ``test_compile_eval.py``.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import tritonq
from qat_models import FloatPair, FloatResidual, images, set_mode, trained_float_form
from tolerances import LONG_SUMS, SUMS, TRAINED, assert_close
from tritonq import nn as qnn
from tritonq.functional.traced import parts
from tritonq.grid import Grid, RangeStatistics
from tritonq.quantized_type import QUANTIZED_TYPES
from vision_models import torchvision_model, torchvision_residual_network

pytestmark = pytest.mark.usefixtures("fresh_compiler")


def prepared(preset: str = "tensorrt", kind: type[nn.Module] = FloatResidual) -> nn.Module:
    torch.manual_seed(0)
    qconfig = {"fbgemm": tritonq.get_default_qat_qconfig("fbgemm")}.get(preset) or tritonq.get_qconfig(preset)
    return tritonq.prepare_qat(kind(), qconfig=qconfig, example_inputs=images(2)).train()


def train(model: nn.Module, called, steps: int = 3, channels_last: bool = False) -> list[torch.Tensor]:
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    outputs = []
    for step in range(steps):
        x = images(8, seed=step)
        x = x.to(memory_format=torch.channels_last) if channels_last else x
        optimizer.zero_grad()
        outputs.append(called(x))
        outputs[-1].square().mean().backward()
        optimizer.step()
    return outputs


def assert_trained_alike(found: nn.Module, expected: nn.Module) -> None:
    """Switches and counts exactly; the compiler may add up vectors and weights in another order."""
    others = expected.state_dict()
    for name, value in found.state_dict().items():
        assert_close(value, others[name], LONG_SUMS, size=0.01, msg=f"{name} differs")
    for (name, parameter), other in zip(found.named_parameters(), expected.parameters(), strict=True):
        assert_close(parameter.grad, other.grad, SUMS, size=0.01, msg=f"gradient of {name} differs")


@pytest.mark.parametrize(
    ("preset", "channels_last", "observed"),
    [("tensorrt", False, False), ("tensorrt", True, True), ("fbgemm", False, True)],
)
def test_a_training_step_is_one_graph_and_equals_eager(preset, channels_last, observed):
    """Also one that nothing was observed before: then the graph holds the question."""
    model = prepared(preset)
    if observed:
        model(images(8, seed=9))
    if channels_last:
        model.to(memory_format=torch.channels_last)
    eager = copy.deepcopy(model)
    expected = train(eager, eager, channels_last=channels_last)
    found = train(model, torch.compile(model, fullgraph=True, backend="aot_eager"), channels_last=channels_last)
    # The first forward has met the same parameters; a compiler adds up in another order.
    assert_close(found[0], expected[0], SUMS, size=0.1)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=TRAINED.rtol, atol=2 * float(model.head.activation_post_process.scale))
    assert_trained_alike(model, eager)
    assert int(model.stem[0].bn.num_batches_tracked) == 3 + observed


@pytest.mark.parametrize(("mode", "bfloat16"), [("approximate", True), ("corrected", False), ("exact", False)])
def test_mixed_precision_and_other_modes_equal_eager(mode, bfloat16):
    model = prepared(kind=FloatPair)
    set_mode(model, mode)
    model(images(8, seed=9))
    eager = copy.deepcopy(model)
    for called in (eager, torch.compile(model, fullgraph=True, backend="aot_eager")):
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            y = called(images(8))
        y.float().square().mean().backward()
    assert_trained_alike(model, eager)


def test_switches_work_in_a_compiled_model():
    """They are tensors: the graph reads them, and is not compiled again."""
    model = prepared()
    model(images(8))
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    compiled(images(4))
    graphs = counter.frame_count
    model.apply(tritonq.disable_observer)
    before = model.add.activation_post_process.scale.clone()
    rounded = compiled(10 * images(4))
    assert torch.equal(model.add.activation_post_process.scale, before)
    model.apply(tritonq.disable_fake_quant)
    assert not torch.equal(compiled(10 * images(4)), rounded)
    assert counter.frame_count == graphs


class Bounded(nn.Module):
    """ReLUs with upper bounds behind a convolution with BatchNorm, one without, and an addition."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU6())
        self.point, self.head = nn.Conv2d(6, 6, 1), nn.Linear(384, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        return self.head(nn.functional.relu6(self.point(x).clamp(0, 0.4) + x).flatten(1))


def test_inductor_trains():
    """With upper bounds of ReLUs, which it sees as numbers."""
    torch.manual_seed(0)
    model = tritonq.prepare_qat(Bounded(), example_inputs=images(2)).train()
    assert [module.ceiling for module in (model.stem[0], model.point, model.add)] == [6.0, 0.4, 6.0]
    model(images(8, seed=9))
    eager = copy.deepcopy(model)
    expected = train(eager, eager, 2)
    found = train(model, torch.compile(model, fullgraph=True), 2)
    torch.testing.assert_close(
        found, expected, rtol=TRAINED.rtol, atol=2 * float(model.head.activation_post_process.scale)
    )
    assert_trained_alike(model, eager)


def two_stages() -> nn.Module:
    """Return a ResNet's first two stages, of one block each: the others repeat the second."""
    model = torchvision_residual_network([1, 1, 1, 1])
    model.layer3 = model.layer4 = nn.Identity()
    model.fc = nn.Linear(128, 10)
    return model


# One block of each kind: a graph of more of them breaks nowhere else, and takes minutes to trace.
NETWORKS = {
    "resnet": two_stages,
    "mobilenet_v2": lambda: torchvision_model("mobilenet_v2", inverted_residual_setting=[[1, 16, 1, 1], [6, 24, 2, 2]]),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_explain_finds_no_graph_break(name):
    x = torch.randn(2, 3, 32, 32)
    model = tritonq.prepare_qat(NETWORKS[name](), example_inputs=x).train()
    # In a function, since explain counts a module's input hook, which quantizes the input, as a graph of its own.
    report = torch._dynamo.explain(lambda x: model(x))(x)
    assert (report.graph_count, report.graph_break_count) == (1, 0), report.break_reasons
    assert report.op_count > 10


WEIGHT = tritonq.get_qconfig("tensorrt").weight
SYMMETRIC = {"dtype": torch.qint8, "qscheme": torch.per_tensor_symmetric}
STEP = tritonq.LearnedStepFakeQuantize.with_args
HISTOGRAM = tritonq.FakeQuantize.with_args(observer=tritonq.HistogramObserver)
OTHER_QUANTIZERS = {
    "tqt": tritonq.get_qconfig("megengine_tqt"),
    "lsq": tritonq.QConfig(
        STEP(dtype=torch.quint8), STEP(dtype=torch.qint8, qscheme=torch.per_channel_symmetric, ch_axis=0)
    ),
    "lsq+": tritonq.QConfig(STEP(dtype=torch.quint8, learn_zero_point=True), WEIGHT),
    "pact": tritonq.QConfig(tritonq.ClippedFakeQuantize.with_args(dtype="quint8"), WEIGHT),
    "histogram mse": tritonq.QConfig(HISTOGRAM.with_args(**SYMMETRIC), WEIGHT),
    "histogram kl": tritonq.QConfig(HISTOGRAM.with_args(search="kl", dtype=torch.quint8), WEIGHT),
    "fixed point": tritonq.get_qconfig("f8net"),
}


@pytest.mark.parametrize("name", OTHER_QUANTIZERS)
@pytest.mark.filterwarnings("ignore:a ClippedFakeQuantize")
def test_other_quantizers_train_in_one_graph(name):
    torch.manual_seed(0)
    model = tritonq.prepare_qat(FloatPair(), qconfig=OTHER_QUANTIZERS[name], example_inputs=images(2)).train()
    model(images(8, seed=9))
    eager = copy.deepcopy(model)
    outputs = []
    for called in (eager, torch.compile(model, fullgraph=True, backend="aot_eager")):
        outputs.append(called(images(8)))
        outputs[-1].square().mean().backward()
    assert torch.equal(*outputs)
    assert_trained_alike(model, eager)
    learned = [parameter.grad for key, parameter in model.named_parameters() if "fake_quant" in key or "process" in key]
    assert not learned or any(bool(gradient.any()) for gradient in learned)


@pytest.mark.parametrize("preset", ["tensorrt", "fbgemm_v0"])
def test_a_converted_model_compiles_to_the_same_codes(preset):
    converted = tritonq.convert(trained_float_form(preset))
    with torch.no_grad():
        expected = converted(images(16))
        for backend in ("aot_eager", "inductor") if preset == "tensorrt" else ("aot_eager",):
            torch._dynamo.reset()
            assert torch.equal(torch.compile(converted, fullgraph=True, backend=backend)(images(16)), expected)


def test_what_cannot_be_traced_says_so():
    layer = qnn.Linear(3, 2, qconfig=tritonq.get_qconfig("megengine_tqt"))
    with pytest.raises(Exception, match="run the model once on a batch"):
        torch.compile(layer, fullgraph=True, backend="eager")(torch.randn(4, 3))


def test_a_quantizer_whose_bins_move_is_traced():
    """Ranges that grow, and one that does not; each batch is rounded to the range that it made."""
    ours, eager = (tritonq.FakeQuantize(observer=tritonq.InterpolatingHistogramObserver) for _ in range(2))
    compiled = torch.compile(ours, fullgraph=True, backend="eager")
    for size in (1.0, 1.7, 0.3):
        x = size * torch.randn(4, 300, generator=torch.Generator().manual_seed(0))
        assert torch.equal(compiled(x), eager(x))
    for (name, mine), other in zip(ours.state_dict().items(), eager.state_dict().values(), strict=True):
        assert torch.equal(mine, other), name


@pytest.mark.parametrize("missing", [(), ("zero_point",), ("enabled",)])
@pytest.mark.parametrize("axis", [None, 1])
def test_structures_survive_as_plain_arguments(missing, axis):
    qtype, one = QUANTIZED_TYPES["qint8"].with_axis(axis), torch.ones(1)
    zero_point, enabled = (None if name in missing else one for name in ("zero_point", "enabled"))
    grid = Grid(one, zero_point, qtype, enabled)
    statistics = RangeStatistics(one, one, one, qtype.granularity, None, True, 0.1, 1.5, "megengine", 1e-5, True)
    for value, kind in ((grid, Grid | None), (None, Grid | None), (statistics, RangeStatistics)):
        described = [("value", parts.describe("value", kind))]
        (found,) = parts.rebuild_all(described, parts.flatten_all(described, {"value": value})).values()
        assert type(found) is type(value)
        if value is not None:
            assert vars(found) == vars(value)


@pytest.mark.parametrize(
    "kind", [dict[str, int], list[list[int]], tuple[int | None, ...], tuple[int, str], tuple, tuple[()]]
)
def test_a_type_that_no_plain_argument_stands_for_is_refused(kind):
    with pytest.raises(TypeError, match="x: an operator can't take"):
        parts.describe("x", kind)


@pytest.mark.parametrize("kind", [torch.Tensor, int])
@pytest.mark.parametrize("name", ["x", "y"])
def test_only_tensor_arguments_are_written_to(kind, name):
    described = [("x", parts.describe("x", kind))]
    if kind is torch.Tensor and name == "x":
        assert parts.schema(described, [name]) == "Tensor(a0!) x"
    else:
        with pytest.raises(ValueError, match=name):
            parts.schema(described, [name])


class Attending(nn.Module):
    """The gradient of a head comes back laid out as the head is, not as its projection's output is."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(32, 32) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        heads = [layer(x).view(2, 17, 2, 16).transpose(1, 2) for layer in (self.query, self.key, self.value)]
        return self.out(nn.functional.scaled_dot_product_attention(*heads).transpose(1, 2).reshape(2, 17, 32))


def test_attention_trains_in_one_graph():
    torch.manual_seed(0)
    x = torch.randn(2, 17, 32)
    eager = tritonq.prepare_qat(Attending(), example_inputs=x).train()
    other = copy.deepcopy(eager)
    compiled = torch.compile(other, backend="aot_eager", fullgraph=True)
    compiled(x).square().sum().backward()
    eager(x).square().sum().backward()
    assert_trained_alike(other, eager)
