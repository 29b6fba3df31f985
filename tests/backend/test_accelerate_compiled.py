"""Accelerated models compiled in one graph, and trained by two processes."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.ao import quantization as ao
from torch.ao.nn import qat as nnqat
from torch.ao.nn.intrinsic import qat as nniqat

import tritonq
from tolerances import FLOAT32, FLOAT64_SUMS, assert_close
from torch_ao_nets import assert_compiled_gradients_equal, in_float64, prepared

pytestmark = pytest.mark.filterwarnings("ignore")


def images(step, dtype=torch.float32):
    generator = torch.Generator().manual_seed(step)
    return torch.randn(4, 3, 8, 8, generator=generator, dtype=torch.float64).to(dtype)


def test_a_compiled_step_is_the_eager_one():
    eager = tritonq.accelerate(prepared(ao.get_default_qat_qconfig("x86", 1)))
    eager(images(0))
    model = assert_compiled_gradients_equal(eager, images(1))
    for (name, value), other in zip(eager.state_dict().items(), model.state_dict().values(), strict=True):
        assert_close(other, value, FLOAT32, size=0.1, msg=name)


def train(rank, folder):
    """Two steps of DistributedDataParallel in float64, with and without tritonq; keep the parameters."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    theirs = in_float64(prepared(ao.get_default_qat_qconfig("x86", 0)))
    results = []
    for model in (theirs, tritonq.accelerate(theirs)):
        model(images(rank, torch.float64))  # gives buffers per channel their length, which DDP wants to know
        wrapped = nn.parallel.DistributedDataParallel(model)
        optimizer = torch.optim.SGD(model.parameters(), 0.05)
        for step in range(2):
            optimizer.zero_grad()
            wrapped(images(10 * rank + step, torch.float64)).square().mean().backward()
            optimizer.step()
        results.append(dict(model.named_parameters()))
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_ranks_over_gloo(tmp_path):
    mp.spawn(train, (str(tmp_path),), nprocs=2)
    (theirs, ours), (other, _) = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    for name, parameter in theirs.items():
        assert_close(ours[name], parameter, FLOAT64_SUMS, size=0.1, msg=name)
        assert torch.equal(other[name], parameter)


def test_graphs_are_counted_per_class():
    # One code object for all classes would share one limit of recompilations, for models without tritonq too.
    tritonq.accelerate(prepared(ao.get_default_qat_qconfig("x86", 1)))
    forwards = [kind.forward for kind in (nnqat.Conv2d, nnqat.Linear, nniqat.ConvBnReLU2d, ao.FakeQuantize)]
    assert len({id(forward.__code__) for forward in forwards}) == len(forwards)
    assert all(forward.__code__ is not forward.__wrapped__.__code__ for forward in forwards)
