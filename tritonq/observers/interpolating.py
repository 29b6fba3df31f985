"""The histogram observer of torch.ao and MegEngine, for those who need their numbers."""

from __future__ import annotations

from typing import Any, get_args

import torch
from torch import Tensor

from tritonq.backend import implementation
from tritonq.observers.base import RangeObserver
from tritonq.process_group import reduce_range, reduce_sums
from tritonq.qparams import QParams
from tritonq.reference.interpolating import (
    MEGENGINE_SLICES,
    TORCH_SLICES,
    Interpolation,
    greedy_range,
    rebin,
    rebin_aligned,
    spike,
    widened_range,
)

Range = tuple[float, float]


class InterpolatingHistogramObserver(RangeObserver):
    """A histogram over the running range, re-binned whenever that grows, and a greedy search for the least L2 error.

    What it proposes depends on the order of batches, and it reads values back to the host: :class:`HistogramObserver`
    does neither. Here for compatibility: the published algorithm asks, after each batch, whether the range has grown,
    counts between limits that are Python numbers, derives from them how many slices make a bin, and its search goes on
    in steps of 1e-5 of the counts until an error rises, each step depending on the one before. As tensors alone these
    steps would all have to be taken, every time.

    Args:
        bins: number of bins, at least 2.
        *args: see :class:`~tritonq.observers.base.ObserverBase`.
        interpolation: ``"torch"``: slices of old bins are put where their middles are; ``"megengine"``: the range is
            widened until they fit the new bins.
        upsample_rate: slices that an old bin is cut into; None: 16 with ``"torch"``, 128 with ``"megengine"``.
        **kwargs: see :class:`~tritonq.observers.base.RangeObserver`.

    Attributes:
        histogram: float64 buffer (bins,) over ``min_val`` .. ``max_val``.

    Raises:
        ValueError: fewer than 2 bins, an unknown interpolation, an upsampling rate below 1, or a per-channel scheme.

    Source: torch.ao.quantization.HistogramObserver; MegEngine's HistogramObserver; docs/numbers.md, "Histograms".

    Examples:
        >>> observer = InterpolatingHistogramObserver(dtype=torch.qint8, qscheme=torch.per_tensor_symmetric)
        >>> _ = observer(torch.linspace(-1, 1, 1000)), observer(torch.linspace(-2, 3, 1000))
        >>> float(observer.histogram.sum())
        2000.0
    """

    histogram: Tensor
    common_histogram: Tensor

    def __init__(
        self,
        bins: int = 2048,
        *args: Any,
        interpolation: Interpolation = "torch",
        upsample_rate: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        if not isinstance(bins, int) or bins < 2:
            raise ValueError(f"bins must be an int of at least 2, got {bins!r}")
        if interpolation not in get_args(Interpolation):
            raise ValueError(f"unknown interpolation {interpolation!r}; known: {', '.join(get_args(Interpolation))}")
        if self.qtype.axis is not None:
            raise ValueError("an interpolating histogram is kept per tensor; HistogramObserver keeps one per channel")
        if upsample_rate is None:
            upsample_rate = MEGENGINE_SLICES if interpolation == "megengine" else TORCH_SLICES
        if not isinstance(upsample_rate, int) or upsample_rate < 1:
            raise ValueError(f"upsample_rate must be an int of at least 1, got {upsample_rate!r}")
        self.upsample_rate = upsample_rate
        self.bins = bins
        self.interpolation: Interpolation = interpolation
        self.register_buffer("histogram", torch.zeros(bins, dtype=torch.float64, device=self.device))
        # What all ranks hold in common already, over a range of its own: a further merge must not add it again.
        self.register_buffer("common_histogram", torch.zeros_like(self.histogram), persistent=False)
        self._common_limits: Range | None = None

    @property
    def cells(self) -> int:
        """Number of codes that the search assumes.

        In torch.ao these are all codes of the dtype, even if fewer are used.
        """
        if self.interpolation == "torch" and isinstance(self.dtype, torch.dtype):
            return int(2 ** torch.iinfo(self.dtype).bits)
        return self.qtype.quant_max - self.qtype.quant_min + 1

    def observe(self, x: Tensor, qparams: QParams | None, enabled: Tensor | None) -> None:
        """Count the values of ``x`` and update the range, and scale and zero point in ``qparams`` unless that is None.

        ``enabled``: one element, 0 leaves everything as it is; None: as 1. Unlike other observers this one reads values
        back from the device.

        Raises:
            NotImplementedError: ``torch.compile`` traces the call.
        """
        if torch.compiler.is_compiling():
            raise NotImplementedError(
                "torch.compile can't trace an InterpolatingHistogramObserver, which widens its range on the host; "
                "HistogramObserver has no such step"
            )
        x = self._checked(x)
        if enabled is not None and not bool(enabled):
            return
        group = self.process_group.resolve()
        low, high, nonfinite = implementation("min_max", x).min_max(x)
        if group is not None:
            low, high = reduce_range(low, high, group)
        batch = (float(low), float(high))
        if batch[0] <= batch[1]:
            limits, kept = self._grown(batch)
            counts = self._counts(x, limits)
            if group is not None:
                (counts,) = reduce_sums([counts], group)
            self._adopt(kept + counts, limits)
            if group is not None:
                self.mark_common()
        self.nonfinite_count.add_(nonfinite)
        if qparams is not None and bool(self.has_observed()):
            for target, value in zip(qparams, self.calculate_qparams(), strict=True):
                target.copy_(value.view_as(target))

    def _grown(self, batch: Range) -> tuple[Range, Tensor]:
        """Return a range with the running one and ``batch`` in it, and the running counts over it (CPU, float64)."""
        old, histogram = self._limits(), self.histogram.cpu()
        new = (min(old[0], batch[0]), max(old[1], batch[1]))
        if not bool(self.has_observed()) or new == old:
            return new, histogram
        if self.interpolation == "megengine" and old[0] < old[1]:
            new, per_bin, start = widened_range(self.bins, old, new, self.upsample_rate)
            return new, rebin_aligned(histogram, per_bin, start, self.upsample_rate)
        return new, rebin(histogram, old, new, self.upsample_rate)

    def _counts(self, x: Tensor, limits: Range) -> Tensor:
        """Return the counts of ``x`` over ``limits`` (CPU, float64).

        If both limits are equal, all values are in the middle bin.
        """
        if limits[0] == limits[1]:
            return spike(self.bins, limits[0], limits) * torch.isfinite(x).sum().cpu()
        counts: Tensor = implementation("histogram", x).linear_histogram(x, self.bins, *limits)
        return counts.cpu().double()

    def _limits(self) -> Range:
        return float(self.min_val), float(self.max_val)

    def _adopt(self, histogram: Tensor, limits: Range) -> None:
        self.histogram.copy_(histogram)
        self.min_val.fill_(limits[0])
        self.max_val.fill_(limits[1])

    def over(self, limits: Range) -> Tensor:
        """Return the counts over a wider range ``limits``: float64 (bins,), on the CPU."""
        if not bool(self.has_observed()):
            return torch.zeros(self.bins, dtype=torch.float64)
        return rebin(self.histogram.cpu(), self._limits(), limits, self.upsample_rate)

    def own_counts(self, limits: Range) -> Tensor:
        """Return the counts, over the range ``limits``, that this rank has not shared with others yet."""
        return self.over(limits) - self._common_over(limits)

    def add_shared(self, counts: Tensor, limits: Range) -> None:
        """Replace this rank's :meth:`own_counts` by their sum over all ranks."""
        self._adopt(self._common_over(limits) + counts, limits)
        self.mark_common()

    def mark_common(self) -> None:
        """Take the present counts as those that all ranks have."""
        self.common_histogram.copy_(self.histogram)
        self._common_limits = self._limits() if bool(self.has_observed()) else None

    def _common_over(self, limits: Range) -> Tensor:
        if self._common_limits is None:
            return torch.zeros(self.bins, dtype=torch.float64)
        return rebin(self.common_histogram.cpu(), self._common_limits, limits, self.upsample_rate)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Load a state dict. Its counts are taken as shared, since every rank loads the same file."""
        super()._load_from_state_dict(state_dict, prefix, *args)
        self.mark_common()

    def search_range(self) -> tuple[Tensor, Tensor]:
        """Return the range that the greedy search proposes: float32, 0-d. If nothing was seen it is +inf and -inf."""
        if not bool(self.has_observed()):
            return self.min_val, self.max_val
        low, high = greedy_range(self.histogram.cpu(), *self._limits(), self.cells)
        return torch.full_like(self.min_val, low), torch.full_like(self.max_val, high)

    def merge(self, other: RangeObserver) -> None:
        """Add to this observer what ``other`` counted; both are counted over a range that contains both.

        Raises:
            TypeError: ``other`` is no InterpolatingHistogramObserver.
            ValueError: it has another number of bins; nothing is changed then.
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

    def reset_min_max_vals(self) -> None:
        """Forget everything that was observed."""
        super().reset_min_max_vals()
        self.mark_common()

    def empty_state(self) -> list[tuple[Tensor, float]]:
        """Return each buffer that observing changes, with the number that it holds before: 0 for the histogram."""
        return [*super().empty_state(), (self.histogram, 0)]
