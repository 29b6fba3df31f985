"""Find masks of attention: tensors that are added to scores and follow from inputs alone.

Such a tensor is a mask on the way to a softmax, and wherever the scores vanish beside it in the recorded run.

A mask holds -infinity, or the smallest number of its type, where scores do not count. A grid that reaches so far would
have one code for all scores; a grid that does not would let them count. So the sum with a mask is no join: it is
computed in float.
"""

from __future__ import annotations

from torch import nn

from tritonq.prepare.decide.constants import Constants
from tritonq.prepare.record.dataflow import Call, Dataflow, ValueIndex

_SOFTMAX_NAMES = frozenset({"softmax", "log_softmax"})
_SOFTMAX_MODULES = (nn.Softmax, nn.LogSoftmax)
_SUMS_WITH_PRODUCTS = ("baddbmm", "addmm")
_SUMS = ("add", "sub", *_SUMS_WITH_PRODUCTS)
# Products of activations count as layers.
_PRODUCTS = frozenset({"matmul", "einsum", "baddbmm", "scaled_dot_product_attention"})
# Of a parameter these make a bias, which may be part of a mask.
_CHOOSING = frozenset({"add", "sub", "where", "masked_fill", "cat", "pad"})


def is_softmax(call: Call) -> bool:
    """Whether a call is a softmax or a log-softmax."""
    return isinstance(call.target, _SOFTMAX_MODULES) or (call.kind == "function" and call.name in _SOFTMAX_NAMES)


def values_without_layers(flow: Dataflow, constants: Constants) -> frozenset[ValueIndex]:
    """Return indices of the float values that depend on no layer and are no constants: they follow from inputs.

    A layer is here any call that reads a parameter, or what follows from one, and any product of activations (matmul,
    einsum, baddbmm, attention). But a parameter that is only added, subtracted or chosen (where, masked_fill, cat,
    pad), as a bias, makes no layer.
    """
    learned: set[ValueIndex] = set()  # what follows from a parameter
    behind_layers: set[ValueIndex] = set()
    for call in flow.calls:
        floating = {value for value in call.inputs if flow.values[value].dtype.is_floating_point}
        reads_parameter = not learned.isdisjoint(floating) or _has_parameters(call)
        reads_parameter |= any(constants.is_parameter(value) for value in floating)
        is_choice = call.kind == "function" and call.name in _CHOOSING
        is_layer = (reads_parameter and not is_choice) or call.name in _PRODUCTS
        if reads_parameter:
            learned.update(call.outputs)
        if is_layer or not behind_layers.isdisjoint(floating):
            behind_layers.update(call.outputs)
    found = (value.index for value in flow.values if value.dtype.is_floating_point)
    return frozenset(found) - behind_layers - constants.values


def _has_parameters(call: Call) -> bool:
    """Whether a call is that of a module with parameters."""
    return isinstance(call.target, nn.Module) and next(call.target.parameters(), None) is not None


def summands(call: Call, without_layers: frozenset[ValueIndex]) -> tuple[ValueIndex, ValueIndex] | None:
    """Return the value indices ``(scores, mask)`` if a call could be their sum or difference; None for other calls.

    ``without_layers`` are the values that follow from inputs alone. The mask is the one operand among them, and in a
    difference the second; the scores are the other one. For ``addmm`` and ``baddbmm`` the mask is the added tensor, and
    the first factor stands for the scores.
    """
    if call.kind != "function" or call.name not in _SUMS:
        return None
    first, *rest = call.inputs or (-1,)
    if call.name in _SUMS_WITH_PRODUCTS:
        return (rest[0], first) if len(rest) == 2 and first in without_layers else None
    if len(rest) != 1 or (first in without_layers) == (rest[0] in without_layers):
        return None
    if rest[0] in without_layers:
        return first, rest[0]
    return (rest[0], first) if call.name == "add" else None
