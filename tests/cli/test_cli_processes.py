"""`python -m tritonq train` in two processes, as torchrun starts them."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist

from digits_runs import DIGITS, FILES, new_run
from image_folders import image_folder
from tritonq.__main__ import main
from tritonq.cli.checkpoints import read_training, save_training
from tritonq.cli.classification import accuracy, logits
from tritonq.cli.data import load_digits, open_examples
from tritonq.cli.models import prepare
from tritonq.cli.preprocessing import Preprocessing
from tritonq.cli.processes import joined
from tritonq.cli.same_run import step_among
from tritonq.cli.settings import Settings

TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m"]


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without torch.distributed")
def test_two_processes_train_one_model(tmp_path):
    words = ["tritonq", "train", *DIGITS, "--frozen-epochs=1", "--output", str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    process = subprocess.run(
        [sys.executable, *TORCHRUN, *words], capture_output=True, text=True, check=False, env=environment, timeout=150
    )
    assert process.returncode == 0, process.stderr[-3000:]
    assert process.stdout.count("epoch 2: ") == 1
    assert "0 of" in process.stdout
    assert sorted(os.listdir(tmp_path)) == FILES
    state = read_training(tmp_path / "last.pt")[1]
    assert (state["step"], len(state["random"])) == (14, 2)  # the last two of 898 images are too few for two processes
    recipe, best = read_training(tmp_path / "best.pt")
    trained = prepare(recipe)
    trained.load_state_dict(best["state_dict"])
    data = load_digits()
    score = accuracy(logits(trained, data.test_images), data.test_labels)
    assert score == pytest.approx(best["accuracy"])  # every process measured one model
    # One process goes on, whose epochs have a step more.
    assert main([*words[1:], "--epochs=3", "--resume"]) == 0
    more = read_training(tmp_path / "last.pt")[1]
    assert (more["step"], len(more["random"])) == (3 * 8, 1)
    assert more["history"][:2] == state["history"]
    assert [(epoch["epoch"], epoch["step"]) for epoch in more["history"]] == [(1, 7), (2, 14), (3, 24)]


def test_steps_where_another_number_of_processes_goes_on():
    settings = Settings("", 3, 0, 128, 0.05, 0, "off")
    assert (settings.steps_per_epoch(898), settings.steps_per_epoch(898, 2)) == (8, 7)
    assert [step_among(step, 8, 7) for step in (0, 6, 8, 14, 24)] == [0, 6, 7, 13, 21]
    assert [step_among(step, 7, 8) for step in (0, 6, 7, 13, 21)] == [0, 6, 8, 14, 24]
    with pytest.raises(ValueError, match="step 15 is followed by a batch that is too small for so many processes"):
        step_among(15, 8, 7)


def test_the_loss_of_an_epoch_goes_on_in_one_process(tmp_path):
    """A checkpoint of two processes, three steps into an epoch, holds each one's part of the sum."""
    run = new_run(tmp_path)
    run.step = 3
    run.save()
    made, content = read_training(run.path)
    (state,) = content["random"]
    content["random"] = [{**state, "loss_sum": part} for part in (100.0, 23.0)]
    save_training(run.path, made, content)
    again = new_run(tmp_path)
    assert again.resume() == 3
    assert float(again.loss_sum) == 123.0


def test_one_process_alone_names_what_is_skipped(tmp_path, capsys):
    folder = image_folder(tmp_path / "insects")
    (folder / "ants" / "broken.png").write_bytes(b"no image")
    open_examples(str(folder), Preprocessing(8, 8), quiet=True)
    assert capsys.readouterr().err == ""
    open_examples(str(folder), Preprocessing(8, 8))
    assert "broken.png" in capsys.readouterr().err


@pytest.fixture
def group(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        yield dist.group.WORLD
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


@pytest.mark.parametrize("torchrun", [False, True])
def test_a_process_group_that_was_there_stays(torchrun, group, tmp_path, capsys, monkeypatch):
    if torchrun:
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    assert main(["train", "builtins:dict", "digits", "--output", str(tmp_path / "out")]) == 1
    assert "tritonq train: " in capsys.readouterr().err
    assert dist.group.WORLD is group
    with joined(torch.device("cpu")) as (processes, _):
        assert (processes.rank, processes.count) == (0, 1)
    assert dist.is_initialized()


def test_a_process_group_of_its_own_is_left(tmp_path, monkeypatch):
    for name, value in {"TORCHELASTIC_RUN_ID": "1", "RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_PORT", "0")
    with joined(torch.device("cpu")):
        assert dist.is_initialized()
    assert not dist.is_initialized()
