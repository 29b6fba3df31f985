"""Which quantizer a tensor gets that no layer returns: heads in float, inputs, and additions of unrounded results."""

import pytest
import torch
from torch import nn

import tritonq
from prepared_nets import quantizers
from tritonq.deploy.modules import QuantizedLayer

EIGHT = tritonq.get_qconfig()
FOUR = tritonq.QConfig(
    tritonq.FakeQuantize.with_args(dtype="quint4"), EIGHT.weight.with_args(dtype="qint4"), "onnxruntime"
)
FLOAT_OUT = EIGHT._replace(activation=nn.Identity)
X = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(1))


class Net(nn.Module):
    """One residual block with a projection, a pool, a function and a head."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.main = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8))
        self.side = nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        x = self.stem(x)
        x = torch.relu(self.main(x) + self.side(x))
        return self.head(self.pool(x).flatten(1))


def prepared(mapping):
    torch.manual_seed(0)
    return tritonq.prepare_qat(Net(), qconfig=mapping, example_inputs=X)


def bits(model):
    return {name: quantizer.qtype.bits for name, quantizer in quantizers(model).items()}


def deployed(model):
    model.train()(X)
    converted = tritonq.convert(model.eval())
    report = tritonq.verify(model, converted, X)
    assert report.agrees()
    assert report.outputs.largest == 0
    return converted


@pytest.mark.parametrize("last", [FLOAT_OUT, FOUR._replace(activation=nn.Identity)])
def test_a_head_with_float_logits_reads_its_features_on_a_grid(last):
    mapping = tritonq.QConfigMapping().set_global(EIGHT).set_last_layer(last)
    model = prepared(mapping)
    assert bits(model)["pool.activation_post_process"] == 8
    head = deployed(model).head
    assert head.multiplier is not None
    assert isinstance(head.activation_post_process, nn.Identity)


def test_a_first_layer_with_float_results_reads_the_input_on_a_grid():
    model = prepared(tritonq.QConfigMapping().set_global(FOUR).set_first_layer(FLOAT_OUT))
    assert bits(model)["stem.0.input_fake_quant"] == 4
    assert deployed(model).stem[0].multiplier is not None


def test_a_model_without_activation_quantizers_gets_none_and_its_summary_says_so():
    model = prepared(tritonq.QConfigMapping().set_global(FLOAT_OUT))
    assert quantizers(model) == {}
    assert all("x float" in row.grid for row in tritonq.summary(model).quantized if row.kind == "Conv2d")
    assert deployed(model).head.multiplier is None


def test_inputs_have_a_rule_of_their_own(tmp_path):
    mapping = tritonq.QConfigMapping().set_global(FOUR).set_input(EIGHT)
    found = bits(prepared(mapping))
    assert found.pop("stem.0.input_fake_quant") == 8
    assert set(found.values()) == {4}
    tritonq.save_qconfig_mapping(mapping, tmp_path / "q.json")
    assert tritonq.load_qconfig_mapping(tmp_path / "q.json") == mapping
    assert mapping != tritonq.QConfigMapping().set_global(FOUR)


def test_inputs_that_are_left_in_float():
    model = prepared(tritonq.QConfigMapping().set_global(FOUR).set_input(None))
    assert "stem.0.input_fake_quant" not in bits(model)
    assert "x float" in {row.name: row.grid for row in tritonq.summary(model).layers}["stem.0"]
    assert deployed(model).stem[0].multiplier is None


def test_a_rule_for_inputs_needs_a_run():
    model = nn.Sequential(nn.Conv2d(3, 4, 1))
    mapping = tritonq.QConfigMapping().set_global(EIGHT).set_input(EIGHT)
    with pytest.raises(ValueError, match="pass example_inputs"):
        tritonq.prepare_qat(model, qconfig=mapping)
    fixed = tritonq.QConfigMapping().set_global(tritonq.get_qconfig("f8net")).set_input(EIGHT)
    with pytest.raises(ValueError, match="leave set_input out"):
        tritonq.prepare_qat(model, qconfig=fixed, example_inputs=X)


def test_summands_are_rounded_behind_the_addition_alone(tmp_path):
    before = prepared(tritonq.QConfigMapping().set_global(EIGHT))
    behind = prepared(tritonq.QConfigMapping().set_global(EIGHT._replace(round_summands=False)))
    gone = set(bits(before)) - set(bits(behind))
    assert gone == {"main.0.activation_post_process", "side.0.activation_post_process"}
    model = deployed(behind)
    assert all(layer.multiplier is not None for layer in model.modules() if isinstance(layer, QuantizedLayer))
    tritonq.export_onnx(model, tmp_path / "m.onnx", example_inputs=X)
    assert tritonq.verify(model, tmp_path / "m.onnx", X).agrees()


def test_a_summand_that_others_read_is_rounded():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = (nn.Conv2d(3, 3, 1) for _ in range(3))

        def forward(self, x):
            y = self.a(x)
            return self.c(self.b(y) + y)

    model = tritonq.prepare_qat(Twice(), qconfig=EIGHT._replace(round_summands=False), example_inputs=X)
    assert set(bits(model)) == {f"{name}.activation_post_process" for name in ("a", "c", "add")} | {
        "a.input_fake_quant"
    }


@pytest.mark.parametrize(
    ("field", "value", "written", "wrong", "message"),
    [
        ("round_summands", False, "false", '"no"', "must be true or false"),
        ("islands", "rounded", '"rounded"', '"sunk"', "must be null or one of float, rounded"),
    ],
)
def test_a_file_keeps_where_tensors_are_rounded(field, value, written, wrong, message, tmp_path):
    mapping = tritonq.QConfigMapping().set_global(FOUR._replace(**{field: value}))
    tritonq.save_qconfig_mapping(mapping, tmp_path / "q.json")
    assert tritonq.load_qconfig_mapping(tmp_path / "q.json") == mapping
    (tmp_path / "q.json").write_text((tmp_path / "q.json").read_text().replace(written, wrong))
    with pytest.raises(ValueError, match=f"{field} of global {message}"):
        tritonq.load_qconfig_mapping(tmp_path / "q.json")
