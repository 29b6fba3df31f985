"""Drawings of the report as inline SVG, whose colours are those of the page's style sheet."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from tritonq.report.measure import LayerMeasure
from tritonq.report.tally import BINS, MARGIN, TensorMeasure

_WIDTH, _HEIGHT, _BASE = 180, 46, 12
# Bars that a histogram is drawn with.
_BARS = 64


def histogram(tensor: TensorMeasure) -> str:
    """Return an SVG histogram of a tensor's values over the codes of its quantizer, and outside of them.

    It has at most 64 bars, each for several neighbouring bins of ``tensor.counts``. Heights are logarithms, so that
    tails are visible.
    """
    first, last = _window(tensor.counts)
    step = math.ceil((last - first) / _BARS)
    groups = [(start, sum(tensor.counts[start : min(start + step, last)])) for start in range(first, last, step)]
    tallest = max(math.log1p(count) for _, count in groups) or 1.0

    def x(bin_: float) -> float:
        return (bin_ - first) / (last - first) * _WIDTH

    parts = []
    for start, count in groups:
        if count:
            height = max(1.0, math.log1p(count) / tallest * (_HEIGHT - 4))
            outside = start < MARGIN or start >= MARGIN + BINS
            parts.append(
                f'<rect class="{"clip" if outside else "bar"}" x="{x(start):.1f}" y="{_HEIGHT - height:.1f}" '
                f'width="{max(x(start + step) - x(start) - 0.4, 0.6):.1f}" height="{height:.1f}"/>'
            )
    low, high = x(MARGIN), x(MARGIN + BINS)
    text = (
        f"{tensor.role}: values from {tensor.low:.4g} to {tensor.high:.4g}; {tensor.clipped:.3%} lie outside the codes "
        f"{tensor.quant_min} to {tensor.quant_max}"
    )
    return (
        f'<svg class="histogram" viewBox="-2 0 {_WIDTH + 4} {_HEIGHT + _BASE}" role="img" aria-label="{escape(text)}">'
        f"<title>{escape(text)}</title>"
        f'<rect class="range" x="{low:.1f}" y="0" width="{high - low:.1f}" height="{_HEIGHT}"/>{"".join(parts)}'
        f'<path class="edge" d="M{low:.1f} 0V{_HEIGHT + 2}M{high:.1f} 0V{_HEIGHT + 2}"/>'
        f'<path class="axis" d="M0 {_HEIGHT}H{_WIDTH}"/>'
        f'<text x="{low:.1f}" y="{_HEIGHT + _BASE - 1}">{tensor.quant_min}</text>'
        f'<text x="{high:.1f}" y="{_HEIGHT + _BASE - 1}" text-anchor="end">{tensor.quant_max}</text></svg>'
    )


def noise_by_position(layers: Sequence[LayerMeasure]) -> str:
    """Return an SVG with a mark for each tensor: its SQNR in dB, layer by layer in order of execution.

    ``layers`` are all of a :class:`ModelMeasure`, in any order. SQNR is the ratio of signal to quantization noise.
    Tensors that are exact or have no signal are left out; if none is left, the result is a line of HTML that says so.
    """
    width, height, left, bottom = 560, 236, 34, 22
    points = [
        (layer, tensor.role, tensor.sqnr) for layer in layers for tensor in layer.tensors if math.isfinite(tensor.sqnr)
    ]
    if not points:
        return "<p>Nothing to draw: no tensor is rounded.</p>"
    low = min(0.0, 10 * math.floor(min(value for *_, value in points) / 10))
    high = max(10.0, 10 * math.ceil(max(value for *_, value in points) / 10))

    def y(value: float) -> float:
        return 8 + (high - value) / (high - low) * (height - bottom - 8)

    def x(position: int) -> float:
        return left + (position - 0.5) / len(layers) * (width - left - 8)

    lines = "".join(
        f'<path class="grid" d="M{left} {y(level):.1f}H{width - 8}"/>'
        f'<text x="{left - 6}" y="{y(level) + 3:.1f}" text-anchor="end">{level:.0f}</text>'
        for level in _levels(low, high)
    )
    marks = "".join(
        f"<g><title>{escape(layer.name)}, {role}: {value:.1f} dB</title>{_mark(role, x(layer.position), y(value))}</g>"
        for layer, role, value in points
    )
    label = (
        f"Signal-to-quantization-noise ratio of {len(layers)} layers in order of execution, {low:.0f} to {high:.0f} dB"
    )
    return (
        f'<svg class="chart" viewBox="0 0 {width} {height}" role="img" aria-label="{escape(label)}">{lines}{marks}'
        f'<text x="{left}" y="{height - 4}">first layer</text>'
        f'<text x="{width - 8}" y="{height - 4}" text-anchor="end">last layer</text></svg>'
    )


def share_bar(fraction: float) -> str:
    """Return HTML of a bar that is filled to this fraction of its width; above 1 as for 1. Screen readers skip it."""
    return f'<span class="share" aria-hidden="true"><span style="width:{100 * min(fraction, 1.0):.1f}%"></span></span>'


def _levels(low: float, high: float) -> list[float]:
    step = 10 if high - low <= 60 else 20
    return [low + step * index for index in range(int((high - low) // step) + 1)]


def _mark(role: str, x: float, y: float) -> str:
    """Return a square for weights, a disc for activations, at (x, y); the shape tells what the colour tells."""
    if role == "weight":
        return f'<rect class="weight" x="{x - 3.5:.1f}" y="{y - 3.5:.1f}" width="7" height="7"/>'
    return f'<circle class="output" cx="{x:.1f}" cy="{y:.1f}" r="4"/>'


def _window(counts: Sequence[int]) -> tuple[int, int]:
    """Return the first and the last bin to draw: those of the grid, and those outside of it that are not empty."""
    filled = [index for index, count in enumerate(counts) if count]
    first = min([MARGIN, *filled[:1]])
    last = max([MARGIN + BINS, *(index + 1 for index in filled[-1:])])
    return first, last
