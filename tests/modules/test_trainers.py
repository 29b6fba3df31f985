"""What training scripts do around a model: mixed precision, memory formats, accumulation, checkpointing, copies."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint

import tritonq
from qat_models import FloatResidual, images, set_mode
from tolerances import EXACT, TRAINED, assert_close
from tritonq.functional.recomputation import StepMemory
from tritonq.nn.batch_norm_layer import QATBatchNormLayer

LABELS = torch.arange(8) % 4


def prepared(preset: str = "tensorrt", seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return tritonq.prepare_qat(FloatResidual(), qconfig=tritonq.get_qconfig(preset), example_inputs=images(2)).train()


def loss_of(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(model(x).float(), LABELS[: len(x)])


def qparams_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """Ranges, scales and zero points by name."""
    names = ("scale", "zero_point", "min_val", "max_val")
    return {name: buffer for name, buffer in model.named_buffers() if name.rsplit(".", 1)[-1] in names}


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert list(found) == list(expected)
    for name, value in found.items():
        assert_close(value, expected[name], EXACT, equal_nan=True, msg=f"{name} differs")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mixed_precision_trains(dtype):
    model = prepared()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    scaler = torch.amp.GradScaler("cpu", enabled=dtype == torch.float16, init_scale=256.0)
    losses, x = [], images(8)
    for _ in range(20):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype):
            assert model(x).dtype in (dtype, torch.float32)
            loss = loss_of(model, x)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    assert not scaler.is_enabled() or scaler.get_scale() == 256.0
    assert all(p.dtype == torch.float32 and p.isfinite().all() for p in model.parameters())
    for name, value in qparams_of(model).items():
        assert value.dtype == (torch.int32 if name.endswith("zero_point") else torch.float32), name
        assert value.isfinite().all(), name
    assert all(layer.bn.running_var.dtype == torch.float32 for layer in batch_norm_layers(model))


def batch_norm_layers(model: nn.Module) -> list[QATBatchNormLayer]:
    return [module for module in model.modules() if isinstance(module, QATBatchNormLayer)]


def test_an_overflowed_step_is_skipped_and_leaves_the_ranges_finite():
    model = prepared()
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    before = copy.deepcopy(dict(model.named_parameters()))
    with torch.autocast("cpu", torch.float16):
        loss = loss_of(model, images(8))
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() < 2.0**40
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    assert all(value.isfinite().all() for value in qparams_of(model).values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_computes_convolutions_in_its_dtype(dtype):
    """Switched off by accident, everything above would pass as well."""
    model, seen = prepared(), []
    for layer in batch_norm_layers(model):
        layer.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    with torch.autocast("cpu", dtype):
        model(images(4))
    assert seen == [dtype] * 2


@pytest.mark.parametrize("training", [True, False])
def test_channels_last_stays_channels_last(training):
    model = prepared().to(memory_format=torch.channels_last)
    model(images(4))
    model.train(training)
    formats = {}

    def note(name):
        def hook(module, inputs, output):
            if isinstance(output, torch.Tensor) and output.dim() == 4 and output.shape[2] > 1:
                formats[name] = output.is_contiguous(memory_format=torch.channels_last)

        return hook

    for name, module in model.named_modules():
        module.register_forward_hook(note(name))
    x = images(4).to(memory_format=torch.channels_last).requires_grad_(True)
    model(x).sum().backward()
    assert len(formats) >= 4
    assert all(formats.values()), formats
    assert x.grad.is_contiguous(memory_format=torch.channels_last)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 4:
            assert parameter.grad.stride() == parameter.stride(), name


def test_channels_last_computes_what_contiguous_does():
    contiguous, last = prepared(), prepared().to(memory_format=torch.channels_last)
    a = contiguous(images(4))
    b = last(images(4).to(memory_format=torch.channels_last))
    # Batch statistics are summed in another order; a value may then fall on the other side of a rounding.
    step = float(contiguous.head.activation_post_process.scale)
    assert float((a - b).detach().abs().max()) <= 3 * step
    assert float((a - b).detach().abs().mean()) < 0.05 * step + 1e-3


def test_gradients_accumulate():
    """Two backwards add what each would have given from the state that it met."""
    model = prepared()
    model(images(8))
    model.apply(tritonq.disable_observer)
    for layer in batch_norm_layers(model):
        layer.freeze_bn_stats()
    parts = images(8).chunk(2)
    sums = None
    for part in parts:
        single = copy.deepcopy(model)
        loss_of(single, part).backward()
        found = gradients(single)
        sums = found if sums is None else {name: value + found[name] for name, value in sums.items()}
    for part in parts:
        loss_of(model, part).backward()
    assert_equal(gradients(model), sums)
    # With everything frozen the mean over two halves is the whole: what accumulation is for.
    whole = copy.deepcopy(model)
    whole.zero_grad()
    (2 * F.cross_entropy(whole(images(8)), LABELS[:4].repeat(2))).backward()
    for name, value in gradients(whole).items():
        assert_close(value, sums[name], TRAINED, size=0.01)


def test_two_forwards_before_their_backwards():
    """The first backward uses the scales of the first forward, which the second has moved since."""
    model, x = prepared("megengine_lowbit"), images(8)
    single = copy.deepcopy(model)
    loss_of(single, x).backward()
    first = loss_of(model, x)
    moved = copy.deepcopy(qparams_of(model))
    model(100 * x)
    assert any(not torch.equal(value, moved[name]) for name, value in qparams_of(model).items())
    first.backward()
    assert_equal(gradients(model), gradients(single))


class Checkpointed(nn.Module):
    """``model`` under gradient checkpointing, run as one segment."""

    def __init__(self, model: nn.Module, use_reentrant: bool) -> None:
        super().__init__()
        self.model, self.use_reentrant = model, use_reentrant

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return checkpoint(self.model, x, use_reentrant=self.use_reentrant)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize(
    ("preset", "mode"),
    [
        *(("tensorrt", "approximate"), ("tensorrt", "exact"), ("tensorrt", "corrected")),
        *((preset, "approximate") for preset in ("megengine_lowbit", "megengine_tqt", "f8net")),
    ],
)
def test_checkpointing_changes_nothing(preset, mode, use_reentrant):
    """Three steps with and without it: equal parameters, gradients, ranges and statistics, bit for bit."""
    plain = prepared(preset)
    set_mode(plain, mode)
    other = copy.deepcopy(plain)
    wrapped = Checkpointed(other, use_reentrant)
    for model, called in ((plain, plain), (other, wrapped)):
        optimizer = torch.optim.SGD(model.parameters(), 0.05)
        for step in range(3):
            optimizer.zero_grad()
            x = images(8, seed=step).requires_grad_(True)
            loss_of(called, x).backward()
            optimizer.step()
    assert_equal(gradients(other), gradients(plain))
    assert_equal(other.state_dict(), plain.state_dict())
    assert any("num_batches_tracked" in name and value == 3 for name, value in other.state_dict().items())


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_with_a_batch_norm_that_runs_by_itself(use_reentrant):
    """A hooked BatchNorm is called as a module; its statistics move once too."""
    plain = prepared()
    for layer in batch_norm_layers(plain):
        layer.bn.register_forward_hook(lambda *_: None)
    other = copy.deepcopy(plain)
    for model, called in ((plain, plain), (other, Checkpointed(other, use_reentrant))):
        for step in range(2):
            model.zero_grad()
            loss_of(called, images(8, seed=step).requires_grad_(True)).backward()
    assert_equal(gradients(other), gradients(plain))
    assert_equal(other.state_dict(), plain.state_dict())


def test_recomputing_really_happens():
    """So that the tests above compare something."""
    model, calls = prepared(), []
    model.stem[0].register_forward_hook(lambda *arguments: calls.append(1))
    Checkpointed(model, False)(images(4)).sum().backward()
    assert calls == [1, 1]


def test_checkpointed_sequence_keeps_less():
    """Checkpointing still saves memory: the second block's tensors are not kept."""
    model = prepared()
    kept: list[int] = []

    def saved(called):
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t.numel()), t)[1], lambda t: t):
            called(images(8))
        return sum(kept)

    assert saved(Checkpointed(model, False)) < 0.2 * saved(model)


@pytest.mark.parametrize("preset", ["tensorrt", "megengine_tqt"])
def test_averaged_copies(preset):
    model = prepared(preset)
    loss_of(model, images(8)).backward()
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=True)
    frozen = copy.deepcopy(average.module.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for step in range(3):
        optimizer.zero_grad()
        loss_of(model, images(8, seed=step)).backward()
        optimizer.step()
    assert_equal(average.module.state_dict(), frozen)
    average.update_parameters(model)
    average.update_parameters(model)
    average.eval()
    y = average(images(4))
    assert y.isfinite().all()
    assert not torch.equal(average.module.stem[0].weight, frozen["stem.0.weight"])
    for name, value in qparams_of(average.module).items():
        assert value.dtype == (torch.int32 if name.endswith("zero_point") else torch.float32), name
    # The layers of a copy read the copy's quantizers.
    own = set(average.module.modules())
    readers = [m for m in own if getattr(m, "input_quantizer", None) is not None]
    assert readers
    assert all(reader.input_quantizer in own for reader in readers)


@pytest.mark.parametrize("preset", ["tensorrt", "megengine_tqt", "f8net"])
@pytest.mark.parametrize("way", ["pickle", "deepcopy", "torch.save"])
def test_copies_go_on_as_the_original(preset, way):
    model = prepared(preset)
    loss_of(model, images(8)).backward()
    model.zero_grad()
    if way == "deepcopy":
        other = copy.deepcopy(model)
    elif way == "pickle":
        other = pickle.loads(pickle.dumps(model))
    else:
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        other = torch.load(buffer, weights_only=False)
    for either in (model, other):
        loss_of(either, images(8, seed=5)).backward()
    assert_equal(gradients(other), gradients(model))
    assert_equal(other.state_dict(), model.state_dict())
    assert torch.equal(other.eval()(images(4)), model.eval()(images(4)))
    shared = {p.data_ptr() for p in model.parameters()} & {p.data_ptr() for p in other.parameters()}
    assert not shared


def test_a_step_memory_is_not_copied():
    memory = StepMemory()
    memory.fold = (torch.ones(1), torch.ones(1))
    assert copy.deepcopy(memory).fold is None
    assert pickle.loads(pickle.dumps(memory)).fold is None


def live_tensors() -> list[torch.Tensor]:
    """Every tensor that Python can reach."""
    gc.collect()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return [o for o in gc.get_objects() if type(o) in (torch.Tensor, nn.Parameter)]


def grown_since(earlier: list[torch.Tensor]) -> tuple[int, int]:
    """How many tensors there are that were not there earlier, and the bytes of their storages."""
    known = {id(t) for t in earlier}
    new = [t for t in live_tensors() if id(t) not in known]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in new}
    return len(new), sum(storages.values())


def test_nothing_grows_over_200_steps():
    others, found = live_tensors(), []
    model = prepared()
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
    x = images(2)
    for step in range(201):
        optimizer.zero_grad()
        loss_of(model, x).backward()
        optimizer.step()
        if step in (5, 100, 200):
            found.append(grown_since(others))
    assert found[0][0] > len(list(model.parameters()))
    assert found[0] == found[1] == found[2]
