"""`make zoo`: the list of models, and the table of their results; the models themselves are not tried here."""

import json
import sys

import zoo
import zoo_models
from vision_models import import_torchvision
from zoo_stages import STAGES

PASSED = {
    "name": "timm/resnet18",
    "parameters": 1234,
    "stages": dict.fromkeys(STAGES, "ok"),
    "layers": [21, 21],
    "joins": [8, 8],
    "in_float": [],
}


def test_enough_models_of_enough_libraries():
    names = zoo_models.names()
    assert len(names) == len(set(names)) >= 120
    assert len(zoo_models.LIBRARIES) >= 6
    hybrids = {"timm/vit_tiny_patch16_224", "timm/deit_tiny_patch16_224", "timm/swin_tiny_patch4_window7_224"}
    hybrids |= {"timm/mobilevit_xxs", "timm/efficientformer_l1", "transformers/Segformer"}
    assert hybrids | {"transformers/Detr", "transformers/CLIPVision"} <= set(names)


def test_the_table_tells_what_failed_and_what_stays_in_float():
    stages = {**PASSED["stages"], "training output": "skipped: the float model raises ValueError", "ONNX": "too large"}
    in_float = [[f"part{index}", "it differs in training"] for index in range(5)]
    other = {**PASSED, "name": "timm/other", "stages": stages, "layers": [16, 21], "in_float": in_float}
    text = zoo.table([PASSED, other])
    count = f"2 of {len(zoo_models.names())} models tried: 1 pass every stage"
    assert f"{count}, 1 have no layer with weights that computes in float." in text
    assert "| timm/resnet18 | 1,234 | 21/21 | 8/8 |" + " ✓ |" * len(STAGES) + " 0 |" in text
    assert "- timm/other, ONNX: too large" in text
    assert "- timm/other: part0, part1, part2 and 2 more in float: it differs in training" in text
    assert zoo.failed(other) == ["ONNX"]
    idle = {**other, "in_float": [*in_float[:3], *(["idle", reason] for reason in zoo.IDLE)]}
    assert [zoo.weights_in_float(result) for result in (PASSED, other, idle)] == [0, 5, 3]


def test_a_model_that_ends_its_process_is_a_result_and_not_tried_again(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(zoo, "RESULTS", tmp_path)
    monkeypatch.setattr(zoo, "TABLE", tmp_path / "ZOO.md")
    monkeypatch.setattr(zoo, "KEPT", tmp_path / "kept.jsonl")
    monkeypatch.setattr(sys, "executable", "/bin/false")
    for tried in (True, False):
        monkeypatch.setattr(sys, "argv", ["zoo.py", "--only", "timm/resnet18"])
        zoo.main()
        assert ("failed" in capsys.readouterr().out) == tried
    result = json.loads((tmp_path / "timm--resnet18.json").read_text())
    assert result["stages"] == {"prepare": "exit status 1"}
    assert result["commit"]
    assert "timm/resnet18" in (tmp_path / "ZOO.md").read_text()
    # Another machine goes on from what was kept.
    (tmp_path / "timm--resnet18.json").unlink()
    assert zoo.read("timm/resnet18") == result
    zoo.main()
    assert capsys.readouterr().out == ""


def test_models_are_built_by_name():
    import_torchvision()
    assert zoo_models.example("timm/resnet18").inputs.shape == (2, 3, 64, 64)
