"""One measurement: prepare a float model by a method, train it, deploy it, and record its answers."""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tritonq.perf.accuracy.data import CLASSES, Split, Task
from tritonq.perf.accuracy.deployment import deploy
from tritonq.perf.accuracy.nets import NETS
from tritonq.perf.accuracy.plan import ALL_METHODS, Measurement, recipes_of
from tritonq.perf.accuracy.request import Request
from tritonq.perf.accuracy.training import BATCH, answers_of, loss_of, outputs_of, score, train
from tritonq.perf.machine import environment
from tritonq.perf.memory import saved_bytes

_FLOAT_RATE, _FLOAT_DECAY = 0.1, 5e-4
# Images for methods that are not trained.
_CALIBRATION = 1000


@dataclass(frozen=True)
class Budget:
    """How much data and how many epochs every method gets.

    Attributes:
        images: training images.
        held_out: images that recipes are chosen by.
        tested: test images.
        float_epochs: epochs of the float model.
        epochs: epochs of training with rounding.
    """

    images: int
    held_out: int
    tested: int
    float_epochs: int
    epochs: int


FULL, QUICK = Budget(10_000, 5_000, 10_000, 20, 2), Budget(300, 100, 100, 1, 1)


def is_installed(method: str) -> bool:
    """Whether the library of the method with this name can be imported."""
    return all(find_spec(module) for module in ALL_METHODS[method].modules)


def measure(item: Measurement, task: Task, budget: Budget, out: Path) -> dict[str, Any]:
    """Train one model with rounding and deploy it; return the numbers that were measured, as plain data.

    Answers to the test images are written to a file and not looked at: :func:`test_accuracy` compares those of the
    chosen recipes with the labels.
    """
    method, recipe = ALL_METHODS[item.method], recipes_of(item.method)[item.recipe]
    float_model = _float_model(item, task, budget, out)
    float_accuracy = _accuracy(outputs_of(float_model, task.validation.images), task.validation)
    torch.manual_seed(item.seed)
    teacher = None if method.further_loss is None else copy.deepcopy(float_model)
    images = task.train.images
    bits = (item.weights, item.activations)
    model = method.make(Request(item.net, CLASSES, float_model, *bits, images[:BATCH], images[:_CALIBRATION]))
    further_loss = None if teacher is None or method.further_loss is None else method.further_loss(model, teacher)
    start = time.perf_counter()
    if method.is_trained:
        rates = recipe.learning_rate, recipe.weight_decay
        train(model, task.train, budget.epochs, *rates, item.seed, further_loss, method.end_search)
    seconds = (time.perf_counter() - start) / budget.epochs
    images = torch.cat([task.validation.images, task.test.images])
    outputs = outputs_of(model, images)
    held_out = len(task.validation.images)
    record: dict[str, Any] = {
        "float": float_accuracy,
        "validation": _accuracy(outputs[:held_out], task.validation),
        "seconds_per_epoch": seconds,
        "versions": {name: _version(name) for name in method.distributions},
    }
    answered = outputs
    if method.library == "tritonq":
        deployed = deploy(model, images)
        answered = deployed.outputs
        record |= {
            "deployed": _accuracy(answered[:held_out], task.validation),
            "different_outputs": int((answered != outputs).sum()),
            "engine": deployed.engine,
            "onnx_bytes": deployed.onnx_bytes,
            "file_bytes": deployed.file_bytes,
            "most_values": deployed.most_values,
        }
    path = _answers_path(item, out)
    path.parent.mkdir(exist_ok=True)
    np.save(path, answers_of(answered[held_out:], task.test.targets).to(torch.uint8).numpy())
    # Last, since a training step moves statistics.
    return {**record, "saved_bytes": _saved_bytes(model, task.train), "environment": environment(torch.device("cpu"))}


def test_accuracy(item: Measurement, task: Task, out: Path) -> float | None:
    """Compare the answers of a measurement with the labels of the test images; return the percentage that is right.

    None if the file of answers is missing.
    """
    path = _answers_path(item, out)
    if not path.exists():
        return None
    answers = torch.from_numpy(np.load(path))
    targets = task.test.targets
    return score(answers.to(targets.dtype if targets.dim() == 1 else torch.bool), targets)


test_accuracy.__test__ = False  # type: ignore[attr-defined]  # no test of pytest's


def _answers_path(item: Measurement, out: Path) -> Path:
    name = f"{item.task}-{item.net}-{item.method}-{item.row.bits}-{item.seed}-{item.recipe}"
    return out / "answers" / f"{name.replace(' ', '_')}.npy"


def _accuracy(outputs: Tensor, split: Split) -> float:
    return score(answers_of(outputs, split.targets), split.targets)


def _saved_bytes(model: nn.Module, data: Split) -> int:
    """Return the bytes that autograd keeps of a training step with one batch."""
    images, targets = data.images[:BATCH], data.targets[:BATCH]
    model.train()
    excluded = [images, *model.parameters(), *model.buffers()]
    return saved_bytes(lambda given: (loss_of(model(given["x"]), targets),), {"x": images}, excluded)


def _float_model(item: Measurement, task: Task, budget: Budget, out: Path) -> nn.Module:
    """Return the float model of a seed; it is trained once and then read from a file."""
    torch.manual_seed(item.seed)
    model = NETS[item.net](CLASSES)
    path = out / f"float-{item.task}-{item.net}-{item.seed}-{budget.images}-{budget.float_epochs}.pt"
    if path.exists():
        model.load_state_dict(torch.load(path, weights_only=True))
    else:
        train(model, task.train, budget.float_epochs, _FLOAT_RATE, _FLOAT_DECAY, item.seed)
        torch.save(model.state_dict(), path)
    return model


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None
