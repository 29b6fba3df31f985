"""Means of quantized tensors in exact integers: average pools, global pools, means over axes."""

from __future__ import annotations

import torch
from torch import Tensor

from tritonq.functional.codes import rounded_codes
from tritonq.functional.host_grid import HostGrid
from tritonq.functional.integer import centred_codes
from tritonq.grid import Grid
from tritonq.reference.average_pool import Averaging, average_steps, exact_sums, requantize_sums


def integer_average(x: Tensor, averaging: Averaging, source: Grid, output: Grid) -> Tensor:
    """Return the means of quantized values as integer runtimes compute them: on the output's grid, before clipping.

    ``round(fl(Σ) · fl(s_in / fl(s_out · N))) · s_out`` with Σ the exact sum of codes minus zero point, N the number
    that the mean divides by, and fl rounding to float32. ``output.qtype.rounding`` says how ties are rounded. The order
    of the terms changes nothing, nor does the memory format.

    Args:
        x: float tensor of values ``(code - zero_point) * s_in``; other values are rounded to the nearest of these.
        averaging: which elements each mean takes: a ``WindowAverage``, ``AxesAverage`` or ``AdaptiveAverage`` of
            `tritonq.reference.average_pool`.
        source: the input's grid, per tensor, with the scale s_in.
        output: grid of the quantizer behind the operation, per tensor, with the scale s_out.

    Returns:
        float32 in the shape of torch's means, without gradient. Means beyond the output's range are not clipped yet.

    Source: QLinearGlobalAveragePool of ONNX Runtime.

    Examples:
        >>> from tritonq.quantized_type import QuantizedType
        >>> from tritonq.reference.average_pool import AxesAverage
        >>> codes = QuantizedType.of(8)
        >>> grids = [Grid(torch.tensor([scale]), None, codes) for scale in (0.5, 0.25)]
        >>> integer_average(torch.tensor([[0.5, 1.0, 1.5, 2.5]]), AxesAverage((1,)), *grids)  # 5.5 steps: a tie
        tensor([1.5000])
    """
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        codes = centred_codes(x, source.scale)
        sums = exact_sums(codes, averaging, source.qtype.quant_max - source.qtype.quant_min)
        divisors = averaging.divisors(x.shape)
        return requantize_sums(sums, source.scale, output.scale, divisors, output.qtype.rounding)


def average_codes(codes: Tensor, averaging: Averaging, source: HostGrid, output: HostGrid) -> Tensor:
    """Return codes of means: ``clip(round(fl(Σ) · fl(s_in / fl(s_out · N))) + z_out)``, on CPU tensors.

    Σ is the exact sum of ``code - z_in`` over the elements of a mean, N the number that the mean divides by, and fl
    rounding to float32. The result is that of :func:`integer_average`, clipped to the output's codes.

    Args:
        codes: uint8 codes of the input, counted from 0 (the smallest code of the grid).
        averaging: which elements each mean takes, as in :func:`integer_average`.
        source: the input's grid: s_in and z_in, which is counted from 0, too.
        output: the result's grid: s_out, z_out; ``half_even`` says how ties are rounded, ``largest`` is its last code.

    Returns:
        uint8, counted from 0, in the shape of torch's means.
    """
    values = codes.to(torch.float32)
    if source.zero:
        values.sub_(source.zero)
    sums, divisors = exact_sums(values, averaging, source.largest), averaging.divisors(codes.shape)
    steps = average_steps(sums, torch.tensor(source.scale), torch.tensor(output.scale), divisors)
    return rounded_codes(steps, output)
