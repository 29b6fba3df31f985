"""Histograms: counts against numpy's, whatever the order, the batches, the dtype and the ranks; the linear one."""

import copy
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tritonq
from op_tester import LAYOUTS, OpTester, axes, operators
from tolerances import assert_matches
from tritonq.bins import FloatPrefixBins
from tritonq.functional import histogram
from tritonq.observers import HistogramObserver, MinMaxObserver
from tritonq.reference import histogram as reference

BINS = FloatPrefixBins()
# Bin edges from both sides, zeros, subnormals, the ends of the window and beyond it, and what is not finite.
SIZES = (0.0, 1e-45, 1.0, 1.0625, 1.0624999, 2.3e-10, 2.0**-32, 2.0**32, 4294967040.0, 65504.0, 3e38, torch.inf)
CORNERS = torch.tensor([*SIZES, *(-size for size in SIZES), torch.nan])


def spread(count, seed=0):
    """Values over many octaves."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, generator=generator) * torch.exp2(6 * torch.randn(count, generator=generator))


def counted_by_numpy(x, bins):
    """The definition, with sorted edges instead of bits."""
    values = x.detach().float().double().numpy().ravel()
    values = values[np.isfinite(values)]
    edges = bins.edges("cpu").numpy()
    # A positive edge belongs to the bin above it, a negative one to the bin below.
    index = np.where(values < 0, np.searchsorted(edges, values, "left"), np.searchsorted(edges, values, "right")) - 1
    return torch.from_numpy(np.bincount(np.clip(index, 0, bins.count - 1), minlength=bins.count))


@pytest.mark.parametrize("mantissa_bits", [0, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_counts_are_numpys(dtype, mantissa_bits):
    bins = FloatPrefixBins(mantissa_bits)
    x = torch.cat((spread(5000), CORNERS)).to(dtype)
    counts, low, high, nonfinite = reference.prefix_histogram(x, bins)
    finite = x[torch.isfinite(x)].float()
    assert torch.equal(counts, counted_by_numpy(x, bins))
    assert (low, high, nonfinite) == (finite.min(), finite.max(), len(x) - len(finite))


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_counts_per_channel(axis):
    x = torch.cat((spread(595), CORNERS)).reshape(4, 5, 31)
    counts, low, high, nonfinite = reference.prefix_histogram(x, BINS, axis)
    for channel, values in enumerate(x.movedim(axis, 0)):
        expected = reference.prefix_histogram(values, BINS)
        assert torch.equal(counts[channel], expected[0])
        assert (low[channel], high[channel]) == expected[1:3]
    assert nonfinite == 3


@pytest.mark.parametrize("shape", [(), (1,), (0,), (0, 3), (2, 3, 5, 7), (1024,), (1025,), (3, 1024)])
def test_any_shape(shape):
    x = spread(int(np.prod(shape))).reshape(shape)
    counts, low, high, nonfinite = reference.prefix_histogram(x, BINS)
    assert torch.equal(counts, counted_by_numpy(x, BINS))
    assert (low <= high) == (x.numel() > 0)
    assert nonfinite == 0


def test_strides_do_not_matter():
    x = spread(2 * 6 * 8 * 8).reshape(2, 6, 8, 8)
    for view in (x.to(memory_format=torch.channels_last), x.transpose(1, 3), x[:, ::2, 1:, ::3], x[..., 0]):
        assert torch.equal(reference.prefix_histogram(view, BINS)[0], counted_by_numpy(view, BINS))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(width=32), max_size=60), st.integers(0, 8))
def test_every_float_is_counted_once(values, mantissa_bits):
    bins = FloatPrefixBins(mantissa_bits)
    x = torch.tensor(values, dtype=torch.float32)
    counts, _, _, nonfinite = reference.prefix_histogram(x, bins)
    assert torch.equal(counts, counted_by_numpy(x, bins))
    assert int(counts.sum() + nonfinite) == len(values)


def observed(batches, **kwargs):
    observer = HistogramObserver(dtype=torch.qint8, qscheme=torch.per_tensor_symmetric, **kwargs)
    for batch in batches:
        observer(batch)
    return observer


def same_state(one, other):
    mine, others = one.state_dict(), other.state_dict()
    return mine.keys() == others.keys() and all(torch.equal(mine[name], others[name]) for name in mine)


def test_order_and_split_do_not_matter():
    x = torch.cat((spread(3000), CORNERS))
    whole = observed([x])
    for batches in itertools.permutations((x[:7], x[7:1500], x[1500:])):
        assert same_state(observed(batches), whole)
    assert same_state(observed([x[torch.randperm(len(x))]]), whole)
    left, right = observed([x[:1234]]), observed([x[1234:]])
    left.merge(right)
    assert same_state(left, whole)


def test_counts_hold_past_32_bits():
    observer = observed([torch.ones(3)])
    observer.histogram.mul_(2**31)
    observer(torch.ones(5))
    assert observer.histogram.max() == 3 * 2**31 + 5


def test_a_frozen_observer_counts_nothing():
    quantizer = tritonq.FakeQuantize(HistogramObserver, dtype=torch.qint8, qscheme=torch.per_tensor_symmetric)
    quantizer(torch.randn(100))
    before = copy.deepcopy(quantizer)
    quantizer.disable_observer()
    quantizer(10 * torch.randn(100))
    assert same_state(quantizer.activation_post_process, before.activation_post_process)
    assert torch.equal(quantizer.scale, before.scale)
    quantizer.enable_observer()
    quantizer.eval()(10 * torch.randn(100))
    assert same_state(quantizer.activation_post_process, before.activation_post_process)


@pytest.mark.parametrize("qtype", ["qint8", "quint8", "qint4", "quint4", "qint2", "quint2", "qint1"])
@pytest.mark.parametrize("search", ["mse", "l2", "percentile", "kl"])
def test_observes_and_rounds_in_a_training_step(qtype, search):
    quantizer = tritonq.FakeQuantize(HistogramObserver, dtype=qtype, search=search)
    x = torch.randn(2000, requires_grad=True)
    for _ in range(3):
        y = quantizer(x)
    y.sum().backward()
    assert set(x.grad.unique().tolist()) <= {0.0, 1.0}
    assert len(y.unique()) <= quantizer.qtype.quant_max - quantizer.qtype.quant_min + 1
    assert (y - x).square().mean() < x.square().mean()
    scale, zero_point = quantizer.activation_post_process.calculate_qparams()
    assert torch.equal(quantizer.scale, scale)
    assert torch.equal(quantizer.zero_point, zero_point)


def test_per_channel_ranges():
    observer = HistogramObserver(dtype=torch.qint8, qscheme=torch.per_channel_symmetric, ch_axis=1, search="percentile")
    x = spread(3 * 4 * 500).reshape(3, 4, 500) * torch.tensor([1.0, 10.0, 0.1, 0.0]).view(4, 1)
    observer(x)
    for channel in range(4):
        alone = HistogramObserver(dtype=torch.qint8, qscheme=torch.per_tensor_symmetric, search="percentile")
        alone(x[:, channel])
        for of_all, of_one in zip(observer.search_range(), alone.search_range(), strict=True):
            assert torch.equal(of_all[channel], of_one)


def test_checkpoint_and_dtype():
    observer = HistogramObserver(dtype=torch.qint8, qscheme=torch.per_channel_symmetric, ch_axis=0)
    observer(torch.randn(3, 50))
    restored = HistogramObserver(dtype=torch.qint8, qscheme=torch.per_channel_symmetric, ch_axis=0)
    restored.load_state_dict(observer.state_dict())
    assert same_state(restored.half(), observer)


def test_unset_without_finite_values():
    observer = observed([torch.empty(0), torch.full((3,), torch.nan), torch.tensor([torch.inf])])
    assert not observer.has_observed()
    assert observer.nonfinite_count == 4
    assert observer.calculate_qparams().scale == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"bins": 1000}, "power of two in 128..32768, got 1000"),
        ({"bins": 64}, "power of two"),
        ({"bins": 2**16}, "power of two"),
        ({"bins": -2048}, "power of two"),
        ({"bins": 0}, "power of two"),
        ({"bins": 2048.0}, "power of two"),
        ({"mantissa_bits": -1}, r"mantissa_bits must be an int in 0\.\.8, got -1"),
        ({"mantissa_bits": 9}, "mantissa_bits"),
        ({"percentile": 50}, r"percentile must be in \(50, 100\], got 50"),
        ({"percentile": 100.1}, "percentile"),
        ({"percentile": float("nan")}, "percentile"),
        ({"search": "median"}, "unknown search 'median'"),
        ({"search": "kl", "dtype": torch.int16}, "16 bits"),
        ({"process_group": "everyone"}, "process_group"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        HistogramObserver(**arguments)


def test_histograms_that_do_not_merge():
    coarse, fine = observed([torch.ones(2)], mantissa_bits=2), observed([torch.ones(2)])
    before = copy.deepcopy(fine)
    with pytest.raises(ValueError, match="cannot merge histograms over"):
        fine.merge(coarse)
    with pytest.raises(TypeError, match="cannot merge a MinMaxObserver into a HistogramObserver"):
        fine.merge(MinMaxObserver())
    three, four = (HistogramObserver(qscheme=torch.per_channel_affine, num_channels=n) for n in (3, 4))
    with pytest.raises(ValueError, match="keeps 3 channels"):
        three.merge(four)
    assert same_state(fine, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("bins", "lo", "hi"), [(10, -1.0, 1.0), (2048, -3.3, 4.7), (7, 0.0, 0.1), (1, -1e30, 1e30)])
def test_linear_histogram_is_histc(bins, lo, hi, dtype):
    edges = torch.linspace(lo, hi, bins + 1, dtype=torch.float64)
    x = torch.cat((torch.randn(20000, dtype=torch.float64), edges, torch.tensor([torch.nan, torch.inf, -torch.inf])))
    counts = histogram(x.to(dtype), bins, lo, hi)
    assert counts.dtype == torch.int64
    assert torch.equal(counts.to(dtype), torch.histc(x.to(dtype), bins, lo, hi))
    if dtype == torch.float64:
        # numpy compares with the edges themselves: the same where the arithmetic is exact.
        exact = torch.round(x[~x.isnan()] * 64) / 64
        expected = np.histogram(exact.numpy(), 16, (-2, 2))[0]
        assert np.array_equal(histogram(exact, 16, -2, 2).numpy(), expected)


def test_linear_histogram_per_channel():
    x = torch.randn(3, 5, 7)
    counts = histogram(x, 9, -1, 2, axis=-2)
    assert torch.equal(counts.float(), torch.stack([torch.histc(x[:, c], 9, -1, 2) for c in range(5)]))
    assert histogram(torch.empty(0, 4), 9, 0, 1, axis=1).sum() == 0


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ((torch.ones(3, dtype=torch.int32), 4, 0, 1), TypeError),
        ((torch.ones(3), 4.0, 0, 1), TypeError),
        ((torch.ones(3), 0, 0, 1), ValueError),
        ((torch.ones(3), 2**25, 0, 1), ValueError),
        ((torch.ones(3), 4, 1, 1), ValueError),
        ((torch.ones(3), 4, 0, float("nan")), ValueError),
        ((torch.ones(3), 4, 1.0, 1.0 + 1e-12), ValueError),
        ((torch.ones(3), 4, -3e38, 3e38), ValueError),
        ((torch.ones(3), 4, 0.0, 3e38), ValueError),
    ],
)
def test_linear_histogram_bad_arguments(arguments, error):
    with pytest.raises(error):
        histogram(*arguments)


class TestKernels(OpTester):
    """Whatever counts, the counts are the same: every layout, many programs, partial tiles."""

    @pytest.mark.parametrize("layout", ["0-d", "empty", "empty channels", "odd", "channels_last", "sliced", "copied"])
    def test_prefix_histogram(self, layout, use, device):
        x = LAYOUTS[layout]()
        for axis in axes(x)[:3]:
            found = operators("histogram", use).prefix_histogram(x.to(device), BINS, axis)
            for actual, expected in zip(found, reference.prefix_histogram(x, BINS, axis), strict=True):
                assert_matches(actual.cpu(), expected, "histogram")

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
    @pytest.mark.parametrize("mantissa_bits", [0, 4, 8])
    def test_every_kind_of_value(self, mantissa_bits, dtype, use, device):
        bins = FloatPrefixBins(mantissa_bits)
        x = torch.cat((spread(300), CORNERS, torch.zeros(40), spread(200).abs() * 1e-30)).to(dtype)
        counts, low, high, nonfinite = operators("histogram", use).prefix_histogram(x.to(device), bins)
        finite = x[torch.isfinite(x)].float()
        assert torch.equal(counts.cpu(), counted_by_numpy(x, bins))
        assert (low, high, nonfinite) == (finite.min(), finite.max(), len(x) - len(finite))

    def test_observe_adds_or_does_nothing(self, use, device):
        x = torch.cat((spread(300), CORNERS)).to(device)
        ops = operators("histogram", use)
        counts, low, high, nonfinite = ops.prefix_histogram(x, BINS)
        state = [counts.clone(), low.clone(), high.clone(), nonfinite.clone()]
        ops.observe(3 * x, *state, torch.zeros(1, dtype=torch.uint8, device=device), BINS, None)
        assert all(torch.equal(a, b) for a, b in zip(state, (counts, low, high, nonfinite), strict=True))
        ops.observe(x, *state, torch.ones(1, dtype=torch.uint8, device=device), BINS, None)
        assert torch.equal(state[0], 2 * counts)
        assert torch.equal(state[3], 2 * nonfinite)
        assert (state[1], state[2]) == (low, high)

    @pytest.mark.parametrize("layout", ["0-d", "empty", "sliced"])
    def test_linear_histogram(self, layout, use, device):
        x = LAYOUTS[layout]()
        for axis in axes(x):
            for bins, lo, hi in ((10, -1.0, 1.0), (33, -3.3, 4.7), (1, -1.0, 1.0)):
                found = histogram(x.to(device), bins, lo, hi, axis=axis, backend=use)
                assert torch.equal(
                    found.cpu(), reference.linear_histogram(x, bins, torch.tensor([lo, hi], dtype=torch.float64), axis)
                )

    @pytest.mark.parametrize(
        ("limits", "expected"),
        [
            ((1.0, 1.0), [0, 0, 0, 2]),  # 0 by 0
            ((1.0, 1.0 + 1e-12), [0, 0, 0, 2]),  # equal in float32
            ((-3e38, 3e38), [1, 0, 0, 4]),  # a width of infinity
            ((1.0, torch.inf), [3, 0, 0, 1]),
            ((torch.inf, -torch.inf), [0, 0, 0, 0]),
        ],
    )
    def test_linear_histogram_without_a_finite_quotient(self, limits, expected, use, device):
        """No value is put into a bin that there is none of."""
        x = torch.tensor([1.0, 1.0, 2.0, -3e38, 3e38, torch.nan, -torch.inf])
        if limits[1] == torch.inf:
            x = torch.tensor([1.0, 1.0, 2.0, torch.inf, -torch.inf, 0.0, torch.nan])
        ends = torch.tensor(limits, dtype=torch.float64, device=device)
        assert operators("histogram", use).linear_histogram(x.to(device), 4, ends).tolist() == expected

    def test_linear_histogram_at_its_ends(self, use, device):
        """The upper end is in the last bin, not behind it in the next channel's first; what lies beyond is in none."""
        x = torch.tensor([[-1.0, -1.0, 1.0, 1.0, 1.0, 0.0], [-1.0000001, 1.0000001, 0.5, 0.4999999, -0.5, 2.0]])
        found = histogram(x.to(device), 4, -1.0, 1.0, axis=0, backend=use)
        assert found.tolist() == [[2, 0, 1, 3], [0, 1, 1, 1]]
