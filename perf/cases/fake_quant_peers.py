"""Other libraries' fake quantization with given scale and zero point, each called as its own library calls it.

A maker receives the problem and the first set of inputs, prepares whatever the library wants prepared (its module, its
form of the scale), and returns the function of ``x`` alone that is timed.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tritonq.perf.case import Implementation, Inputs, Step, Tolerance
from tritonq.perf.cases.compiled_code import compiled_rows
from tritonq.perf.cases.fake_quant_inputs import FakeQuantization
from tritonq.perf.cases.vision_models import import_torchvision

Quantizer = Callable[[Tensor], Tensor]
Maker = Callable[[FakeQuantization, Inputs], Quantizer]

_PEER = Tolerance(
    "divides by the scale or lets a compiler reorder, which turns ties over, and decides the gradient of the outermost "
    "half code before rounding: a few elements in a thousand",
    atol=1e-6,
    rtol=1e-6,
    fraction=3e-3,
)


def implementations(problem: FakeQuantization) -> dict[str, Implementation]:
    """Return tritonq, torch in all its forms, and the libraries of the ``peers`` extra."""
    table = {
        "tritonq": _implementation(problem, _tritonq, distribution="tritonq", module="tritonq"),
        **compiled_rows({"tritonq, compiled": lambda inputs: _step(problem, _tritonq(problem, inputs))}),
        "torch": _implementation(problem, _torch),
        "torch.ao v0": _implementation(problem, _torch_ao_v0),
        "torch.ao v1": _implementation(problem, _torch_ao_v1, tolerance=_PEER),
        "eager formula": _implementation(problem, _formula, tolerance=_PEER),
        "torch.compile(torch)": _compiled(problem, _torch, quick=False),
        "torch.compile(formula)": _compiled(problem, _formula, quick=False),
        "torch.compile(tritonq)": _compiled(problem, _tritonq, quick=False),
    }
    for name, module, maker in _LIBRARIES:
        table[name] = _implementation(problem, maker, distribution=name, module=module, tolerance=_PEER)
    return table


def _implementation(problem: FakeQuantization, maker: Maker, **fields: Any) -> Implementation:
    return Implementation(lambda inputs: _step(problem, maker(problem, inputs)), **fields)


def _compiled(problem: FakeQuantization, maker: Maker, quick: bool) -> Implementation:
    def build(inputs: Inputs) -> Step:
        return _step(problem, torch.compile(maker(problem, inputs), dynamic=False))

    return Implementation(build, tolerance=_PEER, quick=quick)


def _step(problem: FakeQuantization, quantize: Quantizer) -> Step:
    def forward(inputs: Inputs) -> tuple[Tensor, ...]:
        return (quantize(inputs["x"]),)

    def forward_backward(inputs: Inputs) -> tuple[Tensor, ...]:
        y = quantize(inputs["x"])
        return y, *torch.autograd.grad(y, inputs["x"], inputs["dy"])

    return forward_backward if problem.backward else forward


def _broadcast(problem: FakeQuantization, values: Tensor) -> Tensor:
    """Return per-channel ``values`` in a shape that broadcasts against x."""
    if problem.axis is None:
        return values
    shape = [1] * len(problem.shape)
    shape[problem.axis] = -1
    return values.view(shape)


def _tritonq(problem: FakeQuantization, inputs: Inputs) -> Quantizer:
    import tritonq

    scale, zero_point, limits = inputs["scale"], inputs["zero_point"], (problem.quant_min, problem.quant_max)
    axis = problem.axis
    if axis is None:
        return lambda x: tritonq.fake_quantize_per_tensor_affine(x, scale, zero_point, *limits)
    return lambda x: tritonq.fake_quantize_per_channel_affine(x, scale, zero_point, axis, *limits)


def _torch(problem: FakeQuantization, inputs: Inputs) -> Quantizer:
    scale, zero_point, limits = inputs["scale"], inputs["zero_point"], (problem.quant_min, problem.quant_max)
    axis = problem.axis
    if axis is None:
        return lambda x: torch.fake_quantize_per_tensor_affine(x, scale, zero_point, *limits)
    return lambda x: torch.fake_quantize_per_channel_affine(x, scale, zero_point, axis, *limits)


def _formula(problem: FakeQuantization, inputs: Inputs) -> Quantizer:
    """Return fake quantization by five plain operators.

    Its gradient is that of the clamp; the rounding is detached (straight-through estimator).
    """
    scale = _broadcast(problem, inputs["scale"])
    zero_point = _broadcast(problem, inputs["zero_point"])

    def quantize(x: Tensor) -> Tensor:
        position = x.float() / scale + zero_point
        code = position + (position.round() - position).detach()
        return ((code.clamp(problem.quant_min, problem.quant_max) - zero_point) * scale).to(x.dtype)

    return quantize


def _torch_ao_v0(problem: FakeQuantization, inputs: Inputs) -> Quantizer:
    from torch.ao.quantization import FakeQuantize

    return _torch_ao(FakeQuantize, problem, inputs)


def _torch_ao_v1(problem: FakeQuantization, inputs: Inputs) -> Quantizer:
    from torch.ao.quantization import FusedMovingAvgObsFakeQuantize

    return _torch_ao(FusedMovingAvgObsFakeQuantize, problem, inputs)


def _torch_ao(kind: Callable[..., Any], problem: FakeQuantization, inputs: Inputs) -> Quantizer:
    """Return a module of torch.ao with its observer off and its qparams set."""
    from torch.ao.quantization import MovingAverageMinMaxObserver, MovingAveragePerChannelMinMaxObserver

    limits = {"quant_min": problem.quant_min, "quant_max": problem.quant_max, "dtype": torch.qint8}
    if problem.axis is None:
        module = kind(MovingAverageMinMaxObserver, qscheme=torch.per_tensor_symmetric, **limits)
    else:
        qscheme = torch.per_channel_symmetric
        module = kind(MovingAveragePerChannelMinMaxObserver, qscheme=qscheme, ch_axis=problem.axis, **limits)
    module.to(inputs["x"].device)
    module(inputs["x"].detach())
    module.disable_observer()
    low, high = _range_for_version_1(problem, inputs["scale"])
    module.activation_post_process.min_val.copy_(low)
    module.activation_post_process.max_val.copy_(high)
    module.scale.copy_(inputs["scale"])
    module.zero_point.copy_(inputs["zero_point"])
    quantize: Quantizer = module
    return quantize


def _range_for_version_1(problem: FakeQuantization, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Return the range for which torch.ao's fused operator computes ``scale``; it derives the scale anew in every call.

    It takes the larger of ``low / -(h + 1)`` and ``high / h``, ``h`` half the number of steps rounded down, stretches
    the range to ``2h + 1`` of those, and divides it by the number of steps: for the narrow range not the same number.
    """
    steps = problem.quant_max - problem.quant_min
    half = steps // 2
    unit = scale * steps / (2 * half + 1)
    # torch.ao keeps a per-tensor range 0-d.
    unit = unit.squeeze() if problem.axis is None else unit
    return -(half + 1) * unit, half * unit


def _torchao(problem: FakeQuantization, inputs: Inputs) -> Quantizer:
    from torchao.quantization.quant_primitives import _fake_quantize_affine

    block = list(problem.shape)
    if problem.axis is not None:
        block[problem.axis] = 1
    return partial(
        _fake_quantize_affine,
        block_size=tuple(block),
        scale=inputs["scale"],
        zero_point=inputs["zero_point"],
        quant_dtype=torch.int8,
        quant_min=problem.quant_min,
        quant_max=problem.quant_max,
    )


def _modelopt(problem: FakeQuantization, inputs: Inputs) -> Quantizer:
    from modelopt.torch.quantization.tensor_quant import fake_tensor_quant

    amax = _broadcast(problem, inputs["scale"] * problem.quant_max)
    narrow = problem.quant_min == -problem.quant_max
    # Its autograd function takes positional arguments: bias, bits, unsigned, narrow range.
    return lambda x: fake_tensor_quant(x, amax, None, 8, False, narrow)


def _brevitas(problem: FakeQuantization, inputs: Inputs) -> Quantizer:
    from brevitas.core.function_wrapper import Identity
    from brevitas.core.quant import IntQuant

    device = inputs["x"].device
    quantize = IntQuant(problem.quant_min == -problem.quant_max, True, input_view_impl=Identity()).to(device)
    scale = _broadcast(problem, inputs["scale"])
    zero_point, bits = torch.tensor(0.0, device=device), torch.tensor(8.0, device=device)
    return lambda x: quantize(scale, zero_point, bits, x)


def _nncf(problem: FakeQuantization, inputs: Inputs) -> Quantizer:
    from nncf.torch.quantization.quantize_functions import symmetric_quantize

    amax = _broadcast(problem, inputs["scale"] * problem.quant_max)
    levels = problem.quant_max - problem.quant_min + 1
    return lambda x: symmetric_quantize(x, levels, problem.quant_min, problem.quant_max, amax, 0.0)


def _aimet(problem: FakeQuantization, inputs: Inputs) -> Quantizer:
    import_torchvision()  # aimet imports it, without what a CPU build of torch lacks
    from aimet_torch.v2.quantization.affine import quantize_dequantize

    scale = _broadcast(problem, inputs["scale"])
    offset = torch.zeros_like(scale)
    return lambda x: quantize_dequantize(x, scale, offset, qmin=problem.quant_min, qmax=problem.quant_max)


_LIBRARIES: tuple[tuple[str, str, Maker], ...] = (
    ("torchao", "torchao", _torchao),
    ("nvidia-modelopt", "modelopt", _modelopt),
    ("brevitas", "brevitas", _brevitas),
    ("nncf", "nncf", _nncf),
    ("aimet-torch", "aimet_torch", _aimet),
)
