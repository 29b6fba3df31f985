"""Run pytest many times in forks of one process, which has imported what all of them import.

Reads a JSON object per line: ``checkout``, ``imports`` (a folder on the import path), ``arguments`` (of pytest),
``environment`` and ``seconds``. Answers each with a line: ``status`` (pytest's; None where time was up) and ``output``.
No process here may import the project: each fork imports the checkout that it is asked about.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
import tempfile
import time
import traceback
from contextlib import suppress

# What takes longest to import and does not know of the project. Not triton: a variable of the environment decides at
# its import who runs kernels; and no plugin of pytest, which rewrites the assertions of those that it imports itself.
_PRELOADED = ("torch", "numpy", "pytest")
_POLL_S = 0.1


def main() -> None:
    """Answer requests from standard input until there are no more."""
    for name in _PRELOADED:
        with suppress(ImportError):
            importlib.import_module(name)
    for line in sys.stdin:
        print(json.dumps(run(json.loads(line))), flush=True)


def run(request: dict[str, object]) -> dict[str, object]:
    """Run pytest in a fork; return its status and output."""
    with tempfile.TemporaryFile() as output:
        child = os.fork()
        if child == 0:
            _become_pytest(request, output.fileno())
        status = _wait(child, time.monotonic() + float(str(request["seconds"])))
        output.seek(0)
        return {"status": status, "output": output.read().decode(errors="replace")}


def _become_pytest(request: dict[str, object], output: int) -> None:
    os.setsid()
    os.dup2(output, 1)
    os.dup2(output, 2)
    status = 3
    try:
        os.environ.update(request["environment"])  # type: ignore[call-overload]
        os.environ["PYTHONPATH"] = sys.path[0] = str(request["imports"])
        os.chdir(str(request["checkout"]))
        sys.dont_write_bytecode = True
        import pytest

        status = int(pytest.main(request["arguments"]))  # type: ignore[arg-type]
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _wait(child: int, end: float) -> int | None:
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(_POLL_S)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


if __name__ == "__main__":
    main()
