"""Schemes of few bits from papers: DoReFa-Net, binary and ternary weights, and trained numbers of bits."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor, nn

import tritonq
from tritonq.perf.accuracy.methods import MakeQConfig, prepared
from tritonq.perf.accuracy.request import FurtherLoss, Method
from tritonq.qconfig import QConfig, learned_step_qconfig

# What the loss grows by where weights take twice the bytes that are wanted.
_SIZE_PENALTY = 3.0


def _dorefa(weights: int, activations: int) -> QConfig:
    return tritonq.get_qconfig(f"dorefa_w{weights}a{activations}")


def _binary(weights: int, activations: int) -> QConfig:
    return tritonq.get_qconfig("bwn_w1a8")


def _ternary(weights: int, activations: int) -> QConfig:
    return tritonq.get_qconfig("twn_w2a8")


def _trained_bits(weights: int, activations: int) -> QConfig:
    """Return the qconfig of weights with trained numbers of bits, and LSQ's activations.

    The numbers begin one above ``weights``.
    """
    weight = tritonq.LearnedBitsFakeQuantize.with_args(initial_bits=weights + 1.0)
    return learned_step_qconfig(weights, activations)._replace(weight=weight)


def _hold_size(model: nn.Module, float_model: nn.Module) -> FurtherLoss:
    """Return a loss that makes the weights have one bit less, on average, than they begin with."""
    begin = next(part.bits.item() for part in model.modules() if isinstance(part, tritonq.LearnedBitsFakeQuantize))
    wanted = tritonq.learned_size(model).detach() * (1 - 1 / begin)

    def penalty(outputs: Tensor, images: Tensor) -> Tensor:
        return _SIZE_PENALTY * (tritonq.learned_size(model) / wanted - 1).abs()

    return penalty


def _scheme(make: MakeQConfig, differs: str, *widths: tuple[int, int], holds_size: bool = False) -> Method:
    made = Method("tritonq", prepared(make), widths=widths, distributions=("tritonq",), differs=differs)
    if not holds_size:
        return made
    return replace(made, revision=2, further_loss=_hold_size, end_search=tritonq.fix_learned_bits)


SCHEMES: dict[str, Method] = {
    "DoReFa": _scheme(_dorefa, "DoReFa-Net, from the float model", (2, 2), (4, 4)),
    "BWN": _scheme(_binary, "XNOR-Net's binary weights", (1, 8)),
    "TWN": _scheme(_ternary, "ternary weight networks", (2, 8)),
    "trained bits": _scheme(_trained_bits, "FracBits, of so many bits in the mean", (3, 3), (4, 4), holds_size=True),
}
