"""Observers over gloo, in two and three processes: equal to one process that saw everything; no hangs."""

from __future__ import annotations

import copy
import os
from functools import cache

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import tritonq
from ranks import in_processes, needs_distributed
from tolerances import TRAINED, assert_close
from tritonq.distributed import sync_observers
from tritonq.observers import (
    HistogramObserver,
    InterpolatingHistogramObserver,
    MinMaxObserver,
    MovingAverageMinMaxObserver,
    PerChannelMinMaxObserver,
)
from tritonq.rank_ranges import merge_ranges

pytestmark = needs_distributed

PER_CHANNEL = {"qscheme": torch.per_channel_affine, "ch_axis": 1, "num_channels": 3}


def batches(rank, world=3):
    """Three batches of (4, 3, 5); the last rank's second one is empty, and holds nothing finite in the third."""
    generator = torch.Generator().manual_seed(rank)
    found = [torch.randn(4, 3, 5, generator=generator) * (rank + 1) + rank for _ in range(3)]
    if rank == world - 1:
        found[1] = torch.empty(0, 3, 5)
        found[2] = torch.full((4, 3, 5), torch.nan)
    return found


def makers(process_group):
    return {
        "min_max": lambda: MinMaxObserver(process_group=process_group),
        "moving": lambda: MovingAverageMinMaxObserver(0.3, process_group=process_group),
        "channels": lambda: PerChannelMinMaxObserver(1, process_group=process_group, num_channels=3),
        "histogram": lambda: HistogramObserver(process_group=process_group),
        "channel_histogram": lambda: HistogramObserver(process_group=process_group, mantissa_bits=2, **PER_CHANNEL),
        "interpolating": lambda: InterpolatingHistogramObserver(100, process_group=process_group),
    }


def observers(process_group=None):
    return nn.ModuleDict({name: make() for name, make in makers(process_group).items()})


def numpy_state(module):
    """By value: tensors of a process that has gone cannot be read."""
    return {name: buffer.numpy() for name, buffer in module.state_dict().items()}


def observe_together(rank):
    world = dist.get_world_size()
    model = observers("world")
    for batch in batches(rank, world):
        for observer in model.values():
            observer(batch)
    copied = copy.deepcopy(model)
    sync_observers(copied)
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), copied.buffers(), strict=True) if a.dim() != 0)
    return numpy_state(model)


def observe_alone_then_sync(rank):
    world = dist.get_world_size()
    model = observers()
    for batch in batches(rank, world):
        for observer in model.values():
            observer(batch)
    calls = []
    original = dist.all_reduce
    dist.all_reduce = lambda *arguments, **named: (calls.append(1), original(*arguments, **named))
    sync_observers(model)
    dist.all_reduce = original
    first = numpy_state(copy.deepcopy(model))
    sync_observers(model)
    assert len(calls) == 3
    for name, value in numpy_state(model).items():
        assert (value == first[name]).all(), name
    model["histogram"](torch.full((2, 3, 5), float(rank)))
    sync_observers(model)
    assert model["histogram"].histogram.sum() == first["histogram.histogram"].sum() + 30 * world
    return first


def concatenated(world):
    """One process that sees, in each step, the concatenation of all ranks' batches."""
    model = observers()
    for step in range(3):
        batch = torch.cat([batches(rank, world)[step] for rank in range(world)])
        for observer in model.values():
            observer(batch)
    return numpy_state(model)


@pytest.mark.parametrize("world", [2, 3])
def test_a_group_observes_as_one(world, results):
    expected = concatenated(world)
    for state in results(world)["observe_together"]:
        assert isinstance(state, dict), state
        for name, value in state.items():
            if "nonfinite" not in name or name.startswith(("histogram", "channel_histogram")):
                assert (value == expected[name]).all(), name


@pytest.mark.parametrize("world", [2, 3])
def test_sync_merges_what_ranks_saw_alone(world, results):
    expected = concatenated(world)
    states = results(world)["observe_alone_then_sync"]
    for state in states:
        assert isinstance(state, dict), state
        for name in ("min_max", "channels", "histogram", "channel_histogram"):
            for buffer in ("min_val", "max_val"):
                assert (state[f"{name}.{buffer}"] == expected[f"{name}.{buffer}"]).all()
        for name in ("histogram", "channel_histogram"):
            assert (state[f"{name}.histogram"] == expected[f"{name}.histogram"]).all()
            assert state[f"{name}.nonfinite_count"] == expected[f"{name}.nonfinite_count"]
        moved, whole = state["interpolating.histogram"], expected["interpolating.histogram"]
        assert moved.sum() == pytest.approx(whole.sum())
        # Bins that moved smear by a slice of a bin.
        assert abs(moved.cumsum() - whole.cumsum()).max() < 0.05 * whole.sum()
        assert all((state[name] == states[0][name]).all() for name in state if "nonfinite" not in name)


def train_a_quantizer(rank):
    quantizer = tritonq.get_qconfig("megengine_sync_ema").activation()
    for batch in batches(rank, 2)[:1]:
        quantizer(batch)
    return quantizer.scale.numpy()


def test_the_preset_quantizes_alike_on_all_ranks(results):
    scales = results(2)["train_a_quantizer"]
    both = torch.cat([batches(rank, 2)[0] for rank in range(2)])
    alone = tritonq.get_qconfig("megengine_ema").activation()
    alone(both)
    assert scales == [alone.scale.numpy()] * 2


def one_rank_dies(rank):
    observer = MinMaxObserver(process_group="world")
    observer(torch.ones(3) * rank)
    if rank == 1:
        os._exit(1)
    observer(torch.ones(3))


def test_a_rank_that_dies_is_an_error_not_a_hang(tmp_path):
    survivor, _ = in_processes(2, tmp_path, one_rank_dies)["one_rank_dies"]
    assert "all_reduce" in survivor
    assert "Error" in survivor.strip().splitlines()[-1]


def test_scales_of_groups_are_shared(tmp_path):
    layer = tritonq.nn.Linear(64, 4, qconfig=tritonq.get_qconfig("w4_g32"))
    layer(torch.rand(2, 64))
    scale = layer.weight_fake_quant.scale.clone()
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        merge_ranges([layer.weight_fake_quant], dist.group.WORLD)  # as training under DistributedDataParallel does
    finally:
        dist.destroy_process_group()
    assert torch.equal(layer.weight_fake_quant.scale, scale)


def test_without_torch_distributed():
    assert not dist.is_initialized()
    observer = MinMaxObserver(process_group="world")
    with pytest.raises(RuntimeError, match=r"torch\.distributed is not initialised"):
        observer(torch.ones(3))
    assert not observer.has_observed()
    with pytest.raises(RuntimeError, match="not initialised"):
        sync_observers(nn.Sequential(observer))
    histogram = HistogramObserver(process_group="world")
    with pytest.raises(RuntimeError, match="not initialised"):
        histogram(torch.ones(3))
    assert histogram.histogram.sum() == 0
    alone = MinMaxObserver(process_group="auto")
    alone(torch.ones(3))
    assert alone.max_val == 1
    with pytest.raises(ValueError, match="process_group must be"):
        sync_observers(nn.Sequential(), "all")


def length_unknown(rank):
    sync_observers(nn.Sequential(PerChannelMinMaxObserver()))


def length_of_floats_unknown(rank):
    sync_observers(nn.Sequential(tritonq.FloatFakeQuantize("fp8_e4m3", ch_axis=1)))


def test_channels_must_be_known(results):
    for text in results(2)["length_unknown"]:
        assert "ValueError: PerChannelMinMaxObserver does not know its number of channels" in text
    for text in results(2)["length_of_floats_unknown"]:
        assert "ValueError: FloatFakeQuantize does not know its number of channels" in text


def real_group_is_kept_by_copies(rank):
    group = dist.new_group([0, 1])
    make = MinMaxObserver.with_args(process_group=group)
    observer = copy.deepcopy(copy.deepcopy(make)())
    observer(torch.full((2,), float(rank)))
    return float(observer.max_val)


def test_a_group_of_ones_own(results):
    assert results(2)["real_group_is_kept_by_copies"] == [1.0, 1.0]


IMAGES = torch.randn(6, 3, 6, 6, generator=torch.Generator().manual_seed(1)) * torch.arange(1, 7).view(6, 1, 1, 1)
SHARES = ((0, 2), (2, 6))


def synchronized():
    """A prepared model that had SyncBatchNorm before; its ranges are another subject, and off."""
    torch.manual_seed(0)
    conv, head = nn.Conv2d(3, 4, 3, bias=False), nn.Conv2d(4, 4, 1, bias=False)
    model = nn.Sequential(conv, nn.BatchNorm2d(4), nn.ReLU(), head, nn.BatchNorm2d(4))
    qat = tritonq.prepare_qat(nn.SyncBatchNorm.convert_sync_batchnorm(model), example_inputs=IMAGES).train()
    tritonq.disable_fake_quant(qat)
    return qat


def synchronized_step(images):
    """Gradients of a sum, so that those of ranks add up to those of the whole batch, and statistics."""
    qat = synchronized()
    qat(images).square().sum().backward()
    statistics = [tensor for name, tensor in qat.state_dict().items() if "running" in name or "tracked" in name]
    return [parameter.grad for parameter in qat.parameters()], statistics


def train_synchronized(rank):
    gradients, statistics = synchronized_step(IMAGES[slice(*SHARES[rank])])
    for gradient in gradients:
        dist.all_reduce(gradient)
    return [tensor.numpy() for tensor in (*gradients, *statistics)]


def test_synchronized_batch_norm_trains_as_one_process(results):
    gradients, statistics = synchronized_step(IMAGES)
    for found in results(2)["train_synchronized"]:
        assert isinstance(found, list), found
        for got, expected in zip(found, (*gradients, *statistics), strict=True):
            assert_close(torch.from_numpy(got), expected, TRAINED)


def average_in_ranks(rank):
    """Train with DistributedDataParallel on other data in each rank, and keep an average from before the first step."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1))
    qat = tritonq.prepare_qat(model, example_inputs=IMAGES[:2]).train()
    average = AveragedModel(qat, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    trained = nn.parallel.DistributedDataParallel(qat)
    optimizer = torch.optim.SGD(trained.parameters(), 1e-4)
    for _ in range(60):
        optimizer.zero_grad()
        trained(IMAGES[slice(*SHARES[rank])]).square().mean().backward()
        optimizer.step()
        average.update_parameters(qat)
    found = [
        torch.stack(
            [x.max_val - x.min_val for x in kept.modules() if isinstance(x, MinMaxObserver) and x.max_val.dim() == 0]
        )
        for kept in (qat, average.module)
    ]
    converted = tritonq.convert(average.module.eval())
    return [item.numpy() for item in found], torch.equal(converted(IMAGES), average.module(IMAGES))


def test_averages_of_ranks_have_the_ranges_of_all_data(results):
    found = results(2)["average_in_ranks"]
    assert not isinstance(found[0], str), found[0]
    (ranges, converts), (others, other_converts) = found
    assert converts
    assert other_converts
    for mine, its in zip(ranges, others, strict=True):
        assert (mine == its).all()
    of_the_model, of_the_average = map(torch.from_numpy, ranges)
    torch.testing.assert_close(of_the_average, of_the_model, rtol=0.05, atol=0)
    # The second rank's images have up to six times the values of the examples.
    first = tritonq.MinMaxObserver()
    first(IMAGES)
    assert float(of_the_model.max()) == pytest.approx(float(first.max_val - first.min_val), rel=0.05)


IN_ANY_WORLD = (observe_together, observe_alone_then_sync)
IN_PAIRS = (
    train_a_quantizer,
    length_unknown,
    length_of_floats_unknown,
    real_group_is_kept_by_copies,
    train_synchronized,
    average_in_ranks,
)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Starting a process takes seconds: those of one world run everything."""

    @cache
    def run(world):
        functions = IN_ANY_WORLD + (IN_PAIRS if world == 2 else ())
        return in_processes(world, tmp_path_factory.mktemp("ranks"), *functions)

    return run
