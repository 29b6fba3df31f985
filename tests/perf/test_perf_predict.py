"""Predictions by Little's law: the arithmetic by hand, and that the committed table has every kernel."""

from __future__ import annotations

import dataclasses

import pytest
import torch

pytest.importorskip("triton")

from tritonq.backend import is_interpreting
from tritonq.perf import predict
from tritonq.perf.codegen import ALL_CASES, GPUS
from tritonq.perf.disassembly import bytes_per_wait, main_path, parse_sass
from tritonq.perf.goals import GOALS

if is_interpreting():
    pytest.skip("an interpreting process cannot compile", allow_module_level=True)

H200 = next(gpu for gpu in GPUS if gpu.name == "H200")
# 256 MiB read and written by programs of 128 lanes, each with four loads of 16 bytes in flight.
STREAM = predict.Work(
    programs=16384,
    warps=4,
    registers=32,
    shared_bytes=0,
    in_flight=64,
    instructions=4.0,
    elements=1 << 26,
    bytes_read=1 << 28,
    bytes_written=1 << 28,
)


def test_a_stream_is_bound_by_memory() -> None:
    found = predict.predict(STREAM, H200)
    assert found.bound == "memory"
    assert found.in_flight_per_multiprocessor == 16 * 128 * 64
    assert found.seconds == pytest.approx((1 << 29) / (0.9 * 4.8e12) + predict.START)
    assert 0.95 < found.share_of_copy < 1


def test_too_few_bytes_in_flight_are_bound_by_latency() -> None:
    """One access of two bytes per lane: 4 KiB in flight on each multiprocessor, a sixth of what the memory asks for."""
    narrow = dataclasses.replace(STREAM, in_flight=2)
    found = predict.predict(narrow, H200)
    assert found.bound == "latency"
    assert found.in_flight_per_multiprocessor == 4096
    waves = 16384 / (16 * 132)
    expected = (1 << 28) * predict.LATENCY / (4096 * 132) * 8 / waves
    assert found.seconds == pytest.approx(expected + predict.START)


def test_few_programs_leave_multiprocessors_idle() -> None:
    few = dataclasses.replace(STREAM, programs=64)
    assert few.resident(132) == 1
    found = predict.predict(few, H200)
    assert found.bound == "latency"
    assert found.in_flight_per_multiprocessor == 128 * 64


def test_many_instructions_are_bound_by_issue() -> None:
    assert predict.predict(dataclasses.replace(STREAM, instructions=150.0), H200).bound == "issue"


@pytest.mark.parametrize(
    ("changes", "resident"),
    [
        ({}, 16),
        ({"registers": 128}, 4),
        ({"registers": 129}, 3),
        ({"shared_bytes": 100_000}, 2),
        ({"warps": 1, "registers": 16}, 32),
    ],
)
def test_what_limits_programs_on_a_multiprocessor(changes: dict[str, int], resident: int) -> None:
    assert dataclasses.replace(STREAM, **changes).resident(132) == resident  # type: ignore[arg-type]


SASS = """
        /*0000*/                   LDG.E R2, desc[UR4][R2.64] ;     /* 0x1 */
        /*0010*/                   FMUL R2, R2, R5 ;                /* 0x1 */
        /*0020*/                   LDG.E.128 R4, desc[UR4][R2.64] ; /* 0x1 */
        /*0030*/                   IADD3 R3, R3, 0x1, RZ ;          /* 0x1 */
        /*0040*/                   LDG.E.128 R8, desc[UR4][R2.64] ; /* 0x1 */
        /*0050*/                   FADD R4, R4, R5 ;                /* 0x1 */
        /*0060*/                   LDG.E.64 R12, desc[UR4][R2.64] ; /* 0x1 */
        /*0070*/                   EXIT ;                           /* 0x1 */
"""


def test_what_is_loaded_before_a_wait_is_in_flight_together() -> None:
    """The wide loads are waited for by the addition; the narrow one before them by the product."""
    assert bytes_per_wait(main_path(parse_sass(SASS))) == 32


LOOP = """
        /*0000*/                   LDG.E.128 R4, desc[UR4][R2.64] ; /* 0x1 */
        /*0010*/                   LDG.E.64 R8, desc[UR4][R2.64] ;  /* 0x1 */
        /*0020*/                   FADD R20, R20, {used} ;          /* 0x1 */
        /*0030*/                   LDG.E.64 R12, desc[UR4][R2.64] ; /* 0x1 */
        /*0040*/                   FADD R21, R21, R12 ;             /* 0x1 */
        /*0050*/               @P1 BRA 0x0 ;                        /* 0x1 */
        /*0060*/                   EXIT ;                           /* 0x1 */
"""


@pytest.mark.parametrize(("used", "expected"), [("R4", 16), ("R7", 16), ("R9", 16), ("R20", 32), ("R13", 32)])
def test_a_loop_loads_so_much_for_each_wait(used: str, expected: int) -> None:
    """32 bytes a turn, in two waits or in one; the last of a wide load's registers is waited for, too.

    R13 belongs to the load of the turn before, which the end of that turn has waited for already.
    """
    assert bytes_per_wait(main_path(parse_sass(LOOP.format(used=used)))) == expected


def test_a_kernel_is_read_off_its_machine_code() -> None:
    case = next(case for case in ALL_CASES if case.name == "fake_quantize/flat")
    ((name, dtype, work),) = predict.predictions([dataclasses.replace(case, dtypes=(torch.float32,))])
    assert (name, dtype) == ("fake_quantize/flat", "float32")
    elements = 64 * 64 * 56 * 56
    assert work.elements == elements
    assert work.bytes_read == work.bytes_written == 4 * elements
    assert work.programs * 4096 == pytest.approx(elements, rel=0.01)
    assert work.in_flight >= 16


def test_reductions_keep_enough_in_flight_and_are_joined_by_enough_programs() -> None:
    """By the budget file; in the layout and dtype with the fewest bytes per lane."""
    cases = [case for case in ALL_CASES if case.name in ("conv_bn_statistics/channels last int8", "observe/flat")]
    found = list(predict.predictions([dataclasses.replace(case, dtypes=(torch.bfloat16,)) for case in cases]))
    assert len(found) == 4
    assert predict.faults(found, H200) == []
    starved = [(name, dtype, dataclasses.replace(work, in_flight=16)) for name, dtype, work in found]
    assert [": 8 KiB in flight" in fault for fault in predict.faults(starved, H200)] == [True] * 2
    crowded = [(name, dtype, dataclasses.replace(work, joined_channels=32)) for name, dtype, work in found]
    assert ["joins 32 channels" in fault for fault in predict.faults(crowded, H200)] == [True] * 2


def test_the_committed_table_has_every_kernel_that_moves_data() -> None:
    lines = predict.TABLE.read_text(encoding="utf-8").splitlines()
    rows = {tuple(cell.strip() for cell in line.split("|")[1:3]) for line in lines if line.startswith("| ")}
    wanted = {
        (case.name, str(dtype).removeprefix("torch."))
        for case in ALL_CASES
        if case.kernel
        for dtype in case.dtypes
        if dtype != torch.float16
    }
    assert wanted <= rows, "run python -m tritonq.perf.predict --write"


def test_the_committed_table_has_the_goals_of_the_tail() -> None:
    text = predict.TABLE.read_text(encoding="utf-8")
    wanted = [goal.says for goal in GOALS if "conv_bn/tail" in goal.case]
    assert len(wanted) == 4
    assert all(f"| {says} |" in text for says in wanted), "run python -m tritonq.perf.predict --write"


def test_the_tail_of_a_large_tensor_is_predicted_near_the_copy_rate() -> None:
    """Of a small one the starts of its seven kernels take half."""
    (large,) = predict.tail_shares((256, 64, 56, 56), False, [H200])
    (small,) = predict.tail_shares((32, 64, 14, 14), False, [H200])
    assert 0.85 < large < 1
    assert small < 0.5
