"""The results under other versions: how they are written, and that they are not older than the project's version."""

from pathlib import Path

import matrix
import tritonq

ROOT = Path(__file__).parent.parent.parent


def test_the_table_is_not_older_than_the_project():
    """Fails when the version changes: run `make matrix`, or the rows that matter, before the release.

    A development version counts as the release that it leads to.
    """
    rows = matrix.read(matrix.TABLE.read_text())
    assert {row["row"] for row in rows} >= {"oldest", "newest"}
    assert {row["tritonq"].partition(".dev")[0] for row in rows} == {tritonq.__version__.partition(".dev")[0]}
    assert {row["row"]: row["failed"] for row in rows} == {row["row"]: "0" for row in rows}


def test_rows_replace_their_pins():
    oldest = next(row for row in matrix.ROWS if row.name == "oldest")
    lines = matrix.constraints_of(oldest).splitlines()
    assert {"torch==2.11.0", "triton==3.6.0", "torchvision==0.26.0"} <= set(lines)
    pinned = (ROOT / "constraints.txt").read_text().splitlines()
    assert len(lines) == len(pinned)
    assert len(set(lines) - set(pinned)) == 3


def test_the_oldest_row_has_the_oldest_versions_that_are_promised():
    oldest = next(row for row in matrix.ROWS if row.name == "oldest")
    text = (ROOT / "pyproject.toml").read_text()
    for name in ("torch", "triton"):
        assert f'"{name}>={oldest.pins[name].removesuffix(".0")}' in text


def test_a_written_table_is_read_again(tmp_path, monkeypatch):
    monkeypatch.setattr(matrix, "TABLE", tmp_path / "table.md")
    matrix.TABLE.write_text("# Title\n\nText.\n\n| row | tritonq |\n| --- | --- |\n")
    rows = [{name: f"{name} of {row}" for name in matrix.COLUMNS} | {"row": row} for row in ("newest", "pinned")]
    matrix.write(rows)
    assert matrix.TABLE.read_text().startswith("# Title\n\nText.\n\n| row | tritonq |")
    assert matrix.read(matrix.TABLE.read_text()) == rows[::-1], "in the order of the rows"
    matrix.write([rows[0]])
    assert matrix.read(matrix.TABLE.read_text()) == [rows[0]]


def test_the_sample_exists():
    assert set(matrix.SAMPLE) <= set(matrix.all_files())
    assert len(set(matrix.SAMPLE)) == len(matrix.SAMPLE)


def test_reports_are_summed(tmp_path, monkeypatch):
    monkeypatch.setattr(matrix, "versions", lambda python: {"torch": "2.14.1"})
    monkeypatch.setattr(matrix, "all_files", lambda: ["test_a.py", "test_b.py", "test_c.py"])
    reports = tmp_path / "reports"
    reports.mkdir()
    suite = '<testsuites><testsuite name="{}" tests="{}" failures="{}" errors="0" skipped="2"/></testsuites>'
    (reports / "test_a-compiled.xml").write_text(suite.format("abc1234", 7, 0))
    (reports / "test_a-interpreter.xml").write_text(suite.format("abc1234", 3, 1))
    (reports / "test_b-compiled.xml").write_text(suite.format("abc1233+", 5, 0))
    (reports / "test_removed-compiled.xml").write_text(suite.format("old", 100, 100))
    cells = matrix.summarize(matrix.ROWS[0], tmp_path)
    assert {name: cells[name] for name in ("commit", "files", "passed", "skipped", "failed", "torch")} == {
        "commit": "abc1233+, abc1234",
        "files": "2 of 3",
        "passed": "8",
        "skipped": "6",
        "failed": "1",
        "torch": "2.14.1",
    }


def test_a_run_is_reported_with_the_commit_it_ran_on(tmp_path, monkeypatch):
    monkeypatch.setattr(matrix, "all_files", lambda: ["test_matrix.py"])
    monkeypatch.setattr(matrix, "versions", lambda python: {})
    monkeypatch.setattr(matrix, "commit", lambda: "abc1234")
    started = []
    monkeypatch.setattr(matrix.subprocess, "run", lambda command, **_: started.append(command) or _done())
    matrix.run(tmp_path, ["test_matrix.py"], 1, go_on=False)
    assert "junit_suite_name=abc1234" in started[0]


def test_reports_survive_changed_pins_where_a_run_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(matrix.subprocess, "run", lambda command, **_: _done())
    monkeypatch.setattr(matrix, "interpreter", lambda version: "python")
    report, python = tmp_path / "reports" / "test_a-compiled.xml", tmp_path / "bin" / "python"
    for path in (report, python):
        path.parent.mkdir()
        path.write_text("")
    (tmp_path / "constraints.txt").write_text("torch==2.10.0\n")
    (tmp_path / "constraints.pending").write_text("")
    matrix.build(matrix.ROWS[0], tmp_path, go_on=True)
    assert report.exists()
    assert (tmp_path / "constraints.txt").read_text() == matrix.constraints_of(matrix.ROWS[0])


def test_the_table_itself_is_no_difference(monkeypatch):
    asked = []
    monkeypatch.setattr(
        matrix, "_git", lambda *words: asked.append(words) or ("" if words[0] == "status" else "abc1234")
    )
    assert matrix.commit() == "abc1234"
    assert ":!COMPATIBILITY.md" in asked[0]


def _done():
    return matrix.subprocess.CompletedProcess([], 0)
