"""Files of strangers: a pickle in the place of a checkpoint ends in one line, and runs no code, whatever reads it."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch

import tritonq
from image_folders import SMALLNET, image_folder
from tritonq.__main__ import main


class Attack:
    """Creates a file where its pickle is loaded without care."""

    def __reduce__(self):
        return Path.touch, (Path("attacked"),)


def zipped(path):
    torch.save({"state_dict": Attack(), "tritonq": Attack()}, path)


def legacy(path):
    torch.save({"state_dict": Attack()}, path, _use_new_zipfile_serialization=False)


def plain_pickle(path):
    path.write_bytes(pickle.dumps(Attack()))


READERS = {
    "train --weights": ["train", "smallnet:make", "photos", "--weights", "evil/last.pt"],
    "train --resume": ["train", "smallnet:make", "photos", "--output", "evil", "--resume"],
    "evaluate": ["evaluate", "smallnet:make", "photos", "--checkpoint", "evil/last.pt"],
    "export": ["export", "smallnet:make", "out.onnx", "--checkpoint", "evil/last.pt"],
    "report": ["report", "smallnet:make", "photos", "--checkpoint", "evil/last.pt"],
    "predict": ["predict", "smallnet:make", "photos/a", "--checkpoint", "evil/last.pt"],
}


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    (tmp_path / "smallnet.py").write_text(SMALLNET)
    (tmp_path / "evil").mkdir()
    image_folder(tmp_path / "photos", ("a", "b"), count=2)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("write", [zipped, legacy, plain_pickle])
@pytest.mark.parametrize("words", READERS.values(), ids=READERS)
def test_a_pickle_runs_no_code(words, write, workplace, capsys):
    write(workplace / "evil" / "last.pt")
    try:
        status = main(words)
    except SystemExit as error:
        status = error.code
    assert status
    assert not Path("attacked").exists()
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("tritonq ")]
    assert len(errors) == 1


@pytest.mark.parametrize("write", [zipped, legacy, plain_pickle])
def test_converted_files_run_no_code(write, workplace):
    write(workplace / "evil" / "model.int8.pt")
    with pytest.raises((ValueError, OSError)):
        tritonq.load_converted(workplace / "evil" / "model.int8.pt", torch.nn.Linear(2, 2))
    assert not Path("attacked").exists()


def test_the_attack_works_where_files_are_loaded_without_care(workplace):
    zipped(workplace / "evil" / "last.pt")
    torch.load(workplace / "evil" / "last.pt", weights_only=False)
    assert Path("attacked").exists()
