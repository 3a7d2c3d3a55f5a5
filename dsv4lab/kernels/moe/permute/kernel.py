"""Sort (token, slot) entries by expert, stably, and cut the experts' rows into token tiles, in one cluster of CTAs.

    position[i] = #{j : e_j < e_i} + #{j < i : e_j = e_i},   slots[position[i]] = i

Warp w of CTA c owns entries (32 c + w) 32 rounds and so on, a lane one of each 32; so order by (CTA, warp, round, lane) is the
order of entries, and a rank is a sum of counts in that order:
1. Each warp counts its entries by expert, in a row of shared memory that is its own. `match.any` gives a lane those that share
   its expert; the lanes below it and the row's count so far are its rank within the warp.
2. A thread an expert: prefix sums over the warps, then over the CTAs through distributed shared memory.
3. Prefix sums over the experts, of rows, tiles and experts hit, by shuffles within warps and a pass over the warps' sums.
4. Positions and slots are written, tiles by the first CTA.
Every CTA does step 3 for itself, so one exchange is enough. No atomics: the result does not depend on timing.

Bytes: 8 N read, 8 N and 16 a tile written: 0.8 MB for 8192 tokens of 6, nothing beside the latency of the steps.
Predicted on an H200: 2 us for few entries (a launch, two dependent memory latencies, four barriers), 4 to 5 us for 49,152.
sm_90a and sm_100a.

Without `from __future__ import annotations`: CuTeDSL reads the annotations themselves.
"""

from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Int32, Uint32
from cutlass.memory import SmemAllocator

from dsv4lab.kernels._common.lanes import through
from dsv4lab.kernels.moe.permute.config import ROW_STEP, WARP, PermuteConfig


class Permute:
    """The kernel for one `PermuteConfig`; the number of entries and the tile's rows are the call's."""

    def __init__(self, config: PermuteConfig) -> None:
        config.check()
        self.plan = config

    @cute.jit
    def __call__(
        self,
        expert_idx: Any,
        slots: Any,
        position: Any,
        tiles: Any,
        num_tiles: Any,
        tile_tokens: Int32,
        stream: Any,
    ) -> None:
        """expert_idx (N,) i64 -> slots, position (N,) i32, tiles (max_tiles, 4) i32, num_tiles (1,) i32. N > 0."""
        plan = self.plan
        self.kernel(expert_idx, slots, position, tiles, num_tiles, tile_tokens).launch(
            grid=[plan.ctas, 1, 1],
            block=[plan.warps * WARP, 1, 1],
            cluster=[plan.ctas, 1, 1],
            stream=stream,
            use_pdl=True,
        )

    @cute.kernel
    def kernel(
        self,
        expert_idx: Any,
        slots: Any,
        position: Any,
        tiles: Any,
        num_tiles: Any,
        tile_tokens: Int32,
    ) -> None:
        plan = self.plan
        experts, entries = plan.experts, expert_idx.shape[0]
        threads = plan.warps * WARP
        thread, _, _ = cute.arch.thread_idx()
        rank, _, _ = cute.arch.block_idx()  # in the cluster, which is the whole grid
        warp, lane = cute.arch.make_warp_uniform(thread // WARP), thread % WARP
        cute.arch.griddepcontrol_launch_dependents()
        memory = SmemAllocator()
        # An expert's column, one row a warp; the last column takes what is dropped.
        counts = memory.allocate_tensor(Int32, cute.make_layout((plan.warps, experts + 1), stride=(experts + 1, 1)))
        here = memory.allocate_tensor(Int32, cute.make_layout(experts))  # rows of this CTA, by expert
        base = memory.allocate_tensor(Int32, cute.make_layout(experts + 1))  # first row of this CTA's, by expert
        sums = memory.allocate_tensor(Int32, cute.make_layout((3, plan.warps)))
        flat = cute.make_tensor(counts.iterator, cute.make_layout(plan.warps * (experts + 1)))
        for i in cutlass.range(thread, plan.warps * (experts + 1), threads, unroll=1):
            flat[i] = Int32(0)
        cute.arch.barrier()
        cute.arch.griddepcontrol_wait()

        first = (rank * plan.warps + warp) * (WARP * plan.rounds) + lane
        expert = cute.make_rmem_tensor((plan.rounds,), Int32)
        place = cute.make_rmem_tensor((plan.rounds,), Int32)
        self._read(expert_idx, first, expert)
        self._count(counts, warp, expert, place)
        cute.arch.barrier()
        rows, before = Int32(0), Int32(0)
        if thread < experts:
            for w in cutlass.range_constexpr(plan.warps):
                count = counts[w, thread]
                counts[w, thread] = rows
                rows = rows + count
            here[thread] = rows
        if cutlass.const_expr(plan.ctas > 1):
            cute.arch.cluster_arrive()
            cute.arch.cluster_wait()
            if thread < experts:
                rows, before = self._gather_counts(here, thread, rank)
            cute.arch.cluster_arrive()  # the other half stands at the end: nobody leaves while its counts are read

        num = (rows + tile_tokens - 1) // tile_tokens
        hit = cutlass.min(rows, 1)
        (row_at, tile_at, hit_at), (all_rows, all_tiles) = self._scan(sums, warp, lane, (rows, num, hit))
        if thread < experts:
            base[thread] = row_at + before
        cute.arch.barrier()
        for r in cutlass.range_constexpr(plan.rounds):
            i = first + r * WARP
            if i < entries:
                to = Int32(-1)
                if expert[r] < experts:
                    to = base[expert[r]] + counts[warp, expert[r]] + place[r]
                    slots[to] = i
                position[i] = to
        for p in cutlass.range(all_rows + rank * threads + thread, entries, plan.ctas * threads, unroll=1):
            slots[p] = Int32(-1)
        if rank == 0:
            if thread == 0:
                num_tiles[0] = all_tiles
            if rows > 0:
                _write_tiles(tiles, tile_at, num, thread, row_at, rows, hit_at)
        if cutlass.const_expr(plan.ctas > 1):
            cute.arch.cluster_wait()

    @cute.jit
    def _read(self, expert_idx: Any, first: Any, expert: Any) -> None:
        """Expert ids of this lane's entries; ids that are none, and places past the last entry, as `experts`."""
        plan = self.plan
        entries = expert_idx.shape[0]
        wide = cute.make_rmem_tensor((plan.rounds,), cutlass.Int64)
        for r in cutlass.range_constexpr(plan.rounds):
            wide[r] = expert_idx[cutlass.min(first + r * WARP, entries - 1)]
        for r in cutlass.range_constexpr(plan.rounds):
            known = first + r * WARP < entries and wide[r] >= 0 and wide[r] < plan.experts
            expert[r] = Int32(wide[r]) if known else Int32(plan.experts)

    @cute.jit
    def _count(self, counts: Any, warp: Any, expert: Any, place: Any) -> None:
        """Count this warp's entries by expert; place: how many of the same expert the warp has before an entry."""
        below = Uint32(cute.arch.lanemask_lt())
        for r in cutlass.range_constexpr(self.plan.rounds):
            same = Uint32(cute.arch.match_sync(-1, expert[r]))
            count = counts[warp, expert[r]]
            cute.arch.sync_warp()
            if (same & below) == 0:
                counts[warp, expert[r]] = count + Int32(cute.arch.popc(same))
            cute.arch.sync_warp()
            place[r] = count + Int32(cute.arch.popc(same & below))

    @cute.jit
    def _gather_counts(self, here: Any, expert: Any, rank: Any) -> tuple[Any, Any]:
        """(rows of an expert in all CTAs, rows in those before this one)."""
        rows, before = Int32(0), Int32(0)
        place = here.iterator.toint() + 4 * expert
        found = [_remote(place, cta) for cta in range(self.plan.ctas)]
        for cta in cutlass.range_constexpr(self.plan.ctas):
            before = before + (found[cta] if cta < rank else Int32(0))
            rows = rows + found[cta]
        return rows, before

    @cute.jit
    def _scan(self, sums: Any, warp: Any, lane: Any, values: tuple[Any, ...]) -> tuple[Any, Any]:
        """Sums over the threads before this one of rows, tiles and hits; sums over all threads of rows and tiles."""
        upto = [through(value, lane) for value in values]
        if lane == WARP - 1:
            for i in cutlass.range_constexpr(3):
                sums[i, warp] = upto[i]
        cute.arch.barrier()
        at = [upto[i] - values[i] for i in range(3)]
        total = [Int32(0), Int32(0)]
        for w in cutlass.range_constexpr(-(-self.plan.experts // WARP)):
            for i in cutlass.range_constexpr(3):
                part = sums[i, w]
                at[i] = at[i] + (part if w < warp else Int32(0))
                if cutlass.const_expr(i < 2):
                    total[i] = total[i] + part
        return tuple(at), tuple(total)


@cute.jit
def _write_tiles(tiles: Any, at: Any, num: Any, expert: Any, first: Any, rows: Any, hit: Any) -> None:
    """The tiles of one expert: equal but for the last, which is never empty (their rows are below T only if num < T / 8)."""
    size = ((rows + num - 1) // num + ROW_STEP - 1) // ROW_STEP * ROW_STEP
    for t in cutlass.range(num, unroll=1):
        tile = cute.make_rmem_tensor((4,), Int32)
        tile[0] = expert
        tile[1] = first + t * size
        tile[2] = first + cutlass.min((t + 1) * size, rows)
        tile[3] = hit
        cute.autovec_copy(tile, tiles[at + t, None])


def _remote(place: Any, cta: int) -> Any:
    """A word at the same place of another CTA's shared memory."""
    return cute.arch.inline_ptx(
        "{ .reg .b32 there; mapa.shared::cluster.u32 there, {$r0}, {$r1}; ld.shared::cluster.s32 {$w0}, [there]; }",
        write_only_types=[Int32],
        read_only_args=[place, Int32(cta)],
    )
