"""Weights with a scale per group of input channels: training, eval, the converted model, files, ONNX Runtime."""

import numpy as np
import onnx
import pytest
import torch
from torch import nn

import tritonq
from tolerances import FLOAT32, SUMS, assert_close
from tritonq import QuantizedType

X = torch.randn(4, 32, 6, 6, generator=torch.Generator().manual_seed(0))
RANGES = tritonq.FakeQuantize.with_args(observer=tritonq.MovingAveragePerChannelMinMaxObserver, averaging_constant=1.0)
LSQ = tritonq.LearnedStepFakeQuantize.with_args(init="lsq")
TYPES = {
    "symmetric": QuantizedType.of(4, axis=1, group=16),
    "affine": QuantizedType.of(4, signed=False, symmetric=False, axis=1, group=16),
}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(32, 32, 3), nn.BatchNorm2d(32)
        self.up, self.head = nn.ConvTranspose2d(32, 16, 2, 2), nn.Linear(16, 4)

    def forward(self, x):
        return self.head(self.up(torch.relu(self.norm(self.conv(x)))).mean((2, 3)))


def trained(qconfig, steps=2):
    torch.manual_seed(0)
    qat = tritonq.prepare_qat(Net(), qconfig=qconfig, example_inputs=X).train()
    optimizer = torch.optim.SGD(qat.parameters(), 0.01)
    for _ in range(steps):
        optimizer.zero_grad()
        qat(X).square().mean().backward()
        optimizer.step()
    return qat


def qconfig_of(maker, kind, **options):
    return tritonq.QConfig(tritonq.get_qconfig().activation, maker.with_args(dtype=TYPES[kind]), **options)


def test_a_group_is_rounded_as_a_tensor_of_its_own():
    """Axis 1 in groups of 16: scales run along (out, height, width, group), the group fastest."""
    qtype = TYPES["symmetric"]
    quantizer, weight = RANGES(dtype=qtype), torch.randn(4, 32, 3, 3, generator=torch.Generator().manual_seed(1))
    y = quantizer(weight)
    for index in np.ndindex(4, 3, 3, 2):
        out, row, column, group = index
        values = weight[out, group * 16 : group * 16 + 16, row, column]
        one = tritonq.FakeQuantize(observer=tritonq.MinMaxObserver, dtype=qtype.with_axis(None))
        assert torch.equal(one(values), y[out, group * 16 : group * 16 + 16, row, column])
        assert float(one.scale) == float(quantizer.scale[np.ravel_multi_index(index, (4, 3, 3, 2))])


@pytest.mark.parametrize("maker", [RANGES, LSQ], ids=["ranges", "lsq"])
@pytest.mark.parametrize("group", [None, 16])
def test_an_axis_may_count_from_the_end(maker, group):
    results = []
    for axis in (1, -3):
        quantizer = maker(dtype=QuantizedType.of(4, axis=axis, group=group))
        results.append((quantizer(X), quantizer.scale))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


def test_trained_scales_get_the_gradient_of_their_group():
    """LSQ's formula (Esser et al., 2020) in float64, group by group."""
    qtype = QuantizedType.of(4, axis=1, group=16)
    quantizer = tritonq.LearnedStepFakeQuantize(dtype=qtype, init="lsq")
    quantizer.batch_axis = None
    weight = torch.randn(8, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).requires_grad_()
    y, upstream = quantizer(weight), torch.randn(8, 32, dtype=torch.float64)
    y.backward(upstream)
    groups, steps = weight.detach().view(16, 16), None
    start = 2 * groups.abs().mean(1) / 7**0.5
    assert_close(quantizer.scale.double(), start, FLOAT32, size=0)
    scale = quantizer.scale.detach().double().view(16, 1)
    steps = groups / scale
    inside = (steps > -8) & (steps < 7)
    slope = torch.where(inside, steps.round() - steps, steps.clamp(-8, 7))
    expected = (slope * upstream.view(16, 16)).sum(1) / (16 * 7) ** 0.5
    assert_close(quantizer.scale.grad.double(), expected, SUMS, size=0.01)


@pytest.mark.parametrize("folding", [None, "scale"])
@pytest.mark.parametrize(("maker", "kind"), [(RANGES, "symmetric"), (RANGES, "affine"), (LSQ, "symmetric")])
def test_what_was_trained_is_what_is_deployed(maker, kind, folding, tmp_path):
    if kind == "affine" and folding == "scale":
        folding = "exact"
    qat = trained(qconfig_of(maker, kind, folding=folding))
    before = qat.conv.weight_fake_quant.scale.detach().clone()
    assert before.shape == (32 * 9 * 2,)
    expected = qat.eval()(X)
    converted = tritonq.convert(qat)
    assert torch.equal(converted(X), expected)
    assert tuple(converted.conv.weight_scale.shape) == (32, 2, 3, 3)
    assert tuple(converted.up.weight_scale.shape) == (16, 2, 2, 2)
    tritonq.save_converted(converted, tmp_path / "model.pt")
    loaded = tritonq.load_converted(tmp_path / "model.pt", Net())
    assert torch.equal(loaded(X), expected)
    assert loaded.conv.types.weight == TYPES[kind]
    packed = torch.load(tmp_path / "model.pt", weights_only=True)["state_dict"]["conv.weight"]
    assert packed.shape == (32 * 32 * 9 // 2,)
    values = converted.conv.dequantized_weight(torch.float32)
    assert max(len(group.unique()) for group in values.movedim(1, -1).reshape(-1, 16)) <= 2 ** TYPES[kind].bits
    with torch.no_grad():
        assert torch.equal(torch.compile(qat, backend="eager")(X), expected)


@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize("kind", TYPES)
def test_files_have_blocks(kind, pack, tmp_path):
    qat, path = trained(qconfig_of(RANGES, kind), steps=1).eval(), tmp_path / "model.onnx"
    tritonq.export_onnx(qat, path, X, pack=pack)
    file = onnx.load(path)
    assert [entry.version for entry in file.opset_import if entry.domain == ""] == [21]
    held = {tensor.name: tensor for tensor in file.graph.initializer}
    found = {
        node.input[0]: {attribute.name: attribute.i for attribute in node.attribute}
        for node in file.graph.node
        if node.op_type == "DequantizeLinear" and any(attribute.name == "block_size" for attribute in node.attribute)
    }
    assert {name: (each["axis"], each["block_size"]) for name, each in found.items()} == {
        **{"conv.weight": (1, 16), "up.weight": (0, 16), "head.weight": (1, 16)}
    }
    four = onnx.TensorProto.INT4 if kind == "symmetric" else onnx.TensorProto.UINT4
    assert held["conv.weight"].data_type == (four if pack else onnx.TensorProto.INT8)
    report = tritonq.verify(qat, path, X)
    assert report.agrees()
    assert any(layer.island == ("Conv",) for layer in report.layers)


def test_other_forms_say_that_they_have_no_groups(tmp_path):
    qat = trained(qconfig_of(RANGES, "symmetric"), steps=1).eval()
    with pytest.raises(ValueError, match=r"'conv' has a scale per group .* PT2E has no operator"):
        tritonq.export_program(qat, None, X, form="pt2e")


def test_groups_that_do_not_divide_are_refused():
    text = r"a Conv2d with 3 input channels can't have groups of 32 .* by a QConfigMapping"
    with pytest.raises(ValueError, match=text):
        tritonq.prepare_qat(nn.Sequential(nn.Conv2d(3, 8, 3)), qconfig=tritonq.get_qconfig("w4_g32"))
    other = tritonq.QConfig(nn.Identity, RANGES.with_args(dtype=QuantizedType.of(4, axis=0, group=16)))
    with pytest.raises(ValueError, match="lie along axis 1, the input channels, got axis 0"):
        tritonq.nn.Linear(16, 16, qconfig=other)
    with pytest.raises(ValueError, match="groups of at least one element lie along an axis"):
        QuantizedType.of(4, group=32)


@pytest.mark.parametrize("name", ["w4_g32", "w4a8_g32"])
def test_presets(name):
    model = nn.Sequential(nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 64, 3), nn.Flatten(), nn.Linear(1024, 4))
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(3))
    qat = tritonq.prepare_qat(model, qconfig=tritonq.get_qconfig_mapping(name), example_inputs=x).train()
    qat(x).mean().backward()
    assert [layer.weight_fake_quant.qtype.group for layer in (qat[0], qat[2], qat[4])] == [None, 32, 32]
    assert isinstance(qat[2].activation_post_process, nn.Identity) == (name == "w4_g32")
    assert torch.equal(tritonq.convert(qat)(x), qat.eval()(x))
    assert "per group of 32" in str(tritonq.summary(qat))


def test_tools_know_groups():
    """Rounding by training, freezing of oscillating weights and the record of clipped shares read groups."""
    qat = trained(qconfig_of(RANGES, "symmetric"), steps=1)
    history, freezing = tritonq.QuantizerHistory(qat), tritonq.OscillationFreezing(qat, threshold=0.005, momentum=0.5)
    change = torch.randn(qat.conv.weight.shape, generator=torch.Generator().manual_seed(4)) * 0.1
    for sign in (1, -1, 1, -1, 1, -1):
        with torch.no_grad():
            qat.conv.weight.add_(change, alpha=sign)
        history.step()
        freezing.step()
    assert freezing.frozen_share() > 0.5
    assert {record.name for record in history.records} >= {"conv.weight_fake_quant"}
    assert float(tritonq.oscillation_dampening(qat)) > 0
    ratios = tritonq.adaptive_round(qat.eval(), [X], steps=5)
    assert set(ratios) == {"conv", "up", "head"}
    assert torch.equal(tritonq.convert(qat)(X), qat(X))
