"""Code-generation report: compile every kernel for GPUs that are not here, and read what came out.

    python -m tritonq.perf.codegen [--json FILE] [--kernel NAME] [--target cuda:90]

For each kernel, dtype, layout and target: registers, spills, shared memory, width of global accesses, instructions per
element, and the share of a GPU's issue slots that the kernel takes when memory is the limit. Exits with 1 when a kernel
spills, exceeds its budget, or reads contiguous data by less than 128 bits at a time.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from tritonq.perf.codegen_case import CodegenCase
from tritonq.perf.codegen_cases import all_cases
from tritonq.perf.disassembly import main_path, parse_amdgcn, parse_sass

TARGETS = {
    "cuda:80": GPUTarget("cuda", 80, 32),
    "cuda:90": GPUTarget("cuda", 90, 32),
    "cuda:100": GPUTarget("cuda", 100, 32),
    "hip:gfx942": GPUTarget("hip", "gfx942", 64),
}
ALL_CASES = all_cases()
BUDGET_FILE = Path(__file__).with_name("codegen_budget.json")
_CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


@dataclass(frozen=True)
class Gpu:
    """A GPU's rates: instructions of lanes that it issues per second, and bytes that it moves.

    Every multiprocessor of these generations issues one instruction per clock from each of its four schedulers, for the
    32 lanes of a warp (NVIDIA CUDA C++ Programming Guide, compute capabilities 8.0, 9.0, 10.0).
    """

    name: str
    target: str
    multiprocessors: int
    clock: float
    bandwidth: float

    def issue_share(self, instructions: float, bytes_moved: float) -> float:
        """Return the time to issue the instructions of one element, over the time in which memory moves its bytes.

        Above 1 instructions limit the kernel, below 1 memory does.
        """
        lane_instructions_per_second = self.multiprocessors * self.clock * 4 * 32
        return (instructions / lane_instructions_per_second) / (bytes_moved / self.bandwidth)


# Multiprocessors, boost clock (Hz) and memory bandwidth (bytes/s) from NVIDIA's data sheets and architecture papers of
# the A100 80 GB SXM, the H100 SXM, the H200 SXM and the B200 SXM.
GPUS = (
    Gpu("A100", "cuda:80", 108, 1.41e9, 2.039e12),
    Gpu("H100", "cuda:90", 132, 1.98e9, 3.35e12),
    Gpu("H200", "cuda:90", 132, 1.98e9, 4.8e12),
    Gpu("B200", "cuda:100", 148, 1.965e9, 8.0e12),
)


@dataclass(frozen=True)
class Row:
    """One compiled kernel.

    Attributes:
        case: name of the case.
        kernel: name of the kernel.
        dtype: of the data, ``"float32"``.
        target: key of ``TARGETS``.
        registers: per lane.
        spill_bytes: registers kept in memory, per lane.
        shared_bytes: per program.
        access_bits: width of the accesses that move most of the data, on the main path.
        wide_share: part of the data that moves by accesses of the case's width; None for small kernels, as are the next
            three.
        instructions: per element.
        budget: what is allowed per element on the budget's target, else None.
        issue_share: GPU name to issue slots over memory time; below 1 memory is the limit.
    """

    case: str
    kernel: str
    dtype: str
    target: str
    registers: int
    spill_bytes: int
    shared_bytes: int
    access_bits: int
    wide_share: float | None = None
    instructions: float | None = None
    budget: float | None = None
    issue_share: dict[str, float] | None = None

    def faults(self) -> list[str]:
        """Return the budgets and limits that the row breaks, one sentence each; see :func:`allowance`."""
        place = f"{self.case} {self.dtype} {self.target} ({self.kernel})"
        found, allowed = [], allowance(triton.__version__)
        if self.spill_bytes > allowed.spill_bytes:
            found.append(f"{place}: spills {self.spill_bytes} bytes")
        if self.wide_share is not None and self.wide_share < 1:
            found.append(f"{place}: only {self.wide_share:.0%} moves by 128-bit accesses, or the widest of its rows")
        most = None if self.budget is None else self.budget * allowed.instructions
        if most is not None and self.instructions is not None and self.instructions > most:
            found.append(f"{place}: {self.instructions:.1f} instructions per element, budget {self.budget:g}")
        return found


class Allowance(NamedTuple):
    """What a version of Triton may take.

    Attributes:
        spill_bytes: per lane, in any kernel.
        instructions: per element, as a multiple of the budget.
    """

    spill_bytes: int
    instructions: float


@cache
def allowance(version: str) -> Allowance:
    """Return what Triton ``version`` may take: nothing beyond the budgets if they were made with it, else a little."""
    budgets = json.loads(BUDGET_FILE.read_text())
    if version.startswith(budgets["triton"]):
        return Allowance(0, 1.0)
    others = budgets["other tritons"]
    return Allowance(others["spill_bytes"], others["instructions"])


class Launch(NamedTuple):
    """One launch that was compiled.

    Attributes:
        function: the kernel's source.
        kwargs: its keyword arguments, launch options included.
        kernel: what it was compiled to.
        grid: programs along each axis.
        elements: of the largest tensor among its arguments.
    """

    function: JITFunction[Any]
    kwargs: dict[str, Any]
    kernel: Any
    grid: tuple[int, ...]
    elements: int


class _AbsentGpu:
    """Stands in for Triton's driver: it names the target that kernels are compiled for, and can't launch."""

    def __init__(self, name: str) -> None:
        self.name = name

    def get_current_target(self) -> GPUTarget:
        return TARGETS[self.name]

    def get_current_device(self) -> str:
        # Triton keys its compiled kernels by this.
        return self.name

    def get_current_stream(self, device: str) -> int:
        return 0


@contextmanager
def compiling_for(target: str) -> Iterator[list[Launch]]:
    """Let launches inside the block compile for ``target`` and run nothing; yield the list that they are added to."""
    launched: list[Launch] = []
    compile_or_launch = JITFunction.run

    def compile_only(self: JITFunction[Any], *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = compile_or_launch(self, *args, grid=grid, warmup=True, **kwargs)
        elements = max((value.numel() for value in args if isinstance(value, torch.Tensor)), default=0)
        launched.append(Launch(self, kwargs, kernel, grid, elements))
        return kernel

    before = driver._active
    driver.set_active(_AbsentGpu(target))
    try:
        with patch.object(JITFunction, "run", compile_only):
            yield launched
    finally:
        driver._active = before


def rows(
    cases: Iterable[CodegenCase] = ALL_CASES,
    targets: Iterable[str] = tuple(TARGETS),
    dtypes: Collection[torch.dtype] | None = None,
) -> Iterator[Row]:
    """Compile each case for each target and each of its dtypes (of those in ``dtypes``); describe what it launches."""
    budgets = json.loads(BUDGET_FILE.read_text())
    for case in cases:
        for dtype in (d for d in case.dtypes if dtypes is None or d in dtypes):
            for target in targets:
                with compiling_for(target) as launched:
                    case.call(dtype)
                for launch in launched:
                    name = launch.function.__name__
                    yield _describe(case, dtype, target, name, launch.kwargs, launch.kernel, budgets)


def _describe(
    case: CodegenCase,
    dtype: torch.dtype,
    target: str,
    name: str,
    kwargs: dict[str, Any],
    kernel: Any,
    budgets: dict[str, Any],
) -> Row:
    is_cuda = TARGETS[target].backend == "cuda"
    registers, spill_bytes, instructions = read_cuda(kernel) if is_cuda else _read_hip(kernel)
    path = main_path(instructions)
    dtype_name = str(dtype).removeprefix("torch.")
    common = (case.name, name, dtype_name, target, registers, spill_bytes, kernel.metadata.shared, path.usual_width())
    if name != case.kernel:
        return Row(*common)
    bits = 8 * dtype.itemsize
    if path.is_loop:
        elements = path.bits(stores=False) / (bits * case.reads)
        expected = path.bits(stores=False) + path.bits(stores=True)
    else:
        # A tile, or a block of a kernel that sees a tensor as one row.
        tile = kwargs["BLOCK"] if "BLOCK" in kwargs else kwargs["ROWS"] * kwargs["COLS"]
        elements = tile / (TARGETS[target].warp_size * kwargs["num_warps"])
        expected = elements * bits * (case.reads + case.writes)
    per_element = len(path.instructions) / elements
    return Row(
        *common,
        wide_share=path.bits_of_width(case.width) / expected,
        instructions=per_element,
        budget=budgets["budgets"][case.budget][dtype_name] if target == budgets["target"] else None,
        issue_share={
            gpu.name: gpu.issue_share(per_element, dtype.itemsize * (case.reads + case.writes))
            for gpu in GPUS
            if gpu.target == target
        },
    )


def read_cuda(kernel: Any) -> tuple[int, int, list[Any]]:
    """Return registers, spilled bytes and instructions of a compiled CUDA kernel, all per lane."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(kernel.asm["cubin"])
        cubin.flush()
        usage = _dump("-res-usage", cubin.name)
        instructions = parse_sass(_dump("-sass", cubin.name))
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"cuobjdump printed no resource usage: {usage!r}")
    spilled = sum(i.spills for i in instructions) // 8
    return int(found.group(1)), max(spilled, int(found.group(2))), instructions


def _read_hip(kernel: Any) -> tuple[int, int, list[Any]]:
    """Return registers, spilled bytes and instructions of a compiled HIP kernel.

    Scalar registers that move into lanes of a vector register count as instructions, not as spills: no memory is read.
    Those that go on into memory are part of the private segment, as everything is that does.
    """
    text = kernel.asm["amdgcn"]
    values = {
        key: int(re.search(rf"\.{key}:\s+(\d+)", text).group(1))  # type: ignore[union-attr]
        for key in ("vgpr_count", "vgpr_spill_count", "private_segment_fixed_size")
    }
    spilled = max(4 * values["vgpr_spill_count"], values["private_segment_fixed_size"])
    return values["vgpr_count"], spilled, parse_amdgcn(text)


def _dump(*arguments: str) -> str:
    return subprocess.run([str(_CUOBJDUMP), *arguments], capture_output=True, text=True, check=True).stdout


def table(report: Iterable[Row]) -> str:
    """Return the report as aligned text."""
    lines = [
        f"{'case':<40}{'kernel':<31}{'dtype':<10}{'target':<12}{'regs':>5}{'spill':>6}{'shared':>7}{'bits':>5}"
        f"{'inst/el':>9}{'budget':>8}  limit"
    ]
    for row in report:
        count = "" if row.instructions is None else f"{row.instructions:.1f}"
        budget = "" if row.budget is None else f"{row.budget:g}"
        limits = [
            f"{gpu}: {'memory' if share < 1 else 'issue'} ({share:.0%} of issue slots)"
            for gpu, share in (row.issue_share or {}).items()
        ]
        lines.append(
            f"{row.case:<40}{row.kernel:<31}{row.dtype:<10}{row.target:<12}{row.registers:>5}{row.spill_bytes:>6}"
            f"{row.shared_bytes:>7}{row.access_bits:>5}{count:>9}{budget:>8}  {', '.join(limits)}"
        )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Compile, print the table or write it as JSON, and return the exit status: 1 if a row breaks a budget or limit."""
    parser = argparse.ArgumentParser(description="What the kernels compile to, on GPUs that need not be present.")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the report there")
    parser.add_argument("--kernel", default="", metavar="NAME", help="only cases whose name contains NAME")
    parser.add_argument("--target", action="append", choices=list(TARGETS), help="only this target (may be repeated)")
    options = parser.parse_args(arguments)
    cases = [case for case in ALL_CASES if options.kernel in case.name]
    if not cases:
        parser.error(f"no case is called {options.kernel!r}; known: {', '.join(case.name for case in ALL_CASES)}")
    if knobs.runtime.interpret:
        parser.error("unset TRITON_INTERPRET: an interpreting process cannot compile")
    report = list(rows(cases, options.target or TARGETS))
    print(table(report))
    if options.json:
        content = {"triton": triton.__version__, "rows": [asdict(row) for row in report]}
        options.json.write_text(json.dumps(content, indent=1) + "\n")
    faults = [fault for row in report for fault in row.faults()]
    print("\n".join(faults), file=sys.stderr, end="\n" if faults else "")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
