"""A training step asks the device nothing, as a CUDA graph of it demands: shown on tensors that have no values to read.

On the meta device every ``.item()``, ``bool(tensor)`` and ``float(tensor)`` raises. The operators run as their fake
implementations; around them runs the code that runs around kernels, which is chosen by "not on the CPU".
"""

from __future__ import annotations

import warnings
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.trace_rules import get_torch_obj_rule_map

import tritonq
from grids import presets_for_any_width
from qat_models import FloatResidual, images, set_mode
from tritonq import backend
from tritonq.fake_quantize_base import FakeQuantizeBase
from tritonq.functional import traced
from tritonq.learned_bits import LearnedBitsFakeQuantize

WEIGHT = tritonq.get_qconfig("tensorrt").weight
LEARNED = tritonq.LearnedStepFakeQuantize.with_args
QCONFIGS = {
    **presets_for_any_width(),
    "fbgemm": tritonq.get_default_qat_qconfig("fbgemm"),
    "fbgemm_v0": tritonq.get_default_qat_qconfig("fbgemm", 0),
    "lsq+": tritonq.QConfig(LEARNED(dtype=torch.quint8, learn_zero_point=True), WEIGHT),
    "pact": tritonq.QConfig(tritonq.ClippedFakeQuantize.with_args(dtype="quint8"), WEIGHT),
    "histogram": tritonq.QConfig(tritonq.FakeQuantize.with_args(observer=tritonq.HistogramObserver), WEIGHT),
}


def warmed_up(model: nn.Module) -> nn.Module:
    """``model`` after a step, on the meta device; a captured step too has warm-up steps before it."""
    for module in model.modules():
        if isinstance(module, tritonq.PassiveObserver):
            module.set_qparams(torch.full_like(module.scale, 0.05))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model(images(8)).sum().backward()
    model.zero_grad()
    model.to("meta")
    for module in model.modules():
        if isinstance(module, FakeQuantizeBase):
            # Read once for each time that it is thrown.
            switch = module.fake_quant_enabled
            module._switch_read = ((switch.data_ptr(), switch._version), True)
    return model


def train(model: nn.Module, steps: int = 2) -> None:
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    x, labels = torch.empty(8, 3, 8, 8, device="meta"), torch.empty(8, dtype=torch.int64, device="meta")
    for _ in range(steps):
        optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(model(x), labels).backward()
        optimizer.step()


@pytest.fixture(autouse=True)
def _fake_kernels(monkeypatch):
    def implementation(name, x, choice="auto"):
        """Return the fake operators, or for a family that is never traced what runs on every device."""
        return traced.FAMILIES.get(name) or backend.without_kernel(name, x)

    monkeypatch.setattr(backend, "implementation", implementation)
    # Autocast knows no meta device. Dynamo looks up by name, once, what it knows of torch's functions.
    get_torch_obj_rule_map()
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device_type=None: False)


@pytest.mark.parametrize("mode", ["approximate", "exact", "corrected"])
@pytest.mark.parametrize("name", list(QCONFIGS))
def test_a_training_step_reads_nothing_back(name, mode):
    torch.manual_seed(0)
    model = tritonq.prepare_qat(FloatResidual(), qconfig=QCONFIGS[name], example_inputs=images(2)).train()
    set_mode(model, mode)
    model = warmed_up(model)
    train(model)
    assert all(p.grad is not None and p.grad.is_meta for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("name", list(QCONFIGS))
def test_eval_mode_reads_nothing_back(name, monkeypatch):
    monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: nullcontext())
    torch.manual_seed(0)
    model = tritonq.prepare_qat(FloatResidual(), qconfig=QCONFIGS[name], example_inputs=images(2)).train()
    model = warmed_up(model).eval()
    for module in model.modules():
        if isinstance(module, FakeQuantizeBase):
            # As after the first batch: each is read once.
            module._qparams_known = True
        if isinstance(module, LearnedBitsFakeQuantize):
            module._type_read = (module.bits.data_ptr(), module.bits._version), module._widest
    # The fake operators count as writing what they may write; the test below counts these reads.
    monkeypatch.setattr(tritonq.FakeQuantize, "_follow_average", lambda quantizer: None)
    with torch.no_grad():
        assert model(torch.empty(8, 3, 8, 8, device="meta")).is_meta


@pytest.mark.parametrize("name", list(QCONFIGS))
def test_eval_mode_asks_for_averaged_ranges_once(name, monkeypatch):
    monkeypatch.undo()
    torch.manual_seed(0)
    model = tritonq.prepare_qat(FloatResidual(), qconfig=QCONFIGS[name], example_inputs=images(2)).eval()
    reads = []
    monkeypatch.setattr(tritonq.MinMaxObserver, "has_observed", lambda observer: reads.append(1) or torch.tensor(True))
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model(images(2))
        observed = [m.activation_post_process for m in model.modules() if isinstance(m, tritonq.FakeQuantize)]
        assert reads or not any(isinstance(observer, tritonq.MinMaxObserver) for observer in observed)
        reads.clear()
        model(images(2))
    assert reads == []


def test_reading_is_noticed():
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 10), nn.ReLU()).to("meta")
    train(model)
    model.register_forward_hook(lambda module, inputs, output: output * bool(output.sum() > 0))
    with pytest.raises(RuntimeError, match=r"item\(\) cannot be called on meta tensors"):
        train(model)


def test_launchers_read_nothing_back():
    """What runs in place of the fakes: no call that waits for a device stands in the kernels' folder."""
    folder = Path(tritonq.__file__).parent.parent / "kernels"
    sources = {path.name: path.read_text() for path in folder.glob("*.py")}
    assert len(sources) > 10
    found = [
        (name, call)
        for name, text in sources.items()
        for call in (".item()", ".cpu()", ".synchronize()", ".nonzero()")
        if call in text
    ]
    assert not found
