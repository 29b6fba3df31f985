"""Data-parallel and fully sharded training over gloo, in two processes: ranks agree, and equal one process."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import tritonq
from qat_models import FloatResidual, images
from ranks import in_processes, needs_distributed
from tolerances import HALF, LONG_SUMS, TRAINED, assert_close
from tritonq.distributed import broadcast_statistics
from tritonq.nn.batch_norm_layer import QATBatchNormLayer
from tritonq.observers import RangeObserver
from tritonq.process_group import GroupReference

pytestmark = needs_distributed

WORLD, STEPS, BATCH = 2, 20, 8


class Plain(nn.Module):
    """Without BatchNorm: the gradient of a joint batch is the mean over its parts."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.point = nn.Conv2d(8, 8, 1)
        self.head = nn.Linear(8, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.conv(x))
        return self.head(torch.relu(self.point(x) + x).mean((2, 3)))


def prepared(kind: type[nn.Module], group: str | None, frozen: bool = False) -> nn.Module:
    """The same model on every rank, whose activation observers reduce over ``group``."""
    torch.manual_seed(0)
    model = tritonq.prepare_qat(kind(), example_inputs=images(2)).train()
    for module in model.modules():
        # Weights are the same on all ranks; activations are not.
        if isinstance(module, RangeObserver) and module.qtype.axis is None:
            module.process_group = GroupReference(group)
        if frozen and isinstance(module, QATBatchNormLayer):
            module.freeze_bn_stats()
    return model


def batch(step: int, rank: int | None) -> tuple[torch.Tensor, torch.Tensor]:
    """The joint batch of a step, or one rank's part of it."""
    x, labels = images(BATCH * WORLD, seed=step), (torch.arange(BATCH * WORLD) + step) % 10
    return (x, labels) if rank is None else (x.chunk(WORLD)[rank], labels.chunk(WORLD)[rank])


def train(model: nn.Module, rank: int | None, steps: int = STEPS, broadcasts: bool = False) -> list[float]:
    optimizer = torch.optim.SGD(model.parameters(), 0.02, momentum=0.9)
    losses = []
    for step in range(steps):
        x, labels = batch(step, rank)
        if broadcasts:
            broadcast_statistics(model)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def state_of(model: nn.Module) -> dict[str, object]:
    """By value: tensors of a process that has gone can't be read. Shards are put together."""
    state = {}
    for name, value in model.state_dict().items():
        value = value.full_tensor() if hasattr(value, "full_tensor") else value
        state[name] = value.detach().clone().numpy()
    return state


def ddp_plain(rank):
    model = prepared(Plain, "world")
    train(nn.parallel.DistributedDataParallel(model), rank)
    return state_of(model)


def ddp_batch_norm(rank):
    model = prepared(FloatResidual, "world")
    # The statistics of rank 0 are what all ranks get before the next forward, and at the end here.
    wrapped = nn.parallel.DistributedDataParallel(model)
    train(wrapped, rank)
    return state_of(model)


def ddp_frozen(rank):
    model = prepared(FloatResidual, "world", frozen=True)
    train(nn.parallel.DistributedDataParallel(model), rank)
    return state_of(model)


def ddp_accumulates(rank):
    """Two halves under ``no_sync`` and without: what one backward of both gives."""
    model = prepared(Plain, "world")
    model.apply(tritonq.disable_fake_quant)
    wrapped = nn.parallel.DistributedDataParallel(model)
    x, labels = batch(0, rank)
    with wrapped.no_sync():
        (F.cross_entropy(wrapped(x[:4]), labels[:4]) / 2).backward()
    (F.cross_entropy(wrapped(x[4:]), labels[4:]) / 2).backward()
    return {name: parameter.grad.numpy() for name, parameter in model.named_parameters()}


def fsdp_plain(rank):
    return fully_sharded(prepared(Plain, "world"), rank)


def fsdp_batch_norm(rank):
    return fully_sharded(prepared(FloatResidual, "world"), rank)


def fsdp_broadcast(rank):
    return fully_sharded(prepared(FloatResidual, "world"), rank, broadcasts=True)


def fully_sharded(model, rank, broadcasts=False):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (WORLD,))
    for child in model.children():
        if any(parameter.requires_grad for parameter in child.parameters()):
            fully_shard(child, mesh=mesh)
    fully_shard(model, mesh=mesh)
    losses = train(model, rank, broadcasts=broadcasts)
    if broadcasts:
        broadcast_statistics(model)
    sharded = [parameter.to_local().numel() < parameter.numel() for parameter in model.parameters()]
    assert any(sharded)
    return state_of(model) | {"losses": losses}


def ddp_by_default(rank):
    """Nobody named a group: ranges are those of all ranks all the same, in an average of the model too."""
    model = prepared(Plain, None)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=True)
    wrapped = nn.parallel.DistributedDataParallel(model)
    found = {}
    for step in range(3):
        train(wrapped, rank, steps=1)
        average.update_parameters(model)
        found |= {f"{step}.{name}": value for name, value in state_of(model).items()}
    # A process whose data have ended runs no forward, and another must not wait for it.
    ranges = state_of(model)
    with wrapped.join():
        for _ in range(1 + rank):
            wrapped(batch(5, rank)[0]).sum().backward()
    average.eval()
    deployed = tritonq.convert(average.module)
    found |= {f"average.{name}": value for name, value in state_of(average.module).items()}
    assert any((value != ranges[name]).any() for name, value in state_of(model).items() if "max_val" in name)
    return found | {"deployed.max_val": deployed(batch(0, None)[0]).detach().numpy()}


# Quantizers whose statistics are no running range.
OTHER_PRESETS = ("fp8_e4m3", "nvfp4", "lsq_w4a4", "megengine_tqt", "f8net")


def ddp_other_quantizers(rank):
    found = {}
    for preset in (*OTHER_PRESETS, "compiled"):
        torch.manual_seed(0)
        convs = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1))
        qconfig = tritonq.get_qconfig("onnxruntime" if preset == "compiled" else preset)
        model = tritonq.prepare_qat(convs, qconfig=qconfig, example_inputs=images(2)).train()
        called = torch.compile(model, backend="eager", fullgraph=True) if preset == "compiled" else model
        wrapped = nn.parallel.DistributedDataParallel(called)
        for step in range(2):
            wrapped(batch(step, rank)[0] * (1 + rank)).sum().backward()
        found |= {f"{preset}.{name}.max_val": value for name, value in state_of(model).items()}
    return found


# Sharding comes last: with gloo it may abort its process at exit.
OF_REPLICAS = (ddp_by_default, ddp_other_quantizers, ddp_plain, ddp_batch_norm, ddp_frozen, ddp_accumulates)
FUNCTIONS = (*OF_REPLICAS, fsdp_plain, fsdp_batch_norm, fsdp_broadcast)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Starting a process takes seconds: one pair runs everything."""
    return in_processes(WORLD, tmp_path_factory.mktemp("ranks"), *FUNCTIONS)


def is_own(key: str, name: str) -> bool:
    """Whether each rank has its own: a BatchNorm's statistics, and the ranges of weights that are folded with them.

    DistributedDataParallel broadcasts rank 0's buffers before each forward, and so what was folded is common there.
    Sharding broadcasts none, for float models either, unless `broadcast_statistics` does.
    """
    if name == "fsdp_broadcast":
        return False
    of_batch_norm = key.startswith(("stem.0.", "depthwise."))
    folded = name == "fsdp_batch_norm" and "weight_fake_quant" in key
    return of_batch_norm and (".bn.running" in key or folded)


@pytest.mark.parametrize("name", [f.__name__ for f in FUNCTIONS])
def test_ranks_agree(results, name):
    first, second = results[name]
    assert isinstance(first, dict), first
    assert isinstance(second, dict), second
    assert list(first) == list(second)
    compared = [key for key in first if key != "losses" and not is_own(key, name)]
    assert len(compared) >= 6
    assert name == "ddp_accumulates" or any("max_val" in key for key in compared)
    for key in compared:
        # Counts of what was skipped, and a choice for one batch, are each rank's own.
        if "nonfinite" not in key and "batch_frac_len" not in key:
            assert (first[key] == second[key]).all(), key


def alone(kind: type[nn.Module], frozen: bool = False) -> dict[str, object]:
    model = prepared(kind, None, frozen)
    train(model, None)
    return state_of(model)


@pytest.mark.parametrize(
    ("name", "kind", "frozen"),
    [("ddp_plain", Plain, False), ("fsdp_plain", Plain, False), ("ddp_frozen", FloatResidual, True)],
)
def test_ranks_equal_one_process_with_the_joint_batch(results, name, kind, frozen):
    """Without BatchNorm statistics the mean of the ranks' gradients is the joint batch's, to the order of a sum."""
    expected = alone(kind, frozen)
    start = state_of(prepared(kind, None, frozen))
    found = results[name][0]
    for key, value in expected.items():
        got, wanted = torch.from_numpy(found[key]).double(), torch.from_numpy(value).double()
        moved = (wanted - torch.from_numpy(start[key]).double().nan_to_num(0, 0, 0)).abs()
        # Rounding flips a few codes of a gradient's mask; that stays far below what 20 steps moved.
        assert float((got - wanted).abs().max()) <= 0.02 * float(moved.max()) + 1e-6, key


def test_ranges_are_those_of_the_joint_batch_by_default(results):
    """The inputs' range depends on the data alone, and so is the joint batch's to the bit."""
    model = prepared(Plain, None)
    for step in range(3):
        train(model, None, steps=1)
        expected = state_of(model)
        names = [name for name in expected if name.startswith("conv.input_fake_quant.") and "nonfinite" not in name]
        assert len(names) >= 4
        for name in names:
            assert (results["ddp_by_default"][0][f"{step}.{name}"] == expected[name]).all(), name


def test_accumulation_without_sync(results):
    model = prepared(Plain, None)
    model.apply(tritonq.disable_fake_quant)
    x, labels = batch(0, None)
    F.cross_entropy(model(x), labels).backward()
    for name, parameter in model.named_parameters():
        found = torch.from_numpy(results["ddp_accumulates"][0][name])
        assert_close(found, parameter.grad, LONG_SUMS, size=0.01)


def test_sharding_trains_as_replication_does(results):
    """The same mathematics, on whole or sharded parameters."""
    for key, value in results["ddp_plain"][0].items():
        other = results["fsdp_plain"][0][key]
        assert_close(torch.from_numpy(other), torch.from_numpy(value), TRAINED, size=0.01)


def test_broadcast_statistics_are_those_of_replication(results):
    """Rank 0's, before each forward: DistributedDataParallel's arithmetic."""
    for key, value in results["ddp_batch_norm"][0].items():
        if "num_batches_tracked" not in key:
            other = torch.from_numpy(results["fsdp_broadcast"][0][key])
            assert_close(other, torch.from_numpy(value), HALF, size=0.01, msg=key)


def test_broadcasting_alone_does_nothing():
    model = prepared(FloatResidual, None)
    before = state_of(model)
    broadcast_statistics(model, None)
    assert all((value == before[name]).all() for name, value in state_of(model).items())
    with pytest.raises(RuntimeError, match="not initialised"):
        broadcast_statistics(model)


def test_ranks_that_observe_alone_disagree():
    """What the group is for: without it the ranges of two ranks differ."""
    models = [prepared(Plain, None) for _ in range(WORLD)]
    for rank, model in enumerate(models):
        model(batch(0, rank)[0])
    ranges = [copy.deepcopy(dict(model.named_buffers())) for model in models]
    assert any(not torch.equal(value, ranges[1][name]) for name, value in ranges[0].items() if "max_val" in name)
