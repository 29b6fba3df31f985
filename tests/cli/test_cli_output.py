"""Standard output of a command: letters that it has no code for, a reader that ends early, a full disk."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from image_folders import FOLDER_MODEL, image_folder, train_on
from tritonq.__main__ import main
from tritonq.cli.checkpoints import read_training
from tritonq.cli.output import printed_whole

FULL = Path("/dev/full")
CLOSED = 141


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_letters_without_a_code_become_escapes(encoding, monkeypatch):
    stdout = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", stdout)
    with printed_whole():
        print("\u4e2d and \udce9")
    printed = stdout.buffer.getvalue().decode(encoding)
    assert printed.strip() in ("\u4e2d and \\udce9", "\\u4e2d and \\udce9")
    assert stdout.errors == "strict"


def test_classes_are_evaluated_on_a_terminal_of_few_letters(tmp_path, monkeypatch):
    folder = image_folder(tmp_path / "images", ("ants", "\u4e2d"))
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    assert main(["evaluate", FOLDER_MODEL[0], str(folder), *FOLDER_MODEL[1:-3], "--image-size=8"]) == 0
    assert b"images of \\u4e2d" in sys.stdout.buffer.getvalue()


def closed_pipe():
    reads, writes = os.pipe()
    os.close(reads)
    return writes


def full_disk():
    return os.open(FULL, os.O_WRONLY)


@pytest.mark.skipif(not FULL.exists(), reason="needs the device /dev/full")
@pytest.mark.parametrize(
    ("make", "status", "told"),
    [
        (closed_pipe, CLOSED, ""),
        (full_disk, 1, "tritonq: the output can't be written: No space left on device\n"),
    ],
)
def test_output_that_cannot_be_written_has_no_traceback(make, status, told):
    output = make()
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    words = [sys.executable, "-m", "tritonq", "--version"]
    ended = subprocess.run(
        words, stdout=output, stderr=subprocess.PIPE, text=True, check=False, env=environment, timeout=100
    )
    os.close(output)
    assert (ended.returncode, ended.stderr) == (status, told)


def test_training_whose_output_nobody_reads_keeps_its_epoch(tmp_path, monkeypatch):
    folder = image_folder(tmp_path / "images")

    class Terminal(io.StringIO):
        def write(self, text):
            if text.startswith("epoch 1"):
                raise BrokenPipeError
            return super().write(text)

    monkeypatch.setattr(sys, "stdout", Terminal())
    assert train_on(folder, tmp_path / "out") == CLOSED
    assert len(read_training(tmp_path / "out" / "last.pt")[1]["history"]) == 1
