"""Code-generation cases of running ranges."""

from __future__ import annotations

from dataclasses import replace

import torch

from tritonq.grid import Grid
from tritonq.kernels import min_max
from tritonq.perf.codegen_case import LAYOUTS, Call, CodegenCase, meta, meta_qparams, meta_range
from tritonq.qparams import RangeRule
from tritonq.quantized_type import QINT8, QUINT8, QuantizedType


def _observe(layout: str, qtype: QuantizedType, rule: RangeRule) -> Call:
    shape, channels_last, axis = LAYOUTS[layout]

    def call(dtype: torch.dtype) -> None:
        x = meta(*shape, dtype=dtype, channels_last=channels_last)
        typed = qtype.with_axis(axis)
        statistics = replace(meta_range(typed, 1 if axis is None else shape[axis]), rule=rule)
        min_max.observe(x, statistics, Grid(*meta_qparams(shape, axis), typed))

    return call


CASES = (
    CodegenCase("observe/flat", _observe("flat", QUINT8, "torch"), "observe_kernel", 1, 0, "one read"),
    CodegenCase("observe/weight", _observe("weight", QINT8, "torch"), "observe_kernel", 1, 0, "one read"),
    CodegenCase(
        "observe/channels last", _observe("channels last", QINT8, "megengine"), "observe_kernel", 1, 0, "one read"
    ),
    CodegenCase(
        "observe/flat torch_v1",
        _observe("flat", QINT8, "torch_v1"),
        "observe_kernel",
        1,
        0,
        "one read",
        (torch.float32,),
    ),
)  # fmt: skip
