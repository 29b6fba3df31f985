"""`make files`: what each file holds, for whoever looks for the one to change."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent


def lines(*words):
    listed = subprocess.run(
        [sys.executable, ROOT / "tools/files.py", *words], capture_output=True, text=True, check=True
    )
    return dict(line.split(": ", 1) for line in listed.stdout.splitlines())


def test_a_word_finds_files_by_path_and_by_docstring():
    found = lines("bins")
    assert found["tritonq/bins.py"] == "Histogram bins that never move: the top bits of a float."
    assert "tritonq/observers/min_max.py" not in found
    assert lines("Histogram bins").keys() == {"tritonq/bins.py"}


def test_every_file_says_what_it_holds():
    assert [name for name, line in lines().items() if not line] == []
