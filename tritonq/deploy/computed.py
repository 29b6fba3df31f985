"""Converted models whose weights were computed by the forward (from other parameters): that computation is removed."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, fx, nn

from tritonq.deploy.modules import QuantizedLayer
from tritonq.nn.computed import ComputedParameters
from tritonq.prepare.forwards.edited import apply_forward, forward_data
from tritonq.prepare.forwards.graph import ForwardGraph


def drop_computations(model: nn.Module, computed: Iterable[ComputedParameters]) -> None:
    """Remove the computation of weights from forwards, and replace what only this computation read by stand-ins.

    A converted layer has fixed codes and ignores the weight that it is given. A forward that is a graph loses the nodes
    that computed the weight; any other forward goes on computing with *stand-ins*, tensors without memory, which costs
    nothing. They replace the parameters and buffers that nothing but such computations reads; all others stay.

    Args:
        model: a converted model; changed in place.
        computed: for each layer whose weight is computed, how; its ``state`` has what the computation reads, with
            ``exclusive`` True for what nothing but such computations reads.
    """
    for module in model.modules():
        data = forward_data(module)
        if data is None or data.get("eval") is None:
            continue
        graph = ForwardGraph.from_data(data)
        dropped = [_drop_arguments(part, module) for part in graph.graphs()]
        if any(dropped):
            apply_forward(module, {**data, **graph.to_data()})
    for parameters in computed:
        for entry in parameters.state:
            if entry.exclusive and entry.module.module is not None:
                stand_in(entry.module.module, entry.name)


def stand_in(module: nn.Module, name: str) -> None:
    """Replace a module's own parameter or buffer by a meta tensor (without memory) of the same shape and dtype.

    That is a plain attribute, in no state dict. Nothing is done if the module has no such parameter or buffer, or has
    None registered in its place.
    """
    for registry in (module._parameters, module._buffers):
        tensor: Tensor | None = registry.get(name)
        if tensor is not None:
            del registry[name]
            module._non_persistent_buffers_set.discard(name)
            module.__dict__[name] = torch.empty_like(tensor, device="meta", requires_grad=False)


def stand_ins(module: nn.Module) -> list[str]:
    """Return the names of a module's own stand-ins: its plain attributes that are meta tensors, without memory.

    :func:`stand_in` makes them. Parameters, buffers and attributes of children are left out.
    """
    return [name for name, value in vars(module).items() if isinstance(value, Tensor) and value.is_meta]


def _drop_arguments(graph: fx.Graph, module: nn.Module) -> bool:
    """Drop all arguments but the input from calls of converted layers, and the nodes that only they read, in place.

    Return whether any call had more. ``module`` is the one whose forward ``graph`` is; it finds the called layers.
    """
    unused: list[fx.Node] = []
    for node in graph.nodes:
        if node.op != "call_module" or len(node.args) < 2:
            continue
        layer = module.get_submodule(str(node.target))
        if isinstance(layer, QuantizedLayer) and layer.takes_weight:
            unused += node.all_input_nodes[1:]
            node.args = node.args[:1]
    found = bool(unused)
    while unused:
        node = unused.pop()
        if node.users or node.op == "placeholder" or node.graph is not graph or node._erased:
            continue
        unused += node.all_input_nodes
        graph.erase_node(node)
    return found
