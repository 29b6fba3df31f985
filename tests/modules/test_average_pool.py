"""Pools and means give the codes of exact arithmetic in eval, converted, saved, in ONNX Runtime and as a program."""

import copy
from fractions import Fraction

import onnx
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import tritonq
from optimised_graph import optimised_kinds
from tritonq import nn as qnn
from tritonq.functional.average_pool import integer_average
from tritonq.grid import Grid
from tritonq.quantized_type import QuantizedType
from tritonq.reference.average_pool import AdaptiveAverage, AxesAverage, WindowAverage, exact_sums

SHAPE = (2, 3, 7, 5)
AVERAGINGS = [
    AxesAverage((2, 3)),
    AxesAverage((-1,), keepdim=True),
    AxesAverage(None),
    WindowAverage((2, 2), (2, 2), (0, 0)),
    WindowAverage((3, 3), (2, 2), (1, 1)),
    WindowAverage((3, 2), (2, 1), (1, 1), count_include_pad=False),
    WindowAverage((3, 3), (2, 2), (1, 0), ceil_mode=True),
    WindowAverage((3, 3), (2, 2), (1, 1), ceil_mode=True, count_include_pad=False),
    WindowAverage((2, 2), (2, 2), (0, 0), divisor_override=3),
    AdaptiveAverage((1, 1)),
    AdaptiveAverage((3, None)),
    AdaptiveAverage((4, 3)),
]


def window_members(averaging, shape):
    """For each result the positions that it adds up: the operation's own gradient says which."""
    x = torch.zeros(shape, dtype=torch.float64, requires_grad=True)
    y = averaging.mean(x)
    for index in range(y.numel()):
        (gradient,) = torch.autograd.grad(y.flatten()[index], x, retain_graph=True)
        yield gradient.flatten().nonzero().flatten(), gradient.max()


@pytest.mark.parametrize("averaging", AVERAGINGS, ids=repr)
def test_codes_are_those_of_fractions(averaging):
    """Scales are chosen so that many means lie between two codes."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-128, 128, SHAPE, generator=generator)
    members = list(window_members(averaging, SHAPE))
    count = round(1 / float(members[0][1]))
    scale, output_scale = torch.tensor([0.5 * count]), torch.tensor([1.0])
    zero, grid = torch.zeros(1, dtype=torch.int32), QuantizedType.of(8)
    found = integer_average(codes * scale, averaging, Grid(scale, zero, grid), Grid(output_scale, zero, grid))
    flat, ties = codes.flatten(), 0
    for value, (places, weight) in zip(found.flatten().tolist(), members, strict=True):
        exact = Fraction(int(flat[places].sum())) * Fraction(count, 2) / round(1 / float(weight))
        ties += exact.denominator == 2
        assert value == round(exact)
    assert ties > 0


def test_sums_beyond_float32_are_exact():
    codes = torch.full((1, 1, 300, 301), 255.0)
    codes[0, 0, 0, 0] = 254
    for averaging in (AxesAverage((2, 3)), AdaptiveAverage((1, 1)), WindowAverage((300, 301), (1, 1), (0, 0))):
        assert exact_sums(codes, averaging, 255).item() == 255 * 300 * 301 - 1


class Net(nn.Module):
    """Conv-ReLU, something that averages, another convolution."""

    def __init__(self, average):
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 1)
        self.average = average

    def forward(self, x):
        return self.head(self.average(F.relu(self.conv(x))))


AVERAGES = {
    "pool": lambda: nn.AdaptiveAvgPool2d(1),
    "mean": lambda: lambda y: y.mean((2, 3), keepdim=True),
    "mean of one axis": lambda: lambda y: torch.mean(y, dim=-1, keepdim=True),
    "mean without axes kept": lambda: lambda y: y.mean([2, 3])[:, :, None, None],
    "window of the input's size": lambda: lambda y: F.avg_pool2d(y, y.shape[2:]),
    "windows": lambda: nn.AvgPool2d(3, 2, 1, ceil_mode=True, count_include_pad=False),
    "function": lambda: lambda y: F.avg_pool2d(y, 2),
    "windows with an empty stride": lambda: nn.AvgPool2d(2, ()),
    "sizes that don't divide": lambda: nn.AdaptiveAvgPool2d((3, 4)),
}


def trained(average, preset="onnxruntime"):
    torch.manual_seed(0)
    x = torch.randn(32, 3, 14, 10)
    net = Net(AVERAGES[average]())
    qat = tritonq.prepare_qat(net, qconfig=tritonq.get_qconfig(preset), example_inputs=x[:2]).train()
    qat(x).square().mean().backward()
    return qat.eval(), x


@pytest.mark.parametrize("average", AVERAGES)
def test_every_form_gives_the_same_codes(average, tmp_path):
    qat, x = trained(average)
    assert sum(isinstance(module, tritonq.nn.AverageLayer) for module in qat.modules()) == 1
    int8 = tritonq.convert(qat)
    tritonq.save_converted(int8, tmp_path / "model.pt")
    loaded = tritonq.load_converted(tmp_path / "model.pt", Net(AVERAGES[average]()))
    tritonq.export_onnx(int8, tmp_path / "model.onnx", x[:2])
    tritonq.export_program(int8, tmp_path / "model.pt2", x[:2])
    for form in (int8, loaded, tmp_path / "model.onnx", tmp_path / "model.pt2"):
        assert tritonq.verify(qat, form, x).total.differing == 0
    with torch.no_grad():
        expected = int8(x)
        assert torch.equal(int8(x.contiguous(memory_format=torch.channels_last)), expected)
        assert torch.equal(int8(x[:1]), expected[:1])
        if average in ("pool", "windows", "sizes that don't divide"):
            assert torch.equal(int8(x[0]), expected[0])


@pytest.mark.parametrize("average", ["pool", "mean", "mean without axes kept"])
def test_a_global_pool_is_one_integer_node(average, tmp_path):
    qat, x = trained(average)
    tritonq.export_onnx(qat, tmp_path / "model.onnx", x[:2])
    kinds = optimised_kinds(tmp_path / "model.onnx")
    assert kinds["QLinearGlobalAveragePool"] == 1
    assert "ReduceMean" not in kinds


def test_ties_away_from_zero_stay_so(tmp_path):
    qat, x = trained("windows", "megengine_ema")
    tritonq.export_onnx(qat, tmp_path / "model.onnx", x[:2])
    assert tritonq.verify(qat, tmp_path / "model.onnx", x).total.differing == 0


def test_gradient_in_eval_is_that_of_the_mean():
    qat, _ = trained("pool")
    features = torch.rand(2, 8, 4, 4).mul(1e-3).requires_grad_()
    qat.average(features).sum().backward()
    assert torch.allclose(features.grad, torch.full_like(features, 1 / 16))


def test_compiled_eval_gives_the_same_codes():
    qat, x = trained("windows")
    with torch.no_grad():
        assert torch.equal(torch.compile(qat, backend="aot_eager")(x), qat(x))


def test_names_in_the_state_dict_stay():
    assert "average.activation_post_process.scale" in trained("pool")[0].state_dict()
    assert "mean_fake_quant.scale" in {key.removeprefix("average.") for key in trained("mean")[0].state_dict()}


@pytest.mark.parametrize("preset", ["onnxruntime", "tensorrt"])
def test_training_rounds_as_the_quantizer_does_and_saves_a_bit_for_each_result(preset):
    layer = qnn.Average(AxesAverage((2, 3)), qconfig=tritonq.get_qconfig(preset)).train()
    twin = copy.deepcopy(layer.activation_post_process)
    a, b = (torch.randn(8, 64, 4, 4, generator=torch.Generator().manual_seed(0)).requires_grad_() for _ in range(2))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = layer(a)
    expected = twin(b.mean((2, 3)))
    assert torch.equal(y, expected)
    y.backward(y.detach())
    expected.backward(expected.detach())
    assert torch.equal(a.grad, b.grad)
    assert torch.equal(layer.activation_post_process.scale, twin.scale)
    assert sum(t.untyped_storage().nbytes() for t in kept) == 8 * 64 // 8


@pytest.mark.parametrize("padding", [0, 1])
def test_windows_of_a_file_add_whole_numbers(padding, tmp_path):
    """OpenVINO computes pools of dequantized values in integers of its own, with other results."""
    image = torch.randn(2, 3, 8, 8)
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.AvgPool2d(3, 1, padding), nn.Conv2d(4, 2, 1))
    model = tritonq.prepare_qat(net, example_inputs=image)
    model(image)
    tritonq.export_onnx(model.eval(), tmp_path / "m.onnx", image)
    graph = onnx.load(tmp_path / "m.onnx").graph
    makers = {name: node for node in graph.node for name in node.output}
    (pool,) = (node for node in graph.node if node.op_type == "AveragePool")
    before = makers[pool.input[0]]
    before = makers[before.input[0]] if before.op_type == "Pad" else before
    assert before.op_type == "Round"
