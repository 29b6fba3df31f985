"""tritonq's methods for so many bits.

In all of them the weights of the first and last layer and the input have 8 bits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import tritonq
from tritonq.perf.accuracy.request import Method, Request
from tritonq.qconfig import QConfig, learned_step_qconfig
from tritonq.quantized_type import QuantizedType

MakeQConfig = Callable[[int, int], QConfig]


def _ranges(weights: int, activations: int) -> QConfig:
    """Return the qconfig of running ranges: torch.ao's scheme at any width, as tritonq's default preset has them."""
    default = tritonq.get_qconfig()
    return default._replace(
        activation=default.activation.with_args(dtype=_unsigned(activations)),  # type: ignore[attr-defined]
        weight=default.weight.with_args(  # type: ignore[attr-defined]
            dtype=QuantizedType.of(weights, narrow=True, axis=0), qscheme=torch.per_channel_symmetric
        ),
        round_summands=False,
    )


RANGES: MakeQConfig = _ranges
LEARNED_STEP: MakeQConfig = learned_step_qconfig


def _learned_offset(weights: int, activations: int) -> QConfig:
    """Return the qconfig of LSQ+, whose activations have a trained zero point.

    First scales have the least squared error.
    """
    step = tritonq.LearnedStepFakeQuantize.with_args(
        observer=tritonq.HistogramObserver.with_args(search="mse"), dtype=_unsigned(activations), learn_zero_point=True
    )
    return learned_step_qconfig(weights, activations)._replace(activation=step)


def _least_error(weights: int, activations: int) -> QConfig:
    """Return the qconfig of LSQ whose scales begin at the least squared error."""
    return learned_step_qconfig(weights, activations, init="mse")


def _folded(weights: int, activations: int) -> QConfig:
    """Return the qconfig of LSQ whose weights are rounded after the BatchNorm is folded in, as torch.ao folds it."""
    return learned_step_qconfig(weights, activations)._replace(folding="approximate")


def _summands(weights: int, activations: int) -> QConfig:
    """Return the qconfig of LSQ with a quantizer before each addition as well."""
    return learned_step_qconfig(weights, activations)._replace(round_summands=True)


def _clipped(weights: int, activations: int) -> QConfig:
    """Return the qconfig of PACT: a trained bound of activations; weights have the range of their values."""
    clip = tritonq.ClippedFakeQuantize.with_args(dtype=_unsigned(activations))
    return _ranges(weights, activations)._replace(activation=clip)


def _thresholds(weights: int, activations: int) -> QConfig:
    """Return the qconfig of TQT: scales ``2^t`` with a trained t; ties go away from zero."""
    threshold = tritonq.TrainedThresholdFakeQuantize
    return learned_step_qconfig(weights, activations)._replace(
        activation=threshold.with_args(dtype=_away(_unsigned(activations))),
        weight=threshold.with_args(dtype=_away(QuantizedType.of(weights, axis=0))),
    )


def _unsigned(bits: int) -> QuantizedType:
    return QuantizedType.of(bits, signed=False, symmetric=False)


def _away(qtype: QuantizedType) -> QuantizedType:
    return QuantizedType(**{**qtype.__dict__, "rounding": "half_away"})


def mapping_of(inner: QConfig) -> tritonq.QConfigMapping:
    """Return a mapping with the qconfig ``inner`` for all layers but the ends; first and last weights have 8 bits.

    The model's input has 8 bits as well.
    """
    eight = tritonq.get_qconfig()
    first = inner._replace(weight=eight.weight, folding=None)
    return tritonq.QConfigMapping().set_global(inner).set_first_layer(first).set_last_layer(eight).set_input(eight)


def prepared(make: MakeQConfig) -> Callable[[Request], nn.Module]:
    """Return a function that prepares the model of a request with the qconfigs that ``make`` makes for its bits."""

    def prepare(request: Request) -> nn.Module:
        mapping = mapping_of(make(request.weights, request.activations))
        return tritonq.prepare_qat(request.model.train(), qconfig=mapping, example_inputs=request.images)

    return prepare


def _fixed_point(request: Request) -> nn.Module:
    """Return the model of a request in fixed point (F8Net); the weights of its first and last layer have 8 bits."""
    number = tritonq.FixedPointFakeQuantize
    inner = QConfig(
        number.with_args(word_len=request.activations, signed=False),
        number.with_args(word_len=request.weights, momentum=1.0),
    )
    eight = inner._replace(weight=number.with_args(word_len=8, momentum=1.0))
    mapping = tritonq.QConfigMapping().set_global(inner).set_first_layer(eight).set_last_layer(eight)
    return tritonq.prepare_qat(request.model.train(), qconfig=mapping, example_inputs=request.images)


def _method(make: Callable[[Request], nn.Module], differs: str = "", **choices: Any) -> Method:
    return Method("tritonq", make, distributions=("tritonq",), differs=differs, **choices)


METHODS: dict[str, Method] = {
    "LSQ": _method(prepared(learned_step_qconfig), "the preset lsq_w…a…", at_all_widths=True),
    "LSQ, least error": _method(prepared(_least_error), 'init="mse"', at_all_widths=True),
    "LSQ+": _method(prepared(_learned_offset), "trained zero points too", at_all_widths=True, revision=2),
    "ranges": _method(prepared(_ranges), at_all_widths=True),
    "PACT": _method(prepared(_clipped), "trained bounds of activations, ranges of weights"),
    "TQT": _method(prepared(_thresholds), "ties go away from zero; ONNX Runtime's go to even"),
    "F8Net": _method(_fixed_point, "fixed point: scales are powers of two; every result is rounded"),
}
# Variants that show what a choice of the preset is worth; not in the full plan.
VARIANTS: dict[str, Method] = {
    "LSQ, folded": _method(prepared(_folded), "weights are rounded with their BatchNorm folded in"),
    "LSQ, summands": _method(prepared(_summands), "a quantizer before each addition too"),
}
