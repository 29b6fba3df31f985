"""`accelerate` of models that NVIDIA Model-Optimizer prepared; runs where that is installed (`make peers-tests`)."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import tritonq
from tolerances import FLOAT32, LONG_SUMS, assert_close
from tritonq.acceleration import report_of
from vision_models import torchvision_model

pytestmark = pytest.mark.filterwarnings("ignore")
mtq = pytest.importorskip("modelopt.torch.quantization", reason="Model-Optimizer is not installed")


def images(step=0, dtype=torch.float32):
    return torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(step)).to(dtype)


def net():
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(8)
    layers = (nn.Conv2d(3, 8, 3), norm, nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(128, 4))
    return nn.Sequential(*layers)


def quantized(model=None, x=None):
    x = images() if x is None else x
    return mtq.quantize(model or net(), copy.deepcopy(mtq.INT8_DEFAULT_CFG), lambda held: held(x)).train()


@pytest.mark.parametrize("passes", [True, False])
def test_steps_agree(passes):
    theirs = quantized()
    for module in theirs.modules():
        if hasattr(module, "_pass_through_bwd"):
            module._pass_through_bwd = passes
            if not passes and module.amax is not None:
                module.amax = module.amax * 0.5
    ours = tritonq.accelerate(theirs)
    assert not report_of(ours).left_alone
    assert len(report_of(ours).rows) == 6
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for step in range(3):
        results = [model(images(step)) for model in (theirs, ours)]
        assert_close(*results, FLOAT32)
        for result in results:
            result.square().mean().backward()
    for name, parameter in ours.named_parameters():
        assert_close(parameter.grad, dict(theirs.named_parameters())[name].grad, LONG_SUMS, size=0.01)


def test_restore_gives_the_librarys_classes_back():
    theirs = quantized()
    ours = tritonq.accelerate(theirs)
    tritonq.restore(ours)
    assert [type(module) for module in ours.modules()] == [type(module) for module in theirs.modules()]
    assert torch.equal(theirs.eval()(images(1)), ours.eval()(images(1)))


def test_a_range_of_zero_rounds_to_zero():
    model = quantized(x=torch.zeros(4, 3, 8, 8))
    ours = tritonq.accelerate(model)
    torch.testing.assert_close(model(images()), ours(images()))


def test_other_formats_are_left_alone_and_named():
    model = mtq.quantize(net(), copy.deepcopy(mtq.FP8_DEFAULT_CFG), lambda held: held(images()))
    with pytest.warns(UserWarning, match=r"floating-point codes \(4, 3\)"):
        tritonq.accelerate(model)


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2"])
def test_networks_leave_nothing(name):
    x = torch.randn(2, 3, 32, 32)
    model = quantized(torchvision_model(name), x)
    ours = tritonq.accelerate(model)
    assert not report_of(ours).left_alone
    assert len(report_of(ours).rows) > 40
    with torch.no_grad():
        theirs, own = model.eval()(x), ours.eval()(x)
    torch.testing.assert_close(theirs, own, rtol=0, atol=0.02 * float(theirs.abs().max()))
