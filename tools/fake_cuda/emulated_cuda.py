"""A CUDA device made of three parts: the runtime of `build.py`, the operators of `device.py`, the tests' emulator."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from device import CudaOnCpu

from emulator import EmulatedGpu, compiled_for  # type: ignore[import-not-found]


class EmulatedCuda(EmulatedGpu):  # type: ignore[misc]
    """Triton's driver, for tensors on ``cuda:0``."""

    def get_active_torch_device(self) -> torch.device:
        """Return ``cuda:0``, on which Triton then works."""
        return torch.device("cuda", 0)


@contextmanager
def cuda_without_gpu(architecture: int = 90, device: CudaOnCpu | None = None) -> Iterator[EmulatedCuda]:
    """Let CUDA tensors work in the block.

    Kernels run in the emulator, compiled for ``architecture``, the rest on the CPU.
    """
    # cuDNN has no GPU to ask; torch's other convolutions are the CPU's here.
    with torch.backends.cudnn.flags(enabled=False):
        gpu = EmulatedCuda(architecture)
        with compiled_for(gpu), device or CudaOnCpu():
            yield gpu
