"""y = x W^T on Hopper with weights as they are stored: decoded in registers, multiplied by tensor cores, as the A operand.

The product is computed as y^T = W x^T, so that weight rows fill the fixed side of the tensor core's product and the tokens, 8
to 256 of them, its free side. A CTA is persistent:

    weights (a warp)     bulk copies of records (see `layout`) into a ring of stages; early: before the kernel ahead has ended
    tokens  (a warp)     the same columns of x into the same stages: TMA boxes for `wgmma`, rows for warps
    multiply (the rest)  decode, multiply, sums in registers (`multiply`); then through shared memory to y (`epilogue`)

    stages    weights, tokens -> multiply    full: the bytes have arrived    empty: every warp has read them

Tiles are (weight rows) x (tokens): all of them in order, or from a list with a matrix each (grouped). The CTAs of a cluster
share a tile's K and add up through distributed shared memory, always in the same order.
Bytes: the weight once, x once for every tile of weight rows (from L2), y once. Flops: 2 M N K.

Without `from __future__ import annotations`: CuTeDSL reads the annotations themselves.
"""

from dataclasses import replace
from typing import Any

import cutlass
import cutlass.cute as cute
import cutlass.utils.hopper_helpers as hopper
from cutlass import BFloat16, Float32, Int32, Int64, Uint32
from cutlass.cute.nvgpu import OperandMajorMode, cpasync, warpgroup
from cutlass.memory import SmemAllocator
from cutlass.tensor_utils import LayoutEnum

from dsv4lab.kernels._common.ptx import copy_bulk
from dsv4lab.kernels.gemm.mixed.config import MixedConfig
from dsv4lab.kernels.gemm.mixed.epilogue import Epilogue
from dsv4lab.kernels.gemm.mixed.layout import SLAB, TILE, record_words
from dsv4lab.kernels.gemm.mixed.multiply import advance, multiply_by_warp, multiply_by_warpgroup

_BEGINNINGS = 4  # places along K where tiles of weight rows begin
_PACE = 20  # bytes a cycle at which an empty ring is filled; a CTA's share of the memory is 8 or 16
_CARVEOUT = 100  # percent of the L1 for shared memory; named, or compiling with a minimum of CTAs would ask for a device
_FEW_REGISTERS, _MANY_REGISTERS = 40, 232  # of loading and of multiplying threads, where a tile's sums need them


class MixedLinearSm90:
    """One configuration of the kernel, as CuTeDSL compiles it."""

    def __init__(self, config: MixedConfig) -> None:
        config.check()
        self.plan = config
        self.words = record_words(config.format)

    def mma(self, width: int) -> Any:
        return hopper.make_trivial_tiled_mma(
            BFloat16,
            BFloat16,
            OperandMajorMode.K,
            OperandMajorMode.K,
            Float32,
            (1, 1, 1),
            tiler_mn=(4 * SLAB, width),
            a_source=warpgroup.OperandSource.RMEM,
        )

    @cute.jit
    def __call__(
        self,
        x: cute.Tensor,
        records: cute.Tensor,
        alpha: cute.Tensor,
        y: cute.Tensor,
        second: cute.Tensor,
        peaks: cute.Tensor,
        factor: cute.Tensor,
        slots: cute.Tensor,
        slot_weight: cute.Tensor,
        tiles: cute.Tensor,
        num_tiles: cute.Tensor,
        given: cute.Tensor,
        seed: cute.Tensor,
        position: cute.Tensor,
        more_records: cute.Tensor,
        more_alpha: cute.Tensor,
        top_k: Int32,
        group_rows: Int32,
        limit: Float32,
        ctas: Int32,
        stream: Any,
    ) -> None:
        """x (rows, columns) bf16; records (E * slabs, tiles, words) i32; alpha (E, 2) f32; y (M, N) bf16 or f32, or (M, parts)
        i64 for argmax and sample, whose group_rows is N and which has temperatures for factors and seed, position (M,) i64;
        second: like y, of the rows behind y's, if two; peaks (M, ceil(N / 128)) i64, beside f32 y, with group_rows as there.

        factor: (M,) f32, of groups (M, G), of slots (tokens,), of matrices (E,); given (E,) f32: global scales of results;
        slots (M,) i32, slot_weight (slots,) f32 and top_k if slotted;
        tiles (T, 4) i32 (matrix, first row, end row, -) and num_tiles (1,) i32 if grouped, (M, 2) i32 (matrix, -) if single;
        more_records (slabs, tiles, words) and more_alpha (1, 2), of the matrix beside, if there is one.
        group_rows: rows of y^T that share their columns of x: the next group's follow along x's row. limit: of SwiGLU.
        """
        plan = self.plan
        layout = hopper.make_smem_layout_b(
            LayoutEnum.ROW_MAJOR, (4 * SLAB, plan.tokens, TILE), BFloat16, plan.stages * plan.chunks
        )
        load_x, tma_x = None, x
        if cutlass.const_expr(not plan.by_warp):
            one = hopper.make_smem_layout_b(LayoutEnum.ROW_MAJOR, (4 * SLAB, plan.box, TILE), BFloat16, 1)
            box = cute.slice_(one, (None, None, 0))
            load_x, tma_x = cpasync.make_tiled_tma_atom(cpasync.CopyBulkTensorTileG2SOp(), x, box, (plan.box, TILE))
        # Divisions that every role begins with, its first loads behind them: by numbers that are made here.
        slabs = cute.size(records, mode=[0]) // cute.size(alpha, mode=[0])
        inner = cute.FastDivmodDivisorV2(cute.ceil_div(slabs, plan.slabs))
        group = cute.FastDivmodDivisorV2(group_rows)
        routed = (slots, slot_weight, tiles, num_tiles)
        tensors = (records, alpha, y, second, peaks, factor, *routed, given, seed, position, more_records, more_alpha)
        self.kernel(load_x, tma_x, tensors, slabs, inner, group, top_k, group_rows, limit, layout).launch(
            grid=[ctas, 1, 1],
            block=[plan.threads, 1, 1],
            cluster=[plan.cluster, 1, 1] if plan.cluster > 1 else None,
            min_blocks_per_mp=1 if plan.by_warp else plan.resident,
            preferred_smem_carveout=_CARVEOUT if not plan.by_warp and plan.resident > 1 else None,
            stream=stream,
            use_pdl=True,
        )

    @cute.kernel
    def kernel(
        self,
        load_x: Any,
        x: cute.Tensor,
        tensors: Any,
        slabs: Int32,
        inner: cute.FastDivmodDivisorV2,
        group: cute.FastDivmodDivisorV2,
        top_k: Int32,
        group_rows: Int32,
        limit: Float32,
        layout: cute.ComposedLayout,
    ) -> None:
        records, alpha, y, second, peaks, factor, slots, slot_weight, tiles, num_tiles, given, *rest = tensors
        *draw, more_records, more_alpha = rest
        plan = self.plan
        stages = plan.stages
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        memory = SmemAllocator()
        full = memory.allocate_array(Int64, stages)
        empty = memory.allocate_array(Int64, stages)
        shared = memory.allocate_array(Int64, 2)  # of the cluster's epilogue: sums are there, sums are read
        shared_w = memory.allocate_tensor(
            Uint32, cute.make_layout((self.words * plan.chunks, plan.slabs, stages)), byte_alignment=128
        )
        if cutlass.const_expr(plan.by_warp):
            # (words of a token, token, stage)
            shared_x = memory.allocate_tensor(
                Uint32, cute.make_layout((plan.token_pitch // 4, plan.room, stages)), byte_alignment=128
            )
        else:
            shared_x = memory.allocate_tensor(BFloat16, layout.outer, byte_alignment=1024, swizzle=layout.inner)
        sums = memory.allocate_tensor(Float32, cute.make_layout(plan.sum_floats), byte_alignment=128)

        if warp == plan.warps:
            with cute.arch.elect_one():
                for i in cutlass.range_constexpr(stages):
                    cute.arch.mbarrier_init(full + i, 2)
                    cute.arch.mbarrier_init(empty + i, plan.warps)
                cute.arch.mbarrier_init(shared, 1 if plan.sends else plan.cluster)
                cute.arch.mbarrier_init(shared + 1, plan.cluster)
            cute.arch.mbarrier_init_fence()
        elif cutlass.const_expr(plan.by_warp):
            self._clear_past_the_end(x, shared_x)
        if cutlass.const_expr(plan.cluster > 1):
            cute.arch.cluster_arrive()
            cute.arch.cluster_wait()
        elif warp == plan.warps:  # has initialised the barriers it needs, and is first to be needed
            cute.arch.sync_warp()
            cute.arch.barrier_arrive(barrier_id=0, number_of_threads=plan.threads)
        else:
            cute.arch.barrier(barrier_id=0, number_of_threads=plan.threads)
        # The next kernel reads the list of tiles before this one has ended, so it may not start before the list is there.
        if cutlass.const_expr(plan.early):
            cute.arch.griddepcontrol_launch_dependents()
        elif cutlass.const_expr(plan.beside):
            if warp != plan.warps:  # weights of the matrix beside are known
                cute.arch.griddepcontrol_wait()
                cute.arch.griddepcontrol_launch_dependents()
        else:
            cute.arch.griddepcontrol_wait()
            cute.arch.griddepcontrol_launch_dependents()

        work = (records, alpha, y, tiles, num_tiles, inner)
        if warp >= plan.warps:
            if cutlass.const_expr(plan.tokens >= 128):
                cute.arch.setmaxregister_decrease(_FEW_REGISTERS)
            if warp == plan.warps:
                self._load_weights(work, more_records, slabs, shared_w, full, empty)
            elif warp == plan.warps + 1:
                if cutlass.const_expr(plan.by_warp):
                    self._load_rows(work, x, slots, group, top_k, shared_x, full, empty)
                else:
                    self._load_boxes(work, load_x, x, group, shared_x, full, empty)
        else:
            if cutlass.const_expr(plan.tokens >= 128):
                cute.arch.setmaxregister_increase(_MANY_REGISTERS)
            where = (slots, slot_weight, given, draw, top_k, group_rows, limit, sums, shared, shared + 1)
            out = Epilogue(plan, y, second, peaks, alpha, factor, *where)
            self._consume(work, out, more_alpha, shared_x, shared_w, full, empty)

    @cute.jit
    def _clear_past_the_end(self, x: Any, shared_x: Any) -> None:
        """Zeros in all of the tokens' stages where K ends inside one: what lies past the end meets weights of zero, and must be
        numbers. By all warps but the one that loads weights.
        """
        plan = self.plan
        if x.shape[1] % (plan.chunks * TILE) != 0:
            thread, _, _ = cute.arch.thread_idx()
            mine = thread if thread < plan.warps * 32 else thread - 32
            quads = plan.stages * plan.token_bytes // 16
            flat = cute.make_tensor(shared_x.iterator, cute.make_layout(4 * quads))
            zeros = cute.make_rmem_tensor((4,), Uint32)
            zeros.fill(0)
            for i in cutlass.range(mine, quads, plan.threads - 32, unroll=1):
                cute.autovec_copy(zeros, cute.local_tile(flat, (4,), (i,)))
            cute.arch.fence_view_async_shared()

    # ---- tiles ---------------------------------------------------------------------------------------------------------
    def _plan(self, records: Any, y: Any, num_tiles: Any, inner: Any) -> tuple[Any, ...]:
        """(first tile of this CTA, stride, end, first step along K, end). inner: divides by the tiles of a matrix's rows."""
        plan = self.plan
        block, _, _ = cute.arch.block_idx()
        grid, _, _ = cute.arch.grid_dim()
        rank = block % plan.cluster
        steps = records.shape[1] // plan.chunks
        low, high = rank * steps // plan.cluster, (rank + 1) * steps // plan.cluster
        entries = cute.ceil_div(y.shape[0], 1 if plan.single else plan.tokens)
        if cutlass.const_expr(plan.grouped and not plan.single):
            entries = num_tiles[0]
        return block // plan.cluster, grid // plan.cluster, entries * inner.divisor, low, high

    def _tile(self, tile: Any, inner: Any, alpha: Any, y: Any, tiles: Any) -> tuple[Any, ...]:
        """Of a tile: (matrix, -1 for the one beside, tile of weight rows, first row of y, end row)."""
        plan = self.plan
        entry, row_tile = divmod(tile, inner)
        if cutlass.const_expr(plan.beside):
            row = cutlass.select_(entry == 0, y.shape[0], entry) - 1
            return self._matrix(entry, alpha, tiles), row_tile, row, row + 1
        if cutlass.const_expr(plan.single):
            return _one_of(alpha, tiles[entry, 0]), row_tile, entry, entry + 1
        if cutlass.const_expr(plan.grouped):
            return tiles[entry, 0], row_tile, tiles[entry, 1], tiles[entry, 2]
        first, last = entry * plan.tokens, cutlass.min(entry * plan.tokens + plan.tokens, y.shape[0])
        if cutlass.const_expr(not plan.by_warp):
            edge = self._edge(y.shape[0])
            first, last = cutlass.min(first, edge), cutlass.select_(first >= edge, last, cutlass.min(last, edge))
        return Int32(0), row_tile, first, last

    @cute.jit
    def _edge(self, rows: Any) -> Any:
        """The first row of the last of several tiles of tokens; the end where there is one. It has as many rows as its product
        is wide, or half of what the last two have: a box with few rows before the end of x takes longer than a full one, why is
        not known (H200: 4,096 x 8,192 of 129 tokens 31 us, of 192 tokens 25).
        """
        plan = self.plan
        left = (rows - 1) % plan.tokens + 1
        edge = Int32(rows)
        if rows > plan.tokens:
            edge = rows - cutlass.min(self._width(left), cutlass.max(left, (plan.tokens + left) // 2))
        return edge

    @cute.jit
    def _width(self, rows: Any) -> Any:
        """Of the narrowest product that holds so many tokens."""
        widths = self.plan.widths
        width = Int32(widths[0])
        for i in cutlass.range_constexpr(1, len(widths)):
            if rows > widths[i - 1]:
                width = Int32(widths[i])
        return width

    @cute.jit
    def _step(self, step: Any, row_tile: Any, low: Any, high: Any) -> Any:
        """Which of a tile's steps along K is the next: every fourth tile of weight rows begins at the same place."""
        if cutlass.const_expr(self.plan.apart):
            step += row_tile % _BEGINNINGS * (high - low) // _BEGINNINGS
            if step >= high:
                step -= high - low
        return step

    @cute.jit
    def _matrix(self, entry: Any, alpha: Any, tiles: Any) -> Any:
        """The matrix of a routed row, behind the one beside: its number comes from the kernel before."""
        matrix = Int32(-1)
        if entry > 0:
            if cutlass.const_expr(not self.plan.early):
                cute.arch.griddepcontrol_wait()
            matrix = _one_of(alpha, tiles[entry - 1, 0])
        return matrix

    # ---- loads ---------------------------------------------------------------------------------------------------------
    @cute.jit
    def _load_weights(self, work: Any, more_records: Any, slabs: Any, shared_w: Any, full: Any, empty: Any) -> None:
        records, alpha, y, tiles, num_tiles, inner = work
        plan = self.plan
        begin, stride, end, low, high = self._plan(records, y, num_tiles, inner)
        lane = cute.arch.lane_idx()
        words = self.words * plan.chunks
        born = Int32(cute.arch.clock()) if cutlass.const_expr(plan.paced) else Int32(0)
        stage, phase = Int32(0), Int32(1)  # of the ring's empty barriers; the phase before the first counts as over
        for tile in cutlass.range(begin, end, stride, unroll=1):
            matrix, row_tile, _, _ = self._tile(tile, inner, alpha, y, tiles)
            slab = cutlass.min(row_tile * plan.slabs + lane, slabs - 1)  # past the last: never stored
            if cutlass.const_expr(plan.beside):
                start = more_records[slab, 0, None].iterator.toint()
                if matrix >= 0:
                    start = records[matrix * slabs + slab, 0, None].iterator.toint()
            else:
                start = records[matrix * slabs + slab, 0, None].iterator.toint()
            for step in cutlass.range(low, high, 1, unroll=1):
                cute.arch.mbarrier_wait(empty + stage, phase)
                if cutlass.const_expr(plan.paced):
                    self._pause(born, step - low, tile == begin)
                if lane == 0:
                    cute.arch.mbarrier_arrive_and_expect_tx(full + stage, plan.weight_bytes)
                cute.arch.sync_warp()
                if lane < plan.slabs:
                    target = shared_w[None, lane, stage].iterator
                    at = self._step(step, row_tile, low, high)
                    copy_bulk(target, start + at * (words * 4), words * 4, full + stage)
                stage, phase = advance(plan.stages, stage, phase)

    @cute.jit
    def _pause(self, born: Any, step: Any, first: Any) -> None:
        """Until a step of the first tile's first round is due. An empty ring that is asked for at once arrives all at once, its
        first stage with its last, and behind them tokens, which are asked for later.
        """
        if first and step < self.plan.stages:
            now = Int32(cute.arch.clock())
            while now - born < step * (self.plan.weight_bytes // _PACE):
                now = Int32(cute.arch.clock())

    @cute.jit
    def _load_rows(self, work: Any, x: Any, slots: Any, group: Any, top_k: Any, shared_x: Any, full: Any, empty: Any) -> None:
        """A lane a token: its columns of a stage in one copy."""
        records, alpha, y, tiles, num_tiles, inner = work
        plan = self.plan
        begin, stride, end, low, high = self._plan(records, y, num_tiles, inner)
        lane = cute.arch.lane_idx()
        cute.arch.griddepcontrol_wait()
        stage, phase = Int32(0), Int32(1)
        for tile in cutlass.range(begin, end, stride, unroll=1):
            _, row_tile, first, last = self._tile(tile, inner, alpha, y, tiles)
            column = row_tile * plan.rows // group * (records.shape[1] * TILE)
            row = cutlass.min(first + lane, last - 1)
            if cutlass.const_expr(plan.gather):
                if cutlass.const_expr(plan.beside):
                    row = Int32(0)  # of one token
                else:
                    row = (row if cutlass.const_expr(plan.single) else slots[row]) // top_k
            for step in cutlass.range(low, high, 1, unroll=1):
                start = self._step(step, row_tile, low, high) * plan.chunks * TILE + column
                size = cutlass.max(cutlass.min(plan.chunks * TILE, x.shape[1] - start), 0) * 2
                cute.arch.mbarrier_wait(empty + stage, phase)
                if lane == 0:
                    cute.arch.mbarrier_arrive_and_expect_tx(full + stage, (last - first) * size)
                cute.arch.sync_warp()
                if first + lane < last and size > 0:
                    copy_bulk(shared_x[None, lane, stage].iterator, x[row, None].iterator + start, size, full + stage)
                stage, phase = advance(plan.stages, stage, phase)

    @cute.jit
    def _load_boxes(self, work: Any, load_x: Any, x: Any, group: Any, shared_x: Any, full: Any, empty: Any) -> None:
        """Boxes of up to 64 tokens, as many as the tile has."""
        records, alpha, y, tiles, num_tiles, inner = work
        plan = self.plan
        chunks = plan.chunks
        boxes = plan.tokens // plan.box
        begin, stride, end, low, high = self._plan(records, y, num_tiles, inner)
        targets = [cute.group_modes(cute.local_tile(shared_x, (plan.box, TILE), (b, 0, None)), 0, 2) for b in range(boxes)]
        cute.arch.griddepcontrol_wait()
        stage, phase = Int32(0), Int32(1)
        for tile in cutlass.range(begin, end, stride, unroll=1):
            _, row_tile, first, last = self._tile(tile, inner, alpha, y, tiles)
            column = row_tile * plan.rows // group * (records.shape[1] * TILE)
            filled = cute.ceil_div(self._width(last - first), plan.box)  # boxes that the tile's product reads
            source = cute.local_tile(cute.domain_offset((first, column), x), (plan.box, TILE), (None, None))
            pairs = [
                cpasync.tma_partition(load_x, 0, cute.make_layout(1), target, cute.group_modes(source, 0, 2))
                for target in targets
            ]
            for step in cutlass.range(low, high, 1, unroll=1):
                cute.arch.mbarrier_wait(empty + stage, phase)
                barrier = full + stage
                at = self._step(step, row_tile, low, high)
                with cute.arch.elect_one():
                    cute.arch.mbarrier_arrive_and_expect_tx(barrier, filled * (chunks * plan.box * TILE * 2))
                for c in cutlass.range_constexpr(chunks):
                    for b in cutlass.range_constexpr(boxes):
                        if b < filled:
                            to_x, from_x = pairs[b]
                            cute.copy(
                                load_x,
                                from_x[None, b, at * chunks + c],
                                to_x[None, stage * chunks + c],
                                tma_bar_ptr=barrier,
                            )
                stage, phase = advance(plan.stages, stage, phase)

    # ---- products ------------------------------------------------------------------------------------------------------
    @cute.jit
    def _consume(self, work: Any, out: Any, more_alpha: Any, shared_x: Any, shared_w: Any, full: Any, empty: Any) -> None:
        records, alpha, y, tiles, num_tiles, inner = work
        plan = self.plan
        begin, stride, end, low, high = self._plan(records, y, num_tiles, inner)
        total = cute.make_rmem_tensor((plan.sums,), Float32)
        # alpha comes from memory, whose latency would be the tile's end: warps ask for it before their products and, of the one
        # matrix of a linear, before the kernel before has ended.
        gains = cute.make_rmem_tensor(cute.make_layout((1, 2), stride=(0, 1)), Float32)  # of whatever matrix
        ahead = plan.by_warp and plan.early and not plan.grouped
        if cutlass.const_expr(plan.by_warp):
            out = replace(out, alpha=gains)
        if cutlass.const_expr(ahead):
            _keep(gains, alpha, 0)
        slot_weight, weight = out.slot_weight, cute.make_rmem_tensor(cute.make_layout(1, stride=0), Float32)
        if cutlass.const_expr(plan.single and plan.slotted):
            out = replace(out, slot_weight=weight)
        cute.arch.griddepcontrol_wait()  # y may still be read, and factors written, by the kernel before
        stage, phase = Int32(0), Int32(0)
        turn = Int32(0)  # of the cluster's epilogue
        for tile in cutlass.range(begin, end, stride, unroll=1):
            matrix, row_tile, first, last = self._tile(tile, inner, alpha, y, tiles)
            if cutlass.const_expr(plan.beside):
                _keep(gains, more_alpha, 0)
                weight[0] = Float32(1.0)
                if matrix >= 0:
                    _keep(gains, alpha, matrix)
                    if cutlass.const_expr(plan.slotted):
                        weight[0] = slot_weight[first]
            elif cutlass.const_expr(plan.by_warp and not ahead):
                _keep(gains, alpha, matrix)
                if cutlass.const_expr(plan.single and plan.slotted):
                    weight[0] = slot_weight[first]  # of the tile's one row
            total.fill(0.0)
            ring = (full, empty, high - low)
            if cutlass.const_expr(plan.by_warp):
                stage, phase = multiply_by_warp(self, last - first, shared_x, shared_w, ring, total, stage, phase)
            else:
                rows = last - first
                for i in cutlass.range_constexpr(len(plan.widths)):
                    width, less = plan.widths[i], plan.widths[i - 1] if i else 0
                    # the narrowest product that holds the tile's tokens
                    if cutlass.const_expr(len(plan.widths) == 1) or (rows > less and rows <= width):
                        stage, phase = multiply_by_warpgroup(self, width, shared_x, shared_w, ring, total, stage, phase)
            turn = out.store(total, matrix, row_tile, first, last, turn)
        if cutlass.const_expr(plan.cluster > 1):
            out.leave(turn)


def _one_of(alpha: Any, matrix: Any) -> Any:
    """Whatever a row's matrix is, one is read: nobody reads the result of a row that has none."""
    return cutlass.min(cutlass.max(matrix, 0), alpha.shape[0] - 1)


def _keep(gains: Any, alpha: Any, matrix: Any) -> None:
    """Both factors of a matrix, in registers."""
    for i in range(2):
        gains[0, i] = alpha[matrix, i]
