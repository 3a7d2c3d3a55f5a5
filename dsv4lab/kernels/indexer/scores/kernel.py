"""I[t, j] = sum_h w[t, h] relu(q[t, h] . k_j) on Hopper, with keys as the cache stores them.

A CTA has up to four neighbouring queries and a span of entries, or, where queries are few, parts of what single ones see
(`shares`). Queries stay in shared memory, keys stream past them:

    load (a warp)                a tile of 64 keys, from their pages, into a ring of stages by bulk copies
    multiply (two warpgroups)    each its own tiles: keys decoded in registers as the A operand (`decode`), the heads of all
                                 queries as the B operand; then relu, weights and sums of heads, and the scores to memory

    stages    load -> multiply    full: the bytes have arrived    empty: every warp has read them
    turns     load -> multiply    full: which part is next        empty: every warp has read it

A thread's products of a row are one key's, so relu and the weighted sum are two instructions a product, x + |x| and a fused
multiply-add with half the weight; quads of lanes then add up, each lane keeping what it stores. Neighbouring queries of one
sequence are a run: keys are read once for all of it, up to the most that one of its queries sees. Columns of the tile's other
queries are then idle. -inf is written where a query does not see an entry, for who asks for it: in a graph of 64
sequences that may each have a pool of a million tokens, that is 67 MB, 16 us.

Flops: 2 M T H 128. 4096 queries, 16384 keys, 64 heads: 1.1 TFLOP, 1.4 ms at 807 TFLOP/s. Beside it a warp has 490 instructions
for each 64 keys and four queries, whose products take 1024 cycles of the tensor core; two warpgroups take turns. Bytes: keys
once for each four queries, 2.2 GB of fp8 records from L2; the result, 268 MB. Predicted on an H200: 1.6 to 2 ms.
Few queries, one a tile: 290 instructions and 256 tensor cycles for 64 keys, whose bytes take 466 cycles of a multiprocessor's
share of 4.2 TB/s (fp8), 241 (fp4) or 910 (plain): memory speed, for fp4 some 80 % of it. Queries of one sequence read its keys
from L2 after the first, and are bound by the tensor core from the second (fp8) on.

Without `from __future__ import annotations`: CuTeDSL reads the annotations themselves.
"""

from dataclasses import dataclass
from typing import Any

import cutlass
import cutlass.cute as cute
import cutlass.utils.hopper_helpers as hopper
from cutlass import BFloat16, Float32, Int32, Int64, Uint8, Uint32
from cutlass.cute.nvgpu import OperandMajorMode, warpgroup
from cutlass.memory import SmemAllocator
from cutlass.tensor_utils import LayoutEnum

from dsv4lab.kernels._common.lanes import came_before
from dsv4lab.kernels._common.ptx import copy_bulk
from dsv4lab.kernels._common.rings import Ring, arrive_with
from dsv4lab.kernels.indexer.scores.config import DIM, TILE, WARP, WARPGROUP, IndexScoresConfig
from dsv4lab.kernels.indexer.scores.decode import (
    BLOCKS,
    WEIGHT_FACTOR,
    arrange_query,
    decode_rows,
    query_offset,
)
from dsv4lab.kernels.indexer.scores.shares import Shares
from dsv4lab.kernels.indexer.visible import visible

_SLAB = 64  # columns of an operand's row of 128 bytes
_RUN = 4  # words of a run: first query, end, entries, sequence; of a part: query, first entry, end, tiles
_TURNS = 2  # parts that are told of ahead
_NO_PART = 1 << 30  # beyond all
_INFINITY = float("inf")
_CARVEOUT = 100  # percent of the L1 for shared memory; named, or compiling with a minimum of CTAs would ask for a device


class IndexScoresSm90:
    """One configuration of the kernel, as CuTeDSL compiles it."""

    def __init__(self, config: IndexScoresConfig) -> None:
        config.check()
        self.plan = config

    @cute.jit
    def __call__(
        self,
        q: Any,
        head_weights: Any,
        pages: Any,
        block_table: Any,
        seq_idx: Any,
        num_visible: Any,
        out: Any,
        counters: Any,
        span: Int32,
        ctas: Int32,
        fill: Int32,
        scale: Float32,
        stream: Any,
    ) -> None:
        """q (M, Hi, 128) bf16, head_weights (M, Hi) f32, pages (P, bytes) u8, block_table (num_seqs, nb) i32, seq_idx and
        num_visible (M,) -> out (M, T) f32. counters (2,) i32 of who divides, zeros before and after: parts that were taken,
        CTAs that are done. span: entries of a CTA, a multiple of a tile for each warpgroup; ctas: where they divide what there
        is. fill: whether -inf is written.
        """
        plan = self.plan
        mma = hopper.make_trivial_tiled_mma(
            BFloat16,
            BFloat16,
            OperandMajorMode.K,
            OperandMajorMode.K,
            Float32,
            (1, 1, 1),
            tiler_mn=(TILE, plan.columns),
            a_source=warpgroup.OperandSource.RMEM,
        )
        layout = hopper.make_smem_layout_b(LayoutEnum.ROW_MAJOR, (TILE, plan.columns, _SLAB), BFloat16, DIM // _SLAB)
        grid = [ctas, 1, 1]
        if cutlass.const_expr(not plan.divided):
            grid = [cute.ceil_div(q.shape[0], plan.queries), cute.ceil_div(out.shape[1], span), 1]
        self.kernel(
            mma, q, head_weights, pages, block_table, seq_idx, num_visible, out, counters, span, fill, scale, layout
        ).launch(
            grid=grid,
            block=[plan.threads, 1, 1],
            min_blocks_per_mp=plan.resident,
            preferred_smem_carveout=_CARVEOUT,
            stream=stream,
            use_pdl=True,
        )

    @cute.kernel
    def kernel(
        self,
        mma: cute.TiledMma,
        q: Any,
        head_weights: Any,
        pages: Any,
        block_table: Any,
        seq_idx: Any,
        num_visible: Any,
        out: Any,
        counters: Any,
        span: Int32,
        fill: Int32,
        scale: Float32,
        layout: cute.ComposedLayout,
    ) -> None:
        plan = self.plan
        thread, _, _ = cute.arch.thread_idx()
        block, part, _ = cute.arch.block_idx()
        blocks, _, _ = cute.arch.grid_dim()
        warp = cute.arch.make_warp_uniform(thread // WARP)
        multiply = plan.groups * WARPGROUP  # threads
        few_registers, many_registers = plan.registers
        memory = SmemAllocator()
        ring = Ring.allocate(memory, plan.stages)
        runs = memory.allocate_tensor(Int32, cute.make_layout(_RUN * max(plan.queries, _TURNS) + 1))
        sees = memory.allocate_tensor(Int32, cute.make_layout(plan.known))
        sequences = memory.allocate_tensor(Int32, cute.make_layout(plan.known))
        turns = Ring.allocate(memory, _TURNS)
        weights = memory.allocate_tensor(Float32, cute.make_layout(plan.columns), byte_alignment=16)
        queries = memory.allocate_tensor(BFloat16, layout.outer, byte_alignment=1024, swizzle=layout.inner)
        stages = memory.allocate_tensor(Uint8, cute.make_layout(plan.stages * plan.stage_bytes), byte_alignment=128)

        if warp == multiply // WARP:
            ring.init(full=1, empty=WARPGROUP // WARP)
            turns.init(full=1, empty=multiply // WARP)
            cute.arch.mbarrier_init_fence()
        cute.arch.griddepcontrol_launch_dependents()
        cute.arch.griddepcontrol_wait()
        # Later queries see more: they start first, and what ends last is short.
        first = (blocks - 1 - block) * plan.queries
        low = part * span
        high = cutlass.min(low + span, out.shape[1])
        shares = Shares(sees, sequences, q.shape[0], plan.groups * TILE)
        if cutlass.const_expr(plan.divided):
            shares.look(num_visible, seq_idx, out.shape[1], thread, plan.threads)
        elif thread == multiply:
            self._find_runs(seq_idx, num_visible, out, first, runs, sees)
        cute.arch.barrier()

        if warp >= multiply // WARP:
            if cutlass.const_expr(plan.hands_over):
                cute.arch.setmaxregister_decrease(few_registers)
            if warp == multiply // WARP:
                loading = Loading(plan, pages, block_table, stages, ring)
                if cutlass.const_expr(plan.divided):
                    self._load_shares(loading, shares, runs, turns, counters)
                else:
                    step = Int32(0)
                    for r in cutlass.range(runs[_RUN * plan.queries], unroll=1):
                        _, _, limit, sequence, tiles = self._run(runs, r, low, high)
                        loading.load(sequence, low, limit, tiles, step)
                        step += tiles
        else:
            if cutlass.const_expr(plan.hands_over):
                cute.arch.setmaxregister_increase(many_registers)
            multiplying = Multiplying(plan, mma, q, head_weights, scale, queries, weights, stages, ring, out)
            if cutlass.const_expr(plan.divided):
                self._multiply_shares(multiplying, runs, turns)
                if fill != 0 and shares.hides(out.shape[1]):
                    for row in cutlass.range(q.shape[0], unroll=1):
                        multiplying.fill(row, row + 1, sees[row], out.shape[1], block * multiply + thread, blocks * multiply)
            else:
                multiplying.arrange(first)
                base = Int32(0)  # steps of the runs before
                for r in cutlass.range(runs[_RUN * plan.queries], unroll=1):
                    start, end, _, _, tiles = self._run(runs, r, low, high)
                    multiplying.multiply(sees, first, start, end, low, high, tiles, base)
                    base += tiles
                    if fill != 0:
                        multiplying.fill(first + start, first + end, low + tiles * TILE, high, thread, multiply)

    # ---- shares --------------------------------------------------------------------------------------------------------
    @cute.jit
    def _load_shares(self, loading: Any, shares: Any, runs: Any, turns: Any, counters: Any) -> None:
        """The CTA's parts, one after the other: keys for each, and the others are told which it is, and when there is none."""
        block, _, _ = cute.arch.block_idx()
        blocks, _, _ = cute.arch.grid_dim()
        length, several = shares.length(blocks)
        own = cutlass.max(several - 2, 1)  # neighbours
        part, turn, step, row = block * own, Int32(0), Int32(0), Int32(0)
        while row >= 0:
            row, low, high = shares.find(part, length)
            tiles = cute.ceil_div(high - low, TILE)
            turns.wait_empty(turn)
            if cute.arch.lane_idx() == 0:
                for i, word in enumerate((row, low, high, tiles)):
                    runs[turns.stage(turn) * _RUN + i] = word
                cute.arch.mbarrier_arrive(turns.full(turn))
            if row >= 0:
                loading.load(shares.sequences[row], low, shares.seen[row], tiles, step)
                step += tiles
            turn, part = turn + 1, part + 1
            if turn >= own:
                part = Int32(_NO_PART)
                if several > 1 and row >= 0:
                    part = own * blocks + came_before(counters.iterator)
        if several > 1:
            before = came_before(counters.iterator + 1)
            if before == blocks - 1 and cute.arch.lane_idx() == 0:
                counters[0], counters[1] = Int32(0), Int32(0)

    @cute.jit
    def _multiply_shares(self, multiplying: Any, runs: Any, turns: Any) -> None:
        turn, base, row, before = Int32(0), Int32(0), Int32(0), Int32(-1)
        while row >= 0:
            turns.wait_full(turn)
            row, low, high, tiles = (Int32(runs[turns.stage(turn) * _RUN + i]) for i in range(_RUN))
            arrive_with(turns.empty(turn), cute.arch.lane_idx(), [Uint32(word) for word in (row, low, high, tiles)])
            if row >= 0:
                if row != before:
                    if turn > 0:  # all have read the query before
                        cute.arch.barrier(barrier_id=1, number_of_threads=self.plan.groups * WARPGROUP)
                    multiplying.arrange(row)
                before = row
                multiplying.multiply(None, row, Int32(0), Int32(1), low, high, tiles, base)
                base += tiles
            turn += 1

    # ---- runs ----------------------------------------------------------------------------------------------------------
    @cute.jit
    def _find_runs(self, seq_idx: Any, num_visible: Any, out: Any, first: Any, runs: Any, sees: Any) -> None:
        """The tile's queries in runs of one sequence, and what each sees. By one thread."""
        plan = self.plan
        rows = cutlass.min(seq_idx.shape[0] - first, plan.queries)
        sequence, seen = [], []
        for i in cutlass.range_constexpr(plan.queries):
            row = first + cutlass.min(Int32(i), rows - 1)
            sequence.append(Int32(seq_idx[row]))
            seen.append(visible(num_visible, row, out.shape[1]))
        count, start, limit = Int32(0), Int32(0), seen[0]
        for i in cutlass.range_constexpr(plan.queries):
            sees[i] = seen[i]
            last = i + 1 == rows
            if cutlass.const_expr(i + 1 < plan.queries):
                last = last or sequence[i + 1] != sequence[i]
            if i < rows and last:
                runs[_RUN * count] = start
                runs[_RUN * count + 1] = Int32(i + 1)
                runs[_RUN * count + 2] = limit
                runs[_RUN * count + 3] = sequence[i]
                count, start, limit = count + 1, Int32(i + 1), Int32(0)
            if cutlass.const_expr(i + 1 < plan.queries):
                limit = cutlass.max(limit, seen[i + 1])
        runs[_RUN * plan.queries] = count

    def _run(self, runs: Any, index: Any, low: Any, high: Any) -> tuple[Any, ...]:
        """(first query, end, entries, sequence, tiles of keys of this CTA)."""
        start, end, limit, sequence = (runs[_RUN * index + i] for i in range(_RUN))
        return start, end, limit, sequence, cute.ceil_div(cutlass.max(cutlass.min(limit, high) - low, 0), TILE)


@dataclass(frozen=True)
class Loading:
    """Keys from pages into the ring, by a warp."""

    plan: cutlass.Constexpr
    pages: Any
    block_table: Any
    stages: Any
    ring: Any

    @cute.jit
    def load(self, sequence: Any, low: Any, limit: Any, tiles: Any, step: Any) -> None:
        """Tiles of a sequence's keys from `low` on, of which `limit` are seen. A lane a copy: the data of a unit of records, or
        its scales. step: tiles before.
        """
        plan, pages = self.plan, self.pages
        lane = cute.arch.lane_idx()
        units = TILE // plan.unit
        of, mine = lane % units, lane < units * (2 if plan.scale_bytes else 1)
        scales = lane >= units
        size = plan.unit * (plan.scale_bytes if scales else plan.data_bytes)
        offset = of * size + (TILE * plan.data_bytes if scales else Int32(0))
        begin = plan.page_size * plan.data_bytes if scales else Int32(0)  # of the part, in a page
        record = plan.scale_bytes if scales else plan.data_bytes
        first = low + of * plan.unit
        page = self.page(sequence, cutlass.min(first, limit - 1))
        for t in cutlass.range(tiles, unroll=1):
            # Past the run's last entry, its unit again: pages beyond are not there.
            entry = cutlass.min(first + t * TILE, limit - 1) // plan.unit * plan.unit
            ahead = cutlass.min(first + (t + 1) * TILE, limit - 1)
            source = pages.iterator.toint() + Int64(page) * pages.shape[1] + begin + entry % plan.page_size * record
            page = self.page(sequence, ahead)  # the next tile's, on its way while this one waits
            self.ring.wait_empty(step)
            if lane == 0:
                cute.arch.mbarrier_arrive_and_expect_tx(self.ring.full(step), plan.stage_bytes)
            cute.arch.sync_warp()
            if mine:
                target = self.stages.iterator.toint() + self.ring.stage(step) * plan.stage_bytes + offset
                copy_bulk(target, source, size, self.ring.full(step))
            step += 1

    def page(self, sequence: Any, entry: Any) -> Any:
        """The page of an entry; of none that is there, some page, whose records nobody sees."""
        column = cutlass.min(cutlass.max(entry, 0) // self.plan.page_size, self.block_table.shape[1] - 1)
        return cutlass.max(self.block_table[sequence, column], 0)


@dataclass(frozen=True)
class Multiplying:
    """Products, sums and scores, by all warpgroups but the loading one."""

    plan: cutlass.Constexpr
    mma: Any
    q: Any
    head_weights: Any
    scale: Any
    queries: Any
    weights: Any
    stages: Any
    ring: Any
    out: Any

    @cute.jit
    def arrange(self, first: Any) -> None:
        """The queries from `first` on in the order of `decode`, weights beside them; zeros for heads that are none."""
        plan, q, head_weights = self.plan, self.q, self.head_weights
        thread, _, _ = cute.arch.thread_idx()
        heads, columns = plan.heads, plan.columns
        threads = plan.groups * WARPGROUP
        last = q.shape[0] - 1
        base = self.queries.iterator.toint()
        chunks = cute.make_rmem_tensor((4, 4), Uint32)
        for i in cutlass.range_constexpr(-(-columns * 4 // threads)):
            index = i * threads + thread
            column, lane = index // 4, index % 4
            if cutlass.const_expr(columns * 4 % threads == 0) or column < columns:
                query, head = column // plan.padded, column % plan.padded
                row = q.iterator + (Int64(cutlass.min(first + query, last)) * heads + cutlass.min(head, heads - 1)) * DIM
                words = cute.recast_tensor(cute.make_tensor(row.align(16), cute.make_layout(DIM)), Uint32)
                for c in cutlass.range_constexpr(4):
                    at = query_offset(plan.record, c, lane) // 16
                    cute.autovec_copy(cute.local_tile(words, (4,), (at,)), chunks[None, c])
                if head >= heads:
                    chunks.fill(0)
                for c in cutlass.range_constexpr(4):
                    pairs = arrange_query(plan.record, [chunks[w, c] for w in range(4)])
                    for p in cutlass.range_constexpr(4):
                        block = 2 * c + p // 2
                        place = (block % 4 * 2 + p % 2) ^ (column % 8)
                        _store_word(base + (block // 4 * columns + column) * 128 + place * 16 + lane * 4, pairs[p])
        for column in cutlass.range(thread, columns, threads, unroll=1):
            query, head = column // plan.padded, column % plan.padded
            weight = Float32(0.0)
            if head < heads:
                weight = head_weights[cutlass.min(first + query, last), head] * self.scale
                weight = weight * Float32(WEIGHT_FACTOR[plan.record] / 2)  # a power of two
            self.weights[column] = weight
        cute.arch.fence_view_async_shared()
        cute.arch.barrier(barrier_id=1, number_of_threads=threads)

    @cute.jit
    def multiply(self, sees: Any, first: Any, start: Any, end: Any, low: Any, high: Any, tiles: Any, base: Any) -> None:
        """Scores of the queries first + start .. first + end - 1 for tiles of keys from `low` on, up to `high`, -inf where they
        do not see them. sees: entries each sees, None where it is all of these; base: tiles before.
        """
        plan, mma = self.plan, self.mma
        thread, _, _ = cute.arch.thread_idx()
        lane = thread % WARP
        group = cute.arch.make_warp_uniform(thread // WARPGROUP)
        row = thread % WARPGROUP // WARP * 16 + lane // 4
        part = mma.get_slice(thread % WARPGROUP)
        operand = mma.make_fragment_B(part.partition_B(self.queries))
        sums = cute.make_rmem_tensor(part.partition_shape_C((TILE, plan.columns)), Float32)
        keys = mma.make_fragment_A(part.partition_shape_A((TILE, DIM)))
        words = cute.recast_tensor(keys, Uint32)
        mine = self._kept(lane)
        seen = [high if sees is None else sees[query] for query, _ in mine]
        # A step's number says whose it is, and a stage's: no group waits for a phase of a stage whose phase before was
        # another's, and may not have come yet. A parity does not tell a phase from the one two before.
        first_tile = (group + (plan.groups - 1) * base) % plan.groups
        for t in cutlass.range(first_tile, tiles, plan.groups, unroll=1):
            step = base + t
            stage = self.stages.iterator.toint() + self.ring.stage(step) * plan.stage_bytes
            self.ring.wait_full(step)
            factors = decode_rows(plan.record, stage, stage + TILE * plan.data_bytes, row, lane % 4, words)
            warpgroup.fence()
            for j in cutlass.range_constexpr(BLOCKS):
                mma.set(warpgroup.Field.ACCUMULATE, j > 0)
                cute.gemm(mma, sums, keys[None, None, j], operand[None, None, j % 4, j // 4], sums)
            warpgroup.commit_group()
            # Products that have begun have their registers, so this warp's loads have ended. Released behind the loads
            # themselves, a stage was filled again under those of plain keys, which nothing else waits for (H200). Factors
            # are none of the products'.
            arrive_with(self.ring.empty(step), lane, factors)
            warpgroup.wait_group(0)
            scores = self._reduce(sums, factors, lane)
            for i in cutlass.range_constexpr(len(mine)):
                query, half = mine[i]
                entry = low + t * TILE + row + 8 * half
                if query >= start and query < end and entry < high and self._stores(lane):
                    found = scores[i] if entry < seen[i] else Float32(-_INFINITY)
                    _store_score(self.out, first + query, entry, found)

    def _kept(self, lane: Any) -> list[tuple[Any, Any]]:
        """(query, half of the rows) of the sums that `_reduce` leaves to a lane."""
        q = lane % 4
        if self.plan.queries == 4:
            return [(q, Int32(0)), (q, Int32(1))]
        if self.plan.queries == 2:
            return [(q // 2, q % 2)]
        return [(Int32(0), q // 2)]

    def _stores(self, lane: Any) -> Any:
        """Whether a lane's sums are its own: those of one query are two lanes'."""
        return lane % 2 == 0 if self.plan.queries == 1 else True

    def _reduce(self, sums: Any, factors: Any, lane: Any) -> list[Any]:
        """Weighted sums over the heads, added up over the four lanes that share a key."""
        plan = self.plan
        blocks = plan.padded // 8
        q = lane % 4
        values = []
        for query in range(plan.queries):
            totals: list[Any] = [Float32(0.0), Float32(0.0)]
            for b in range(query * blocks, (query + 1) * blocks):
                pair = cute.local_tile(self.weights, (2,), (4 * b + q,))
                held = cute.make_rmem_tensor((2,), Float32)
                cute.autovec_copy(pair, held)
                for half in range(2):
                    for e in range(2):
                        totals[half] = _add_relu(sums[4 * b + 2 * half + e], held[e], totals[half])
            values += [total * factor for total, factor in zip(totals, factors, strict=True)] if factors else totals
        for bit in (2, 1):
            upper = q // bit % 2 == 1
            half = len(values) // 2
            if half:  # a lane keeps one half, its partner the other
                given = [cutlass.select_(upper, values[i], values[i + half]) for i in range(half)]
                kept = [cutlass.select_(upper, values[i + half], values[i]) for i in range(half)]
            else:
                given, kept = values, values
            values = [k + cute.arch.shuffle_sync_bfly(g, bit) for k, g in zip(kept, given, strict=True)]
        return values

    @cute.jit
    def fill(self, first: Any, end: Any, low: Any, high: Any, begin: Any, step: Any) -> None:
        """-inf in entries from `low` on of queries, which none of them sees: a thread's are low + begin + n step."""
        for row in cutlass.range(first, end, 1, unroll=1):
            for entry in cutlass.range(low + begin, high, step, unroll=4):
                _store_score(self.out, row, entry, Float32(-_INFINITY))


def _store_score(out: Any, row: Any, entry: Any, score: Any) -> None:
    place = out.iterator + (Int64(row) * out.shape[1] + entry)
    cute.make_tensor(place, cute.make_layout(1))[0] = score


def _add_relu(x: Any, weight: Any, total: Any) -> Any:
    """total + weight * 2 relu(x): the maximum with zero takes twice the time of an addition, which keeps a NaN."""
    code = "{ .reg .f32 size, twice; abs.f32 size, {$r0}; add.rn.f32 twice, {$r0}, size; "
    code += "fma.rn.f32 {$w0}, twice, {$r1}, {$r2}; }"
    return cute.arch.inline_ptx(code, write_only_types=[Float32], read_only_args=[x, weight, total])


def _store_word(address: Any, word: Any) -> None:
    cute.arch.inline_ptx("st.shared.b32 [{$r0}], {$r1};", read_only_args=[address, word])
