"""`predict`, `evaluate` and `export` on everything that `train` writes, and on factories with weights."""

from __future__ import annotations

import errno
import json
import os
import sys

import onnx
import onnxruntime
import pytest
import torch

import tritonq
from image_folders import FOLDER_MODEL, image_folder
from tritonq.__main__ import main
from tritonq.cli.checkpoints import load_state, read_training
from tritonq.cli.data import open_examples
from tritonq.cli.deployment import deploy
from tritonq.cli.models import prepare
from tritonq.demo.model import SmallResNet

FACTORY = FOLDER_MODEL[0]
ARGUMENTS = [word for word in FOLDER_MODEL if word.startswith("--model-arg")]


def run(*words):
    return main([str(word) for word in words])


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run on two classes that are told apart easily, and its images."""
    folder = tmp_path_factory.mktemp("trained")
    torch.set_num_threads(1)
    images = image_folder(folder / "insects", count=12)
    words = [word for word in FOLDER_MODEL if word not in ("--no-onnx", "--epochs=1")]
    words += ["--epochs=6", "--learning-rate=0.1", "--augment=flip"]
    assert run("train", FACTORY, images, *words[1:], "--output", folder / "out") == 0
    return folder


def test_every_file_holds_preprocessing_and_classes(trained):
    out = trained / "out"
    expected = read_training(out / "best.pt")[0]
    assert expected.classes == ("ants", "bees")
    assert len(expected.preprocessing.mean) == len(expected.preprocessing.std) == 3
    assert read_training(out / "last.pt")[0] == expected
    metadata = tritonq.deploy.load_metadata(out / "model.int8.pt")
    assert metadata["classes"] == ["ants", "bees"]
    assert metadata["preprocessing"]["mean"] == list(expected.preprocessing.mean)
    properties = {entry.key: entry.value for entry in onnx.load(out / "model.onnx").metadata_props}
    assert json.loads(properties["tritonq.metadata"]) == metadata


FORMS = ["best.pt", "last.pt", "model.int8.pt", "model.onnx"]


def named(trained, form):
    path = trained / "out" / form
    return [path] if form.endswith(".onnx") else [FACTORY, "--checkpoint", path]


@pytest.mark.parametrize("form", FORMS)
def test_predictions(trained, form, capsys):
    photos = [trained / "insects" / name / "0.png" for name in ("ants", "bees")]
    model, *options = named(trained, form)
    assert run("predict", model, *photos, *options, "--json", "--top=5") == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [entry["classes"][0]["class"] for entry in found] == ["ants", "bees"]
    for entry in found:
        assert sum(choice["probability"] for choice in entry["classes"]) == pytest.approx(1)
    assert run("predict", model, trained / "insects", *options) == 0
    assert len(capsys.readouterr().out.splitlines()) == 24


@pytest.mark.parametrize("form", FORMS)
def test_accuracy(trained, form, capsys):
    model, *options = named(trained, form)
    assert run("evaluate", model, trained / "insects", *options) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "100.00% of 12 images right" in lines[0]
    assert lines[1].strip() == "100.00% of 6 images of ants"


def test_classes_are_known_by_name(trained, tmp_path, capsys):
    image_folder(tmp_path / "more", ("aphids", "bees"))
    assert run("evaluate", trained / "out" / "model.onnx", tmp_path / "more") == 1
    assert "the model knows no class 'aphids'; it knows ants, bees" in capsys.readouterr().err
    # Dark ants, bright bees: in folders of the other name all are wrong.
    image_folder(tmp_path / "wrong", ("bees", "ants"))
    assert run("evaluate", trained / "out" / "model.onnx", tmp_path / "wrong", "--part=all") == 0
    assert ": 0.00% of 12 images right" in capsys.readouterr().out


def test_files_that_cannot_be_read_are_named_and_others_answered(trained, tmp_path, capsys):
    (tmp_path / "broken.png").write_bytes(b"no image")
    good = trained / "insects" / "ants" / "1.png"
    assert run("predict", trained / "out" / "model.onnx", tmp_path / "broken.png", good) == 1
    printed = capsys.readouterr()
    assert printed.out.startswith(f"{good}: ants")
    (line,) = printed.err.splitlines()
    assert line.startswith(f"tritonq predict: {tmp_path / 'broken.png'}: ")


def test_exports_of_a_checkpoint(trained, tmp_path, capsys):
    out = trained / "out"
    for name, source in (("a.onnx", "best.pt"), ("a.pt", "best.pt"), ("a.pt2", "last.pt"), ("b.onnx", "model.int8.pt")):
        assert run("export", FACTORY, tmp_path / name, "--checkpoint", out / source) == 0
    photo = trained / "insects" / "bees" / "0.png"
    capsys.readouterr()
    said = []
    for model in ([tmp_path / "a.onnx"], [tmp_path / "b.onnx"], [FACTORY, "--checkpoint", tmp_path / "a.pt"]):
        assert run("predict", model[0], photo, *model[1:]) == 0
        said.append(capsys.readouterr().out)
    assert len(set(said)) == 1
    assert ": bees" in said[0]
    program = torch.export.load(tmp_path / "a.pt2").module()
    assert program(torch.zeros(2, 3, 8, 8)).shape == (2, 2)


@pytest.mark.filterwarnings("ignore:TensorRT takes int8 codes")
def test_a_float_model_is_calibrated(trained, tmp_path, capsys):
    torch.manual_seed(0)
    torch.save(SmallResNet(3, 2, 4).state_dict(), tmp_path / "float.pt")
    words = [FACTORY, tmp_path / "c.onnx", *ARGUMENTS, "--checkpoint", tmp_path / "float.pt", "--image-size=8"]
    assert run("export", *words) == 1
    assert "is a float model: train it, or calibrate it with --calibrate DATA" in capsys.readouterr().err
    assert run("export", *words, "--calibrate", trained / "insects", "--target=tensorrt") == 0
    assert "; it reads images scaled to 8 x 8" in capsys.readouterr().out
    session = onnxruntime.InferenceSession(tmp_path / "c.onnx", providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {session.get_inputs()[0].name: torch.zeros(1, 3, 8, 8).numpy()})
    assert logits.shape == (1, 2)
    assert run("evaluate", tmp_path / "c.onnx", trained / "insects") == 0


def test_hidden_folders_hold_no_images_to_predict(trained, tmp_path, capsys):
    (tmp_path / ".thumbnails").mkdir()
    for target in (tmp_path / "photo.png", tmp_path / ".thumbnails" / "photo.png"):
        target.write_bytes((trained / "insects" / "ants" / "0.png").read_bytes())
    assert run("predict", trained / "out" / "model.onnx", tmp_path) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"{tmp_path / 'photo.png'}: ")


def test_digits_with_any_factory(capsys):
    words = ["--model-arg=in_channels=1", "--model-arg=classes=10", "--model-arg=width=4"]
    assert run("evaluate", FACTORY, "digits", *words) == 0
    assert "as its factory gives it: " in capsys.readouterr().out


def test_mistakes_end_in_one_line(trained, tmp_path, capsys):
    out, photo = trained / "out", trained / "insects" / "ants" / "0.png"
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.onnx").write_bytes(b"no model")
    (tmp_path / "program.pt2").write_bytes(b"a program")
    for words, message in (
        (["predict", out / "best.pt", photo], f"holds no code: name its model's factory ({FACTORY} says the file)"),
        (["predict", "torch.nn:Conv2d", photo, "--checkpoint", out / "best.pt"], f"was made with {FACTORY}, not with"),
        (["predict", "torch.nn:Conv2d", photo, "--checkpoint", out / "model.int8.pt"], f"was made with {FACTORY}, not"),
        (["predict", tmp_path / "program.pt2", photo], "program.pt2 is for torch.export.load: name the checkpoint"),
        (
            ["evaluate", FACTORY, trained / "insects", "--checkpoint", tmp_path / "program.pt2"],
            "is for torch.export.load",
        ),
        (["predict", out, photo], f"{out} is a folder: name an .onnx file, or the model's factory as module:factory"),
        (["predict", "lastpt", photo], "lastpt is no file: name an .onnx file, or the model's factory"),
        (["predict", FACTORY, photo, *ARGUMENTS], "nothing says how the model's images are scaled"),
        (["predict", out / "model.onnx", photo, "--mean=0", "--std=1"], "leave out --mean, --std"),
        (["predict", out / "model.onnx", photo, "--checkpoint", out / "best.pt"], "leave out --checkpoint"),
        (["predict", FACTORY, photo, "--checkpoint", out / "best.pt", "--model-arg=width=9"], "leave out --model-arg"),
        (
            ["predict", FACTORY, photo, "--checkpoint", out / "model.int8.pt", "--model-arg=width=9"],
            "leave out --model",
        ),
        (["predict", FACTORY, photo, "--checkpoint", out / "model.onnx"], "give it as MODEL, without --checkpoint"),
        (["predict", out / "model.onnx", tmp_path / "none.png"], "none.png does not exist"),
        (["predict", out / "model.onnx", tmp_path / "empty"], "empty holds no image"),
        (["predict", out / "model.onnx", photo, "--top=0"], "at least one class is shown"),
        (["predict", tmp_path / "none.onnx", photo], "none.onnx does not exist"),
        (["predict", tmp_path / "bad.onnx", photo], "bad.onnx can't be run"),
        (["evaluate", out / "model.onnx", tmp_path / "none"], "is not a folder"),
        (["export", FACTORY, tmp_path / "x.tflite", "--checkpoint", out / "best.pt"], "ends in none of .onnx, .pt"),
        (["export", FACTORY, tmp_path / "none" / "x.pt", "--checkpoint", out / "best.pt"], "make it first"),
        (["export", out / "model.onnx", tmp_path / "x.pt"], "can't be exported again"),
        (["export", FACTORY, tmp_path / "x.pt", "--checkpoint", out / "best.pt", "--calibrate", "x"], "has its ranges"),
    ):
        assert run(*words) == 1, words
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert message in line
        assert line.startswith(f"tritonq {words[0]}: ")


def test_damaged_metadata_is_noticed(trained, tmp_path):
    content = torch.load(trained / "out" / "model.int8.pt", weights_only=True)
    content["metadata"]["classes"] = ["bees", "ants"]
    torch.save(content, tmp_path / "swapped.pt")
    with pytest.raises(ValueError, match="don't match their checksum"):
        tritonq.deploy.load_metadata(tmp_path / "swapped.pt")
    model = tritonq.load_converted(trained / "out" / "model.int8.pt", SmallResNet(3, 2, 4))
    with pytest.raises(ValueError, match="must be data that JSON can hold"):
        tritonq.save_converted(model, tmp_path / "x.pt", metadata={"a": object()})


@pytest.mark.parametrize(("preset", "codes"), [("fp8_e4m3", "float"), ("a16w8", "int16")])
def test_codes_that_are_no_bytes(trained, preset, codes, tmp_path, capsys):
    """They deploy as bytes do: the files of a run, predictions by ONNX Runtime, evaluation and export."""
    out, images = tmp_path / "out", trained / "insects"
    words = [word for word in FOLDER_MODEL[1:] if word != "--no-onnx"]
    assert run("train", FACTORY, images, *words, f"--qconfig={preset}", "--output", out) == 0
    assert f"converted ({codes})" in capsys.readouterr().out
    assert run("predict", out / "model.onnx", images / "ants") == 0
    assert run("evaluate", FACTORY, images, "--checkpoint", out / "model.int8.pt") == 0
    assert run("export", FACTORY, tmp_path / "again.onnx", "--checkpoint", out / "best.pt") == 0
    assert (tmp_path / "again.onnx").exists()


def test_a_full_disk_leaves_no_onnx_file_without_its_preprocessing(trained, tmp_path, capsys, monkeypatch):
    flush, written = os.fsync, []

    def fsync(handle):
        """Let one file be written whole; small ones only try the folder."""
        written.extend([handle] * (os.fstat(handle).st_size > 100))
        if len(written) > 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        flush(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    path = tmp_path / "model.onnx"
    assert run("export", FACTORY, path, "--checkpoint", trained / "out" / "best.pt") == 0
    assert "tritonq.metadata" in {entry.key for entry in onnx.load(path).metadata_props}
    assert run("export", FACTORY, tmp_path / "other.onnx", "--checkpoint", trained / "out" / "best.pt") == 1
    assert "other.onnx: No space left on device" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [path]


def test_without_onnx_runtime_the_file_is_written_and_not_tried(trained, tmp_path, monkeypatch, capsys):
    made, content = read_training(trained / "out" / "best.pt")
    model = prepare(made)
    load_state(model, content["state_dict"], "best.pt")
    data = open_examples(str(trained / "insects"), made.preprocessing)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert deploy(model.eval(), made, data, tmp_path, workers=0) == 0
    assert "ONNX Runtime      model.onnx not tried: " in capsys.readouterr().out
    assert (tmp_path / "model.onnx").exists()
