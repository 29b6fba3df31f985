"""Pictures of measured results."""

import pytest

pytest.importorskip("matplotlib")

from tritonq.perf import plot, records

ENVIRONMENT = {
    "device": "toy cpu",
    "device_type": "cpu",
    "driver": None,
    "threads": 2,
    "torch": "2.0",
    "triton": "3.0",
    "python": "3.0",
    "commit": "0123456789",
    "dirty": False,
}


def record(implementation, speed_up, case="fake_quant/tensor/4x4/float32/forward", **changes):
    fields = {
        "schema": records.SCHEMA,
        "run": "20260101T000000Z-abc",
        "case": case,
        "family": case.split("/")[0],
        "implementation": implementation,
        "status": "ok",
        "median_s": 1e-3 / speed_up,
        "speed_up": speed_up,
        "bytes_moved": 1000,
        "bytes_per_s": 1e9 * speed_up,
        "copy_bytes_per_s": 5e9,
        "time": "2026-01-01T00:00:00Z",
        "environment": ENVIRONMENT,
    }
    return {**fields, **changes}


def texts(figure):
    found = [text.get_text() for text in figure.texts]
    for axis in figure.axes:
        found += [axis.get_title("left"), *(text.get_text() for text in [*axis.texts, *axis.get_yticklabels()])]
    return found


TIMES = "\N{MULTIPLICATION SIGN}"
FOUND = [record("tritonq", 4.0), record("torch", 1.0), record("rival", 8.0), record("torch.compile(tritonq)", 5.0)]


def test_ratios_are_tritonqs_over_each_peers():
    assert plot.ratios(FOUND) == {"torch": 4.0, "rival": 0.5}
    unpaired = [{k: v for k, v in r.items() if k != "speed_up"} for r in FOUND]
    assert plot.ratios(unpaired) == pytest.approx({"torch": 4.0, "rival": 0.5})
    assert plot.ratios([record("torch", 1.0)]) == {}


def test_bars_show_who_is_faster_and_name_device_and_commit():
    figure = plot.speed_up_figure(FOUND)
    shown = texts(figure)
    assert {f"4.00{TIMES}", f"0.50{TIMES}", "torch", "rival"} <= set(shown)
    assert any("toy cpu, 2 threads" in text and "commit 0123456" in text for text in shown)
    assert f"fake quant per tensor, forward\n4{TIMES}4, float32" in shown
    bars = zip(figure.axes[0].get_yticklabels(), figure.axes[0].patches, strict=True)
    assert {label.get_text(): bar.get_width() for label, bar in bars} == {"torch": 2.0, "rival": -1.0}


def test_no_bar_no_number_leaves_the_panel():
    extreme = [record("tritonq", 1.0), record("torch", 0.01), record("rival", 90.0)]
    figure = plot.speed_up_figure(extreme)
    figure.canvas.draw()
    axis = figure.axes[0]
    inside = axis.get_window_extent()
    for text in axis.texts:
        box = text.get_window_extent()
        assert inside.x0 <= box.x0
        assert box.x1 <= inside.x1


def test_roofline_has_a_mark_per_case_and_the_copy_line():
    figure = plot.roofline_figure(FOUND)
    assert any("copy bandwidth, read plus written: 5 GB/s" in text for text in texts(figure))
    assert sum(len(collection.get_offsets()) for collection in figure.axes[0].collections) == 3


def test_nothing_to_show():
    assert plot.speed_up_figure([record("torch", 1.0)]) is None
    assert plot.roofline_figure([record("tritonq", 1.0, bytes_per_s=None)]) is None


def test_choice():
    other = record("tritonq", 2.0, environment={**ENVIRONMENT, "device": "toy gpu"})
    with pytest.raises(ValueError, match=r"several devices.*toy cpu, toy gpu"):
        plot.choose([*FOUND, other], [], None)
    assert plot.choose([*FOUND, other], [], "GPU") == [other]
    with pytest.raises(ValueError, match="no measurement matches"):
        plot.choose(FOUND, ["nothing"], None)
    newer = record("tritonq", 3.0, run="20260201T000000Z-abc")
    assert plot.choose([newer, record("tritonq", 4.0)], [], None) == [newer]


def test_command_writes_both_pictures(tmp_path, capsys):
    with records.create(tmp_path / "toy", "abc") as file:
        for entry in FOUND:
            records.write(file, {k: v for k, v in entry.items() if k not in ("schema", "run")})
    (tmp_path / "toy" / "bad.jsonl").write_text("{")
    with pytest.warns(UserWarning, match=r"bad\.jsonl"):
        assert plot.main([str(tmp_path / "toy"), "--out", str(tmp_path / "pictures")]) == 0
    assert {path.name for path in (tmp_path / "pictures").iterdir()} == {"speedup-cpu.png", "roofline-cpu.png"}
    assert plot.main([str(tmp_path / "toy" / "bad.jsonl")]) == 2
    assert "bad.jsonl" in capsys.readouterr().err
