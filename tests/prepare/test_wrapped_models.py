"""Models that others wrapped before or after preparation: torch.compile, accelerate's autocast."""

import types

import pytest
import torch
from torch import nn

import tritonq
from prepared_nets import X, conv
from tritonq import nn as qnn


def model():
    return nn.Sequential(conv(), nn.ReLU(), nn.Sequential(conv(), nn.ReLU()))


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.filterwarnings("ignore:no training step reached")
def test_compiled_models_and_parts_are_prepared_as_what_is_inside(inplace):
    plain = model().train()
    whole = torch.compile(plain, backend="eager")
    prepared = tritonq.prepare_qat(whole, inplace=inplace, example_inputs=X)
    assert (prepared is plain) == inplace
    assert isinstance(prepared[0], qnn.ConvReLU2d)
    parts = model().train()
    parts[2] = torch.compile(parts[2], backend="eager")
    prepared = tritonq.prepare_qat(parts, inplace=inplace, example_inputs=X)
    assert isinstance(prepared[2][0], qnn.ConvReLU2d)
    assert isinstance(parts[2], nn.Sequential) == inplace
    again = torch.compile(prepared, backend="eager")
    again(X).sum().backward()
    assert tritonq.verify(again, tritonq.convert(again.eval()), X).agrees()


def test_export_names_autocast_around_a_forward(tmp_path):
    prepared = tritonq.prepare_qat(model().train(), example_inputs=X)
    prepared.forward = types.MethodType(torch.autocast("cpu", torch.bfloat16)(prepared.forward.__func__), prepared)
    prepared(X).float().sum().backward()
    with pytest.raises(ValueError, match="forward of 'Sequential' is wrapped in autocast"):
        tritonq.export_onnx(tritonq.convert(prepared.eval()), tmp_path / "model.onnx", X)
