"""Attention over window and compressed entries on Hopper: 64 query heads of one token at a time, one 512-wide K = V head.

    o[h] = sum_n exp(s[h, n] - M) k[n] / (sum_n exp(s[h, n] - M) + exp(sink[h] - M)),   s[h, n] = scale q[h] . k[n]

A CTA is persistent and goes through items (query, tile of 64 heads, part of the keys), see `work`:

    gather  (warpgroups 2, 3)    Q by TMA; blocks of 64 keys by index, decoded to BF16 (`gather`), two stages of 64 KB
    consume (warpgroups 0, 1)    scores, softmax, sums; each half of the output's dims (`consume`)

    queries   gather -> consume    full: the bytes have arrived, and with them the item's number of blocks, in shared memory
                                   empty: the item's last scores are done
    halves    gather -> consume    full: written by every warp      empty: multiplied, see `consume`

Where keys are packed and heads are an even number of tiles, CTAs are clusters of two, which have two tiles of a query's heads
and the same part: each decodes half of a block's keys for both (`pair`).

    halves    gather -> consume    full: written by every warp of both CTAs    empty: multiplied by both CTAs

Where keys are plain and all visible ones are attended, CTAs are clusters of two, too, which have two tiles of heads or two
queries: a warp copies half of the keys to both, another one asks for queries (`shared`).

Several parts of a query are a cluster of CTAs, an item each, which puts them together (`merge`). Where a cluster would be too
large, or not all run at once, each leaves O / sum and log2(sum) + M in float32, and a second kernel does (`combine`).

Many neighbouring queries that see few keys have another kernel, `resident`.

Cost of a block, 64 heads x 64 keys: 8.4 MFLOP, 2048 cycles of a multiprocessor's tensor cores (4096 FLOP a cycle). Shared
memory, 128 bytes a cycle: Q and K for the scores 1024 cycles, K again and the half of the probabilities that another warpgroup
has for the sums 640, the gathered keys written 512: 2176, which is the bound, 94 % of the matrix rate; packed codes of half a
block, written and read, add 256 (FP8: 84 %) or 128. Issue slots, of 2048 a scheduler: decoding FP8 about 940 (two warps),
softmax 250, a new maximum 256, products 300. Bytes: 584 a key as FP8, 384 as NVFP4: a block in 1.1 us is 34 GB/s a
multiprocessor, 4.4 TB/s in all, of which the second tile of 128 heads and neighbouring queries find most in L2. Plain keys,
1024 bytes each, would be 7.4 TB/s, and L2 gives 5.2 (H200).

What binds prefill is the chain P V, S, softmax of two warpgroups, not bytes: 4,096 queries of some 176 keys took 267 us,
without stores 234, without queries 251, without keys 256, without all three 219. A block of 64 keys is 1.7 us then, where 2176
cycles are 1.3, and an item's start and end 1.2 us more, since no item overlaps the next. Large batches are bound by shared
memory and tensor cores, small ones by latency: launch, three dependent reads (position and index, page, record), Q K^T, P V.

Without `from __future__ import annotations`: CuTeDSL reads the annotations themselves.
"""

from typing import Any

import cutlass
import cutlass.cute as cute
import cutlass.utils.hopper_helpers as hopper
from cutlass import BFloat16, Float32, Int32, Int64, Uint32, Uint64
from cutlass.cute.nvgpu import cpasync
from cutlass.memory import SmemAllocator
from cutlass.tensor_utils import LayoutEnum

from dsv4lab.kernels.attention.core import ptx
from dsv4lab.kernels.attention.core.config import (
    DIM,
    HALVES,
    KEYS,
    ROWS,
    STAGES,
    THREADS,
    TILE,
    TILES,
    WARPGROUP,
    AttentionConfig,
)
from dsv4lab.kernels.attention.core.consume import Consume
from dsv4lab.kernels.attention.core.gather import Gather, packed_words
from dsv4lab.kernels.attention.core.pair import PairGather
from dsv4lab.kernels.attention.core.pair import packed_words as pair_words
from dsv4lab.kernels.attention.core.shared import Shared
from dsv4lab.kernels.attention.core.work import Work
from dsv4lab.kernels.cache.unpack.config import GROUP

_CONSUME_REGISTERS, _GATHER_REGISTERS = 192, 64  # of a thread; it is launched with 128
_CONSUME_WARPS = 8
_HALF = DIM // HALVES


class AttentionSm90:
    """The kernel for one `AttentionConfig`; sizes are the call's."""

    def __init__(self, config: AttentionConfig) -> None:
        config.check()
        self.plan = config

    @cute.jit
    def __call__(
        self,
        q: Any,
        sinks: Any,
        window_pages: Any,
        entry_pages: Any,
        table: Any,
        positions: Any,
        seq_idx: Any,
        chosen: Any,
        out: Any,
        partial: Any,
        lse: Any,
        factor: Float32,
        ring_len: Int32,
        ratio: Int32,
        parts: Int32,
        head_tiles: Int32,
        items: Int32,
        ctas: Int32,
        stream: Any,
    ) -> None:
        """q (M H, 512) bf16; sinks (H,) f32; pages (P, bytes) u8; table (sequences, pages) i32; positions, seq_idx (M,) i64;
        chosen (M, k) i32 -> out (M H, 512) bf16, or partial (parts, M H, 512) and lse (parts, M H) f32. factor: scale times
        log2 e. Shared keys: window_pages are rows in line (n, 512) bf16, and table their places (rings, 4) i32, see
        `cache.unpack`. What the configuration does not read may be anything.
        """
        plan = self.plan
        layout = hopper.make_smem_layout_b(LayoutEnum.ROW_MAJOR, (ROWS, ROWS, TILE), BFloat16, TILES)
        box = cute.slice_(layout, (None, None, 0))
        load_q, tma_q = cpasync.make_tiled_tma_atom(cpasync.CopyBulkTensorTileG2SOp(), q, box, (ROWS, TILE))
        load_k, tma_k = load_q, tma_q
        if cutlass.const_expr(plan.share):
            group = cute.make_layout((GROUP, (TILE, _HALF // TILE)), stride=(TILE, (1, GROUP * TILE)))
            group = cute.make_composed_layout(layout.inner, 0, group)
            multicast = cpasync.CopyBulkTensorTileG2SMulticastOp()
            load_k, tma_k = cpasync.make_tiled_tma_atom(multicast, window_pages, group, (GROUP, _HALF))
        self.kernel(
            load_q,
            tma_q,
            load_k,
            tma_k,
            sinks,
            window_pages,
            entry_pages,
            table,
            positions,
            seq_idx,
            chosen,
            out,
            partial,
            lse,
            factor,
            ring_len,
            ratio,
            parts,
            head_tiles,
            items,
        ).launch(
            grid=[ctas, 1, 1],
            block=[THREADS, 1, 1],
            cluster=[parts * plan.ctas, 1, 1] if plan.merge else [2, 1, 1] if plan.ctas == 2 else None,
            min_blocks_per_mp=1,
            stream=stream,
            use_pdl=True,
        )

    @cute.kernel
    def kernel(
        self,
        load_q: Any,
        q: Any,
        load_k: Any,
        keys: Any,
        sinks: Any,
        window_pages: Any,
        entry_pages: Any,
        table: Any,
        positions: Any,
        seq_idx: Any,
        chosen: Any,
        out: Any,
        partial: Any,
        lse: Any,
        factor: Float32,
        ring_len: Int32,
        ratio: Int32,
        parts: Int32,
        head_tiles: Int32,
        items: Int32,
    ) -> None:
        plan = self.plan
        thread, _, _ = cute.arch.thread_idx()
        block, _, _ = cute.arch.block_idx()
        grid, _, _ = cute.arch.grid_dim()
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        memory = SmemAllocator()
        full = memory.allocate_array(Int64, STAGES * HALVES)
        empty = memory.allocate_array(Int64, STAGES * HALVES)
        queries = memory.allocate_array(Int64, 4 if plan.merge else 2)  # full, empty; `Merge`'s
        masks = memory.allocate_array(Uint64, STAGES * plan.mask_bytes // 8)
        counts = memory.allocate_tensor(Int32, cute.make_layout(1))
        maxima = memory.allocate_tensor(Float32, cute.make_layout((2, ROWS), stride=(ROWS, 1)))
        sums = memory.allocate_tensor(Float32, cute.make_layout((2, 2, ROWS), stride=(2 * ROWS, ROWS, 1)))
        tiles = [hopper.make_smem_layout_b(LayoutEnum.ROW_MAJOR, (ROWS, ROWS, TILE), BFloat16, count) for count in (TILES, 2)]
        swizzle = tiles[0].inner
        shared_q, shared_p = (memory.allocate_tensor(BFloat16, t.outer, byte_alignment=1024, swizzle=swizzle) for t in tiles)
        # Keys as `gather` has them: (key, dim, tile of a half of a stage); the same with dims as the product's N.
        group, half = GROUP * _HALF, KEYS * _HALF
        shape_k = ((GROUP, KEYS // GROUP), (TILE, 1), (_HALF // TILE, STAGES * HALVES))
        by_key = cute.make_layout(shape_k, stride=((TILE, group), (1, 0), (GROUP * TILE, half)))
        shared_k = memory.allocate_tensor(BFloat16, by_key, byte_alignment=1024, swizzle=swizzle)
        shape_v = ((TILE, _HALF // TILE), (GROUP, KEYS // GROUP), STAGES * HALVES)
        by_dim = cute.make_layout(shape_v, stride=((1, GROUP * TILE), (TILE, group), half))
        shared_v = cute.make_tensor(shared_k.iterator, by_dim)
        words = pair_words(plan.record) if plan.pair else packed_words(plan.record)
        packed = memory.allocate_array(Uint32, max(words, 1))

        rank, peer = Int32(0), Int32(0)
        if cutlass.const_expr(plan.ctas == 2):
            rank = block % 2
            block, grid, items = block // 2, grid // 2, items // 2
            peer = ptx.to_peer(masks.toint(), cute.arch.block_idx_in_cluster() ^ 1)
        if cutlass.const_expr(plan.merge):
            items, grid = block + 1, 1  # this one
        pools = (window_pages, entry_pages, table, positions, seq_idx, chosen)
        work = Work(plan, *pools, ring_len, ratio, parts, head_tiles, rank)
        places = (shared_k.iterator.toint(), packed.toint(), masks.toint())
        gather: Any = PairGather(work, *places, full, empty, peer) if plan.pair else Gather(work, *places, full, empty)
        if cutlass.const_expr(plan.share):
            shape = (GROUP, (TILE, _HALF // TILE), KEYS // GROUP, STAGES * HALVES)
            by_group = cute.make_layout(shape, stride=(TILE, (1, GROUP * TILE), group, half))
            stages = cute.make_tensor(shared_k.iterator, by_group)
            gather = Shared(work, load_k, keys, stages, masks.toint(), full, empty)
        if warp == 0:
            with cute.arch.elect_one():
                cute.arch.mbarrier_init(queries, 1)
                cute.arch.mbarrier_init(queries + 1, _CONSUME_WARPS)
                if cutlass.const_expr(plan.merge):
                    cute.arch.mbarrier_init(queries + 2, 1)
                    cute.arch.mbarrier_init(queries + 3, parts - 1)
                for i in cutlass.range_constexpr(STAGES * HALVES):
                    cute.arch.mbarrier_init(full + i, gather.arrivals)
                    cute.arch.mbarrier_init(empty + i, _CONSUME_WARPS // 2 * plan.ctas)
            cute.arch.mbarrier_init_fence()
        elif warp == _CONSUME_WARPS:
            cpasync.prefetch_descriptor(load_q)
        if cutlass.const_expr(plan.ctas == 2 or plan.merge):
            cute.arch.cluster_arrive_relaxed()
        else:
            cute.arch.barrier(barrier_id=0, number_of_threads=THREADS)
        cute.arch.griddepcontrol_launch_dependents()
        cute.arch.griddepcontrol_wait()
        if cutlass.const_expr(plan.ctas == 2 or plan.merge):
            cute.arch.cluster_wait()

        if warp >= _CONSUME_WARPS:
            cute.arch.setmaxregister_decrease(_GATHER_REGISTERS)
            if cutlass.const_expr(not plan.share) or warp < _CONSUME_WARPS + 2:
                self._gather(
                    gather, load_q, q, shared_q, queries, counts, sinks.shape[0], warp - _CONSUME_WARPS, block, grid, items
                )
        else:
            cute.arch.setmaxregister_increase(_CONSUME_REGISTERS)
            consume = Consume(
                work,
                shared_q,
                shared_k,
                shared_v,
                shared_p,
                maxima,
                sums,
                masks.toint(),
                full,
                empty,
                queries,
                counts,
                factor,
                sinks,
                out,
                partial,
                lse,
                peer,
            )
            if warp < _CONSUME_WARPS // 2:
                consume.run(0, thread, block, items, grid)
            else:
                consume.run(1, thread - WARPGROUP, block, items, grid)

    @cute.jit
    def _gather(
        self,
        gather: Any,
        load_q: Any,
        q: Any,
        shared_q: Any,
        queries: Any,
        counts: Any,
        heads: Any,
        warp: Any,
        block: Any,
        grid: Any,
        items: Any,
    ) -> None:
        """Keys of all items; a warp asks for queries, too, one of its own where one warp copies all keys."""
        alone = self.plan.share != ""
        phases, phase = Int32(0), Int32(1)
        for item in cutlass.range(block, items, grid, unroll=1):
            query, tile, part = gather.work.item(item)
            index = gather.ahead(query, part, warp)
            span = gather.span(query, part)
            if warp == (1 if alone else 0):
                cute.arch.mbarrier_wait(queries + 1, phase)
                target, source = self._queries(load_q, q, shared_q, query * heads + tile * ROWS)
                size = Int32(ROWS * DIM * 2) if span[-1] > 0 else Int32(0)
                with cute.arch.elect_one():
                    counts[0] = span[-1]
                    cute.arch.mbarrier_arrive_and_expect_tx(queries, size)
                if size > 0:
                    for t in cutlass.range_constexpr(TILES):
                        cute.copy(load_q, source[None, t], target[None, t], tma_bar_ptr=queries)
                if cutlass.const_expr(self.plan.share):
                    # the next ones to L2: there is place for them only when all scores are done
                    near, side, _ = gather.work.item(cutlass.min(item + grid, items - 1))
                    source = self._queries(load_q, q, shared_q, near * heads + side * ROWS)[1]
                    for t in cutlass.range_constexpr(TILES):
                        cute.prefetch(load_q, source[None, t])
            phase = phase ^ 1
            if not alone or warp == 0:
                phases = gather.item(query, span, index, warp, phases)
        if not alone or warp == 0:
            gather.leave(phases)

    def _queries(self, load_q: Any, q: Any, shared_q: Any, row: Any) -> tuple[Any, Any]:
        """Places of an item's queries in shared and in global memory, by column tiles."""
        source = cute.local_tile(cute.domain_offset((row, 0), q), (ROWS, TILE), (0, None))
        shared, source = cute.group_modes(shared_q, 0, 2), cute.group_modes(source, 0, 2)
        return cpasync.tma_partition(load_q, 0, cute.make_layout(1), shared, source)
