"""Run PyTorch's own quantization tests with tritonq's operators behind torch's, and write TORCH_TESTS.md.

Run: python tools/torch_tests.py CHECKOUT (`make torch-tests PYTORCH=CHECKOUT`), where CHECKOUT is PyTorch's source.
Each file runs twice, with torch's operators and under `tritonq.use_in_torch()`; a test that only the first run passes,
and that ABSENT does not explain, makes the command fail. The tests themselves stay in the checkout.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections import Counter
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any, Literal

from markdown_table import markdown_table

ROOT = Path(__file__).parent.parent
TABLE = ROOT / "TORCH_TESTS.md"
FILES = (
    "test/quantization/core/test_workflow_ops.py",
    "test/quantization/core/test_workflow_module.py",
    "test/quantization/eager/test_quantize_eager_qat.py",
)
# Tests that do not apply under `use_in_torch`, by name, with the reason.
ABSENT: dict[str, str] = {}
OTHER_VERSION = (
    "The tests are of another version than torch is: what torch itself fails below may be due to that, and newer tests "
    "were not run. What `test_workflow_ops.py` of PyTorch's main branch asks beyond these on a CPU (bfloat16, switches "
    "of type bool, empty tensors, dtypes of scales and zero points, infinities) is compared call by call in "
    "`tests/operators/test_torch_operators.py`."
)
Outcome = Literal["passed", "failed", "skipped"]
Operators = Literal["torch", "tritonq"]


@dataclass(frozen=True)
class Result:
    """Outcome of one test, and the first line of its reason."""

    outcome: Outcome
    reason: str = ""


def pytest_addoption(parser: Any) -> None:
    """Add the option that says whose operators run; pytest loads this file as a plugin."""
    parser.addoption("--operators", choices=("torch", "tritonq"), default="torch")


def pytest_configure(config: Any) -> None:
    """Put tritonq behind torch's operators for the whole run; torchvision, if it is there, is of another build."""
    sys.modules["torchvision"] = None  # type: ignore[assignment]
    if config.getoption("--operators") == "tritonq":
        import tritonq

        tritonq.use_in_torch()


def run(checkout: Path, file: str, operators: Operators) -> dict[str, Result]:
    """Run a file's tests with the operators of torch or of tritonq; return the results by name.

    Raises:
        RuntimeError: pytest could not run the tests.
    """
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        options = ["-q", "-W", "ignore", "-c", "/dev/null", "-p", "no:cacheprovider", "-p", Path(__file__).stem]
        # Some files import helpers that are called test_….
        options += ["-o", "python_functions=", "--rootdir", str(checkout)]
        command = [sys.executable, "-m", "pytest", *options, f"--junitxml={report}", f"--operators={operators}", file]
        environment = {**os.environ, "PYTHONPATH": str(ROOT / "tools")}
        done = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True, check=False)
        if not report.exists() or done.returncode not in (0, 1):  # all passed, some failed
            raise RuntimeError(f"pytest could not run {file}:\n{done.stdout}{done.stderr}")
        return results_of(report.read_text())


def results_of(report: str) -> dict[str, Result]:
    """Return the results in a report of JUnit's form, by ``class.test``.

    Examples:
        >>> results_of('<a><testcase classname="x.T" name="t"><failure message="E: no&#10;more"/></testcase></a>')
        {'T.t': Result(outcome='failed', reason='E: no')}
    """
    found: dict[str, Result] = {}
    for case in ElementTree.fromstring(report).iter("testcase"):
        name = f"{(case.get('classname') or '').rpartition('.')[2]}.{case.get('name')}"
        failed = case.find("failure") if case.find("failure") is not None else case.find("error")
        skipped = case.find("skipped")
        cause = failed if failed is not None else skipped
        outcome: Outcome = "failed" if failed is not None else "skipped" if skipped is not None else "passed"
        found[name] = Result(outcome, "" if cause is None else (cause.get("message") or "").partition("\n")[0])
    return found


def lost(plain: dict[str, Result], ours: dict[str, Result]) -> list[str]:
    """Return names of tests that pass with torch's operators and not with tritonq's, unless ABSENT explains them.

    Examples:
        >>> lost({"T.a": Result("passed"), "T.b": Result("failed")}, {"T.a": Result("failed"), "T.b": Result("failed")})
        ['T.a']
    """
    passed = [name for name, result in plain.items() if result.outcome == "passed"]
    return [name for name in passed if name not in ABSENT and ours.get(name, Result("failed")).outcome != "passed"]


def table(source: str, runs: dict[str, tuple[dict[str, Result], dict[str, Result]]]) -> str:
    """Return the page of results."""
    import torch

    import tritonq

    lines = [
        "# PyTorch's own quantization tests",
        "",
        f"Run by `make torch-tests` on {date.today():%Y-%m-%d}: tritonq {tritonq.__version__}, "
        f"torch {torch.__version__}, tests of PyTorch {source}, on {'a GPU and ' if torch.cuda.is_available() else ''}"
        "a CPU.",
        *([] if source.split(".")[:2] == torch.__version__.split(".")[:2] else [OTHER_VERSION]),
        "",
    ]
    head = ("file", "tests", "pass with torch's operators", "pass under `use_in_torch()`", "lost", "skipped")
    rows: list[tuple[object, ...]] = []
    for file, (plain, ours) in runs.items():
        counts = [Counter(result.outcome for result in results.values()) for results in (plain, ours)]
        passed = [count["passed"] for count in counts]
        rows.append((f"`{Path(file).name}`", len(plain), *passed, len(lost(plain, ours)), counts[1]["skipped"]))
    lines += [*markdown_table(head, rows), "", "## Lost", ""]
    told = [(name, ours[name]) for plain, ours in runs.values() for name in lost(plain, ours)]
    lines += [f"- `{name}`: {result.reason}" for name, result in told] or ["None."]
    lines += ["", "## What does not apply", ""]
    lines += [f"- `{name}`: {reason}" for name, reason in ABSENT.items()] or ["Nothing: every test applies."]
    lines += ["", "## Fails or is skipped with torch's operators too", ""]
    for outcome in ("failed", "skipped"):
        reasons: dict[str, list[str]] = {}
        for plain, _ in runs.values():
            for name, result in plain.items():
                if result.outcome == outcome:
                    reasons.setdefault(result.reason, []).append(name)
        lines += [f"- {outcome}: {', '.join(f'`{name}`' for name in names)}: {why}" for why, names in reasons.items()]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Run all tests with both, write the page, and return 1 if a test was lost, else 0."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("checkout", type=Path, help="folder with PyTorch's source")
    parser.add_argument("--out", type=Path, default=TABLE, help="page to write")
    arguments = parser.parse_args()
    checkout = arguments.checkout.resolve()
    missing = [file for file in FILES if not (checkout / file).is_file()]
    if missing:
        parser.error(f"{checkout} has no {missing[0]}: it is no checkout of PyTorch")
    runs = {file: (run(checkout, file, "torch"), run(checkout, file, "tritonq")) for file in FILES}
    version = checkout / "version.txt"
    page = table(version.read_text().strip() if version.exists() else "of an unknown version", runs)
    arguments.out.write_text(page)
    print(page)
    return int(any(lost(*results) for results in runs.values()))


if __name__ == "__main__":
    sys.exit(main())
