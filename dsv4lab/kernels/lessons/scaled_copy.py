"""target = factor * source, tile by tile through a ring of shared-memory stages, with one warp role for each step.

    load (warp 0)       waits until a stage is empty, has TMA fill it
    scale (warps 1-4)   wait until it is full, multiply it in place, fence, say that it is ready
    store (warp 5)      waits until it is ready, has TMA write it out, says that it is empty when it has been read

Three mbarriers a stage carry the handshakes: `full` (one arrival and the tile's bytes), `ready` (one arrival a scaling warp),
`empty` (one arrival). The k-th use of a stage completes phase k of each, so a role that has used the ring t times waits for
parity (t // stages) % 2; `empty` starts complete, which is the other parity.

source, target: (M, K) float16, row-major, M % 64 == K % 64 == 0. One CTA takes 64 rows. Bytes: 4 M K. sm_90a and sm_100a.
"""

import cutlass
import cutlass.cute as cute
from cutlass.cute.nvgpu import cpasync, warpgroup
from cutlass.memory import SmemAllocator

TILE = (64, 64)  # rows, columns: 8 KiB of float16, rows as long as the widest swizzle
_SCALE_WARPS = 4
_WARPS = _SCALE_WARPS + 2
_LOAD_WARP, _STORE_WARP = 0, _WARPS - 1
_BYTES = TILE[0] * TILE[1] * 2


@cute.kernel
def _scaled_copy(
    load: cute.CopyAtom,
    source: cute.Tensor,
    store: cute.CopyAtom,
    target: cute.Tensor,
    factor: cutlass.Float32,
    layout: cute.ComposedLayout,
    element: cutlass.Constexpr,
    stages: cutlass.Constexpr,
) -> None:
    thread, _, _ = cute.arch.thread_idx()
    block, _, _ = cute.arch.block_idx()
    warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
    memory = SmemAllocator()
    full = memory.allocate_array(cutlass.Int64, stages)
    ready = memory.allocate_array(cutlass.Int64, stages)
    empty = memory.allocate_array(cutlass.Int64, stages)
    tiles = memory.allocate_tensor(element, layout.outer, byte_alignment=1024, swizzle=layout.inner)
    one = cute.make_layout(1)
    there, back = (cute.local_tile(x, TILE, (block, None)) for x in (source, target))
    flat = cute.group_modes(tiles, 0, 2)
    to_stage, from_source = cpasync.tma_partition(load, 0, one, flat, cute.group_modes(there, 0, 2))
    from_stage, to_target = cpasync.tma_partition(store, 0, one, flat, cute.group_modes(back, 0, 2))
    num_tiles = cute.size(there, mode=[2])
    if thread == 0:
        for stage in cutlass.range_constexpr(stages):
            cute.arch.mbarrier_init(full + stage, 1)
            cute.arch.mbarrier_init(ready + stage, _SCALE_WARPS)
            cute.arch.mbarrier_init(empty + stage, 1)
    cute.arch.mbarrier_init_fence()
    cute.arch.barrier()

    if warp == _LOAD_WARP:
        for tile in cutlass.range(num_tiles, unroll=1):
            stage, parity = tile % stages, tile // stages % 2
            cute.arch.mbarrier_wait(empty + stage, 1 - parity)
            with cute.arch.elect_one():
                cute.arch.mbarrier_arrive_and_expect_tx(full + stage, _BYTES)
            cute.copy(load, from_source[None, tile], to_stage[None, stage], tma_bar_ptr=full + stage)
    elif warp == _STORE_WARP:
        for tile in cutlass.range(num_tiles, unroll=1):
            stage, parity = tile % stages, tile // stages % 2
            cute.arch.mbarrier_wait(ready + stage, parity)
            with cute.arch.elect_one():  # nothing else makes a warp store once: its lanes may have parted ways
                cute.copy(store, from_stage[None, stage], to_target[None, tile])
                cute.arch.cp_async_bulk_commit_group()
                cute.arch.cp_async_bulk_wait_group(0, read=True)
                cute.arch.mbarrier_arrive(empty + stage)
    else:
        # Two neighbouring threads share a row of 128 bytes, four 16-byte accesses each.
        atom = cute.make_copy_atom(cute.nvgpu.CopyUniversalOp(), element, num_bits_per_copy=128)
        split = cute.make_tiled_copy_tv(atom, cute.make_layout((64, 2), stride=(2, 1)), cute.make_layout((1, TILE[1] // 2)))
        mine = split.get_slice(thread - 32).partition_S(tiles)
        for tile in cutlass.range(num_tiles, unroll=1):
            stage, parity = tile % stages, tile // stages % 2
            cute.arch.mbarrier_wait(full + stage, parity)
            part = mine[None, None, None, stage]
            values = cute.make_rmem_tensor_like(part)
            cute.autovec_copy(part, values)
            values.store((values.load() * factor).to(element))
            cute.autovec_copy(values, part)
            cute.arch.fence_proxy("async.shared", space="cta")
            cute.arch.sync_warp()
            with cute.arch.elect_one():
                cute.arch.mbarrier_arrive(ready + stage)


@cute.jit
def scaled_copy(
    source: cute.Tensor,
    target: cute.Tensor,
    factor: cutlass.Float32,
    stages: cutlass.Constexpr = 2,
    swizzled: cutlass.Constexpr = True,
) -> None:
    """target = factor * source with a ring of `stages` tiles; swizzled=False lays tiles out plainly, row after row."""
    rows, columns = TILE
    if cutlass.const_expr(swizzled):
        atom = warpgroup.make_smem_layout_atom(warpgroup.SmemLayoutAtomKind.K_SW128, source.element_type)
        layout = cute.tile_to_shape(atom, (rows, columns, stages), order=(0, 1, 2))
    else:
        plain = cute.make_layout((rows, columns, stages), stride=(columns, 1, rows * columns))
        layout = cute.make_composed_layout(cute.make_swizzle(0, 4, 3), 0, plain)
    tile = cute.slice_(layout, (None, None, 0))
    load, from_source = cpasync.make_tiled_tma_atom(cpasync.CopyBulkTensorTileG2SOp(), source, tile, TILE)
    store, to_target = cpasync.make_tiled_tma_atom(cpasync.CopyBulkTensorTileS2GOp(), target, tile, TILE)
    _scaled_copy(load, from_source, store, to_target, factor, layout, source.element_type, stages).launch(
        grid=[cute.ceil_div(cute.size(source, mode=[0]), rows), 1, 1], block=[32 * _WARPS, 1, 1]
    )
