"""verify charges a difference to the layer that makes it, allows one code in islands, and takes any form of model."""

import pytest
import torch
from test_verify import bump
from torch import nn

import tritonq
from qat_models import after_one_batch, images, trained_residual
from tritonq.deploy.comparisons import LayerComparison, OutputComparison, VerificationReport

pytest.importorskip("onnxruntime")
LAYERS = ["input", "stem", "depthwise", "point", "add", "pooled"]


@pytest.mark.parametrize("form", ["converted", "m.onnx", "m.pt2"])
def test_a_difference_is_charged_to_the_layer_that_makes_it(form, tmp_path):
    model = trained_residual()
    deployed = bump(tritonq.convert(model), "stem")
    if form != "converted":
        export = tritonq.export_onnx if form.endswith("onnx") else tritonq.export_program
        export(deployed, tmp_path / form, images(2))
        deployed = tmp_path / form
    report = tritonq.verify(model, deployed, [images(8), images(5)])
    differing = {layer.name: layer.differing for layer in report.layers}
    assert list(differing) == LAYERS
    assert differing.pop("stem") > 0
    assert set(differing.values()) == {0}
    # Outputs are those that the deployed model makes itself.
    assert report.outputs.largest > 0


def test_fixed_point_layers_read_the_codes_of_the_trained_ones(tmp_path):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Flatten())
    x = torch.rand(6, 1, 12, 12)
    model = after_one_batch(net, x, qconfig=tritonq.get_qconfig("f8net"))
    integers = tritonq.convert(model)
    layers = [module for module in integers.modules() if hasattr(module, "decodes")]
    layers[0].weight[:] = -layers[0].weight
    tritonq.export_onnx(integers, tmp_path / "m.onnx", x[:2])
    for deployed in (integers, tmp_path / "m.onnx"):
        first, second, third = tritonq.verify(model, deployed, x).layers
        assert (first.differing, third.differing) == (0, 0)
        assert second.differing > 0


class Attention(nn.Module):
    """Quantized layers around softmax and LayerNorm."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 4)
        self.norm = nn.LayerNorm(8)

    def forward(self, x):
        x = self.second(torch.softmax(self.first(x), -1))
        return self.third(self.norm(x))


def test_islands_are_named(tmp_path):
    torch.manual_seed(0)
    x = torch.randn(16, 6)
    model = after_one_batch(Attention(), x)
    tritonq.export_onnx(model, tmp_path / "m.onnx", x[:2])
    report = tritonq.verify(model, tmp_path / "m.onnx", x)
    assert report.agrees(), report
    islands = {layer.name: layer.island for layer in report.layers if layer.island}
    assert sorted(islands.values()) == [("LayerNormalization",), ("Softmax",)], report
    assert "codes may differ by one" in str(report)


@pytest.mark.parametrize("function", [nn.SiLU(), nn.GELU(), nn.GELU("tanh")])
def test_functions_of_single_values_are_no_islands(function, tmp_path):
    """The exporter has tried each of their codes; ONNX Runtime has names of its own for some of them."""
    torch.manual_seed(0)
    x = torch.randn(16, 6)
    model = after_one_batch(nn.Sequential(nn.Linear(6, 8), function, nn.Linear(8, 4)), x)
    tritonq.export_onnx(model, tmp_path / "m.onnx", x[:2])
    report = tritonq.verify(model, tmp_path / "m.onnx", x)
    assert report.agrees(), report
    assert [layer.island for layer in report.layers] == [()] * len(report.layers)


def test_islands_allow_one_code_and_other_layers_none():
    def report(*layers):
        return VerificationReport(layers, OutputComparison(1, 0.0, 1, 0))

    off_by_one, exact = LayerComparison("a", 9, 4, 1, ("Softmax",)), LayerComparison("b", 9, 0, 0)
    assert report(exact, off_by_one).agrees()
    assert "island: Softmax" in str(report(exact, off_by_one))
    assert report(off_by_one, LayerComparison("b", 9, 1, 1)).first_beyond().name == "b"
    assert not report(LayerComparison("a", 9, 1, 2, ("Softmax",))).agrees()


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 4))


class Text(Net):
    def forward(self, x):
        y = self.net(x)
        return {"scores": y, "name": "digits", "threshold": 0.5, "mean": y.mean(), "none": None}


class Named(Net):
    def forward(self, *args, **kwargs):
        return self.net(kwargs["image"])


class Positional(Net):
    def forward(self, *args):
        return self.net(args[0]) + self.net(args[1])


class OneDict(Net):
    def forward(self, batch):
        return self.net(batch["image"])


X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
WEIGHTS = tritonq.get_qconfig("onnxruntime")._replace(activation=nn.Identity)
EXAMPLES = {Text: X, Named: {"image": X}, Positional: (X, X), OneDict: ({"image": X},)}


def prepared(kind, qconfig):
    torch.manual_seed(0)
    example = EXAMPLES[kind]
    model = tritonq.prepare_qat(kind(), qconfig=qconfig, example_inputs=example).train()
    if isinstance(example, dict):
        model(**example)
    else:
        model(*example) if isinstance(example, tuple) else model(example)
    return model.eval(), example


@pytest.mark.parametrize("kind", EXAMPLES, ids=lambda kind: kind.__name__)
def test_any_forward_and_any_result(kind, tmp_path):
    model, example = prepared(kind, tritonq.get_qconfig("onnxruntime"))
    tritonq.export_onnx(model, tmp_path / "m.onnx", example)
    if kind is Text:
        with pytest.warns(UserWarning, match="None in the place of text"):
            tritonq.export_program(model, tmp_path / "m.pt2", example)
    else:
        tritonq.export_program(model, tmp_path / "m.pt2", example)
    for form in (tritonq.convert(model), tmp_path / "m.onnx", tmp_path / "m.pt2"):
        report = tritonq.verify(model, form, [example, example])
        assert report.agrees(), report
        assert len(report.layers) >= 3
        assert report.outputs.elements >= 32
        assert report.outputs.largest < 1e-5


def test_weights_alone(tmp_path):
    model, x = prepared(Text, WEIGHTS)
    with pytest.warns(UserWarning, match=r"in float: net\.0"):
        tritonq.export_onnx(model, tmp_path / "m.onnx", x)
    with pytest.warns(UserWarning, match="None in the place of text"):
        program = tritonq.export_program(model, None, x)
    for form in (tritonq.convert(model), tmp_path / "m.onnx", program):
        report = tritonq.verify(model, form, x)
        assert (report.layers, report.outputs.elements) == ((), 17)
        assert report.outputs.largest < 1e-5


@pytest.mark.filterwarnings("ignore:ONNX Runtime convolves")
def test_a_file_of_another_model_is_refused(tmp_path):
    """One without quantizers, too."""
    tritonq.export_onnx(prepared(Text, WEIGHTS)[0], tmp_path / "m.onnx", X)
    with pytest.raises(ValueError, match="has no quantizer"):
        tritonq.verify(trained_residual(), tmp_path / "m.onnx", images(2))
