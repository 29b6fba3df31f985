"""Factories of users that fail in their own ways, and modules that are not what they are taken for."""

from __future__ import annotations

import json
import re
import sys
from contextlib import nullcontext

import pytest
import torch
from torch import nn

from digits_runs import train
from image_folders import image_folder, train_on
from tritonq.__main__ import main
from tritonq.cli.models import find_qconfig, make_model
from tritonq.cli.processes import Processes

HERE = __name__
MODEL = nn.Linear(2, 2)


def leaves():
    sys.exit("usage: make.py")


def asserts():
    raise AssertionError


def adds():
    return None + 1


def frozen(classes=2):
    return nn.Sequential(nn.Flatten(), nn.Linear(192, classes)).requires_grad_(False)


@pytest.mark.parametrize(
    ("factory", "words", "message"),
    [
        ("leaves", (), f"{HERE}:leaves() raised SystemExit: usage: make.py"),
        ("asserts", (), f"{HERE}:asserts() raised AssertionError"),
        ("adds", (), f"{HERE}:adds() raised TypeError: unsupported operand"),
        ("frozen", ("clases=3",), f"{HERE}:frozen(clases=3) raised TypeError: frozen() got an unexpected"),
        ("frozen", ("clases=3",), "; --model-arg KEY=VALUE gives an argument"),
        ("frozen", ("clases={[]: 1}",), "raised TypeError: frozen() got an unexpected"),
        ("MODEL", (), f"'{HERE}:MODEL' is not a factory but a Linear: name a function that returns one"),
        ("adze", (), f"({__file__}) has no 'adze'; did you mean 'adds'?"),
    ],
)
def test_what_a_factory_does_wrong_is_told(factory, words, message):
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        make_model(f"{HERE}:{factory}", words)
    assert not str(error.value).endswith(":")


@pytest.mark.parametrize(
    ("name", "dotted"),
    [("./net", "net"), ("models/net.py", "models.net"), ("..net", "net"), ("src\\net", "src.net"), (".net", "net")],
)
def test_a_path_is_no_module(name, dotted):
    with pytest.raises(ValueError, match=rf"named as in an import, .*: {dotted}:small$"):
        make_model(f"{name}:small")


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("import sys\nsys.exit(2)\n", "it ends the program: .*__main__"),
        ("raise RuntimeError('operator nms does not exist')\n", "RuntimeError: operator nms does not exist"),
    ],
)
def test_a_script_that_fails_when_it_is_imported_is_named(script, reason, tmp_path, monkeypatch):
    (tmp_path / "my_script_for_this_test.py").write_text(script)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    with pytest.raises(ValueError, match=f"can't be imported: {reason}"):
        make_model("my_script_for_this_test:small")


def test_modules_of_the_working_directory_come_first(tmp_path, monkeypatch):
    for folder in ("installed", "here"):
        (tmp_path / folder).mkdir()
        text = f"from torch import nn\ndef make():\n    return nn.Linear(1, {len(folder)})\n"
        (tmp_path / folder / "my_shadowed_models_for_this_test.py").write_text(text)
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(sys, "path", [str(tmp_path / "installed"), *sys.path])
    assert make_model("my_shadowed_models_for_this_test:make").out_features == len("here")


def test_what_cannot_be_trained_is_told_before_an_image_is_read(tmp_path, capsys, monkeypatch):
    folder = image_folder(tmp_path / "images")
    (folder / "ants" / "broken.png").write_text("no image")
    assert train(f"{HERE}:frozen", folder, "--image-size=8", "--output", tmp_path / "out") == 1
    assert capsys.readouterr().err == "tritonq train: Sequential has no parameter that requires a gradient\n"
    alone = nullcontext((Processes(0, 2), torch.device("cpu")))
    monkeypatch.setattr("tritonq.cli.train.joined", lambda device: alone)
    assert train_on(folder, tmp_path / "b", "--batch-size=2") == 1
    assert capsys.readouterr().err == "tritonq train: batch size 2 gives 2 processes less than two images each\n"


def test_a_missing_file_of_qconfigs_is_named_once():
    with pytest.raises(ValueError, match=r"^none.json can't be read: No such file or directory$"):
        find_qconfig("none.json")


def test_what_a_factory_prints_is_kept_apart_from_the_answers(tmp_path, monkeypatch, capsys):
    (tmp_path / "my_talking_models_for_this_test.py").write_text(
        "from torch import nn\nprint('imported')\ndef make():\n    print('made')\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(192, 2))\n"
    )
    folder = image_folder(tmp_path / "images", count=1)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    words = ["--image-size=8", "--mean=0.5", "--std=0.5", "--json"]
    assert main(["predict", "my_talking_models_for_this_test:make", str(folder), *words]) == 0
    printed = capsys.readouterr()
    assert [sorted(json.loads(line)) for line in printed.out.splitlines()] == [["classes", "image"]] * 2
    assert printed.err == "imported\nmade\n"
