"""y = (x codes * x scales) (w codes * w scales)^T * row_scale * weight_scale on Blackwell, both operands in NVFP4.

One persistent CTA a multiprocessor, six warps, each with one task, joined by two rings of mbarriers:

    load   (warp 5)     TMA: codes and block scales of a 128 x 256 slice of x and of W into a stage of shared memory
    mma    (warp 4)     tcgen05.cp: scales of the stage to TMEM; tcgen05.mma: four products of 64 columns into the accumulator
    store  (warps 0-3)  TMEM -> registers, times both global scales, -> shared memory -> TMA; 32 rows of the tile each

    stages        load -> mma     full: bytes of the stage have arrived       empty: the products that read it are done
    accumulators  mma -> store    full: all products of the tile are done     empty: all four warps hold their part

Ends of M, N and K need no code here: TMA reads zeros beyond them (codes and scales of zero) and does not write beyond them.

TMEM: accumulators from column 0, `tile_n` columns of 32 bits each, then the scales of x and W: a 32-bit column holds the four
scales of 64 columns along K for 32 rows, repeated in all four subpartitions, so 128 rows by 256 columns take 16 columns.
"""

from __future__ import annotations

from typing import Any

import cutlass
import cutlass.cute as cute
import cutlass.utils.blackwell_helpers as blackwell
import cutlass.utils.blockscaled_layout as blockscaled
from cutlass import Float32, Int16, Int32
from cutlass.cute.nvgpu import cpasync, tcgen05
from cutlass.memory import SmemAllocator

from dsv4lab.kernels._common.rings import Ring
from dsv4lab.kernels.gemm.w4a4.config import SCALE_GROUP, TILE_K, TILE_M, W4A4Config

STORE_WARPS, MMA_WARP, LOAD_WARP, WARPS = 4, 4, 5, 6
WARP = 32
ATOM_ROWS, ATOM_HALFWORDS = 128, 256  # of an atom128x4 scale tile: 128 rows by 4 scales, 512 bytes
SCALE_TILES = TILE_K // (4 * SCALE_GROUP)  # atom128x4 tiles along K of one stage
SLAB_BYTES = 128  # of a row in the store buffer: one swizzle span
SLABS = 2  # store buffers of a warp
BUFFER_ALIGN = 1024  # of a 128-byte swizzled shared-memory buffer, bytes
TMEM_COLUMNS = 512  # all of it: the CTA has the multiprocessor to itself


class W4A4LinearSm100:
    """The kernel for one `W4A4Config`; M, N and K are the call's."""

    def __init__(self, config: W4A4Config) -> None:
        config.check()
        self.config = config
        self.tile = (TILE_M, config.tile_n, TILE_K)
        self.out_type = {"bf16": cutlass.BFloat16, "f32": cutlass.Float32}[config.out]
        self.slab_columns = SLAB_BYTES * 8 // self.out_type.width
        self.codes, self.scales = cutlass.Float4E2M1FN, cutlass.Float8E4M3FN

    @cute.jit
    def __call__(
        self,
        x_codes: cute.Tensor,
        x_scale: cute.Tensor,
        w_codes: cute.Tensor,
        w_scale: cute.Tensor,
        row_scale: cute.Tensor,
        weight_scale: cute.Tensor,
        out: Any,
        num_ctas: Int32,
        stream: Any,
    ) -> None:
        """x_codes (M, K/2) u8; x_scale (ceil(M/128), ceil(K/64), 512) u8, bytes of E4M3 in atom128x4; w_codes (N, K/2) u8;
        w_scale (ceil(N/128), ceil(K/64), 512) u8; row_scale (M,) f32; weight_scale (1,) f32; out (M, N); num_ctas of the grid.
        """
        tile_m, tile_n, _ = self.tile
        operation = tcgen05.MmaMXF4NVF4Op(self.scales, (tile_m, tile_n, 64), tcgen05.CtaGroup.ONE, tcgen05.OperandSource.SMEM)
        mma = cute.make_tiled_mma(operation)
        stages = self.config.stages
        x_layout = blackwell.make_smem_layout_a(mma, self.tile, self.codes, stages)
        w_layout = blackwell.make_smem_layout_b(mma, self.tile, self.codes, stages)
        load = cpasync.CopyBulkTensorTileG2SOp(tcgen05.CtaGroup.ONE)
        x_stage, w_stage = cute.select(x_layout, mode=[0, 1, 2]), cute.select(w_layout, mode=[0, 1, 2])
        load_x, x = cute.nvgpu.make_tiled_tma_atom_A(load, self._matrix(x_codes), x_stage, self.tile, mma)
        load_w, w = cute.nvgpu.make_tiled_tma_atom_B(load, self._matrix(w_codes), w_stage, self.tile, mma)
        load_x_scale, x_scales = self._scale_load(load, x_scale, tile_m)
        load_w_scale, w_scales = self._scale_load(load, w_scale, tile_n)
        store, y = cpasync.make_tiled_tma_atom(
            cpasync.CopyBulkTensorTileS2GOp(), out, self._slab_layout(), (WARP, self.slab_columns)
        )
        loads = (load_x, load_w, load_x_scale, load_w_scale)
        tiles_m = cute.ceil_div(out.shape[0], tile_m)
        tiles_n = cute.ceil_div(out.shape[1], tile_n)
        self.kernel(
            mma, loads, (x, w, x_scales, w_scales), x_layout, w_layout, store, y, row_scale, weight_scale, (tiles_m, tiles_n)
        ).launch(grid=[num_ctas, 1, 1], block=[WARP * WARPS, 1, 1], stream=stream)

    def _matrix(self, codes: Any) -> cute.Tensor:
        """Packed codes (rows, K/2) as the matrix (rows, K) of 4-bit elements that they are."""
        rows, row_bytes = codes.shape
        layout = cute.make_layout((rows, row_bytes * 2), stride=(cute.assume(row_bytes * 2, divby=32), 1))
        return cute.make_tensor(cute.recast_ptr(codes.iterator, dtype=self.codes), layout)

    def _scale_load(self, load: Any, scale: Any, rows: int) -> Any:
        """TMA of the scales of `rows` rows by TILE_K columns: a box of whole atom128x4 tiles, 16 bits an element."""
        row_tiles, column_tiles, _ = scale.shape
        strides = (cute.assume(column_tiles * ATOM_HALFWORDS, divby=ATOM_HALFWORDS), ATOM_HALFWORDS, 1)
        layout = cute.make_layout((row_tiles, column_tiles, ATOM_HALFWORDS), stride=strides)
        tensor = cute.make_tensor(cute.recast_ptr(scale.iterator, dtype=Int16), layout)
        return cpasync.make_tiled_tma_atom(load, tensor, self._scale_box(rows), self._scale_tile(rows))

    def _scale_tile(self, rows: int) -> tuple[int, int, int]:
        return (rows // ATOM_ROWS, SCALE_TILES, ATOM_HALFWORDS)

    def _scale_box(self, rows: int) -> cute.Layout:
        """Shared-memory layout of one stage's scales, in TMA's elements."""
        return cute.make_layout(self._scale_tile(rows), stride=(SCALE_TILES * ATOM_HALFWORDS, ATOM_HALFWORDS, 1))

    def _slab_layout(self) -> cute.ComposedLayout:
        """A store warp's buffer: 32 rows of 128 bytes, swizzled so that its 32 row-wise writes meet no bank twice."""
        atom = cute.nvgpu.warpgroup.make_smem_layout_atom(cute.nvgpu.warpgroup.SmemLayoutAtomKind.K_SW128, self.out_type)
        return cute.tile_to_shape(atom, (WARP, self.slab_columns), order=(0, 1))

    @cute.kernel
    def kernel(
        self,
        mma: cute.TiledMma,
        loads: tuple,
        matrices: tuple,
        x_layout: cute.ComposedLayout,
        w_layout: cute.ComposedLayout,
        store: cute.CopyAtom,
        y: cute.Tensor,
        row_scale: cute.Tensor,
        weight_scale: cute.Tensor,
        tiles: tuple,
    ) -> None:
        config, (tile_m, tile_n, _) = self.config, self.tile
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        first, _, _ = cute.arch.block_idx()
        num_ctas, _, _ = cute.arch.grid_dim()
        tiles_m, tiles_n = tiles
        num_tiles = tiles_m * tiles_n

        # ---- shared memory, barriers, TMEM ---------------------------------------------------------------------------
        memory = SmemAllocator()
        stages = Ring.allocate(memory, config.stages)
        sums = Ring.allocate(memory, config.accumulators)
        slot = memory.allocate_array(Int32, 1)
        shared_x = memory.allocate_tensor(self.codes, x_layout.outer, byte_alignment=BUFFER_ALIGN, swizzle=x_layout.inner)
        shared_w = memory.allocate_tensor(self.codes, w_layout.outer, byte_alignment=BUFFER_ALIGN, swizzle=w_layout.inner)
        x_scale_layout = blockscaled.make_smem_layout_sfa(mma, self.tile, SCALE_GROUP, config.stages)
        w_scale_layout = blockscaled.make_smem_layout_sfb(mma, self.tile, SCALE_GROUP, config.stages)
        shared_x_scale = memory.allocate_tensor(self.scales, x_scale_layout, byte_alignment=128)
        shared_w_scale = memory.allocate_tensor(self.scales, w_scale_layout, byte_alignment=128)
        slab = self._slab_layout()
        slabs = memory.allocate_tensor(
            self.out_type,
            cute.append(slab.outer, cute.make_layout(STORE_WARPS * SLABS, stride=cute.cosize(slab.outer))),
            byte_alignment=BUFFER_ALIGN,
            swizzle=slab.inner,
        )
        if warp == MMA_WARP:
            stages.init(full=1, empty=1)
            sums.init(full=1, empty=STORE_WARPS)
            cute.arch.mbarrier_init_fence()
            cute.arch.alloc_tmem(TMEM_COLUMNS, slot)
            cute.arch.relinquish_tmem_alloc_permit()
        cute.arch.barrier()
        tmem = cute.arch.retrieve_tmem_ptr(Float32, alignment=16, ptr_to_buffer_holding_addr=slot)
        shape = mma.partition_shape_C((tile_m, tile_n))
        accumulators = cute.make_tensor(tmem, mma.make_fragment_C(cute.append(shape, config.accumulators)).layout)
        steps_per_tile = cute.ceil_div(matrices[0].shape[1], TILE_K)

        # ---- one branch a task ---------------------------------------------------------------------------------------
        if warp == LOAD_WARP:
            shared = (shared_x, shared_w, shared_x_scale, shared_w_scale)
            self._load(mma, loads, matrices, shared, stages, (first, num_ctas, num_tiles, tiles_m, steps_per_tile))
        if warp == MMA_WARP:
            shared = (shared_x, shared_w, shared_x_scale, shared_w_scale)
            self._multiply(mma, shared, accumulators, stages, sums, (first, num_ctas, num_tiles, steps_per_tile))
        if warp < STORE_WARPS:
            scales = (row_scale, weight_scale[0])
            self._store(accumulators, scales, slabs, store, y, sums, (first, num_ctas, num_tiles, tiles_m))
        cute.arch.barrier()
        if warp == MMA_WARP:
            cute.arch.dealloc_tmem(tmem, TMEM_COLUMNS)

    @cute.jit
    def _load(self, mma: Any, loads: Any, matrices: Any, shared: Any, stages: Any, work: Any) -> None:
        """Every K step of every tile of this CTA: wait until the stage is empty, announce its bytes, start four copies."""
        first, num_ctas, num_tiles, tiles_m, steps_per_tile = work
        load_x, load_w, load_x_scale, load_w_scale = loads
        tile_m, tile_n, tile_k = self.tile
        x, w, x_scales, w_scales = matrices
        mine = mma.get_slice(0)
        x_tiles = mine.partition_A(cute.local_tile(x, (tile_m, tile_k), (None, None)))
        w_tiles = mine.partition_B(cute.local_tile(w, (tile_n, tile_k), (None, None)))
        to_x, from_x = _partition(load_x, shared[0], x_tiles)
        to_w, from_w = _partition(load_w, shared[1], w_tiles)
        to_xs, from_xs = self._scale_partition(load_x_scale, shared[2], x_scales, tile_m)
        to_ws, from_ws = self._scale_partition(load_w_scale, shared[3], w_scales, tile_n)
        stage_bytes = self.config.stage_bytes
        step = Int32(0)
        for tile in cutlass.range(first, num_tiles, num_ctas, unroll=1):
            m, n = tile % tiles_m, tile // tiles_m
            for k in cutlass.range(steps_per_tile, unroll=1):
                stages.wait_empty(step)
                arrived = stages.full(step)
                with cute.arch.elect_one():
                    cute.arch.mbarrier_arrive_and_expect_tx(arrived, stage_bytes)
                stage = stages.stage(step)
                cute.copy(load_x, from_x[None, m, k], to_x[None, stage], tma_bar_ptr=arrived)
                cute.copy(load_w, from_w[None, n, k], to_w[None, stage], tma_bar_ptr=arrived)
                cute.copy(load_x_scale, from_xs[None, m, k, 0], to_xs[None, stage], tma_bar_ptr=arrived)
                cute.copy(load_w_scale, from_ws[None, n, k, 0], to_ws[None, stage], tma_bar_ptr=arrived)
                step += 1

    def _scale_partition(self, load: Any, shared: Any, scales: Any, rows: int) -> Any:
        """A stage's scales as TMA sees them: the same bytes, 16 bits an element, in whole atom128x4 tiles."""
        box = self._scale_box(rows)
        layout = cute.append(box, cute.make_layout(self.config.stages, stride=cute.cosize(box)))
        target = cute.make_tensor(cute.recast_ptr(shared.iterator, dtype=Int16), layout)
        tiles = cute.local_tile(scales, self._scale_tile(rows), (None, None, None))
        return _partition(load, target, tiles)

    @cute.jit
    def _multiply(self, mma: Any, shared: Any, accumulators: Any, stages: Any, sums: Any, work: Any) -> None:
        """Every K step: scales to TMEM, then the products; a commit hands the stage back, another one the finished sums."""
        first, num_ctas, num_tiles, steps_per_tile = work
        shared_x, shared_w, shared_x_scale, shared_w_scale = shared
        x_fragment, w_fragment = mma.make_fragment_A(shared_x), mma.make_fragment_B(shared_w)
        x_place, w_place = self.config.scale_columns
        base = accumulators.iterator
        make_x, make_w = blockscaled.make_tmem_layout_sfa, blockscaled.make_tmem_layout_sfb
        x_scale = self._scale_tensor(mma, make_x, shared_x_scale, base + x_place)
        w_scale = self._scale_tensor(mma, make_w, shared_w_scale, base + w_place)
        copy_x, x_from, x_to = self._scale_copy(shared_x_scale, x_scale)
        copy_w, w_from, w_to = self._scale_copy(shared_w_scale, w_scale)
        step, done = Int32(0), Int32(0)
        for _ in cutlass.range(first, num_tiles, num_ctas, unroll=1):
            sums.wait_empty(done)
            _fence_after_thread_sync()
            total = accumulators[None, None, None, sums.stage(done)]
            for k in cutlass.range(steps_per_tile, unroll=1):
                stages.wait_full(step)
                stage = stages.stage(step)
                cute.copy(copy_x, x_from[None, None, None, None, stage], x_to)
                cute.copy(copy_w, w_from[None, None, None, None, stage], w_to)
                for part in cutlass.range_constexpr(cute.size(x_fragment, mode=[2])):
                    mma.set(tcgen05.Field.ACCUMULATE, True if part > 0 else k > 0)
                    x_part = [x_fragment[None, None, part, stage], x_scale[None, None, part]]
                    w_part = [w_fragment[None, None, part, stage], w_scale[None, None, part]]
                    cute.gemm(mma, total, x_part, w_part, total)
                with cute.arch.elect_one():
                    tcgen05.commit(stages.empty(step))
                step += 1
            with cute.arch.elect_one():
                tcgen05.commit(sums.full(done))
            done += 1

    def _scale_tensor(self, mma: Any, make_layout: Any, shared: Any, pointer: Any) -> cute.Tensor:
        layout = make_layout(mma, self.tile, SCALE_GROUP, cute.slice_(shared.layout, (None, None, None, 0)))
        return cute.make_tensor(cute.recast_ptr(pointer, dtype=self.scales), layout)

    def _scale_copy(self, shared: Any, target: Any) -> Any:
        """tcgen05.cp of a stage's scales: 32 rows of 16 bytes a tile, repeated in the four subpartitions of TMEM."""
        atom = cute.make_copy_atom(tcgen05.Cp4x32x128bOp(tcgen05.CtaGroup.ONE), self.scales)
        source, target = cute.filter_zeros(shared), cute.filter_zeros(target)
        copy = tcgen05.make_s2t_copy(atom, target)
        part = copy.get_slice(0)
        return copy, tcgen05.get_s2t_smem_desc_tensor(copy, part.partition_S(source)), part.partition_D(target)

    @cute.jit
    def _store(self, accumulators: Any, scales: Any, slabs: Any, store: Any, y: Any, sums: Any, work: Any) -> None:
        """32 rows of every finished tile, 128 bytes of each at a time: TMEM, registers, shared memory, TMA."""
        first, num_ctas, num_tiles, tiles_m = work
        row_scale, weight_scale = scales
        thread, _, _ = cute.arch.thread_idx()
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        columns = self.slab_columns
        atom = cute.make_copy_atom(tcgen05.Ld32x32bOp(tcgen05.Repetition(columns)), Float32)
        read = tcgen05.make_tmem_copy(atom, accumulators[(None, None), 0, 0, 0])
        reader = read.get_slice(thread)
        mine = reader.partition_D(cute.make_identity_tensor((TILE_M, self.tile[1])))[None, None, 0]
        values = cute.make_rmem_tensor(mine.shape, Float32)
        y_tiles = cute.local_tile(y, (WARP, columns), (None, None))
        from_slab, to_y = _partition(store, slabs, y_tiles, 2)
        parts = self.tile[1] // columns
        done = Int32(0)
        for tile in cutlass.range(first, num_tiles, num_ctas, unroll=1):
            m, n = tile % tiles_m, tile // tiles_m
            row = m * TILE_M + thread
            factor = weight_scale
            if row < row_scale.shape[0]:
                factor = factor * row_scale[row]
            sums.wait_full(done)
            _fence_after_thread_sync()
            source = reader.partition_S(accumulators[(None, None), 0, 0, sums.stage(done)])
            for part in cutlass.range_constexpr(parts):
                cute.copy(read, source[None, None, part], values)
                cute.arch.fence_view_async_tmem_load()
                if part == parts - 1:
                    _fence_before_thread_sync()
                    cute.arch.sync_warp()
                    with cute.arch.elect_one():
                        cute.arch.mbarrier_arrive(sums.empty(done))
                buffer = warp * SLABS + part % SLABS
                cute.arch.cp_async_bulk_wait_group(SLABS - 1, read=True)
                cute.arch.sync_warp()
                rounded = cute.make_rmem_tensor(mine.shape, self.out_type)
                rounded.store((values.load() * factor).to(self.out_type))
                cute.autovec_copy(cute.make_tensor(rounded.iterator, columns), slabs[thread % WARP, None, buffer])
                cute.arch.fence_view_async_shared()
                cute.arch.sync_warp()
                cute.copy(store, from_slab[None, buffer], to_y[None, m * STORE_WARPS + warp, n * parts + part])
                cute.arch.cp_async_bulk_commit_group()
            done += 1
        cute.arch.cp_async_bulk_wait_group(0)


def _partition(atom: Any, shared: Any, tiles: Any, modes: int = 3) -> Any:
    """TMA's view of a staged shared-memory tensor and of the tiles of a global one, for a CTA on its own."""
    return cpasync.tma_partition(
        atom, 0, cute.make_layout(1), cute.group_modes(shared, 0, modes), cute.group_modes(tiles, 0, modes)
    )


def _fence_before_thread_sync() -> None:
    """TMEM accesses of this thread so far come before those of whoever it now signals."""
    cute.arch.inline_ptx("tcgen05.fence::before_thread_sync;")


def _fence_after_thread_sync() -> None:
    cute.arch.inline_ptx("tcgen05.fence::after_thread_sync;")
