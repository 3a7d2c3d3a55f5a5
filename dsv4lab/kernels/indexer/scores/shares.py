"""Entries of few queries, each its own number, in parts for the CTAs of a grid.

A query's entries are cut into parts of `length` units, the last one shorter. The length is the smallest with which there are no
more parts than a budget: parts are then as even as whole units let them be, whatever a query may see at most. A captured graph
is launched for the longest sequences that it may ever have; what it does follows those that it has.

Even parts do not end together: multiprocessors read at different speeds. Where there is much to do a CTA has several parts, all
but the last two of them neighbours; then it takes parts from a counter, one when it has loaded the one before.

A CTA finds its parts by itself. The warp that loads keys does it, from shared memory, and tells the others: they have no
registers for that beside their sums.

Without `from __future__ import annotations`: CuTeDSL reads the annotations themselves.
"""

from dataclasses import dataclass
from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Int32, Uint32

from dsv4lab.kernels._common.lanes import lowest, through
from dsv4lab.kernels.indexer.scores.config import WARP
from dsv4lab.kernels.indexer.visible import visible

_LEAST = 4  # units of one of several parts
_MOST = 8  # parts of a CTA


@dataclass(frozen=True)
class Shares:
    """seen, sequences (.. M) i32 in shared memory: entries each of `queries` sees, and whose it is. unit: entries that are not
    divided.
    """

    seen: Any
    sequences: Any
    queries: Any
    unit: cutlass.Constexpr

    @cute.jit
    def look(self, num_visible: Any, seq_idx: Any, entries: Any, thread: Any, threads: int) -> None:
        """What each query sees of `entries`, and whose it is, by all threads; a barrier must follow."""
        for row in cutlass.range(thread, self.queries, threads, unroll=1):
            self.seen[row] = visible(num_visible, row, entries)
            self.sequences[row] = Int32(seq_idx[row])

    @cute.jit
    def units(self, first: Any) -> Any:
        """Of the lane's of 32 queries."""
        row, found = first + cute.arch.lane_idx(), Int32(0)
        if row < self.queries:
            found = cute.ceil_div(self.seen[row], self.unit)
        return found

    @cute.jit
    def length(self, ctas: Any) -> tuple[Any, Any]:
        """(units of a part, parts of a CTA at most). Two parts a query and CTA are allowed for, so that one long query among
        many is divided, too.
        """
        budget = ctas * cute.ceil_div(2 * self.queries, ctas)
        total, most = Int32(0), Int32(0)
        for first in cutlass.range(0, self.queries, WARP, unroll=1):
            units = self.units(first)
            total += units
            most = cutlass.max(most, units)
        total, most = cute.arch.warp_redux_sync(total, "add"), cute.arch.warp_redux_sync(most, "max")
        budget = cutlass.max(budget, ctas * cutlass.min(total // (ctas * _LEAST), _MOST))
        low, high = Int32(1), Int32(1)
        if total > budget:
            low, high = _over(total, budget), cutlass.min(most, _over(total, budget - self.queries))  # both are few enough
        while low < high:
            middle = (low + high) // 2
            if self.parts(middle) <= budget:
                high = middle
            else:
                low = middle + 1
        return low, budget // ctas

    @cute.jit
    def parts(self, length: Any) -> Any:
        """Of all queries."""
        count = Int32(0)
        for first in cutlass.range(0, self.queries, WARP, unroll=1):
            count += _over(self.units(first), length)
        return cute.arch.warp_redux_sync(count, "add")

    @cute.jit
    def find(self, part: Any, length: Any) -> tuple[Any, Any, Any]:
        """(query, first entry, end) of a part; a query of -1 where parts are fewer."""
        lane = cute.arch.lane_idx()
        row, at, before, first = Int32(-1), Int32(0), Int32(0), Int32(0)
        while row < 0 and first < self.queries:
            count = _over(self.units(first), length)
            ends = through(count, lane)
            mask = cute.arch.vote_ballot_sync(before + ends > part)
            if mask != 0:
                owner = lowest(mask)
                row = first + owner
                at = part - before - cute.arch.shuffle_sync(ends - count, owner)
            before += cute.arch.shuffle_sync(ends, WARP - 1)
            first += WARP
        low = at * length * self.unit
        return row, low, cutlass.min(low + length * self.unit, self.seen[cutlass.max(row, 0)])

    @cute.jit
    def hides(self, entries: Any) -> Any:
        """Whether a query sees fewer."""
        less = Int32(0)
        for first in cutlass.range(0, self.queries, WARP, unroll=1):
            row = cutlass.min(first + cute.arch.lane_idx(), self.queries - 1)
            less |= Int32(self.seen[row] < entries)
        return cute.arch.warp_redux_sync(less, "or") != 0


def _over(a: Any, b: Any) -> Any:
    """a / b, rounded up; neither is negative, for which a division is shorter than `cute.ceil_div` has it."""
    return Int32((Uint32(a) + Uint32(b) - Uint32(1)) // Uint32(b))
