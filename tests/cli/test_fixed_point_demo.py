"""Fixed point from the command line: the main job on real data, training, and what the report says."""

import math

import pytest
import torch
from PIL import Image
from test_demo import arguments

from tritonq.__main__ import main
from tritonq.cli.models import make_model
from tritonq.demo import run as demo
from tritonq.demo.picture import widest_channel
from tritonq.demo.result import Result, Stage, table
from tritonq.deploy import load_converted
from tritonq.nn import FixedPointLinear
from tritonq.qconfig import QConfig, get_qconfig

MODEL = ["tritonq.demo.model:SmallResNet", "digits", "--model-arg", "in_channels=1", "--model-arg", "classes=10"]


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("demo"))
    return demo.run(arguments("--scheme", "f8net", "--output", folder, "--epochs", "5", "--qat-epochs", "2"))


def test_fixed_point_reaches_float_accuracy(result):
    by_name = {stage.name: stage for stage in result.stages}
    assert by_name["float"].accuracy > 0.97
    assert by_name["fixed point (eval)"].accuracy >= by_name["float"].accuracy - 0.015


def test_no_code_differs_anywhere(result):
    assert result.agrees
    for stage in result.stages[2:]:
        assert stage.report.total.codes > 1e7
        assert stage.report.total.differing == 0
        assert stage.report.outputs.largest == 0
        assert stage.accuracy == result.stages[1].accuracy


def test_files(result):
    files = result.files
    sizes = {name: path.stat().st_size for name, path in vars(files).items()}
    assert sizes["converted"] < 0.34 * sizes["float_model"]
    assert sizes["onnx"] < 0.34 * sizes["float_model"]
    with Image.open(files.picture) as picture:
        assert picture.width > 1000
        assert len(picture.convert("L").getcolors()) > 20
    model = load_converted(files.converted, make_model(MODEL[0], MODEL[3::2]))
    assert model(torch.rand(2, 1, 8, 8)).shape == (2, 10)


@pytest.mark.parametrize("axis", [None, 0])
def test_the_picture_shows_the_widest_channel_on_its_grid(axis):
    torch.manual_seed(0)
    preset = get_qconfig("f8net")
    layer = FixedPointLinear(50, 7, qconfig=QConfig(preset.activation, preset.weight.with_args(axis=axis)))
    with torch.no_grad():
        layer.weight.mul_(torch.tensor([1.0, 0.1, 9.0, 0.5, 0.2, 9.0, 0.3]).view(-1, 1))
        layer.weight[5] *= 1.01
    layer(torch.rand(8, 50))
    channel = widest_channel(layer.eval())
    assert channel.index == int(layer.weight[[2, 5]].abs().amax(1).argmax()) * 3 + 2
    assert math.log2(channel.scale).is_integer()
    assert torch.equal(channel.codes, (channel.values / channel.scale).round())


def test_the_table_shows_every_stage_and_file(result):
    lines = table(result.stages).splitlines()
    assert [line.split("  ")[0] for line in lines[2:]] == ["float", "fixed point (eval)", "integers", "ONNX Runtime"]
    assert sum("kB" in line for line in lines) == 3


def test_a_difference_in_onnx_fails_the_demo(result):
    onnx = Stage("ONNX Runtime", 1.0, report=off_by_one())
    assert not Result((*result.stages[:3], onnx), result.files).agrees


def off_by_one():
    from tritonq.deploy import LayerComparison, OutputComparison, VerificationReport

    return VerificationReport((LayerComparison("head", 10**7, 1, 1),), OutputComparison(1, 0.0, 0, 0))


def test_training_ends_in_integers(tmp_path, capsys):
    output = ["--qconfig", "f8net", "--epochs", "1", "--output", str(tmp_path)]
    assert main(["train", *MODEL, *output]) == 0
    assert "; 0 of 14,901,824 codes differ" in capsys.readouterr().out


def test_the_report_shows_its_layers(result, tmp_path, capsys):
    page = tmp_path / "r.html"
    words = ["report", str(result.files.converted.parent), "digits", "--images", "40", "--output", str(page)]
    assert main(words) == 0
    assert "error from" in capsys.readouterr().out
    assert "block1.pointwise" in page.read_text()
