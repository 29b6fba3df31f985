"""Which range to quantize: searches over a float-prefix histogram, all candidates at once, on its device.

A *candidate* is a range that might be used. Inside a bin values count as evenly spread, so that an expected squared
error is a sum over bins of an integral in closed form. Nothing here reads a value on the host. Histograms are
(channels, bins). Bins (`tritonq.bins`) hold values with the same sign, exponent and top mantissa bits, ``per_side`` on
each side of one around zero.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from tritonq.bins import FloatPrefixBins
from tritonq.qparams import RangeRule, range_to_qparams
from tritonq.quantized_type import QuantizedType
from tritonq.reference.operator import Like, operator

Search = Literal["l2", "mse", "percentile", "kl"]

# A threshold is looked for down to 2^-12 of the largest magnitude.
_OCTAVES_OF_THRESHOLDS = 12
# Values below half a step of the finest candidate all round to zero: octaves below it that are told apart.
_SPARE_OCTAVES = 1
# (spacing in octaves, steps on each side of the best so far); the first round covers everything.
_Rounds = tuple[tuple[float, int], ...]
_ROUNDS_ONE_SIDED: _Rounds = ((1 / 2, 0), (1 / 32, 16))
_ROUNDS_TWO_SIDED: _Rounds = ((3 / 2, 0), (1 / 2, 3), (1 / 6, 3), (1 / 18, 3), (1 / 54, 3))
# Bins of an octave that rounds before the last one look at; the optimum of a smooth error is flat.
_COARSE_MANTISSA_BITS = 2
# Channels searched together: bounds the temporaries to a few tens of megabytes.
_CHANNELS_AT_ONCE = 64
# TensorRT's calibration: linear bins, and the distance of neighbouring candidates.
KL_BINS = 2048
KL_STRIDE = 8
# How far beyond its extreme value an end bin reaches: an extreme on a bin edge would leave a bin without width.
_BEYOND = 2.0**-20
_TINY = torch.finfo(torch.float64).tiny


@operator(returns=(Like("low"), Like("low")), has_kernel=False)
def search_range(
    counts: Tensor,
    low: Tensor,
    high: Tensor,
    bins: FloatPrefixBins,
    qtype: QuantizedType,
    search: Search,
    rule: RangeRule = "torch",
    eps: float | None = None,
    percentile: float = 99.99,
) -> tuple[Tensor, Tensor]:
    """Return the range ``lo..hi`` that is best for a histogram by ``search``; none reaches beyond the data and zero.

    - ``"mse"``: least expected squared error of fake quantization on the grid that follows from the range.
    - ``"l2"``: least squared distance to the centres of ``quant_max - quant_min + 1`` equal cells of the range, values
      outside going to the end cells (torch.ao's and MegEngine's measure).
    - ``"percentile"`` p: for symmetric types ±q, with q the p% quantile of ``|x|``, cut at the data; for affine ones
      the quantiles ``100 - p`` and p.
    - ``"kl"``: least Kullback-Leibler divergence between the clipped histogram and its quantized form (TensorRT).

    Args:
        counts: int64, (bins.count,) or (channels, bins.count).
        low: float32, 0-d or (channels,): exact smallest value, above ``high`` where nothing was counted.
        high: float32, shaped as ``low``: exact largest value.
        bins: the bins of ``counts``.
        qtype: the codes that the range will be quantized to.
        search: which of the measures above.
        rule: how a range becomes scale and zero point: ``"torch"``, ``"torch_v1"`` or ``"megengine"``; formulas in
            :func:`tritonq.qparams.range_to_qparams`. Only ``"mse"`` reads it, and ``eps``.
        eps: smallest scale; None: 2^-23 for the rule ``"torch"``, 1e-5 for ``"megengine"``. ``"torch_v1"`` ignores it.
        percentile: percent of the values inside, for ``"percentile"``; in (50, 100].

    Returns:
        ``(lo, hi)`` shaped and typed like ``low``; ``low`` and ``high`` themselves where nothing was counted.

    Source: docs/numbers.md, "Histograms"; torch.ao.quantization.HistogramObserver; NVIDIA, "8-bit inference with
        TensorRT", 2017.
    """
    if counts.dim() == 1:
        lo, hi = search_range(counts[None], low[None], high[None], bins, qtype, search, rule, eps, percentile)
        return lo[0], hi[0]
    chunks = (torch.split(state, _CHANNELS_AT_ONCE) for state in (counts, low, high))
    parts = [
        _search(some, some_low, some_high, bins, qtype, search, rule, eps, percentile)
        for some, some_low, some_high in zip(*chunks, strict=True)
    ]
    return torch.cat([lo for lo, _ in parts]), torch.cat([hi for _, hi in parts])


def _search(
    counts: Tensor,
    low: Tensor,
    high: Tensor,
    bins: FloatPrefixBins,
    qtype: QuantizedType,
    search: Search,
    rule: RangeRule,
    eps: float | None,
    percentile: float,
) -> tuple[Tensor, Tensor]:
    """Return ``(lo, hi)``, (channels,) each: :func:`search_range` of a few channels, with counts (channels, bins)."""
    seen = low <= high
    # A channel without data is searched as if it held zeros, and keeps its unset range.
    safe_low, safe_high = torch.where(seen, low, 0), torch.where(seen, high, 0)
    # Zero stays within: a symmetric range may be narrower than the smallest magnitude.
    least, most = safe_low.clamp(max=0), safe_high.clamp(min=0)
    if search == "percentile":
        lo, hi = _percentile_range(counts, safe_low, safe_high, bins, qtype, percentile)
        least, most = safe_low, safe_high
    elif search == "kl":
        lo, hi = _kl_range(counts, safe_low, safe_high, bins, qtype)
    else:
        lo, hi = _least_error_range(counts, safe_low, safe_high, bins, qtype, search, rule, eps)
    lo, hi = torch.maximum(lo, least), torch.minimum(hi, most)
    return torch.where(seen, lo, low), torch.where(seen, hi, high)


def data_edges(low: Tensor, high: Tensor, bins: FloatPrefixBins) -> Tensor:
    """Return the edges of the bins, moved so that none lies far beyond the data: float64 (channels, bins.count + 1).

    The first and last edge lie 2^-20 of their size beyond ``low`` and ``high``, the exact extremes, float32
    (channels,); edges that lay farther out lie there, too.
    """
    low, high = low.double().view(-1, 1), high.double().view(-1, 1)
    low, high = low - low.abs() * _BEYOND, high + high.abs() * _BEYOND
    edges = bins.edges(low.device).expand(low.shape[0], -1)
    inner = torch.minimum(torch.maximum(edges, low), high)
    # The outermost bins have no end of their own.
    first, last = torch.minimum(inner[:, :1], low), torch.maximum(inner[:, -1:], high)
    return torch.cat((first, inner[:, 1:-1], last), dim=1)


def condensed(counts: Tensor, low: Tensor, high: Tensor, bins: FloatPrefixBins, octaves: int) -> tuple[Tensor, Tensor]:
    """Return a histogram's top ``octaves`` on both sides of zero, with all smaller values in one bin between them.

    An octave is the values between two powers of two; the top one holds the largest magnitude of the channel.

    Args:
        counts: int64 (channels, bins.count).
        low: exact smallest value, float32 (channels,).
        high: exact largest value, float32 (channels,).
        bins: the bins of ``counts``.
        octaves: how many are kept on each side; edges that would lie within the bin of zero repeat an edge of it.

    Returns:
        Edges of the bins (:func:`data_edges`), float64 (channels, 2, octaves · 2^mantissa_bits + 1), ascending: first
        those below zero, then those above; and the share of all values below each edge, of the same shape.
    """
    largest = torch.maximum(-low, high)
    top = torch.frexp(largest).exponent.clamp(bins.min_exponent, bins.max_exponent) - bins.min_exponent
    reach = torch.arange(-octaves << bins.mantissa_bits, 1, device=counts.device)
    # Edges outward from the zero bin; those that would lie within it repeat its own.
    step = ((top.view(-1, 1) << bins.mantissa_bits) + reach).clamp(min=0)
    index = torch.cat((bins.per_side - step.flip(1), bins.per_side + 1 + step), dim=1)
    below = torch.nn.functional.pad(counts.cumsum(1), (1, 0)).gather(1, index)
    share = below.double() / counts.sum(1, keepdim=True).clamp(min=1)
    sides = (len(counts), 2, -1)
    return data_edges(low, high, bins).gather(1, index).view(sides), share.view(sides)


def densities(edges: Tensor, below: Tensor, stride: int = 1) -> tuple[Tensor, Tensor]:
    """Return edges and densities of the bins that :func:`condensed` found, for :func:`cell_error`.

    Args:
        edges: of bins, float64 (channels, 2, m): ascending, first those of negative values.
        below: share of all values below each edge, as ``edges``.
        stride: how many bins of a side become one: the first edge of a side stays, and every ``stride``-th after it.

    Returns:
        Edges, float64 (channels, n + 1) with ``n + 1 = 2 · ceil(m / stride)``, and the share of the values in each bin
        over its width, which counts as 2^-1022 at least: (channels, n).
    """
    edges, below = edges[..., ::stride].flatten(1), below[..., ::stride].flatten(1)
    return edges, below.diff(dim=1).div_(edges.diff(dim=1).clamp_(min=_TINY))


def cell_error(edges: Tensor, density: Tensor, step: Tensor, origin: Tensor, first: Tensor, last: Tensor) -> Tensor:
    """Return the expected squared distance of values to the nearest of the points ``origin + n step``.

    ``n`` goes from ``first`` to ``last``. With ``t = (x - origin)/step`` and ``n`` the nearest allowed point, the
    integral of ``(t - n)^2`` from ``origin`` to ``x`` is ``G(t) = n/12 + (t - n)^3/3``: continuous, and right beyond
    the end points too. So a bin of density ``d`` contributes ``d step^3 (G(right) - G(left))``.

    Args:
        edges: of a histogram's bins, float64 (channels, n + 1).
        density: share of the values in a bin over its width, float64 (channels, n).
        step: float64, (channels, candidates), as are ``origin``, ``first`` and ``last``.
        origin: the point with n = 0.
        first: smallest n.
        last: largest n.

    Returns:
        float64, (channels, candidates).
    """
    step = step.unsqueeze(-1)
    t = (edges.unsqueeze(1) - origin.unsqueeze(-1)).div_(step)
    nearest = torch.minimum(torch.maximum(t.round(), first.unsqueeze(-1)), last.unsqueeze(-1))
    distance = t.sub_(nearest)
    integral = distance.pow(3).div_(3).add_(nearest, alpha=1 / 12)
    return (integral.diff(dim=-1) * density.unsqueeze(1)).sum(-1) * step.squeeze(-1) ** 3


def range_error(
    edges: Tensor,
    density: Tensor,
    lo: Tensor,
    hi: Tensor,
    qtype: QuantizedType,
    search: Search,
    rule: RangeRule,
    eps: float | None,
) -> Tensor:
    """Return the expected squared error of each candidate range ``lo..hi``: float64 (channels, candidates).

    Args:
        edges: of the histogram's bins, float64 (channels, n + 1), as :func:`densities` returns them.
        density: share of the values in a bin over its width, float64 (channels, n).
        lo: lower ends of the ranges, float64 (channels, candidates).
        hi: upper ends, as ``lo``.
        qtype: the codes that a range is quantized to.
        search: ``"l2"``: the distance to the centres of equal cells of the range; else to the values of the grid that
            follows from the range.
        rule: how a range becomes scale and zero point, see :func:`tritonq.qparams.range_to_qparams`; not of ``"l2"``.
        eps: smallest scale; None: 2^-23 for the rule ``"torch"``, 1e-5 for ``"megengine"``. ``"torch_v1"`` ignores it.
    """
    if search == "l2":
        cells = qtype.quant_max - qtype.quant_min + 1
        lo, hi = lo.double(), hi.double()
        step = ((hi - lo) / cells).clamp(min=_TINY)
        first = torch.zeros_like(step)
        return cell_error(edges, density, step, lo + step / 2, first, first + (cells - 1))
    scale, zero_point = range_to_qparams(lo.float(), hi.float(), qtype, rule=rule, eps=eps)
    first, last = qtype.quant_min - zero_point, qtype.quant_max - zero_point
    step = scale.double()
    return cell_error(edges, density, step, torch.zeros_like(step), first.double(), last.double())


def _least_error_range(
    counts: Tensor,
    low: Tensor,
    high: Tensor,
    bins: FloatPrefixBins,
    qtype: QuantizedType,
    search: Search,
    rule: RangeRule,
    eps: float | None,
) -> tuple[Tensor, Tensor]:
    """Return the ranges ``(lo, hi)`` of least :func:`range_error`, (channels,) each, of counts (channels, bins).

    Both ends are tried in geometric steps, then finer around the best; those of an affine type are searched together.
    ``low`` and ``high`` are the exact extremes; the other arguments are those of :func:`range_error`.
    """
    octaves = _OCTAVES_OF_THRESHOLDS + qtype.bits + _SPARE_OCTAVES
    rounds = _ROUNDS_ONE_SIDED if qtype.symmetric else _ROUNDS_TWO_SIDED
    ends = [end.double() for end in _ends(low, high, qtype)]
    best_lo = best_hi = low.new_zeros((low.shape[0], 1), dtype=torch.float64)
    fine = condensed(counts, low, high, bins, octaves)
    coarse = densities(*fine, 1 << max(0, bins.mantissa_bits - _COARSE_MANTISSA_BITS))
    for number, (spacing, reach) in enumerate(rounds):
        edges, density = densities(*fine) if number == len(rounds) - 1 else coarse
        steps = _steps(spacing, reach, low.device)
        down_lo, down_hi = (best_lo + steps).clamp(min=0), (best_hi + steps).clamp(min=0)
        if not qtype.symmetric:
            down_lo = down_lo.repeat_interleave(len(steps), dim=1)
            down_hi = down_hi.repeat(1, len(steps))
        lo, hi = ends[0].view(-1, 1) * torch.exp2(-down_lo), ends[1].view(-1, 1) * torch.exp2(-down_hi)
        best = range_error(edges, density, lo, hi, qtype, search, rule, eps).argmin(1, keepdim=True)
        best_lo, best_hi = down_lo.gather(1, best), down_hi.gather(1, best)
    return lo.gather(1, best)[:, 0].float(), hi.gather(1, best)[:, 0].float()


def _ends(low: Tensor, high: Tensor, qtype: QuantizedType) -> tuple[Tensor, Tensor]:
    """Return the widest range worth trying: that of the data and zero; symmetric about zero for a symmetric type."""
    largest = torch.maximum(-low, high)
    return (-largest, largest) if qtype.symmetric else (low.clamp(max=0), high.clamp(min=0))


def _steps(spacing: float, reach: int, device: torch.device) -> Tensor:
    """Return how many octaves below the best end so far a round of the search tries others: float64 (steps,).

    Args:
        spacing: between two neighbours, in octaves.
        reach: how many are tried on each side of the best so far; 0 for the first round, which tries all from the
            largest value down.
        device: of the result.
    """
    first, last = (-reach, reach) if reach else (0, round(_OCTAVES_OF_THRESHOLDS / spacing))
    return torch.arange(first, last + 1, device=device, dtype=torch.float64) * spacing


def _percentile_range(
    counts: Tensor, low: Tensor, high: Tensor, bins: FloatPrefixBins, qtype: QuantizedType, percentile: float
) -> tuple[Tensor, Tensor]:
    share = percentile / 100
    if qtype.symmetric:
        size = _quantile(*_magnitudes(counts, low, high, bins), share)
        return -size, size
    edges = data_edges(low, high, bins)
    return _quantile(counts, edges, 1 - share), _quantile(counts, edges, share)


def _magnitudes(counts: Tensor, low: Tensor, high: Tensor, bins: FloatPrefixBins) -> tuple[Tensor, Tensor]:
    """Return the histogram of ``|x|`` from that of x: counts (channels, per_side + 1), and its edges, ascending."""
    side = bins.per_side
    folded = counts[:, side:].clone()
    folded[:, 1:] += counts[:, :side].flip(1)
    largest = torch.maximum(-low, high)
    smallest = torch.maximum(low, -high).clamp(min=0)
    edges = data_edges(smallest, largest, bins)
    return folded, edges[:, side:]


def _quantile(counts: Tensor, edges: Tensor, share: float) -> Tensor:
    """Return the value below which a ``share`` of the counts lies: float32 (channels,), interpolated within a bin."""
    below = torch.nn.functional.pad(counts.cumsum(1).double(), (1, 0))
    return _interpolate(below[:, -1:] * share, below, edges)[:, 0].float()


def _interpolate(at: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Return y at the points ``at``, (channels, points), of a function that is straight between given corners.

    The corners are ``x`` (ascending) and ``y``, (channels, corners) each; beyond them y stays that of the last one.
    """
    right = torch.searchsorted(x.contiguous(), at.contiguous()).clamp(1, x.shape[1] - 1)
    x0, x1 = x.gather(1, right - 1), x.gather(1, right)
    y0, y1 = y.gather(1, right - 1), y.gather(1, right)
    part = torch.where(x1 > x0, (at - x0) / (x1 - x0), 1).clamp(0, 1)
    return y0 + part * (y1 - y0)


def _kl_range(
    counts: Tensor, low: Tensor, high: Tensor, bins: FloatPrefixBins, qtype: QuantizedType
) -> tuple[Tensor, Tensor]:
    """Return the range that TensorRT's entropy calibration would choose, searched on :data:`KL_BINS` bins of magnitude.

    For an affine type (one with a zero point) both sides of zero are scaled to 1 and added up, and clipped at the same
    fraction of their own end. If all data are on one side of zero, it has all codes.
    """
    codes = qtype.quant_max - qtype.quant_min + 1
    ends = _ends(low, high, qtype)
    edges = data_edges(low, high, bins)
    below = torch.nn.functional.pad(counts.cumsum(1).double(), (1, 0))
    grid = torch.linspace(0, 1, KL_BINS + 1, dtype=torch.float64, device=low.device)
    folded = torch.zeros(len(low), KL_BINS, dtype=torch.float64, device=low.device)
    for end, beyond in zip(ends, (below[:, 0], below[:, -1]), strict=True):
        reached = _interpolate(end.double().view(-1, 1) * grid, edges, below)
        # The extreme itself belongs to the last bin.
        reached[:, -1] = beyond
        folded += reached.diff(dim=1).abs()
    one_sided = torch.zeros_like(low, dtype=torch.bool) if qtype.symmetric else (ends[0] == 0) | (ends[1] == 0)
    levels = torch.where(one_sided, codes, max(1, codes // 2))
    part = kl_threshold(folded, levels, codes).float()
    return ends[0] * part, ends[1] * part


def kl_threshold(counts: Tensor, levels: Tensor, most_levels: int, stride: int = KL_STRIDE) -> Tensor:
    """Return the fraction of a linear histogram's bins that is best to keep, by TensorRT's measure; (0, 1].

    Best is where the quantized histogram Q diverges least from the clipped one P. For each candidate ``i``: P is the
    first i bins, with all counts beyond added to the last; Q spreads the first i bins' counts over ``levels`` groups
    (group g begins at bin ``ceil(g i / levels)``), evenly over the bins of a group that are not empty in ``counts``.
    With p and q the shares of P and Q, ``KL = Σ p log(p/q)``, infinite where only q is 0. The first bin counts as much
    as the second: zeros cost nothing. Of equal candidates the largest wins.

    Args:
        counts: float64, (channels, n), not negative: of magnitudes, in n bins of equal width from 0 on.
        levels: how many codes quantize the bins that are kept; int64, (channels,), at most n.
        most_levels: the largest of ``levels``, or more; known without reading them.
        stride: distance of candidates, which reach from n down to ``levels``.

    Returns:
        float64, (channels,), in (0, 1]; 1 for a channel without counts.
    """
    n = counts.shape[1]
    counts = torch.cat((counts[:, 1:2], counts[:, 1:]), dim=1)
    ends = torch.arange(n, 0, -stride, device=counts.device)
    pad, xlogy = torch.nn.functional.pad, torch.special.xlogy
    below, occupied = pad(counts.cumsum(1), (1, 0)), pad((counts > 0).cumsum(1), (1, 0))
    inner = pad(xlogy(counts, counts).cumsum(1), (1, 0))[:, ends]
    total, inside = below[:, -1:], below[:, ends]
    outside, last = total - inside, counts[:, ends - 1]

    groups = torch.arange(most_levels + 1, device=counts.device)
    many = levels.view(-1, 1, 1)
    # Group g starts at ceil(g i / levels): integers, so that no bin changes its group by a rounding error.
    start_of = (groups * ends.view(-1, 1) + many - 1).div(many, rounding_mode="floor")
    start_of = torch.minimum(start_of, ends.view(-1, 1)).flatten(1)
    shape = (counts.shape[0], len(ends), len(groups))
    mass = below.gather(1, start_of).view(shape).diff(dim=-1)
    spread = mass / occupied.gather(1, start_of).view(shape).diff(dim=-1).clamp(min=1)
    end_spread = spread.gather(2, many.expand(-1, len(ends), 1) - 1)[..., 0]
    cross = xlogy(mass, spread).sum(-1) + xlogy(outside, torch.where(last > 0, end_spread, 0))
    clipped = inner - xlogy(last, last) + xlogy(last + outside, last + outside)
    divergence = (clipped - cross - xlogy(total, total) + xlogy(total, inside)) / total.clamp(min=1)
    usable = torch.isfinite(divergence) & (ends >= levels.view(-1, 1))
    best = torch.where(usable, divergence, torch.inf).argmin(1)
    return ends[best].double() / n
