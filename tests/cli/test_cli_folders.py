"""Folders of images as users have them: links, names that are no text, endings of every kind, one class to measure."""

from __future__ import annotations

import errno
import os
import sys
import warnings

import pytest
import torch
from PIL import Image

from image_folders import FOLDER_MODEL, image_folder, train_on
from tritonq.__main__ import main
from tritonq.cli.data import class_names, open_examples
from tritonq.cli.folder import image_paths, readable_images
from tritonq.cli.image_files import decode
from tritonq.cli.preprocessing import Preprocessing

SMALL = Preprocessing(8, 8)


def test_links_to_folders_are_followed_once(tmp_path):
    elsewhere = image_folder(tmp_path / "elsewhere", ("red", "black"), count=2)
    folder = image_folder(tmp_path / "insects", count=1)
    (folder / "ants" / "red").symlink_to(elsewhere / "red")
    (folder / "ants" / "all").symlink_to(folder)
    (folder / "ants" / "bees").symlink_to(folder / "bees")
    (folder / "bees" / "ants").symlink_to(folder / "ants")
    found = [str(path.relative_to(folder / "ants")) for path in image_paths(folder / "ants")]
    assert found == ["0.png", "bees/0.png", "red/0.png", "red/1.png"]


def test_a_folder_that_cannot_be_read_is_told(tmp_path, capsys, monkeypatch):
    folder = image_folder(tmp_path / "insects")
    (folder / "ants" / "more").mkdir()
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("more"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert train_on(folder, tmp_path / "out") == 1
    assert "more: Permission denied" in capsys.readouterr().err


@pytest.mark.parametrize("ending", ["ppm", "pgm", "jfif", "JPE"])
def test_endings_of_images(ending, tmp_path):
    folder = image_folder(tmp_path / "insects", count=1)
    kind = {"jfif": "JPEG", "JPE": "JPEG"}.get(ending)
    Image.new("L", (4, 4)).save(folder / "ants" / f"more.{ending}", kind)
    assert len(readable_images(folder, ("ants", "bees"), SMALL, least=1)) == 3


def test_photos_that_pillow_cannot_read_are_told(tmp_path, capsys):
    folder = image_folder(tmp_path / "insects", count=1)
    (folder / "ants" / "photo.HEIC").write_bytes(b"\0\0\0\x18ftypheic")
    readable_images(folder, ("ants", "bees"), SMALL, least=1)
    assert "photo.HEIC: not an image of a kind that Pillow reads\n1 of 3 files skipped" in capsys.readouterr().err


@pytest.mark.skipif(sys.platform != "linux", reason="names of files are text there")
def test_a_class_whose_name_is_no_text(tmp_path, capsys):
    folder = image_folder(tmp_path / "insects")
    (folder / "ants").rename(os.fsdecode(os.fsencode(folder) + b"/caf\xe9"))
    output = tmp_path / "out"
    words = [FOLDER_MODEL[0], str(folder), *FOLDER_MODEL[1:-1]]
    assert main(["train", *words, "--output", str(output)]) == 0
    assert main(["train", *words, "--output", str(output), "--epochs=2", "--resume"]) == 0
    assert main(["predict", str(output / "model.onnx"), str(folder)]) == 0
    checkpoint = ["--checkpoint", str(output / "model.int8.pt")]
    assert main(["evaluate", FOLDER_MODEL[0], str(folder), *checkpoint]) == 0
    checkpoint = ["--checkpoint", str(output / "best.pt")]
    assert main(["report", FOLDER_MODEL[0], str(folder), *checkpoint, "--output", str(tmp_path / "r.html")]) == 0
    assert "caf\\udce9" in capsys.readouterr().out


def test_a_folder_of_one_class_is_measured_whole(tmp_path, capsys):
    folder = image_folder(tmp_path / "insects")
    output = tmp_path / "out"
    assert train_on(folder, output) == 0
    model = [FOLDER_MODEL[0], "--checkpoint", str(output / "best.pt")]
    new = image_folder(tmp_path / "new", ("bees",), count=1)
    assert main(["evaluate", *model, str(new), "--part=all"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[-2].endswith("of 1 images right")
    assert printed[-1].endswith("of 1 images of bees")
    assert main(["evaluate", *model, str(new)]) == 1
    assert "at least two classes" in capsys.readouterr().err
    (tmp_path / "none").mkdir()
    assert main(["evaluate", *model, str(tmp_path / "none"), "--part=all"]) == 1
    assert "expected a folder for each class" in capsys.readouterr().err
    whole = open_examples(str(new), SMALL, trains=False)
    assert (len(whole.train), len(whole.test)) == (0, 1)


def test_a_folder_for_output_is_no_class(tmp_path, capsys, monkeypatch):
    folder = image_folder(tmp_path / "insects")
    monkeypatch.chdir(folder)
    assert main(["train", FOLDER_MODEL[0], ".", *FOLDER_MODEL[1:]]) == 1
    assert capsys.readouterr().err == "tritonq train: train-output would be a class of .: pass an --output elsewhere\n"
    assert sorted(path.name for path in folder.iterdir()) == ["ants", "bees"]
    assert train_on(".", "../out") == 0
    assert capsys.readouterr().out.startswith("insects: 6 images to train with")
    (folder / "__pycache__").mkdir()
    assert train_on(".", "../again") == 1
    assert "__pycache__ holds no images, such as .png or .jpg; a folder that is no class" in capsys.readouterr().err


@pytest.mark.parametrize("channels", [1, 3])
def test_a_palette_with_transparency(channels, tmp_path):
    image = Image.effect_noise((8, 8), 50).convert("P")
    image.save(tmp_path / "plain.png")
    image.save(tmp_path / "clear.png", transparency=bytes(range(256)))
    preprocessing = Preprocessing(8, 8, channels=channels)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plain, clear = (preprocessing.pixels(decode(tmp_path / name)) for name in ("plain.png", "clear.png"))
    assert torch.equal(plain, clear)


def test_blocks_that_do_not_divide_are_told_before_training(tmp_path, capsys):
    folder = image_folder(tmp_path / "insects")
    assert train_on(folder, tmp_path / "out", "--qconfig=w_mxfp4") == 0
    printed = capsys.readouterr().out
    assert "without int8 and ONNX files: " in printed
    assert printed.index("can't be converted: mxfp4 has a deployed form where") < printed.index("epoch 1:")


def test_a_folder_beside_train_and_val_makes_no_classes_of_them(tmp_path):
    for part in ("train", "val"):
        image_folder(tmp_path / "insects" / part)
    image_folder(tmp_path / "insects", ("unsorted",))
    folder = str(tmp_path / "insects")
    with pytest.raises(ValueError, match=r"train, val, and 'unsorted' beside them: name .*train, and --valid"):
        class_names(folder)
    assert class_names(f"{folder}/train", f"{folder}/val") == ("ants", "bees")
    assert class_names(str(image_folder(tmp_path / "vehicles", ("test", "train", "van")))) == ("test", "train", "van")


def test_less_than_no_workers(tmp_path):
    with pytest.raises(ValueError, match=r"^workers must be at least 0, got -3$"):
        open_examples(str(image_folder(tmp_path / "insects")), SMALL, workers=-3)
