"""Fake quantization alone: given scale and zero point, per tensor and per channel, forward and backward."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod

import torch

from tritonq.perf.case import Case, Tolerance
from tritonq.perf.cases.fake_quant_inputs import FakeQuantization
from tritonq.perf.cases.fake_quant_peers import implementations

_EXACT = Tolerance("same float32 arithmetic in the same order, rounded once: equal bit for bit")

# round, clamp, two products, and for the backward a comparison and a product.
_FORWARD_OPERATIONS, _BACKWARD_OPERATIONS = 5, 6


class Problem(FakeQuantization):
    """A fake quantization, as a benchmark case."""

    def case(self, *, quick: bool, devices: tuple[str, ...]) -> Case:
        """Return the case; least traffic: forward reads x and writes y, backward reads x and dy and writes dx."""
        elements = prod(self.shape)
        passes = 5 if self.backward else 2
        operations = _FORWARD_OPERATIONS + (_BACKWARD_OPERATIONS if self.backward else 0)
        return Case(
            name=self.name,
            family="fake_quant",
            make_inputs=self.make_inputs,
            reference=self.reference,
            implementations=implementations(self),
            baseline="torch",
            bytes_moved=passes * elements * self.dtype.itemsize,
            operations=operations * elements,
            tolerance=_EXACT,
            devices=devices,
            quick=quick,
        )


_SMALL = (64, 64)
_QUICK = (16, 64, 24, 24)
_CPU_ACTIVATIONS = ((32, 64, 56, 56), (32, 2048, 7, 7))
_CUDA_ACTIVATIONS = ((256, 64, 56, 56), (256, 2048, 7, 7), (256, 64, 64, 64))
_WEIGHTS = ((64, 3, 7, 7), (128, 128, 3, 3), (512, 512, 3, 3), (2048, 512, 1, 1))
_DTYPES = (torch.float32, torch.bfloat16)
_BOTH = ("cpu", "cuda")


def cases() -> Iterator[Case]:
    """Yield small tensors, weights and activations, in both layouts and dtypes, forward and with backward."""
    for backward in (False, True):
        for dtype in _DTYPES:
            yield from _for_grid(dtype, backward)


def _for_grid(dtype: torch.dtype, backward: bool) -> Iterator[Case]:
    quick = dtype == torch.float32
    for axis in (None, 0):
        yield Problem(_SMALL, dtype, axis, False, backward).case(quick=quick and axis is None, devices=_BOTH)
    for shape in _WEIGHTS:
        problem = Problem(shape, dtype, 0, False, backward, quant_min=-127)
        yield problem.case(quick=quick and shape == _WEIGHTS[-1], devices=_BOTH)
    for axis in (None, 1):
        for channels_last in (False, True):
            yield Problem(_QUICK, dtype, axis, channels_last, backward).case(
                quick=quick and not channels_last, devices=_BOTH
            )
            for shape in _CPU_ACTIVATIONS:
                yield Problem(shape, dtype, axis, channels_last, backward).case(quick=False, devices=("cpu",))
            for shape in _CUDA_ACTIVATIONS:
                yield Problem(shape, dtype, axis, channels_last, backward).case(quick=False, devices=("cuda",))
