"""Compiled fake quantization and histograms against the reference: the same bits, ties and odd values included."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tritonq import QuantizedType, use_backend
from tritonq.bins import FloatPrefixBins
from tritonq.compiled import build, fake_quant, histogram
from tritonq.functional import fake_quantize_per_channel_affine, fake_quantize_per_tensor_affine
from tritonq.grid import Grid
from tritonq.observers import HistogramObserver
from tritonq.reference import fake_quant as reference
from tritonq.reference import histogram as counted

pytestmark = pytest.mark.skipif(build.obstacle() is not None, reason=str(build.obstacle()))

SHAPES = [(5,), (64, 64), (3, 8, 7, 5), (2, 16, 40, 33), (4, 3, 1, 1), (2, 3, 4, 5, 6), (70_001,)]
ODD = (0.0, -0.0, torch.nan, torch.inf, -torch.inf, 1e30, -1e30, 1e-42)


def values(shape: tuple[int, ...], channels_last: bool = False) -> Tensor:
    """Normal values, of which many are ties of a scale of 0.25, and some are odd."""
    generator = torch.Generator().manual_seed(len(shape))
    x = torch.randn(shape, generator=generator) * 20
    x[x.abs() < 8] = (x[x.abs() < 8] * 8).round() / 8
    x.flatten()[: len(ODD)] = torch.tensor(ODD)[: x.numel()]
    if channels_last and x.dim() in (4, 5):
        x = x.contiguous(memory_format=torch.channels_last if x.dim() == 4 else torch.channels_last_3d)
    return x


def grid_of(x: Tensor, axis: int | None, zero: str, ends: tuple[int, int]) -> Grid:
    """A grid whose zero points are none, one number, or differ."""
    count = 1 if axis is None else x.shape[axis]
    scale = torch.full((), 0.25) if axis is None else 0.25 * (1 + torch.arange(count) % 3)
    offsets = {"none": None, "one": torch.full_like(scale, 3, dtype=torch.int32)}
    points = torch.arange(count, dtype=torch.int32) % 5 - 2
    offsets["each"] = points.view(scale.shape) if axis is not None else points.sum()
    return Grid(scale, offsets[zero], QuantizedType(*ends, axis=axis))


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are the same, layout and signs of zeros included; any NaN is one."""
    a, b = (torch.nan_to_num(t, 12345.0) if t.is_floating_point() else t for t in (a, b))
    return a.stride() == b.stride() and torch.equal(a, b) and torch.equal(torch.signbit(a), torch.signbit(b))


@pytest.mark.parametrize("zero", ["none", "one", "each"])
@pytest.mark.parametrize("axis", [None, 0, 1, -1])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_fake_quantization_has_the_bits_of_the_reference(monkeypatch, shape, channels_last, axis, zero):
    if axis == 1 and len(shape) == 1:
        return
    x, ends = values(shape, channels_last), (-128, 127)
    dy = torch.randn(shape, generator=torch.Generator().manual_seed(9))
    grid = grid_of(x, axis, zero, ends)
    wanted = [
        reference.fake_quantize(x, grid),
        *reference.fake_quantize_with_mask(x, grid),
        *(reference.fake_quantize_backward(dy, x, grid, blocks) for blocks in (False, True)),
        reference.fake_quantize_backward(dy.sum().expand(shape), x, grid),
    ]
    for name in ("fake_quantize", "fake_quantize_with_mask", "fake_quantize_backward"):
        monkeypatch.delattr(reference, name)
    found = [
        fake_quant.fake_quantize(x, grid),
        *fake_quant.fake_quantize_with_mask(x, grid),
        *(fake_quant.fake_quantize_backward(dy, x, grid, blocks) for blocks in (False, True)),
        fake_quant.fake_quantize_backward(dy.sum().expand(shape), x, grid),
    ]
    assert [same_bits(a, b) for a, b in zip(found, wanted, strict=True)] == [True] * len(wanted)


@pytest.mark.parametrize("case", ["bfloat16", "float64", "half_away", "strided", "empty", "switched off", "wide"])
def test_what_compiled_code_does_not_take_is_the_references(case):
    qtype = QuantizedType(-(2**30), 2**30 - 1) if case == "wide" else QuantizedType(-8, 7)
    if case == "half_away":
        qtype = QuantizedType(-8, 7, rounding="half_away")
    x = torch.randn(6, 8)
    x = {"bfloat16": x.bfloat16(), "float64": x.double(), "strided": x[:, ::2], "empty": x[:0]}.get(case, x)
    enabled = torch.zeros(1, dtype=torch.uint8) if case == "switched off" else None
    grid = Grid(torch.tensor(0.25), None, qtype, enabled=enabled)
    dy = torch.randn(6, 8)[:, : x.shape[1]][: len(x)].to(x.dtype)
    assert same_bits(fake_quant.fake_quantize(x, grid), reference.fake_quantize(x, grid))
    for ours, theirs in zip(
        fake_quant.fake_quantize_with_mask(x, grid), reference.fake_quantize_with_mask(x, grid), strict=True
    ):
        assert same_bits(ours, theirs)
    gradients = [module.fake_quantize_backward(dy, x, grid) for module in (fake_quant, reference)]
    assert same_bits(*gradients)


def test_public_functions_take_the_compiled_path(monkeypatch):
    x = values((4, 6, 5, 5)).requires_grad_()
    scale, zero = torch.rand(6) + 0.1, torch.zeros(6, dtype=torch.int32)
    wanted = [
        fake_quantize_per_tensor_affine(x, 0.5, 2, -8, 7),
        fake_quantize_per_channel_affine(x, scale, zero, 1, -8, 7),
    ]
    gradients = [torch.autograd.grad(y.nansum(), x)[0] for y in wanted]
    monkeypatch.delattr(reference, "fake_quantize")
    monkeypatch.delattr(reference, "fake_quantize_backward")
    with use_backend("compiled"):
        found = [
            fake_quantize_per_tensor_affine(x, 0.5, 2, -8, 7),
            fake_quantize_per_channel_affine(x, scale, zero, 1, -8, 7),
        ]
        assert all(torch.equal(torch.autograd.grad(y.nansum(), x)[0], g) for y, g in zip(found, gradients, strict=True))
    assert all(same_bits(a, b) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("mantissa_bits", [0, 4, 8])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("channels_last", [False, True])
def test_histograms_have_the_counts_of_the_reference(monkeypatch, shape, channels_last, mantissa_bits):
    x, bins = values(shape, channels_last), FloatPrefixBins(mantissa_bits)
    wanted = counted.prefix_histogram(x, bins)
    monkeypatch.delattr(counted, "prefix_histogram")
    found = histogram.prefix_histogram(x, bins)
    assert [torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(found, wanted, strict=True)] == [True] * 4


@pytest.mark.parametrize("x", [torch.full((9,), torch.nan), torch.zeros(0), torch.tensor(3.0)], ids=str)
def test_histograms_of_few_values(x):
    bins = FloatPrefixBins()
    for a, b in zip(histogram.prefix_histogram(x, bins), counted.prefix_histogram(x, bins), strict=True):
        assert torch.equal(a, b)


def test_an_observer_counts_the_same(monkeypatch):
    batches, observers = [values((2, 16, 40, 33)), values((4, 3, 1, 1)) * 1e3], []
    for backend in ("torch", "compiled"):
        observer = HistogramObserver(2048, dtype=torch.qint8, qscheme=torch.per_tensor_symmetric)
        with use_backend(backend):
            for x in batches:
                observer(x)
        observers.append(observer)
        monkeypatch.delattr(counted, "prefix_histogram", raising=False)
    ours, theirs = (observer.state_dict() for observer in observers)
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert int(ours["histogram"].sum()) == sum(int(x.isfinite().sum()) for x in batches)


# torch has no rule of its own for batches of clamp_.
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_transforms_of_functions_compute_as_without_compiled_code():
    def quantize(x: Tensor) -> Tensor:
        return fake_quantize_per_tensor_affine(x, 0.5, 2, -8, 7)

    x, tangent = values((3, 70)), torch.ones(3, 70)
    wanted = quantize(x)
    with use_backend("compiled"):
        assert same_bits(torch.func.vmap(quantize)(x), wanted)
        assert same_bits(torch.func.jvp(quantize, (x,), (tangent,))[0], wanted)
