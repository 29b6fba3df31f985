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


def test_only_the_wrapper_of_torch_compile_counts_as_one():
    class Holder(nn.Module):
        def __init__(self):
            super().__init__()
            self._orig_mod, self.head = conv(), conv()

        def forward(self, x):
            return self.head(self._orig_mod(x))

    prepared = tritonq.prepare_qat(Holder(), example_inputs=X)
    assert isinstance(prepared, Holder)
    assert isinstance(prepared._orig_mod, qnn.Conv2d)
    compiled = model()
    compiled.compile(backend="eager")
    assert tritonq.prepare_qat(compiled, example_inputs=X)._compiled_call_impl is None


class Gate(nn.Module):
    """Reads a tensor twice, with weights of its own."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = conv(), nn.BatchNorm2d(4)

    def forward(self, x):
        return torch.sigmoid(self.norm(self.conv(x))) * x


class Scripted(nn.Module):
    def __init__(self, gate):
        super().__init__()
        self.stem, self.gate, self.head = conv(), gate, conv()

    def forward(self, x):
        return self.head(torch.relu(self.gate(x=self.stem(x))))


@pytest.mark.parametrize("compiler", ["script", "trace"])
def test_scripted_parts_run_in_float_and_are_told(compiler, tmp_path):
    gate = Gate()
    example = torch.randn(X.shape[0], 4, *X.shape[2:])
    gate = torch.jit.script(gate) if compiler == "script" else torch.jit.trace(gate, example)
    float_model = Scripted(gate).train()
    hooks = len(torch.nn.modules.module._global_forward_hooks_with_kwargs)
    with pytest.warns(UserWarning, match=r"layers and joins of Scripted in float: gate: torch\.jit made it"):
        prepared = tritonq.prepare_qat(float_model, example_inputs=X)
    assert len(torch.nn.modules.module._global_forward_hooks_with_kwargs) == hooks
    assert prepared.gate.training
    rows = {row.name: row.status for row in tritonq.summary(prepared).layers}
    assert list(rows)[:2] == ["stem", "gate"]
    assert rows["stem"] == rows["head"] == "quantized"
    assert rows["gate"] == "float"
    assert not any(name.startswith("gate.") for name in rows)
    prepared(X).sum().backward()
    assert all(parameter.grad is not None for parameter in prepared.parameters())
    converted = tritonq.convert(prepared.eval())
    tritonq.save_converted(converted, tmp_path / "model.pt")
    loaded = tritonq.load_converted(tmp_path / "model.pt", Scripted(gate))
    assert torch.equal(converted(X), prepared(X))
    assert torch.equal(loaded(X), prepared(X))
