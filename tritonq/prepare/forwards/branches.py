"""Whether a trace can have left out a branch of a forward, and which values of the module it fixed."""

from __future__ import annotations

import ast
import dis
import inspect
import textwrap
from collections.abc import Iterator
from functools import cache
from types import CodeType, FunctionType
from typing import Any

from torch import nn

# Calls whose result is the same in every call of one module in one mode, where their arguments are.
_FIXED_CALLS = frozenset({"torch.jit.is_scripting", "hasattr", "getattr", "len", "isinstance"})
_CONDITIONAL = (ast.If, ast.IfExp, ast.While, ast.Assert)


def frozen_branch(module: nn.Module) -> str | None:
    """Return a condition in the source of a module's forward that another call may decide otherwise, or None.

    Conditions on the module alone (``self.downsample is not None``, ``self.training``) are decided once for each mode.
    The methods and functions that the forward calls are read too. Where there is no source, a conditional jump counts.
    """
    for function, tree in _sources(module):
        if tree is None:
            if _has_jumps(function.__code__):
                return "a forward without source"
            continue
        receiver = _receiver(function, module)
        varying = {*function.__code__.co_varnames, *function.__code__.co_freevars} - {receiver}
        for condition in _conditions(tree):
            if not _is_fixed(condition, varying, {**function.__globals__, receiver: module}):
                return f"`{ast.unparse(condition).splitlines()[0]}`"
    return None


def fixed_number(module: nn.Module) -> str | None:
    """Return a floating-point attribute that the source of a module's forward reads, or None.

    A trace would fix it, and who trains may change it: temperatures, probabilities of dropout and the like.
    """
    for source, _, value in _attributes(module):
        if _holds_floats(value):
            return f"`{source}`"
    return None


def fixed_values(module: nn.Module) -> dict[str, Any]:
    """Return the flags, whole numbers and texts that the source of a module's forward reads, by their paths.

    Those of modules inside and of configurations count, too: the path of ``self.config.depth`` is ``config.depth``.
    """
    return {path: value for _, path, value in _attributes(module) if _is_plain(value)}


def _attributes(module: nn.Module) -> Iterator[tuple[str, str, Any]]:
    """Yield source, path and value of the attributes that the source of a module's forward reads."""
    for function, tree in _sources(module):
        names = function.__code__.co_varnames[:1]
        for node in () if tree is None or names == () else ast.walk(tree):
            if isinstance(node, ast.Attribute) and node.attr != "training":
                source = ast.unparse(node)
                yield source, source.partition(".")[2], _attribute(node, module, names[0])


_PLAIN = (type(None), bool, int, str)


def _is_plain(value: Any) -> bool:
    if type(value) in (list, tuple):
        return all(map(_is_plain, value))
    return type(value) in _PLAIN


_UNKNOWN = object()


def _attribute(node: ast.expr, module: nn.Module, receiver: str) -> Any:
    """Return the object that an expression ``self.name`` or ``self.name.name`` stands for; ``_UNKNOWN`` for others."""
    if isinstance(node, ast.Name):
        return module if node.id == receiver else _UNKNOWN
    owner = _attribute(node.value, module, receiver) if isinstance(node, ast.Attribute) else _UNKNOWN
    if owner is _UNKNOWN or not isinstance(node, ast.Attribute):
        return _UNKNOWN
    found = inspect.getattr_static(owner, node.attr, _UNKNOWN)
    return owner._modules.get(node.attr, found) if isinstance(owner, nn.Module) else found


def _holds_floats(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return any(map(_holds_floats, value))
    return isinstance(value, float)


def _sources(module: nn.Module) -> Iterator[tuple[FunctionType, ast.AST | None]]:
    """Yield a module's forward, and the methods and functions that it calls, with their sources where there are any."""
    pending: list[Any] = [type(module).forward]
    seen: set[CodeType] = set()
    while pending:
        function = inspect.unwrap(pending.pop())
        if not isinstance(function, FunctionType) or function.__code__ in seen or _is_of_torch(function):
            continue
        seen.add(function.__code__)
        tree = _source_tree(function)
        yield function, tree
        if tree is not None:
            pending += _called(tree, module, function, _receiver(function, module))


def _receiver(function: FunctionType, module: nn.Module) -> str:
    """Return the name of the module in a function that its forward runs."""
    found = [vars(base).get(function.__name__) for base in type(module).__mro__]
    is_method = any(inspect.unwrap(method) is function for method in found if callable(method))
    return function.__code__.co_varnames[0] if is_method and function.__code__.co_argcount else "self"


def _is_of_torch(function: FunctionType) -> bool:
    return (function.__module__ or "").partition(".")[0] == "torch"


@cache
def _source_tree(function: FunctionType) -> ast.AST | None:
    try:
        tree: ast.AST = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError, ValueError):
        return None
    if function.__name__ != "<lambda>":
        return tree
    # The source of a lambda is the whole statement that holds it.
    code = function.__code__
    names = list(code.co_varnames[: code.co_argcount])
    lambdas = [node for node in ast.walk(tree) if isinstance(node, ast.Lambda)]
    alike = [node for node in lambdas if [argument.arg for argument in node.args.args] == names]
    return ast.Module([ast.Expr(node) for node in alike], []) if alike else None


def _has_jumps(code: CodeType) -> bool:
    return any("JUMP" in step.opname and "IF" in step.opname for step in dis.get_instructions(code))


def _conditions(tree: ast.AST) -> Iterator[ast.AST]:
    for node in ast.walk(tree):
        if isinstance(node, _CONDITIONAL):
            yield node.test
        elif isinstance(node, ast.comprehension):
            yield from node.ifs
        elif isinstance(node, (ast.BoolOp, ast.Try, ast.Match)):
            yield node


def _is_fixed(condition: ast.AST, varying: set[str], names: dict[str, Any]) -> bool:
    """Whether a condition reads no argument or local variable but ``self``, as far as it is evaluated."""
    if isinstance(condition, ast.BoolOp):
        for operand in condition.values:
            if not _is_fixed(operand, varying, names):
                return False
            decides = isinstance(condition.op, ast.Or)
            if _value(operand, names) is decides:
                return True  # what follows is never read
        return True
    nodes = list(ast.walk(condition))
    if isinstance(condition, (ast.Try, ast.Match)):
        return False
    if any(isinstance(node, ast.Call) and ast.unparse(node.func) not in _FIXED_CALLS for node in nodes):
        return False
    return not any(isinstance(node, ast.Name) and node.id in varying for node in nodes)


def _value(operand: ast.expr, names: dict[str, Any]) -> bool | None:
    """Return whether a fixed operand is true, or None where that depends on the mode or can't be told."""
    text = ast.unparse(operand)
    try:
        return None if "training" in text else bool(eval(text, names))
    except Exception:
        return None


def _called(tree: ast.AST, module: nn.Module, function: FunctionType, receiver: str) -> Iterator[Any]:
    """Yield the methods of the module, and the functions, that a source names."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            if isinstance(node.value, ast.Name) and node.value.id == receiver:
                yield vars(module).get(node.attr)
                yield getattr(inspect.getattr_static(type(module), node.attr, None), "__func__", None)
                yield inspect.getattr_static(type(module), node.attr, None)
            elif isinstance(node.value, ast.Call) and ast.unparse(node.value.func) == "super":
                yield from (vars(base).get(node.attr) for base in type(module).__mro__[1:])
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            yield function.__globals__.get(node.func.id)
