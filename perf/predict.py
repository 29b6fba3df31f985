"""Predict the time of every kernel on GPUs that are not here; the predictions are written down before any measurement.

    python -m tritonq.perf.predict            # print the table python -m tritonq.perf.predict --write    # put it into
    perf/PREDICTIONS.md

Ends with status 1 where a reduction keeps fewer bytes in flight than ``codegen_budget.json`` asks for.

The time of a kernel is the longest of three, times what its last, partly filled wave of programs costs, plus the start:

- memory: bytes read and written, at the share of the memory's rate that a copy reaches;
- latency, by Little's law: bytes read, over the bytes in flight divided by the latency of a load. In flight are, on
  each multiprocessor, what a lane loads for each time that it waits, on as many lanes as registers and shared memory
  admit and the launch has;
- issue: instructions of all lanes, at one warp instruction per clock and scheduler.

Source: Little, "A proof for the queuing formula L = λW", 1961; its use for GPUs: Volkov, "Better performance at lower
occupancy", 2010.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from tritonq.perf.codegen import ALL_CASES, BUDGET_FILE, GPUS, Gpu, Launch, compiling_for, read_cuda
from tritonq.perf.codegen_case import CodegenCase
from tritonq.perf.codegen_cases.conv_bn import backward_call, forward_call
from tritonq.perf.disassembly import bytes_per_wait, main_path
from tritonq.perf.goals import GOALS, Goal
from tritonq.quantized_type import QINT8

TABLE = Path(__file__).with_name("PREDICTIONS.md")
TARGET = "cuda:90"

# Assumed, not measured. A load that misses the caches of a busy H100 takes some 600 to 700 ns.
LATENCY = 650e-9
# Of the memory's rate, what a copy reaches.
COPY_SHARE = 0.9
# From one kernel of a CUDA graph to the next.
START = 2e-6

# Per multiprocessor of compute capability 9.0 (NVIDIA CUDA C++ Programming Guide).
_REGISTERS, _LANES, _PROGRAMS, _SHARED_BYTES = 65536, 2048, 32, 233472
# Registers are given out by eight to a lane; a program takes a KiB of shared memory besides its own.
_REGISTER_STEP, _SHARED_OVERHEAD = 8, 1024
_WARP = 32
# Goals of Conv-BN's tail, the passes that its two directions make over a tensor, and each kernel's reads and writes.
_TAIL = re.compile(r"conv_bn/tail/([\dx]+)/bfloat16(/channels_last)?/")
_TAIL_PASSES = 8
_TAIL_KERNELS = {
    "statistics_kernel": (1, 0),
    "apply_kernel": (1, 1),
    "gradient_sums_kernel": (2, 0),
    "gradient_kernel": (2, 1),
}
# Constants whose product is the number of elements that a program works on.
_TILES = (("BLOCK",), ("ROWS", "COLS"), ("SPLITS", "CHANNELS"))


@dataclass(frozen=True)
class Work:
    """What the time of one launch depends on.

    Attributes:
        programs: in the grid.
        warps: per program.
        registers: per lane.
        shared_bytes: per program.
        in_flight: bytes that one lane has in flight at a time.
        instructions: of one lane, for one element.
        elements: number of elements.
        bytes_read: from memory.
        bytes_written: to memory.
        joined_channels: number of channels whose partial results one program adds up; 0 for kernels that read the
            tensor.
    """

    programs: int
    warps: int
    registers: int
    shared_bytes: int
    in_flight: float
    instructions: float
    elements: int
    bytes_read: int
    bytes_written: int
    joined_channels: int = 0

    def resident(self, multiprocessors: int) -> int:
        """Return how many programs run on one multiprocessor at a time.

        Registers, shared memory and the number of programs limit it.
        """
        lanes = self.warps * _WARP
        registers = math.ceil(max(self.registers, 1) / _REGISTER_STEP) * _REGISTER_STEP * lanes
        limits = [_REGISTERS // registers, _LANES // lanes, _PROGRAMS, math.ceil(self.programs / multiprocessors)]
        if self.shared_bytes:
            limits.append(_SHARED_BYTES // (self.shared_bytes + _SHARED_OVERHEAD))
        return max(1, min(limits))


@dataclass(frozen=True)
class Prediction:
    """The predicted time of one launch on one GPU.

    Attributes:
        seconds: of the launch, its start included.
        bound: what limits it: ``"memory"``, ``"latency"`` or ``"issue"``.
        share_of_copy: of a copy's bytes per second.
        in_flight_per_multiprocessor: bytes that a multiprocessor has requested and not yet received.
    """

    seconds: float
    bound: str
    share_of_copy: float
    in_flight_per_multiprocessor: float


def predict(work: Work, gpu: Gpu) -> Prediction:
    """Return the predicted time of ``work`` on ``gpu``: the longest of memory, latency and issue."""
    resident = work.resident(gpu.multiprocessors)
    busy = min(gpu.multiprocessors, work.programs)
    in_flight = resident * work.warps * _WARP * work.in_flight
    moved = work.bytes_read + work.bytes_written
    copy_rate = COPY_SHARE * gpu.bandwidth
    times = {
        "memory": moved / copy_rate,
        "latency": work.bytes_read * LATENCY / (in_flight * busy) if in_flight else 0.0,
        "issue": work.instructions * work.elements / (busy * gpu.clock * 4 * _WARP),
    }
    bound = max(times, key=lambda name: times[name])
    waves = work.programs / (resident * busy)
    # Programs of the last wave take as long as a full one, unless memory was the limit: then they have more of it each.
    tail = math.ceil(waves) / waves if bound != "memory" else 1.0
    seconds = times[bound] * tail + START
    return Prediction(seconds, bound, moved / seconds / copy_rate, in_flight)


def predictions(cases: Iterable[CodegenCase] = ALL_CASES) -> Iterator[tuple[str, str, Work]]:
    """Compile each case for sm_90; yield case, dtype and work of the kernel that moves its data.

    If that kernel leaves partial results, the kernel that adds them follows, its name after the case's.
    """
    for case in cases:
        for dtype in (d for d in case.dtypes if d != torch.float16):
            name = str(dtype).removeprefix("torch.")
            with compiling_for(TARGET) as launched:
                case.call(dtype)
            for launch, following in zip(launched, [*launched[1:], None], strict=True):
                if launch.function.__name__ != case.kernel:
                    continue
                yield case.name, name, work_of(launch, dtype, case.reads, case.writes)
                if following is not None and "SPLITS" in following.kwargs:
                    yield f"{case.name}: {following.function.__name__}", name, work_of(following, torch.float32, 1, 0)


def faults(found: Iterable[tuple[str, str, Work]], gpu: Gpu) -> list[str]:
    """Return the demands of ``codegen_budget.json`` on reductions that are not met, one sentence each."""
    budget = json.loads(BUDGET_FILE.read_text())
    least, wide = budget["in_flight"]["kib"], budget["in_flight"]["cases"]
    wrong = []
    for name, dtype, work in found:
        case, _, kernel = name.partition(": ")
        if kernel:
            if work.joined_channels > budget["joining"]["channels"]:
                wrong.append(f"{name} {dtype}: one program joins {work.joined_channels} channels")
        elif case.split("/")[0] in wide and (kib := predict(work, gpu).in_flight_per_multiprocessor / 1024) < least:
            wrong.append(f"{name} {dtype}: {kib:.0f} KiB in flight, the budget asks for {least}")
    return wrong


def work_of(launch: Launch, dtype: torch.dtype, reads: int, writes: int) -> Work:
    """Return what the time of a launch depends on, from its arguments and its machine code.

    Args:
        launch: of one kernel.
        dtype: of the data.
        reads: tensors of the dtype that each element is read from.
        writes: tensors of the dtype that each element is written to.
    """
    registers, _, instructions = read_cuda(launch.kernel)
    path = main_path(instructions)
    warps = launch.kernel.metadata.num_warps
    bits = 8 * dtype.itemsize
    if path.is_loop:
        per_turn = path.bits(stores=False) / (bits * reads)
    else:
        constants = launch.kwargs
        sizes = next(names for names in _TILES if names[0] in constants)
        tile = math.prod(constants[name] for name in sizes)
        per_turn = tile / (_WARP * warps)
    return Work(
        programs=math.prod(launch.grid),
        warps=warps,
        registers=registers,
        shared_bytes=launch.kernel.metadata.shared,
        in_flight=bytes_per_wait(path),
        instructions=len(path.instructions) / per_turn,
        elements=launch.elements,
        bytes_read=launch.elements * dtype.itemsize * reads,
        bytes_written=launch.elements * dtype.itemsize * writes,
        joined_channels=launch.kwargs["CHANNELS"] if "SPLITS" in launch.kwargs else 0,
    )


def tail_shares(shape: tuple[int, ...], channels_last: bool, gpus: Sequence[Gpu]) -> list[float]:
    """Return the share of a copy's rate that Conv-BN's tail reaches in bfloat16, both directions, on each GPU.

    Kernels that do not read the tensor count with their partial results, or with their start alone.
    """
    with compiling_for(TARGET) as launched:
        for call in (forward_call, backward_call):
            call(QINT8, channels_last, shape)(torch.bfloat16)
    seconds = [0.0] * len(gpus)
    for launch in launched:
        reads, writes = _TAIL_KERNELS.get(launch.function.__name__, (1, 0))
        is_large = launch.function.__name__ in _TAIL_KERNELS
        is_timed = is_large or "SPLITS" in launch.kwargs
        work = work_of(launch, torch.bfloat16 if is_large else torch.float32, reads, writes) if is_timed else None
        for i, gpu in enumerate(gpus):
            seconds[i] += START if work is None else predict(work, gpu).seconds
    moved = _TAIL_PASSES * math.prod(shape) * torch.bfloat16.itemsize
    return [moved / spent / (COPY_SHARE * gpu.bandwidth) for spent, gpu in zip(seconds, gpus, strict=True)]


def render_tails(goals: Iterable[Goal], gpus: Sequence[Gpu]) -> str:
    """Return a table of those goals that are shares of a copy's rate by Conv-BN's tail."""
    lines = [
        f"| goal | {' | '.join(f'{gpu.name} of copy' for gpu in gpus)} | measured |",
        "|---" * (len(gpus) + 2) + "|",
    ]
    for goal in goals:
        found = _TAIL.match(goal.case)
        if found is not None:
            shape = tuple(map(int, found[1].split("x")))
            shares = tail_shares(shape, found[2] is not None, gpus)
            lines.append(f"| {goal.says} | {' | '.join(f'{share:.0%}' for share in shares)} | |")
    return "\n".join(lines) + "\n"


def render(found: Iterable[tuple[str, str, Work]], gpus: Sequence[Gpu]) -> str:
    """Return the table in Markdown."""
    names = [gpu.name for gpu in gpus]
    heads = [f"{name} {what}" for name in names for what in ("µs", "of copy", "bound")]
    columns = ["case", "dtype", "programs", "KiB in flight", *heads, "measured"]
    lines = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    for name, dtype, work in found:
        each = [predict(work, gpu) for gpu in gpus]
        cells = [name, dtype, str(work.programs), f"{each[0].in_flight_per_multiprocessor / 1024:.0f}"]
        for prediction in each:
            cells += [f"{prediction.seconds * 1e6:.0f}", f"{prediction.share_of_copy:.0%}", prediction.bound]
        lines.append(f"| {' | '.join([*cells, ''])} |")
    return "\n".join(lines) + "\n"


_HEAD = """# Predictions, written before a GPU has answered

Written by `python -m tritonq.perf.predict --write` from what the kernels compile to for sm_90; see `perf/predict.py`
for the model. Assumed: {latency:.0f} ns per load, {share:.0%} of the memory's rate for a copy, {start:.0f} µs from one
kernel to the next. No number here was measured. `python -m tritonq.perf.gpu --parts kernels` measures the operators on
a GPU; where a kernel is off by more than a quarter, the model or the kernel has something to explain. "KiB in flight"
is per multiprocessor: Little's law asks for {needed}.

"""


_GOALS_HEAD = """
## Goals

The sum of these times over all kernels of Conv-BN's tail, forward and backward. Kernels of a small tensor wait for
their start: a tensor of 256x512x7x7 is 13 MB, which an H200 copies in 6 µs.

"""


def main(argv: list[str] | None = None) -> int:
    """Print the table, or write it."""
    parser = argparse.ArgumentParser(prog="python -m tritonq.perf.predict", description="Predict times of kernels.")
    parser.add_argument("--write", action="store_true", help=f"write the table into {TABLE.name}")
    parser.add_argument("--case", default="", metavar="NAME", help="only cases whose name contains NAME")
    options = parser.parse_args(argv)
    gpus = [gpu for gpu in GPUS if gpu.target == TARGET]
    needed = " and ".join(
        f"{gpu.bandwidth * COPY_SHARE * LATENCY / gpu.multiprocessors / 1024:.0f} on the {gpu.name}" for gpu in gpus
    )
    head = _HEAD.format(latency=LATENCY * 1e9, share=COPY_SHARE, start=START * 1e6, needed=needed)
    found = list(predictions([case for case in ALL_CASES if options.case in case.name]))
    table = render(found, gpus)
    if options.write:
        TABLE.write_text(head + table + _GOALS_HEAD + render_tails(GOALS, gpus), encoding="utf-8")
    else:
        print(table, end="")
    wrong = faults(found, gpus[-1])
    print("\n".join(wrong), file=sys.stderr, end="\n" if wrong else "")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
