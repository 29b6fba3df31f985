"""Run the operators' tests on the GPU, by pytest in a process of its own; every failure is a finding."""

from __future__ import annotations

import importlib.util
import os
import re
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from tritonq.perf.gpu.part import DEVICE_FAULT, Visit, is_lost
from tritonq.perf.gpu.results import RESULTS, append
from tritonq.perf.machine import SOURCE

if TYPE_CHECKING:
    import pytest

# Set for the plugin below: the results file, and the part that it writes for.
_FILE, _PART = "TRITONQ_GPU_RESULTS", "TRITONQ_GPU_PART"
_MESSAGE_LENGTH = 400
# What pytest and its workers may take to end when the time is over.
_SECONDS_TO_END = 10.0
_MAX_FAILURES_WRITTEN = 100
_USES_OP_TESTER = re.compile(r"^from op_tester import .*\bOpTester\b", re.MULTILINE)
_counts: dict[str, int] = {}


def run(visit: Visit, tests: Path = SOURCE.parent / "tests", keyword: str | None = None) -> None:
    """Run the tests of every file that uses ``op_tester``; of each, those whose name contains ``keyword``.

    Without a keyword: all that run on the GPU, or on a CPU, as a trial, those of the PyTorch path in one file.
    """
    files = operator_test_files(tests)
    if keyword is None:
        keyword, files = ("cuda", files) if visit.device.type == "cuda" else ("torch", files[:1])
    if not files:
        visit.note("pytest", "not run", reason=f"no operators' tests in {tests}")
        return
    missing = [name for name in ("pytest", "hypothesis") if importlib.util.find_spec(name) is None]
    if missing:
        visit.note("pytest", "not run", reason=f"{' and '.join(missing)} not installed")
        return
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", __name__, "-k", keyword]
    if importlib.util.find_spec("xdist") is not None and len(files) > 1:
        command += ["-n", str(min(16, os.cpu_count() or 1)), "--dist", "worksteal"]
    # What a pytest around this one told its workers is not for the one that starts here.
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    environment = {**kept, _FILE: str(visit.out / RESULTS), _PART: visit.part}
    # Not in the checkout itself, whose folder ``tritonq`` lacks the kernels and would be imported.
    with subprocess.Popen([*command, *map(str, files)], cwd=tests, env=environment) as process:
        try:
            status = process.wait(max(1.0, visit.left() - _SECONDS_TO_END))
            # 1 says that some failed, each of which is written down; with 2 and more nothing ran.
            visit.note("pytest", "ok" if status == 0 else "wrong", exit_status=status, files=len(files))
        except subprocess.TimeoutExpired:
            _interrupt(process)
            visit.note("pytest", "cut off", files=len(files))


def _interrupt(process: subprocess.Popen[bytes]) -> None:
    """End pytest by an interrupt, so that it still writes its counts; kill it if that takes too long.

    Python drops an interrupt that comes while it frees an object, so that a second one follows.
    """
    for share in (0.3, 0.2):
        process.send_signal(signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            process.wait(share * _SECONDS_TO_END)
            return
    process.kill()


def operator_test_files(tests: Path) -> list[Path]:
    """Return the files of tests that run once per backend."""
    return sorted(path for path in tests.rglob("test_*.py") if _USES_OP_TESTER.search(path.read_text()))


def pytest_configure() -> None:
    """Let an interrupt end this process, also below a shell's background job, where interrupts are ignored."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Write a failed test to the results at once, and count the others."""
    if "PYTEST_XDIST_WORKER" in os.environ or (report.outcome == "passed" and report.when != "call"):
        return
    _counts[report.outcome] = _counts.get(report.outcome, 0) + 1
    if report.outcome == "failed" and _counts["failed"] <= _MAX_FAILURES_WRITTEN:
        crash = getattr(report.longrepr, "reprcrash", None)
        message = str(crash.message if crash is not None else report.longrepr)
        _write(report.nodeid, "wrong", message=message[:_MESSAGE_LENGTH])


def pytest_runtest_teardown() -> None:
    """End this process if it can do no more on the device; pytest-xdist then starts another for the other tests."""
    if "PYTEST_XDIST_WORKER" in os.environ and torch.cuda.is_initialized() and is_lost(torch.device("cuda")):
        os._exit(DEVICE_FAULT)


def pytest_sessionfinish() -> None:
    """Write the counts to the results."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        _write("counts", "ok", **_counts)


def _write(name: str, status: str, **fields: object) -> None:
    append(Path(os.environ[_FILE]), {"part": os.environ[_PART], "name": name, "status": status, **fields})
