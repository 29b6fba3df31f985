"""Where in the source a torch function is called: the function, and the lines and columns in it."""

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
Use: TypeAlias = Literal["used", "dropped", "rebound"]
_TORCH = Path(torch.__file__).parent
# Python functions of torch that hand their call on: the place is that of their caller.
_WRAPPERS = ("_tensor.py", "functional.py", "overrides.py", "_jit_internal.py", "nn/functional.py", "utils/_device.py")
_WRAPPER_FILES = frozenset(str(_TORCH / name) for name in _WRAPPERS)


def calling_place(frame: FrameType | None) -> str:
    """Return the place that a frame calls from, past wrappers of torch, as ``"module:function:position"``."""
    frame = calling_frame(frame)
    return "" if frame is None else place_name(frame.f_globals, frame.f_code, frame.f_lasti)


def calling_frame(frame: FrameType | None) -> FrameType | None:
    """Return the first frame, from this one outwards, that is no wrapper of torch."""
    while frame is not None and frame.f_code.co_filename in _WRAPPER_FILES:
        frame = frame.f_back
    return frame


def place_in_forward(frame: FrameType | None, ends: Callable[[FrameType], bool], beyond: CodeType | None = None) -> str:
    """Return the place that a frame calls from, or "" where that is in the forward of another module, called inside.

    Hooks belong to the forward that calls the module which they are registered on.

    Args:
        frame: the frame.
        ends: whether a frame is that of the forward, or what called it.
        beyond: another code that calls what does not belong to the forward.
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
    """Whether a frame is the call of a module with hooks."""
    return frame.f_code is _CALL_WITH_HOOKS and frame.f_locals.get("self") is module


def plain_function(function: Any) -> Any:
    """Return the function inside a callable: past ``functools.partial`` and the binding to an object."""
    while isinstance(function, partial):
        function = function.func
    return getattr(function, "__func__", function)


def _is_forward_of(call: FrameType, frame: FrameType) -> bool:
    """Whether a frame that a module's call made is the module's forward, not a hook's."""
    function = plain_function(call.f_locals.get("forward_call"))
    return getattr(function, "__code__", frame.f_code) is frame.f_code


def use_of_result(frame: FrameType | None) -> Use:
    """Return how a function uses the result of the call that it is making; wrappers of torch are passed over.

    ``"dropped"``: not at all, as with ``x.relu_()`` on a line of its own; ``"rebound"``: under the name of the operand,
    as with ``x += y``; else ``"used"``.
    """
    frame = calling_frame(frame)
    if frame is None:
        return "used"
    steps = [step for step in dis.get_instructions(frame.f_code) if step.offset >= frame.f_lasti][:2]
    if steps[0].opname.startswith("INPLACE_") or (steps[0].opname == "BINARY_OP" and steps[0].argrepr.endswith("=")):
        return "rebound"
    return "dropped" if [step.opname for step in steps[1:]] == ["POP_TOP"] else "used"


_MODULE_CALL = getattr(nn.Module, "_call_impl").__code__  # noqa: B009 - a private method of torch
_CALL_WITH_HOOKS = next(code for code in _MODULE_CALL.co_consts if getattr(code, "co_name", "") == "inner")


def place_name(module: dict[str, Any], code: CodeType, instruction: int) -> str:
    """Name an instruction of a function of a module by its lines and columns in the function's source.

    These are the same in every version of Python, other than the offset of an instruction, which stands for them where
    Python keeps no positions (``-X no_debug_ranges``).
    """
    known, index = _positions(code), instruction // _UNIT
    position = known[index] if 0 <= index < len(known) else _NOWHERE
    return _place_at(module, code, position, instruction)


_Position = tuple[int | None, int | None, int | None, int | None]
_NOWHERE: _Position = (None, None, None, None)


def _place_at(module: dict[str, Any], code: CodeType, position: _Position, instruction: int) -> str:
    line, end, column, end_column = position
    where, code = f"@{instruction}", source_code(code)
    if None not in position:
        first = code.co_firstlineno
        where = f"{line - first}.{column}-{end - first}.{end_column}"  # type: ignore[operator]
    return f"{_function_name(module, code)}:{where}"


def function_name(frame: FrameType) -> str:
    """Return the part of a frame's place that names the function."""
    return _function_name(frame.f_globals, source_code(frame.f_code))


def function_of_place(place: str) -> str:
    """Return the part that names the function of a place, as :func:`place_name` returned it."""
    return place.rpartition(":")[0]


def _function_name(module: dict[str, Any], code: CodeType) -> str:
    return f"{module.get('__name__', '')}:{code.co_qualname}"


def source_code(code: CodeType) -> CodeType:
    """Return the code of a function where Dynamo made ``code`` of the part of it behind a graph break."""
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
    """Return first line, last line, first column and last column of each instruction."""
    known = _known.get(id(code))
    if known is None:
        known = _known[id(code)] = code, list(code.co_positions())
    return known[1]


def traced_places() -> list[tuple[CodeType, str]]:
    """Return the places that ``torch.compile`` is tracing, the innermost first, each with its code object.

    Called while Dynamo traces: its translators stand on Python's own stack.
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
