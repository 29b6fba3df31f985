"""Take times in turns over changing inputs, and measure the copy bandwidth with which they are compared."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

import torch

from tritonq.perf.case import Inputs, Step
from tritonq.perf.machine import last_level_cache
from tritonq.perf.stats import Spread

# A sample lasts at least this long, so that the clock's resolution and the loop around the call don't show.
_MIN_SAMPLE_S = 2e-3
_MAX_CALLS = 1000

# Calls for the first estimate. Of a step that takes longer than this, one must do: its check was a call already, and a
# training step on a busy machine takes seconds.
_WARM_CALLS = 3
_LONG_S = 0.05

# Input sets beyond this number no longer help: a case whose sets still fit in the cache then is one where calls, not
# memory, take the time.
_MAX_SETS = 32

# When a case takes this many times its seconds, it ends; three rounds are the least that have a middle.
_PATIENCE = 4
_FEWEST_ROUNDS = 3

# Twice the cache, so that a set has left it before its turn comes again.
_CACHES_TO_FILL = 2


@dataclass(frozen=True)
class Budget:
    """How long one case may be timed: about ``seconds``, within a least and a largest number of rounds.

    The rounds are counted from an estimate. On a machine that is busier than it was then, a case ends after four times
    its seconds, though never before the third round.
    """

    seconds: float
    min_rounds: int = 7
    max_rounds: int = 60

    def is_spent(self, rounds_done: int, elapsed: float) -> bool:
        """Whether timing should stop early, after so many rounds and seconds."""
        return rounds_done >= _FEWEST_ROUNDS and elapsed > _PATIENCE * self.seconds

    def rounds(self, seconds_per_round: float) -> int:
        """Return how many rounds fit, for the estimated seconds of one."""
        return max(self.min_rounds, min(self.max_rounds, int(self.seconds / max(seconds_per_round, 1e-9))))


def input_sets(make: Callable[[torch.Generator, torch.device], Inputs], device: torch.device) -> list[Inputs]:
    """Return 2 to 32 sets of inputs, seeds 0, 1, 2, …, that together exceed twice the last-level cache."""

    def sets() -> Iterator[Inputs]:
        seed = 0
        while True:
            yield make(torch.Generator(device).manual_seed(seed), device)
            seed += 1

    source = sets()
    first = next(source)
    size = sum(tensor.numel() * tensor.element_size() for tensor in first.values())
    wanted = math.ceil(_CACHES_TO_FILL * last_level_cache(device) / max(size, 1))
    return [first, *islice(source, min(max(wanted, 2), _MAX_SETS) - 1)]


def schedule(names: Sequence[str], rounds: int) -> Iterator[tuple[int, str]]:
    """Yield the order of samples, with the number of the round: every implementation once per round, A B A B."""
    for number in range(rounds):
        for name in names:
            yield number, name


def interleave(
    steps: Mapping[str, Step], sets: Sequence[Inputs], device: torch.device, budget: Budget
) -> dict[str, list[float]]:
    """Time all ``steps`` in turns.

    Every step is warmed before any is timed. Each sample makes enough calls to last a few milliseconds, each call on
    the next of ``sets``. The garbage collector rests meanwhile.

    Returns:
        Seconds per call, one entry per round, for each step.
    """
    sample = _cuda_sample if device.type == "cuda" else _cpu_sample
    rotations = {name: _rotation(sets) for name in steps}
    warm = {name: 1 if sample(step, rotations[name], 1) > _LONG_S else _WARM_CALLS for name, step in steps.items()}
    estimates = {name: sample(step, rotations[name], warm[name]) for name, step in steps.items()}
    calls = {name: min(_MAX_CALLS, max(1, math.ceil(_MIN_SAMPLE_S / seconds))) for name, seconds in estimates.items()}
    rounds = budget.rounds(sum(estimates[name] * calls[name] for name in steps))
    times: dict[str, list[float]] = {name: [] for name in steps}
    gc.collect()
    gc.disable()
    try:
        start, current = time.perf_counter(), 0
        for number, name in schedule(list(steps), rounds):
            if number != current and budget.is_spent(number, time.perf_counter() - start):
                break
            current = number
            times[name].append(sample(steps[name], rotations[name], calls[name]))
    finally:
        gc.enable()
    return times


def captured(step: Step, sets: Sequence[Inputs]) -> Step:
    """Return a step that replays one CUDA graph, in which ``step`` runs on every set of inputs.

    The step ignores its argument.
    """
    # Compilation is not allowed while capturing.
    step(sets[0])
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for inputs in sets:
            step(inputs)

    def replay(_: Inputs) -> tuple[torch.Tensor, ...]:
        graph.replay()
        return ()

    return replay


def step_times(step: Step, inputs: Inputs, device: torch.device, calls: int) -> tuple[Spread, Spread]:
    """Time ``calls`` calls of a warm step one by one.

    Returns:
        Seconds until the device has finished, and seconds until the call has returned: what launching takes. On a CPU
        the two are the same.
    """
    finished, launched = [], []
    for _ in range(calls):
        if device.type == "cuda":
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            torch.cuda.synchronize(device)
            start = time.perf_counter()
            begin.record()
            step(inputs)
            end.record()
            launched.append(time.perf_counter() - start)
            end.synchronize()
            finished.append(begin.elapsed_time(end) * 1e-3)
        else:
            start = time.perf_counter()
            step(inputs)
            launched.append(time.perf_counter() - start)
            finished.append(launched[-1])
    return Spread.of(finished), Spread.of(launched)


def copy_bandwidth(device: torch.device) -> Spread:
    """Return the bytes per second, read plus written, of a copy that is far larger than any cache of ``device``."""
    size = (1 << 30) if device.type == "cuda" else max(4 * last_level_cache(device), 128 << 20)
    source = torch.ones(size // 4, device=device)
    target = torch.empty_like(source)

    def copy(_: Inputs) -> tuple[torch.Tensor, ...]:
        return (target.copy_(source),)

    times = interleave({"copy": copy}, [{}], device, Budget(seconds=1.0, max_rounds=30))["copy"]
    return Spread.of([2 * size / seconds for seconds in times])


def _rotation(sets: Sequence[Inputs]) -> Iterator[Inputs]:
    while True:
        yield from sets


def _cpu_sample(step: Step, rotation: Iterator[Inputs], calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        step(next(rotation))
    return (time.perf_counter() - start) / calls


def _cuda_sample(step: Step, rotation: Iterator[Inputs], calls: int) -> float:
    """Return seconds per call between two events on the current stream."""
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    begin.record()
    for _ in range(calls):
        step(next(rotation))
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) * 1e-3 / calls
