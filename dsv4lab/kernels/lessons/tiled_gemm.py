"""c = a b^T on Hopper: TMA fills a ring of operand stages, a warpgroup multiplies from shared memory with wgmma.

    load (warp 4)         waits until a stage is empty, has TMA fill it with a tile of a and one of b
    multiply (warps 0-3)  wait until it is full, issue four wgmma, wait for those of the stage before, say that it is empty

Two mbarriers a stage: `full` (one arrival and the bytes of both tiles) and `empty` (one arrival a multiplying warp). One group
of wgmma stays in flight while the next is issued, so a stage is given back one step late: its operands are still being read.

a (M, K), b (N, K) float16, K-major; c (M, N) float32, row-major; M, N, K multiples of 64. One CTA a tile of c.
Flops: 2 M N K. Bytes by TMA: 2 M N K (1/64 + 1/64). sm_90a only.
"""

import cutlass
import cutlass.cute as cute
import cutlass.utils.hopper_helpers as hopper
from cutlass.cute.nvgpu import OperandMajorMode, cpasync, warpgroup
from cutlass.memory import SmemAllocator
from cutlass.tensor_utils import LayoutEnum

TILE = (64, 64, 64)  # M, N, K
_MULTIPLY_WARPS = 4  # a warpgroup
_WARPS = _MULTIPLY_WARPS + 1
_LOAD_WARP = _MULTIPLY_WARPS


@cute.kernel
def _tiled_gemm(
    mma: cute.TiledMma,
    load_a: cute.CopyAtom,
    a: cute.Tensor,
    load_b: cute.CopyAtom,
    b: cute.Tensor,
    c: cute.Tensor,
    layout_a: cute.ComposedLayout,
    layout_b: cute.ComposedLayout,
    element: cutlass.Constexpr,
    copy_bytes: cutlass.Constexpr,
    stages: cutlass.Constexpr,
) -> None:
    thread, _, _ = cute.arch.thread_idx()
    row, column, _ = cute.arch.block_idx()
    warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
    memory = SmemAllocator()
    full = memory.allocate_array(cutlass.Int64, stages)
    empty = memory.allocate_array(cutlass.Int64, stages)
    shared_a = memory.allocate_tensor(element, layout_a.outer, byte_alignment=1024, swizzle=layout_a.inner)
    shared_b = memory.allocate_tensor(element, layout_b.outer, byte_alignment=1024, swizzle=layout_b.inner)
    tile_m, tile_n, tile_k = TILE
    global_a = cute.local_tile(a, (tile_m, tile_k), (row, None))
    global_b = cute.local_tile(b, (tile_n, tile_k), (column, None))
    one = cute.make_layout(1)
    to_a, from_a = cpasync.tma_partition(load_a, 0, one, cute.group_modes(shared_a, 0, 2), cute.group_modes(global_a, 0, 2))
    to_b, from_b = cpasync.tma_partition(load_b, 0, one, cute.group_modes(shared_b, 0, 2), cute.group_modes(global_b, 0, 2))
    num_steps = cute.size(global_a, mode=[2])
    if thread == 0:
        for stage in cutlass.range_constexpr(stages):
            cute.arch.mbarrier_init(full + stage, 1)
            cute.arch.mbarrier_init(empty + stage, _MULTIPLY_WARPS)
    cute.arch.mbarrier_init_fence()
    cute.arch.barrier()

    if warp == _LOAD_WARP:
        for step in cutlass.range(num_steps, unroll=1):
            stage, parity = step % stages, step // stages % 2
            cute.arch.mbarrier_wait(empty + stage, 1 - parity)
            with cute.arch.elect_one():
                cute.arch.mbarrier_arrive_and_expect_tx(full + stage, copy_bytes)
            cute.copy(load_a, from_a[None, step], to_a[None, stage], tma_bar_ptr=full + stage)
            cute.copy(load_b, from_b[None, step], to_b[None, stage], tma_bar_ptr=full + stage)
    else:
        mine = mma.get_slice(thread)
        fragment_a = mma.make_fragment_A(mine.partition_A(shared_a))
        fragment_b = mma.make_fragment_B(mine.partition_B(shared_b))
        out = mine.partition_C(cute.local_tile(c, (tile_m, tile_n), (row, column)))
        sums = cute.make_rmem_tensor(out.shape, cutlass.Float32)
        mma.set(warpgroup.Field.ACCUMULATE, False)
        for step in cutlass.range(num_steps, unroll=1):
            stage, parity = step % stages, step // stages % 2
            cute.arch.mbarrier_wait(full + stage, parity)
            warpgroup.fence()
            for block in cutlass.range_constexpr(cute.size(fragment_a, mode=[2])):
                at = (None, None, block, stage)
                cute.gemm(mma, sums, fragment_a[at], fragment_b[at], sums)
                mma.set(warpgroup.Field.ACCUMULATE, True)
            warpgroup.commit_group()
            warpgroup.wait_group(1)
            if step > 0:
                with cute.arch.elect_one():
                    cute.arch.mbarrier_arrive(empty + (step - 1) % stages)
        warpgroup.wait_group(0)
        cute.autovec_copy(sums, out)


@cute.jit
def tiled_gemm(a: cute.Tensor, b: cute.Tensor, c: cute.Tensor, stages: cutlass.Constexpr = 3) -> None:
    """c = a b^T with a ring of `stages` >= 2 operand stages."""
    mma = hopper.make_trivial_tiled_mma(
        a.element_type,
        b.element_type,
        OperandMajorMode.K,
        OperandMajorMode.K,
        cutlass.Float32,
        (1, 1, 1),
        tiler_mn=TILE[:2],
    )
    row = LayoutEnum.ROW_MAJOR
    layout_a = hopper.make_smem_layout_a(row, TILE, a.element_type, stages)
    layout_b = hopper.make_smem_layout_b(row, TILE, b.element_type, stages)
    load = cpasync.CopyBulkTensorTileG2SOp()
    stage_a, stage_b = cute.slice_(layout_a, (None, None, 0)), cute.slice_(layout_b, (None, None, 0))
    load_a, tma_a = cpasync.make_tiled_tma_atom(load, a, stage_a, (TILE[0], TILE[2]))
    load_b, tma_b = cpasync.make_tiled_tma_atom(load, b, stage_b, (TILE[1], TILE[2]))
    copy_bytes = cute.size_in_bytes(a.element_type, stage_a) + cute.size_in_bytes(b.element_type, stage_b)
    _tiled_gemm(mma, load_a, tma_a, load_b, tma_b, c, layout_a, layout_b, a.element_type, copy_bytes, stages).launch(
        grid=[cute.ceil_div(cute.size(c, mode=[0]), TILE[0]), cute.ceil_div(cute.size(c, mode=[1]), TILE[1]), 1],
        block=[32 * _WARPS, 1, 1],
    )
