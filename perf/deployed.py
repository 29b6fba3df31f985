"""Time int8 files and float files in ONNX Runtime, and say where the time goes.

Run as ``python -m tritonq.perf.deployed`` on a quiet machine; it needs the extra ``tritonq[onnx]``. Both files of a
model run in turns, with the same session options. Where a goal is not met, the kinds of nodes that take the time of the
int8 file are printed, by ONNX Runtime's own profile.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from tritonq.perf.cases.deployed import GOALS, Setting, settings
from tritonq.perf.measure import Budget, interleave
from tritonq.perf.stats import Spread

_RUNS = 20
_KINDS_SHOWN = 6


def main(argv: list[str] | None = None) -> int:
    """Time and print; return 1 if a goal is not met, else 0."""
    parser = argparse.ArgumentParser(prog="python -m tritonq.perf.deployed", description=__doc__)
    parser.add_argument("--only", default="", metavar="TEXT", help="models whose names contain TEXT")
    parser.add_argument("--seconds", type=float, default=20.0, help="time per model and number of threads")
    args = parser.parse_args(argv)
    missed = 0
    for setting in settings():
        if args.only in setting.model:
            ratio, kinds = compare(setting, args.seconds)
            goal = GOALS[setting.model]
            print(f"{setting.name:48} {ratio:5.2f} times float, goal {goal}", flush=True)
            if ratio < goal:
                missed += 1
                print(describe(kinds), flush=True)
    return int(missed > 0)


def compare(setting: Setting, seconds: float) -> tuple[float, Mapping[str, float]]:
    """Return how many times as fast the int8 file is, and the seconds per run of each kind of its nodes."""
    with tempfile.TemporaryDirectory() as folder:
        paths = {int8: setting.write(Path(folder), int8) for int8 in (False, True)}
        sessions = {int8: setting.open(path) for int8, path in paths.items()}
        inputs = setting.make_inputs(torch.Generator().manual_seed(1), torch.device("cpu"))
        feeds = {sessions[True].get_inputs()[0].name: inputs["images"].numpy()}
        names = {int8: session.get_inputs()[0].name for int8, session in sessions.items()}

        def step(int8: bool) -> Any:
            return lambda given: tuple(sessions[int8].run(None, {names[int8]: given["images"].numpy()}))

        steps = {"float": step(False), "int8": step(True)}
        times = interleave(steps, [inputs], torch.device("cpu"), Budget(seconds))
        medians = {name: Spread.of(samples).median for name, samples in times.items()}
        return medians["float"] / medians["int8"], profiled(setting, paths[True], feeds, Path(folder))


def profiled(setting: Setting, path: Path, feeds: Mapping[str, Any], folder: Path) -> dict[str, float]:
    """Return the seconds per run that each kind of node of a file takes, the longest first."""
    session = setting.open(path, folder / "profile")
    for _ in range(_RUNS):
        session.run(None, dict(feeds))
    found: dict[str, float] = defaultdict(float)
    for event in json.loads(Path(session.end_profiling()).read_text()):
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            found[event["args"]["op_name"]] += event["dur"] / 1e6 / _RUNS
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def describe(kinds: Mapping[str, float]) -> str:
    """Return in words the kinds of nodes that take most of the time, with their shares."""
    total = sum(kinds.values())
    shown = [f"{name} {seconds / total:.0%}" for name, seconds in list(kinds.items())[:_KINDS_SHOWN]]
    return f"  int8 file, {total * 1e3:.2f} ms in nodes: {', '.join(shown)}"


if __name__ == "__main__":
    sys.exit(main())
