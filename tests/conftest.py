"""Which tests run where kernels are interpreted, and how hypothesis looks for examples."""

from __future__ import annotations

import gc
import os
from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

from interpreter_library import mend_interpreter

# The same examples on every run, and no clock: the interpreter takes seconds where a GPU takes microseconds.
settings.register_profile(
    "tritonq",
    max_examples=25,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.differing_executors],
)
settings.load_profile("tritonq")

# Sums over threads depend on their number; and tests run side by side, a core each.
torch.set_num_threads(1)

# A process that interprets kernels can't compile them, and one whose interpreter the sanitizer watches does nothing
# else: each has a run of pytest of its own. Which run a test belongs to, its marker says.
_RUNS = {
    "compiled": "kernels are compiled, or not launched",
    "interpreter": "Triton's interpreter runs the kernels",
    "sanitizer": "the interpreter runs the kernels, and triton-viz checks every access",
    "emulator": "kernels are compiled, and an emulated GPU runs them on CPU tensors",
}
_OPERATORS = Path(__file__).parent / "operators"
_run = "compiled"
_in_other_runs: Counter[str] = Counter()


def pytest_addoption(parser: pytest.Parser) -> None:
    what = "; ".join(f"{name}: {meaning}" for name, meaning in _RUNS.items())
    parser.addoption("--kernels", choices=list(_RUNS), default="compiled", help=f"the tests to run ({what})")


def pytest_configure(config: pytest.Config) -> None:
    global _run
    _run = config.getoption("--kernels")
    if _run in ("interpreter", "sanitizer"):
        os.environ["TRITON_INTERPRET"] = "1"
        mend_interpreter()
    for name, meaning in list(_RUNS.items())[1:]:
        config.addinivalue_line("markers", f"{name}: runs under --kernels={name}, where {meaning}")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what runs in another run."""
    if lost := [item.nodeid for item in items if _run_of(item) != "compiled" and item.path.parent != _OPERATORS]:
        raise pytest.UsageError(f"other runs look in {_OPERATORS.name}/ only, and miss {lost[0]}")
    elsewhere = [item for item in items if _run_of(item) != _run]
    _in_other_runs.update(map(_run_of, elsewhere))
    config.hook.pytest_deselected(items=elsewhere)
    items[:] = [item for item in items if _run_of(item) == _run]


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """Take what a file's tests leave behind, such as torch's caches of traces, out of the garbage collector's sight.

    In a million objects that stay each full collection takes half a second, a fifth of all time.
    """
    if nextitem is None or nextitem.path != item.path:
        gc.collect()
        gc.freeze()


def pytest_report_collectionfinish() -> list[str]:
    return [f"{number} of these tests run under --kernels={name}" for name, number in sorted(_in_other_runs.items())]


def _run_of(item: pytest.Item) -> str:
    return next((name for name in _RUNS if item.get_closest_marker(name) is not None), "compiled")
