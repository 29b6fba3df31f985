"""Tensors with a scale per group, rearranged as a matrix with one group, and one scale, per row.

A *group* is ``group`` neighbouring elements along one axis. A (4, 64) weight with groups of 32 along axis 1 becomes (8,
32).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from tritonq.arithmetic import whole_number
from tritonq.functional.validate import check_axis
from tritonq.granularity import Granularity
from tritonq.grid import Grid
from tritonq.reference.fake_quant import quantize


@dataclass(frozen=True)
class GroupRows:
    """How a tensor with groups along an axis becomes a matrix of one group per row, and back.

    Attributes:
        shape: of the tensor.
        granularity: axis (not negative) and size of the groups.
    """

    shape: tuple[int, ...]
    granularity: Granularity

    def split(self, x: Tensor) -> Tensor:
        """Return ``x``, of the shape ``shape``, as (groups, size): a view where its strides allow one, else a copy.

        Groups are in the order of the tensor's elements after the axis was moved to the end. For groups of 32 along
        axis 0 of a (64, 4) tensor the first rows are ``x[:32, 0]``, ``x[32:, 0]`` and ``x[:32, 1]``.
        """
        return x.movedim(self.axis, -1).reshape(-1, self.granularity.group or 1)

    def join(self, rows: Tensor) -> Tensor:
        """Return a view of a contiguous (groups, size) matrix in the tensor's shape; the inverse of :meth:`split`."""
        moved = [size for axis, size in enumerate(self.shape) if axis != self.axis] + [self.shape[self.axis]]
        return rows.view(moved).movedim(-1, self.axis)

    def flatten(self, name: str, value: Tensor) -> Tensor:
        """Return values, one per group, as a vector (groups,), in the order of the rows of :meth:`split`.

        Args:
            name: name of the argument in the error's message, such as ``"scale"``.
            value: such as scales: shaped as the tensor, but with one index per group along the groups' axis.

        Raises:
            ValueError: ``value`` has another shape.
        """
        expected = self.granularity.scale_shape(self.shape)
        if tuple(value.shape) != expected:
            raise ValueError(f"{name} must have shape {expected}, one per group, got {tuple(value.shape)}")
        return value.movedim(self.axis, -1).reshape(-1)

    def join_values(self, values: Tensor) -> Tensor:
        """Return a vector (groups,) as a tensor shaped as ``shape``, but with one index per group along the axis.

        It is the inverse of :meth:`flatten`.
        """
        shape = list(self.granularity.scale_shape(self.shape))
        moved = [size for axis, size in enumerate(shape) if axis != self.axis] + [shape[self.axis]]
        return values.reshape(moved).movedim(-1, self.axis)

    @property
    def axis(self) -> int:
        """The axis that groups lie along."""
        return self.granularity.axis or 0


def in_groups(
    function: Callable[[Tensor, Tensor, int | Tensor], Tensor],
    x: Tensor,
    scale: Tensor,
    zero_point: int | Tensor,
    axis: int | None,
    group_size: int,
) -> Tensor:
    """Apply a function of rows to the groups of ``x``; returns its result in the shape of ``x``.

    Args:
        function: called with (groups, size) values, (groups,) scales, and zero points, as an int or (groups,); returns
            a contiguous tensor (groups, size).
        x: the tensor.
        scale: one per group: shaped as ``x``, but with one index per group along ``axis``.
        zero_point: an int, or shaped as ``scale``.
        axis: that groups lie along; may be negative. None raises.
        group_size: elements of a group.

    Raises:
        TypeError: the group size or the axis is no int, or the scale is no tensor.
        ValueError: there is no axis, it is out of range, the group size is below 1 or does not divide the axis, or
            scale or zero point have another shape.
    """
    if axis is None:
        raise ValueError("groups lie along an axis, got axis=None")
    if whole_number(group_size) is None:
        raise TypeError(f"group_size must be an int, got {group_size!r}")
    if not isinstance(scale, Tensor):
        raise TypeError(f"with groups scale must be a tensor, one element per group, got {type(scale).__name__}")
    rows = GroupRows(tuple(x.shape), Granularity(check_axis(x, axis), group_size))
    flat_zero = rows.flatten("zero_point", zero_point) if isinstance(zero_point, Tensor) else zero_point
    return rows.join(function(rows.split(x), rows.flatten("scale", scale), flat_zero))


def group_rows(x: Tensor, granularity: Granularity) -> GroupRows | None:
    """Return how ``x`` becomes a matrix of one group per row; None if ``granularity`` has no groups.

    Raises:
        ValueError: the axis is out of range, or its length no multiple of the group's size.
    """
    if granularity.group is None:
        return None
    rows = GroupRows(tuple(x.shape), Granularity(check_axis(x, granularity.axis or 0), granularity.group))
    rows.granularity.scale_shape(rows.shape)
    return rows


def as_rows(x: Tensor, grid: Grid) -> tuple[Tensor, Grid]:
    """Return ``x`` as (groups, size) rows and its grid with a scale per row; both themselves if it has no groups.

    The result's grid shares the tensors of ``grid``, in which scales of groups are (groups,), in the order of rows.

    Raises:
        ValueError: ``x`` lacks the grid's axis, or its length is no multiple of the group's size.
    """
    rows = group_rows(x, grid.granularity)
    if rows is None:
        return x, grid
    return rows.split(x), Grid(grid.scale, grid.zero_point, grid.qtype.row_type, grid.enabled)


def codes_on(x: Tensor, grid: Grid) -> Tensor:
    """Return ``clamp(round(x/s) + z, quant_min, quant_max)``, codes as whole float32 numbers, in the shape of ``x``.

    For float64 they are float64; NaN stays NaN. The grid may have any granularity; its switch is not read. If its type
    is a float format, the result is numbers of that format: ``x/s`` rounded.
    """
    rows = group_rows(x, grid.granularity)
    return quantize(x, grid) if rows is None else rows.join(quantize(*as_rows(x, grid)))


def aligned(values: Tensor, x: Tensor, granularity: Granularity) -> Tensor:
    """Return ``values``, one per scale of ``x`` (such as the scales themselves), shaped to broadcast against ``x``.

    ``values`` are one element, (channels,), or (groups,) in the order of :meth:`GroupRows.split`. The result is a view;
    with groups a tensor of the shape of ``x``.
    """
    rows = group_rows(x, granularity)
    if rows is None:
        return granularity.align(values, x.dim())
    return rows.join_values(values).repeat_interleave(granularity.group or 1, rows.axis)
