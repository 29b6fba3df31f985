"""The log for TensorBoard: what its own reader finds, also after a disk was full."""

from __future__ import annotations

import errno
import os
import resource
import shutil
from pathlib import Path

import pytest

from digits_runs import DIGITS, train
from full_disk import growing_no_further_than
from tritonq.cli.training_log import Epoch, TensorBoard

pytest.importorskip("tensorboard")

WORDS = [*DIGITS, "--batch-size=256", "--epochs=3", "--frozen-epochs=0", "--tensorboard"]


def epoch(number: int) -> Epoch:
    return Epoch(number, 8 * number, 0.5**number, 2.0 / number, 0.25 * number)


def read(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Return what TensorBoard would draw: of each value the steps with their numbers."""
    from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader

    (path,) = folder.iterdir()
    curves: dict[str, list[tuple[int, float]]] = {}
    for event in LegacyEventFileLoader(str(path)).Load():
        for value in event.summary.value:
            curves.setdefault(value.tag, []).append((event.step, value.simple_value))
    return curves


def test_it_reads_what_was_logged(tmp_path: Path) -> None:
    board = TensorBoard(tmp_path / "tensorboard")
    for number in (1, 2):
        board.add(epoch(number))
    assert read(tmp_path / "tensorboard") == {
        "loss": [(1, 2.0), (2, 1.0)],
        "accuracy": [(1, 0.25), (2, 0.5)],
        "learning_rate": [(1, 0.5), (2, 0.25)],
    }


@pytest.mark.parametrize("spare", [0, 10], ids=["nothing fits", "half a record fits"])
def test_a_full_disk_loses_no_epoch(spare: int, tmp_path: Path) -> None:
    board = TensorBoard(tmp_path)
    board.add(epoch(1))
    (path,) = tmp_path.iterdir()
    with growing_no_further_than(path.stat().st_size + spare):
        for number in (2, 3):
            with pytest.raises(OSError, match="File too large") as raised:
                board.add(epoch(number))
            assert raised.value.filename == str(path)
    board.add(epoch(4))
    assert [step for step, _ in read(tmp_path)["loss"]] == [1, 2, 3, 4]


def test_a_log_that_vanished_is_written_again(tmp_path: Path) -> None:
    board = TensorBoard(tmp_path / "tensorboard")
    board.add(epoch(1))
    shutil.rmtree(tmp_path / "tensorboard")
    board.add(epoch(2))
    assert [step for step, _ in read(tmp_path / "tensorboard")["loss"]] == [1, 2]


def test_a_log_that_fails_costs_one_line(tmp_path: Path, monkeypatch, capfd) -> None:
    """The log can not grow in the first two epochs, and can in the third."""
    add = TensorBoard.add

    def add_within_limits(self: TensorBoard, done: Epoch) -> None:
        with growing_no_further_than(0 if done.epoch < 3 else resource.RLIM_INFINITY):
            add(self, done)

    monkeypatch.setattr(TensorBoard, "add", add_within_limits)
    assert train(*WORDS, "--output", tmp_path) == 0
    (path,) = (tmp_path / "tensorboard").iterdir()
    assert capfd.readouterr().err == f"tritonq train: {path}: File too large; training goes on\n"
    assert [step for step, _ in read(tmp_path / "tensorboard")["loss"]] == [1, 2, 3]


@pytest.mark.parametrize("reason", [errno.ENOSPC, errno.EROFS], ids=["full", "read-only"])
def test_a_log_that_cannot_begin_is_told_before_an_image_is_read(reason, tmp_path, monkeypatch, capfd) -> None:
    def refused(self: Path, *args: object, **choices: object) -> None:
        raise OSError(reason, os.strerror(reason))

    monkeypatch.setattr("tritonq.cli.train.open_examples", None)
    with monkeypatch.context() as patches:
        patches.setattr("tritonq.cli.training_log.Path.open", refused)
        assert train(*WORDS, "--output", tmp_path) == 1
    (line,) = capfd.readouterr().err.splitlines()
    folder = tmp_path / "tensorboard"
    assert line.startswith(f"tritonq train: {folder}{os.sep}events.out.tfevents.")
    assert line.endswith(f": {os.strerror(reason)}")
