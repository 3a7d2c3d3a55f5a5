"""A compressor's step in one launch: pool the entries that tokens complete, make keys of them, move the tokens into the ring.

    e[i] = sum_p softmax_p(z_p[i]) a_p[i]  over the tokens p of an entry, for each channel i;  key = quantise(RoPE(norm(e)))

Entry j pools tokens [j m, (j + 1) m), m = ratio; with overlap the second half of their channels, and the first half of the
block before. So every number of a step belongs to one entry, and is read once from memory, by the warp that pools it. A warp
holds 128 channels of 8 tokens: all of an index entry (128 channels, 4 + 4 tokens), a quarter of a CSA entry (512 channels), or
a piece of an HCA entry (512 channels, 128 tokens: 4 CTAs of a cluster take 128 channels each, 8 warps of a CTA 16 tokens each;
of few tokens 8 CTAs 64 channels, and half a warp 8 tokens; of many 2 CTAs of 16 warps 256 channels, and 2 warps 16 tokens).
Parts of a softmax meet in shared memory, the pooled channels of a cluster's CTAs in that of the CTA whose turn it is, where one
warp finishes the key (`kernels.cache.key`); meanwhile the others may be at the next entry.

Sizes depend on M alone: a cluster looks through `rows` rows of the step and pools what they complete, mostly one entry or none.

The ring holds token p at p mod R. A step that writes it also reads it, where an entry began in an earlier step. Let p0 be a
sequence's first token in this step. What is in the ring before it are tokens p0 - R .. p0 - 1, and a number of those is read by
one entry only, so by one thread only. That thread then puts the newer token in its place, if there is one in this step; all
other tokens' numbers are nobody's in this step and go into the ring at any time. Who does what follows from positions alone
(`_kinds`), so no thread waits for another.

A lane's 16 loads are 64 of its 128 registers. All are on their way before anything waits: embeddings, norm weight and
frequencies lie in shared memory (`_constants`), and so do a decode step's rows on their way into the ring (`_fetch`). If all
warps load at once, all data comes late and nothing is computed meanwhile. So in a step of many tokens half of a CTA's warps
load before positions are known (`_guess`), and each lets one of the others load when its own tokens are there (`_follow`).

Bytes: 8 width a token once, keys once; the tokens of the ring again from L2, 8 width more to write each. 8192 tokens of Flash:
CSA 67 + 1.2 MB, index 16.8 + 0.3 MB, HCA 33.5 MB, and 16.8 MB of embeddings from L2. Start and end are 2 to 3 us beside these.
sm_90a and sm_100a.

Without `from __future__ import annotations`: CuTeDSL reads the annotations themselves.
"""

from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Float32, Int32, Int64, Uint32
from cutlass.memory import SmemAllocator

from dsv4lab.kernels._common.lanes import lowest
from dsv4lab.kernels._common.ptx import copy_async
from dsv4lab.kernels.cache.key import KeyRow
from dsv4lab.kernels.cache.plan import WARP
from dsv4lab.kernels.compressor import pool
from dsv4lab.kernels.compressor.config import LANE, TOKENS, CompressConfig
from dsv4lab.kernels.compressor.rows import FIELDS, LAST, PLACE, POSITION, RING, ROW, SEQ, START, Rows
from dsv4lab.kernels.quant.rows import encode as enc

_ONCE = ".L1::no_allocate"  # what is read once needs no room in L1


class Compress(Rows):
    """The kernel of one `CompressConfig`; numbers of tokens, sequences, ring places and pages are the call's."""

    def __init__(self, config: CompressConfig) -> None:
        config.check()
        self.plan = config
        self.key = KeyRow(config.keys)

    @cute.jit
    def __call__(
        self,
        values: Any,
        scores: Any,
        ape: Any,
        state: Any,
        weight: Any,
        inv_freq: Any,
        pages: Any,
        positions: Any,
        seq_idx: Any,
        first_row: Any,
        last_position: Any,
        block_table: Any,
        eps: Float32,
        stream: Any,
    ) -> None:
        """values, scores (M, width) f32 with rows apart as they are; ape (ratio, width) f32; state (num_seqs, R, 2, width) f32;
        weight (dim,) u32 words; inv_freq (32,) f32; pages (P, page_bytes) u8; positions, seq_idx, first_row, last_position (M,)
        i64; block_table (num_seqs, blocks) i32. M > 0.
        """
        plan = self.plan
        known = (positions, last_position, seq_idx, first_row)
        self.kernel(values, scores, ape, state, weight, inv_freq, pages, known, block_table, eps).launch(
            grid=[cute.ceil_div(positions.shape[0], plan.rows) * plan.cluster, 1, 1],
            block=[plan.threads, 1, 1],
            cluster=[plan.cluster, 1, 1] if plan.cluster > 1 else None,
            min_blocks_per_mp=plan.resident,
            preferred_smem_carveout=plan.carveout,
            stream=stream,
            use_pdl=True,
        )

    @cute.kernel
    def kernel(
        self,
        values: Any,
        scores: Any,
        ape: Any,
        state: Any,
        weight: Any,
        inv_freq: Any,
        pages: Any,
        known: Any,
        block_table: Any,
        eps: Float32,
    ) -> None:
        plan = self.plan
        thread, _, _ = cute.arch.thread_idx()
        block, _, _ = cute.arch.block_idx()
        grid, _, _ = cute.arch.grid_dim()
        warp, lane = cute.arch.make_warp_uniform(thread // WARP), thread % WARP
        rank = block % plan.cluster
        cute.arch.griddepcontrol_launch_dependents()
        memory = SmemAllocator()
        own_ape = memory.allocate_tensor(
            Float32, cute.make_layout((LANE, plan.threads // plan.teams, plan.rounds * TOKENS)), byte_alignment=16
        )
        layout = cute.make_layout((plan.weight_words, WARP, plan.teams))
        weights = memory.allocate_tensor(Uint32, layout, byte_alignment=16)
        freqs = memory.allocate_tensor(Float32, cute.make_layout((WARP, plan.teams)))
        own_moved: Any = None
        if cutlass.const_expr(plan.held):
            layout = cute.make_layout((LANE, plan.threads, 2, plan.units, plan.moved))
            own_moved = memory.allocate_tensor(Float32, layout, byte_alignment=16)
        described = memory.allocate_tensor(
            Int32, cute.make_layout((plan.rows + plan.moved, FIELDS), stride=(FIELDS, 1)), byte_alignment=16
        )
        masks = memory.allocate_tensor(Uint32, cute.make_layout(plan.masks))
        pooled: Any = None
        parts: Any = None
        arrived: Any = None
        if cutlass.const_expr(plan.teams == 1):
            shape = (plan.keys.dim, 1 if plan.cluster > 1 else 2)
            pooled = memory.allocate_tensor(Float32, cute.make_layout(shape), byte_alignment=16)
            if cutlass.const_expr(plan.slices > 1):
                layout = cute.make_layout((plan.channels, 3, plan.slices, 2))
                parts = memory.allocate_tensor(Float32, layout, byte_alignment=16)
        if cutlass.const_expr(plan.cluster > 1):
            arrived = memory.allocate_array(Int64, 1)  # all pooled channels are here
            if warp == 0:
                with cute.arch.elect_one():
                    cute.arch.mbarrier_init(arrived, 1)
                cute.arch.mbarrier_init_fence()
            cute.arch.cluster_arrive_relaxed()
        self.values, self.scores = values.iterator.toint(), scores.iterator.toint()
        self.value_stride, self.score_stride = Int64(values.stride[0]), Int64(scores.stride[0])
        self.ape, self.state, self.ring = ape.iterator.toint(), state.iterator.toint(), Int32(state.shape[1])
        self.weight, self.inv_freq = weight.iterator.toint(), inv_freq.iterator.toint()
        self.pages, self.block_table, self.eps = pages, block_table, eps
        self.own_ape, self.own_moved, self.weights, self.freqs = own_ape, own_moved, weights, freqs
        self.described, self.pooled, self.parts, self.arrived = described, pooled, parts, arrived
        self.count = Int32(known[0].shape[0])
        self.thread, self.warp, self.lane, self.rank = thread, warp, lane, rank
        side = plan.lanes * plan.groups
        self.piece = thread // side if plan.teams == 1 else Int32(0)  # of an entry's tokens, `rounds` times `TOKENS`
        self.local = (thread % side if plan.teams == 1 else lane) * LANE  # channel of the CTA's
        self.mine = thread if plan.teams == 1 else lane  # place of a thread's embeddings

        if cutlass.const_expr(plan.settled):
            self._constants()
        cute.arch.griddepcontrol_wait()
        if cutlass.const_expr(not plan.settled):
            self._constants()
        self.z, self.a = (cute.make_rmem_tensor((LANE, TOKENS), Float32) for _ in range(2))
        self.guess = Int32(-1)
        row = self._row_of(block, grid)
        if cutlass.const_expr(plan.early):
            self._look(known, row)
            self.guess = self._guess(block)
        self._describe(known, masks, row)
        if cutlass.const_expr(plan.teams > 1):
            cute.arch.cp_async_wait_group(0)  # for embeddings, which warps with an entry each share
        cute.arch.barrier()
        if cutlass.const_expr(plan.held):
            self._fetch()
        else:
            self._move()
        if cutlass.const_expr(plan.cluster > 1):
            cute.arch.cluster_wait()  # all CTAs are there, and their barriers
        if cutlass.const_expr(plan.early):
            self._follow(memory.allocate_tensor(Float32, cute.make_layout(plan.early)))
        turn = Int32(0)
        for m in cutlass.range(plan.masks, unroll=1):
            left = masks[m]
            while left != Uint32(0):
                at = m * WARP + lowest(left)
                left = left & (left - 1)
                if cutlass.const_expr(plan.teams == 1):
                    self._entry(at, turn)
                else:
                    if turn % plan.teams == warp:
                        self._entry(at, turn)
                turn = turn + 1
        if cutlass.const_expr(plan.held):
            self._put_fetched()

    # ---- what does not change --------------------------------------------------------------------------------------------
    @cute.jit
    def _constants(self) -> None:
        """Embeddings, and what lanes need of the norm and the angles, on their way into shared memory.

        Where they are nobody's results they come while the kernel before still runs; and kept there they take no registers, of
        which the loads of an entry need all. Embeddings are the thread's own, `_round` waits for them; or the CTA's, where
        warps have entries of their own, and are waited for before a barrier. The rest is a team's: a warp's own, or warp 0's,
        behind whose wait there is a barrier before an entry is finished.
        """
        plan, keys = self.plan, self.plan.keys
        channel = self.rank * plan.channels + self.local
        for i in cutlass.range_constexpr(plan.rounds * TOKENS // plan.teams):
            t = i * plan.teams + (self.warp if plan.teams > 1 else 0)
            of = channel + (keys.dim * (t // plan.ratio) if plan.overlap else 0)
            token = self.piece * (plan.rounds * TOKENS) + t
            copy_async(self.own_ape[None, self.mine, t].iterator.toint(), self._ape_at(token, of), 16)
        if self.warp < plan.teams:
            size = min(4 * plan.weight_words, 16)
            for i in cutlass.range_constexpr(0, 4 * plan.weight_words, size):
                source = self.weight + Int64(self.lane * (4 * plan.weight_words) + i)
                copy_async(self.weights[None, self.lane, self.warp].iterator.toint() + i, source, size)
            target = self.freqs.iterator + (self.warp * WARP + self.lane)
            copy_async(target.toint(), self.inv_freq + Int64(self.lane * 4), 4)
        cute.arch.cp_async_commit_group()

    # ---- entries ---------------------------------------------------------------------------------------------------------
    @cute.jit
    def _entry(self, at: Any, turn: Any) -> None:
        """The entry that a row completes, from its tokens to its record. turn: how many there were before it."""
        plan, keys = self.plan, self.plan.keys
        warp, lane, described = self.warp, self.lane, self.described
        position = described[at, POSITION]
        entry = position // plan.ratio
        column, columns = entry // keys.page_size, Int32(self.block_table.shape[1])
        page = self.block_table[described[at, SEQ], cutlass.min(column, columns - 1)]
        slot = page * keys.page_size + entry % keys.page_size
        slot = slot if page >= 0 and column < columns else Int32(-1)

        channel = self.rank * plan.channels + self.local
        guess = self.guess if turn < plan.teams else Int32(-1)  # for the first entry alone are its tokens still there
        found = cute.make_rmem_tensor((3, LANE), Float32)
        if cutlass.const_expr(plan.rounds == 1):
            self._round(found, at, 0, channel, guess)
        else:
            part = cute.make_rmem_tensor((3, LANE), Float32)
            for c in cutlass.range_constexpr(LANE):
                found[0, c], found[1, c], found[2, c] = Float32(pool.LOWEST), Float32(0.0), Float32(0.0)
            for r in cutlass.range(plan.rounds, unroll=1):
                self._round(part, at, r, channel, guess)
                for c in cutlass.range_constexpr(LANE):
                    both = [(held[0, c], held[1, c], held[2, c]) for held in (found, part)]
                    found[0, c], found[1, c], found[2, c] = pool.joined(both)
        mine = [pool.quotient((found[0, c], found[1, c], found[2, c])) for c in range(LANE)]
        if cutlass.const_expr(plan.teams > 1):
            self._finish(mine, entry, slot)
        else:
            self._gather(found, mine, turn)
            if self.rank == turn % plan.cluster and warp == turn // plan.cluster % plan.warps:
                whole = self._whole(turn)
                own = cute.make_rmem_tensor((keys.width,), Float32)
                for i in cutlass.range_constexpr(keys.width // LANE):
                    vector = _swizzled(lane * (keys.width // LANE) + i)
                    cute.autovec_copy(cute.local_tile(whole, (LANE,), (vector,)), cute.local_tile(own, (LANE,), (i,)))
                self._finish([own[i] for i in range(keys.width)], entry, slot)

    @cute.jit
    def _gather(self, found: Any, mine: Any, turn: Any) -> None:
        """An entry's pooled channels to the CTA whose turn it is. found: a lane's parts; mine: the same, as pooled values.

        A barrier an entry is enough. Memory of a CTA is written again two entries later, after a barrier to which those come
        who read it. In a cluster a CTA's turn comes again after every other's, and by then all have got channels that it sent
        when it had come to the barrier after its turn: its pooled channels were read.
        """
        plan, thread, pooled, parts, local = self.plan, self.thread, self.pooled, self.parts, self.local
        first = self.rank * plan.channels
        if cutlass.const_expr(plan.slices > 1):
            for kind in cutlass.range_constexpr(3):
                _put(parts[None, kind, self.piece, turn % 2], local // LANE, [found[kind, c] for c in range(LANE)])
            cute.arch.barrier()
            if thread < plan.channels:
                shares = [tuple(parts[thread, kind, s, turn % 2] for kind in range(3)) for s in range(plan.slices)]
                value = pool.quotient(pool.joined(shares))
                whole = first + thread
                place = _swizzled(whole // LANE) * LANE + whole % LANE
                if cutlass.const_expr(plan.cluster > 1):
                    there = pooled.iterator + place
                    cute.arch.store_async_dsmem(there, value.bitcast(Int32), self.arrived, turn % plan.cluster)
                else:
                    pooled[place, turn % 2] = value
        else:
            _put(pooled[None, turn % 2], _swizzled((first + local) // LANE), mine)
        if cutlass.const_expr(plan.cluster == 1):
            cute.arch.barrier()

    @cute.jit
    def _whole(self, turn: Any) -> Any:
        """An entry's pooled channels, all of them there. By one warp of the CTA whose turn it is."""
        plan = self.plan
        if cutlass.const_expr(plan.cluster > 1):
            with cute.arch.elect_one():
                cute.arch.mbarrier_arrive_and_expect_tx(self.arrived, 4 * plan.keys.dim)
            cute.arch.mbarrier_wait(self.arrived, turn // plan.cluster % 2)
        return self.pooled[None, 0 if plan.cluster > 1 else turn % 2]

    @cute.jit
    def _finish(self, values: Any, entry: Any, slot: Any) -> None:
        """The key of an entry, by one warp."""
        keys, lane = self.plan.keys, self.lane
        team = self.warp if self.plan.teams > 1 else 0
        weights = enc.floats([self.weights[i, lane, team] for i in range(self.plan.weight_words)], keys.weight)
        freq = self.freqs[lane, team]
        if cutlass.const_expr(keys.element == "bf16"):
            values = self.key.rounded(values)
        words, pair = self.key.key(values, weights, entry * self.plan.ratio, freq, self.eps, self.lane)
        self.key.store(words, pair, self.pages, slot, self.lane)

    @cute.jit
    def _round(self, part: Any, at: Any, r: Any, channel: Any, guess: Any) -> None:
        """The lane's tokens of round r: their parts, for its channels. at: the row that completes the entry."""
        plan, described = self.plan, self.described
        first = (self.piece * plan.rounds + r) * TOKENS
        row, start, position, last = (described[at, field] for field in (ROW, START, POSITION, LAST))
        back = plan.span - 1 - first
        oldest = position - back
        z, a = self.z, self.a
        if Boolean(plan.long) and position - (plan.span - 1) >= start:  # the usual entry: all of it is in this step
            if not plan.early or row != guess or r > 0:
                self._load(row - back, channel)
            self._await_embeddings()
            for t in cutlass.range_constexpr(TOKENS):
                for c in cutlass.range_constexpr(LANE):
                    z[c, t] = enc.add(z[c, t], self.own_ape[c, self.mine, r * TOKENS + t])
        else:
            self._load_apart(z, a, at, r, channel)
        found = pool.part_of(*([[held[c, t] for c in range(LANE)] for t in range(TOKENS)] for held in (z, a)))
        for c in cutlass.range_constexpr(LANE):
            part[0, c], part[1, c], part[2, c] = found[c]
        if oldest < start and last - oldest >= self.ring:
            self._renew(at, first, channel)

    @cute.jit
    def _guess(self, block: Any) -> Any:
        """The first tokens of an early warp's first entry on their way, as if the step were one sequence's and began with an
        entry; the row that then completes it, or -1.
        """
        plan = self.plan
        begin = block // plan.cluster * plan.rows
        row = (begin & -plan.ratio) + ((self.warp if plan.teams > 1 else 0) + 1) * plan.ratio - 1
        found = Int32(-1)
        if self.warp < plan.early and row >= plan.span - 1 and row < cutlass.min(begin + plan.rows, self.count):
            self._load(row - (plan.span - 1) + self.piece * (plan.rounds * TOKENS), self.rank * plan.channels + self.local)
            found = row
        return found

    @cute.jit
    def _follow(self, shown: Any) -> None:
        """An early warp lets another load when its own tokens are there: it stores the last, which waits for it."""
        warp, early = self.warp, self.plan.early
        if warp < early:
            if self.guess >= 0 and self.lane == 0:
                shown[warp] = self.a[LANE - 1, TOKENS - 1]
            cute.arch.barrier_arrive(barrier_id=1 + warp, number_of_threads=2 * WARP)
        else:
            cute.arch.barrier(barrier_id=1 + warp - early, number_of_threads=2 * WARP)

    @cute.jit
    def _load(self, first: Any, channel: Any) -> None:
        """A lane's tokens from a row on."""
        plan = self.plan
        for held, stride, is_score in ((self.z, self.score_stride, True), (self.a, self.value_stride, False)):
            step = self._number_at(first, channel, Boolean(is_score))
            for t in cutlass.range_constexpr(TOKENS):
                more = plan.keys.dim if plan.overlap and t >= plan.ratio else 0
                _keep(held, t, pool.load(step + 4 * more, _ONCE))
                step = step + stride * 4

    def _await_embeddings(self) -> None:
        """All loads are on their way before anything waits: without the first line ptxas, short of registers, moves embeddings
        and sums between them, and the last loads wait for the first ones' data.
        """
        cute.arch.sync_warp()
        cute.arch.cp_async_wait_group(1 if self.plan.held else 0)

    @cute.jit
    def _load_apart(self, z: Any, a: Any, at: Any, r: Any, channel: Any) -> None:
        """The same tokens, each in this step, in the ring, or before the sequence, which is nowhere."""
        plan, described = self.plan, self.described
        row, start, position = (described[at, field] for field in (ROW, START, POSITION))
        ring, place = described[at, RING], described[at, PLACE]
        z_at, a_at, present, missing = [], [], [], []
        back = plan.span - 1 - (self.piece * plan.rounds + r) * TOKENS
        oldest = position - back
        z_row, a_row = (self._number_at(row, channel, Boolean(is_score)) for is_score in (True, False))
        z_row = z_row - 4 * plan.width  # as it is in the ring, next to the values
        z_step, a_step = z_row - Int64(back) * (self.score_stride * 4), a_row - Int64(back) * (self.value_stride * 4)
        for t in cutlass.range_constexpr(TOKENS):
            early = plan.overlap and t < plan.ratio  # one of the block before, which may not be there
            here, none = oldest + t >= start, Boolean(early) and oldest + t < 0
            older = place - back + t
            older = self._in_ring(ring + (older + self.ring if older < 0 else older), channel)
            z_from, a_from = z_step if here else older, a_step if here else older
            if cutlass.const_expr(early):  # any row, since nobody writes there
                z_from, a_from = z_row if none else z_from, a_row if none else a_from
            more = plan.keys.dim if plan.overlap and not early else 0
            z_at.append(z_from + 4 * (plan.width + more))
            a_at.append(a_from + 4 * more)
            present.append(here)
            missing.append(none)
            z_step, a_step = z_step + self.score_stride * 4, a_step + self.value_stride * 4
        for held, places in ((z, z_at), (a, a_at)):
            for t in cutlass.range_constexpr(TOKENS):
                _keep(held, t, pool.load(places[t], _ONCE))
        self._await_embeddings()
        for t in cutlass.range_constexpr(TOKENS):
            score = pool.plus([z[c, t] for c in range(LANE)], self.own_ape[None, self.mine, r * TOKENS + t], present[t])
            if cutlass.const_expr(plan.overlap and t < plan.ratio):  # there is no block before the first
                score = pool.without(score, missing[t], pool.MINUS_INFINITY)
                _keep(a, t, pool.without([a[c, t] for c in range(LANE)], missing[t], 0.0))
            _keep(z, t, score)


def _swizzled(vector: Any) -> Any:
    """Where a vector of pooled channels lies: four neighbours are read by one lane, so lanes' first ones avoid each other."""
    return vector ^ (vector // 8 & 3)


def _keep(held: Any, token: int, values: list[Any]) -> None:
    """Four numbers of a token, in registers."""
    for c in range(LANE):
        held[c, token] = values[c]


@cute.jit
def _put(memory: Any, vector: Any, values: Any) -> None:
    """Four floats into shared memory, in one store."""
    held = cute.make_rmem_tensor((LANE,), Float32)
    for c in cutlass.range_constexpr(LANE):
        held[c] = values[c]
    cute.autovec_copy(held, cute.local_tile(memory, (LANE,), (vector,)))
