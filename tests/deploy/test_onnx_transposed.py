"""Transposed convolutions run in integers in ONNX Runtime, as plain ones whose channels are phases."""

import pytest
import torch
from torch import nn

import tritonq
from optimised_graph import optimised_kinds
from qat_models import after_one_batch
from tritonq.deploy.phases import Phases

# Kernel, stride, padding, output padding, groups, dilation.
GEOMETRIES = [
    (2, 2, 0, 0, 1, 1),
    (4, 2, 1, 0, 1, 1),
    (3, 2, 1, 1, 2, 1),
    (2, 2, 0, 1, 1, 1),
    (3, 1, 1, 0, 4, 1),
    (2, 3, 0, 0, 1, 1),
    ((3, 5), (1, 2), (1, 2), 0, 1, 1),
    ((4, 6), (2, 3), (0, 1), (1, 0), 2, 1),
    (3, 1, 2, 0, 8, 2),
    (3, 2, 1, 1, 2, (2, 1)),
    ((3, 2), (1, 3), (0, 1), 0, 1, (3, 2)),
]


def trained(layer, preset="onnxruntime"):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), layer, nn.ReLU(), nn.Conv2d(8, 4, 1))
    x = torch.randn(8, 3, 9, 7)
    qconfig = tritonq.get_qconfig(preset) if preset == "onnxruntime" else tritonq.get_default_qat_qconfig(preset)
    qat = tritonq.prepare_qat(net, qconfig=qconfig, example_inputs=x[:2]).train()
    qat(x).square().mean().backward()
    return qat.eval(), x


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_codes_are_those_that_were_trained_and_all_layers_run_in_integers(geometry, tmp_path):
    kernel, stride, padding, output_padding, groups, dilation = geometry
    qat, x = trained(nn.ConvTranspose2d(8, 8, kernel, stride, padding, output_padding, groups, True, dilation))
    tritonq.export_onnx(qat, tmp_path / "m.onnx", x[:2], dynamic_sizes=True)
    report = tritonq.verify(qat, tmp_path / "m.onnx", [x, x[:1, :, :8, :6]])
    assert report.total.differing == 0, report
    kinds = optimised_kinds(tmp_path / "m.onnx")
    assert (kinds["QLinearConv"], kinds["ConvTranspose"], kinds["Conv"]) == (3, 0, 0)


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize(
    ("axes", "geometry"),
    [
        (1, (4, 2, 1, 0, 1, 1)),
        (1, (3, 2, 1, 1, 2, 1)),
        (1, (3, 1, 2, 0, 8, 2)),
        (1, (5, 3, 0, 2, 1, 2)),
        (3, (2, 2, 0, 0, 1, 1)),
        (3, ((3, 4, 2), (2, 1, 3), (1, 0, 0), (1, 0, 1), 2, (1, 2, 1))),
    ],
    ids=str,
)
def test_over_one_axis_and_three_too(axes, geometry, norm, tmp_path):
    kernel, stride, padding, output_padding, groups, dilation = geometry
    kind = {1: nn.ConvTranspose1d, 3: nn.ConvTranspose3d}[axes]
    conv, batch_norm = (nn.Conv1d, nn.BatchNorm1d) if axes == 1 else (nn.Conv3d, nn.BatchNorm3d)
    layer = kind(8, 8, kernel, stride, padding, output_padding, groups, True, dilation)
    torch.manual_seed(0)
    net = nn.Sequential(conv(3, 8, 1), nn.ReLU(), layer, *[batch_norm(8)] * norm, nn.ReLU(), conv(8, 4, 1))
    x = torch.randn(3, 3, *(7, 5, 4)[:axes])
    qat = tritonq.prepare_qat(net, example_inputs=x, strict=True).train()
    qat(x).square().mean().backward()
    assert not tritonq.summary(qat.eval()).in_float
    converted = tritonq.convert(qat)
    tritonq.save_converted(converted, tmp_path / "m.pt")
    assert torch.equal(converted(x), qat(x))
    assert torch.equal(tritonq.load_converted(tmp_path / "m.pt", net)(x), qat(x))
    tritonq.export_onnx(converted, tmp_path / "m.onnx", x, dynamic_sizes=True)
    assert tritonq.verify(qat, tmp_path / "m.onnx", [x, x[:1]]).total.differing == 0
    kinds = optimised_kinds(tmp_path / "m.onnx")
    assert (kinds["QLinearConv"], kinds["ConvTranspose"], kinds["Conv"]) == (3, 0, 0)


@pytest.mark.parametrize("dilation", [1, 2])
def test_weights_with_zero_points_and_kernels_that_their_phases_do_not_fill(dilation, tmp_path):
    """Places beyond the kernel hold the zero point of their channel."""
    weight = tritonq.FakeQuantize.with_args(
        observer=tritonq.PerChannelMinMaxObserver, dtype=tritonq.QuantizedType.of(8, symmetric=False, axis=0)
    )
    qconfig = tritonq.get_qconfig()._replace(weight=weight)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ConvTranspose2d(8, 4, 3, 2, dilation=dilation))
    with torch.no_grad():
        net[1].weight.abs_()
    x = torch.randn(4, 3, 6, 6)
    qat = after_one_batch(net, x, qconfig=qconfig)
    with pytest.warns(UserWarning, match="zero point"):
        tritonq.export_onnx(qat, tmp_path / "m.onnx", x)
    assert tritonq.verify(qat, tmp_path / "m.onnx", x).total.differing == 0


def test_one_that_pads_by_more_than_its_kernel_keeps_its_form_and_is_told(tmp_path):
    qat, x = trained(nn.ConvTranspose2d(8, 8, 1, padding=1))
    with pytest.warns(UserWarning, match=r"of some kinds never; it will run in float: 2\."):
        tritonq.export_onnx(qat, tmp_path / "m.onnx", x[:2])
    assert optimised_kinds(tmp_path / "m.onnx")["ConvTranspose"] == 1
    assert tritonq.verify(qat, tmp_path / "m.onnx", x).agrees(0.001, 1)


class Twice(nn.Module):
    """Calls one layer twice."""

    def __init__(self, layer):
        super().__init__()
        self.stem, self.layer = nn.Conv2d(3, 8, 1), layer

    def forward(self, x):
        return self.layer(self.layer(self.stem(x)))


def test_a_layer_that_is_called_twice_is_told_once(tmp_path):
    torch.manual_seed(0)
    x = torch.randn(4, 3, 8, 8)
    qat = after_one_batch(Twice(nn.ConvTranspose2d(8, 8, 1, padding=1)), x)
    with pytest.warns(UserWarning, match=r"it will run in float: layer\."):
        tritonq.export_onnx(qat, tmp_path / "m.onnx", x)


@pytest.mark.parametrize(("kernel", "stride", "padding", "output_padding"), [(1, 4, 0, 3), (7, 3, 2, 1), (5, 5, 4, 0)])
def test_phases_are_as_long_as_the_result(kernel, stride, padding, output_padding):
    found = Phases.of(kernel, stride, padding, output_padding)
    size = 6 + found.before + found.after - (found.taps - 1)
    assert size * stride - found.first - found.last == 5 * stride - 2 * padding + kernel + output_padding
