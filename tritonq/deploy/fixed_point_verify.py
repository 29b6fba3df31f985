"""Whether a converted fixed-point network computes what was trained: what every layer reads, code for code."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tritonq.deploy.fixed_point_modules import IntegerLayer
from tritonq.deploy.verify import LayerComparison, OutputComparison, VerificationReport
from tritonq.nn.fixed_point import FixedPointLayer
from tritonq.reference.fixed_point import power_of_two


def verify_fixed_point(model: nn.Module, converted: nn.Module, x: Tensor) -> VerificationReport:
    """Run a fixed-point network in eval mode and its converted form on the same input, and compare their codes.

    Args:
        model: the trained network; its mode is afterwards what it was.
        converted: what ``convert`` made of it.
        x: the network's input.

    Raises:
        ValueError: the two have different layers.
    """
    training = model.training
    expected, outputs = _codes(model.eval(), x)
    model.train(training)
    found, results = _codes(converted, x)
    if list(expected) != list(found):
        raise ValueError(f"the networks have different layers: {list(expected)} and {list(found)}")
    layers = []
    for name, codes in expected.items():
        difference = (codes - found[name]).abs()
        layers.append(LayerComparison(name, codes.numel(), int((difference > 0).sum()), int(difference.max())))
    return VerificationReport(tuple(layers), compare_outputs(outputs, results))


def compare_outputs(expected: Tensor, found: Tensor) -> OutputComparison:
    """Two networks' outputs (batch, classes)."""
    predictions = expected.shape[0] if expected.dim() == 2 else 0
    differing = int((expected.argmax(1) != found.argmax(1)).sum()) if predictions else 0
    return OutputComparison(expected.numel(), float((expected - found).abs().max()), predictions, differing)


@torch.no_grad()
def _codes(model: nn.Module, x: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """What every layer reads as integer codes, by name, and the network's output."""
    found: dict[str, Tensor] = {}
    handles = []
    for name, module in model.named_modules():
        if isinstance(module, (FixedPointLayer, IntegerLayer)):

            def keep(module: Any, given: tuple[Tensor, ...], name: str = name) -> None:
                found[name] = _read(module, given[0]).to(torch.int64)

            handles.append(module.register_forward_pre_hook(keep))
    try:
        return found, model(x)
    finally:
        for handle in handles:
            handle.remove()


def _read(module: Any, x: Tensor) -> Tensor:
    if isinstance(module, IntegerLayer):
        return module.input.encode(x) if module.encodes else x
    source = module.input_format
    codes: Tensor = source.quantize(x).double() * power_of_two(source.rounded_frac_len(), torch.float64)
    return codes
