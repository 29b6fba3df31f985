"""Processes of a visit to a GPU end with what they started: when their time is over, and when the visit is ended."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from tritonq.perf.gpu.limit import run_limited

ROOT = Path(__file__).parent.parent.parent


def is_gone(process):
    """Whether a process ends within some seconds."""
    for _ in range(100):
        if not Path(f"/proc/{process}").exists() or "Z" in Path(f"/proc/{process}/stat").read_text().split()[2]:
            return True
        time.sleep(0.05)
    return False


def test_what_hangs_is_stopped_with_all_that_it_started(tmp_path):
    started = tmp_path / "started"
    code = (
        "import subprocess, sys, time\n"
        f"child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        f"open({str(started)!r}, 'w').write(str(child.pid))\n"
        "time.sleep(60)\n"
    )
    for limit in (3.0, 30.0):
        begin = time.monotonic()
        with (tmp_path / "log").open("wb") as log:
            assert run_limited([sys.executable, "-c", code], limit, log) is None
        assert time.monotonic() - begin < limit + 20
        if started.exists():
            # On a busy machine the first limit may be over before the process has begun.
            break
    assert is_gone(int(started.read_text()))


def test_a_visit_that_is_ended_ends_what_it_runs(tmp_path):
    started = tmp_path / "started"
    child = f"import os, time; open({str(started)!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    code = (
        "import sys\nfrom tritonq.perf.gpu.limit import end_with_children, run_limited\nend_with_children()\n"
        f"run_limited([sys.executable, '-c', {child!r}], 60.0, open({str(tmp_path / 'log')!r}, 'wb'))\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    visit = subprocess.Popen([sys.executable, "-c", code], env=environment)
    for _ in range(600):
        if started.exists() and started.read_text():
            break
        time.sleep(0.1)
    visit.terminate()
    assert visit.wait(20) == 128 + signal.SIGTERM
    assert is_gone(int(started.read_text()))
