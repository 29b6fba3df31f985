"""Operators that a compiler sees into: their reference's tensor operations take their place in its graph.

Dynamo, which traces Python, meets one call. AOTAutograd, which removes in-place updates from the graph, replaces the
call by the operations of its reference. So Inductor makes loops of a hundred small operations, and its partitioner
keeps the smallest tensors that a backward needs. ``torch.library.triton_op`` does the same for operators that are made
of Triton kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.functional_tensor import FunctionalTensor, FunctionalTensorMode
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import CheckpointPolicy

from tritonq.backend import select

_JOINS = (torch.ops.aten.add.Tensor, torch.ops.aten.mul.Tensor)


def make_visible(call: Any, run: Callable[..., Any], has_kernel: bool, made_again: bool) -> None:
    """Register that ``torch.compile`` replaces an operator's call by the operations of ``run``, if no kernel runs.

    The call stays one call in ``torch.export``, and for tensors of a user's subclass of ``Tensor``.

    Args:
        call: the operator, from ``torch.library.custom_op``.
        run: a function of the same arguments that computes the operator's results by PyTorch operations.
        has_kernel: whether the operator has a Triton kernel. If so, its call is replaced only where
            `tritonq.backend.select` chooses "torch" for the first tensor argument.
        made_again: whether a compiled backward preferably recomputes results that have at least as many elements as
            the first tensor argument, instead of keeping them.
    """

    def decompose(mode: Any, op: Any, types: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if mode.export or not _is_traced(types) or (has_kernel and select(_first(args)) != "torch"):
            return mode.__torch_dispatch__(op, types, args, kwargs)
        with mode, _compiling(), _made_again(_first(args)) if made_again else nullcontext():
            return run(*args, **kwargs)

    call.register_torch_dispatch(FunctionalTensorMode, decompose)


def _is_traced(types: tuple[type, ...]) -> bool:
    """Whether all tensors are of torch's own classes, none of a user's subclass; only then is a call replaced."""
    known = (Tensor, torch.nn.Parameter, FunctionalTensor, torch._subclasses.FakeTensor)
    return all(kind in known for kind in types)


def _first(args: tuple[Any, ...]) -> Tensor:
    return next(leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor))


@contextmanager
def _made_again(first: Tensor) -> Iterator[None]:
    """Let a backward compute operations of the block again, if their results are as large as ``first``.

    A sum or product that they read is marked, too. Without a mark the partitioner keeps what a convolution reads in the
    backward, however cheap it is to compute.
    """
    mode = get_proxy_mode()
    if mode is None:
        yield
        return
    nodes, before = mode.tracer.graph.nodes, len(mode.tracer.graph.nodes)
    yield
    made = list(islice(reversed(nodes), len(nodes) - before))
    read = {node for each in made for node in each.all_input_nodes if node.target in _JOINS}
    for node in (*made, *read):
        value = node.meta.get("val")
        if node.op == "call_function" and isinstance(value, Tensor) and value.numel() >= first.numel():
            node.meta["recompute"] = CheckpointPolicy.PREFER_RECOMPUTE


@contextmanager
def _compiling() -> Iterator[None]:
    """Make ``torch.compiler.is_compiling()`` true inside the block.

    Before version 2.13 torch makes it true only while Dynamo runs, and so not where AOTAutograd replaces calls.
    """
    before = torch.compiler._is_compiling_flag
    torch.compiler._is_compiling_flag = True
    try:
        yield
    finally:
        torch.compiler._is_compiling_flag = before
