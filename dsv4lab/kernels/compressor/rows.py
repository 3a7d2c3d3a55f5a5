"""Rows of a step: what each is, by its position alone; where its numbers lie; and its way into the ring.

Without `from __future__ import annotations`: CuTeDSL reads the annotations themselves.
"""

from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Float32, Int32, Int64, Uint32

from dsv4lab.kernels._common.lanes import lowest
from dsv4lab.kernels._common.ptx import copy_async, copy_or_zeros
from dsv4lab.kernels.cache.plan import WARP
from dsv4lab.kernels.compressor import pool
from dsv4lab.kernels.compressor.config import LANE, TOKENS, CompressConfig

FIELDS = 8  # of a row's description
ROW, START, POSITION, LAST, RING, PLACE, SEQ, KINDS = range(FIELDS)
FIRST_HALF, SECOND_HALF = 1, 2


class Rows:
    """What `Compress` does with rows, by what its kernel keeps."""

    plan: CompressConfig
    values: Any
    scores: Any
    value_stride: Any
    score_stride: Any
    ape: Any
    state: Any
    ring: Any
    described: Any
    own_moved: Any
    count: Any
    thread: Any
    warp: Any
    lane: Any

    def _row_of(self, block: Any, grid: Any) -> Any:
        """A thread's: of those that this cluster looks through, then of those that this CTA moves, spread over the grid."""
        plan = self.plan
        own, moved = block // plan.cluster * plan.rows + self.thread, (self.thread - plan.rows) * grid + block
        return cutlass.select_(self.thread >= plan.rows, moved, own)

    @cute.jit
    def _look(self, known: Any, row: Any) -> None:
        """What is known of a thread's row on its way to where its description will be. Not into registers: such loads share a
        scoreboard with those of tokens after them, and who waits for positions would wait for tokens.
        """
        if row < self.count and self.thread < self.plan.rows + self.plan.moved:
            to = self.described[self.thread, None].iterator.toint()
            for i, one in enumerate(known):
                copy_async(to + 8 * i, one.iterator.toint() + Int64(row) * 8, 8)
        cute.arch.cp_async_commit_group()

    @cute.jit
    def _describe(self, known: Any, masks: Any, row: Any) -> None:
        """A thread a row."""
        plan = self.plan
        thread, described, count = self.thread, self.described, self.count
        inside = row < count and thread < plan.rows + plan.moved
        completes = Boolean(False)
        position = last = seq = first = Int32(0)
        if cutlass.const_expr(plan.early):
            cute.arch.cp_async_wait_group(0)
        else:
            position, last, seq, first = (Int32(one[cutlass.min(row, count - 1)]) for one in known)
        if inside:
            if cutlass.const_expr(plan.early):
                position, last, seq, first = (described[thread, 2 * i] for i in range(4))
            start = position - (row - first)
            completes = (position + 1) % plan.ratio == 0 and thread < plan.rows
            place = position % self.ring
            described[thread, ROW] = row
            described[thread, START] = start
            described[thread, POSITION] = position
            described[thread, LAST] = last
            described[thread, RING] = seq * self.ring
            described[thread, PLACE] = place
            described[thread, SEQ] = seq
            described[thread, KINDS] = self._kinds(start, position, last)
        elif thread < plan.rows + plan.moved:
            for field in cutlass.range_constexpr(FIELDS):  # as of row 0, nothing of which is to be moved
                described[thread, field] = Int32(0)
        mask = Uint32(cute.arch.vote_ballot_sync(completes))
        if self.lane == 0 and self.warp < plan.masks:
            masks[self.warp] = mask

    @cute.jit
    def _kinds(self, start: Any, position: Any, last: Any) -> Any:
        """Which halves of a token's channels may go into the ring at any time: 1 the first, 2 the second.

        None of a token that is not among the last R. Not those that lie where an entry of this step reads an older token.
        """
        plan = self.plan
        older = position - (position - start + self.ring) // self.ring * self.ring  # in the ring before this step
        found = Int32(0)
        if position > last - self.ring:
            completed = (older & -plan.ratio) + (plan.ratio - 1)  # the last token of the entry of its own block
            second = completed >= start and completed <= last
            following = completed + plan.ratio
            first = older >= 0 and following >= start and following <= last
            if cutlass.const_expr(not plan.overlap):
                first = second
            found = (Int32(0) if first else Int32(FIRST_HALF)) | (Int32(0) if second else Int32(SECOND_HALF))
        return found

    @cute.jit
    def _move(self) -> None:
        """The rows of this CTA into the ring, what of them may go there at any time, a few together."""
        plan = self.plan
        described = self.described
        for w in cutlass.range(-(-plan.moved // WARP), unroll=1):
            mine = w * WARP + self.lane
            kinds = described[plan.rows + cutlass.min(mine, plan.moved - 1), KINDS]
            left = Uint32(cute.arch.vote_ballot_sync(kinds != 0 and mine < plan.moved))
            at = plan.rows + w * WARP
            while left != Uint32(0):
                held = cute.make_rmem_tensor((LANE, plan.units, plan.batch), Float32)
                there = cute.make_rmem_tensor((plan.units, plan.batch), Int64)
                # Loads without a branch, so that they are on their way together; past the last row they read it again.
                for b in cutlass.range_constexpr(plan.batch):
                    some = left != Uint32(0)
                    at = plan.rows + w * WARP + lowest(left) if some else at
                    left = left & (left - 1) if some else left
                    row, position, kinds = described[at, ROW], described[at, POSITION], described[at, KINDS]
                    place = described[at, RING] + described[at, PLACE]
                    for u in cutlass.range_constexpr(plan.units):
                        channel, is_score, half = self._unit(u)
                        to = self._in_ring(place, channel) + (Int64(4 * plan.width) if is_score else Int64(0))
                        there[u, b] = to if some and kinds & half != 0 else Int64(0)
                        found = self._number(row, position, channel, is_score)
                        for c in cutlass.range_constexpr(LANE):
                            held[c, u, b] = found[c]
                for b in cutlass.range_constexpr(plan.batch):
                    for u in cutlass.range_constexpr(plan.units):
                        if there[u, b] != 0:
                            pool.store(there[u, b], [held[c, u, b] for c in range(LANE)])

    @cute.jit
    def _fetch(self) -> None:
        """The rows of this CTA that go into the ring, few as they are, on their way into shared memory."""
        plan, described = self.plan, self.described
        for b in cutlass.range_constexpr(plan.moved):
            row, position = described[plan.rows + b, ROW], described[plan.rows + b, POSITION]
            kinds = described[plan.rows + b, KINDS]
            for u in cutlass.range_constexpr(plan.units):
                channel, is_score, half = self._unit(u)
                size = cutlass.select_(kinds & half != 0, Int32(16), Int32(0))  # of what may not go there nothing is read
                for i, source in enumerate((self._number_at(row, channel, is_score), self._ape_at(position, channel))):
                    copy_or_zeros(self.own_moved[None, self.thread, i, u, b].iterator.toint(), source, size, 16)
        cute.arch.cp_async_commit_group()

    @cute.jit
    def _put_fetched(self) -> None:
        """Those rows into the ring, what of them may go there."""
        plan, described = self.plan, self.described
        cute.arch.sync_warp()  # lanes that stored a scale, too: the warp waits as one
        cute.arch.cp_async_wait_group(0)
        for b in cutlass.range_constexpr(plan.moved):
            kinds = described[plan.rows + b, KINDS]
            for u in cutlass.range_constexpr(plan.units):
                channel, is_score, half = self._unit(u)
                if kinds & half != 0:
                    place = described[plan.rows + b, RING] + described[plan.rows + b, PLACE]
                    to = self._in_ring(place, channel) + (Int64(4 * plan.width) if is_score else Int64(0))
                    number, ape = (self.own_moved[None, self.thread, i, u, b] for i in range(2))
                    pool.store(to, pool.plus(number, ape, is_score))

    @cute.jit
    def _renew(self, at: Any, first: Any, channel: Any) -> None:
        """Newer tokens in the places of those that `_round` has read in the ring."""
        plan, described = self.plan, self.described
        row, start, position, last = (described[at, field] for field in (ROW, START, POSITION, LAST))
        for t in cutlass.range(TOKENS, unroll=1):
            older = position - (plan.span - 1 - first) + t
            newer = last - (last - older) % self.ring
            if older >= 0 and older < start and newer >= start:
                of = channel
                if cutlass.const_expr(plan.overlap):
                    of = channel + (Int32(plan.keys.dim) if t >= plan.ratio else Int32(0))
                to = self._in_ring(described[at, RING] + newer % self.ring, of)
                pool.store(to, self._number(row + newer - position, newer, of, Boolean(False)))
                pool.store(to + 4 * plan.width, self._number(row + newer - position, newer, of, Boolean(True)))

    def _unit(self, u: int) -> tuple[Any, Any, Any]:
        """(channel, whether it is a score's, the half) of a thread's unit of a row to be moved."""
        unit, quarter = self.thread + u * self.plan.threads, self.plan.width // LANE
        channel = unit % quarter * LANE
        half = cutlass.select_(channel >= self.plan.keys.dim, Int32(SECOND_HALF), Int32(FIRST_HALF))
        half = cutlass.select_(unit < 2 * quarter, half, Int32(0))  # threads may be more than vectors
        return channel, unit >= quarter, half

    @cute.jit
    def _number(self, row: Any, position: Any, channel: Any, is_score: Any) -> Any:
        """Four values of a token of this step, or its scores with their embeddings: what the ring holds of it."""
        found = pool.load(self._number_at(row, channel, is_score))
        return pool.plus(found, pool.load(self._ape_at(position, channel)), is_score)

    @cute.jit
    def _number_at(self, row: Any, channel: Any, is_score: Any) -> Any:
        """The address of a token's values, or of its scores."""
        start = self.scores if is_score else self.values
        stride = self.score_stride if is_score else self.value_stride
        return start + (Int64(row) * stride + channel) * 4

    def _ape_at(self, position: Any, channel: Any) -> Any:
        """The address of a token's embeddings."""
        return self.ape + Int64((position & (self.plan.ratio - 1)) * self.plan.width + channel) * 4

    def _in_ring(self, place: Any, channel: Any) -> Any:
        """The address of values in the ring; their scores are `width` floats further."""
        return self.state + (Int64(place) * (2 * self.plan.width) + channel) * 4
