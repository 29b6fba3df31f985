"""Short runs of `tritonq train` on scikit-learn's digits."""

from __future__ import annotations

from pathlib import Path

from tritonq.__main__ import main
from tritonq.cli.checkpoints import ModelRecipe, read_training
from tritonq.cli.data import open_examples
from tritonq.cli.models import find_qconfig, prepare
from tritonq.cli.preprocessing import Preprocessing
from tritonq.cli.settings import Settings
from tritonq.cli.training_loop import Run
from tritonq.qconfig_files import mapping_to_data

MODEL = ["tritonq.demo.model:SmallResNet", "digits", *(f"--model-arg={word}" for word in ("classes=10", "width=4"))]
SHORT = ["--model-arg=in_channels=1", "--batch-size=128", "--epochs=2", "--learning-rate=0.05", "--no-onnx"]
DIGITS = [*MODEL, *SHORT]
# What a run leaves in its folder.
FILES = ["best.pt", "last.pt", "log.csv", "model.int8.pt"]
RECIPE = ModelRecipe(
    "tritonq.demo.model:SmallResNet",
    ("in_channels=1", "classes=10", "width=4"),
    mapping_to_data(find_qconfig("onnxruntime")),
    Preprocessing(8, 8, channels=1),
)


def train(*words):
    """Run `tritonq train` in this process; return its exit code."""
    return main(["train", *map(str, words)])


def state_of(folder):
    """Return the content of the checkpoint `last.pt`."""
    return read_training(Path(folder) / "last.pt")[1]


def new_run(folder, amp="off", **options):
    """Return a run of one epoch in steps of 256 images, in this process; it has done nothing yet."""
    settings = Settings("", 1, 0, 256, 0.01, 0, amp)
    data = open_examples("digits", RECIPE.preprocessing)
    return Run(RECIPE, prepare(RECIPE), settings, data, folder, **options)
