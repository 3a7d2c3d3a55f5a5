"""y = softmax of the rows of x (float32) on sm_90a with the means of sm_80: cp.async in stages, named barriers, shuffles.

Two groups of four warps work side by side, each on 4 rows and with a named barrier of its own. A thread copies 16 bytes of
every 128-column chunk and reads a column of it, so a chunk needs both cp.async.wait_group and the group's barrier. The first
pass finds maximum and sum of each row, the second one writes.
"""

import cutlass
import cutlass.cute as cute
import cutlass.utils as utils
import torch
from cutlass.cute.nvgpu import cpasync

ROWS, CHUNK = 4, 128
STAGES = 3
GROUP, GROUPS = 128, 2  # threads of a group; groups of a CTA
WARPS = GROUP // 32
RTOL = 1e-5


@cute.kernel
def _row_softmax(x: cute.Tensor, y: cute.Tensor, copy: cute.TiledCopy, defect: cutlass.Constexpr):
    thread, _, _ = cute.arch.thread_idx()
    block, _, _ = cute.arch.block_idx()
    group = cute.arch.make_warp_uniform(thread // GROUP)
    mine, lane = thread % GROUP, thread % 32
    memory = utils.SmemAllocator()
    buffers = STAGES - 1 if cutlass.const_expr(defect == "a stage too few") else STAGES
    stages = memory.allocate_tensor(
        cutlass.Float32, cute.make_ordered_layout((ROWS, CHUNK, buffers, GROUPS), (1, 0, 2, 3)), 128
    )[None, None, None, group]
    scratch = memory.allocate_tensor(cutlass.Float32, cute.make_layout((2, ROWS, WARPS, GROUPS)), 128)
    chunks = cute.local_tile(x, (ROWS, CHUNK), (GROUPS * block + group, None))
    results = cute.local_tile(y, (ROWS, CHUNK), (GROUPS * block + group, None))
    source, target = copy.get_slice(mine).partition_S(chunks), copy.get_slice(mine).partition_D(stages)
    count = cute.size(chunks, mode=[2])
    top = cute.make_rmem_tensor(ROWS, cutlass.Float32)
    total = cute.make_rmem_tensor(ROWS, cutlass.Float32)
    top.fill(-1e30)
    total.fill(0.0)
    for turn in cutlass.range_constexpr(2):
        for early in cutlass.range_constexpr(STAGES - 1):
            cute.copy(copy, source[None, None, None, early], target[None, None, None, early])  # prologue
            cute.arch.cp_async_commit_group()
        for chunk in cutlass.range(count, unroll=1):
            cute.arch.cp_async_wait_group(STAGES - 2)
            cute.arch.barrier(barrier_id=1 + group, number_of_threads=GROUP)  # the chunk is there, the one before is read
            later = chunk + STAGES - 1
            if later < count:
                cute.copy(copy, source[None, None, None, later], target[None, None, None, later % buffers])
            cute.arch.cp_async_commit_group()
            for row in cutlass.range_constexpr(ROWS):
                value = stages[row, mine, chunk % buffers]
                if cutlass.const_expr(turn == 0):
                    higher = cute.arch.fmax(top[row], value)
                    total[row] = total[row] * cute.math.exp(top[row] - higher, fastmath=True) + cute.math.exp(
                        value - higher, fastmath=True
                    )
                    top[row] = higher
                else:
                    results[row, mine, chunk] = cute.math.exp(value - top[row], fastmath=True) / total[row]
        if cutlass.const_expr(turn == 0):
            for row in cutlass.range_constexpr(ROWS):
                for step in cutlass.range_constexpr(5):
                    other_top = cute.arch.shuffle_sync_bfly(top[row], offset=1 << step)
                    other_total = cute.arch.shuffle_sync_bfly(total[row], offset=1 << step)
                    higher = cute.arch.fmax(top[row], other_top)
                    total[row] = total[row] * cute.math.exp(top[row] - higher, fastmath=True) + other_total * cute.math.exp(
                        other_top - higher, fastmath=True
                    )
                    top[row] = higher
                if lane == 0:
                    scratch[0, row, mine // 32, group] = top[row]
                    scratch[1, row, mine // 32, group] = total[row]
            cute.arch.barrier(barrier_id=1 + group, number_of_threads=GROUP)  # every warp's part is there
            for row in cutlass.range_constexpr(ROWS):
                higher = cutlass.Float32(-1e30)
                for warp in cutlass.range_constexpr(WARPS):
                    higher = cute.arch.fmax(higher, scratch[0, row, warp, group])
                total[row] = cutlass.Float32(0.0)
                for warp in cutlass.range_constexpr(WARPS):
                    total[row] += scratch[1, row, warp, group] * cute.math.exp(
                        scratch[0, row, warp, group] - higher, fastmath=True
                    )
                top[row] = higher


@cute.jit
def row_softmax(x: cute.Tensor, y: cute.Tensor, defect: cutlass.Constexpr):
    """y = softmax(x) over the rows of (M, N) float32, M % 8 == 0, N % 128 == 0, N >= 256; a CTA for every 8 rows."""
    atom = cute.make_copy_atom(cpasync.CopyG2SOp(), cutlass.Float32, num_bits_per_copy=128)
    copy = cute.make_tiled_copy_tv(atom, cute.make_ordered_layout((ROWS, 32), (1, 0)), cute.make_layout((1, 4)))
    _row_softmax(x, y, copy, defect).launch(
        grid=[cute.size(x, mode=[0]) // (ROWS * GROUPS), 1, 1], block=[GROUP * GROUPS, 1, 1]
    )


def case():
    """Two CTAs, seven chunks: tensors by name, and the expected result."""
    x = torch.randn(16, 7 * CHUNK, generator=torch.Generator().manual_seed(3)) * 3
    return {"x": x, "y": torch.zeros_like(x)}, {"y": torch.softmax(x.double(), 1).float()}
