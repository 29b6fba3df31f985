"""Histogram observers: one observation, and one observation with the search for the range."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from tritonq.perf.case import Case, Implementation, Inputs, Step, Tolerance
from tritonq.perf.cases.compiled_code import compiled_rows

_BINS = 2048
_EXTREMES = Tolerance("the extremes of a batch are exact, however it is counted")
_SCALE = Tolerance(
    "each searches its own histogram with its own measure of error; the range of all values, without a search, would "
    "be at a distance of 0.2 or more",
    distance=0.1,
)

# A bit cast, a shift and a count.
_OPERATIONS = 3

_CPU_SHAPES = ((16, 64, 56, 56), (16, 64, 24, 24))
_CUDA_SHAPES = ((256, 64, 64, 64), (256, 64, 56, 56), (256, 2048, 7, 7))


def cases() -> Iterator[Case]:
    """Yield activations of a CNN, with and without a search."""
    for shape in (*_CPU_SHAPES, *_CUDA_SHAPES):
        devices = ("cpu", "cuda") if shape in _CPU_SHAPES else ("cuda",)
        for search in (False, True):
            yield _case(shape, torch.float32, search, devices, quick=search and shape == _CPU_SHAPES[0])
        yield _case(shape, torch.bfloat16, False, devices, quick=False)


def _case(shape: tuple[int, ...], dtype: torch.dtype, search: bool, devices: tuple[str, ...], quick: bool) -> Case:
    what = "observe+search" if search else "observe"
    return Case(
        name=f"histogram/{what}/{'x'.join(map(str, shape))}/{str(dtype).removeprefix('torch.')}",
        family="histogram",
        make_inputs=partial(_make_inputs, shape, dtype),
        reference=_best_scale if search else _extremes,
        implementations={
            "tritonq": Implementation(partial(_step, _tritonq, search), distribution="tritonq", module="tritonq"),
            **compiled_rows({"tritonq, compiled": partial(_step, _tritonq, search)}),
            "torch.ao": Implementation(partial(_step, _torch_ao, search)),
        },
        baseline="torch.ao",
        bytes_moved=prod(shape) * dtype.itemsize,
        operations=_OPERATIONS * prod(shape),
        tolerance=_SCALE if search else _EXTREMES,
        devices=devices,
        quick=quick,
    )


def _make_inputs(
    shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator, device: torch.device
) -> Inputs:
    """Return normal values ``x``, for which the best 8-bit range is clearly shorter than the range of all values."""
    return {"x": torch.randn(shape, generator=generator, device=device).to(dtype)}


def _step(make: Callable[[], nn.Module], search: bool, inputs: Inputs) -> Step:
    observer: Any = make().to(inputs["x"].device)

    def observe(inputs: Inputs) -> tuple[Tensor, ...]:
        observer(inputs["x"])
        return observer.min_val.float(), observer.max_val.float()

    def observe_and_search(inputs: Inputs) -> tuple[Tensor, ...]:
        observer(inputs["x"])
        return (observer.calculate_qparams()[0].view(1),)

    return observe_and_search if search else observe


def _tritonq() -> nn.Module:
    from tritonq.observers import HistogramObserver

    # torch.ao has one search, which minimises its l2 measure.
    return HistogramObserver(_BINS, dtype=torch.qint8, qscheme=torch.per_tensor_symmetric, search="l2")


def _torch_ao() -> nn.Module:
    from torch.ao.quantization import HistogramObserver

    return HistogramObserver(_BINS, dtype=torch.qint8, qscheme=torch.per_tensor_symmetric)


def _extremes(inputs: Inputs) -> tuple[Tensor, ...]:
    x = inputs["x"].float()
    return x.amin(), x.amax()


def _best_scale(inputs: Inputs) -> tuple[Tensor, ...]:
    """Return the symmetric 8-bit scale with the least squared error on the values, of a hundred candidates."""
    x = inputs["x"].float().flatten()
    widest = x.abs().amax() / 127.5
    candidates = [widest * step / 100 for step in range(40, 101)]
    errors = [((x / s).round().clamp(-128, 127) * s - x).square().mean() for s in candidates]
    return (candidates[int(torch.stack(errors).argmin())].view(1),)
