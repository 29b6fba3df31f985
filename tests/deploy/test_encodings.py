"""AIMET's encodings: each names a tensor of the float file, and rounding to them gives the converted model."""

import json
from dataclasses import replace

import pytest
import torch
from torch import nn

import tritonq
from qat_models import after_one_batch
from tolerances import FLOAT32, assert_close
from tritonq.deploy.encodings import encodings_json
from tritonq.deploy.encodings_form import Encoding, encodings_form, take_marks
from tritonq.deploy.quantizer import Quantizer
from tritonq.nn import UnaryLayer

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")
X = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.bn, self.side = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 1)
        self.up, self.head = nn.ConvTranspose2d(8, 8, 2, 2, bias=False), nn.Linear(8, 4)

    def forward(self, x):
        x = nn.functional.max_pool2d(torch.relu(self.bn(self.stem(x))), 2)
        x = self.up(x + self.side(x))
        one, two = torch.cat([x, x], 1).chunk(2, 1)
        return self.head((one * two).mean((2, 3)).view(2, -1, 8))


def trained(net, qconfig=None):
    torch.manual_seed(0)
    return after_one_batch(net(), X, qconfig=qconfig or tritonq.get_qconfig("qnn"))


def rounded(path, encodings):
    """Return the file's outputs with every tensor of the newer encodings rounded to them."""
    model = onnx.load(path)
    graph = model.graph
    held = {tensor.name: tensor for tensor in graph.initializer}
    renamed, nodes = {}, {"": []}
    for entry in encodings["encodings"]:
        name, kind = entry["name"], onnx.numpy_helper.to_array
        bits, axis = entry["output_dtype"].removeprefix("u").removeprefix("int"), entry.get("axis", 0)
        low = 0 if entry["output_dtype"][0] == "u" else -(2 ** (int(bits) - 1))
        scale, zero = torch.tensor(entry["y_scale"]), torch.tensor(entry.get("y_zero_point", 0))
        if name in held:
            shape = [-1 if i == axis else 1 for i in range(len(held[name].dims))] if scale.dim() else ()
            scale, zero = scale.view(shape), zero.view(shape) if zero.dim() else zero
            values = torch.tensor(kind(held[name]))
            codes = (values.double() / scale.double()).round() + zero
            assert codes.min() >= low
            assert codes.max() < low + 2 ** int(bits)
            assert_close(((codes - zero) * scale).float(), values, FLOAT32, size=0)
            continue
        pair = f"{name}.rounded"
        graph.initializer.append(onnx.numpy_helper.from_array(scale.numpy(), f"{name}.scale"))
        graph.initializer.append(onnx.numpy_helper.from_array(zero.to(torch.uint8).numpy(), f"{name}.zero"))
        grid = [f"{name}.scale", f"{name}.zero"]
        quantize = onnx.helper.make_node("QuantizeLinear", [name, *grid], [f"{name}.codes"])
        nodes[name] = [quantize, onnx.helper.make_node("DequantizeLinear", [f"{name}.codes", *grid], [pair])]
        renamed[name] = pair
    ordered = [node for name in renamed if name in {value.name for value in graph.input} for node in nodes[name]]
    for node in graph.node:
        for index, name in enumerate(node.input):
            node.input[index] = renamed.get(name, name)
        ordered += [node, *(new for name in node.output for new in nodes.get(name, []))]
    for output in graph.output:
        output.name = renamed.get(output.name, output.name)
    del graph.node[:]
    graph.node.extend(ordered)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return torch.tensor(session.run(None, {graph.input[0].name: X.numpy()})[0])


def test_rounding_to_the_encodings_gives_the_converted_model(tmp_path):
    model = trained(Net)
    encodings = tritonq.export_encodings(model, tmp_path / "m.onnx", X, version="2.0.0")
    assert json.loads((tmp_path / "m.encodings").read_text()) == encodings
    graph = onnx.load(tmp_path / "m.onnx").graph
    tensors = {name for node in graph.node for name in (*node.input, *node.output)}
    entries = {entry["name"]: entry for entry in encodings["encodings"]}
    assert set(entries) <= tensors
    kinds = {node.op_type for node in graph.node}
    assert kinds == {"Conv", "Relu", "MaxPool", "Add", "ConvTranspose", "Concat", "Split", "Mul", "Gemm", "Reshape"} | (
        {"GlobalAveragePool"}
    )
    # Every result but the convolution's before its ReLU.
    results = {name: node for node in graph.node for name in node.output}
    assert {results[name].op_type for name in results if name not in entries} == {"Conv"}
    assert sum(name not in entries for name in results) == 1
    weights = {name: entries[name] for name in entries if name.endswith("weight")}
    assert {name: (e["output_dtype"], e["axis"]) for name, e in weights.items()} == {
        "stem.weight": ("int8", 0), "side.weight": ("int8", 0), "up.weight": ("int8", 1), "head.weight": ("int8", 0)
    }  # fmt: skip
    assert {entries[name]["output_dtype"] for name in entries if name.endswith("bias")} == {"int32"}
    int8 = tritonq.convert(model)
    step = float(int8.head.activation_post_process.scale)
    assert (rounded(tmp_path / "m.onnx", encodings) - int8(X)).abs().max() <= 1.001 * step


@pytest.mark.parametrize(
    ("qtype", "zero", "is_parameter", "older", "newer"),
    [
        # (bw, is_sym, offset), then (output_dtype, y_zero_point)
        (tritonq.QuantizedType.of(8, signed=False, symmetric=False), 3, False, (8, False, -3), ("uint8", 3)),
        (tritonq.QuantizedType.of(8, narrow=True), 0, False, (8, True, -128), ("uint8", 128)),
        (tritonq.QuantizedType.of(8, narrow=True), 0, True, (8, True, -128), ("int8", None)),
        (tritonq.QuantizedType.of(8), 5, True, (8, False, -133), ("int8", 5)),
        (tritonq.QuantizedType.of(8, signed=False), 128, False, (8, True, -128), ("uint8", 128)),
        (tritonq.QuantizedType(0, 127, symmetric=False), 60, False, (7, False, -60), ("uint7", 60)),
        (tritonq.QuantizedType.of(16, symmetric=False), -7, False, (16, False, 7 - 2**15), ("uint16", 2**15 - 7)),
        (tritonq.QuantizedType.of(4), 0, True, (4, True, -8), ("int4", None)),
    ],
)
def test_entries_of_both_versions(qtype, zero, is_parameter, older, newer):
    """Older: ``value = (code + offset) * scale`` with unsigned codes; newer: ``(code - y_zero_point) * y_scale``."""
    found = {"t": Encoding((0.5,), (zero,), qtype), "c": Encoding((0.5, 0.25), (zero, zero), replace(qtype, axis=1))}
    names = {"t", "c"} if is_parameter else set()
    first = encodings_json(found, names, "1.0.0")
    assert first["version"] == "1.0.0"
    entry, channels = first["param_encodings" if is_parameter else "activation_encodings"]
    bits, is_symmetric, offset = older
    assert entry == {
        **{"name": "t", "dtype": "INT", "enc_type": "PER_TENSOR", "bw": bits, "is_sym": is_symmetric},
        **{"scale": [0.5], "offset": [offset]},
    }
    assert (channels["enc_type"], channels["scale"]) == ("PER_CHANNEL", [0.5, 0.25])
    assert channels["offset"] == [offset, offset]
    entry, channels = encodings_json(found, names, "2.0.0")["encodings"]
    dtype, point = newer
    zeros = {} if point is None else {"y_zero_point": point}
    assert entry == {"name": "t", "output_dtype": dtype, "y_scale": 0.5, **zeros}
    zeros = {} if point is None else {"y_zero_point": [point, point]}
    assert channels == {"name": "c", "output_dtype": dtype, "y_scale": [0.5, 0.25], "axis": 1, **zeros}


def test_biases_are_listed_where_wanted(tmp_path):
    """Their encodings stand in for the converter's own, which AIMET leaves to it in its older format."""
    int8 = tritonq.convert(trained(lambda: nn.Sequential(nn.Conv2d(3, 4, 1))))
    encodings = tritonq.export_encodings(int8, tmp_path / "m.onnx", X, int32_bias=True)
    assert [entry["name"] for entry in encodings["activation_encodings"]] == ["input", "output"]
    weight, bias = encodings["param_encodings"]
    assert (weight["name"], weight["scale"]) == ("0.weight", int8[0].weight_scale.tolist())
    assert (bias["name"], bias["bw"], bias["offset"]) == ("0.bias", 32, [-(2**31)] * 4)
    assert bias["scale"] == int8[0].multiplier.tolist()
    without = tritonq.export_encodings(int8, tmp_path / "m.onnx", X)
    assert without["param_encodings"] == [weight]


def graph_of(nodes, outputs):
    """Return an ``onnx_ir`` graph over an input "x" with the given nodes: (operator, inputs, output[, mark])."""
    value = {name: onnx.helper.make_tensor_value_info(name, 1, [2, 2]) for name in ("x", *outputs)}
    made = [
        onnx.helper.make_node(
            kind, inputs, [out], **({"domain": "tritonq", "name": mark[0]} if mark else {})
        )
        for kind, inputs, out, *mark in nodes
    ]  # fmt: skip
    for node, (_, _, _, *mark) in zip(made, nodes, strict=True):
        if mark:
            node.attribute.append(onnx.helper.make_attribute("name", mark[0]))
    import onnx_ir

    proto = onnx.helper.make_graph(made, "g", [value["x"]], [value[name] for name in outputs])
    return onnx_ir.from_proto(onnx.helper.make_model(proto)).graph


def encoding(scale):
    return Encoding((scale,), (0,), tritonq.QuantizedType.of(8, signed=False))


@pytest.mark.parametrize(
    ("nodes", "outputs", "kinds", "scales"),
    [
        # Read on two grids, then on one grid twice.
        ([("Relu", ["x"], "r"), ("Marked", ["r"], "a", "1"), ("Marked", ["r"], "b", "2"), ("Add", ["a", "b"], "y")],
         ["y"], ["Relu", "Identity", "Add"], {"r": 1.0, "b": 2.0}),
        ([("Relu", ["x"], "r"), ("Marked", ["r"], "a", "1"), ("Marked", ["r"], "b", "1"), ("Add", ["a", "b"], "y")],
         ["y"], ["Relu", "Add"], {"r": 1.0}),
        # Read rounded and unrounded.
        ([("Relu", ["x"], "r"), ("Marked", ["r"], "a", "1"), ("Add", ["a", "r"], "y")],
         ["y"], ["Relu", "Identity", "Add"], {"a": 1.0}),
        # The output is rounded; so is the input, which is an output too.
        ([("Relu", ["x"], "r"), ("Marked", ["r"], "y", "1")], ["y"], ["Relu"], {"y": 1.0}),
        ([("Marked", ["x"], "y", "1")], ["y"], ["Identity"], {"y": 1.0}),
        # Moves hand on and back; concatenations of two grids don't.
        ([("Relu", ["x"], "r"), ("Transpose", ["r"], "t"), ("Marked", ["t"], "a", "1"), ("Transpose", ["a"], "y")],
         ["y"], ["Relu", "Transpose", "Transpose"], {"r": 1.0, "t": 1.0, "y": 1.0}),
        ([("Relu", ["x"], "r"), ("Sigmoid", ["x"], "s"), ("Marked", ["r"], "a", "1"), ("Marked", ["s"], "b", "2"),
          ("Concat", ["a", "b"], "y")], ["y"], ["Relu", "Sigmoid", "Concat"], {"r": 1.0, "s": 2.0}),
    ],
)  # fmt: skip
def test_marks_become_names_of_tensors(nodes, outputs, kinds, scales):
    graph = graph_of(nodes, outputs)
    found = take_marks(graph, {"1": encoding(1.0), "2": encoding(2.0)})
    assert sorted(node.op_type for node in graph) == sorted(kinds)
    assert [value.name for value in graph.outputs] == outputs
    assert {name: grid.scale[0] for name, grid in found.items()} == scales


def test_what_has_no_encoding_is_told(tmp_path):
    odd = tritonq.FakeQuantize.with_args(dtype=tritonq.QuantizedType(0, 200, symmetric=False))
    qconfig = tritonq.get_qconfig("qnn")._replace(activation=odd)
    model = trained(lambda: nn.Sequential(nn.Conv2d(3, 4, 1)), qconfig)
    with pytest.raises(ValueError, match=r"has the codes 0\.\.200, which are no range of whole bits"):
        tritonq.export_encodings(model, tmp_path / "m.onnx", X)
    grouped = trained(lambda: nn.Sequential(nn.ConvTranspose2d(3, 6, 2, groups=3)))
    with pytest.raises(ValueError, match=r"'0': the scales of a grouped transposed convolution run along two axes"):
        tritonq.export_encodings(grouped, tmp_path / "m.onnx", X)
    for arguments, text in (({"version": "0.6.1"}, "unknown version"), ({"opset": 16}, "opset must be at least 17")):
        with pytest.raises(ValueError, match=text):
            tritonq.export_encodings(grouped, tmp_path / "m.onnx", X, **arguments)
    with pytest.raises(ValueError, match="path is the ONNX file's"):
        tritonq.export_encodings(grouped, tmp_path / "m.encodings", X)
    assert not list(tmp_path.iterdir())


class Tables(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.bag, self.head = nn.Embedding(9, 4), nn.EmbeddingBag(9, 4, mode="sum"), nn.Linear(4, 2)

    def forward(self, indices):
        return self.head(self.table(indices).sum(1) + self.bag(indices))


class Halved(UnaryLayer):
    """An operation of one tensor that no list of layers names."""

    def compute(self, x):
        return x / 2

    def exact(self, x, source, output):
        raise AssertionError("a file with encodings has float operators")

    traced = exact


def test_any_operation_of_one_tensor_is_written_in_float():
    converted = tritonq.convert(trained(lambda: nn.Sequential(nn.Conv2d(3, 4, 1), nn.SiLU(), nn.Conv2d(4, 2, 1))))
    halved = Halved()
    halved.attach_quantizers(None)
    source, output = converted[1].linked_quantizers
    halved.set_quantizers(source, output)
    converted = nn.Sequential(converted[0], halved, output, converted[2]).eval()
    form, _ = encodings_form(converted)
    assert_close(form[1](X), X / 2, FLOAT32)


def test_embedding_tables_stay_in_float_and_are_named(tmp_path):
    indices = torch.tensor([[0, 8, 3], [5, 2, 2]])
    int8 = tritonq.convert(after_one_batch(Tables(), indices, qconfig=tritonq.get_qconfig("qnn")))
    with pytest.warns(UserWarning, match="a scale per row, which encodings don't describe; in float: table, bag"):
        encodings = tritonq.export_encodings(int8, tmp_path / "m.onnx", indices)
    assert [entry["name"] for entry in encodings["param_encodings"]] == ["head.weight"]
    held = {
        tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in onnx.load(tmp_path / "m.onnx").graph.initializer
    }
    tables = [value for value in held.values() if value.shape == (9, 4)]
    expected = [table.dequantized_weight().numpy() for table in (int8.table, int8.bag)]
    assert all(any((value == table).all() for value in tables) for table in expected)


def test_float_codes_have_no_encoding():
    floats = Quantizer(tritonq.QuantizedType.of_floats("e4m3"), torch.ones(1), torch.zeros(1, dtype=torch.int32))
    with pytest.raises(ValueError, match="'0' has the codes of e4m3, and encodings describe integers alone"):
        encodings_form(nn.Sequential(floats))
