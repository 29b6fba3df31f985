"""The 8-bit convolution of compiled fixed-point networks, which warns if its accumulators pass 32 bits."""

from __future__ import annotations

import warnings
from typing import Any

from torch import Tensor

from tritonq.backend import implementation


def warning_int8_conv2d(x: Tensor) -> Any:
    """Return a function that convolves 8-bit codes, by the Triton kernel if it runs on ``x``'s device, else by PyTorch.

    The function takes all arguments of `tritonq.reference.int8_conv.int8_conv2d` by keyword, and returns int32
    accumulators or, with ``shift``, codes in ``out_dtype``. It adds the number of accumulators that it clamps to
    ``saturated``; if that is on a CPU, each call that clamps some also emits a RuntimeWarning with their number.
    """

    def run(*, saturated: Tensor | None, **arguments: Any) -> Tensor:
        before = int(saturated) if saturated is not None and saturated.is_cpu else 0
        y: Tensor = implementation("int8_conv", x).int8_conv2d(saturated=saturated, **arguments)
        if saturated is not None and saturated.is_cpu and int(saturated) > before:
            warnings.warn(
                f"{int(saturated) - before} accumulators of a compiled fixed-point network passed 32 bits and were "
                "clamped to ±(2^31 - 1); tritonq.deploy.fixed_point_modules.overflow_report counts them by layer",
                RuntimeWarning,
                stacklevel=2,
            )
        return y

    return run
