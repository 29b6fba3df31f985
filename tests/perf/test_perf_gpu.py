"""A visit to a GPU, tried without one: parts, time limits, and results that survive being cut off."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import tritonq
from tritonq.perf.case import Case, Implementation, Tolerance
from tritonq.perf.cases import all_cases
from tritonq.perf.goals import GOALS
from tritonq.perf.gpu import command, compiled, kernels, operator_tests, results, smoke, steps
from tritonq.perf.gpu.__main__ import link_checkout
from tritonq.perf.gpu.limit import run_limited
from tritonq.perf.gpu.part import DEVICE_FAULT, Visit
from tritonq.perf.memory import peak_bytes
from tritonq.perf.stats import Spread

ROOT = Path(__file__).parent.parent.parent
CPU = torch.device("cpu")


@pytest.fixture
def visit(tmp_path):
    return Visit("toy", CPU, tmp_path, seconds=600, small=True)


def written(visit):
    return results.read(visit.out / results.RESULTS)


def statuses(visit):
    return {record["name"]: record["status"] for record in written(visit)}


class TestCommand:
    @pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
    def test_without_a_gpu_it_says_so_in_one_line(self, tmp_path, capsys):
        assert command.main(["--out", str(tmp_path / "out")]) == 2
        printed = capsys.readouterr()
        assert printed.out == ""
        assert printed.err.count("\n") == 1
        assert "no GPU" in printed.err
        assert not (tmp_path / "out").exists()

    def test_an_unknown_part_is_named(self, tmp_path, capsys):
        assert command.main(["--device", "cpu", "--parts", "smoke,toast", "--out", str(tmp_path)]) == 2
        assert "toast" in capsys.readouterr().err

    def test_phases_hold_parts_that_exist(self):
        for names, minutes in command.PHASES.values():
            assert set(names) <= set(command.PARTS)
            assert 0 < minutes <= 9

    def test_a_checkout_runs_without_installation(self, tmp_path):
        """In another folder, with the parts that take no time; at most eight files."""
        out = tmp_path / "out"
        arguments = ["--device", "cpu", "--small", "--parts", "environment,memcheck", "--out", str(out)]
        done = subprocess.run(
            [sys.executable, str(ROOT / "perf" / "gpu"), *arguments], cwd=tmp_path, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr
        found = results.read(out / results.RESULTS)
        assert found[0]["part"] == "environment"
        assert found[0]["torch"] == torch.__version__
        assert found[-1] == {**found[-1], "name": "memcheck", "status": "not run"}
        assert "torch" in (out / results.SUMMARY).read_text()
        assert len(list(out.iterdir())) <= 8


def test_links_import_as_the_installed_package_does(tmp_path):
    link_checkout(ROOT, tmp_path)
    code = "import tritonq, tritonq.kernels, tritonq.perf.gpu as gpu; print(tritonq.__file__, gpu.__file__)"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(path.startswith(str(tmp_path / "tritonq")) for path in done.stdout.split())


class TestLimits:
    def test_statuses(self, tmp_path):
        with (tmp_path / "log").open("wb") as log:
            assert run_limited([sys.executable, "-c", "print(7); raise SystemExit(3)"], 60.0, log) == 3
        assert (tmp_path / "log").read_text() == "7\n"

    def test_time_that_a_part_leaves_goes_to_later_ones(self, tmp_path, monkeypatch):
        limits = {}

        def run(name, limit, *_, **__):
            limits[name] = limit
            return "cut off after 9 s" if name == "tests" else None

        monkeypatch.setattr(command, "_run_part", run)
        command.visit_all(("smoke", "tests", "tune"), 245.0, tmp_path, CPU, small=True)
        # 75, 120 and 50 of 245 seconds; the first two took none of theirs.
        assert limits == pytest.approx({"smoke": 75, "tests": 173, "tune": 245}, rel=0.05)
        assert "! tests: cut off after 9 s" in (tmp_path / results.SUMMARY).read_text()

    def test_no_time_left(self, tmp_path):
        late = Visit("toy", CPU, tmp_path, seconds=1.0)
        assert not late.has_time_for("something", 2.0)
        assert statuses(late) == {"something": "not run"}


class TestDeviceFault:
    def test_the_rest_of_a_part_runs_in_a_new_process(self, tmp_path, monkeypatch):
        """Two presets whose kernels fault, each of which ends its process."""
        todo, processes = ("first", "fault", "second", "another fault", "third"), []

        def process(arguments, seconds, log):
            processes.append(arguments)
            visit = Visit("smoke", CPU, tmp_path, seconds=60)
            try:
                for name in todo:
                    if visit.has_time_for(name, 0):
                        with visit.finding(name):
                            assert "fault" not in name
                            visit.note(name)
            except SystemExit as end:
                return end.code
            return 0

        monkeypatch.setattr(command, "run_limited", process)
        monkeypatch.setattr("tritonq.perf.gpu.part.is_lost", lambda device: True)
        command.visit_all(["smoke"], 60, tmp_path, CPU, small=True)
        found = {record["name"]: record["status"] for record in results.read(tmp_path / results.RESULTS)}
        assert found == {name: "error" if "fault" in name else "ok" for name in todo}
        assert len(processes) == 3

    def test_a_part_that_faults_at_once_again_is_left(self, tmp_path, monkeypatch):
        monkeypatch.setattr(command, "run_limited", lambda *arguments: DEVICE_FAULT)
        command.visit_all(["smoke"], 60, tmp_path, CPU, small=True)
        (record,) = results.read(tmp_path / results.RESULTS)
        assert record["status"].startswith(f"ended with status {DEVICE_FAULT}")


class TestResults:
    def test_a_line_that_was_cut_off_is_left_out(self, tmp_path):
        path = tmp_path / results.RESULTS
        results.append(path, {"part": "a", "name": "one", "status": "ok"})
        with path.open("a") as file:
            file.write('{"part": "a", "na')
        assert [record["name"] for record in results.read(path)] == ["one"]

    def test_failures_are_marked(self):
        found = [
            {"part": "smoke", "name": "fine", "status": "ok", "ms": 1.23456},
            {"part": "smoke", "name": "bad", "status": "wrong", "faults": ["other bits"]},
            {"part": "step", "name": "peer", "status": "not run", "reason": "not installed"},
        ]
        assert results.summarize(found).splitlines() == [
            *("smoke", "  fine: ms 1.235", "! bad: wrong faults ['other bits']", ""),
            *("step", "  peer: not run reason not installed"),
        ]
        assert [record["name"] for record in results.failures(found)] == ["bad"]

    def test_an_exception_is_a_finding(self, visit):
        with visit.finding("broken"):
            raise RuntimeError("no such kernel")
        (record,) = written(visit)
        assert record["status"] == "error"
        assert record["error"] == "RuntimeError: no such kernel"


class TestSmoke:
    @pytest.mark.parametrize("name", ["tensorrt", "megengine_calibration", "megengine_passive"])
    def test_a_preset(self, visit, name):
        smoke.check_preset(visit, name, tritonq.get_qconfig(name))
        (record,) = written(visit)
        assert record["status"] == "ok", record
        assert record["losses"] == record["cpu"]

    def test_other_bits_are_seen(self, visit, monkeypatch):
        convert = tritonq.convert

        def perturbed(model):
            converted = convert(model)
            converted.classifier.register_forward_hook(lambda module, inputs, y: y + 1e-6)
            return converted

        monkeypatch.setattr(tritonq, "convert", perturbed)
        smoke.check_preset(visit, "tensorrt", tritonq.get_qconfig("tensorrt"))
        (record,) = written(visit)
        assert record["status"] == "wrong"
        assert "the converted model differs" in " ".join(record["faults"])

    def test_another_training_is_seen(self, visit, monkeypatch):
        train, seeds = smoke.train, iter(range(100))
        monkeypatch.setattr(smoke, "train", lambda *a, **k: [loss + 0.02 * next(seeds) for loss in train(*a, **k)])
        smoke.check_preset(visit, "tensorrt", tritonq.get_qconfig("tensorrt"))
        faults = written(visit)[0]["faults"]
        assert "the same input gave other losses" in faults
        assert "the losses are not the CPU's" in faults


def toy_case(scale: float = 2.0) -> Case:
    def make_inputs(generator, device):
        return {"x": torch.rand(100, generator=generator, device=device)}

    return Case(
        name="train_step/toy",
        family="train_step",
        make_inputs=make_inputs,
        reference=lambda inputs: (inputs["x"] * 2,),
        implementations={
            "compiler": Implementation(lambda inputs: lambda inputs: (inputs["x"] * 2,), quick=False),
            "tritonq": Implementation(lambda inputs: lambda inputs: (inputs["x"] * scale,)),
            "graph": Implementation(lambda inputs: lambda inputs: (), devices=("cuda",)),
            "absent": Implementation(lambda inputs: lambda inputs: (), distribution="no-such", module="no_such_module"),
            "float": Implementation(lambda inputs: lambda inputs: (inputs["x"] * 2,)),
        },
        baseline="float",
        bytes_moved=800,
        operations=0,
        tolerance=Tolerance("exact"),
        memory=lambda step, inputs: 1 << 20,
    )


class TestSteps:
    def test_what_can_be_tried_is_measured_and_the_rest_named(self, visit):
        steps.run(visit, [toy_case()])
        found = {record["name"].removeprefix("toy "): record for record in written(visit)}
        assert list(found)[:2] == ["float", "tritonq"]
        assert found["tritonq"]["status"] == "ok"
        assert found["tritonq"]["memory_mib"] == 1.0
        assert found["tritonq"]["ms"] > 0
        assert found["graph"]["reason"] == "needs cuda"
        assert found["absent"]["reason"] == "no-such is not installed"
        profiles = (visit.out / results.PROFILE).read_text()
        assert "toy float\n" in profiles
        assert "toy tritonq\n" in profiles
        assert "aten::mul" in profiles

    def test_a_wrong_step_is_marked(self, visit):
        steps.run(visit, [toy_case(scale=3.0)])
        assert statuses(visit)["toy tritonq"] == "wrong"

    def test_the_order_knows_the_goals(self):
        case = next(case for case in all_cases() if case.name.startswith("train_step/resnet50/128x3x224x224/amp"))
        assert steps.ordered(case)[:3] == ["float", "tritonq", "tritonq, CUDA graph"]
        assert set(steps.ordered(case)) == set(case.implementations)


class TestKernels:
    @pytest.mark.parametrize("case", kernels.small_cases(), ids=lambda case: case.name)
    def test_a_case(self, visit, case):
        kernels.measure(visit, case, Spread(1e9, 1e9, 1e9))
        (record,) = written(visit)
        assert record["status"] == "ok"
        assert record["share_of_copy"] == pytest.approx(case.bytes_moved / record["us"] / 1e3)

    def test_a_wrong_result_is_not_timed(self, visit):
        kernels.measure(visit, toy_case(scale=3.0), Spread(1e9, 1e9, 1e9))
        assert statuses(visit) == {"train_step/toy": "wrong"}
        assert "us" not in written(visit)[0]

    def test_the_goals_come_first(self):
        names = [case.name for case in kernels.chosen(all_cases())]
        assert len(names) == len(set(names)) > 100
        wanted = [goal.case for goal in GOALS if goal.device_type == "cuda" and "conv_bn/tail" in goal.case]
        assert wanted
        assert all(names.index(name) < 12 for name in wanted)


def test_a_compiled_step(visit):
    compiled.compile_step(visit)
    assert statuses(visit) == {"training step": "ok", "eval": "ok"}


class TestOperatorTests:
    PASSING = "from op_tester import LAYOUTS, OpTester\n\ndef test_cuda_one():\n    assert LAYOUTS\n"
    FAILING = "from op_tester import OpTester\n\ndef test_cuda_two():\n    assert 1 == 2, 'not equal'\n"
    OTHER = "\n\ndef test_torch():\n    assert False\n"

    def run(self, visit, keyword="cuda", **files):
        tests = visit.out / "tests"
        tests.mkdir()
        (tests / "op_tester.py").write_text("LAYOUTS = [1]\nOpTester = None\n")
        for name, text in files.items():
            (tests / f"{name}.py").write_text(text)
        operator_tests.run(visit, tests, keyword)
        return {record["name"]: record for record in written(visit)}

    def test_failures_and_counts(self, visit):
        found = self.run(visit, test_a=self.PASSING + self.OTHER, test_b=self.FAILING, test_c=self.OTHER)
        assert found["pytest"]["status"] == "wrong"
        assert found["pytest"]["files"] == 2
        assert found["counts"]["passed"] == found["counts"]["failed"] == 1
        (name,) = set(found) - {"pytest", "counts"}
        assert name.endswith("test_cuda_two")
        assert "not equal" in found[name]["message"]

    @pytest.mark.parametrize("ignored", [False, True])
    def test_cut_off(self, visit, monkeypatch, ignored):
        """The time is over as soon as the slow test has begun; a shell's background jobs ignore interrupts."""
        begun = visit.out / "begun"

        def left():
            while not begun.exists():
                time.sleep(0.05)
            return 0.0

        monkeypatch.setattr(visit, "left", left)
        # On a busy machine it takes more than the usual seconds to write the counts after the interrupt.
        monkeypatch.setattr(operator_tests, "_SECONDS_TO_END", 120.0)
        slow = (
            f"\n\ndef test_cuda_slow():\n    import time\n    open({str(begun)!r}, 'w').close()\n    time.sleep(100)\n"
        )
        before = signal.signal(signal.SIGINT, signal.SIG_IGN if ignored else signal.default_int_handler)
        try:
            found = self.run(visit, test_a=self.PASSING + slow)
        finally:
            signal.signal(signal.SIGINT, before)
        assert found["pytest"]["status"] == "cut off"
        assert found["counts"]["passed"] == 1

    def test_an_interrupt_that_python_drops_is_repeated(self, monkeypatch):
        """As one that comes while an object is freed."""
        monkeypatch.setattr(operator_tests, "_SECONDS_TO_END", 5.0)
        program = (
            "import signal, time\n"
            "signal.signal(signal.SIGINT, lambda *_: signal.signal(signal.SIGINT, signal.default_int_handler))\n"
            "print(flush=True)\n"
            "try: time.sleep(100)\n"
            "except KeyboardInterrupt: raise SystemExit(7)\n"
        )
        with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as process:
            process.stdout.readline()
            operator_tests._interrupt(process)
        assert process.returncode == 7

    def test_a_cpu_runs_one_file_without_kernels(self, visit):
        """A trial has tests to run, and ends well."""
        found = self.run(
            visit, None, test_a=self.FAILING + "\n\ndef test_torch_one():\n    pass\n", test_b=self.FAILING
        )
        assert found["pytest"]["status"] == "ok"
        assert found["counts"] == {**found["counts"], "passed": 1}

    def test_none(self, visit):
        assert self.run(visit)["pytest"]["status"] == "not run"

    def test_this_checkout_has_them(self):
        names = {path.name for path in operator_tests.operator_test_files(ROOT / "tests")}
        assert {"test_fake_quant.py", "test_weight.py", "test_residual.py"} <= names


def test_peak_memory_counts_the_step_alone(monkeypatch):
    """Of 1000 bytes that other models hold nothing is counted."""
    allocated = {"now": 1000, "most": 5000}
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: allocated.update(most=allocated["now"]))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: allocated["now"])
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: allocated["most"])

    def step(_):
        allocated["most"] = max(allocated["most"], allocated["now"] + 70)
        return ()

    assert peak_bytes(step, {}, torch.device("cuda")) == 70


def test_results_are_json(visit):
    visit.note("spread", spread=Spread(1.0, 2.0, 3.0), dtype=torch.float32)
    (line,) = (visit.out / results.RESULTS).read_text().splitlines()
    assert json.loads(line)["dtype"] == "torch.float32"
