"""Every kernel under triton-viz's sanitizer: no access outside its tensors, on a machine without a GPU.

The sanitizer takes a tensor's bytes to be contiguous from its first one, so it would call a slice's own elements
foreign: dense tensors only. The addresses within slices are compared one by one in `test_layout.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest
import torch

from grids import grid_of
from tritonq.grid import Grid, RangeStatistics

pytestmark = pytest.mark.sanitizer


@pytest.fixture(scope="module")
def trace() -> Callable[[Any], Any]:
    """Wraps a kernel so that an access out of bounds ends in SystemExit."""
    from sanitizer_library import import_triton_viz

    triton_viz = import_triton_viz()
    from triton_viz.clients import Sanitizer

    return lambda kernel: triton_viz.trace(Sanitizer(abort_on_error=True))(kernel.function)


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Several programs and partial tiles on small tensors."""
    from op_tester import clear_plans
    from tritonq.kernels import launch, reduction

    monkeypatch.setattr(reduction, "_MIN_ELEMENTS_PER_PROGRAM", 50)
    clear_plans()
    with launch.override(launch.EVERY_KERNEL, launch.Parameters(64, 32, 4)):
        yield
    clear_plans()


def traced(trace: Callable[[Any], Any], module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put every kernel of ``module`` under the sanitizer."""
    names = [name for name in vars(module) if name.endswith("_kernel")]
    assert names
    for name in names:
        monkeypatch.setattr(module, name, trace(getattr(module, name)))


INPUTS = {
    "odd": torch.randn(3, 5, 7),
    "channels_last": torch.randn(2, 5, 3, 3).to(memory_format=torch.channels_last),
    "one": torch.randn(1),
    "rows": torch.randn(67, 3),
}


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("name", INPUTS)
@pytest.mark.parametrize("axis", [None, 0, 1, 2])
def test_fake_quant(name: str, axis: int | None, trace: Callable[[Any], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    from tritonq.kernels import fake_quant

    traced(trace, fake_quant, monkeypatch)
    x = INPUTS[name]
    if axis is not None and axis >= x.dim():
        return
    channels = 1 if axis is None else x.shape[axis]
    qparams = (torch.ones(channels), torch.ones(channels, dtype=torch.int32))
    grid = grid_of(*qparams, -8, 7, axis, enabled=torch.ones(1, dtype=torch.uint8))
    fake_quant.fake_quantize(x, grid)
    fake_quant.fake_quantize_with_mask(x, grid)
    fake_quant.quantize(x, grid_of(*qparams, -8, 7, axis, "half_away"))
    fake_quant.fake_quantize_backward(x, x, grid)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("name", INPUTS)
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_float_blocks(name: str, axis: int, trace: Callable[[Any], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    from tritonq.formats import BLOCK_FORMATS
    from tritonq.kernels import fake_quant, float_blocks
    from tritonq.qparams import QuantizedType

    traced(trace, float_blocks, monkeypatch)
    traced(trace, fake_quant, monkeypatch)
    x = INPUTS[name]
    if axis >= x.dim():
        return
    float_blocks.fake_quantize_blocks(x, BLOCK_FORMATS["mxfp8"], axis)
    float_blocks.fake_quantize_blocks(x, BLOCK_FORMATS["nvfp4"], axis, torch.ones(()))
    grid = Grid(torch.ones(x.shape[axis]), None, QuantizedType.of_floats("e4m3", axis))
    fake_quant.fake_quantize_with_mask(x, grid)
    fake_quant.fake_quantize_backward(x, x, grid)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("name", INPUTS)
@pytest.mark.parametrize("axis", [None, 0, 1, 2])
@pytest.mark.parametrize("rule", ["torch", "torch_v1"])
def test_min_max(
    name: str, axis: int | None, rule: str, trace: Callable[[Any], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from tritonq.kernels import min_max
    from tritonq.qparams import QUINT8

    traced(trace, min_max, monkeypatch)
    x = INPUTS[name]
    if axis is not None and axis >= x.dim():
        return
    channels = () if axis is None else (x.shape[axis],)
    state = (torch.zeros(channels), torch.zeros(channels), torch.zeros((), dtype=torch.int64))
    qparams = (torch.zeros(channels), torch.zeros(channels, dtype=torch.int32))
    enabled = torch.ones(1, dtype=torch.uint8)
    qtype = QUINT8.with_axis(axis)
    statistics = RangeStatistics(*state, qtype.granularity, enabled, averaging_constant=0.1, rule=rule, eps=1e-7)
    min_max.observe(x, statistics, Grid(*qparams, qtype))


def _claims_one_column_more(view: Any) -> Any:
    outer, rows, cols = view.sizes
    return view._replace(sizes=(outer, rows, cols + 1))


@pytest.mark.usefixtures("small_tiles")
def test_finds_a_planted_access_out_of_bounds(trace: Callable[[Any], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """A view that claims one column too many must be caught, or the tests above prove nothing."""
    from tritonq.kernels import fake_quant, min_max, reduction

    traced(trace, fake_quant, monkeypatch)
    traced(trace, min_max, monkeypatch)
    x = torch.randn(65)
    fake_quant.fake_quantize(x, grid_of(torch.ones(1), None, -8, 7))
    min_max.min_max(x)

    honest, view = fake_quant.common_view, reduction.view
    monkeypatch.setattr(reduction, "view", lambda *arguments: _claims_one_column_more(view(*arguments)))
    with pytest.raises(SystemExit):
        min_max.min_max(x)

    def dishonest(*arguments: Any) -> Any:
        inputs, seen = honest(*arguments)
        return inputs, _claims_one_column_more(seen)

    monkeypatch.setattr(fake_quant, "common_view", dishonest)
    with pytest.raises(SystemExit):
        fake_quant.fake_quantize(x, grid_of(torch.ones(1), None, -8, 7))
