"""Exported files: ONNX Runtime finds the trained codes, in integer kernels; TensorRT's form holds what it accepts."""

import json
import subprocess
import sys

import pytest
import torch
from torch import nn

import tritonq
from optimised_graph import optimised_kinds
from qat_models import PRESETS, TORCH_PRESETS, OneLayer, images, train, trained_float_form, trained_residual
from tolerances import SUMS, assert_close
from tritonq import nn as qnn
from tritonq.deploy import convert, export_onnx, verify
from tritonq.deploy.modules import DeployedModule
from tritonq.deploy.onnx_files import CODES_KEY, checked

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")

# ONNX Runtime requantizes with float32 factors that it forms in its own order: rare ties may fall the other way.
MAX_FRACTION = 0.001


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Trained model and exported file by preset and target, each made once."""
    folder, made = tmp_path_factory.mktemp("onnx"), {}

    def get(preset, target="onnxruntime"):
        if (preset, target) not in made:
            model = trained_residual(preset)
            path = folder / f"{preset}.{target}.onnx"
            export_onnx(model, path, images(1), target=target)
            made[preset, target] = model, path
        return made[preset, target]

    return get


def initialisers(path):
    return {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in onnx.load(path).graph.initializer}


def nodes(path, kind):
    return [node for node in onnx.load(path).graph.node if node.op_type == kind]


# x86 has the numbers of fbgemm.
@pytest.mark.parametrize("preset", [name for name in PRESETS if not name.startswith("x86")])
def test_onnx_runtime_finds_the_trained_codes(exported, preset):
    model, path = exported(preset)
    report = verify(model, path, images(64))
    assert [layer.name for layer in report.layers] == ["input", "stem", "depthwise", "point", "add", "pooled"]
    assert report.agrees(MAX_FRACTION, max_step=1), report
    assert report.outputs.differing_predictions == 0


@pytest.mark.parametrize("preset", ["tensorrt", "fbgemm_v0", "qnnpack_v1", "onednn_v0", "megengine_lowbit"])
def test_onnx_runtime_computes_in_integers(exported, preset):
    """Every convolution, the addition and the linear layer, whatever the code range of the preset."""
    counts = optimised_kinds(exported(preset)[1])
    assert (counts["QLinearConv"], counts["QLinearAdd"], counts["QGemm"]) == (3, 1, 1)
    assert not counts["Conv"] + counts["FusedConv"] + counts["Gemm"] + counts["Relu"]


def test_weights_are_int8_and_biases_int32_initialisers(exported):
    model, path = exported("tensorrt")
    layer, held = convert(model).stem, initialisers(path)
    assert held["stem.weight"].dtype == "int8"
    assert (held["stem.weight"] == layer.stored_weight.numpy()).all()
    assert held["stem.bias"].dtype == "int32"
    assert (held["stem.bias"] == layer.stored_bias.numpy()).all()
    assert (held["stem.multiplier"] == (layer.input_scale * layer.weight_scale).numpy()).all()
    readers = {node.input[0]: node for node in nodes(path, "DequantizeLinear")}
    assert readers["stem.weight"].attribute[0].i == 0
    assert not [name for name, values in held.items() if values.dtype == "float32" and values.ndim > 1]


def test_a_relu_becomes_the_lower_bound_of_the_codes(exported):
    _, path = exported("tensorrt")
    assert not nodes(path, "Relu")
    listed = next(entry.value for entry in onnx.load(path).metadata_props if entry.key == CODES_KEY)
    zero_points = {entry["quantizer"]: entry["zero_point"] for entry in json.loads(listed)}
    assert zero_points["stem.activation_post_process"] == 0
    assert zero_points["point.activation_post_process"] == 128


def test_the_batch_is_open_and_its_size_does_not_matter(exported):
    model, path = exported("tensorrt")
    (entry,) = onnx.load(path).graph.input
    assert entry.type.tensor_type.shape.dim[0].dim_param
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    for size in (1, 3, 17):
        x = images(size)
        (y,) = session.run(None, {entry.name: x.numpy()})
        assert_close(torch.from_numpy(y), model(x).detach(), SUMS)


def test_a_fixed_batch_on_request(tmp_path):
    path = tmp_path / "m.onnx"
    export_onnx(trained_residual(), path, images(2), dynamic_batch=False, input_names=["x"], output_names=["y"])
    graph = onnx.load(path).graph
    assert graph.input[0].type.tensor_type.shape.dim[0].dim_value == 2
    assert (graph.input[0].name, graph.output[0].name) == ("x", "y")


@pytest.mark.parametrize(("options", "opset"), [({}, 18), ({"opset": 17}, 17), ({"opset": 21}, 21)])
def test_opsets(options, opset, tmp_path):
    model, path = trained_residual(), tmp_path / "m.onnx"
    export_onnx(convert(model), path, images(2), **options)
    assert [entry.version for entry in onnx.load(path).opset_import if not entry.domain] == [opset]
    assert verify(model, path, images(8)).agrees(MAX_FRACTION, 1)


SYMMETRIC = tritonq.get_qconfig("tensorrt")
LAYERS = {
    "conv1d": (lambda q: qnn.ConvReLU1d(4, 6, 3, groups=2, qconfig=q), (4, 4, 9)),
    "conv3d": (lambda q: qnn.Conv3d(2, 3, 2, bias=False, qconfig=q), (4, 2, 4, 3, 5)),
    "reflect": (lambda q: qnn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect", qconfig=q), (4, 4, 7, 6)),
    "transposed": (lambda q: qnn.ConvTransposeBn2d(4, 6, 3, stride=2, qconfig=q), (4, 4, 5, 4)),
    "grouped transposed": (lambda q: qnn.ConvTranspose2d(4, 6, 3, groups=2, qconfig=q), (4, 4, 5, 4)),
    "linear on rows": (lambda q: qnn.LinearReLU(5, 7, qconfig=q), (4, 3, 5)),
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.filterwarnings("ignore:ONNX Runtime convolves in integers", "ignore:TensorRT takes int8 codes")
def test_other_layers_keep_their_codes(name, tmp_path):
    make, shape = LAYERS[name]
    torch.manual_seed(0)
    model = train(OneLayer(make(SYMMETRIC), SYMMETRIC), torch.randn(shape))
    # Other data than in training, whose largest value lies on a tie: 127.5 steps.
    x = torch.randn(64, *shape[1:])
    for target in ("onnxruntime", "tensorrt"):
        export_onnx(model, tmp_path / "m.onnx", x[:2], target=target)
        report = verify(model, tmp_path / "m.onnx", x)
        assert report.agrees(MAX_FRACTION, 1), (target, report)


@pytest.mark.filterwarnings("ignore:weight zero points differ")
def test_zero_points_that_differ_between_channels(tmp_path):
    """One-sided channels under torch's fused rule."""
    qconfig = TORCH_PRESETS["fbgemm_v1"]
    torch.manual_seed(0)
    layer = qnn.Conv2d(2, 4, 1, qconfig=qconfig)
    with torch.no_grad():
        layer.weight[0].abs_()
        layer.weight[1].abs_().neg_()
    x = torch.randn(16, 2, 8, 8)
    model = train(OneLayer(layer, qconfig), x, steps=1)
    assert convert(model).layer.weight_zero_point.unique().numel() > 1
    export_onnx(model, tmp_path / "m.onnx", x)
    assert verify(model, tmp_path / "m.onnx", x).agrees(MAX_FRACTION, 1)
    assert optimised_kinds(tmp_path / "m.onnx")["QLinearConv"] == 1


def test_ties_at_the_input_round_as_trained(tmp_path):
    """Inputs in units of half a code: ties everywhere, which MegEngine rounds away from zero and ONNX to even."""
    for preset in ("megengine_ema", "tensorrt"):
        model = trained_residual(preset)
        export_onnx(model, tmp_path / "m.onnx", images(2), target="onnxruntime")
        halves = torch.randint(-40, 40, (16, 3, 8, 8), generator=torch.Generator().manual_seed(0)) / 2
        x = halves * model.input.scale
        report = verify(model, tmp_path / "m.onnx", x)
        assert report.layers[0].name == "input"
        assert report.layers[0].differing == 0


def test_embeddings_are_looked_up_in_integers(tmp_path):
    class Words(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = qnn.Embedding(11, 5, qconfig=tritonq.default_embedding_qat_qconfig)
            self.join = qnn.Add(qconfig=SYMMETRIC)

        def forward(self, index):
            rows = self.table(index)
            return self.join(rows, rows)

    torch.manual_seed(0)
    index = torch.randint(0, 11, (6, 4))
    model = train(Words(), index)
    export_onnx(model, tmp_path / "m.onnx", index)
    assert initialisers(tmp_path / "m.onnx")["table.weight"].dtype == "uint8"
    assert verify(model, tmp_path / "m.onnx", index).agrees(0.01, 1)


@pytest.mark.parametrize("target", ["onnxruntime", "qdq"])
def test_rows_of_embeddings_have_at_most_their_norm(target, tmp_path):
    torch.manual_seed(0)
    some, every = torch.randint(0, 6, (6, 4)), torch.arange(12).view(3, 4) % 11
    model = nn.Sequential(nn.Embedding(11, 5, max_norm=1.0), nn.Linear(5, 3))
    model = train(tritonq.prepare_qat(model, example_inputs=some), some)
    assert float(convert(model)[0].weight.norm(dim=1).max()) > 1.5
    export_onnx(model, tmp_path / "m.onnx", some, target=target)
    assert verify(model, tmp_path / "m.onnx", every).layers[0].differing == 0


class Bags(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.table, self.head = nn.EmbeddingBag(11, 5, **options), nn.Linear(5, 3)

    def forward(self, index, factors=None):
        return self.head(self.table(index, per_sample_weights=factors))


BAGS = [{}, {"mode": "max"}, {"mode": "sum"}, {"max_norm": 0.5}, {"padding_idx": 0}, {"mode": "max", "padding_idx": 3}]


@pytest.mark.parametrize("options", BAGS, ids=str)
def test_bags_of_embeddings(options, tmp_path):
    torch.manual_seed(0)
    index = torch.randint(0, 11, (6, 4))
    inputs = (index, torch.rand(6, 4)) if options == {"mode": "sum"} else (index,)
    model = train(tritonq.prepare_qat(Bags(**options), example_inputs=inputs), *inputs)
    export_onnx(model, tmp_path / "m.onnx", inputs)
    assert verify(model, tmp_path / "m.onnx", [inputs]).agrees()


def test_what_is_no_valid_onnx_is_refused_in_one_line():
    reads_nothing = onnx.helper.make_node("Neg", ["x"], ["y"])
    result = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1])
    proto = onnx.helper.make_model(onnx.helper.make_graph([reads_nothing], "main", [], [result]))
    with pytest.raises(ValueError, match=r"the file of this model would be no valid ONNX: Nodes in a graph .*[^\n]$"):
        checked(proto)


def test_tensorrt_files_hold_float_weights_between_q_and_dq(exported):
    model, path = exported("tensorrt", "tensorrt")
    held = initialisers(path)
    layer = convert(model).stem
    assert held["stem.weight"].dtype == held["stem.bias"].dtype == "float32"
    assert (held["stem.weight"] == layer.dequantized_weight(torch.float32).numpy()).all()
    zero_points = [held[node.input[2]] for kind in ("QuantizeLinear", "DequantizeLinear") for node in nodes(path, kind)]
    assert zero_points
    assert all(values.dtype == "int8" and not values.any() for values in zero_points)
    producers = {node.output[0]: node for node in onnx.load(path).graph.node}

    def is_quantized(name):
        if producers[name].op_type == "Reshape":
            name = producers[name].input[0]
        dequantize = producers[name]
        return (dequantize.op_type, producers[dequantize.input[0]].op_type) == ("DequantizeLinear", "QuantizeLinear")

    layers = [*nodes(path, "Conv"), *nodes(path, "Gemm")]
    assert len(layers) == 4
    for node in layers:
        assert all(is_quantized(name) for name in node.input[:2])
        assert node.input[2] in held
    (join,) = nodes(path, "Add")
    assert all(is_quantized(name) for name in join.input)
    assert verify(model, path, images(32)).agrees(0.005, 1)


@pytest.mark.parametrize("preset", ["megengine_min_max", "megengine_lowbit"])
def test_tensorrt_takes_every_symmetric_preset(exported, preset):
    model, path = exported(preset, "tensorrt")
    assert verify(model, path, images(32)).agrees(0.005, 1)


@pytest.mark.parametrize("preset", ["fbgemm_v0", "qnnpack_v1", "onnxruntime"])
def test_tensorrt_runs_in_float_what_its_integers_cannot_hold(exported, preset):
    with pytest.warns(UserWarning, match=r"zero points of 0 alone.*it will run in float: stem[,.].*tensorrt"):
        model, path = exported(preset, "tensorrt")
    # Behind a ReLU the seven bits of fbgemm fit.
    assert bool(nodes(path, "QuantizeLinear")) == (preset == "fbgemm_v0")
    assert verify(model, path, images(32)).agrees(0.005, 1)


def test_codes_wider_than_eight_bits(tmp_path):
    qtype = tritonq.QuantizedType.of(12)
    qconfig = tritonq.QConfig(tritonq.FakeQuantize.with_args(dtype=qtype), SYMMETRIC.weight)
    model = train(OneLayer(qnn.Conv2d(3, 4, 1, qconfig=qconfig), qconfig), images(4))
    with pytest.raises(ValueError, match=r"'input' has the codes -2048\.\.2047.*at most 8 bits"):
        export_onnx(model, tmp_path / "m.onnx", images(2))
    with pytest.warns(UserWarning, match="it will run in float: layer"):
        export_onnx(model, tmp_path / "m.onnx", images(2), target="tensorrt")
    assert verify(model, tmp_path / "m.onnx", images(32)).agrees(0.005, 1)


@pytest.mark.parametrize(("target", "form"), [("openvino", "onnxruntime"), ("xnnpack", "qdq")])
def test_an_engine_is_written_in_its_form(target, form, tmp_path):
    model = trained_residual()
    for name in (target, form):
        export_onnx(model, tmp_path / f"{name}.onnx", images(2), target=name)
    assert (tmp_path / f"{target}.onnx").read_bytes() == (tmp_path / f"{form}.onnx").read_bytes()


def test_wrong_arguments(tmp_path):
    model, path = trained_residual(), tmp_path / "m.onnx"
    with pytest.raises(ValueError, match="unknown target 'tpu'; known: onnxruntime, tensorrt, qdq, openvino, qnn"):
        export_onnx(model, path, images(2), target="tpu")
    for names in ({"input_names": ["a", "b"]}, {"input_names": "x"}, {"output_names": []}):
        with pytest.raises(ValueError, match="put_names must be a sequence of 1 names"):
            export_onnx(trained_residual(), tmp_path / "m.onnx", images(2), **names)
    with pytest.raises(ValueError, match="opset must be at least 17, got 13"):
        export_onnx(model, path, images(2), opset=13)
    with pytest.raises(ValueError, match="no quantization-aware layer"):
        export_onnx(nn.Sequential(nn.Conv2d(3, 4, 1)), path, images(2))
    with pytest.raises(ValueError, match="can't be exported"):
        export_onnx(model, path, torch.randn(2, 5, 8, 8))
    assert not list(tmp_path.iterdir())


def test_deployed_modules_without_a_form_in_onnx_are_refused(tmp_path):
    class Other(DeployedModule):
        pass

    with pytest.raises(ValueError, match="Other '1' has no form in ONNX"):
        export_onnx(nn.Sequential(convert(trained_residual()), Other()), tmp_path / "m.onnx", images(2))


def test_named_inputs(tmp_path):
    model, path = trained_float_form(), tmp_path / "m.onnx"
    export_onnx(model, path, {"x": images(2)})
    assert verify(model, path, [{"x": images(8)}]).agrees(MAX_FRACTION, 1)


def test_the_model_is_left_alone(tmp_path):
    model = trained_residual().train()
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    export_onnx(model, tmp_path / "m.onnx", images(2))
    assert model.training
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())


def test_without_the_extra_the_error_names_it():
    code = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("onnx", "onnxscript", "onnxruntime"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Block())
import torch, tritonq
from tritonq.deploy import export_onnx
layer = tritonq.nn.Conv2d(3, 4, 1, qconfig=tritonq.get_qconfig("tensorrt"))
layer(torch.randn(2, 3, 4, 4))
calls = lambda: export_onnx(layer, "m.onnx", torch.randn(2, 3, 4, 4)), lambda: tritonq.verify(layer, "m.onnx", [])
for call in calls:
    try:
        call()
    except ImportError as error:
        assert "tritonq[onnx]" in str(error), error
    else:
        raise AssertionError("the missing packages were not reported")
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)
    assert result.returncode == 0, result.stderr
