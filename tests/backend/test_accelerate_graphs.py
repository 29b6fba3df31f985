"""`accelerate` of graphs that torchao's PT2E and torch.ao's FX mode prepared, against the same graphs untouched."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.ao.quantization import get_default_qat_qconfig_mapping
from torch.ao.quantization.quantize_fx import convert_fx, prepare_qat_fx

import tritonq
from saved_bytes import saved_bytes
from tolerances import FLOAT32, FLOAT64_SUMS, LONG_SUMS, SUMS, assert_close
from torch_ao_nets import assert_compiled_gradients_equal, in_float64
from tritonq.acceleration import report_of
from vision_models import torchvision_model

pytestmark = pytest.mark.filterwarnings("ignore")
pytest.importorskip("torchao", reason="torchao is not installed")

from torchao.quantization.pt2e import (  # noqa: E402
    allow_exported_model_train_eval,
    disable_observer,
    move_exported_model_to_eval,
    move_exported_model_to_train,
)
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_qat_pt2e  # noqa: E402
from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86  # noqa: E402


class Net(nn.Module):
    """Layers with and without BatchNorm, bias and ReLU, a residual addition and a dropout."""

    def __init__(self, dropout=0.0):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.first_norm, self.relu = (
            nn.Conv2d(3, 8, 3, padding=1, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(True),
        )
        self.branch, self.branch_norm = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.pool, self.wide = nn.MaxPool2d(2), nn.Conv2d(8, 8, 1)
        self.dropout, self.head = nn.Dropout(dropout), nn.Linear(8, 4)

    def forward(self, x):
        x = self.relu(self.first_norm(self.first(x)))
        x = self.pool(self.relu(x + self.branch_norm(self.branch(x))))
        return self.head(self.dropout(torch.relu(self.wide(x)).mean((2, 3))))


def images(step=0):
    return torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(step))


def pt2e(model=None, x=None):
    quantizer = x86.X86InductorQuantizer().set_global(x86.get_default_x86_inductor_quantization_config(is_qat=True))
    exported = torch.export.export((model or Net()).train(), (images() if x is None else x,), strict=True)
    return prepare_qat_pt2e(exported.module(), quantizer)


def fx(version=1):
    return prepare_qat_fx(Net().train(), get_default_qat_qconfig_mapping("x86", version), images())


def assert_same_steps(theirs, ours, steps=3):
    """Results, gradients and state agree while no tie parts them."""
    for step in range(steps):
        results = [model(images(step)) for model in (theirs, ours)]
        assert_close(*results, FLOAT32)
        for result in results:
            result.square().mean().backward()
    expected = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        assert_close(parameter.grad, expected[name].grad, LONG_SUMS, size=0.01, msg=name)
    assert_same_state(theirs, ours)


def assert_same_state(theirs, ours):
    expected, state = theirs.state_dict(), ours.state_dict()
    assert set(state) == set(expected)
    for name, value in expected.items():
        assert_close(state[name], value, SUMS, size=0.1, msg=name)


@pytest.mark.parametrize("make", [pt2e, fx, lambda: fx(0)], ids=["pt2e", "fx", "fx version 0"])
def test_steps_eval_and_state(make):
    theirs = make()
    ours = tritonq.accelerate(theirs)
    assert not report_of(ours).left_alone
    assert list(ours.state_dict()) == list(copy.deepcopy(theirs).state_dict())
    assert_same_steps(theirs, ours)
    assert not [name for name in ours.code.split() if "activation_post_process" in name and name.endswith("(x)")]


class WritingNet(nn.Module):
    """A function writes into a convolution's result between a sum that reads it and that sum's ReLU."""

    def __init__(self, write):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.other, self.last = (nn.Conv2d(width, 8, 1) for width in (3, 3, 8))
        self.write = write

    def forward(self, x):
        h = self.first(x)
        total = h + self.other(x)
        written = self.write(h)
        return self.last(torch.relu(total) + written) + h


@pytest.mark.parametrize(
    "write",
    [nn.ReLU(inplace=True), lambda h: F.relu(h, inplace=True), lambda h: h.mul_(2), torch.sigmoid_],
    ids=["module", "function", "method", "torch"],
)
def test_what_is_written_in_place_is_read_as_in_the_library(write):
    theirs = prepare_qat_fx(WritingNet(write).train(), get_default_qat_qconfig_mapping("x86"), images())
    assert_same_steps(theirs, tritonq.accelerate(theirs))


class NumberNet(nn.Module):
    """Sums of a tensor and a number that the graph computes."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1)

    def forward(self, x):
        h = self.first(x)
        return self.last(h.size(1) + torch.relu(h + h.size(1) / 3))


def test_sums_with_numbers():
    theirs = prepare_qat_fx(NumberNet().train(), get_default_qat_qconfig_mapping("x86"), images())
    assert_same_steps(theirs, tritonq.accelerate(theirs))


def test_ten_steps_of_fx_in_float64():
    theirs = in_float64(fx(0))
    ours = tritonq.accelerate(theirs)
    optimizers = [torch.optim.SGD(model.parameters(), 0.05, momentum=0.9) for model in (theirs, ours)]
    for step in range(10):
        for model, optimizer in zip((theirs, ours), optimizers, strict=True):
            optimizer.zero_grad()
            model(images(step).double()).square().mean().backward()
            optimizer.step()
    expected = theirs.state_dict()
    for name, value in ours.state_dict().items():
        assert_close(value, expected[name], FLOAT64_SUMS, size=0.1, msg=name)
    assert_close(*(model.eval()(images().double()) for model in (ours, theirs)), FLOAT64_SUMS, size=0.1)


def test_modes_and_convert_of_pt2e():
    theirs = pt2e()
    ours = tritonq.accelerate(theirs)
    for model in (theirs, ours):
        model(images())
        move_exported_model_to_eval(model)
        model.apply(disable_observer)
    assert_close(theirs(images(1)), ours(images(1)), FLOAT32)
    move_exported_model_to_train(theirs), move_exported_model_to_train(ours)
    for node in theirs.graph.nodes:
        if "dropout" in str(node.target):  # a fault of torchao's, which tritonq keeps from happening
            assert node.args[1] == 0.5
            node.update_arg(1, 0.0)
    theirs.recompile()
    assert_same_steps(theirs, ours, steps=1)
    for model in (theirs, ours):
        move_exported_model_to_eval(model)
    ours.load_state_dict(theirs.state_dict())
    tritonq.restore(ours)
    assert [node.target for node in ours.graph.nodes] == [node.target for node in theirs.graph.nodes]
    assert "tritonq" not in ours.code
    assert torch.equal(convert_pt2e(theirs)(images(2)), convert_pt2e(ours)(images(2)))


@pytest.mark.parametrize("version", [0, 1])
def test_convert_of_fx(version):
    theirs = fx(version)
    ours = tritonq.accelerate(theirs)
    for model in (theirs, ours):
        model(images())
    ours.load_state_dict(theirs.state_dict())
    unrestored = convert_fx(copy.deepcopy(ours).eval())
    assert "tritonq" not in unrestored.code
    tritonq.restore(ours)
    expected = convert_fx(theirs.eval())(images(1))
    assert all(torch.equal(each(images(1)), expected) for each in (convert_fx(ours.eval()), unrestored))


def test_copies_stay_accelerated_in_their_mode():
    ours = tritonq.accelerate(pt2e())
    ours(images())
    move_exported_model_to_eval(ours)
    ours.apply(disable_observer)
    copied = copy.deepcopy(ours)
    assert tritonq.acceleration.graph_modules.is_accelerated(copied)
    assert torch.equal(copied(images(1)), ours(images(1)))
    tritonq.restore(copied)
    assert_close(copied(images(1)), ours(images(1)), FLOAT32)


def test_faults_of_pt2e_are_told_and_kept_from_happening():
    with pytest.warns(UserWarning, match=r"gave 2 BatchNorms behind convolutions eps 1e-05 and momentum 0\.1"):
        ours = tritonq.accelerate(pt2e(Net(dropout=0.25)))
    assert "note: torchao's prepare_qat_pt2e" in str(report_of(ours))
    with pytest.warns(UserWarning, match=r"dropout p 0\.25, and not p 0\.5"):
        move_exported_model_to_eval(ours)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # told once
        move_exported_model_to_train(ours)
    assert "0.25, True" in ours.code
    theirs = pt2e()
    move_exported_model_to_eval(theirs)
    with pytest.warns(UserWarning, match="observers go on in eval mode"):
        tritonq.accelerate(theirs)


def test_pt2e_is_restored_and_converted_with_the_constants_that_ran():
    ours = tritonq.accelerate(pt2e(nn.Sequential(Net(), nn.BatchNorm1d(4, eps=0.5))))
    ours(images())
    move_exported_model_to_eval(ours)
    ours.apply(disable_observer)
    result = ours(images(1))
    unrestored = convert_pt2e(copy.deepcopy(ours))
    assert_close(tritonq.restore(ours)(images(1)), result, FLOAT32)
    assert torch.equal(unrestored(images(1)), convert_pt2e(ours)(images(1)))


@pytest.mark.parametrize(("name", "theirs", "ours"), [("resnet18", 185.2e6, 52e6), ("mobilenet_v2", 339.6e6, 100e6)])
def test_saved_bytes_of_a_training_step(name, theirs, ours):
    x = torch.randn(16, 3, 96, 96)
    model = pt2e(torchvision_model(name), x)
    if name == "resnet18":
        assert 0.99 * theirs < saved_bytes(model, x) < theirs
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = tritonq.accelerate(model, inplace=True)
    assert not report_of(model).left_alone
    assert saved_bytes(model, x) < ours


def test_a_compiled_step_is_the_eager_one():
    eager = tritonq.accelerate(pt2e())
    eager(images())
    model = assert_compiled_gradients_equal(eager, images(1))
    assert_same_state(eager, model)


def test_a_graph_compiles_before_its_first_step():
    """Quantizers per channel get their lengths in it, at which the compiler breaks the graph and goes on behind it."""
    models = [tritonq.accelerate(fx(0)) for _ in range(2)]
    torch._dynamo.reset()
    compiled = torch.compile(models[1], backend="aot_eager")
    assert_close(compiled(images()), models[0](images()), SUMS)


def test_a_version_that_is_not_known_is_refused(monkeypatch):
    model = pt2e()
    monkeypatch.setattr("torchao.__version__", "0.31.2")
    with pytest.raises(ValueError, match=r"torchao 0\.31\.2 prepared this model; accelerate knows torchao from 0\.18"):
        tritonq.accelerate(model, inplace=True)
    assert "tritonq" not in model.code


def test_train_and_eval_go_on_where_torchao_allows_them():
    model = allow_exported_model_train_eval(pt2e())
    ours = tritonq.accelerate(model)
    ours(images())
    ours.eval()
    assert "0.1, 1e-05, False)" in ours.code
    model.train()
    assert "0.1, 1e-05, False)" in ours.code
    ours.train()
    assert "0.1, 1e-05, True)" in ours.code
