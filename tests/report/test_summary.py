"""The summary names every layer of a model, with its grid and, where it stayed in float, the reason."""

from __future__ import annotations

import copy
import dataclasses
import logging
import pickle

import pytest
import torch
from torch import nn

import tritonq
from qat_models import FloatResidual, after_one_batch, images, trained_float_form, trained_residual
from tritonq import QConfigMapping

QCONFIG = tritonq.get_qconfig("tensorrt")


def by_name(report):
    return {layer.name: layer for layer in report.layers}


def test_every_layer_has_a_row():
    mapping = QConfigMapping().set_global(QCONFIG).set_module_name("point", None)
    model = tritonq.prepare_qat(FloatResidual(), qconfig=mapping, example_inputs=images(2))
    report = tritonq.summary(model)
    rows = by_name(report)
    assert {"stem.0", "stem.1", "stem.2", "depthwise", "bn", "point", "head", "add"} <= set(rows)
    assert rows["stem.0"].fused_with == ("stem.2", "stem.1")
    assert rows["stem.0"].grid == "w -127..127 per channel, y -128..127, x -128..127 (no data yet)"
    assert (rows["point"].status, rows["point"].reason) == ("float", "its qconfig is None")
    assert not report.moving
    assert report.absorbed == {"stem.1", "stem.2", "bn"}
    assert {layer.name for layer in report.quantized} == {"stem.0", "depthwise", "head", "add", "mean"}
    assert {layer.name for layer in report.in_float} == {"point"}


def test_the_table():
    report = tritonq.summary(trained_float_form())
    lines = str(report).splitlines()
    assert lines[0].split() == ["layer", "kind", "fused", "with", "status", "grid,", "or", "why", "in", "float"]
    (stem,) = [line for line in lines if line.startswith("stem.0 ")]
    assert "quantized" in stem
    assert "stem.2, stem.1" in stem
    assert "w -127..127 per channel, y -128..127, x -128..127" in stem
    assert not [line for line in lines if line.startswith("stem.1")]
    assert report.line == (
        "FloatResidual: quantized 4 of 4 layers, 1 of 1 joins, 1 other operations (3 Conv2d, 1 add, 1 mean, 1 Linear), "
        "3 more fused into them, 0 left in float"
    )
    assert " ".join(lines[-2:]) == report.line


def test_the_log_counts_as_the_table_does(caplog):
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last, self.held = nn.Conv2d(1, 2, 1), nn.Conv2d(2, 2, 1), nn.Conv2d(2, 2, 1, bias=False)
            self.scale = nn.Parameter(torch.ones(2, 1, 1))

        def forward(self, x):
            x = self.first(x) * 2
            y = 1 - (self.last(x) + x) * self.scale
            return nn.functional.conv2d(y, self.held.weight)

    with caplog.at_level(logging.INFO, "tritonq"):
        prepared = tritonq.prepare_qat(Scaled(), qconfig=QCONFIG, example_inputs=torch.randn(2, 1, 8, 8))
    counted = "Scaled: quantized 3 of 3 layers, 1 of 1 joins"
    assert counted in caplog.messages
    report = tritonq.summary(prepared)
    assert report.line.startswith(f"{counted}, 2 other operations (")
    assert [(row.kind, row.reason) for row in report.in_float] == [
        ("mul", "computed in float between quantized tensors: one of its operands is a constant")
    ]
    prepared(torch.randn(2, 1, 8, 8))
    assert tritonq.summary(tritonq.convert(prepared)).line == report.line
    del prepared.tritonq_report  # what remains tells nothing of `held`
    assert "1 of 1 joins, 2 other operations (" in tritonq.summary(prepared).line


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deepcopy", "pickle"]
)
def test_copies_keep_it(copied):
    model = trained_float_form()
    assert tritonq.summary(copied(model)) == tritonq.summary(model)


def test_switches_show():
    model = trained_float_form()
    model.depthwise.activation_post_process.disable_fake_quant()
    assert by_name(tritonq.summary(model))["depthwise"].grid == "w -127..127 per channel, y -128..127 (off)"


def test_a_converted_model_says_what_its_original_said():
    model = trained_float_form()
    before, after = tritonq.summary(model), tritonq.summary(tritonq.convert(model))
    assert before == after


def test_a_loaded_converted_model_is_described_by_its_modules(tmp_path):
    tritonq.save_converted(tritonq.convert(trained_float_form()), tmp_path / "m.pt")
    rows = by_name(tritonq.summary(tritonq.load_converted(tmp_path / "m.pt", FloatResidual())))
    assert rows["stem.0"].kind == "QuantizedConv2d"
    assert rows["stem.0"].grid == "w -127..127 per channel, y -128..127, x -128..127"


def test_modules_by_hand_and_the_eager_flow():
    rows = by_name(tritonq.summary(trained_residual()))
    assert rows["stem"].kind == "ConvBnReLU2d"
    assert rows["pool"].reason == "no quantized module took the place of AvgPool2d"
    model = nn.Sequential(tritonq.nn.QuantStub(), nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1))
    model[2].qconfig = None
    rows = by_name(tritonq.summary(tritonq.prepare_qat(model, qconfig=QCONFIG)))
    assert rows["1"].status == "quantized"
    assert rows["2"].reason == "its qconfig is None"


def test_fixed_point():
    model = tritonq.prepare_qat(FloatResidual(), qconfig=tritonq.get_qconfig("f8net"), example_inputs=images(2))
    rows = by_name(tritonq.summary(model))
    assert rows["stem.0"].status == "quantized"
    assert "w -127..127" in rows["stem.0"].grid


def test_it_is_frozen_and_refuses_float_models():
    with pytest.raises(dataclasses.FrozenInstanceError):
        tritonq.summary(trained_residual()).model = "other"
    with pytest.raises(ValueError, match="FloatResidual is a float model"):
        tritonq.summary(FloatResidual())
    with pytest.raises(TypeError, match=r"must be a torch\.nn\.Module"):
        tritonq.summary("model")


def test_notebooks_show_a_table():
    mapping = QConfigMapping().set_global(QCONFIG).set_module_name("point", None)
    report = tritonq.summary(tritonq.prepare_qat(FloatResidual(), qconfig=mapping, example_inputs=images(2)))
    page = report._repr_html_()
    assert page.count("<tr>") == len(str(report).split("further")[0].strip().splitlines()) - 1
    assert "its qconfig is None" in page
    assert report.line in page
    hostile = dataclasses.replace(report, model="<script>")
    assert "<script>" not in hostile._repr_html_()


def test_the_table_fits_a_terminal():
    class Deep(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.a_rather_long_name_of_a_part = inner

        def forward(self, x):
            return self.a_rather_long_name_of_a_part(x)

    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Softmax(1), nn.Conv2d(4, 4, 3))
    for _ in range(4):
        model = Deep(model)
    prepared = tritonq.prepare_qat(model, example_inputs=torch.randn(1, 3, 8, 8))
    lines = str(tritonq.summary(prepared)).splitlines()
    assert max(map(len, lines)) <= 120
    assert "Softmax has no" in "".join(lines)


def test_what_moves_values_is_not_left_in_float():
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Softmax(1))
    report = tritonq.summary(tritonq.prepare_qat(model, qconfig=QCONFIG, example_inputs=torch.randn(2, 1, 8, 8)))
    assert [(layer.name, layer.reason) for layer in report.moving] == [("2", ""), ("3", "")]
    assert {layer.name for layer in report.in_float} == {"4"}
    assert report.line.endswith("1 more fused into them, 2 that only move values, 1 left in float")


def test_layers_that_the_engine_runs_in_float_are_told():
    class Clipped(nn.Module):
        def __init__(self):
            super().__init__()
            self.clipped, self.last = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1)
            self.wide = nn.ConvTranspose2d(4, 4, 1, padding=1)

        def forward(self, x):
            return self.last(self.wide(self.clipped(x).clamp(-1, 1)))

    for preset, told in (
        ("onnxruntime", ["it pads by as much as its kernel, or more", "no quantizer follows at once"]),
        # Its file has the same form.
        ("openvino", ["it pads by as much as its kernel, or more", "no quantizer follows at once"]),
        ("xnnpack", []),
    ):
        model = after_one_batch(Clipped(), torch.randn(2, 3, 8, 8), qconfig=tritonq.get_qconfig(preset))
        model.last.activation_post_process = nn.Identity()
        for each in (model, tritonq.convert(model)):
            reasons = [layer.reason for layer in tritonq.summary(each).layers if layer.reason]
            assert reasons == [f"float in ONNX Runtime: {reason}" for reason in told]
