"""Blackwell beside TMEM: rows gathered and scattered by TMA, packed 4- and 6-bit elements, work taken from later clusters."""

import numpy as np
import pytest

from dsv4lab.sim.assembly import kernel, launch_of, memory_of, run
from dsv4lab.sim.descriptor import TensorMap
from dsv4lab.sim.errors import MemoryFault, UnknownInstruction
from dsv4lab.sim.machine import Machine

RNG = np.random.default_rng(23)
SCHEDULES = ["eager", "lazy", "random:3"]
SPANS = {"none": 128, "32B": 32, "64B": 64, "128B": 128}
WAIT = "W{n}: mbarrier.try_wait.parity.shared.b64 %p3, [%r1], {parity}; @!%p3 bra W{n};"
# %r0 thread, %r1 shared memory (barrier at 0, data at 1024), %d1 descriptor, %d2 bytes in shared memory's order
BEGIN = """
ld.param.b64 %d1, [p0]; ld.param.b64 %d2, [p1]; mov.u32 %r0, %tid.x; mov.b32 %r1, smem; setp.eq.u32 %p1, %r0, 0;
@%p1 mbarrier.init.shared.b64 [%r1], 1; bar.sync 0;
"""
MOVE = """mov.b32 %r5, %r0;
L: setp.ge.u32 %p2, %r5, {words}; @%p2 bra E; shl.b32 %r2, %r5, 2; add.s32 %r3, %r1, %r2; cvt.u64.u32 %d3, %r2;
add.s64 %d4, %d2, %d3; {word} add.s32 %r5, %r5, 32; bra L; E:
"""
OUT = "ld.shared.b32 %r4, [%r3+1024]; st.global.b32 [%d4], %r4;"
IN = "ld.global.b32 %r4, [%d4]; st.shared.b32 [%r3+1024], %r4;"


def _transfer(source: np.ndarray, tensor: TensorMap, code: str, data: np.ndarray, schedule: str = "lazy") -> None:
    """Run code that moves between the tensor and shared memory. data: bytes of shared memory in or out."""
    room = np.zeros(256, np.uint8)
    start = -room.ctypes.data % 64
    descriptor = room[start : start + 128]
    descriptor[:] = np.frombuffer(tensor.encode(), np.uint8)
    memory = memory_of(source=source, descriptor=descriptor, data=data)
    made = kernel(BEGIN + code + "ret;", 2)
    Machine(memory, schedule).run(launch_of(made, descriptor, data, shared=16384))


def _load(tensor: TensorMap, source: np.ndarray, coordinates: list[int], counted: int, size: int, mode: str) -> np.ndarray:
    """Load; wait for `counted` bytes; return `size` bytes of shared memory."""
    data = np.zeros(size, np.uint8)
    code = f"""@%p1 mbarrier.arrive.expect_tx.shared.b64 _, [%r1], {counted};
    @%p1 cp.async.bulk.tensor.2d.shared::cta.global.{mode}.mbarrier::complete_tx::bytes [%r1+1024],
        [%d1, {{{", ".join(map(str, coordinates))}}}], [%r1];
    {WAIT.format(n=0, parity=0)} {MOVE.format(words=size // 4, word=OUT)}"""
    _transfer(source, tensor, code, data)
    return data


def _swizzled(rows: np.ndarray, span: int) -> np.ndarray:
    """Rows one after the other; 16-byte chunk c of line l of 128 bytes lies at c XOR l, l modulo the chunks of a span."""
    flat = rows.reshape(-1, 16)
    out = np.zeros_like(flat)
    for chunk in range(len(flat)):
        line, place = divmod(chunk, 8)
        out[8 * line + (place ^ line % (span // 16))] = flat[chunk]
    return out.reshape(-1)


@pytest.mark.parametrize("mode", SPANS)
def test_four_rows_gathered(mode):
    """Rows in any order, twice, and one beyond the matrix, which reads as zero."""
    source = RNG.integers(1, 1 << 16, (40, 128), np.uint16)
    width = SPANS[mode] // 2
    tensor = TensorMap(source.ctypes.data, "u16", (128, 40), (256,), (width, 1), mode)
    size = 4 * 2 * width
    got = _load(tensor, source, [16, 39, 3, 40, 3], size, size, "tile::gather4")
    expected = np.stack([source[39, 16:][:width], source[3, 16:][:width], np.zeros(width, np.uint16), source[3, 16:][:width]])
    stored = expected.view(np.uint8) if mode == "none" else _swizzled(expected.view(np.uint8), SPANS[mode])
    np.testing.assert_array_equal(got, stored.reshape(-1))


@pytest.mark.parametrize("mode", SPANS)
def test_four_rows_scattered(mode):
    source = RNG.integers(1, 1 << 16, (40, 128), np.uint16)
    before, width = source.copy(), SPANS[mode] // 2
    rows = RNG.integers(1, 1 << 16, (4, width), np.uint16)
    data = rows.view(np.uint8).reshape(-1) if mode == "none" else _swizzled(rows.view(np.uint8), SPANS[mode])
    tensor = TensorMap(source.ctypes.data, "u16", (128, 40), (256,), (width, 1), mode)
    code = f"""{MOVE.format(words=2 * width, word=IN)} fence.proxy.async.shared::cta; bar.sync 0;
    @%p1 cp.async.bulk.tensor.2d.global.shared::cta.tile::scatter4.bulk_group [%d1, {{16, 39, 3, 40, 0}}], [%r1+1024];
    cp.async.bulk.commit_group; cp.async.bulk.wait_group 0;"""
    _transfer(source, tensor, code, np.ascontiguousarray(data))
    for row, place in zip(rows, (39, 3, 40, 0), strict=True):
        if place < 40:
            before[place, 16 : 16 + width] = row
    np.testing.assert_array_equal(source, before)


def test_gather_needs_a_box_of_one_row_and_four_rows():
    source = RNG.integers(1, 1 << 16, (40, 128), np.uint16)
    two = TensorMap(source.ctypes.data, "u16", (128, 40), (256,), (64, 2))
    with pytest.raises(MemoryFault, match=r"whose box is one row, got 5 coordinates and a box of \(64, 2\)"):
        _load(two, source, [0, 1, 2, 3, 4], 512, 512, "tile::gather4")
    one = TensorMap(source.ctypes.data, "u16", (128, 40), (256,), (64, 1))
    with pytest.raises(MemoryFault, match="got 3 coordinates"):
        _load(one, source, [0, 1, 2], 512, 512, "tile::gather4")
    with pytest.raises(UnknownInstruction, match="reductions have no scatter4"):
        reduce = "cp.reduce.async.bulk.tensor.2d.global.shared::cta.add.tile::scatter4.bulk_group"
        _transfer(source, one, f"@%p1 {reduce} [%d1, {{0, 1, 2, 3, 4}}], [%r1];", np.zeros(4, np.uint8))
    with pytest.raises(MemoryFault, match=r"no negative coordinates .*, got \(0, 1, 2, -1, 4\)"):
        store = "cp.async.bulk.tensor.2d.global.shared::cta.tile::scatter4.bulk_group [%d1, {0, 1, 2, -1, 4}], [%r1+1024]"
        _transfer(source, one, f"{MOVE.format(words=128, word=IN)} bar.sync 0; @%p1 {store};", np.zeros(512, np.uint8))


@pytest.mark.parametrize(("element", "bits", "taken"), [("b4x16", 4, 8), ("b4x16_p64", 4, 16), ("b6x16_p32", 6, 16)])
def test_packed_elements_of_4_and_6_bits(element, bits, taken):
    """16 elements take `taken` bytes of shared memory (CUDA: 16U4_ALIGN8B, 16U4_ALIGN16B, 16U6_ALIGN16B), data first."""
    columns, rows, wide = 256, 12, 128
    source = RNG.integers(0, 256, (rows, columns * bits // 8), np.uint8)
    tensor = TensorMap(source.ctypes.data, element, (columns, rows), (source.shape[1],), (wide, 4))
    counted, size = 4 * wide * bits // 8, 4 * wide // 16 * taken
    got = _load(tensor, source, [128, 10], counted, size, "tile").reshape(4, wide // 16, taken)
    expected = np.zeros((4, wide // 16, 2 * bits), np.uint8)
    expected[:2] = source[10:12, 128 * bits // 8 :].reshape(2, wide // 16, 2 * bits)  # rows 12 and 13 lie beyond
    np.testing.assert_array_equal(got[..., : 2 * bits], expected)


# clusterlaunchcontrol

# p0 counts how often each tile was worked on; a CTA begins with its own tile and goes on with those that it takes over
PERSISTENT = """
ld.param.b64 %d1, [p0]; mov.u32 %r0, %tid.x; mov.b32 %r1, smem; mov.u32 %r10, %ctaid.x; mov.b32 %r11, 0;
setp.eq.u32 %p1, %r0, 0; @%p1 mbarrier.init.shared.b64 [%r1], 1; @%p1 fence.mbarrier_init.release.cluster;
barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned; mov.u32 %r12, %cluster_ctarank;
TILE: mul.wide.u32 %d3, %r10, 4; add.s64 %d4, %d1, %d3; @%p1 atom.global.add.u32 %r13, [%d4], 1;
setp.eq.u32 %p6, %r12, 0; and.pred %p6, %p6, %p1;
@%p1 mbarrier.arrive.expect_tx.shared.b64 _, [%r1], 16;
barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;
@%p6 clusterlaunchcontrol.try_cancel.async.shared::cta.mbarrier::complete_tx::bytesMULTICAST.b128 [%r1+16], [%r1];
W: mbarrier.try_wait.parity.shared.b64 %p3, [%r1], %r11; @!%p3 bra W; xor.b32 %r11, %r11, 1;
ld.shared.b128 %q1, [%r1+16]; clusterlaunchcontrol.query_cancel.is_canceled.pred.b128 %p4, %q1; @!%p4 bra END;
clusterlaunchcontrol.query_cancel.get_first_ctaid.v4.b32.b128 {%r20, %r21, %r22, _}, %q1;
clusterlaunchcontrol.query_cancel.get_first_ctaid::x.b32.b128 %r23, %q1; setp.ne.u32 %p5, %r20, %r23; @%p5 trap;
add.s32 %r10, %r20, %r12; bra TILE; END: ret;
"""


@pytest.mark.parametrize("resident", [1, 3])
@pytest.mark.parametrize("cluster", [1, 2])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_persistent_kernel_takes_every_tile_once(schedule, cluster, resident):
    """Clusters that run take over those that have not begun; with a cluster of two, the answer goes to both CTAs."""
    tiles = 12
    count = np.zeros(tiles, np.uint32)
    body = PERSISTENT.replace("MULTICAST", ".multicast::cluster::all" if cluster > 1 else "")
    launch = launch_of(kernel(body, 1), count, grid=tiles, cluster=cluster)
    stats = Machine(memory_of(count=count), schedule).run(launch, resident=resident)
    np.testing.assert_array_equal(count, np.ones(tiles, np.uint32))
    assert stats.ctas <= resident * cluster  # the other clusters were cancelled, not launched


def test_dependent_grids_and_register_budgets_pass_on_blackwell():
    out = np.zeros(1, np.uint32)
    run(
        """ld.param.b64 %d1, [p0]; griddepcontrol.wait; setmaxnreg.dec.sync.aligned.u32 40; mov.b32 %r1, 7;
        setmaxnreg.inc.sync.aligned.u32 96; griddepcontrol.launch_dependents; st.global.b32 [%d1], %r1; ret;""",
        out=out,
    )
    assert out[0] == 7
