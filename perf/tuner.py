"""The command ``tune``: try launch parameters on this GPU, check each, and write the table that the kernels read.

Never run on a GPU so far: its search, its checks and its file are tested with Triton's interpreter and a fake clock.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from tritonq.perf.case import Inputs, Step, Tolerance, disagreement
from tritonq.perf.machine import environment
from tritonq.perf.measure import Budget, captured, input_sets, interleave
from tritonq.perf.progress import progress
from tritonq.perf.records import utc_now
from tritonq.perf.stats import speed_up

# A candidate has to beat the default by more than this, or the default is written: less is within the noise.
_WORTHWHILE = 1.02

# Seconds per candidate and shape: about a dozen turns with the default.
_BUDGET = Budget(seconds=0.06, max_rounds=20)

Clock = Callable[[dict[str, Step], Sequence[Inputs], torch.device], float]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``python -m tritonq tune``."""
    parser.add_argument("--kernel", action="append", metavar="NAME", help="only this kernel; repeatable")
    parser.add_argument("--again", action="store_true", help="tune what the table already holds, too")
    parser.add_argument("--out", type=Path, metavar="FILE", help="table to write (default: the one the kernels read)")


def main(args: argparse.Namespace) -> int:
    """Tune the kernels for the first GPU; return the exit status. An interrupted run continues where it stopped."""
    if not torch.cuda.is_available():
        print("tune: torch finds no GPU here", file=sys.stderr)
        return 2
    from tritonq.kernels.launch_sizes import TABLES, gpu_file_stem
    from tritonq.perf import tuning_conv2d, tuning_space

    targets: list[Any] = [*tuning_space.targets(), *tuning_conv2d.targets()]
    chosen = [target for target in targets if not args.kernel or target.kernel in args.kernel]
    if not chosen:
        known = ", ".join(sorted({target.kernel for target in targets}))
        print(f"tune: no kernel called {', '.join(args.kernel)}; known: {known}", file=sys.stderr)
        return 2
    device = torch.device("cuda", torch.cuda.current_device())
    path = args.out or TABLES / f"{gpu_file_stem(torch.cuda.get_device_name(device))}.json"
    table = Table.open(path, device, afresh=args.again)
    open_targets = [target for target in chosen if not table.holds(target.kernel, target.key)]
    print(f"{len(chosen) - len(open_targets)} of {len(chosen)} entries are in {path.name} already")
    for target in progress(open_targets, len(open_targets), "tune", "entry"):
        result = search(target, device)
        table.add(target.kernel, target.key, result)
        print(f"{target.kernel} {target.key}: {result.describe()}")
    print(f"written to {path}")
    return 0


@dataclass(frozen=True)
class Result:
    """The outcome of one search.

    Attributes:
        parameters: what to launch with, by field name; or ``"torch"``: torch's operator is faster.
        gain: how many times faster than the default, mean over the shapes.
        rejected: candidates that failed their check or could not be launched, and why.
        tried: number of candidates.
    """

    parameters: dict[str, int] | str
    gain: float
    tried: int
    rejected: dict[str, str]

    def describe(self) -> str:
        """Return one line for the terminal."""
        sizes = self.parameters
        if isinstance(sizes, dict):
            sizes = ", ".join(f"{name} {value}" for name, value in sizes.items())
        return f"{sizes}; {self.gain:.2f}x the default; {self.tried} tried, {len(self.rejected)} rejected"


def paired_gain(steps: dict[str, Step], sets: Sequence[Inputs], device: torch.device) -> float:
    """Return how many times faster ``"candidate"`` is than ``"default"``, taking turns.

    Each is captured in a CUDA graph over all ``sets``, so that the time is the kernel's alone, also where launching
    takes longer than running.
    """
    graphs = {name: captured(step, sets) for name, step in steps.items()}
    times = interleave(graphs, [{}], device, _BUDGET)
    return speed_up(times["default"], times["candidate"]).median


def search(
    target: Any, device: torch.device, clock: Clock = paired_gain, options: Sequence[Any] | None = None
) -> Result:
    """Try every candidate on every shape of ``target``, and return the fastest.

    One that is wrong on any shape is left out.

    Args:
        target: a :class:`tritonq.perf.tuning_space.Target` or what looks like one.
        device: where to run.
        clock: measures a pair of steps; replaced where there is no GPU.
        options: candidates; None: all of the target's.
    """
    default = target.default
    options = target.candidates() if options is None else options
    logs: dict[Any, float] = dict.fromkeys(options, 0.0)
    rejected: dict[str, str] = {}
    for shape in target.shapes:
        step, reference = target.operation(shape)
        sets = input_sets(partial(target.make_inputs, shape), device)
        expected = reference(sets[0])
        for option in list(logs):
            candidate = _with_parameters(step, target.kernel, option)
            reason = _obstacle(candidate, sets[0], expected, target.tolerance)
            if reason is not None:
                rejected[str(tuple(option))] = reason
                del logs[option]
                continue
            pair = {"default": _with_parameters(step, target.kernel, default), "candidate": candidate}
            logs[option] += math.log(clock(pair, sets, device)) / len(target.shapes)
    best = max(logs, key=lambda option: logs[option], default=default)
    gain = math.exp(logs.get(best, 0.0))
    if gain < _WORTHWHILE:
        best, gain = default, 1.0
    return Result(best if isinstance(best, str) else dict(best._asdict()), gain, len(options), rejected)


def _with_parameters(step: Step, kernel: str, parameters: Any) -> Step:
    """Return a step that runs ``step`` while ``kernel`` is launched with ``parameters``."""
    from tritonq.kernels import launch_sizes

    def run(inputs: Inputs) -> tuple[torch.Tensor, ...]:
        with launch_sizes.override(kernel, parameters):
            return step(inputs)

    return run


def _obstacle(step: Step, inputs: Inputs, expected: tuple[torch.Tensor, ...], tolerance: Tolerance) -> str | None:
    """Run a candidate once; return in words why it can't be used, or None."""
    try:
        return disagreement(step(inputs), expected, tolerance)
    except Exception as error:  # too many registers, too much shared memory: the compiler has many ways to refuse
        return f"{type(error).__name__}: {error}"


class Table:
    """The file of one GPU.

    It is replaced as a whole after every entry, so that an interrupted run loses at most one.
    """

    def __init__(self, path: Path, header: dict[str, Any], kernels: dict[str, dict[str, dict[str, int] | str]]) -> None:
        self.path = path
        self.header = header
        self.kernels = kernels

    @classmethod
    def open(cls, path: Path, device: torch.device, *, afresh: bool = False) -> Table:
        """Continue ``path`` when it is sound and of the same triton and driver; else start an empty table.

        A damaged file is named in a warning, and replaced with the first entry.
        """
        from tritonq.kernels.launch_sizes import TABLE_VERSION, load_table

        env = environment(device)
        header = {
            "version": TABLE_VERSION,
            "gpu": env["device"],
            "triton": env["triton"],
            "torch": env["torch"],
            "driver": env["driver"],
            "commit": env["commit"],
            "time": utc_now(),
        }
        load_table.cache_clear()
        sound = bool(load_table(path))
        old = json.loads(path.read_text()) if sound and not afresh else {}
        same = all(old.get(name) == header[name] for name in ("gpu", "triton", "driver"))
        return cls(path, header, old["kernels"] if old and same else {})

    def holds(self, kernel: str, key: str) -> bool:
        """Whether the table has an entry for this kernel and key."""
        return key in self.kernels.get(kernel, {})

    def add(self, kernel: str, key: str, result: Result) -> None:
        """Add an entry and write the file, which the kernels' own loader then reads.

        Raises:
            RuntimeError: the loader does not accept the file; the old one is kept.
        """
        from tritonq.kernels.launch_sizes import load_table

        self.kernels.setdefault(kernel, {})[key] = result.parameters
        self.path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=self.path.parent, prefix=self.path.stem, suffix=".tmp")
        draft = Path(name)
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                json.dump({**self.header, "kernels": self.kernels}, file, indent=1, sort_keys=True)
                file.write("\n")
            if key not in load_table(draft).get(kernel, {}):
                raise RuntimeError(f"the kernels' loader does not accept {kernel} {key}: {result.parameters}")
            draft.replace(self.path)
        finally:
            draft.unlink(missing_ok=True)
        load_table.cache_clear()
