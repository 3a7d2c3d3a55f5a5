"""tcgen05.cp, shift, alloc and commit: where the PTX ISA puts their rows, and what their barriers and queues do."""

import numpy as np
import pytest

from dsv4lab.sim.assembly import run
from dsv4lab.sim.errors import Deadlock, ResourceError, UnknownInstruction

RNG = np.random.default_rng(19)
COLUMNS = 16  # that the tests watch
ROWS = 4096  # bytes: of a CTA's operand in shared memory
# shape with its multicast -> rows, bytes of a row
SHAPES = {
    "128x256b": (128, 32),
    "4x256b": (4, 32),
    "128x128b": (128, 16),
    "64x128b.warpx2::02_13": (64, 16),
    "64x128b.warpx2::01_23": (64, 16),
    "32x128b.warpx4": (32, 16),
}
# p0 image (CTAs, 4096) bytes of shared memory, p1 before (CTAs, 128, 16) and p2 after: TMEM words
# %r0 thread, %r1 shared memory (barrier at 0, allocation at 16, operand at 1024), %r8 the warp's quarter, %r11 CTA
COPY = """
ld.param.b64 %d1, [p0]; ld.param.b64 %d2, [p1]; ld.param.b64 %d3, [p2]; mov.u32 %r0, %tid.x; mov.b32 %r1, smem;
mov.u32 %r11, %cluster_ctarank; shr.u32 %r6, %r0, 5; setp.eq.u32 %p1, %r6, 0; setp.eq.u32 %p2, %r0, 0;
@%p2 mbarrier.init.shared.b64 [%r1], 1; @%p2 fence.mbarrier_init.release.cluster;
@%p1 tcgen05.alloc.cta_group::GROUP.sync.aligned.shared::cta.b32 [%r1+16], 64;
mul.wide.u32 %d4, %r11, 4096; add.s64 %d1, %d1, %d4; mul.wide.u32 %d4, %r0, 32; add.s64 %d5, %d1, %d4;
ld.global.v4.b32 {%r20, %r21, %r22, %r23}, [%d5]; ld.global.v4.b32 {%r24, %r25, %r26, %r27}, [%d5+16];
shl.b32 %r2, %r0, 5; add.s32 %r2, %r2, %r1;
st.shared.v4.b32 [%r2+1024], {%r20, %r21, %r22, %r23}; st.shared.v4.b32 [%r2+1040], {%r24, %r25, %r26, %r27};
fence.proxy.async.shared::cta; bar.sync 0; ld.shared.b32 %r9, [%r1+16];
shl.b32 %r7, %r6, 21; add.s32 %r8, %r9, %r7;
mad.lo.s32 %r12, %r11, 128, %r0; mul.wide.u32 %d6, %r12, 64; add.s64 %d2, %d2, %d6; add.s64 %d3, %d3, %d6;
LOAD tcgen05.st.sync.aligned.32x32b.x16.b32 [%r8], {WORDS}; tcgen05.wait::st.sync.aligned;
tcgen05.fence::before_thread_sync; barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;
tcgen05.fence::after_thread_sync;
shr.u32 %r3, %r1, 4; add.s32 %r3, %r3, 64; cvt.u64.u32 %d10, %r3; mov.b64 %d11, DESCRIPTOR; or.b64 %d10, %d10, %d11;
setp.eq.u32 %p3, %r11, 0; and.pred %p3, %p3, %p2; mov.b16 %h1, MASK;
@%p3 INSTRUCTION;
@%p3 tcgen05.commit.cta_group::GROUP.mbarrier::arrive::one.shared::cluster.multicast::cluster.b64 [%r1], %h1;
W: mbarrier.try_wait.parity.shared.b64 %p4, [%r1], 0; @!%p4 bra W;
tcgen05.fence::after_thread_sync;
tcgen05.ld.sync.aligned.32x32b.x16.b32 {WORDS}, [%r8]; tcgen05.wait::ld.sync.aligned; STORE
barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;
@%p1 tcgen05.dealloc.cta_group::GROUP.sync.aligned.b32 %r9, 64; ret;
"""
WORDS = [f"%r{40 + k}" for k in range(COLUMNS)]
LOAD, STORE = (
    "".join(text.format(place=16 * k, names=", ".join(WORDS[4 * k : 4 * k + 4])) for k in range(4))
    for text in ("ld.global.v4.b32 {{{names}}}, [%d2+{place}];", "st.global.v4.b32 [%d3+{place}], {{{names}}};")
)
SCHEDULES = ["eager", "lazy", "random:3"]


def _image(rows: np.ndarray) -> tuple[np.ndarray, int]:
    """Rows as K-major 8 x 16-byte blocks without swizzle, and the descriptor's bits above its address."""
    count, width = rows.shape
    image = np.zeros(ROWS, np.uint8)
    for row in range(count):
        for chunk in range(width // 16):
            place = row // 8 * 8 * width + chunk * 128 + row % 8 * 16
            image[place : place + 16] = rows[row, 16 * chunk : 16 * chunk + 16]
    return image, (128 >> 4) << 16 | (8 * width >> 4) << 32 | 1 << 46


def _run(
    instruction: str, image: np.ndarray, descriptor: int, group: int, schedule: str = "lazy"
) -> tuple[np.ndarray, np.ndarray]:
    """TMEM words (CTAs, 128, 16) before and after an instruction that the first CTA issues."""
    before = RNG.integers(0, 1 << 32, (group, 128, COLUMNS), np.uint32)
    after = np.zeros_like(before)
    body = COPY.replace("INSTRUCTION", instruction).replace("GROUP", str(group)).replace("DESCRIPTOR", str(descriptor))
    body = body.replace("MASK", str(2**group - 1)).replace("LOAD", LOAD).replace("STORE", STORE)
    body = body.replace("WORDS", ", ".join(WORDS))
    run(body, block=128, grid=group, cluster=group, shared=8192, schedule=schedule, image=image, before=before, after=after)
    return before, after


def _lanes(shape: str, row: int, lane: int) -> list[int]:
    """Where the ISA puts a row: a lane of each sub-partition (warp) that receives it."""
    match shape:
        case "4x256b":
            return [32 * row + lane]
        case "32x128b.warpx4":
            return [row, 32 + row, 64 + row, 96 + row]
        case "64x128b.warpx2::02_13":
            return [row, 64 + row]  # rows 0 to 31 to warps 0 and 2, the others to 1 and 3
        case "64x128b.warpx2::01_23":
            return [row, 32 + row] if row < 32 else [32 + row, 64 + row]  # the first to warps 0 and 1, the others to 2 and 3
    return [row]


@pytest.mark.parametrize("group", [1, 2])
@pytest.mark.parametrize("bits", [8, 6, 4])
@pytest.mark.parametrize("shape", SHAPES)
def test_copies_into_tmem(shape, bits, group):
    """Packed elements of 6 and 4 bits are put into the middle of bytes; each CTA of a pair copies its own shared memory."""
    rows, width = SHAPES[shape]
    values = RNG.integers(0, 1 << bits, (group, rows, width), np.uint8)
    source = values.copy()
    if bits < 8:  # 16 elements in the first bytes of 16, then padding that must not matter
        stream = (values.reshape(group, rows, -1, 16, 1) >> np.arange(bits, dtype=np.uint8)) & 1
        packed = np.packbits(stream.reshape(group, rows, width // 16, -1), axis=-1, bitorder="little")
        source = RNG.integers(0, 256, values.shape, np.uint8)
        source.reshape(group, rows, -1, 16)[..., : 2 * bits] = packed
    images = [_image(part) for part in source]
    suffix = {8: "", 6: ".b8x16.b6x16_p32", 4: ".b8x16.b4x16_p64"}[bits]
    lane = 31 if shape == "4x256b" else 0
    instruction = f"tcgen05.cp.cta_group::{group}.{shape}{suffix} [%r9+{(lane << 16) + 3}], %d10"
    before, after = _run(instruction, np.stack([image for image, _ in images]), images[0][1], group)
    expected = before.copy()
    words = (values << np.uint8((8 - bits) // 2)).view(np.uint32)
    for cta, row in np.ndindex(group, rows):
        for target in _lanes(shape, row, lane):
            expected[cta, target, 3 : 3 + width // 4] = words[cta, row]
    np.testing.assert_array_equal(after, expected)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_copy_from_swizzled_rows_is_there_once_committed(schedule):
    rows = RNG.integers(0, 256, (32, 16), np.uint8)
    image = np.zeros(ROWS, np.uint8)
    for row in range(32):  # 128-byte rows; chunk 0 of row r lies at chunk r % 8
        image[128 * row + 16 * (row % 8) :][:16] = rows[row]
    descriptor = 1 << 16 | (1024 >> 4) << 32 | 1 << 46 | 2 << 61
    before, after = _run("tcgen05.cp.cta_group::1.32x128b.warpx4 [%r9], %d10", image[None], descriptor, 1, schedule)
    expected = before.copy()
    expected[0, :, :4] = np.tile(rows, (4, 1)).view(np.uint32)
    np.testing.assert_array_equal(after, expected)


@pytest.mark.parametrize("group", [1, 2])
@pytest.mark.parametrize("quarter", [0, 1, 3])
def test_shift_moves_31_lanes_of_8_columns(quarter, group):
    image = np.zeros((group, ROWS), np.uint8)
    before, after = _run(f"tcgen05.shift.cta_group::{group}.down [%r9+{(quarter << 21) + 2}]", image, 0, group)
    expected = before.copy()
    first = 32 * quarter
    expected[:, first : first + 31, 2:10] = before[:, first + 1 : first + 32, 2:10]
    np.testing.assert_array_equal(after, expected)


@pytest.mark.parametrize(
    ("instruction", "error", "message"),
    [
        ("tcgen05.shift.cta_group::1.down [%r9+1048576]", ResourceError, "lane that is a multiple of 32, got 16"),
        ("tcgen05.cp.cta_group::1.32x128b [%r9], %d10", UnknownInstruction, "32x128b goes with .warpx4, got None"),
        ("tcgen05.cp.cta_group::1.64x128b.warpx4 [%r9], %d10", UnknownInstruction, "64x128b goes with .warpx2, got warpx4"),
        ("tcgen05.cp.cta_group::1.128x256b.warpx4 [%r9], %d10", UnknownInstruction, "128x256b goes with .no multicast"),
        ("tcgen05.cp.cta_group::1.16x256b [%r9], %d10", UnknownInstruction, "is not simulated"),
    ],
)
def test_what_is_refused(instruction, error, message):
    with pytest.raises(error, match=message):
        _run(instruction, np.zeros((1, ROWS), np.uint8), 1 << 46, 1)


# allocation


def _alloc(columns: int | str, place: int = 0) -> str:
    return f"tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [%r1+{place}], {columns};"


def _free(register: str, columns: int) -> str:
    return f"tcgen05.dealloc.cta_group::1.sync.aligned.b32 {register}, {columns};"


BEGIN = "ld.param.b64 %d1, [p0]; mov.u32 %r0, %tid.x; mov.b32 %r1, smem; shr.u32 %r6, %r0, 5; setp.eq.u32 %p1, %r6, 0;"
GIVE_UP = "tcgen05.relinquish_alloc_permit.cta_group::1.sync.aligned;"


def test_allocations_of_every_size_are_disjoint_and_used_again():
    sizes = [32, 256, 64, 128, 32]  # all 512 columns
    out = np.zeros(len(sizes) + 2, np.uint32)
    body = BEGIN + "".join(_alloc(size, 4 * k) for k, size in enumerate(sizes))
    body += "".join(f"ld.shared.b32 %r{20 + k}, [%r1+{4 * k}]; st.global.b32 [%d1+{4 * k}], %r{20 + k};" for k in range(5))
    body += _free("%r21", 256) + _alloc(256, 40) + "ld.shared.b32 %r30, [%r1+40]; st.global.b32 [%d1+20], %r30;"
    body += _free("%r30", 256) + "".join(_free(f"%r{20 + k}", size) for k, size in enumerate(sizes) if k != 1)
    body += (
        _alloc(512, 44) + "ld.shared.b32 %r31, [%r1+44]; st.global.b32 [%d1+24], %r31;" + GIVE_UP + _free("%r31", 512) + "ret;"
    )
    run(body, out=out)
    held = np.zeros(512, int)
    for first, size in zip(out, sizes, strict=False):
        held[first : first + size] += 1
    assert (held == 1).all()
    assert out[5] == out[1] and out[6] == 0


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_an_allocation_waits_until_another_warp_frees(schedule):
    """Warp 1 asks for 64 columns while warp 0 has all 512; what warp 0 wrote by then tells that it had to wait."""
    out = np.zeros(2, np.uint32)
    body = f"""{BEGIN} @!%p1 bra OTHER; {_alloc(512)} bar.sync 0; ld.shared.b32 %r2, [%r1]; mov.b32 %r3, 0;
    SPIN: add.s32 %r3, %r3, 1; setp.lt.u32 %p2, %r3, 100; @%p2 bra SPIN;
    st.global.b32 [%d1], %r3; {_free("%r2", 512)} bra END;
    OTHER: bar.sync 0; {_alloc(64, 4)} ld.global.b32 %r4, [%d1]; st.global.b32 [%d1+4], %r4; ld.shared.b32 %r5, [%r1+4];
    {_free("%r5", 64)} END: ret;"""
    run(body, block=64, schedule=schedule, out=out)
    assert out.tolist() == [100, 100]


@pytest.mark.parametrize(
    ("body", "error", "message"),
    [
        (_alloc(48), ResourceError, "power of two from 32 to 512 columns, got 48"),
        (_alloc(16), ResourceError, "power of two from 32 to 512 columns, got 16"),
        (_alloc(1024), ResourceError, "power of two from 32 to 512 columns, got 1024"),
        (_alloc(64) + "ld.shared.b32 %r2, [%r1];" + 2 * _free("%r2", 64), ResourceError, "allocated are none"),
        (
            _alloc(64) + "ld.shared.b32 %r2, [%r1];" + _free("%r2", 32),
            ResourceError,
            r"dealloc of 32 columns at 0, .* \{0: 64\}",
        ),
        (_alloc(64) + "mov.b32 %r2, 32;" + _free("%r2", 64), ResourceError, r"dealloc of 64 columns at 32, .* \{0: 64\}"),
        (GIVE_UP + _alloc(32), ResourceError, "after relinquish_alloc_permit"),
        (_alloc(512) + _alloc(32, 4), Deadlock, "waits for 32 free TMEM columns; allocated are {0: 512}"),
        (_alloc(32), ResourceError, "exits with TMEM columns allocated"),
    ],
)
def test_misused_allocations(body, error, message):
    with pytest.raises(error, match=message):
        run(BEGIN + body + "ret;", out=np.zeros(4, np.uint32))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_commit_arrives_once(schedule):
    """One arrival of two: the phase ends with a second commit, not with the first."""
    out = np.zeros(2, np.uint32)
    commit = "@%p2 tcgen05.commit.cta_group::1.mbarrier::arrive::one.shared::cluster.b64 [%r1];"
    body = f"""{BEGIN} setp.eq.u32 %p2, %r0, 0; @%p2 mbarrier.init.shared.b64 [%r1], 2; bar.warp.sync -1;
    {commit} mov.b32 %r3, 0; SPIN: add.s32 %r3, %r3, 1; setp.lt.u32 %p3, %r3, 100; @%p3 bra SPIN;
    mbarrier.test_wait.parity.shared.b64 %p4, [%r1], 0; selp.b32 %r4, 1, 0, %p4; st.global.b32 [%d1], %r4;
    {commit} W: mbarrier.try_wait.parity.shared.b64 %p5, [%r1], 0; @!%p5 bra W;
    mov.b32 %r5, 1; st.global.b32 [%d1+4], %r5; ret;"""
    run(body, schedule=schedule, out=out)
    assert out.tolist() == [0, 1]
