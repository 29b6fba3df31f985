"""Recognise recorded calls that are means: average pools, as modules or functions, and means over axes.

An ``Averaging`` describes a mean: its windows (``WindowAverage``), its output size (``AdaptiveAverage``), or its axes
(``AxesAverage``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tritonq.functional.linear_map import per_axis
from tritonq.nn.average_pool import averaging_of
from tritonq.prepare.decide.read_call import read_call
from tritonq.prepare.record.dataflow import Call, Ref
from tritonq.reference.average_pool import AdaptiveAverage, Averaging, AxesAverage, WindowAverage


def averaging_of_call(call: Call, shape: tuple[int, ...], has_fixed_arguments: bool = True) -> Averaging | None:
    """Return the mean that a call computes; None if it computes something else.

    Args:
        call: any recorded call.
        shape: shape of the tensor that it reads.
        has_fixed_arguments: for functions, whether their other arguments are known to be constants. If not, they may
            have been computed from the input's size: a window over the whole input, without padding and
            ``divisor_override``, becomes an adaptive pool to size 1.
    """
    if call.kind == "module":
        return averaging_of(call.target)  # type: ignore[arg-type]
    found = read_call(call, _READERS)
    return found if has_fixed_arguments else _following_sizes(found, shape)


def may_change(averaging: Averaging) -> bool:
    """Whether a mean's arguments, if they are not known to be constants, may have been computed from a tensor's size.

    True for windows, and for adaptive pools with an output of more than one element or of the input's size. False for
    means over axes, and for adaptive pools with an output of one element. Where it is True, a module takes the place of
    the mean only in a forward that can compare the arguments with the recorded ones when it runs.
    """
    if isinstance(averaging, AdaptiveAverage):
        return any(size != 1 for size in averaging.output_size)
    return not isinstance(averaging, AxesAverage)


def _mean(input: Ref, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Averaging | None:
    """Return the ``Averaging`` that these arguments of ``torch.mean`` describe; None if it changes the dtype."""
    if dtype is not None or isinstance(dim, Ref):
        return None
    axes = None if dim is None or dim == () else tuple(dim) if isinstance(dim, Sequence) else (int(dim),)
    return AxesAverage(axes, bool(keepdim))


def _axis_names(function: Callable[..., Averaging | None]) -> Callable[..., Averaging | None]:
    """Return ``function``, a reader of arguments, so that it takes NumPy's names (``axis``, ``keepdims``) too."""

    def renamed(*args: Any, **kwargs: Any) -> Averaging | None:
        names = {"axis": "dim", "keepdims": "keepdim"}
        return function(*args, **{names.get(name, name): value for name, value in kwargs.items()})

    return renamed


def _window(rank: int) -> Callable[..., Averaging | None]:
    """Return a function that takes the arguments of ``avg_pool1d``, ``2d`` or ``3d`` and returns a ``WindowAverage``.

    Numbers for all axes become one per axis, ``rank`` of them; without a stride it is the kernel size.
    """

    def average(
        input: Ref,
        kernel_size: Any,
        stride: Any = None,
        padding: Any = 0,
        ceil_mode: bool = False,
        count_include_pad: bool = True,
        divisor_override: int | None = None,
    ) -> Averaging | None:
        kernel = _whole_per_axis(kernel_size, rank)
        # Without a stride, or with an empty one, windows stand side by side.
        step = kernel if stride in (None, ()) else _whole_per_axis(stride, rank)
        return WindowAverage(
            kernel, step, _whole_per_axis(padding, rank), bool(ceil_mode), bool(count_include_pad), divisor_override
        )

    return average


def _adaptive(rank: int) -> Callable[..., Averaging | None]:
    """Return a function that takes the arguments of ``adaptive_avg_pool1d`` etc. and returns an ``AdaptiveAverage``.

    An output size for all axes becomes one per axis, ``rank`` of them; None is the input's.
    """

    def average(input: Ref, output_size: Any) -> Averaging | None:
        return AdaptiveAverage(_whole_per_axis(output_size, rank))

    return average


_READERS: Mapping[str, Callable[..., Averaging | None]] = {
    "mean": _axis_names(_mean),
    **{f"avg_pool{rank}d": _window(rank) for rank in (1, 2, 3)},
    **{f"adaptive_avg_pool{rank}d": _adaptive(rank) for rank in (1, 2, 3)},
}


def _whole_per_axis(value: Any, rank: int) -> tuple[Any, ...]:
    """Return ``value``, one entry or one per axis, as a tuple of ``rank`` entries, each an int or None.

    Raises:
        ValueError: another number of entries, or entries of another type.
    """
    entries = per_axis(value, rank)
    if len(entries) != rank or not all(entry is None or isinstance(entry, int) for entry in entries):
        raise ValueError(f"expected 1 or {rank} whole numbers, got {value!r}")
    return entries


def _following_sizes(averaging: Averaging | None, shape: tuple[int, ...]) -> Averaging | None:
    """Return an adaptive pool to size 1 for a window over the whole input, of ``shape``; any other mean as it is."""
    if not isinstance(averaging, WindowAverage) or any(averaging.padding) or averaging.divisor_override is not None:
        return averaging
    rank = len(averaging.kernel_size)
    return AdaptiveAverage((1,) * rank) if averaging.kernel_size == tuple(shape[-rank:]) else averaging
