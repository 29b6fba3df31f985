"""Means of codes: which elements each mean takes, and the exact sum behind it.

A float mean depends on the order in which its terms are added. A sum of codes does not, so the code of a mean is the
same whoever computes it: ``code = round(fl(Σ) · fl(s_in / fl(s_out · N)))``. Σ is the sum of codes minus zero point
over N elements, fl rounding to float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from tritonq.arithmetic import round_steps_
from tritonq.quantized_type import Rounding

# A mean of whole numbers in float32, times their count, is off by less than a half while the sum stays below this.
_FLOAT32_SUM = 2**22

_POOLS = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}
_ADAPTIVE_POOLS = {1: F.adaptive_avg_pool1d, 2: F.adaptive_avg_pool2d, 3: F.adaptive_avg_pool3d}


class Averaging(Protocol):
    """An operation whose results are each a sum of elements (and zeros of a padding), divided by a number.

    It has three methods: ``mean(x)`` computes the results, ``divisors(shape)`` returns the numbers that the sums are
    divided by, and ``terms(shape)`` returns an upper bound of the number of elements in one sum, and of its divisor.
    ``shape`` is always that of the input, batch and channels included. Objects are not callable: ``torch.compile`` of
    torch 2.11 hashes an object that is called, and cannot hash one that is made while it traces.
    """

    def mean(self, x: Tensor) -> Tensor:
        """Return the means of a float tensor ``x``, as torch computes them."""

    def divisors(self, shape: tuple[int, ...]) -> int | Tensor:
        """Return what each sum is divided by: one number, or a float32 tensor that broadcasts against the result.

        The tensor, on the CPU, has one element per window. A :class:`WindowAverage` without ``divisor_override``
        gives one if it has ``ceil_mode`` or a padding whose zeros do not count, an :class:`AdaptiveAverage` if its
        output sizes do not divide those of the input. All others return one number.

        Args:
            shape: of the input.
        """

    def terms(self, shape: tuple[int, ...]) -> int:
        """Return an upper bound of the number of elements in one sum, and of its divisor, for an input of ``shape``."""


@dataclass(frozen=True)
class AxesAverage:
    """The mean over axes: ``x.mean(axes, keepdim)``.

    Attributes:
        axes: indices of axes, negative ones from the end; not empty. None: all axes.
        keepdim: whether the axes stay, with size 1.
    """

    axes: tuple[int, ...] | None
    keepdim: bool = False

    def mean(self, x: Tensor) -> Tensor:
        """Return the mean of ``x`` over the axes."""
        return x.mean(self.axes, self.keepdim)

    def divisors(self, shape: tuple[int, ...]) -> int:
        """Return the number of elements along the axes, for an input of ``shape``."""
        return math.prod(shape if self.axes is None else [shape[axis] for axis in self.axes])

    def terms(self, shape: tuple[int, ...]) -> int:
        """Return how many elements one sum has: as many as lie along the axes, for an input of ``shape``."""
        return self.divisors(shape)


@dataclass(frozen=True)
class WindowAverage:
    """Describes average pooling over windows: ``avg_pool1d``, ``avg_pool2d``, ``avg_pool3d``.

    Attributes:
        kernel_size: of the window, one number per pooled axis.
        stride: elements from the start of one window to that of the next, one number per axis.
        padding: zeros at either end of an axis, one number per axis.
        ceil_mode: whether a last window may reach beyond the padded input; what lies beyond is no element of a mean.
        count_include_pad: whether zeros of the padding count as elements of a mean.
        divisor_override: what to divide every sum by, not 0; None: its number of elements. None for one pooled axis:
            ``avg_pool1d`` has no such argument.
    """

    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    ceil_mode: bool = False
    count_include_pad: bool = True
    divisor_override: int | None = None

    def mean(self, x: Tensor) -> Tensor:
        """Return the mean of each window of ``x`` (n, c, ...)."""
        rank = len(self.kernel_size)
        arguments: list[Any] = [self.kernel_size, self.stride, self.padding, self.ceil_mode, self.count_include_pad]
        if rank > 1:
            arguments.append(self.divisor_override)
        return _POOLS[rank](x, *arguments)

    def divisors(self, shape: tuple[int, ...]) -> int | Tensor:
        """Return the number of elements of each window, or ``divisor_override`` if that is given.

        One number without ``ceil_mode`` where zeros of the padding count or there are none; else a float32 tensor on
        the CPU, one number per window, in the shape of the result's pooled axes. ``shape`` is that of the input.
        """
        if self.divisor_override is not None:
            return self.divisor_override
        if not self.ceil_mode and (self.count_include_pad or not any(self.padding)):
            return math.prod(self.kernel_size)
        axes = zip(shape[-len(self.kernel_size) :], self.kernel_size, self.stride, self.padding, strict=True)
        return _outer([self._along(*axis) for axis in axes])

    def terms(self, shape: tuple[int, ...]) -> int:
        """Return the number of elements of a window, padding included, or ``|divisor_override|`` if that is larger.

        It does not depend on ``shape``.
        """
        return max(math.prod(self.kernel_size), abs(self.divisor_override or 0))

    def windows(self, size: int, kernel: int, stride: int, padding: int) -> int:
        """Return how many windows an axis of ``size`` elements, without padding, has: ``ceil_mode`` may add one."""
        span = size + 2 * padding - kernel
        count = (-(-span // stride) if self.ceil_mode else span // stride) + 1
        # The last window has to begin inside of the input or of the padding before it.
        return count - 1 if self.ceil_mode and (count - 1) * stride >= size + padding else count

    def _along(self, size: int, kernel: int, stride: int, padding: int) -> list[int]:
        found = []
        for index in range(self.windows(size, kernel, stride, padding)):
            start = index * stride - padding
            end = min(start + kernel, size + padding)
            found.append(end - start if self.count_include_pad else min(end, size) - max(start, 0))
        return found


@dataclass(frozen=True)
class AdaptiveAverage:
    """Describes average pooling to a given size: ``adaptive_avg_pool1d``, ``adaptive_avg_pool2d`` and the 3-d one.

    Methods compute the float means, and the numbers that exact sums of codes are divided by.

    Attributes:
        output_size: one number per pooled axis; None in place of a number: the size of the input along that axis.
    """

    output_size: tuple[int | None, ...]

    def mean(self, x: Tensor) -> Tensor:
        """Return the mean of each window of ``x`` (n, c, ...)."""
        sizes = self.sizes(x.shape)
        result: Tensor = _ADAPTIVE_POOLS[len(sizes)](x, sizes)  # type: ignore[arg-type]
        return result

    def sizes(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the size of the result along each pooled axis, for an input of ``shape``."""
        return tuple([out for _, out in self._axes(shape)])

    def divisors(self, shape: tuple[int, ...]) -> int | Tensor:
        """Return the number of elements of each window, for an input of ``shape``.

        One number if the output's sizes divide those of the input; else a float32 tensor on the CPU, one number per
        window, in the shape of the result's pooled axes.
        """
        if self.divides(shape):
            return math.prod(size // out for size, out in self._axes(shape))
        return _outer([[end - start for start, end in windows] for windows in self.bounds(shape)])

    def terms(self, shape: tuple[int, ...]) -> int:
        """Return the number of elements of the largest window, for an input of ``shape``."""
        return math.prod(max(end - start for start, end in windows) for windows in self.bounds(shape))

    def divides(self, shape: tuple[int, ...]) -> bool:
        """Whether the output's sizes divide those of an input of ``shape``; all windows then have one size."""
        return all(size % out == 0 for size, out in self._axes(shape))

    def bounds(self, shape: tuple[int, ...]) -> list[list[tuple[int, int]]]:
        """Return the windows along each pooled axis, for an input of ``shape``: (first element, one past the last)."""
        return [
            [(index * size // out, -(-(index + 1) * size // out)) for index in range(out)]
            for size, out in self._axes(shape)
        ]

    def _axes(self, shape: tuple[int, ...]) -> list[tuple[int, int]]:
        """Return the size of each pooled axis before and after pooling, for an input of ``shape``."""
        pooled = zip(shape[-len(self.output_size) :], self.output_size, strict=True)
        return [(size, size if out is None else out) for size, out in pooled]


_KINDS: dict[str, Callable[..., Averaging]] = {
    "axes": AxesAverage,
    "window": WindowAverage,
    "adaptive": AdaptiveAverage,
}


def averaging_to_data(averaging: Averaging) -> dict[str, Any]:
    """Return an averaging as plain data, such as ``{"kind": "axes", "axes": [2, 3], "keepdim": False}``.

    The kind is "axes", "window" or "adaptive"; the other keys are the attributes of :class:`AxesAverage`,
    :class:`WindowAverage` or :class:`AdaptiveAverage`, with lists for tuples. :func:`averaging_from_data` reads it.
    """
    kind = next(name for name, made in _KINDS.items() if type(averaging) is made)
    return {"kind": kind, **{name: _plain(value) for name, value in vars(averaging).items()}}


def averaging_from_data(data: Mapping[str, Any]) -> Averaging:
    """Return the averaging that :func:`averaging_to_data` described.

    Raises:
        KeyError: ``data`` has no "kind", or an unknown one.
        TypeError: ``data`` lacks a required attribute of that kind, or has a key that is none. Values are not checked.
    """
    fields = {name: tuple(value) if isinstance(value, (list, tuple)) else value for name, value in data.items()}
    kind: Any = fields.pop("kind")
    return _KINDS[kind](**fields)


def exact_sums(codes: Tensor, averaging: Averaging, largest: int) -> Tensor:
    """Return the sums of codes behind the means that ``averaging`` takes, as exact whole numbers.

    Args:
        codes: codes minus zero point: float32, whole numbers; not changed.
        averaging: which elements each mean takes.
        largest: no element of ``codes``, a code minus the zero point, is larger in magnitude.

    Returns:
        In the shape of the means: float32 if ``largest`` times ``averaging.terms`` is below 2^22, else float64. The
        values are the same in every memory format of ``codes``.
    """
    exact = codes if largest * averaging.terms(codes.shape) < _FLOAT32_SUM else codes.double()
    divisors = averaging.divisors(codes.shape)
    if isinstance(divisors, Tensor):
        divisors = divisors.to(exact.device)
    return (averaging.mean(exact) * divisors).round_()


def average_steps(sums: Tensor, scale: Tensor, output_scale: Tensor, divisors: int | Tensor) -> Tensor:
    """Return means in steps of the output's scale, before rounding: ``fl(fl(Σ) · fl(s_in / fl(s_out · N)))``.

    Args:
        sums: Σ, the exact sums of codes minus zero point, float32 or float64.
        scale: s_in, the scale of the input, float32, one element.
        output_scale: s_out, the scale of the output, float32, one element.
        divisors: N, what each sum is divided by: one number, or a float32 tensor that broadcasts against ``sums``, on
            their device.

    Returns:
        float32, shaped as ``sums``.

    Source: QLinearGlobalAveragePool of ONNX Runtime.
    """
    return sums.float() * (scale / (output_scale * divisors))


def requantize_sums(
    sums: Tensor, scale: Tensor, output_scale: Tensor, divisors: int | Tensor, rounding: Rounding
) -> Tensor:
    """Return the means on the output's grid, ``round(steps) · s_out``, float32, before clipping to its codes.

    ``steps = fl(fl(Σ) · fl(s_in / fl(s_out · N)))``, with fl rounding to float32.

    Args:
        sums: Σ, the exact sums of codes minus zero point, float32 or float64.
        scale: s_in, the scale of the input, float32, one element.
        output_scale: s_out, the scale of the output, float32, one element.
        divisors: N, what each sum is divided by: one number, or a float32 tensor that broadcasts against ``sums``, on
            any device.
        rounding: how ties are rounded: ``"half_even"`` or ``"half_away"``.
    """
    if isinstance(divisors, Tensor):
        divisors = divisors.to(sums.device)
    steps = average_steps(sums, scale, output_scale, divisors)
    return round_steps_(steps, rounding).mul_(output_scale)


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _outer(counts: list[list[int]]) -> Tensor:
    """Return the products of one count per axis, float32: ``[[2, 3], [5]]`` gives ``[[10], [15]]``."""
    result = torch.ones(())
    for count in counts:
        result = result.unsqueeze(-1) * torch.tensor(count, dtype=torch.float32)
    return result
