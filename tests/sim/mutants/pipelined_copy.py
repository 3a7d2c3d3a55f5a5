"""target = 2 source + 1 (float32) on sm_90a: TMA loads into a ring of buffers, TMA stores out of two.

Warp 4 loads tiles into STAGES buffers; each has a full barrier (bytes) and an empty barrier (one arrival of each of warps 0-3).
Warps 0-3 compute into OUT buffers, of which warp 0 stores one while the other is filled.
"""

import cutlass
import cutlass.cute as cute
import cutlass.utils as utils
import torch
from cutlass.cute.nvgpu import cpasync

ROWS, COLUMNS = 16, 64  # of a tile
STAGES, OUT = 3, 2
WORKERS, LOADER = 4, 4  # warps that compute; the warp that loads
THREADS = 32 * (WORKERS + 1)
STEPS = ROWS * COLUMNS // (32 * WORKERS)  # elements of a tile that a thread computes


@cute.kernel
def _pipelined_copy(
    load: cute.CopyAtom, source: cute.Tensor, store: cute.CopyAtom, target: cute.Tensor, defect: cutlass.Constexpr
):
    thread, _, _ = cute.arch.thread_idx()
    warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
    row, _, _ = cute.arch.block_idx()
    memory = utils.SmemAllocator()
    full = memory.allocate_array(cutlass.Int64, STAGES)
    empty = memory.allocate_array(cutlass.Int64, STAGES)
    buffers = 2 if cutlass.const_expr(defect == "a buffer too few") else STAGES
    inside = memory.allocate_tensor(cutlass.Float32, cute.make_ordered_layout((ROWS, COLUMNS, buffers), (1, 0, 2)), 128)
    outside = memory.allocate_tensor(cutlass.Float32, cute.make_ordered_layout((ROWS, COLUMNS, OUT), (1, 0, 2)), 128)
    tiles = cute.local_tile(source, (ROWS, COLUMNS), (row, None))
    results = cute.local_tile(target, (ROWS, COLUMNS), (row, None))
    one = cute.make_layout(1)
    to_inside, from_tiles = cpasync.tma_partition(load, 0, one, cute.group_modes(inside, 0, 2), cute.group_modes(tiles, 0, 2))
    from_outside, to_results = cpasync.tma_partition(
        store, 0, one, cute.group_modes(outside, 0, 2), cute.group_modes(results, 0, 2)
    )
    if thread == 0:
        for stage in cutlass.range_constexpr(STAGES):
            cute.arch.mbarrier_init(full + stage, 1)
            cute.arch.mbarrier_init(empty + stage, WORKERS)
    cute.arch.mbarrier_init_fence()
    cute.arch.barrier()
    count = cute.size(tiles, mode=[2])
    early = defect == "a buffer released before the values read from it are used"
    values = cute.make_rmem_tensor(STEPS, cutlass.Float32)
    if warp == LOADER:
        for tile in cutlass.range(count, unroll=1):
            stage, turn = tile % STAGES, tile // STAGES
            cute.arch.mbarrier_wait(empty + stage, (turn % 2) ^ 1)
            with cute.arch.elect_one():
                cute.arch.mbarrier_arrive_and_expect_tx(full + stage, 4 * ROWS * COLUMNS)
            cute.copy(load, from_tiles[None, tile], to_inside[None, tile % buffers], tma_bar_ptr=full + stage)
    else:
        for tile in cutlass.range(count, unroll=1):
            stage, turn, out = tile % STAGES, tile // STAGES, tile % OUT
            parity = 0 if cutlass.const_expr(defect == "a phase not flipped") else turn % 2
            cute.arch.mbarrier_wait(full + stage, parity)
            if warp == 0:
                cute.arch.cp_async_bulk_wait_group(OUT - 1, read=True)
            cute.arch.barrier(barrier_id=1, number_of_threads=32 * WORKERS)  # the buffer is free
            column, first = thread % COLUMNS, thread // COLUMNS
            for step in cutlass.range_constexpr(STEPS):
                values[step] = inside[first + 2 * step, column, tile % buffers]
            if cutlass.const_expr(not early):
                for step in cutlass.range_constexpr(STEPS):
                    outside[first + 2 * step, column, out] = 2 * values[step] + 1
            cute.arch.sync_warp()
            with cute.arch.elect_one():
                cute.arch.mbarrier_arrive(empty + stage)
            if cutlass.const_expr(early):
                for step in cutlass.range_constexpr(STEPS):
                    outside[first + 2 * step, column, out] = 2 * values[step] + 1
            cute.arch.fence_proxy("async.shared", space="cta")
            cute.arch.barrier(barrier_id=1, number_of_threads=32 * WORKERS)  # the buffer is full
            if warp == 0:
                cute.copy(store, from_outside[None, out], to_results[None, tile])
                cute.arch.cp_async_bulk_commit_group()
        if warp == 0:
            cute.arch.cp_async_bulk_wait_group(0)


@cute.jit
def pipelined_copy(source: cute.Tensor, target: cute.Tensor, defect: cutlass.Constexpr):
    """target = 2 source + 1 for (M, N) float32, M % 16 == 0, N % 64 == 0; a CTA for every 16 rows."""
    layout = cute.make_ordered_layout((ROWS, COLUMNS), (1, 0))
    load, tma_source = cpasync.make_tiled_tma_atom(cpasync.CopyBulkTensorTileG2SOp(), source, layout, (ROWS, COLUMNS))
    store, tma_target = cpasync.make_tiled_tma_atom(cpasync.CopyBulkTensorTileS2GOp(), target, layout, (ROWS, COLUMNS))
    _pipelined_copy(load, tma_source, store, tma_target, defect).launch(
        grid=[cute.size(source, mode=[0]) // ROWS, 1, 1], block=[THREADS, 1, 1]
    )


def case():
    """Two CTAs, eight tiles each: tensors by name, and the expected result."""
    source = torch.arange(32 * 512, dtype=torch.float32).reshape(32, 512)
    return {"source": source, "target": torch.zeros(32, 512)}, {"target": 2 * source + 1}
