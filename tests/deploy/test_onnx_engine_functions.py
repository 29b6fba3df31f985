"""Functions that are one operator of ONNX Runtime are written as that, where its codes are the trained ones."""

import onnx
import pytest
import torch
from torch import nn

import tritonq
from qat_models import after_one_batch
from tritonq.deploy import onnx_functions

KINDS = {
    "QuickGelu": (nn.SiLU(), {"Sigmoid"}),
    "Gelu": (nn.GELU(), {"Erf"}),
    "FastGelu": (nn.GELU("tanh"), {"Tanh"}),
}


def trained(function):
    torch.manual_seed(0)
    x = torch.randn(4, 3, 6, 6)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), function, nn.Conv2d(8, 2, 1))
    return after_one_batch(net, x), x


def kinds_in(path):
    return {node.op_type for node in onnx.load(path).graph.node}


@pytest.mark.parametrize("operator", KINDS)
def test_one_operator_computes_the_trained_codes(operator, tmp_path):
    function, composed = KINDS[operator]
    model, x = trained(function)
    tritonq.export_onnx(model, tmp_path / "m.onnx", x)
    assert operator in kinds_in(tmp_path / "m.onnx")
    assert not kinds_in(tmp_path / "m.onnx") & {*composed, "Gather"}
    assert tritonq.verify(model, tmp_path / "m.onnx", x).total.differing == 0


@pytest.mark.parametrize(("wrong", "kept"), [({"QuickGelu"}, "Sigmoid"), ({"QuickGelu", "Sigmoid"}, "Gather")])
def test_where_its_codes_differ_the_standard_operators_or_a_table_stay(wrong, kept, tmp_path, monkeypatch):
    model, x = trained(nn.SiLU())
    run = onnx_functions.run_function

    def run_otherwise(source, result, nodes, constants, count):
        return run(source, result, nodes, constants, count) ^ any(node.op_type in wrong for node in nodes)

    monkeypatch.setattr(onnx_functions, "run_function", run_otherwise)
    tritonq.export_onnx(model, tmp_path / "m.onnx", x)
    assert kept in kinds_in(tmp_path / "m.onnx")
    assert not kinds_in(tmp_path / "m.onnx") & wrong
    assert tritonq.verify(model, tmp_path / "m.onnx", x).total.differing == 0


def test_other_targets_hold_the_standard_alone(tmp_path):
    model, x = trained(nn.SiLU())
    tritonq.export_onnx(model, tmp_path / "m.onnx", x, target="qdq")
    assert {entry.domain for entry in onnx.load(tmp_path / "m.onnx").opset_import} == {""}
