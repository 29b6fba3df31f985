"""Who else rounds to fixed point, searches fractional lengths and convolves 8-bit codes, each in its own way.

F8Net's code is not a package: its quantizer and its search are written here from their formulas (SEMANTICS section 6).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tritonq.perf.case import Implementation, Inputs, Step, Tolerance

if TYPE_CHECKING:
    from tritonq.perf.cases.fixed_point import Convolution, Rounding, Search

_COMPILER = Tolerance("a compiler may keep bfloat16 intermediates, or not", atol=1e-6, rtol=1e-2, fraction=3e-3)
_BFLOAT16 = Tolerance("results of bfloat16 have 8 bits: codes of up to 255 are off by one", atol=1.0)
_FLOAT32 = Tolerance(
    "sums above 2^24 round in float32, which turns ties over: one code, seldom", atol=1.0, fraction=1e-3
)


def quantize_implementations(problem: Rounding) -> dict[str, Implementation]:
    """tritonq; F8Net's autograd function; torch's operator, whose mask is not strict, so that it only goes forward."""
    table = {
        "tritonq": Implementation(lambda _: _tritonq_quantize(problem), distribution="tritonq", module="tritonq"),
        "f8net": Implementation(lambda inputs: _f8net_quantize(problem, inputs, compiled=False)),
        "torch.compile(f8net)": Implementation(
            lambda inputs: _f8net_quantize(problem, inputs, compiled=True), tolerance=_COMPILER, quick=False
        ),
    }
    if not problem.backward:
        table["torch"] = Implementation(lambda inputs: _torch_quantize(problem, inputs))
    return table


def search_implementations(problem: Search) -> dict[str, Implementation]:
    """One read in tritonq, and pass after pass in F8Net."""
    return {
        "tritonq": Implementation(lambda _: _tritonq_search(problem), distribution="tritonq", module="tritonq"),
        "f8net": Implementation(lambda _: _f8net_search(problem)),
    }


def conv_implementations(problem: Convolution) -> dict[str, Implementation]:
    """tritonq; the convolution of floats that it replaces; torch's quantized operator, on CPUs alone.

    The float convolution is cuDNN's in bfloat16 on a GPU and oneDNN's in float32 on a CPU. Its check requantizes what
    it returns, which is not timed: a float network has no such step. Torch's depthwise kernel for x86 adds pairs of
    products in 16 bits, which saturate: it fails the check. On a CPU tritonq's is a proof, not a product: it computes
    in int32, for which torch has no fast convolution.
    """
    shift = problem.shift

    def to_codes(outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return ((outputs[0].double() * 0.5**shift).round().clamp(0, 255).byte(),)

    return {
        "tritonq": Implementation(lambda _: _tritonq_conv(problem), distribution="tritonq", module="tritonq"),
        "float convolution": Implementation(
            lambda inputs: _float_conv(problem, inputs), tolerance=_BFLOAT16, for_check=to_codes
        ),
        "torch quantized": Implementation(
            lambda inputs: _torch_quantized_conv(problem, inputs),
            tolerance=_FLOAT32,
            devices=("cpu",),
            for_check=lambda outputs: (outputs[0].int_repr(),),
        ),
    }


def _with_gradient(problem: Rounding, quantize: Any) -> Step:
    """``quantize`` maps inputs to y; the step returns the gradient of x too where the problem asks for it."""

    def forward(inputs: Inputs) -> tuple[Tensor, ...]:
        return (quantize(inputs),)

    def forward_backward(inputs: Inputs) -> tuple[Tensor, ...]:
        y = quantize(inputs)
        return y, *torch.autograd.grad(y, inputs["x"], inputs["dy"])

    return forward_backward if problem.backward else forward


def _tritonq_quantize(problem: Rounding) -> Step:
    import tritonq

    return _with_gradient(
        problem, lambda inputs: tritonq.fixed_point_quantize(inputs["x"], inputs["frac_len"], axis=problem.axis)
    )


class _FixQuant(torch.autograd.Function):
    """F8Net's quantizer: it keeps the mask of the codes strictly inside for its backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, powers: Tensor, low: int, high: int) -> Tensor:
        codes = (x * powers).round().clamp(low, high)
        ctx.save_for_backward((codes > low) & (codes < high))
        return (codes / powers).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return dy * ctx.saved_tensors[0], None, None, None


def _f8net_quantize(problem: Rounding, inputs: Inputs, *, compiled: bool) -> Step:
    powers, low, high = problem.powers(inputs), problem.quant_min, problem.quant_max

    def quantize(x: Tensor) -> Tensor:
        y: Tensor = _FixQuant.apply(x, powers, low, high)  # type: ignore[no-untyped-call]
        return y

    called = torch.compile(quantize, dynamic=False) if compiled else quantize
    return _with_gradient(problem, lambda inputs: called(inputs["x"]))


def _torch_quantize(problem: Rounding, inputs: Inputs) -> Step:
    limits = (problem.quant_min, problem.quant_max)
    scale = torch.exp2(-inputs["frac_len"].float())
    zero_point = torch.zeros_like(inputs["frac_len"])
    if problem.axis is None:
        return lambda inputs: (torch.fake_quantize_per_tensor_affine(inputs["x"], scale, zero_point, *limits),)
    axis = problem.axis
    return lambda inputs: (torch.fake_quantize_per_channel_affine(inputs["x"], scale, zero_point, axis, *limits),)


def _tritonq_search(problem: Search) -> Step:
    import tritonq

    return lambda inputs: (tritonq.search_frac_len(inputs["x"], signed=problem.signed),)


def _f8net_search(problem: Search) -> Step:
    """One quantized copy and one mean of squares for every candidate, then the least of them."""
    low, high = problem.codes

    def search(inputs: Inputs) -> tuple[Tensor, ...]:
        x = inputs["x"].float()
        errors = []
        for length in problem.candidates:
            rounded = (x * 2.0**length).round().clamp(low, high) / 2.0**length
            errors.append((rounded - x).square().mean().sqrt())
        return (torch.stack(errors).argmin().int(),)

    return search


def _tritonq_conv(problem: Convolution) -> Step:
    from tritonq.backend import implementation

    pad = problem.kernel // 2
    geometry: dict[str, Any] = {"stride": (1, 1), "padding": (pad, pad), "dilation": (1, 1), "groups": problem.groups}

    def convolve(inputs: Inputs) -> tuple[Tensor, ...]:
        operands = (inputs["x"], inputs["weight"], inputs["bias"], inputs["shift"])
        ops = implementation("int8_conv", inputs["x"])
        return (ops.int8_conv2d(*operands, **geometry, quant_min=0, quant_max=255, out_dtype=torch.uint8),)

    return convolve


def _float_conv(problem: Convolution, inputs: Inputs) -> Step:
    dtype = torch.bfloat16 if inputs["x"].is_cuda else torch.float32
    weight, bias = inputs["weight"].to(dtype), inputs["bias"].to(dtype)
    # A float network's activations are floats already: each set of inputs is converted once.
    converted: dict[int, Tensor] = {}

    def convolve(inputs: Inputs) -> tuple[Tensor, ...]:
        x = inputs["x"]
        values = converted.get(x.data_ptr())
        if values is None:
            values = converted[x.data_ptr()] = x.to(dtype)
        return (F.conv2d(values, weight, bias, padding=problem.kernel // 2, groups=problem.groups),)

    return convolve


def _torch_quantized_conv(problem: Convolution, inputs: Inputs) -> Step:
    """Scales of 1 for both operands, of ``2^shift`` for the result: the same codes."""
    quantized = torch._make_per_tensor_quantized_tensor
    pad, one = [problem.kernel // 2] * 2, [1, 1]
    weight = quantized(inputs["weight"], 1.0, 0)
    packed = torch.ops.quantized.conv2d_prepack(weight, inputs["bias"].float(), one, pad, one, problem.groups)
    scale = 2.0**problem.shift

    def convolve(inputs: Inputs) -> tuple[Tensor, ...]:
        x = quantized(inputs["x"], 1.0, 0)
        return (torch.ops.quantized.conv2d(x, packed, scale, 0),)

    return convolve
