"""Tune the most valuable entries of the launch table, as many as there is time for."""

from __future__ import annotations

import torch

from tritonq.perf.gpu.part import Visit

# An entry takes a hundred compilations.
_SECONDS = 25.0
_DTYPES = (torch.bfloat16, torch.float32)


def run(visit: Visit) -> None:
    """Tune large tensors first, bfloat16 before float32; the table is written among the results."""
    if visit.device.type != "cuda":
        visit.note("tuner", "not run", reason="needs a GPU")
        return
    from tritonq.kernels.launch_sizes import gpu_file_stem
    from tritonq.perf.tuner import Table, search
    from tritonq.perf.tuning_space import Target, targets

    def worth(target: Target) -> tuple[bool, int, bool]:
        dtype = _DTYPES.index(target.dtype) if target.dtype in _DTYPES else len(_DTYPES)
        return "large" not in target.key, dtype, "flat" in target.key

    name = torch.cuda.get_device_name(visit.device)
    table = Table.open(visit.out / f"{gpu_file_stem(name)}.json", visit.device)
    for target in sorted(targets(), key=worth):
        label = f"{target.kernel} {target.key}"
        if not visit.has_time_for(label, _SECONDS):
            break
        with visit.finding(label):
            result = search(target, visit.device)
            table.add(target.kernel, target.key, result)
            visit.note(label, result=result.describe())
