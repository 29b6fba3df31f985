"""Pixels in, codes or the largest class out: whole numbers at both ends, and the codes that were trained."""

import pytest
import torch
from torch import nn

import tritonq
from qat_models import after_one_batch
from tritonq.deploy.onnx_ends import PixelNormalization, take_pixels

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# Every pixel value in every channel.
PIXELS = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).repeat(4, 3, 1, 1)
PIXELS = PIXELS.flatten(2)[:, :, torch.randperm(256, generator=torch.Generator().manual_seed(0))].view_as(PIXELS)


def values(mean, std):
    return (PIXELS.float() / 255 - torch.tensor(mean).view(1, -1, 1, 1)) / torch.tensor(std).view(1, -1, 1, 1)


def trained(preset="onnxruntime", net=None, mean=MEAN, std=STD):
    torch.manual_seed(0)
    if net is None:
        net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))
    qconfig = tritonq.get_default_qat_qconfig(preset) if preset == "x86" else tritonq.get_qconfig(preset)
    return after_one_batch(net, values(mean, std), qconfig=qconfig)


def graph_of(path):
    return onnx.load(path).graph


@pytest.mark.parametrize(
    ("preset", "target"),
    [("onnxruntime", "onnxruntime"), ("tensorrt", "tensorrt"), ("megengine_ema", "onnxruntime"), ("x86", "qdq")],
)
def test_pixels_have_the_codes_that_were_trained(preset, target, tmp_path):
    model = trained(preset)
    tritonq.export_onnx(model, tmp_path / "m.onnx", values(MEAN, STD)[:2], target=target, pixels=(MEAN, STD))
    graph = graph_of(tmp_path / "m.onnx")
    assert graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.UINT8
    report = tritonq.verify(model, tmp_path / "m.onnx", PIXELS)
    # Exact whatever the target: the codes of the input are looked up.
    assert report.layers[0].name.endswith("input_fake_quant")
    assert (report.layers[0].codes, report.layers[0].differing) == (PIXELS.numel(), 0)
    assert report.agrees(0.02, 1), report
    if target == "onnxruntime":
        assert report.agrees(), report
        readers = [node.op_type for node in graph.node if graph.input[0].name in node.input]
        assert readers == ["Cast"]


def test_pixels_that_are_codes_already_cost_nothing(tmp_path):
    """Values of pixel / 255 on the grid of 1/255."""
    model = trained(mean=(0.0,), std=(1.0,))
    tritonq.export_onnx(model, tmp_path / "m.onnx", values((0.0,), (1.0,))[:2], pixels=(0, 1))
    graph = graph_of(tmp_path / "m.onnx")
    assert [node.op_type for node in graph.node if graph.input[0].name in node.input] == ["Identity"]
    assert tritonq.verify(model, tmp_path / "m.onnx", PIXELS).agrees()


@pytest.mark.parametrize("returns", ["codes", "argmax"])
def test_whole_numbers_out(returns, tmp_path):
    model = trained()
    x = values(MEAN, STD)
    tritonq.export_onnx(model, tmp_path / "m.onnx", x[:2], returns=returns, pixels=(MEAN, STD))
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx", providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: PIXELS.numpy()})
    wanted, last = model(x), model[-1].activation_post_process
    if returns == "codes":
        wanted = (wanted / last.scale).round() + last.zero_point
        assert found.dtype == "uint8"
    else:
        wanted = wanted.argmax(1)
    assert torch.equal(torch.from_numpy(found).long(), wanted.long())
    report = tritonq.verify(model, tmp_path / "m.onnx", PIXELS)
    assert report.agrees()
    assert report.outputs.largest == 0


def test_the_largest_of_codes_on_a_grid_per_channel_is_found_by_value(tmp_path):
    torch.manual_seed(0)
    x, net = torch.randn(4, 1, 8, 8), nn.Sequential(nn.Conv2d(1, 4, 3), nn.Conv2d(4, 5, 3))
    with torch.no_grad():
        net[1].weight *= torch.tensor([1.0, 0.1, 10.0, 2.0, 0.3]).view(-1, 1, 1, 1)
    per_channel = tritonq.FakeQuantize.with_args(observer=tritonq.PerChannelMinMaxObserver, ch_axis=1)
    qconfig = tritonq.get_qconfig("onnxruntime")
    qconfigs = tritonq.QConfigMapping().set_global(qconfig)
    qconfigs = qconfigs.set_module_name("1", tritonq.QConfig(activation=per_channel, weight=qconfig.weight))
    model = after_one_batch(net, x, qconfig=qconfigs)
    tritonq.export_onnx(model, tmp_path / "m.onnx", x, returns="argmax", target="qdq")
    assert tritonq.verify(model, tmp_path / "m.onnx", x).outputs.differing_integers == 0
    with pytest.raises(ValueError, match="has no codes: no quantizer with one grid"):
        tritonq.export_onnx(model, tmp_path / "m.onnx", x, returns="codes", target="qdq")


class Peeks(nn.Module):
    """Reads its input in float, too."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)

    def forward(self, x):
        return self.conv(x) * x.std()


def test_what_has_no_quantizer_at_its_ends_is_refused(tmp_path):
    x, path = values(MEAN, STD)[:2], tmp_path / "m.onnx"
    with pytest.raises(ValueError, match=r"quantizers alone read its input; a \w+ reads it"):
        tritonq.export_onnx(trained(net=Peeks()), path, x, pixels=(MEAN, STD))
    head = nn.Sequential(nn.Conv2d(3, 4, 16), nn.Flatten(), nn.Softmax(1))
    with pytest.raises(ValueError, match="the output 'output' has no codes"):
        tritonq.export_onnx(trained(net=head), path, x, returns="codes")
    assert not path.exists()


def test_argmax_of_16_bit_codes_runs_and_of_an_output_without_classes_is_refused(tmp_path):
    torch.manual_seed(0)
    x, path = torch.randn(4, 6), tmp_path / "m.onnx"
    model = after_one_batch(nn.Sequential(nn.Linear(6, 5)), x, qconfig=tritonq.get_qconfig("a16w8"))
    tritonq.export_onnx(model, path, x, returns="argmax")
    assert tritonq.verify(model, path, x).outputs.differing_integers == 0
    flat = after_one_batch(nn.Sequential(nn.Linear(6, 1), nn.Flatten(0)), x)
    with pytest.raises(ValueError, match="argmax looks along axis 1, which the output 'output' does not have"):
        tritonq.export_onnx(flat, tmp_path / "flat.onnx", x, returns="argmax")


def test_pixels_need_an_axis_of_channels(tmp_path):
    x = torch.randn(6)
    model = after_one_batch(nn.Sequential(nn.Linear(6, 5)), x)
    with pytest.raises(ValueError, match="this model's has no axis of channels"):
        tritonq.export_onnx(model, tmp_path / "m.onnx", x, pixels=(0, 1), dynamic_batch=False)


def test_pixels_and_models_may_lie_on_any_device(tmp_path):
    pixels = PixelNormalization(MEAN, STD)
    assert pixels(PIXELS.to("meta")).is_meta
    model, x = tritonq.convert(trained()), values(MEAN, STD)[:2]
    tritonq.export_onnx(model, tmp_path / "m.onnx", x)
    # The codes are computed there; what a meta device has not is their bytes.
    with pytest.raises(NotImplementedError, match="Cannot copy out of meta tensor"):
        take_pixels(onnx.load(tmp_path / "m.onnx"), pixels, model.to("meta"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pixels": (MEAN, STD[:2])}, "as many deviations as means"),
        ({"pixels": (0, 0)}, "all deviations positive"),
        ({"pixels": (float("nan"), 1)}, "finite numbers"),
        ({"pixels": (0, float("inf"))}, "finite numbers"),
        ({"pixels": (1e39, 1)}, "finite numbers"),  # not in float32
        ({"pixels": (10**400, 1)}, "each a number or one per channel"),
        ({"pixels": ((), ())}, "at least one"),
        ({"pixels": ("12", "34")}, "each a number or one per channel"),
        ({"pixels": 3}, "each a number or one per channel"),
        ({"pixels": (MEAN[:2], STD[:2])}, "2 means, and the input has 3 channels"),
        ({"returns": "logits"}, "unknown returns 'logits'; known: values, codes, argmax"),
    ],
)
def test_wrong_ends(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        tritonq.export_onnx(trained(), tmp_path / "m.onnx", values(MEAN, STD)[:2], **options)
