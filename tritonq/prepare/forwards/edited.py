"""Put an edited forward on a module: the module gets a class made for it, a subclass of its own class.

*Forward data* are plain data that describe the edits, so that pickles and files hold no code. Their keys: "version";
"eval" and "train", the graph of each mode ("train" is None if it is the same; "eval" is None without a graph);
"answers" and "expected" of :mod:`~tritonq.prepare.forwards.answered`; "values" and "otherwise" of
:mod:`~tritonq.prepare.forwards.guarded`; "reads" and "returns" of :mod:`~tritonq.prepare.forwards.quantized`; "hidden",
names of children that ``children()`` leaves out; "on_instance", the parameters of a forward that was replaced on the
instance.
"""

from __future__ import annotations

import copyreg
import inspect
import itertools
import json
from collections.abc import Callable, Iterable
from functools import partial
from types import FunctionType
from typing import Any
from weakref import WeakValueDictionary

from torch import Tensor, fx, nn

from tritonq.nn.kept_class import KeepsClass, joined_class, new_joined
from tritonq.nn.original_class import original_class
from tritonq.prepare.forwards.answered import answering, check_answers
from tritonq.prepare.forwards.graph import DATA_VERSION, QUANTIZING_VERSION, ForwardData, ForwardGraph, compile_graph
from tritonq.prepare.forwards.graph_module import read_graph, write_graph
from tritonq.prepare.forwards.guarded import check_values, guarded
from tritonq.prepare.forwards.hidden import HidesChildren, container_methods
from tritonq.prepare.forwards.open_attention import open_attention
from tritonq.prepare.forwards.quantized import Read, quantizing


class EditedForward(HidesChildren):
    """Let modules with an edited forward be pickled and copied, and hide the children that the edit added.

    The class of such a module is made at run time, with this one and the module's own class as bases, and its forward
    is the edited one. ``pickle`` can't import it by name, so the module's own class and the edited forward, as data,
    are written in its place.

    Attributes:
        _tritonq_class: the module's own class.
        _tritonq_forward: the forward data as JSON.
    """

    _tritonq_class: type[nn.Module]
    _tritonq_forward: str

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced = super().__reduce_ex__(protocol)
        # The class is made at run time, so a pickle (and deepcopy) names what it was made from.
        if isinstance(reduced, tuple) and reduced[0] in (copyreg.__newobj__, new_joined):  # type: ignore[attr-defined]
            state, original = _without_graphs(reduced[2]), self._tritonq_class
            if not isinstance(state, dict) or "_modules" not in state:
                state = {_OWN_STATE: state, _CHILDREN: dict(self._modules), "training": self.training}
            parts = original._tritonq_joined if issubclass(original, KeepsClass) else original
            return (_rebuild, (parts, self._tritonq_forward), state, *reduced[3:])
        return reduced

    def __setstate__(self, state: Any) -> None:
        own = isinstance(state, dict) and _OWN_STATE in state
        super().__setstate__(state[_OWN_STATE] if own else state)  # type: ignore[no-untyped-call]
        if own:
            self._modules.update(state[_CHILDREN])
            self.training = state["training"]


# In the state of a class that makes its own, without the children that it was given.
_OWN_STATE, _CHILDREN = "_tritonq_own_state", "_tritonq_children"


def _without_graphs(state: Any) -> Any:
    """Return a module's state with its tensors detached from autograd: copies and files refuse others."""
    if not isinstance(state, dict):
        return state
    return {
        name: value.detach() if isinstance(value, Tensor) and value.grad_fn is not None else value
        for name, value in state.items()
    }


def forward_data(module: nn.Module) -> ForwardData | None:
    """Return the forward data of a module; None if :func:`apply_forward` did not edit it.

    A ``torch.fx.GraphModule``, edited or not, has the data of its graph; None if plain data can't hold that.
    """
    if isinstance(module, fx.GraphModule):
        return read_graph(module)
    return json.loads(module._tritonq_forward) if isinstance(module, EditedForward) else None


def forward_source(module: nn.Module) -> dict[str, str]:
    """Return the Python source of a module's edited forward, by mode.

    The keys are ``"eval"`` and ``"train"``, or ``"eval and train"`` if both modes run the same, as those of a
    GraphModule always do: it shows its graph, edited or not, with the quantizers of arguments and results.
    A forward that keeps its branches has no graph: it runs as written, but some of its calls are *answered*, which is
    to say that a child's result or the first operand takes the place of the call's result. Then the one key is
    ``"its own forward, with these calls answered"``, and the text has a line ``place -> answer`` for each of these
    calls, such as ``net:Net.forward:3.8-3.20#0 -> self.child(tensors), then self.quantizer``. Only a GraphModule shows
    quantized arguments and results; the dict is empty if the edit did nothing else, or if there is none.
    """
    data = forward_data(module)
    if data is not None and "answers" in data:
        told = {"run": "as written", "replace": "self.{child}({operands})", "erase": "its first operand"}
        lines = [
            f"{place} -> {told[kind].format(child=child, operands=operands)}" + (f", then self.{then}" if then else "")
            for place, (kind, child, operands, then, *_) in data["answers"].items()
        ]
        return {"its own forward, with these calls answered": "\n".join(lines)}
    if data is None or data["eval"] is None:
        return {}
    graphs = ForwardGraph.from_data(data).graphs()
    sources = [graph.python_code("self").src.strip() for graph in graphs]
    return {"eval and train": sources[0]} if len(sources) == 1 else dict(zip(("eval", "train"), sources, strict=True))


def apply_forward(module: nn.Module, data: ForwardData, hidden: Iterable[str] = ()) -> None:
    """Give ``module`` the forward that ``data`` describes, in place; its type becomes a subclass of its class.

    The edits before are replaced. A ``torch.fx.GraphModule`` keeps its type, gets the edited graph for its own, and
    hides no children. If the module has a forward on the instance, that one is edited, not its class's.

    Args:
        module: the module.
        data: forward data, from ``to_data`` of a graph, :func:`forward_data` or :func:`quantizing_data`; or
            ``quantizing_data() | answers``, with ``answers`` from ``to_data`` of a forward that keeps its branches.
        hidden: names of children that ``children()`` leaves out, and that a container does not run, count or index,
            besides those that ``data`` names.

    Raises:
        ValueError: data that don't describe a forward, or that call children which ``module`` doesn't have; for a
            GraphModule also what :func:`~tritonq.prepare.forwards.graph_module.write_graph` refuses, such as "answers".
    """
    plain = _checked(module, data)
    if data["eval"] is not None or "answers" in data:
        open_attention(module)
    if isinstance(module, fx.GraphModule):
        write_graph(module, plain)
        return
    plain["hidden"] = sorted({*plain["hidden"], *hidden})
    if _changes_forward(plain):
        plain |= _moved_aside(module)
    module.__class__ = _edited_class(original_class(module), json.dumps(plain, sort_keys=True))


# Where a forward lies that was replaced on the instance, once it is edited: the edited one, of the class, runs it.
_OWN_FORWARD = "_tritonq_own_forward"


def _changes_forward(data: ForwardData) -> bool:
    """Whether forward data change what a module computes, and do not only hide children."""
    return data["eval"] is not None or "answers" in data or data["version"] == QUANTIZING_VERSION


def _moved_aside(module: nn.Module) -> ForwardData:
    """Move a forward that was set on the instance to another attribute, so that the class's forward runs.

    Returns ``{"on_instance": [[name, kind, has a default], …]}`` with its parameters; empty if there is no such
    forward.
    """
    own = vars(module).pop("forward", None)
    if own is not None:
        vars(module)[_OWN_FORWARD] = own
    own = vars(module).get(_OWN_FORWARD)
    if own is None:
        return {}
    parameters = inspect.signature(own).parameters.values()
    # A default counts when the forward runs; here it only says that there is one.
    return {"on_instance": [[item.name, item.kind, item.default is not item.empty] for item in parameters]}


def _own_forward(parameters: Iterable[tuple[str, int, bool]]) -> Callable[..., Any]:
    """Return a forward for a class that runs the one that :func:`_moved_aside` moved, and has its parameters.

    ``parameters`` has ``(name, kind of inspect.Parameter, whether it has a default)`` of each, without self.
    """

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return vars(self)[_OWN_FORWARD](*args, **kwargs)

    others = [
        inspect.Parameter(name, kind, **({"default": None} if has_default else {}))  # type: ignore[arg-type]
        for name, kind, has_default in parameters
    ]
    itself = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
    forward.__signature__ = inspect.Signature([itself, *others])  # type: ignore[attr-defined]
    return forward


def quantizing_data(reads: Iterable[Read] = (), returns: str | None = None) -> ForwardData:
    """Return forward data that quantize arguments and results, and leave the forward as it is otherwise.

    Args:
        reads: the arguments to quantize.
        returns: name of the child that quantizes the result; None: no child does.
    """
    return {
        "version": QUANTIZING_VERSION,
        "eval": None,
        "reads": [read.to_data() for read in reads],
        "returns": returns,
    }


def quantizing_part(module: nn.Module) -> ForwardData | None:
    """Return the part of a module's forward data that quantizes arguments and results; None if it quantizes none.

    The part is forward data too, with the keys "version", "eval" (None: no graph), "reads" and "returns". It is None
    for a module without forward data, and for a GraphModule, whose graph calls such quantizers itself.
    """
    data = forward_data(module) or {}
    if not data.get("reads") and data.get("returns") is None:
        return None
    return {"version": QUANTIZING_VERSION, "eval": None, "reads": data["reads"], "returns": data["returns"]}


def set_inner_forward(module: nn.Module, forward: Callable[..., Any]) -> None:
    """Let a module run ``forward`` in place of its own; it still quantizes arguments and results as before.

    A GraphModule no longer does: its graph, which called the quantizers, does not run.

    To be used on copies that are traced: the new forward is an attribute of the instance, and may keep the module from
    being pickled.

    Args:
        module: the module, changed in place.
        forward: called with the module's arguments, without the module.
    """
    data = quantizing_part(module)
    if data is None:
        module.forward = forward
        return

    def inner(_: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return forward(*args, **kwargs)

    reads = [Read.from_data(read) for read in data["reads"]]
    module.forward = partial(quantizing(inner, reads, data["returns"]), module)


def quantizer_names(data: ForwardData) -> list[str]:
    """Return the names of the children that quantize arguments and results, arguments first, in some forward data."""
    returns = [] if data.get("returns") is None else [data["returns"]]
    return [*(Read.from_data(read).child for read in data.get("reads", ())), *returns]


def _checked(module: nn.Module, data: Any) -> ForwardData:
    """Return forward data with every key, checked so that the module can run them.

    Raises:
        ValueError: data of another form or version, or that name children which the module doesn't have.
    """
    version = data.get("version", DATA_VERSION) if isinstance(data, dict) else None
    if version not in (DATA_VERSION, ANSWERS_VERSION, QUANTIZING_VERSION):
        raise ValueError(f"expected forward data of version {QUANTIZING_VERSION} or earlier, got {version!r}")
    owner = type(module).__name__
    children = dict(module.named_modules(remove_duplicate=False))
    plain: ForwardData = {"version": DATA_VERSION, "eval": None, "train": None, "hidden": list(data.get("hidden", ()))}
    called: list[str] = []
    if "answers" in data:
        check_answers(data["answers"], children, owner)
        plain |= {"version": ANSWERS_VERSION, "answers": data["answers"], "expected": data.get("expected", {})}
    elif data.get("eval") is not None:
        graph = ForwardGraph.from_data(data)
        nodes = itertools.chain.from_iterable(part.nodes for part in graph.graphs())
        called += [str(node.target) for node in nodes if node.op == "call_module"]
        plain |= graph.to_data()
        plain |= _checked_guard(data, children, owner)
    reads, returns = [Read.from_data(read) for read in data.get("reads") or ()], data.get("returns")
    if reads or returns is not None:
        plain |= {"version": QUANTIZING_VERSION, "reads": [read.to_data() for read in reads], "returns": returns}
        called += quantizer_names(plain)
    for child in called:
        if child not in children:
            raise ValueError(f"the forward calls the child {child!r}, which {owner} doesn't have")
    return plain


def _checked_guard(data: ForwardData, children: Iterable[str], owner: str) -> ForwardData:
    """Return the keys "values" and "otherwise" of forward data, checked; empty without "values".

    Args:
        data: forward data.
        children: names of the children that the forward may call.
        owner: class name of the module, for messages.
    """
    if "values" not in data:
        return {}
    check_values(data["values"])
    otherwise = data.get("otherwise")
    if otherwise is None:
        return {"values": data["values"], "otherwise": None}
    check_answers(otherwise.get("answers"), children, owner)
    answers = {"answers": otherwise["answers"], "expected": otherwise.get("expected", {})}
    return {"values": data["values"], "otherwise": answers}


# Data of this version names answered calls; the earlier one knows graphs alone.
ANSWERS_VERSION = 2
# Modules of one class with equal forwards share the class, and so what torch.compile makes of it.
_classes: WeakValueDictionary[tuple[type, str], type[nn.Module]] = WeakValueDictionary()


def _edited_class(original: type[nn.Module], encoded: str) -> type[nn.Module]:
    """Return the subclass of ``original`` that runs some forward data, given as JSON in ``encoded``.

    Modules of one class with equal forward data share the subclass.
    """
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
    authors = _own_forward(data["on_instance"]) if "on_instance" in data else original.forward
    forward: Callable[..., Any] | None = None
    if data["eval"] is not None:
        graph = ForwardGraph.from_data(data)
        forwards = [compile_graph(part, original.__name__) for part in graph.graphs()]
        forward = forwards[0] if len(forwards) == 1 else _by_mode(*forwards)
        if "values" in data:
            forward = guarded(forward, authors, data)
    elif "answers" in data:
        forward = answering(authors, data["answers"], data.get("expected"))
    if data["version"] == QUANTIZING_VERSION:
        reads = [Read.from_data(read) for read in data["reads"]]
        forward = quantizing(forward or authors, reads, data["returns"])
    if forward is not None:
        forward.__signature__ = inspect.signature(authors)  # type: ignore[attr-defined]
        namespace["forward"] = forward
    hidden = frozenset(data["hidden"])
    namespace |= {"_tritonq_hidden": hidden, **container_methods(original, hidden)}
    metaclass: Any = type(original)
    made: type[nn.Module] = metaclass(original.__name__, (EditedForward, original), namespace)
    _classes[original, encoded] = made
    return made


def _by_mode(in_eval: FunctionType, in_train: FunctionType) -> Callable[..., Any]:
    """Return a forward that runs one function in eval mode and another one in training mode."""

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return in_train(self, *args, **kwargs) if self.training else in_eval(self, *args, **kwargs)

    return forward


def _rebuild(original: type[nn.Module] | tuple[type[nn.Module], type[nn.Module]], encoded: str) -> nn.Module:
    """Return an empty module of an edited class, for a pickle or copy that sets its attributes next.

    Args:
        original: the class whose forward was edited; or two classes, which are joined by ``joined_class``.
        encoded: the forward data as JSON.
    """
    cls = _edited_class(joined_class(*original) if isinstance(original, tuple) else original, encoded)
    return cls.__new__(cls)
