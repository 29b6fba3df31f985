"""The examples run as their docstrings say, on tiny data, and are short enough to copy."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import tritonq
from image_folders import image_folder
from vision_models import timm_model, torchvision_model

ROOT = Path(__file__).parent.parent.parent
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


def run(example, *words, cwd, launcher=()):
    """What an example prints."""
    script = [str(ROOT / "tests" / "support" / "run_example.py"), str(ROOT / "examples" / example)]
    process = subprocess.Popen(
        [sys.executable, *launcher, *script, *map(str, words)],
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        output, errors = process.communicate(timeout=150)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # the ranks too
        raise
    assert process.returncode == 0, errors[-3000:]
    return output


# Long, since they make their data and measure the deployed model too; and for minutes, or libraries that are not here.
LONG = ("segmentation.py", "yolo.py")


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_it_is_short(path):
    lines = path.read_text().splitlines()
    assert len(lines) < (200 if path.name in LONG else 80)
    assert lines[0].startswith('"""')
    assert f"{path.name}" in path.read_text(), "its docstring shows the command"


def test_every_example_is_run_here():
    tested = Path(__file__).read_text()
    for path in EXAMPLES:
        assert f'run("{path.name}"' in tested or path.name in LONG, path.name


def test_segmentation_tells_how_to_run_it(tmp_path):
    assert "--quick" in run("segmentation.py", "--help", cwd=tmp_path)


def test_calibration(tmp_path):
    printed = run("calibrate.py", "--epochs", 4, "--images", 128, cwd=tmp_path)
    scores = dict(re.findall(r"^(\w+) +([\d.]+)%$", printed, re.MULTILINE))
    assert set(scores) == {"float", "calibrated", "refined", "converted"}
    assert float(scores["float"]) > 80
    assert float(scores["calibrated"]) > float(scores["float"]) - 3
    assert scores["converted"] == scores["refined"]
    assert "no code differs" in printed
    assert (tmp_path / "digits.int8.pt").exists()


def test_own_quantizer(tmp_path):
    printed = run("own_quantizer.py", cwd=tmp_path)
    assert "checked: interface, values" in printed
    assert "no code differs" in printed


def test_coming_from_torch_ao(tmp_path):
    printed = run("from_torch_ao.py", cwd=tmp_path)
    assert "0 not mapped, 0 not in the file" in printed
    before, after = (float(loss) for loss in re.findall(r"loss ([\d.]+)", printed))
    assert after < before < 0.7
    assert "no code differs" in printed


def test_fine_tuning_timm(tmp_path):
    image_folder(tmp_path / "photos", count=8)
    words = ["photos", "--model", "resnet10t", "--size", 32, "--epochs", 2, "--batch-size", 8, "--workers", 0, "--amp"]
    printed = run("finetune_timm.py", *words, cwd=tmp_path)
    assert "no code differs" in printed
    assert "epoch 2: loss" in printed
    float_model = timm_model("resnet10t")
    float_model.reset_classifier(2)
    model = tritonq.load_converted(tmp_path / "model.int8.pt", float_model)
    assert model(torch.randn(1, 3, 32, 32)).shape == (1, 2)


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without torch.distributed")
def test_ddp(tmp_path):
    for part in ("train", "val"):
        image_folder(tmp_path / "data" / part, count=4)
    words = ["data", "--model", "resnet18", "--size", 32, "--epochs", 2, "--batch-size", 2, "--workers", 0]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    printed = run("imagenet_ddp.py", *words, cwd=tmp_path, launcher=torchrun)
    assert "epoch 2:" in printed
    float_model = torchvision_model("resnet18")
    float_model.fc = torch.nn.Linear(512, 1000)
    model = tritonq.load_converted(tmp_path / "int8.pt", float_model)
    assert model(torch.randn(1, 3, 32, 32)).shape == (1, 1000)
