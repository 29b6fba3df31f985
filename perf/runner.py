"""The command ``bench``: check the results of all implementations, time them in turns, and write the times down."""

from __future__ import annotations

import argparse
import importlib.util
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import IO

import torch

from tritonq.perf import records
from tritonq.perf.case import Case, Implementation, Inputs, Step
from tritonq.perf.cases import all_cases
from tritonq.perf.machine import SOURCE, device_slug, environment
from tritonq.perf.measure import Budget, copy_bandwidth, input_sets, interleave
from tritonq.perf.progress import progress
from tritonq.perf.records import Record
from tritonq.perf.stats import Spread, speed_up
from tritonq.perf.table import render

# Seconds of timing per case; with building, checking and warming, --quick stays below three minutes on two cores.
_QUICK_SECONDS, _FULL_SECONDS = 2.0, 4.0
# Building, checking and warming take about as long again as timing.
_BUILD_SHARE = 2.0

_ERROR_LENGTH = 160


@dataclass(frozen=True)
class Bench:
    """What all records of one run share.

    Attributes:
        copy: measured copy bandwidth of the device, bytes per second.
    """

    device: torch.device
    environment: dict[str, object]
    budget: Budget
    quick: bool
    copy: Spread


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``python -m tritonq bench``."""
    parser.add_argument("--quick", action="store_true", help="the cases that fit into three minutes on two cores")
    parser.add_argument("--case", action="append", metavar="PATTERN", help="part of a name, or a glob; repeatable")
    parser.add_argument("--list", action="store_true", help="print the names of the chosen cases and stop")
    parser.add_argument("--threads", type=_positive, metavar="N", help="CPU threads (default: torch's)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: a GPU if there is one")
    parser.add_argument(
        "--seconds", type=_duration, metavar="S", help="time per case (default: 2 with --quick, else 4)"
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder for results (default: perf/results)")


def main(args: argparse.Namespace) -> int:
    """Run the chosen cases; return the exit status."""
    cases = select(all_cases(), args.case or [], quick=args.quick)
    if not cases:
        print(f"no case matches {' '.join(args.case or [])}; --list shows all names", file=sys.stderr)
        return 2
    if args.list:
        print("\n".join(f"{case.name}  [{', '.join(case.devices)}]{'  quick' if case.quick else ''}" for case in cases))
        return 0
    if args.threads:
        torch.set_num_threads(args.threads)
    device = _device(args.device)
    if device is None:
        print("--device cuda: torch finds no GPU here", file=sys.stderr)
        return 2
    print(_announcement(cases, device, args.quick, _seconds(args.quick, args.seconds)), flush=True)
    bench = _bench(device, args.quick, args.seconds)
    folder = (args.out or default_results()) / device_slug(device)
    label = f"{str(bench.environment['commit'])[:7]}{'-dirty' if bench.environment['dirty'] else ''}"
    with records.create(folder, label) as file:
        written = list(_run_all(cases, bench, file))
    print(render(written))
    print(f"\nwritten to {file.name}")
    return 0


def default_results() -> Path:
    """Return the folder for results: ``perf/results`` in a clone.

    If tritonq is installed without its tests, it is a folder in the working directory.
    """
    return SOURCE / "results" if (SOURCE.parent / "pyproject.toml").is_file() else Path("tritonq-results")


def select(cases: Sequence[Case], patterns: Sequence[str], *, quick: bool) -> list[Case]:
    """Return the cases whose name contains one of ``patterns`` or matches it as a glob; without patterns all of them.

    With ``quick`` only those that are part of ``--quick``.
    """

    def wanted(case: Case) -> bool:
        return not patterns or any(part in case.name or fnmatchcase(case.name, part) for part in patterns)

    return [case for case in cases if wanted(case) and (case.quick or not quick)]


def run_case(case: Case, bench: Bench) -> Iterator[Record]:
    """Check, time and describe every implementation of ``case``; yield one record for each, also if it failed."""
    if bench.device.type not in case.devices:
        reason = f"not run: needs {' or '.join(case.devices)}, this run is on {bench.device.type}"
        for name, implementation in case.implementations.items():
            yield _record(case, name, implementation, bench, {"status": reason})
        return
    # Compiled functions are specialised to a case; without a reset the compiler's limit on recompilation would turn
    # later ones into eager calls, silently.
    torch.compiler.reset()
    sets = input_sets(case.make_inputs, bench.device)
    expected = case.reference(sets[0])
    steps: dict[str, Step] = {}
    status: dict[str, str] = {}
    for name, implementation in case.implementations.items():
        step, status[name] = _prepare(case, implementation, sets[0], expected, bench)
        if step is not None:
            steps[name] = step
    times = interleave(steps, sets, bench.device, bench.budget) if steps else {}
    for name, implementation in case.implementations.items():
        fields: Record = {"status": status[name]}
        if name in times:
            fields |= _timing(case, times[name], times.get(case.baseline), bench.copy)
            if case.memory is not None:
                fields["memory_bytes"] = case.memory(steps[name], sets[0])
        yield _record(case, name, implementation, bench, fields)


def _run_all(cases: Sequence[Case], bench: Bench, file: IO[str]) -> Iterator[Record]:
    for case in progress(cases, len(cases), "bench", "case"):
        for record in run_case(case, bench):
            records.write(file, record)
            yield record


def _prepare(
    case: Case, implementation: Implementation, inputs: Inputs, expected: tuple[torch.Tensor, ...], bench: Bench
) -> tuple[Step | None, str]:
    """Build and check an implementation; return its step and a status. The step is None unless the status is "ok"."""
    if bench.quick and not implementation.quick:
        return None, "not run: left out by --quick"
    if bench.device.type not in implementation.devices:
        return None, f"not run: needs {' or '.join(implementation.devices)}"
    if importlib.util.find_spec(implementation.module) is None:
        return None, "not installed"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            step = implementation.build(inputs)
            difference = implementation.check(step, inputs, expected, case.tolerance)
    except Exception as error:  # a peer may fail in any way, and the table has to say how
        return None, f"error: {type(error).__name__}: {_one_line(str(error))}"
    return (step, "ok") if difference is None else (None, f"failed check: {difference}")


def _timing(case: Case, times: list[float], baseline: list[float] | None, copy: Spread) -> Record:
    seconds = Spread.of(times)
    rate = case.bytes_moved / seconds.median
    fields: Record = {
        "rounds": len(times),
        "median_s": seconds.median,
        "p20_s": seconds.p20,
        "p80_s": seconds.p80,
    }
    if case.bytes_moved:
        fields |= {"bytes_per_s": rate, "copy_fraction": rate / copy.median}
    if baseline is not None:
        ratio = speed_up(baseline, times)
        fields |= {"speed_up": ratio.median, "speed_up_p20": ratio.p20, "speed_up_p80": ratio.p80}
    return fields


def _record(case: Case, name: str, implementation: Implementation, bench: Bench, fields: Record) -> Record:
    return {
        "case": case.name,
        "family": case.family,
        "implementation": name,
        "baseline": case.baseline,
        "library_version": implementation.library_version(),
        **({"leaves_out": implementation.leaves_out} if implementation.leaves_out else {}),
        "bytes_moved": case.bytes_moved,
        "operations": case.operations,
        "copy_bytes_per_s": bench.copy.median,
        **fields,
        "quick": bench.quick,
        "time": records.utc_now(),
        "environment": bench.environment,
    }


def _bench(device: torch.device, quick: bool, seconds: float | None) -> Bench:
    budget = Budget(_seconds(quick, seconds))
    return Bench(device, environment(device), budget, quick, copy_bandwidth(device))


def _seconds(quick: bool, given: float | None) -> float:
    return given or (_QUICK_SECONDS if quick else _FULL_SECONDS)


def _announcement(cases: Sequence[Case], device: torch.device, quick: bool, seconds: float) -> str:
    """Return a line that says what will run, and for how long."""
    here = [case for case in cases if device.type in case.devices]
    minutes = len(here) * seconds * _BUILD_SHARE / 60
    others = f"; {len(cases) - len(here)} need another device" if len(here) < len(cases) else ""
    shorter = "" if quick else "; --quick runs fewer, --case PATTERN the chosen ones"
    named = ", ".join(sorted({case.name.partition("/")[0] for case in here}))
    return f"{len(here)} cases on {device}, about {max(1, round(minutes))} min{others}{shorter}: {named}"


def _device(choice: str) -> torch.device | None:
    """Return the device that ``--device`` asks for; None when it is not there."""
    present = torch.cuda.is_available()
    if choice == "cuda" and not present:
        return None
    return torch.device("cuda" if present and choice != "cpu" else "cpu")


def _one_line(text: str) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= _ERROR_LENGTH else flat[: _ERROR_LENGTH - 1] + "…"


def _duration(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a number above 0, got {text}")
    return value


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value
