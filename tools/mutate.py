"""Deliberate errors in kernels and their specification, each of which the operator's own tests must notice.

    python tools/mutate.py --minutes 20            # try edits that have no result yet
    python tools/mutate.py --only kernels/weight   # edits whose file, tests or line contain this, also those with one

``mutations.tsv`` lists the edits: file, name of the tests (``tests/operators/test_<name>.py``), a line's text that
occurs once in the file, and what takes its place. Each is made in a copy of the checkout, where that one file of tests
runs: kernels in the emulator, the specification in PyTorch. Results are kept in ``mutation_results.json``, so that a
run goes on where the last one ended, and MUTATIONS.md is written from them. An edit that changes nothing that can be
observed has the reason in the last column, and is not run.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from markdown_table import markdown_table

ROOT = Path(__file__).resolve().parent.parent
EDITS = ROOT / "tools" / "mutations.tsv"
RESULTS = ROOT / "tools" / "mutation_results.json"
TABLE = ROOT / "MUTATIONS.md"
# An edit may make a loop endless.
TIME_LIMIT_S = 900.0
_COPIED = ("kernels", "perf", "tests", "tritonq", "pyproject.toml", "examples")


@dataclass(frozen=True)
class Edit:
    """One deliberate error.

    Attributes:
        file: path in the checkout.
        tests: name of the operator's file of tests.
        old: text that occurs once in the file.
        new: what takes its place.
        equivalent: why nothing can notice it; empty where something can.
    """

    file: str
    tests: str
    old: str
    new: str
    equivalent: str

    @property
    def key(self) -> str:
        """The edit as results name it."""
        return f"{self.file}: {self.old} -> {self.new}"

    def applied(self, text: str) -> str:
        """Return the file's text with the edit.

        Raises:
            ValueError: the old text does not occur once.
        """
        if text.count(self.old) != 1:
            raise ValueError(f"{self.file} has {text.count(self.old)} times: {self.old}")
        return text.replace(self.old, self.new)


def read_edits(path: Path = EDITS) -> list[Edit]:
    """Return the table's edits."""
    with path.open(newline="") as file:
        return [Edit(**row) for row in csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)]


def main(argv: Sequence[str] | None = None) -> int:
    """Try edits; returns 1 where one survives that is not said to be equivalent."""
    options = _parser().parse_args(argv)
    edits, results = read_edits(), json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    chosen = [edit for edit in edits if not edit.equivalent and _is_chosen(edit, options.only, results)]
    end = time.monotonic() + 60 * options.minutes
    with copied_checkout(ROOT) as copy:
        passing: dict[str, bool] = {}
        for edit in chosen:
            if time.monotonic() > end:
                break
            if edit.tests not in passing:
                passing[edit.tests] = run_tests(copy, edit) == "passed"
            if not passing[edit.tests]:
                print(f"left out, since {edit.tests} fails without it: {edit.key}", flush=True)
                continue
            results[edit.key] = outcome = try_edit(copy, edit)
            print(f"{outcome}: {edit.key}", flush=True)
            RESULTS.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")
    TABLE.write_text(render(edits, results))
    return int(any(results.get(edit.key) == "survived" for edit in edits if not edit.equivalent))


def _is_chosen(edit: Edit, only: str | None, results: dict[str, str]) -> bool:
    return edit.key not in results if only is None else only in f"{edit.tests} {edit.key}"


@contextmanager
def copied_checkout(root: Path) -> Iterator[Path]:
    """Copy what tests need; yields the copy, which is imported through links beside it."""
    with tempfile.TemporaryDirectory(prefix="tritonq-mutate-") as name:
        copy = Path(name) / "checkout"
        copy.mkdir()
        for part in _COPIED:
            if (root / part).is_dir():
                shutil.copytree(root / part, copy / part, ignore=shutil.ignore_patterns("__pycache__"), symlinks=True)
            elif (root / part).exists():
                shutil.copy(root / part, copy / part)
        yield copy


def try_edit(copy: Path, edit: Edit) -> str:
    """Return ``"caught"``, ``"survived"`` or ``"stale"`` (the line has changed)."""
    path = copy / edit.file
    text = path.read_text()
    try:
        changed = edit.applied(text)
    except ValueError:
        return "stale"
    path.write_text(changed)
    try:
        return "survived" if run_tests(copy, edit) == "passed" else "caught"
    finally:
        path.write_text(text)


def run_tests(copy: Path, edit: Edit) -> str:
    """Run the edit's file of tests in the copy; return ``"passed"`` or ``"failed"``, also where they take too long."""
    from tritonq.perf.gpu.__main__ import link_checkout

    with tempfile.TemporaryDirectory(prefix="links-", dir=copy.parent) as links:
        link_checkout(copy, Path(links))
        kernels = "emulator" if edit.file.startswith("kernels/") else "compiled"
        command = [sys.executable, "-B", "-m", "pytest", "-qx", "-p", "no:cacheprovider", f"--kernels={kernels}"]
        command.append(f"tests/operators/test_{edit.tests}.py")
        environment = {**os.environ, "PYTHONPATH": links}
        try:
            done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, timeout=TIME_LIMIT_S)
        except subprocess.TimeoutExpired:
            return "failed"
    if done.returncode not in (0, 1, 2):
        # 1: tests failed, 2: they could not be collected. Anything else says nothing about the edit.
        raise RuntimeError(f"pytest ended with {done.returncode}: {done.stdout.decode()[-2000:]}")
    return "passed" if done.returncode == 0 else "failed"


def render(edits: Sequence[Edit], results: dict[str, str]) -> str:
    """Return MUTATIONS.md."""
    outcomes = ["equivalent" if edit.equivalent else results.get(edit.key, "not run") for edit in edits]
    counts = Counter(outcomes)
    lines = [
        "# Deliberate errors, and whether tests notice them",
        "",
        "Written by `make mutate` (`tools/mutate.py`): each edit is made alone; the operator's own file of tests runs.",
        "",
        f"{len(edits)} edits: {', '.join(f'{counts[name]} {name}' for name in sorted(counts))}.",
        "",
    ]
    rows = []
    for edit, outcome in zip(edits, outcomes, strict=True):
        told = f"equivalent: {edit.equivalent}" if edit.equivalent else outcome
        rows.append((edit.file, edit.tests, f"`{edit.old}`", f"`{edit.new}`", told))
    return "\n".join([*lines, *markdown_table(("file", "tests", "line", "becomes", "outcome"), rows), ""])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60.0, help="begin no edit after so many (default 60)")
    parser.add_argument("--only", metavar="TEXT", help="edits with this in their file, tests or line, tried anew")
    return parser


if __name__ == "__main__":
    sys.exit(main())
