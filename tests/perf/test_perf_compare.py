"""Two commits compared by one command, over a small repository whose bench writes known times."""

from __future__ import annotations

import subprocess

import pytest

from tritonq.perf import compare

BENCH = """
import json, pathlib, sys
import tritonq.perf.times as times

out = pathlib.Path(sys.argv[sys.argv.index("--out") + 1])
out.mkdir(parents=True)
assert sys.argv[1:4] == ["bench", "--case", "toy"]
shared = {"schema": 1, "run": "r", "family": "f", "implementation": "tritonq", "status": "ok", "time": "t"}
with (out / "r.jsonl").open("w") as file:
    for case, seconds in times.TIMES.items():
        print(json.dumps({**shared, "case": case, "environment": {"device": "d"}, "median_s": seconds}), file=file)
"""


def git(folder, *arguments):
    identity = ["-c", "user.name=n", "-c", "user.email=e@example.com"]
    subprocess.run(["git", "-C", str(folder), *identity, *arguments], check=True, capture_output=True)


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """Commits ``slow`` and ``fast``, and a working tree of its own."""
    folder = tmp_path / "repository"
    for name in ("tritonq", "kernels", "perf"):
        (folder / name).mkdir(parents=True)
    for name in ("tritonq", "perf"):
        (folder / name / "__init__.py").touch()
    (folder / "tritonq" / "__main__.py").write_text(BENCH)
    git(tmp_path, "init", "-q", str(folder))
    for name, times in (("slow", {"toy/a": 3.0, "toy/old": 1.0}), ("fast", {"toy/a": 1.5, "toy/new": 1.0})):
        (folder / "perf" / "times.py").write_text(f"TIMES = {times}")
        git(folder, "add", "-A")
        git(folder, "commit", "-qm", name)
        git(folder, "tag", name)
    (folder / "perf" / "times.py").write_text("TIMES = {'toy/a': 6.0}")
    monkeypatch.setattr(compare, "SOURCE", folder / "perf")
    return folder


def test_two_commits(repository, capsys):
    assert compare.main(["slow", "fast", "--rounds", "2", "--case", "toy"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:4] == [f"round {i} of 2: {name}" for i, name in ((1, "slow"), (1, "fast"), (2, "fast"), (2, "slow"))]
    (row,) = (line.split() for line in lines if "toy/a" in line)
    assert row[row.index("tritonq") + 5] == "2.00"
    assert "  toy/old, tritonq: measured at slow alone" in lines
    assert "  toy/new, tritonq: measured at fast alone" in lines
    worktrees = subprocess.run(["git", "-C", str(repository), "worktree", "list"], capture_output=True, text=True)
    assert len(worktrees.stdout.splitlines()) == 1


def test_the_working_tree(repository, capsys):
    assert compare.main([".", "fast", "--rounds", "1", "--case", "toy"]) == 0
    assert "4.00" in capsys.readouterr().out


def test_a_commit_that_is_not_there(repository, capsys):
    assert compare.main(["slow", "lost"]) == 2
    assert "has no commit lost" in capsys.readouterr().err


def test_a_bench_that_fails(repository, capsys):
    assert compare.main(["slow", "fast", "--rounds", "1"]) == 1
    assert "bench of slow ended with 1" in capsys.readouterr().err
