"""c = sum over k-tiles of A0 * B + A1 * B (elementwise, float32) on sm_90a, by clusters of two CTAs.

CTA r of a cluster loads its own rows of A, and its half of every tile of B, which TMA multicasts to both. Both CTAs' workers
release a buffer to both CTAs' loaders. At the end each CTA adds the other's partial sum to its own for half of the rows, read
from distributed shared memory between two cluster barriers.
"""

import cutlass
import cutlass.cute as cute
import cutlass.utils as utils
import torch
from cutlass.cute.nvgpu import cpasync

ROWS, COLUMNS = 32, 64  # of a tile
STAGES = 2
WORKERS, LOADER = 4, 4
THREADS = 32 * (WORKERS + 1)
CLUSTER = 2
EACH = ROWS * COLUMNS // (32 * WORKERS)  # elements of a thread


@cute.kernel
def _cluster_product(load_a: cute.CopyAtom, a: cute.Tensor, load_b: cute.CopyAtom, b: cute.Tensor, c: cute.Tensor):
    thread, _, _ = cute.arch.thread_idx()
    warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
    block, _, _ = cute.arch.block_idx()
    rank = cute.arch.make_warp_uniform(cute.arch.block_idx_in_cluster())
    memory = utils.SmemAllocator()
    full = memory.allocate_array(cutlass.Int64, STAGES)
    empty = memory.allocate_array(cutlass.Int64, STAGES)
    staged = cute.make_ordered_layout((ROWS, COLUMNS, STAGES), (1, 0, 2))
    shared_a = memory.allocate_tensor(cutlass.Float32, staged, 128)
    shared_b = memory.allocate_tensor(cutlass.Float32, staged, 128)
    partial = memory.allocate_tensor(cutlass.Float32, cute.make_ordered_layout((ROWS, COLUMNS), (1, 0)), 128)
    tiles_a = cute.local_tile(a, (ROWS, COLUMNS), (block, None))
    tiles_b = cute.local_tile(b, (ROWS, COLUMNS), (0, None))
    one, pair = cute.make_layout(1), cute.make_layout(CLUSTER)
    to_a, from_a = cpasync.tma_partition(load_a, 0, one, cute.group_modes(shared_a, 0, 2), cute.group_modes(tiles_a, 0, 2))
    to_b, from_b = cpasync.tma_partition(load_b, rank, pair, cute.group_modes(shared_b, 0, 2), cute.group_modes(tiles_b, 0, 2))
    if thread == 0:
        for stage in cutlass.range_constexpr(STAGES):
            cute.arch.mbarrier_init(full + stage, 1)
            cute.arch.mbarrier_init(empty + stage, WORKERS * CLUSTER)
    cute.arch.mbarrier_init_fence()
    cute.arch.cluster_arrive()  # barriers are there
    cute.arch.cluster_wait()  # barriers are there
    sums = cute.make_rmem_tensor(EACH, cutlass.Float32)
    sums.fill(0.0)
    column = thread % COLUMNS
    if warp == LOADER:
        for tile in cutlass.range(cute.size(tiles_a, mode=[2]), unroll=1):
            stage, turn = tile % STAGES, tile // STAGES
            cute.arch.mbarrier_wait(empty + stage, (turn % 2) ^ 1)
            with cute.arch.elect_one():
                cute.arch.mbarrier_arrive_and_expect_tx(full + stage, 2 * 4 * ROWS * COLUMNS)
            cute.copy(load_a, from_a[None, tile], to_a[None, stage], tma_bar_ptr=full + stage)
            cute.copy(load_b, from_b[None, tile], to_b[None, stage], tma_bar_ptr=full + stage, mcast_mask=cutlass.Int16(3))
    else:
        for tile in cutlass.range(cute.size(tiles_a, mode=[2]), unroll=1):
            stage, turn = tile % STAGES, tile // STAGES
            cute.arch.mbarrier_wait(full + stage, turn % 2)
            for i in cutlass.range_constexpr(EACH):
                row = 2 * i + thread // COLUMNS
                sums[i] += shared_a[row, column, stage] * shared_b[row, column, stage]
            cute.arch.sync_warp()
            with cute.arch.elect_one():
                cute.arch.mbarrier_arrive(empty + stage, 0)
                cute.arch.mbarrier_arrive(empty + stage, 1)
        for i in cutlass.range_constexpr(EACH):
            partial[2 * i + thread // COLUMNS, column] = sums[i]
    cute.arch.cluster_arrive()  # partial sums are there
    cute.arch.cluster_wait()  # partial sums are there
    if warp < WORKERS:
        for i in cutlass.range_constexpr(EACH // 2):
            row = rank * (ROWS // 2) + 2 * i + thread // COLUMNS
            other = cute.arch.inline_ptx(
                "{ .reg .b32 there; mapa.shared::cluster.u32 there, {$r0}, {$r1}; ld.shared::cluster.f32 {$w0}, [there]; }",
                write_only_types=[cutlass.Float32],
                read_only_args=[partial.iterator + (row * COLUMNS + column), rank ^ 1],
            )
            c[(block // CLUSTER) * ROWS + row, column] = partial[row, column] + other
    cute.arch.cluster_arrive()  # nobody leaves while its memory is read
    cute.arch.cluster_wait()  # nobody leaves while its memory is read


@cute.jit
def cluster_product(a: cute.Tensor, b: cute.Tensor, c: cute.Tensor, defect: cutlass.Constexpr):
    """c (32 G, 64) = sum over tiles k of a (64 G, 64 K) * b (32, 64 K), where two 32-row tiles of a share one of c and of b."""
    layout = cute.make_ordered_layout((ROWS, COLUMNS), (1, 0))
    load_a, tma_a = cpasync.make_tiled_tma_atom(cpasync.CopyBulkTensorTileG2SOp(), a, layout, (ROWS, COLUMNS))
    load_b, tma_b = cpasync.make_tiled_tma_atom(
        cpasync.CopyBulkTensorTileG2SMulticastOp(), b, layout, (ROWS, COLUMNS), num_multicast=CLUSTER
    )
    _cluster_product(load_a, tma_a, load_b, tma_b, c).launch(
        grid=[cute.size(a, mode=[0]) // ROWS, 1, 1], block=[THREADS, 1, 1], cluster=[CLUSTER, 1, 1]
    )


def case():
    """Two clusters, five tiles: tensors by name, and the expected result."""
    generator = torch.Generator().manual_seed(2)
    a = torch.randint(-4, 5, (4 * ROWS, 5 * COLUMNS), generator=generator).float()
    b = torch.randint(-4, 5, (ROWS, 5 * COLUMNS), generator=generator).float()
    products = a.view(2, 2, ROWS, 5, COLUMNS) * b.view(ROWS, 5, COLUMNS)
    return {"a": a, "b": b, "c": torch.zeros(2 * ROWS, COLUMNS)}, {"c": products.sum((1, 3)).reshape(2 * ROWS, COLUMNS)}
