"""Pictures of what a histogram observer counted, and of the range that it chose. matplotlib is imported when needed."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tritonq.observers import HistogramObserver, InterpolatingHistogramObserver
from tritonq.qparams import QParams
from tritonq.quantized_type import QuantizedType
from tritonq.reference.float_rounding import floats_of_codes
from tritonq.reference.search import condensed, densities

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Octaves below the largest magnitude that are told apart in the picture; smaller values make one bar around zero.
_OCTAVES = 12
# Grids with more lines than this would be a grey area: only every few codes are drawn then.
_MOST_GRID_LINES = 64
_DENSITY, _RANGE, _GRID, _CLIPPED = "#4c72b0", "#c44e52", "#9a9a9a", "#dd8452"


def plot_histogram(
    observer: HistogramObserver | InterpolatingHistogramObserver,
    path: str | os.PathLike[str],
    *,
    channel: int | None = None,
    title: str | None = None,
) -> None:
    """Write a picture of an observer's histogram, the range that its search chooses, and the grid of codes.

    The upper panel is logarithmic in density and shows all that was seen; values outside the range, which saturate, are
    orange. The lower one is linear and shows the chosen range.

    Args:
        observer: a histogram observer that has seen values.
        path: file to write; any format that matplotlib knows by its ending.
        channel: index of the channel to draw, for an observer per channel; None for one per tensor.
        title: what to write above; None names the observer and its type.

    Raises:
        ValueError: nothing was observed, the channel is missing, not wanted or out of range, or matplotlib does not
            know the ending of ``path``.
        ImportError: matplotlib is not installed (extra ``report``).

    Examples:
        >>> import os, tempfile, tritonq
        >>> observer = tritonq.HistogramObserver()
        >>> _ = observer(torch.randn(1000))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     plot_histogram(observer, f"{folder}/histogram.png")
        ...     os.listdir(folder)
        ['histogram.png']
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    edges, density = densities_of(observer, channel)
    lo, hi = (_select(end, channel) for end in observer.search_range())
    scale, zero_point = (_select(value, channel) for value in observer.calculate_qparams())
    points = grid_points(QParams(scale, zero_point), observer.qtype)
    ends = (float(points[0]), float(points[-1]))
    figure = Figure(figsize=(9, 6), layout="constrained")
    FigureCanvasAgg(figure)
    whole, chosen = figure.subplots(2, 1)
    qtype = observer.qtype
    kind = "symmetric" if qtype.symmetric else "affine"
    figure.suptitle(title or f"{type(observer).__name__}, {qtype.bits} bits, {kind}")

    _draw(whole, edges, density, ends)
    whole.legend(loc="upper right", fontsize="small", frameon=False)
    whole.set_yscale("log")
    # A single outlier is one count in a wide bin, and still to be seen.
    whole.set_ylim(bottom=float(density[density > 0].min()) / 2)
    whole.set_ylabel("density (log)")
    _mark_range(whole, lo, hi)
    whole.set_title("everything that was seen", fontsize="medium", loc="left")

    _draw(chosen, edges, density, ends)
    step = -(-len(points) // _MOST_GRID_LINES)
    shown = points[::step]
    chosen.vlines(shown.tolist(), 0, 1, transform=chosen.get_xaxis_transform(), color=_GRID, linewidth=0.6, zorder=0)
    left, right = min(ends[0], float(lo)), max(ends[1], float(hi))
    margin = 0.08 * (right - left)
    chosen.set_xlim(left - margin, right + margin)
    inside = (edges[1:] > points[0]) & (edges[:-1] < points[-1])
    if bool(inside.any()):
        # Zeros after a ReLU would flatten everything else.
        visible = density[inside]
        chosen.set_ylim(0, 1.25 * float(torch.quantile(visible[visible > 0], 0.98)) if bool((visible > 0).any()) else 1)
    _mark_range(chosen, lo, hi)
    every = "every code" if step == 1 else f"every {step}th code"
    chosen.set_title(
        f"chosen range, scale {float(scale):.4g}, zero point {int(zero_point)}; lines: {every}",
        fontsize="medium",
        loc="left",
    )
    chosen.set_ylabel("density")
    chosen.set_xlabel("value")
    figure.savefig(path, dpi=120)


def densities_of(
    observer: HistogramObserver | InterpolatingHistogramObserver, channel: int | None
) -> tuple[Tensor, Tensor]:
    """Return edges and densities of a histogram, for a picture: float64 (n + 1,) and (n,), on the CPU.

    The densities integrate to 1 over the edges. If only one value was observed, there is one bin of width 1 around it.

    Args:
        observer: a histogram observer that has seen values.
        channel: index of the channel to return, for an observer per channel; None for one per tensor.

    Raises:
        ValueError: a channel that is missing, not wanted or out of range, or nothing was observed.
    """
    per_channel = observer.qtype.axis is not None
    if per_channel != (channel is not None):
        raise ValueError("channel= says which channel of a per-channel observer to draw, and only of such a one")
    if channel is not None and not 0 <= channel < observer.min_val.numel():
        raise ValueError(f"channel must be in 0..{observer.min_val.numel() - 1}, got {channel}")
    low, high = (_select(end, channel).cpu().view(1) for end in (observer.min_val, observer.max_val))
    if not bool(low <= high):
        raise ValueError(f"this {type(observer).__name__} has observed nothing that could be drawn")
    if bool(low == high):
        # A single value has no width to be dense in.
        return low.double() + torch.tensor([-0.5, 0.5], dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    if isinstance(observer, InterpolatingHistogramObserver):
        edges = torch.linspace(float(low), float(high), observer.bins + 1, dtype=torch.float64)
        width = max(float(high - low) / observer.bins, torch.finfo(torch.float32).tiny)
        return edges, observer.histogram.cpu() / observer.histogram.sum().cpu() / width
    counts = observer.histogram if channel is None else observer.histogram[channel]
    edges, density = densities(*condensed(counts.cpu()[None], low, high, observer.prefix_bins, _OCTAVES))
    return edges[0], density[0]


def _select(values: Tensor, channel: int | None) -> Tensor:
    return values.reshape(()) if channel is None else values[channel]


def grid_points(qparams: QParams, qtype: QuantizedType) -> Tensor:
    """Return the values ``(code - zero_point) · scale`` of all codes, ascending: float64, 1-d, on the CPU.

    For float codes the values are the format's numbers times the scale. Of types with more than 2^12 codes it is every
    n-th, so that 2^12 to 2^13 are left.

    Args:
        qparams: one scale and one zero point, 0-d or (1,), on any device.
        qtype: the type whose codes are listed.
    """
    step = max(1, (qtype.quant_max - qtype.quant_min) // 2**12)
    codes = torch.arange(qtype.quant_min, qtype.quant_max + 1, step, dtype=torch.float64)
    numbers = codes - qparams.zero_point.cpu()
    if qtype.float_format is not None:
        numbers = floats_of_codes(codes, qtype.float_format)
    return numbers * qparams.scale.double().cpu()


def _draw(axes: Axes, edges: Tensor, density: Tensor, ends: tuple[float, float]) -> None:
    """Draw one bar for each bin, in another colour if its values lie outside of ``ends`` and saturate.

    ``edges`` are (n + 1,), ``density`` is (n,); ``ends`` are the smallest and the largest value of the grid.
    """
    kept = edges.diff() > 0
    left, right, height = edges[:-1][kept], edges[1:][kept], density[kept]
    inside = (right > ends[0]) & (left < ends[1])
    for mask, color, label in ((inside, _DENSITY, "represented"), (~inside, _CLIPPED, "saturates")):
        # A single value is a bar without width.
        width = (right - left)[mask].clamp(min=float(edges[-1] - edges[0]) / 2000)
        axes.bar(left[mask].tolist(), height[mask].tolist(), width.tolist(), align="edge", color=color, label=label)


def _mark_range(axes: Axes, lo: Tensor, hi: Tensor) -> None:
    for end in (float(lo), float(hi)):
        axes.axvline(end, color=_RANGE, linewidth=1.4)
        axes.annotate(
            f"{end:.4g}", (end, 0.9), xycoords=axes.get_xaxis_transform(), color=_RANGE, fontsize="small",
            xytext=(3, 0), textcoords="offset points",
        )  # fmt: skip
