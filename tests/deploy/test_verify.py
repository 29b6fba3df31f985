"""verify finds what differs, says where first, and counts right."""

import copy
import dataclasses

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from qat_models import after_one_batch, images, trained_float_form, trained_residual
from tritonq.deploy import convert, export_onnx, export_program, verify

pytest.importorskip("onnxruntime")
QUANTIZERS = ["input", "stem", "depthwise", "point", "add", "pooled"]


def bump(model, name):
    """One weight code of one layer, off by one; off by more where that must be seen."""
    weight = model.get_submodule(name).stored_weight
    weight[0] = torch.where(weight[0] > 0, weight[0] - 20, weight[0] + 20)
    return model


def test_equal_models():
    model = trained_residual()
    report = verify(model, convert(model), images())
    assert report.agrees()
    assert report.first_difference is None
    assert [layer.name for layer in report.layers] == QUANTIZERS
    assert report.total.codes == sum(layer.codes for layer in report.layers)
    assert report.outputs.largest == 0
    assert (report.outputs.elements, report.outputs.predictions, report.outputs.agreement) == (160, 16, 1.0)
    assert "no code differs" in str(report)


@pytest.mark.parametrize("layer", ["stem", "depthwise", "point"])
def test_the_first_layer_that_differs_is_named(layer):
    model = trained_residual()
    report = verify(model, bump(convert(model), layer), images())
    assert report.first_difference is not None
    assert report.first_difference.name == layer
    assert not report.agrees(0.001, 1)
    assert report.outputs.largest > 0
    assert f"first difference: {layer}" in str(report)


def test_a_layer_without_output_quantizer_shows_in_the_outputs():
    model = trained_residual()
    report = verify(model, bump(convert(model), "head"), images())
    assert report.first_difference is None
    assert report.outputs.largest > 0


def test_differences_are_counted_in_codes():
    """A range that ends at 120 cuts 125 and 126 off, and nothing else."""
    model = nn.Sequential(trained_residual().input)
    converted = convert(model)
    scale = float(converted[0].scale)
    x = torch.tensor([[0.0, 100.0, -100.0, 125.0, 126.0]]) * scale
    assert verify(model, converted, x).agrees()
    converted[0].qtype = dataclasses.replace(converted[0].qtype, quant_max=120)
    report = verify(model, converted, x)
    (layer,) = report.layers
    assert (layer.codes, layer.differing, layer.largest, layer.fraction) == (5, 2, 6, 0.4)
    assert report.agrees(0.4, 6)
    assert not report.agrees(0.4, 5)
    assert not report.agrees(0.39, 6)
    (layer,) = verify(model, converted, [x, x[:, :3]]).layers
    assert (layer.codes, layer.differing, layer.largest) == (8, 2, 6)


def test_a_path_may_be_a_string(tmp_path):
    model = trained_residual()
    export_onnx(model, str(tmp_path / "m.onnx"), images(2))
    assert verify(model, str(tmp_path / "m.onnx"), images()).agrees(0.001, 1)


def test_every_kind_of_data():
    model = trained_residual()
    converted, x = convert(model), images(8)
    loader = DataLoader(TensorDataset(x, torch.zeros(8)), batch_size=3)
    for data in (x, [x[:3], x[3:]], [(x,)], {"x": x}, [{"x": x}], loader):
        report = verify(model, converted, data)
        assert report.agrees()
        assert (report.layers[0].codes, report.outputs.predictions) == (x.numel(), 8)


def test_modes_and_hooks_are_restored():
    model = trained_residual().train()
    model.stem.eval()
    modes = [module.training for module in model.modules()]
    verify(model, convert(model), images())
    assert [module.training for module in model.modules()] == modes
    assert not any(module._forward_hooks for module in model.modules())


def test_prepared_models_and_inputs():
    model = trained_float_form()
    report = verify(model, convert(model), images())
    assert report.agrees()
    assert report.layers[0].name == "stem.0.input_fake_quant"


def test_a_module_called_twice_has_two_lines():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)

        def forward(self, x):
            return self.conv(torch.relu(self.conv(x)))

    model = after_one_batch(Twice(), images())
    report = verify(model, convert(model), images())
    assert report.agrees()
    names = [layer.name for layer in report.layers]
    assert [name for name in names if "input" not in name] == ["conv", "conv (call 2)"]


def test_nan_on_one_side_alone_is_a_difference():
    model = trained_residual()
    x = images()
    x[0, 0, 0, 0] = torch.nan
    assert verify(model, convert(model), x).agrees()
    converted = convert(model)
    converted.add.register_forward_hook(lambda module, args, output: output * torch.nan)
    assert verify(model, converted, images()).layers[-1].largest > 255


def test_wrong_arguments(tmp_path):
    model = trained_residual()
    converted = convert(model)
    with pytest.raises(ValueError, match="at least one batch"):
        verify(model, converted, [])
    with pytest.raises(ValueError, match="that holds a sample"):
        verify(model, converted, images()[:0])
    with pytest.raises(ValueError, match="must be a tensor or an iterable"):
        verify(model, converted, 3)
    converted.extra = converted.stem.activation_post_process
    del model.depthwise.activation_post_process
    model.depthwise.activation_post_process = nn.Identity()
    with pytest.raises(ValueError, match=r"'depthwise\.activation_post_process' that the trained model lacks"):
        verify(model, converted, images())
    text = tmp_path / "text.onnx"
    text.write_text("not a model")
    with pytest.raises(ValueError, match=r"text\.onnx is not an ONNX file"):
        verify(model, text, images())
    with pytest.raises(FileNotFoundError):
        verify(model, tmp_path / "absent.onnx", images())


@pytest.mark.filterwarnings("ignore:Exporting a model while it is in training mode")
def test_a_foreign_onnx_file(tmp_path):
    torch.onnx.export(nn.Linear(3, 2), (torch.randn(2, 3),), tmp_path / "m.onnx", dynamo=True, verbose=False)
    with pytest.raises(ValueError, match="was not written by export_onnx"):
        verify(trained_residual(), tmp_path / "m.onnx", images())


def test_arguments_with_defaults_that_a_file_takes(tmp_path):
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1)

        def forward(self, a, b=None):
            return self.first(a) if b is None else self.first(a) + self.second(b)

    a, b = torch.randn(2, 2, 3, 8, 8, generator=torch.Generator().manual_seed(0)).unbind(0)
    model = after_one_batch(Pair(), a, b)
    int8 = convert(model)
    export_onnx(int8, tmp_path / "m.onnx", (a, b))
    export_program(int8, tmp_path / "m.pt2", (a, b))
    for name in ("m.onnx", "m.pt2"):
        # What stands behind the arguments is left out.
        report = verify(model, tmp_path / name, [(a, b, torch.tensor([0, 1]))])
        assert report.total.differing == 0
        assert "add" in [layer.name for layer in report.layers]


class Twins(nn.Module):
    """Two heads that begin as copies of each other, as YOLOv10's do."""

    def __init__(self):
        super().__init__()
        self.body, self.first = nn.Conv2d(3, 4, 1), nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1))
        self.second = copy.deepcopy(self.first)

    def forward(self, x):
        x = self.body(x).relu()
        return self.first(x), self.second(x)


def test_branches_that_an_exporter_merged_are_compared(tmp_path):
    x = images()
    model = after_one_batch(Twins(), x)
    export_onnx(model, tmp_path / "model.onnx", x)
    report = verify(model, tmp_path / "model.onnx", x)
    assert report.agrees()
    assert "second.2" in [layer.name for layer in report.layers]
    model.second[0].weight.data.mul_(-1)
    with pytest.raises(ValueError, match=r"lacks the quantizer 'second\.0"):
        verify(model, tmp_path / "model.onnx", x)


class ForExporters(nn.Module):
    """Pools by another operation where it is exported to ONNX, and masks where it is traced."""

    def __init__(self):
        super().__init__()
        self.conv, self.pool, self.head = nn.Conv2d(3, 4, 1), nn.AdaptiveAvgPool2d(1), Masked()

    def forward(self, x):
        x = self.conv(x).relu()
        x = nn.functional.interpolate(x, (1, 1), mode="area") if torch.onnx.is_in_onnx_export() else self.pool(x)
        return self.head(x, torch.ones(1) if type(x) is not torch.Tensor else None)


class Masked(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 1)

    def forward(self, x, mask=None):
        if mask is not None:
            x = x * mask
        return self.conv(x) + x


def test_files_hold_the_path_that_was_trained(tmp_path):
    x = images()
    model = after_one_batch(ForExporters(), x)
    export_onnx(model, tmp_path / "model.onnx", x)
    assert verify(model, tmp_path / "model.onnx", x).agrees()
    assert verify(model, export_program(model, None, x), x).agrees()


class Ranked(nn.Module):
    """The places of the largest scores, of which many are equal."""

    def __init__(self):
        super().__init__()
        self.scores = nn.Linear(8, 64)

    def forward(self, x):
        return self.scores(x).topk(32, 1)


def test_indices_of_equal_values_are_counted_and_allowed(tmp_path):
    torch.manual_seed(0)
    x = torch.randn(64, 8)
    model = after_one_batch(Ranked(), x)
    export_onnx(model, tmp_path / "model.onnx", x)
    report = verify(model, tmp_path / "model.onnx", x)
    assert report.agrees()
    assert (report.outputs.largest, report.outputs.differing_predictions) == (0, 0)
    assert 0 < report.outputs.differing_integers < 64 * 32
    assert "whole numbers differ: allowed where they are indices of equal values" in str(report)
