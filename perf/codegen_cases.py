"""What the code-generation report compiles: launchers called on meta tensors, exactly as a GPU call would launch them.

A kernel family adds its cases to ``CASES``, or to a module of its own that `tritonq.perf.codegen` collects. Strides,
sizes and alignments come from the tensors, tiles from the same functions that choose them on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tritonq.bins import FloatPrefixBins
from tritonq.grid import Grid, RangeStatistics
from tritonq.kernels import fake_quant, histogram, learned_scale, min_max
from tritonq.qparams import QINT8, QUINT8, QuantizedType, RangeRule, Rounding

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class CodegenCase:
    """One call of one launcher.

    Attributes:
        name: ``kernel/layout`` with options.
        call: launches on meta tensors of the given dtype.
        kernel: the kernel that moves the data; others of the call are small and only checked for spills. Empty: all of
            them are.
        reads: tensors of the dtype that each element is read from.
        writes: tensors of the dtype that each element is written to.
        budget: entry of ``codegen_budget.json`` that limits its instructions per element.
        dtypes: what to compile it for.
    """

    name: str
    call: Callable[[torch.dtype], object]
    kernel: str
    reads: int
    writes: int
    budget: str
    dtypes: tuple[torch.dtype, ...] = DTYPES


def meta(*shape: int, dtype: torch.dtype, channels_last: bool = False) -> Tensor:
    """A tensor without data."""
    x = torch.empty(shape, dtype=dtype, device="meta")
    return x.to(memory_format=torch.channels_last) if channels_last else x


# A middle activation and weight of ResNet-50: rows of 56 * 56, which no tile divides, and 64 channels.
_ACTIVATION = (64, 64, 56, 56)
_WEIGHT = (512, 512, 3, 3)
# layout: shape, channels_last, axis
_LAYOUTS: dict[str, tuple[tuple[int, ...], bool, int | None]] = {
    "flat": (_ACTIVATION, False, None),
    "channels first": (_ACTIVATION, False, 1),
    "channels last": (_ACTIVATION, True, 1),
    "weight": (_WEIGHT, False, 0),
}


def _qparams(shape: tuple[int, ...], axis: int | None) -> tuple[Tensor, Tensor]:
    channels = (1,) if axis is None else (shape[axis],)
    return meta(*channels, dtype=torch.float32), meta(*channels, dtype=torch.int32)


def _fake_quantize(
    layout: str, *, rounding: Rounding = "half_even", switched: bool = False
) -> Callable[[torch.dtype], object]:
    shape, channels_last, axis = _LAYOUTS[layout]

    def call(dtype: torch.dtype) -> object:
        x = meta(*shape, dtype=dtype, channels_last=channels_last)
        active = meta(1, dtype=torch.uint8) if switched else None
        qtype = QuantizedType(0, 255, False, axis, rounding)
        return fake_quant.fake_quantize(x, Grid(*_qparams(shape, axis), qtype, active))

    return call


def _fake_quantize_backward(layout: str) -> Callable[[torch.dtype], object]:
    shape, channels_last, axis = _LAYOUTS[layout]

    def call(dtype: torch.dtype) -> object:
        x = meta(*shape, dtype=dtype, channels_last=channels_last)
        grid = Grid(*_qparams(shape, axis), QUINT8.with_axis(axis))
        return fake_quant.fake_quantize_backward(torch.empty_like(x), x, grid)

    return call


def _observe(layout: str, qtype: QuantizedType, rule: RangeRule) -> Callable[[torch.dtype], object]:
    shape, channels_last, axis = _LAYOUTS[layout]

    def call(dtype: torch.dtype) -> None:
        x = meta(*shape, dtype=dtype, channels_last=channels_last)
        scale, zero_point = _qparams(shape, axis)
        low, high = torch.empty_like(scale), torch.empty_like(scale)
        count = torch.empty((), dtype=torch.int64, device="meta")
        enabled = meta(1, dtype=torch.uint8)
        typed = qtype.with_axis(axis)
        statistics = RangeStatistics(
            low, high, count, typed.granularity, enabled, averaging_constant=0.01, rule=rule, eps=1e-7
        )
        min_max.observe(x, statistics, Grid(scale, zero_point, typed))

    return call


_FAKE_QUANT = (
    tuple(
        CodegenCase(
            f"fake_quantize/{layout}", _fake_quantize(layout), "fake_quantize_kernel", 1, 1, "one read, one write"
        )
        for layout in _LAYOUTS
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
    )
)

_MIN_MAX = (
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


def _histogram(layout: str) -> Callable[[torch.dtype], object]:
    shape, channels_last, axis = _LAYOUTS[layout]

    def call(dtype: torch.dtype) -> None:
        x = meta(*shape, dtype=dtype, channels_last=channels_last)
        bins = FloatPrefixBins()
        channels = () if axis is None else (shape[axis],)
        counts = meta(*channels, bins.count, dtype=torch.int64)
        low, high = meta(*channels, dtype=torch.float32), meta(*channels, dtype=torch.float32)
        nonfinite = torch.empty((), dtype=torch.int64, device="meta")
        histogram.observe(x, counts, low, high, nonfinite, meta(1, dtype=torch.uint8), bins, axis)

    return call


def _learned_scale(layout: str, method: str) -> Callable[[torch.dtype], object]:
    shape, channels_last, axis = _LAYOUTS[layout]

    def call(dtype: torch.dtype) -> object:
        x = meta(*shape, dtype=dtype, channels_last=channels_last)
        scale, zero_point = _qparams(shape, axis)
        shift = zero_point if method in ("torch", "megengine") else None
        grid = Grid(scale, shift, QUINT8.with_axis(axis))
        return learned_scale.learned_fake_quantize_backward(torch.empty_like(x), x, grid, method)

    return call


_HISTOGRAM = tuple(
    CodegenCase(f"prefix_histogram/{layout}", _histogram(layout), "prefix_histogram_kernel", 1, 0, "histogram")
    for layout in ("flat", "weight")
)

_LEARNED_SCALE = tuple(
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
)

CASES: tuple[CodegenCase, ...] = (*_FAKE_QUANT, *_MIN_MAX, *_HISTOGRAM, *_LEARNED_SCALE)
