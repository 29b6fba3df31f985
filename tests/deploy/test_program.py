"""Programs of ``torch.export``: the converted model's outputs, bit for bit, from a process that knows nothing of it."""

from __future__ import annotations

import subprocess
import sys
from typing import NamedTuple

import pytest
import torch
from torch import nn

import tritonq
from full_disk import growing_no_further_than
from qat_models import PRESETS, FloatResidual, after_one_batch, images, trained_float_form, trained_residual
from tritonq.deploy import export_program
from vision_models import transformers_resnet


@pytest.mark.parametrize("preset", ["tensorrt", "fbgemm_v0", "megengine_min_max"])
@pytest.mark.parametrize("make", [trained_residual, trained_float_form])
def test_it_computes_what_the_converted_model_does(make, preset, tmp_path):
    model, path = make(preset), tmp_path / "m.pt2"
    converted = tritonq.convert(model)
    returned = export_program(model, path, images(2))
    loaded = torch.export.load(path)
    for size in (1, 2, 17):
        x = images(size, seed=size)
        expected = converted(x)
        assert torch.equal(loaded.module()(x), expected)
        assert torch.equal(returned.module()(x), expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(loaded.module()(x), expected)


def test_weights_are_integers_and_operators_are_pytorchs():
    program = export_program(tritonq.convert(trained_residual()), None, images(1))
    targets = [str(node.target) for module in program.graph_module.modules() for node in module.graph.nodes]
    assert any("conv2d" in target for target in targets)
    assert not [target for target in targets if "tritonq" in target]
    weights = [value for name, value in program.state_dict.items() if name.endswith(".weight")]
    assert len(weights) == 4
    assert {weight.dtype for weight in weights} == {torch.int8}


def test_a_list_is_positional_arguments_as_it_is_to_prepare_qat():
    converted, x = tritonq.convert(trained_residual()), images(2)
    program = export_program(converted, None, [x], dynamic_batch=False)
    assert torch.equal(program.module()(x), converted(x))


def test_a_full_disk_is_an_error_of_the_system(tmp_path):
    with growing_no_further_than(1000), pytest.raises(OSError, match="File too large"):
        export_program(tritonq.convert(trained_residual()), tmp_path / "m.pt2", images(2))
    assert not list(tmp_path.iterdir())


def test_another_process_needs_neither_tritonq_nor_the_model(tmp_path):
    model, x = trained_residual(), images(3)
    export_program(model, tmp_path / "m.pt2", images(2))
    torch.save((x, tritonq.convert(model)(x)), tmp_path / "data.pt")
    code = """
import sys, torch
x, expected = torch.load(sys.argv[2])
found = torch.export.load(sys.argv[1]).module()(x)
assert torch.equal(found, expected), "the outputs differ"
assert "tritonq" not in sys.modules
"""
    paths = [str(tmp_path / name) for name in ("m.pt2", "data.pt")]
    result = subprocess.run(
        [sys.executable, "-I", "-c", code, *paths], capture_output=True, text=True, check=False, timeout=120
    )
    assert result.returncode == 0, result.stderr


def test_a_library_model():
    torch.manual_seed(0)
    x = torch.randn(4, 3, 32, 32)
    converted = tritonq.convert(after_one_batch(transformers_resnet(), x))
    assert torch.equal(export_program(converted, None, x[:1]).module()(x).logits, converted(x).logits)


def test_named_inputs_and_a_fixed_batch():
    model = trained_float_form()
    expected = tritonq.convert(model)(images(5))
    assert torch.equal(export_program(model, None, {"x": images(2)}).module()(x=images(5)), expected)
    fixed = export_program(model, None, images(2), dynamic_batch=False).module()
    with pytest.raises(Exception, match="to be equal to 2"):
        fixed(images(5))


def test_embeddings():
    torch.manual_seed(0)
    codes = torch.tensor([[1, 2], [3, 6]])
    converted = tritonq.convert(after_one_batch(nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 2)), codes))
    assert torch.equal(export_program(converted, None, codes).module()(codes), converted(codes))


def test_verify_compares_it_code_for_code(tmp_path):
    """The file and the program, for each rounding."""
    for preset in ("tensorrt", "fbgemm_v0", "megengine_min_max"):
        model, path = trained_float_form(preset), tmp_path / "m.pt2"
        program = export_program(model, path, images(2))
        data = [images(8), images(3, seed=5)]
        reference = tritonq.verify(model, tritonq.convert(model), data)
        for deployed in (path, str(path), program):
            report = tritonq.verify(model, deployed, data)
            assert report.agrees()
            assert report == reference
            assert report.total.codes > 10_000


@pytest.mark.parametrize("form", ["integers", "pt2e"])
def test_verify_names_the_first_layer_of_a_program_that_differs(form):
    model = trained_residual()
    program = export_program(model, None, images(2), form=form)
    program.state_dict["depthwise.weight"].view(-1)[0] += 40
    report = tritonq.verify(model, program, images(8))
    assert report.first_difference is not None
    assert report.first_difference.name == "depthwise"
    assert not report.agrees()


class Twice(nn.Module):
    """A layer that runs twice."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(torch.relu(self.layer(x)))


def test_verify_counts_the_calls_of_a_layer():
    torch.manual_seed(0)
    x = torch.randn(4, 6)
    model = after_one_batch(Twice(), x)
    converted = tritonq.convert(model)
    report = tritonq.verify(model, export_program(converted, None, x), x)
    assert report == tritonq.verify(model, converted, x)
    assert report.agrees()


def test_verify_refuses_what_is_no_such_program(tmp_path):
    model, path = trained_float_form(), tmp_path / "m.pt2"
    path.write_bytes(b"not a program")
    with pytest.raises(ValueError, match=r"m\.pt2 is not a program of torch\.export"):
        tritonq.verify(model, path, images(2))
    with pytest.raises(FileNotFoundError):
        tritonq.verify(model, tmp_path / "none.pt2", images(2))
    with pytest.raises(ValueError, match="has no quantizer"):
        tritonq.verify(model, torch.export.export(nn.ReLU(), (images(2),)), images(2))
    with pytest.raises(ValueError, match=r"lacks the quantizer|a quantizer"):
        tritonq.verify(model, export_program(trained_residual(), None, images(2)), images(2))
    with pytest.raises(ValueError, match="takes arguments of the structure"):
        tritonq.verify(model, export_program(model, None, images(2)), [{"x": images(2)}])


class Branching(FloatResidual):
    """Looks at its data, which no graph can."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = super().forward(x)
        return y if y.sum() < 1e9 else -y


def test_what_cannot_be_exported_says_so_and_leaves_no_file(tmp_path):
    torch.manual_seed(0)
    model = after_one_batch(Branching(), images(4), qconfig=PRESETS["tensorrt"])
    with pytest.raises(ValueError, match="Branching can't be exported"):
        export_program(model, tmp_path / "m.pt2", images(2))
    with pytest.raises(ValueError, match="no quantization-aware layer"):
        export_program(FloatResidual(), tmp_path / "m.pt2", images(2))
    with pytest.raises(ValueError, match="no tensor with a batch axis"):
        export_program(trained_residual(), tmp_path / "m.pt2", torch.tensor(1.0))
    fixed = after_one_batch(FloatResidual(), images(4), qconfig=tritonq.get_qconfig("f8net"))
    with pytest.raises(ValueError, match=r"has no form in a program of torch\.export"):
        export_program(fixed, tmp_path / "m.pt2", images(2))
    assert not list(tmp_path.iterdir())


class Scores(NamedTuple):
    scores: torch.Tensor


class Named(nn.Sequential):
    def forward(self, x):
        return Scores(super().forward(x))


def test_a_result_that_torch_cannot_save_is_refused_in_one_line(tmp_path):
    model = tritonq.prepare_qat(Named(nn.Linear(4, 2)), example_inputs=torch.randn(2, 4)).train()
    model(torch.randn(2, 4))
    with pytest.raises(ValueError, match=r"the program of Named can't be saved: .*Scores"):
        tritonq.export_program(model.eval(), tmp_path / "model.pt2", torch.randn(2, 4))
    assert not list(tmp_path.iterdir())
    assert tritonq.export_program(model, None, torch.randn(2, 4)).module()(torch.ones(1, 4)).scores.shape == (1, 2)
