"""The `tune` command: which launches it tries, and the table that it writes."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from tritonq.kernels.conv_tile import ConvTile
from tritonq.kernels.launch_sizes import Parameters, load_table
from tritonq.perf import tuner, tuning_conv2d, tuning_space
from tritonq.perf.case import disagreement

CPU = torch.device("cpu")


def result(**changes):
    fields = {"parameters": {"elements": 2048, "max_cols": 2048, "warps": 4}, "gain": 1.2, "tried": 3, "rejected": {}}
    return tuner.Result(**{**fields, **changes})


@pytest.fixture(autouse=True)
def forget():
    yield
    load_table.cache_clear()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """What the interpreted tuner reported, and the table it wrote."""
    folder = tmp_path_factory.mktemp("tuned")
    script = Path(__file__).parent.parent / "support" / "interpreted_tuner.py"
    command = [sys.executable, str(script), str(folder)]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1]), folder / "cpu.json"


class TestInterpreted:
    """Real kernels, launched by the tuner; only the clock is made up."""

    def test_every_candidate_is_right_and_the_fastest_wins(self, run):
        for name, (parameters, gain, rejected) in run[0]["results"].items():
            assert rejected == {}, name
            assert parameters == {"elements": 512, "max_cols": 64, "warps": 2}, name
            assert gain == pytest.approx(3.0)

    def test_candidates_reach_the_launch(self, run):
        assert run[0]["tiles"] == [[1, 512, 1], [1, 64, 2], [1, 128, 4]]

    def test_a_wrong_candidate_is_out_however_fast(self, run):
        parameters, gain, rejected = run[0]["wrong"]
        assert list(rejected) == ["(512, 64, 2)"]
        assert "differs in 1110 of 1110 elements" in rejected["(512, 64, 2)"]
        assert (parameters["elements"], gain) == (1024, pytest.approx(2.0))

    def test_convolutions_are_compared_with_torch(self, run):
        tile = {"pixels": 32, "outs": 16, "channels": 16, "warps": 4, "stages": 2}
        found = run[0]["convolutions"]
        assert found["float32/channels_first/3x3s1/dense/small"] == [tile, pytest.approx(1.5), {}]
        # One per cent is within the noise.
        assert found["codes/channels_last/3x3s1/dense/large"] == ["torch", 1.0, {}]
        parameters, _, rejected = run[0]["wrong convolution"]
        assert list(rejected) == ["(16, 16, 16, 4, 1)"]
        assert "relative distance" in rejected["(16, 16, 16, 4, 1)"]
        assert parameters == tile

    def test_the_kernels_loader_reads_the_table(self, run):
        table = load_table(run[1])
        assert set(table) == {"conv2d", "fake_quantize", "fake_quantize_backward", "min_max"}
        assert table["conv2d"]["float32/channels_first/3x3s1/dense/small"] == ConvTile(32, 16, 16, 4, 2)
        assert table["conv2d"]["codes/channels_last/3x3s1/dense/large"] == "torch"
        assert table["min_max"]["float32/rows/small"] == Parameters(512, 64, 2)


class TestSearch:
    def target(self, step):
        shape = tuning_space.Shape((4, 4), None)
        operation = lambda shape: (step, lambda inputs: (inputs["x"],))  # noqa: E731
        return tuning_space.Target("fake_quantize", "float32/flat/small", torch.float32, (shape,), operation)

    def test_a_gain_within_the_noise_keeps_the_default(self):
        target = self.target(lambda inputs: (inputs["x"],))
        found = tuner.search(target, CPU, lambda *_: 1.01, [Parameters(512, 512, 1)])
        assert found.parameters == {"elements": 1024, "max_cols": 1024, "warps": 4}
        assert found.gain == 1.0

    def test_when_no_candidate_can_be_launched_the_default_stays(self):
        def refuse(inputs):
            raise RuntimeError("out of shared memory")

        found = tuner.search(self.target(refuse), CPU, lambda *_: 9.0, [Parameters(512, 512, 1)])
        assert found.parameters["elements"] == 1024
        assert "out of shared memory" in found.rejected["(512, 512, 1)"]


class TestSpace:
    def test_targets_have_the_keys_that_kernels_look_up(self):
        for target in tuning_space.targets():
            dtype, shapes_class, size_class = target.key.split("/")
            assert str(target.dtype) == f"torch.{dtype}"
            for shape in target.shapes:
                assert shape.shape_class() == shapes_class, target
                assert (torch.Size(shape.sizes).numel() >= 2**20) == (size_class == "large"), target

    def test_classes_of_convolutions_are_those_of_their_shapes(self):
        targets = list(tuning_conv2d.targets())
        assert len({target.key for target in targets}) == len(targets)
        for target in targets:
            dtype, layout = target.key.split("/")[:2]
            assert dtype == ("codes" if target.is_codes else str(target.dtype).removeprefix("torch."))
            assert (layout == "channels_last") is target.channels_last
            assert {shape.key(dtype, layout) for shape in target.shapes} == {target.key}
            tiles = target.candidates()
            assert len(tiles) == len(set(tiles)) > 10
        kinds = {tuple(target.key.split("/")[2:4]) for target in targets}
        assert {"1x1s1", "1x1s2", "3x3s1", "3x3s2", "7x7s2"} <= {kernel for kernel, _ in kinds}
        assert {"dense", "stem", "grouped", "depthwise"} == {kind for _, kind in kinds}

    def test_candidates_are_distinct_powers_of_two(self):
        for shapes_class in ("flat", "rows", "cols"):
            found = tuning_space.candidates(shapes_class)
            assert len(found) == len(set(found)) > 10
            assert all(value & (value - 1) == 0 for option in found for value in option)
        assert all(option.max_cols == option.elements for option in tuning_space.candidates("flat"))


class TestSteps:
    """Every step that a search on a GPU runs: small shapes of each class, torch's operators and the specification."""

    @pytest.mark.parametrize("target", list(tuning_conv2d.targets()), ids=lambda target: target.key)
    def test_torch_convolutions_agree_with_their_specification(self, target):
        largest = max(target.shapes, key=lambda shape: shape.kernel)
        groups = min(largest.groups, 8)
        width = 3 if largest.channels < 16 else 8
        depth = largest.channels // largest.groups
        channels = width if largest.groups == 1 else groups * (1 if depth == 1 else 2)
        small = replace(largest, batch=1, channels=channels, size=9, outs=channels, groups=groups)
        run, specify = replace(target, shapes=(small,)).operation(small)
        inputs = target.make_inputs(small, torch.Generator().manual_seed(0), CPU)
        assert disagreement(run(inputs), specify(inputs), target.tolerance) is None

    @pytest.mark.parametrize("target", list(tuning_space.targets()), ids=lambda target: f"{target.kernel} {target.key}")
    def test_specifications_run(self, target):
        small = replace(target.shapes[0], sizes=tuple(min(size, 5) for size in target.shapes[0].sizes))
        _, specify = target.operation(small)
        inputs = target.make_inputs(small, torch.Generator().manual_seed(0), CPU)
        assert all(output.numel() for output in specify(inputs))


class TestTable:
    def test_a_run_continues_where_it_stopped(self, tmp_path):
        path = tmp_path / "gpu.json"
        tuner.Table.open(path, CPU).add("min_max", "float32/flat/small", result())
        again = tuner.Table.open(path, CPU)
        assert again.holds("min_max", "float32/flat/small")
        assert not again.holds("min_max", "float32/flat/large")
        again.add("min_max", "float32/flat/large", result())
        assert len(load_table(path)["min_max"]) == 2

    def test_another_triton_starts_afresh(self, tmp_path):
        path = tmp_path / "gpu.json"
        tuner.Table.open(path, CPU).add("min_max", "float32/flat/small", result())
        path.write_text(path.read_text().replace('"triton": "', '"triton": "0.'))
        assert not tuner.Table.open(path, CPU).holds("min_max", "float32/flat/small")

    def test_afresh_on_request(self, tmp_path):
        path = tmp_path / "gpu.json"
        tuner.Table.open(path, CPU).add("min_max", "float32/flat/small", result())
        assert not tuner.Table.open(path, CPU, afresh=True).holds("min_max", "float32/flat/small")

    def test_a_damaged_table_is_named_and_replaced(self, tmp_path):
        path = tmp_path / "gpu.json"
        path.write_text('{"version": 1, "kernels"')
        with pytest.warns(UserWarning, match=r"damaged .*gpu\.json"):
            table = tuner.Table.open(path, CPU)
        table.add("min_max", "float32/flat/small", result())
        assert list(load_table(path)) == ["min_max"]

    def test_what_the_loader_rejects_never_replaces_a_good_table(self, tmp_path):
        path = tmp_path / "gpu.json"
        table = tuner.Table.open(path, CPU)
        table.add("min_max", "float32/flat/small", result())
        before = path.read_text()
        bad = result(parameters={"elements": 1000, "max_cols": 64, "warps": 4})
        with (
            pytest.warns(UserWarning, match="power of two"),
            pytest.raises(RuntimeError, match="does not accept min_max float32/flat/large"),
        ):
            table.add("min_max", "float32/flat/large", bad)
        assert path.read_text() == before
        assert [entry.name for entry in tmp_path.iterdir()] == ["gpu.json"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(capsys):
    import argparse

    parser = argparse.ArgumentParser()
    tuner.add_arguments(parser)
    assert tuner.main(parser.parse_args([])) == 2
    assert "no GPU" in capsys.readouterr().err
