"""c = a b^T (float16 inputs, float32 output) on sm_100a: persistent, warp specialised, tcgen05 with two accumulators in TMEM.

Warp 4 loads k-tiles of A and B into STAGES buffers, warp 5 issues the products, warps 0-3 move a finished accumulator to global
memory while the other one is computed. Commits free the buffers and announce accumulators; the readers' warps hand them back.
"""

import cutlass
import cutlass.cute as cute
import cutlass.utils as utils
import cutlass.utils.blackwell_helpers as blackwell
import torch
from cutlass.cute.nvgpu import cpasync, tcgen05

TILE = (128, 64, 64)
STAGES, SUMS = 2, 2  # buffers of A and B; accumulators
READERS, LOADER, MULTIPLIER = 4, 4, 5  # warps
THREADS = 192
GRID = 2
COLUMNS = TILE[1] * SUMS  # of TMEM


@cute.kernel
def _tensor_gemm(
    mma: cute.TiledMma,
    load_a: cute.CopyAtom,
    a: cute.Tensor,
    load_b: cute.CopyAtom,
    b: cute.Tensor,
    c: cute.Tensor,
    layout_a: cute.ComposedLayout,
    layout_b: cute.ComposedLayout,
    defect: cutlass.Constexpr,
):
    thread, _, _ = cute.arch.thread_idx()
    warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
    first, _, _ = cute.arch.block_idx()
    memory = utils.SmemAllocator()
    full = memory.allocate_array(cutlass.Int64, STAGES)
    empty = memory.allocate_array(cutlass.Int64, STAGES)
    sums_full = memory.allocate_array(cutlass.Int64, SUMS)
    sums_empty = memory.allocate_array(cutlass.Int64, SUMS)
    slot = memory.allocate_array(cutlass.Int32, 1)
    half = cutlass.Float16
    shared_a = memory.allocate_tensor(half, layout_a.outer, byte_alignment=1024, swizzle=layout_a.inner)
    shared_b = memory.allocate_tensor(half, layout_b.outer, byte_alignment=1024, swizzle=layout_b.inner)
    mine = mma.get_slice(0)
    tiles_a = mine.partition_A(cute.local_tile(a, (TILE[0], TILE[2]), (None, None)))
    tiles_b = mine.partition_B(cute.local_tile(b, (TILE[1], TILE[2]), (None, None)))
    tiles_c = mine.partition_C(cute.local_tile(c, TILE[:2], (None, None)))
    one = cute.make_layout(1)
    to_a, from_a = cpasync.tma_partition(load_a, 0, one, cute.group_modes(shared_a, 0, 3), cute.group_modes(tiles_a, 0, 3))
    to_b, from_b = cpasync.tma_partition(load_b, 0, one, cute.group_modes(shared_b, 0, 3), cute.group_modes(tiles_b, 0, 3))
    fragment_a, fragment_b = mma.make_fragment_A(shared_a), mma.make_fragment_B(shared_b)
    if warp == 0:
        cute.arch.alloc_tmem(COLUMNS, slot)
        cute.arch.relinquish_tmem_alloc_permit()
    if thread == 0:
        for stage in cutlass.range_constexpr(STAGES):
            cute.arch.mbarrier_init(full + stage, 1)
            cute.arch.mbarrier_init(empty + stage, 1)
        for which in cutlass.range_constexpr(SUMS):
            cute.arch.mbarrier_init(sums_full + which, 1)
            cute.arch.mbarrier_init(sums_empty + which, READERS)
    cute.arch.mbarrier_init_fence()
    cute.arch.barrier()  # barriers and TMEM are there
    start = cute.arch.retrieve_tmem_ptr(cutlass.Float32, alignment=16, ptr_to_buffer_holding_addr=slot)
    both = cute.make_tensor(start, mma.make_fragment_C(cute.append(mma.partition_shape_C(TILE[:2]), SUMS)).layout)
    rows, depth = cute.size(from_a, mode=[1]), cute.size(from_a, mode=[2])
    columns = cute.size(from_b, mode=[1])
    count = (rows * columns - first + GRID - 1) // GRID  # tiles of this CTA
    if warp == LOADER:
        for turn in cutlass.range(count, unroll=1):
            tile = first + turn * GRID
            for k in cutlass.range(depth, unroll=1):
                step = turn * depth + k
                stage = step % STAGES
                cute.arch.mbarrier_wait(empty + stage, (step // STAGES % 2) ^ 1)
                with cute.arch.elect_one():
                    cute.arch.mbarrier_arrive_and_expect_tx(full + stage, 2 * TILE[2] * (TILE[0] + TILE[1]))
                cute.copy(load_a, from_a[None, tile // columns, k], to_a[None, stage], tma_bar_ptr=full + stage)
                cute.copy(load_b, from_b[None, tile % columns, k], to_b[None, stage], tma_bar_ptr=full + stage)
    elif warp == MULTIPLIER:
        for turn in cutlass.range(count, unroll=1):
            which = turn % SUMS
            cute.arch.mbarrier_wait(sums_empty + which, (turn // SUMS % 2) ^ 1)
            sums = both[None, None, None, which]
            mma.set(tcgen05.Field.ACCUMULATE, False)
            for k in cutlass.range(depth, unroll=1):
                step = turn * depth + k
                stage = step % STAGES
                cute.arch.mbarrier_wait(full + stage, step // STAGES % 2)
                for block in cutlass.range_constexpr(cute.size(fragment_a, mode=[2])):
                    cute.gemm(mma, sums, fragment_a[None, None, block, stage], fragment_b[None, None, block, stage], sums)
                    mma.set(tcgen05.Field.ACCUMULATE, True)
                with cute.arch.elect_one():
                    tcgen05.commit(empty + stage)
            with cute.arch.elect_one():
                tcgen05.commit(sums_full + which)
    else:
        atom = cute.make_copy_atom(tcgen05.Ld32x32bOp(tcgen05.Repetition.x64), cutlass.Float32)
        for turn in cutlass.range(count, unroll=1):
            tile, which = first + turn * GRID, turn % SUMS
            sums = both[(None, None), 0, 0, which]
            unload = tcgen05.make_tmem_copy(atom, sums)
            reader = unload.get_slice(thread)
            target = reader.partition_D(tiles_c[(None, None), 0, 0, tile // columns, tile % columns])
            values = cute.make_rmem_tensor(target.shape, cutlass.Float32)
            parity = 0 if cutlass.const_expr(defect == "a phase not flipped") else turn // SUMS % 2
            cute.arch.mbarrier_wait(sums_full + which, parity)
            cute.copy(unload, reader.partition_S(sums), values)
            cute.arch.fence_view_async_tmem_load()
            with cute.arch.elect_one():
                cute.arch.mbarrier_arrive(sums_empty + which)
            cute.autovec_copy(values, target)
    cute.arch.barrier()  # all accumulators are read
    if warp == 0:
        cute.arch.dealloc_tmem(start, COLUMNS)


@cute.jit
def tensor_gemm(a: cute.Tensor, b: cute.Tensor, c: cute.Tensor, defect: cutlass.Constexpr):
    """c = a b^T for a (M, K), b (N, K) float16 and c (M, N) float32, all row-major; M % 128 == 0, N % 64 == 0, K % 64 == 0."""
    operation = tcgen05.MmaF16BF16Op(
        a.element_type,
        cutlass.Float32,
        (*TILE[:2], 16),
        tcgen05.CtaGroup.ONE,
        tcgen05.OperandSource.SMEM,
        tcgen05.OperandMajorMode.K,
        tcgen05.OperandMajorMode.K,
    )
    mma = cute.make_tiled_mma(operation)
    layout_a = blackwell.make_smem_layout_a(mma, TILE, a.element_type, STAGES)
    layout_b = blackwell.make_smem_layout_b(mma, TILE, b.element_type, STAGES)
    stage_a, stage_b = cute.select(layout_a, mode=[0, 1, 2]), cute.select(layout_b, mode=[0, 1, 2])
    load = cpasync.CopyBulkTensorTileG2SOp(tcgen05.CtaGroup.ONE)
    load_a, tma_a = cute.nvgpu.make_tiled_tma_atom_A(load, a, stage_a, TILE, mma)
    load_b, tma_b = cute.nvgpu.make_tiled_tma_atom_B(load, b, stage_b, TILE, mma)
    _tensor_gemm(mma, load_a, tma_a, load_b, tma_b, c, layout_a, layout_b, defect).launch(
        grid=[GRID, 1, 1], block=[THREADS, 1, 1]
    )


def case():
    """Six tiles of five k-tiles, three for each CTA: tensors by name, and the expected result."""
    generator = torch.Generator().manual_seed(4)
    a = torch.randint(-4, 5, (256, 320), generator=generator).half()
    b = torch.randint(-4, 5, (192, 320), generator=generator).half()
    return {"a": a, "b": b, "c": torch.zeros(256, 192)}, {"c": a.float() @ b.float().T}
