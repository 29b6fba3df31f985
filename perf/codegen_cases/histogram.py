"""Code-generation cases of histograms."""

from __future__ import annotations

import torch

from tritonq.bins import FloatPrefixBins
from tritonq.kernels import histogram
from tritonq.perf.codegen_case import LAYOUTS, Call, CodegenCase, meta


def _histogram(layout: str) -> Call:
    shape, channels_last, axis = LAYOUTS[layout]

    def call(dtype: torch.dtype) -> None:
        x = meta(*shape, dtype=dtype, channels_last=channels_last)
        bins = FloatPrefixBins()
        channels = () if axis is None else (shape[axis],)
        counts = meta(*channels, bins.count, dtype=torch.int64)
        low, high = meta(*channels, dtype=torch.float32), meta(*channels, dtype=torch.float32)
        nonfinite = torch.empty((), dtype=torch.int64, device="meta")
        histogram.observe(x, counts, low, high, nonfinite, meta(1, dtype=torch.uint8), bins, axis)

    return call


def _linear_histogram(dtype: torch.dtype) -> object:
    return histogram.linear_histogram(meta(*LAYOUTS["flat"][0], dtype=dtype), 256, meta(2))


CASES = (
    *(
        CodegenCase(f"prefix_histogram/{layout}", _histogram(layout), "prefix_histogram_kernel", 1, 0, "histogram")
        for layout in ("flat", "weight")
    ),
    # One atomic addition per value: checked for spills alone.
    CodegenCase("linear_histogram/flat", _linear_histogram, dtypes=(torch.float32,)),
)
