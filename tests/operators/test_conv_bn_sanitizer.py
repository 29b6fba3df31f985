"""The convolution-BatchNorm, weight and join kernels under triton-viz's sanitizer: nothing outside their tensors."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_sanitizer import small_tiles, traced  # noqa: F401 (a fixture)
from test_sanitizer import trace as symbolic_trace  # noqa: F401 (a fixture)

from quantizer_states import NO_QUANTIZER, quantizer_state
from tritonq.qparams import QINT8, QUINT8, QuantizedType
from tritonq.reference.conv_bn import BatchNormState, Normalization
from tritonq.reference.functions import Function

pytestmark = pytest.mark.sanitizer

INPUTS = {
    "odd": torch.randn(3, 5, 7),
    "channels_last": torch.randn(2, 5, 3, 3).to(memory_format=torch.channels_last),
    "rows": torch.randn(67, 3),
    "one channel": torch.randn(2, 1, 9),
}


@pytest.fixture
def trace(symbolic_trace: object) -> Callable[[Any], Any]:  # noqa: F811
    """As there, but with loop variables as numbers: the sanitizer bounds the innermost of nested loops alone."""
    import triton_viz
    from triton_viz.clients import Sanitizer
    from triton_viz.core.callbacks import ForLoopCallbacks

    def wrap(kernel: Any) -> Any:
        client = Sanitizer(abort_on_error=True)
        symbolic = client.register_for_loop_callback()
        numbers = ForLoopCallbacks(range_wrapper_factory=symbolic.range_wrapper_factory)
        client.register_for_loop_callback = lambda: numbers
        return triton_viz.trace(client)(kernel.function)

    return wrap


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
def test_tail(
    name: str,
    qtype: QuantizedType | None,
    trace: Callable[[Any], Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from tritonq.kernels import activation, conv_bn, conv_bn_backward

    for module in (activation, conv_bn, conv_bn_backward):
        traced(trace, module, monkeypatch)
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
    trace: Callable[[Any], Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from tritonq.kernels import batch_norm_weight, min_max, weight

    for module in (batch_norm_weight, min_max, weight):
        traced(trace, module, monkeypatch)
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
def test_input_codes(
    qtype: QuantizedType,
    trace: Callable[[Any], Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from tritonq.kernels import input_codes

    traced(trace, input_codes, monkeypatch)
    x = torch.randn(3, 5, 33)
    codes = input_codes.encode(x, quantizer_state(qtype).grid, True)
    input_codes.decode(codes, torch.float16)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("n", [1, 100, 1000])
@pytest.mark.parametrize("qtype", [QINT8, QUINT8, None], ids=str)
def test_join(
    n: int,
    qtype: QuantizedType | None,
    trace: Callable[[Any], Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from tritonq.kernels import activation, residual, rounded

    for module in (activation, residual, rounded):
        traced(trace, module, monkeypatch)
    a = torch.randn(n)
    y, mask = residual.forward(a, a, *(NO_QUANTIZER if qtype is None else quantizer_state(qtype)), 1.5)
    residual.backward(y, mask)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("n", [1, 100, 1000])
def test_functions(n: int, trace: Callable[[Any], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    from tritonq.kernels import activation, functions, rounded

    for module in (activation, functions, rounded):
        traced(trace, module, monkeypatch)
    x = torch.randn(n)
    y, grid = functions.forward(x, Function("hardswish"), *quantizer_state(QUINT8))
    functions.backward(y, x, None, None, Function("hardswish"), grid)
    functions.backward(y, x.to(torch.int8), torch.ones(1), torch.ones(1), Function("hardswish"), grid)


@pytest.mark.usefixtures("small_tiles")
def test_finds_a_planted_access_out_of_bounds(
    trace: Callable[[Any], Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from tritonq.kernels import conv_bn, conv_bn_backward, residual, rounded, weight

    for module in (rounded, weight, conv_bn, conv_bn_backward):
        traced(trace, module, monkeypatch)
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
