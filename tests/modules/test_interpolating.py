"""The interpolating histogram against torch.ao's observer, batch by batch, and MegEngine's alignment by hand."""

import numpy as np
import pytest
import torch
from torch.ao.quantization import HistogramObserver as TorchHistogramObserver

from tolerances import EXACT, LONG_SUMS, SUMS, assert_close
from tritonq.observers import HistogramObserver, InterpolatingHistogramObserver, MinMaxObserver, base
from tritonq.qparams import QParams
from tritonq.reference import interpolating
from tritonq.reference.interpolating import greedy_range


def sequences():
    generator = torch.Generator().manual_seed(7)

    def normal(count=4000):
        return torch.randn(count, generator=generator)

    return {
        "growing": [normal() * size for size in (1, 1.3, 2, 2.1, 9)],
        "shrinking": [normal() * size for size in (5, 3, 1, 0.1)],
        "one_sided": [normal().abs() * size for size in (1, 2, 0.5)],
        "negative": [-normal().abs() - 1, -normal().abs() * 3 - 0.5],
        "shifting": [normal() + shift for shift in (0, 3, -8)],
        "constant": [torch.full((50,), 2.5), torch.full((30,), 2.5)],
        "zeros": [torch.zeros(50), torch.zeros(30)],
        "constant_then_not": [torch.full((50,), 2.5), normal(), torch.full((9,), 1.0)],
        "two_constants": [torch.full((50,), 2.5), torch.full((30,), -1.0)],
        "outlier": [normal(), torch.cat((normal(), torch.tensor([60.0])))],
        "uniform": [torch.rand(4000, generator=generator) - 0.3, 2 * torch.rand(4000, generator=generator) - 0.3],
        "empty": [torch.empty(0), normal(), torch.empty(0)],
    }


SEQUENCES = sequences()
ARGUMENTS = {
    "symmetric": {"dtype": torch.qint8, "qscheme": torch.per_tensor_symmetric},
    "affine": {"dtype": torch.quint8, "qscheme": torch.per_tensor_affine},
    "reduced": {"dtype": torch.quint8, "qscheme": torch.per_tensor_affine, "reduce_range": True},
}


@pytest.mark.parametrize("interpolation", ["torch", "megengine"])
def test_infinities_beside_one_value_are_left_out(interpolation):
    """The range of one value has no width to divide by."""
    observer, finite = (InterpolatingHistogramObserver(interpolation=interpolation) for _ in range(2))
    for batch in (torch.tensor([1.5, torch.inf, torch.nan, 1.5]), torch.tensor([0.5, -torch.inf, 2.0])):
        observer(batch)
        finite(batch[batch.isfinite()])
    assert torch.equal(observer.histogram, finite.histogram)
    assert observer.calculate_qparams() == finite.calculate_qparams()
    assert int(observer.nonfinite_count) == 3


@pytest.mark.filterwarnings("ignore:Please use quant_min")
@pytest.mark.parametrize("arguments", ARGUMENTS.values(), ids=ARGUMENTS)
@pytest.mark.parametrize("name", SEQUENCES)
def test_as_torch_ao(name, arguments):
    ours, theirs = InterpolatingHistogramObserver(**arguments), TorchHistogramObserver(**arguments)
    for batch in SEQUENCES[name]:
        ours(batch)
        theirs(batch)
        assert (float(ours.min_val), float(ours.max_val)) == (float(theirs.min_val), float(theirs.max_val))
        assert_close(ours.histogram.float(), theirs.histogram, LONG_SUMS, size=10)
        if theirs.min_val <= theirs.max_val:
            (scale, zero_point), (expected, expected_zero) = ours.calculate_qparams(), theirs.calculate_qparams()
            assert float(scale) == pytest.approx(float(expected), rel=SUMS.rtol)
            assert int(zero_point) == int(expected_zero)


@pytest.mark.parametrize("name", SEQUENCES)
def test_megengine_keeps_counts_and_holds_the_range(name):
    batches = SEQUENCES[name]
    observer = InterpolatingHistogramObserver(dtype="qint8", rule="megengine", interpolation="megengine")
    for batch in batches:
        observer(batch)
    data = torch.cat(batches)
    assert float(observer.histogram.sum()) == pytest.approx(len(data))
    assert observer.min_val <= data.min()
    assert data.max() <= observer.max_val
    assert observer.calculate_qparams().scale.isfinite()


def test_megengine_alignment_by_hand():
    """Two bins of 0..1, then 0..3: a new bin takes ceil(3 * 128) slices of 1/256, so the range is just 0..3."""
    observer = InterpolatingHistogramObserver(2, dtype="qint8", interpolation="megengine")
    observer(torch.tensor([0.0, 0.1, 0.9, 1.0]))
    assert observer.histogram.tolist() == [2, 2]
    observer(torch.tensor([3.0]))
    assert (float(observer.min_val), float(observer.max_val)) == (0, 3)
    assert observer.histogram.tolist() == [4, 1]
    # 0..3 to -0.7..3: (3.7 / 6) * 256 * 2 = 315.7 slices of 3/256 in all, so 158 per bin: 3.703125 wide.
    observer(torch.tensor([-0.7]))
    assert float(observer.max_val - observer.min_val) == pytest.approx(158 * 2 * 3 / 256)
    assert float(observer.min_val) == pytest.approx(-0.7 - (158 * 2 * 3 / 256 - 3.7) / 2)
    # The old slices start at the 60th of the new range: 98 of the first old bin's 128 stay in the first new bin.
    assert observer.histogram.tolist() == pytest.approx([4 * 98 / 128 + 1, 4 * 30 / 128 + 1])


@pytest.mark.parametrize("name", ["growing", "one_sided", "outlier", "uniform"])
def test_greedy_search_stops_at_the_first_rise(name):
    """Against torch.ao's own search over the very same histogram."""
    theirs = TorchHistogramObserver(dtype=torch.qint8, qscheme=torch.per_tensor_symmetric)
    for batch in SEQUENCES[name]:
        theirs(batch)
    low, high = theirs._non_linear_param_search()
    limits = torch.stack((theirs.min_val, theirs.max_val)).double()
    found = greedy_range(theirs.histogram.double(), limits, 256)
    np.testing.assert_allclose(found.tolist(), (float(low), float(high)), rtol=SUMS.rtol)


HISTOGRAMS = {
    "two values": [0, 5, 0, 0, 0, 0, 40, 0],
    "the first": [7, 0, 0, 0],
    "the last": [0, 0, 0, 7],
    "one in the middle": [0, 0, 7, 0, 0],
    "ends": [40, 0, 0, 1, 0, 0, 90],
    "slopes": [1, 2, 4, 8, 16, 8, 4, 2, 1],
    "one step takes several": [1, 1, 1, 500000, 1, 1, 500000, 1],
}


def greedy_by_steps(counts: list[float], cells: int) -> tuple[int, int]:
    """The first and last bin that are left, one step of the published search after the other."""
    below, total = np.cumsum(counts).tolist(), float(np.sum(counts))
    lower, upper, first, last, least = 0.0, 1.0, 0, len(counts) - 1, np.inf
    while lower < upper:
        left, right = first, last
        while left < last and below[left] < (lower + 1e-5) * total:
            left += 1
        while right > first and below[right] > (upper - 1e-5) * total:
            right -= 1
        if left - first > last - right:
            candidate, lower = (left, last), lower + 1e-5
        else:
            candidate, upper = (first, right), upper - 1e-5
        if candidate == (first, last):
            continue
        step = (candidate[1] - candidate[0] + 1) / cells
        points = candidate[0] + step / 2 + step * np.arange(cells)
        # Midpoints of many slices of each bin, to the nearest point.
        middles = (np.arange(len(counts) * 1000) + 0.5) / 1000
        distance = np.abs(middles[:, None] - points).min(1) ** 2
        error = float((distance.reshape(len(counts), -1).mean(1) * counts).sum())
        if error > least:
            break
        least, (first, last) = error, candidate
    return first, last


@pytest.mark.parametrize("cells", [2, 16])
@pytest.mark.parametrize("name", HISTOGRAMS)
def test_windows_are_those_of_one_step_after_the_other(name, cells):
    counts = HISTOGRAMS[name]
    found = greedy_range(torch.tensor(counts).double(), torch.tensor([0.0, len(counts)]).double(), cells)
    first, last = greedy_by_steps(counts, cells)
    assert found.tolist() == [first, last + 1]


@pytest.mark.parametrize("interpolation", ["torch", "megengine"])
@pytest.mark.parametrize("name", SEQUENCES)
def test_what_a_gpu_computes_without_a_look_from_the_host(name, interpolation, monkeypatch):
    arguments = {"dtype": "qint8", "interpolation": interpolation}
    ours, theirs = (InterpolatingHistogramObserver(**arguments) for _ in range(2))
    for batch in SEQUENCES[name]:
        theirs(batch)
        with monkeypatch.context() as patched:
            patched.setattr(interpolating, "is_readable", lambda values: False)
            ours(batch)
            scale, zero_point = ours.calculate_qparams()
        assert torch.equal(ours.min_val, theirs.min_val)
        assert torch.equal(ours.max_val, theirs.max_val)
        if interpolation == "megengine":
            assert_close(ours.histogram, theirs.histogram, EXACT)
        else:
            # A slice whose middle is on a boundary, by either formula of linspace, may fall on either side.
            moved = (ours.histogram - theirs.histogram).cumsum(0).abs().max()
            assert moved <= theirs.histogram.max() / interpolating.TORCH_SLICES
        expected, expected_zero = theirs.calculate_qparams()
        assert_close(scale, expected, SUMS, size=0)
        assert torch.equal(zero_point, expected_zero)


def test_a_switch_that_only_the_device_knows(monkeypatch):
    """With 0 nothing moves, with 1 everything does."""
    observer, other = InterpolatingHistogramObserver(), InterpolatingHistogramObserver()
    qparams = QParams(torch.ones(1), torch.zeros(1, dtype=torch.int32))
    monkeypatch.setattr(base, "is_readable", lambda values: False)
    x = SEQUENCES["growing"][0]
    observer.observe(x, qparams, torch.zeros(1, dtype=torch.uint8))
    for (name, mine), untouched in zip(observer.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(mine, untouched), name
    assert float(qparams.scale) == 1
    observer.observe(x, qparams, torch.ones(1, dtype=torch.uint8))
    other(x)
    assert torch.equal(observer.histogram, other.histogram)
    assert torch.equal(qparams.scale, other.calculate_qparams().scale)


@pytest.mark.parametrize("dtype", ["qint4", "quint4", "qint2", "quint2", "qint1"])
def test_low_bits(dtype):
    observer = InterpolatingHistogramObserver(dtype=dtype)
    for batch in SEQUENCES["growing"]:
        observer(batch)
    low, high = observer.search_range()
    assert observer.min_val <= low < high <= observer.max_val
    assert high - low < observer.max_val - observer.min_val


def test_merge():
    batches = SEQUENCES["growing"]
    left, right = InterpolatingHistogramObserver(), InterpolatingHistogramObserver()
    left(batches[0])
    right(batches[4])
    left.merge(right)
    assert (left.min_val, left.max_val) == (min(b.min() for b in batches[::4]), max(b.max() for b in batches[::4]))
    assert float(left.histogram.sum()) == pytest.approx(8000)
    empty = InterpolatingHistogramObserver()
    empty.merge(right)
    assert torch.equal(empty.histogram, right.histogram)
    with pytest.raises(ValueError, match="2048 and 100 bins"):
        InterpolatingHistogramObserver(100).merge(left)
    with pytest.raises(TypeError, match="cannot merge a MinMaxObserver"):
        left.merge(MinMaxObserver())


@pytest.mark.parametrize("kind", [MinMaxObserver, HistogramObserver, InterpolatingHistogramObserver])
def test_both_ways_of_forgetting_leave_a_new_observer(kind):
    new = {name: buffer.clone() for name, buffer in kind().named_buffers()}
    for forget in (kind.reset_min_max_vals, lambda observer: observer.reset_where(torch.tensor(True))):
        observer = kind()
        observer(torch.tensor([-1.0, 2.0, torch.nan]))
        if kind is HistogramObserver:
            observer.add_shared(*observer.own_counts())
        elif kind is InterpolatingHistogramObserver:
            observer.mark_common()
        before = {name: buffer.clone() for name, buffer in observer.named_buffers()}
        assert all(not torch.equal(before[name], buffer) for name, buffer in new.items())
        observer.reset_where(torch.tensor(False))
        assert all(torch.equal(before[name], buffer) for name, buffer in observer.named_buffers())
        forget(observer)
        assert all(torch.equal(new[name], buffer) for name, buffer in observer.named_buffers())


def test_skips_what_is_not_finite():
    observer = InterpolatingHistogramObserver()
    observer(torch.tensor([torch.nan, torch.inf]))
    assert not observer.has_observed()
    assert observer.calculate_qparams().scale == 1
    observer(torch.tensor([1.0, 2.0, -torch.inf]))
    assert (observer.min_val, observer.max_val, observer.nonfinite_count) == (1, 2, 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"bins": 1}, "bins must be an int of at least 2, got 1"),
        ({"bins": 10.0}, "bins must be an int"),
        ({"interpolation": "linear"}, "unknown interpolation"),
        ({"qscheme": torch.per_channel_affine}, "kept per tensor"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        InterpolatingHistogramObserver(**arguments)


def test_the_mergeable_histogram_finds_a_like_range():
    """Different measures of the same data: within a few percent, away from outliers."""
    for name in ("growing", "uniform"):
        ours = HistogramObserver(dtype=torch.qint8, qscheme=torch.per_tensor_symmetric, search="l2")
        theirs = InterpolatingHistogramObserver(dtype=torch.qint8, qscheme=torch.per_tensor_symmetric)
        for batch in SEQUENCES[name]:
            ours(batch)
            theirs(batch)
        ratio = ours.calculate_qparams().scale / theirs.calculate_qparams().scale
        assert 0.75 < float(ratio) < 1.1


def test_upsample_rate():
    """Old bins are cut into as many slices as the argument says."""
    data = [torch.linspace(-1, 1, 500), torch.linspace(-1.7, 2.9, 500)]
    arguments = {"bins": 64, "dtype": "qint8", "interpolation": "megengine"}
    observers = {}
    for rate in (None, 128, 3):
        observers[rate] = InterpolatingHistogramObserver(**arguments, upsample_rate=rate)
        for x in data:
            observers[rate](x)
    assert torch.equal(observers[None].histogram, observers[128].histogram)
    assert not torch.equal(observers[None].histogram, observers[3].histogram)
    width = 2 / (64 * 3)
    size = float(observers[3].max_val - observers[3].min_val) / 64 / width
    assert size == pytest.approx(round(size)), "new bins are whole numbers of slices"
    with pytest.raises(ValueError, match="upsample_rate"):
        InterpolatingHistogramObserver(upsample_rate=0)
