"""What the folded convolution compiles to on GPUs that are not here: no spills, matrix units, tf32 where allowed."""

from __future__ import annotations

import math

import pytest
import torch

pytest.importorskip("triton")

from tritonq.backend import is_interpreting
from tritonq.grid import Grid
from tritonq.kernels import conv2d
from tritonq.perf import codegen
from tritonq.perf.codegen_cases import CodegenCase, meta
from tritonq.perf.codegen_conv2d import CASES
from tritonq.qparams import QINT8

if is_interpreting():
    pytest.skip("an interpreting process cannot compile", allow_module_level=True)

BY_NAME = {case.name: case for case in CASES}


@pytest.mark.parametrize("target", codegen.TARGETS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_compiles_without_spills(case: CodegenCase, target: str) -> None:
    # float32 takes other instructions on each target, float16 the same as bfloat16: that is left to the report.
    dtypes = [dtype for dtype in case.dtypes if dtype != torch.float16]
    report = list(codegen.rows([case], [target], dtypes))
    assert len(report) == len(dtypes)
    assert [fault for row in report for fault in row.faults()] == []


def ptx(name: str, dtype: torch.dtype) -> str:
    with codegen.compiling_for("cuda:80") as launched:
        BY_NAME[name].call(dtype)
    kernel = launched[0].kernel
    return str(kernel.asm["ptx"])


def test_precision_of_products(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    assert ".f32.tf32.tf32.f32" in ptx("conv2d/3x3", torch.float32)
    assert ".f32.f16.f16.f32" in ptx("conv2d/3x3 codes", torch.float32)
    assert ".f32.bf16.bf16.f32" in ptx("conv2d/3x3", torch.bfloat16)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    exact = ptx("conv2d/3x3", torch.float32)
    assert "tf32" not in exact
    assert "fma.rn.f32" in exact


@pytest.mark.parametrize("ceiling", [None, math.inf, 6.0])
@pytest.mark.parametrize("quantized", [False, True])
def test_compiles_without_a_quantizer_or_its_switch(ceiling: float | None, quantized: bool) -> None:
    x, weight = meta(4, 8, 6, 6, dtype=torch.float32), meta(16, 8, 3, 3, dtype=torch.float32)
    grid = Grid(meta(1, dtype=torch.float32), None, QINT8) if quantized else None
    with codegen.compiling_for("cuda:90") as launched:
        conv2d.conv2d(x, weight, None, (1, 1), (1, 1), (1, 1), 1, ceiling, grid)
    assert len(launched) == 1
