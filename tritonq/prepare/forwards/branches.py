"""Read the source of a forward: can another call take another branch, and which attributes of the module does it read?

A trace holds only the branch that one run took, and the numbers that attributes had then. What is found here decides
whether a trace may stand for the forward.
"""

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
    """Return the first condition in a module's forward that may have another result in another call, as text.

    A trace would freeze it: it holds one of the two branches. None if there is no such condition.

    For example ``"`x.shape[0] > 1`"``. Conditions on the module alone (``self.downsample is not None``,
    ``self.training``) do not count: they have one result in each mode. The methods and functions that the forward calls
    are searched too. If a function has no source, any conditional jump in its bytecode counts, and the text is "a
    forward without source".
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
    """Return the first attribute that is a Python float and that a module's forward reads.

    A trace would freeze its value. It is text such as ``"`self.temperature`"``. A list or tuple that holds a float
    counts, too; a tensor does not. None if there is none.
    """
    for source, _, value in _attributes(module):
        if _holds_floats(value):
            return f"`{source}`"
    return None


def fixed_values(module: nn.Module) -> dict[str, Any]:
    """Return the flags, whole numbers and texts that a module's forward reads from its attributes, by path.

    A trace is right only while they are the same. None, and lists and tuples of such values, are among them. The path
    of ``self.config.depth`` is ``"config.depth"``: attributes of modules inside and of configuration objects count,
    too.
    """
    return {path: value for _, path, value in _attributes(module) if _is_plain(value)}


def _attributes(module: nn.Module) -> Iterator[tuple[str, str, Any]]:
    """Yield ``(source, path, value)`` of each attribute that the source of a module's forward reads.

    For example ``("self.config.depth", "config.depth", 4)``. ``value`` is ``_UNKNOWN`` for an attribute of something
    else than the module.
    """
    for function, tree in _sources(module):
        names = function.__code__.co_varnames[:1]
        for node in () if tree is None or names == () else ast.walk(tree):
            if isinstance(node, ast.Attribute) and node.attr != "training":
                source = ast.unparse(node)
                yield source, source.partition(".")[2], _attribute(node, module, names[0])


_PLAIN = (type(None), bool, int, str)


def _is_plain(value: Any) -> bool:
    """Whether a value is None, a flag, a whole number, a text, or a list or tuple of such."""
    if type(value) in (list, tuple):
        return all(map(_is_plain, value))
    return type(value) in _PLAIN


_UNKNOWN = object()


def _attribute(node: ast.expr, module: nn.Module, receiver: str) -> Any:
    """Return the object that an expression ``self.name`` or ``self.name.name`` stands for; ``_UNKNOWN`` for others.

    ``receiver`` is the name of the module in the source, usually "self".
    """
    if isinstance(node, ast.Name):
        return module if node.id == receiver else _UNKNOWN
    owner = _attribute(node.value, module, receiver) if isinstance(node, ast.Attribute) else _UNKNOWN
    if owner is _UNKNOWN or not isinstance(node, ast.Attribute):
        return _UNKNOWN
    found = inspect.getattr_static(owner, node.attr, _UNKNOWN)
    return owner._modules.get(node.attr, found) if isinstance(owner, nn.Module) else found


def _holds_floats(value: Any) -> bool:
    """Whether a value is a float, or a list or tuple that holds one."""
    if isinstance(value, (list, tuple)):
        return any(map(_holds_floats, value))
    return isinstance(value, float)


def _sources(module: nn.Module) -> Iterator[tuple[FunctionType, ast.AST | None]]:
    """Yield a module's forward and the methods and functions that it calls, each with its syntax tree or None."""
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
    """Return the name that a function has for the module: that of a method's first argument, else "self"."""
    found = [vars(base).get(function.__name__) for base in type(module).__mro__]
    is_method = any(inspect.unwrap(method) is function for method in found if callable(method))
    return function.__code__.co_varnames[0] if is_method and function.__code__.co_argcount else "self"


def _is_of_torch(function: FunctionType) -> bool:
    return (function.__module__ or "").partition(".")[0] == "torch"


@cache
def _source_tree(function: FunctionType) -> ast.AST | None:
    """Return the syntax tree of a function; None if its source can't be found."""
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
    """Whether bytecode has a conditional jump."""
    return any("JUMP" in step.opname and "IF" in step.opname for step in dis.get_instructions(code))


def _conditions(tree: ast.AST) -> Iterator[ast.AST]:
    """Yield the syntax nodes that decide which code runs.

    These are the tests of ``if``, ``while``, ``assert`` and comprehensions, and whole ``and``, ``or``, ``try`` and
    ``match``.
    """
    for node in ast.walk(tree):
        if isinstance(node, _CONDITIONAL):
            yield node.test
        elif isinstance(node, ast.comprehension):
            yield from node.ifs
        elif isinstance(node, (ast.BoolOp, ast.Try, ast.Match)):
            yield node


def _is_fixed(condition: ast.AST, varying: set[str], names: dict[str, Any]) -> bool:
    """Whether a condition has the same result in every call: it reads no argument and no local variable but the module.

    Args:
        condition: a syntax node.
        varying: names of arguments and local variables.
        names: global names, and the module's, with what they stand for.
    """
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
    """Return whether a condition with a fixed result is true.

    None if that depends on the mode or can't be evaluated.
    """
    text = ast.unparse(operand)
    try:
        return None if "training" in text else bool(eval(text, names))
    except Exception:
        return None


def _called(tree: ast.AST, module: nn.Module, function: FunctionType, receiver: str) -> Iterator[Any]:
    """Yield the methods of the module, and the functions, that a source names; None for names that are neither.

    ``tree`` is the syntax tree of ``function``, and ``receiver`` its name for the module.
    """
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
