"""`python -m tritonq train` in two processes, as torchrun starts them."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from image_folders import image_folder
from tritonq.cli.checkpoints import read_training
from tritonq.cli.classification import accuracy, logits
from tritonq.cli.data import load_digits, open_examples
from tritonq.cli.models import prepare
from tritonq.cli.preprocessing import Preprocessing

MODEL = ["tritonq.demo.model:SmallResNet", "digits"]
SIZES = ["--model-arg=in_channels=1", "--model-arg=classes=10", "--model-arg=width=4"]
SHORT = ["--batch-size=128", "--epochs=2", "--frozen-epochs=1", "--learning-rate=0.05", "--no-onnx"]
FILES = ["best.pt", "last.pt", "log.csv", "model.int8.pt"]

TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m"]


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without torch.distributed")
def test_two_processes_train_one_model(tmp_path):
    words = ["tritonq", "train", *MODEL, *SIZES, *SHORT, "--output", str(tmp_path)]
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


def test_one_process_alone_names_what_is_skipped(tmp_path, capsys):
    folder = image_folder(tmp_path / "insects")
    (folder / "ants" / "broken.png").write_bytes(b"no image")
    open_examples(str(folder), Preprocessing(8, 8), quiet=True)
    assert capsys.readouterr().err == ""
    open_examples(str(folder), Preprocessing(8, 8))
    assert "broken.png" in capsys.readouterr().err
