"""Rounding blocks of small floats, forward only: its gradient is that of the output."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from tritonq.formats import BLOCK_FORMATS
from tritonq.perf.case import Case, Implementation, Inputs, Tolerance

_EXACT = Tolerance("scales are powers of two or rounded alike, elements are rounded once: equal bit for bit")
_PEER = Tolerance(
    "rounds block scales and elements of NVFP4 by other divisions, which moves some values by one code of four bits",
    rtol=1e-6,
    atol=1e-6,
    fraction=1e-2,
)

# Magnitude and maximum; then scaling, rounding by two sums, clamp, sign and scaling back.
_OPERATIONS = 12


@dataclass(frozen=True)
class Problem:
    """A tensor in one block format; blocks run along its last axis, as in all peers."""

    format: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def name(self) -> str:
        """The name of the case, such as ``float_blocks/mxfp4/4096x4096/bfloat16``."""
        return "/".join(
            ["float_blocks", self.format, "x".join(map(str, self.shape)), str(self.dtype).removeprefix("torch.")]
        )

    def make_inputs(self, generator: torch.Generator, device: torch.device) -> Inputs:
        """Return ``x``, normal, and the float32 scale of the whole tensor, which NVFP4 needs."""
        x = torch.randn(self.shape, generator=generator, device=device).to(self.dtype)
        return {"x": x, "scale": x.float().abs().amax() / (6 * 448)}

    def reference(self, inputs: Inputs) -> tuple[Tensor, ...]:
        """Return the nearest number of the format to each value divided by its block's scale, times that scale."""
        blocks = BLOCK_FORMATS[self.format]
        number = blocks.element_format
        x = inputs["x"].float().unflatten(-1, (-1, blocks.size))
        largest = x.abs().amax(-1, keepdim=True)
        if blocks.scale == "e8m0":
            scale = torch.exp2(torch.floor(torch.log2(largest)) - number.greatest_exponent)
        else:
            steps = largest * (1 / (inputs["scale"] * number.largest))
            scale = steps.clamp(max=448).to(torch.float8_e4m3fn).float() * inputs["scale"]
        return ((_round(x * (1 / scale), self.format) * scale).to(self.dtype).flatten(-2),)

    def case(self, *, quick: bool) -> Case:
        """Return the case; least traffic: one read, one write."""
        elements = prod(self.shape)
        return Case(
            name=self.name,
            family="float_blocks",
            make_inputs=self.make_inputs,
            reference=self.reference,
            implementations=_implementations(self),
            baseline="eager formula",
            bytes_moved=2 * elements * self.dtype.itemsize,
            operations=_OPERATIONS * elements,
            tolerance=_EXACT,
            quick=quick,
        )


def _round(units: Tensor, format: str) -> Tensor:
    """Round by torch's own dtype, or to multiples of the power of two that the exponent gives."""
    number = BLOCK_FORMATS[format].element_format
    units = units.clamp(-number.largest, number.largest)
    if BLOCK_FORMATS[format].elements == "e4m3":
        return units.to(torch.float8_e4m3fn).float()
    exponent = torch.floor(torch.log2(units.abs().clamp(min=math.ldexp(1.0, number.least_exponent))))
    step = torch.exp2(exponent - number.mantissa_bits)
    return torch.round(units / step) * step


def _implementations(problem: Problem) -> dict[str, Implementation]:
    """Return tritonq, the formula, and the libraries of the ``peers`` extra that emulate the format."""

    def ours(inputs: Inputs) -> Callable[[Inputs], tuple[Tensor, ...]]:
        import tritonq

        scale = inputs["scale"] if problem.format == "nvfp4" else None
        return lambda inputs: (tritonq.fake_quantize_float(inputs["x"], problem.format, scale),)

    table = {
        "tritonq": Implementation(ours, distribution="tritonq", module="tritonq"),
        "eager formula": Implementation(lambda inputs: problem.reference),
        "torch.compile(formula)": Implementation(
            lambda inputs: torch.compile(problem.reference, dynamic=False), tolerance=_PEER, quick=False
        ),
    }
    if problem.format in _TORCHAO_DTYPES:
        build = _torchao_mx(_TORCHAO_DTYPES[problem.format])
        table["torchao"] = Implementation(build, tolerance=_PEER, distribution="torchao", module="torchao")
    if problem.format == "nvfp4":
        table["torchao"] = Implementation(_torchao_nvfp4, tolerance=_PEER, distribution="torchao", module="torchao")
    if problem.format in _MODELOPT_BITS:
        table["nvidia-modelopt"] = Implementation(
            lambda inputs: _modelopt(problem), tolerance=_PEER, distribution="nvidia-modelopt", module="modelopt"
        )
    return table


_TORCHAO_DTYPES = {"mxfp8": "float8_e4m3fn", "mxfp4": "float4_e2m1fn_x2"}


def _torchao_mx(dtype: str) -> Callable[[Inputs], Callable[[Inputs], tuple[Tensor, ...]]]:
    def build(inputs: Inputs) -> Callable[[Inputs], tuple[Tensor, ...]]:
        from torchao.prototype.mx_formats.mx_tensor import MXTensor

        return lambda inputs: (MXTensor.to_mx(inputs["x"], getattr(torch, dtype), 32).dequantize(inputs["x"].dtype),)

    return build


def _torchao_nvfp4(inputs: Inputs) -> Callable[[Inputs], tuple[Tensor, ...]]:
    from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor

    def run(inputs: Inputs) -> tuple[Tensor, ...]:
        x = inputs["x"]
        return (NVFP4Tensor.to_nvfp4(x, per_tensor_scale=inputs["scale"]).dequantize(x.dtype),)

    return run


# Exponent and mantissa of an element, and of a block's scale.
_MODELOPT_BITS = {"mxfp8": ((4, 3), (8, 0)), "mxfp4": ((2, 1), (8, 0)), "nvfp4": ((2, 1), (4, 3))}


def _modelopt(problem: Problem) -> Callable[[Inputs], tuple[Tensor, ...]]:
    from modelopt.torch.quantization.tensor_quant import dynamic_block_quant

    size = BLOCK_FORMATS[problem.format].size
    element_bits, scale_bits = _MODELOPT_BITS[problem.format]

    def run(inputs: Inputs) -> tuple[Tensor, ...]:
        amax = inputs["scale"] * (6 * 448)
        return (dynamic_block_quant(inputs["x"], size, amax, None, element_bits, scale_bits),)

    return run


_QUICK = (64, 1024)
_SHAPES = ((1024, 1024), (4096, 4096))


def cases() -> Iterator[Case]:
    """Yield weights and activations of linear layers, in both dtypes."""
    for format in ("mxfp8", "mxfp4", "nvfp4"):
        yield Problem(format, _QUICK, torch.float32).case(quick=True)
        for dtype in (torch.float32, torch.bfloat16):
            for shape in _SHAPES:
                yield Problem(format, shape, dtype).case(quick=False)
