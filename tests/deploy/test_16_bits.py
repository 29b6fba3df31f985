"""Activations of 16 bits: sums that hold them, the converted model, its files, ONNX Runtime."""

import pytest
import torch
from torch import nn

import tritonq
from tritonq.functional.integer_joins import integer_matmul
from tritonq.grid import Grid
from tritonq.quantized_type import QuantizedType

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """Its second convolution adds 576 products, which int32 does not hold at 16 bits by 8."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm, self.wide = nn.Conv2d(3, 64, 3), nn.BatchNorm2d(64), nn.Conv2d(64, 16, 3)
        self.attention, self.head = nn.MultiheadAttention(16, 2, batch_first=True), nn.Linear(16, 4)

    def forward(self, x):
        x = nn.functional.hardswish(self.wide(torch.relu(self.norm(self.stem(x))))).flatten(2).transpose(1, 2)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return self.head(x.mean(1))


@pytest.fixture(scope="module", params=["a16w8", "a16w4"])
def trained(request):
    torch.manual_seed(0)
    model = Net()
    with torch.no_grad():
        model.wide.weight.uniform_(0.9, 1.0)  # every code is near the largest
    qat = tritonq.prepare_qat(model, qconfig=tritonq.get_qconfig(request.param), example_inputs=X[:2]).train()
    qat(X).square().mean().backward()
    return qat.eval()


def test_eval_the_converted_model_and_its_file_compute_the_same_bits(trained, tmp_path):
    expected = trained(X)
    int16 = tritonq.convert(trained)
    tritonq.save_converted(int16, tmp_path / "model.pt")
    assert trained.stem.activation_post_process.qtype.bits == 16
    assert torch.equal(int16(X), expected)
    assert torch.equal(tritonq.load_converted(tmp_path / "model.pt", Net())(X), expected)
    assert int16.wide.weight_scale.tolist() == trained.wide.weight_fake_quant.scale.tolist()
    assert torch.equal(torch.compile(trained, backend="eager")(X), expected)


def test_sums_beyond_int32_are_exact(trained):
    layer = tritonq.convert(trained).wide
    layer.activation_post_process = nn.Identity()
    codes = torch.randint(60_000, 2**16, (2, 64, 5, 5), generator=torch.Generator().manual_seed(1))
    centred = codes - layer.input_zero_point
    sums = nn.functional.conv2d(centred.double(), layer.centred_weight().double()).long()
    if trained.wide.weight_fake_quant.qtype.bits == 8:
        assert int(sums.min()) > 2**31
    total = (sums + layer.stored_bias.view(-1, 1, 1)).float()
    assert torch.equal(layer(centred * layer.input_scale), total * layer.multiplier.view(-1, 1, 1))


def test_files_hold_16_bits_and_onnx_runtime_runs_them(trained, tmp_path):
    path = tmp_path / "model.onnx"
    is_small = trained.wide.weight_fake_quant.qtype.bits == 4
    tritonq.export_onnx(trained, path, X[:2], pack=is_small)
    file = onnx.load(path)
    assert [entry.version for entry in file.opset_import if entry.domain == ""] == [21]
    held = {tensor.name: tensor for tensor in file.graph.initializer}
    quantized = [node for node in file.graph.node if node.op_type == "QuantizeLinear"]
    assert {held[node.input[2]].data_type for node in quantized} == {onnx.TensorProto.UINT16}
    assert held["wide.weight"].data_type == (onnx.TensorProto.INT4 if is_small else onnx.TensorProto.INT8)
    report = tritonq.verify(trained, path, X)
    assert report.agrees()
    assert report.total.fraction < 0.01
    assert "round to codes of 16 bits" in str(report)


@pytest.mark.parametrize("target", ["onnxruntime", "tensorrt"])
def test_forms_that_hold_8_bits_name_the_one_that_holds_16(trained, target, tmp_path):
    if target == "tensorrt":
        with pytest.warns(UserWarning, match="in float"):
            tritonq.export_onnx(trained, tmp_path / "model.onnx", X[:2], target=target)
        return
    with pytest.raises(ValueError, match='take at most 8 bits: export with target="qdq"'):
        tritonq.export_onnx(trained, tmp_path / "model.onnx", X[:2], target=target)


def test_programs_hold_16_bits(trained):
    program = tritonq.export_program(trained, None, X[:2], form="pt2e")
    assert tritonq.verify(trained, program, X[:2]).total.largest <= 1


def test_products_of_16_bits_may_be_longer_than_int32_holds():
    """The longest of 8 bits stays as it was: tests of matrix products say so."""
    qtype = QuantizedType.of(16, signed=False, symmetric=False)
    scale, zero = torch.tensor([2.0**-15]), torch.tensor([0], dtype=torch.int32)
    grid = Grid(scale, zero, qtype)
    output = Grid(torch.tensor([1.0]), None, QuantizedType.of(32))
    codes = torch.full((1, 64), 65535.0)
    sums = 64 * 65535**2
    found = integer_matmul(codes * scale, (codes * scale).t(), grid, grid, output)
    assert float(found) == round(torch.tensor(float(sums)).float().item() * 2.0**-30)
