"""The `bench` command: its options, its results file, and what it does about failures."""

import argparse
import json
import time
from pathlib import Path

import pytest
import torch

from tritonq.perf import records, runner
from tritonq.perf.case import Case, Implementation, Tolerance, disagreement
from tritonq.perf.measure import Budget, input_sets, interleave, schedule
from tritonq.perf.stats import Spread, speed_up
from tritonq.perf.table import duration, render

CPU = torch.device("cpu")
EXACT = Tolerance("no arithmetic to differ in")


def make_inputs(generator, device):
    return {"x": torch.rand(1000, generator=generator, device=device)}


def double(inputs):
    return (inputs["x"] * 2,)


def make_case(**changes):
    fields = {
        "name": "toy/double",
        "family": "toy",
        "make_inputs": make_inputs,
        "reference": double,
        "implementations": {"plain": Implementation(lambda inputs: double)},
        "baseline": "plain",
        "bytes_moved": 8000,
        "operations": 1000,
        "tolerance": EXACT,
        "quick": True,
    }
    return Case(**{**fields, **changes})


@pytest.fixture
def bench():
    return runner.Bench(CPU, {"device": "toy cpu", "threads": 1}, Budget(0.01), quick=True, copy=Spread(1e9, 1e9, 1e9))


def statuses(case, bench):
    return {record["implementation"]: record["status"] for record in runner.run_case(case, bench)}


class TestStatistics:
    def test_quantiles_interpolate(self):
        assert Spread.of([3.0, 1.0, 2.0]).median == 2.0
        assert Spread.of([4.0, 1.0, 3.0, 2.0]).median == 2.5
        assert Spread.of([0.0, 10.0]).p20 == pytest.approx(2.0)
        assert Spread.of([7.0]) == Spread(7.0, 7.0, 7.0)

    def test_no_values(self):
        with pytest.raises(ValueError, match="no values"):
            Spread.of([])

    def test_spread_ignores_an_outlier(self):
        assert Spread.of([1.0, 1.0, 1.0, 1.0, 1.0, 100.0]).median == 1.0

    def test_ratios_are_paired_by_round(self):
        # The machine was ten times slower in the second round: unpaired medians would say anything.
        assert speed_up([2.0, 20.0, 2.0], [1.0, 10.0, 1.0]) == Spread(2.0, 2.0, 2.0)
        with pytest.raises(ValueError, match="paired"):
            speed_up([1.0], [1.0, 2.0])


class TestTiming:
    def test_implementations_take_turns(self):
        assert list(schedule(["a", "b"], 2)) == [(0, "a"), (0, "b"), (1, "a"), (1, "b")]

    def test_every_step_is_warmed_before_any_is_timed_and_then_alternates(self):
        calls = []
        steps = {name: lambda inputs, name=name: calls.append(name) or () for name in "ab"}
        times = interleave(steps, [{}], CPU, Budget(0.0, min_rounds=3, max_rounds=3))
        assert len(times["a"]) == len(times["b"]) == 3
        assert calls[:2] == ["a", "b"]
        runs = [name for i, name in enumerate(calls) if i == 0 or calls[i - 1] != name]
        assert runs == ["a", "b"] * 5

    def test_a_long_step_is_called_as_rarely_as_can_be(self):
        calls = []
        steps = {"long": lambda inputs: calls.append(time.sleep(0.06)) or ()}
        interleave(steps, [{}], CPU, Budget(0.0, min_rounds=3, max_rounds=3))
        assert len(calls) == 1 + 1 + 3

    def test_a_slower_step_takes_longer(self):
        x = torch.rand(200_000)
        steps = {"once": lambda _: (x.sin(),), "often": lambda _: tuple(x.sin() for _ in range(20))}
        times = interleave(steps, [{}], CPU, Budget(0.05))
        assert speed_up(times["often"], times["once"]).median > 5

    def test_buffers_rotate_through_more_than_the_cache(self):
        def make(generator, device):
            return {"x": torch.rand(1 << 22, generator=generator, device=device)}

        sets = input_sets(make, CPU)
        assert 2 <= len(sets) <= 32
        assert not torch.equal(sets[0]["x"], sets[1]["x"])
        assert torch.equal(sets[0]["x"], input_sets(make, CPU)[0]["x"])

    def test_rounds_fit_the_budget(self):
        budget = Budget(seconds=2.0, min_rounds=7, max_rounds=60)
        assert [budget.rounds(s) for s in (10.0, 0.1, 1e-9)] == [7, 20, 60]
        assert budget.is_spent(3, 9.0)
        assert not budget.is_spent(2, 9.0)
        assert not budget.is_spent(20, 7.0)


class TestChecking:
    def test_agreement(self):
        ref = torch.tensor([1.0, 2.0, torch.nan, torch.inf])
        assert disagreement((ref.clone(),), (ref,), EXACT) is None

    @pytest.mark.parametrize(
        ("out", "says"),
        [
            (torch.tensor([1.0, 2.5]), "differs in 1 of 2 elements, by up to 0.5"),
            (torch.tensor([1.0, torch.nan]), "has NaN"),
            (torch.tensor([1.0]), "has shape"),
            (torch.tensor([1.0, 2.0], dtype=torch.float64), "is torch.float64"),
        ],
    )
    def test_disagreement_says_how(self, out, says):
        assert says in disagreement((out,), (torch.tensor([1.0, 2.0]),), EXACT)

    def test_a_fraction_may_differ_and_no_more(self):
        ref, out = torch.zeros(1000), torch.zeros(1000)
        out[:3] = 1
        allowed = Tolerance("test", fraction=3e-3)
        assert disagreement((out,), (ref,), allowed) is None
        out[3] = 1
        assert disagreement((out,), (ref,), allowed) is not None

    def test_distance(self):
        ref = torch.ones(100)
        near = Tolerance("test", distance=0.5)
        assert disagreement((ref * 1.4,), (ref,), near) is None
        assert "relative distance 1" in disagreement((ref * 0,), (ref,), near)


class TestRunCase:
    def test_what_fails_or_is_missing_keeps_its_line(self, bench):
        def broken(inputs):
            raise RuntimeError("no such kernel")

        def wrong(inputs):
            return (inputs["x"] * 2 + 1,)

        table = {
            "plain": Implementation(lambda inputs: double),
            "wrong": Implementation(lambda inputs: wrong),
            "broken": Implementation(lambda inputs: broken),
            "unbuildable": Implementation(broken),
            "absent": Implementation(lambda inputs: double, distribution="nosuchlib", module="nosuchlib"),
            "gpu only": Implementation(lambda inputs: double, devices=("cuda",)),
            "slow start": Implementation(lambda inputs: double, quick=False),
        }
        written = list(runner.run_case(make_case(implementations=table), bench))
        found = {record["implementation"]: record["status"] for record in written}
        assert found == {
            "plain": "ok",
            "wrong": "failed check: output 0 differs in 1000 of 1000 elements, by up to 1",
            "broken": "error: RuntimeError: no such kernel",
            "unbuildable": "error: RuntimeError: no such kernel",
            "absent": "not installed",
            "gpu only": "not run: needs cuda",
            "slow start": "not run: left out by --quick",
        }
        assert [record["implementation"] for record in written if "median_s" in record] == ["plain"]
        text = render([{**record, "environment": ENVIRONMENT} for record in written])
        for name, status in found.items():
            assert name in text
            assert status == "ok" or status in text

    def test_a_peers_own_tolerance_replaces_the_cases(self, bench):
        loose = Tolerance("test", atol=2.0)
        table = {
            "plain": Implementation(lambda inputs: double),
            "off by one": Implementation(lambda inputs: lambda i: (i["x"] * 2 + 1,), tolerance=loose),
        }
        assert statuses(make_case(implementations=table), bench)["off by one"] == "ok"

    def test_cuda_cases_are_listed_as_not_run(self, bench):
        written = list(runner.run_case(make_case(devices=("cuda",)), bench))
        assert [record["status"] for record in written] == ["not run: needs cuda, this run is on cpu"]
        text = render([{**record, "environment": ENVIRONMENT} for record in written])
        assert "toy/double: not run: needs cuda" in text

    def test_no_ratio_without_a_baseline(self, bench):
        table = {
            "plain": Implementation(lambda inputs: lambda i: (i["x"],)),
            "right": Implementation(lambda inputs: double),
        }
        right = list(runner.run_case(make_case(implementations=table), bench))[1]
        assert right["status"] == "ok"
        assert "speed_up" not in right

    def test_bandwidth_and_ratio(self, bench):
        record = next(runner.run_case(make_case(), bench))
        assert record["bytes_per_s"] == pytest.approx(8000 / record["median_s"])
        assert record["copy_fraction"] == pytest.approx(record["bytes_per_s"] / 1e9)
        assert record["speed_up"] == 1.0
        assert record["p20_s"] <= record["median_s"] <= record["p80_s"]

    def test_a_case_needs_its_baseline(self):
        with pytest.raises(ValueError, match="baseline 'other'"):
            make_case(baseline="other")


ENVIRONMENT = {
    "device": "toy cpu",
    "driver": None,
    "threads": 1,
    "torch": "2",
    "triton": "3",
    "python": "3",
    "commit": "0123456789",
    "dirty": False,
}
RECORD = {
    "case": "toy/double",
    "family": "toy",
    "implementation": "plain",
    "status": "ok",
    "time": "2026-01-01T00:00:00Z",
    "environment": ENVIRONMENT,
}


class TestRecords:
    def test_a_result_is_never_overwritten(self, tmp_path):
        paths = set()
        for number in range(3):
            with records.create(tmp_path, "abc") as file:
                records.write(file, {**RECORD, "number": number})
            paths.add(Path(file.name))
        assert len(paths) == 3
        assert sorted(record["number"] for record in records.read_folder(tmp_path)) == [0, 1, 2]

    def test_creation_is_exclusive(self, tmp_path, monkeypatch):
        with records.create(tmp_path, "abc") as file:
            taken = Path(file.name)
        with pytest.raises(FileExistsError):
            taken.open("x")

    def test_a_line_is_on_disk_before_the_run_is_over(self, tmp_path):
        with records.create(tmp_path, "abc") as file:
            records.write(file, RECORD)
            assert len(records.read(Path(file.name))) == 1

    @pytest.mark.parametrize(
        ("line", "says"),
        [
            ('{"schema": 1, "case"', "not JSON"),
            ("[1, 2]", "not a measurement"),
            ('{"schema": 1, "environment": {}}', "lacks run, case"),
            (json.dumps({**RECORD, "run": "a", "schema": 99}), "schema 99"),
            ("\x00\x01", "not JSON"),
        ],
    )
    def test_a_damaged_file_is_named_and_ignored(self, tmp_path, line, says):
        with records.create(tmp_path, "good") as file:
            records.write(file, RECORD)
        bad = tmp_path / "bad.jsonl"
        bad.write_text(line + "\n")
        with pytest.raises(ValueError, match=f"bad.jsonl, line 1: .*{says}"):
            records.read(bad)
        with pytest.warns(UserWarning, match=r"ignored a results file: .*bad\.jsonl"):
            assert len(records.read_folder(tmp_path)) == 1

    def test_bytes_that_are_no_text(self, tmp_path):
        (tmp_path / "bad.jsonl").write_bytes(b"\xff\xfe\x00")
        with pytest.warns(UserWarning, match="not readable"):
            assert records.read_folder(tmp_path) == []

    def test_the_last_run_of_each_case_and_nothing_from_earlier_ones(self):
        def made(run, implementation, case="toy/double", device="toy cpu"):
            environment = {**ENVIRONMENT, "device": device}
            return {**RECORD, "run": run, "implementation": implementation, "case": case, "environment": environment}

        old = [made("20260101T000000Z-a", "plain"), made("20260101T000000Z-a", "other")]
        new = [made("20260102T000000Z-b", "plain")]
        elsewhere = [
            made("20260101T000000Z-a", "plain", device="toy gpu"),
            made("20260101T000000Z-a", "plain", "toy/2"),
        ]
        assert records.latest([*new, *old, *elsewhere]) == [*new, *elsewhere]


class TestCommand:
    @pytest.fixture
    def run(self, tmp_path, monkeypatch, capsys):
        monkeypatch.setattr(runner, "all_cases", lambda: [make_case(), make_case(name="toy/gpu", devices=("cuda",))])
        monkeypatch.setattr(runner, "copy_bandwidth", lambda device: Spread(1e9, 1e9, 1e9))

        def command(*arguments):
            parser = argparse.ArgumentParser()
            runner.add_arguments(parser)
            threads = torch.get_num_threads()
            try:
                code = runner.main(parser.parse_args([*arguments, "--out", str(tmp_path), "--seconds", "0.01"]))
            finally:
                torch.set_num_threads(threads)
            return code, capsys.readouterr(), list(tmp_path.rglob("*.jsonl"))

        return command

    def test_runs_and_writes_what_it_prints(self, run):
        code, captured, files = run("--quick", "--device", "cpu", "--threads", "1")
        assert code == 0
        assert "toy/gpu: not run: needs cuda" in captured.out
        (file,) = files
        written = records.read(file)
        assert [(r["case"], r["status"][:7]) for r in written] == [("toy/double", "ok"), ("toy/gpu", "not run")]
        environment = written[0]["environment"]
        assert environment["threads"] == 1
        assert {"device", "driver", "torch", "triton", "python", "commit", "dirty"} <= environment.keys()

    def test_list(self, run):
        code, captured, files = run("--list")
        assert code == 0
        assert captured.out.splitlines() == ["toy/double  [cpu, cuda]  quick", "toy/gpu  [cuda]  quick"]
        assert not files

    def test_pattern(self, run):
        assert run("--case", "gpu", "--list")[1].out.startswith("toy/gpu")
        code, captured, files = run("--case", "nothing")
        assert code == 2
        assert "no case matches nothing" in captured.err
        assert not files

    @pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
    def test_no_gpu(self, run):
        code, captured, _ = run("--device", "cuda")
        assert code == 2
        assert "no GPU" in captured.err

    @pytest.mark.parametrize(
        "words", [("--threads", "0"), ("--seconds", "0"), ("--seconds", "-1"), ("--seconds", "nan")]
    )
    def test_threads_and_seconds_must_be_positive(self, words, run):
        with pytest.raises(SystemExit):
            run(*words)


def test_durations_are_readable():
    assert [duration(s) for s in (1.5, 0.0123, 4.56e-5, 3e-8)] == ["1.5 s", "12.3 ms", "45.6 µs", "0.03 µs"]


def test_what_an_implementation_leaves_out_stands_below_its_time(bench):
    partial = Implementation(lambda inputs: double, leaves_out="BatchNorm stays in float")
    absent = Implementation(lambda inputs: double, leaves_out="everything", module="no_such_module")
    case = make_case(implementations={"plain": Implementation(lambda inputs: double), "p": partial, "q": absent})
    found = list(runner.run_case(case, bench))
    for row in found:
        row["environment"] = {**bench.environment, "torch": "2", "triton": None, "python": "3", "commit": "0"}
        row["environment"] |= {"dirty": False, "driver": None}
    lines = render(found).splitlines()
    assert "  p differs: BatchNorm stays in float" in lines
    assert not [line for line in lines if "everything" in line]
