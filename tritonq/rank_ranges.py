"""Equal ranges on all ranks for quantizers that DistributedDataParallel trains, by one collective per forward.

A quantizer calls :func:`join_ranks` when it observes. That registers :func:`share_ranges` as a forward hook of the
wrapper, which merges the tensors that each quantizer names in :meth:`SharesRange.rank_state`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from tritonq.process_group import ProcessGroup
from tritonq.qparams import RangeRule, range_to_qparams
from tritonq.quantized_type import QuantizedType


@dataclass
class FollowingGrid:
    """Scale and zero point that follow from the ranges in a :class:`RankState`.

    Attributes:
        scale: the quantizer's scale, updated in place.
        zero_point: its zero point, updated in place.
        qtype: type of the codes.
        rule: ``rule`` of :func:`tritonq.qparams.range_to_qparams`, such as ``"torch"``.
        eps: floor under the scale.
    """

    scale: Tensor
    zero_point: Tensor
    qtype: QuantizedType
    rule: RangeRule
    eps: float


@dataclass
class RankState:
    """Tensors of one quantizer that all ranks share, updated in place.

    Attributes:
        lowest: tensors of which all ranks take the smallest values, elementwise.
        highest: tensors of which all ranks take the largest values, elementwise.
        first: tensors of which all ranks take the first rank's values.
        grid: scale and zero point that follow from the merged range; ``lowest`` and ``highest`` then have one tensor
            each, with as many elements as the scale. None: none follows.
    """

    lowest: Sequence[Tensor] = ()
    highest: Sequence[Tensor] = ()
    first: Sequence[Tensor] = ()
    grid: FollowingGrid | None = None


class SharesRange(nn.Module):
    """Base class of quantizers whose range is that of all ranks under DistributedDataParallel.

    A subclass calls :func:`join_ranks`, without arguments, when it observes, and its :meth:`rank_state` returns a
    :class:`RankState` with its running minimum in ``lowest`` and its running maximum in ``highest``. After each forward
    in training these are overwritten, in place, by the smallest and the largest of all ranks. A quantizer without such
    a range, or whose scale is trained, puts into ``first`` the tensors that all ranks are to take from the first rank.
    """

    def rank_state(self) -> RankState:
        """Return a `RankState` of tensors that all ranks are to share, of the same shapes on each; in this class none.

        Nothing is communicated here: :func:`merge_ranges` reads and merges what all quantizers return.
        """
        return RankState()

    def follow_ranks(self) -> None:
        """Update what depends on the tensors of :meth:`rank_state`; called by :func:`merge_ranges` after merging.

        Scale and zero point in ``RankState.grid`` are updated already. In this base class it does nothing.
        """


# The quantizers of each model that was met: DistributedDataParallel lists buffers once too.
_QUANTIZERS: WeakKeyDictionary[nn.Module, list[SharesRange]] = WeakKeyDictionary()


def join_ranks() -> None:
    """Let the DistributedDataParallel whose forward is running merge its quantizers' ranges, after this and later ones.

    Quantizers call this when they observe. Nothing happens outside such a forward, or if the merging was set up before.
    """
    if torch.compiler.is_compiling():
        _join_while_tracing()
    else:
        _join()


def _join_while_tracing() -> bool:
    """Register the hook while ``torch.compile`` traces, so that no operator and no guard of it is in the graph.

    Return True.
    """
    _join()
    return True


# As torch.compiler.assume_constant_result does, which would import the compiler with this file.
vars(_join_while_tracing)["_dynamo_marked_constant"] = True


def _join() -> None:
    parallel = DistributedDataParallel._active_ddp_module
    if parallel is None or share_ranges in parallel._forward_hooks.values():
        return
    parallel.register_forward_hook(share_ranges)
    behind_forward: Callable[[Any], Any] = parallel._post_forward

    def first_time(output: Any) -> Any:
        # The hooks of the forward that is running were looked up before this one came.
        vars(parallel).pop("_post_forward")
        output = behind_forward(output)
        share_ranges(parallel, (), output)
        return output

    vars(parallel)["_post_forward"] = first_time


def share_ranges(parallel: DistributedDataParallel, inputs: Any, output: Any) -> None:
    """Merge the ranges of a model in training mode over its ranks; a forward hook of DistributedDataParallel.

    All ranks take the smallest minimum and the largest maximum of all; of trained scales, the first rank's.

    Nothing is merged in eval mode, with one rank, and under ``parallel.join()``: ranks whose data have ended run no
    forward.

    Args:
        parallel: the wrapped model.
        inputs: not used.
        output: not used.
    """
    group = parallel.process_group
    if not parallel.training or parallel._join_config.enable or dist.get_world_size(group) == 1:
        return
    quantizers = _QUANTIZERS.get(parallel)
    if quantizers is None:
        quantizers = [module for module in parallel.modules() if isinstance(module, SharesRange)]
        _QUANTIZERS[parallel] = quantizers
    merge_ranges(quantizers, group)


@torch.no_grad()
def merge_ranges(quantizers: Sequence[SharesRange], group: ProcessGroup) -> None:
    """Merge what each quantizer's :meth:`SharesRange.rank_state` names over all ranks, in place, in one collective.

    All ranks take the smallest of ``lowest``, the largest of ``highest`` and the first rank's of ``first``. Where a
    merge changed a range, scale and zero point in ``grid`` follow from it. Then each ``follow_ranks`` is called. If no
    quantizer names a tensor, nothing is done.

    From equal ranges, the moving averages of the ranks' batches become that of the joint batch: ``min(m + c (a - m),
    m + c (b - m)) = m + c (min(a, b) - m)``, with the running minimum m before the step, the averaging constant c, and
    the minima a and b of two ranks' batches. Merging again changes nothing. Nothing is read back from the device.

    Args:
        quantizers: the same on every rank, on one device.
        group: a group of torch.distributed; all of its ranks must make this call.
    """
    states = [quantizer.rank_state() for quantizer in quantizers]
    lowest = [tensor for state in states for tensor in state.lowest]
    highest = [tensor for state in states for tensor in state.highest]
    first = [tensor for state in states for tensor in state.first]
    if not (lowest or highest or first):
        return
    nothing = (lowest or highest or first)[0].new_empty(0)
    own = [_joined(tensors) if tensors else nothing for tensors in (lowest, highest, first)]
    own[1] = own[1].neg()
    if dist.get_rank(group) != 0:
        own[2].fill_(torch.inf)
    both = torch.cat(own)
    dist.all_reduce(both, dist.ReduceOp.MIN, group=group)
    low, high, values = torch.split(both, [part.numel() for part in own])
    lows, highs = _apart(low, lowest), _apart(high.neg(), highest)
    # A range that is nobody else's keeps its grid, which may have been set by hand.
    moved = {id(tensor): part for tensor, part in zip(lowest, _apart(low != own[0], lowest), strict=True)}
    moved |= {id(tensor): part for tensor, part in zip(highest, _apart(high != own[1], highest), strict=True)}
    # A parameter's own forward has run already: its version must not say that it changed since.
    held = [tensor.data if isinstance(tensor, nn.Parameter) else tensor for tensor in (*lowest, *highest, *first)]
    torch._foreach_copy_(held, [*lows, *highs, *_apart(values, first)])
    _move_grids(states, moved)
    for quantizer in quantizers:
        quantizer.follow_ranks()


def _move_grids(states: Sequence[RankState], moved: dict[int, Tensor]) -> None:
    """Write scale and zero point that follow from the ranges that moved; all grids with the same formula at once.

    Args:
        states: of all quantizers; those without a grid are left out.
        moved: for each range tensor, by its ``id``, a bool tensor: which of its elements the merge changed.
    """
    kinds: dict[tuple[QuantizedType, RangeRule, float], list[tuple[RankState, FollowingGrid]]] = defaultdict(list)
    for state in states:
        if state.grid is not None:
            codes = replace(state.grid.qtype, axis=None, group=None)
            kinds[codes, state.grid.rule, state.grid.eps].append((state, state.grid))
    for (codes, rule, eps), alike in kinds.items():
        lows = [state.lowest[0] for state, _ in alike]
        highs = [state.highest[0] for state, _ in alike]
        scales, zero_points = [grid.scale for _, grid in alike], [grid.zero_point for _, grid in alike]
        scale, zero_point = range_to_qparams(_joined(lows), _joined(highs), codes, rule=rule, eps=eps)
        has_moved = torch.cat(
            [moved[id(low)].view(-1) | moved[id(high)].view(-1) for low, high in zip(lows, highs, strict=True)]
        )
        scale = torch.where(has_moved, scale, _joined(scales))
        zero_point = torch.where(has_moved, zero_point, _joined(zero_points))
        torch._foreach_copy_(scales, _apart(scale, scales))
        torch._foreach_copy_(zero_points, _apart(zero_point, zero_points))


def _joined(tensors: Sequence[Tensor]) -> Tensor:
    """Return one flat tensor with all elements of ``tensors``, one tensor after the other."""
    return torch.cat([tensor.detach().reshape(-1) for tensor in tensors])


def _apart(joined: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return the elements of the flat tensor ``joined`` in the shapes of ``tensors``.

    It is the inverse of :func:`_joined`.
    """
    parts = torch.split(joined, [tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]
