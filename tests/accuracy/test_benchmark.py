"""The accuracy benchmark: its data, and its quick form by what must hold of every result."""

import gzip
import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tritonq.perf.accuracy import command, plan, results
from tritonq.perf.accuracy.data import generate, load, pasted, read_idx
from tritonq.perf.accuracy.nets import NETS, parameters
from tritonq.perf.accuracy.page import BEGIN, END, markdown
from tritonq.perf.accuracy.plan import RECIPES, Row


@pytest.mark.filterwarnings("ignore:ONNX Runtime convolves in integers only")
def test_the_quick_form(tmp_path, capsys):
    assert command.main(["--quick", "--out", str(tmp_path)]) == 0
    path = tmp_path / "quick.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    records = [line for line in lines if "validation" in line]
    assert [record["method"] for record in records] == ["LSQ", "LSQ", "LSQ by hand", "LSQ by hand"]
    for record in records[:2]:
        assert record["deployed"] == record["validation"]
        assert record["different_outputs"] == 0
        assert record["engine"].startswith("onnxruntime")
        edges = {"0", "9"}
        assert {"0", "4.main.0", "9"} <= set(record["most_values"])
        for layer, values in record["most_values"].items():
            assert values <= (2**8 if layer in edges else 2**2), layer
        assert record["environment"]["torch"] == torch.__version__
        assert record["file_bytes"] > 10_000
        assert record["saved_bytes"] > 1_000_000
    # only of each method's better recipe the test answers were read
    tested = {(line["method"], line["recipe"]): line["test"] for line in lines if "test" in line}
    found = results.read(path)
    assert set(tested) == {(row.method, found.choice(row)) for row in found.rows()}
    # what is done is not done again, and a line that was cut off is
    text = [line for line in path.read_text().splitlines() if '"test"' not in line]
    path.write_text("\n".join(text)[:-20])
    assert command.main(["--quick", "--out", str(tmp_path), "--minutes", "0"]) == 1
    assert "at least 1 measurements are left" in capsys.readouterr().out


def _record(item, validation):
    settings = results.settings_of(item)
    return {**asdict(item), "settings": settings, "validation": validation, "float": 90.0, "seconds_per_epoch": 1.0} | {
        "saved_bytes": 1,
        "versions": {"tritonq": "0"},
        "environment": {"commit": "abcdefgh", "device": "a CPU", "tritonq": "0"},
    }


def test_a_changed_method_invalidates_its_rows_alone(tmp_path, monkeypatch):
    path, rows = tmp_path / "results.jsonl", [Row("garments", "residual", 2, 2, name) for name in ("LSQ", "Brevitas")]
    items = [row.measurement(0, recipe) for row in rows for recipe in RECIPES]
    path.write_text("".join(json.dumps(_record(item, 80.0 + place)) + "\n" for place, item in enumerate(items)))
    found = results.read(path)
    assert list(found.measured) == items
    assert found.choice(rows[0]) == list(RECIPES)[-1]
    monkeypatch.setitem(plan.ALL_METHODS, "LSQ", replace(plan.ALL_METHODS["LSQ"], revision=2))
    assert list(results.read(path).measured) == items[2:]
    assert results.read(path).choice(rows[0]) is None


def test_an_accuracy_belongs_to_the_measurement_before_it(tmp_path):
    """Of a row that is measured again the test answers are compared again."""
    path, item = tmp_path / "results.jsonl", Row("garments", "residual", 2, 2, "LSQ").measurement(0, "high rate")
    results.append(path, item, {"validation": 80.0})
    results.append(path, item, {"test": 79.0})
    assert results.read(path).tested == {item: 79.0}
    results.append(path, item, {"validation": 81.0})
    assert results.read(path).tested == {}
    assert results.read(path).measured[item]["validation"] == 81.0


def test_a_library_that_fails_does_not_stop_the_others(tmp_path, monkeypatch, capsys):
    def fail(request):
        raise NotImplementedError("no such layer")

    rows = [Row("garments", "residual", 2, 2, name) for name in ("Brevitas", "LSQ by hand")]
    monkeypatch.setattr(command, "quick_plan", lambda: plan.Plan([plan.Step(row, 0) for row in rows], []))
    monkeypatch.setitem(plan.ALL_METHODS, "Brevitas", replace(plan.ALL_METHODS["Brevitas"], make=fail, modules=()))
    assert command.main(["--quick", "--out", str(tmp_path)]) == 0
    found = results.read(tmp_path / "quick.jsonl")
    assert [item.method for item in found.measured] == ["LSQ by hand"] * 2
    assert set(found.failed.values()) == {"NotImplementedError: no such layer"}
    assert "failed: W2A2 Brevitas, seed 0, low rate: NotImplementedError" in capsys.readouterr().out


def test_the_plan_fits_its_hours_and_says_what_it_cuts(tmp_path):
    full, short = plan.full_plan(3), plan.full_plan(3, hours=0.5)
    assert sum(step.seconds for step in full.steps) <= 3 * 3600
    assert sum(step.seconds for step in short.steps) <= 1800
    assert len(full.steps) + len(full.cut) == len(short.steps) + len(short.cut)
    assert full.steps[0].row.bits == "W2A2"
    assert any(line.startswith("pasted, depthwise: ") for line in full.describe_cut())
    page = tmp_path / "page.md"
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    row = Row("garments", "residual", 2, 2, "LSQ")
    measured = {row.measurement(0, recipe): _record(row.measurement(0, recipe), 80.0) for recipe in RECIPES}
    markdown(results.Results(measured, {}, {}), short, page)
    written = page.read_text()
    assert written.startswith(f"before\n{BEGIN}\n")
    assert written.endswith(f"{END}\nafter\n")
    assert "\nold\n" not in written
    assert "| W2A2 | tritonq: LSQ | 90.00 | 80.00 |" in written
    assert "Cut from the plan" in written
    page.write_text("a page without the marks")
    with pytest.raises(ValueError, match="once each"):
        markdown(results.Results({}, {}, {}), short, page)


def test_idx_files_come_back_packed_or_not(tmp_path):
    generate(tmp_path, 300, 40)
    path = tmp_path / "train-images-idx3-ubyte"
    values = read_idx(path)
    assert values.shape == (300, 28, 28)
    Path(f"{path}.gz").write_bytes(gzip.compress(path.read_bytes()))
    path.unlink()
    assert np.array_equal(read_idx(path), values)
    task = load(tmp_path, 200, 40)
    assert task.train.images.shape == (200, 1, 28, 28)
    assert torch.equal(task.validation.targets, load(tmp_path, 100, 40).validation.targets)
    with pytest.raises(ValueError, match="fewer than asked for"):
        load(tmp_path, 290, 40)
    (tmp_path / "t10k-labels-idx1-ubyte").write_bytes(b"\0\0\x08\x01\0\0\0\x09ab")
    with pytest.raises(ValueError, match="holds 2 bytes"):
        load(tmp_path, 200, 40)


def test_pasted_garments_say_what_is_there(tmp_path):
    generate(tmp_path, 60, 10)
    task = load(tmp_path, 40, 10, several_labels=True)
    assert task.train.images.shape == (40, 1, 64, 64)
    assert task.train.targets.shape == (40, 10)
    assert set(task.train.targets.sum(1).tolist()) <= {1.0, 2.0, 3.0, 4.0}
    one = load(tmp_path, 40, 10).train
    assert torch.equal(pasted(one, 5, 3).images, pasted(one, 5, 3).images)


@pytest.mark.parametrize("name", NETS)
def test_networks_take_both_tasks(name):
    model = NETS[name](10).eval()
    assert [model(torch.zeros(2, 1, size, size)).shape for size in (28, 64)] == [(2, 10)] * 2
    assert parameters(model) < 80_000
