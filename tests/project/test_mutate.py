"""The table of deliberate errors, and the script that tries them on a small checkout."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import mutate

ROOT = Path(__file__).parent.parent.parent


def applies(edit):
    try:
        edit.applied((ROOT / edit.file).read_text())
    except ValueError:
        return False
    return True


def test_most_edits_still_apply():
    """Who changes a line changes its edits as well; one that was forgotten is told as stale by the next run."""
    edits = mutate.read_edits()
    assert len({edit.key for edit in edits}) == len(edits)
    assert all((ROOT / "tests" / "operators" / f"test_{edit.tests}.py").exists() for edit in edits)
    assert sum(map(applies, edits)) >= 120


def test_the_table_is_written_from_the_results():
    results = json.loads(mutate.RESULTS.read_text())
    edits = mutate.read_edits()
    assert mutate.TABLE.read_text() == mutate.render(edits, results)
    assert [edit.key for edit in edits if results.get(edit.key) == "survived" and not edit.equivalent] == []


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    for name in ("kernels", "perf", "tritonq", "tests/operators"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "tritonq" / "__init__.py").touch()
    (tmp_path / "tritonq" / "toy.py").write_text("def add(a, b):\n    return a + b  # of two\n\n\nUNUSED = 1 + 1\n")
    (tmp_path / "tests" / "conftest.py").write_text(
        "def pytest_addoption(parser):\n    parser.addoption('--kernels')\n"
    )
    (tmp_path / "tests" / "operators" / "test_toy.py").write_text(
        "from tritonq.toy import add\n\ndef test_add():\n    assert add(1, 2) == 3\n"
    )
    (tmp_path / "mutations.tsv").write_text(
        "file\ttests\told\tnew\tequivalent\n"
        "tritonq/toy.py\ttoy\treturn a + b\treturn a - b\t\n"
        "tritonq/toy.py\ttoy\tUNUSED = 1 + 1\tUNUSED = 1 + 2\t\n"
        "tritonq/toy.py\ttoy\tUNUSED = 1 + 1\tUNUSED = 2\tThe same number.\n"
        "tritonq/toy.py\ttoy\tno such line\tgone\t\n"
    )
    monkeypatch.setattr(mutate, "ROOT", tmp_path)
    for name, file in (("RESULTS", "results.json"), ("TABLE", "MUTATIONS.md")):
        monkeypatch.setattr(mutate, name, tmp_path / file)
    edits = mutate.read_edits(tmp_path / "mutations.tsv")
    monkeypatch.setattr(mutate, "read_edits", lambda: edits)
    return tmp_path


def test_edits_are_tried_on_a_copy(checkout, capsys):
    before = (checkout / "tritonq" / "toy.py").read_text()
    assert mutate.main(["--minutes", "5"]) == 1
    assert (checkout / "tritonq" / "toy.py").read_text() == before
    results = json.loads((checkout / "results.json").read_text())
    assert sorted(results.values()) == ["caught", "stale", "survived"]
    assert results["tritonq/toy.py: return a + b -> return a - b"] == "caught"
    assert results["tritonq/toy.py: UNUSED = 1 + 1 -> UNUSED = 1 + 2"] == "survived"
    table = (checkout / "MUTATIONS.md").read_text()
    assert "4 edits: 1 caught, 1 equivalent, 1 stale, 1 survived." in table
    assert "equivalent: The same number." in table
    capsys.readouterr()
    mutate.main([])
    assert capsys.readouterr().out == "", "what has a result is not tried again"


def test_an_edit_that_no_test_runs_is_an_error(checkout):
    (checkout / "tests" / "operators" / "test_toy.py").write_text("def helper():\n    pass\n")
    with pytest.raises(ValueError, match=r"no test of tests/operators/test_toy\.py runs tritonq/toy\.py"):
        mutate.main(["--minutes", "5"])
