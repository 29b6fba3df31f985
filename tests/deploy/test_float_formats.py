"""Float formats in deployment: codes, the converted model, its files, ONNX Runtime."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

import tritonq
from tritonq.deploy.float_quantizer import FloatQuantizer
from tritonq.deploy.onnx_packed import pack_weights
from tritonq.formats import FLOAT_FORMATS
from tritonq.functional.fake_quant import fake_quantize
from tritonq.grid import Grid
from tritonq.quantized_type import QuantizedType
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


class Blocks(nn.Module):
    """Layers whose input channels blocks divide, of every kind, and one that they don't."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 32, 3), nn.BatchNorm2d(32)
        self.grouped, self.up = nn.Conv2d(32, 64, 3), nn.ConvTranspose2d(64, 32, 2)
        self.lstm, self.head = nn.LSTM(32, 32), nn.Linear(32, 4)

    def forward(self, x):
        x = self.up(self.grouped(torch.relu(self.norm(self.stem(x)))))
        return self.head(self.lstm(x.flatten(2).permute(2, 0, 1))[0])


@pytest.fixture(scope="module", params=["w_mxfp8", "w_mxfp4", "w_nvfp4", "w_mxfp4 on 8 bits"])
def trained_blocks(request):
    torch.manual_seed(0)
    name, *rest = request.param.split(" ")
    mapping = tritonq.get_qconfig_mapping(name)
    if rest:
        qconfig = tritonq.get_qconfig(name)._replace(activation=tritonq.get_qconfig().activation)
        mapping = tritonq.QConfigMapping().set_global(qconfig).set_first_layer(tritonq.get_qconfig())
    qat = tritonq.prepare_qat(Blocks(), qconfig=mapping, example_inputs=X[:2]).train()
    with torch.no_grad():
        qat.head.weight[:2].zero_()  # blocks of zeros
        qat.head.weight[2, :16] *= 1e-30
    qat(X).square().mean().backward()
    return name, qat.eval()


def test_blocks_of_weights_are_deployed_with_equal_bits(trained_blocks, tmp_path):
    name, qat = trained_blocks
    expected, converted = qat(X), tritonq.convert(qat)
    assert torch.equal(converted(X), expected)
    size = 16 if name == "w_nvfp4" else 32
    assert converted.grouped.weight_scale.shape == (64, 32 // size, 3, 3)
    assert converted.grouped.stored_weight.dtype == torch.int8
    assert torch.equal(
        converted.grouped.dequantized_weight(torch.float32), qat.grouped.quantized_weight(qat.grouped.weight)
    )
    tritonq.save_converted(converted, tmp_path / "model.pt")
    assert torch.equal(tritonq.load_converted(tmp_path / "model.pt", Blocks())(X), expected)


@pytest.mark.filterwarnings("ignore:ONNX Runtime convolves in integers only")
@pytest.mark.parametrize("pack", [False, True])
def test_files_hold_blocks_of_weights(trained_blocks, pack, tmp_path):
    from onnx.reference import ReferenceEvaluator

    name, qat = trained_blocks
    tritonq.export_onnx(qat, tmp_path / "model.onnx", X, pack=pack)
    file = onnx.load(tmp_path / "model.onnx")
    kinds = {tensor.data_type for tensor in file.graph.initializer}
    is_packed = pack and name != "w_mxfp8"
    wanted = onnx.TensorProto.FLOAT4E2M1 if is_packed else onnx.TensorProto.FLOAT8E4M3FN
    other = onnx.TensorProto.FLOAT8E4M3FN if is_packed else onnx.TensorProto.FLOAT4E2M1
    assert wanted in kinds
    assert other not in kinds
    assert next(entry.version for entry in file.opset_import if entry.domain == "") == (23 if is_packed else 21)
    assert tritonq.verify(qat, tmp_path / "model.onnx", X).agrees()
    if is_packed:
        reads = [node for node in file.graph.node if node.op_type == "DequantizeLinear"]
        codes = {tensor.name: tensor for tensor in file.graph.initializer if tensor.data_type == wanted}
        node = next(node for node in reads if node.input[0] in codes and codes[node.input[0]].dims[:2] == [64, 32])
        graph = onnx.helper.make_graph(
            [node],
            "weight",
            [],
            [onnx.helper.make_tensor_value_info(node.output[0], onnx.TensorProto.FLOAT, None)],
            [tensor for tensor in file.graph.initializer if tensor.name in node.input],
        )
        opsets = [onnx.helper.make_opsetid("", 23)]
        values = ReferenceEvaluator(onnx.helper.make_model(graph, opset_imports=opsets, ir_version=11)).run(None, {})[0]
        weight = tritonq.convert(qat).grouped.dequantized_weight(torch.float32)
        assert torch.equal(torch.from_numpy(values), weight)


def test_an_onnx_without_floats_of_four_bits_is_told(monkeypatch):
    kinds = {name: number for name, number in onnx.TensorProto.DataType.items() if name != "FLOAT4E2M1"}
    weight = onnx.helper.make_tensor("weight", onnx.TensorProto.FLOAT8E4M3FN, [2], [0.5, 6.0])
    weight = onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(weight), "weight")
    read = onnx.helper.make_node("DequantizeLinear", ["weight", "scale"], ["y"])
    proto = onnx.helper.make_model(onnx.helper.make_graph([read], "weight", [], [], [weight]))
    monkeypatch.setattr(onnx, "TensorProto", SimpleNamespace(**kinds))
    with pytest.raises(ValueError, match="has no FLOAT4E2M1, which pack=True needs for 'weight'"):
        pack_weights(proto)


def test_blocks_need_weights_that_are_folded_before_they_are_rounded():
    qconfig = tritonq.get_qconfig("w_mxfp4")._replace(folding="scale")
    x = torch.randn(2, 32)
    linear = tritonq.prepare_qat(nn.Sequential(nn.Linear(32, 4)), qconfig=qconfig, example_inputs=x).eval()
    assert torch.equal(tritonq.convert(linear)(x), linear(x))
    model = nn.Sequential(nn.Conv2d(32, 4, 3), nn.BatchNorm2d(4))
    qat = tritonq.prepare_qat(model, qconfig=qconfig, example_inputs=torch.randn(2, 32, 5, 5))
    with pytest.raises(ValueError, match='mxfp4 has no deployed form with folding="scale"'):
        tritonq.convert(qat.eval())


def test_blocks_that_divide_no_channels_are_told():
    qconfig = tritonq.get_qconfig("w_mxfp4")
    qat = tritonq.prepare_qat(nn.Sequential(nn.Conv2d(3, 4, 3)), qconfig=qconfig, example_inputs=X)
    with pytest.raises(
        ValueError, match="'0' can't be converted: mxfp4 has a deployed form where its blocks of 32 divide"
    ):
        tritonq.convert(qat.eval())
