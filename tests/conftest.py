"""Which process runs a test, and how hypothesis looks for examples."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, settings

from worker import Worker, in_worker

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

_workers: dict[str, Worker] = {}


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "worker(name): runs in a process of its own, in Triton's interpreter")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave the time limit of a worker's test to the worker: ended here, it would end the whole run."""
    if not in_worker():
        for item in items:
            if item.get_closest_marker("worker") is not None:
                item.add_marker(pytest.mark.timeout(0))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> bool | None:
    marker = item.get_closest_marker("worker")
    if marker is None or in_worker():
        return None
    name = marker.args[0]
    if name not in _workers:
        _workers[name] = Worker(item.config)
    item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    for report in _workers[name].run(item):
        item.ihook.pytest_runtest_logreport(report=report)
    item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
    # The test before this one left up what the two share: classes and modules.
    item.session._setupstate.teardown_exact(nextitem)
    return True


def pytest_unconfigure(config: pytest.Config) -> None:
    for worker in _workers.values():
        worker.stop()
    _workers.clear()
