"""Models whose code asks whether it is being exported, and does something else then than preparation saw.

And arguments and results in containers of other kinds than tuples, lists and dicts.
"""

from collections import OrderedDict
from dataclasses import dataclass
from typing import NamedTuple

import onnx
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import tritonq
from qat_models import after_one_batch

X = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Block(nn.Module):
    """Attends, behind a mask where it is given one; its forward becomes a graph without."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x, mask=None):
        y = self.linear(x)
        return F.scaled_dot_product_attention(y, y, y, attn_mask=mask) + x


class Asking(nn.Module):
    """As transformers' encoders: a mask that hides nothing is left out, but not in a graph."""

    def __init__(self, hides):
        super().__init__()
        self.block, self.head, self.hides = Block(), nn.Linear(8, 4), hides

    def forward(self, x):
        mask = torch.zeros(5, 5) if torch.compiler.is_exporting() or (self.hides and x.shape[0] == 2) else None
        return self.head(self.block(x, mask))


def test_it_is_traced_as_it_runs(tmp_path):
    torch.manual_seed(0)
    x = torch.randn(4, 5, 8)
    qat = tritonq.prepare_qat(Asking(False), example_inputs=x)
    qat.train()(x).square().mean().backward()
    for dynamic in (False, True):
        tritonq.export_onnx(qat.eval(), tmp_path / "model.onnx", x, dynamic_batch=dynamic)
        assert tritonq.verify(qat, tmp_path / "model.onnx", [x]).agrees()


def test_an_argument_that_really_changed_is_told(tmp_path):
    x = torch.randn(4, 5, 8)
    qat = after_one_batch(Asking(True), x)
    with pytest.raises(ValueError, match=r"can't be exported: .*Block.forward argument mask was None"):
        tritonq.export_onnx(qat, tmp_path / "model.onnx", x[:2], dynamic_batch=False)


@dataclass
class Scores:
    of_all: torch.Tensor
    of_each: torch.Tensor


class Scoring(nn.Module):
    """Returns a class that torch.export was not told of."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x):
        y = self.conv(x)
        return Scores(y.mean((1, 2, 3)), y)


def test_a_result_of_any_dataclass_is_written(tmp_path):
    torch.manual_seed(0)
    x = torch.randn(2, 3, 8, 8)
    qat = tritonq.prepare_qat(Scoring(), example_inputs=x)
    qat.train()(x).of_each.square().mean().backward()
    path = tmp_path / "model.onnx"
    tritonq.export_onnx(tritonq.convert(qat), path, x)
    assert [item.name for item in onnx.load(path).graph.output] == ["of_all", "of_each"]
    assert tritonq.verify(qat.eval(), path, [x]).agrees()


class Pair(NamedTuple):
    left: torch.Tensor
    right: torch.Tensor


class OfBoth(nn.Module):
    """Reads two tensors of one argument by their names."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, pair):
        left, right = (pair.left, pair.right) if isinstance(pair, Pair) else (pair["left"], pair["right"])
        return self.conv(left) + self.conv(right)


@pytest.mark.parametrize("kind", [Pair, dict, OrderedDict])
@pytest.mark.parametrize("batch", [1, 3])
def test_an_argument_that_holds_tensors_by_name(kind, batch, tmp_path):
    torch.manual_seed(0)
    example = (kind(left=torch.randn(batch, 3, 8, 8), right=torch.randn(batch, 3, 8, 8)),)
    qat = tritonq.prepare_qat(OfBoth(), example_inputs=example)
    qat.train()(*example).square().mean().backward()
    path, more = tmp_path / "model.onnx", (kind(left=torch.randn(5, 3, 8, 8), right=torch.randn(5, 3, 8, 8)),)
    tritonq.export_onnx(qat.eval(), path, example)
    assert tritonq.verify(qat, path, [more]).agrees()
    program = tritonq.deploy.export_program(qat, None, example)
    assert tritonq.verify(qat, program, [more]).agrees()


class Named(nn.Module):
    """Returns its results under names that inner tensors have, or that become one."""

    def __init__(self, *names):
        super().__init__()
        self.first, self.second, self.names = nn.Linear(4, 4), nn.Linear(4, 4), names

    def forward(self, x):
        x = self.first(x)
        results = (self.second(x), self.second(x * 2), self.second(x * 3))
        return dict(zip(self.names, results, strict=True))


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (("linear", "linear_1", "y"), ["output_linear", "output_linear_1", "y"]),
        (("a.b", "a_b", "a-b"), ["a_b", "output_a_b", "output_output_a_b"]),
    ],
)
def test_outputs_have_names_of_their_own(names, expected, tmp_path):
    torch.manual_seed(0)
    x = torch.randn(4, 4)
    model = after_one_batch(Named(*names), x)
    tritonq.export_onnx(model, tmp_path / "m.onnx", x)
    assert [output.name for output in onnx.load(tmp_path / "m.onnx").graph.output] == expected
    assert tritonq.verify(model, tmp_path / "m.onnx", x).outputs.differing_integers == 0


class ByAnyName(nn.Module):
    """Takes tensors by names that its own parameters for all others have."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, *args, **kwargs):
        return self.first(kwargs["kwargs"]) + self.second(kwargs["args"])


def test_arguments_called_as_the_parameters_for_all_others(tmp_path):
    torch.manual_seed(0)
    example = {"kwargs": torch.randn(3, 4), "args": torch.randn(3, 4)}
    qat = tritonq.prepare_qat(ByAnyName(), example_inputs=example)
    qat.train()(**example).square().mean().backward()
    tritonq.export_onnx(qat.eval(), tmp_path / "m.onnx", example)
    assert [value.name for value in onnx.load(tmp_path / "m.onnx").graph.input] == ["kwargs", "args"]
    assert tritonq.verify(qat, tmp_path / "m.onnx", example).agrees()
    assert tritonq.verify(qat, tritonq.deploy.export_program(qat, None, example), example).agrees()


class _KeepsActivations(nn.Module):
    """Keeps results of its layers, as many models do to look at them later; torch refuses to copy such tensors."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 1)

    def forward(self, x):
        self.hidden = torch.relu(self.first(x))
        self.all = [self.hidden]
        return self.second(self.hidden)


@pytest.mark.parametrize(
    "export",
    [
        lambda model, path: tritonq.export_onnx(model, path / "model.onnx", X),
        lambda model, path: tritonq.deploy.export_encodings(model, path / "model.onnx", X),
        lambda model, path: tritonq.deploy.export_program(model, path / "model.pt2", X),
    ],
    ids=["onnx", "encodings", "program"],
)
@pytest.mark.filterwarnings("ignore:The tensor attributes:UserWarning")  # torch.export's own
def test_models_that_keep_activations(export, tmp_path):
    model = tritonq.prepare_qat(_KeepsActivations(), example_inputs=X).train()
    model(X)
    converted = tritonq.convert(model.eval())
    converted.hidden = model(X)  # as it is after a run with layers in float
    export(converted, tmp_path)


def test_fixed_point_networks_that_keep_activations():
    model = tritonq.prepare_qat(_KeepsActivations(), qconfig=tritonq.get_qconfig("f8net"), example_inputs=X).train()
    model(X)
    expected = model.eval()(X)
    assert torch.equal(tritonq.convert(model)(X), expected)


class Swapped(nn.Module):
    """Returns tensors under keys that torch gives each other's tensors."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 4)

    def forward(self, x):
        y = self.linear(x)
        return {"exp": y.cos(), "cos": y.exp(), "again": x}


def test_a_key_may_be_the_name_of_a_later_output(tmp_path):
    x = torch.randn(4, 8)
    qat = after_one_batch(Swapped(), x)
    tritonq.export_onnx(qat, tmp_path / "model.onnx", x)
    names = [value.name for value in onnx.load(tmp_path / "model.onnx").graph.output]
    assert names[:2] == ["exp", "cos"]
    assert tritonq.verify(qat, tmp_path / "model.onnx", [x]).agrees()
