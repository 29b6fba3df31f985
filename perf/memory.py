"""How much memory a training step holds."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from tritonq.perf.case import Inputs, Step


def saved_bytes(step: Step, inputs: Inputs, excluded: Iterable[Tensor]) -> int:
    """Return bytes that autograd keeps for the backward of one call of ``step``.

    Storages are counted once, however many views of them are saved; those of ``excluded`` (parameters and buffers) are
    not counted, since they exist anyway.
    """
    known = {tensor.untyped_storage().data_ptr() for tensor in excluded}
    # The storages themselves are kept, so that no address is used twice before the step is over.
    saved: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            saved[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        step(inputs)
    return sum(storage.nbytes() for storage in saved.values())


def peak_bytes(step: Step, inputs: Inputs, device: torch.device) -> int:
    """Return the most CUDA memory that one call of ``step`` allocates on top of what is allocated when it starts.

    The model's parameters, optimizer state and present gradients are not counted, nor is anything else that the
    process holds, such as the other implementations of a case.
    """
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    step(inputs)
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def peak_cpu_bytes(step: Step, inputs: Inputs) -> int:
    """Return the most memory of CPU tensors that one call of ``step`` allocates on top of what is allocated before."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as recorded:
        step(inputs)
    assert recorded.profiler is not None
    events = recorded.profiler.kineto_results.events()
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    present = most = 0
    for _, change in changes:
        present += change
        most = max(most, present)
    return most
