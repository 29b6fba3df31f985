"""DoReFa, binary and ternary weights: each paper's formula and gradient in float64, then training and deployment."""

import numpy as np
import pytest
import torch
from torch import nn

import tritonq
from tolerances import FLOAT32, assert_close
from tritonq.paper_schemes import BinaryWeight, DoReFaActivation, DoReFaWeight, TernaryWeight

SCHEMES = {"dorefa1": lambda: DoReFaWeight(1), "dorefa3": lambda: DoReFaWeight(3), "xnor": BinaryWeight}
SCHEMES |= {"twn": TernaryWeight, "twn per channel": lambda: TernaryWeight(ch_axis=0)}
X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def drawn(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def results(quantizer, weight, upstream):
    weight = weight.clone().requires_grad_()
    y = quantizer(weight)
    y.backward(upstream)
    return y.detach(), weight.grad


@pytest.mark.parametrize("bits", [1, 2, 4, 7])
def test_dorefa(bits):
    weight, upstream, n = drawn(6, 3, 2, 2), drawn(6, 3, 2, 2).flip(0), 2**bits - 1
    y, gradient = results(DoReFaWeight(bits), weight, upstream)
    if bits == 1:
        torch.testing.assert_close(y, weight.sign() * weight.abs().mean())
        torch.testing.assert_close(gradient, upstream)
        return
    largest = torch.tanh(weight).abs().max()
    share = torch.tanh(weight) / (2 * largest) + 0.5
    torch.testing.assert_close(y, 2 * ((n * share).round() / n) - 1)
    free = weight.clone().requires_grad_()
    (2 * (torch.tanh(free) / (2 * torch.tanh(free).abs().max()) + 0.5) - 1).backward(upstream)
    torch.testing.assert_close(gradient, free.grad)


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_dorefa_activations(bits):
    x, n = torch.linspace(-0.513, 1.511, 83, dtype=torch.float64).requires_grad_(), 2**bits - 1
    y = DoReFaActivation(bits)(x)
    assert_close(y.detach(), (n * x.detach().clamp(0, 1)).round() / n, FLOAT32)
    y.sum().backward()
    assert torch.equal(x.grad, ((x >= 0) & (x <= 1)).double())


@pytest.mark.parametrize("name", ["dorefa_w1a2", "dorefa_w4a4", "bwn_w1a8", "twn_w2a8"])
def test_presets(name, tmp_path):
    torch.manual_seed(0)
    qconfig = tritonq.get_qconfig_mapping(name)
    qat = tritonq.prepare_qat(Net(), qconfig=qconfig, example_inputs=X).train()
    qat(X).square().mean().backward()
    assert [layer.weight_fake_quant.qtype.bits for layer in (qat.stem, qat.head)] == [8, 8]
    qat.eval()
    assert torch.equal(tritonq.convert(qat)(X), qat(X))
    tritonq.save_qconfig_mapping(qconfig, tmp_path / "q.json")
    assert tritonq.load_qconfig_mapping(tmp_path / "q.json") == qconfig


def test_binary_weights_of_xnor_net():
    weight, upstream = drawn(5, 4, 3), drawn(5, 4, 3).flip(0)
    y, gradient = results(BinaryWeight(), weight, upstream)
    for row in range(5):
        mean = weight[row].abs().mean()
        torch.testing.assert_close(y[row], mean * weight[row].sign())
        torch.testing.assert_close(gradient[row], upstream[row] * (1 / 12 + mean * (weight[row].abs() < 1)))


@pytest.mark.parametrize("ch_axis", [None, 0])
def test_ternary_weights(ch_axis):
    weight, upstream = drawn(5, 4, 3), drawn(5, 4, 3).flip(0)
    y, gradient = results(TernaryWeight(ch_axis), weight, upstream)
    assert torch.equal(gradient, upstream)
    for rows, values in [(weight, y)] if ch_axis is None else zip(weight, y, strict=True):
        large = rows.abs() > 0.7 * rows.abs().mean()
        expected = torch.where(large, rows[large].abs().mean() * rows.sign(), 0)
        torch.testing.assert_close(values, expected)
    assert torch.equal(TernaryWeight(ch_axis)(torch.zeros(2, 3)), torch.zeros(2, 3))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.norm, self.body = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        return self.head(torch.relu(self.body(torch.relu(self.norm(self.stem(x))))).mean((2, 3)))


@pytest.mark.parametrize("folding", ["scale", "approximate"])
@pytest.mark.parametrize("name", SCHEMES)
def test_what_was_trained_is_what_is_deployed(name, folding, tmp_path):
    torch.manual_seed(0)
    qconfig = tritonq.QConfig(tritonq.get_qconfig().activation, SCHEMES[name], "onnxruntime", folding=folding)
    qat = tritonq.prepare_qat(Net(), qconfig=qconfig, example_inputs=X).train()
    optimizer = torch.optim.SGD(qat.parameters(), 0.1)
    for _ in range(3):
        optimizer.zero_grad()
        qat(X).square().mean().backward()
        optimizer.step()
    qat.eval()
    converted = tritonq.convert(qat)
    assert torch.equal(converted(X), qat(X))
    assert len(converted.body.stored_weight.unique()) <= {"dorefa3": 8, "twn": 3, "twn per channel": 3}.get(name, 2)
    tritonq.save_converted(converted, tmp_path / "model.pt")
    assert torch.equal(tritonq.load_converted(tmp_path / "model.pt", Net())(X), qat(X))
    fresh = tritonq.prepare_qat(Net(), qconfig=qconfig, example_inputs=X).eval()
    fresh.load_state_dict(qat.state_dict())
    assert torch.equal(fresh(X), qat(X))
    if folding == "scale":
        tritonq.export_onnx(converted, tmp_path / "model.onnx", X)
        assert tritonq.verify(qat, tmp_path / "model.onnx", X).agrees()


@pytest.mark.parametrize("name", SCHEMES)
def test_compiled_steps(name):
    quantizer, weight = SCHEMES[name](), torch.randn(4, 6, generator=torch.Generator().manual_seed(2))
    quantizer(weight)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(quantizer, backend="aot_eager", fullgraph=True)(weight), quantizer(weight))


def test_mistakes():
    with pytest.raises(ValueError, match="DoReFa weights have 1 to 7 bits, got 8"):
        DoReFaWeight(8)
    with pytest.raises(ValueError, match=r"per tensor \(ch_axis=None\) or per out channel \(0\), got 1"):
        TernaryWeight(ch_axis=1)
    with pytest.raises(TypeError, match=r"weight must be float32, .* got torch\.int32"):
        TernaryWeight()(torch.ones(2, 2, dtype=torch.int32))
    with pytest.raises(ValueError, match="along its first axis"):
        TernaryWeight()(torch.tensor(1.0))


@pytest.mark.parametrize("make", [lambda: DoReFaWeight(1), lambda: DoReFaWeight(2), BinaryWeight, TernaryWeight])
def test_a_weight_without_values_leaves_the_scale_alone(make):
    quantizer = make()
    quantizer(torch.randn(3, 4))
    before = quantizer.scale.clone()
    assert quantizer(torch.zeros(3, 0)).shape == (3, 0)
    assert torch.equal(quantizer.scale, before)


def test_bits_are_a_whole_number():
    assert DoReFaWeight(np.int64(2)).bits == 2
    for bits in (True, 2.0):
        with pytest.raises(ValueError, match="DoReFa weights have 1 to 7 bits"):
            DoReFaWeight(bits)


def test_a_weight_of_another_length_has_no_scale_yet():
    scheme = BinaryWeight()
    scheme(torch.randn(3, 4))
    weight = torch.randn(5, 4)
    assert torch.equal(scheme.eval()(weight), weight)
    assert not scheme.has_qparams()
