"""Everything that a step launches on a GPU, counted on the meta device: kernels, and torch's own operators."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._dynamo.trace_rules import get_torch_obj_rule_map
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tritonq import backend
from tritonq.fake_quantize_base import FakeQuantizeBase
from tritonq.kernels import batch_norm_weight, launch_sizes, reduction, weight
from tritonq.kernels.cached_launch import Launcher

# Operators that allocate or make views.
_FREE = frozenset({"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view", "detach"})


class Launched(NamedTuple):
    """One launch.

    Attributes:
        name: of the kernel or the operator.
        bytes: of the tensors that it reads and writes, each counted once, or twice where an operator works in place.
    """

    name: str
    bytes: int


class StepLog(TorchDispatchMode):
    """What is launched while the mode is on.

    On the meta device every read by the host raises, so that the count holds for steps that a CUDA graph can capture.

    Attributes:
        launches: kernels, and operators of torch, of which a backward convolution counts as two.
    """

    def __init__(self) -> None:
        super().__init__()
        self.launches: list[Launched] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        name = func.name().split("::")[-1].split(".")[0]
        tensors = [leaf for leaf in tree_leaves((args, kwargs, results)) if isinstance(leaf, Tensor)]
        if tensors and name not in _FREE and not func.is_view:
            moved = sum(map(_bytes, tensors))
            self.launches += [Launched(name, moved)] * (2 if name == "convolution_backward" else 1)
        return results

    def _note_kernel(self, launcher: Launcher, args: tuple[Any, ...]) -> None:
        tensors = {id(value): value for value in args if isinstance(value, Tensor)}
        self.launches.append(Launched(launcher.function.fn.__name__, sum(map(_bytes, tensors.values()))))

    @contextmanager
    def kernels(self) -> Iterator[None]:
        """Inside, tensors on the meta device are taken for a GPU's, and kernels are noted instead of launched."""

        def note(launcher: Launcher, grid: Any, *args: Any, **constants: Any) -> None:
            self._note_kernel(launcher, args)

        with ExitStack() as stack:
            stack.enter_context(patch.object(backend, "_obstacle", lambda x: None))
            stack.enter_context(patch.object(Launcher, "_launch", note))
            for module in (launch_sizes, reduction, weight, batch_norm_weight):
                if hasattr(module, "warp_size"):
                    stack.enter_context(patch.object(module, "warp_size", lambda device: 32))
            yield


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


@contextmanager
def autocast(dtype: torch.dtype | None) -> Iterator[None]:
    """Stand in for autocast, which does not know the meta device: tritonq's operators ask these two functions."""
    # Dynamo looks up by name, once, what it knows of torch's functions: it is to find torch's own.
    get_torch_obj_rule_map()
    with (
        patch.object(torch, "is_autocast_enabled", lambda device_type=None: dtype is not None),
        patch.object(torch, "get_autocast_dtype", lambda device_type: dtype),
    ):
        yield


def on_meta(model: nn.Module, memory_format: torch.memory_format) -> nn.Module:
    """Move a trained model to the meta device; its switches count as read, as after the first step on a GPU."""
    model.to("meta").to(memory_format=memory_format)
    for module in model.modules():
        if isinstance(module, FakeQuantizeBase):
            switch = module.fake_quant_enabled
            module._switch_read = ((switch.data_ptr(), switch._version), True)
    return model
