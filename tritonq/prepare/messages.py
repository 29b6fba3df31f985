"""Log what `prepare_qat` quantized, and warn of what it left in float although nobody asked for that."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence

from torch import nn

from tritonq.prepare.decide.called_layers import CONSTANT_INPUT
from tritonq.prepare.decide.find_layers import NO_QCONFIG
from tritonq.prepare.decide.joins import CONCATENATIONS, NO_NEIGHBOUR
from tritonq.prepare.decide.layer_records import LayerRecord, counts

_log = logging.getLogger("tritonq")
_NAMES_PER_REASON = 5
# Reasons that were asked for, or that leave nothing to quantize.
_BY_DESIGN = (NO_QCONFIG, CONSTANT_INPUT)


def report_float_layers(
    model: nn.Module,
    records: Sequence[LayerRecord],
    warn: bool,
    strict: bool,
    depth: int = 1,
) -> None:
    """Log how many layers and joins are quantized, and warn (UserWarning) of those left in float unasked.

    The logger is "tritonq", the level INFO. A join is an addition, concatenation or other operation of several tensors.
    Unasked is what has a qconfig and reads more than parameters, except for products, differences and stacks that no
    quantized layer makes or reads.

    Args:
        model: the prepared model.
        records: what became of each layer and join.
        warn: whether to warn.
        strict: whether to raise instead, whatever ``warn`` is.
        depth: which line the warning names: 1 is the line in this function, 2 that of its caller, and so on.

    Raises:
        ValueError: ``strict`` is True and a layer or join was left in float unasked.
    """
    name = type(model).__name__
    _log.info("%s: %s", name, counts(records))
    counted = [record for part in ("layer", "join") for record in records if record.part == part]
    unasked = [record for record in counted if record.status == "float" and not _is_by_design(record)]
    if not unasked or not (warn or strict):
        return
    by_reason: dict[str, list[str]] = {}
    for record in unasked:
        by_reason.setdefault(record.reason, []).append(record.name)
    parts = [f"{_listed(names)}: {reason}" for reason, names in by_reason.items()]
    text = f"prepare_qat leaves {len(unasked)} layers and joins of {name} in float: {'; '.join(parts)}"
    if strict:
        raise ValueError(f"{text}. With strict=True nothing may stay so unasked: a qconfig of None asks for it")
    warnings.warn(
        f"{text}. tritonq.summary lists them; a qconfig of None or warn=False silences this", stacklevel=depth
    )


def _is_by_design(record: LayerRecord) -> bool:
    """Whether a layer or join in float was asked for, or belongs to an operation that stays in float as a whole.

    Products, differences and stacks that no quantized layer reads or makes are such parts: of norms, gates and boxes.
    """
    left = ("mul", "sub", *CONCATENATIONS - {"cat"})
    return record.reason in _BY_DESIGN or (record.reason == NO_NEIGHBOUR and record.kind in left)


def _listed(names: Sequence[str]) -> str:
    """Return the first five names as text, and how many more there are."""
    more = len(names) - _NAMES_PER_REASON
    return ", ".join(names[:_NAMES_PER_REASON]) + (f" and {more} more" if more > 0 else "")
