"""The command: the parts of a visit to a GPU, the most valuable first, each in a process with a time limit of its own.

    python -m tritonq.perf.gpu --minutes 9 --out DIR     # everything python -m tritonq.perf.gpu --phase first --out DIR
    # 5 minutes: smoke, tests, one step python -m tritonq.perf.gpu --phase second --out DIR  # 6 minutes: what is left

``python perf/gpu`` does the same in a checkout that is not installed. A *finding* is one result, good or bad. Findings
are written when they are found, so that a visit which is cut off keeps what it has; a part that crashes or hangs leaves
the others alone.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import IO

import torch

from tritonq.perf.gpu.limit import end_with_children, run_limited
from tritonq.perf.gpu.part import DEVICE_FAULT, Visit
from tritonq.perf.gpu.results import LOG, RESULTS, SUMMARY, append, failures, read, summarize, write_text
from tritonq.perf.machine import environment

# A part stops itself this long before it is stopped.
_MARGIN_S = 4.0


@dataclass(frozen=True)
class Part:
    """One part of a visit.

    Attributes:
        weight: its share of the time, in seconds of a visit of nine minutes. What a part leaves goes to later ones.
        function: ``module:function`` in this package, called with a `Visit`.
    """

    weight: float
    function: str


# The most valuable first.
PARTS = {
    "environment": Part(10, "command:describe"),
    "smoke": Part(75, "smoke:run"),
    "tests": Part(120, "operator_tests:run"),
    "step": Part(110, "steps:run"),
    "kernels": Part(85, "kernels:run"),
    "compile": Part(40, "compiled:compile_step"),
    "eval": Part(20, "compiled:evaluate"),
    "memcheck": Part(30, "command:check_memory"),
    "tune": Part(50, "tune:run"),
}
# Names of parts, and minutes.
PHASES = {
    "first": (("environment", "smoke", "tests", "step"), 5.0),
    "second": (("environment", "step", "kernels", "compile", "eval", "memcheck", "tune"), 6.0),
    "all": (tuple(PARTS), 9.0),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the chosen parts; return 0 if all is well, 1 if a finding says otherwise, 2 if there is no GPU."""
    options = _parser().parse_args(argv)
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("tritonq.perf.gpu: torch finds no GPU here (--device cpu --small tries the code)", file=sys.stderr)
        return 2
    options.out.mkdir(parents=True, exist_ok=True)
    if options.run_part:
        _call(options.run_part, Visit(options.run_part, device, options.out, options.seconds, options.small))
        return 0
    names, minutes = PHASES[options.phase]
    names = tuple(options.parts.split(",")) if options.parts else names
    unknown = [name for name in names if name not in PARTS]
    if unknown:
        print(f"tritonq.perf.gpu: no part is called {', '.join(unknown)}; known: {', '.join(PARTS)}", file=sys.stderr)
        return 2
    (options.out / RESULTS).unlink(missing_ok=True)
    end_with_children()
    visit_all(names, 60 * (options.minutes or minutes), options.out, device, small=options.small)
    found = read(options.out / RESULTS)
    print(f"\n{summarize(found)}\nwritten to {options.out}")
    return 1 if failures(found) else 0


def visit_all(names: Sequence[str], seconds: float, out: Path, device: torch.device, *, small: bool) -> None:
    """Run each part within its share of what is left of ``seconds``, and rewrite the summary after each."""
    end = time.monotonic() + seconds
    with (out / LOG).open("wb") as log:
        for i, name in enumerate(names):
            weights = [PARTS[later].weight for later in names[i:]]
            limit = (end - time.monotonic()) * weights[0] / sum(weights)
            reason = _run_part(name, limit, out, device, small=small, log=log)
            if reason is not None:
                append(out / RESULTS, {"part": name, "name": name, "status": reason})
            write_text(out / SUMMARY, summarize(read(out / RESULTS)))


def _run_part(name: str, limit: float, out: Path, device: torch.device, *, small: bool, log: IO[bytes]) -> str | None:
    """Run one part in a process of its own; return in words what went wrong, or None.

    A fault of the device ends its process. What the part has not found by then runs in a new one.
    """
    end = time.monotonic() + limit
    log.write(f"== {name}, {limit:.0f} s\n".encode())
    log.flush()
    while True:
        found = _names(name, out)
        seconds = max(1.0, end - time.monotonic() - _MARGIN_S)
        command = [sys.executable, "-m", "tritonq.perf.gpu", "--run-part", name, "--seconds", f"{seconds:.1f}"]
        command += ["--out", str(out), "--device", str(device), *(["--small"] if small else [])]
        status = run_limited(command, end - time.monotonic(), log)
        if status is None:
            return f"cut off after {limit:.0f} s"
        if status != DEVICE_FAULT or _names(name, out) == found:
            return None if status == 0 else f"ended with status {status}; see {LOG}"


def _names(part: str, out: Path) -> set[str]:
    """Return the names of the findings of a part so far."""
    return {record["name"] for record in read(out / RESULTS) if record["part"] == part}


def _call(name: str, visit: Visit) -> None:
    module, _, function = PARTS[name].function.partition(":")
    run: Callable[[Visit], None] = getattr(import_module(f"tritonq.perf.gpu.{module}"), function)
    with visit.finding(name):
        run(visit)


def describe(visit: Visit) -> None:
    """Note device, versions and commit, and the findings of ``python -m tritonq doctor``."""
    from tritonq.cli.doctor import examine

    visit.note("machine", **environment(visit.device))
    for item in examine():
        if item.problem:
            visit.note(item.name, "wrong", value=item.value, problem=item.problem)


def check_memory(visit: Visit) -> None:
    """Run the first preset of the smoke part under NVIDIA's memory checker, if that is installed."""
    checker = shutil.which("compute-sanitizer")
    if checker is None or visit.device.type != "cuda":
        visit.note("memcheck", "not run", reason="compute-sanitizer is not installed" if checker is None else "no GPU")
        return
    command = [checker, "--tool", "memcheck", "--error-exitcode", "9", sys.executable, "-m", "tritonq.perf.gpu"]
    command += ["--run-part", "smoke", "--out", str(visit.out), "--seconds", f"{visit.left() - _MARGIN_S:.0f}"]
    status = subprocess.run(command, check=False).returncode
    visit.note("memcheck", "ok" if status == 0 else "wrong", exit_status=status)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tritonq.perf.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("gpu-results"), metavar="DIR", help="folder for the results")
    parser.add_argument("--minutes", type=float, metavar="M", help="time for everything (default: that of the phase)")
    parser.add_argument("--phase", choices=list(PHASES), default="all", help="which parts: " + _phases())
    parser.add_argument("--parts", metavar="A,B", help=f"these parts instead, in this order: {', '.join(PARTS)}")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: try the code, measure nothing")
    parser.add_argument("--small", action="store_true", help="small shapes, for a trial")
    parser.add_argument("--run-part", choices=list(PARTS), help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, default=60.0, help=argparse.SUPPRESS)
    return parser


def _phases() -> str:
    return "; ".join(f"{name}: {', '.join(parts)} ({minutes:g} minutes)" for name, (parts, minutes) in PHASES.items())
