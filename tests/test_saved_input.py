"""Inputs kept for the backward as 8-bit codes: only where they can be rebuilt exactly, and without looking where an
operator has just rounded them."""

import pytest
import torch

from quantizer_states import quantizer_state
from tritonq.functional import saved_input
from tritonq.functional.residual import residual_join
from tritonq.functional.saved_input import keep, mark, restore
from tritonq.grid import Grid
from tritonq.qparams import QINT8, QUINT8


def on_grid(qtype, dtype=torch.float32, seed=0):
    """Values on a grid, and the grid."""
    generator = torch.Generator().manual_seed(seed)
    scale, zero = torch.tensor([0.0173]), torch.tensor([3], dtype=torch.int32)
    codes = torch.randint(qtype.quant_min, qtype.quant_max + 1, (4, 6, 5, 7), generator=generator)
    return ((codes - zero) * scale).to(dtype), Grid(scale, zero, qtype)


def seen(qtype):
    """A quantizer whose qparams rest on data."""
    return quantizer_state(qtype)._replace(known=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("qtype", [QINT8, QUINT8])
@pytest.mark.parametrize("marked", [False, True])
def test_codes_rebuild_the_input_exactly(qtype, dtype, marked):
    x, grid = on_grid(qtype, dtype)
    if marked:
        mark(x, grid.scale, seen(qtype))
    kept = keep(x, grid)
    assert kept.values.dtype == torch.int8
    assert torch.equal(restore(kept), x)
    assert torch.equal(restore(kept, torch.empty_like(x, dtype=torch.float32)), x)


def test_an_input_off_the_grid_is_kept_itself():
    x, grid = on_grid(QINT8)
    x[0, 0, 0, 0] += 0.4 * grid.scale.item()
    assert keep(x, grid).values is x
    x[0, 0, 0, 0] = torch.nan
    assert keep(x.clone(), grid).scale is None


@pytest.fixture
def verified(monkeypatch):
    """How many times an input was compared with its codes."""
    calls = []
    is_exact = saved_input._is_exact
    monkeypatch.setattr(saved_input, "_is_exact", lambda *args: calls.append(1) or is_exact(*args))
    return calls


def test_a_marked_input_is_trusted(verified):
    x, grid = on_grid(QINT8)
    mark(x, grid.scale, seen(QINT8))
    keep(x, grid)
    assert not verified
    keep(x.clone(), grid)
    assert len(verified) == 1


def test_a_mark_does_not_outlive_the_values_or_the_scale(verified):
    x, grid = on_grid(QINT8)
    mark(x, grid.scale, seen(QINT8))
    x[0, 0, 0, 0] += 0.4 * grid.scale.item()
    assert keep(x, grid).values is x
    x, grid = on_grid(QINT8)
    mark(x, grid.scale, seen(QINT8))
    grid.scale.mul_(1.01)
    assert keep(x, grid).values is x
    x, grid = on_grid(QINT8)
    mark(x, grid.scale.clone(), seen(QINT8))
    keep(x, grid)
    assert len(verified) == 3


def test_a_quantizer_that_is_off_marks_nothing(verified):
    x, grid = on_grid(QINT8)
    state = seen(QINT8)
    mark(x, grid.scale, state._replace(active=torch.zeros(1, dtype=torch.uint8)))
    unobserved = state._replace(known=False, min_val=torch.tensor(torch.inf), max_val=torch.tensor(-torch.inf))
    mark(x, grid.scale, unobserved)
    keep(x, grid)
    assert len(verified) == 1


def test_a_residual_join_marks_its_result(verified):
    state = quantizer_state(QINT8)
    a, b = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    y = residual_join(a.requires_grad_(), b, state, None)
    kept = keep(y, Grid(state.scale, state.zero_point, QINT8))
    assert not verified
    assert torch.equal(restore(kept), y)
