"""How kernels see tensors: plain arithmetic, checked for sizes that no memory holds."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from op_tester import LAYOUTS, axes, strided_tensors

pytest.importorskip("triton")

from tritonq.kernels import reduction
from tritonq.kernels.layout import Split, View, launch_grid, split, tile_counts, tile_shape, view


def seen(x: Tensor, axis: int | None = None) -> View | None:
    return view(x.shape, (x.stride(), torch.empty_like(x).stride()), axis)


def meta(*shape: int, channels_last: bool = False) -> Tensor:
    x = torch.empty(shape, device="meta")
    if not channels_last:
        return x
    return x.to(memory_format=torch.channels_last if len(shape) == 4 else torch.channels_last_3d)


@pytest.mark.parametrize(
    ("x", "axis", "sizes", "channel"),
    [
        (meta(2, 3, 4, 5), None, (1, 1, 120), None),
        (meta(2, 3, 4, 5), 0, (1, 2, 60), 1),
        (meta(2, 3, 4, 5), 1, (2, 3, 20), 1),
        (meta(2, 3, 4, 5), -1, (1, 24, 5), 2),
        (meta(2, 3, 4, 5, channels_last=True), None, (1, 1, 120), None),
        (meta(2, 3, 4, 5, channels_last=True), 0, (1, 2, 60), 1),
        (meta(2, 3, 4, 5, channels_last=True), 1, (1, 40, 3), 2),
        (meta(2, 3, 4, 5, 6, channels_last=True), 1, (1, 240, 3), 2),
        (meta(2, 1, 4, 5), 1, (1, 1, 40), None),
        (meta(7), 0, (1, 1, 7), 2),
        (meta(), None, (1, 1, 1), None),
        (meta(1, 1), 0, (1, 1, 1), None),
        (meta(6, 8).t(), None, (1, 1, 48), None),
        (meta(6, 8).t(), 0, (1, 6, 8), 2),
        (meta(6, 8)[:, 1:], None, (1, 6, 7), None),
        (meta(6, 8)[::2], 1, (1, 3, 8), 2),
        (meta(5, 1).expand(5, 30), None, (1, 5, 30), None),
        (meta(4, 6, 10)[::2, :, 1:], 0, (2, 6, 9), 0),
    ],
)
def test_dimensions_fold(x: Tensor, axis: int | None, sizes: tuple[int, int, int], channel: int | None) -> None:
    found = seen(x, axis)
    assert found is not None
    assert (found.sizes, found.channel) == (sizes, channel)


def test_dense_formats_share_one_view() -> None:
    flat = seen(meta(2, 3, 4, 5))
    assert flat == seen(meta(2, 3, 4, 5, channels_last=True))
    assert flat == seen(meta(5, 4, 3, 2).permute(3, 1, 0, 2))


def test_none_where_strides_allow_no_view() -> None:
    assert seen(torch.empty(4, 6, 8, 10)[::2, ::2, ::2, ::2]) is None


def check_covers(x: Tensor, axis: int | None) -> None:
    """The view's offsets are the tensor's own, each once, and the channel index is the axis index."""
    found = seen(x, axis)
    if found is None:
        return
    offsets = sorted(
        (sum(i * s for i, s in zip(index, x.stride(), strict=True)), index[axis] if axis is not None else 0)
        for index in itertools.product(*map(range, x.shape))
    )
    through_view = sorted(
        (
            sum(i * s for i, s in zip(index, found.strides[0], strict=True)),
            0 if found.channel is None else index[found.channel],
        )
        for index in itertools.product(*map(range, found.sizes))
    )
    assert through_view == offsets


@pytest.mark.parametrize("layout", LAYOUTS)
def test_view_addresses_every_element(layout: str) -> None:
    x = LAYOUTS[layout]()
    for axis in axes(x):
        check_covers(x, axis)


@given(x=strided_tensors(), data=st.data())
def test_view_addresses_every_element_of_anything(x: Tensor, data: st.DataObject) -> None:
    check_covers(x, data.draw(st.sampled_from(axes(x))))


@pytest.mark.parametrize(
    ("x", "wide"),
    [
        (meta(2**30), False),
        (meta(2**31), True),
        (meta(2**16, 2**15), True),
        (meta(2**16, 2**14), False),
        (meta(2, 2**31)[:, :4], True),
        (meta(1).expand(2**31 - 1), True),
    ],
)
def test_offsets_become_wide(x: Tensor, wide: bool) -> None:
    found = view(x.shape, (x.stride(),), None)
    assert found is not None
    assert found.wide is wide


def test_shares_that_end_beyond_32_bits_are_wide(monkeypatch: pytest.MonkeyPatch) -> None:
    """A program computes where its share ends before it looks where the tensor does."""
    programs, tile = 4000, 1024
    monkeypatch.setattr(reduction, "programs_that_fill", lambda device: programs)
    # One tile more than shares of 524 tiles hold: all have 525.
    size = 524 * programs * tile + 1
    found = view((size,), ((1,),), None)
    assert found is not None
    assert not found.wide
    shares = reduction.planned_reduction(torch.bfloat16, found, torch.device("cpu"), 32)
    assert shares.share == (1, 1, 525 * tile)
    assert shares.grid.programs[0] * 525 * tile > size
    assert shares.view.wide


sizes_of_views = st.tuples(st.integers(1, 2**20), st.integers(1, 2**34), st.integers(1, 2**34)).filter(
    lambda sizes: sizes[0] * sizes[1] * sizes[2] < 2**40
)


@given(sizes=sizes_of_views, max_cols=st.sampled_from([128, 4096]))
def test_tiles_and_grids(sizes: tuple[int, int, int], max_cols: int) -> None:
    rows, cols = tile_shape(sizes, 4096, max_cols)
    assert rows & (rows - 1) == cols & (cols - 1) == 0
    assert 1 <= rows * cols <= 4096
    assert cols <= max_cols
    programs = tile_counts(sizes, rows, cols)
    assert programs[1] * rows >= sizes[1] > (programs[1] - 1) * rows
    assert programs[2] * cols >= sizes[2] > (programs[2] - 1) * cols
    placed = launch_grid(programs)
    assert sorted(placed.programs) == sorted(programs)
    assert placed.programs[0] < 2**31
    assert max(placed.programs[1:]) <= 65535
    # What kernels derive from `first` (tritonq.kernels.tile.program_along) is where the numbers are.
    along = {placed.first: 0}
    along |= {d: 2 - placed.first if d == 2 else 2 - d for d in range(3) if d != placed.first}
    assert tuple(placed.programs[along[d]] for d in range(3)) == programs


def test_tiles_waste_little() -> None:
    """56 * 56 columns are no multiple of a wide tile, 7 * 7 fit in one, 147 take narrow ones."""
    assert tile_shape((64, 64, 3136), 4096, 4096) == (8, 512)
    assert tile_shape((256, 2048, 49), 4096, 4096) == (64, 64)
    assert tile_shape((1, 64, 147), 4096, 4096) == (64, 32)
    assert tile_shape((1, 1, 2**28), 4096, 4096) == (1, 4096)
    assert tile_shape((1, 2**20, 64), 4096, 128) == (64, 64)


def test_grid_too_large() -> None:
    with pytest.raises(ValueError, match="65535"):
        launch_grid((70000, 70000, 70000))


@given(sizes=sizes_of_views, channel=st.sampled_from([None, 0, 1, 2]), target=st.integers(1, 2000))
def test_shares_of_a_reduction(sizes: tuple[int, int, int], channel: int | None, target: int) -> None:
    rows, cols = tile_shape(sizes, 1024, 128 if channel == 2 else 1024)
    tile = (1, rows, cols)
    found: Split = split(sizes, channel, tile, target, 8192)
    for d in range(3):
        assert found.share[d] % tile[d] == 0
        assert found.programs[d] * found.share[d] >= sizes[d] > (found.programs[d] - 1) * found.share[d]
        assert d != channel or found.share[d] == tile[d]
    kept = 1 if channel is None else found.programs[channel]
    assert found.programs[0] * found.programs[1] * found.programs[2] <= max(target, kept)


def test_small_reductions_stay_in_one_program() -> None:
    assert split((1, 1, 8000), None, (1, 1, 1024), 528, 8192).programs == (1, 1, 1)
    assert split((1, 512, 4608), 1, (1, 1, 1024), 528, 8192).programs == (1, 512, 1)
    assert split((1, 3, 0), 1, (1, 4, 1), 528, 8192).programs == (1, 1, 1)


@pytest.mark.parametrize("shape", [(0, 0, 0, 0), (2, 0, 3, 4), (0, 3)])
def test_empty_tensors_fold_whatever_their_strides(shape: tuple[int, ...]) -> None:
    x = torch.empty_strided(shape, (1,) * len(shape))
    for axis in (None, 1):
        found = view(x.shape, (x.stride(),), axis)
        assert found is not None
        assert 0 in found.sizes


@pytest.mark.parametrize(
    ("shape", "channels_last", "alignment"),
    [
        ((2, 64, 56, 56), False, 1),  # multiples of 16, which the compiler knows of
        ((2, 256, 14, 14), False, 4),
        ((2, 24, 5, 5), True, 8),
        ((2, 3, 7, 7), False, 1),
        ((2, 6, 3, 3), True, 2),
        ((0, 4, 14, 14), False, 4),
    ],
)
def test_alignment_of_rows(shape: tuple[int, ...], channels_last: bool, alignment: int) -> None:
    found = seen(meta(*shape, channels_last=channels_last), 1)
    assert found is not None
    assert found.alignment == alignment


@pytest.mark.parametrize(
    ("x", "width", "skew", "pieces"),
    [
        (meta(2, 512, 7, 7), 64, 8, (2, 3136, 8)),
        (meta(1, 512, 7, 7), 64, 8, (1, 3136, 8)),
        (meta(2, 4, 7, 7), 64, 4, (2, 49, 4)),  # planes of 196 elements
        (meta(2, 512, 7, 7), 32, 1, (2, 3136, 8)),  # more than one tile to a row
        (meta(2, 8, 5, 3), 16, 1, (2, 15, 8)),  # a row and the elements before it fill more than a tile
        (meta(2, 8, 5), 8, 4, (2, 10, 4)),  # pieces of 8 would have elements of three channels
        (meta(2, 8, 6), 8, 1, (2, 12, 4)),
        (meta(2, 3, 7, 7), 64, 1, None),  # planes begin anywhere
        (meta(2, 512, 14, 14), 256, 1, None),  # rows begin at multiples of 4
        (meta(2, 8, 49, channels_last=False)[:, ::2], 64, 1, None),
        (meta(2, 16, 49)[:, :8], 64, 1, None),
        (meta(2, 512, 7, 7, channels_last=True), 64, 1, None),
    ],
)
def test_rows_that_begin_anywhere(x: Tensor, width: int, skew: int, pieces: tuple[int, int, int] | None) -> None:
    found = view(x.shape, (x.stride(),), 1)
    assert found is not None
    assert found.skew(width) == skew
    cut, run = found.pieces()
    if pieces is None:
        assert (cut, run) == (found, None)
        return
    assert (cut.sizes, run) == (pieces, found.sizes[2])
    assert cut.alignment == pieces[2]
    # Element i of a plane is at i, and no piece has elements of three channels.
    assert cut.strides == ((pieces[1] * pieces[2], pieces[2], 1),) or found.sizes[0] == 1
    assert pieces[2] <= found.sizes[2] + 1


def test_rows_that_end_elsewhere_have_no_alignment() -> None:
    """Kernels round the length of a row down to its alignment: all of it must be a multiple."""
    x = meta(2, 8, 24)[:, :, :13]
    found = view(x.shape, (x.stride(),), 1)
    assert found is not None
    assert found.sizes == (2, 8, 13)
    assert found.alignment == 1


def test_elements_with_gaps_between_have_no_alignment() -> None:
    found = seen(meta(2, 8, 14, 28)[:, :, 0, ::2], 1)
    assert found is not None
    assert found.alignment == 1
