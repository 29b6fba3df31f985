"""The emulator of compiled kernels reports what a GPU would get wrong in silence, and computes what PTX says."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

import triton
import triton.language as tl

from emulator import EmulatedGpu, EmulatorError, GlobalMemory, Launch, Program, emulated
from emulator import run as run_launch
from tritonq.backend import is_interpreting

if is_interpreting():
    pytest.skip("an interpreting process cannot compile", allow_module_level=True)

REGISTERS = ".reg .pred %p<9>; .reg .b16 %rs<9>; .reg .b32 %r<19>; .reg .b64 %rd<19>;"


def run(body: str, *tensors: Tensor, threads: int = 32, blocks: int = 1, shared: int = 0) -> None:
    """Run PTX on tensors, whose addresses are in ``%rd0``, ``%rd1``, …; ``%r0`` is the thread, ``%r1`` its block."""
    declared = ", ".join(f".param .u64 param_{number}" for number in range(len(tensors)))
    loads = "\n".join(f"ld.param.b64 %rd{number}, [param_{number}];" for number in range(len(tensors)))
    text = f"""
.visible .entry kernel({declared})
.reqntid {threads}
{{
    {REGISTERS}
    {loads}
    mov.u32 %r0, %tid.x;
    mov.u32 %r1, %ctaid.x;
    {body}
    ret;
}}
"""
    memory = GlobalMemory()
    for tensor in tensors:
        memory.add(tensor.data_ptr(), tensor.numel() * tensor.element_size())
    addresses = {f"param_{number}": tensor.data_ptr() for number, tensor in enumerate(tensors)}
    run_launch(Launch(Program.parse(text), (blocks, 1, 1), addresses, shared, memory))


# Writes each thread's number to its element of the first tensor.
STORE = "mad.wide.s32 %rd9, %r0, 4, %rd0; st.global.b32 [ %rd9 + 0 ], { %r0 };"


# Writes two halves of a word to local memory, by a generic address, and stores the word.
LOCAL = """
    .local .align 4 .b8 __local_depot0[4];
    mov.b64 %rd7, __local_depot0;
    cvta.local.u64 %rd8, %rd7;
    cvt.u16.u32 %rs0, %r0;
    st.b16 [ %rd8 ], %rs0;
    mov.b16 %rs1, 7;
    st.local.b16 [ %rd7{end} ], %rs1;
    ld.b32 %r4, [ %rd8 ];
    mad.wide.s32 %rd9, %r0, 4, %rd0;
    st.b32 [ %rd9 ], %r4;
"""


class TestMemory:
    def test_stores_within_bounds(self) -> None:
        x = torch.zeros(32, dtype=torch.int32)
        run(STORE, x)
        assert torch.equal(x, torch.arange(32, dtype=torch.int32))

    @pytest.mark.parametrize(("length", "offset"), [(31, 0), (32, 4), (32, -4)])
    def test_a_store_out_of_bounds(self, length: int, offset: int) -> None:
        with pytest.raises(EmulatorError, match=r"global store of 4 bytes out of bounds by 1 threads"):
            run(STORE.replace("+ 0", f"+ {offset}"), torch.zeros(length, dtype=torch.int32))

    def test_a_load_out_of_bounds_of_one_tensor_and_inside_of_none(self) -> None:
        with pytest.raises(EmulatorError, match="global load of 4 bytes out of bounds"):
            run("ld.global.b32 { %r2 }, [ %rd0 + 12 ];", torch.zeros(3), torch.zeros(3))

    def test_an_atomic_out_of_bounds(self) -> None:
        with pytest.raises(EmulatorError, match="global atomic addition of 8 bytes out of bounds"):
            run("mov.b64 %rd2, 1; atom.global.gpu.acq_rel.add.u64 %rd3, [%rd0+8], %rd2;", torch.zeros(1).double())

    def test_a_misaligned_vector(self) -> None:
        body = "ld.global.v4.b32 { %r2, %r3, %r4, %r5 }, [ %rd0 + 4 ];"
        with pytest.raises(EmulatorError, match="global load of 16 bytes is misaligned by 4"):
            run(body, torch.zeros(8))

    def test_a_misaligned_word(self) -> None:
        with pytest.raises(EmulatorError, match="global store of 4 bytes is misaligned by 2"):
            run(STORE.replace("+ 0", "+ 2"), torch.zeros(40))

    @pytest.mark.parametrize("body", ["st.shared.b32 [ %r2 + 0 ], %r0;", "ld.shared.b32 %r3, [ %r2 + 0 ];"])
    def test_shared_memory_out_of_bounds(self, body: str) -> None:
        run(f"shl.b32 %r2, %r0, 2; {body}", torch.zeros(1), shared=128)
        with pytest.raises(EmulatorError, match=r"shared (store|load) of 4 bytes at byte 124 of 124, out of bounds"):
            run(f"shl.b32 %r2, %r0, 2; {body}", torch.zeros(1), shared=124)

    def test_each_thread_has_its_own_local_memory(self) -> None:
        x = torch.zeros(32, dtype=torch.int32)
        run(LOCAL.format(end="+2"), x)
        low, high = torch.arange(32, dtype=torch.int32), 7
        assert torch.equal(x, low + (high << 16))
        with pytest.raises(EmulatorError, match="local store of 2 bytes at byte 4 of 4, out of bounds"):
            run(LOCAL.format(end="+4"), x)

    def test_generic_addresses_of_two_memories(self) -> None:
        body = "setp.lt.s32 %p1, %r0, 9; selp.b64 %rd2, %rd0, %rd8, %p1; st.b32 [ %rd2 + 0 ], %r0;"
        with pytest.raises(EmulatorError, match="generic addresses of two memories"):
            run(LOCAL.format(end="+2") + body, torch.zeros(32))

    def test_atomics_add_one_after_the_other(self) -> None:
        total, before = torch.tensor([5], dtype=torch.int32), torch.zeros(32, dtype=torch.int32)
        body = "mov.b32 %r2, 2; atom.global.gpu.acq_rel.add.u32 %r3, [%rd1+0], %r2;"
        run(body + "mad.wide.s32 %rd9, %r0, 4, %rd0; st.global.b32 [ %rd9 + 0 ], { %r3 };", before, total)
        assert int(total) == 5 + 64
        assert torch.equal(before, 5 + 2 * torch.arange(32, dtype=torch.int32))


# Every thread writes its place in shared memory, and reads its mirror image's.
EXCHANGE = """
    shl.b32 %r2, %r0, 2;
    st.shared.b32 [ %r2 + 0 ], %r0;
    {barrier}
    sub.s32 %r3, 252, %r2;
    ld.shared.b32 %r4, [ %r3 + 0 ];
    mad.wide.s32 %rd9, %r0, 4, %rd0;
    st.global.b32 [ %rd9 + 0 ], {{ %r4 }};
"""


class TestOrder:
    def test_a_barrier_orders(self) -> None:
        x = torch.zeros(64, dtype=torch.int32)
        run(EXCHANGE.format(barrier="bar.sync 0;"), x, threads=64, shared=256)
        assert torch.equal(x, torch.arange(64, dtype=torch.int32).flip(0))

    def test_a_missing_barrier(self) -> None:
        x = torch.zeros(64, dtype=torch.int32)
        with pytest.raises(EmulatorError, match=r"race between warps of a block at 64 shared locations.* after 0 barr"):
            run(EXCHANGE.format(barrier=""), x, threads=64, shared=256)

    def test_a_barrier_that_some_threads_miss(self) -> None:
        body = "setp.lt.s32 %p1, %r0, 40; @%p1 bra $L__there; bar.sync 0;\n$L__there: mov.b32 %r2, 0;"
        with pytest.raises(EmulatorError, match="a barrier that not every thread of the block arrives at"):
            run(body, torch.zeros(1), threads=64)

    def test_threads_wait_at_a_barrier_for_those_behind_it(self) -> None:
        """Triton's compiler puts what few threads run behind the loop that they come back to."""
        x = torch.zeros(64, dtype=torch.int32)
        away = "setp.lt.s32 %p1, %r0, 40; @%p1 bra $L__away;\n$L__back: bar.sync 0;"
        detour = "bra $L__end;\n$L__away: mov.b32 %r2, %r2; bra $L__back;\n$L__end: mov.b32 %r2, 0;"
        run(EXCHANGE.format(barrier=away) + detour, x, threads=64, shared=256)
        assert torch.equal(x, torch.arange(64, dtype=torch.int32).flip(0))

    def test_a_race_between_warps_that_write_different_values(self) -> None:
        with pytest.raises(EmulatorError, match="race between warps of a block at 1 global locations"):
            run("st.global.b32 [ %rd0 + 0 ], { %r0 };", torch.zeros(1), threads=64)
        run("st.global.b32 [ %rd0 + 0 ], { %r1 };", torch.zeros(1), threads=64)  # one value, twice

    def test_a_scalar_that_all_warps_read_and_one_writes(self) -> None:
        """Triton's compiler makes this of ``tl.store(x, tl.load(x) + 1)``: only the first thread's value is used."""
        x = torch.tensor([7], dtype=torch.int32)
        body = "ld.global.b32 { %r2 }, [ %rd0 + 0 ]; add.s32 %r2, %r2, 1; setp.eq.s32 %p1, %r0, {writer};"
        run(body.replace("{writer}", "0") + "@%p1 st.global.b32 [ %rd0 + 0 ], { %r2 };", x, threads=96)
        assert int(x) == 8
        body = body.replace("setp.eq.s32 %p1, %r0, {writer}", "and.b32 %r3, %r0, 31; setp.eq.s32 %p1, %r3, 0")
        with pytest.raises(EmulatorError, match="the order of warps changes the result"):
            run(body + "@%p1 st.global.b32 [ %rd0 + 0 ], { %r2 };", x, threads=96)

    @pytest.mark.parametrize(
        "body",
        [
            "st.global.b32 [ %rd0 + 0 ], { %r1 };",
            "mov.b32 %r2, 1; atom.global.gpu.acq_rel.add.u32 %r3, [%rd0+0], %r2; ld.global.b32 { %r4 }, [ %rd0 + 0 ];",
        ],
    )
    def test_a_race_between_blocks(self, body: str) -> None:
        with pytest.raises(EmulatorError, match="race between blocks at 1 global locations"):
            run(body, torch.zeros(1), blocks=2)

    def test_atomics_of_several_blocks_are_no_race(self) -> None:
        total = torch.zeros(1, dtype=torch.int32)
        run("mov.b32 %r2, 1; atom.global.gpu.acq_rel.add.u32 %r3, [%rd0+0], %r2;", total, blocks=3)
        assert int(total) == 96

    def test_a_shuffle_that_reads_a_lane_that_takes_no_part(self) -> None:
        body = "setp.lt.s32 %p1, %r0, 5; @%p1 shfl.sync.bfly.b32 %r2, %r0, 1, 31, -1;"
        with pytest.raises(EmulatorError, match="reads a lane that takes no part"):
            run(body, torch.zeros(1))

    def test_what_does_not_end(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("emulator.machine._MAX_STEPS", 1000)
        with pytest.raises(EmulatorError, match="does not end"):
            run("$L__again: bra $L__again;", torch.zeros(1))


def float_bits(value: float) -> str:
    return f"0f{np.float32(value).view(np.uint32):08X}"


# Instructions that leave their result in %r2, and its bits.
RESULTS: dict[str, int] = {
    "mov.b32 %r2, -1;": 0xFFFFFFFF,
    "mov.b32 %r3, 0x12345678; mov.b32 {%rs1, %rs2}, %r3; mov.b32 %r2, {%rs2, %rs1};": 0x56781234,
    "mov.b32 %r3, 0x12345678; prmt.b32 %r2, %r3, %r3, 0x0123;": 0x78563412,
    "mov.b32 %r3, 0x80; prmt.b32 %r2, %r3, %r3, 0x8888;": 0xFFFFFFFF,
    "mov.b32 %r3, -8; shr.s32 %r2, %r3, 40;": 0xFFFFFFFF,
    "mov.b32 %r3, -8; shr.u32 %r2, %r3, 40;": 0,
    "mov.b32 %r3, -7; mov.b32 %r4, 2; div.s32 %r2, %r3, %r4;": 2**32 - 3,
    "mov.b32 %r3, -7; mov.b32 %r4, 2; rem.s32 %r2, %r3, %r4;": 2**32 - 1,
    "mov.b32 %r3, -7; mul.hi.s32 %r2, %r3, 3;": 2**32 - 1,
    "mov.b32 %r3, -7; mul.hi.u32 %r2, %r3, 3;": 2,
    "mov.b32 %r3, -3; mad.lo.s32 %r2, %r3, 5, 1;": 2**32 - 14,
    "mov.b32 %r3, -2; mul.wide.s32 %rd3, %r3, 3; shr.s64 %rd4, %rd3, 1; cvt.u32.u64 %r2, %rd4;": 2**32 - 3,
    "mov.b32 %r3, 0xF0; bfe.u32 %r2, %r3, 4, 3;": 7,
    "mov.b32 %r3, 0xF0; bfe.s32 %r2, %r3, 4, 3;": 0xFFFFFFFF,
    "mov.b32 %r3, 5; mov.b32 %r4, 0xFFFF; bfi.b32 %r2, %r3, %r4, 4, 4;": 0xFF5F,
    "mov.b32 %r3, 0xF0F0; popc.b32 %r2, %r3;": 8,
    "lop3.b32 %r2, 12, 10, 6, 0x96;": 0,
    # (1 + 2^-12)^2 - 1 needs one rounding: 2^-11 + 2^-24.
    "fma.rn.f32 %r2, 0f3F800800, 0f3F800800, 0fBF800000;": np.float32(2**-11 + 2**-24).view(np.uint32),
    "mul.rn.f32 %r2, 0f3F800800, 0f3F800800;": np.float32(1 + 2**-11).view(np.uint32),
    f"min.f32 %r2, 0f7FC00000, {float_bits(2)};": np.float32(2).view(np.uint32),
    f"div.rn.f32 %r2, {float_bits(1)}, {float_bits(3)};": np.float32(1 / 3).view(np.uint32),
    f"cvt.rn.bf16.f32 %rs1, {float_bits(1 + 2**-8)}; cvt.f32.bf16 %r2, %rs1;": np.float32(1).view(np.uint32),
    f"cvt.rn.bf16.f32 %rs1, {float_bits(1 + 3 * 2**-8)}; cvt.f32.bf16 %r2, %rs1;": np.float32(1 + 2**-6).view(
        np.uint32
    ),
    f"cvt.rn.f16x2.f32 %r2, {float_bits(1)}, {float_bits(70000)};": 0x3C007C00,
    f"cvt.rzi.s32.f32 %r2, {float_bits(-2.9)};": 2**32 - 2,
    f"cvt.rzi.s32.f32 %r2, {float_bits(1e20)};": 2**31 - 1,
    "cvt.rzi.s32.f32 %r2, 0f7FC00000;": 0,
    f"cvt.rmi.f32.f32 %r2, {float_bits(-0.5)};": np.float32(-1).view(np.uint32),
    "mov.b16 %rs1, 0x80; cvt.s32.s8 %r2, %rs1;": 0xFFFFFF80,
    "setp.neu.f32 %p1, 0f7FC00000, 0f7FC00000; selp.b32 %r2, 1, 0, %p1;": 1,
    "setp.ne.f32 %p1, 0f7FC00000, 0f7FC00000; selp.b32 %r2, 1, 0, %p1;": 0,
    "setp.lo.u32 %p1, 1, -1; selp.b32 %r2, 1, 0, %p1;": 1,
    "setp.lt.s32 %p1, %r0, 3; vote.sync.ballot.b32 %r2, %p1, -1;": 7,
    "redux.sync.add.s32 %r2, %r0, -1;": 31 * 16,
    "redux.sync.max.s32 %r2, %r0, -1;": 31,
    "shfl.sync.idx.b32 %r2, %r0, 9, 31, -1;": 9,
}


class TestInstructions:
    @pytest.mark.parametrize("body", RESULTS)
    def test_result(self, body: str) -> None:
        x = torch.zeros(1, dtype=torch.int32)
        run(f"{body} st.global.b32 [ %rd0 + 0 ], {{ %r2 }};", x)
        assert int(x) % 2**32 == int(RESULTS[body])

    def test_double_precision_products_are_fused(self) -> None:
        x = torch.zeros(1, dtype=torch.float64)
        bits = f"0d{np.float64(1 + 2**-30).view(np.uint64):016X}"
        run(f"fma.rn.f64 %rd3, {bits}, {bits}, 0dBFF0000000000000; st.global.b64 [ %rd0 + 0 ], {{ %rd3 }};", x)
        assert float(x) == 2**-29 + 2**-60

    def test_loops_with_different_ends(self) -> None:
        x = torch.zeros(32, dtype=torch.int32)
        loop = "$L__loop: add.s32 %r2, %r2, 1; setp.lt.s32 %p1, %r2, %r0; @%p1 bra $L__loop;"
        run(f"mov.b32 %r2, 0; {loop} mad.wide.s32 %rd9, %r0, 4, %rd0; st.global.b32 [ %rd9 + 0 ], {{ %r2 }};", x)
        assert torch.equal(x, torch.arange(32, dtype=torch.int32).clamp(min=1))

    @pytest.mark.parametrize(
        "body", ["lg2.approx.f32 %r2, %r3;", "add.ftz.f32 %r2, %r3, %r3;", "div.full.f32 %r2, %r3, %r3;"]
    )
    def test_what_it_does_not_know_it_refuses(self, body: str) -> None:
        with pytest.raises(EmulatorError, match=re.escape(body.rstrip(";"))):
            run(f"mov.b32 %r3, 0; {body}", torch.zeros(1))


@triton.jit
def neighbour_kernel(x_ptr, y_ptr, n, BARRIER: tl.constexpr, BLOCK: tl.constexpr):  # noqa: N803
    """Writes a block and reads it from the other end."""
    at = tl.arange(0, BLOCK)
    tl.store(y_ptr + at, tl.load(x_ptr + at, mask=at < n, other=0.0))
    if BARRIER:
        tl.debug_barrier()
    tl.store(x_ptr + at, tl.load(y_ptr + BLOCK - 1 - at), mask=at < n)


@triton.jit
def product_kernel(a_ptr, b_ptr, c_ptr, SIZE: tl.constexpr, ACCUMULATOR: tl.constexpr):  # noqa: N803
    row, col = tl.arange(0, SIZE)[:, None], tl.arange(0, SIZE)[None, :]
    a, b = tl.load(a_ptr + row * SIZE + col), tl.load(b_ptr + row * SIZE + col)
    tl.store(c_ptr + row * SIZE + col, tl.dot(a, b, out_dtype=ACCUMULATOR, input_precision="tf32"))


def launched(kernel: Any, *args: Any, architecture: int = 90, **constants: Any) -> None:
    with emulated(EmulatedGpu(architecture)):
        kernel[(1,)](*args, **constants)


class TestTriton:
    def test_a_barrier_orders_global_memory(self) -> None:
        x, y = torch.arange(256.0), torch.zeros(256)
        launched(neighbour_kernel, x, y, 256, BARRIER=True, BLOCK=256)
        assert torch.equal(x, torch.arange(256.0).flip(0))

    def test_a_missing_barrier(self) -> None:
        with pytest.raises(EmulatorError, match="neighbour_kernel: race between warps of a block"):
            launched(neighbour_kernel, torch.arange(256.0), torch.zeros(256), 256, BARRIER=False, BLOCK=256)

    def test_a_mask_that_lets_too_much_through(self) -> None:
        with pytest.raises(EmulatorError, match=r"neighbour_kernel: global load .* out of bounds"):
            launched(neighbour_kernel, torch.zeros(200), torch.zeros(256), 256, BARRIER=True, BLOCK=256)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.int8])
    def test_matrix_products(self, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(0)
        # Small integers: every product and sum is exact, in tf32 too.
        a, b = (torch.randint(-20, 20, (32, 32), generator=generator).to(dtype) for _ in range(2))
        is_integer = dtype == torch.int8
        c = torch.zeros(32, 32, dtype=torch.int32 if is_integer else torch.float32)
        accumulator = tl.int32 if is_integer else tl.float32
        launched(product_kernel, a, b, c, architecture=80, SIZE=32, ACCUMULATOR=accumulator)
        assert torch.equal(c.double(), a.double() @ b.double())
