"""Kernels of layers (convolutions, BatchNorm, weights, joins, functions) under triton-viz's sanitizer."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from quantizer_states import NO_QUANTIZER, quantizer_state
from tritonq.grid import Grid
from tritonq.quantized_type import QINT8, QUINT8, QuantizedType
from tritonq.reference.conv_bn import BatchNormState, Normalization
from tritonq.reference.functions import Function

pytestmark = pytest.mark.sanitizer

Sanitize = Callable[..., None]

INPUTS = {
    "odd": torch.randn(3, 5, 7),
    "channels_last": torch.randn(2, 5, 3, 3).to(memory_format=torch.channels_last),
    "rows": torch.randn(67, 3),
    "one channel": torch.randn(2, 1, 9),
    "rows that begin anywhere": torch.randn(2, 8, 3, 3),
}


def _multiply_add(x: Any, factor: Any, addend: Any) -> Any:
    """The sanitizer follows addresses symbolically and knows no fused multiply-add."""
    return x * factor + addend


@pytest.fixture(autouse=True)
def without_fma(monkeypatch: pytest.MonkeyPatch) -> None:
    from tritonq.kernels import conv_bn, conv_bn_backward, weight

    for module in (conv_bn, conv_bn_backward, weight):
        monkeypatch.setattr(module, "fma", _multiply_add)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("name", INPUTS)
@pytest.mark.parametrize("qtype", [QINT8, QUINT8, None], ids=str)
def test_tail(name: str, qtype: QuantizedType | None, sanitize_loops: Sanitize) -> None:
    from tritonq.kernels import activation, conv_bn, conv_bn_backward

    sanitize_loops(activation, conv_bn, conv_bn_backward)
    c = INPUTS[name]
    vector = torch.ones(c.shape[1])
    norm = BatchNormState(vector.clone(), vector.clone(), torch.tensor(0.5), 1e-5)
    state = NO_QUANTIZER if qtype is None else quantizer_state(qtype)
    y, vectors, frozen = conv_bn.forward(c, vector, vector, vector, vector, norm, *state, 1.5)
    conv_bn.backward(y, c, Normalization(*vectors), frozen, 1.5)
    conv_bn.apply(c, vector, vector, frozen, None)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("shape", [(5, 3, 3, 3), (7, 130), (33, 2)], ids=str)
@pytest.mark.parametrize("qtype", [QINT8.with_axis(0), QUINT8.with_axis(0), QINT8], ids=str)
def test_weight(
    shape: tuple[int, ...],
    qtype: QuantizedType,
    sanitize_loops: Sanitize,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from tritonq.kernels import batch_norm_weight, min_max, weight

    sanitize_loops(batch_norm_weight, min_max, weight)
    monkeypatch.setattr(weight, "_MAX_ELEMENTS", 256)
    rows, fold = torch.randn(shape), torch.ones(shape[0])
    codes, unit, _, frozen = weight.quantize_folded(rows, fold, *quantizer_state(qtype, shape[0]))
    weight.folded_backward(codes, rows, fold, unit, frozen, True)
    weight.folded_backward(codes, rows, fold, unit, None, False)
    state = quantizer_state(qtype, shape[0])
    dtypes = (torch.float16, torch.float32)
    codes, unit, _, *vectors, _, frozen = batch_norm_weight.quantize(rows, fold, fold, 1e-5, *dtypes, *state)
    batch_norm_weight.gradients(codes, rows, fold, *vectors, unit, fold, fold, frozen, True)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("qtype", [QINT8, QUINT8], ids=str)
def test_input_codes(qtype: QuantizedType, sanitize_loops: Sanitize) -> None:
    from tritonq.kernels import input_codes

    sanitize_loops(input_codes)
    x = torch.randn(3, 5, 33)
    codes = input_codes.encode(x, quantizer_state(qtype).grid, True)
    input_codes.decode(codes, torch.float16)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("n", [1, 100, 1000])
@pytest.mark.parametrize("qtype", [QINT8, QUINT8, None], ids=str)
def test_join(n: int, qtype: QuantizedType | None, sanitize_loops: Sanitize) -> None:
    from tritonq.kernels import activation, residual, rounded

    sanitize_loops(activation, residual, rounded)
    a = torch.randn(n)
    y, mask = residual.forward(a, a, *(NO_QUANTIZER if qtype is None else quantizer_state(qtype)), 1.5)
    residual.backward(y, mask)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("n", [1, 100, 1000])
def test_functions(n: int, sanitize_loops: Sanitize) -> None:
    from tritonq.kernels import activation, functions, rounded

    sanitize_loops(activation, functions, rounded)
    x = torch.randn(n)
    y, grid = functions.forward(x, Function("hardswish"), *quantizer_state(QUINT8))
    functions.backward(y, x, None, None, Function("hardswish"), grid)
    functions.backward(y, x.to(torch.int8), torch.ones(1), torch.ones(1), Function("hardswish"), grid)


@pytest.mark.usefixtures("small_tiles")
def test_finds_planted_accesses_of_layers(
    sanitize_loops: Sanitize,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from tritonq.kernels import conv_bn, conv_bn_backward, residual, rounded, weight

    sanitize_loops(rounded, weight, conv_bn, conv_bn_backward)
    for module in (conv_bn, conv_bn_backward):
        honest = module.common_view

        def dishonest(*arguments: Any, honest: Any = honest) -> Any:
            inputs, seen = honest(*arguments)
            outer, rows, cols = seen.sizes
            return inputs, seen._replace(sizes=(outer, rows, cols + 1))

        monkeypatch.setattr(module, "common_view", dishonest)
    c, vector = torch.randn(2, 5, 33), torch.ones(5)
    with pytest.raises(SystemExit):
        conv_bn.apply(c, vector, vector, None, math.inf)
    norm = BatchNormState(vector.clone(), vector.clone(), 0.1, 1e-5)
    with pytest.raises(SystemExit):
        conv_bn.forward(c, vector, None, None, None, norm, None, None, math.inf)
    with pytest.raises(SystemExit):
        conv_bn.backward(c, c, Normalization(*[vector] * 6), None, math.inf)
    with pytest.raises(SystemExit):
        residual.forward(torch.randn(1000), torch.randn(500), None, None, math.inf)
    with pytest.raises(SystemExit):
        weight.folded_codes(torch.randn(5, 9), torch.ones(4), quantizer_state(QINT8, 5).grid)


# channels, outs, groups, kernel
CONVOLUTIONS = [(5, 3, 1, 3), (19, 18, 1, 1), (6, 4, 2, 2), (5, 10, 5, 3)]


@pytest.fixture
def small_convolution_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    from tritonq.kernels import conv2d
    from tritonq.kernels.conv_tile import ConvTile

    # Three sizes: the sanitizer takes ranges of one size for one and the same.
    monkeypatch.setattr(conv2d, "_default_tile", lambda *_: ConvTile(64, 16, 32, 4, 1))


def convolve(channels: int, outs: int, groups: int, kernel: int, channels_last: bool) -> None:
    from tritonq.kernels import conv2d

    x = torch.randn(2, channels, 4, 5)
    x = x.contiguous(memory_format=torch.channels_last) if channels_last else x
    weight = torch.randn(outs, channels // groups, kernel, kernel)
    one, zero = torch.ones(1), torch.zeros(1, dtype=torch.int32)
    grid = Grid(one, zero, QUINT8, torch.ones(1, dtype=torch.uint8))
    geometry = ((2, 1), (1, 2), (1, 2), groups)
    conv2d.conv2d(x, weight, torch.ones(outs), *geometry, 1.5, grid)
    bias = torch.ones(outs, dtype=torch.int32)
    conv2d.integer_conv2d(x, weight, bias, torch.ones(outs), Grid(one, None, QUINT8), torch.float32, *geometry)


@pytest.mark.usefixtures("small_convolution_tiles")
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("convolution", CONVOLUTIONS, ids=str)
def test_convolutions(convolution: tuple[int, int, int, int], channels_last: bool, sanitize_loops: Sanitize) -> None:
    from tritonq.kernels import conv2d

    sanitize_loops(conv2d)
    convolve(*convolution, channels_last)


@pytest.mark.usefixtures("small_convolution_tiles")
def test_finds_planted_accesses_of_convolutions(sanitize_loops: Sanitize) -> None:
    from tritonq.kernels import conv2d
    from tritonq.kernels.conv_tile import ConvGeometry

    sanitize_loops(conv2d)
    x, weight, geometry = torch.randn(2, 5, 4, 5), torch.randn(3, 5, 3, 3), ConvGeometry((1, 1), (1, 1), (1, 1), 1)

    def launch(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, y: torch.Tensor) -> None:
        conv2d._launch(x, weight, bias, None, None, y, geometry, None, None, None, None)

    launch(x, weight, torch.ones(3), torch.empty(2, 3, 4, 5))
    for arguments in (
        (x, torch.randn(3, 6, 3, 3), torch.ones(3), torch.empty(2, 3, 4, 5)),
        (x, weight, torch.ones(2), torch.empty(2, 3, 4, 5)),
        (torch.randn(3, 5, 4, 5), weight, torch.ones(3), torch.empty(2, 3, 4, 5)),
    ):
        with pytest.raises(SystemExit):
            launch(*arguments)
