"""Telling what `prepare_qat` quantized, and what it left in float although nobody asked for that."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping, Sequence

from torch import nn

from tritonq.prepare.decide.find_layers import NO_QCONFIG
from tritonq.prepare.decide.function_layers import CONSTANT_INPUT, FUNCTIONS_WITH_WEIGHTS
from tritonq.prepare.decide.joins import KINDS
from tritonq.prepare.decide.layer_records import LayerRecord

_log = logging.getLogger("tritonq")
_WEIGHTED = (nn.modules.conv._ConvNd, nn.Linear, nn.Bilinear, nn.Embedding, nn.EmbeddingBag)
_NAMES_PER_REASON = 5
# Reasons that were asked for, or that leave nothing to quantize.
_BY_DESIGN = (NO_QCONFIG, CONSTANT_INPUT)


def tell(
    model: nn.Module, float_modules: Mapping[str, nn.Module], records: Sequence[LayerRecord], warn: bool, strict: bool
) -> None:
    """Log how many layers and joins are quantized, and warn of those left in float unasked.

    Raises:
        ValueError: one is, and ``strict`` is True.
    """
    layers, joins = layers_and_joins(float_modules, records)
    quantized = [sum(record.status == "quantized" for record in part) for part in (layers, joins)]
    name = type(model).__name__
    _log.info(
        "%s: quantized %d of %d layers, %d of %d joins", name, quantized[0], len(layers), quantized[1], len(joins)
    )
    unasked = [record for record in (*layers, *joins) if record.status == "float" and record.reason not in _BY_DESIGN]
    if not unasked or not (warn or strict):
        return
    by_reason: dict[str, list[str]] = {}
    for record in unasked:
        by_reason.setdefault(record.reason, []).append(record.name)
    parts = [f"{_listed(names)}: {reason}" for reason, names in by_reason.items()]
    text = f"prepare_qat leaves {len(unasked)} layers and joins of {name} in float: {'; '.join(parts)}"
    if strict:
        raise ValueError(f"{text}. With strict=True nothing may stay so unasked: a qconfig of None asks for it")
    warnings.warn(f"{text}. tritonq.summary lists them; a qconfig of None or warn=False silences this", stacklevel=4)


def layers_and_joins(
    float_modules: Mapping[str, nn.Module], records: Sequence[LayerRecord]
) -> tuple[list[LayerRecord], list[LayerRecord]]:
    """The records of layers with weights, and those of operations on two tensors."""
    layers = [
        record
        for record in records
        if isinstance(float_modules.get(record.name), _WEIGHTED) or record.kind in FUNCTIONS_WITH_WEIGHTS
    ]
    return layers, [record for record in records if record.kind in KINDS]


def _listed(names: Sequence[str]) -> str:
    more = len(names) - _NAMES_PER_REASON
    return ", ".join(names[:_NAMES_PER_REASON]) + (f" and {more} more" if more > 0 else "")
