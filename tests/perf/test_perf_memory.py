"""What a call allocates at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from tritonq.perf.case import Inputs
from tritonq.perf.memory import peak_cpu_bytes

_MEBIBYTE = 2**20


def test_peak_counts_what_is_held_at_one_time() -> None:
    def step(inputs: Inputs) -> tuple[Tensor, ...]:
        for _ in range(3):
            first = torch.empty(2 * _MEBIBYTE, dtype=torch.uint8)
            del first
        both = torch.empty(3 * _MEBIBYTE, dtype=torch.uint8), torch.empty(4 * _MEBIBYTE, dtype=torch.uint8)
        return (both[0][:1].clone(),)

    kept = torch.empty(64 * _MEBIBYTE, dtype=torch.uint8)
    assert 7 * _MEBIBYTE <= peak_cpu_bytes(step, {"kept": kept}) < 7.1 * _MEBIBYTE
