"""Code-generation cases of convolutions of 8-bit codes."""

from __future__ import annotations

import torch

from tritonq.kernels import int8_conv
from tritonq.perf.codegen_case import Call, CodegenCase, meta


def conv(channels: int, groups: int, out_dtype: torch.dtype, wide: bool = False) -> Call:
    """Return a call of a 3×3 convolution of codes to 128 channels; with ``wide`` it saturates 64-bit sums."""

    def call(dtype: torch.dtype) -> object:
        x = meta(8, channels, 28, 28, dtype=dtype, channels_last=True)
        weight = meta(128, channels // groups, 3, 3, dtype=torch.int8, channels_last=groups == 1)
        bias, shift = meta(128, dtype=torch.int32), meta(128, dtype=torch.int32)
        saturated = meta(1, dtype=torch.int64) if wide else None
        codes = out_dtype != torch.int32
        arguments = ((1, 1), (1, 1), (1, 1), groups, 0, 255, out_dtype, saturated)
        return int8_conv.int8_conv2d(x, weight, bias, shift if codes else None, *arguments)

    return call


def _conv_case(name: str, call: Call, dtypes: tuple[torch.dtype, ...] = (torch.uint8, torch.int8)) -> CodegenCase:
    # Products are bound by the matrix units, not by instructions per element: checked for spills alone.
    return CodegenCase(f"int8_conv/{name}", call, dtypes=dtypes)


CASES = (
    _conv_case("128 channels to codes", conv(128, 1, torch.uint8)),
    _conv_case("3 channels to codes", conv(3, 1, torch.uint8)),
    _conv_case("to accumulators", conv(128, 1, torch.int32)),
    _conv_case("saturating", conv(128, 1, torch.uint8, wide=True), (torch.uint8,)),
    _conv_case("depthwise", conv(128, 128, torch.uint8)),
)
