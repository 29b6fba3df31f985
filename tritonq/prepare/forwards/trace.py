"""Trace the forward of one module into a torch.fx graph, in which its children are single calls."""

from __future__ import annotations

import copy
import inspect
import random
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode

from tritonq.prepare.forwards.checkpointed import is_checkpointed
from tritonq.prepare.forwards.graph_data import check_argument
from tritonq.prepare.record.dataflow import Frame, refs_in
from tritonq.prepare.record.operations import METADATA, operation_name
from tritonq.prepare.record.snapshot import preserved_random_state, tensor_version

_NUMBERS = (int, float)
_CONTAINERS = {dict, list, tuple, torch.Size}
_CONTAINERS |= {fx.immutable_collections.immutable_dict, fx.immutable_collections.immutable_list}
_CONSTANTS = (type(None), bool, int, float, str)
# What ``cuda()`` and ``half()`` change. ``self.weight.device`` is no constant of a trace, as that of
# ``next(self.parameters())`` is.
_CHANGED_BY_MOVES = frozenset(["device", "dtype", "get_device", "is_cpu", "is_cuda", "is_mps", "is_xpu", "type"])


class TraceError(Exception):
    """Say that no graph can stand for a forward.

    The message is a clause in which "it" is the forward, such as "it writes to a buffer".
    """


@dataclass(frozen=True)
class Arguments:
    """How the parameters of a forward are traced.

    Attributes:
        traced: names of the parameters that stay symbolic: tensors, containers of tensors, and numbers that may have
            been computed from a shape.
        constants: the other parameters by name, with the values (None, bool, int, float or str) for which the graph is
            made; the graph checks that it is given them. ``*args`` and ``**kwargs`` without items are left out.
    """

    traced: tuple[str, ...]
    constants: Mapping[str, Any]


def bind_frame(signature: inspect.Signature, frame: Frame) -> dict[str, Any]:
    """Return the arguments of one recorded run of a forward by parameter name, with defaults filled in.

    Args:
        signature: of the forward, without self.
        frame: the recorded run; its arguments, and so the returned ones, have a
            :class:`~tritonq.prepare.record.dataflow.Ref` in the place of each tensor.

    Raises:
        TraceError: the signature doesn't take these arguments.
    """
    try:
        bound = signature.bind(*frame.args, **frame.kwargs)
    except TypeError as error:
        raise TraceError(f"its arguments don't fit its signature: {error}") from None
    bound.apply_defaults()
    return dict(bound.arguments)


def classify_arguments(signature: inspect.Signature, frames: Iterable[Frame]) -> Arguments:
    """Return which parameters of a forward a trace keeps symbolic, and which it fixes.

    Tensors and containers with a tensor stay symbolic. So does an int or float (no bool) that is not the parameter's
    default in the first frame, since it may have been computed from a shape. Any other argument is fixed: it must be
    None, a bool, int, float or str, and the same in all frames.

    Args:
        signature: of the forward, without self.
        frames: all recorded runs of the forward; at least one.

    Raises:
        TraceError: arguments that don't fit the signature, a fixed argument that differs between frames or has another
            type, such as a tuple of numbers, or ``*args`` or ``**kwargs`` with items but no tensor.
    """
    calls = [bind_frame(signature, frame) for frame in frames]
    traced, constants = [], {}
    for name, parameter in signature.parameters.items():
        values = [call[name] for call in calls]
        is_number = all(type(value) in _NUMBERS for value in values) and values[0] != parameter.default
        if is_number or any(refs_in(value) for value in values):
            traced.append(name)
        elif parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            if any(values):
                raise TraceError(f"it was called with extra arguments that are not tensors: {values[0]!r}")
        elif any(value != values[0] or type(value) is not type(values[0]) for value in values):
            raise TraceError(f"its argument {name} differs between calls")
        elif not isinstance(values[0], _CONSTANTS):
            raise TraceError(f"its argument {name} is neither tensor nor constant")
        else:
            constants[name] = values[0]
    return Arguments(tuple(traced), constants)


def forward_signature(module: nn.Module) -> inspect.Signature:
    """Return the signature of a module's forward, without self."""
    return inspect.signature(module.forward)


def trace(module: nn.Module, arguments: Arguments, training: bool) -> fx.Graph:
    """Trace ``module.forward`` and return its graph; the module is left as it is.

    Children become single calls; parameters and buffers become attributes that the graph reads. Of a
    ``torch.fx.GraphModule`` a copy of its own graph is returned, for both modes.

    Args:
        module: the module.
        arguments: which parameters of the forward stay symbolic.
        training: the value of ``self.training`` that the forward sees.

    Raises:
        TraceError: the forward branches on tensors, has side effects, draws random numbers in Python or NumPy, switches
            autocast or gradients, hands functions to torch's checkpoint, takes tensors through ``*args`` or
            ``**kwargs``, builds containers such as named tuples, reads values that a graph would keep as constants or
            tensors that are neither parameter nor buffer, was replaced on the instance, is the graph of a torch.export
            program, or raises any other error while torch.fx runs it.
    """
    if "forward" in vars(module):
        raise TraceError("its forward was replaced on the instance")
    if isinstance(module, fx.GraphModule):
        return _own_graph(module)
    shadow = _shadow(module)
    shadow.training = training
    versions = [(buffer, tensor_version(buffer)) for buffer in module.buffers()]
    before = _random_states()
    try:
        with preserved_random_state(module), _FreezeGuard():
            graph = _Tracer(arguments).trace(shadow)
            after = _random_states()
    except TraceError:
        raise
    except Exception as error:
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise TraceError(f"torch.fx can't trace it: {reason}") from error
    if after != before:
        raise TraceError("it draws random numbers in Python or NumPy")
    if any(tensor_version(buffer) != version for buffer, version in versions):
        raise TraceError("it writes to a buffer")
    _check_attributes(graph, module)
    _check_side_effects(shadow, module)
    return graph


def _random_states() -> tuple[Any, ...]:
    """Return the states of the random generators of Python and NumPy, in a form that can be compared."""
    name, keys, *rest = np.random.get_state()
    return random.getstate(), name, bytes(np.asarray(keys)), *rest


def _own_graph(module: fx.GraphModule) -> fx.Graph:
    """Return a copy of a GraphModule's graph, which is its forward in both modes.

    Raises:
        TraceError: the graph takes or returns structures in a way of its own, or reads a tensor that is neither
            parameter nor buffer.
    """
    if type(module.graph._codegen) is not fx.graph.CodeGen:
        raise TraceError("its graph takes and returns structures in a way of its own, as those of torch.export do")
    graph = fx.Graph()
    graph.output(graph.graph_copy(module.graph, {}))
    _check_attributes(graph, module)
    return graph


def _shadow(module: nn.Module) -> nn.Module:
    """Return a copy of ``module`` that shares its contents, but keeps what its forward assigns for itself."""
    # Not copy.copy, which classes may refuse, as parametrized modules do.
    shadow = type(module).__new__(type(module))
    shadow.__dict__.update(vars(module))
    for name, value in vars(module).items():
        if isinstance(value, (dict, list, set)):
            shadow.__dict__[name] = copy.copy(value)
    return shadow


def _check_side_effects(shadow: nn.Module, module: nn.Module) -> None:
    """Raise TraceError if the forward, run on the copy ``shadow``, assigned or changed an attribute."""
    before, after = vars(module), vars(shadow)
    changed = [
        name
        for name in {**before, **after}
        if name != "training" and not _same_contents(before.get(name, shadow), after.get(name, shadow))
    ]
    if changed:
        raise TraceError(f"it changes attributes ({', '.join(sorted(changed))})")


def _same_contents(before: Any, after: Any) -> bool:
    """Whether two attributes are one object, or containers of the same objects."""
    if isinstance(before, (list, set)) and isinstance(after, (list, set)):
        return list(map(id, before)) == list(map(id, after))
    if isinstance(before, dict) and isinstance(after, dict):
        return {key: id(held) for key, held in before.items()} == {key: id(held) for key, held in after.items()}
    return before is after


class _Tracer(fx.Tracer):
    """Trace one forward: children are leaves, buffers stay attributes, parameters of the forward keep their names.

    Raises TraceError where the forward changes the grad mode or autocast, hands functions to torch's checkpoint, builds
    a container of a class of its own, or takes tensors through ``*args`` or ``**kwargs``.
    """

    proxy_buffer_attributes = True

    def __init__(self, arguments: Arguments) -> None:
        super().__init__()
        self.trace_asserts = True
        self._arguments = arguments
        self._context = _context()

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        if _context() != self._context:
            raise TraceError("it changes the grad mode or autocast inside its forward")
        if is_checkpointed(sys._getframe(1)):
            raise TraceError("it hands functions to torch.utils.checkpoint, which a graph would run once")
        return super().create_node(*args, **kwargs)

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, (dict, list, tuple)) and type(a) not in _CONTAINERS:
            # torch.fx would make a plain dict of it.
            raise TraceError(f"it builds a {type(a).__qualname__}")
        return super().create_arg(a)

    def create_args_for_root(
        self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None
    ) -> tuple[Any, list[Any]]:
        signature = inspect.signature(root_fn)
        positional: list[Any] = []
        keywords: dict[str, Any] = {}
        for name, parameter in list(signature.parameters.items())[1:]:  # the first is self
            variable = parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
            if variable and name in self._arguments.traced:
                raise TraceError(f"it takes tensors through *args or **kwargs ({name})")
            if variable:
                continue
            default = () if parameter.default is parameter.empty else (parameter.default,)
            value: Any = self.create_proxy("placeholder", name, default, {})
            if name in self._arguments.constants:
                expected = self._arguments.constants[name]
                label = f"{type(self.root).__name__}.forward argument {name}"
                self.create_proxy("call_function", check_argument, (value, expected, label), {})
                value = expected
            if parameter.kind is parameter.KEYWORD_ONLY:
                keywords[name] = value
            else:
                positional.append(value)
        return lambda *given: root_fn(*given, **keywords), [self.root, *positional]


class _FreezeGuard(TorchFunctionMode):
    """Refuse torch functions on tensors that are not traced: the graph would keep their result as a constant.

    It raises TraceError. Questions about metadata such as a shape are allowed, but not about what ``cuda()`` and
    ``half()`` change, such as dtype and device.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        traced = any(issubclass(kind, fx.Proxy) for kind in types) or _holds_proxy((args, kwargs))
        is_asked = not traced and bool(args) and isinstance(args[0], Tensor)  # not torch.device("cpu")
        if is_asked and operation_name(func) in _CHANGED_BY_MOVES:
            raise TraceError(f"it asks a parameter for its {operation_name(func)}, which a trace would freeze")
        if not traced and operation_name(func) not in METADATA:
            raise TraceError(
                f"it calls {operation_name(func)} on nothing that it was given, which a trace would freeze"
            )
        return func(*args, **kwargs)


def _holds_proxy(item: Any) -> bool:
    if isinstance(item, dict):
        item = tuple(item.values())
    if isinstance(item, (tuple, list)):
        return any(_holds_proxy(child) for child in item)
    return isinstance(item, fx.Proxy)


def _context() -> tuple[bool, ...]:
    """Return whether gradients, and autocast on each device, are switched on."""
    devices = [device for device in ("cpu", "cuda") if torch.amp.is_autocast_available(device)]
    return (torch.is_grad_enabled(), *(torch.is_autocast_enabled(device) for device in devices))


def _check_attributes(graph: fx.Graph, module: nn.Module) -> None:
    """Raise TraceError if the graph reads an attribute that is neither parameter nor buffer of the module."""
    known = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    known |= {name for name, _ in module.named_buffers(remove_duplicate=False)}
    for node in graph.nodes:
        if node.op == "get_attr" and node.target not in known:
            raise TraceError(f"it uses a tensor that is neither parameter nor buffer ({node.target})")
