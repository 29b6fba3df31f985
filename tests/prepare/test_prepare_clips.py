"""Where a clip that is no ReLU follows a convolution there is one quantizer, after the clip, and none before."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import tritonq
from optimised_graph import optimised_kinds
from prepared_nets import quantizers
from tolerances import SUMS, assert_close
from tritonq import nn as qnn
from tritonq.fake_quantize_base import FakeQuantizeBase
from tritonq.prepare import disable_fake_quant, prepare_qat

X = torch.randn(8, 4, 6, 6, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """Convolution, BatchNorm, ``act``, another convolution."""

    def __init__(self, act, bn: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(4, 6, 3, padding=1, bias=not bn)
        self.norm = nn.BatchNorm2d(6) if bn else None
        self.act = act
        self.second = nn.Conv2d(6, 4, 1)
        # Values far above 6, so that clipping matters.
        (self.norm or self.first).weight.data.fill_(4.0 if bn else 0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(x)
        return self.second(self.act(y if self.norm is None else self.norm(y)))


def trained(model: nn.Module) -> nn.Module:
    model.train()
    for _ in range(2):
        model(X).square().mean().backward()
    return model.eval()


@pytest.mark.parametrize("bn", [True, False])
@pytest.mark.parametrize(
    "act",
    [
        *(nn.Hardtanh(-1, 2), F.hardtanh, lambda x: F.hardtanh(x, -1, 2, inplace=True), lambda x: x.clamp(-1, 2)),
        *(lambda x: torch.clamp(x, min=-1, max=2), lambda x: x.clamp_(-1, 2)),
    ],
)
def test_one_quantizer_after_the_clipping(act, bn):
    model = Net(act, bn)
    prepared = trained(prepare_qat(model, example_inputs=X))
    assert type(prepared.first) is (qnn.ConvBn2d if bn else qnn.Conv2d)
    assert type(prepared.first.activation_post_process) is nn.Identity
    # The input, the clipped values, the second layer's output.
    assert len(quantizers(prepared)) == 3
    grid = prepared.second.input_quantizer
    assert grid is not None
    limit = 1.0 if act is F.hardtanh else 2.0
    assert float(grid.activation_post_process.max_val) == limit
    converted = tritonq.convert(prepared)
    assert tritonq.verify(prepared, converted, X).agrees()


def test_the_summary_says_that_the_clip_is_quantized():
    prepared = prepare_qat(Net(nn.Hardtanh(-1, 2)), example_inputs=X)
    rows = {row.name: row for row in tritonq.summary(prepared).layers}
    assert (rows["act"].status, rows["act"].grid, rows["first"].reason) == ("quantized", "y 0..255 (no data yet)", "")


def test_nothing_is_lost_with_rounding_off():
    model = Net(nn.Hardtanh(-1, 2)).eval()
    prepared = prepare_qat(model, example_inputs=X)
    disable_fake_quant(prepared)
    expected = model(X)
    assert float(expected.detach().abs().max()) > 0.1
    assert_close(prepared(X), expected, SUMS)


@pytest.mark.parametrize("act", [nn.SiLU(), nn.Hardswish(), nn.GELU(), nn.Sigmoid(), nn.LeakyReLU()])
def test_other_activations_have_a_quantizer_on_either_side(act):
    """Without the first ONNX Runtime would convolve in float."""
    prepared = trained(prepare_qat(Net(act), example_inputs=X))
    assert isinstance(prepared.first.activation_post_process, FakeQuantizeBase)
    assert prepared.second.input_quantizer is prepared.act.activation_post_process
    assert len(quantizers(prepared)) == 4


class SharedClip(nn.Module):
    """One Hardtanh in two places of a forward, which branches on its data where ``traceable`` is false."""

    def __init__(self, traceable: bool) -> None:
        super().__init__()
        self.first, self.second, self.third = (nn.Conv2d(4, 4, 1) for _ in range(3))
        self.act, self.traceable = nn.Hardtanh(-1, 2), traceable

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.act(self.second(self.act(self.first(x))) * 2)
        if not self.traceable and y.sum() > 1e9:
            raise ValueError("too large")
        return self.third(y)


@pytest.mark.parametrize("traceable", [True, False])
def test_a_shared_clip_is_quantized_where_that_touches_nothing_else(traceable):
    prepared = trained(prepare_qat(SharedClip(traceable), example_inputs=X))
    assert (type(prepared.first.activation_post_process) is nn.Identity) == traceable
    assert prepared.second.input_quantizer is not prepared.third.input_quantizer or not traceable
    assert tritonq.verify(prepared, tritonq.convert(prepared), X).agrees()


def test_clipped_values_that_others_read_unclipped_keep_both_quantizers():
    class Both(Net):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.first(x)
            return self.second(self.act(y)) + y[:, :4]

    prepared = prepare_qat(Both(nn.Hardtanh(-1, 2), bn=False), example_inputs=X)
    assert isinstance(prepared.first.activation_post_process, FakeQuantizeBase)


CLIPS = [
    *(lambda x: F.hardtanh(x, -2.0, 1.0), lambda x: x.clamp(0.5, 2.0)),
    *(lambda x: x.clamp(max=1.5), lambda x: torch.clamp_min(x, -1), lambda x: F.relu(x).clamp_max(2.0)),
]


class Chain(nn.Module):
    """A convolution before each of the clips, and one behind the last."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Conv2d(4, 4, 1) for _ in range(len(CLIPS) + 2))
        self.hardtanh = nn.Hardtanh(-1.0, 2.0)
        for layer in self.layers:
            layer.weight.data.mul_(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer, clip in zip(self.layers, (self.hardtanh, *CLIPS), strict=False):
            x = clip(layer(x))
        return self.layers[-1](x)


@pytest.mark.parametrize("preset", ["onnxruntime", "tensorrt", "fbgemm"])
def test_sums_go_onto_the_grid_behind_the_clip_at_once(preset, tmp_path, monkeypatch):
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    is_torch_ao = preset == "fbgemm"
    qconfig = tritonq.get_default_qat_qconfig(preset, version=0) if is_torch_ao else tritonq.get_qconfig(preset)
    prepared = trained(prepare_qat(Chain(), qconfig=qconfig, example_inputs=X))
    # Every odd sum lies between two codes.
    for layer in prepared.layers:
        assert type(layer.activation_post_process) is nn.Identity or layer is prepared.layers[-1]
        layer.input_quantizer.scale.fill_(0.02)
        layer.weight_fake_quant.scale.fill_(0.5)
    converted, path = tritonq.convert(prepared), tmp_path / "m.onnx"
    assert tritonq.verify(prepared, converted, 4 * X).total.differing == 0
    tritonq.save_converted(converted, tmp_path / "m.pt")
    with torch.no_grad():
        expected = converted(4 * X)
        assert torch.equal(tritonq.load_converted(tmp_path / "m.pt", Chain())(4 * X), expected)
        with monkeypatch.context() as patch:  # without torch's integer kernels
            patch.setattr("torch.backends.mkldnn.enabled", False)
            assert torch.equal(prepared(4 * X), expected)
            assert torch.equal(tritonq.convert(prepared)(4 * X), expected)
        if preset == "onnxruntime":
            assert torch.equal(torch.compile(prepared, backend="eager", fullgraph=True)(4 * X), expected)
    tritonq.export_onnx(converted, path, X, target="onnxruntime")
    assert tritonq.verify(prepared, path, 4 * X).total.differing == 0
    kinds = optimised_kinds(path)
    assert kinds["QLinearConv"] == len(prepared.layers)
    assert not {"Conv", "FusedConv", "Relu"} & set(kinds)


CHAINS = {
    "functions": (lambda x: F.hardtanh(x.clamp(-2, 0.5)), (-1, 0.5)),
    "an absorbed ReLU6": (lambda x: F.relu6(x).clamp(0.5, 3), (0.5, 3)),
    "modules": (nn.Sequential(nn.Hardtanh(-2, 2), nn.ReLU6(), nn.Hardtanh(0.1, 1)), (0.1, 1)),
    "one bound each": (lambda x: x.clamp_min(-1).relu_().clamp_max_(1.5), (0, 1.5)),
}


@pytest.mark.parametrize(("act", "bounds"), CHAINS.values(), ids=CHAINS)
def test_clips_in_a_row_are_one(act, bounds, tmp_path):
    pytest.importorskip("onnxruntime")
    prepared = trained(prepare_qat(Net(act, bn=False), example_inputs=X))
    assert len(quantizers(prepared)) == 3
    (clip,) = (module for module in prepared.modules() if isinstance(module, qnn.UnaryLayer))
    assert (clip.clipping.low, clip.clipping.high) == bounds
    prepared.first.input_quantizer.scale.fill_(0.02)
    prepared.first.weight_fake_quant.scale.fill_(0.5)
    values, path = 4 * X, tmp_path / "m.onnx"
    tritonq.export_onnx(prepared, path, X)
    converted = tritonq.convert(prepared)
    assert tritonq.verify(prepared, converted, values).total.differing == 0
    assert tritonq.verify(prepared, path, values).total.differing == 0
    tritonq.save_converted(converted, tmp_path / "m.pt")
    assert torch.equal(tritonq.load_converted(tmp_path / "m.pt", Net(act, bn=False))(values), converted(values))


def test_a_clip_that_is_called_elsewhere_too_stays_apart():
    class Twice(Net):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.act(self.first(x)).clamp(-0.5, 1)
            return self.second(self.act(y * 3))

    prepared = trained(prepare_qat(Twice(nn.Hardtanh(-1, 2), bn=False), example_inputs=X))
    assert isinstance(prepared.act, nn.Hardtanh)
    assert tritonq.verify(prepared, tritonq.convert(prepared), 4 * X).total.differing == 0


def test_tensorrt_gets_the_clip_before_its_quantizer(tmp_path):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    qconfig = tritonq.get_qconfig("tensorrt")
    prepared = trained(prepare_qat(Net(nn.Hardtanh(-1, 2)), qconfig=qconfig, example_inputs=X))
    path = tmp_path / "m.onnx"
    tritonq.export_onnx(prepared, path, X, target="tensorrt")
    kinds = [node.op_type for node in onnx.load(path).graph.node]
    between = kinds[kinds.index("Conv") + 1 : kinds.index("Conv", kinds.index("Conv") + 1)]
    assert between[:2] == ["Clip", "QuantizeLinear"]
    assert tritonq.verify(prepared, path, X).agrees(0.005, 1)
