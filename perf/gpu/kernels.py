"""Time operators by replays of CUDA graphs, as a share of the copy rate: memory counts, launching does not."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product

import torch

from tritonq.perf.case import Case
from tritonq.perf.cases import all_cases
from tritonq.perf.cases.conv_bn import Tail
from tritonq.perf.cases.fake_quant import Problem
from tritonq.perf.gpu.part import Visit
from tritonq.perf.measure import Budget, captured, copy_bandwidth, input_sets, interleave
from tritonq.perf.stats import Spread

# Each is one operator at the sizes of a ResNet's first and last stage; of every family the goals' shapes come first.
_SHAPES = ("256x64x56x56", "256x512x7x7", "256x2048x7x7", "256x64x64x64")
_FAMILIES = (
    ("conv_bn/tail", "residual", "fake_quant/tensor"),
    ("fake_quant", "observe", "histogram", "learned_scale", "fixed_point"),
)
_DTYPES = ("bfloat16", "float32")
_BUDGET = Budget(seconds=0.15, min_rounds=7, max_rounds=15)
# Compiling, checking against float64 and capturing.
_SECONDS = 4.0
_MAX_SETS = 3


def run(visit: Visit) -> None:
    """Note the copy rate, then one finding per case."""
    copy = copy_bandwidth(visit.device)
    visit.note("copy", gb_per_s=copy.median / 1e9)
    for case in small_cases() if visit.small else chosen(all_cases()):
        if not visit.has_time_for(case.name, 0 if visit.small else _SECONDS):
            break
        with visit.finding(case.name):
            measure(visit, case, copy)


def chosen(cases: Sequence[Case]) -> Iterator[Case]:
    """Yield the cases with bytes to move on a GPU: bfloat16 before float32, families and shapes in the order above."""
    seen = set()
    for dtype, shape, family in _order():
        for case in cases:
            parts = case.name.split("/")
            is_meant = case.name.startswith(family) and dtype in parts and shape in parts
            if is_meant and case.name not in seen and "cuda" in case.devices and case.bytes_moved:
                seen.add(case.name)
                yield case


def _order() -> Iterator[tuple[str, str, str]]:
    for dtype, families in product(_DTYPES, _FAMILIES):
        for shape, family in product(_SHAPES, families):
            yield dtype, shape, family


def small_cases() -> tuple[Case, ...]:
    """Return small cases for a trial without a GPU."""
    return (
        Tail((2, 8, 6, 6), torch.float32, True, ("cpu", "cuda")).case(),
        Problem((4, 8, 6, 6), torch.float32, 1, True, True).case(quick=True, devices=("cpu", "cuda")),
    )


def measure(visit: Visit, case: Case, copy: Spread) -> None:
    """Check the operator, capture it over as many inputs as leave the cache, and time replays."""
    sets = input_sets(case.make_inputs, visit.device)[:_MAX_SETS]
    implementation = case.implementations["tritonq"]
    step = implementation.build(sets[0])
    difference = implementation.check(step, sets[0], case.reference(sets[0]), case.tolerance)
    if difference is not None:
        visit.note(case.name, "wrong", difference=difference)
        return
    if visit.device.type == "cuda":
        seconds = interleave({"ours": captured(step, sets)}, [{}], visit.device, _BUDGET)["ours"]
        seconds = [value / len(sets) for value in seconds]
    else:
        seconds = interleave({"ours": step}, sets, visit.device, Budget(0.0, min_rounds=1, max_rounds=1))["ours"]
    spread = Spread.of(seconds)
    share = case.bytes_moved / spread.median / copy.median
    visit.note(case.name, us=spread.median * 1e6, share_of_copy=share, mb_moved=case.bytes_moved / 1e6)
