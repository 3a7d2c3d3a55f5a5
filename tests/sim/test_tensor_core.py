"""wgmma from hand-written PTX: values and the wait that must come first; how often a warp issues a bulk reduction."""

import numpy as np
import pytest

from dsv4lab.sim.assembly import run
from dsv4lab.sim.errors import HazardError, MissingFence
from dsv4lab.sim.machine import Checks

REGISTERS = ", ".join(f"%r{100 + i}" for i in range(4))
# A (64, 16) and B (8, 16) float16, K-major without swizzle: 8 x 8 blocks of 128 bytes, K blocks 128 apart, row blocks 256.
FILL = """
ld.param.b64 %d1, [p0]; ld.param.b64 %d2, [p1]; mov.u32 %r0, %tid.x; mov.b32 %r1, smem;
shl.b32 %r2, %r0, 4; cvt.u64.u32 %d3, %r2; add.s64 %d4, %d1, %d3; add.s32 %r3, %r1, %r2;
ld.global.v2.b64 {%d5, %d6}, [%d4]; st.shared.v2.b64 [%r3], {%d5, %d6};
setp.lt.u32 %p2, %r0, 16; @%p2 ld.global.v2.b64 {%d5, %d6}, [%d4+2048]; @%p2 st.shared.v2.b64 [%r3+2048], {%d5, %d6};
fence.proxy.async.shared::cta; bar.sync 0;
shr.u32 %r4, %r1, 4; cvt.u64.u32 %d10, %r4; mov.b64 %d12, 68720001024;
add.s32 %r5, %r4, 128; cvt.u64.u32 %d13, %r5; or.b64 %d14, %d13, %d12; or.b64 %d11, %d10, %d12;
mov.b32 %r100, 0; mov.b32 %r101, 0; mov.b32 %r102, 0; mov.b32 %r103, 0; setp.eq.b32 %p3, 0, 1;
wgmma.fence.sync.aligned;
"""
ISSUE = f"wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 {{{REGISTERS}}}, %d11, %d14, %p3, 1, 1, 0, 0;"
COMMIT = "wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0;"
STORE = (
    "shl.b32 %r6, %r0, 4; cvt.u64.u32 %d20, %r6; add.s64 %d21, %d2, %d20; st.global.v4.b32 [%d21], {" + REGISTERS + "}; ret;"
)


def _blocks(matrix):
    """(rows, 16) to 8 x 8 blocks, K block fastest."""
    return matrix.reshape(-1, 8, 2, 8).transpose(0, 2, 1, 3).reshape(-1)


def _operands():
    rng = np.random.default_rng(5)
    a, b = (rng.integers(-8, 8, (rows, 16)).astype(np.float16) for rows in (64, 8))
    return a, b, np.concatenate([_blocks(a), _blocks(b)])


@pytest.mark.parametrize("schedule", ["eager", "lazy", "random"])
def test_wgmma_against_numpy(schedule):
    a, b, packed = _operands()
    out = np.zeros((128, 4), np.float32)
    run(FILL + ISSUE + COMMIT + STORE, block=128, packed=packed, out=out, schedule=schedule)
    exact = a.astype(np.float32) @ b.astype(np.float32).T
    thread, item = np.arange(128)[:, None], np.arange(4)[None, :]
    rows = 16 * (thread // 32) + thread % 32 // 4 + 8 * (item // 2)
    np.testing.assert_array_equal(out, exact[rows, 2 * (thread % 4) + item % 2])


@pytest.mark.parametrize("schedule", ["eager", "lazy"])
def test_accumulators_read_before_the_wait(schedule):
    packed, out = _operands()[2], np.zeros((128, 4), np.float32)
    early = ISSUE + "wgmma.commit_group.sync.aligned; add.f32 %r9, %r101, %r101;" + STORE
    with pytest.raises(HazardError, match=r"%r101 belongs to a wgmma in flight"):
        run(FILL + early, block=128, packed=packed, out=out, schedule=schedule)


def test_a_warp_issues_equal_bulk_operations_once():
    source, total = np.ones(32, np.float32), np.zeros(32, np.float32)
    body = """
    ld.param.b64 %d1, [p0]; ld.param.b64 %d2, [p1]; mov.u32 %r0, %tid.x; mov.b32 %r1, smem; shl.b32 %r2, %r0, 2;
    add.s32 %r3, %r1, %r2; cvt.u64.u32 %d3, %r2; add.s64 %d4, %d1, %d3; ld.global.b32 %r4, [%d4]; st.shared.b32 [%r3], %r4;
    bar.warp.sync -1; fence.proxy.async.shared::cta;
    cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%d2], [%r1], 128;
    cp.async.bulk.commit_group; cp.async.bulk.wait_group 0; ret;
    """
    run(body, source=source, total=total)
    np.testing.assert_array_equal(total, source)


def test_wgmma_needs_a_fence_after_other_instructions_touched_its_registers():
    """Once before the first product is enough for products in a row, not for one after the accumulators were read."""
    _, _, packed = _operands()
    out = np.zeros((128, 4), np.float32)
    read = "add.f32 %r50, %r100, %r101;"
    checks = Checks(races=True)
    run(FILL + ISSUE + ISSUE + COMMIT + STORE, block=128, packed=packed, out=out, checks=checks)
    run(FILL + ISSUE + COMMIT + read + "wgmma.fence.sync.aligned;" + ISSUE + COMMIT + STORE, block=128, packed=packed, out=out)
    with pytest.raises(MissingFence, match=r"register %r100 of a wgmma was touched before, and no wgmma.fence"):
        run(FILL + ISSUE + COMMIT + read + ISSUE + COMMIT + STORE, block=128, packed=packed, out=out, checks=checks)


def test_a_missing_wgmma_fence_is_found_around_a_loop():
    _, _, packed = _operands()
    out = np.zeros((128, 4), np.float32)
    body = f"""mov.b32 %r60, 0; L: wgmma.fence.sync.aligned; M: {ISSUE} {COMMIT} add.f32 %r50, %r100, 0f00000000;
    add.s32 %r60, %r60, 1; setp.lt.u32 %p4, %r60, 2; @%p4 bra TARGET;"""
    checks = Checks(races=True)
    run(FILL + body.replace("TARGET", "L") + STORE, block=128, packed=packed, out=out, checks=checks)
    with pytest.raises(MissingFence, match=r"register %r100 of a wgmma was touched before"):
        run(FILL + body.replace("TARGET", "M") + STORE, block=128, packed=packed, out=out, checks=checks)
