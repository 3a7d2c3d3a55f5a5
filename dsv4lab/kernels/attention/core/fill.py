"""The warp that fills shared memory for `resident`: keys by groups of eight, queries by slices of 64 dims, all by TMA.

A sequence's tokens in line are cut into blocks of 16; block b has the place b of the ring, modulo its length. A query needs its
own block and `reach` before it. Where the next unit's query is in the same block of the same sequence, all is there. Otherwise
the warp waits for all units before, which multiply whatever is in the ring, and copies the block that follows, or, for a query
elsewhere, all blocks that it needs and all entries of its sequence that the call sees.

What is masked is multiplied, too, and 0 times NaN is NaN. So a query elsewhere gets zeros in all places that no key of its
sequence comes to: another sequence's keys there, of a damaged cache, would spoil it.

Without `from __future__ import annotations`: CuTeDSL reads the annotations themselves.
"""

from dataclasses import dataclass
from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Int32
from cutlass.cute.nvgpu import cpasync

from dsv4lab.kernels.attention.core.config import DIM, ROWS, STEP, TILE, TILES, ZERO_ROWS
from dsv4lab.kernels.attention.core.units import UNITS
from dsv4lab.kernels.cache.unpack.config import GROUP

_GROUPS = STEP // GROUP  # of a block
_WARP = 32
_GROUP_BYTES = GROUP * DIM * 2
_SLICE_BYTES = ROWS * TILE * 2


@dataclass(frozen=True)
class Fill:
    """load_q, q, load_k, keys: the copies, and what they copy from; shared_q, shared_k: where to, by slice and by group."""

    plan: cutlass.Constexpr
    load_q: Any
    q: Any
    shared_q: Any
    load_k: Any
    keys: Any
    shared_k: Any
    places: Any
    positions: Any
    seq_idx: Any
    ratio: Any
    head_tiles: Any
    units: Any
    queries: Any

    @cute.jit
    def run(self, heads: Any, first: Any, count: Any) -> None:
        """Units first .. first + count - 1."""
        plan, lane = self.plan, cute.arch.lane_idx()
        known = Int32(0)  # units that are done, as far as this warp has asked
        of, step = Int32(-1), Int32(0)  # sequence and block of the unit before
        seq, place, token, entry, held, seen = (Int32(0) for _ in range(6))
        for unit in cutlass.range(count, unroll=1):
            nth = unit % _WARP
            if nth == 0:  # a lane looks at one of the next 32
                query = (first + cutlass.min(unit + lane, count - 1)) // self.head_tiles
                position, seq = Int32(self.positions[query]), Int32(self.seq_idx[query])
                token, entry, held = self.places[seq, 0], self.places[seq, 2], self.places[seq, 3]
                place = position - self.places[seq, 1]
                if cutlass.const_expr(plan.entries > 0):
                    held = cutlass.min(held, plan.entries)
                    seen = cutlass.min((position + 1) // self.ratio, held)
            now, at, line, far, most, visible = (
                Int32(cute.arch.shuffle_sync(value, nth)) for value in (seq, place, token, entry, held, seen)
            )
            block = at // STEP
            same, following = now == of and block == step, now == of and block == step + 1
            low = cutlass.select_(following, block, cutlass.max(block - plan.reach, 0)) * _GROUPS
            high = cutlass.min(block * _GROUPS + _GROUPS, (far - line) // GROUP)  # of tokens that there are
            tokens = cutlass.select_(same, Int32(0), cutlass.select_(following, Int32(_GROUPS), Int32(plan.ring * _GROUPS)))
            entries = cutlass.select_(same or following, Int32(0), Int32(plan.entries // GROUP))
            wanted = cutlass.select_(same, cutlass.max(unit + 2 - UNITS, 0), unit)
            for other in cutlass.range(known, wanted, 1, unroll=1):
                self.units.wait_done(other)
            known = cutlass.max(known, wanted)
            of, step = now, block
            full = self.units.full + unit % UNITS
            with cute.arch.elect_one():
                for i, fact in enumerate((at, block % plan.ring, visible)):
                    self.units.facts[unit % UNITS, i] = fact
                cute.arch.mbarrier_arrive_and_expect_tx(full, (tokens + entries) * _GROUP_BYTES)
            for g in cutlass.range(tokens, unroll=1):
                row = cutlass.select_(low + g < high, line + (low + g) * GROUP, Int32(ZERO_ROWS))
                self._copy_group(row, (low + g) % (plan.ring * _GROUPS), full)
            for g in cutlass.range(entries, unroll=1):
                row = cutlass.select_(g * GROUP < most, far + g * GROUP, Int32(ZERO_ROWS))
                self._copy_group(row, plan.ring * _GROUPS + g, full)
            self._copy_queries(heads, first + unit, unit)
            near = self._slices(heads, first + cutlass.min(unit + 1, count - 1))[1]
            for t in cutlass.range_constexpr(TILES):
                cute.prefetch(self.load_q, near[None, t])

    @cute.jit
    def _copy_group(self, row: Any, place: Any, barrier: Any) -> None:
        """Eight rows of keys."""
        source = cute.local_tile(cute.domain_offset((row, 0), self.keys), (GROUP, DIM), (0, 0))
        target, source = cpasync.tma_partition(
            self.load_k, 0, cute.make_layout(1), cute.group_modes(self.shared_k, 0, 2), cute.group_modes(source, 0, 2)
        )
        cute.copy(self.load_k, source, target[None, place], tma_bar_ptr=barrier)

    @cute.jit
    def _copy_queries(self, heads: Any, where: Any, unit: Any) -> None:
        """A unit's queries, slice by slice as there is place."""
        target, source = self._slices(heads, where)
        for t in cutlass.range_constexpr(TILES):
            turn = unit * TILES + t
            self.queries.wait_empty(turn)
            with cute.arch.elect_one():
                cute.arch.mbarrier_arrive_and_expect_tx(self.queries.full(turn), _SLICE_BYTES)
            cute.copy(self.load_q, source[None, t], target[None, self.queries.stage(turn)], tma_bar_ptr=self.queries.full(turn))

    def _slices(self, heads: Any, where: Any) -> tuple[Any, Any]:
        """Places of slices in shared memory, and of a unit's in global memory."""
        row = where // self.head_tiles * heads + where % self.head_tiles * ROWS
        source = cute.local_tile(cute.domain_offset((row, 0), self.q), (ROWS, TILE), (0, None))
        shared, source = cute.group_modes(self.shared_q, 0, 2), cute.group_modes(source, 0, 2)
        return cpasync.tma_partition(self.load_q, 0, cute.make_layout(1), shared, source)
