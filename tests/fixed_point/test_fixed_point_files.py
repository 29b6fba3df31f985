"""Converted fixed-point networks in files, and where export_onnx, verify and the command line take them."""

import copy

import pytest
import torch
from test_fixed_point_integer import overflowing, trained
from test_fixed_point_prepare import F8NET, Residual
from torch import nn

import tritonq
from qat_models import after_one_batch
from tritonq.deploy import convert, export_onnx, load_converted, save_converted, verify


@pytest.fixture(scope="module")
def residual():
    """A trained network with every kind of join, its integers, and images."""
    torch.manual_seed(2)
    images = torch.randn(64, 2, 12, 12)
    model = trained(Residual(), images, torch.randint(0, 3, (64,)))
    return model, convert(model), images


def fresh(kind, *arguments):
    torch.manual_seed(99)
    return kind(*arguments)


def test_every_kind_of_join_comes_back(residual, tmp_path):
    _, integers, images = residual
    save_converted(integers, tmp_path / "model.pt")
    model = fresh(Residual)
    loaded = load_converted(tmp_path / "model.pt", model)
    assert loaded is model
    assert torch.equal(loaded(images), integers(images))
    assert [(name, type(part)) for name, part in loaded.named_modules()] == [
        (name, type(part)) for name, part in integers.named_modules()
    ]
    for name, part in integers.named_modules():
        mine = loaded.get_submodule(name)
        assert getattr(mine, "name", "") == getattr(part, "name", "")
        assert getattr(mine, "bound", 0) == getattr(part, "bound", 0)
    save_converted(loaded, tmp_path / "again.pt")
    again = load_converted(tmp_path / "again.pt", fresh(Residual))
    assert torch.equal(again(images), integers(images))
    with pytest.raises(RuntimeError, match="eval"):
        loaded.train()


class Windowed(nn.Module):
    """An average over windows, and layers called as modules alone."""

    def __init__(self):
        super().__init__()
        self.one, self.relu, self.pool = nn.Conv2d(2, 4, 3, 2, "valid", 1, 1), nn.ReLU6(), nn.AvgPool2d(2, 1)
        self.two, self.head = nn.Conv2d(4, 4, 3, padding="same", groups=4), nn.Linear(4 * 16, 3)

    def forward(self, x):
        return self.head(torch.flatten(torch.relu(self.two(self.pool(self.relu(self.one(x))))), 1))


def test_windows_and_paddings_in_words_come_back(tmp_path):
    torch.manual_seed(3)
    images = torch.randn(8, 2, 11, 11)
    model = after_one_batch(Windowed(), images, qconfig=F8NET)
    integers = convert(model)
    save_converted(integers, tmp_path / "model.pt")
    loaded = load_converted(tmp_path / "model.pt", fresh(Windowed))
    with torch.no_grad():
        assert torch.equal(loaded(images), model(images))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: setattr(m, "head", nn.Linear(6, 4)), "'head'.*out_features=3"),
        (lambda m: setattr(m, "head", nn.Bilinear(6, 6, 3)), "'head'.*Linear in the file"),
        (lambda m: setattr(m, "max_pool", nn.MaxPool2d(3)), "'max_pool'.*kernel_size=2"),
        (lambda m: setattr(m, "max_pool", nn.AvgPool2d(2)), "'max_pool'.*MaxPool2d in the file"),
        (lambda m: setattr(m.b1[0], "stride", (1, 1)), r"'b1\.0'.*stride=\(2, 2\)"),
        (lambda m: setattr(m, "extra", nn.Linear(1, 1)), "'extra'"),
        (lambda m: delattr(m, "a2"), "'a2"),
    ],
)
def test_other_architectures_are_refused_and_left_as_they_were(residual, change, message, tmp_path):
    _, integers, _ = residual
    save_converted(integers, tmp_path / "model.pt")
    model = fresh(Residual)
    change(model)
    before = copy.deepcopy(model.state_dict())
    types = [type(part) for part in model.modules()]
    with pytest.raises(ValueError, match=message):
        load_converted(tmp_path / "model.pt", model)
    assert [type(part) for part in model.modules()] == types
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())


@pytest.mark.filterwarnings(r"ignore:\d+ accumulators of")
def test_saturating_layers_stay_guarded(tmp_path):
    model, x = overflowing()
    save_converted(convert(model), tmp_path / "model.pt")
    float_model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.MaxPool2d(3), nn.Flatten(), nn.Linear(2, 2))
    loaded = load_converted(tmp_path / "model.pt", float_model)
    loaded[0].encodes = True
    with pytest.warns(RuntimeWarning, match="'3' passed 32 bits"):
        loaded(x)
    assert tritonq.deploy.overflow_report(loaded)["3"] == 4


class TestOnnx:
    @pytest.fixture(autouse=True)
    def _needs_onnx(self):
        pytest.importorskip("onnx")
        pytest.importorskip("onnxruntime")

    def test_a_pool_with_an_empty_stride(self, tmp_path):
        torch.manual_seed(5)
        images = torch.randn(64, 2, 12, 12)
        network = Residual()
        network.max_pool = nn.MaxPool2d(2, ())
        integers = convert(trained(network, images, torch.randint(0, 3, (64,))))
        export_onnx(integers, tmp_path / "model.onnx", images[:2])
        assert verify(integers, tmp_path / "model.onnx", images).total.differing == 0

    @pytest.mark.parametrize("form", ["trained", "integers"])
    def test_export_and_verification_take_fixed_point(self, residual, form, tmp_path):
        model, integers, images = residual
        target = None if form == "trained" else "onnxruntime"
        export_onnx(model if form == "trained" else integers, tmp_path / "model.onnx", images[:2], target=target)
        report = verify(
            model if form == "trained" else integers, tmp_path / "model.onnx", [images[:40], (images[40:],)]
        )
        assert report.agrees()
        assert report.total.codes == verify(model, integers, images).total.codes
        assert report.outputs.elements == 64 * 3
        # The network ends in a float log-softmax.
        assert report.outputs.largest < 1e-5
        assert report.outputs.differing_predictions == 0

    def test_options_that_fixed_point_lacks_are_refused(self, residual, tmp_path):
        _, integers, images = residual
        for option in (
            {"target": "tensorrt"},
            {"opset": 20},
            {"dynamic_batch": False},
            {"input_names": ["x"]},
            {"output_names": ["y"]},
        ):
            with pytest.raises(ValueError, match=f"export_fixed_point_onnx.*{next(iter(option))}"):
                export_onnx(integers, tmp_path / "model.onnx", images[:2], **option)
        with pytest.raises(ValueError, match="one tensor"):
            export_onnx(integers, tmp_path / "model.onnx", (images[:2], images[:2]))
        assert not list(tmp_path.iterdir())

    def test_another_network_in_the_file_shows(self, residual, tmp_path):
        model, integers, images = residual
        broken = copy.deepcopy(integers)
        broken.head.bias += 300
        broken.a1[0].bias += 40
        export_onnx(broken, tmp_path / "model.onnx", images[:2])
        report = verify(model, tmp_path / "model.onnx", images)
        assert report.first_difference.name == "a2.0"
        assert report.outputs.largest > 0.01


def test_verification_of_integers(residual):
    model, integers, images = residual
    model.train()
    report = verify(model, integers, [images[:40], images[40:]])
    assert model.training
    model.eval()
    assert report.agrees()
    assert report.total.codes == verify(model, integers, images).total.codes > 10_000
    assert report.outputs.elements == 64 * 3
    assert verify(integers, integers, images).agrees()
    broken = copy.deepcopy(integers)
    broken.a1[0].bias += 40
    assert verify(model, broken, [images[:40], images[40:]]).first_difference.name == "a2.0"
    with pytest.raises(ValueError, match="at least one batch"):
        verify(model, integers, [])
    with pytest.raises(ValueError, match="was not made from this model"):
        verify(model, nn.Identity(), images)
