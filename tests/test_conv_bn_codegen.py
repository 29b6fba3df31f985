"""What the convolution-BatchNorm kernels compile to on GPUs that are not here: no spills, 128-bit accesses, budgets."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

pytest.importorskip("triton")

from tritonq.backend import is_interpreting
from tritonq.kernels import conv_bn, residual
from tritonq.perf import codegen
from tritonq.perf.codegen_cases import CodegenCase, meta
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


def _tail(ceiling: float | None) -> None:
    x, vectors = meta(4, 8, 6, 6, dtype=torch.float32), [meta(8, dtype=torch.float32) for _ in range(6)]
    conv_bn.apply(x, vectors[0], vectors[1], None, ceiling)
    conv_bn.backward(x, x, vectors, None, ceiling)


def _join(ceiling: float | None) -> None:
    x = meta(4, 8, 6, 6, dtype=torch.bfloat16)
    residual.forward(x, x, None, None, ceiling)


@pytest.mark.parametrize("ceiling", [None, math.inf, 6.0])
@pytest.mark.parametrize("call", [_tail, _join])
def test_compiles_without_a_quantizer(call: Callable[[float | None], None], ceiling: float | None) -> None:
    with codegen.compiling_for("cuda:90") as launched:
        call(ceiling)
    assert launched
