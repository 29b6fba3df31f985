"""Undo edits of a model (modules, hooks, attributes, modes, buffers), copy a model, and preserve the random state."""

from __future__ import annotations

import copy
import io
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.jit import ScriptModule

from tritonq.prepare.record.closures import rebind_closures
from tritonq.prepare.record.structure import tensors_in

_CONTAINERS = (dict, list, set)


class ModelSnapshot:
    """Remember what every module of a model holds, so that :meth:`restore` can undo any edit.

    Modules, parameters and attributes are remembered by identity; buffers also by value, since a forward may write into
    them. Values of parameters are not remembered: training steps are not undone.

    Args:
        model: the model; what its modules hold now is remembered.
    """

    def __init__(self, model: nn.Module) -> None:
        self._modules = [_ModuleState(module) for module in model.modules()]

    def restore(self) -> None:
        """Undo every edit of the model since the snapshot was taken. It may be called more than once.

        For each module that the model had then, it puts back:

        - class, mode and attributes, by identity;
        - the entries of attributes that are dicts, lists or sets, among them children, parameters and hooks;
        - values and shapes of buffers.

        Of a module that torch.jit made it puts back mode and buffers only. Values and gradients of parameters, what
        lies deeper inside of attributes, and the random state (see :func:`preserved_random_state`) stay as they are.
        """
        for state in self._modules:
            state.restore()


@contextmanager
def undone_on_error(model: nn.Module) -> Iterator[None]:
    """If the block raises, undo its edits of the model, and raise the error again.

    Put back are classes, modes, attributes, children, hooks and buffers of all modules that the model had when the
    block began, not values of parameters.
    """
    snapshot = ModelSnapshot(model)
    try:
        yield
    except BaseException:
        snapshot.restore()
        raise


def copied(model: nn.Module) -> nn.Module:
    """Return a deep copy of a model, also if its modules hold results of computations, which torch refuses to copy.

    The copy has detached clones of these. Pruning and the old ``weight_norm`` leave the computed weight on the module;
    forwards may leave activations there, also in lists and dicts. Functions that hold modules of the model, such as
    hooks, hold those of the copy in it.

    Raises:
        ValueError: something that a module holds can't be copied; the message names it.
    """
    memo: dict[int, Any] = {}
    for module in model.modules():
        if isinstance(module, ScriptModule) and id(module) not in memo:
            memo.update((id(old), new) for old, new in zip(module.modules(), _reloaded(module).modules(), strict=True))
        for name, value in vars(module).items():
            if name == "_modules":
                continue
            for _, tensor in tensors_in(value):
                if tensor.grad_fn is not None:
                    memo[id(tensor)] = tensor.detach().clone()
    try:
        made = copy.deepcopy(model, memo)
    except Exception as error:
        raise ValueError(
            f"{type(model).__name__} can't be copied{_culprit(model)}: {error}. inplace=True changes the model itself"
        ) from error
    rebind_closures(model, made)
    return made


def _culprit(model: nn.Module) -> str:
    """Return the end of a message that names the attribute that refuses to be copied; "" if none does."""
    for name, module in model.named_modules():
        for attribute, value in vars(module).items():
            if attribute in ("_modules", "_parameters", "_buffers"):
                continue
            try:
                copy.deepcopy(value, {id(model): model})
            except Exception:
                return f" (attribute {attribute!r} of {name or 'the model'}, a {type(value).__qualname__})"
    return ""


def _reloaded(module: ScriptModule) -> nn.Module:
    """Return a copy of a module that torch.jit made, saved and loaded again.

    Parameters that ``copy.deepcopy`` makes of it take no gradients (torch 2.13).
    """
    file = io.BytesIO()
    torch.jit.save(module, file)
    file.seek(0)
    loaded: nn.Module = torch.jit.load(file)
    return loaded


class _ModuleState:
    """What one module holds: its class, mode, attributes, contents of containers, and values of buffers."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.training = module.training
        self.cls = type(module)
        # A GraphModule has a class of its own, in which a new graph writes its forward.
        self.forward = vars(self.cls).get("forward") if isinstance(module, GraphModule) else None
        self.attributes = dict(module.__dict__)
        # Registries (_modules, _parameters, hooks, …) and lists are changed in place: their contents are kept too.
        self.contents = {key: copy.copy(value) for key, value in vars(module).items() if isinstance(value, _CONTAINERS)}
        self.buffers = [_BufferState(buffer) for buffer in module._buffers.values() if buffer is not None]

    def restore(self) -> None:
        for buffer in self.buffers:
            buffer.restore()
        if isinstance(self.module, ScriptModule):
            self.module.training = self.training  # nothing else of it is in Python's hands
            return
        self.module.__class__ = self.cls
        if self.forward is not None:
            self.cls.forward = self.forward
        self.module.__dict__.clear()
        self.module.__dict__.update(self.attributes)
        for key, contents in self.contents.items():
            container = self.module.__dict__[key]
            container.clear()
            if isinstance(container, list):
                container.extend(contents)
            else:
                container.update(contents)


class _BufferState:
    """A buffer with its value and version, to be restored if either changed."""

    def __init__(self, buffer: Tensor) -> None:
        self.buffer = buffer
        self.version = tensor_version(buffer)
        self.value = buffer.detach().clone()

    def restore(self) -> None:
        # Not every operator that writes counts it in the version: batch_norm does not for running statistics.
        is_known = self.buffer.is_meta or self.buffer.is_inference()
        if tensor_version(self.buffer) != self.version or not (is_known or torch.equal(self.buffer, self.value)):
            with torch.no_grad():
                if self.buffer.shape != self.value.shape:  # a quantizer took the channel count of the first batch
                    self.buffer.resize_(self.value.shape)
                self.buffer.copy_(self.value)


def tensor_version(tensor: Tensor) -> int:
    """Return torch's count of writes in place, which views share; 0 for inference tensors, which have none.

    Some operators are not counted, such as ``batch_norm``, which writes running statistics.
    """
    return 0 if tensor.is_inference() else int(tensor._version)


def tensor_storage(tensor: Tensor) -> int:
    """Return a number that identifies a tensor's storage among all living ones; two views of one tensor share it.

    For a tensor without one storage, such as a sparse one, it is the ``id`` of the tensor object.
    """
    try:
        return int(tensor.untyped_storage()._cdata)
    except NotImplementedError:  # sparse and other tensors without one storage
        return id(tensor)


@contextmanager
def preserved_random_state(model: nn.Module, seed: int | None = None) -> Iterator[None]:
    """Restore the random state of Python, NumPy and torch (CPU, and the GPUs that hold the model) when the block ends.

    So it is after an error too. With a ``seed`` (0..2^32-1) all three, torch's on every GPU, begin the block with it,
    so that two blocks draw the same numbers. None: they go on from where they are.

    Raises:
        ValueError: a seed outside 0..2^32-1.
    """
    tensors = [*model.parameters(), *model.buffers()]
    devices = sorted({tensor.device.index for tensor in tensors if tensor.device.type == "cuda"})
    state: Any = random.getstate()
    numpy_state = np.random.get_state()
    with torch.random.fork_rng(devices=devices):
        try:
            if seed is not None:
                random.seed(seed)
                np.random.seed(seed)
                torch.manual_seed(seed)
            yield
        finally:
            random.setstate(state)
            np.random.set_state(numpy_state)
