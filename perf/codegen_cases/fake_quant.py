"""Code-generation cases of fake quantization."""

from __future__ import annotations

import torch

from tritonq.grid import Grid
from tritonq.kernels import fake_quant
from tritonq.perf.codegen_case import LAYOUTS, Call, CodegenCase, meta, meta_qparams
from tritonq.quantized_type import QUINT8, QuantizedType, Rounding


def _to_floats(layout: str) -> Call:
    shape, channels_last, axis = LAYOUTS[layout]

    def call(dtype: torch.dtype) -> object:
        x = meta(*shape, dtype=dtype, channels_last=channels_last)
        grid = Grid(meta_qparams(shape, axis)[0], None, QuantizedType.of_floats("e4m3", axis))
        fake_quant.fake_quantize_backward(torch.empty_like(x), x, grid)
        return fake_quant.fake_quantize(x, grid)

    return call


def _fake_quantize(layout: str, *, rounding: Rounding = "half_even", switched: bool = False) -> Call:
    shape, channels_last, axis = LAYOUTS[layout]

    def call(dtype: torch.dtype) -> object:
        x = meta(*shape, dtype=dtype, channels_last=channels_last)
        active = meta(1, dtype=torch.uint8) if switched else None
        qtype = QuantizedType(0, 255, False, axis, rounding)
        return fake_quant.fake_quantize(x, Grid(*meta_qparams(shape, axis), qtype, active))

    return call


def _fake_quantize_backward(layout: str) -> Call:
    shape, channels_last, axis = LAYOUTS[layout]

    def call(dtype: torch.dtype) -> object:
        x = meta(*shape, dtype=dtype, channels_last=channels_last)
        grid = Grid(*meta_qparams(shape, axis), QUINT8.with_axis(axis))
        return fake_quant.fake_quantize_backward(torch.empty_like(x), x, grid)

    return call


CASES = (
    tuple(
        CodegenCase(
            f"fake_quantize/{layout}", _fake_quantize(layout), "fake_quantize_kernel", 1, 1, "one read, one write"
        )
        for layout in LAYOUTS
    )
    + tuple(
        CodegenCase(
            f"fake_quantize_backward/{layout}",
            _fake_quantize_backward(layout),
            "fake_quantize_backward_kernel",
            2,
            1,
            "two reads, one write",
        )
        for layout in ("flat", "channels first", "channels last")
    )
    + (
        CodegenCase(
            "fake_quantize/flat switched",
            _fake_quantize("flat", switched=True),
            "fake_quantize_kernel",
            1,
            1,
            "one read, one write",
        ),
        CodegenCase(
            "fake_quantize/flat half_away",
            _fake_quantize("flat", rounding="half_away"),
            "fake_quantize_kernel",
            1,
            1,
            "true division",
        ),
        *(
            CodegenCase(
                f"fake_quantize/{layout} to floats",
                _to_floats(layout),
                "fake_quantize_kernel",
                1,
                1,
                "rounding to floats",
            )
            for layout in ("flat", "channels last")
        ),
    )
)
