"""Float formats in deployment: codes, the converted model, its files, ONNX Runtime."""

import pytest
import torch
from torch import nn

import tritonq
from tritonq.deploy.float_quantizer import FloatQuantizer
from tritonq.formats import FLOAT_FORMATS
from tritonq.functional.fake_quant import fake_quantize
from tritonq.grid import Grid
from tritonq.qparams import QuantizedType
from tritonq.reference.float_rounding import codes_of_floats, floats_of_codes

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.norm, self.body = nn.Conv2d(3, 32, 3), nn.BatchNorm2d(32), nn.Conv2d(32, 32, 3, padding=1)
        self.head = nn.Linear(32, 4)

    def forward(self, x):
        x = torch.relu(self.norm(self.stem(x)))
        x = torch.relu(self.body(x) + x)
        return self.head(nn.functional.silu(x).mean((2, 3)))


def prepared(qconfig):
    torch.manual_seed(0)
    qat = tritonq.prepare_qat(Net(), qconfig=qconfig, example_inputs=X[:2]).train()
    qat(X).square().mean().backward()
    return qat.eval()


def preset(format="fp8_e4m3", **options):
    quantizer = tritonq.FloatFakeQuantize.with_args(format=format)
    return tritonq.QConfig(quantizer, quantizer.with_args(ch_axis=0, history=1), **options)


@pytest.mark.parametrize("name", FLOAT_FORMATS)
def test_every_code_is_one_number(name):
    number = FLOAT_FORMATS[name]
    codes = torch.arange(-number.largest_code, number.largest_code + 1, dtype=torch.int8)
    values = floats_of_codes(codes, number)
    assert bool((values.diff() > 0).all())
    assert torch.equal(codes_of_floats(values, number), codes)
    grid = Grid(torch.ones(1), None, QuantizedType.of_floats(name))
    assert torch.equal(fake_quantize(values, grid), values)
    if name in ("e4m3", "e5m2"):
        dtype = torch.float8_e4m3fn if name == "e4m3" else torch.float8_e5m2
        positive = torch.arange(number.largest_code + 1, dtype=torch.uint8).view(dtype).float()
        assert torch.equal(values[number.largest_code :], positive)


@pytest.mark.parametrize("format", ["fp8_e4m3", "fp8_e5m2", "fp6_e2m3", "fp4_e2m1"])
@pytest.mark.parametrize("folding", [None, "scale"])
def test_what_was_trained_is_what_is_deployed(format, folding, tmp_path):
    qat = prepared(preset(format, folding=folding))
    expected = qat(X)
    converted = tritonq.convert(qat)
    assert torch.equal(converted(X), expected)
    assert converted.stem.stored_weight.dtype == torch.int8
    assert type(converted.stem.activation_post_process) is FloatQuantizer
    tritonq.save_converted(converted, tmp_path / "model.pt")
    assert torch.equal(tritonq.load_converted(tmp_path / "model.pt", Net())(X), expected)
    assert tritonq.verify(qat, converted, X).agrees()
    assert f"{format.split('_')[1]} per channel" in str(tritonq.summary(converted))


@pytest.mark.parametrize("target", ["onnxruntime", "qdq", "tensorrt"])
@pytest.mark.parametrize("format", ["fp8_e4m3", "fp8_e5m2"])
def test_files_hold_eight_bit_floats(format, target, tmp_path):
    qat, path = prepared(preset(format)), tmp_path / "model.onnx"
    tritonq.export_onnx(qat, path, X[:2], target=target)
    file = onnx.load(path)
    assert [entry.version for entry in file.opset_import if entry.domain == ""] == [19]
    held = {tensor.name: tensor.data_type for tensor in file.graph.initializer}
    kind = onnx.TensorProto.FLOAT8E4M3FN if format == "fp8_e4m3" else onnx.TensorProto.FLOAT8E5M2
    assert {held[f"{name}.weight"] for name in ("stem", "body", "head")} == {kind}
    report = tritonq.verify(qat, path, X)
    assert report.agrees()
    assert len(report.layers) == sum(type(module) is FloatQuantizer for module in tritonq.convert(qat).modules())
    # Another model's codes are told, layer by layer.
    with torch.no_grad():
        qat.body.weight.mul_(-1)
    changed = tritonq.verify(qat, path, X)
    assert changed.first_beyond().name == "body"
    assert next(layer for layer in changed.layers if layer.name == "stem").largest <= 1


@pytest.mark.parametrize("ch_axis", [None, 1])
def test_onnx_runtime_moves_floats(ch_axis, tmp_path):
    """It has no MaxPool, Reshape, Unsqueeze or Slice of eight-bit floats, and moves DequantizeLinear behind these."""

    class Moves(Net):
        def forward(self, x):
            x = nn.functional.max_pool2d(torch.relu(self.stem(x)), 2).permute(0, 1, 3, 2)
            x = self.body(x.unsqueeze(1).squeeze(1)[:, :, 1:])
            return self.head(x.mean((2, 3), keepdim=True).flatten(1))

    make = tritonq.FloatFakeQuantize.with_args(format="fp8_e4m3")
    qconfig = tritonq.QConfig(make.with_args(ch_axis=ch_axis), make.with_args(ch_axis=0, history=1))
    qat = tritonq.prepare_qat(Moves(), qconfig=qconfig, example_inputs=X[:2]).train()
    qat(X), qat.eval()
    tritonq.export_onnx(qat, tmp_path / "model.onnx", X[:2])
    assert tritonq.verify(qat, tmp_path / "model.onnx", X).agrees()


def test_formats_without_operators_are_refused(tmp_path):
    qat = prepared(preset("fp4_e2m1"))
    with pytest.raises(ValueError, match="rounds to e2m1, for which ONNX Runtime has no Q/DQ; known: e4m3, e5m2"):
        tritonq.export_onnx(qat, tmp_path / "model.onnx", X[:2])
    with pytest.raises(ValueError, match=r"FloatQuantizer 'stem.activation_post_process' has no form in a program"):
        tritonq.export_program(qat, None, X[:2], form="pt2e")
    weights = tritonq.get_qconfig()._replace(weight=preset().weight)
    with pytest.raises(ValueError, match="weight of 'stem' is rounded to floats, and the form of PT2E holds integers"):
        tritonq.export_program(prepared(weights), None, X[:2], form="pt2e")


def test_integer_quantizers_of_float_codes_deploy_too():
    """A FakeQuantize over ranges may have float codes; joins beside it compute in float."""
    make = tritonq.FakeQuantize.with_args(observer=tritonq.MovingAverageMinMaxObserver)
    qtype = QuantizedType.of_floats("e4m3")
    qat = prepared(tritonq.QConfig(make.with_args(dtype=qtype), make.with_args(dtype=qtype)))
    assert torch.equal(tritonq.convert(qat)(X), qat(X))


class Tables(nn.Module):
    def __init__(self):
        super().__init__()
        self.words, self.bags, self.head = nn.Embedding(10, 4), nn.EmbeddingBag(10, 4), nn.Linear(8, 2)

    def forward(self, index):
        return self.head(torch.cat([self.words(index).mean(1), self.bags(index)], 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tables_hold_numbers_of_the_format(dtype):
    index = torch.arange(10).view(2, 5)
    model = tritonq.prepare_qat(Tables().to(dtype), qconfig=preset(), example_inputs=index).train()
    for _ in range(2):
        assert model(index).dtype == dtype
    model.float().eval()
    assert float(model.words.weight_fake_quant.scale.std()) > 0
    assert torch.equal(tritonq.convert(model)(index), model(index))
