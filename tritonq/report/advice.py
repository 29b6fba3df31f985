"""Advice for the report: what to do about the layer that costs most, decided by errors that were measured."""

from __future__ import annotations

import math
from dataclasses import dataclass

from tritonq.report.measure import LayerMeasure, ModelMeasure

# Rounding that changes less is the price of int8, not a fault.
_WELL_AGREEMENT = 0.99
_WELL_ACCURACY_LOSS = 0.005
_WELL_ERROR = 0.1
# Below this mostly predictions that were undecided change.
_NEGLIGIBLE_ERROR = 0.01
# Answers that change by chance get better and worse alike: a loss beyond two deviations of that is none.
_DEVIATIONS = 2
# A layer that alone makes this much of the error of the whole model is named.
_DOMINANT = 0.5
# Wider ranges are advised where they take away at least a fifth of the layer's error.
_WORTHWHILE = 0.8


@dataclass(frozen=True)
class Advice:
    """A piece of advice in a sentence or two.

    Attributes:
        layer: name of the layer with which the sentence begins; "" if it begins with ``text``.
        text: the rest of it.
        code: a line of Python to write, such as ``QConfigMapping().set_global(qconfig).set_module_name("fc", None)``;
            "" if there is none.
    """

    layer: str
    text: str
    code: str = ""


def advise(measured: ModelMeasure) -> Advice:
    """Return an `Advice` about the layer whose rounding costs most, or one that nothing needs to be done.

    The first of these that holds is said:

    - All is well: no layer was measured, or there is no error, or all of these hold: the error is at most 10 % of the
      output's norm, at least 99 % of the predictions stay, the accuracy falls by at most 0.5 percentage points.
    - Rounding is not to blame: the error is at most 1 %, and predictions that change get better and worse alike. That
      is, at most ``2 sqrt(n)`` fewer images are classified correctly, with n the number of predictions that change.
    - No layer stands out: the worst one alone makes less than half of the error.
    - The worst layer needs more training, if it is one in fixed point; else wider ranges, if these leave less than 80 %
      of its error; else it is to be left in float, or, if no weight of it is rounded, to have its range searched or
      trained.
    """
    if not measured.layers or not measured.error:
        return Advice("", "All is well: rounding changes nothing.")
    before, after = percent(measured.float_accuracy), percent(measured.quantized_accuracy)
    accuracies = f"accuracy is {before} without rounding, {after} with it."
    error, agree = f"the output's error is {percent(measured.error)}", percent(measured.agreement)
    loss = measured.float_accuracy - measured.quantized_accuracy
    if measured.error <= _WELL_ERROR and measured.agreement >= _WELL_AGREEMENT and loss <= _WELL_ACCURACY_LOSS:
        return Advice("", f"All is well: {error}, {agree} of the predictions stay the same; {accuracies}")
    changed = measured.images * (1 - measured.agreement)
    if measured.error <= _NEGLIGIBLE_ERROR and measured.images * loss <= _DEVIATIONS * math.sqrt(changed):
        undecided = f"the {percent(1 - measured.agreement)} of the predictions that change were nearly undecided"
        return Advice("", f"Rounding is not to blame: {error}, and {undecided}; {accuracies}")
    worst = measured.layers[0]
    if worst.sensitivity < _DOMINANT * measured.error:
        reason = ": leaving a single one in float would change little" if worst.has_float_form else ""
        return Advice("", f"No layer stands out{reason}.")
    return _about(worst, measured)


def percent(fraction: float) -> str:
    """Return a fraction as a percentage: ``"12.34 %"`` for 0.1234, with a third decimal between 0 and 0.1 %."""
    value = 100 * fraction
    return f"{value:.3f} %" if 0 < value < 0.1 else f"{value:.2f} %"


def _about(worst: LayerMeasure, measured: ModelMeasure) -> Advice:
    text = (
        f" alone makes an error of {percent(worst.sensitivity)}; all layers together make {percent(measured.error)}. "
    )
    if not worst.has_float_form:
        text += "Its formats are found in training: more of it, with a search for lengths, may serve it better."
        return Advice(worst.name, text)
    clipping = max(worst.tensors, key=lambda tensor: tensor.clipped, default=None)
    if clipping is not None and worst.unclipped is not None and worst.unclipped < _WORTHWHILE * worst.sensitivity:
        text += (
            f"Its {clipping.role} loses {percent(clipping.clipped)} of its values to clipping; with ranges that hold "
            f"every value it would make {percent(worst.unclipped)}. Let its observer see more batches, or calibrate."
        )
        return Advice(worst.name, text)
    if worst.unclipped is not None:
        text += f"Clipping is not the reason: wider ranges would make {percent(worst.unclipped)}. "
    text += f"With it in float all others would make {percent(measured.error_without_worst)}."
    if worst.worst("weight") is None:
        return Advice(
            worst.name, f"{text} An observer that searches its range, or a trained scale, may serve it better."
        )
    rule = f'QConfigMapping().set_global(qconfig).set_module_name("{worst.name}", None)'
    return Advice(worst.name, f"{text} To leave it in float:", rule)
