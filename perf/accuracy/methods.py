"""Ways to quantize for so many bits, all with first and last layer's weights and the input at 8 bits."""

from __future__ import annotations

from collections.abc import Callable

import torch

import tritonq
from tritonq.qconfig import QConfig, learned_step_qconfig
from tritonq.qparams import QuantizedType

_STEP = tritonq.LearnedStepFakeQuantize.with_args(init="lsq")


def _ranges(weights: int, activations: int) -> QConfig:
    """Running ranges: torch.ao's scheme at any width, as tritonq's default preset has them."""
    default = tritonq.get_qconfig()
    return default._replace(
        activation=default.activation.with_args(dtype=_unsigned(activations)),  # type: ignore[attr-defined]
        weight=default.weight.with_args(  # type: ignore[attr-defined]
            dtype=QuantizedType.of(weights, narrow=True, axis=0), qscheme=torch.per_channel_symmetric
        ),
        round_summands=False,
    )


def _learned_offset(weights: int, activations: int) -> QConfig:
    """LSQ+: a trained zero point of activations too."""
    step = _STEP.with_args(dtype=_unsigned(activations), learn_zero_point=True)
    return learned_step_qconfig(weights, activations)._replace(activation=step)


def _folded(weights: int, activations: int) -> QConfig:
    """LSQ whose weights are rounded after the BatchNorm is folded in, as torch.ao folds it."""
    return learned_step_qconfig(weights, activations)._replace(folding="approximate")


def _summands(weights: int, activations: int) -> QConfig:
    """LSQ with a quantizer before each addition too."""
    return learned_step_qconfig(weights, activations)._replace(round_summands=True)


def _unsigned(bits: int) -> QuantizedType:
    return QuantizedType.of(bits, signed=False, symmetric=False)


METHODS: dict[str, Callable[[int, int], QConfig]] = {
    "lsq": learned_step_qconfig,
    "lsq_plus": _learned_offset,
    "lsq_folded": _folded,
    "lsq_round_summands": _summands,
    "ranges": _ranges,
}


def mapping_of(method: str, weights: int, activations: int) -> tritonq.QConfigMapping:
    """Return the mapping of a method at so many bits."""
    inner, eight = METHODS[method](weights, activations), tritonq.get_qconfig()
    first = inner._replace(weight=eight.weight, folding=None)
    return tritonq.QConfigMapping().set_global(inner).set_first_layer(first).set_last_layer(eight).set_input(eight)
