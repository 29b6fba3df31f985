"""Rows of `use_backend("compiled")`: what a case times, with operators that are compiled for this CPU."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

from torch import Tensor

from tritonq.compiled.build import obstacle
from tritonq.perf.case import Implementation, Inputs, Step


def compiled_rows(builds: Mapping[str, Callable[[Inputs], Step]]) -> dict[str, Implementation]:
    """Return an implementation for each named step of tritonq; none where no C++ can be compiled."""
    if obstacle() is not None:
        return {}
    return {
        name: Implementation(partial(_compiled, build), distribution="tritonq", module="tritonq", devices=("cpu",))
        for name, build in builds.items()
    }


def _compiled(build: Callable[[Inputs], Step], inputs: Inputs) -> Step:
    import tritonq

    with tritonq.use_backend("compiled"):
        step = build(inputs)

    def compiled(inputs: Inputs) -> tuple[Tensor, ...]:
        with tritonq.use_backend("compiled"):
            return step(inputs)

    return compiled
