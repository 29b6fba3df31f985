"""Constants of device code that several kernels share."""

from __future__ import annotations

import triton.language as tl

INF = tl.constexpr(float("inf"))
# A running magnitude of more than so many times the batch's was an outlier's; `reference/min_max.py` has it too.
FALL = tl.constexpr(100.0)
