"""The command: what is still to do, one measurement after the other, until the time is over."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

import tritonq
from tritonq.perf.accuracy.data import CLASSES, Task, generate, load
from tritonq.perf.accuracy.methods import METHODS, mapping_of
from tritonq.perf.accuracy.nets import NETS
from tritonq.perf.accuracy.training import accuracy, train
from tritonq.perf.machine import environment

_WIDTHS = ((8, 8), (4, 4), (2, 4), (2, 2))
_FLOAT_RATE, _FLOAT_DECAY, _DECAY = 0.1, 5e-4, 1e-4


@dataclass(frozen=True)
class Measurement:
    """One training with rounding, of one float model."""

    task: str
    net: str
    method: str
    weights: int
    activations: int
    seed: int


@dataclass(frozen=True)
class Budget:
    """How much everyone trains; quick runs take little of it."""

    images: int
    held_out: int
    float_epochs: int
    epochs: int


FULL, QUICK = Budget(10_000, 5_000, 20, 2), Budget(300, 100, 1, 1)


def main(arguments: list[str] | None = None) -> int:
    """Measure what the results file lacks, print a table, and return 0 when everything is done."""
    parser = argparse.ArgumentParser(prog="python -m tritonq.perf.accuracy", description=__doc__)
    parser.add_argument("data", type=Path, nargs="?", help="folder with Fashion-MNIST's four idx files")
    parser.add_argument("--out", type=Path, default=Path("accuracy-output"), help="where results and models go")
    parser.add_argument("--minutes", type=float, default=9.0, help="begin no further measurement after so long")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--quick", action="store_true", help="generated data, one width and seed: a test of the command"
    )
    given = parser.parse_args(arguments)
    if given.data is None and not given.quick:
        parser.error("data is needed: Debian's package dataset-fashion-mnist has it, or any copy of the four files")
    until = time.monotonic() + 60 * given.minutes
    given.out.mkdir(parents=True, exist_ok=True)
    wanted = list(_plan(given.quick, given.seeds))
    path = given.out / ("quick.jsonl" if given.quick else "results.jsonl")
    with tempfile.TemporaryDirectory() as generated:
        folder, budget = given.data or Path(generated), QUICK if given.quick else FULL
        if given.data is None:
            generate(folder, budget.images + budget.held_out, budget.held_out)
        tasks: dict[str, Task] = {}
        for item in wanted:
            if item in read(path) or time.monotonic() > until:
                continue
            if item.task not in tasks:
                tasks[item.task] = load(folder, budget.images, budget.held_out, item.task == "pasted")
            _append(path, measure(item, tasks[item.task], budget, given.out))
    found = read(path)
    print(table(found))
    left = [item for item in wanted if item not in found]
    if left:
        print(f"{len(left)} of {len(wanted)} measurements are left: run the command again")
    return 1 if left else 0


def _plan(quick: bool, seeds: int) -> list[Measurement]:
    if quick:
        return [Measurement("garments", "residual", method, 2, 2, 0) for method in ("lsq", "ranges")]
    return [
        Measurement(task, net, method, *widths, seed)
        for seed in range(seeds)
        for task in ("garments", "pasted")
        for net in NETS
        for widths in _WIDTHS
        for method in METHODS
    ]


def measure(item: Measurement, task: Task, budget: Budget, out: Path) -> dict[str, Any]:
    """Train one model with rounding, deploy it, and return what came of it, as plain data.

    Accuracies are of the validation split; who has chosen by them reads the test split once, from the same models.
    """
    model = _float_model(item, task, budget, out)
    float_accuracy = accuracy(model, task.validation)
    torch.manual_seed(item.seed)
    mapping = mapping_of(item.method, item.weights, item.activations)
    example = task.train.images[:16]
    qat = tritonq.prepare_qat(model.train(), qconfig=mapping, example_inputs=example)
    start = time.perf_counter()
    train(qat, task.train, budget.epochs, tritonq.recipe_for(mapping).learning_rate, _DECAY, item.seed)
    seconds = (time.perf_counter() - start) / budget.epochs
    reported = accuracy(qat, task.validation)
    deployed = tritonq.convert(qat.eval())
    with tempfile.TemporaryDirectory() as folder:
        tritonq.save_converted(deployed, Path(folder) / "model.pt")
        size = (Path(folder) / "model.pt").stat().st_size
    return {
        **asdict(item),
        "float": float_accuracy,
        "accuracy": reported,
        "deployed": accuracy(deployed, task.validation),
        "test": accuracy(deployed, task.test),
        "most_values": _most_values(deployed),
        "seconds_per_epoch": seconds,
        "bytes": size,
        "environment": environment(torch.device("cpu")),
    }


def _float_model(item: Measurement, task: Task, budget: Budget, out: Path) -> torch.nn.Module:
    """The float model of a seed, trained once."""
    torch.manual_seed(item.seed)
    model = NETS[item.net](CLASSES)
    path = out / f"float-{item.task}-{item.net}-{item.seed}-{budget.images}-{budget.float_epochs}.pt"
    if path.exists():
        model.load_state_dict(torch.load(path, weights_only=True))
    else:
        train(model, task.train, budget.float_epochs, _FLOAT_RATE, _FLOAT_DECAY, item.seed)
        torch.save(model.state_dict(), path)
    return model


def _most_values(deployed: torch.nn.Module) -> dict[str, int]:
    """The largest number of values in an out channel of each layer's deployed weight, by name."""
    return {
        name.removesuffix(".weight"): max(len(row.unique()) for row in codes.flatten(1))
        for name, codes in deployed.state_dict().items()
        if name.endswith("weight") and codes.dtype == torch.int8
    }


def read(path: Path) -> dict[Measurement, dict[str, Any]]:
    """Return the measurements of a results file, without a line that was cut off."""
    found: dict[Measurement, dict[str, Any]] = {}
    lines = path.read_text().splitlines() if path.exists() else []
    for line in lines:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        found[Measurement(**{name: record[name] for name in Measurement.__dataclass_fields__})] = record
    return found


def _append(path: Path, record: dict[str, Any]) -> None:
    with path.open("a") as file:
        file.write(json.dumps(record) + "\n")
    print(
        f"{record['task']} {record['net']} {record['method']} W{record['weights']}A{record['activations']} seed "
        f"{record['seed']}: {record['deployed']:.2f} (float {record['float']:.2f})",
        file=sys.stderr,
        flush=True,
    )


def table(found: dict[Measurement, dict[str, Any]]) -> str:
    """Mean and spread of validation accuracy over seeds, one line per task, network, method and width."""
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for item, record in found.items():
        groups.setdefault((item.task, item.net, item.method, f"W{item.weights}A{item.activations}"), []).append(record)
    lines = [f"{'task':9} {'net':10} {'method':19} {'bits':5} {'float':>6} {'deployed':>9} {'spread':>7} {'seeds':>5}"]
    for (task, net, method, bits), records in sorted(groups.items()):
        values = [record["deployed"] for record in records]
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        base = statistics.mean(record["float"] for record in records)
        lines.append(
            f"{task:9} {net:10} {method:19} {bits:5} {base:6.2f} {statistics.mean(values):9.2f} {spread:7.2f} "
            f"{len(values):5}"
        )
    return "\n".join(lines)
