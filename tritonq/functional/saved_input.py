"""Keeping an operator's input for its backward: as 8-bit codes if it lies on a known grid."""

from __future__ import annotations

from typing import NamedTuple, cast

import torch
from torch import Tensor

from tritonq.functional.dispatch import implementation
from tritonq.functional.marks import codes_of, is_rounded, mark_codes, mark_rounded
from tritonq.grid import Grid, RangeStatistics
from tritonq.qparams import is_readable
from tritonq.reference.input_codes import InputCodes
from tritonq.reference.ranges import settled

_MAX_BITS = 8


class SavedInput(NamedTuple):
    """A tensor, or its codes as int8: the tensor is then ``(values - shift) · scale``.

    Attributes:
        values: the tensor itself, not copied; or its codes, int8, in its shape.
        scale: float32, one element, a copy of the grid's; None if ``values`` is the tensor.
        shift: one element, int32 or float32: the zero point minus the middle of the code range, so that codes fit into
            int8. None: 0, or ``values`` is the tensor.
        dtype: of the tensor, also where ``values`` are codes.
    """

    values: Tensor
    scale: Tensor | None
    shift: Tensor | None
    dtype: torch.dtype

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """The tensors to save for the backward, ``(values, scale, shift)``; the last two may be None."""
        return self.values, self.scale, self.shift


def save_input(x: Tensor, grid: Grid | None) -> SavedInput:
    """Return a :class:`SavedInput` of codes of ``x`` on ``grid``; of ``x`` itself, if codes can't give it back exactly.

    A tensor that a quantizer has just rounded is known to lie on its grid (:func:`mark_on_grid`). Any other tensor,
    such as one that a hook changed, is compared with its codes on a CPU; on other devices the comparison would wait, so
    the tensor itself is kept. Operators that read the same tensor share one :class:`SavedInput` of codes.

    Args:
        x: float tensor; one of float64 or of inference mode is kept itself.
        grid: of the quantizer that rounded ``x``, which must be on. None, one with several scales, with float codes or
            of more than 8 bits: ``x`` is kept.
    """
    # In torch.inference_mode there is no backward, and tensors don't count their versions.
    if grid is None or not _is_compact(grid) or x.dtype == torch.float64 or x.is_inference():
        return SavedInput(x, None, None, x.dtype)
    shared = codes_of(x, grid.scale)
    if shared is not None:
        return cast(SavedInput, shared)
    marked = is_rounded(x, grid.scale)
    if not marked and not is_readable(x):
        return SavedInput(x, None, None, x.dtype)
    codes: InputCodes | None = implementation("input_codes", x).encode(x, grid, marked)
    if codes is None:
        return SavedInput(x, None, None, x.dtype)
    saved = SavedInput(*codes, x.dtype)
    mark_codes(x, grid.scale, saved)
    return saved


def _is_compact(grid: Grid) -> bool:
    """Whether the grid has integer codes of at most 8 bits, and one scale."""
    qtype = grid.qtype
    return qtype.bits <= _MAX_BITS and qtype.axis is None and qtype.float_format is None


def mark_on_grid(y: Tensor, scale: Tensor, grid: Grid, statistics: RangeStatistics | None = None) -> None:
    """Note on ``y`` that its values were rounded to the grid of the quantizer with this ``scale``, if it was active.

    A quantizer is active while its switch is on and it has observed something. If that can't be read without waiting
    for a device, the note is made all the same: :func:`save_input` is given a grid only while its quantizer is active.
    While ``torch.compile`` traces, and if ``y`` or ``scale`` is of inference mode, nothing is noted.

    Args:
        y: the operator's result.
        scale: the quantizer's buffer itself, which stands for the quantizer in the note.
        grid: of the quantizer, or the copy of it that rounded ``y``.
        statistics: the running range of the grid, which says whether something was observed; None: the switch of
            ``grid`` says that too, as a snapshot's does.
    """
    if torch.compiler.is_compiling() or y.is_inference() or scale.is_inference():
        return
    if not is_readable(y) or settled(grid, statistics).enabled_flag() is True:
        mark_rounded(y, scale)


def load_input(saved: SavedInput, out: Tensor | None = None) -> Tensor:
    """Return the tensor that was given to :func:`save_input`: ``(values - shift) · scale`` in ``saved.dtype``.

    If the tensor itself was saved (``scale`` is None), that is ``values``. ``out`` is float32 memory in the shape of
    ``values``, which may be overwritten, and may be returned if the dtype is float32; None: new memory.
    """
    if saved.scale is None:
        return saved.values
    codes = InputCodes(saved.values, saved.scale, saved.shift)
    values: Tensor = implementation("input_codes", saved.values).decode(codes, saved.dtype, out)
    return values
