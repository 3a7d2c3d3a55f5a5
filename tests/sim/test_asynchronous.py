"""Barriers, asynchronous copies, TMA and TMEM on hand-written PTX, under every kind of schedule."""

from dataclasses import replace

import numpy as np
import pytest

from dsv4lab.sim.assembly import kernel, launch_of, memory_of, run
from dsv4lab.sim.descriptor import TensorMap
from dsv4lab.sim.errors import BarrierMisuse, DataRace, Deadlock, MemoryFault, ResourceError, ScheduleDependence
from dsv4lab.sim.exploration import explore
from dsv4lab.sim.layouts import swizzle
from dsv4lab.sim.machine import Checks, Machine

RNG = np.random.default_rng(4)
SCHEDULES = ["eager", "lazy", "random"]
WAIT = "W{n}: mbarrier.try_wait.parity.shared.b64 %p9, [{bar}], {parity}; @%p9 bra D{n}; bra W{n}; D{n}:"


def wait(bar: str, parity: int, n: int = 0) -> str:
    return WAIT.format(n=n, bar=bar, parity=parity)


# %r0 thread, %r1 shared memory, %d1 and %d2 the parameters
START = """
ld.param.b64 %d1, [p0]; ld.param.b64 %d2, [p1]; mov.u32 %r0, %tid.x; mov.b32 %r1, smem;
setp.eq.u32 %p1, %r0, 0;
@%p1 mbarrier.init.shared.b64 [%r1], 1;
@%p1 fence.mbarrier_init.release.cluster;
bar.sync 0;
"""
# every thread copies its 4 bytes of shared memory at +128 to the second parameter
FINISH = """
shl.b32 %r2, %r0, 2; add.s32 %r3, %r1, %r2; ld.shared.b32 %r4, [%r3+128];
cvt.u64.u32 %d3, %r2; add.s64 %d4, %d2, %d3; st.global.b32 [%d4], %r4; ret;
"""
BULK = """
@%p1 mbarrier.arrive.expect_tx.shared.b64 _, [%r1], 256;
@%p1 cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r1+128], [%d1], 256, [%r1];
"""


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_bulk_copy_and_its_barrier(schedule):
    source, out = RNG.integers(0, 1 << 32, 64).astype(np.uint32), np.zeros(64, np.uint32)
    run(START + BULK + wait("%r1", 0) + FINISH, block=64, source=source, out=out, schedule=schedule)
    np.testing.assert_array_equal(out, source)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_bulk_prefetch_changes_nothing(schedule):
    """Bytes of a tensor, whoever writes them at the time; another lane's are its own."""
    source, out = RNG.integers(0, 1 << 32, 64).astype(np.uint32), np.zeros(64, np.uint32)
    fetch = "cvt.u64.u32 %d3, %r0; shl.b64 %d3, %d3, 4; add.s64 %d3, %d1, %d3; setp.lt.u32 %p2, %r0, 16;"
    fetch += "@%p2 cp.async.bulk.prefetch.L2.global [%d3], 16; @%p1 cp.async.bulk.prefetch.L2.global [%d2], 256;"
    body, checks = START + fetch + BULK + wait("%r1", 0) + FINISH, Checks(races=True)
    run(body, block=64, source=source, out=out, schedule=schedule, checks=checks)
    np.testing.assert_array_equal(out, source)


@pytest.mark.parametrize(
    ("fetch", "message"),
    [
        ("[%d1], 272;", "out of bounds: 272 bytes at source"),
        ("[%d1+240], 32;", "out of bounds: 32 bytes at source"),
        ("[%d3], 16;", "belongs to no tensor"),
        ("[%d1+8], 16;", "a bulk prefetch of 16 bytes from .* needs multiples of 16"),
        ("[%d1], 24;", "a bulk prefetch of 24 bytes from .* needs multiples of 16"),
    ],
)
def test_a_bulk_prefetch_of_bytes_that_no_tensor_has(fetch, message):
    body = START + f"mov.b64 %d3, 4096; @%p1 cp.async.bulk.prefetch.L2.global {fetch} ret;"
    with pytest.raises(MemoryFault, match=message):
        run(body, block=32, source=np.zeros(64, np.uint32), out=np.zeros(64, np.uint32))


def test_a_missing_wait_is_found_by_exploring():
    source, out = RNG.integers(0, 1 << 32, 64).astype(np.uint32), np.zeros(64, np.uint32)
    # Written first, so that an early read is stale rather than uninitialised.
    fill = "shl.b32 %r2, %r0, 2; add.s32 %r3, %r1, %r2; st.shared.b32 [%r3+128], 5; fence.proxy.async; bar.sync 0;"
    arrays = {"source": source, "out": out}
    good = kernel(START + fill + BULK + wait("%r1", 0) + FINISH, 2)
    found = explore(launch_of(good, source, out, block=64), memory=memory_of(**arrays), seeds=3)
    assert found and found.schedules == ["eager", "lazy", "random:0", "random:1", "random:2"]
    bad = kernel(START + fill + BULK + FINISH, 2)
    with pytest.raises(ScheduleDependence, match=r"out\[0\] .*differs between eager and lazy"):
        explore(launch_of(bad, source, out, block=64), memory=memory_of(**arrays), seeds=1, checks=Checks())
    with pytest.raises(DataRace, match="a wait on the mbarrier"):
        explore(launch_of(bad, source, out, block=64), memory=memory_of(**arrays), seeds=1)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_deadlock_says_who_waits_for_what(schedule):
    source, out = np.zeros(64, np.uint32), np.zeros(64, np.uint32)
    short = BULK.replace("_, [%r1], 256", "_, [%r1], 512")
    with pytest.raises(Deadlock) as caught:
        run(START + short + wait("%r1", 0) + FINISH, block=64, source=source, out=out, schedule=schedule)
    text = str(caught.value)
    assert "256 bytes outstanding" in text and "try_wait" in text and "0 of 1 arrivals pending" in text
    assert "phase 0" in text and "last events" in text and schedule in text


def test_a_named_barrier_that_too_few_reach():
    body = "mov.u32 %r0, %tid.x; setp.lt.u32 %p1, %r0, 32; @%p1 bra E; bar.sync 1, 96; E: ret;"
    with pytest.raises(Deadlock, match="named barrier 1: 64 of 96 threads arrived"):
        run(body, block=96, out=np.zeros(1, np.uint32))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_named_barriers_whose_number_is_in_a_register(schedule):
    """Warps 0-1 meet at barrier 1, warps 2-3 at barrier 2, by one and the same instruction."""
    out = np.zeros(128, np.uint32)
    body = """
    ld.param.b64 %d1, [p0]; mov.u32 %r0, %tid.x; mov.b32 %r1, smem; shl.b32 %r2, %r0, 2; add.s32 %r3, %r1, %r2;
    shr.u32 %r4, %r0, 6; add.s32 %r4, %r4, 1; st.shared.b32 [%r3], %r0; bar.sync %r4, 64;
    xor.b32 %r5, %r2, 128; add.s32 %r5, %r1, %r5; ld.shared.b32 %r6, [%r5]; cvt.u64.u32 %d2, %r2; add.s64 %d3, %d1, %d2;
    st.global.b32 [%d3], %r6; ret;
    """
    run(body, block=128, out=out, schedule=schedule)
    np.testing.assert_array_equal(out, np.arange(128) ^ 32)


def test_exited_warps_do_not_count_for_a_barrier_of_all():
    body = """
    ld.param.b64 %d1, [p0]; mov.u32 %r0, %tid.x; setp.lt.u32 %p1, %r0, 32; @%p1 bra E;
    bar.sync 0; mul.wide.u32 %d2, %r0, 4; add.s64 %d3, %d1, %d2; st.global.b32 [%d3], %r0; E: ret;
    """
    out = np.zeros(96, np.uint32)
    for schedule in SCHEDULES:
        out[:] = 0
        run(body, block=96, out=out, schedule=schedule)
        np.testing.assert_array_equal(out, np.where(np.arange(96) < 32, 0, np.arange(96)))


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("@%p1 mbarrier.arrive.shared.b64 _, [%r1], 3;", "2 more arrivals in one phase than its count"),
        ("@%p1 mbarrier.arrive.shared.b64 _, [%r1+8];", "no mbarrier was initialised"),
        ("@%p1 mbarrier.arrive.expect_tx.shared.b64 _, [%r1], 64;", "exits with bytes outstanding"),
        ("@%p1 mbarrier.init.shared.b64 [%r1+4], 1;", "not a multiple of 8"),
        (
            "@%p1 mbarrier.arrive.expect_tx.shared.b64 _, [%r1], 64; @%p1 mbarrier.init.shared.b64 [%r1], 1;",
            "init of an mbarrier in use",
        ),
        (
            "@%p1 mbarrier.arrive.expect_tx.shared.b64 _, [%r1], 64; @%p1 mbarrier.inval.shared.b64 [%r1];",
            "inval of an mbarrier in use",
        ),
        ("@%p1 mbarrier.inval.shared.b64 [%r1]; @%p1 mbarrier.arrive.shared.b64 _, [%r1];", "no mbarrier was initialised"),
        ("bar.sync 17;", "number must be 0 to 15"),
        ("bar.sync 1, 40;", "multiple of 32, got 40"),
    ],
)
def test_barrier_misuse(body, message):
    with pytest.raises(BarrierMisuse, match=message):
        run(START + body + " ret;", block=32, source=np.zeros(64, np.uint32), out=np.zeros(64, np.uint32))


def test_a_barrier_reduces_votes():
    out = np.zeros(64, np.uint32)
    body = """
    ld.param.b64 %d1, [p0]; mov.u32 %r0, %tid.x; setp.ne.u32 %p1, %r0, 40;
    barrier.red.and.pred %p2, 0, %p1; barrier.red.popc.u32 %r3, 1, 64, %p1; selp.b32 %r2, 1000, %r3, %p2;
    mul.wide.u32 %d2, %r0, 4; add.s64 %d3, %d1, %d2; st.global.b32 [%d3], %r2; ret;
    """
    for schedule in SCHEDULES:
        run(body, block=64, out=out, schedule=schedule)
        assert (out == 63).all()


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_cp_async_groups(schedule):
    source, out = RNG.integers(0, 1 << 32, 64).astype(np.uint32), np.zeros(64, np.uint32)
    body = """
    shl.b32 %r2, %r0, 2; add.s32 %r3, %r1, %r2; cvt.u64.u32 %d3, %r2; add.s64 %d4, %d1, %d3;
    cp.async.ca.shared.global [%r3+128], [%d4], 4; cp.async.commit_group; cp.async.wait_group 0; bar.sync 0;
    """
    run(START + body + FINISH, block=64, source=source, out=out, schedule=schedule)
    np.testing.assert_array_equal(out, source)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_distributed_shared_memory_and_the_cluster_barrier(schedule):
    out = np.zeros(64, np.uint32)
    body = """
    ld.param.b64 %d1, [p0]; mov.u32 %r0, %tid.x; mov.u32 %r5, %cluster_ctarank; mov.b32 %r1, smem;
    shl.b32 %r2, %r0, 2; add.s32 %r3, %r1, %r2; mad.lo.s32 %r4, %r5, 100, %r0;
    xor.b32 %r6, %r5, 1; mapa.shared::cluster.u32 %r7, %r3, %r6; st.shared::cluster.b32 [%r7], %r4;
    barrier.cluster.arrive.release.aligned; barrier.cluster.wait.acquire.aligned;
    ld.shared.b32 %r8, [%r3]; shl.b32 %r9, %r5, 7; add.s32 %r9, %r9, %r2; cvt.u64.u32 %d2, %r9; add.s64 %d3, %d1, %d2;
    st.global.b32 [%d3], %r8; ret;
    """
    run(body, grid=2, cluster=2, out=out, schedule=schedule)
    np.testing.assert_array_equal(out, np.concatenate([100 + np.arange(32), np.arange(32)]))


MODES = {"none": (0, 64), "32B": (1, 32), "64B": (2, 64), "128B": (3, 128)}


def _tma(source, rank, box, mode, coordinates, size, owner=None):
    """Load one box with TMA and copy shared memory out, byte for byte. owner: the memory that is registered for it."""
    extents = source.shape[::-1]
    tensor = TensorMap(source.ctypes.data, "u16", extents, source.strides[::-1][1:], box, mode)
    raw = np.frombuffer(bytearray(tensor.encode() + bytes(64)), np.uint8)
    aligned = np.zeros(256, np.uint8)
    start = -aligned.ctypes.data % 64
    descriptor = aligned[start : start + 128]
    descriptor[:] = raw[:128]
    out = np.zeros(size // 4, np.uint32)
    given = ", ".join(str(c) for c in coordinates)
    load = f"cp.async.bulk.tensor.{rank}d.shared::cta.global.tile.mbarrier::complete_tx::bytes"
    body = f"""
    ld.param.b64 %d1, [p0]; ld.param.b64 %d2, [p1]; mov.u32 %r0, %tid.x; mov.b32 %r1, smem;
    setp.eq.u32 %p1, %r0, 0; @%p1 mbarrier.init.shared.b64 [%r1], 1; bar.sync 0;
    @%p1 mbarrier.arrive.expect_tx.shared.b64 _, [%r1], {size};
    @%p1 {load} [%r1+1024], [%d1, {{{given}}}], [%r1];
    {wait("%r1", 0)}
    mov.b32 %r5, %r0;
    L: setp.ge.u32 %p2, %r5, {size // 4}; @%p2 bra E; shl.b32 %r2, %r5, 2; add.s32 %r3, %r1, %r2; ld.shared.b32 %r4, [%r3+1024];
    cvt.u64.u32 %d3, %r2; add.s64 %d4, %d2, %d3; st.global.b32 [%d4], %r4; add.s32 %r5, %r5, 32; bra L; E: ret;
    """
    made = kernel(body, 2)
    memory = memory_of(source=source if owner is None else owner, descriptor=descriptor, out=out)
    Machine(memory, "lazy").run(launch_of(made, descriptor, out, shared=16384))
    return out.view(np.uint16)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("rank", [1, 2, 3, 4, 5])
def test_tma_boxes_clip_at_every_edge_and_swizzle(rank, mode):
    code, span = MODES[mode]
    shape = (3, 2, 4, 9, 48)[-rank:]
    padded = np.zeros((*shape[:-1], 56), np.uint16)
    padded[...] = RNG.integers(1, 1 << 16, padded.shape)
    source = padded[..., : shape[-1]] if rank > 1 else padded[: shape[-1]]
    box = (span // 2, 8, 2, 2, 2)[:rank]
    start = (32, 5, -1, 1, -1)[:rank]  # beyond the end, and before the beginning
    got = _tma(source, rank, box, mode, start, int(np.prod(box)) * 2)
    expected = np.zeros(box[::-1], np.uint16)
    for index in np.ndindex(*expected.shape):
        place = [o + i for o, i in zip(start[::-1], index, strict=True)]
        if all(0 <= p < n for p, n in zip(place, source.shape, strict=True)):
            expected[index] = source[tuple(place)]
    linear = np.arange(expected.size * 2)
    stored = np.zeros(expected.size * 2, np.uint8)
    stored[swizzle(linear, code)] = expected.reshape(-1).view(np.uint8)
    np.testing.assert_array_equal(got.view(np.uint8), stored)


def test_swizzle_128_by_its_definition():
    offsets = np.arange(1024).reshape(8, 8, 16)  # rows, 16-byte chunks, bytes
    moved = swizzle(offsets, 3)
    for row in range(8):
        for chunk in range(8):
            assert moved[row, chunk, 0] == 128 * row + 16 * (chunk ^ row)


def test_a_descriptor_larger_than_its_tensor_is_an_error():
    source = np.zeros((8, 64), np.uint16)
    wrong = np.lib.stride_tricks.as_strided(source, (16, 64), source.strides)
    with pytest.raises(MemoryFault, match="beyond source"):
        _tma(wrong, 2, (64, 8), "128B", (0, 6), 1024, owner=source)


TMEM = """
ld.param.b64 %d1, [p0]; mov.u32 %r0, %tid.x; mov.b32 %r1, smem; shr.u32 %r6, %r0, 5; setp.eq.u32 %p1, %r6, 0;
@!%p1 bra G; tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [%r1], 64; G: bar.sync 0;
ld.shared.b32 %r9, [%r1];
"""
FREE = "bar.sync 0; @!%p1 bra Q; tcgen05.dealloc.cta_group::1.sync.aligned.b32 %r9, 64; Q: ret;"


def test_tmem_keeps_what_was_stored_and_shapes_interleave():
    """Written as 32x32b, read as 16x256b: register i of thread t holds lane t / 4 + 8 * (i / 2), column 2 * (t % 4) + i % 2."""
    out = np.zeros((4, 32), np.uint32)
    columns = ", ".join(f"%r{20 + i}" for i in range(8))
    fill = " ".join(f"mad.lo.s32 %r{20 + i}, %r0, 100, {i};" for i in range(8))
    store = " ".join(f"st.global.b32 [%d4+{128 * i}], %r{40 + i};" for i in range(4))
    body = f"""{TMEM} {fill}
    @!%p1 bra S; tcgen05.st.sync.aligned.32x32b.x8.b32 [%r9], {{{columns}}}; tcgen05.wait::st.sync.aligned;
    tcgen05.ld.sync.aligned.16x256b.x1.b32 {{%r40, %r41, %r42, %r43}}, [%r9]; tcgen05.wait::ld.sync.aligned;
    mul.wide.u32 %d3, %r0, 4; add.s64 %d4, %d1, %d3; {store} S: {FREE}"""
    run(body, block=64, out=out)
    thread = np.arange(32)
    for i in range(4):
        lane, column = thread // 4 + 8 * (i // 2), 2 * (thread % 4) + i % 2
        np.testing.assert_array_equal(out[i], 100 * lane + column)


def test_tmem_that_is_not_freed_or_not_allocated():
    with pytest.raises(ResourceError, match="exits with TMEM columns allocated"):
        run(TMEM + " ret;", block=64, out=np.zeros(4, np.uint32))
    with pytest.raises(MemoryFault, match="touches TMEM columns 64 to 64"):
        run(TMEM + "tcgen05.ld.sync.aligned.32x32b.x1.b32 {%r40}, [%r9+64]; ret;", block=64, out=np.zeros(4, np.uint32))


def run_with_registers(body, block=256, registers=128, schedule="eager"):
    made = replace(kernel(body, 1), thread_registers=registers)
    out = np.zeros(4, np.uint32)
    Machine(memory_of(out=out), schedule).run(launch_of(made, out, block=block))


SPLIT = """mov.u32 %r0, %tid.x; shr.u32 %r6, %r0, 7; setp.eq.u32 %p1, %r6, 0; @%p1 bra P;
setmaxnreg.inc.sync.aligned.u32 {more}; bra E; P: setmaxnreg.dec.sync.aligned.u32 {less}; E: ret;"""


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_setmaxnreg_moves_registers_between_warps(schedule):
    run_with_registers(SPLIT.format(more=216, less=40), schedule=schedule)
    with pytest.raises(Deadlock, match=r"waits for 3072 registers, .* of the CTA's are free"):
        run_with_registers(SPLIT.format(more=224, less=40), schedule=schedule)


def test_setmaxnreg_in_the_wrong_direction():
    with pytest.raises(ResourceError, match=r"setmaxnreg.dec.* to 136 registers a thread, but warp 0 has 128"):
        run_with_registers("setmaxnreg.dec.sync.aligned.u32 136; ret;")
    with pytest.raises(ResourceError, match=r"setmaxnreg.inc.* to 120 registers a thread, but warp 0 has 128"):
        run_with_registers("setmaxnreg.inc.sync.aligned.u32 120; ret;")


def test_setmaxnreg_over_the_register_file():
    with pytest.raises(ResourceError, match="the multiprocessor has 65536"):
        run("setmaxnreg.inc.sync.aligned.u32 240; ret;", block=512, out=np.zeros(4, np.uint32))


def test_schedules_replay_from_their_seed():
    """The order in which warps take a ticket depends on the seed and on nothing else."""
    body = """
    ld.param.b64 %d1, [p0]; ld.param.b64 %d2, [p1]; mov.u32 %r0, %tid.x; and.b32 %r2, %r0, 31; setp.ne.u32 %p1, %r2, 0;
    @%p1 bra E; atom.global.add.u32 %r3, [%d1], 1; shr.u32 %r4, %r0, 5;
    mul.wide.u32 %d3, %r4, 4; add.s64 %d4, %d2, %d3; st.global.b32 [%d4], %r3; E: ret;
    """
    made = kernel(body, 2)
    orders = []
    for seed in (1, 1, 2, 3, 4):
        counter, out = np.zeros(1, np.uint32), np.zeros(8, np.uint32)
        Machine(memory_of(counter=counter, out=out), f"random:{seed}").run(launch_of(made, counter, out, block=256))
        assert sorted(out) == list(range(8))
        orders.append(tuple(out))
    assert orders[0] == orders[1] and len(set(orders)) > 1
