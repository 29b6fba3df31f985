"""`use_in_torch`: torch's operators with tritonq behind them, against torch's own, call by call and in training."""

from __future__ import annotations

import copy
import threading
import warnings

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.ao import quantization as ao
from torch.profiler import ProfilerActivity, profile

import tritonq
from tolerances import SUMS, assert_close

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def values(dtype=torch.float32, shape=(2, 3, 4, 5)):
    """Ties, bounds, infinities, and values between."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator) * 3
    special = torch.tensor([0.25, -0.25, 0.75, 3.5, 3.75, 4.0, -4.0, -4.25, -4.5, torch.inf, -torch.inf, -0.0])
    return torch.cat([x.flatten()[len(special) :], special]).view(shape).to(dtype)


def our_calls(function):
    """Return the result, and which of tritonq's operators ran."""
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        result = function()
    return result, {event.key for event in recorded.key_averages() if event.key.startswith("tritonq.")}


def numbers(x):
    return torch.fake_quantize_per_tensor_affine(x, 0.5, 2, -8, 7)


def tensors(x):
    return torch.fake_quantize_per_tensor_affine(x, torch.tensor([0.5]), torch.tensor([2], dtype=torch.int32), -8, 7)


def channels(x):
    # What torch makes of infinities per channel is undefined: they pass through an int64.
    x = x.clamp(-100, 100)
    zero_point = torch.tensor([0, 3, -2], dtype=torch.int32)
    return torch.fake_quantize_per_channel_affine(x, torch.tensor([0.5, 0.31, 0.07]), zero_point, 1, -8, 7)


def masked_numbers(x):
    return torch.ops.aten.fake_quantize_per_tensor_affine_cachemask(x, 0.5, 2, -8, 7)


def masked_tensors(x, on=1):
    scale, zero_point, enabled = torch.tensor([0.5]), torch.tensor([2], dtype=torch.int32), torch.tensor([on])
    operator = torch.ops.aten._fake_quantize_per_tensor_affine_cachemask_tensor_qparams
    return operator(x, scale, zero_point, enabled, -8, 7)


def masked_off(x):
    return masked_tensors(x, 0)


def masked_channels(x):
    x = x.clamp(-100, 100)
    zero_point = torch.tensor([0, 3, -2], dtype=torch.int32)
    operator = torch.ops.aten.fake_quantize_per_channel_affine_cachemask
    return operator(x, torch.tensor([0.5, 0.31, 0.07]), zero_point, 1, -8, 7)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("call", [numbers, tensors, channels])
def test_values_and_gradients(call, dtype):
    def run():
        x = values(dtype).requires_grad_()
        y = call(x)
        y.backward(torch.linspace(-1, 1, x.numel()).view(x.shape).to(dtype))
        return y.detach(), x.grad

    expected = run()
    with tritonq.use_in_torch():
        found, ours = our_calls(run)
    assert any("fake_quantize_with_mask" in name for name in ours)
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(found, expected, strict=True))
    with tritonq.use_in_torch(), torch.inference_mode():
        assert torch.equal(call(values(dtype)), expected[0])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("call", [masked_numbers, masked_tensors, masked_off, masked_channels])
def test_masks(call, dtype):
    expected = call(values(dtype))
    with tritonq.use_in_torch():
        found, ours = our_calls(lambda: call(values(dtype)))
    assert ours
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("zero", [3.2, -2.4])
@pytest.mark.parametrize("per_channel", [False, True])
def test_learned_scales(per_channel, zero):
    count = 3 if per_channel else 1
    operator = "channel" if per_channel else "tensor"
    call = getattr(torch, f"_fake_quantize_learnable_per_{operator}_affine")

    def run():
        x = values().clamp(-100, 100).requires_grad_()
        # No value is a tie of these scales.
        scale = torch.linspace(0.21, 0.51, count).requires_grad_()
        zero_point = torch.full((count,), zero, requires_grad=True)
        y = call(x, scale, zero_point, *((1,) if per_channel else ()), -8, 7, 0.25)
        gradients = torch.autograd.grad(y, (x, scale, zero_point), torch.linspace(-1, 1, x.numel()).view(x.shape))
        return y.detach(), *gradients

    expected = run()
    with tritonq.use_in_torch():
        found, ours = our_calls(run)
    assert any("learned_fake_quantize (" in name for name in ours)
    # One negative zero point is torch's own business: its backward takes another integer than its forward.
    assert any("backward" in name for name in ours) == (per_channel or zero > 0)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])
    for a, b in zip(found[2:], expected[2:], strict=True):
        assert_close(a, b, SUMS, size=0.1)


def network():
    torch.manual_seed(1)
    features = nn.Sequential(
        *(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(8 * 64, 4)),
    )
    features = ao.fuse_modules_qat(features.train(), [["0", "1", "2"], ["3", "4"]])
    return nn.Sequential(ao.QuantStub(), features, ao.DeQuantStub()).train()


def trained(model, steps=4):
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    generator = torch.Generator().manual_seed(3)
    losses = []
    for _ in range(steps):
        loss = model(torch.randn(4, 3, 12, 12, generator=generator)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("version", [0, 1])
@pytest.mark.parametrize("backend", ["x86", "qnnpack"])
def test_torch_ao_trains_the_same_model(backend, version):
    """Losses, state dict and converted model after four steps, bit for bit."""
    model = network()
    model.qconfig = ao.get_default_qat_qconfig(backend, version=version)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = ao.prepare_qat(model)
    ours = copy.deepcopy(theirs)
    expected = trained(theirs)
    with tritonq.use_in_torch():
        found, names = our_calls(lambda: trained(ours))
    assert found == expected
    assert any(name.startswith("tritonq.min_max.observe") for name in names) == (version == 1)
    for (key, value), other in zip(theirs.state_dict().items(), ours.state_dict().values(), strict=True):
        assert torch.equal(value, other), key
    x = values(shape=(4, 3, 12, 12)).clamp(-5, 5)
    with torch.no_grad():
        assert torch.equal(theirs.eval()(x), ours.eval()(x))


def test_a_switched_off_observer_and_quantizer():
    quantizer = ao.get_default_qat_qconfig("x86", version=1).activation()
    x = torch.randn(50)
    quantizer(x)
    others = copy.deepcopy(quantizer)
    for module in (quantizer, others):
        module.disable_observer()
        module.disable_fake_quant()
    expected = quantizer(3 * x)
    with tritonq.use_in_torch():
        assert torch.equal(others(3 * x), expected)
    assert torch.equal(expected, 3 * x)
    assert all(torch.equal(a, b) for a, b in zip(quantizer.buffers(), others.buffers(), strict=True))


@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("on", [True, False, 1, 0])
def test_the_fused_operator_takes_switches_of_either_type_and_empty_tensors(per_row, on):
    def run():
        size = 3 if per_row else 1
        low, high = torch.full((size,), torch.inf), torch.full((size,), -torch.inf)
        scale, zero_point, switch = torch.ones(size), torch.zeros(size, dtype=torch.int32), torch.tensor(on)
        state = (low, high, scale, zero_point)
        results = [
            torch.fused_moving_avg_obs_fake_quant(x, switch, switch, *state, 0.01, 0, 255, 0, per_row, False)
            for x in (torch.linspace(-1, 2, 12).view(3, 4), torch.linspace(-3, 1, 12).view(3, 4), torch.empty(3, 0))
        ]
        return *results, *state

    expected = run()
    with tritonq.use_in_torch():
        assert all(torch.equal(a, b) for a, b in zip(run(), expected, strict=True))


def test_what_tritonq_does_not_compute_is_torchs():
    x = torch.randn(2, 3, dtype=torch.float64)
    scale, zero_point = torch.tensor([0.1, 0.2, 0.3]), torch.tensor([0.5, 0.25, 0.0])
    calls = [
        lambda: torch.fake_quantize_per_tensor_affine(x, 0.1, 0, -8, 7),
        lambda: torch.fake_quantize_per_channel_affine(x.float(), scale, zero_point, 1, -8, 7),
        lambda: torch.fake_quantize_per_tensor_affine(torch.empty(0), 0.1, 0, -8, 7),
    ]
    expected = [call() for call in calls]
    with tritonq.use_in_torch():
        for call, wanted in zip(calls, expected, strict=True):
            assert torch.equal(call(), wanted)


@pytest.mark.parametrize(
    "call",
    [
        lambda x: torch.fake_quantize_per_tensor_affine(x, 0.1, 9, -8, 7),
        lambda x: torch.fake_quantize_per_tensor_affine(x, 0.1, 0, 7, -8),
        lambda x: torch.fake_quantize_per_tensor_affine(x.int(), 0.1, 0, -8, 7),
        lambda x: torch.fake_quantize_per_channel_affine(x, torch.ones(2), torch.zeros(3).int(), 0, -8, 7),
        lambda x: torch.fake_quantize_per_channel_affine(x, torch.ones(3), torch.full((3,), 8).int(), 0, -8, 7),
        lambda x: torch.fake_quantize_per_channel_affine(x[:0, None], torch.ones(1), torch.tensor([8]).int(), 1, -8, 7),
        lambda x: torch.fake_quantize_per_channel_affine(x, torch.ones(3), torch.zeros(3).long(), 0, -8, 7),
        lambda x: torch.fake_quantize_per_channel_affine(x, torch.ones(3).half(), torch.zeros(3).int(), 0, -8, 7),
        lambda x: torch.fake_quantize_per_channel_affine(x, torch.ones(3).double(), torch.zeros(3).int(), 0, -8, 7),
        lambda x: torch._fake_quantize_learnable_per_channel_affine(x, torch.ones(3), torch.zeros(2), 0, -8, 7),
    ],
)
def test_errors_are_torchs(call):
    with pytest.raises((RuntimeError, NotImplementedError)) as theirs:
        call(torch.ones(3))
    with tritonq.use_in_torch(), pytest.raises(type(theirs.value)) as ours:
        call(torch.ones(3))
    assert str(ours.value).splitlines()[0] == str(theirs.value).splitlines()[0]


def test_nothing_is_left_behind():
    call = lambda: numbers(values())  # noqa: E731
    outer = tritonq.use_in_torch()
    with pytest.raises(RuntimeError, match="from the block"), tritonq.use_in_torch() as inner:
        raise RuntimeError("from the block")
    assert our_calls(call)[1], "the outer use goes on"
    inner.remove()
    assert our_calls(call)[1], "a second removal counts for nothing"
    outer.remove()
    assert not our_calls(call)[1]
    assert "removed" in repr(outer)
    assert "fake_quantize_per_tensor_affine_cachemask" in outer.operators
    for _ in range(2):
        with outer:
            assert our_calls(call)[1], "one object serves several blocks"
        assert not our_calls(call)[1]


def test_other_threads_see_it():
    found = []
    with tritonq.use_in_torch():
        threads = [threading.Thread(target=lambda: found.append(numbers(values()))) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(found) == 4
    assert all(torch.equal(y, numbers(values())) for y in found)


def test_compiled_graphs_and_programs():
    def function(x):
        return numbers(x) * 2

    x = values().requires_grad_()
    expected = function(x)
    (gradient,) = torch.autograd.grad(expected.sum(), x)
    with tritonq.use_in_torch():
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        found = compiled(x)
        assert torch.equal(found, expected)
        assert torch.equal(torch.autograd.grad(found.sum(), x)[0], gradient)
    # A graph that was traced under it runs without it.
    assert torch.equal(compiled(x), expected)

    class Model(nn.Module):
        def forward(self, x):
            return function(x)

    with tritonq.use_in_torch():
        program = torch.export.export(Model(), (values(),))
    targets = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert any("fake_quantize_per_tensor_affine" in target for target in targets)
    assert torch.equal(program.module()(values()), expected)


def test_data_parallel(tmp_path):
    model = network()
    model.qconfig = ao.get_default_qat_qconfig("x86", version=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = ao.prepare_qat(model)
    ours = copy.deepcopy(theirs)
    expected = trained(theirs, 2)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        with tritonq.use_in_torch():
            assert trained(nn.parallel.DistributedDataParallel(ours), 2) == expected
    finally:
        dist.destroy_process_group()
