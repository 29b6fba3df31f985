"""Forms of ONNX files for other readers: plain pairs, opset 17, and transposed convolutions for TensorRT."""

import json

import pytest
import torch
from torch import nn

import tritonq
from prepared_nets import quantizers
from qat_models import after_one_batch
from tritonq.deploy.onnx_opset17 import lower_opset

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.up, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.ConvTranspose2d(8, 8, 2, 2), nn.Linear(8, 4)

    def forward(self, x):
        x = nn.functional.relu6(self.stem(x))
        one, two = nn.functional.interpolate(self.up(x), scale_factor=2).chunk(2, 1)
        x = nn.functional.silu(torch.cat([two, one], 1))
        return self.head((x - x.mean((2, 3), keepdim=True)).amax((2, 3)))


def trained(preset):
    torch.manual_seed(0)
    qconfig = tritonq.get_default_qat_qconfig(preset) if preset == "fbgemm" else tritonq.get_qconfig(preset)
    return after_one_batch(Net(), X, qconfig=qconfig)


def constants(graph):
    return {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}


@pytest.mark.parametrize("preset", ["onnxruntime", "fbgemm"])
def test_plain_pairs(preset, tmp_path):
    """fbgemm's codes have seven bits, which a clamp in float stands for."""
    model = trained(preset)
    tritonq.export_onnx(model, tmp_path / "m.onnx", X[:2], target="qdq")
    graph = onnx.load(tmp_path / "m.onnx").graph
    held = constants(graph)
    readers = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    quantize = [node for node in graph.node if node.op_type == "QuantizeLinear"]
    assert len(quantize) == len(quantizers(model))
    for node in quantize:
        (reader,) = readers[node.output[0]]
        assert reader.op_type == "DequantizeLinear"
        assert [held[name].tolist() for name in reader.input[1:]] == [held[name].tolist() for name in node.input[1:]]
        assert held[node.input[2]].dtype == "uint8"
        assert held[node.input[1]] != 1
    weights = [node.input[0] for node in graph.node if node.op_type == "DequantizeLinear" and node.input[0] in held]
    assert {str(held[name].dtype) for name in weights} == {"int8", "int32"}
    report = tritonq.verify(model, tmp_path / "m.onnx", X)
    assert report.agrees(0.01, 1), report


def test_codes_that_have_no_plain_form(tmp_path):
    wide = tritonq.FakeQuantize.with_args(dtype=tritonq.QuantizedType.of(20))
    qconfig = tritonq.get_qconfig("onnxruntime")._replace(activation=wide)
    model = after_one_batch(nn.Sequential(nn.Conv2d(3, 4, 1)), X, qconfig=qconfig)
    with pytest.raises(ValueError, match=r"has the codes -524288\.\.524287; the plain form holds int8, uint8, int16"):
        tritonq.export_onnx(model, tmp_path / "m.onnx", X, target="qdq")


@pytest.mark.filterwarnings("ignore:ONNX Runtime convolves")
def test_opset_17_reads_axes_from_attributes(tmp_path):
    model = trained("onnxruntime")
    paths = {opset: tmp_path / f"{opset}.onnx" for opset in (17, 18)}
    for opset, path in paths.items():
        tritonq.export_onnx(model, path, X[:2], opset=opset)
    made = {opset: onnx.load(path) for opset, path in paths.items()}
    reductions = {o: [n for n in m.graph.node if n.op_type == "ReduceMax"] for o, m in made.items()}
    assert [len(node.input) for node in reductions[17]] == [1]
    assert [len(node.input) for node in reductions[18]] == [2]
    assert [entry.version for entry in made[17].opset_import if not entry.domain] == [17]
    report = tritonq.verify(model, paths[17], X)
    assert report.agrees(), report
    assert report.outputs.largest == tritonq.verify(model, paths[18], X).outputs.largest


def test_what_opset_17_lacks_is_refused():
    value = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [2])
    for operator, attributes in (("Mish", {}), ("Resize", {"antialias": 1, "mode": "linear"})):
        node = onnx.helper.make_node(operator, ["x"], ["y"], **attributes)
        proto = onnx.helper.make_model(onnx.helper.make_graph([node], "g", [value], [value]))
        with pytest.raises(ValueError, match=rf"opset 17 has no {operator}.*opset=18"):
            lower_opset(proto)


@pytest.mark.parametrize("per_channel", [True, False])
def test_transposed_convolutions_for_tensorrt(per_channel, tmp_path):
    """It takes one scale for a weight, as its preset trains it; a layer with one per channel is in float, and told."""
    qconfig = tritonq.get_qconfig("tensorrt")
    if per_channel:
        qconfig = qconfig._replace(target="onnxruntime")
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.ConvTranspose2d(4, 6, 2, 2))
    model = after_one_batch(net, X, qconfig=qconfig)
    assert [layer.weight_fake_quant.scale.numel() for layer in (model[0], model[2])] == [4, 6 if per_channel else 1]
    if per_channel:
        with pytest.warns(UserWarning, match=r"scale for all channels of a transposed.* in float: 2\."):
            tritonq.export_onnx(model, tmp_path / "m.onnx", X, target="tensorrt")
    else:
        tritonq.export_onnx(model, tmp_path / "m.onnx", X)
    graph = onnx.load(tmp_path / "m.onnx").graph
    held, makers = constants(graph), {name: node for node in graph.node for name in node.output}
    (node,) = [node for node in graph.node if node.op_type == "ConvTranspose"]
    if per_channel:
        assert node.input[1] in held
    else:
        dequantize = makers[node.input[1]]
        assert held[dequantize.input[1]].shape == ()
        assert [attribute.i for attribute in dequantize.attribute if attribute.name == "axis"] in ([], [0])
    assert tritonq.verify(model, tmp_path / "m.onnx", X).agrees(0.01, 1)


class Joined(nn.Module):
    """A residual whose shortcut has a convolution, one without, and a concatenation that alone reads one part."""

    def __init__(self):
        super().__init__()
        self.stem, self.a, self.b, self.side, self.head = (nn.Conv2d(c, 8, 1) for c in (3, 8, 8, 8, 16))

    def forward(self, x):
        x = torch.relu(self.stem(x))
        x = torch.relu(self.a(x) + self.side(x))
        x = torch.relu(x + self.b(x))
        return self.head(torch.cat([x, torch.nn.functional.silu(self.a(x))], 1))


def test_joins_for_tensorrt(tmp_path):
    """One summand behind a convolution is unrounded; a part of a concatenation is rounded behind it alone."""
    torch.manual_seed(0)
    qat = after_one_batch(Joined(), X, qconfig=tritonq.get_qconfig("tensorrt"))
    tritonq.export_onnx(qat, tmp_path / "m.onnx", X, opset=17)
    graph = onnx.load(tmp_path / "m.onnx").graph
    makers = {name: node for node in graph.node for name in node.output}
    additions = [[makers[name].op_type for name in node.input] for node in graph.node if node.op_type == "Add"]
    assert [sorted(kinds) for kinds in additions] == [["Conv", "DequantizeLinear"]] * 2
    assert tritonq.verify(qat, tmp_path / "m.onnx", X).agrees(0.01, 1)


def test_parts_of_a_concatenation_for_tensorrt_lie_on_its_grid(tmp_path):
    class Parts(Joined):
        def forward(self, x):
            x = torch.relu(self.stem(x))
            return self.head(torch.cat([self.a(x), torch.nn.functional.silu(self.b(x))], 1))

    torch.manual_seed(0)
    qat = after_one_batch(Parts(), X, qconfig=tritonq.get_qconfig("tensorrt"), warn=False)
    names = [name for name in quantizers(qat) if "input" not in name]
    assert names == ["stem.activation_post_process", "head.activation_post_process", "cat.activation_post_process"]
    tritonq.export_onnx(qat, tmp_path / "m.onnx", X)
    graph = onnx.load(tmp_path / "m.onnx").graph
    makers = {name: node for node in graph.node for name in node.output}
    (concatenation,) = [node for node in graph.node if node.op_type == "Concat"]
    assert [makers[name].op_type for name in concatenation.input] == ["Conv", "Mul"]
    assert tritonq.verify(qat, tmp_path / "m.onnx", X).agrees(0.01, 1)


class Difference(nn.Module):
    """A layer, a difference and an output, each of whose quantizers may have a grid per channel."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1), nn.Conv2d(4, 5, 1)

    def forward(self, x):
        return self.head(self.a(x) - self.b(x))


@pytest.mark.filterwarnings("ignore:ONNX Runtime convolves in integers only where")  # those beside such grids
@pytest.mark.parametrize("target", ["onnxruntime", "openvino", "tensorrt"])
@pytest.mark.parametrize("name", ["a", "b", "head", ""])
def test_activations_with_a_grid_per_channel_run(name, target, tmp_path):
    torch.manual_seed(0)
    qconfig = tritonq.get_qconfig(target)
    per_channel = tritonq.FakeQuantize.with_args(observer=tritonq.PerChannelMinMaxObserver, ch_axis=1)
    own = tritonq.QConfig(activation=per_channel, weight=qconfig.weight)
    mapping = tritonq.QConfigMapping().set_global(qconfig if name else own)
    for layer in ("a", "b", "head"):
        mapping = mapping.set_module_name(layer, own if layer == name else qconfig)
    model = tritonq.prepare_qat(Difference(), qconfig=mapping, example_inputs=X)
    model(X)
    path = tmp_path / "m.onnx"
    tritonq.export_onnx(model.eval(), path, X, target=target)
    # Where codes are subtracted for TensorRT, its own arithmetic decides ties.
    found = {layer.name: layer for layer in tritonq.verify(model, path, X).layers}
    assert all(layer.is_within(0.0, 0) for layer in found.values() if (layer.name, target) != ("sub", "tensorrt"))
    session = onnxruntime.InferenceSession(path)
    session.run(None, {"x": X.numpy()})
    entries = json.loads(session.get_modelmeta().custom_metadata_map["tritonq.codes"])
    grids = {entry["quantizer"]: entry["axis"] for entry in entries}
    assert grids[f"{name or 'sub'}.activation_post_process"] == 1
