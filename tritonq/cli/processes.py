"""Several processes that train one model, as `torchrun` starts them; or one process alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

# What the first process may take to deploy a model while the others wait.
_LONGEST_END = timedelta(days=1)


@dataclass(frozen=True)
class Processes:
    """This process among those that train together; :func:`joined` gives it.

    Attributes:
        rank: its number, from 0, over all machines.
        count: how many there are.
    """

    rank: int = 0
    count: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this is the one process that writes files and prints."""
        return self.rank == 0

    @property
    def together(self) -> bool:
        """Whether there is more than one process."""
        return self.count > 1

    def gathered(self, item: Any) -> list[Any]:
        """Return the ``item`` of every process, in the order of ranks. Every process must call it.

        Items have to be such as pickle takes, where there are several processes.
        """
        if not self.together:
            return [item]
        items: list[Any] = [None] * self.count
        dist.all_gather_object(items, item)
        return items

    def summed(self, *numbers: int) -> list[int]:
        """Return the sum of each of ``numbers`` over all processes, in their order. Every process must call it."""
        return [sum(column) for column in zip(*self.gathered(numbers), strict=True)]

    def wait(self) -> None:
        """Wait until every process has called this."""
        if self.together:
            dist.barrier()


@contextmanager
def joined(device: torch.device) -> Iterator[tuple[Processes, torch.device]]:
    """Join the processes that torchrun started, and leave them together when the block of ``with`` ends.

    It gives this process among them, and its device: if ``device`` is "cuda" without an index, a GPU of its own, such
    as "cuda:1", which becomes torch's current one; else ``device``. Without torchrun nothing happens, and it gives
    ``Processes()``, one process, and ``device``. A process group that was there before is used, and stays.

    Raises:
        RuntimeError: the processes can't connect, or there are more on a machine than it has GPUs.
    """
    if not (dist.is_available() and dist.is_torchelastic_launched()):
        yield Processes(), device
        return
    made = not dist.is_initialized()
    last: dist.ProcessGroup | None = None
    if made:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        last = dist.new_group(backend="gloo", timeout=_LONGEST_END)
    try:
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", dist.get_node_local_rank())
            torch.cuda.set_device(device)
        yield Processes(dist.get_rank(), dist.get_world_size()), device
        if last is not None:
            # A process that ends while others go on may be aborted in the destructors of its connections to them. One
            # that the others left by an error, which they tell, need not wait.
            with suppress(RuntimeError):
                dist.barrier(group=last)
    finally:
        if made:
            dist.destroy_process_group()
