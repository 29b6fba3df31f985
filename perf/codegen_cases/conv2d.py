"""Code-generation cases of the folded convolution: its operands' dtypes, shapes and epilogues."""

from __future__ import annotations

import torch

from tritonq.kernels import conv2d
from tritonq.perf.codegen_case import DTYPES, Call, CodegenCase, meta, meta_grid
from tritonq.quantized_type import QINT8, QUINT8

# Of ReLU6: a plain ReLU compiles to less.
_CEILING = 6.0


def _values(
    channels: int, kernel: int, groups: int = 1, *, outs: int = 128, size: int = 28, channels_last: bool = True
) -> Call:
    def call(dtype: torch.dtype) -> object:
        x = meta(8, channels, size, size, dtype=dtype, channels_last=channels_last)
        weight = meta(outs, channels // groups, kernel, kernel, dtype=dtype, channels_last=channels_last)
        geometry = ((1, 1), (kernel // 2, kernel // 2), (1, 1), groups)
        return conv2d.conv2d(x, weight, meta(outs, dtype=dtype), *geometry, _CEILING, meta_grid(QUINT8))

    return call


def _codes(channels: int, groups: int = 1, kernel: int = 3) -> Call:
    def call(dtype: torch.dtype) -> object:
        codes = meta(8, channels, 28, 28, dtype=torch.float16, channels_last=True)
        weight = meta(128, channels // groups, kernel, kernel, dtype=torch.float16, channels_last=True)
        bias, multiplier = meta(128, dtype=torch.int32), meta(128, dtype=torch.float32)
        end = (bias, multiplier, meta_grid(QINT8), dtype, (1, 1), (kernel // 2, kernel // 2), (1, 1), groups)
        return conv2d.integer_conv2d(codes, weight, *end, _CEILING, meta_grid(QINT8))

    return call


def _case(name: str, call: Call, dtypes: tuple[torch.dtype, ...] = DTYPES) -> CodegenCase:
    # A product is bound by its matrix units, not by instructions per element: checked for spills alone.
    return CodegenCase(f"conv2d/{name}", call, dtypes=dtypes)


_BRIEF = (torch.float32, torch.bfloat16)

CASES = (
    _case("3x3", _values(128, 3)),
    _case("3x3 channels first", _values(128, 3, channels_last=False), _BRIEF),
    _case("1x1", _values(256, 1), _BRIEF),
    _case("7x7 stem", _values(3, 7, outs=64, size=112), _BRIEF),
    _case("3x3 grouped", _values(128, 3, 32), _BRIEF),
    _case("3x3 depthwise", _values(128, 3, 128), _BRIEF),
    _case("3x3 codes", _codes(128), _BRIEF),
    _case("1x1 codes, sums in float32", _codes(256, kernel=1), (torch.float32,)),
    _case("3x3 codes depthwise", _codes(128, 128), (torch.float32,)),
)
