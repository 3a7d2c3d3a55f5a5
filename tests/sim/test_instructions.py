"""Instruction semantics on hand-written PTX, lane by lane against numpy."""

import numpy as np
import pytest

from dsv4lab.sim import numfmt
from dsv4lab.sim.assembly import kernel, launch_of, memory_of, per_thread, run
from dsv4lab.sim.errors import BarrierMisuse, MemoryFault, UninitializedRead, UnknownInstruction
from dsv4lab.sim.machine import Machine

RNG = np.random.default_rng(3)
WORDS = np.concatenate([[0, 1, 2, 31, 32, 33, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF], RNG.integers(0, 1 << 32, 23)]).astype(
    np.uint32
)
SIGNED = WORDS.view(np.int32).astype(np.int64)
FLOATS = np.concatenate([[0.0, -0.0, np.inf, -np.inf, np.nan, 1e-40, 3.5, -2.5], RNG.normal(0, 4, 24)]).astype(np.float32)


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("add.s32 %r2, %r1, 7;", WORDS + np.uint32(7)),
        ("sub.s32 %r2, 7, %r1;", np.uint32(7) - WORDS),
        ("mul.lo.s32 %r2, %r1, %r1;", WORDS * WORDS),
        ("mul.hi.s32 %r2, %r1, -3;", ((SIGNED * -3) >> 32).astype(np.uint32)),
        ("mul.hi.u32 %r2, %r1, %r1;", ((WORDS.astype(np.uint64) ** 2) >> np.uint64(32)).astype(np.uint32)),
        ("mad.lo.s32 %r2, %r1, 5, %r1;", WORDS * np.uint32(6)),
        ("div.s32 %r2, %r1, -7;", (np.sign(SIGNED) * -(np.abs(SIGNED) // 7)).astype(np.uint32)),
        ("rem.s32 %r2, %r1, 10;", np.fmod(SIGNED, 10).astype(np.uint32)),
        ("div.u32 %r2, %r1, 10;", WORDS // 10),
        ("min.s32 %r2, %r1, 5;", np.minimum(SIGNED, 5).astype(np.uint32)),
        ("max.u32 %r2, %r1, 5;", np.maximum(WORDS, 5)),
        ("shl.b32 %r2, %r1, 5;", WORDS << np.uint32(5)),
        ("shr.s32 %r2, %r1, 40;", (SIGNED >> 31).astype(np.uint32)),
        ("shl.b32 %r2, 1, %r1;", np.where(WORDS < 32, np.uint32(1) << (WORDS & np.uint32(31)), 0).astype(np.uint32)),
        ("shf.l.wrap.b32 %r2, %r1, %r1, 8;", (WORDS << np.uint32(8)) | (WORDS >> np.uint32(24))),
        ("lop3.b32 %r2, %r1, 255, 0x0F0F0F0F, 0x6A;", ((WORDS & np.uint32(255)) ^ np.uint32(0x0F0F0F0F)).astype(np.uint32)),
        ("prmt.b32 %r2, %r1, 0, 0x0123;", WORDS.byteswap()),
        ("prmt.b32.f4e %r2, %r1, 0xDDCCBBAA, 1;", (WORDS >> np.uint32(8)) | np.uint32(0xAA000000)),
        (
            "prmt.b32.b4e %r2, 0x44332211, %r1, 1;",
            np.uint32(0x1122) | (WORDS >> np.uint32(24) << np.uint32(16)) | (WORDS << np.uint32(8) & np.uint32(0xFF000000)),
        ),
        ("prmt.b32.rc8 %r2, %r1, 0, 2;", (WORDS >> np.uint32(16) & np.uint32(255)) * np.uint32(0x01010101)),
        (
            "prmt.b32.ecl %r2, %r1, 0, 2;",
            np.uint32(0x00010101) * (WORDS >> np.uint32(16) & np.uint32(255)) | (WORDS & np.uint32(0xFF000000)),
        ),
        (
            "prmt.b32.ecr %r2, %r1, 0, 1;",
            np.uint32(0x01010100) * (WORDS >> np.uint32(8) & np.uint32(255)) | (WORDS & np.uint32(255)),
        ),
        ("prmt.b32.rc16 %r2, %r1, 0, 1;", (WORDS >> np.uint32(16)) * np.uint32(0x00010001)),
        ("popc.b32 %r2, %r1;", np.bitwise_count(WORDS).astype(np.uint32)),
        ("clz.b32 %r2, %r1;", np.array([32 - int(x).bit_length() for x in WORDS], np.uint32)),
        ("bfe.u32 %r2, %r1, 4, 8;", (WORDS >> np.uint32(4)) & np.uint32(255)),
        ("setp.lt.s32 %p1, %r1, 10; selp.b32 %r2, 1, 0, %p1;", (SIGNED < 10).astype(np.uint32)),
        ("setp.lt.u32 %p1, %r1, 10; @!%p1 mov.b32 %r2, 3; @%p1 mov.b32 %r2, 4;", np.where(WORDS < 10, 4, 3).astype(np.uint32)),
        ("cvt.s64.s32 %d9, %r1; shr.s64 %d9, %d9, 32; cvt.u32.u64 %r2, %d9;", (SIGNED >> 32).astype(np.uint32)),
        ("mov.b32 {%h1, %h2}, %r1; mov.b32 %r2, {%h2, %h1};", (WORDS >> np.uint32(16)) | (WORDS << np.uint32(16))),
    ],
)
def test_integers(code, expected):
    np.testing.assert_array_equal(per_thread(code, WORDS), expected)


def _bits(x):
    return np.ascontiguousarray(x, dtype=np.float32).view(np.uint32)


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("add.f32 %r2, %r1, 0f3F800000;", FLOATS + np.float32(1)),
        ("mul.f32 %r2, %r1, %r1;", FLOATS * FLOATS),
        ("fma.rn.f32 %r2, %r1, %r1, %r1;", numfmt.fma_f32(FLOATS, FLOATS, FLOATS)),
        ("max.f32 %r2, %r1, 0f00000000;", np.fmax(FLOATS, np.float32(0))),
        ("max.NaN.f32 %r2, %r1, 0f00000000;", np.maximum(FLOATS, np.float32(0))),
        ("div.rn.f32 %r2, 0f3F800000, %r1;", np.float32(1) / FLOATS),
        ("abs.f32 %r2, %r1;", np.abs(FLOATS)),
        ("copysign.f32 %r2, %r1, 0f40000000;", np.copysign(np.float32(2), FLOATS)),
        ("cvt.rn.f16.f32 %h1, %r1; cvt.f32.f16 %r2, %h1;", FLOATS.astype(np.float16).astype(np.float32)),
        ("ex2.approx.ftz.f32 %r2, %r1;", np.exp2(np.where(np.abs(FLOATS) < 2.0**-126, 0, FLOATS).astype(np.float64))),
    ],
)
@np.errstate(all="ignore")
def test_floats(code, expected):
    result = per_thread(code, FLOATS, np.float32)
    np.testing.assert_array_equal(result, np.asarray(expected, np.float32))


def test_comparisons_with_nan():
    for name, expected in (("lt", FLOATS < 3), ("ltu", ~(FLOATS >= 3)), ("neu", FLOATS != 3), ("nan", np.isnan(FLOATS))):
        got = per_thread(f"setp.{name}.f32 %p1, %r1, 0f40400000; selp.b32 %r2, 1, 0, %p1;", FLOATS)
        np.testing.assert_array_equal(got.astype(bool), expected, err_msg=name)


def test_float_to_integer_saturates():
    x = np.zeros(32, np.float32)
    x[:7] = [2.5, -2.5, 1e20, -1e20, np.nan, 3.5, 0.49]
    got = per_thread("cvt.rni.s32.f32 %r2, %r1;", x).view(np.int32)[:7]
    assert got.tolist() == [2, -2, 2**31 - 1, -(2**31), 0, 4, 0]


def test_packed_conversions_put_the_first_source_on_top():
    x = np.linspace(-7, 7, 32, dtype=np.float32)
    got = per_thread("cvt.rn.satfinite.e4m3x2.f32 %h1, %r1, 0f3F800000; mov.b32 %r2, {%h1, %h1};", x)
    expected = (numfmt.encode(x, numfmt.E4M3, saturate=True) << np.uint32(8)) | np.uint32(0x38)
    np.testing.assert_array_equal(got & np.uint32(0xFFFF), expected)
    fp4 = "cvt.rn.satfinite.e2m1x2.f32 %c1, %r1, 0f3F800000; cvt.u32.u8 %r2, %c1;"
    np.testing.assert_array_equal(per_thread(fp4, x), (numfmt.encode(x, numfmt.E2M1) << np.uint32(4)) | np.uint32(2))


def test_shuffles_votes_and_reductions():
    lanes = np.arange(32, dtype=np.uint32)
    shuffle = {
        "shfl.sync.bfly.b32 %r2, %r1, 5, 31, -1;": lanes ^ 5,
        "shfl.sync.idx.b32 %r2, %r1, 3, 31, -1;": np.full(32, 3),
        "shfl.sync.up.b32 %r2, %r1, 4, 0, -1;": np.where(lanes >= 4, lanes - 4, lanes),
        "shfl.sync.down.b32 %r2, %r1, 4, 31, -1;": np.where(lanes < 28, lanes + 4, lanes),
        "redux.sync.add.s32 %r2, %r1, -1;": np.full(32, 496),
        "setp.gt.u32 %p1, %r1, 29; vote.sync.ballot.b32 %r2, %p1, -1;": np.full(32, 0xC0000000),
    }
    for code, expected in shuffle.items():
        np.testing.assert_array_equal(per_thread(code, lanes), expected, err_msg=code)


def test_shuffles_stay_within_their_warp_when_warps_run_together():
    lanes = np.arange(96, dtype=np.uint32)
    got = per_thread("shfl.sync.bfly.b32 %r2, %r1, 1, 31, -1;", lanes, block=96)
    np.testing.assert_array_equal(got, lanes ^ 1)


def test_divergent_lanes_meet_at_a_sync_instruction():
    code = """
    and.b32 %r3, %r1, 1; setp.eq.b32 %p1, %r3, 0; mov.b32 %r4, 0;
    @%p1 bra EVEN;
    mov.b32 %r4, 100; bra JOIN;
    EVEN: mov.b32 %r4, 7;
    JOIN: shfl.sync.bfly.b32 %r2, %r4, 1, 31, -1;
    """
    got = per_thread(code, np.arange(32, dtype=np.uint32))
    np.testing.assert_array_equal(got, np.where(np.arange(32) % 2 == 0, 100, 7))


def test_a_data_dependent_loop_runs_each_lane_its_own_number_of_times():
    code = """
    mov.b32 %r2, 0; mov.b32 %r3, 0;
    LOOP: setp.ge.u32 %p1, %r3, %r1; @%p1 bra END;
    add.s32 %r2, %r2, %r3; add.s32 %r3, %r3, 1; bra LOOP;
    END:
    """
    n = np.arange(64, dtype=np.uint32)
    np.testing.assert_array_equal(per_thread(code, n, block=64), n * (n - 1) // 2)


ADDRESS = "ld.param.b64 %d1, [p0]; mov.u32 %r0, %tid.x; mul.wide.u32 %d2, %r0, 4; add.s64 %d1, %d1, %d2;"


def test_out_of_bounds_names_tensor_index_and_lines():
    weights = np.zeros((4, 7), np.float32)
    with pytest.raises(MemoryFault) as caught:
        run(f"{ADDRESS} ld.global.b32 %r1, [%d1]; ret;", weights=weights)
    text = str(caught.value)
    assert "weights" in text and "(4, 7)" in text and "ld.global.b32" in text and "CTA (0, 0, 0)" in text


def test_misaligned_access():
    with pytest.raises(MemoryFault, match="misaligned: 4-byte access at weights"):
        run(f"{ADDRESS} ld.global.b32 %r1, [%d1+2]; ret;", weights=np.zeros(64, np.float32))


def test_address_of_no_tensor():
    with pytest.raises(MemoryFault, match="belongs to no tensor; nearest is weights"):
        run("ld.param.b64 %d1, [p0]; sub.s64 %d1, %d1, 4096; ld.global.b32 %r1, [%d1]; ret;", weights=np.zeros(8, np.uint32))


def test_shared_memory_must_be_written_before_it_is_read():
    with pytest.raises(UninitializedRead, match="never-written shared memory"):
        run("mov.b32 %r1, smem; ld.shared.b32 %r2, [%r1+64]; ret;", out=np.zeros(1, np.uint32))
    with pytest.raises(MemoryFault, match="out of bounds"):
        run("mov.b32 %r1, smem; st.shared.b32 [%r1+8192], 1; ret;", out=np.zeros(1, np.uint32))


def test_unknown_forms_name_themselves_when_reached():
    made = kernel("bra SKIP; frobnicate.sync.b32 %r1, %r2; SKIP: ret;", 1)
    data = np.zeros(1, np.uint32)
    Machine(memory_of(data=data)).run(launch_of(made, data))  # not reached
    with pytest.raises(UnknownInstruction, match=r"frobnicate\.sync\.b32"):
        run("frobnicate.sync.b32 %r1, %r2; ret;", data=data)
    with pytest.raises(UnknownInstruction, match=r"\.bogus is not simulated"):
        run("add.bogus.s32 %r1, %r2, %r3; ret;", data=data)


REMOTE = """
mov.u32 %r1, %cluster_ctarank; xor.b32 %r1, %r1, {other}; mov.b32 %r2, smem; mapa.shared::cluster.u32 %r2, %r2, %r1;
mov.b64 %d2, smem; cvta.shared.u64 %d2, %d2; mapa.u64 %d2, %d2, %r1; mov.b64 %d1, 1; mov.b32 %r3, 1; mov.b32 %r4, 1;
mov.b32 %r5, smem; st.shared.v2.b32 [%r5], {{%r3, %r4}};
barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;
{code}
barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned; ret;
"""
TORN = [
    "red.relaxed.cluster.shared::cluster.max.u64 [%r2], %d1;",
    "red.shared::cluster.min.s64 [%r2], %d1;",
    "atom.relaxed.cluster.shared::cluster.add.u64 %d3, [%r2], %d1;",
    "red.shared::cluster.xor.b64 [%r2], %d1;",
    "red.relaxed.cluster.shared::cluster.add.noftz.f16x2 [%r2], %r3;",
    "red.relaxed.cluster.max.u64 [%d2], %d1;",
]
WHOLE = [
    "red.relaxed.cluster.shared::cluster.max.u32 [%r2], %r3;",
    "atom.relaxed.cluster.shared::cluster.cas.b64 %d3, [%r2], %d1, %d1;",
    "atom.relaxed.cluster.shared::cluster.exch.b64 %d3, [%r2], %d1;",
    "red.relaxed.cluster.shared::cluster.add.f32 [%r2], %r3;",
    "red.relaxed.cluster.max.u32 [%d2], %r3;",
]


@pytest.mark.parametrize("code", TORN)
def test_atomics_that_ptxas_does_not_make_atomic_are_refused(code):
    """On another CTA's shared memory; on its own they are loops of compare and swap."""
    data = np.zeros(1, np.uint32)
    with pytest.raises(UnknownInstruction, match=r"another CTA's shared memory .* not atomic .* a slot of its own"):
        run(REMOTE.format(other=1, code=code), grid=2, cluster=2, data=data)
    run(REMOTE.format(other=0, code=code), grid=2, cluster=2, data=data)


@pytest.mark.parametrize("code", WHOLE)
def test_atomics_on_another_ctas_memory_that_are_atomic_are_not_refused(code):
    run(REMOTE.format(other=1, code=code), grid=2, cluster=2, data=np.zeros(1, np.uint32))


def test_64_bit_atomics_on_global_memory_are_not_refused():
    data = np.zeros(2, np.uint64)
    run(
        "ld.param.b64 %d1, [p0]; mov.b64 %d2, 3; red.relaxed.gpu.max.u64 [%d1], %d2; red.global.add.u64 [%d1+8], %d2; ret;",
        data=data,
    )
    assert data.tolist() == [3, 32 * 3]


@pytest.mark.parametrize(
    "code",
    [
        "mma.sp::ordered_metadata.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%r0,%r1,%r2,%r3}, {%r4,%r5}, {%r6,%r7}, {%r0,%r1,%r2,%r3}, %r8, 0;",
        "wgmma.mma_async.sp.sync.aligned.m64n8k32.f32.f16.f16 {%r0,%r1,%r2,%r3}, %d1, %d2, %r4, 0, 1, 1, 1, 0, 0;",
        "tcgen05.mma.sp.cta_group::1.kind::f16 [%r1], %d1, %d2, [%r2], %r3, 1;",
    ],
)
def test_sparse_products_are_refused_by_name(code):
    data = np.zeros(1, np.uint32)
    with pytest.raises(UnknownInstruction, match=code.split(" ")[0].replace(".", r"\.") + " is not simulated"):
        run(f"{code} ret;", data=data)


def test_float64_fma_rounds_once():
    rows = np.array(
        [[1 + 2.0**-30, 1 - 2.0**-30, -1.0], [1e308, 2, -1.5e308], [0.0, 3, -0.0], [2.0**-600, 2.0**-500, 2.0**-1074]]
    )
    data = rows.reshape(-1).copy()
    out = np.zeros(4)
    body = """ld.param.b64 %d1, [p0]; ld.param.b64 %d2, [p1]; mov.u32 %r0, %tid.x; setp.gt.u32 %p1, %r0, 3; @%p1 bra E;
    mul.wide.u32 %d3, %r0, 24; add.s64 %d4, %d1, %d3; ld.global.b64 %d5, [%d4]; ld.global.b64 %d6, [%d4+8];
    ld.global.b64 %d7, [%d4+16]; fma.rn.f64 %d8, %d5, %d6, %d7; mul.wide.u32 %d3, %r0, 8; add.s64 %d4, %d2, %d3;
    st.global.b64 [%d4], %d8; E: ret;"""
    run(body, data=data, out=out)
    np.testing.assert_array_equal(out, [-(2.0**-60), 5e307, 0.0, 2.0**-1074])


def test_arrivals_that_must_not_complete_a_phase():
    data = np.zeros(1, np.uint32)
    body = """mov.b32 %r1, smem; setp.eq.u32 %p1, %r0, 0; mbarrier.init.shared.b64 [%r1], {count};
    mbarrier.arrive.noComplete.shared.b64 %d1, [%r1], 2; ret;"""
    with pytest.raises(BarrierMisuse, match="of 2 arrivals would complete the phase"):
        run(body.replace("{count}", "2"), block=1, data=data)
    run(body.replace("{count}", "3"), block=1, data=data)


def test_atomics_apply_once_a_lane():
    total = np.zeros(4, np.uint32)
    run("ld.param.b64 %d1, [p0]; mov.u32 %r0, %tid.x; red.relaxed.gpu.global.add.u32 [%d1], %r0; ret;", block=96, total=total)
    assert total[0] == 96 * 95 // 2


def test_mma_sync_bf16():
    a, b = RNG.normal(size=(16, 16)), RNG.normal(size=(8, 16))
    rounded = [numfmt.f32_to_bf16(m.astype(np.float32)) for m in (a, b)]
    out = np.zeros((16, 8), np.float32)
    # Fragments by their definition: thread t holds row t / 4 (and + 8), columns 2 * (t % 4) and next (and + 8).
    body = """
    ld.param.b64 %d1, [p0]; ld.param.b64 %d2, [p1]; ld.param.b64 %d3, [p2];
    mov.u32 %r0, %tid.x; shr.u32 %r1, %r0, 2; and.b32 %r2, %r0, 3; shl.b32 %r3, %r1, 5; shl.b32 %r4, %r2, 2;
    add.s32 %r5, %r3, %r4; cvt.u64.u32 %d4, %r5; add.s64 %d5, %d1, %d4; add.s64 %d6, %d2, %d4;
    ld.global.b32 %r10, [%d5]; ld.global.b32 %r11, [%d5+256]; ld.global.b32 %r12, [%d5+16]; ld.global.b32 %r13, [%d5+272];
    ld.global.b32 %r14, [%d6]; ld.global.b32 %r15, [%d6+16]; mov.b32 %r16, 0;
    mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%r20, %r21, %r22, %r23}, {%r10, %r11, %r12, %r13}, {%r14, %r15},
        {%r16, %r16, %r16, %r16};
    shl.b32 %r6, %r2, 3; add.s32 %r7, %r3, %r6; cvt.u64.u32 %d7, %r7; add.s64 %d8, %d3, %d7;
    st.global.v2.b32 [%d8], {%r20, %r21}; st.global.v2.b32 [%d8+256], {%r22, %r23}; ret;
    """
    run(body, a=rounded[0], b=rounded[1], out=out)
    expected = numfmt.bf16_to_f32(rounded[0]) @ numfmt.bf16_to_f32(rounded[1]).T
    np.testing.assert_allclose(out, expected, rtol=0, atol=1e-5)


def test_matrix_fragments_through_shared_memory():
    data = RNG.integers(0, 1 << 16, (16, 8)).astype(np.uint16)
    out = np.zeros((2, 32), np.uint32)
    body = """
    ld.param.b64 %d1, [p0]; ld.param.b64 %d2, [p1]; mov.u32 %r0, %tid.x; mov.b32 %r1, smem;
    shl.b32 %r2, %r0, 4; add.s32 %r3, %r1, %r2; setp.lt.u32 %p1, %r0, 16; cvt.u64.u32 %d3, %r2; add.s64 %d4, %d1, %d3;
    @%p1 ld.global.v2.b64 {%d5, %d6}, [%d4]; @%p1 st.shared.v2.b64 [%r3], {%d5, %d6}; bar.warp.sync -1;
    ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%r4, %r5}, [%r3];
    mul.wide.u32 %d7, %r0, 4; add.s64 %d8, %d2, %d7; st.global.b32 [%d8], %r4; st.global.b32 [%d8+128], %r5; ret;
    """
    run(body, data=data, out=out)
    for k in range(2):
        np.testing.assert_array_equal(out[k].view(np.uint16).reshape(8, 8), data[8 * k : 8 * k + 8].T)
