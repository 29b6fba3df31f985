"""The goals say what the committed results say, and the results are the newest of each case."""

import dataclasses

import pytest

from tritonq.perf import goals, records
from tritonq.perf.cases import all_cases
from tritonq.perf.goals import GOALS, Goal
from tritonq.perf.machine import SOURCE
from tritonq.perf.runner import default_results


def record(implementation, **changes):
    environment = {"device": "toy cpu", "device_type": "cpu", "threads": 2, "commit": "0123456789"}
    fields = {"run": "20260101T000000Z-abc", "case": "toy/a", "implementation": implementation, "median_s": 1.0}
    fields["status"] = "ok"
    return {**fields, "environment": environment, **changes}


def test_every_committed_file_holds_the_newest_run_of_some_case():
    """Remove what a newer run replaces: measurements would make the repository grow for ever."""
    newest = {record["run"] for record in records.latest(records.read_folder(default_results()))}
    files = sorted(default_results().rglob("*.jsonl"))
    assert files
    replaced = [path.name for path in files if not {record["run"] for record in records.read(path)} & newest]
    assert replaced == []


@pytest.mark.parametrize("goal", GOALS, ids=lambda goal: goal.says)
def test_goals_name_cases_and_implementations_that_exist(goal):
    case = next(case for case in all_cases() if case.name == goal.case)
    assert goal.ours in case.implementations
    assert goal.device_type in case.devices
    if goal.measure == "copy":
        assert case.bytes_moved
    elif goal.measure == "every peer":
        assert set(goals.TRAINING_PEERS) <= set(case.implementations)
    else:
        assert goal.peer in case.implementations
    if goal.measure == "memory":
        assert case.memory is not None


@pytest.mark.parametrize(
    ("measure", "bound", "ours", "peer", "value", "met"),
    [
        ("speed-up", 2.0, {"speed_up": 6.0}, {"speed_up": 2.0}, 3.0, True),
        ("speed-up", 4.0, {"speed_up": 6.0}, {"speed_up": 2.0}, 3.0, False),
        ("time", 1.15, {"speed_up": 0.8}, {"speed_up": 1.0}, 1.25, False),
        ("time", 1.3, {"speed_up": 0.8}, {"speed_up": 1.0}, 1.25, True),
        ("memory", 1.01, {"memory_bytes": 90}, {"memory_bytes": 100}, 0.9, True),
        ("memory", 0.8, {"memory_bytes": 90}, {"memory_bytes": 100}, 0.9, False),
        ("copy", 0.85, {"copy_fraction": 0.9}, None, 0.9, True),
        ("copy", 0.95, {"copy_fraction": 0.9}, None, 0.9, False),
        ("speed-up", 1.0, {"speed_up": 6.0}, None, None, None),
        ("speed-up", 1.0, {}, {}, None, None),
        ("memory", 1.0, {}, {"memory_bytes": 100}, None, None),
    ],
)
def test_values(measure, bound, ours, peer, value, met):
    goal = Goal("toy", "toy/a", measure, bound, "peer")
    found = goal.value(ours, peer)
    assert found == (pytest.approx(value) if value is not None else None)
    if value is not None:
        assert goal.is_met(found) is met


def test_table(monkeypatch):
    fast = Goal("fast", "toy/a", "speed-up", 2.0, "peer")
    monkeypatch.setattr(goals, "GOALS", (fast, dataclasses.replace(fast, says="gpu", device_type="cuda")))
    lines = goals.render([record("tritonq", speed_up=3.0), record("peer", speed_up=2.0)]).splitlines()
    assert lines[2:] == [
        "| fast | 1.50x | no | toy cpu, 2 threads | 0123456 |",
        "| gpu | not measured | | cuda | |",
    ]


class TestEveryPeer:
    GOAL = Goal("ahead", "toy/a", "every peer", 1.0)

    def rows(self, monkeypatch, **changed):
        monkeypatch.setattr(goals, "GOALS", (self.GOAL,))
        peers = {name: {"speed_up": 0.5} for name in goals.TRAINING_PEERS} | changed
        found = [record("tritonq", speed_up=0.8), *(record(name, **{"status": "ok", **f}) for name, f in peers.items())]
        return goals.render(found).splitlines()[2]

    def test_the_fastest_peer_decides(self, monkeypatch):
        assert "| 1.60x torch.ao v0 | yes |" in self.rows(monkeypatch)
        assert "| 0.89x AIMET | no |" in self.rows(monkeypatch, AIMET={"speed_up": 0.9})

    @pytest.mark.parametrize("status", ["not installed", "error: no such layer", "failed check: output 0"])
    def test_one_that_was_not_timed_is_named(self, monkeypatch, status):
        assert "| 1.60x torch.ao v0 (not timed: Brevitas) | yes |" in self.rows(
            monkeypatch, Brevitas={"status": status}
        )

    def test_without_a_peer_it_is_not_measured(self, monkeypatch):
        monkeypatch.setattr(goals, "TRAINING_PEERS", ("torch.ao v0",))
        monkeypatch.setattr(goals, "GOALS", (self.GOAL,))
        assert "not measured" in goals.render([record("tritonq", speed_up=0.8)])


def test_the_readme_shows_what_the_committed_results_say():
    text = (SOURCE / "README.md").read_text(encoding="utf-8")
    table = goals.render(records.read_folder(default_results()))
    assert goals.replaced(text, table) == text, "run python -m tritonq.perf.goals --write"


def test_lost_marks():
    with pytest.raises(ValueError, match="lost the marks"):
        goals.replaced("nothing", "table")
