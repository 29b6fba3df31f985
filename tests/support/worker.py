"""A second pytest process that runs tests on request, since a process that interprets kernels cannot compile them.

A test marked ``worker("name")`` runs in the process of that name, with ``TRITON_INTERPRET=1``. Its reports come back,
so that in the ordinary run it passes or fails like any other test. See `conftest.py`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

_REPORT_FD = "TRITONQ_TEST_REPORT_FD"


def in_worker() -> bool:
    """Whether this process interprets kernels already."""
    return os.environ.get("TRITON_INTERPRET") == "1"


class Worker:
    """The parent's end: sends node ids, receives reports."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config
        self._process: subprocess.Popen[str] | None = None

    def run(self, item: pytest.Item) -> Iterator[pytest.TestReport]:
        """The reports of one test. A process that dies makes a failed one, and the next test gets a new process."""
        process = self._process if self._process and self._process.poll() is None else self._start()
        assert process.stdin is not None
        process.stdin.write(json.dumps({"path": str(item.path), "nodeid": item.nodeid}) + "\n")
        process.stdin.flush()
        for line in self._reports:
            content = json.loads(line)
            if content is None:
                return
            yield self._config.hook.pytest_report_from_serializable(config=self._config, data=content)
        message = f"the worker process ended with {process.wait()}"
        self._output.seek(0)
        tail = self._output.read()[-4000:]
        yield pytest.TestReport(item.nodeid, item.location, {}, "failed", f"{message}\n{tail}", "call")

    def stop(self) -> None:
        """End the process, if there is one."""
        if self._process is not None and self._process.stdin is not None:
            self._process.stdin.close()
            self._process.wait()

    def _start(self) -> subprocess.Popen[str]:
        self._output = tempfile.TemporaryFile("w+")  # noqa: SIM115 (lives as long as the process)
        reading, writing = os.pipe()
        environment = {**os.environ, "TRITON_INTERPRET": "1", _REPORT_FD: str(writing)}
        # What pytest-xdist told its own worker is not for this one.
        environment = {key: value for key, value in environment.items() if not key.startswith("PYTEST_XDIST")}
        self._process = subprocess.Popen(
            [sys.executable, __file__, str(self._config.rootpath)],
            stdin=subprocess.PIPE,
            stdout=self._output,
            stderr=subprocess.STDOUT,
            pass_fds=(writing,),
            env=environment,
            text=True,
        )
        os.close(writing)
        self._reports = os.fdopen(reading)
        return self._process


class _Serve:
    """The child's end, a pytest plugin: its test loop reads node ids from stdin."""

    def __init__(self) -> None:
        # A copy, since pytest takes stdin away while it captures output.
        self._requests = os.fdopen(os.dup(0))
        self._out = os.fdopen(int(os.environ[_REPORT_FD]), "w")
        self._items: dict[str, pytest.Item] = {}
        self._collected: set[str] = set()

    def _send(self, content: Any) -> None:
        self._out.write(json.dumps(content) + "\n")
        self._out.flush()

    def pytest_collection(self, session: pytest.Session) -> bool:
        return True

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        for line in self._requests:
            request = json.loads(line)
            if request["path"] not in self._collected:
                self._collected.add(request["path"])
                self._items.update((item.nodeid, item) for item in session.perform_collect([request["path"]]))
            item = self._items.get(request["nodeid"])
            if item is not None:
                item.ihook.pytest_runtest_protocol(item=item, nextitem=None)
                self._send(None)
                continue
            raise RuntimeError(f"no test {request['nodeid']!r} in {request['path']}")
        return True

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._send(self._config.hook.pytest_report_to_serializable(config=self._config, report=report))

    def pytest_configure(self, config: pytest.Config) -> None:
        self._config = config


if __name__ == "__main__":
    root = sys.argv[1]
    options = ["--rootdir", root, "-p", "no:cacheprovider", "-p", "no:xdist", str(Path(root, "tests"))]
    sys.exit(pytest.main(options, plugins=[_Serve()]))
