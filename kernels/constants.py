"""Constants of device code that several kernels share."""

from __future__ import annotations

import triton.language as tl

INF = tl.constexpr(float("inf"))
