"""Sums, differences and products of tensors of codes: the results of `integer_joins`, bit for bit, without float64.

A *join* is an operation of two tensors; `tritonq.functional.integer_joins` computes it on values, as ONNX Runtime
does. Codes are uint8 and counted from 0, the smallest code of their grid.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from tritonq.backend import without_kernel
from tritonq.functional.codes import code_range, images_at_once
from tritonq.functional.host_grid import HostGrid, host_grid
from tritonq.functional.integer_joins import JoinKind
from tritonq.grid import Grid
from tritonq.reference.eval_codes import CodeRange
from tritonq.reference.fake_quant import quantize

_LARGEST_CODE = 255


@dataclass(frozen=True, eq=False)
class CodedJoin:
    """A sum, difference or product of two tensors of codes, prepared once: a call with both returns the result's codes.

    With u and v the operands' codes, each operation rounded to float32, fma (product plus third argument) rounded once,
    and zero that of ``code_range``:

    - sum, difference: ``clip(round(fma(u - starts[0], ratios[0], fma(v - starts[1], ratios[1], fixed))) + zero)``.
    - product: ``clip(round((u - a.zero) · (v - b.zero) · ratios[0] + fixed) + zero)``.

    Attributes:
        kind: ``"add"``, ``"sub"`` or ``"mul"``.
        a: grid of the first operand.
        b: grid of the second operand.
        output: grid of the result.
        starts: for each operand, the code that an engine counts its codes from: 0, or behind a ReLU with a fixed zero
            point the code of the value 0.
        ratios: each operand's scale over the output's, float32, the second negative for a difference; for a product one
            number, the product of both scales over the output's.
        fixed: the constant term, float32, 0-d: ``output.zero - code_range.zero``; for a sum or difference
            ``(a.zero - starts[0]) · ratios[0] + (b.zero - starts[1]) · ratios[1]`` is subtracted from that.
        code_range: ends of the clip and how ties are rounded; its ``zero`` is the code that an engine counts the
            result's codes from.
    """

    kind: JoinKind
    a: HostGrid
    b: HostGrid
    output: HostGrid
    starts: tuple[int, int]
    ratios: tuple[float, ...]
    fixed: Tensor
    code_range: CodeRange

    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        """Return the codes of the result, uint8.

        Args:
            a: uint8 codes of the first operand.
            b: uint8 codes of the second, of the same shape; for a product one may broadcast to the shape of the other.
        """
        if a.shape == b.shape and a.dim() > 1:
            images = images_at_once(a.numel() // max(1, len(a)), len(a))
            if images < len(a):
                pairs = zip(torch.split(a, images), torch.split(b, images), strict=True)
                return torch.cat([self._run(*pair) for pair in pairs])
        return self._run(a, b)

    def _run(self, a: Tensor, b: Tensor) -> Tensor:
        computed: Any = without_kernel("eval_codes", a)
        result: Tensor
        if self.kind == "mul":
            zeros = self.a.zero, self.b.zero
            result = computed.codes_of_product(a, b, zeros, self.ratios[0], self.fixed, self.code_range)
        else:
            result = computed.codes_of_sum(a, b, self.starts, self.ratios, self.fixed, self.code_range)
        return result


def coded_join(
    kind: JoinKind, grids: tuple[Grid, Grid, Grid], deployed: list[Grid], ceiling: float | None
) -> CodedJoin | None:
    """Return an operation on codes; None if codes can't be used.

    That is so if a grid has several scales or more than 256 codes, or is not on the CPU, if a ratio of scales is not
    finite, or for sums and differences if this CPU rounds a product and a sum apart (:func:`adds_fused`). Codes must be
    integers, which is not checked.

    Args:
        kind: ``"add"``, ``"sub"`` or ``"mul"``.
        grids: of both operands and of the result, per tensor.
        deployed: the same three grids with the codes that converted models and files have: behind a ReLU with a fixed
            zero point only those from the zero point on.
        ceiling: upper bound of the ReLU before the quantizer, infinity for a plain one, 6 for ReLU6; None: no ReLU.
    """
    found = [host_grid(grid) for grid in grids]
    if kind != "mul" and not adds_fused():
        return None
    a, b, output = found
    if a is None or b is None or output is None:
        return None
    starts = [grid.qtype.quant_min - full.qtype.quant_min for grid, full in zip(deployed, grids, strict=True)]
    offsets = [float(one.zero - start) for one, start in zip((a, b, output), starts, strict=True)]
    scale_a, scale_b, scale = (grid.scale.view(()) for grid in grids)
    if kind == "mul":
        ratios: tuple[float, ...] = (float(scale_a * scale_b / scale),)
        fixed = torch.tensor(offsets[2])
    else:
        ratio_a, ratio_b = scale_a / scale, (-scale_b if kind == "sub" else scale_b) / scale
        ratios = float(ratio_a), float(ratio_b)
        inner = offsets[0] * ratio_a.double() + (offsets[1] * ratio_b).double()
        fixed = torch.tensor(offsets[2]) - inner.float()
    if not all(math.isfinite(ratio) for ratio in ratios):
        return None
    low, high = 0, output.largest
    if ceiling is not None:
        low, high = output.zero, int(quantize(torch.tensor([ceiling]), grids[2])) - grids[2].qtype.quant_min
    # A code minus its start, or a product of two.
    farthest = (_LARGEST_CODE**2 if kind == "mul" else _LARGEST_CODE) * sum(map(abs, ratios)) + abs(float(fixed))
    result = replace(code_range(output, low, high, farthest), zero=starts[2])
    return CodedJoin(kind, a, b, output, (starts[0], starts[1]), ratios, fixed, result)


@cache
def adds_fused() -> bool:
    """Whether ``torch.add(x, y, alpha=r)`` rounds ``x + r · y`` once on this CPU, as a fused multiply-add does.

    Tried once per process.
    """
    generator = torch.Generator().manual_seed(0)
    y = torch.randint(0, 256, (1003,), generator=generator).float()
    addend = torch.randn(1003, generator=generator) * 64
    for ratio in (0.7310585, -1.3333334, 0.0123456):
        exact = y.double() * float(torch.tensor(ratio))
        for x in (addend, addend[0]):
            for length in (1003, 7, 1):
                once = ((x if x.dim() == 0 else x[:length]).double() + exact[:length]).float()
                found = torch.add(x if x.dim() == 0 else x[:length], y[:length], alpha=ratio)
                if not torch.equal(found, once):
                    return False
    return True
