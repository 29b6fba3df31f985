"""Code-generation cases of blocks of small floats."""

from __future__ import annotations

import torch

from tritonq.formats import BLOCK_FORMATS
from tritonq.kernels import float_blocks
from tritonq.perf.codegen_case import LAYOUTS, Call, CodegenCase, meta


def _blocks(layout: str, format: str) -> Call:
    shape, channels_last, _ = LAYOUTS[layout]

    def call(dtype: torch.dtype) -> object:
        x = meta(*shape, dtype=dtype, channels_last=channels_last)
        blocks = BLOCK_FORMATS[format]
        return float_blocks.fake_quantize_blocks(x, blocks, 1, meta() if blocks.scale == "e4m3" else None)

    return call


CASES = tuple(
    CodegenCase(
        f"fake_quantize_blocks/{layout} {format}",
        _blocks(layout, format),
        "fake_quantize_blocks_kernel",
        1,
        1,
        "blocks of floats",
    )
    for layout in ("channels first", "channels last")
    for format in ("mxfp8", "nvfp4")
)
