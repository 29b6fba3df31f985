"""Quantizers of accelerated models: their hooks and those of their observers, and the switch of a grid."""

import copy

import pytest
import torch
from torch import nn
from torch.ao import quantization as ao

import tritonq
from tolerances import SUMS, assert_close
from torch_ao_nets import prepared
from tritonq.acceleration.quantizers import marked
from tritonq.grid import Grid
from tritonq.quantized_type import QINT8

pytestmark = pytest.mark.filterwarnings("ignore")
X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
KINDS = ["register_forward_pre_hook", "register_forward_hook", "register_full_backward_hook"]


def counted(model: nn.Module, kind: str, place: str) -> list[str]:
    """Put a hook on each quantizer or observer, and return the list to which each call adds the module's name."""
    calls: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, ao.FakeQuantize) and not isinstance(module, ao.FusedMovingAvgObsFakeQuantize):
            target = module if place == "quantizer" else module.activation_post_process
            getattr(target, kind)(lambda *args, name=name: calls.append(name))
    return calls


@pytest.mark.parametrize("when", ["before", "afterwards"])
@pytest.mark.parametrize(
    ("kind", "place"), [*((kind, "quantizer") for kind in KINDS), *((kind, "observer") for kind in KINDS[:2])]
)
def test_every_hook_is_called(kind: str, place: str, when: str) -> None:
    theirs = prepared(ao.get_default_qat_qconfig("x86", version=0))
    ours = copy.deepcopy(theirs)
    expected = counted(theirs, kind, place)
    if when == "before":
        calls = counted(ours, kind, place)
        ours = tritonq.accelerate(ours, inplace=True)
    else:
        ours = tritonq.accelerate(ours, inplace=True)
        calls = counted(ours, kind, place)
    results = []
    for model in (theirs, ours):
        results.append(model(X))
        results[-1].square().mean().backward()
    assert_close(*results, SUMS)
    assert expected
    assert sorted(calls) == sorted(expected)


@pytest.mark.parametrize("enabled", [None, 0, 1])
def test_float64_values_are_rounded_to_float32_unless_the_grid_is_off(enabled: int | None) -> None:
    y = torch.tensor([0.1, -3.3], dtype=torch.float64)
    switch = None if enabled is None else torch.tensor([enabled], dtype=torch.uint8)
    expected = y if enabled == 0 else y.float().double()
    assert torch.equal(marked(y, Grid(torch.ones(1), None, QINT8, switch)), expected)
