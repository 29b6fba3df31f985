"""The main job does what the README says, on its real data; and its own folder of images."""

import argparse

import pytest
import torch
from PIL import Image

from image_folders import image_folder
from tritonq.__main__ import main
from tritonq.cli.data import load_digits, open_examples
from tritonq.cli.preprocessing import Preprocessing
from tritonq.demo import run as demo
from tritonq.demo.model import SmallResNet
from tritonq.demo.result import Files, Result, Stage, table
from tritonq.deploy import LayerComparison, OutputComparison, VerificationReport
from tritonq.qconfig import get_qconfig


def arguments(*words):
    parser = argparse.ArgumentParser()
    demo.add_arguments(parser)
    return parser.parse_args(list(words))


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    return demo.run(arguments("--output", str(tmp_path_factory.mktemp("demo"))))


def test_qat_reaches_float_accuracy(result):
    by_name = {stage.name: stage for stage in result.stages}
    assert by_name["float"].accuracy > 0.97
    assert by_name["QAT (eval)"].accuracy >= by_name["float"].accuracy - 0.005


def test_the_converted_model_is_the_trained_one(result):
    report = next(stage.report for stage in result.stages if stage.name == "converted")
    assert report.total.codes > 1e7
    assert report.total.differing == 0
    assert report.outputs.differing_predictions == 0


def test_onnx_runtime_agrees(result):
    report = next(stage.report for stage in result.stages if stage.name == "ONNX Runtime")
    assert report.agrees(), report
    assert report.outputs.agreement >= 0.999
    assert result.agrees


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (LayerComparison("stem", 9000, 2, 1), "2 of 9,000 codes of stem differ, by up to 1; allowed: none"),
        (
            LayerComparison("bn", 9, 2, 3, ("Softmax",)),
            "2 of 9 codes of bn differ, by up to 3; allowed: differences of 1, since Softmax adds in no defined order",
        ),
    ],
)
def test_the_demo_says_what_disagrees(layer, message, tmp_path, monkeypatch, capsys):
    outputs = OutputComparison(1, 0.0, 1, 0)
    good = VerificationReport((LayerComparison("input", 9000, 0, 0),), outputs)
    bad = VerificationReport((*good.layers, layer, LayerComparison("head", 9000, 9, 9)), outputs)
    stages = [Stage(name, 1.0, report=report) for name, report in (("converted", good), ("ONNX Runtime", bad))]
    monkeypatch.setattr(demo, "run", lambda _: Result(tuple(stages), Files.inside(tmp_path)))
    assert demo.main(arguments()) == 1
    assert (
        capsys.readouterr().out.splitlines()[-1] == f"FAILED: ONNX Runtime disagrees with the trained model: {message}"
    )


def test_files(result):
    files = result.files
    sizes = {name: path.stat().st_size for name, path in vars(files).items()}
    assert sizes["converted"] < 0.34 * sizes["float_model"]
    with Image.open(files.picture) as picture:
        assert picture.width > 1000
    state = torch.load(files.converted, weights_only=True)
    assert state["format"] == "tritonq.converted"


def test_the_table_shows_every_stage(result):
    lines = table(result.stages).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert [line.split("  ")[0] for line in lines[2:]] == ["float", "QAT (eval)", "converted", "ONNX Runtime"]
    assert "0 of 899" in lines[4]


def test_digits_hold_out_half():
    data = load_digits()
    assert len(data.test_labels) >= 899
    assert len(data.test_labels) + len(data.train_labels) == 1797


def test_a_folder_of_images(tmp_path, capsys):
    folder = image_folder(tmp_path / "insects")
    (folder / "bees" / "broken.png").write_bytes(b"no image")
    options = ["--data", str(folder), "--output", str(tmp_path / "out")]
    status = main(["demo", *options, "--image-size", "16", "--epochs", "2", "--qat-epochs", "2"])
    printed = capsys.readouterr()
    assert status == 0, printed
    assert "insects: 6 images to train with, 6 held out, 2 classes" in printed.out
    assert "broken.png" in printed.err
    assert "1 of 13 files skipped" in printed.err


@pytest.mark.parametrize(
    ("classes", "count", "message"),
    [(("ants",), 3, "at least two classes"), (("ants", "bees"), 1, "1 readable images")],
)
def test_a_folder_that_cannot_be_trained_on(tmp_path, classes, count, message, capsys):
    folder = image_folder(tmp_path / "few", classes, count)
    with pytest.raises(ValueError, match=message):
        open_examples(str(folder), Preprocessing(8, 8))
    assert main(["demo", "--data", str(folder), "--output", str(tmp_path / "out")]) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("preset", ["megengine_passive", "megengine_calibration", "w4_g32", "mxfp8", "w_nvfp4"])
def test_what_cannot_be_trained_or_deployed_is_refused_before_training(preset, tmp_path, capsys):
    assert main(["demo", "--qconfig", preset, "--output", str(tmp_path / "out")]) == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("tritonq demo: ")
    assert not (tmp_path / "out").exists()


def test_a_scale_that_a_scheme_fixes_is_no_reason_to_refuse_it():
    demo.check_qconfig(SmallResNet(1, 10), get_qconfig("dorefa_w1a2"), "dorefa_w1a2", torch.rand(2, 1, 8, 8))


@pytest.mark.parametrize("preset", ["fp8_e4m3", "a16w8"])
def test_codes_that_are_floats_or_wide_are_deployed(preset, tmp_path):
    result = demo.run(arguments("--qconfig", preset, "--epochs=1", "--qat-epochs=1", "--output", str(tmp_path)))
    assert result.agrees
    with Image.open(result.files.picture) as picture:
        assert (picture.width > 1000) == (preset == "a16w8")  # codes of floats are not drawn


def test_one_name_for_fixed_point_however_it_is_asked_for(tmp_path, monkeypatch):
    def stop(folder, form):
        raise KeyError(form)

    monkeypatch.setattr(demo.Files, "inside", stop)
    for option in ("--qconfig", "--scheme"):
        with pytest.raises(KeyError, match="f8net"):
            demo.run(arguments(option, "f8net", "--output", str(tmp_path)))


def test_unknown_preset_and_missing_folder(tmp_path, capsys):
    assert main(["demo", "--qconfig", "int7", "--output", str(tmp_path)]) == 1
    assert "known: onnxruntime, tensorrt" in capsys.readouterr().err
    assert main(["demo", "--data", str(tmp_path / "none"), "--output", str(tmp_path)]) == 1
    assert "is not a folder" in capsys.readouterr().err
