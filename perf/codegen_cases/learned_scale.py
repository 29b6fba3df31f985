"""Code-generation cases of learned scales."""

from __future__ import annotations

import torch

from tritonq.grid import Grid
from tritonq.kernels import learned_scale
from tritonq.perf.codegen_case import LAYOUTS, Call, CodegenCase, meta, meta_qparams
from tritonq.quantized_type import QUINT8


def _learned_scale(layout: str, method: str) -> Call:
    shape, channels_last, axis = LAYOUTS[layout]

    def call(dtype: torch.dtype) -> object:
        x = meta(*shape, dtype=dtype, channels_last=channels_last)
        scale, zero_point = meta_qparams(shape, axis)
        shift = zero_point if method in ("torch", "megengine") else None
        grid = Grid(scale, shift, QUINT8.with_axis(axis))
        return learned_scale.learned_fake_quantize_backward(torch.empty_like(x), x, grid, method)

    return call


def _clip_then_round(dtype: torch.dtype) -> object:
    """Launch the kernel that clips, then rounds, as MegEngine does, per channel."""
    shape, _, axis = LAYOUTS["channels first"]
    grid = Grid(*meta_qparams(shape, axis), QUINT8.with_axis(axis))
    return learned_scale.learned_fake_quantize(meta(*shape, dtype=dtype), grid, "megengine")


CASES = (
    *(
        CodegenCase(
            f"learned_backward/{layout} {method}",
            _learned_scale(layout, method),
            "learned_backward_kernel",
            2,
            1,
            budget,
        )
        for layout, method, budget in (
            ("flat", "torch", "two reads, one write, two sums"),
            ("channels last", "torch", "two reads, one write, two sums"),
            ("weight", "tqt", "true division"),
            ("flat", "pact", "two reads, one write, two sums"),
        )
    ),
    CodegenCase("clip_then_round/channels first", _clip_then_round, "clip_then_round_kernel", 1, 1, "true division"),
)
