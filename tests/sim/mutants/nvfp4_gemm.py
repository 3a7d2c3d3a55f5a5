"""c = (a sfa)(b sfb)^T, NVFP4 inputs with a scale factor for 16 elements, float32 output, on sm_100a.

Warp 4 loads k-tiles of A, B and their scale factors, warp 5 copies the factors from shared memory into TMEM (tcgen05.cp),
issues the block-scaled products and commits, warps 0-3 read the accumulator. One tile a CTA.
"""

import cutlass
import cutlass.cute as cute
import cutlass.utils as utils
import cutlass.utils.blackwell_helpers as blackwell
import cutlass.utils.blockscaled_layout as blockscaled
import torch
from cutlass.cute.nvgpu import cpasync, tcgen05

TILE = (128, 128, 256)
VECTOR = 16  # elements that share a scale factor
STAGES = 2
READERS, LOADER, MULTIPLIER = 4, 4, 5  # warps
THREADS = 192
COLUMNS = 256  # of TMEM: 128 for the accumulator, then the factors
CODES, FACTORS = cutlass.Float4E2M1FN, cutlass.Float8E4M3FN


@cute.kernel
def _nvfp4_gemm(
    mma: cute.TiledMma,
    load_a: cute.CopyAtom,
    a: cute.Tensor,
    load_b: cute.CopyAtom,
    b: cute.Tensor,
    load_sfa: cute.CopyAtom,
    sfa: cute.Tensor,
    load_sfb: cute.CopyAtom,
    sfb: cute.Tensor,
    c: cute.Tensor,
    layout_a: cute.ComposedLayout,
    layout_b: cute.ComposedLayout,
    layout_sfa: cute.Layout,
    layout_sfb: cute.Layout,
    copy_bytes: cutlass.Constexpr,
):
    thread, _, _ = cute.arch.thread_idx()
    warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
    row, column, _ = cute.arch.block_idx()
    memory = utils.SmemAllocator()
    full = memory.allocate_array(cutlass.Int64, STAGES)
    empty = memory.allocate_array(cutlass.Int64, STAGES)
    done = memory.allocate_array(cutlass.Int64, 1)
    slot = memory.allocate_array(cutlass.Int32, 1)
    shared_a = memory.allocate_tensor(CODES, layout_a.outer, byte_alignment=1024, swizzle=layout_a.inner)
    shared_b = memory.allocate_tensor(CODES, layout_b.outer, byte_alignment=1024, swizzle=layout_b.inner)
    shared_sfa = memory.allocate_tensor(FACTORS, layout_sfa, byte_alignment=128)
    shared_sfb = memory.allocate_tensor(FACTORS, layout_sfb, byte_alignment=128)
    mine = mma.get_slice(0)
    to_a, from_a = _partition(load_a, shared_a, mine.partition_A(cute.local_tile(a, (TILE[0], TILE[2]), (row, None))))
    to_b, from_b = _partition(load_b, shared_b, mine.partition_B(cute.local_tile(b, (TILE[1], TILE[2]), (column, None))))
    tiles_sfa = mine.partition_A(cute.local_tile(sfa, (TILE[0], TILE[2]), (row, None)))
    tiles_sfb = mine.partition_B(cute.local_tile(sfb, (TILE[1], TILE[2]), (column, None)))
    to_sfa, from_sfa = map(cute.filter_zeros, _partition(load_sfa, shared_sfa, tiles_sfa))
    to_sfb, from_sfb = map(cute.filter_zeros, _partition(load_sfb, shared_sfb, tiles_sfb))
    fragment_a, fragment_b = mma.make_fragment_A(shared_a), mma.make_fragment_B(shared_b)
    if warp == 0:
        cute.arch.alloc_tmem(COLUMNS, slot)
        cute.arch.relinquish_tmem_alloc_permit()
    if thread == 0:
        for stage in cutlass.range_constexpr(STAGES):
            cute.arch.mbarrier_init(full + stage, 1)
            cute.arch.mbarrier_init(empty + stage, 1)
        cute.arch.mbarrier_init(done, 1)
    cute.arch.mbarrier_init_fence()
    cute.arch.barrier()  # barriers and TMEM are there
    start = cute.arch.retrieve_tmem_ptr(cutlass.Float32, alignment=16, ptr_to_buffer_holding_addr=slot)
    sums = cute.make_tensor(start, mma.make_fragment_C(mma.partition_shape_C(TILE[:2])).layout)
    after_sums = start + tcgen05.find_tmem_tensor_col_offset(sums)
    one_sfa = cute.slice_(layout_sfa, (None, None, None, 0))
    one_sfb = cute.slice_(layout_sfb, (None, None, None, 0))
    held_sfa = cute.make_tensor(
        cute.recast_ptr(after_sums, dtype=FACTORS), blockscaled.make_tmem_layout_sfa(mma, TILE, VECTOR, one_sfa)
    )
    after_sfa = after_sums + tcgen05.find_tmem_tensor_col_offset(held_sfa)
    held_sfb = cute.make_tensor(
        cute.recast_ptr(after_sfa, dtype=FACTORS), blockscaled.make_tmem_layout_sfb(mma, TILE, VECTOR, one_sfb)
    )
    depth = cute.size(from_a, mode=[1])
    if warp == LOADER:
        for k in cutlass.range(depth, unroll=1):
            stage = k % STAGES
            cute.arch.mbarrier_wait(empty + stage, (k // STAGES % 2) ^ 1)
            with cute.arch.elect_one():
                cute.arch.mbarrier_arrive_and_expect_tx(full + stage, copy_bytes)
            cute.copy(load_a, from_a[None, k], to_a[None, stage], tma_bar_ptr=full + stage)
            cute.copy(load_b, from_b[None, k], to_b[None, stage], tma_bar_ptr=full + stage)
            cute.copy(load_sfa, from_sfa[None, k], to_sfa[None, stage], tma_bar_ptr=full + stage)
            cute.copy(load_sfb, from_sfb[None, k], to_sfb[None, stage], tma_bar_ptr=full + stage)
    elif warp == MULTIPLIER:
        unpack = cute.make_copy_atom(tcgen05.Cp4x32x128bOp(tcgen05.CtaGroup.ONE), FACTORS)
        copy_sfa, source_sfa, target_sfa = _factors(unpack, shared_sfa, held_sfa)
        copy_sfb, source_sfb, target_sfb = _factors(unpack, shared_sfb, held_sfb)
        mma.set(tcgen05.Field.ACCUMULATE, False)
        for k in cutlass.range(depth, unroll=1):
            stage = k % STAGES
            cute.arch.mbarrier_wait(full + stage, k // STAGES % 2)
            cute.copy(copy_sfa, source_sfa[None, None, None, None, stage], target_sfa)
            cute.copy(copy_sfb, source_sfb[None, None, None, None, stage], target_sfb)
            for block in cutlass.range_constexpr(cute.size(fragment_a, mode=[2])):
                mma.set(tcgen05.Field.SFA, held_sfa[None, None, block].iterator)
                mma.set(tcgen05.Field.SFB, held_sfb[None, None, block].iterator)
                cute.gemm(mma, sums, fragment_a[None, None, block, stage], fragment_b[None, None, block, stage], sums)
                mma.set(tcgen05.Field.ACCUMULATE, True)
            with cute.arch.elect_one():
                tcgen05.commit(empty + stage)
        with cute.arch.elect_one():
            tcgen05.commit(done)
    else:
        atom = cute.make_copy_atom(tcgen05.Ld32x32bOp(tcgen05.Repetition.x128), cutlass.Float32)
        unload = tcgen05.make_tmem_copy(atom, sums[(None, None), 0, 0])
        reader = unload.get_slice(thread)
        tile = mine.partition_C(cute.local_tile(c, TILE[:2], (row, column)))
        target = reader.partition_D(tile[(None, None), 0, 0])
        values = cute.make_rmem_tensor(target.shape, cutlass.Float32)
        cute.arch.mbarrier_wait(done, 0)
        cute.copy(unload, reader.partition_S(sums[(None, None), 0, 0]), values)
        cute.arch.fence_view_async_tmem_load()
        cute.autovec_copy(values, target)
    cute.arch.barrier()  # the accumulator is read
    if warp == 0:
        cute.arch.dealloc_tmem(start, COLUMNS)


def _partition(atom, shared, tiles):
    """Shared memory's buffers and global memory's k-tiles as a TMA atom copies them."""
    return cpasync.tma_partition(atom, 0, cute.make_layout(1), cute.group_modes(shared, 0, 3), cute.group_modes(tiles, 0, 3))


def _factors(atom, shared, held):
    """A tiled copy of scale factors from shared memory to TMEM, its sources (one for each buffer) and its target."""
    compact = cute.filter_zeros(held)
    copy = tcgen05.make_s2t_copy(atom, compact)
    source = copy.get_slice(0).partition_S(cute.filter_zeros(shared))
    return copy, tcgen05.get_s2t_smem_desc_tensor(copy, source), copy.get_slice(0).partition_D(compact)


def _atom(make, tensor, layout, mma, **more):
    """A TMA atom and its coordinate tensor for one buffer of a staged layout."""
    load = cpasync.CopyBulkTensorTileG2SOp(tcgen05.CtaGroup.ONE)
    return make(load, tensor, cute.slice_(layout, (None, None, None, 0)), TILE, mma, **more)


@cute.jit
def nvfp4_gemm(a: cute.Tensor, b: cute.Tensor, sfa: cute.Tensor, sfb: cute.Tensor, c: cute.Tensor, defect: cutlass.Constexpr):
    """a (M, K/2), b (N, K/2) uint8, two codes a byte; sfa, sfb uint8, E4M3 in the atom128x4 layout; c (M, N) float32.

    M % 128 == 0, N % 128 == 0, K % 256 == 0.
    """
    m, n, k = cute.size(a, mode=[0]), cute.size(b, mode=[0]), 2 * cute.size(a, mode=[1])
    codes_a = cute.make_tensor(cute.recast_ptr(a.iterator, dtype=CODES), cute.make_layout((m, k), stride=(k, 1)))
    codes_b = cute.make_tensor(cute.recast_ptr(b.iterator, dtype=CODES), cute.make_layout((n, k), stride=(k, 1)))
    shape_sfa = blockscaled.tile_atom_to_shape_SF((m, k, 1), VECTOR)
    shape_sfb = blockscaled.tile_atom_to_shape_SF((n, k, 1), VECTOR)
    factors_a = cute.make_tensor(cute.recast_ptr(sfa.iterator, dtype=FACTORS), shape_sfa)[None, None, 0]
    factors_b = cute.make_tensor(cute.recast_ptr(sfb.iterator, dtype=FACTORS), shape_sfb)[None, None, 0]
    operation = tcgen05.MmaMXF4NVF4Op(FACTORS, (*TILE[:2], 64), tcgen05.CtaGroup.ONE, tcgen05.OperandSource.SMEM)
    mma = cute.make_tiled_mma(operation)
    layout_a = blackwell.make_smem_layout_a(mma, TILE, CODES, STAGES)
    layout_b = blackwell.make_smem_layout_b(mma, TILE, CODES, STAGES)
    layout_sfa = blockscaled.make_smem_layout_sfa(mma, TILE, VECTOR, STAGES)
    layout_sfb = blockscaled.make_smem_layout_sfb(mma, TILE, VECTOR, STAGES)
    load_a, tma_a = _atom(cute.nvgpu.make_tiled_tma_atom_A, codes_a, layout_a, mma)
    load_b, tma_b = _atom(cute.nvgpu.make_tiled_tma_atom_B, codes_b, layout_b, mma)
    load_sfa, tma_sfa = _atom(cute.nvgpu.make_tiled_tma_atom_A, factors_a, layout_sfa, mma, internal_type=cutlass.Int16)
    load_sfb, tma_sfb = _atom(cute.nvgpu.make_tiled_tma_atom_B, factors_b, layout_sfb, mma, internal_type=cutlass.Int16)
    copy_bytes = (TILE[0] + TILE[1]) * (TILE[2] // 2 + TILE[2] // VECTOR)
    _nvfp4_gemm(
        mma,
        load_a,
        tma_a,
        load_b,
        tma_b,
        load_sfa,
        tma_sfa,
        load_sfb,
        tma_sfb,
        c,
        layout_a,
        layout_b,
        layout_sfa,
        layout_sfb,
        copy_bytes,
    ).launch(grid=[m // TILE[0], n // TILE[1], 1], block=[THREADS, 1, 1])


def case():
    """Two tiles of five k-tiles: tensors by name, and the expected result."""
    from dsv4lab.formats import to_atom128x4

    generator = torch.Generator().manual_seed(5)
    m, n, k = 256, 128, 5 * TILE[2]
    table = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    table = torch.cat([table, -table])
    packed, scales, values = [], [], []
    for rows in (m, n):
        codes = torch.randint(0, 16, (rows, k), generator=generator)
        scale = torch.tensor([0.5, 1.0, 2.0])[torch.randint(0, 3, (rows, k // VECTOR), generator=generator)]
        packed.append((codes[:, ::2] | codes[:, 1::2] << 4).to(torch.uint8))
        scales.append(to_atom128x4(scale.to(torch.float8_e4m3fn)).view(torch.uint8))
        values.append(table[codes] * scale.repeat_interleave(VECTOR, 1))
    tensors = {"a": packed[0], "b": packed[1], "sfa": scales[0], "sfb": scales[1], "c": torch.zeros(m, n)}
    return tensors, {"c": values[0] @ values[1].T}
