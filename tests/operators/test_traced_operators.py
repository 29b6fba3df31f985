"""Every custom operator against its schema and its fake implementation, with kernels and without.

Kernels return other memory than the PyTorch path: views of one buffer, one value per row where PyTorch has one. A
compiled graph relies on what the fake implementation promises, whichever of the two runs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import tritonq
from op_tester import OpTester
from quantizer_states import NO_QUANTIZER, QuantizerState, quantizer_state
from tritonq.backend import Backend
from tritonq.bins import FloatPrefixBins
from tritonq.formats import BLOCK_FORMATS
from tritonq.functional import traced
from tritonq.functional.linear_map import Convolution
from tritonq.functional.traced import eval_mode
from tritonq.grid import Grid
from tritonq.quantized_type import QINT8, QUINT8, QuantizedType
from tritonq.reference.average_pool import AdaptiveAverage, AxesAverage, WindowAverage
from tritonq.reference.conv_bn import BatchNormState
from tritonq.reference.functions import Function


class CheckedOperators(TorchDispatchMode):
    """Apply ``torch.library.opcheck`` to every call of an operator of tritonq."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "tritonq":
            self.names.add(func.name())
            # The check of the schema multiplies what it compares, and torch multiplies no 8-bit floats.
            is_float8 = any(isinstance(arg, Tensor) and arg.dtype == torch.float8_e4m3fn for arg in args)
            tests = ("test_faketensor",) if is_float8 else ("test_schema", "test_faketensor")
            torch.library.opcheck(func, args, kwargs, test_utils=tests)
        return func(*args, **(kwargs or {}))


def normal(*shape: int) -> Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0), device="cpu")
    return x.to(torch.get_default_device())


def state(qtype: QuantizedType, channels: int = 1) -> QuantizerState:
    return quantizer_state(qtype, channels, device=str(torch.get_default_device()))


def weights(x: Tensor) -> None:
    ops, rows, fold = traced.FAMILIES["weight"], normal(6, 5, 3, 3), torch.ones(6)
    for qtype, channels in ((QINT8.with_axis(0), 6), (QUINT8.with_axis(0), 6), (QINT8, 1), (QUINT8, 1)):
        codes, unit, clips, frozen = ops.quantize_folded(rows, fold, *state(qtype, channels))
        again, *_ = ops.folded_codes(rows, fold, frozen)
        assert torch.equal(again, codes)
        ops.folded_backward(torch.ones_like(codes), rows, fold, unit, frozen, clips)
    ops = traced.FAMILIES["batch_norm_weight"]
    for gamma, qtype in ((fold, QINT8.with_axis(0)), (None, QUINT8.with_axis(0))):
        for dtype in (torch.float32, torch.float16):
            made = ops.quantize(rows, fold, gamma, 1e-5, dtype, torch.float32, *state(qtype, 6))
            codes, unit, _, factor, inverse_std, clips, frozen = made
            assert torch.equal(ops.codes_again(rows, factor, frozen, dtype), codes)
            dcodes = torch.ones_like(codes)
            ops.gradients(dcodes, rows, gamma, factor, inverse_std, unit, fold, fold, frozen, clips)


def tails(x: Tensor) -> None:
    ops, vectors = traced.FAMILIES["conv_bn"], [torch.ones(x.shape[1]) for _ in range(6)]
    for quantizer in (NO_QUANTIZER, state(QINT8), state(QUINT8)):
        norm = BatchNormState(*vectors[:2], 0.1, 1e-5)
        y, normalization, frozen = ops.forward(x, *vectors[2:], norm, *quantizer, math.inf)
        ops.backward(torch.ones_like(y), x, normalization, frozen, math.inf)
        ops.apply(x, *vectors[:2], frozen, None)


def joins(x: Tensor) -> None:
    ops = traced.FAMILIES["residual"]
    for quantizer in (NO_QUANTIZER, state(QUINT8)):
        y, mask = ops.forward(x, x + 1, *quantizer, math.inf)
        ops.backward(torch.ones_like(y), mask)
    traced.FAMILIES["rounded"].forward(x, *state(QUINT8), None)
    traced.FAMILIES["rounded"].forward_with_mask(x, *state(QUINT8), 6.0)
    traced.FAMILIES["rounded"].forward_with_mask(x, None, None, math.inf)
    ops, codes = traced.FAMILIES["functions"], (x * 20).to(torch.int8)
    for function in (Function("hardswish"), Function("leaky_relu", (0.1,))):
        y, grid = ops.forward(x, function, *state(QUINT8))
        ops.backward(y, x, None, None, function, grid)
        ops.backward(y, codes, grid.scale, None, function, grid)


def copies(x: Tensor) -> None:
    # Imported here: it registers an operator.
    from tritonq.remember import remember

    remember(x, torch.zeros(1))


def elementwise(x: Tensor) -> None:
    for axis, channels in ((None, 1), (1, x.shape[1])):
        scale, zero_point = torch.full((channels,), 0.05), torch.zeros(channels, dtype=torch.int32)
        qtype, enabled = QINT8.with_axis(axis), torch.ones(1, dtype=torch.uint8)
        for grid in (Grid(scale, zero_point, qtype), Grid(scale, None, qtype, enabled)):
            ops = traced.FAMILIES["fake_quant"]
            ops.fake_quantize(x, grid)
            ops.quantize(x, grid)
            ops.fake_quantize_with_mask(x, grid)
            ops.fake_quantize_backward(x, x, grid)
        for method in ("torch", "megengine", "tqt"):
            ops = traced.FAMILIES["learned_scale"]
            grid = Grid(scale, None if method == "tqt" else zero_point, qtype)
            ops.learned_fake_quantize(x, grid, method)
            ops.learned_fake_quantize_backward(x, x, grid, method)
        ops = traced.FAMILIES["fixed_point"]
        ops.frac_len_errors(x, qtype, 8)
        ops.search_frac_len(x, qtype, 8)


def observers(x: Tensor) -> None:
    bins = FloatPrefixBins()
    for axis, channels in ((None, 1), (1, x.shape[1])):
        qtype = QINT8.with_axis(axis)
        grid, statistics = state(qtype, channels)
        for written in (grid, None):
            traced.FAMILIES["min_max"].observe(x, statistics, written)
        traced.FAMILIES["min_max"].min_max(x, axis)
        ops = traced.FAMILIES["histogram"]
        counts, low, high, count = ops.prefix_histogram(x, bins, axis)
        ops.observe(x, counts, low, high, count, statistics.enabled, bins, axis)
        traced.FAMILIES["search"].search_range(counts, low, high, bins, qtype, "l2")
        traced.FAMILIES["histogram"].linear_histogram(x, 5, torch.tensor([-1.0, 1.0]), axis)
    moving, limits = torch.ones(16, dtype=torch.float64), torch.tensor([-1.0, 1.0], dtype=torch.float64)
    for interpolation in ("torch", "megengine"):
        ops = traced.FAMILIES["interpolating"]
        wider, kept = ops.grown(moving, limits, 1.5 * limits, interpolation, 8)
        ops.greedy_range(kept, wider, 4)


def integers(x: Tensor) -> None:
    codes, counter = (x * 20).round().to(torch.int8), torch.zeros(1, dtype=torch.int64)
    weight, bias = torch.ones(6, x.shape[1], 3, 3, dtype=torch.int8), torch.ones(6, dtype=torch.int32)
    shift = torch.full((6,), 3, dtype=torch.int32)
    geometry = ((2, 1), (1, 0), (1, 2), 1)
    for saturated in (None, counter):
        ops = traced.FAMILIES["int8_conv"]
        ops.int8_conv2d(codes, weight, bias, shift, *geometry, -127, 127, torch.int8, saturated)
        ops.int8_conv2d(codes, weight, bias, None, *geometry, 0, 0, torch.int32, saturated)


def floats(x: Tensor) -> None:
    ops = traced.FAMILIES["float_blocks"]
    for axis in range(x.dim()):
        ops.fake_quantize_blocks(x, BLOCK_FORMATS["mxfp8"], axis)
    ops.fake_quantize_blocks(x, BLOCK_FORMATS["nvfp4"], 1, torch.ones(()), torch.ones(1, dtype=torch.uint8))
    traced.FAMILIES["fake_quant"].fake_quantize(x, Grid(torch.ones(1), None, QuantizedType.of_floats("e5m2")))


def folds(x: Tensor) -> None:
    ops = traced.FAMILIES["fold"]
    for gamma in (torch.ones(4), None):
        ops.nonzero_fold(torch.ones(4), gamma, 1e-5, torch.float32)
    ops.remembered(torch.ones(4))


def evaluation(x: Tensor) -> None:
    zero = torch.zeros(1, dtype=torch.int32)
    enabled = torch.ones(1, dtype=torch.uint8)
    grid = Grid(torch.full((1,), 0.05), zero, QINT8, enabled)
    kernels = Grid(torch.full((6,), 0.05), torch.zeros(6, dtype=torch.int32), QINT8.with_axis(0), enabled)
    x = tritonq.fake_quantize_per_tensor_affine(x, 0.05, 0, -128, 127)
    op = Convolution((1, 1), (1, 1), (1, 1), (0, 0), False, 1)
    weight = normal(6, x.shape[1], 3, 3)
    for output in (None, grid):
        eval_mode.affine(x, weight, torch.ones(6), op, 1, grid, kernels, output)
    eval_mode.join("add", x, x, grid, grid, grid)
    eval_mode.on_grid(x, grid)
    eval_mode.on_grid(x, grid, grid)
    eval_mode.prelu(x, torch.ones(1), grid, grid)
    for averaging in (AxesAverage((2, 3)), WindowAverage((2, 2), (1, 1), (0, 0)), AdaptiveAverage((2, 3))):
        eval_mode.average(x, averaging, grid, grid)
    eval_mode.function(x, Function("silu"), grid, grid)


def exports(x: Tensor) -> None:
    # Imported here: it registers operators.
    from tritonq.deploy import onnx_ops, onnx_recurrent

    scale, zero = torch.tensor(0.05), torch.tensor(0, dtype=torch.int8)
    onnx_ops.quantize_dequantize(x, scale, zero, -128, 127, 0, False, "")
    onnx_ops.quantize_dequantize_float(x, scale, zero.to(torch.float8_e4m3fn), 0, "")
    onnx_ops.round_to_float(x, torch.ones(()), zero.to(torch.float8_e4m3fn), "")
    onnx_ops.dequantize(x.to(torch.int8), scale, zero, 0)
    onnx_ops.global_average(x)
    onnx_ops.negate_codes(x, scale, -scale, zero)
    for mode, gates, states in (("LSTM", 4, 2), ("GRU", 3, 1), ("RNN_TANH", 1, 1)):
        first = [torch.zeros(2, 2, 3) for _ in range(states)]
        weights = [normal(3 * gates, width) for width in (4, 3)] + [normal(6 * gates)]
        onnx_recurrent.recurrent(normal(5, 2, 4), first, 2 * weights, mode, 3)


CALLS: tuple[Callable[[Tensor], None], ...] = (
    weights,
    tails,
    joins,
    copies,
    elementwise,
    observers,
    integers,
    floats,
    folds,
    evaluation,
    exports,
)


class TestTracedOperators(OpTester):
    # The evaluation's convolution: see the emulator's package.
    architecture = 80

    @pytest.mark.parametrize("channels_last", [False, True])
    @pytest.mark.parametrize("call", CALLS)
    def test_keeps_its_promises(
        self, call: Callable[[Tensor], None], channels_last: bool, use: Backend, device: str
    ) -> None:
        with torch.device(device), tritonq.use_backend(use), CheckedOperators() as checked:
            x = normal(2, 4, 5, 6)
            call(x.to(memory_format=torch.channels_last) if channels_last else x)
        assert checked.names


def test_no_operator_is_left_out() -> None:
    with CheckedOperators() as checked:
        for call in CALLS:
            call(normal(2, 4, 5, 6))
    registered = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("tritonq::")}
    assert checked.names == registered


@pytest.mark.parametrize(
    ("positional", "named", "message"),
    [
        ((), {"rounding": 1}, "unexpected keyword argument 'rounding'"),
        ((None, None), {}, "too many positional"),
        ((), {"x": None}, "multiple values for argument 'x'"),
    ],
)
def test_a_traced_form_refuses_the_arguments_that_eager_code_refuses(positional, named, message):
    """Its reference has the parameters x and grid."""
    traced_form, x, grid = traced.FAMILIES["fake_quant"].fake_quantize, normal(3), Grid(torch.ones(1), None, QINT8)
    assert torch.equal(traced_form(x, grid=grid), traced_form(x, grid))
    with pytest.raises(TypeError, match=message):
        traced_form(x, grid, *positional, **named)
    with pytest.raises(TypeError, match="missing a required argument: 'grid'"):
        traced_form(x)
