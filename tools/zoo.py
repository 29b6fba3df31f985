"""Try `prepare_qat` and everything behind it on models of other libraries, and write the results as one table.

    python tools/zoo.py                        # every model that has no result yet, then ZOO.md
    python tools/zoo.py --only timm/ yolo      # those whose names contain one of these
    python tools/zoo.py --again --only resnet  # anew
    python tools/zoo.py --table                # ZOO.md from the results there are

Each model is tried in a process of its own. Its result is written under `.zoo/results/` at once, and with the table to
`tools/zoo_results.jsonl`, which is committed: a run goes on where the last one stopped, on whatever machine that was.
`make zoo` builds the environment; see `tools/zoo-requirements.txt`.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import zoo_models
from markdown_table import markdown_table
from tritonq.perf.machine import source_name
from zoo_stages import STAGES

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / ".zoo" / "results"
KEPT = ROOT / "tools" / "zoo_results.jsonl"
TABLE = ROOT / "ZOO.md"
PACKAGES = (
    *("torch", "torchvision", "timm", "transformers", "segmentation_models_pytorch", "ultralytics"),
    *("efficientnet_pytorch", "pytorchcv", "onnxruntime"),
)
_SHORT = {
    **{"prepare": "prep", "eval output": "eval =", "training output": "train =", "three steps": "steps"},
    **{"gradients": "grads", "save and load": "file", "integer nodes": "int8"},
}
_NAMES_SHOWN = 3
# Why a layer has no data to compute on.
IDLE = ("the example inputs don't reach it", "it reads nothing but parameters, so that its result is a constant")
_HEAD = """Written by `make zoo`. Each model is prepared, compared with its float form in eval and in training mode,
trained for three steps, converted, saved and loaded, verified, and run by ONNX Runtime. ✓ passed, ✗ failed, o the
float model can't do it; "layers" and "joins" say how many of them are quantized."""


def try_model(name: str, seconds: int) -> dict[str, Any]:
    """Try one model in a process of its own, for at most so many seconds.

    Return its result, also if the process crashed.
    """
    path = _path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    script = Path(__file__).with_name("zoo_stages.py")
    environment = {**os.environ, "YOLO_CONFIG_DIR": str(RESULTS), "OMP_NUM_THREADS": "1", "YOLO_OFFLINE": "1"}
    try:
        ended = subprocess.run(
            [sys.executable, str(script), name, str(path)],
            capture_output=True,
            text=True,
            timeout=seconds,
            env=environment,
            check=False,
        )
        why = (ended.stderr.strip().splitlines() or [f"exit status {ended.returncode}"])[-1]
    except subprocess.TimeoutExpired:
        why = f"more than {seconds} s"
    if not path.exists():
        path.write_text(json.dumps({"name": name, "stages": {"prepare": why}}))
    result = {**json.loads(path.read_text()), "commit": source_name("ZOO.md", "tools/zoo_results.jsonl")}
    path.write_text(json.dumps(result))
    return result


def read(name: str, kept: Mapping[str, dict[str, Any]] | None = None) -> dict[str, Any] | None:
    """Return the result of a model on this machine, or else the committed one; None: it was not tried.

    ``kept`` holds the committed results, if they have been read.
    """
    path = _path(name)
    if path.exists():
        found: dict[str, Any] = json.loads(path.read_text())
        return found
    return (_kept() if kept is None else kept).get(name)


def _kept() -> dict[str, dict[str, Any]]:
    if not KEPT.exists():
        return {}
    return {result["name"]: result for result in map(json.loads, KEPT.read_text().splitlines())}


def _path(name: str) -> Path:
    return RESULTS / f"{name.replace('/', '--')}.json"


def failed(result: Mapping[str, Any]) -> list[str]:
    """Return the names of the stages that a model did not pass."""
    stages = result["stages"]
    return [stage for stage in STAGES if _mark(stages.get(stage)) in ("✗", "")]


def _mark(text: str | None) -> str:
    if text is None:
        return ""
    return "✓" if text == "ok" else "o" if text.startswith("skipped") else "✗"


def table(results: Sequence[Mapping[str, Any]]) -> str:
    """Return the results as Markdown: a line per model, then what failed and what stays in float."""
    head = [
        "model",
        "parameters",
        "layers",
        "joins",
        *(_SHORT.get(stage, stage) for stage in STAGES),
        "weights in float",
    ]
    rows, notes = [], []
    for result in results:
        layers, joins = result.get("layers", (0, 0)), result.get("joins", (0, 0))
        cells = [
            result["name"],
            f"{result.get('parameters', 0):,}",
            f"{layers[0]}/{layers[1]}",
            f"{joins[0]}/{joins[1]}",
        ]
        cells += [_mark(result["stages"].get(stage)) for stage in STAGES]
        cells.append(str(weights_in_float(result)))
        rows.append(cells)
        notes += _notes(result)
    passed = sum(not failed(result) for result in results)
    whole = sum(not weights_in_float(result) for result in results)
    text = f"{len(results)} of {len(zoo_models.names())} models tried: {passed} pass every stage, "
    text += f"{whole} have no layer with weights that computes in float.\n"
    return "\n".join([text, *markdown_table(head, rows), "", "## What failed and what stays in float", "", *notes, ""])


def weights_in_float(result: Mapping[str, Any]) -> int:
    """Return how many layers with weights compute in float; layers that read no data are not counted."""
    quantized, layers = result.get("layers", (0, 1))
    idle = sum(reason in IDLE for _, reason in result.get("in_float", ()))
    return max(0, int(layers) - int(quantized) - idle)


def _notes(result: Mapping[str, Any]) -> list[str]:
    found = []
    for stage, text in result["stages"].items():
        if _mark(text) != "✓":
            found.append(f"- {result['name']}, {stage}: {text}")
    by_reason: dict[str, list[str]] = {}
    for name, reason in result.get("in_float", ()):
        by_reason.setdefault(reason, []).append(name)
    for reason, names in by_reason.items():
        more = f" and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else ""
        found.append(f"- {result['name']}: {', '.join(names[:_NAMES_SHOWN])}{more} in float: {reason}")
    return found


def write_table() -> None:
    """Write ZOO.md from all results, and the results to the committed file."""
    kept = _kept()
    results = [found for name in zoo_models.names() if (found := read(name, kept)) is not None]
    KEPT.write_text("".join(json.dumps(result) + "\n" for result in results))
    commits = ", ".join(sorted({str(result.get("commit", "?")) for result in results}))
    versions = ", ".join(f"{package} {_version(package)}" for package in PACKAGES)
    made = f"tritonq {_version('tritonq')} at {commits}, {datetime.date.today()}; {versions}."
    head = f"# Models of other people\n\n{_HEAD}\n\n{made}\n\n"
    TABLE.write_text(head + table(results))


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "?"


def main() -> None:
    """Read the command line and try models."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--only", nargs="+", default=[""], metavar="TEXT", help="models whose names contain one of these"
    )
    parser.add_argument("--again", action="store_true", help="also those that have a result")
    parser.add_argument("--table", action="store_true", help="write the table and try nothing")
    parser.add_argument("--processes", type=int, default=1, help="models at a time (default 1)")
    parser.add_argument("--seconds", type=int, default=900, help="time that a model may take (default 900)")
    options = parser.parse_args()
    chosen = [name for name in zoo_models.names() if any(text in name for text in options.only)]
    kept = _kept()
    pending = [] if options.table else [name for name in chosen if options.again or read(name, kept) is None]
    with ThreadPoolExecutor(options.processes) as pool:
        for result in pool.map(lambda name: try_model(name, options.seconds), pending):
            what = failed(result)
            print(f"{result['name']}: {'ok' if not what else 'failed: ' + ', '.join(what)}", flush=True)
            write_table()
    write_table()


if __name__ == "__main__":
    main()
