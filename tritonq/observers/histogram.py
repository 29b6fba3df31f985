"""A histogram observer whose result does not depend on the order of batches or their split over ranks."""

from __future__ import annotations

from typing import Any, get_args

import torch
from torch import Tensor

from tritonq.bins import FloatPrefixBins
from tritonq.functional.dispatch import implementation
from tritonq.observers.base import RangeObserver, known_off, write_if
from tritonq.process_group import reduce_range, reduce_sums
from tritonq.qparams import QParams
from tritonq.reference.search import KL_BINS, Search, search_range


class HistogramObserver(RangeObserver):
    """Counts values over bins that never move, and searches the counts for the range that loses least.

    The bins are :class:`~tritonq.bins.FloatPrefixBins`; counts are exact integers, so the state depends on the values
    alone: not on their order, their batches or their ranks. The extremes are exact. It is cheap enough for every
    training step. :func:`tritonq.plots.plot_histogram` draws the counts, the range and the grid.

    Args:
        bins: bins on both sides of zero together, a power of two in 128..32768; 2048 tells 16 steps per octave apart.
        *args: arguments of :class:`~tritonq.observers.base.ObserverBase`.
        search: what the range is chosen by. ``"mse"``: the least expected squared error of fake quantization; ``"l2"``:
            the least squared distance to the centres of equal cells, one per code (torch's and MegEngine's measure);
            ``"percentile"``; ``"kl"``: the least Kullback-Leibler divergence between the clipped histogram and its
            quantized form (TensorRT). :func:`tritonq.reference.search.search_range` computes them.
        percentile: p for ``search="percentile"``, in (50, 100]. Symmetric types: p percent of the magnitudes lie in
            the range. Affine ones: the range goes from the quantile of 100 - p percent to that of p percent.
        mantissa_bits: the resolution, in place of ``bins``, which is then ignored: ``2^mantissa_bits`` steps per
            octave, 0..8. None: ``bins`` decides.
        **kwargs: named arguments of :class:`~tritonq.observers.base.RangeObserver`.

    Attributes:
        histogram: int64 buffer, (prefix_bins.count,) or (channels, prefix_bins.count).
        prefix_bins: the :class:`~tritonq.bins.FloatPrefixBins` that are counted over.

    Raises:
        ValueError: bins or mantissa bits out of range, an unknown search, a percentile outside (50, 100],
            ``search="kl"`` for a type of more than 11 bits, or what the base classes refuse.

    Source: docs/numbers.md, "Histograms"; torch.ao.quantization.HistogramObserver for the arguments.

    Examples:
        >>> observer = HistogramObserver(dtype=torch.qint8, qscheme=torch.per_tensor_symmetric, search="percentile")
        >>> _ = observer(torch.linspace(-1, 1, 100_001)), observer(torch.tensor([50.0]))
        >>> float(observer.max_val), round(float(observer.search_range()[1]), 3)
        (50.0, 1.0)
    """

    histogram: Tensor
    common_histogram: Tensor
    common_nonfinite: Tensor

    def __init__(
        self,
        bins: int = 2048,
        *args: Any,
        search: Search = "mse",
        percentile: float = 99.99,
        mantissa_bits: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        if search not in get_args(Search):
            raise ValueError(f"unknown search {search!r}; known: {', '.join(get_args(Search))}")
        if not 50 < percentile <= 100:
            raise ValueError(f"percentile must be in (50, 100], got {percentile}")
        if search == "kl" and 2**self.qtype.bits > KL_BINS:
            raise ValueError(f"search='kl' compares {KL_BINS} bins: too few for {self.qtype.bits} bits")
        self.prefix_bins = FloatPrefixBins.of_size(bins) if mantissa_bits is None else FloatPrefixBins(mantissa_bits)
        self.bins = self.prefix_bins.count - 1
        self.search: Search = search
        self.percentile = percentile
        self.register_buffer("histogram", self._empty_histogram(self.min_val))
        # What all ranks hold in common already: a further merge must not add it again.
        self.register_buffer("common_histogram", torch.zeros_like(self.histogram), persistent=False)
        self.register_buffer("common_nonfinite", torch.zeros_like(self.nonfinite_count), persistent=False)

    def observe(self, x: Tensor, qparams: QParams | None, enabled: Tensor | None) -> None:
        """Count the values of ``x`` and update the range, and scale and zero point in ``qparams`` unless that is None.

        ``enabled``: one element on the device, 0 leaves everything as it is; None: as 1. Values that are not finite are
        left out and counted in ``nonfinite_count``. With a process group the values of all ranks in it are counted, and
        each of them must call this.

        Raises:
            TypeError: ``x`` is no floating point tensor.
            ValueError: ``x`` has another number of channels than the observer.
            RuntimeError: a process group is wanted, and torch.distributed is not initialised.
        """
        x = self._checked(x)
        group = self.process_group.resolve()
        ops = implementation("histogram", x)
        if known_off(enabled):
            return
        state = (self.histogram, self.min_val, self.max_val, self.nonfinite_count)
        if group is None:
            ops.observe(x, *state, enabled, self.prefix_bins, self.qtype.row_type.axis)
        else:
            counts, low, high, nonfinite = ops.prefix_histogram(x, self.prefix_bins, self.qtype.row_type.axis)
            low, high = reduce_range(low, high, group)
            counts, nonfinite = reduce_sums([counts, nonfinite], group)
            for total in (self.histogram, self.common_histogram):
                write_if(enabled, total, total + counts)
            for total in (self.nonfinite_count, self.common_nonfinite):
                write_if(enabled, total, total + nonfinite)
            write_if(enabled, self.min_val, torch.minimum(self.min_val, low))
            write_if(enabled, self.max_val, torch.maximum(self.max_val, high))
        self._write_qparams(qparams, enabled)

    def search_range(self) -> tuple[Tensor, Tensor]:
        """Return the range ``(lo, hi)`` that is best by the argument ``search``.

        It lies within ``min_val..max_val``; except for "percentile" that range is first widened to contain 0. Both are
        float32, 0-d or (channels,). If nothing was seen they are +inf and -inf.
        """
        find = search_range
        if torch.compiler.is_compiling():
            # One operator: no compiler makes its hundreds of steps faster.
            find = implementation("search", self.histogram).search_range
        return find(
            self.histogram,
            self.min_val,
            self.max_val,
            self.prefix_bins,
            self.qtype,
            self.search,
            self.rule,
            self.eps,
            self.percentile,
        )

    def merge(self, other: RangeObserver) -> None:
        """Add to this observer what ``other`` observed: as if this one had seen the values of both.

        Raises:
            TypeError: ``other`` is of another class.
            ValueError: the observers have different resolutions or known numbers of channels, or only one of them
                counts per channel; nothing is changed then.
        """
        if isinstance(other, HistogramObserver) and other.prefix_bins != self.prefix_bins:
            raise ValueError(f"cannot merge histograms over {other.prefix_bins} and {self.prefix_bins}")
        super().merge(other)
        if isinstance(other, HistogramObserver) and other.histogram.numel():
            self.histogram.add_(other.histogram)

    def allocate(self, num_channels: int) -> None:
        """Give range and histogram their final number of channels; the range becomes +inf and -inf, and counts 0.

        An observer with one range per tensor stays as it is, and so does one that has this number of channels.

        Raises:
            ValueError: they have another number of channels already.
        """
        super().allocate(num_channels)
        if self.histogram.shape[:-1] != self.min_val.shape:
            for counts in (self.histogram, self.common_histogram):
                counts.resize_(*self.min_val.shape, self.prefix_bins.count).zero_()

    def empty_state(self) -> list[tuple[Tensor, float]]:
        """Return pairs of a buffer that observing changes and the number that it holds before the first batch.

        Besides those of the base class they are ``histogram``, ``common_histogram`` and ``common_nonfinite``, each
        with 0. The last two hold the part of ``histogram`` and ``nonfinite_count`` that is the same on all ranks:
        added up over them, or loaded.
        """
        counts = (self.histogram, self.common_histogram, self.common_nonfinite)
        return [*super().empty_state(), *((count, 0) for count in counts)]

    def own_counts(self) -> list[Tensor]:
        """Return ``[counts, nonfinite]``, new int64 tensors, what is not added up over the ranks yet.

        They are this rank's part of ``histogram`` and of ``nonfinite_count``, in the buffers' shapes.
        """
        return [self.histogram - self.common_histogram, self.nonfinite_count - self.common_nonfinite]

    def add_shared(self, counts: Tensor, nonfinite: Tensor) -> None:
        """Put ``counts`` and ``nonfinite``, the sums of all ranks' :meth:`own_counts`, in the place of this rank's own.

        The buffers then hold what all ranks have counted, and :meth:`own_counts` are zeros. The range stays: the caller
        updates ``min_val`` and ``max_val``.
        """
        self.common_histogram.add_(counts)
        self.common_nonfinite.add_(nonfinite)
        self.histogram.copy_(self.common_histogram)
        self.nonfinite_count.copy_(self.common_nonfinite)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Load a state dict. Its counts are taken as shared, since every rank loads the same file."""
        super()._load_from_state_dict(state_dict, prefix, *args)
        self.common_histogram.copy_(self.histogram)
        self.common_nonfinite.copy_(self.nonfinite_count)

    def _empty_histogram(self, like: Tensor) -> Tensor:
        return torch.zeros(*like.shape, self.prefix_bins.count, dtype=torch.int64, device=like.device)
