"""c = a b^T (float16, sums in float32) on sm_90a: persistent, warp specialised, wgmma fed by TMA, stmatrix and TMA out.

Warp 4 loads k-tiles of A and B into STAGES buffers. Warps 0-3 keep one wgmma group in flight, so they release a buffer one
k-tile late; then they write the tile as float16 into shared memory, which warp 0 stores. A CTA has every GRID-th tile of c.
"""

import cutlass
import cutlass.cute as cute
import cutlass.utils as utils
import cutlass.utils.hopper_helpers as hopper
import torch
from cutlass.cute.nvgpu import OperandMajorMode, cpasync, warp, warpgroup

TILE = (64, 64, 64)
STAGES = 3
WORKERS, LOADER = 4, 4  # warps of the warpgroup; the warp that loads, alone in its own warpgroup
THREADS = 256
GRID = 2
WIDE, NARROW = 88, 40  # registers of a thread of the two warpgroups, if launched with 64 each
RTOL = 2e-3  # of float16 output; inputs are small integers, so that sums are exact


@cute.kernel
def _warpgroup_gemm(
    mma: cute.TiledMma,
    load_a: cute.CopyAtom,
    a: cute.Tensor,
    load_b: cute.CopyAtom,
    b: cute.Tensor,
    store: cute.CopyAtom,
    c: cute.Tensor,
    layout_a: cute.ComposedLayout,
    layout_b: cute.ComposedLayout,
    layout_c: cute.ComposedLayout,
    defect: cutlass.Constexpr,
):
    thread, _, _ = cute.arch.thread_idx()
    mine = cute.arch.make_warp_uniform(cute.arch.warp_idx())
    first, _, _ = cute.arch.block_idx()
    tile_m, tile_n, tile_k = TILE
    half = cutlass.Float16
    memory = utils.SmemAllocator()
    full = memory.allocate_array(cutlass.Int64, STAGES)
    empty = memory.allocate_array(cutlass.Int64, STAGES)
    shared_a = memory.allocate_tensor(half, layout_a.outer, byte_alignment=1024, swizzle=layout_a.inner)
    shared_b = memory.allocate_tensor(half, layout_b.outer, byte_alignment=1024, swizzle=layout_b.inner)
    shared_c = memory.allocate_tensor(half, layout_c.outer, byte_alignment=1024, swizzle=layout_c.inner)
    tiles_a = cute.local_tile(a, (tile_m, tile_k), (None, None))
    tiles_b = cute.local_tile(b, (tile_n, tile_k), (None, None))
    tiles_c = cute.local_tile(c, (tile_m, tile_n), (None, None))
    one = cute.make_layout(1)
    to_a, from_a = cpasync.tma_partition(load_a, 0, one, cute.group_modes(shared_a, 0, 2), cute.group_modes(tiles_a, 0, 2))
    to_b, from_b = cpasync.tma_partition(load_b, 0, one, cute.group_modes(shared_b, 0, 2), cute.group_modes(tiles_b, 0, 2))
    from_c, to_c = cpasync.tma_partition(store, 0, one, cute.group_modes(shared_c, 0, 2), cute.group_modes(tiles_c, 0, 2))
    if thread == 0:
        for stage in cutlass.range_constexpr(STAGES):
            cute.arch.mbarrier_init(full + stage, 1)
            cute.arch.mbarrier_init(empty + stage, WORKERS)
    cute.arch.mbarrier_init_fence()
    cute.arch.barrier()
    rows, depth = cute.size(tiles_a, mode=[2]), cute.size(tiles_a, mode=[3])
    columns = cute.size(tiles_b, mode=[2])
    count = (rows * columns - first + GRID - 1) // GRID  # tiles of this CTA
    if mine >= WORKERS:
        cute.arch.setmaxregister_decrease(NARROW)
        if mine == LOADER:
            for turn in cutlass.range(count, unroll=1):
                tile = first + turn * GRID
                for k in cutlass.range(depth, unroll=1):
                    step = turn * depth + k
                    stage = step % STAGES
                    cute.arch.mbarrier_wait(empty + stage, (step // STAGES % 2) ^ 1)
                    with cute.arch.elect_one():
                        copy_bytes = 2 * tile_k * (tile_m + tile_n)
                        cute.arch.mbarrier_arrive_and_expect_tx(full + stage, copy_bytes)
                    cute.copy(load_a, from_a[None, tile // columns, k], to_a[None, stage], tma_bar_ptr=full + stage)
                    cute.copy(load_b, from_b[None, tile % columns, k], to_b[None, stage], tma_bar_ptr=full + stage)
    else:
        cute.arch.setmaxregister_increase(WIDE)
        part = mma.get_slice(thread)
        fragment_a = mma.make_fragment_A(part.partition_A(shared_a))
        fragment_b = mma.make_fragment_B(part.partition_B(shared_b))
        sums = cute.make_rmem_tensor(part.partition_C(tiles_c[None, None, 0, 0]).shape, cutlass.Float32)
        matrices = cute.make_copy_atom(warp.StMatrix8x8x16bOp(False, 4), half)
        writer = cute.make_tiled_copy_S(matrices, cute.make_tiled_copy_C_atom(matrices, mma))
        target = writer.get_slice(thread).partition_D(shared_c)
        values = cute.make_rmem_tensor(writer.get_slice(thread).partition_S(shared_c).shape, half)
        for turn in cutlass.range(count, unroll=1):
            tile = first + turn * GRID
            mma.set(warpgroup.Field.ACCUMULATE, False)
            for k in cutlass.range(depth, unroll=1):
                step = turn * depth + k
                stage = step % STAGES
                cute.arch.mbarrier_wait(full + stage, step // STAGES % 2)
                warpgroup.fence()
                for block in cutlass.range_constexpr(cute.size(fragment_a, mode=[2])):
                    cute.gemm(mma, sums, fragment_a[None, None, block, stage], fragment_b[None, None, block, stage], sums)
                    mma.set(warpgroup.Field.ACCUMULATE, True)
                warpgroup.commit_group()
                warpgroup.wait_group(1)
                if k > 0:
                    with cute.arch.elect_one():
                        cute.arch.mbarrier_arrive(empty + (step - 1) % STAGES)
            warpgroup.wait_group(0)
            with cute.arch.elect_one():
                cute.arch.mbarrier_arrive(empty + (turn * depth + depth - 1) % STAGES)
            values.store(writer.retile(sums).load().to(half))
            if mine == 0:
                cute.arch.cp_async_bulk_wait_group(0, read=True)
            cute.arch.barrier(barrier_id=1, number_of_threads=32 * WORKERS)  # the buffer is free
            cute.copy(writer, values, target)
            cute.arch.fence_proxy("async.shared", space="cta")
            cute.arch.barrier(barrier_id=1, number_of_threads=32 * WORKERS)  # the buffer is full
            if mine == 0:
                cute.copy(store, from_c, to_c[None, tile // columns, tile % columns])
                cute.arch.cp_async_bulk_commit_group()
        if mine == 0:
            cute.arch.cp_async_bulk_wait_group(0)


@cute.jit
def warpgroup_gemm(a: cute.Tensor, b: cute.Tensor, c: cute.Tensor, defect: cutlass.Constexpr):
    """c = a b^T for a (M, K), b (N, K), c (M, N) float16, all row-major and multiples of 64."""
    major = OperandMajorMode.K
    mma = hopper.make_trivial_tiled_mma(
        a.element_type, b.element_type, major, major, cutlass.Float32, (1, 1, 1), tiler_mn=TILE[:2]
    )
    row = utils.LayoutEnum.ROW_MAJOR
    layout_a = hopper.make_smem_layout_a(row, TILE, a.element_type, STAGES)
    layout_b = hopper.make_smem_layout_b(row, TILE, b.element_type, STAGES)
    atom = warpgroup.make_smem_layout_atom(warpgroup.SmemLayoutAtomKind.K_SW128, c.element_type)
    layout_c = cute.tile_to_shape(atom, TILE[:2], order=(0, 1))
    load = cpasync.CopyBulkTensorTileG2SOp()
    stage_a, stage_b = cute.slice_(layout_a, (None, None, 0)), cute.slice_(layout_b, (None, None, 0))
    if cutlass.const_expr(defect == "a wrong swizzle"):
        narrow = warpgroup.make_smem_layout_atom(warpgroup.SmemLayoutAtomKind.K_SW64, a.element_type)
        stage_a = cute.tile_to_shape(narrow, (TILE[0], TILE[2]), order=(0, 1))
    load_a, tma_a = cpasync.make_tiled_tma_atom(load, a, stage_a, (TILE[0], TILE[2]))
    load_b, tma_b = cpasync.make_tiled_tma_atom(load, b, stage_b, (TILE[1], TILE[2]))
    store, tma_c = cpasync.make_tiled_tma_atom(cpasync.CopyBulkTensorTileS2GOp(), c, layout_c, TILE[:2])
    _warpgroup_gemm(mma, load_a, tma_a, load_b, tma_b, store, tma_c, layout_a, layout_b, layout_c, defect).launch(
        grid=[GRID, 1, 1], block=[THREADS, 1, 1]
    )


def case():
    """Six tiles of seven k-tiles, three for each CTA: tensors by name, and the expected result."""
    generator = torch.Generator().manual_seed(1)
    a = torch.randint(-3, 4, (128, 448), generator=generator).half()
    b = torch.randint(-3, 4, (192, 448), generator=generator).half()
    return {"a": a, "b": b, "c": torch.zeros(128, 192).half()}, {"c": (a.float() @ b.float().T).half()}
