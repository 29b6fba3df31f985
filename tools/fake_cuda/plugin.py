"""A pytest plugin: the operators' tests on ``cuda``, where kernels run in the emulator and the rest on the CPU."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
from device import CudaOnCpu, lost_launches
from emulated_cuda import cuda_without_gpu

_DEVICE = CudaOnCpu()


@pytest.fixture(autouse=True)
def cuda_device(request: pytest.FixtureRequest) -> Iterator[None]:
    """Let tests with a device run on CUDA tensors."""
    if not re.search(r"[\[-]cuda[\]-]", request.node.nodeid):
        yield
        return
    with cuda_without_gpu(getattr(request.instance, "architecture", 90), _DEVICE):
        yield


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print how many launches nothing computed."""
    terminalreporter.write_line(f"kernels of torch that were lost: {lost_launches()}")
