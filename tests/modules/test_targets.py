"""Presets know the engine that they are made for, and a model knows it in every form."""

import collections
import copy
import io

import onnx
import pytest
import torch
from torch import nn

import tritonq
from tritonq.targets import TARGETS, onnx_form_of

X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def float_net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.Flatten(), nn.Linear(64, 5)
    )


def trained(qconfig=None):
    model = tritonq.prepare_qat(float_net(), qconfig=qconfig, example_inputs=X).train()
    model(X)
    return model.eval()


def written_target(model, path, **options):
    tritonq.export_onnx(model, path, X, **options)
    return {entry.key: entry.value for entry in onnx.load(path).metadata_props}["tritonq.target"]


def pickled(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def test_every_preset_of_an_engine_names_its_target():
    assert tritonq.get_qconfig() == tritonq.get_qconfig("onnxruntime")
    for name in ("onnxruntime", "tensorrt", "openvino", "qnn", "xnnpack"):
        assert tritonq.get_qconfig(name).target == name
    for name in ("fbgemm", "x86", "qnnpack", "onednn"):
        assert tritonq.get_default_qat_qconfig(name).target == name
    assert all(tritonq.get_qconfig(name).find_target() is TARGETS["onnxruntime"] for name in ("onnxruntime", "f8net"))
    with pytest.raises(ValueError, match="unknown target 'tpu'; known: onnxruntime, tensorrt"):
        tritonq.get_qconfig()._replace(target="tpu").find_target()


@pytest.mark.parametrize("preset", ["onnxruntime", "tensorrt"])
def test_the_file_is_for_the_target_of_the_preset(preset, tmp_path):
    model = trained(tritonq.get_qconfig(preset))
    int8 = tritonq.convert(model)
    tritonq.save_converted(int8, tmp_path / "m.pt")
    forms = {
        "trained": model,
        "copy": copy.deepcopy(model),
        "pickle": pickled(model),
        "converted": int8,
        "copy of converted": copy.deepcopy(int8),
        "pickle of converted": pickled(int8),
        "loaded": tritonq.load_converted(tmp_path / "m.pt", float_net()),
    }
    assert {name: onnx_form_of(form.modules()) for name, form in forms.items()} == dict.fromkeys(forms, preset)
    assert written_target(forms["loaded"], tmp_path / "m.onnx") == preset


def test_a_qconfig_without_target_is_for_onnx_runtime(tmp_path):
    preset = tritonq.get_qconfig("tensorrt")
    assert written_target(trained(tritonq.QConfig(*preset[:2])), tmp_path / "m.onnx") == "onnxruntime"


def test_layers_for_different_targets_need_a_choice(tmp_path):
    mapping = tritonq.QConfigMapping().set_global(tritonq.get_qconfig())
    model = trained(mapping.set_last_layer(tritonq.get_qconfig("tensorrt")))
    with pytest.raises(ValueError, match=r"different targets \(onnxruntime, tensorrt\): pass target="):
        tritonq.export_onnx(model, tmp_path / "m.onnx", X)
    assert written_target(model, tmp_path / "m.onnx", target="onnxruntime") == "onnxruntime"


def test_a_mapping_file_keeps_the_target(tmp_path):
    own = tritonq.get_qconfig("tensorrt")._replace(weight=nn.Identity)
    tritonq.save_qconfig_mapping(tritonq.QConfigMapping().set_global(own), tmp_path / "q.json")
    assert tritonq.load_qconfig_mapping(tmp_path / "q.json").global_rule.qconfig == own
    text = (tmp_path / "q.json").read_text().replace('"target": "tensorrt"', '"target": "tpu"')
    (tmp_path / "q.json").write_text(text)
    with pytest.raises(ValueError, match="the target of global is none: unknown target 'tpu'"):
        tritonq.load_qconfig_mapping(tmp_path / "q.json")


def test_the_default_preset_needs_no_clip_and_gives_every_code(tmp_path):
    model = trained()
    tritonq.export_onnx(model, tmp_path / "m.onnx", X)
    kinds = collections.Counter(node.op_type for node in onnx.load(tmp_path / "m.onnx").graph.node)
    assert kinds["Clip"] == kinds["Relu"] == 0
    # One behind Flatten too, so that the layer behind it sees codes.
    assert kinds["QuantizeLinear"] == 5
    first = model[0].activation_post_process
    assert (first.qtype.quant_min, first.qtype.quant_max, int(first.zero_point)) == (0, 255, 0)
    assert not tritonq.convert(model)[3].weight_zero_point
    x = torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    assert tritonq.verify(model, tmp_path / "m.onnx", x).agrees(), tritonq.verify(model, tmp_path / "m.onnx", x)


def test_another_target_names_the_layers_that_it_runs_in_float(tmp_path):
    model = trained()
    with pytest.warns(UserWarning, match=r"it will run in float: 0, 3, 5\. .*get_qconfig\(\"tensorrt\"\)"):
        assert written_target(model, tmp_path / "m.onnx", target="tensorrt") == "tensorrt"
    report = tritonq.verify(model, tmp_path / "m.onnx", torch.randn(64, 3, 8, 8))
    assert len(report.layers) == 4
    assert report.agrees(0.005, 1), report


class Pooled(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.pool, self.head = nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Linear(8, 5)

    def forward(self, x):
        return self.head(self.pool(torch.relu(self.conv(x))).flatten(1))


class Meaned(Pooled):
    def forward(self, x):
        return self.head(torch.relu(self.conv(x)).mean((2, 3)))


@pytest.mark.parametrize("kind", [Pooled, Meaned])
def test_tensorrt_gets_global_pools_without_an_axes_input(kind, tmp_path):
    torch.manual_seed(0)
    model = tritonq.prepare_qat(kind(), qconfig=tritonq.get_qconfig("tensorrt"), example_inputs=X).train()
    model(X)
    tritonq.export_onnx(model.eval(), tmp_path / "m.onnx", X)
    kinds = [node.op_type for node in onnx.load(tmp_path / "m.onnx").graph.node]
    assert "GlobalAveragePool" in kinds
    assert "ReduceMean" not in kinds
    assert tritonq.verify(model, tmp_path / "m.onnx", X).agrees(0.01, 1)
