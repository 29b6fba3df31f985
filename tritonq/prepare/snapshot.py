"""Put a model back exactly as it was: its modules, parameters, buffers, hooks, attributes, modes and random state."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class ModelSnapshot:
    """What every module of a model holds, taken so that any edit can be undone.

    Modules, parameters and attributes are remembered by identity; buffers also by value, since a forward may write
    into them. ``restore`` undoes replaced children, added hooks, changed classes, modes and attributes.
    """

    def __init__(self, model: nn.Module) -> None:
        self._modules = [_ModuleState(module) for module in model.modules()]

    def restore(self) -> None:
        """Undo everything that happened to the model since the snapshot was taken."""
        for state in self._modules:
            state.restore()


class _ModuleState:
    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.cls = type(module)
        self.attributes = dict(module.__dict__)
        # The registries (_modules, _parameters, hooks, …) are changed in place, so their contents are kept as well.
        self.registries = {key: dict(value) for key, value in module.__dict__.items() if isinstance(value, dict)}
        self.buffers = [_BufferState(buffer) for buffer in module._buffers.values() if buffer is not None]

    def restore(self) -> None:
        self.module.__class__ = self.cls
        self.module.__dict__.clear()
        self.module.__dict__.update(self.attributes)
        for key, contents in self.registries.items():
            registry = self.module.__dict__[key]
            registry.clear()
            registry.update(contents)
        for buffer in self.buffers:
            buffer.restore()


class _BufferState:
    def __init__(self, buffer: Tensor) -> None:
        self.buffer = buffer
        self.version = tensor_version(buffer)
        self.value = buffer.detach().clone()

    def restore(self) -> None:
        # The version counter tells, without a device synchronisation, whether anything was written.
        if tensor_version(self.buffer) != self.version:
            with torch.no_grad():
                self.buffer.copy_(self.value)


def tensor_version(tensor: Tensor) -> int:
    """How often the tensor's storage was written in place; 0 for inference tensors, which do not count."""
    return 0 if tensor.is_inference() else int(tensor._version)


@contextmanager
def preserved_random_state(model: nn.Module) -> Iterator[None]:
    """Restore Python's and torch's random state (CPU, and the GPUs that hold the model) on leaving."""
    tensors = [*model.parameters(), *model.buffers()]
    devices = sorted({tensor.device.index for tensor in tensors if tensor.device.type == "cuda"})
    state: Any = random.getstate()
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            random.setstate(state)
