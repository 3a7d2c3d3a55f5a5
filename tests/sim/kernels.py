"""Small CuTeDSL kernels of our own for the simulator's tests. Importing this module imports CuTeDSL."""

import cutlass
import cutlass.cute as cute
import cutlass.utils as utils
import cutlass.utils.blackwell_helpers as blackwell
import cutlass.utils.hopper_helpers as hopper
from cutlass.cute.nvgpu import OperandMajorMode, cpasync, tcgen05, warpgroup

THREADS = 128


@cute.kernel
def _add(a: cute.Tensor, b: cute.Tensor, c: cute.Tensor):
    thread, _, _ = cute.arch.thread_idx()
    block, _, _ = cute.arch.block_idx()
    index = block * THREADS + thread
    if index < cute.size(c):
        c[index] = a[index] + b[index]


@cute.jit
def add(a: cute.Tensor, b: cute.Tensor, c: cute.Tensor):
    """c = a + b, elementwise, over one-dimensional tensors."""
    _add(a, b, c).launch(grid=[cute.ceil_div(cute.size(c), THREADS), 1, 1], block=[THREADS, 1, 1])


@cute.kernel
def _add_past_the_end(a: cute.Tensor, b: cute.Tensor, c: cute.Tensor):
    thread, _, _ = cute.arch.thread_idx()
    c[thread] = a[thread + 64] + b[thread]


@cute.jit
def add_past_the_end(a: cute.Tensor, b: cute.Tensor, c: cute.Tensor):
    """Reads a[64 + i] for i < 128: out of bounds unless a has 192 elements."""
    _add_past_the_end(a, b, c).launch(grid=[1, 1, 1], block=[THREADS, 1, 1])


@cute.kernel
def _spilling(x: cute.Tensor, y: cute.Tensor):
    thread, _, _ = cute.arch.thread_idx()
    held = cute.make_rmem_tensor((256,), cutlass.Float32)
    for i in cutlass.range_constexpr(256):
        held[i] = x[thread * 256 + i]
    for _ in cutlass.range(4, unroll=1):
        cute.arch.barrier()
        for i in cutlass.range_constexpr(256):
            held[i] = held[i] * held[(7 * i + 3) % 256] + 1.0
    for i in cutlass.range_constexpr(256):
        y[thread * 256 + i] = held[i]


@cute.jit
def spilling(x: cute.Tensor, y: cute.Tensor):
    """Keeps 256 values a thread in use at a time: one more than there are registers."""
    _spilling(x, y).launch(grid=[1, 1, 1], block=[THREADS, 1, 1])


STATIC_FLOATS = 300


@cute.kernel
def _reverse(x: cute.Tensor, y: cute.Tensor):
    thread, _, _ = cute.arch.thread_idx()
    shared = cute.make_tensor(cute.arch.alloc_smem(cutlass.Float32, STATIC_FLOATS), cute.make_layout(STATIC_FLOATS))
    shared[thread] = x[thread]
    cute.arch.barrier()
    y[thread] = shared[THREADS - 1 - thread]


@cute.jit
def reverse(x: cute.Tensor, y: cute.Tensor):
    """y = x backwards for 128 elements, through STATIC_FLOATS of static shared memory."""
    _reverse(x, y).launch(grid=[1, 1, 1], block=[THREADS, 1, 1])


TILE_M, TILE_K = 64, 64  # of the tensor copy, elements


@cute.kernel
def _tile_copy(
    load: cute.CopyAtom,
    source: cute.Tensor,
    store: cute.CopyAtom,
    target: cute.Tensor,
    layout: cute.ComposedLayout,
    element: cutlass.Constexpr,
    copy_bytes: cutlass.Constexpr,
):
    thread, _, _ = cute.arch.thread_idx()
    row, column, _ = cute.arch.block_idx()
    memory = utils.SmemAllocator()
    barrier = memory.allocate_array(cutlass.Int64, 1)
    tile = memory.allocate_tensor(element, layout.outer, byte_alignment=1024, swizzle=layout.inner)
    there = cute.local_tile(source, (TILE_M, TILE_K), (row, column))
    back = cute.local_tile(target, (TILE_M, TILE_K), (row, column))
    one = cute.make_layout(1)
    in_shared, in_source = cpasync.tma_partition(load, 0, one, cute.group_modes(tile, 0, 2), cute.group_modes(there, 0, 2))
    out_shared, in_target = cpasync.tma_partition(store, 0, one, cute.group_modes(tile, 0, 2), cute.group_modes(back, 0, 2))
    warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
    if thread == 0:
        cute.arch.mbarrier_init(barrier, 1)
    cute.arch.mbarrier_init_fence()
    cute.arch.barrier()
    if warp == 0:
        with cute.arch.elect_one():
            cute.arch.mbarrier_arrive_and_expect_tx(barrier, copy_bytes)
        cute.copy(load, in_source, in_shared, tma_bar_ptr=barrier)
    cute.arch.mbarrier_wait(barrier, 0)
    if warp == 0:
        cute.copy(store, out_shared, in_target)
        cute.arch.cp_async_bulk_commit_group()
        cute.arch.cp_async_bulk_wait_group(0)


@cute.jit
def tile_copy(source: cute.Tensor, target: cute.Tensor):
    """target = source for row-major 16-bit matrices, tile by tile through 128B-swizzled shared memory, by TMA both ways."""
    atom = cute.nvgpu.warpgroup.make_smem_layout_atom(cute.nvgpu.warpgroup.SmemLayoutAtomKind.K_SW128, source.element_type)
    layout = cute.tile_to_shape(atom, (TILE_M, TILE_K), order=(0, 1))
    load, from_source = cpasync.make_tiled_tma_atom(cpasync.CopyBulkTensorTileG2SOp(), source, layout, (TILE_M, TILE_K))
    store, to_target = cpasync.make_tiled_tma_atom(cpasync.CopyBulkTensorTileS2GOp(), target, layout, (TILE_M, TILE_K))
    rows, columns = cute.ceil_div(source.shape[0], TILE_M), cute.ceil_div(source.shape[1], TILE_K)
    copy_bytes = cute.size_in_bytes(source.element_type, layout)
    _tile_copy(load, from_source, store, to_target, layout, source.element_type, copy_bytes).launch(
        grid=[rows, columns, 1], block=[THREADS, 1, 1]
    )


WGMMA_TILE = (64, 64, 64)


@cute.kernel
def _wgmma_tile(
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
):
    thread, _, _ = cute.arch.thread_idx()
    memory = utils.SmemAllocator()
    barrier = memory.allocate_array(cutlass.Int64, 1)
    shared_a = memory.allocate_tensor(element, layout_a.outer, byte_alignment=1024, swizzle=layout_a.inner)
    shared_b = memory.allocate_tensor(element, layout_b.outer, byte_alignment=1024, swizzle=layout_b.inner)
    tile_m, tile_n, tile_k = WGMMA_TILE
    global_a = cute.local_tile(a, (tile_m, tile_k), (0, None))
    global_b = cute.local_tile(b, (tile_n, tile_k), (0, None))
    one = cute.make_layout(1)
    to_a, from_a = cpasync.tma_partition(load_a, 0, one, cute.group_modes(shared_a, 0, 2), cute.group_modes(global_a, 0, 2))
    to_b, from_b = cpasync.tma_partition(load_b, 0, one, cute.group_modes(shared_b, 0, 2), cute.group_modes(global_b, 0, 2))
    mine = mma.get_slice(thread)
    fragment_a = mma.make_fragment_A(mine.partition_A(shared_a))
    fragment_b = mma.make_fragment_B(mine.partition_B(shared_b))
    out = mine.partition_C(c)
    sums = cute.make_rmem_tensor(out.shape, cutlass.Float32)
    warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
    if thread == 0:
        cute.arch.mbarrier_init(barrier, 1)
    cute.arch.mbarrier_init_fence()
    cute.arch.barrier()
    mma.set(warpgroup.Field.ACCUMULATE, False)
    for step in cutlass.range(cute.size(global_a, mode=[2]), unroll=1):
        if warp == 0:
            with cute.arch.elect_one():
                cute.arch.mbarrier_arrive_and_expect_tx(barrier, copy_bytes)
            cute.copy(load_a, from_a[None, step], to_a[None, 0], tma_bar_ptr=barrier)
            cute.copy(load_b, from_b[None, step], to_b[None, 0], tma_bar_ptr=barrier)
        cute.arch.mbarrier_wait(barrier, step % 2)
        warpgroup.fence()
        for block in cutlass.range_constexpr(cute.size(fragment_a, mode=[2])):
            cute.gemm(mma, sums, fragment_a[None, None, block, 0], fragment_b[None, None, block, 0], sums)
            mma.set(warpgroup.Field.ACCUMULATE, True)
        warpgroup.commit_group()
        warpgroup.wait_group(0)
        cute.arch.barrier()  # nobody refills a tile that another warp still reads
    cute.autovec_copy(sums, out)


@cute.jit
def wgmma_tile(a: cute.Tensor, b: cute.Tensor, c: cute.Tensor):
    """c = a b^T for a (64, K), b (64, K) float16, both K-major, and c (64, 64) float32, on one CTA; K % 64 == 0."""
    mma = hopper.make_trivial_tiled_mma(
        a.element_type,
        b.element_type,
        OperandMajorMode.K,
        OperandMajorMode.K,
        cutlass.Float32,
        (1, 1, 1),
        tiler_mn=(64, WGMMA_TILE[1]),
    )
    row = utils.LayoutEnum.ROW_MAJOR
    layout_a = hopper.make_smem_layout_a(row, WGMMA_TILE, a.element_type, 1)
    layout_b = hopper.make_smem_layout_b(row, WGMMA_TILE, b.element_type, 1)
    load = cpasync.CopyBulkTensorTileG2SOp()
    stage_a, stage_b = cute.slice_(layout_a, (None, None, 0)), cute.slice_(layout_b, (None, None, 0))
    load_a, tma_a = cpasync.make_tiled_tma_atom(load, a, stage_a, (WGMMA_TILE[0], WGMMA_TILE[2]))
    load_b, tma_b = cpasync.make_tiled_tma_atom(load, b, stage_b, (WGMMA_TILE[1], WGMMA_TILE[2]))
    copy_bytes = cute.size_in_bytes(a.element_type, stage_a) + cute.size_in_bytes(b.element_type, stage_b)
    _wgmma_tile(mma, load_a, tma_a, load_b, tma_b, c, layout_a, layout_b, a.element_type, copy_bytes).launch(
        grid=[1, 1, 1], block=[THREADS, 1, 1]
    )


TCGEN05_TILE = (128, 64, 64)
_TMEM_COLUMNS = 64


@cute.kernel
def _tcgen05_tile(
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
):
    thread, _, _ = cute.arch.thread_idx()
    warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
    memory = utils.SmemAllocator()
    barriers = memory.allocate_array(cutlass.Int64, 2)
    slot = memory.allocate_array(cutlass.Int32, 1)
    shared_a = memory.allocate_tensor(element, layout_a.outer, byte_alignment=1024, swizzle=layout_a.inner)
    shared_b = memory.allocate_tensor(element, layout_b.outer, byte_alignment=1024, swizzle=layout_b.inner)
    mine = mma.get_slice(0)
    global_a = mine.partition_A(cute.local_tile(a, TCGEN05_TILE, (0, 0, None), proj=(1, None, 1)))
    global_b = mine.partition_B(cute.local_tile(b, TCGEN05_TILE, (0, 0, None), proj=(None, 1, 1)))
    one = cute.make_layout(1)
    to_a, from_a = cpasync.tma_partition(load_a, 0, one, cute.group_modes(shared_a, 0, 3), cute.group_modes(global_a, 0, 3))
    to_b, from_b = cpasync.tma_partition(load_b, 0, one, cute.group_modes(shared_b, 0, 3), cute.group_modes(global_b, 0, 3))
    fragment_a, fragment_b = mma.make_fragment_A(shared_a), mma.make_fragment_B(shared_b)
    if warp == 0:
        cute.arch.alloc_tmem(_TMEM_COLUMNS, slot)
        cute.arch.relinquish_tmem_alloc_permit()
    if thread == 0:
        cute.arch.mbarrier_init(barriers, 1)
        cute.arch.mbarrier_init(barriers + 1, 1)
    cute.arch.mbarrier_init_fence()
    cute.arch.barrier()
    start = cute.arch.retrieve_tmem_ptr(cutlass.Float32, alignment=16, ptr_to_buffer_holding_addr=slot)
    sums = cute.make_tensor(start, mma.make_fragment_C(mma.partition_shape_C(TCGEN05_TILE[:2])).layout)
    if warp == 0:
        mma.set(tcgen05.Field.ACCUMULATE, False)
        for step in cutlass.range(cute.size(from_a, mode=[1]), unroll=1):
            with cute.arch.elect_one():
                cute.arch.mbarrier_arrive_and_expect_tx(barriers, copy_bytes)
            cute.copy(load_a, from_a[None, step], to_a[None, 0], tma_bar_ptr=barriers)
            cute.copy(load_b, from_b[None, step], to_b[None, 0], tma_bar_ptr=barriers)
            cute.arch.mbarrier_wait(barriers, step % 2)
            for block in cutlass.range_constexpr(cute.size(fragment_a, mode=[2])):
                cute.gemm(mma, sums, fragment_a[None, None, block, 0], fragment_b[None, None, block, 0], sums)
                mma.set(tcgen05.Field.ACCUMULATE, True)
            with cute.arch.elect_one():
                tcgen05.commit(barriers + 1)
            cute.arch.mbarrier_wait(barriers + 1, step % 2)
    cute.arch.barrier()
    atom = cute.make_copy_atom(tcgen05.Ld32x32bOp(tcgen05.Repetition.x64), cutlass.Float32)
    unload = tcgen05.make_tmem_copy(atom, sums[(None, None), 0, 0])
    reader = unload.get_slice(thread)
    source, target = reader.partition_S(sums[(None, None), 0, 0]), reader.partition_D(mine.partition_C(c)[(None, None), 0, 0])
    values = cute.make_rmem_tensor(target.shape, cutlass.Float32)
    cute.copy(unload, source, values)
    cute.arch.fence_view_async_tmem_load()
    cute.autovec_copy(values, target)
    cute.arch.barrier()
    if warp == 0:
        cute.arch.dealloc_tmem(start, _TMEM_COLUMNS)


@cute.jit
def tcgen05_tile(a: cute.Tensor, b: cute.Tensor, c: cute.Tensor):
    """c = a b^T for a (128, K), b (64, K) float16, both K-major, and c (128, 64) float32, on one CTA; K % 64 == 0."""
    operation = tcgen05.MmaF16BF16Op(
        a.element_type,
        cutlass.Float32,
        (*TCGEN05_TILE[:2], 16),
        tcgen05.CtaGroup.ONE,
        tcgen05.OperandSource.SMEM,
        tcgen05.OperandMajorMode.K,
        tcgen05.OperandMajorMode.K,
    )
    mma = cute.make_tiled_mma(operation)
    layout_a = blackwell.make_smem_layout_a(mma, TCGEN05_TILE, a.element_type, 1)
    layout_b = blackwell.make_smem_layout_b(mma, TCGEN05_TILE, b.element_type, 1)
    stage_a, stage_b = cute.select(layout_a, mode=[0, 1, 2]), cute.select(layout_b, mode=[0, 1, 2])
    load = cpasync.CopyBulkTensorTileG2SOp(tcgen05.CtaGroup.ONE)
    load_a, tma_a = cute.nvgpu.make_tiled_tma_atom_A(load, a, stage_a, TCGEN05_TILE, mma)
    load_b, tma_b = cute.nvgpu.make_tiled_tma_atom_B(load, b, stage_b, TCGEN05_TILE, mma)
    copy_bytes = cute.size_in_bytes(a.element_type, stage_a) + cute.size_in_bytes(b.element_type, stage_b)
    _tcgen05_tile(mma, load_a, tma_a, load_b, tma_b, c, layout_a, layout_b, a.element_type, copy_bytes).launch(
        grid=[1, 1, 1], block=[THREADS, 1, 1]
    )


@cute.kernel
def _only_prefetch(atom: cute.CopyAtom, out: cute.Tensor):
    cpasync.prefetch_descriptor(atom)
    out[0] = cutlass.Float16(1)


@cute.jit
def im2col_map(x: cute.Tensor, out: cute.Tensor):
    """An im2col descriptor of x, (4, 12, 16) pixels of 64 channels, for boxes of 32 pixels; nothing is copied."""
    shape = cute.make_layout(((16, 12, 4), 64), stride=((64, 1024, 12288), 1))
    tile = cute.make_composed_layout(cute.make_swizzle(3, 4, 3), 0, cute.make_layout((32, 64), stride=(64, 1)))
    image = cute.make_tensor(x.iterator, shape)
    corners = ((-1, -2), (-1, 0), (0, 0), (0, 0), (2, 1), (0, 0), (1, 1))  # lower, upper, paddings, stride, of the filter
    made = cpasync.make_im2col_tma_atom(cpasync.CopyBulkTensorIm2ColG2SOp(), image, tile, (32, 64), *corners)
    _only_prefetch(made.atom, out).launch(grid=(1, 1, 1), block=(32, 1, 1))
