"""Kernels that round to integer codes alone refuse grids of floats, and have changed nothing by then."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

from quantizer_states import QuantizerState, assert_same_state, quantizer_state
from tritonq.kernels import batch_norm_weight, conv2d, conv_bn, functions, learned_scale, rounded, weight
from tritonq.kernels import weights_together as together
from tritonq.quantized_type import QuantizedType
from tritonq.reference.functions import Function

ROWS, VECTOR = torch.ones(3, 4), torch.ones(3)
IMAGES, KERNEL = torch.ones(2, 3, 4, 4), torch.ones(3, 3, 1, 1)
GEOMETRY = ((1, 1), (0, 0), (1, 1), 1)


def norm() -> SimpleNamespace:
    return SimpleNamespace(running_mean=torch.zeros(3), running_var=torch.ones(3), momentum=0.1, eps=1e-5)


def conv_bn_forward(state: QuantizerState) -> None:
    statistics = norm()
    try:
        conv_bn.forward(IMAGES, VECTOR, None, None, None, statistics, *state, None)
    finally:
        assert torch.equal(statistics.running_mean, torch.zeros(3))
        assert torch.equal(statistics.running_var, torch.ones(3))


OF_TENSORS: dict[str, Callable[[QuantizerState], object]] = {
    "rounded": lambda state: rounded.forward(ROWS.clone(), *state, None),
    "functions": lambda state: functions.forward(ROWS, Function("silu"), *state),
    "conv_bn": conv_bn_forward,
    "conv2d": lambda state: conv2d.conv2d(IMAGES, KERNEL, None, *GEOMETRY, None, state.grid),
    "integer_conv2d": lambda state: conv2d.integer_conv2d(
        IMAGES, KERNEL, None, VECTOR, state.grid, torch.float32, *GEOMETRY
    ),
    "learned_scale": lambda state: learned_scale.learned_fake_quantize_backward(ROWS, ROWS, state.grid, "torch"),
}
OF_WEIGHTS: dict[str, Callable[[QuantizerState], object]] = {
    "weight": lambda state: weight.quantize_folded(ROWS, VECTOR, *state),
    "batch_norm_weight": lambda state: batch_norm_weight.quantize(
        ROWS, VECTOR, VECTOR, 1e-5, torch.float32, torch.float32, *state
    ),
}


def assert_refused(run: Callable[[QuantizerState], object], axis: int | None) -> None:
    state, untouched = (quantizer_state(QuantizedType.of_floats("e4m3", axis=axis), 3) for _ in range(2))
    with pytest.raises(NotImplementedError, match="rounds to integer codes"):
        run(state)
    assert_same_state(state, untouched)


@pytest.mark.interpreter
@pytest.mark.parametrize("name", OF_TENSORS)
def test_of_tensors(name: str) -> None:
    assert_refused(OF_TENSORS[name], None)


@pytest.mark.interpreter
@pytest.mark.parametrize("axis", [None, 0])
@pytest.mark.parametrize("name", OF_WEIGHTS)
def test_of_weights(name: str, axis: int | None) -> None:
    assert_refused(OF_WEIGHTS[name], axis)


@pytest.mark.interpreter
def test_of_weights_together() -> None:
    assert_refused(lambda state: together.quantize_all([ROWS], VECTOR, [state.grid], [state.statistics]), 0)
