"""The bounds between which a gradient passes are the tightest ones."""

import pytest
import torch

from tritonq.arithmetic import round_half_away
from tritonq.reference.open_bounds import open_bounds, open_bounds_of_codes

INFINITY = torch.tensor(torch.inf)


def code(x, scale, rounding):
    # torch takes the float32 reciprocal for float64 values too.
    return (
        (x * scale.float().reciprocal().to(scale.dtype)).round()
        if rounding == "half_even"
        else round_half_away(x / scale)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rounding", ["half_even", "half_away"])
@pytest.mark.parametrize(("lowest", "highest"), [(-128, 127), (0, 255), (-7, 8), (-1, 1), (3, 9)])
def test_bounds_are_the_first_values_outside(lowest, highest, rounding, dtype):
    torch.manual_seed(0)
    scales = torch.cat((torch.rand(200) * 10.0 ** torch.randint(-6, 6, (200,)), torch.tensor([0.5, 0.1, 1e-38, 1e30])))
    for scale in scales:
        low, high = open_bounds(float(scale), lowest, highest, rounding, dtype)
        for bound, limit, inwards in ((low, lowest, INFINITY), (high, highest, -INFINITY)):
            outside = torch.tensor(bound, dtype=dtype)
            inside = torch.nextafter(outside, inwards.to(dtype))
            beyond = code(outside, scale.to(dtype), rounding)
            assert (beyond < limit) if limit == lowest else (beyond > limit)
            assert code(inside, scale.to(dtype), rounding) == limit


@pytest.mark.parametrize("limits", [(-128, 127), (0, 255), (-(2**23), 2**23), (-(2**25), 2**25)])
def test_bounds_of_whole_numbers(limits):
    low, high = open_bounds_of_codes(*limits, torch.float32)
    whole = torch.tensor([limits[0] - 8.0, limits[0], 0.0, limits[1], limits[1] + 8.0])
    assert ((whole > low) & (whole < high)).tolist() == [False, True, True, True, False]
