"""Training steps of ResNet-50, beside float's and other libraries': time, time to launch, memory, and a profile."""

from __future__ import annotations

import gc
import importlib.util
from collections.abc import Sequence
from dataclasses import replace

import torch

from tritonq.perf.case import Case, Implementation, Inputs, Step
from tritonq.perf.cases.train_step import Setting
from tritonq.perf.gpu.part import Visit
from tritonq.perf.gpu.results import PROFILE, write_text
from tritonq.perf.measure import step_times

# Most valuable first. What isn't named comes last, in the order of the case, as long as there is time.
_ORDER = ("float", "tritonq", "tritonq, CUDA graph", "torch.ao v1", "torchao PT2E", "Model-Optimizer")
_PROFILED = ("float", "tritonq")
_WARM_CALLS, _TIMED_CALLS = 3, 7
_PROFILE_ROWS = 45
# Building, checking and warming one implementation on a GPU; compilers take longer.
_SECONDS, _SECONDS_COMPILED = 8.0, 45.0
_LARGE = Setting("resnet50", 128, 224, channels_last=True, autocast=torch.bfloat16)
_SETTINGS = (_LARGE, replace(_LARGE, batch=32), replace(_LARGE, batch=2))
_SMALL_SETTINGS = (Setting("resnet18", 4, 64, channels_last=True),)


def run(visit: Visit, cases: Sequence[Case] | None = None) -> None:
    """Measure the large batch first, then the smaller ones; or ``cases``."""
    profiles: list[str] = []
    settings = _SMALL_SETTINGS if visit.small else _SETTINGS
    for case in cases if cases is not None else (setting.case() for setting in settings):
        inputs = case.make_inputs(torch.Generator(visit.device).manual_seed(0), visit.device)
        expected = case.reference(inputs)
        for name in ordered(case):
            implementation = case.implementations[name]
            label = f"{case.name.removeprefix('train_step/')} {name}"
            reason = obstacle(implementation, visit)
            if reason is not None:
                visit.note(label, "not run", reason=reason)
                continue
            seconds = _SECONDS_COMPILED if name.startswith("torch.compile") else _SECONDS
            if visit.has_time_for(label, 0 if visit.small else seconds):
                step: Step | None
                with visit.finding(label):
                    step = implementation.build(inputs)
                    difference = implementation.check(step, inputs, expected, case.tolerance)
                    measure(visit, label, case, step, inputs, difference)
                    if name in _PROFILED:
                        profiles.append(f"{label}\n{profile(visit, step, inputs)}\n")
                        write_text(visit.out / PROFILE, "\n".join(profiles))
            step = None  # frees its model
            gc.collect()
            if visit.device.type == "cuda":
                torch.cuda.empty_cache()


def ordered(case: Case) -> list[str]:
    """Return the implementations of ``case``, the most valuable first."""
    first = [name for name in _ORDER if name in case.implementations]
    return [*first, *(name for name in case.implementations if name not in first)]


def obstacle(implementation: Implementation, visit: Visit) -> str | None:
    """Return in words why an implementation can't be tried; None: it can."""
    if visit.device.type not in implementation.devices:
        return f"needs {' or '.join(implementation.devices)}"
    if importlib.util.find_spec(implementation.module) is None:
        return f"{implementation.distribution} is not installed"
    if visit.small and not implementation.quick:
        return "left out of a trial"
    return None


def measure(visit: Visit, label: str, case: Case, step: Step, inputs: Inputs, difference: str | None) -> None:
    """Note time, launch time and memory of ``step``, which was called before.

    ``difference`` says how its results differ from the reference; None: they do not.
    """
    for _ in range(0 if visit.small else _WARM_CALLS):
        step(inputs)
    finished, launched = step_times(step, inputs, visit.device, 1 if visit.small else _TIMED_CALLS)
    # A replayed graph allocates nothing: its memory was taken when it was captured.
    is_replayed = label.endswith("CUDA graph")
    memory = None if is_replayed or case.memory is None else case.memory(step, inputs)
    visit.note(
        label,
        "ok" if difference is None else "wrong",
        **({} if difference is None else {"difference": difference}),
        ms=finished.median * 1e3,
        p20_ms=finished.p20 * 1e3,
        p80_ms=finished.p80 * 1e3,
        launched_after_ms=launched.median * 1e3,
        **({} if memory is None else {"memory_mib": memory / 2**20}),
    )


def profile(visit: Visit, step: Step, inputs: Inputs) -> str:
    """Return the operators and kernels of one step that take longest."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    activities += [torch.profiler.ProfilerActivity.CUDA] if visit.device.type == "cuda" else []
    with torch.profiler.profile(activities=activities) as profiler:
        step(inputs)
        visit.synchronize()
    key = "self_cuda_time_total" if visit.device.type == "cuda" else "self_cpu_time_total"
    return str(profiler.key_averages().table(sort_by=key, row_limit=_PROFILE_ROWS, max_name_column_width=70))
