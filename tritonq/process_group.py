"""Which ranks an observer shares its statistics with, and the reductions over them."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

ProcessGroup = Any  # dist.ProcessGroup, where torch was built with torch.distributed.
ProcessGroupLike = ProcessGroup | Literal["world", "auto"] | None

_NAMES = ("world", "auto")


class GroupReference:
    """Names a process group; ``copy.deepcopy`` of a model that holds it shares it with the copy.

    A pickle holds None in place of a group of torch.distributed, so that what is loaded elsewhere observes alone; it
    holds the strings as they are.

    Args:
        process_group: None, this rank alone; ``"world"``, the default group, looked up when it is used; ``"auto"``, the
            same where torch.distributed is initialised, else this rank alone; or a group of torch.distributed.

    Raises:
        ValueError: another string.

    Examples:
        >>> GroupReference("auto").resolve() is None    # torch.distributed is not initialised: this rank alone
        True
    """

    def __init__(self, process_group: ProcessGroupLike) -> None:
        if isinstance(process_group, str) and process_group not in _NAMES:
            raise ValueError(f"process_group must be None, a group, or one of {_NAMES}, got {process_group!r}")
        self.process_group = process_group

    def resolve(self) -> ProcessGroup | None:
        """Return the group of ranks that share statistics, or None for this rank alone.

        Raises:
            RuntimeError: ``"world"`` or a group was given, and torch.distributed is not initialised.
        """
        if self.process_group is None:
            return None
        initialised = dist.is_available() and dist.is_initialized()
        if not initialised:
            if self.process_group == "auto":
                return None
            raise RuntimeError(
                f"process_group={self.process_group!r}: torch.distributed is not initialised; call "
                "torch.distributed.init_process_group first, or leave process_group=None"
            )
        return dist.group.WORLD if isinstance(self.process_group, str) else self.process_group

    def __deepcopy__(self, memo: dict[int, Any]) -> GroupReference:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        # A group belongs to its processes. What is loaded elsewhere observes alone until it is told otherwise.
        return GroupReference, (self.process_group if isinstance(self.process_group, str) else None,)

    def __repr__(self) -> str:
        return repr(self.process_group)


def reduce_range(low: Tensor, high: Tensor, group: ProcessGroup) -> tuple[Tensor, Tensor]:
    """Return the smallest ``low`` and the largest ``high`` over all ranks of ``group``, elementwise, by one collective.

    Every rank of the group has to call it. Both have one shape, signed dtype and device, shape and dtype the same on
    every rank; they stay as they are.
    """
    both = torch.stack((low, -high))
    dist.all_reduce(both, dist.ReduceOp.MIN, group=group)
    return both[0], -both[1]


def reduce_sums(tensors: list[Tensor], group: ProcessGroup) -> list[Tensor]:
    """Return the sum of each tensor over all ranks of ``group``, by one collective; the tensors stay as they are.

    Every rank of the group has to call it, with at least one tensor. All have one dtype and device; order, shapes and
    dtype are the same on every rank.
    """
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    dist.all_reduce(flat, dist.ReduceOp.SUM, group=group)
    parts = torch.split(flat, [tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]
