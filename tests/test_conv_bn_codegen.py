"""What the convolution-BatchNorm kernels compile to on GPUs that are not here: no spills, 128-bit accesses, budgets."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from tritonq.backend import is_interpreting
from tritonq.perf import codegen
from tritonq.perf.codegen_cases import CodegenCase
from tritonq.perf.codegen_conv_bn import CASES, WEIGHTS

if is_interpreting():
    pytest.skip("an interpreting process cannot compile", allow_module_level=True)

TARGETS = tuple(codegen.TARGETS)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_tail_and_join(case: CodegenCase, target: str) -> None:
    dtypes = (torch.float32, torch.bfloat16) if target == "cuda:90" else (torch.bfloat16,)
    report = list(codegen.rows([case], [target], dtypes))
    assert [fault for row in report for fault in row.faults()] == []
    measured = [row for row in report if row.kernel == case.kernel]
    assert len(measured) == len(dtypes)
    for row in measured:
        assert row.access_bits == 128
        assert all(share < 1 for share in (row.issue_share or {}).values()), row


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_do_not_spill(name: str, target: str) -> None:
    for call in WEIGHTS[name]:
        case = CodegenCase("weight", call, "none", 1, 1, "one read", (torch.float32,))
        report = list(codegen.rows([case], [target]))
        assert report
        assert [fault for row in report for fault in row.faults()] == []
