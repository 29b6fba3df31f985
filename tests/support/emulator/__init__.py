"""An emulator of the PTX that Triton compiles: launches of compiled kernels run on CPU tensors, without a GPU.

All threads of a launch run side by side, each register a NumPy array over them. What runs is checked:

- every global and shared access lies inside a tensor of the launch (or the block's shared memory) and is aligned;
- every thread of a block arrives at the same barrier;
- no two warps of a block, and no two blocks, touch a location between barriers unless both only read it, or no order
  of the warps changes the result.

Time, caches, the order of float atomics and ``wgmma`` are not emulated; matrix kernels are compiled for sm_80 instead.

Read `ptx` first, then `machine`, which the other files plug their instructions into; `driver` stands behind Triton.
Instructions as in NVIDIA's PTX ISA, version 8.7.
"""

from emulator.driver import EmulatedGpu, compiled_for, emulated
from emulator.faults import EmulatorError
from emulator.launch import run
from emulator.memory import GlobalMemory
from emulator.ptx import Program
from emulator.threads import Launch

__all__ = ["EmulatedGpu", "EmulatorError", "GlobalMemory", "Launch", "Program", "compiled_for", "emulated", "run"]
