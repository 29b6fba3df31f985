"""ReLU6 and every other ReLU with an upper bound, as part of layers and additions, from preparation to ONNX Runtime."""

from __future__ import annotations

import collections
import copy
import math

import onnx
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import tritonq
from optimised_graph import optimised_kinds
from prepared_nets import assert_same_when_not_rounding, quantizers
from tritonq import nn as qnn
from tritonq.deploy.description import build_module
from tritonq.nn import intrinsic
from tritonq.nn.clip import Clip
from tritonq.prepare import fuse_modules_qat, prepare_qat
from tritonq.prepare.forwards.edited import EditedForward
from vision_models import timm_model, torchvision_model

X = torch.randn(8, 4, 6, 6, generator=torch.Generator().manual_seed(0))
MODULES = [(nn.ReLU6(), 6.0), (nn.ReLU6(inplace=True), 6.0), (nn.Hardtanh(0, 1.5), 1.5), (nn.Hardtanh(0.0, 40.0), 40.0)]
FUNCTIONS = [
    (F.relu6, 6.0),
    (lambda x: F.relu6(x, inplace=True), 6.0),
    (lambda x: F.hardtanh(x, 0, 1.5), 1.5),
    (lambda x: F.hardtanh(x, max_val=1.5, min_val=0.0), 1.5),
    (lambda x: F.hardtanh_(x, 0.0, 1.5), 1.5),
    (lambda x: torch.clamp(x, 0, 6), 6.0),
    (lambda x: torch.clip(x, min=0, max=2), 2.0),
    (lambda x: x.clamp(0, 6), 6.0),
    (lambda x: x.clamp(min=0, max=6), 6.0),
    (lambda x: x.clamp_(0.0, 6.0), 6.0),
    (lambda x: x.clamp(min=0), math.inf),
    (lambda x: x.clamp_min(0), math.inf),
]
NO_RELUS = [
    *(nn.Hardtanh(-1, 6), F.hardtanh, lambda x: x.clamp(max=6), lambda x: x.clamp(0.5, 6), lambda x: x.clamp(-6, 6)),
    lambda x: torch.clamp(x, torch.zeros(()), torch.full((), 6.0)),
]


class Net(nn.Module):
    """Convolution, BatchNorm, ``act``, another convolution; values reach far above 6."""

    def __init__(self, act, bn: bool = True, affine: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(4, 6, 3, padding=1, bias=not bn)
        self.norm = nn.BatchNorm2d(6, affine=affine) if bn else None
        self.act = act
        self.second = nn.Conv2d(6, 4, 1)
        if bn and affine:
            self.norm.weight.data.fill_(4.0)
        elif not bn:
            self.first.weight.data.mul_(20)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(x)
        return self.second(self.act(y if self.norm is None else self.norm(y)))


class Block(nn.Module):
    """An addition of two convolutions' results, ``act``, a convolution."""

    def __init__(self, act) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.act, self.head = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 3, padding=1), act, nn.Conv2d(4, 2, 1)
        for layer in (self.a, self.b):
            layer.weight.data.mul_(10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.act(self.a(x) + self.b(x)))


def trained(model: nn.Module, x: torch.Tensor = X) -> nn.Module:
    model.train()
    for _ in range(2):
        model(x).square().mean().backward()
    return model.eval()


def widened(model: nn.Module) -> nn.Module:
    """``model`` with every activation's range up to 40, where no bound is hidden by the last code."""
    for quantizer in quantizers(model).values():
        observer = quantizer.activation_post_process
        observer.max_val.fill_(40.0)
        for mine, value in zip((quantizer.scale, quantizer.zero_point), observer.calculate_qparams(), strict=True):
            mine.copy_(value)
    return model


def assert_prepared(model: nn.Module, count: int, x: torch.Tensor = X) -> nn.Module:
    """``model`` prepared, with so many activation quantizers, and trained two steps; it computes and deploys alike."""
    prepared = prepare_qat(model, example_inputs=x)
    assert len(quantizers(prepared)) == count
    assert_same_when_not_rounding(model, prepared, x)
    prepared = trained(prepared, x)
    assert tritonq.verify(prepared, tritonq.convert(prepared), x).agrees()
    return prepared


@pytest.mark.parametrize("bn", [True, False])
@pytest.mark.parametrize(("act", "ceiling"), [*MODULES, *FUNCTIONS])
def test_it_becomes_part_of_the_layer_in_every_spelling(act, ceiling, bn):
    # The input, the clipped values, the second layer's output.
    prepared = assert_prepared(Net(act, bn), 3)
    assert type(prepared.first) is (qnn.ConvBnReLU2d if bn else qnn.ConvReLU2d)
    assert prepared.first.ceiling == ceiling
    assert prepared.second.input_quantizer is prepared.first.activation_post_process
    top = float(prepared.first.activation_post_process.activation_post_process.max_val)
    assert top == ceiling if ceiling <= 6 else 6 < top <= ceiling
    if isinstance(act, nn.Module):
        assert isinstance(prepared.act, nn.Identity)
    else:
        assert isinstance(prepared, EditedForward)


@pytest.mark.parametrize("act", NO_RELUS)
def test_what_is_no_relu_stays(act):
    prepared = prepare_qat(Net(act), example_inputs=X)
    assert type(prepared.first) is qnn.ConvBn2d
    assert prepared.first.ceiling is None


@pytest.mark.parametrize(("act", "ceiling"), [*MODULES, *FUNCTIONS])
def test_additions_take_it(act, ceiling):
    # The input, two summands, the sum, the head's output.
    prepared = assert_prepared(Block(act), 5)
    assert prepared.add.ceiling == ceiling
    assert prepared.head.input_quantizer is prepared.add.activation_post_process


@pytest.mark.parametrize(
    ("parts", "shape", "kind"),
    [
        ((nn.Conv1d(4, 4, 1), nn.BatchNorm1d(4)), (2, 4, 5), qnn.ConvBnReLU1d),
        ((nn.Conv3d(4, 4, 1),), (2, 4, 2, 2, 2), qnn.ConvReLU3d),
        ((nn.Linear(4, 4),), (2, 4), qnn.LinearReLU),
        ((nn.Linear(4, 4), nn.BatchNorm1d(4)), (8, 4), qnn.LinearBnReLU1d),
        ((nn.ConvTranspose2d(4, 4, 2),), (2, 4, 3, 3), qnn.ConvTransposeReLU2d),
        ((nn.ConvTranspose2d(4, 4, 2), nn.BatchNorm2d(4)), (2, 4, 3, 3), qnn.ConvTransposeBnReLU2d),
    ],
)
@pytest.mark.parametrize(("act", "ceiling"), [(nn.ReLU(), math.inf), (nn.ReLU6(), 6.0), (nn.Hardtanh(0, 0.5), 0.5)])
def test_rows(parts, shape, kind, act, ceiling):
    torch.manual_seed(0)
    prepared = assert_prepared(nn.Sequential(*copy.deepcopy(parts), act), 2, torch.randn(shape))
    assert type(prepared[0]) is kind
    assert prepared[0].ceiling == ceiling


def test_the_eager_flow_takes_it_too():
    fused = fuse_modules_qat(nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU6()), ["0", "1", "2"])
    assert type(fused[0]) is intrinsic.ConvBnReLU2d
    prepared = prepare_qat(fused)
    assert (type(prepared[0]), prepared[0].ceiling) == (qnn.ConvBnReLU2d, 6.0)
    assert "relu up to 6" in str(prepared[0])


def test_a_row_that_ends_in_something_else_is_refused():
    made = intrinsic.ConvReLU2d(nn.Conv2d(1, 1, 1), nn.SiLU())
    made.qconfig = tritonq.get_qconfig("tensorrt")
    with pytest.raises(TypeError, match=r"takes a ReLU, ReLU6 or Hardtanh\(0, b\), got SiLU"):
        qnn.ConvReLU2d.from_float(made)


@pytest.mark.parametrize(
    ("ceiling", "error"), [(True, TypeError), ("6", TypeError), (0.0, ValueError), (-1, ValueError)]
)
def test_bad_ceilings(ceiling, error):
    with pytest.raises(error, match="ceiling must be"):
        qnn.Add(ceiling)


class Shared(nn.Module):
    """One ReLU6 in three places of a forward, which branches on its data where ``traceable`` is false."""

    def __init__(self, traceable: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.third = (nn.Conv2d(4, 4, 1) for _ in range(3))
        self.act, self.traceable = nn.ReLU6(), traceable

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.act(self.second(self.act(self.first(x))) * 2)
        if not self.traceable and y.sum() > 1e9:
            raise ValueError("too large")
        return self.third(self.act(y + x))


@pytest.mark.parametrize("traceable", [True, False])
def test_it_stays_where_it_can_not_be_removed(traceable):
    """Behind a quantizer it would clip between two codes; a plain ReLU changes nothing there."""
    prepared = trained(prepare_qat(Shared(traceable), example_inputs=X, warn=False))
    assert prepared.first.ceiling == (6.0 if traceable else None)
    assert isinstance(prepared.act, nn.ReLU6 if traceable else Clip)
    assert prepared.add.ceiling == (6.0 if traceable else None)
    assert tritonq.verify(prepared, tritonq.convert(prepared), X).total.differing == 0


def test_hooks_keep_it_apart():
    model, calls = Net(nn.ReLU6()), []
    model.act.register_forward_hook(lambda *arguments: calls.append(arguments))
    prepared = prepare_qat(model, example_inputs=X)
    assert type(prepared.first) is qnn.ConvBn2d
    calls.clear()
    prepared(X)
    assert len(calls) == 1


def test_the_summary_says_what_was_fused():
    prepared = prepare_qat(Net(nn.ReLU6()), example_inputs=X)
    rows = {row.name: row for row in tritonq.summary(prepared).layers}
    assert set(rows["first"].fused_with) == {"norm", "act"}
    assert (rows["act"].status, rows["act"].kind) == ("quantized", "ReLU6")


@pytest.mark.parametrize("act", [nn.ReLU(), nn.ReLU6(), F.relu6])
def test_state_dicts_do_not_know_of_it(act):
    prepared = prepare_qat(Net(act), example_inputs=X)
    plain = prepare_qat(Net(nn.ReLU()), example_inputs=X)
    plain.load_state_dict(prepared.state_dict(), strict=True)


@pytest.mark.parametrize("block", [Net(nn.ReLU6()), Block(nn.ReLU6()), Net(nn.Hardtanh(0, 1.5), bn=False)])
def test_converted_files_hold_the_bound(block, tmp_path):
    prepared = widened(trained(prepare_qat(block, example_inputs=X)))
    converted = tritonq.convert(prepared)
    assert tritonq.verify(prepared, converted, 4 * X).agrees()
    tritonq.save_converted(converted, tmp_path / "m.pt")
    loaded = tritonq.load_converted(tmp_path / "m.pt", copy.deepcopy(block))
    assert torch.equal(loaded(4 * X), converted(4 * X))


def test_files_of_version_1_say_whether_there_is_a_relu():
    assert build_module({"kind": "add", "relu": True, "name": "add"}, {}).ceiling == math.inf
    assert build_module({"kind": "add", "relu": False, "name": "add"}, {}).ceiling is None


def kinds_in(path, optimise: bool) -> collections.Counter:
    if optimise:
        return optimised_kinds(path)
    return collections.Counter(node.op_type for node in onnx.load(path).graph.node)


# qnnpack's 256 codes end at the largest observed value: at the bound or below. Symmetric types have 128 of them.
@pytest.mark.parametrize(("preset", "clips"), [("symmetric", 1), ("qnnpack", 0)])
@pytest.mark.parametrize(
    "act", [nn.ReLU6(), F.relu6, lambda x: x.clamp(min=0, max=3)], ids=["module", "relu6", "clamp"]
)
@pytest.mark.parametrize("make", [Net, Block])
def test_onnx_runtime_has_no_clip_where_the_codes_end_first(make, act, preset, clips, tmp_path):
    symmetric = tritonq.get_qconfig("tensorrt")
    symmetric = tritonq.QConfig(symmetric.activation, symmetric.weight, "onnxruntime")
    qconfig = symmetric if preset == "symmetric" else tritonq.get_default_qat_qconfig("qnnpack")
    prepared = trained(prepare_qat(make(act), qconfig=qconfig, example_inputs=X))
    path = tmp_path / "m.onnx"
    tritonq.export_onnx(prepared, path, X, target="onnxruntime")
    assert tritonq.verify(prepared, path, 4 * X).agrees(0.001, 1)
    assert kinds_in(path, optimise=False)["Clip"] == clips
    kinds = kinds_in(path, optimise=True)
    assert kinds["QLinearConv"] == (2 if make is Net else 3)
    assert kinds["QLinearAdd"] == (0 if make is Net else 1)
    assert not {"Conv", "FusedConv", "Relu"} & set(kinds)


@pytest.mark.parametrize("target", ["onnxruntime", "tensorrt"])
@pytest.mark.parametrize("make", [Net, Block])
def test_a_bound_below_the_last_code_is_exported(make, target, tmp_path):
    qconfig = tritonq.get_qconfig(target)
    prepared = widened(trained(prepare_qat(make(nn.Hardtanh(0.0, 1.5)), qconfig=qconfig, example_inputs=X)))
    tritonq.export_onnx(prepared, tmp_path / "m.onnx", X, target=target)
    assert tritonq.verify(prepared, tmp_path / "m.onnx", 4 * X).agrees(0.005 if target == "tensorrt" else 0.001, 1)


@pytest.mark.parametrize(("bound", "kind"), [(40.0, "Relu"), (1.5, "Clip")])
def test_tensorrt_gets_a_clip_only_where_the_quantizer_ends_above_it(bound, kind, tmp_path):
    qconfig = tritonq.get_qconfig("tensorrt")
    prepared = widened(trained(prepare_qat(Net(nn.Hardtanh(0.0, bound)), qconfig=qconfig, example_inputs=X)))
    path = tmp_path / "m.onnx"
    tritonq.export_onnx(prepared, path, X, target="tensorrt")
    kinds = [node.op_type for node in onnx.load(path).graph.node]
    assert kinds[kinds.index("Conv") + 1 : kinds.index("Conv") + 3] == [kind, "QuantizeLinear"]
    assert tritonq.verify(prepared, path, 4 * X).agrees(0.005, 1)


@pytest.mark.parametrize("act", [nn.ReLU6(), nn.ReLU()])
def test_a_batch_norm_without_affine_is_fused(act, tmp_path):
    model = Net(act, affine=False)
    prepared = assert_prepared(model, 3)
    assert type(prepared.first) is qnn.ConvBnReLU2d
    assert prepared.first.bn.weight is None
    assert isinstance(prepared.norm, nn.Identity)
    tritonq.export_onnx(prepared, tmp_path / "m.onnx", X)
    assert tritonq.verify(prepared, tmp_path / "m.onnx", X).agrees(0.001, 1)


@pytest.mark.parametrize(
    ("make", "bounded", "pairs", "additions"),
    [
        # The stem, 16 expansions, 17 depthwise convolutions, the last one; 17 projections beside them.
        (lambda: torchvision_model("mobilenet_v2"), 35, 52, 10),
        # The stem, 15 expansions, 16 depthwise ones, the last one; 16 projections. ReLU6 is part of BatchNormAct2d.
        (lambda: timm_model("efficientnet_lite0"), 33, 49, 9),
    ],
    ids=["mobilenet_v2", "efficientnet_lite0"],
)
def test_library_models_have_one_quantizer_after_each_layer(make, bounded, pairs, additions):
    prepared = prepare_qat(make(), example_inputs=torch.randn(1, 3, 32, 32))
    layers = [module for module in prepared.modules() if isinstance(module, qnn.QATLayer)]
    assert sum(layer.ceiling == 6.0 for layer in layers) == bounded
    assert sum(isinstance(layer, qnn.ConvBn2d) for layer in layers) == pairs
    assert not [module for module in prepared.modules() if isinstance(module, nn.Hardtanh)]
    # Each of these and the classifier has one; the input and the pooled features have no layer before them.
    assert len(quantizers(prepared)) == pairs + 1 + additions + 2
