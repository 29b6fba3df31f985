"""What the kernels compile to, on GPUs that are not here: no spills, 128-bit accesses, instruction budgets."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl

from tritonq.backend import is_interpreting
from tritonq.perf import codegen
from tritonq.perf.codegen_case import CodegenCase, meta
from tritonq.perf.disassembly import main_path, parse_amdgcn, parse_sass

if is_interpreting():
    pytest.skip("an interpreting process cannot compile", allow_module_level=True)

BUDGETED = json.loads(codegen.BUDGET_FILE.read_text())["target"]
# Cases of these budgets are bound by instructions, not by memory.
BOUND_BY_INSTRUCTIONS = (
    *("true division", "histogram", "nine candidates", "blocks of floats"),
    *("function of one tensor", "function of one tensor, backward"),
    *(f"{reads}, one write, rows that begin anywhere" for reads in ("one read", "two reads")),
)


def dtypes(case: CodegenCase, target: str) -> tuple[torch.dtype, ...]:
    """What a case is compiled for here; ``python -m tritonq.perf.codegen`` compiles it for all of its dtypes.

    float16 compiles like bfloat16 but for the conversions. Where a kernel moves data, other targets than the budget's
    compile bfloat16 alone, which takes the most registers: twice as many elements per 128 bits.
    """
    if target == BUDGETED and case.name.endswith("flat"):
        return case.dtypes
    if target != BUDGETED and case.kernel and torch.bfloat16 in case.dtypes:
        return (torch.bfloat16,)
    return tuple(dtype for dtype in case.dtypes if dtype != torch.float16)


def compilations() -> Iterator[Any]:
    """Every case for every target; ``make emulate`` has what differs from another of its kernel by its input alone."""
    for target in codegen.TARGETS:
        kernels: set[str] = set()
        for case in codegen.ALL_CASES:
            is_variant = target != BUDGETED and case.kernel in kernels
            marks = (pytest.mark.emulator,) if is_variant else ()
            yield pytest.param(case, target, id=f"{target}-{case.name}", marks=marks)
            if case.kernel:
                kernels.add(case.kernel)


@pytest.mark.parametrize(("case", "target"), list(compilations()))
def test_compiles_as_it_should(case: CodegenCase, target: str) -> None:
    report = list(codegen.rows([case], [target], dtypes(case, target)))
    assert report
    assert [fault for row in report for fault in row.faults()] == []
    measured = [row for row in report if case.kernel and row.kernel == case.kernel]
    assert len(measured) == (len(dtypes(case, target)) if case.kernel else 0)
    for row in measured:
        assert row.access_bits == case.width
        assert row.instructions is not None
        assert row.instructions > 2
        assert (row.budget is not None) is (target == BUDGETED)
        if case.budget not in BOUND_BY_INSTRUCTIONS:
            assert all(share < 1 for share in (row.issue_share or {}).values()), row


def test_other_compilers_are_allowed_a_little() -> None:
    assert codegen.allowance(json.loads(codegen.BUDGET_FILE.read_text())["triton"] + "1") == (0, 1.0)
    assert codegen.allowance("3.8.0") == (8, 1.05)


@triton.jit
def wasteful_kernel(x_ptr, y_ptr, ROWS: tl.constexpr, COLS: tl.constexpr):  # noqa: N803
    """Reads every other element, and works on it for too long."""
    offsets = tl.program_id(0) * COLS + tl.arange(0, COLS)
    x = tl.load(x_ptr + 2 * offsets)
    for _ in tl.static_range(40):
        x = x * x + 1.5
    tl.store(y_ptr + offsets, x)


@triton.jit
def spilling_kernel(x_ptr, y_ptr, ROWS: tl.constexpr, COLS: tl.constexpr):  # noqa: N803
    """Holds more than the registers can."""
    offsets = tl.arange(0, COLS)
    x = tl.load(x_ptr + offsets)
    total = tl.sum(x)
    tl.store(y_ptr + offsets, x * total)


def planted(kernel: object, cols: int) -> CodegenCase:
    def call(dtype: torch.dtype) -> None:
        x = meta(2 * cols, dtype=dtype)
        kernel[(1,)](x, torch.empty_like(x), ROWS=1, COLS=cols, num_warps=1)  # type: ignore[index]

    return CodegenCase("planted", call, kernel.__name__, 1, 1, "one read, one write", (torch.float32,))  # type: ignore[attr-defined]


def test_finds_narrow_accesses_and_too_many_instructions() -> None:
    (row,) = codegen.rows([planted(wasteful_kernel, 256)], ["cuda:90"])
    words = " ".join(row.faults())
    assert "128-bit" in words
    assert "budget 28" in words
    assert "spills" not in words


def test_finds_spills() -> None:
    for target in ("cuda:90", "hip:gfx942"):
        cols = 32768
        (row,) = codegen.rows([planted(spilling_kernel, cols)], [target])
        assert "spills" in " ".join(row.faults())


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "report.json"
    arguments = ["--kernel", "observe/flat torch_v1", "--target", "cuda:90", "--json", str(out)]
    assert codegen.main(arguments) == 0
    assert "H200: memory" in capsys.readouterr().out
    content = json.loads(out.read_text())
    assert {row["kernel"] for row in content["rows"]} == {"observe_kernel", "finish_kernel"}
    with pytest.raises(SystemExit):
        codegen.main(["--kernel", "no such kernel"])
    assert "fake_quantize/flat" in capsys.readouterr().err


SASS = """
        /*0000*/                   LDC R1, c[0x0][0x28] ;          /* 0x1 */
        /*0010*/                   LDG.E R2, desc[UR4][R2.64] ;    /* 0x1 */
        /*0020*/              @P0 BRA 0x50 ;                       /* 0x1 */
        /*0030*/                   MOV R4, 0x1 ;                   /* 0x1 */
        /*0040*/                   CALL.REL.NOINC 0xb0 ;           /* 0x1 */
        /*0050*/                   LDG.E.128 R4, desc[UR4][R2.64] ;/* 0x1 */
        /*0060*/                   FADD R4, R4, R5 ;               /* 0x1 */
        /*0070*/              @P1 BRA 0x50 ;                       /* 0x1 */
        /*0080*/                   STL [R1], R0 ;                  /* 0x1 */
        /*0090*/                   STG.E.64 desc[UR4][R2.64], R4 ; /* 0x1 */
        /*00a0*/                   EXIT ;                          /* 0x1 */
        /*00b0*/                   MUFU.RCP R4, R5 ;               /* 0x1 */
        /*00c0*/                   RET.REL.NODEC R2 0x0 ;          /* 0x1 */
        /*00d0*/                   NOP ;                           /* 0x1 */
"""


def test_reads_nvidia_disassembly() -> None:
    instructions = parse_sass(SASS)
    assert len(instructions) == 13
    assert sum(i.spills for i in instructions) == 32
    loop = main_path(instructions)
    assert loop.is_loop
    assert [i.opcode for i in loop.instructions] == ["LDG.E.128", "FADD", "BRA"]
    assert loop.bits(stores=False) == 128
    straight = main_path(parse_sass(SASS.replace("@P1 BRA 0x50", "@P1 BRA 0x80")))
    assert not straight.is_loop
    # Without the division's slow path (0x30, 0x40 and what they call).
    assert len(straight.instructions) == 9
    assert straight.bits(stores=True) == 64


SM_80_LOOP = """
        /*0000*/                   LDG.E.128 R4, [R2.64] ;         /* 0x1 */
        /*0010*/               @P0 CALL.REL.NOINC 0x30 ;           /* 0x1 */
        /*0020*/                   BRA 0x0 ;                       /* 0x1 */
        /*0030*/                   STG.E [R2.64], R4 ;             /* 0x1 */
        /*0040*/                   EXIT ;                          /* 0x1 */
"""


def test_a_call_over_the_branch_back_leaves_a_loop() -> None:
    loop = main_path(parse_sass(SM_80_LOOP))
    assert loop.is_loop
    assert [i.opcode.split(".")[0] for i in loop.instructions] == ["LDG", "CALL", "BRA"]


AMDGCN = """
kernel:
\ts_load_dwordx2 s[0:1], s[0:1], 0x0
.LBB0_1:                                ; %loop
\tglobal_load_dwordx4 v[0:3], v4, s[0:1]
\tv_add_f32_e32 v0, v1, v2
\ts_cbranch_scc1 .LBB0_1
\tglobal_store_short v4, v0, s[0:1]
\tscratch_store_dword off, v0, s32
\ts_endpgm
"""


def test_reads_amd_assembly() -> None:
    instructions = parse_amdgcn(AMDGCN)
    path = main_path(instructions)
    assert path.is_loop
    assert len(path.instructions) == 3
    assert path.bits_of_width(128) == 128
    assert [i.access_bits for i in instructions if i.stores] == [16]
    assert sum(i.spills for i in instructions) == 32
