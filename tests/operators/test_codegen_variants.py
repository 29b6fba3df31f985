"""What single kernels compile to on GPUs that are not here: matrix units, tf32 where allowed, parts that are absent."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

pytest.importorskip("triton")

from tritonq.backend import is_interpreting
from tritonq.grid import Grid
from tritonq.kernels import conv2d, conv_bn, residual
from tritonq.perf import codegen
from tritonq.perf.codegen_case import meta
from tritonq.quantized_type import QINT8

if is_interpreting():
    pytest.skip("an interpreting process cannot compile", allow_module_level=True)

BY_NAME = {case.name: case for case in codegen.ALL_CASES}


def ptx(name: str, dtype: torch.dtype, target: str = "cuda:80") -> str:
    with codegen.compiling_for(target) as launched:
        BY_NAME[name].call(dtype)
    return str(launched[0].kernel.asm["ptx"])


def test_precision_of_products(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    assert ".f32.tf32.tf32.f32" in ptx("conv2d/3x3", torch.float32)
    assert ".f32.f16.f16.f32" in ptx("conv2d/3x3 codes", torch.float32)
    assert ".f32.bf16.bf16.f32" in ptx("conv2d/3x3", torch.bfloat16)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    exact = ptx("conv2d/3x3", torch.float32)
    assert "tf32" not in exact
    assert "fma.rn.f32" in exact


@pytest.mark.parametrize("target", ["cuda:80", "cuda:90"])
def test_codes_meet_in_matrix_units(target: str) -> None:
    text = ptx("int8_conv/128 channels to codes", torch.uint8, target)
    assert "mma" in text
    assert ".s32.s8.s8" in text


@pytest.mark.parametrize("ceiling", [None, math.inf, 6.0])
@pytest.mark.parametrize("quantized", [False, True])
def test_convolution_without_a_quantizer_or_its_switch(ceiling: float | None, quantized: bool) -> None:
    x, weight = meta(4, 8, 6, 6, dtype=torch.float32), meta(16, 8, 3, 3, dtype=torch.float32)
    grid = Grid(meta(1, dtype=torch.float32), None, QINT8) if quantized else None
    with codegen.compiling_for("cuda:90") as launched:
        conv2d.conv2d(x, weight, None, (1, 1), (1, 1), (1, 1), 1, ceiling, grid)
    assert len(launched) == 1


def _tail(ceiling: float | None) -> None:
    x, vectors = meta(4, 8, 6, 6, dtype=torch.float32), [meta(8, dtype=torch.float32) for _ in range(6)]
    conv_bn.apply(x, vectors[0], vectors[1], None, ceiling)
    conv_bn.backward(x, x, vectors, None, ceiling)


def _join(ceiling: float | None) -> None:
    x = meta(4, 8, 6, 6, dtype=torch.bfloat16)
    residual.forward(x, x, None, None, ceiling)


@pytest.mark.parametrize("ceiling", [None, math.inf, 6.0])
@pytest.mark.parametrize("call", [_tail, _join])
def test_tail_and_join_without_a_quantizer(call: Callable[[float | None], None], ceiling: float | None) -> None:
    with codegen.compiling_for("cuda:90") as launched:
        call(ceiling)
    assert launched
