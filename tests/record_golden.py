"""Record what every operator, module, preset and file computes, and compare with the record.

``python tests/record_golden.py`` compares with ``tests/golden.json`` and lists what differs. Other options:

- ``--write``: write the record anew. Each value that changes on purpose needs a line in CHANGELOG.md.
- ``--dump FILE`` and ``--compare FILE``: save every tensor, and say where tensors differ from a saved file.

Floating-point sums depend on a CPU's instruction set. The cases therefore run in a process that is restricted to the
oldest one that PyTorch supports, with one thread. ``--write`` also runs them with other instruction sets and threads:
parts with the same bits everywhere are marked as exact. Other parts must have the recorded bits where this machine
gives the recorded bits of plain PyTorch operations (the probe); elsewhere their norms and projections must be close.
Training multiplies differences, so each part has a tolerance of its own: a multiple of what it differed by here.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

RECORD = Path(__file__).with_name("golden.json")
# Least tolerance, as a fraction of a tensor's norm, where sums are computed in another order.
_CLOSE = 1e-3
# A part's tolerance is this many times what it differs by between instruction sets.
_MARGIN = 5
# A tensor with a smaller norm is noise around zero.
_TINY = 1e-6
PROBE = "probe | bits"

_SETTINGS: dict[str, dict[str, str]] = {
    "oldest": {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41", "MKL_CBWR": "COMPATIBLE"},
    "avx2": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_CBWR": "AVX2"},
    "newest": {},
    "threads": {"OMP_NUM_THREADS": "2"},
}


def summary_with(setting: str, *options: str) -> dict[str, list[Any]]:
    """Run the cases in a process of their own; return hash, norms and projections of each part.

    Raises:
        RuntimeError: a case failed; the message holds the process's output.
    """
    inherited = {key: value for key, value in os.environ.items() if key not in _SETTINGS["oldest"]}
    environment = {**inherited, "OMP_NUM_THREADS": "1", **_SETTINGS[setting]}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "summary.json"
        command = [sys.executable, "-m", "golden.run", str(file), *options]
        done = subprocess.run(command, cwd=RECORD.parent, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"the cases failed:\n{done.stdout}{done.stderr}")
        print(done.stdout, end="")
        return json.loads(file.read_text())


def difference(recorded: list[Any], got: list[Any], exactly: bool) -> str | None:
    """Say how a part differs from the record, or return None.

    Args:
        recorded: hash, tolerance (0: exact), norms and projections.
        got: hash, norms and projections.
        exactly: whether this machine computes sums as the record's did.
    """
    bits, tolerance, *numbers = recorded
    if got[0] == bits:
        return None
    if tolerance == 0 or exactly:
        return f"other bits: {got[0]} instead of {bits}"
    if len(got) - 1 != len(numbers):
        return f"{len(got) - 1} numbers instead of {len(numbers)}"
    distance = spread(numbers, got[1:])
    return f"{distance:.2g} of the norm away, tolerance {tolerance}" if distance > tolerance else None


def spread(numbers: list[float], others: list[float]) -> float:
    """Return the largest difference of norms and projections as a fraction of the norm."""
    norms = [max(norm, _TINY) for norm in numbers[0::2] for _ in range(2)]
    distances = (abs(a - b) / norm for a, b, norm in zip(numbers, others, norms, strict=True))
    # A norm that is not a number is infinitely far from one that is.
    return max((math.inf if math.isnan(distance) else distance for distance in distances), default=0.0)


def differences(summary: dict[str, list[Any]], only: str = "") -> list[str]:
    """Return one line for each part that differs from the record; ``only`` restricts it to some cases."""
    recorded = json.loads(RECORD.read_text())["parts"]
    exactly = summary[PROBE][0] == recorded[PROBE][0]
    lines = [f"{name}: not in the record" for name in summary if name not in recorded]
    for name, part in recorded.items():
        if name != PROBE and only in name.split(" | ")[0]:
            told = difference(part, summary[name], exactly) if name in summary else "missing"
            lines += [] if told is None else [f"{name}: {told}"]
    return lines


def write() -> None:
    """Write the record."""
    first, *others = (summary_with(name) for name in _SETTINGS)
    parts = {}
    for name, (bits, *numbers) in first.items():
        if all(other[name][0] == bits for other in others):
            parts[name] = [bits, 0]
        else:
            tolerance = max(_CLOSE, _MARGIN * max(spread(numbers, other[name][1:]) for other in others))
            parts[name] = [bits, float(f"{tolerance:.2g}"), *numbers]
    header = {"torch": version("torch"), "machine": platform.machine()}
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(part, separators=(',', ':'))}" for name, part in parts.items())
    RECORD.write_text(f'{{"header": {json.dumps(header)},\n"parts": {{\n{lines}\n}}}}\n')
    exact = sum(part[1] == 0 for part in parts.values())
    print(f"{len(parts)} parts, {exact} exact, {RECORD.stat().st_size:,} bytes")


def main() -> int:
    """Run the command line; return 1 where something differs from the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write the record anew")
    parser.add_argument("--only", metavar="TEXT", default="", help="only cases whose name contains TEXT")
    parser.add_argument("--dump", type=Path, metavar="FILE", help="save every tensor")
    parser.add_argument("--compare", type=Path, metavar="FILE", help="compare every tensor with a saved file")
    args = parser.parse_args()
    if args.write:
        write()
        return 0
    options = ["--only", args.only]
    for name in ("dump", "compare"):
        if getattr(args, name) is not None:
            options += [f"--{name}", str(getattr(args, name).resolve())]
    summary = summary_with("oldest", *options)
    lines = differences(summary, args.only)
    print("\n".join(lines) or f"{len(summary)} parts are as recorded")
    return int(bool(lines))


if __name__ == "__main__":
    sys.exit(main())
