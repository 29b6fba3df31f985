"""Find where in the source a torch function is called: which function calls it, and at which lines and columns.

A *place* is a text ``"module:function:position"``, such as ``"models.net:Net.forward:3.8-3.20"``, from line 3, column 8
to line 3, column 20. Lines count from the first line of the function or of its decorators, which is 0. A *frame* is
here a frame of the Python interpreter (``types.FrameType``).
"""

from __future__ import annotations

import dis
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import CodeType, FrameType
from typing import Any, Literal, TypeAlias, cast

import torch
from torch import nn

# What a forward does with the result of a call.
Use: TypeAlias = Literal["used", "dropped", "rebound", "temporary"]
_TORCH = Path(torch.__file__).parent
# Python functions of torch that hand their call on: the place is that of their caller.
_WRAPPERS = ("_tensor.py", "functional.py", "overrides.py", "_jit_internal.py", "nn/functional.py", "utils/_device.py")
_WRAPPER_FILES = frozenset(str(_TORCH / name) for name in _WRAPPERS)


def calling_place(frame: FrameType | None) -> str:
    """Return the place of the call that a frame is making now; "" for None, or if all frames are skipped.

    Python functions of torch that only hand their call on are skipped: the place is that of their caller.
    """
    frame = calling_frame(frame)
    return "" if frame is None else place_name(frame.f_globals, frame.f_code, frame.f_lasti)


def calling_frame(frame: FrameType | None) -> FrameType | None:
    """Return the first frame, from this one outwards, that is no Python function of torch which hands its call on.

    Such functions are those of ``_tensor.py``, ``functional.py``, ``overrides.py``, ``_jit_internal.py``,
    ``nn/functional.py`` and ``utils/_device.py`` in torch's folder. None for None, or if there is no other frame.
    """
    while frame is not None and frame.f_code.co_filename in _WRAPPER_FILES:
        frame = frame.f_back
    return frame


def place_in_forward(frame: FrameType | None, ends: Callable[[FrameType], bool], beyond: CodeType | None = None) -> str:
    """Return the place at which a frame calls, or "" if the frame is not in the forward that ``ends`` finds.

    A frame inside of another module's call does not belong to it. Hooks belong to the forward that calls the module on
    which they are registered.

    Args:
        frame: the frame that calls a torch function; None gives "".
        ends: called with one frame after the other, from ``frame`` outwards; True for a frame that runs the forward, or
            that called it. The search stops there, and the place is returned; so it is if no frame stops the search.
        beyond: code object of a function whose callees do not belong to the forward either; None: no such function.
    """
    caller, below = frame, None
    while frame is not None and not ends(frame):
        if frame.f_code is _MODULE_CALL or frame.f_code is beyond:
            return ""
        if frame.f_code is _CALL_WITH_HOOKS:
            if below is None or _is_forward_of(frame, below):
                return ""
            frame = frame.f_back  # what called this function is the module's call
        below, frame = frame, None if frame is None else frame.f_back
    return calling_place(caller)


def is_call_of(module: nn.Module | None, frame: FrameType) -> bool:
    """Whether a frame runs the function of torch that calls ``module`` with its hooks; False if ``module`` is None."""
    return frame.f_code is _CALL_WITH_HOOKS and frame.f_locals.get("self") is module


def plain_function(function: Any) -> Any:
    """Return the function inside of a ``functools.partial`` object or bound method; anything else as it is."""
    while isinstance(function, partial):
        function = function.func
    return getattr(function, "__func__", function)


def _is_forward_of(call: FrameType, frame: FrameType) -> bool:
    """Whether ``frame`` runs the forward of a module, and not one of its hooks.

    Args:
        call: frame of the function of torch that calls the module with its hooks.
        frame: a frame that this function called.
    """
    function = plain_function(call.f_locals.get("forward_call"))
    return getattr(function, "__code__", frame.f_code) is frame.f_code


def use_of_result(frame: FrameType | None) -> Use:
    """Return how a frame uses the result of the call that it is making now.

    - ``"dropped"``: not at all, as with ``x.relu_()`` on a line of its own.
    - ``"rebound"``: it assigns it to the left operand, as with ``x += y``.
    - ``"temporary"``: it uses it, and calls a method of what a call or operator returned: ``f(x).mul_(y)``.
    - ``"used"``: in any other way, or not known.

    Python functions of torch that only hand their call on are skipped. None gives ``"used"``.
    """
    frame = calling_frame(frame)
    if frame is None:
        return "used"
    steps = [step for step in dis.get_instructions(frame.f_code) if step.offset >= frame.f_lasti][:2]
    if steps[0].opname.startswith("INPLACE_") or (steps[0].opname == "BINARY_OP" and steps[0].argrepr.endswith("=")):
        return "rebound"
    if [step.opname for step in steps[1:]] == ["POP_TOP"]:
        return "dropped"
    return "temporary" if _is_method_of_result(frame) else "used"


def _is_method_of_result(frame: FrameType) -> bool:
    """Whether a frame is calling a method of what a call or an operator just returned."""
    steps = [step for step in dis.get_instructions(frame.f_code) if step.opname not in _FILLING]
    now = next((step for step in steps if step.offset >= frame.f_lasti), None)
    if now is None or now.positions is None or now.positions.lineno is None:
        return False
    start = (now.positions.lineno, now.positions.col_offset)
    # The method is looked up last among what begins where the call does: its receiver is on the stack by then.
    looked_up = [
        index
        for index, step in enumerate(steps)
        if step.opname in ("LOAD_METHOD", "LOAD_ATTR")
        and step.offset < now.offset
        and step.positions is not None
        and (step.positions.lineno, step.positions.col_offset) == start
    ]
    return bool(looked_up) and steps[looked_up[-1] - 1].opname in _RESULTS


_FILLING = frozenset({"CACHE", "EXTENDED_ARG"})
_RESULTS = frozenset({"CALL", "CALL_KW", "CALL_FUNCTION_EX", "BINARY_OP", "UNARY_NEGATIVE"})


_MODULE_CALL = getattr(nn.Module, "_call_impl").__code__  # noqa: B009 - a private method of torch
_CALL_WITH_HOOKS = next(code for code in _MODULE_CALL.co_consts if getattr(code, "co_name", "") == "inner")


def place_name(module: dict[str, Any], code: CodeType, instruction: int) -> str:
    """Return the place of an instruction: module, function, lines and columns.

    Lines and columns are the same in every version of Python. If Python keeps none for the instruction, as with
    ``-X no_debug_ranges``, its offset stands for them, as ``"@24"``.

    Args:
        module: globals of the module that holds the function; ``"__name__"`` gives the module's name.
        code: code object of the function.
        instruction: offset of the instruction in bytes.
    """
    known, index = _positions(code), instruction // _UNIT
    position = known[index] if 0 <= index < len(known) else _NOWHERE
    return _place_at(module, code, position, instruction)


_Position = tuple[int | None, int | None, int | None, int | None]
_NOWHERE: _Position = (None, None, None, None)


def _place_at(module: dict[str, Any], code: CodeType, position: _Position, instruction: int) -> str:
    """Return the place of an instruction of ``code``, ``"module:function:position"``; ``module`` are its globals.

    If ``position`` (lines and columns) is incomplete, the offset ``instruction`` stands for it, as ``"@24"``.
    """
    line, end, column, end_column = position
    where, code = f"@{instruction}", source_code(code)
    if None not in position:
        first = code.co_firstlineno
        where = f"{line - first}.{column}-{end - first}.{end_column}"  # type: ignore[operator]
    return f"{_function_name(module, code)}:{where}"


def function_name(frame: FrameType) -> str:
    """Return the part ``"module:function"`` of the places in the function that a frame runs."""
    return _function_name(frame.f_globals, source_code(frame.f_code))


def function_of_place(place: str) -> str:
    """Return the part ``"module:function"`` of a place; "" for ""."""
    return place.rpartition(":")[0]


def _function_name(module: dict[str, Any], code: CodeType) -> str:
    return f"{module.get('__name__', '')}:{code.co_qualname}"


def source_code(code: CodeType) -> CodeType:
    """Return the code object of the function that its author wrote.

    Dynamo (``torch.compile``) splits a function at a graph break and makes a new code object of the rest. For such an
    object the original one is returned, for all others ``code``.
    """
    if not code.co_name.startswith("torch_dynamo_resume"):
        return code
    from torch._dynamo.resume_execution import ContinueExecutionCache

    known = ContinueExecutionCache.generated_code_metadata.get(code)
    return code if known is None else cast(CodeType, known.code)


# Bytes of an instruction.
_UNIT = 2
# By the identity of a code object, which is kept: comparing code objects takes longer than what this saves.
_known: dict[int, tuple[CodeType, list[_Position]]] = {}


def _positions(code: CodeType) -> list[_Position]:
    """Return ``(first line, last line, first column, last column)`` of each instruction of a code object."""
    known = _known.get(id(code))
    if known is None:
        known = _known[id(code)] = code, list(code.co_positions())
    return known[1]


def traced_places() -> list[tuple[CodeType, str]]:
    """Return ``(code object, place of the instruction)`` of each function that Dynamo is tracing now, innermost first.

    Python functions of torch that only hand their call on are left out. To be called by what Dynamo
    (``torch.compile``) runs while it traces, in the same thread; elsewhere the list is empty.
    """
    from torch._dynamo.symbolic_convert import InstructionTranslatorBase

    found: dict[int, tuple[CodeType, str]] = {}
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        translator = frame.f_locals.get("self")
        if isinstance(translator, InstructionTranslatorBase) and id(translator) not in found:
            # Its offset is one in bytecode that Dynamo has changed: behind a branch it may name the next instruction.
            given, offset = translator.current_instruction.positions, translator.current_instruction.offset
            position: _Position = (
                _NOWHERE if given is None else (given.lineno, given.end_lineno, given.col_offset, given.end_col_offset)
            )
            place = _place_at(translator.f_globals, translator.f_code, position, -1 if offset is None else offset)
            found[id(translator)] = (translator.f_code, place)
        frame = frame.f_back
    return [item for item in found.values() if item[0].co_filename not in _WRAPPER_FILES]
