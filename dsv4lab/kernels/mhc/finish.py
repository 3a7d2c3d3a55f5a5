"""From sums to results: coefficients, Sinkhorn, new streams, collapse and norm; see `project` for the sums.

A CTA takes a token at a time. Its streams (with `post` also y, post and comb) come by bulk copies into a ring in shared memory,
a token each, ahead of time: the projection reads the same bytes a moment before, so that they come from L2. Then

    sums        every warp waits for, adds (float64) and clears its share of the slices' sums; through shared memory
    coefficients    every warp for itself, a lane an output: mix = sum / rms, sigmoids
    collapse    [new streams, stored]; u = sum_j pre[j] X[j], rounded; the sum of its squares; through shared memory
    norm        u / rms * weight, or codes of that, see `codes`

and the sums of the next token may already be asked for. Sinkhorn is serial, 39 divisions of rows or columns after each other,
and nothing here needs its result: a warp of its own has it and the softmax before, for up to 8 tokens at once, a lane each.

As a kernel it is started while `project` runs, and waits for sums, not for it; it waits for its end last of all. In one kernel
with `project` all wait for the kernel ahead first. There a cluster has a token, each CTA a part of the columns, and all its
sums; squares go to all CTAs by `st.async`, and say that the sums have been read: then they are cleared.

Arithmetic: logits in float64, from there on float32 with divisions within 2^-22; comb is some 2e-6 from the exact one,
relative. Bytes: streams (and y) once more, from L2; x once, new streams once.

Without `from __future__ import annotations`: CuTeDSL reads the annotations themselves.
"""

from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Float64, Int32, Int64, Uint32
from cutlass.memory import SmemAllocator

from dsv4lab.kernels._common.ptx import copy_bulk, load_words, store_global, store_words
from dsv4lab.kernels.mhc import values as val
from dsv4lab.kernels.mhc.codes import Codes
from dsv4lab.kernels.mhc.coefficients import LOGITS, Coefficients, sigmoid
from dsv4lab.kernels.mhc.config import BATCH, CHUNK, COEFFICIENTS, MANY_FINISH, STREAMS, WARP, MixConfig
from dsv4lab.kernels.quant.rows import encode as enc

_TEAM = 1  # barrier of the warps that collapse
_EARLY_ROWS = 4  # sums of a lane that fit beside all that `post` holds


class Finish:
    """The kernel of one `MixConfig`."""

    def __init__(self, plan: MixConfig, arch: str) -> None:
        self.plan, self.arch = plan, arch
        self.coefficients = Coefficients(plan.columns)
        self.team = plan.finish * WARP
        self.rows = -(-plan.slices // plan.finish)  # of sums, a warp
        # A token's sums are asked for while the one before is collapsed, unless there is none or no room in registers.
        self.early = plan.finish <= MANY_FINISH and not (plan.split > 1 or (plan.post and self.rows > _EARLY_ROWS))
        self.unroll = 1 if plan.post else min(plan.chunks, 2)  # as far as registers go
        self.whole = plan.outputs > STREAMS  # not the head: post and comb are results

    @cute.kernel
    def kernel(
        self,
        streams: Any,
        y: Any,
        post: Any,
        comb: Any,
        partial: Any,
        base: Any,
        scale: Any,
        weight: Any,
        new: Any,
        out: Any,
        new_post: Any,
        new_comb: Any,
        eps: Float32,
        hc_eps: Float32,
        iters: Int32,
        scales: Any,
        given: Any,
    ) -> None:
        cute.arch.griddepcontrol_launch_dependents()
        made = new, out, new_post, new_comb, eps, hc_eps, iters, scales, given
        self.run(SmemAllocator(), (streams, y, post, comb), partial, (base, scale, weight), made)
        cute.arch.griddepcontrol_wait()

    @cute.jit
    def run(self, memory: Any, rows: Any, partial: Any, shared: Any, made: Any) -> None:
        """Arguments of the kernel, some together."""
        plan = self.plan
        streams, y, post, comb = rows
        base, scale, weight = shared
        new, out, new_post, new_comb, eps, hc_eps, iters, scales, given = made
        thread, _, _ = cute.arch.thread_idx()
        block, grid, rank = self._place_of()
        warp = cute.arch.make_warp_uniform(thread // WARP)
        full = memory.allocate_array(Int64, plan.ring + 1)  # the last: a cluster's squares have come
        sums = memory.allocate_tensor(Float64, cute.make_layout((WARP, plan.finish, 2)), byte_alignment=16)
        squares = memory.allocate_tensor(Float32, cute.make_layout((plan.finish * plan.split, 2)), byte_alignment=16)
        logits = memory.allocate_tensor(Float64, cute.make_layout((LOGITS, BATCH, 2)), byte_alignment=16)
        rounded = memory.allocate_tensor(Uint32, cute.make_layout(plan.share // 2), byte_alignment=16)
        slots = memory.allocate_tensor(Uint32, cute.make_layout((plan.slot_bytes // 4, plan.ring)), byte_alignment=128)
        tokens = streams.shape[0]
        count = (tokens - block + grid - 1) // grid
        if warp == 0:
            with cute.arch.elect_one():
                for i in cutlass.range_constexpr(plan.ring + 1):
                    cute.arch.mbarrier_init(full + i, 1)
            cute.arch.mbarrier_init_fence()
            if cutlass.const_expr(plan.split > 1):
                cute.arch.griddepcontrol_wait()
            cute.arch.sync_warp()
            if thread == 0:
                for i in cutlass.range_constexpr(plan.ring):
                    if i < count:
                        self._copy(streams, y, post, comb, slots, full, i, block + i * grid)
        if cutlass.const_expr(plan.split > 1):
            cute.arch.cluster_arrive_relaxed()
        cute.arch.barrier()
        if cutlass.const_expr(plan.split > 1):
            cute.arch.cluster_wait()
            cute.arch.griddepcontrol_wait()
        if warp < plan.finish:
            target = out
            if cutlass.const_expr(plan.quant != ""):
                target = Codes.of(plan, self.arch, out, scales, given, thread)
            self._tokens(
                streams, y, post, comb, partial, base, scale, weight, new, target, new_post,
                full, sums, squares, logits, rounded, slots, count, eps, hc_eps,
            )  # fmt: skip
        elif cutlass.const_expr(self.whole) and rank == 0:
            self.coefficients.sinkhorn(logits, new_comb, block, grid, count, hc_eps, iters)

    def _place_of(self) -> Any:
        """Of a cluster, or of a CTA alone: its number, of how many; the CTA's number in it."""
        block, _, _ = cute.arch.block_idx()
        grid, _, _ = cute.arch.grid_dim()
        split, leading = self.plan.split, self.plan.leading
        return (block - leading) // split, (grid - leading) // split, block % split

    def _first(self) -> Any:
        """A CTA's first chunk of a row."""
        return self._place_of()[2] * (self.plan.share // CHUNK)

    # ---- tokens ----------------------------------------------------------------------------------------------------------
    @cute.jit
    def _tokens(
        self,
        streams: Any,
        y: Any,
        post: Any,
        comb: Any,
        partial: Any,
        base: Any,
        scale: Any,
        weight: Any,
        new: Any,
        out: Any,
        new_post: Any,
        full: Any,
        sums: Any,
        squares: Any,
        logits: Any,
        rounded: Any,
        slots: Any,
        count: Any,
        eps: Any,
        hc_eps: Any,
    ) -> None:
        """All tokens of this CTA, by the warps that collapse."""
        plan = self.plan
        thread, _, _ = cute.arch.thread_idx()
        block, grid, rank = self._place_of()
        warp, lane = cute.arch.make_warp_uniform(thread // WARP), thread % WARP
        output = cutlass.min(lane, plan.outputs - 1)
        kind = cutlass.min(output // STREAMS, 2)
        factor, offset = scale[kind].to(Float64), base[output].to(Float64)
        ready = None
        if cutlass.const_expr(plan.chunks == 1):  # a thread's weights, long before they are used
            ready = self._weights(weight, self._first() + cutlass.min(thread, plan.share // CHUNK - 1))
        got = cute.make_rmem_tensor((self.rows,), Uint32)
        if cutlass.const_expr(self.early):
            self._ask(partial, got, block, warp, lane)
        for i in cutlass.range(count, unroll=1):
            token, turn, slot = block + i * grid, i % 2, i % plan.ring
            if cutlass.const_expr(plan.split > 1):  # no sum comes before: `project` reads the same
                cute.arch.mbarrier_wait(full + slot, i // plan.ring % 2)
            if cutlass.const_expr(not self.early):
                self._ask(partial, got, token, warp, lane)
            sums[lane, warp, turn] = self._sum(partial, got, token, warp, lane)
            if cutlass.const_expr(plan.split == 1):
                self._clear(partial, token, warp, lane)
            cute.arch.barrier(barrier_id=_TEAM, number_of_threads=self.team)
            if cutlass.const_expr(self.early):
                self._ask(partial, got, cutlass.min(token + grid, streams.shape[0] - 1), warp, lane)
            total = enc.tree(lambda a, b: a + b, [sums[lane, w, turn] for w in range(plan.finish)])
            z = self.coefficients.logit(total, val.shuffle64(total, plan.outputs), factor, offset, eps)
            maker = warp == 0 and rank == 0
            if cutlass.const_expr(self.whole) and maker:  # before all else: comb takes longest
                self.coefficients.hand_over(z, logits, i, count, lane)
            gate = sigmoid(z)
            pre = [cute.arch.shuffle_sync(gate, j) + hc_eps for j in range(STREAMS)]
            if cutlass.const_expr(self.whole) and maker:
                self.coefficients.store_post(gate, new_post, token, lane)
            if cutlass.const_expr(plan.split == 1):
                cute.arch.mbarrier_wait(full + slot, i // plan.ring % 2)
            mine = self._collapse(slots, new, rounded, pre, slot, token, thread)
            mine = val.over_lanes(mine, (16, 8, 4, 2, 1), enc.add)
            if cutlass.const_expr(plan.split > 1):
                self._tell(squares, full + plan.ring, mine, warp, lane)
                self._clear(partial, token, warp, lane)
            else:
                if lane == 0:
                    squares[warp, turn] = mine
                cute.arch.barrier(barrier_id=_TEAM, number_of_threads=self.team)
                following = i + plan.ring
                if thread == 0 and following < count:  # all have read the slot
                    self._copy(streams, y, post, comb, slots, full, slot, block + following * grid)
            whole = Float32(0.0)
            for w in cutlass.range_constexpr(plan.finish * plan.split):
                whole = enc.add(whole, squares[w, turn])
            self._norm(rounded, weight, ready, out, whole, token, thread, eps)

    @cute.jit
    def _copy(self, streams: Any, y: Any, post: Any, comb: Any, slots: Any, full: Any, slot: Any, token: Any) -> None:
        """A token into a slot, by one thread."""
        plan = self.plan
        barrier = full + slot
        cute.arch.mbarrier_arrive_and_expect_tx(barrier, plan.slot_bytes)
        target = slots.iterator.toint() + slot * plan.slot_bytes
        row = plan.share * 2
        _, _, rank = self._place_of()
        if cutlass.const_expr(plan.split > 1):
            for j in cutlass.range_constexpr(STREAMS):
                copy_bulk(target + j * row, self._part(streams[token, j, None], rank), row, barrier)
        else:
            copy_bulk(target, streams[token, 0, None].iterator, STREAMS * row, barrier)
        if cutlass.const_expr(plan.post):
            copy_bulk(target + STREAMS * row, self._part(y[token, None], rank), row, barrier)
            copy_bulk(target + (STREAMS + 1) * row, post[token, None].iterator, STREAMS * 4, barrier)
            copy_bulk(target + (STREAMS + 1) * row + STREAMS * 4, comb[token, None].iterator, LOGITS * 4, barrier)

    def _part(self, row: Any, rank: Any) -> Any:
        """Where a CTA's part of a row is."""
        return cute.local_tile(row, (self.plan.share // 2,), (rank,)).iterator

    # ---- sums ------------------------------------------------------------------------------------------------------------
    def _place(self, partial: Any, token: Any, k: int, warp: Any, lane: Any) -> Any:
        """A lane's number in a warp's k-th slice, which must be there; lanes past the last number repeat it."""
        return partial[token, warp + k * self.plan.finish, None].iterator + cutlass.min(lane, self.plan.outputs)

    @cute.jit
    def _ask(self, partial: Any, got: Any, token: Any, warp: Any, lane: Any) -> None:
        """What is there of a warp's slices; 0 for a slice past the last, which is no other warp's to be waited for."""
        for k in cutlass.range_constexpr(self.rows):
            got[k] = Uint32(0)
            if warp + k * self.plan.finish < self.plan.slices:
                got[k] = val.load_relaxed(self._place(partial, token, k, warp, lane))

    @cute.jit
    def _sum(self, partial: Any, got: Any, token: Any, warp: Any, lane: Any) -> Any:
        """Wait for a warp's share of a token's sums and add them up."""
        waiting = self._incomplete(got)
        while waiting:
            self._ask(partial, got, token, warp, lane)
            waiting = self._incomplete(got)
        # a slice past the last is 0
        return enc.tree(lambda a, b: a + b, [got[k].bitcast(Float32).to(Float64) for k in range(self.rows)])

    @cute.jit
    def _clear(self, partial: Any, token: Any, warp: Any, lane: Any) -> None:
        """For the next launch a CTA's part of what this warp has read, of a cluster each CTA's."""
        _, _, rank = self._place_of()
        for k in cutlass.range_constexpr(self.rows):
            if k % self.plan.split == rank and warp + k * self.plan.finish < self.plan.slices and lane <= self.plan.outputs:
                val.store_relaxed(self._place(partial, token, k, warp, lane), Uint32(val.UNSET))

    @cute.jit
    def _incomplete(self, got: Any) -> Any:
        """Whether a lane of the warp still has a number that has not come."""
        highest = got[0]
        for k in cutlass.range_constexpr(1, self.rows):
            highest = enc.max_u32(highest, got[k])
        return cute.arch.vote_any_sync(highest == Uint32(val.UNSET))

    @cute.jit
    def _tell(self, squares: Any, barrier: Any, mine: Any, warp: Any, lane: Any) -> None:
        """A warp's sum of squares to all CTAs of the cluster, and wait for theirs: they have read the token's sums then."""
        plan = self.plan
        _, _, rank = self._place_of()
        place = rank * plan.finish + warp
        if warp == 0 and lane == 0:
            cute.arch.mbarrier_arrive_and_expect_tx(barrier, plan.finish * plan.split * 4)
        if lane < plan.split:
            val.send_one(squares.iterator.toint() + place * 4, barrier.toint(), lane, mine)
        cute.arch.mbarrier_wait(barrier, 0)

    # ---- collapse and norm -----------------------------------------------------------------------------------------------
    @cute.jit
    def _collapse(self, slots: Any, new: Any, rounded: Any, pre: Any, slot: Any, token: Any, thread: Any) -> Any:
        """u = sum_j pre[j] X[j], rounded, a thread's own in shared memory -> the sum of its squares.

        With `post` X are the new streams, and are stored.
        """
        plan = self.plan
        row = plan.share * 2
        at = slots.iterator.toint() + slot * plan.slot_bytes
        given = [Float32(0.0)] * COEFFICIENTS
        if cutlass.const_expr(plan.post):
            place = at + (STREAMS + 1) * row
            given = [w.bitcast(Float32) for i in range(COEFFICIENTS // 4) for w in load_words(place + 16 * i)]
        square = cute.make_rmem_tensor((2,), Float32)
        square.fill(0.0)
        first = self._first()
        for chunk in cutlass.range(thread, plan.share // CHUNK, self.team, unroll=self.unroll):
            x = [load_words(at + j * row + chunk * 16) for j in range(STREAMS)]
            if cutlass.const_expr(plan.post):
                added = load_words(at + STREAMS * row + chunk * 16)
                made = [val.new_words(added[i], [x[j][i] for j in range(STREAMS)], given[:4], given[4:]) for i in range(4)]
                x = [[made[i][j] for i in range(4)] for j in range(STREAMS)]
                for j in cutlass.range_constexpr(STREAMS):
                    store_global(cute.local_tile(new[token, j, None], (4,), (first + chunk,)).iterator, x[j])
            words = []
            for i in cutlass.range_constexpr(4):
                words.append(val.collapsed([x[j][i] for j in range(STREAMS)], pre))
                two = val.halves(words[i])
                for h in cutlass.range_constexpr(2):
                    square[h] = enc.fma(two[h], two[h], square[h])
            store_words(rounded.iterator.toint() + chunk * 16, words)
        return enc.add(square[0], square[1])

    @cute.jit
    def _norm(self, rounded: Any, weight: Any, ready: Any, out: Any, square: Any, token: Any, thread: Any, eps: Any) -> None:
        """ready: a thread's weights, if it has one chunk only."""
        plan = self.plan
        inverse = val.inverse_rms(square, plan.columns, eps)
        ours, chunks = self._first(), plan.share // CHUNK
        if cutlass.const_expr(plan.quant != ""):
            lane = thread % WARP
            for first in cutlass.range(thread - lane, chunks, self.team, unroll=1):
                chunk = cutlass.min(first + lane, chunks - 1)
                words = self._normed(rounded, weight, ready, inverse, chunk)
                out.put(words, token, ours + chunk, first + lane < chunks)
        else:
            for chunk in cutlass.range(thread, chunks, self.team, unroll=self.unroll):
                words = self._normed(rounded, weight, ready, inverse, chunk)
                store_global(cute.local_tile(out[token, None], (4,), (ours + chunk,)).iterator, words)

    def _weights(self, weight: Any, place: Any) -> Any:
        """Of a row's chunk."""
        w = cute.make_rmem_tensor((CHUNK,), weight.element_type)
        cute.autovec_copy(cute.local_tile(weight, (CHUNK,), (place,)), w)
        return w

    def _normed(self, rounded: Any, weight: Any, ready: Any, inverse: Any, chunk: Any) -> list[Any]:
        """Four words of the CTA's chunk."""
        w = self._weights(weight, self._first() + chunk) if ready is None else ready
        held = load_words(rounded.iterator.toint() + chunk * 16)
        return [val.normed(held[i], inverse, w[2 * i], w[2 * i + 1]) for i in range(4)]
