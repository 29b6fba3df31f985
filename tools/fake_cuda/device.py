"""CUDA tensors without a GPU: torch's operators on them are computed on the CPU, over the same memory.

Needs the libraries of ``build.py``, under which device memory is host memory. All that asks ``is_cuda`` runs as on a
GPU: dispatch, device guards, checks that tensors are on one device, streams, and capture of graphs, in which waiting
for the device is an error.
"""

from __future__ import annotations

import ctypes
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

# Run by torch itself: they allocate, or ask what a tensor is.
_ON_DEVICE = frozenset(
    {
        *("aten::empty", "aten::empty_strided", "aten::empty_like", "aten::new_empty", "aten::new_empty_strided"),
        *("aten::detach", "aten::alias", "aten::set_", "aten::resize_", "aten::record_stream", "aten::is_pinned"),
        *("aten::is_same_size", "aten::is_set_to", "aten::_has_same_storage_numel", "aten::_version"),
        *("aten::sym_size", "aten::sym_stride", "aten::sym_numel", "aten::sym_storage_offset", "aten::_pin_memory"),
    }
)
# Take tensors of both devices.
_MAY_MIX = frozenset(
    {
        *("aten::copy_", "aten::_to_copy", "aten::index", "aten::index_put", "aten::index_put_"),
        *("aten::_index_put_impl_", "aten::set_", "aten::is_same_size", "aten::is_set_to"),
    }
)
# Wait for the device: the host needs a value, or the size of the result.
_WAITING = frozenset(
    {
        *("aten::_local_scalar_dense", "aten::is_nonzero", "aten::equal", "aten::item"),
        *("aten::nonzero", "aten::masked_select", "aten::_unique2"),
    }
)


class CudaOnCpu(TorchDispatchMode):
    """While entered, operators on CUDA tensors are computed on the CPU.

    Attributes:
        waits: how often each operator waited for the device; copies between devices with their direction.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.waits: Counter[str] = Counter()
        self._generators: dict[int, tuple[torch.Generator, torch.Generator, int]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Compute an operator on CUDA tensors on the CPU, over the same memory; count it if it waits for the device.

        Raises:
            RuntimeError: tensors of both devices, or waiting while a graph is captured.
        """
        kwargs = dict(kwargs or {})
        name = func._schema.name
        flat, _ = tree_flatten((args, kwargs))
        tensors = [value for value in flat if isinstance(value, Tensor)]
        target = None if kwargs.get("device") is None else torch.device(kwargs["device"])
        if any(isinstance(tensor, FakeTensor) for tensor in tensors):
            return func(*args, **kwargs)
        from_cuda = any(tensor.is_cuda for tensor in tensors)
        to_cuda = target is not None and target.type == "cuda"
        if not (from_cuda or to_cuda or any(map(_is_cuda_generator, flat))):
            return func(*args, **kwargs)
        if func.namespace == "tritonq":
            with self:
                return OPDEFS[name]._init_fn(*args, **kwargs)
        if name in _ON_DEVICE or _returns_views(func):
            return func(*args, **kwargs)
        if from_cuda and name not in _MAY_MIX and any(not tensor.is_cuda and tensor.dim() for tensor in tensors):
            places = ", ".join(f"{tensor.device} {tuple(tensor.shape)}" for tensor in tensors)
            raise RuntimeError(f"{name} takes tensors of one device, got {places}")
        self._count_waiting(name, tensors, target, bool(kwargs.get("non_blocking")))
        stays = target is None or to_cuda
        if name == "aten::_to_copy" and target is None:
            stays = tensors[0].is_cuda
        return self._computed(func, args, kwargs, stays and (from_cuda or to_cuda))

    def _count_waiting(
        self, name: str, tensors: Sequence[Tensor], target: torch.device | None, non_blocking: bool
    ) -> None:
        what = name if name in _WAITING else ""
        if name in ("aten::copy_", "aten::_to_copy"):
            source = tensors[-1] if name == "aten::copy_" else tensors[0]
            place = tensors[0].device if name == "aten::copy_" else target or source.device
            if source.device.type != place.type:
                what = f"{name} {source.device.type} to {place.type}"
                if non_blocking and torch.cuda.is_current_stream_capturing():
                    return
        if not what:
            return
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError(f"{what}: operation not permitted when stream is capturing")
        self.waits[what] += 1

    def _computed(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], is_cuda: bool) -> Any:
        """Compute an operator on CPU tensors over the same memory.

        An argument that the operator returns, as in-place operators do, is returned as the same object.
        """
        shared: dict[int, tuple[Tensor, Tensor]] = {}

        def to_host(value: Any) -> Any:
            if isinstance(value, Tensor) and value.is_cuda:
                return shared.setdefault(id(value), (host_view(value.detach()), value))[0]
            if isinstance(value, torch.device) and value.type == "cuda":
                return torch.device("cpu")
            return self._host_generator(value) if _is_cuda_generator(value) else value

        host_args, host_kwargs = tree_map(to_host, (args, kwargs))
        if host_kwargs.get("device") is not None:
            host_kwargs["device"] = torch.device("cpu")
        if host_kwargs.get("pin_memory"):
            host_kwargs["pin_memory"] = False
        given = {id(host): (host, device) for host, device in shared.values()}

        def to_device(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            if id(value) in given:
                host, device = given[id(value)]
                return device if is_cuda or func._schema.is_mutable else host.clone()
            return _on_device(value) if is_cuda else value

        return tree_map(to_device, func(*host_args, **host_kwargs))

    def _host_generator(self, generator: torch.Generator) -> torch.Generator:
        found = self._generators.get(id(generator))
        if found is None or found[2] != generator.initial_seed():
            host = torch.Generator().manual_seed(generator.initial_seed())
            # The generator is kept, so that no other one gets its id.
            found = self._generators[id(generator)] = (host, generator, generator.initial_seed())
        return found[0]


def host_view(x: Tensor) -> Tensor:
    """Return a CPU tensor over the memory of a CUDA tensor, with its strides."""
    storage = x.untyped_storage()
    size = storage.nbytes()
    if size == 0:
        return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype)
    memory = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(storage.data_ptr()))
    whole = torch.from_numpy(memory)[: size // x.element_size() * x.element_size()].view(x.dtype)
    return whole.as_strided(x.shape, x.stride(), x.storage_offset())


def _on_device(x: Tensor) -> Tensor:
    y = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cuda")
    if x.numel():
        host_view(y).copy_(x)
    return y


def _returns_views(func: Any) -> bool:
    schema = func._schema
    aliases = [result.alias_info for result in schema.returns]
    is_view = bool(aliases) and all(alias is not None and not alias.is_write for alias in aliases)
    return is_view and not schema.is_mutable


def _is_cuda_generator(value: object) -> bool:
    return isinstance(value, torch.Generator) and value.device.type == "cuda"


def lost_launches() -> int:
    """Return how many kernels of torch's own were launched; as nothing computes them, results may be wrong."""
    return ctypes.c_long.in_dll(ctypes.CDLL("libcudart.so.13"), "fake_cuda_lost_launches").value
