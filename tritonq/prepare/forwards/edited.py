"""Modules that run an edited forward instead of their class's own."""

from __future__ import annotations

import copyreg
import inspect
import itertools
import json
from collections import OrderedDict
from collections.abc import Callable, Iterable
from types import FunctionType
from typing import Any
from weakref import WeakValueDictionary

from torch import Tensor, nn

from tritonq.prepare.forwards.answered import answering, check_answers
from tritonq.prepare.forwards.graph import DATA_VERSION, ForwardData, ForwardGraph, compile_graph


class EditedForward:
    """Mixin of the classes that carry an edited forward; each is a subclass of the module's own class."""

    _tritonq_class: type[nn.Module]
    _tritonq_forward: str

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced = super().__reduce_ex__(protocol)
        # The class is made at run time, so a pickle (and deepcopy) names what it was made from.
        if isinstance(reduced, tuple) and reduced[0] is copyreg.__newobj__:  # type: ignore[attr-defined]
            state = _without_graphs(reduced[2])
            return (_rebuild, (self._tritonq_class, self._tritonq_forward), state, *reduced[3:])
        return reduced


def _without_graphs(state: Any) -> Any:
    """A module's state, where tensors that a forward left on it are detached: copies and files refuse others."""
    if not isinstance(state, dict):
        return state
    return {
        name: value.detach() if isinstance(value, Tensor) and value.grad_fn is not None else value
        for name, value in state.items()
    }


def forward_data(module: nn.Module) -> ForwardData | None:
    """The plain data of a module's edited forward, or None where the forward is the class's own."""
    return json.loads(module._tritonq_forward) if isinstance(module, EditedForward) else None


def forward_source(module: nn.Module) -> dict[str, str]:
    """Return the Python source of a module's edited forward by mode; empty where the forward is the class's own.

    The modes are ``"eval"`` and ``"train"``, or ``"eval and train"`` where both run the same.
    """
    data = forward_data(module)
    if data is not None and "answers" in data:
        told = {"run": "as written", "replace": "self.{child}({operands})", "erase": "its first operand"}
        lines = [
            f"{place} -> {told[kind].format(child=child, operands=operands)}" + (f", then self.{then}" if then else "")
            for place, (kind, child, operands, then) in data["answers"].items()
        ]
        return {"its own forward, with these calls answered": "\n".join(lines)}
    if data is None or data["eval"] is None:
        return {}
    sources = [graph.python_code("self").src.strip() for graph in ForwardGraph.from_data(data).graphs()]
    return {"eval and train": sources[0]} if len(sources) == 1 else dict(zip(("eval", "train"), sources, strict=True))


def apply_forward(module: nn.Module, data: ForwardData, hidden: Iterable[str] = ()) -> None:
    """Give ``module`` the forward that ``data`` describes, in place; its type stays a subclass of its class.

    Args:
        module: the module.
        data: from :meth:`ForwardGraph.to_data` or :func:`forward_data`.
        hidden: children that a Sequential should not run, count or index, besides those that ``data`` names.

    Raises:
        ValueError: data that doesn't describe a forward, or one that calls children which ``module`` doesn't have.
    """
    names = sorted({*data.get("hidden", ()), *hidden}) if isinstance(data, dict) else []
    plain: ForwardData = {"version": DATA_VERSION, "eval": None, "train": None, "hidden": names}
    children = dict(module.named_modules(remove_duplicate=False))
    if isinstance(data, dict) and "answers" in data:
        check_answers(data["answers"], children, type(module).__name__)
        plain |= {"version": ANSWERS_VERSION, "answers": data["answers"]}
    elif not isinstance(data, dict) or data.get("eval") is not None or data.get("version") != DATA_VERSION:
        graph = ForwardGraph.from_data(data)
        for node in itertools.chain.from_iterable(part.nodes for part in graph.graphs()):
            if node.op == "call_module" and node.target not in children:
                raise ValueError(
                    f"the forward calls the child {node.target!r}, which {type(module).__name__} doesn't have"
                )
        plain |= graph.to_data()
    module.__class__ = _edited_class(original_class(module), json.dumps(plain, sort_keys=True))


def hide_children(module: nn.Sequential, names: Iterable[str]) -> None:
    """Let a Sequential hold children that it does not run, count or index: quantizers that hooks call."""
    apply_forward(module, forward_data(module) or {"version": DATA_VERSION, "eval": None}, names)


def original_class(module: nn.Module) -> type[nn.Module]:
    """The class of a module as its author wrote it, also after its forward was edited."""
    return module._tritonq_class if isinstance(module, EditedForward) else type(module)


# Data of this version names answered calls; the earlier one knows graphs alone.
ANSWERS_VERSION = 2
# Modules of one class with equal forwards share the class, and so what torch.compile makes of it.
_classes: WeakValueDictionary[tuple[type, str], type[nn.Module]] = WeakValueDictionary()


def _edited_class(original: type[nn.Module], encoded: str) -> type[nn.Module]:
    known = _classes.get((original, encoded))
    if known is not None:
        return known
    data: ForwardData = json.loads(encoded)
    namespace = {
        "_tritonq_class": original,
        "_tritonq_forward": encoded,
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
        "__doc__": original.__doc__,
    }
    if data["eval"] is not None:
        forwards = [compile_graph(part, original.__name__) for part in ForwardGraph.from_data(data).graphs()]
        forward = forwards[0] if len(forwards) == 1 else _by_mode(*forwards)
        forward.__signature__ = inspect.signature(original.forward)  # type: ignore[attr-defined]
        namespace["forward"] = forward
    elif "answers" in data:
        forward = answering(original.forward, data["answers"])
        forward.__signature__ = inspect.signature(original.forward)  # type: ignore[attr-defined]
        namespace["forward"] = forward
    if data["hidden"] and issubclass(original, nn.Sequential):
        namespace |= _sequence_without(frozenset(data["hidden"]))
    metaclass: Any = type(original)
    made: type[nn.Module] = metaclass(original.__name__, (EditedForward, original), namespace)
    _classes[original, encoded] = made
    return made


def _by_mode(in_eval: FunctionType, in_train: FunctionType) -> Callable[..., Any]:
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return in_train(self, *args, **kwargs) if self.training else in_eval(self, *args, **kwargs)

    return forward


def _sequence_without(hidden: frozenset[str]) -> dict[str, Callable[..., Any]]:
    """What makes a Sequential a sequence, without some of its children."""

    def visible(self: nn.Sequential) -> nn.Sequential:
        return nn.Sequential(OrderedDict((name, child) for name, child in self._modules.items() if name not in hidden))

    def iterate(self: nn.Sequential) -> Any:
        return iter([child for name, child in self._modules.items() if name not in hidden])

    return {
        "__iter__": iterate,
        "__len__": lambda self: len(self._modules) - len(hidden),
        "__getitem__": lambda self, index: visible(self)[index],
    }


def _rebuild(original: type[nn.Module], encoded: str) -> nn.Module:
    cls = _edited_class(original, encoded)
    return cls.__new__(cls)
