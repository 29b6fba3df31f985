"""What is read from pytest's output where the operators' tests run on a CUDA device that is not there."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "tools" / "fake_cuda"


@pytest.fixture
def run(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.delitem(sys.modules, "build", raising=False)
    spec = importlib.util.spec_from_file_location("run_fake_cuda", FOLDER / "run.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_counts_stand_in_any_of_the_last_lines(run):
    lines = [
        "FAILED tests/operators/test_weight.py::test_rows - 3 passed in words",
        "2 failed, 331 passed, 4 skipped, 700 deselected, 1 xfailed, 3 errors in 812.33s (0:13:32)",
        "kernels of torch that were lost: {}",
    ]
    assert run.outcomes(lines) == {"failed": 2, "passed": 331, "skipped": 4, "xfailed": 1, "error": 3}


def test_a_run_without_counts_is_no_table_of_nothing(run):
    with pytest.raises(SystemExit, match="counted no tests: ERROR: not found"):
        run.outcomes(["ERROR: not found"])
