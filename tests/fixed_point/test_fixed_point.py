"""Fixed-point rounding, its strict mask, and the choice of the number of fraction bits."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tolerances import FLOAT32, assert_close
from tritonq.fixed_point_fake_quantize import FixedPointFakeQuantize
from tritonq.functional.fixed_point import fixed_point_quantize, fixed_point_range, search_frac_len, statistic_frac_len
from tritonq.quantized_type import QINT8_NARROW
from tritonq.reference.fixed_point import frac_len_errors, power_of_two

FORMATS = [(8, True), (8, False), (2, True), (2, False), (5, True), (16, True), (16, False)]


def by_hand(value, frac_len, word_len, signed):
    """One number in Python's own arithmetic, whose round() goes to even."""
    low, high = (-(2 ** (word_len - 1)) + 1, 2 ** (word_len - 1) - 1) if signed else (0, 2**word_len - 1)
    nearest = math.copysign(2**40, value) if math.isinf(value) else round(value * 2**frac_len)
    code = min(max(nearest, low), high)
    return code / 2**frac_len, low < code < high


def interesting(word_len, signed, frac_len):
    """Ties, rails, one step beyond them, subnormals, infinities."""
    low, high = fixed_point_range(word_len, signed)
    codes = {low, high, low - 1, high + 1, low + 1, high - 1, -1, 0, 1, 2, 3}
    halves = {code + half for code in codes for half in (-0.5, 0.0, 0.5)}
    values = [half / 2**frac_len for half in sorted(halves)]
    return [*values, 1e-45, -1e-45, 1e30, -1e30, math.inf, -math.inf]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("word_len", "signed"), FORMATS)
def test_values_and_strict_mask(word_len, signed, dtype):
    for frac_len in {0, 1, (word_len - signed) // 2, word_len - signed}:
        numbers = interesting(word_len, signed, frac_len)
        x = torch.tensor(numbers, dtype=dtype, requires_grad=True)
        y = fixed_point_quantize(x, frac_len, word_len, signed)
        y.backward(torch.full_like(y, 3.0))
        expected = [by_hand(float(value), frac_len, word_len, signed) for value in x.tolist()]
        assert y.tolist() == [value for value, _ in expected]
        assert x.grad.tolist() == [3.0 * inside for _, inside in expected]


def test_whole_numbers_may_be_floats():
    """F8Net holds fractional lengths in float tensors."""
    x = torch.tensor([[0.3, -1.0], [0.3, -1.0]])
    floats, integers = (
        fixed_point_quantize(x, torch.tensor([3, 1], dtype=d), axis=0) for d in (torch.float32, torch.int32)
    )
    assert torch.equal(floats, integers)


def test_nan_stays_with_zero_gradient():
    x = torch.tensor([math.nan, 0.5], requires_grad=True)
    y = fixed_point_quantize(x, 3)
    y.sum().backward()
    assert y.isnan().tolist() == [True, False]
    assert x.grad.tolist() == [0.0, 1.0]


def test_per_channel_equals_one_channel_at_a_time():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 4, 5, generator=generator) * 20
    lengths = torch.tensor([0, 3, 7, 5])
    y = fixed_point_quantize(x, lengths, axis=1)
    for channel, frac_len in enumerate(lengths.tolist()):
        assert torch.equal(y[:, channel], fixed_point_quantize(x[:, channel], frac_len))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_rounds_once(dtype):
    x = (torch.randn(257, generator=torch.Generator().manual_seed(1)) * 4).to(dtype)
    assert torch.equal(fixed_point_quantize(x, 4), fixed_point_quantize(x.float(), 4).to(dtype))


def test_powers_of_two_are_exact():
    exponents = torch.arange(-126, 128)
    for dtype in (torch.float32, torch.float64):
        assert power_of_two(exponents, dtype).tolist() == [2.0**k for k in exponents.tolist()]


def brute_force(x, word_len, signed):
    """F8Net's own way: one full pass per candidate, the first least error wins."""
    errors = []
    for frac_len in range(word_len + 1 - signed):
        rounded = fixed_point_quantize(x.double(), frac_len, word_len, signed)
        errors.append(math.fsum(((x.double() - rounded) ** 2).flatten().tolist()))
    return errors.index(min(errors))


@pytest.mark.parametrize(("word_len", "signed"), FORMATS)
@pytest.mark.parametrize("spread", [0.01, 0.3, 1.0, 7.0, 300.0])
def test_search_against_brute_force(word_len, signed, spread):
    x = torch.randn(1001, generator=torch.Generator().manual_seed(2), dtype=torch.float64) * spread
    assert int(search_frac_len(x, word_len, signed)) == brute_force(x, word_len, signed)
    assert int(search_frac_len(x.float(), word_len, signed)) == brute_force(x.float(), word_len, signed)


def test_ties_go_to_the_smaller():
    # All on the grid of two fraction bits, and so on every finer one.
    assert int(search_frac_len(torch.tensor([0.25, -1.5, 8.75]))) == 2
    assert int(search_frac_len(torch.zeros(5))) == 0
    assert int(search_frac_len(torch.empty(0))) == 0
    # 127.5 errs by .5 with no fraction bit (ties to 128, clamped to 127); and finer formats saturate.
    assert int(search_frac_len(torch.tensor([127.5]))) == 0
    # An error of 1/2 in one element at 0 bits, of 1/2 in another one (saturated) at 1 bit: equal sums.
    assert int(search_frac_len(torch.tensor([0.5, 64.0]))) == 0


@given(
    st.lists(st.floats(-300, 300, width=32, allow_subnormal=False), min_size=1, max_size=40),
    st.sampled_from(FORMATS),
)
@settings(max_examples=60, deadline=None)
def test_search_on_any_numbers(numbers, kind):
    x = torch.tensor(numbers, dtype=torch.float64)
    assert int(search_frac_len(x, *kind)) == brute_force(x, *kind)


def test_search_per_channel_and_across_blocks():
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(5, 33_000, generator=generator) * torch.tensor([0.1, 1.0, 5.0, 40.0, 200.0])[:, None]
    found = search_frac_len(x, axis=0)
    assert found.dtype == torch.int32
    assert torch.equal(found, search_frac_len(x.T, axis=1))
    errors = frac_len_errors(x, QINT8_NARROW.with_axis(0), 8)
    naive = torch.stack([(x - fixed_point_quantize(x, k)).double().square().sum(1) for k in range(8)])
    assert_close(errors, naive, FLOAT32, size=0)
    assert found.tolist() == naive.argmin(0).tolist()


def test_search_leaves_out_what_is_not_finite():
    x = torch.randn(500, generator=torch.Generator().manual_seed(4))
    dirty = torch.cat([x, torch.tensor([math.nan, math.inf, -math.inf])])
    assert torch.equal(search_frac_len(dirty), search_frac_len(x))


def test_search_does_not_depend_on_threads():
    x = torch.randn(200_001, generator=torch.Generator().manual_seed(5))
    threads = torch.get_num_threads()
    sums = []
    for count in (1, 2):
        torch.set_num_threads(count)
        sums.append(frac_len_errors(x, QINT8_NARROW, 8))
    torch.set_num_threads(threads)
    assert torch.equal(*sums)


@pytest.mark.parametrize("statistic", ["std", "mean_abs", "rms"])
@pytest.mark.parametrize("signed", [True, False])
def test_statistics(statistic, signed):
    numerator = {"std": (40, 70), "mean_abs": (30, 30), "rms": (40, 50)}[statistic][0 if signed else 1]
    for spread in (0.05, 0.7, 3.0, 50.0):
        x = torch.rand(64, generator=torch.Generator().manual_seed(6), dtype=torch.float64) * spread
        values = x.tolist()
        mean = sum(values) / 64
        metric = {
            "std": math.sqrt(sum((v - mean) ** 2 for v in values) / 63),
            "mean_abs": mean,
            "rms": math.sqrt(sum(v * v for v in values) / 64),
        }[statistic]
        expected = min(max(math.floor(math.log2(numerator / metric)), 0), 8 - signed)
        assert int(statistic_frac_len(x, signed=signed, statistic=statistic)) == expected


def test_statistic_at_an_exact_power_of_two_and_of_zeros():
    assert int(statistic_frac_len(torch.full((4,), 15.0), statistic="mean_abs")) == 1  # log2(30 / 15) = 1
    assert int(statistic_frac_len(torch.full((4,), 15.0000001, dtype=torch.float64), statistic="mean_abs")) == 0
    assert int(statistic_frac_len(torch.zeros(4))) == 7
    per_channel = statistic_frac_len(torch.tensor([[15.0, 15.0], [0.0, 0.0]]), statistic="mean_abs", axis=0)
    assert per_channel.tolist() == [1, 7]


@pytest.mark.parametrize("statistic", ["std", "mean_abs", "rms"])
def test_statistics_leave_out_what_is_not_finite(statistic):
    """As the search does: a batch with an infinity, as mixed precision meets it, must not move the length."""
    finite = torch.tensor([[0.3, -1.0, 2.5], [4.0, -9.0, 7.0]])
    others = torch.tensor([[math.inf, math.nan], [-math.inf, math.inf]])
    x = torch.cat((others, finite), dim=1)
    for axis in (None, 0):
        found = statistic_frac_len(x, statistic=statistic, axis=axis)
        assert found.tolist() == statistic_frac_len(finite, statistic=statistic, axis=axis).tolist()
    assert int(statistic_frac_len(others, statistic=statistic)) == 7


def test_one_value_has_no_deviation():
    """Its magnitude stands for it, without a warning; a weight of one in channel per channel is such a tensor."""
    weight = torch.tensor([[1.0], [-0.25], [0.0], [20.0]])
    found = statistic_frac_len(weight, statistic="std", axis=0)
    assert found.tolist() == statistic_frac_len(weight, statistic="rms", axis=0).tolist() == [5, 7, 7, 1]
    assert int(statistic_frac_len(torch.tensor([]))) == 7


X = torch.ones(2, 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"frac_len": 8}, "0..7"),
        ({"frac_len": -1}, "0..7"),
        ({"frac_len": 9, "signed": False}, "0..8"),
        ({"frac_len": True}, "whole number"),
        ({"frac_len": torch.tensor([1.5])}, "whole numbers"),
        ({"frac_len": torch.tensor([True])}, "whole numbers"),
        ({"frac_len": torch.tensor([8])}, "0..7"),
        ({"frac_len": torch.tensor([1, 2])}, "shape"),
        ({"frac_len": torch.tensor([1, 2]), "axis": 1}, "shape"),
        ({"frac_len": 1, "axis": 2}, "axis"),
        ({"frac_len": 1, "word_len": 1}, "2..16"),
        ({"frac_len": 1, "word_len": 17}, "2..16"),
        ({"frac_len": 1, "word_len": 8.0}, "2..16"),
    ],
)
def test_bad_input_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        fixed_point_quantize(X, **arguments)


def test_bad_input_of_the_choice_is_refused():
    with pytest.raises(ValueError, match=r"2\.\.16"):
        search_frac_len(X, 17)
    with pytest.raises(ValueError, match="axis"):
        search_frac_len(X, axis=2)
    with pytest.raises(ValueError, match="unknown statistic"):
        statistic_frac_len(X, statistic="median")
    with pytest.raises(TypeError, match="float"):
        search_frac_len(torch.ones(3, dtype=torch.int32))


@pytest.mark.parametrize("choice", ["search", "rms"])
@pytest.mark.parametrize("axis", [None, 1])
def test_batches_without_a_finite_value_are_skipped(choice, axis):
    quantizer = FixedPointFakeQuantize(axis=axis, choice=choice, num_channels=3)
    for x in (torch.zeros(0, 3), torch.full((4, 3), math.nan)):
        for _ in range(20):
            quantizer(x)
        assert set(quantizer.frac_len.tolist()) == {7.0}
        assert quantizer.observed.tolist() == [0]
    x = torch.full((4, 3), 30.0)
    quantizer(x)
    assert quantizer.observed.tolist() == [1]
    before = quantizer.frac_len.clone()
    assert set(before.tolist()) != {7.0}
    x[:, 1] = math.nan
    quantizer(x)
    assert (quantizer.frac_len < before).tolist() == ([True] if axis is None else [True, False, True])
    assert torch.equal(quantizer.eval()(x)[:, 0], x[:, 0].clamp(max=127 * float(quantizer.scale[0])))


def test_the_length_comes_to_the_same_buffers():
    """DDP lists a model's buffers once."""
    quantizer = FixedPointFakeQuantize(axis=1)
    held = dict(quantizer.named_buffers())
    quantizer(torch.ones(2, 3))
    assert quantizer.frac_len.numel() == 3
    loaded = FixedPointFakeQuantize(axis=1)
    other = dict(loaded.named_buffers())
    loaded.load_state_dict(quantizer.state_dict())
    for made, before in ((quantizer, held), (loaded, other)):
        assert all(buffer is before[name] for name, buffer in made.named_buffers())
