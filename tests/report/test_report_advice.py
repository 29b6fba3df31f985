"""The report's advice rests on errors that were measured."""

from __future__ import annotations

import re

import pytest
import torch

import tritonq
from tritonq.cli.data import load_digits
from tritonq.demo.model import SmallResNet
from tritonq.report.advice import percent
from tritonq.report.measure import measure
from tritonq.report.page import render


@pytest.fixture(scope="module")
def data():
    torch.set_num_threads(1)
    return load_digits()


def calibrated():
    torch.manual_seed(0)
    images = load_digits().train_images
    model = tritonq.prepare_qat(
        SmallResNet(1, 10, 4), qconfig=tritonq.get_qconfig("tensorrt"), example_inputs=images[:2]
    )
    return tritonq.calibrate(model, images[::9])


def advice_of(measured):
    text = re.search('<p class="advice">(.*?)</p>', render(measured, "digits", "test")).group(1)
    return re.sub("<[^>]*>", "", text)


def test_advice_is_decided_by_error_and_tried(data):
    """Clipping is blamed only where a wider range takes the error away."""
    x, labels = data.test_images[::20], data.test_labels[::20]
    assert advice_of(measure(calibrated(), x, labels)).startswith("All is well")
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


def test_progress_has_a_total(data):
    seen = []
    model = calibrated()
    measure(model, data.test_images[:8], data.test_labels[:8], tick=lambda done, total: seen.append((done, total)))
    assert seen == [(k, 10) for k in range(1, 11)]
