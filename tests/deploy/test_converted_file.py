"""Converted models in files: rebuilt on a fresh float model bit for bit, or refused with the model untouched."""

import collections
import enum
import os
import re
import stat

import numpy as np
import pytest
import torch
from torch import nn

import tritonq
from full_disk import growing_no_further_than
from qat_models import (
    PRESETS,
    FloatResidual,
    Residual,
    assert_same_state,
    images,
    state_of,
    train,
    trained_float_form,
    trained_residual,
)
from tritonq import nn as qnn
from tritonq.deploy import convert, load_converted, load_metadata, save_converted
from tritonq.deploy.converted_file import FORMAT, VERSION, checksum
from tritonq.deploy.modules import DeployedModule
from vision_models import timm_model, torchvision_model, transformers_resnet

QCONFIG = tritonq.get_qconfig("tensorrt")


@pytest.fixture
def saved(tmp_path):
    """A converted model, prepared from a float one, and its file."""
    model = convert(trained_float_form())
    path = tmp_path / "model.int8.pt"
    save_converted(model, path)
    return model, path


def rewrite(path, change):
    """The file with its contents changed and its checksum made right again."""
    content = torch.load(path, weights_only=True)
    change(content)
    content["sha256"] = checksum(content["modules"], content["state_dict"], content.get("metadata"))
    torch.save(content, path)


@pytest.mark.parametrize("preset", PRESETS)
def test_a_fresh_float_model_becomes_the_converted_one(preset, tmp_path):
    model = convert(trained_float_form(preset))
    save_converted(model, tmp_path / "m.pt")
    fresh = FloatResidual()
    loaded = load_converted(tmp_path / "m.pt", fresh)
    assert loaded is fresh
    assert torch.equal(loaded(images()), model(images()))
    assert not any(module.training for module in loaded.modules())
    assert list(loaded.state_dict()) == list(model.state_dict())


def test_saving_what_was_loaded_gives_the_same_file_contents(saved, tmp_path):
    _, path = saved
    save_converted(load_converted(path, FloatResidual()), tmp_path / "again.pt")
    one, other = (torch.load(p, weights_only=True) for p in (path, tmp_path / "again.pt"))
    assert one["modules"] == other["modules"]
    assert one["sha256"] == other["sha256"]


def test_the_file_is_plain_data_and_int8(saved):
    _, path = saved
    content = torch.load(path, weights_only=True)
    assert (content["format"], content["version"]) == (FORMAT, VERSION)
    weights = {name: tensor for name, tensor in content["state_dict"].items() if name.endswith(".weight")}
    assert {tensor.dtype for tensor in weights.values()} == {torch.int8}
    assert {tensor.dtype for name, tensor in content["state_dict"].items() if name.endswith(".bias")} == {torch.int32}


@pytest.mark.parametrize(
    "make",
    [
        lambda: torchvision_model("resnet18"),
        lambda: torchvision_model("mobilenet_v3_small"),
        lambda: timm_model("resnet18"),
        transformers_resnet,
    ],
    ids=["torchvision resnet18", "torchvision mobilenet_v3_small", "timm resnet18", "transformers resnet"],
)
def test_library_models_come_back(make, tmp_path):
    torch.manual_seed(0)
    model, x = make(), torch.randn(2, 3, 32, 32)
    float_size = sum(tensor.nbytes for tensor in model.state_dict().values())
    prepared = tritonq.prepare_qat(model, qconfig=QCONFIG, example_inputs=x)
    with torch.no_grad():
        prepared.train()(x)
    converted = convert(prepared)
    save_converted(converted, tmp_path / "m.pt")
    loaded = load_converted(tmp_path / "m.pt", make())
    with torch.no_grad():
        outputs = [m(x) if isinstance(m(x), torch.Tensor) else m(x).logits for m in (loaded, converted)]
    assert torch.equal(*outputs)
    if float_size > 10**7:
        # Small layers have scales, biases and names that weigh something.
        assert (tmp_path / "m.pt").stat().st_size < 0.26 * float_size


def test_tensors_share_storages_in_the_file_and_nowhere_else(saved):
    model, path = saved
    state = torch.load(path, weights_only=True)["state_dict"]
    storages = {tensor.untyped_storage().data_ptr() for tensor in state.values()}
    assert len(storages) == len({tensor.dtype for tensor in state.values()})
    loaded = load_converted(path, FloatResidual()).state_dict()
    assert len({tensor.untyped_storage().data_ptr() for tensor in loaded.values()}) == len(model.state_dict())


def test_what_stayed_in_float_is_loaded_as_well(tmp_path):
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.conv = nn.BatchNorm2d(3), nn.Conv2d(3, 4, 1)
            self.gain = nn.Parameter(torch.rand(4, 1, 1))

        def forward(self, x):
            return self.conv(self.norm(x)).sigmoid() * self.gain

    model = train(tritonq.prepare_qat(Mixed(), qconfig=QCONFIG, example_inputs=images(2)))
    save_converted(convert(model), tmp_path / "m.pt")
    loaded = load_converted(tmp_path / "m.pt", Mixed())
    assert torch.equal(loaded(images()), model(images()))
    assert torch.equal(loaded.norm.running_mean, model.norm.running_mean)


def test_handwritten_quantized_models_come_back_too(tmp_path):
    model = convert(trained_residual())
    save_converted(model, tmp_path / "m.pt")
    loaded = load_converted(tmp_path / "m.pt", Residual(QCONFIG))
    assert torch.equal(loaded(images()), model(images()))


def test_a_single_layer_and_tables_come_back(tmp_path):
    layer = train(qnn.Linear(5, 3, qconfig=QCONFIG), torch.randn(4, 5))
    save_converted(convert(layer), tmp_path / "layer.pt")
    x = torch.randn(4, 5)
    assert torch.equal(load_converted(tmp_path / "layer.pt", nn.Linear(5, 3))(x), layer(x))
    table = qnn.EmbeddingBag(7, 3, mode="sum", qconfig=tritonq.default_embedding_qat_qconfig)
    index = torch.tensor([[1, 2], [3, 6]])
    table(index)
    save_converted(convert(table.eval()), tmp_path / "table.pt")
    assert torch.equal(load_converted(tmp_path / "table.pt", nn.EmbeddingBag(7, 3, mode="sum"))(index), table(index))


def test_shared_modules_are_saved_once_and_stay_shared(tmp_path):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.one = self.other = nn.Conv2d(3, 3, 1)

        def forward(self, x):
            return self.other(torch.relu(self.one(x)))

    model = tritonq.prepare_qat(Twice(), qconfig=QCONFIG, example_inputs=images(2))
    converted = convert(train(model, images(4)))
    save_converted(converted, tmp_path / "m.pt")
    loaded = load_converted(tmp_path / "m.pt", Twice())
    assert loaded.one is loaded.other
    assert torch.equal(loaded(images()), converted(images()))


def test_nothing_is_left_beside_the_file_and_its_mode_is_usual(saved):
    _, path = saved
    assert os.listdir(path.parent) == [path.name]
    other = path.parent / "usual"
    other.touch()
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(other.stat().st_mode)


class Colour(enum.StrEnum):
    RED = "red"


@pytest.mark.parametrize(
    ("given", "read"),
    [
        ({"accuracy": np.float64(0.5), "classes": ("ant", "bee"), "sizes": [True, None, 1]}, None),
        (
            {"colour": Colour.RED, Colour.RED: collections.OrderedDict(a=Colour.RED)},
            {"colour": "red", "red": {"a": "red"}},
        ),
        ({"counts": collections.defaultdict(int, ant=2)}, None),
    ],
    ids=["numbers", "enums", "dicts"],
)
def test_metadata_of_derived_types_is_read_as_plain_data(given, read, saved):
    model, path = saved
    save_converted(model, path, metadata=given)
    found = load_metadata(path)
    assert found == (given if read is None else read)
    assert {type(value) for value in found.values()} <= {float, tuple, list, str, dict}


def test_a_failed_save_leaves_the_old_file(saved, monkeypatch):
    model, path = saved
    before = path.read_bytes()

    def fail(content, file):
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        save_converted(model, path)
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == [path.name]


def test_only_converted_models_are_saved(tmp_path):
    with pytest.raises(ValueError, match="use convert first"):
        save_converted(trained_residual(), tmp_path / "m.pt")
    assert not os.listdir(tmp_path)


def test_deployed_modules_without_a_form_in_files_are_refused(tmp_path):
    class Other(DeployedModule):
        pass

    with pytest.raises(ValueError, match="Other has no form"):
        save_converted(nn.Sequential(convert(trained_residual()), Other()), tmp_path / "m.pt")
    assert not os.listdir(tmp_path)


def refused(path, model, message):
    before = state_of(model)
    with pytest.raises(ValueError, match=message):
        load_converted(path, model)
    assert_same_state(before, state_of(model))


@pytest.mark.parametrize("where", [0.001, 0.2, 0.4, 0.6, 0.8, 0.9, 0.99])
@pytest.mark.parametrize("kind", ["cut", "byte"])
def test_damaged_files_are_refused_or_harmless(saved, kind, where):
    """Zip archives hold padding and time stamps, whose loss changes nothing."""
    converted, path = saved
    content = bytearray(path.read_bytes())
    position = int(len(content) * where)
    if kind == "cut":
        content = content[:position]
    else:
        content[position] ^= 0x55
    path.write_bytes(content)
    model = FloatResidual()
    before = state_of(model)
    outcome = None
    try:
        load_converted(path, model)
    except ValueError as error:
        outcome = str(error)
    if outcome is None:
        assert kind == "byte"
        assert torch.equal(model(images()), converted(images()))
    else:
        assert re.search("damaged|not a file of", outcome)
        assert_same_state(before, state_of(model))


def test_every_changed_weight_is_noticed(saved):
    _, path = saved
    content = torch.load(path, weights_only=True)
    content["state_dict"]["head.weight"][0, 0] += 1
    torch.save(content, path)
    refused(path, FloatResidual(), "checksum")


def test_foreign_files_are_refused(tmp_path):
    text, weights = tmp_path / "text", tmp_path / "weights.pt"
    text.write_text("not a model")
    torch.save(FloatResidual().state_dict(), weights)
    refused(text, FloatResidual(), "not a file of save_converted")
    refused(weights, FloatResidual(), "not a file of save_converted")
    with pytest.raises(FileNotFoundError):
        load_converted(tmp_path / "absent", FloatResidual())


def test_a_folder_that_is_not_there_is_named(saved, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"model\.pt can't be written: .*absent is not a folder"):
        save_converted(saved[0], tmp_path / "absent" / "model.pt")


def test_a_full_disk_leaves_the_old_file_and_is_an_error_of_the_system(saved):
    model, path = saved
    before = path.read_bytes()
    with growing_no_further_than(1000), pytest.raises(OSError, match=rf"{path} can't be written: File too large"):
        save_converted(model, path)
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_newer_versions_are_refused(saved):
    _, path = saved
    rewrite(path, lambda content: content.update(version=VERSION + 1))
    refused(path, FloatResidual(), f"version {VERSION + 1}; this tritonq reads versions up to {VERSION}")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda model: setattr(model, "point", nn.Conv2d(8, 8, 3, padding=1)),
            r"'point' differs: Conv2d with kernel_size=\(1, 1\) in the file, kernel_size=\(3, 3\) in the model",
        ),
        (lambda model: delattr(model, "head"), "'head' .Linear. is missing in the model"),
        (lambda model: setattr(model, "tail", nn.Linear(10, 10)), "'tail' .Linear. of the model is not in the file"),
        (
            lambda model: setattr(model, "depthwise", nn.Linear(8, 8)),
            "'depthwise' differs: Conv2d in the file, Linear in the model",
        ),
    ],
)
def test_the_first_difference_in_architecture_is_named(saved, change, message):
    model = FloatResidual()
    change(model)
    refused(saved[1], model, message)


def test_a_model_of_another_class_is_named(saved):
    other = nn.Sequential(nn.Conv2d(3, 8, 3))
    refused(saved[1], other, "'' differs: FloatResidual in the file, Sequential in the model")


def with_code(content):
    for entry in content["modules"]:
        if (entry.get("forward") or {}).get("eval"):
            entry["forward"]["eval"][1].update(op="call_function", target="os.system")


def without_geometry(content):
    next(entry for entry in content["modules"] if entry["kind"] == "layer").pop("geometry")


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content["state_dict"].pop("point.weight_scale"),
        lambda content: content["state_dict"].update({"stem.0.weight": torch.zeros(8, 3, 1, 1, dtype=torch.int8)}),
        lambda content: content["modules"][3].update(kind="surprise"),
        *(with_code, without_geometry),
    ],
)
def test_contents_that_make_no_model_are_refused(saved, change):
    _, path = saved
    rewrite(path, change)
    refused(path, FloatResidual(), "damaged|does not fit")
