"""Functions that run in a process per rank, over gloo."""

import datetime
import traceback

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

needs_distributed = pytest.mark.skipif(not dist.is_available(), reason="torch was built without torch.distributed")
# Longer than any step takes, shorter than anyone would wait.
TIMEOUT = datetime.timedelta(seconds=60)


def in_processes(world, folder, *functions):
    """Return what each ``function(rank)`` returned on each rank, by its name; None where the process died before."""
    context = mp.get_context("spawn")
    arguments = (world, folder, functions)
    children = [context.Process(target=_process, args=(rank, *arguments), daemon=True) for rank in range(world)]
    for child in children:
        child.start()
    for child in children:
        child.join(120)
    hanging = [rank for rank, child in enumerate(children) if child.is_alive()]
    for child in children:
        child.kill()
    assert not hanging
    return {f.__name__: [_read(folder / f"{f.__name__}.{rank}") for rank in range(world)] for f in functions}


def _process(rank, world, folder, functions):
    """Write each result, or the text of an error, at once, so that what happens at exit can't take it away."""
    torch.set_num_threads(1)
    store = f"file://{folder / 'store'}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world, timeout=TIMEOUT)
    for function in functions:
        try:
            result = function(rank)
        except Exception:
            result = traceback.format_exc()
        torch.save(result, folder / f"{function.__name__}.{rank}")
    dist.destroy_process_group()


def _read(path):
    return torch.load(path, weights_only=False) if path.exists() else None
