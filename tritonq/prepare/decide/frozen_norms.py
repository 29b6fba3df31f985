"""Recognise modules that normalise each channel with fixed numbers, such as the FrozenBatchNorm2d of many toolkits.

A *frozen norm* computes ``x · factor + summand`` per channel, from buffers and parameters that do not train.
"""

from __future__ import annotations

from dataclasses import dataclass
from operator import attrgetter
from typing import Literal

from torch import nn

from tritonq.prepare.decide.analysis import Analysis
from tritonq.prepare.decide.constants import PlannedProgram
from tritonq.prepare.record.dataflow import Call, Frame, Ref, ValueIndex, refs_in, replace_refs

Operation = Literal["add", "sub", "mul", "div", "reversed_sub", "batch_norm"]
_BATCH_NORM = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
_ELEMENTWISE = ("add", "sub", "mul", "div")
# These keep values as they are, where they keep the dtype.
_PASSING = ("to", "type_as", "float", "contiguous")


@dataclass(frozen=True)
class AffineStep:
    """One operation of a frozen norm, on every channel.

    Attributes:
        operation: ``"add"``, ``"sub"``, ``"mul"`` or ``"div"`` of x and the operand; ``"reversed_sub"``, which is
            ``operand - x``; or ``"batch_norm"``.
        number: the operand, if it is a number; 0.0 if it is a tensor; for ``"batch_norm"`` its epsilon.
        operands: the calls that compute the operand from parameters and buffers, if it is a tensor; for
            ``"batch_norm"`` those of all ``roles``, with a result for each. None if the operand is a number.
        roles: for ``"batch_norm"`` what the operands are, such as ``("running_mean", "running_var", "weight")``;
            else empty.
    """

    operation: Operation
    number: float = 0.0
    operands: PlannedProgram | None = None
    roles: tuple[str, ...] = ()

    @property
    def key(self) -> object:
        """Description of what the operation computes, equal (``==``) for frames that compute the same."""
        if self.operands is None:
            return (self.operation, self.number)
        names: dict[int, object] = dict(self.operands.state)
        for call in self.operands.calls:
            names.update({output: (call.name, place) for place, output in enumerate(call.outputs, len(names))})
        given = [(call.args, call.kwargs) for call in self.operands.calls]
        results = [names.get(result) for result in self.operands.results]
        return (
            self.operation,
            self.number,
            self.roles,
            replace_refs(tuple(given), lambda ref: names.get(ref.value)),
            results,
        )


@dataclass(frozen=True)
class FrozenNorm:
    """A module that multiplies and shifts each channel by constants.

    Attributes:
        channels: number of channels.
        dimensions: number of dimensions of its input, 4 for images.
        steps: the operations of the module's first frame, in order; without calls that keep values, such as ``to``.
        starts: for each frame of the module the first call of a function on its input, ``to`` included.
        ends: for each frame the last call of a function on what follows from its input, ``to`` included.
        remainder: qualified names of the modules that it calls behind these, in order, such as an activation.
    """

    channels: int
    dimensions: int
    steps: tuple[AffineStep, ...]
    starts: tuple[Call, ...]
    ends: tuple[Call, ...]
    remainder: tuple[str, ...] = ()


def find_frozen_norm(owner: str, analysis: Analysis) -> FrozenNorm | None:
    """Return the frozen norm that a module computes: its channels, and the recorded operations that are its parts.

    None if it never ran, computes something else, computes by other operations, operands or numbers in another frame
    (as in another mode), or multiplies or shifts by parameters that train (``requires_grad``).
    Children may follow, such as an activation, whose parameters may train.

    Args:
        owner: qualified name of the module.
        analysis: the model and its record.
    """
    frames = analysis.flow.frames_of(owner)
    chains = [_chain(frame, analysis) for frame in frames]
    found = [chain[0] for chain in chains if chain is not None and chain[0]]
    remainders = {chain[1] for chain in chains if chain is not None}
    if not found or len(found) < len(frames) or len(remainders) > 1:
        return None
    if len({tuple(call.name for call in chain) for chain in found}) > 1:
        return None
    shape = analysis.flow.values[found[0][0].inputs[0]].shape if found[0][0].inputs else ()
    steps, *others = ([_step(call, analysis) for call in chain if call.name not in _PASSING] for chain in found)
    known = tuple(step for step in steps if step is not None)
    if len(shape) < 2 or len(known) < len(steps) or not any(step.operands for step in known):
        return None
    if any([step and step.key for step in other] != [step.key for step in known] for other in others):
        return None
    starts, ends = tuple(chain[0] for chain in found), tuple(chain[-1] for chain in found)
    return FrozenNorm(shape[1], len(shape), known, starts, ends, remainders.pop())


def _chain(frame: Frame, analysis: Analysis) -> tuple[list[Call], tuple[str, ...]] | None:
    """Return the functions that lead from the only input of a forward on, and the names of the children behind them.

    The last child, or the last function, gives the forward's result. Functions that compute constants are left out.
    None if the forward does anything else. ``frame`` is one recorded run of it.
    """
    flow, constants = analysis.flow, analysis.constants.values
    given = set(refs_in((*frame.args, *frame.kwargs.values()))) - constants
    if len(given) != 1:
        return None
    value, chain, children = given.pop(), list[Call](), list[str]()
    for kind, index in frame.events:
        if kind != "call":
            return None
        call = flow.calls[index]
        if constants.issuperset(call.outputs):
            continue
        result = analysis.value_of(call)
        if set(call.inputs) - constants != {value} or result is None:
            return None
        if call.kind == "module" and call.module_name is not None:
            children.append(call.module_name)  # activations may work in place
        elif call.kind == "function" and not children and not call.writes:
            chain.append(call)
        else:
            return None
        value = result
    return (chain, tuple(children)) if analysis.value_of(frame) == value else None


def _step(call: Call, analysis: Analysis) -> AffineStep | None:
    """Return the operation on each channel that a call is.

    None if it does more, or uses a tensor that training changes.
    """
    if call.name == "batch_norm":
        given = {**dict(zip(_BATCH_NORM, call.args, strict=False)), **call.kwargs}
        roles = tuple(name for name in _BATCH_NORM[1:5] if isinstance(given.get(name), Ref))
        operands = _program(analysis, [given[role].value for role in roles])
        if given.get("training") or operands is None or not {"running_mean", "running_var"} <= set(roles):
            return None
        return AffineStep("batch_norm", float(given.get("eps", 1e-5)), operands, roles)
    if call.name not in _ELEMENTWISE or len(call.args) != 2 or call.kwargs:
        return None
    constants = analysis.constants.values
    moving = [isinstance(item, Ref) and item.value not in constants for item in call.args]
    operand = call.args[1 if moving[0] else 0]
    operation: Operation = "reversed_sub" if call.name == "sub" and moving[1] else call.name  # type: ignore[assignment]
    if all(moving) or (call.name == "div" and moving[1]):
        return None
    if isinstance(operand, (int, float)):
        return AffineStep(operation, float(operand))
    if not isinstance(operand, Ref) or not _is_per_channel(call, operand.value, analysis):
        return None
    program = _program(analysis, [operand.value])
    return None if program is None else AffineStep(operation, operands=program)


def _is_per_channel(call: Call, operand: int, analysis: Analysis) -> bool:
    """Whether the value ``operand`` holds one number for each channel (axis 1) of the call's result, or one for all."""
    result = analysis.value_of(call)
    shape = analysis.flow.values[operand].shape
    whole = () if result is None else analysis.flow.values[result].shape
    padded = (*[1] * (len(whole) - len(shape)), *shape)
    return len(padded) == len(whole) and all(size == 1 for axis, size in enumerate(padded) if axis != 1)


def _program(analysis: Analysis, values: list[ValueIndex]) -> PlannedProgram | None:
    """Return the program that computes the constants with the indices ``values``.

    None if there is none, or if it reads a parameter that is trained.
    """
    program = analysis.constants.program(values)
    if program is None:
        return None
    tensors = (attrgetter(name)(analysis.model) for name in program.state.values())
    return None if any(isinstance(tensor, nn.Parameter) and tensor.requires_grad for tensor in tensors) else program
