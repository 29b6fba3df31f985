"""Files whose content is not what a command needs, though their checksum is right, end in one line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import onnx
import pytest
import torch

import tritonq
from image_folders import SMALLNET, image_folder
from tritonq.__main__ import main
from tritonq.cli.checkpoints import read_training, save_training

MODEL = "smallnet:make"
SETTINGS = ["--image-size=8", "--batch-size=4", "--epochs=2", "--frozen-epochs=0"]
PREDICT = ["predict", MODEL, "photos/a/0.png", "--checkpoint", "out/last.pt"]
RESUME = ["train", MODEL, "photos", *SETTINGS, "--output", "out", "--resume"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A folder with a model, images and what a run of two epochs wrote."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "smallnet.py").write_text(SMALLNET)
    image_folder(folder / "photos", ("a", "b"), count=4)
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patches:
        patches.chdir(folder)
        patches.syspath_prepend(str(folder))
        assert main(["train", MODEL, "photos", *SETTINGS, "--output", "out"]) == 0
    return folder


@pytest.fixture
def workplace(run, tmp_path, monkeypatch):
    shutil.copytree(run, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def one_line(capsys, command):
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith(f"tritonq {command}: ")
    return line


def changed(path, **entries):
    """Write a checkpoint again, with other entries and a checksum of them; None leaves one out."""
    made, content = read_training(path)
    content = {name: entries.get(name, value) for name, value in content.items()}
    save_training(path, made, {name: value for name, value in content.items() if value is not None})


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"state_dict": None}, "out/last.pt is damaged: it has no state dict"),
        ({"optimizer": None}, "out/last.pt can't be resumed: it has no optimizer"),
        ({"optimizer": {}}, "out/last.pt can't be resumed: it has no state"),
        ({"random": 5}, "out/last.pt can't be resumed: it has no random"),
        ({"step": "5"}, "out/last.pt can't be resumed: it has no step"),
        ({"settings": []}, "out/last.pt can't be resumed: it has no settings"),
        ({"history": [{"epoch": 1}]}, "out/last.pt can't be resumed: its history is not one"),
    ],
)
def test_checkpoints_without_what_a_run_needs(entries, message, workplace, capsys):
    changed(workplace / "out" / "last.pt", **entries)
    assert main(RESUME) == 1
    assert message in one_line(capsys, "train")
    assert main(PREDICT) == int("state_dict" in entries)  # the weights are all that it needs


def test_the_best_checkpoint_is_no_run(workplace, capsys):
    shutil.copy(workplace / "out" / "best.pt", workplace / "out" / "last.pt")
    assert main(RESUME) == 1
    assert "it has no settings; last.pt holds a run, best.pt the weights of an epoch" in one_line(capsys, "train")


@pytest.mark.parametrize(
    ("field", "value"),
    [("model", 5), ("model_arguments", [5]), ("model_arguments", "x"), ("classes", [1, 2]), ("qconfig", 5)],
)
def test_a_recipe_of_other_types(field, value, workplace, capsys):
    made, content = read_training(workplace / "out" / "last.pt")
    content["recipe"] = {**content["recipe"], field: value}
    save_training(workplace / "out" / "last.pt", made, content)
    for command, words in (("predict", PREDICT), ("train", RESUME)):
        assert main(words) == 1
        assert "out/last.pt is damaged: " in one_line(capsys, command)


@pytest.mark.parametrize("text", ["{", "[1]", "null", '{"classes": 5}', '{"classes": [1]}', '{"model_arguments": 5}'])
def test_metadata_of_other_types(text, workplace, capsys):
    proto = onnx.load(workplace / "out" / "model.onnx")
    for entry in proto.metadata_props:
        if entry.key == "tritonq.metadata":
            entry.value = text
    onnx.save(proto, workplace / "out" / "model.onnx")
    assert main(["predict", "out/model.onnx", "photos/a/0.png"]) == 1
    assert "out/model.onnx is damaged: " in one_line(capsys, "predict")
    try:
        data = json.loads(text)
    except ValueError:
        return
    if isinstance(data, dict):
        import smallnet

        model = tritonq.load_converted(workplace / "out" / "model.int8.pt", smallnet.make())
        tritonq.save_converted(model, workplace / "out" / "last.pt", metadata=data)
        assert main(PREDICT) == 1
        assert "out/last.pt is damaged: " in one_line(capsys, "predict")


def test_metadata_of_the_user_s_own(workplace, capsys):
    """Files that a program of the user wrote need not say how the model was made."""
    import smallnet

    model = tritonq.load_converted(workplace / "out" / "model.int8.pt", smallnet.make())
    tritonq.save_converted(model, workplace / "out" / "last.pt", metadata={"classes": ["ants", "bees"]})
    assert main([*PREDICT, "--image-size=8", "--mean=0", "--std=1"]) == 0
    assert capsys.readouterr().out.startswith(("photos/a/0.png: ants ", "photos/a/0.png: bees "))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: path.unlink(), "out/best.pt can't be read: No such file or directory"),
        (lambda path: changed(path, step=9), "out/best.pt holds step 9; epoch 1, the best, ended at 1"),
    ],
    ids=["gone", "of another epoch"],
)
def test_a_best_checkpoint_that_is_not_the_best_epoch_s(make, message, workplace, capsys):
    """As after a disk that was full when it should have been written."""
    path = workplace / "out" / "last.pt"
    _, content = read_training(path)
    first, last = content["history"]
    changed(path, history=[{**first, "accuracy": 0.9}, {**last, "accuracy": 0.1}])
    make(workplace / "out" / "best.pt")
    (workplace / "out" / "model.int8.pt").unlink()
    message = message.replace("ended at 1", f"ended at {first['step']}")
    assert main(RESUME) == 1
    assert one_line(capsys, "train").endswith(f"{message}; --resume --deploy last takes the last epoch")
    assert not Path("out/model.int8.pt").exists()
    assert main([*RESUME, "--deploy=last"]) == 0


def test_an_export_replaces_no_checkpoint(workplace, capsys):
    before = (workplace / "out" / "last.pt").read_bytes()
    for name in ("last.pt", "best.pt"):
        assert main(["export", MODEL, f"out/{name}", "--checkpoint", "out/last.pt"]) == 1
        assert f"out/{name} exists and is no converted model" in one_line(capsys, "export")
    assert (workplace / "out" / "last.pt").read_bytes() == before
    assert main(["export", MODEL, "out/model.int8.pt", "--checkpoint", "out/last.pt"]) == 0


@pytest.mark.parametrize("name", ["best.pt", "log.csv", "model.onnx", "model.int8.pt"])
@pytest.mark.parametrize("words", [[], ["--resume"]], ids=["new", "resume"])
def test_a_run_replaces_no_file_of_another_program(name, words, workplace, capsys):
    """As where the float model's training left its files in the present folder."""
    torch.save({"weight": torch.ones(1)}, workplace / name)
    before = (workplace / name).read_bytes()
    assert main(["train", MODEL, "photos", *SETTINGS, "--output", ".", *words]) == 1
    assert f"{name} exists, and train writes a file of this name: pass another --output" in one_line(capsys, "train")
    assert (workplace / name).read_bytes() == before


@pytest.mark.parametrize("left", [["log.csv"], ["log.csv", "best.pt"]])
def test_a_run_that_was_killed_before_its_first_checkpoint_begins_again(left, workplace):
    (workplace / "again").mkdir()
    for name in left:
        shutil.copy(workplace / "out" / name, workplace / "again" / name)
    assert main(["train", MODEL, "photos", *SETTINGS, "--output", "again", "--no-onnx"]) == 0
