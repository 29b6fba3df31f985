"""The arithmetic of quantization-aware modules in eval mode for ``torch.compile``.

Eager code reads on the host whether grids are switched on and have observed data. These operators read it on the
device: they compute both answers and select one, or only the right one if reading doesn't wait. Integers and what
follows them are eager code's, bit for bit. A grid "is on" if it is switched on and has data. ``round`` rounds ties as
the type of the grid rounded to says. "Not clipped" results are multiples of a grid's scale that may lie beyond its
codes: the output's quantizer clips them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from tritonq.functional.average_pool import integer_average
from tritonq.functional.conv2d import find_kernel, run_integer_layer
from tritonq.functional.fake_quant import fake_quantize
from tritonq.functional.functions import integer_function, integer_prelu, requantized
from tritonq.functional.integer import integer_sums, onto_grid, to_integers
from tritonq.functional.integer_joins import JoinKind, divided, float_join, integer_join, joint_dtype
from tritonq.functional.linear_map import Convolution, LinearMap, MatrixProduct
from tritonq.functional.traced.build import traced_operator
from tritonq.grid import Grid
from tritonq.qparams import is_readable
from tritonq.reference.average_pool import AdaptiveAverage, Averaging, AxesAverage, WindowAverage
from tritonq.reference.functions import Function
from tritonq.reference.operator import Like, New, operator


def affine(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    op: LinearMap,
    channel_axis: int,
    source: Grid,
    weights: Grid,
    output: Grid | None,
) -> Tensor:
    """Return ``op(x, FQ_w(weight)) + bias``, in exact integers if the grids of input and weight are on.

    In integers it is ``fl(Σ (x_code - x_zero) (w_code - w_zero) + bias / m) · m``, with m input scale times weight
    scale, the bias rounded to whole multiples of m, and fl rounding to float32; if ``output``, of scale s, is on,
    ``round(fl(Σ …) · fl(m / s)) · s``, not clipped. A Triton kernel or torch's operators compute it.

    Args:
        x: values on the grid of ``source``; any shape that ``op`` takes.
        weight: float, with any BatchNorm folded in.
        bias: (out,), or None.
        op: a Convolution or MatrixProduct; for a PaddedConvolution give ``x`` and ``op`` as its ``padded(x)`` returns
            them.
        channel_axis: axis of the result with the out channels.
        source: grid of the input, per tensor.
        weights: grid of the weight, per tensor or per out channel (axis 0 of ``op.to_rows(weight)``); no groups.
        output: grid of the quantizer behind the layer, per tensor, to which integer sums are rounded while it is on;
            None: they are not.

    Returns:
        Tensor in ``x``'s dtype; without gradient.
    """
    bias = None if bias is None else bias.detach()
    conv = op if isinstance(op, Convolution) else None
    result: Tensor = _affine(x.detach(), weight.detach(), bias, conv, channel_axis, source, weights, output)
    return result


def join(kind: JoinKind, a: Tensor, b: Tensor, grid_a: Grid, grid_b: Grid, output: Grid) -> Tensor:
    """Return the join v of ``a`` and ``b``; if all three grids are on, ``round(v / s) · s`` with the output's scale s.

    The rounded result is computed from codes (of minimum and maximum: from values), in the order of float32 operations
    of ONNX Runtime, and not clipped: :func:`tritonq.functional.integer_joins.integer_join`.

    Args:
        kind: which v is: ``"add"``, ``"sub"``, ``"mul"``, ``"matmul"``, ``"minimum"`` or ``"maximum"``.
        a: float tensor on ``grid_a``.
        b: float tensor on ``grid_b`` that broadcasts against ``a``; for ``"matmul"`` what ``a @ b`` takes.
        grid_a: grid of ``a``, per tensor.
        grid_b: grid of ``b``, per tensor.
        output: grid of the quantizer behind the operation, per tensor.

    Returns:
        Tensor in the dtype of torch's ``a + b``; without gradient. If a grid is off, v as torch computes it.

    Raises:
        ValueError: when the graph runs, for integer sums of ``"matmul"`` that may pass 31 bits, or 53 where codes have
            more than 8, if all grids are on, for which the host waits for the device.
    """
    wide = a.detach().to(torch.promote_types(a.dtype, b.dtype))
    result: Tensor = _join(kind, wide, b.detach(), grid_a, grid_b, output)
    return result.to(joint_dtype(a, b))


def on_grid(x: Tensor, output: Grid, source: Grid | None = None) -> Tensor:
    """Return ``round(x / s) · s``, not clipped, in ``x``'s dtype if all given grids are on, else a copy of ``x``.

    The result has no gradient.

    Args:
        x: float tensor.
        output: the grid with scale s, per tensor.
        source: the grid that ``x`` lies on, per tensor, to which it is rounded first in float32; None: unknown, ``x``
            is not rounded first.
    """
    result: Tensor = _on_grid(x.detach(), output, source)
    return result


def prelu(x: Tensor, weight: Tensor, source: Grid, output: Grid) -> Tensor:
    """Return the PReLU ``v = max(0, x) + weight · min(0, x)``; if both grids are on, ``round(v / s) · s``, not clipped.

    s is the output's scale. If both are on, ``x`` is first rounded to its grid, and all is computed in float32.

    Args:
        x: float tensor on the grid of ``source``.
        weight: float, (1,) or one per channel on axis 1.
        source: grid of the input, per tensor.
        output: grid of the quantizer behind the operation, per tensor.

    Returns:
        Tensor in ``x``'s dtype; without gradient.
    """
    result: Tensor = _prelu(x.detach(), weight.detach(), source, output)
    return result


def average(x: Tensor, averaging: Averaging, source: Grid, output: Grid) -> Tensor:
    """Return the means of ``x``: by exact integers, on the output's grid, if both grids are on, else as torch does.

    The integer result is ``round(fl(Σ) · fl(s_in / fl(s_out · N))) · s_out``, not clipped: Σ is the exact sum of codes
    minus zero point, N the number that the mean divides by, fl rounding to float32.

    Args:
        x: float tensor on the grid of ``source``.
        averaging: which elements each mean takes, and N: axes, windows or adaptive pooling.
        source: grid of the input, per tensor.
        output: grid of the quantizer behind the operation, per tensor.

    Returns:
        Tensor in ``x``'s dtype; without gradient.
    """
    axes = averaging if isinstance(averaging, AxesAverage) else None
    window = averaging if isinstance(averaging, WindowAverage) else None
    sizes = averaging.sizes(x.shape) if isinstance(averaging, AdaptiveAverage) else None
    result: Tensor = _average(x.detach(), axes, window, sizes, source, output)
    return result


def function(x: Tensor, function: Function, source: Grid, output: Grid) -> Tensor:
    """Return f(x): computed from codes, on the output's grid, if both grids are on, else as torch computes it.

    From codes it is ``round(f(fl((code - z) · s_in)) / s_out) · s_out``, not clipped, with the input's zero point z, f
    in float32, in the order of operations of ONNX Runtime, and fl rounding to float32. If ``source`` has at most 16
    bits, values beyond its ends count as its ends.

    Args:
        x: float tensor on the grid of ``source``.
        function: f and its numbers, such as ``Function("leaky_relu", (0.1,))``.
        source: grid of the input, per tensor.
        output: grid of the quantizer behind the function, per tensor.

    Returns:
        Tensor in ``x``'s dtype; without gradient.
    """
    result: Tensor = _function(x.detach(), function, source, output)
    return result


def _op(conv: Convolution | None) -> LinearMap:
    return MatrixProduct() if conv is None else conv


def _affine_shape(arguments: dict[str, Any]) -> tuple[int, ...]:
    x = arguments["x"]
    return tuple(_op(arguments["conv"])(x, arguments["weight"].to(x.dtype)).shape)


def _join_shape(arguments: dict[str, Any]) -> tuple[int, ...]:
    return tuple(float_join(arguments["kind"], arguments["a"], arguments["b"]).shape)


@operator(returns=New(_affine_shape, "x", keeps_format=True))
def run_affine(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    conv: Convolution | None,
    channel_axis: int,
    source: Grid,
    weights: Grid,
    output: Grid | None,
) -> Tensor:
    """Compute :func:`affine`, ``op(x, FQ_w(weight)) + bias``, when the compiled graph runs.

    ``conv`` is the convolution, None for a matrix product. ``bias`` is (out,) or None; ``channel_axis`` the axis of the
    result with the out channels. ``source``, ``weights`` and ``output`` are the grids of input, weight and output; if
    the first two are on, sums are exact integers, which are rounded to ``output`` if that is on, and not clipped; else
    all is float, the weight rounded if its grid is on. The result has ``x``'s dtype.
    """
    op = _op(conv)

    def values() -> Tensor:
        rows = fake_quantize(op.to_rows(weight), weights)
        return op(x, op.from_rows(rows).to(x.dtype), None if bias is None else bias.to(x.dtype))

    def integers() -> Tensor:
        layer = to_integers(weight, bias, op, source, weights, may_wait=is_readable(x))
        kernel = find_kernel(x, weight, op, layer)
        total = integer_sums(x, layer, op) if kernel is None else None

        def onto(grid: Grid | None) -> Tensor:
            # Two calls may use the sums: off the CPU these are float64, which nothing overwrites.
            if total is None:
                return run_integer_layer(x, layer, op, grid, kernel)
            return onto_grid(total, layer, channel_axis, grid).to(x.dtype)

        return onto(None) if output is None else _chosen((output,), lambda: onto(output), lambda: onto(None))

    return _chosen((source, weights), integers, values)


@operator(returns=New(_join_shape, "a", keeps_format=True))
def run_join(kind: JoinKind, a: Tensor, b: Tensor, grid_a: Grid, grid_b: Grid, output: Grid) -> Tensor:
    """Compute :func:`join` when the compiled graph runs; the result has ``a``'s dtype.

    ``kind`` is as in :func:`join`. The caller gives ``a`` in the wider dtype of both. If the grids of ``a`` and ``b``
    (``grid_a``, ``grid_b``) and ``output`` are on, it is computed from codes (minimum and maximum: from values) and
    rounded to ``output``, not clipped; else in float.

    Raises:
        ValueError: integer sums of ``"matmul"`` may pass 31 bits, or 53 where codes have more than 8, and all grids are
            on, for which the host waits for the device.
    """
    return _chosen(
        (grid_a, grid_b, output),
        lambda: integer_join(kind, a, b, grid_a, grid_b, output).to(a.dtype),
        lambda: float_join(kind, a, b).to(a.dtype),
    )


@operator(returns=Like("x"))
def run_on_grid(x: Tensor, output: Grid, source: Grid | None) -> Tensor:
    """Compute :func:`on_grid`, ``round(x / s) · s`` or a copy of ``x``, when the compiled graph runs, in ``x``'s dtype.

    s is the scale of ``output``. Unless ``output`` and ``source`` (None: not asked) are on, the result is the copy.
    Else, with ``source``, ``x`` is first rounded to multiples of that grid's scale, in float32. Nothing is clipped.
    """
    if source is None:
        return _chosen((output,), lambda: divided(x, output).to(x.dtype), lambda: x.clone())
    return _chosen((source, output), lambda: requantized(x, source, output).to(x.dtype), lambda: x.clone())


@operator(returns=Like("x"))
def run_prelu(x: Tensor, weight: Tensor, source: Grid, output: Grid) -> Tensor:
    """Compute :func:`prelu`, ``max(0, x) + weight · min(0, x)``, when the compiled graph runs, in ``x``'s dtype.

    If both grids are on, ``x`` is rounded to ``source`` and the result to ``output``, neither clipped; else it is
    torch's PReLU.
    """
    return _chosen(
        (source, output),
        lambda: integer_prelu(x, weight, source, output).to(x.dtype),
        lambda: F.prelu(x, weight.to(x.dtype)).to(x.dtype),
    )


def _averaging(axes: AxesAverage | None, window: WindowAverage | None, sizes: tuple[int, ...] | None) -> Averaging:
    """Return the averaging from its three arguments, two of which are None; ``sizes`` are those of adaptive pooling."""
    return cast(Averaging, axes or window) if sizes is None else AdaptiveAverage(sizes)


def _average_shape(arguments: dict[str, Any]) -> tuple[int, ...]:
    averaging = _averaging(arguments["axes"], arguments["window"], arguments["sizes"])
    return tuple(averaging.mean(arguments["x"]).shape)


@operator(returns=New(_average_shape, "x", keeps_format=True))
def run_average(
    x: Tensor,
    axes: AxesAverage | None,
    window: WindowAverage | None,
    sizes: tuple[int, ...] | None,
    source: Grid,
    output: Grid,
) -> Tensor:
    """Compute the means of ``x`` (:func:`average`) when the compiled graph runs, in ``x``'s dtype.

    Exactly one of ``axes`` (a mean over axes), ``window`` (pooling over windows) and ``sizes`` (adaptive pooling to
    these sizes) is not None. If both grids are on, sums are exact integers and means are rounded to ``output``, not
    clipped; else torch computes them.
    """
    averaging = _averaging(axes, window, sizes)
    return _chosen(
        (source, output),
        lambda: integer_average(x, averaging, source, output).to(x.dtype),
        lambda: averaging.mean(x),
    )


@operator(returns=Like("x"))
def run_function(x: Tensor, function: Function, source: Grid, output: Grid) -> Tensor:
    """Compute f(x) (:func:`function`) when the compiled graph runs, in ``x``'s dtype.

    If both grids are on, it is computed from codes and rounded to ``output``, not clipped; else torch computes it.
    """
    return _chosen(
        (source, output),
        lambda: integer_function(x, function, source, output).to(x.dtype),
        lambda: function(x),
    )


def _chosen(grids: tuple[Grid, ...], on: Callable[[], Tensor], off: Callable[[], Tensor]) -> Tensor:
    """Return ``on()`` if all grids are on, else ``off()``.

    Both are computed if reading a switch would wait for a device. Only where ``on()`` raises ValueError, such as for
    sums too long for its integers, this waits: the error is raised if the grids are on.
    """
    if all(grid.enabled is None or is_readable(grid.enabled) for grid in grids):
        return on() if all(grid.is_enabled_on_host() for grid in grids) else off()
    try:
        integers = on()
    except ValueError:
        if all(grid.is_enabled_on_host() for grid in grids):
            raise
        return off()
    return torch.where(torch.stack([grid.enabled_on_device() for grid in grids]).all(), integers, off())


_affine, _join = traced_operator("eval_affine", run_affine), traced_operator("eval_join", run_join)
_on_grid, _prelu = traced_operator("eval_on_grid", run_on_grid), traced_operator("eval_prelu", run_prelu)
_average = traced_operator("eval_average", run_average)
_function = traced_operator("eval_function", run_function)
