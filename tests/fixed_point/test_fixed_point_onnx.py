"""ONNX Runtime runs the export of a fixed-point network with equal codes."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from test_fixed_point_integer import digits, overflowing, per_channel, trained  # noqa: F401 - a fixture
from test_fixed_point_prepare import F8NET
from torch import nn

from qat_models import after_one_batch
from tolerances import SUMS, assert_close
from tritonq.demo.model import SmallResNet
from tritonq.deploy import convert, verify
from tritonq.deploy.fixed_point_modules import FixedPointFormat, IntegerAvgPool2d, IntegerLayer, PoolingWindow
from tritonq.deploy.fixed_point_onnx import export_fixed_point_onnx

pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")


def ran(path, x):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    (outputs,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    return torch.from_numpy(outputs)


@pytest.mark.parametrize("qconfig", [F8NET, per_channel()], ids=["layer", "channel"])
def test_digits(digits, qconfig, tmp_path):  # noqa: F811
    torch.manual_seed(1)
    model = trained(SmallResNet(1, 10, width=8), digits.train_images, digits.train_labels, qconfig)
    export_fixed_point_onnx(model, tmp_path / "model.onnx", digits.train_images[:2])
    images = digits.test_images[:300]
    assert torch.equal(ran(tmp_path / "model.onnx", images), convert(model)(images))
    report = verify(model, tmp_path / "model.onnx", images)
    assert report.agrees()
    assert report.total.codes > 5e5


class Twice(nn.Module):
    """Concatenates a tensor with itself, and ends in a softmax along an axis that is not the last."""

    def __init__(self, softmax):
        super().__init__()
        self.first, self.norm, self.second = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(8, 3, 1)
        self.softmax = softmax

    def forward(self, x):
        y = F.relu(self.norm(self.first(x)))
        return self.softmax(self.second(torch.cat([y, y], dim=1)))


@pytest.mark.parametrize(
    "softmax",
    [nn.Softmax(dim=1), nn.LogSoftmax(dim=-3), partial(F.softmax, dim=1), partial(F.log_softmax, dim=2), F.softmax],
    ids=["module", "log", "function", "log function", "no axis"],
)
@pytest.mark.filterwarnings("ignore:Implicit dimension choice")
def test_axes_and_repeated_tensors(softmax, tmp_path):
    images = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(3))
    integers = convert(after_one_batch(Twice(softmax), images, qconfig=F8NET))
    export_fixed_point_onnx(integers, tmp_path / "model.onnx", images[:2])
    assert_close(ran(tmp_path / "model.onnx", images), integers(images), SUMS, size=0.1)


@pytest.mark.filterwarnings(r"ignore:\d+ accumulators of")
def test_what_cannot_be_exported_is_refused(tmp_path):
    model, x = overflowing()
    with pytest.raises(ValueError, match="may pass 32 bits"):
        export_fixed_point_onnx(model, tmp_path / "model.onnx", x)
    assert not list(tmp_path.iterdir())


def test_averages_of_large_images_are_exact(tmp_path):
    """The sum is one more than a tie, 170.5 · 2^17, which is what float32 makes of it."""
    bytes_in, bytes_out = FixedPointFormat(0, 0, 255), FixedPointFormat(-17, 0, 255)
    one = {"weight": torch.ones(1, 1, 1, 1, dtype=torch.int8)}
    one |= {name: torch.zeros(1, dtype=torch.int32) for name in ("bias", "frac_len")}
    geometry = {"stride": (1, 1), "padding": (0, 0), "dilation": (1, 1), "groups": 1}
    window = PoolingWindow(None, None, (0, 0), 300 * 300, keepdim=True)
    model = nn.Sequential(
        IntegerLayer(one, geometry, bytes_in, bytes_in, encodes=True, decodes=False, linear=False),
        IntegerAvgPool2d(window, torch.zeros(1, dtype=torch.int32), bytes_in, bytes_out),
        IntegerLayer(one, geometry, bytes_out, None, encodes=False, decodes=True, linear=False),
    )
    images = torch.full((1, 1, 300, 300), 248.0)
    images.view(-1)[: 170 * 2**17 + 2**16 + 1 - 248 * 300 * 300] += 1
    export_fixed_point_onnx(model, tmp_path / "model.onnx", images)
    assert model(images).item() == ran(tmp_path / "model.onnx", images).item() == 171
