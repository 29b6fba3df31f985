"""Whether a CPU's float32 convolutions are plain sums of products: these are exact for small integers."""

from __future__ import annotations

import platform

import torch


def cpu_is_direct() -> bool:
    """Whether float32 convolutions on this CPU are plain sums of products, exact for small integers.

    That is so on x86 while oneDNN is on (``torch.backends.mkldnn.enabled``). NNPACK (used if oneDNN is off) and Arm's
    libraries may choose Winograd's algorithm, which rounds.
    """
    on_x86 = platform.machine() in ("x86_64", "AMD64")
    return on_x86 and torch.backends.mkldnn.is_available() and bool(torch.backends.mkldnn.enabled)
