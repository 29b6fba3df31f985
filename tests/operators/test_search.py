"""Range searches against brute force in float64 over the same histogram, and against the raw data."""

import math

import numpy as np
import pytest
import torch

from tolerances import FLOAT32
from tritonq.bins import FloatPrefixBins
from tritonq.grid import Grid
from tritonq.qparams import range_to_qparams
from tritonq.quantized_type import QINT1, QINT2, QINT4, QINT8, QINT8_NARROW, QUINT2, QUINT8, QuantizedType
from tritonq.reference import search as reference
from tritonq.reference.fake_quant import fake_quantize
from tritonq.reference.histogram import prefix_histogram

BINS = FloatPrefixBins()
TYPES = [QINT8, QINT8_NARROW, QUINT8, QINT4, QUINT2, QINT2, QINT1, QuantizedType.of(6, symmetric=False)]


def data(name):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(8000, generator=generator)
    return {
        "normal": x,
        "relu": x.relu(),
        "outlier": torch.cat((x, torch.tensor([80.0]))),
        "heavy": x * torch.exp2(2 * torch.randn(8000, generator=generator)),
        "shifted": x + 3,
        "negative": -x.abs() - 0.5,
        "tiny": x * 1e-4,
        "huge": x * 1e8,
    }[name]


DATA = ["normal", "relu", "outlier", "heavy", "shifted", "negative", "tiny", "huge"]


def chosen(x, qtype, search, **kwargs):
    counts, low, high, _ = prefix_histogram(x, BINS)
    return reference.search_range(counts, low, high, BINS, qtype, search, **kwargs)


def mean_cubic(left, right, points):
    """Mean squared distance of a uniform density on [left, right] to the nearest of ``points``, by cutting it up."""
    cuts = (points[1:] + points[:-1]) / 2
    inner = np.clip(np.concatenate(([left], cuts[(cuts > left) & (cuts < right)], [right])), left, right)
    middle = (inner[1:] + inner[:-1]) / 2
    nearest = points[np.abs(middle[:, None] - points).argmin(1)]
    return (((inner[1:] - nearest) ** 3 - (inner[:-1] - nearest) ** 3) / 3).sum() / (right - left)


def brute_force_error(x, lo, hi, qtype, search):
    """The error of one range over the histogram of ``x``, bin by bin."""
    counts, low, high, _ = prefix_histogram(x, BINS)
    edges = reference.data_edges(low.view(1), high.view(1), BINS)[0].numpy()
    codes = np.arange(qtype.quant_min, qtype.quant_max + 1)
    if search == "l2":
        width = (hi - lo) / len(codes)
        points = lo + width * (np.arange(len(codes)) + 0.5)
    else:
        scale, zero_point = range_to_qparams(torch.tensor(lo).float(), torch.tensor(hi).float(), qtype)
        points = (codes - int(zero_point)) * scale.double().numpy()
    total = 0.0
    for bin in counts.nonzero().ravel().tolist():
        left, right = edges[bin], edges[bin + 1]
        if right > left:
            total += int(counts[bin]) * mean_cubic(left, right, points)
        else:
            total += int(counts[bin]) * ((left - points) ** 2).min()
    return total / int(counts.sum())


@pytest.mark.parametrize("search", ["mse", "l2"])
@pytest.mark.parametrize("qtype", TYPES, ids=str)
def test_error_is_the_integral(qtype, search):
    x = data("heavy")[:3000]
    counts, low, high, _ = prefix_histogram(x, BINS)
    fine = reference.condensed(counts[None], low[None], high[None], BINS, 64)
    for lo, hi in ((-4.0, 4.0), (-1.0, 20.0), (float(low), float(high)), (-1e-3, 2e-3)):
        candidates = (torch.tensor([[lo]]), torch.tensor([[hi]]))
        error = reference.range_error(*reference.densities(*fine), *candidates, qtype, search, "torch", None)
        assert float(error) == pytest.approx(brute_force_error(x, lo, hi, qtype, search), rel=FLOAT32.rtol)


@pytest.mark.parametrize("search", ["mse", "l2"])
@pytest.mark.parametrize("name", DATA)
@pytest.mark.parametrize("qtype", [QINT8, QUINT8, QINT4, QUINT2, QINT2, QINT1], ids=str)
def test_no_candidate_of_a_dense_grid_is_much_better(qtype, name, search):
    x = data(name)
    counts, low, high, _ = prefix_histogram(x, BINS)
    lo, hi = reference.search_range(counts, low, high, BINS, qtype, search)
    fine = reference.densities(*reference.condensed(counts[None], low[None], high[None], BINS, 24))
    down = torch.exp2(-torch.arange(0, 7, 1 / 3, dtype=torch.float64))
    ends = reference._ends(low, high, qtype)
    if qtype.symmetric:
        all_lo, all_hi = ends[0] * down, ends[1] * down
        lo, hi = -torch.maximum(-lo, hi), torch.maximum(-lo, hi)
    else:
        all_lo, all_hi = (ends[0] * down).repeat_interleave(len(down)), (ends[1] * down).repeat(len(down))
        lo, hi = lo.clamp(max=0), hi.clamp(min=0)
    arguments = (qtype, search, "torch", None)
    best = min(
        float(reference.range_error(*fine, some_lo[None], some_hi[None], *arguments).min())
        for some_lo, some_hi in zip(all_lo.split(256), all_hi.split(256), strict=True)
    )
    found = float(reference.range_error(*fine, lo.view(1, 1), hi.view(1, 1), *arguments))
    assert found <= 1.02 * best


@pytest.mark.parametrize("name", ["normal", "relu", "outlier", "heavy", "tiny"])
@pytest.mark.parametrize("qtype", [QINT8, QUINT8, QINT4, QUINT2, QINT2, QINT1], ids=str)
def test_mse_against_raw_data(qtype, name):
    x = data(name)

    def error(lo, hi):
        scale, zero_point = range_to_qparams(lo, hi, qtype)
        y = fake_quantize(x, Grid(scale, zero_point, qtype))
        return float((y.double() - x.double()).square().mean())

    down = [2 ** (-step / 16) for step in range(0, 96, 2)]
    alike = min(error(x.min() * f, x.max() * f) for f in down)
    assert error(*chosen(x, qtype, "mse")) <= 1.03 * alike


@pytest.mark.parametrize("name", DATA)
@pytest.mark.parametrize("percentile", [60.0, 99.0, 99.9, 100.0])
def test_percentile_against_raw_data(name, percentile):
    x = data(name).double().numpy()

    def is_quantile(found, values, percent):
        """Between the neighbouring values, give or take a bin: 1/16 of the value, and 2^-32 around zero."""
        low, high = (np.percentile(values, percent, method=method) for method in ("lower", "higher"))
        slack = max(abs(low), abs(high)) / 16 + 2.0**-32
        return low - slack <= float(found) <= high + slack

    lo, hi = chosen(data(name), QUINT8, "percentile", percentile=percentile)
    assert is_quantile(lo, x, 100 - percentile)
    assert is_quantile(hi, x, percentile)
    lo, hi = chosen(data(name), QINT8, "percentile", percentile=percentile)
    assert is_quantile(max(-lo, hi), np.abs(x), percentile)
    if percentile == 100:
        assert max(-float(lo), float(hi)) == np.abs(x).max()


def brute_force_kl(counts, levels, stride):
    """TensorRT's threshold, candidate by candidate, with integer group boundaries."""
    counts = counts.astype(np.float64).copy()
    counts[0] = counts[1]
    divergences = {}
    for i in range(len(counts), levels - 1, -stride):
        p = counts[:i].copy()
        p[-1] += counts[i:].sum()
        group = np.arange(i) * levels // i
        q = np.zeros(i)
        for g in range(levels):
            members = (group == g) & (counts[:i] > 0)
            if members.any():
                q[members] = counts[:i][members].sum() / members.sum()
        if counts[:i].sum() == 0:
            continue
        p, q = p / p.sum(), q / q.sum()
        with np.errstate(divide="ignore"):
            divergences[i] = sum(a * math.log(a / b) if b else math.inf for a, b in zip(p, q, strict=True) if a)
    # Of equal candidates the largest; equal to the rounding of a sum of 2048 terms.
    return divergences


@pytest.mark.parametrize("levels", [1, 2, 8, 128])
@pytest.mark.parametrize("kind", ["smooth", "gaps", "outliers", "zeros"])
def test_kl_against_brute_force(kind, levels):
    generator = np.random.default_rng(5)
    counts = np.histogram(np.abs(generator.standard_normal(20000)), 512, (0, 6))[0]
    if kind == "gaps":
        counts[generator.random(512) < 0.3] = 0
    if kind == "outliers":
        counts[400:] = 0
        counts[-1] = 3
    if kind == "zeros":
        # As behind a ReLU; they would hide what clipping costs.
        counts[0] = 10**7
    found = reference.kl_threshold(torch.from_numpy(counts)[None].double(), torch.tensor([levels]), levels, 8)
    divergences = brute_force_kl(counts, levels, 8)
    i = round(float(found) * 512)
    assert divergences[i] <= min(divergences.values()) + 1e-12


def test_kl_clips_outliers_and_keeps_the_rest():
    x = torch.cat((data("normal"), torch.tensor([60.0, -55.0])))
    for qtype in (QINT8, QUINT8, QINT4):
        lo, hi = chosen(x, qtype, "kl")
        assert 2 < max(-lo, hi) < 30
    assert chosen(data("relu"), QUINT8, "kl")[0] == 0


@pytest.mark.parametrize("search", ["mse", "l2", "percentile", "kl"])
@pytest.mark.parametrize("qtype", TYPES, ids=str)
@pytest.mark.parametrize("value", [0.0, 3.0, -3.0, 2.0, -2.0, 1e-20, -1e-20, 3e38, 1.3e-38])
def test_a_single_value(value, qtype, search):
    x = torch.full((10,), value)
    lo, hi = chosen(x, qtype, search)
    assert min(0, x[0]) <= lo <= hi <= max(0, x[0])
    if search == "percentile":
        assert lo == hi == x[0]
    if search == "mse":
        y, plain = (fake_quantize(x, Grid(*range_to_qparams(*ends, qtype), qtype)) for ends in ((lo, hi), (x[0], x[0])))
        # The bin of the value is not the value: it reaches 2^-20 beyond.
        assert (y - x).abs().max() <= (plain - x).abs().max() + 2.0**-20 * abs(value)


@pytest.mark.parametrize("search", ["mse", "l2", "percentile", "kl"])
def test_channels_are_searched_alone(search):
    x = torch.stack([data("heavy")[:5000] * 10.0**power for power in range(-3, 3)])
    x[2] = torch.nan
    counts, low, high, _ = prefix_histogram(x, BINS, 0)
    for qtype in (QINT8, QUINT8):
        lo, hi = reference.search_range(counts, low, high, BINS, qtype, search)
        for channel in (0, 1, 3, 4, 5):
            assert (lo[channel], hi[channel]) == chosen(x[channel], qtype, search)
        assert (lo[2], hi[2]) == (torch.inf, -torch.inf)


def test_more_channels_than_are_searched_together():
    x = torch.randn(150, 40)
    counts, low, high, _ = prefix_histogram(x, BINS, 0)
    lo, hi = reference.search_range(counts, low, high, BINS, QINT8, "mse")
    assert (lo[149], hi[149]) == chosen(x[149], QINT8, "mse")


def test_more_mantissa_bits_come_closer():
    x = data("normal")
    exact = np.percentile(np.abs(x.double().numpy()), 99.0)

    def distance(mantissa_bits):
        bins = FloatPrefixBins(mantissa_bits)
        counts, low, high, _ = prefix_histogram(x, bins)
        _, hi = reference.search_range(counts, low, high, bins, QINT8, "percentile", percentile=99.0)
        return abs(float(hi) - exact)

    assert distance(8) < 2.0**-8 * exact
    assert distance(8) <= distance(0)
