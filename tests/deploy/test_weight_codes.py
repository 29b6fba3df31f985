"""Codes of a weight's rows."""

import pytest
import torch

from tritonq.deploy.weight_codes import codes_of_rows
from tritonq.grid import Grid
from tritonq.quantized_type import QuantizedType


def test_the_first_axis_may_be_counted_from_the_end():
    rows, scale = torch.randn(2, 3, generator=torch.Generator().manual_seed(0)), torch.tensor([0.1, 0.2])
    expected = codes_of_rows(rows, Grid(scale, None, QuantizedType(-8, 7, axis=0)))
    found = codes_of_rows(rows, Grid(scale, None, QuantizedType(-8, 7, axis=-2)))
    assert all(map(torch.equal, found, expected))
    with pytest.raises(ValueError, match="per index of axis -1, not per row"):
        codes_of_rows(rows, Grid(torch.ones(3), None, QuantizedType(-8, 7, axis=-1)))
