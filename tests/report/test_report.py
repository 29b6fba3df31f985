"""The report measures what it says, and its page stands alone."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest
import torch
from torch import nn

import digits_runs
import tritonq
from image_folders import image_folder
from qat_models import FloatResidual, assert_same_state, images, state_of, without_ranges
from tritonq.__main__ import main
from tritonq.cli import folder
from tritonq.cli.checkpoints import save_training
from tritonq.cli.classification import accuracy, logits
from tritonq.cli.data import load_digits
from tritonq.cli.models import find_qconfig, prepare
from tritonq.demo.model import SmallResNet
from tritonq.qconfig_files import mapping_to_data
from tritonq.report.drawing import histogram
from tritonq.report.measure import measure
from tritonq.report.page import render
from tritonq.report.run import DEMO_FILE, DEMO_MODEL
from tritonq.report.tally import BINS, MARGIN, FixedPointTally

RECIPE = replace(digits_runs.RECIPE, qconfig=mapping_to_data(find_qconfig("tensorrt")))
ARGUMENTS = [f"--model-arg={word}" for word in RECIPE.model_arguments]


def calibrated():
    torch.manual_seed(0)
    model = prepare(RECIPE)
    return tritonq.calibrate(model, load_digits().train_images[::9])


@pytest.fixture(scope="module")
def data():
    torch.set_num_threads(1)
    return load_digits()


@pytest.fixture
def measured(data):
    return measure(calibrated(), data.test_images[::20], data.test_labels[::20])


def layer_of(measured, name):
    return next(layer for layer in measured.layers if layer.name == name)


def test_layers_are_all_there_worst_first(measured):
    names = {layer.name for layer in measured.layers}
    assert names == {
        *("stem.0", "block1.depthwise", "block1.pointwise", "block1.add", "down.0"),
        *("block2.depthwise", "block2.pointwise", "block2.add", "pool", "head"),
    }
    errors = [layer.sensitivity for layer in measured.layers]
    assert errors == sorted(errors, reverse=True)
    assert 0 < min(errors) < max(errors) < 1
    assert layer_of(measured, "stem.0").position == 1
    assert layer_of(measured, "head").position == len(names)
    assert [tensor.role for tensor in layer_of(measured, "stem.0").tensors] == ["input", "weight", "output"]


def test_noise_clipping_and_counts_by_hand(data):
    model = calibrated().eval()
    quantizer = model.stem[0].input_fake_quant
    quantizer.scale.mul_(0.5)  # half of the range that was observed
    # Digits have 17 grey levels: noise puts values everywhere, close to the ends of the range too.
    x = data.test_images[::20] + 0.1 * torch.randn(45, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    scale = float(quantizer.scale)
    found = layer_of(measure(model, x, data.test_labels[::20]), "stem.0").tensors[0]
    codes = x.double() / scale
    rounded = codes.round().clamp(-128, 127) * scale
    sqnr = 10 * math.log10(float(x.double().square().sum() / (x.double() - rounded).square().sum()))
    assert found.sqnr == pytest.approx(sqnr, abs=1e-3)
    assert found.clipped == pytest.approx(float(((codes > 127.5) | (codes < -128.5)).double().mean()), abs=1e-6)
    assert found.clipped > 0.05
    assert (found.low, found.high) == (float(x.min()), float(x.max()))
    assert sum(found.counts) == x.numel()
    assert sum(found.counts[:MARGIN]) + sum(found.counts[MARGIN + BINS :]) == round(found.clipped * x.numel())


def test_weights_are_the_folded_ones(measured):
    model = calibrated().eval()
    weight = model.stem[0].folded_parameters()[0].detach().double()
    scale = model.stem[0].weight_fake_quant.scale.double().view(-1, 1, 1, 1)
    error = weight - (weight / scale).round().clamp(-127, 127) * scale
    found = layer_of(measured, "stem.0").worst("weight")
    assert found.sqnr == pytest.approx(10 * math.log10(float(weight.square().sum() / error.square().sum())), abs=1e-2)
    assert found.clipped == 0
    assert sum(found.counts[:MARGIN]) == sum(found.counts[MARGIN + BINS :]) == 0


def test_a_damaged_layer_comes_first(data):
    model = calibrated()
    model.down[0].activation_post_process.scale.mul_(0.02)
    found = measure(model, data.test_images[::20], data.test_labels[::20])
    assert found.layers[0].name == "down.0"
    assert found.layers[0].clipped > 0.3
    assert found.error == pytest.approx(found.layers[0].sensitivity, rel=0.5)
    assert "loses" in render(found, "digits", "test")


def test_what_is_switched_off_makes_no_error(data):
    model = calibrated()
    for name, module in model.named_modules():
        if isinstance(module, tritonq.FakeQuantize) and not name.startswith("head"):
            module.disable_fake_quant()
    found = measure(model, data.test_images[::20], data.test_labels[::20])
    assert [layer.name for layer in found.layers if layer.sensitivity > 0] == ["head"]
    assert found.error == pytest.approx(found.layers[0].sensitivity, rel=1e-3)


def test_the_model_is_left_as_it_was(data):
    model = calibrated().train()
    before = state_of(model)
    measure(model, data.test_images[:8], data.test_labels[:8])
    assert_same_state(before, state_of(model))
    assert model.training


def in_phase(phase):
    model = tritonq.prepare_qat(FloatResidual(), qconfig=tritonq.get_qconfig("f8net"), example_inputs=images(2))
    tritonq.set_fixed_point_phase(model, phase)
    return model


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (FloatResidual, "call prepare_qat first"),
        (
            lambda: without_ranges(tritonq.prepare_qat(FloatResidual(), example_inputs=images(2))),
            "has observed anything",
        ),
        (lambda: in_phase("floating"), "in phase 'floating'"),
    ],
)
def test_models_that_cannot_be_measured(make, message):
    with pytest.raises(ValueError, match=message):
        measure(make(), images(4), torch.zeros(4))


class Page(HTMLParser):
    """Every element of a page, and whether each is closed where it should be."""

    VOID = frozenset({"meta", "rect", "circle", "path"})

    def __init__(self, text):
        super().__init__()
        self.found, self.open, self.links, self.ids = [], [], [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.found.append((tag, attributes))
        self.links += [value for key, value in attributes.items() if key in ("href", "src", "action", "data")]
        self.ids += [attributes["id"]] if "id" in attributes else []
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def all(self, tag):
        return [attributes for name, attributes in self.found if name == tag]


def test_the_page_stands_alone_and_can_be_read_aloud(measured):
    text = render(measured, "digits & letters", "a <model>")
    page = Page(text)
    assert all(link.startswith("#") and link[1:] in page.ids for link in page.links)
    assert not re.search(r"https?:|@import|url\(|//[a-z]", text)
    assert "a &lt;model&gt;" in text
    assert "digits &amp; letters" in text
    assert page.all("html") == [{"lang": "en"}]
    assert len(page.ids) == len(set(page.ids))
    for drawing in page.all("svg"):
        assert drawing.get("aria-hidden") == "true" or (drawing["role"] == "img" and drawing["aria-label"])
    assert len(page.all("main")) == len(page.all("h1")) == len(page.all("caption")) == 1
    assert all(head["scope"] in ("col", "row") for head in page.all("th"))
    rows = [row["id"] for row in page.all("tr") if "id" in row]
    assert rows == [f"layer-{layer.position}" for layer in measured.layers]
    drawn = [drawing for drawing in page.all("svg") if drawing.get("class") == "histogram"]
    assert len(drawn) == sum(len(layer.tensors) for layer in measured.layers)


def test_the_chart_s_text_does_not_shrink_with_the_screen(measured):
    """A phone shows the chart at half its size: its text is twice as large there."""
    style = re.search(r"<style>(.*?)</style>", render(measured, "digits", "test"), re.DOTALL).group(1)
    (everywhere,) = re.findall(r"^svg text { font: ([\d.]+)px", style, re.MULTILINE)
    (narrow,) = re.findall(r"max-width: \d+px\) { \.chart text { font-size: ([\d.]+)px", style)
    assert float(narrow) >= 2 * float(everywhere)


def test_clipped_values_are_drawn_apart(measured):
    tensor = layer_of(measured, "stem.0").tensors[0]
    assert 'class="clip"' not in histogram(tensor)
    counts = list(tensor.counts)
    counts[MARGIN - 20] = 5
    assert histogram(tensor.__class__(**{**vars(tensor), "counts": tuple(counts)})).count('class="clip"') == 1


FIXED = replace(RECIPE, qconfig=mapping_to_data(find_qconfig("f8net")))


@pytest.fixture(scope="module")
def fixed_point(data):
    """A fixed-point network that has seen a few batches."""
    torch.manual_seed(0)
    model = prepare(FIXED).train()
    for batch in data.train_images[:320].split(64):
        model(batch)
    return model


def test_a_fixed_point_network_is_measured_layer_by_layer(fixed_point, data):
    x, labels = data.test_images[::10], data.test_labels[::10]
    before = state_of(fixed_point)
    measured = measure(fixed_point, x, labels, sensitivity_images=len(x))
    assert_same_state(before, state_of(fixed_point))
    assert fixed_point.stem[0].input_format.phase == "fixed"
    sensitivities = [layer.sensitivity for layer in measured.layers]
    assert 0 < max(sensitivities) < measured.error * 3
    assert measured.quantized_accuracy == accuracy(logits(fixed_point, x), labels)
    assert len({layer.name for layer in measured.layers}) == len(measured.layers)

    # By hand: what a layer reads, and the weight that it multiplies with.
    layer, read = fixed_point.block1.pointwise, []
    handle = layer.register_forward_pre_hook(lambda module, given: read.append(given[0]))
    tritonq.set_fixed_point_phase(fixed_point, "floating")
    logits(fixed_point, x)
    tritonq.set_fixed_point_phase(fixed_point, "fixed")
    handle.remove()
    weight = layer.effective_parameters()[0].detach().double()
    tensors = {tensor.role: tensor for tensor in layer_of(measured, "block1.pointwise").tensors}
    for role, signal, quantizer, frac_len in (
        ("input", torch.cat(read).double(), layer.input_format, int(layer.input_format.rounded_frac_len())),
        ("weight", weight, layer.weight_fake_quant, int(layer.weight_fake_quant.choose(weight))),
    ):
        low, high = quantizer.codes
        codes = signal * 2.0**frac_len
        noise = (codes.round().clamp(low, high) * 2.0**-frac_len - signal).square().sum()
        assert tensors[role].sqnr == pytest.approx(10 * math.log10(float(signal.square().sum() / noise)), abs=1e-3)
        clipped = ((codes < low - 0.5) | (codes > high + 0.5)).double().mean()
        assert tensors[role].clipped == pytest.approx(float(clipped), abs=1e-9)
        assert tensors[role].scale == (2.0**-frac_len, 2.0**-frac_len)
        assert tensors[role].grid.endswith(f"fraction length {frac_len}")


def test_the_relu_of_unsigned_fixed_point_is_no_clipping():
    values = torch.tensor([-3.0, 0.3, 1.0])
    found = {}
    for signed in (False, True):
        quantizer = tritonq.FixedPointFakeQuantize(word_len=4, signed=signed)
        tally = FixedPointTally(quantizer, torch.tensor([2]))
        tally.add(values)
        found[signed] = tally.measure("input")
    assert (found[False].clipped, found[False].low) == (0.0, 0.0)
    assert found[False].sqnr == pytest.approx(10 * math.log10((0.09 + 1) / 0.05**2), abs=1e-4)
    assert (found[True].clipped, found[True].low) == (pytest.approx(1 / 3), -3.0)


def test_the_page_of_a_fixed_point_network(fixed_point, tmp_path):
    path, page = tmp_path / "fixed.pt", tmp_path / "r.html"
    save_training(path, FIXED, {"state_dict": fixed_point.state_dict()})
    assert report(DEMO_MODEL, "digits", "--images", 40, "--checkpoint", path, "--output", page) == 0
    text = page.read_text()
    assert "fraction length" in text
    assert 'class="histogram"' in text
    assert "QConfigMapping" not in text


def test_fixed_point_without_training_has_no_formats_to_show(tmp_path, capsys):
    assert report(DEMO_MODEL, "digits", *ARGUMENTS, "--qconfig", "f8net", "--output", tmp_path / "r.html") == 1
    assert "is of fixed point: train the network" in capsys.readouterr().err
    assert not (tmp_path / "r.html").exists()


def report(*words):
    return main(["report", *map(str, words)])


@pytest.fixture
def checkpoint(tmp_path):
    output = tmp_path / "demo-output"
    output.mkdir()
    save_training(output / DEMO_FILE, RECIPE, {"state_dict": calibrated().state_dict()})
    return output / DEMO_FILE


def test_the_demos_output_and_a_checkpoint_give_one_page(checkpoint, tmp_path, capsys):
    one, other = tmp_path / "one.html", tmp_path / "other.html"
    assert report(checkpoint.parent, "digits", "--images", 40, "--output", one) == 0
    assert report(DEMO_MODEL, "digits", "--images", 40, "--checkpoint", checkpoint, "--output", other) == 0
    assert one.read_text() == other.read_text()
    assert "40 images" in one.read_text()
    assert "error from" in capsys.readouterr().out


def test_a_factory_alone_is_calibrated(tmp_path):
    assert report(DEMO_MODEL, "digits", *ARGUMENTS, "--images", 40, "--output", tmp_path / "r.html") == 0
    assert "calibrated" in (tmp_path / "r.html").read_text()


def test_a_folder_s_pixels_are_read_as_they_are_needed(tmp_path, monkeypatch):
    """All files once for mean and deviation; then those alone that are calibrated with and measured."""
    image_folder(tmp_path, count=8)
    read, original = [], folder.decode
    monkeypatch.setattr(folder, "decode", lambda path, *content: read.append(path) or original(path, *content))
    words = ["--model-arg=in_channels=3", "--model-arg=classes=2", "--image-size=8", "--images=3"]
    assert report(DEMO_MODEL, tmp_path, *words, "--output", tmp_path / "r.html") == 0
    assert len(read) == 16 + 3 + 3
    assert "3 images" in (tmp_path / "r.html").read_text()


def test_bad_input_ends_in_one_line(checkpoint, tmp_path, capsys):
    foreign = tmp_path / "foreign.pt"
    state = tritonq.prepare_qat(SmallResNet(1, 10, 8), example_inputs=torch.zeros(2, 1, 8, 8)).state_dict()
    save_training(foreign, RECIPE, {"state_dict": state})
    code = tmp_path / "code.pt"
    save_training(code, replace(RECIPE, model="os:getcwd", model_arguments=()), {"state_dict": state})
    for words, message in (
        ([tmp_path, "digits"], "is no output of the demo"),
        ([tmp_path, "digits", "--checkpoint", foreign], "with a checkpoint of its own: leave the other out"),
        ([DEMO_MODEL, "digits", "--checkpoint", foreign], "of another architecture: 'stem.0.weight' has shape"),
        ([DEMO_MODEL, "digits", "--checkpoint", code], "was made with os:getcwd"),
        ([DEMO_MODEL, "digits", "--checkpoint", tmp_path / "none.pt"], "none.pt can't be read"),
        ([DEMO_MODEL, tmp_path / "none", "--checkpoint", checkpoint], "is not a folder"),
        ([DEMO_MODEL, "digits", "--images", "0"], "at least one image"),
    ):
        assert report(*words, "--output", tmp_path / "r.html") == 1
        printed = capsys.readouterr().err.strip().splitlines()
        assert message in printed[-1]
    assert not (tmp_path / "r.html").exists()


def test_layers_in_float_are_listed(data):
    mapping = tritonq.QConfigMapping().set_global(tritonq.get_qconfig("tensorrt")).set_last_layer(None)
    model = tritonq.prepare_qat(SmallResNet(1, 10, 4), qconfig=mapping, example_inputs=data.train_images[:2])
    tritonq.calibrate(model, data.train_images[:32])
    text = render(measure(model, data.test_images[:8], data.test_labels[:8]), "digits", "test")
    assert isinstance(model.head, nn.Linear)
    assert "its qconfig is None" in text


def test_a_layer_whose_quantizer_stands_behind_its_clip_keeps_its_place():
    torch.manual_seed(0)
    clips = nn.Hardtanh(-1, 2), nn.Hardtanh(-1, 2)
    parts = (nn.Conv2d(1, 4, 3), clips[0], nn.Conv2d(4, 4, 3), clips[1], nn.Flatten(), nn.Linear(64, 10))
    x = torch.randn(8, 1, 8, 8)
    model = tritonq.calibrate(tritonq.prepare_qat(nn.Sequential(*parts), example_inputs=x), x)
    measured = measure(model, x, torch.arange(8))
    in_order = sorted(measured.layers, key=lambda layer: layer.position)
    assert [layer.name for layer in in_order] == ["0", "1", "2", "3", "5"]
    assert [tensor.role for tensor in layer_of(measured, "1").tensors] == ["output"]


def test_weights_of_a_float_model(tmp_path):
    torch.manual_seed(3)
    torch.save(SmallResNet(1, 10, 4).state_dict(), tmp_path / "float.pt")
    words = [*ARGUMENTS, "--weights", tmp_path / "float.pt", "--images", 40, "--output", tmp_path / "r.html"]
    assert report(DEMO_MODEL, "digits", *words) == 0
    assert "with float.pt, calibrated" in (tmp_path / "r.html").read_text()
