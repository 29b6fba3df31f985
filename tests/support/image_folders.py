"""Small folders of images for the tests of the command line."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image

from digits_runs import train


def image_folder(root: Path, classes: tuple[str, ...] = ("ants", "bees"), count: int = 6) -> Path:
    """Return one sub-folder per class; pixels are random, and brighter from class to class."""
    generator = torch.Generator().manual_seed(0)
    for label, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for k in range(count):
            pixels = torch.randint(0, 120, (9, 7, 3), generator=generator, dtype=torch.uint8) + 100 * (label % 2)
            Image.fromarray(pixels.numpy()).save(root / name / f"{k}.png")
    return root


# A module with a factory of a model of two classes.
SMALLNET = """
from torch import nn

def make(width=4):
    return nn.Sequential(nn.Conv2d(3, width, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 2))
"""
FOLDER_MODEL = [
    "tritonq.demo.model:SmallResNet",
    *(f"--model-arg={word}" for word in ("in_channels=3", "classes=2", "width=4")),
    *("--image-size=8", "--batch-size=4", "--epochs=1", "--no-onnx"),
]


def train_on(folder, output, *words):
    """Run `tritonq train` on a folder of images in this process; return its exit code."""
    return train(FOLDER_MODEL[0], folder, *FOLDER_MODEL[1:], *words, "--output", output)
