"""The report's advice rests on errors that were measured."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch

import tritonq
from tritonq.cli.data import load_digits
from tritonq.demo.model import SmallResNet
from tritonq.report.advice import advise, percent
from tritonq.report.measure import measure
from tritonq.report.page import render


@pytest.fixture(scope="module")
def data():
    torch.set_num_threads(1)
    return load_digits()


def calibrated(offset=0.0):
    """Return a calibrated model whose outputs all share an ``offset``."""
    torch.manual_seed(0)
    images = load_digits().train_images
    network = SmallResNet(1, 10, 4)
    network.head.bias.data += offset
    model = tritonq.prepare_qat(network, qconfig=tritonq.get_qconfig("tensorrt"), example_inputs=images[:2])
    return tritonq.calibrate(model, images[::9])


def advice_of(measured):
    text = re.search('<p class="advice">(.*?)</p>', render(measured, "digits", "test")).group(1)
    return re.sub("<[^>]*>", "", text)


def test_advice_is_decided_by_error_and_tried(data):
    """Clipping is blamed only where a wider range takes the error away."""
    x, labels = data.test_images[::20], data.test_labels[::20]
    assert advice_of(measure(calibrated(), x, labels)).startswith("Rounding is not to blame")
    clipped = calibrated()
    clipped.down[0].activation_post_process.scale.mul_(0.02)
    found = measure(clipped, x, labels)
    worst = found.layers[0]
    assert worst.unclipped < 0.1 * worst.sensitivity
    assert f"with ranges that hold every value it would make {percent(worst.unclipped)}" in advice_of(found)
    assert float(clipped.down[0].activation_post_process.scale) < 0.001  # as it was

    coarse = calibrated()
    coarse.down[0].weight_fake_quant.scale.mul_(60)
    coarse.down[0].activation_post_process.scale.mul_(0.995)
    found = measure(coarse, x, labels)
    worst = found.layers[0]
    assert worst.name == "down.0"
    assert worst.clipped > 0
    assert worst.unclipped > 0.8 * worst.sensitivity
    assert found.error_without_worst < 0.5 * found.error
    said = advice_of(found)
    assert "Clipping is not the reason" in said
    assert 'set_module_name("down.0", None)' in said.replace("&#34;", '"')


def test_a_small_error_that_costs_answers_is_not_well(data):
    """Outputs with a large part in common: what is small beside them decides the answers."""
    model, x = calibrated(offset=200.0), data.test_images[::20]
    tritonq.disable_fake_quant(model)
    labels = model.eval()(x).argmax(1)
    tritonq.enable_fake_quant(model)
    found = measure(model, x, labels)
    assert found.error < 0.01
    assert (found.float_accuracy, found.quantized_accuracy < 0.5) == (1.0, True)
    assert advice_of(found).startswith("head alone makes an error")


@pytest.mark.parametrize(("quantized_accuracy", "said"), [(0.45, "Rounding is not to blame"), (0.2, "stem")])
def test_answers_that_change_by_chance_are_told_apart(quantized_accuracy, said, data):
    """Of 100 images 20 get another answer: five more wrong ones are chance, thirty are none."""
    found = measure(calibrated(), data.test_images[:4], data.test_labels[:4])
    worst = replace(found.layers[0], name="stem.0", sensitivity=0.004)
    measured = replace(
        found,
        images=100,
        layers=(worst,),
        error=0.005,
        agreement=0.8 if quantized_accuracy > 0.4 else 0.6,
        float_accuracy=0.5,
        quantized_accuracy=quantized_accuracy,
    )
    assert advise(measured).text.startswith(said) or advise(measured).layer.startswith(said)
    assert "All is well" not in advise(measured).text


def test_progress_has_a_total(data):
    seen = []
    model = calibrated()
    measure(model, data.test_images[:8], data.test_labels[:8], tick=lambda done, total: seen.append((done, total)))
    assert seen == [(k, 10) for k in range(1, 11)]
