"""What the fixed-point kernels compile to on GPUs that are not here: no spills, and int8 matrix instructions."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from tritonq.backend import is_interpreting
from tritonq.kernels import fixed_point, int8_conv
from tritonq.perf import codegen
from tritonq.perf.codegen_cases import CodegenCase, meta

if is_interpreting():
    pytest.skip("an interpreting process cannot compile", allow_module_level=True)


def search(dtype: torch.dtype) -> object:
    return fixed_point.frac_len_errors(meta(64, 64, 56, 56, dtype=dtype), 0, 255, 9)


def search_weights(dtype: torch.dtype) -> object:
    return fixed_point.frac_len_errors(meta(512, 512, 3, 3, dtype=dtype), -127, 127, 8, 0)


def conv(channels: int, groups: int, out_dtype: torch.dtype, wide: bool = False) -> object:
    def call(dtype: torch.dtype) -> object:
        x = meta(8, channels, 28, 28, dtype=dtype, channels_last=True)
        weight = meta(128, channels // groups, 3, 3, dtype=torch.int8, channels_last=groups == 1)
        bias, shift = meta(128, dtype=torch.int32), meta(128, dtype=torch.int32)
        saturated = meta(1, dtype=torch.int64) if wide else None
        codes = out_dtype != torch.int32
        arguments = ((1, 1), (1, 1), (1, 1), groups, 0, 255, out_dtype, saturated)
        return int8_conv.int8_conv2d(x, weight, bias, shift if codes else None, *arguments)

    return call


CODES = (torch.uint8, torch.int8)
CASES = (
    CodegenCase("search/flat", search, "", 1, 0, ""),
    CodegenCase("search/weight", search_weights, "", 1, 0, "", (torch.float32,)),
    CodegenCase("conv/128 channels to codes", conv(128, 1, torch.uint8), "", 1, 1, "", CODES),
    CodegenCase("conv/3 channels to codes", conv(3, 1, torch.uint8), "", 1, 1, "", CODES),
    CodegenCase("conv/to accumulators", conv(128, 1, torch.int32), "", 1, 1, "", CODES),
    CodegenCase("conv/saturating", conv(128, 1, torch.uint8, wide=True), "", 1, 1, "", (torch.uint8,)),
    CodegenCase("conv/depthwise", conv(128, 128, torch.uint8), "", 1, 1, "", CODES),
)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("target", codegen.TARGETS)
def test_compiles_without_spills(case: CodegenCase, target: str) -> None:
    report = list(codegen.rows([case], [target], case.dtypes))
    assert len(report) == len(case.dtypes)
    assert [fault for row in report for fault in row.faults()] == []


@pytest.mark.parametrize("target", ["cuda:80", "cuda:90"])
def test_codes_meet_in_matrix_units(target: str) -> None:
    with codegen.compiling_for(target) as launched:
        conv(128, 1, torch.uint8)(torch.uint8)
    (_, _, kernel), *_ = launched
    assert "mma" in kernel.asm["ptx"]
    assert ".s32.s8.s8" in kernel.asm["ptx"]
