"""The commands that README and the pages show run, in order, on a small folder of images: long ones in a quick form."""

from __future__ import annotations

import shlex

import pytest
import torch

from image_folders import image_folder
from pages import PAGES, ROOT, commands
from tritonq.__main__ import main

# The model of the pages, and what stands for it here.
LARGE, SMALL = "torchvision.models:resnet18", "net_of_pages:resnet18"
SMALLNET = """
from torch import nn

def resnet18(num_classes=5):
    convolution = [nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU()]
    return nn.Sequential(*convolution, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, num_classes))
"""
# Options that make a command quick.
QUICK = {
    "train": ["--epochs=1", "--image-size=8", "--batch-size=8", "--checkpoint-every=100"],
    "report": ["--images=4"],
    "bench": ["--list"],
}
# Run by CI as they stand, or by the tests of their own.
ELSEWHERE = ("demo", "tune")


def shown():
    """Return each command of tritonq on README and the pages, once, beginning with the page on commands."""
    found = {}
    for path in [ROOT / "docs" / "command-line.md", ROOT / "README.md", *PAGES]:
        for command in commands(path):
            words = shlex.split(command)
            if words[:3] == ["python", "-m", "tritonq"]:
                found[tuple(words[3 : words.index(">>") if ">>" in words else None])] = None
    return list(found)


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    (tmp_path / "net_of_pages.py").write_text(SMALLNET)
    image_folder(tmp_path / "photos", tuple("abcde"), count=4)
    image_folder(tmp_path / "new-photos", ("any",), count=2)
    names = {}
    exec(SMALLNET, names)
    torch.manual_seed(0)
    torch.save(names["resnet18"]().state_dict(), tmp_path / "float.pt")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))


@pytest.mark.filterwarnings("default")  # a command may warn, as that which exports for another engine does
def test_every_command_of_the_pages(workplace, capsys):
    """One after the other, since most read what `train` wrote."""
    run = shown()
    assert {words[0] for words in run} >= {
        "train",
        "predict",
        "evaluate",
        "export",
        "report",
        "doctor",
        "demo",
        "bench",
    }
    for number, given in enumerate(run):
        if given[0] in ELSEWHERE:
            continue
        words = [word.replace(LARGE, SMALL) for word in given] + QUICK.get(given[0], [])
        if given[0] == "train" and number:
            words += ["--output", f"run-{number}"]
        assert main(words) == 0, (given, capsys.readouterr().err)
