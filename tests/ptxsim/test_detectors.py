"""Hand-written PTX with known bugs, and without: what the emulator says, and what it computes."""

from __future__ import annotations

import os
import shutil
import struct
import sys
from pathlib import Path

import pytest
import torch

pytestmark = [
    pytest.mark.ci,
    pytest.mark.skipif(
        shutil.which(os.environ.get("CXX", "c++").split()[0]) is None, reason="needs a C++ compiler"
    ),
]

HEAD = """.version 8.0
.target sm_80
.address_size 64
.shared .align 16 .b8 buf[1024];
.visible .entry k(.param .u64 p) {
 .reg .pred %p<9>; .reg .b32 %r<30>; .reg .b64 %rd<9>; .reg .f32 %f<30>;
 ld.param.u64 %rd1, [p];
 mov.u32 %r1, %tid.x;
 shl.b32 %r2, %r1, 2;
 mov.u32 %r3, buf;
 add.s32 %r4, %r3, %r2;
 cvt.u64.u32 %rd2, %r2;
 add.s64 %rd3, %rd1, %rd2;
"""
PUT = " st.shared.u32 [%r4], %r1;\n"
SWAP = " xor.b32 %r5, %r4, 4;\n ld.shared.u32 %r6, [%r5];\n st.global.u32 [%rd3], %r6;"
FAR = SWAP.replace("%r4, 4", "%r4, 128")
SHUFFLE = " shfl.sync.bfly.b32 %r9, %r1, 1, 31, -1;\n"
QUADS = " and.b32 %r7, %r1, 28;\n mov.u32 %r8, 15;\n shl.b32 %r8, %r8, %r7;\n bar.warp.sync %r8;\n"
COPY = (
    " st.global.u32 [%rd3], %r1;\n cp.async.ca.shared.global [%r4], [%rd3], 4;\n"
    " cp.async.commit_group;\n"
)
TAKE = " ld.shared.u32 %r6, [%r4];\n st.global.u32 [%rd3], %r6;"
WAIT = " cp.async.wait_group 0;\n"
SPLIT = " setp.lt.u32 %p1, %r1, 16;\n @%p1 bra A;\n"
READ_RACE = "shared race read after write"
# body, threads, findings, answers
CASES = {
    "lanes exchange behind bar.warp.sync": (
        PUT + " bar.warp.sync -1;\n" + SWAP, 32, [], [i ^ 1 for i in range(32)],
    ),
    "lanes exchange without": (PUT + SWAP, 32, [READ_RACE], None),
    "lanes exchange behind a shuffle": (PUT + SHUFFLE + SWAP, 32, [READ_RACE], None),
    "quads synchronise, neighbours exchange": (
        PUT + QUADS + SWAP, 32, [], [i ^ 1 for i in range(32)],
    ),
    "quads synchronise, others exchange": (
        PUT + QUADS + SWAP.replace("%r4, 4", "%r4, 16"), 32, [READ_RACE], None,
    ),
    "warps exchange behind bar.sync": (
        PUT + " bar.sync 0;\n" + FAR, 64, [], [i ^ 32 for i in range(64)],
    ),
    "warps exchange behind bar.warp.sync": (
        PUT + " bar.warp.sync -1;\n" + FAR, 64, [READ_RACE, "shared uninitialised read"], None,
    ),
    "read before it is overwritten": (
        PUT + " bar.sync 0;\n" + FAR + "\n st.shared.u32 [%r4], 7;",
        64, ["shared race write after read"], None,
    ),
    "never written": (SWAP, 32, ["shared uninitialised read"], None),
    "beyond shared memory": (" st.shared.u32 [%r4+1000], %r1;", 32, ["shared out of bounds"], None),
    "beyond a tensor": (" st.global.u32 [%rd3+252], %r1;", 32, ["global out of bounds"], None),
    "misaligned": (" st.global.u32 [%rd3+2], %r1;", 32, ["misaligned"], None),
    "half a warp at another barrier": (
        SPLIT + " bar.sync 0;\n bra B;\nA:\n bar.sync 0;\nB:",
        32, ["divergent barrier: parts of one warp at different places"], None,
    ),
    "lanes that never come": (
        SPLIT + "L:\n bar.sync 0;\n bra B;\nA:\n bar.warp.sync -1;\nB:", 32, ["deadlock"], None,
    ),
    "cp.async read too early": (
        " st.shared.u32 [%r4], 5;\n" + COPY + " ld.shared.u32 %r6, [%r4];\n" + WAIT
        + " st.global.u32 [%rd3], %r6;",
        32, ["access to a cp.async destination in flight"], [5] * 32,
    ),
    "cp.async waited for": (COPY + WAIT + TAKE, 32, [], list(range(32))),
    "cp.async with zero fill": (
        " setp.lt.u32 %p1, %r1, 5;\n selp.b32 %r7, 4, 0, %p1;\n" + COPY.replace(", 4;", ", 4, %r7;")
        + WAIT + TAKE,
        32, [], [i if i < 5 else 0 for i in range(32)],
    ),
    "any of a block": (
        " setp.eq.u32 %p1, %r1, 37;\n bar.red.or.pred %p2, 0, %p1;\n selp.u32 %r5, 1, 2, %p2;\n"
        " st.global.u32 [%rd3], %r5;",
        64, [], [1] * 64,
    ),
    "a loop whose lanes leave one by one": (
        " mov.u32 %r5, 0;\n mov.u32 %r6, 0;\nL:\n add.s32 %r6, %r6, %r5;\n add.s32 %r5, %r5, 1;\n"
        " setp.le.u32 %p1, %r5, %r1;\n @%p1 bra L;\n shfl.sync.idx.b32 %r7, %r6, 3, 31, -1;\n"
        " add.s32 %r6, %r6, %r7;\n st.global.u32 [%rd3], %r6;",
        32, [], [i * (i + 1) // 2 + 6 for i in range(32)],
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def sim():
    """The emulator, which is compiled by its first import."""
    sys.path.insert(0, str(Path(__file__).parent))
    try:
        import emulator

        yield emulator
    finally:
        sys.path.pop(0)


def run(sim, body: str, threads: int, seed: int = 3, strict: bool = True):
    """Kinds of findings, and what was left in global memory."""
    out = torch.zeros(64, dtype=torch.int32)
    sim.lib.sim_clear_regions()
    sim.lib.sim_region(1 << 40, out.data_ptr(), 256, 4, b"out")
    module = sim.load(HEAD + body + "\n ret;\n}\n")
    sim.launch(module, "k", (1,), threads, 0, struct.pack("<Q", 1 << 40), seed, strict)
    return sorted({r["kind"] for r in sim.reports()}), out


@pytest.mark.parametrize("name", CASES)
def test_what_is_wrong_is_found_and_what_is_right_is_not(sim, name: str) -> None:
    body, threads, expected, answers = CASES[name]
    for seed in (sim.SEED, sim.SEED + 1):
        kinds, out = run(sim, body, threads, seed)
        assert set(expected) <= set(kinds)
        assert expected or not kinds
        assert answers is None or out[:threads].tolist() == answers


def test_shuffles_order_memory_where_they_may(sim) -> None:
    """As they do on hardware so far, and as PTX does not promise."""
    assert run(sim, PUT + SHUFFLE + SWAP, 32, strict=False)[0] == []


def test_bits_and_bytes(sim) -> None:
    body = (
        " mov.u32 %r5, 0x12345678;\n prmt.b32 %r6, %r5, 0, 0x0123;\n bfe.u32 %r7, %r6, 4, 8;\n"
        " bfi.b32 %r8, %r7, %r5, 16, 8;\n lop3.b32 %r9, %r8, %r5, %r6, 0x96;\n"
        " shf.l.wrap.b32 %r9, %r9, %r5, 8;\n st.global.u32 [%rd3], %r9;"
    )
    permuted, whole = 0x78563412, 0x12345678
    inserted = (whole & ~(255 << 16)) | ((permuted >> 4 & 255) << 16)
    mixed = inserted ^ whole ^ permuted
    expected = (whole << 32 | mixed) << 8 >> 32 & 0xFFFFFFFF
    assert int(run(sim, body, 32)[1][0]) & 0xFFFFFFFF == expected


def test_an_instruction_that_is_not_known_is_refused(sim) -> None:
    with pytest.raises(sim.SimError, match="dp4a"):
        sim.load(HEAD + " dp4a.u32.u32 %r5, %r1, %r1, %r1;\n ret;\n}\n")


PRODUCT = (
    " mov.f32 %f1, 0f3F800000;\n mov.f32 %f2, 0f3F7FE000;\n"  # 1 and 1 - 2^-11
    " mov.f32 %f5, 0f4B800000;\n"  # 2^24: what is added is less than half a unit each time
    " mov.b32 %r10, %f1;\n mov.b32 %r11, %f2;\n"
    " mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%f6,%f7,%f8,%f9},"
    " {%r10,%r10,%r10,%r10}, {%r11,%r11}, {%f5,%f5,%f5,%f5};\n"
    " st.global.f32 [%rd3], %f6;"
)


def test_tensor_cores_may_cut_their_sums_off(sim) -> None:
    """Each of eight products lies below the last bit of 2^24: rounded once 8 are there, or none."""
    found = []
    for truncate in (0, 1):
        sim.lib.sim_truncate(truncate)
        found.append(float(run(sim, PRODUCT, 32)[1].view(torch.float32)[0]) - 2.0**24)
    sim.lib.sim_truncate(0)
    assert found == [8.0, 0.0]
