"""Marks on tensors: notes that one operator leaves on a tensor for the operators that read it later.

A mark is an attribute of the Python object. Views, copies and pickles have none. Each mark holds the version of its
tensor, and counts only while nothing has changed that in place; that of :func:`mark_rounded` also ends when the scale
is changed. A quantizer is known by its ``scale`` buffer.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

_ROUNDED = "_tritonq_grid"
_CODES = "_tritonq_saved_codes"
_SOURCE = "_tritonq_source"


def mark_rounded(y: Tensor, scale: Tensor) -> None:
    """Note on ``y`` that its values were just rounded to the grid of the quantizer with this ``scale`` buffer.

    Neither may be a tensor of inference mode, which gives RuntimeError.
    """
    setattr(y, _ROUNDED, (scale, scale._version, y._version))


def is_rounded(x: Tensor, scale: Tensor) -> bool:
    """Whether :func:`mark_rounded` noted this ``scale`` on ``x``, and neither of the two has changed since."""
    marked, *versions = getattr(x, _ROUNDED, (None,))
    return marked is scale and versions == [scale._version, x._version]


def mark_codes(x: Tensor, scale: Tensor, codes: Any) -> None:
    """Note on ``x`` the codes that a backward keeps of it, on the grid of the quantizer with this ``scale`` buffer.

    ``codes`` is a `saved_input.SavedInput`. ``x`` may not be a tensor of inference mode, which gives RuntimeError.
    """
    setattr(x, _CODES, (scale, x._version, codes))


def codes_of(x: Tensor, scale: Tensor) -> Any:
    """Return the `saved_input.SavedInput`, codes of ``x``, that :func:`mark_codes` noted for this ``scale``.

    None without such a mark, or if ``x`` changed in place since.
    """
    marked, version, codes = getattr(x, _CODES, (None, None, None))
    return codes if marked is scale and version == x._version else None


def mark_source(y: Tensor, grid: Any) -> None:
    """Note on ``y`` the `Grid` that it was rounded to, for layers that have no reference to its quantizer.

    The grid is not copied. Nothing is noted on a tensor of inference mode.
    """
    if not y.is_inference():
        setattr(y, _SOURCE, (grid, y._version))


def source_of(x: Tensor) -> Any:
    """Return the grid that :func:`mark_source` noted; None: there is no such mark, or ``x`` changed in place since."""
    grid, version = getattr(x, _SOURCE, (None, None))
    return grid if grid is not None and version == x._version else None
