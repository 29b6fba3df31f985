"""Run the operators' tests and a step of every preset on a CUDA device that is not there, and write FAKE_CUDA.md.

    python tools/fake_cuda/run.py

Needs Linux, a C compiler, and a CUDA build of torch with triton (`make fake-cuda` makes that environment). What asks
``is_cuda`` runs as on a GPU: dispatch, device guards, graph capture. Kernels run in the emulator of the tests, torch's
operators on the CPU. Time, cuDNN and the memory of a GPU are not shown.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from build import RUNTIME, build

from tritonq.perf.machine import source_name

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
TABLE = ROOT / "FAKE_CUDA.md"
# Of pytest.
_INTERRUPTED = 2
_HEAD = """# On a CUDA device that is not there

Written by `make fake-cuda`: a CUDA build of torch over a runtime without a GPU ({folder}). Kernels run in the emulator,
torch's operators on the CPU over the same memory; dispatch, device guards and graph capture run as on a GPU.
"""


def environment(libraries: Path) -> dict[str, str]:
    """Return the environment variables of a process that sees the device."""
    paths = [HERE, ROOT / "tests" / "support", ROOT / "src"]
    return {
        **os.environ,
        "LD_PRELOAD": str(libraries / RUNTIME),
        "LD_LIBRARY_PATH": str(libraries),
        "PYTHONPATH": os.pathsep.join(map(str, paths)),
        "OMP_NUM_THREADS": "1",
    }


def operators_tests(libraries: Path, words: list[str]) -> tuple[Counter[str], list[str]]:
    """Run the operators' tests; return how many had each outcome, and the last lines of those that failed."""
    command = [sys.executable, "-m", "pytest", "-p", "plugin", "-p", "no:cacheprovider", "--tb=line", "-rfE"]
    # opcheck runs operators under modes of its own, which this device is another one of. Tensors of more than 2^31
    # elements fill the memory of the host, which the device's is.
    left_out = ("codegen", "test_traced_operators", "test_beyond_32_bits")
    command += ["-k", " and not ".join(("cuda", *left_out)), *(words or ["tests/operators"])]
    done = subprocess.run(command, cwd=ROOT, env=environment(libraries), stdout=subprocess.PIPE, text=True, check=False)
    lines = done.stdout.strip().splitlines()
    told = [line for line in lines if line.startswith(("FAILED", "ERROR", "kernels of torch"))]
    return outcomes(lines), [*told, *(["interrupted before all had run"] if done.returncode == _INTERRUPTED else [])]


def outcomes(lines: Sequence[str]) -> Counter[str]:
    """Return the counts of pytest's last line of counts.

    Raises:
        SystemExit: there is none, so that no test ran to its end.
    """
    for line in reversed(lines):
        if re.search(r" in \d+(\.\d+)?s\b", line):
            found = re.findall(r"(\d+) (passed|failed|error|skipped|xfailed|xpassed)", line)
            return Counter({name: int(number) for number, name in found})
    raise SystemExit("pytest counted no tests: " + "\n".join(lines[-5:]))


def presets(libraries: Path) -> list[dict[str, str]]:
    """Return what a process of `steps.py` prints, one dict per preset."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(HERE / "steps.py")],
        env=environment(libraries),
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit("steps.py failed: what it says stands above")
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def main() -> int:
    """Run the tests and the presets, and write the table; return the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("tests", nargs="*", help="files of tests (default: tests/operators)")
    words = parser.parse_args().tests
    with tempfile.TemporaryDirectory() as scratch:
        libraries = Path(scratch)
        build(libraries)
        rows = presets(libraries)
        counts, lines = operators_tests(libraries, words)
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("tritonq", "torch", "triton"))
    made = f"{versions}; commit {source_name('FAKE_CUDA.md')}, {datetime.date.today()}."
    text = [_HEAD.format(folder="`tools/fake_cuda`"), made, "", "## Operators' tests", ""]
    told = ", ".join(f"{count} {name}" for name, count in counts.items())
    chosen = f" of {', '.join(words)}" if words else ""
    text += [f"{sum(counts.values())} tests{chosen} on the device: {told}.", ""]
    text += [*(f"- {line}" for line in lines), "", "## A training step, eval and conversion of every preset", ""]
    text += ["| " + " | ".join(rows[0]) + " |", "|" + "---|" * len(rows[0])]
    text += ["| " + " | ".join(row.values()) + " |" for row in rows]
    TABLE.write_text("\n".join(text) + "\n")
    print(f"written: {TABLE.relative_to(ROOT)}; {dict(counts)}")
    return int(bool(counts["failed"] or counts["error"]))


if __name__ == "__main__":
    raise SystemExit(main())
