"""Exported files hold what runs and nothing else, and models that can't be deployed are refused by name."""

import contextlib
import errno
import io
import os
import zipfile

import onnx
import onnxruntime
import pytest
import torch
from torch import nn
from torch.nn import functional

import tritonq
from qat_models import after_one_batch
from tritonq.deploy import onnx_session
from tritonq.deploy.files import atomic_file, atomic_files, remove_leftovers
from tritonq.deploy.onnx_files import add_metadata, code_entries, drop_unread


def trained():
    torch.manual_seed(0)
    images = torch.randn(64, 3, 8, 8)
    model = nn.Sequential(nn.Conv2d(3, 3, 3, bias=False), nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 3, 3), nn.ReLU())
    return after_one_batch(model, images), images


@pytest.mark.parametrize("name", ["0.weight", "0.bn.weight", "0.bn.running_var", "3.bias"])
def test_convert_names_what_is_not_finite(name):
    qat, _ = trained()
    qat.state_dict()[name].flatten()[0] = float("nan")
    with pytest.raises(ValueError, match=name):
        tritonq.convert(qat)


def test_onnx_files_hold_no_source_and_no_shared_zero_point(tmp_path):
    qat, images = trained()
    tritonq.export_onnx(qat, tmp_path / "model.onnx", images[:2])
    graph = onnx.load(tmp_path / "model.onnx").graph
    assert not any(item.metadata_props for item in (*graph.node, *graph.value_info))
    constants = {tensor.name for tensor in graph.initializer}
    weights = [node for node in graph.node if node.op_type == "DequantizeLinear" and node.input[0] in constants]
    zero_points = [node.input[2] for node in weights if len(node.input) > 2]
    assert len(zero_points) == len(set(zero_points)) == 2


class Siamese(nn.Module):
    """A tower that runs on two inputs, and a table that is read as such and as the matrix of scores."""

    def __init__(self):
        super().__init__()
        self.table, self.tower, self.inner = nn.Embedding(12, 8), nn.Conv1d(8, 8, 3, padding=1), nn.Linear(8, 8)

    def run(self, tokens):
        return self.inner(self.tower(self.table(tokens).transpose(1, 2)).transpose(1, 2))

    def forward(self, first, second):
        return functional.linear(self.run(first) - self.run(second), self.table.weight)


@pytest.mark.parametrize("target", ["onnxruntime", "qdq"])
def test_onnx_runtime_rewrites_the_weights_of_a_layer_that_runs_twice(target, tmp_path):
    inputs, path = tuple(torch.randint(12, (2, 3, 5))), tmp_path / "model.onnx"
    qat = tritonq.prepare_qat(Siamese(), example_inputs=inputs).train()
    qat(*inputs)
    tritonq.export_onnx(qat.eval(), path, inputs, target=target)
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.x64quantprecision", "1")
    session = onnxruntime.InferenceSession(path, options)
    (found,) = session.run(None, {"first": inputs[0].numpy(), "second": inputs[1].numpy()})
    if target == "onnxruntime":  # other files may differ by single codes
        assert torch.equal(torch.from_numpy(found), qat(*inputs))


def test_what_only_branches_read_stays_in_an_onnx_graph():
    result = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1])
    branches = {
        key: onnx.helper.make_graph([onnx.helper.make_node("Neg", [source], ["y"])], key, [], [result])
        for key, source in (("then_branch", "x_abs"), ("else_branch", "held"))
    }
    nodes = [
        onnx.helper.make_node("Abs", ["x"], ["x_abs"]),
        onnx.helper.make_node("Exp", ["x"], ["unread"]),
        onnx.helper.make_node("If", ["flag"], ["y"], **branches),
    ]
    held = [onnx.helper.make_tensor(name, onnx.TensorProto.FLOAT, [1], [1.0]) for name in ("held", "unused")]
    graph = onnx.helper.make_graph(nodes, "main", [], [result], held)
    drop_unread(graph)
    assert [node.op_type for node in graph.node] == ["Abs", "If"]
    assert [tensor.name for tensor in graph.initializer] == ["held"]


def test_programs_hold_no_example_and_no_stack_traces():
    qat, images = trained()
    file = io.BytesIO()
    program = tritonq.export_program(qat, None, images[:2])
    torch.export.save(program, file)
    assert program.example_inputs is None
    assert images[0].numpy().tobytes() not in file.getvalue()
    with zipfile.ZipFile(file) as archive:
        assert not any(b".py" in archive.read(name) for name in archive.namelist() if name.endswith("model.json"))


def test_half_precision_is_told(tmp_path):
    qat, images = trained()
    with pytest.raises(ValueError, match="float32"):
        tritonq.export_onnx(qat.half(), tmp_path / "model.onnx", images[:2].half())


def test_sessions_on_x86_without_vnni_ask_for_exact_sums(tmp_path, monkeypatch):
    qat, images = trained()
    path = tmp_path / "model.onnx"
    tritonq.export_onnx(qat, path, images[:2])
    for saturates, entries in ((False, []), (True, ["1"])):
        monkeypatch.setattr(onnx_session, "products_saturate", lambda answer=saturates: answer)
        options = onnxruntime.SessionOptions()
        onnx_session.open_session(path, options)
        found = []
        with contextlib.suppress(RuntimeError):  # no such entry
            found.append(options.get_session_config_entry("session.x64quantprecision"))
        assert found == entries
    assert tritonq.verify(qat, path, images).total.differing == 0


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_bias_and_products_together_fit_32_bits(sign, tmp_path):
    """Alone the bias fits, and so do the products; their sum would wrap in an integer engine."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(64, 2, 1), nn.ReLU(), nn.Conv2d(2, 2, 1))
    images = torch.rand(16, 64, 4, 4)
    with torch.no_grad():
        model[0].weight[0] = sign * 1e-3
    qat = tritonq.prepare_qat(model, qconfig=tritonq.get_qconfig("tensorrt"), example_inputs=images[:2]).train()
    qat(images)
    layer = qat.get_submodule("0")
    with torch.no_grad():
        layer.bias[0] = sign * 0.9999 * 2**31 * layer.integer_layer(layer.weight, layer.bias).multiplier[0]
    qat(images)
    converted = tritonq.convert(qat.eval())
    weight, bias = (
        getattr(converted.get_submodule("0"), name)[0].double() for name in ("stored_weight", "stored_bias")
    )
    assert float(bias.abs()) > 0.99 * 2**31
    assert float(bias.abs() + 128 * weight.abs().sum()) < 2**31
    path = tmp_path / "model.onnx"
    tritonq.export_onnx(converted, path, images[:2])
    assert tritonq.verify(qat, converted, images).total.differing == 0
    assert tritonq.verify(qat, path, images).total.differing == 0


def full_disk_at(call, monkeypatch):
    """Make the disk full when a file is flushed to it for the ``call``-th time."""
    flush, calls = os.fsync, []

    def fsync(handle):
        calls.append(handle)
        if len(calls) == call:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        flush(handle)

    monkeypatch.setattr(os, "fsync", fsync)


def write_both(folder):
    with atomic_files(folder / "a", folder / "b") as files:
        for file in files:
            file.write(b"new")


@pytest.mark.parametrize("call", [1, 2])
def test_files_that_belong_together_are_all_there_or_none(call, tmp_path, monkeypatch):
    (tmp_path / "a").write_text("old")
    full_disk_at(call, monkeypatch)
    with pytest.raises(OSError, match="No space left"):
        write_both(tmp_path)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"a": "old"}


@pytest.mark.parametrize("call", [1, 2])
def test_a_full_disk_leaves_no_encodings_of_another_graph(call, tmp_path, monkeypatch):
    converted = tritonq.convert(trained()[0])
    full_disk_at(call, monkeypatch)
    with pytest.raises(OSError, match="No space left"):
        tritonq.export_encodings(converted, tmp_path / "model.onnx", trained()[1][:2])
    assert not list(tmp_path.iterdir())


def test_onnx_files_hold_the_caller_s_metadata(tmp_path):
    qat, images = trained()
    tritonq.export_onnx(qat, tmp_path / "model.onnx", images[:2], metadata={"classes": "ant bee"})
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    assert session.get_modelmeta().custom_metadata_map["classes"] == "ant bee"
    own = [({f"tritonq.{name}": ""}, "choose another name") for name in ("codes", "ends", "target")]
    for metadata, message in (({"size": 3}, "'size': 3"), *own):
        with pytest.raises(ValueError, match=message):
            tritonq.export_onnx(qat, tmp_path / "other.onnx", images[:2], metadata=metadata)
    assert not (tmp_path / "other.onnx").exists()


def test_metadata_that_are_refused_leave_a_file_as_it_was():
    model = onnx.ModelProto()
    with pytest.raises(ValueError, match="'size': 3"):
        add_metadata(model, {"classes": "ant bee", "size": 3})
    assert not model.metadata_props
    with pytest.raises(ValueError, match="export_onnx did not write it"):
        code_entries(model)


def test_only_unfinished_files_of_the_same_name_are_leftovers(tmp_path):
    left = tmp_path / "last[1].pt"
    writing = atomic_file(left)
    writing.__enter__()  # and the writer is killed
    others = [".last[1].pt.swp", ".last[1].pt.json.abcdefgh", ".last1.pt.abcdefgh", "last[1].pt"]
    for name in others:
        (tmp_path / name).touch()
    assert len(list(tmp_path.iterdir())) == 5
    remove_leftovers(left)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(others)
