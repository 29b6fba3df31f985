"""The histogram observer of torch.ao and MegEngine, for those who need their numbers."""

from __future__ import annotations

from typing import Any, get_args

import torch
from torch import Tensor

from tritonq.arithmetic import whole_number
from tritonq.functional.dispatch import implementation, without_kernel
from tritonq.observers.base import RangeObserver, known_off, write_if
from tritonq.process_group import reduce_range, reduce_sums
from tritonq.qparams import QParams
from tritonq.reference.interpolating import MEGENGINE_SLICES, TORCH_SLICES, Interpolation, rebin

Range = tuple[float, float]


class InterpolatingHistogramObserver(RangeObserver):
    """A histogram over the running range, re-binned whenever that grows, and a greedy search for the least L2 error.

    The search gives up 1e-5 of the counts, again and again, from the end where that frees more bins, until the squared
    distance to the centres of equal cells, one per code, first rises.

    Its scale and zero point depend on the order of batches; those of :class:`HistogramObserver` do not, and take
    less time. Here for compatibility.

    On a GPU every step is taken in every batch, whether the range has grown or not, and the
    search computes the error of every window that it might look at: so no value is read on the host.

    Args:
        bins: number of bins, at least 2.
        *args: arguments of :class:`~tritonq.observers.base.ObserverBase`.
        interpolation: ``"torch"``: slices of old bins are put where their middles are; ``"megengine"``: the range is
            widened until they fit the new bins.
        upsample_rate: slices that an old bin is cut into; None: 16 with ``"torch"``, 128 with ``"megengine"``.
        **kwargs: named arguments of :class:`~tritonq.observers.base.RangeObserver`.

    Attributes:
        histogram: float64 buffer (bins,) over ``min_val`` .. ``max_val``.

    Raises:
        ValueError: fewer than 2 bins, an unknown interpolation, an upsampling rate below 1, a per-channel scheme, or
            what the base classes refuse.

    Source: torch.ao.quantization.HistogramObserver; MegEngine's HistogramObserver; docs/numbers.md, "Histograms".

    Examples:
        >>> observer = InterpolatingHistogramObserver(dtype=torch.qint8, qscheme=torch.per_tensor_symmetric)
        >>> _ = observer(torch.linspace(-1, 1, 1000)), observer(torch.linspace(-2, 3, 1000))
        >>> float(observer.histogram.sum())
        2000.0
    """

    histogram: Tensor
    common_histogram: Tensor
    common_limits: Tensor

    def __init__(
        self,
        bins: int = 2048,
        *args: Any,
        interpolation: Interpolation = "torch",
        upsample_rate: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        whole = whole_number(bins)
        if whole is None or whole < 2:
            raise ValueError(f"bins must be an int of at least 2, got {bins!r}")
        if interpolation not in get_args(Interpolation):
            raise ValueError(f"unknown interpolation {interpolation!r}; known: {', '.join(get_args(Interpolation))}")
        if self.qtype.axis is not None:
            raise ValueError("an interpolating histogram is kept per tensor; HistogramObserver keeps one per channel")
        if upsample_rate is None:
            upsample_rate = MEGENGINE_SLICES if interpolation == "megengine" else TORCH_SLICES
        rate = whole_number(upsample_rate)
        if rate is None or rate < 1:
            raise ValueError(f"upsample_rate must be an int of at least 1, got {upsample_rate!r}")
        self.upsample_rate = rate
        self.bins = bins = whole
        self.interpolation: Interpolation = interpolation
        self.register_buffer("histogram", torch.zeros(bins, dtype=torch.float64, device=self.device))
        # What all ranks hold in common already, over a range of its own: a further merge must not add it again.
        self.register_buffer("common_histogram", torch.zeros_like(self.histogram), persistent=False)
        self.register_buffer("common_limits", self._range(), persistent=False)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Give models that earlier versions pickled the buffer of what ranks hold in common, which they had not."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        if "common_limits" not in self._buffers:
            common = self.__dict__.pop("_common_limits", None) or (torch.inf, -torch.inf)
            limits = torch.tensor(common, dtype=torch.float64, device=self.histogram.device)
            self.register_buffer("common_limits", limits, persistent=False)

    @property
    def cells(self) -> int:
        """The number of codes that the search assumes, ``quant_max - quant_min + 1``.

        With ``interpolation="torch"`` and a torch dtype in the attribute ``dtype`` it is the number of all codes of
        that dtype, such as 256 for ``torch.qint8``, even if fewer are used.
        """
        if self.interpolation == "torch" and isinstance(self.dtype, torch.dtype):
            return int(2 ** torch.iinfo(self.dtype).bits)
        return self.qtype.quant_max - self.qtype.quant_min + 1

    def observe(self, x: Tensor, qparams: QParams | None, enabled: Tensor | None) -> None:
        """Count the values of ``x`` and update the range, and scale and zero point in ``qparams`` unless that is None.

        ``enabled``: one element, 0 leaves everything as it is; None: as 1. While no finite value was seen ``qparams``
        stays as it is. With a process group ``x`` of all ranks in it is counted, and each of them must call this.
        Values that are not finite are left out; ``nonfinite_count`` counts those of this rank only.

        Raises:
            TypeError: ``x`` is no floating point tensor.
            RuntimeError: a process group is wanted, and torch.distributed is not initialised.
        """
        x = self._checked(x)
        if known_off(enabled):
            return
        group = self.process_group.resolve()
        low, high, nonfinite = implementation("min_max", x).min_max(x)
        finite = x.numel() - nonfinite
        if group is not None:
            low, high = reduce_range(low, high, group)
        limits, kept = without_kernel("interpolating", x).grown(
            self.histogram, self._range(), torch.stack((low, high)).double(), self.interpolation, self.upsample_rate
        )
        counts = self._counts(x, limits, finite)
        if group is not None:
            (counts,) = reduce_sums([counts], group)
        write_if(enabled, self.histogram, kept + counts)
        write_if(enabled, self.min_val, limits[0])
        write_if(enabled, self.max_val, limits[1])
        write_if(enabled, self.nonfinite_count, self.nonfinite_count + nonfinite)
        if group is not None:
            self.mark_common()
        if qparams is not None:
            observed = self.has_observed()
            self._write_qparams(qparams, observed if enabled is None else observed & (enabled.view(()) != 0))

    def _range(self) -> Tensor:
        """Return both ends of the running range, (2,) float64."""
        return torch.stack((self.min_val, self.max_val)).double()

    def _counts(self, x: Tensor, limits: Tensor, finite: Tensor) -> Tensor:
        """Return the counts of ``x``, ``finite`` of whose values are finite, over ``limits``, (2,): float64 (bins,).

        If both limits are equal, all finite values are in the middle bin.
        """
        is_one = limits[0] == limits[1]
        counts: Tensor = implementation("histogram", x).linear_histogram(x, self.bins, limits)
        middle = torch.arange(self.bins, device=x.device) == self.bins // 2
        return torch.where(is_one, middle * finite, counts).double()

    def _limits(self) -> Range:
        return float(self.min_val), float(self.max_val)

    def _adopt(self, histogram: Tensor, limits: Range) -> None:
        self.histogram.copy_(histogram)
        self.min_val.fill_(limits[0])
        self.max_val.fill_(limits[1])

    def over(self, limits: Range) -> Tensor:
        """Return the histogram's counts over another range: float64 (bins,), on the CPU.

        ``limits`` is that range, two floats ``(low, high)``, which contains the running one. Zeros if nothing was
        observed.
        """
        return self._rebinned(self.histogram, self._limits(), limits)

    def _rebinned(self, histogram: Tensor, old: Range, new: Range) -> Tensor:
        if not old[0] <= old[1]:
            return torch.zeros(self.bins, dtype=torch.float64)
        before, after = (torch.tensor(ends, dtype=torch.float64) for ends in (old, new))
        return rebin(histogram.cpu(), before, after, self.upsample_rate)

    def own_counts(self, limits: Range) -> Tensor:
        """Return the counts that this rank has not shared yet, over the range ``limits``: float64 (bins,), on the CPU.

        ``limits`` is ``(low, high)`` and contains the running range. Counts are shared if all ranks hold them: they
        were observed in a process group, loaded, or given to :meth:`add_shared`. This call changes nothing.
        """
        return self.over(limits) - self._common_over(limits)

    def add_shared(self, counts: Tensor, limits: Range) -> None:
        """Make the histogram what was shared before plus ``counts``, the sum of all ranks' :meth:`own_counts`.

        ``counts``, float64 (bins,) on the CPU, are over ``limits``, ``(low, high)``, which becomes the range. It must
        contain the range of what was shared before, which is re-binned to it. All counts are shared then.
        """
        self._adopt(self._common_over(limits) + counts, limits)
        self.mark_common()

    def mark_common(self) -> None:
        """Mark all counts so far, and their range, as held by all ranks, so that :meth:`own_counts` are zeros."""
        self.common_histogram.copy_(self.histogram)
        self.common_limits.copy_(self._range())

    def _common_over(self, limits: Range) -> Tensor:
        low, high = self.common_limits.tolist()
        return self._rebinned(self.common_histogram, (low, high), limits)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Load a state dict. Its counts are taken as shared, since every rank loads the same file."""
        super()._load_from_state_dict(state_dict, prefix, *args)
        self.mark_common()

    def search_range(self) -> tuple[Tensor, Tensor]:
        """Return the range ``(low, high)`` that the greedy search proposes, float32, 0-d; (+inf, -inf) before data."""
        limits, seen = self._range(), self.has_observed()
        found = without_kernel("interpolating", limits).greedy_range(self.histogram, limits, self.cells)
        low, high = torch.where(seen, found, limits).float().unbind()
        return low, high

    def merge(self, other: RangeObserver) -> None:
        """Add to this observer what ``other`` counted; its range becomes the smallest that contains both ranges.

        Raises:
            TypeError: ``other`` is no InterpolatingHistogramObserver.
            ValueError: ``other`` has another number of bins; nothing is changed then.
        """
        if not isinstance(other, InterpolatingHistogramObserver):
            raise TypeError(f"cannot merge a {type(other).__name__} into a {type(self).__name__}")
        if other.bins != self.bins:
            raise ValueError(f"cannot merge histograms of {other.bins} and {self.bins} bins")
        mine, theirs = self._limits(), other._limits()
        limits = (min(mine[0], theirs[0]), max(mine[1], theirs[1]))
        if limits[0] <= limits[1]:
            self._adopt(self.over(limits) + other.over(limits), limits)
        self.nonfinite_count.add_(other.nonfinite_count)

    def empty_state(self) -> list[tuple[Tensor, float]]:
        """Return pairs of a buffer, or a view of a part, that observing changes and its number before the first batch.

        Besides those of the base class they are the histogram and the counts that all ranks have in common (0), and the
        ends of these counts' range (+inf and -inf).
        """
        return [
            *super().empty_state(),
            (self.histogram, 0),
            (self.common_histogram, 0),
            (self.common_limits[:1], torch.inf),
            (self.common_limits[1:], -torch.inf),
        ]
