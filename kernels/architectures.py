"""The GPU architectures that the kernels' machine code is tested for."""

from __future__ import annotations

import warnings
from functools import cache

# Every kernel is compiled for these in the tests: registers, spills, width of accesses, instructions.
TESTED = ("cuda:80", "cuda:90", "cuda:100", "hip:gfx942")


@cache
def warn_if_untested(architecture: str) -> None:
    """Warn (UserWarning), once per process and architecture, if no test compiles the kernels for ``architecture``.

    ``architecture`` is backend and chip: ``"cuda:90"`` is NVIDIA's compute capability 9.0, ``"hip:gfx942"`` an AMD GPU.
    """
    if architecture not in TESTED:
        warnings.warn(
            f"no test compiles tritonq's kernels for {architecture} (tested: {', '.join(TESTED)}): run the operators' "
            "tests here by `python -m tritonq.perf.gpu --parts smoke,tests`, and report what fails",
            stacklevel=2,
        )
