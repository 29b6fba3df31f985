"""What the fixed-point kernels compile to on GPUs that are not here: no spills, and int8 matrix instructions."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from tritonq.backend import is_interpreting
from tritonq.perf import codegen
from tritonq.perf.codegen_cases import CodegenCase
from tritonq.perf.codegen_fixed_point import CASES, conv

if is_interpreting():
    pytest.skip("an interpreting process cannot compile", allow_module_level=True)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("target", codegen.TARGETS)
def test_compiles_as_it_should(case: CodegenCase, target: str) -> None:
    report = list(codegen.rows([case], [target]))
    assert len(report) == len(case.dtypes)
    assert [fault for row in report for fault in row.faults()] == []
    for row in report:
        assert (row.budget is not None) is bool(case.kernel and target == "cuda:90")


def test_the_report_of_the_command_line_holds_them() -> None:
    assert set(CASES) <= set(codegen.ALL_CASES)


@pytest.mark.parametrize("target", ["cuda:80", "cuda:90"])
def test_codes_meet_in_matrix_units(target: str) -> None:
    with codegen.compiling_for(target) as launched:
        conv(128, 1, torch.uint8)(torch.uint8)
    (_, _, kernel), *_ = launched
    assert "mma" in kernel.asm["ptx"]
    assert ".s32.s8.s8" in kernel.asm["ptx"]
