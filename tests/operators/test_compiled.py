"""Compiled operators against the reference: bits where sums are exact, and sums that agree to float32's digits."""

from __future__ import annotations

import importlib
import logging
import math
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import tritonq
from op_tester import memory_formats
from quantizer_states import NO_QUANTIZER, assert_same_state, quantizer_state
from tolerances import EXACT, FLOAT32, LONG_SUMS, TRAINED, assert_close
from tritonq import backend
from tritonq.compiled import build
from tritonq.quantized_type import QINT4, QINT8, QINT8_NARROW, QUINT8, QuantizedType
from tritonq.reference.conv_bn import BatchNormState

needs_compiler = pytest.mark.skipif(build.obstacle() is not None, reason=str(build.obstacle()))
SHAPES = [(4, 5, 7, 3), (2, 3, 1030), (8, 6), (16, 1, 3, 1), (2, 3, 2, 3, 4), (4, 37, 1, 1), (64, 3, 30, 30)]
ENDS: list[tuple[QuantizedType | None, float | None]] = [
    *((None, None), (None, 1.5), (QINT8, None), (QINT8, 2.5), (QUINT8, math.inf), (QINT4, 0.4)),
]


def both(family: str) -> tuple[ModuleType, ModuleType]:
    """The compiled module and the reference."""
    return importlib.import_module(f"tritonq.compiled.{family}"), importlib.import_module(f"tritonq.reference.{family}")


def whole_numbers(shape: tuple[int, ...]) -> Tensor:
    """Each channel holds -3, -1, 1, 3 equally often: sums are exact in any order, and the variance is 5."""
    count = math.prod(shape) // shape[1]
    values = torch.tensor([-3.0, -1.0, 1.0, 3.0]).repeat(-(-count // 4))[:count]
    rows = torch.stack([values[torch.randperm(count)] for _ in range(shape[1])])
    return rows.view(shape[1], shape[0], *shape[2:]).transpose(0, 1).contiguous()


def vectors(channels: int, *, affine: bool = True) -> tuple[Any, ...]:
    """Ratio, gamma, beta, bias and a BatchNorm; a channel's gamma is negative, and one is zero."""
    torch.manual_seed(1)
    sign = torch.tensor([1.0, -1.0]).repeat(channels)[:channels]
    gamma = sign * (torch.rand(channels) + 0.5)
    ratio = gamma * (torch.rand(channels) + 0.5)
    gamma[-1], ratio[-1] = 0.0, 0.7
    norm = BatchNormState(torch.rand(channels), torch.rand(channels) + 0.1, 0.1, 1e-5)
    return ratio, gamma if affine else None, torch.randn(channels) if affine else None, torch.rand(channels), norm


def quantizer(qtype: QuantizedType | None) -> Any:
    return NO_QUANTIZER if qtype is None else quantizer_state(qtype)


@needs_compiler
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("qtype", "ceiling"), ENDS)
def test_a_tail_has_the_bits_of_the_reference_where_sums_are_exact(shape, qtype, ceiling):
    ours, theirs = both("conv_bn")
    for memory_format in memory_formats(shape):
        c = whole_numbers(shape).to(memory_format=memory_format)
        mine, other, found = quantizer(qtype), quantizer(qtype), []
        for module, state in ((ours, mine), (theirs, other)):
            arguments = vectors(shape[1])
            for _ in range(2):
                result = module.forward(c, *arguments, *state, ceiling)
            found.append((result, arguments[-1]))
        (a, norm_a), (b, norm_b) = found
        # The last bit of a mean or variance that is no power of two may differ; then codes may, and are not compared.
        if all(torch.equal(x, y) for x, y in zip(a.normalization, b.normalization, strict=True)):
            assert torch.equal(a.y, b.y)
            if qtype is not None:
                assert_same_state(mine, other)
        assert_close(tuple(a.normalization), tuple(b.normalization), FLOAT32)
        assert_close(norm_a.running_mean, norm_b.running_mean, FLOAT32)
        assert_close(norm_a.running_var, norm_b.running_var, FLOAT32)
        assert a.y.stride() == b.y.stride()
        # The same slope and shift give the same bits, ties and rails included.
        slope, shift = b.normalization.slope, b.normalization.shift
        assert torch.equal(ours.apply(c, slope, shift, b.grid, ceiling), b.y)


@needs_compiler
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("qtype", "ceiling"), ENDS)
def test_gradients_of_a_tail(shape, qtype, ceiling):
    ours, theirs = both("conv_bn")
    for memory_format in memory_formats(shape):
        torch.manual_seed(0)
        c = torch.randn(shape).to(memory_format=memory_format)
        _, normalization, grid = theirs.forward(c, *vectors(shape[1]), *quantizer(qtype), ceiling)
        dy = torch.randn(shape)
        a, b = (m.backward(dy, c, normalization, grid, ceiling) for m in (ours, theirs))
        assert_close(tuple(a), tuple(b), LONG_SUMS, size=0.2)
        assert torch.equal(ours.backward(dy, c, normalization, grid, ceiling, torch.empty_like(c)).c, a.c)


@needs_compiler
@pytest.mark.parametrize("qtype", [QINT8.with_axis(0), QINT8_NARROW.with_axis(0), QINT4.with_axis(0)], ids=str)
@pytest.mark.parametrize("averaging", [None, 0.1, 1.0])
@pytest.mark.parametrize("shape", [(6, 5, 3, 3), (7, 1, 3, 3), (3, 1100), (40, 64, 5, 5)], ids=str)
def test_weights_have_the_bits_of_the_reference(qtype, averaging, shape):
    ours, theirs = both("weight")
    for memory_format in memory_formats(shape):
        torch.manual_seed(0)
        mine, other = (quantizer_state(qtype, shape[0], averaging=averaging) for _ in range(2))
        fold = torch.rand(shape[0]) + 0.5
        fold[1] = -fold[1]
        for step in range(3):
            rows = (torch.randn(shape) * (1 + step % 2)).to(memory_format=memory_format)
            a, b = ours.quantize_folded(rows, fold, *mine), theirs.quantize_folded(rows, fold, *other)
            assert torch.equal(a.codes, b.codes)
            assert torch.equal(a.unit, b.unit)
            assert a.clips == b.clips
            assert_same_state(mine, other)
        assert torch.equal(ours.folded_codes(rows, fold, a.grid).codes, a.codes)
        gradient = torch.randn(shape).to(memory_format=memory_format)
        for clips in (a.clips, True):
            arguments = (rows, fold, a.unit.contiguous(), a.grid, clips)
            (dw, df), (ew, ef) = (m.folded_backward(gradient.clone(), *arguments) for m in (ours, theirs))
            assert torch.equal(dw, ew)
            assert_close(df, ef, LONG_SUMS, size=100)


@needs_compiler
@pytest.mark.parametrize(("qtype", "ceiling"), ENDS[1:])
@pytest.mark.parametrize("shape", [(3, 5, 7), (1, 130), (5, 64, 31, 7)], ids=str)
def test_sums_have_the_bits_of_the_reference(qtype, ceiling, shape):
    torch.manual_seed(0)
    ours, theirs = both("residual")
    a, b = torch.randn(shape).round(decimals=1), torch.randn(shape).round(decimals=1)
    mine, other = quantizer(qtype), quantizer(qtype)
    (y, mask), (z, bits) = ours.forward(a, b, *mine, ceiling), theirs.forward(a, b, *other, ceiling)
    assert torch.equal(y, z)
    dy = torch.randn(shape)
    assert torch.equal(ours.backward(dy, mask), theirs.backward(dy, bits))
    if qtype is not None:
        assert_same_state(mine, other)
        ours, theirs = both("rounded")
        (y, mask), (z, bits) = ours.forward(a.clone(), *mine, ceiling), theirs.forward(a.clone(), *other, ceiling)
        assert torch.equal(y, z)
        assert torch.equal(mask[: a.numel() // 8], bits[: a.numel() // 8])


@needs_compiler
@pytest.mark.parametrize("averaging", [None, 0.1])
@pytest.mark.parametrize("rule", ["torch", "megengine"])
@pytest.mark.parametrize("qtype", [QINT8, QUINT8, QINT4, QuantizedType.of(8, symmetric=False), QINT8_NARROW], ids=str)
def test_ranges_and_grids_follow_by_the_rule_of_the_reference(qtype, rule, averaging):
    """The first batch, growth, an outlier that is forgotten at once, zeros, values of one sign, and large ones."""
    ours, theirs = both("residual")
    torch.manual_seed(0)
    b = torch.randn(3, 50)
    for copy_above in (None, 1.2):
        options = {"rule": rule, "averaging": averaging, "copy_above": copy_above}
        mine, other = (quantizer_state(qtype, **options) for _ in range(2))
        for a in (b, 1.5 * b, 1e6 * b, b, b.abs(), -b.abs() - 1, 0 * b, 1e-9 * b, 3e38 * b.clamp(-0.5, 0.5)):
            results = [m.forward(a, torch.zeros_like(a), *state, None) for m, state in ((ours, mine), (theirs, other))]
            assert torch.equal(results[0].y, results[1].y)
            assert_same_state(mine, other)


@needs_compiler
def test_ranges_of_weights_forget_an_outlier():
    torch.manual_seed(0)
    mine, other = (quantizer_state(QINT8.with_axis(0), 4) for _ in range(2))
    for factor in (1, 1000, 1):
        rows, fold = torch.randn(4, 9) * factor, torch.ones(4)
        a, b = (m.quantize_folded(rows, fold, *s) for m, s in zip(both("weight"), (mine, other), strict=True))
        assert torch.equal(a.codes, b.codes)
        assert_same_state(mine, other)
    assert float(mine.statistics.max_val.max()) < 10


@needs_compiler
@pytest.mark.parametrize("observing", [True, False])
@pytest.mark.parametrize("qtype", [QINT8.with_axis(0), QINT4.with_axis(0)], ids=str)
@pytest.mark.parametrize("shape", [(6, 5, 3, 3), (3, 1100)], ids=str)
def test_a_weight_of_a_step_has_the_bits_of_the_reference(shape, qtype, observing):
    ours, theirs = both("batch_norm_weight")
    count = shape[0]
    for memory_format in memory_formats(shape):
        torch.manual_seed(0)
        gamma = torch.randn(count)
        gamma[0], running_var, unused = 0.0, torch.rand(count), torch.randn(count)
        mine, other = (quantizer_state(qtype, count) for _ in range(2))
        for step in range(3):
            rows = (torch.randn(shape) * (1 + step)).to(memory_format=memory_format)
            if step == 2:
                mine, other = (
                    s.with_range(enabled=torch.tensor([observing], dtype=torch.uint8)) for s in (mine, other)
                )
            arguments = (rows, running_var, gamma, 1e-5, torch.float32, torch.float32)
            a, b = ours.quantize(*arguments, *mine), theirs.quantize(*arguments, *other)
            for x, y in zip(a[:5], b[:5], strict=True):
                assert torch.equal(x, y)
            assert a.clips == b.clips
            assert torch.equal(a.grid.scale, b.grid.scale)
            assert a.grid.is_enabled_on_host() == b.grid.is_enabled_on_host()
            assert_same_state(mine, other)
        gradient = torch.randn(shape).to(memory_format=memory_format)
        vectors_ = (gamma, a.fold, a.inverse_std, a.unit, torch.rand(count), unused)
        (dw, dg), (ew, eg) = (m.gradients(gradient.clone(), rows, *vectors_, a.grid, a.clips) for m in (ours, theirs))
        assert torch.equal(dw, ew)
        assert_close(dg, eg, LONG_SUMS, size=100)


@needs_compiler
@pytest.mark.parametrize("qtype", [QINT8, QUINT8, QINT4], ids=str)
def test_inputs_are_kept_as_codes(qtype):
    ours, theirs = both("input_codes")
    torch.manual_seed(0)
    grid, statistics = quantizer_state(qtype)
    x, _ = both("residual")[1].forward(torch.randn(3, 70, 5), torch.randn(3, 70, 5), grid, statistics, None)
    for trusted in (True, False):
        a, b = ours.encode(x, grid, trusted), theirs.encode(x, grid, trusted)
        assert torch.equal(a.codes, b.codes)
        assert torch.equal(ours.decode(a, torch.float32), x)
        assert torch.equal(ours.decode(a, torch.float32, torch.empty_like(x)), x)
    moved = x.clone()
    moved[2, 69, 4] += float(grid.scale) / 3
    assert ours.encode(moved, grid, False) is None
    moved[2, 69, 4] = math.nan
    assert ours.encode(moved, grid, False) is None
    # Beyond the last code that a byte holds, on a step all the same.
    moved[2, 69, 4] = float(grid.scale) * 1000
    assert ours.encode(moved, grid, False) is None


@needs_compiler
@pytest.mark.parametrize("given", [True, False])
def test_folds_and_their_gradients(given):
    """A gamma of zero, a tiny one, a negative one, and none at all."""
    ours, theirs = both("fold")
    torch.manual_seed(0)
    gamma = torch.tensor([0.0, 1e-20, -0.5, 2.0, -0.0, 0.3])
    running_var = torch.rand(6)
    arguments = (running_var, gamma if given else None, 1e-5, torch.float32)
    a, b = ours.nonzero_fold(*arguments), theirs.nonzero_fold(*arguments)
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    rest = (*a, torch.rand(6), torch.randn(6), torch.randn(6))
    assert torch.equal(ours.gamma_gradient(gamma, *rest), theirs.gamma_gradient(gamma, *rest))


@needs_compiler
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_batches_that_are_not_finite_are_the_references(bad):
    c = torch.randn(4, 3, 5, 5)
    c[1, 2, 3, 4] = bad
    found = []
    for module in both("conv_bn"):
        arguments, state = vectors(3), quantizer_state(QINT8)
        found.append((module.forward(c, *arguments, *state, math.inf).y, state, arguments[-1]))
    (y, mine, norm), (z, other, expected) = found
    assert_close(y, z, EXACT, equal_nan=True)
    assert_same_state(mine, other)
    assert_close(norm.running_mean, expected.running_mean, EXACT, equal_nan=True)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        self.depthwise = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1, groups=16), nn.BatchNorm2d(16), nn.ReLU6())
        self.project = nn.Sequential(nn.Conv2d(16, 16, 1), nn.BatchNorm2d(16))
        self.relu, self.head = nn.ReLU(), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = self.relu(x + self.project(self.depthwise(x)))
        return self.head(x.mean((2, 3)))


def trained(name: str, memory_format: torch.memory_format) -> tuple[list[float], nn.Module]:
    torch.manual_seed(0)
    x = torch.randn(8, 3, 10, 10).to(memory_format=memory_format)
    model = tritonq.prepare_qat(Net(), example_inputs=x).train().to(memory_format=memory_format)
    optimizer, losses = torch.optim.SGD(model.parameters(), 0.05), []
    with tritonq.use_backend(name):
        for _ in range(4):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x), torch.arange(8) % 5)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return losses, model


@needs_compiler
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_training_agrees_and_evaluation_is_the_same(memory_format):
    (ours, model), (theirs, reference) = (trained(name, memory_format) for name in ("compiled", "torch"))
    assert ours == pytest.approx(theirs, rel=LONG_SUMS.rtol)
    for name, value in model.state_dict().items():
        assert_close(value, reference.state_dict()[name], TRAINED, size=0.1)
    model.eval()
    x = torch.randn(2, 3, 10, 10)
    with torch.no_grad(), tritonq.use_backend("compiled"):
        y = model(x)
    with torch.no_grad():
        assert torch.equal(model(x), y)


@needs_compiler
def test_calls_of_a_step_are_few():
    """Per Conv-BN-ReLU layer, forward and backward, nested calls and convolutions counted: 175 now, 340 in PyTorch."""
    net = nn.Sequential(*(m for _ in range(4) for m in (nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())))
    x = torch.randn(2, 8, 8, 8)
    model = tritonq.prepare_qat(net, example_inputs=x).train()
    with tritonq.use_backend("compiled"):
        model(x).sum().backward()
        with profile(activities=[ProfilerActivity.CPU]) as recorded:
            model(x).sum().backward()
    calls = sum(event.count for event in recorded.key_averages() if not event.key.startswith("tritonq"))
    assert calls / 4 <= 190


@needs_compiler
def test_other_dtypes_run_pytorch():
    ours, theirs = both("conv_bn")
    c = torch.randn(4, 3, 5, 5, dtype=torch.bfloat16)
    a, b = (m.forward(c, *vectors(3), *quantizer_state(QINT8), math.inf) for m in (ours, theirs))
    assert torch.equal(a.y, b.y)


def test_without_a_compiler_asking_for_it_is_an_error(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    build.compiler.cache_clear()
    try:
        with pytest.raises(RuntimeError, match=r"needs a C\+\+ compiler"), tritonq.use_backend("compiled"):
            pass
        assert backend.select(torch.ones(1)) == "torch"
    finally:
        monkeypatch.undo()
        build.compiler.cache_clear()


@needs_compiler
def test_what_is_compiled_is_kept(tmp_path, monkeypatch, caplog):
    """The first use says that it compiles, once; a second finds the file; a damaged source is told."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(build, "_SOURCES", ("weight.cpp",))
    with caplog.at_level(logging.INFO, "tritonq"):
        first, second = build._compiled(), build._compiled()
    assert first == second
    assert [record.message for record in caplog.records] == [
        f"tritonq: compiling operators for this CPU, once: {first}"
    ]
    assert [path.name for path in first.parent.iterdir()] == [first.name]
    monkeypatch.setattr(build, "_FLAGS", ("-no-such-flag",))
    with pytest.raises(RuntimeError, match="no-such-flag"):
        build._compiled()


@needs_compiler
def test_tensors_elsewhere_are_refused():
    with tritonq.use_backend("compiled"), pytest.raises(RuntimeError, match="it runs on CPU tensors"):
        backend.select(torch.ones(1, device="meta"))
