"""Deliberate errors in kernels and their specification, each of which the operator's own tests must notice.

    python tools/mutate.py --minutes 20            # try edits that have no result yet
    python tools/mutate.py --only kernels/weight   # edits whose file, tests or line contain this, also those with one

``mutations.tsv`` lists the edits: file, name of the tests (``tests/operators/test_<name>.py``), a line's text that
occurs once in the file, and what takes its place. Each is made in a copy of the checkout, where that one file of tests
runs to its first failure: kernels in Triton's interpreter, which is the fastest, in the emulator if that finds nothing,
and what plans their launches last; the specification in PyTorch, and against kernels in the interpreter if that finds
nothing. An edit is caught by a test that passes without it. Results are kept in ``mutation_results.json``, so that a
run goes on where the last one ended, and MUTATIONS.md is written from them. An edit that changes nothing that can be
observed has the reason in the last column, and is not run.
"""

from __future__ import annotations

import argparse
import csv
import json
import re
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
from tritonq.perf.gpu.__main__ import link_checkout

ROOT = Path(__file__).resolve().parent.parent
EDITS = ROOT / "tools" / "mutations.tsv"
RESULTS = ROOT / "tools" / "mutation_results.json"
TABLE = ROOT / "MUTATIONS.md"
# An edit may make a loop endless.
TIME_LIMIT_S = 900.0
# Of pytest: all passed, and none was chosen.
_PASSED, _NONE_CHOSEN = 0, 5
# Of pytest, where tests can't be collected, as is so where an edit can't be imported; beyond it pytest was misused.
_NOT_COLLECTED = 2
_COPIED = ("kernels", "perf", "tests", "tritonq", "pyproject.toml", "examples")


@dataclass(frozen=True)
class Edit:
    """One deliberate error: a line of a file that is replaced.

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
        """The name of the edit in the file of results."""
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
    """Return the edits in the table at ``path``."""
    with path.open(newline="") as file:
        return [Edit(**row) for row in csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)]


def main(argv: Sequence[str] | None = None) -> int:
    """Try edits; return 1 if one survives that is not marked as equivalent, else 0."""
    options = _parser().parse_args(argv)
    edits, results = read_edits(), json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    chosen = [edit for edit in edits if not edit.equivalent and _is_chosen(edit, options.only, results)]
    end = time.monotonic() + 60 * options.minutes
    with copied_checkout(ROOT) as copy, Tests(copy) as tests:
        for edit in chosen:
            if time.monotonic() > end:
                break
            results[edit.key] = outcome = try_edit(copy, edit, tests)
            print(f"{outcome}: {edit.key}", flush=True)
            RESULTS.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")
    TABLE.write_text(render(edits, results))
    return int(any(results.get(edit.key) == "survived" for edit in edits if not edit.equivalent))


def _is_chosen(edit: Edit, only: str | None, results: dict[str, str]) -> bool:
    return edit.key not in results if only is None else only in f"{edit.tests} {edit.key}"


@contextmanager
def copied_checkout(root: Path) -> Iterator[Path]:
    """Copy what tests need; yield the copy, which is imported through links beside it."""
    with tempfile.TemporaryDirectory(prefix="tritonq-mutate-") as name:
        copy = Path(name) / "checkout"
        copy.mkdir()
        for part in _COPIED:
            if (root / part).is_dir():
                shutil.copytree(root / part, copy / part, ignore=shutil.ignore_patterns("__pycache__"), symlinks=True)
            elif (root / part).exists():
                shutil.copy(root / part, copy / part)
        yield copy


def try_edit(copy: Path, edit: Edit, tests: Tests) -> str:
    """Make an edit in a copy and run its tests; return what came of it.

    ``"caught"``, ``"survived"``, ``"stale"`` (the line has changed), or why nothing was learned.

    Raises:
        ValueError: none of the file's tests runs what is edited.
    """
    path = copy / edit.file
    text = path.read_text()
    try:
        changed = edit.applied(text)
    except ValueError:
        return "stale"
    file = f"tests/operators/test_{edit.tests}.py"
    ran = False
    is_kernel = edit.file.startswith("kernels/")
    for kernels in ("interpreter", "emulator", "compiled") if is_kernel else ("compiled", "interpreter"):
        path.write_text(changed)
        try:
            chosen, failed = tests.first_failure(file, kernels)
        finally:
            path.write_text(text)
        ran = ran or chosen
        if failed is not None:
            return "caught" if tests.passes(failed, kernels) else f"not run: {failed[0]} fails without it"
    if not ran:
        raise ValueError(f"no test of {file} runs {edit.file}: name another file in {EDITS.name}")
    return "survived"


class Tests:
    """Tests of a checkout, each run in a fork of a process that has imported what they share."""

    def __init__(self, copy: Path) -> None:
        self._copy = copy
        self._links = copy.parent / "links"
        self._links.mkdir()
        link_checkout(copy, self._links)
        self._passing: dict[tuple[tuple[str, ...], str], bool] = {}

    def __enter__(self) -> Tests:
        """Start the process."""
        command = [sys.executable, str(Path(__file__).with_name("forked_pytest.py"))]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        return self

    def __exit__(self, *exception: object) -> None:
        """End the process."""
        self._process.kill()
        with self._process:
            pass

    def first_failure(self, file: str, kernels: str) -> tuple[bool, tuple[str, ...] | None]:
        """Return whether a test of the file ran, and pytest's arguments for the first that failed.

        They name the whole file if pytest did not say which test; None: none failed.
        """
        status, output = self._run((file,), kernels)
        if status in (_PASSED, _NONE_CHOSEN):
            return status == _PASSED, None
        if status is not None and status > _NOT_COLLECTED:
            raise RuntimeError(f"pytest ended with {status}: {output[-2000:]}")
        failed = re.search(r"^FAILED (\S.*?)(?: - .*)?$", output, re.MULTILINE)
        if failed:
            return True, (failed[1],)
        # A crash ends the process, whose last words name the function.
        crashed = re.search(rf"/{Path(file).name}\", line \d+ in (test_\w+)", output)
        return True, (file, "-k", crashed[1]) if crashed else (file,)

    def passes(self, tests: tuple[str, ...], kernels: str) -> bool:
        """Whether the tests pass in the checkout without an edit; the answer is remembered."""
        if (tests, kernels) not in self._passing:
            self._passing[tests, kernels] = self._run(tests, kernels)[0] == _PASSED
        return self._passing[tests, kernels]

    def _run(self, tests: tuple[str, ...], kernels: str) -> tuple[int | None, str]:
        request = {
            "checkout": str(self._copy),
            "imports": str(self._links),
            "arguments": ["-qx", "-p", "no:cacheprovider", "--tb=no", "-rf", f"--kernels={kernels}", *tests],
            "environment": {},
            "seconds": TIME_LIMIT_S,
        }
        if self._process.stdin is None or self._process.stdout is None:
            raise RuntimeError("the process of tests has no pipes")
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        answer = json.loads(self._process.stdout.readline())
        return answer["status"], answer["output"]


def render(edits: Sequence[Edit], results: dict[str, str]) -> str:
    """Return the text of MUTATIONS.md."""
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
