"""Whether a CPU's float32 convolutions are sums of products, which are exact for small integers."""

from __future__ import annotations

import platform

import torch


def cpu_is_direct() -> bool:
    """Whether a CPU's float32 convolutions are sums of products: oneDNN's on x86.

    NNPACK (its replacement when switched off) and Arm's libraries may choose Winograd, which rounds.
    """
    on_x86 = platform.machine() in ("x86_64", "AMD64")
    return on_x86 and torch.backends.mkldnn.is_available() and bool(torch.backends.mkldnn.enabled)
