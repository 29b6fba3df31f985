"""Observers' statistics over the ranks of a process group, for a whole model at once."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tritonq.fake_quantize import FakeQuantize
from tritonq.observers import HistogramObserver, InterpolatingHistogramObserver, RangeObserver
from tritonq.process_group import GroupReference, ProcessGroup, ProcessGroupLike, reduce_range, reduce_sums
from tritonq.rank_ranges import SharesRange, merge_ranges


@torch.no_grad()
def sync_observers(model: nn.Module, process_group: ProcessGroupLike = "world") -> None:
    """Give every observer of ``model`` what all ranks' observers have seen, and refresh the scales that follow.

    Ranges become the smallest minimum and the largest maximum; histograms the sum of all ranks' counts, as if one rank
    had seen everything (to rounding where bins move). Each value of a FloatFakeQuantize's ``amax_history`` becomes the
    largest of all ranks'; scales that are trained or given, and fractional lengths, become those of the group's first
    rank. All is changed in place. Only histogram counts since the last call are added, so that calling it again changes
    nothing. At most four collectives, however many observers there are. Every rank of the group must call it with the
    same model, also one whose observers have seen nothing.

    Args:
        model: any module; it and all modules in it are searched for observers and quantizers.
        process_group: the ranks: a group, ``"world"`` (the default group), or ``"auto"`` (the same if torch.distributed
            is initialised, else nothing is done); None does nothing.

    Raises:
        RuntimeError: torch.distributed is not initialised (not with ``"auto"``), or a rank has gone.
        ValueError: ``process_group`` is another string; or on this rank a per-channel observer or quantizer does not
            know its number of channels, which comes with data or with ``num_channels``; nothing is sent then.

    Examples:
        >>> import tempfile, torch, tritonq
        >>> import torch.distributed as dist
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
        ...     observer = tritonq.MinMaxObserver()
        ...     _ = observer(torch.tensor([3.0]))
        ...     sync_observers(observer)
        ...     dist.destroy_process_group()
        >>> observer.max_val
        tensor(3.)
    """
    group = GroupReference(process_group).resolve()
    if group is None:
        return
    observers = [module for module in model.modules() if isinstance(module, RangeObserver)]
    for observer in observers:
        if observer.qtype.axis is not None and observer.num_channels is None:
            raise ValueError(f"{type(observer).__name__} does not know its number of channels: pass num_channels=")
    quantizers = [module for module in model.modules() if isinstance(module, SharesRange)]
    alone = [quantizer for quantizer in quantizers if not _has_range_observer(quantizer)]
    for quantizer in alone:
        state = quantizer.rank_state()
        if any(not tensor.numel() for tensor in (*state.lowest, *state.highest, *state.first)):
            raise ValueError(f"{type(quantizer).__name__} does not know its number of channels: pass num_channels=")
    merge_ranges(alone, group)
    if not observers:
        return
    ranges = _reduced_ranges(observers, group)
    mergeable = [observer for observer in observers if isinstance(observer, HistogramObserver)]
    moving = [observer for observer in observers if isinstance(observer, InterpolatingHistogramObserver)]
    _add_up(mergeable, group)
    _add_up_over(moving, [ranges[observer] for observer in moving], group)
    for observer, (low, high) in ranges.items():
        observer.min_val.copy_(low)
        observer.max_val.copy_(high)
    for quantizer in quantizers:
        if isinstance(quantizer, FakeQuantize) and _has_range_observer(quantizer):
            quantizer.refresh_qparams()


@torch.no_grad()
def broadcast_statistics(model: nn.Module, process_group: ProcessGroupLike = "world") -> None:
    """Overwrite the BatchNorm buffers of every rank with those of the group's first rank, by one collective per dtype.

    They are running mean, running variance and number of batches; those of an InstanceNorm count too.

    DistributedDataParallel does so by itself before each forward. Sharded training (FSDP2) leaves each rank its own
    statistics, for float models too; but weights that are folded with them then differ in scale and codes from rank to
    rank. Call this function on every rank before each forward, and after the last step.

    Args:
        model: any module, the same on every rank.
        process_group: the ranks: a group, ``"world"`` (the default group), or ``"auto"`` (the same if torch.distributed
            is initialised, else nothing is done); None does nothing.

    Raises:
        RuntimeError: torch.distributed is not initialised (not with ``"auto"``), or a rank has gone.
        ValueError: ``process_group`` is another string.

    Examples:
        >>> import tempfile, torch
        >>> import torch.distributed as dist
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
        ...     broadcast_statistics(torch.nn.BatchNorm2d(4))
        ...     dist.destroy_process_group()
    """
    group = GroupReference(process_group).resolve()
    if group is None:
        return
    found: dict[torch.dtype, list[Tensor]] = {}
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._NormBase):
            for buffer in module.buffers(recurse=False):
                found.setdefault(buffer.dtype, []).append(buffer)
    for buffers in found.values():
        flat = torch.cat([buffer.reshape(-1) for buffer in buffers])
        dist.broadcast(flat, group=group, group_src=0)
        for buffer, value in zip(buffers, torch.split(flat, [b.numel() for b in buffers]), strict=True):
            buffer.copy_(value.view_as(buffer))


def _has_range_observer(quantizer: SharesRange) -> bool:
    """Whether ``quantizer`` is a FakeQuantize with a RangeObserver, from whose range its scale is computed."""
    return isinstance(quantizer, FakeQuantize) and isinstance(quantizer.activation_post_process, RangeObserver)


def _reduced_ranges(observers: list[RangeObserver], group: ProcessGroup) -> dict[RangeObserver, tuple[Tensor, Tensor]]:
    """Return minimum and maximum over all ranks for each observer, in their shapes, by one collective.

    The observers themselves stay as they are.
    """
    own_lows = torch.cat([observer.min_val.reshape(-1) for observer in observers])
    own_highs = torch.cat([observer.max_val.reshape(-1) for observer in observers])
    sizes = [observer.min_val.numel() for observer in observers]
    lows, highs = (torch.split(values, sizes) for values in reduce_range(own_lows, own_highs, group))
    return {
        observer: (low.view_as(observer.min_val), high.view_as(observer.min_val))
        for observer, low, high in zip(observers, lows, highs, strict=True)
    }


def _add_up(observers: list[HistogramObserver], group: ProcessGroup) -> None:
    """Replace the observers' histogram counts and numbers of skipped values by their sums over all ranks, in place.

    What was shared before is counted once. One collective does all.
    """
    if observers:
        sums = reduce_sums([counts for observer in observers for counts in observer.own_counts()], group)
        for observer, counts, nonfinite in zip(observers, sums[::2], sums[1::2], strict=True):
            observer.add_shared(counts, nonfinite)


def _add_up_over(
    observers: list[InterpolatingHistogramObserver], ranges: list[tuple[Tensor, Tensor]], group: ProcessGroup
) -> None:
    """Add the histogram counts of all ranks over a common range, and give them to the observers, in place.

    Args:
        observers: one or more, the same on every rank.
        ranges: for each, minimum and maximum over all ranks; one without a value (minimum above maximum) is left out.
        group: the ranks.
    """
    if observers:
        limits = [(float(low), float(high)) for low, high in ranges]
        own = [observer.own_counts(limit) for observer, limit in zip(observers, limits, strict=True)]
        sums = reduce_sums([counts.to(observers[0].histogram.device) for counts in own], group)
        for observer, counts, limit in zip(observers, sums, limits, strict=True):
            if limit[0] <= limit[1]:
                observer.add_shared(counts.cpu(), limit)
