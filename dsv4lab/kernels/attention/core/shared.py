"""The keys of two CTAs that attend to the same ones, copied once for both: plain keys in line, by multicast.

The two CTAs of a cluster have two tiles of a query's heads, or neighbouring queries. Keys are rows of BF16, sequence after
sequence (`cache.unpack`, in line), and go by groups of eight: first a query's entries, then its window, either from a group of
its own on. Neighbouring queries of a sequence have one list, of what either sees; others have one each, and as many blocks as
the longer one. A block is eight groups.

One warp of a CTA copies half of a block's groups to the same place of both CTAs, four KB at a time, half the dims of a group;
the barriers that say that a half is full count all bytes in both. A list that is one CTA's alone it copies to itself. A half is
filled again when both CTAs have multiplied it: consumers arrive at both barriers. So L2 gives a key once for two items: of some
400 entries 4 % of a call (H200), of some 50 nothing, since bytes do not bind there, see `sm90`.

Which keys of a block a CTA's query attends to is in its mask. Others are multiplied, too, and 0 times NaN is NaN: so none may
be another sequence's, which a damaged cache may have. They are the sequence's own, or zeros: an item's first block of either
stage is filled to its end, with zeros where the list ends before; later ones leave there what that put there.

Without `from __future__ import annotations`: CuTeDSL reads the annotations themselves.
"""

from dataclasses import dataclass
from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Int16, Int32
from cutlass.cute.nvgpu import cpasync

from dsv4lab.kernels.attention.core import ptx
from dsv4lab.kernels.attention.core.config import DIM, HALVES, KEYS, STAGES, ZERO_ROWS
from dsv4lab.kernels.attention.core.gather import GROUP_BYTES
from dsv4lab.kernels.attention.core.pair import leave
from dsv4lab.kernels.cache.unpack.config import GROUP

_GROUPS = KEYS // GROUP  # of a block
_WORDS = KEYS // 32  # of its mask
_NEAR = 64  # tokens between queries that have one list, at most: so many keys each reads for the other
_BOTH = 3  # CTAs of a copy, a bit each
_HALF = DIM // HALVES


@dataclass(frozen=True)
class Shared:
    """As `gather.Gather`. load, keys: the copy of half a group, and all rows as it takes them; stages: (a group's half, group,
    half of a stage) of shared memory; masks: an address. The work's table has the sequences' places, see `cache.unpack`.
    """

    work: Any
    load: Any
    keys: Any
    stages: Any
    masks: Any
    full: Any
    empty: Any

    @property
    def arrivals(self) -> int:
        """That fill a half, but for bytes."""
        return 1

    def ahead(self, query: Any, part: Any, warp: Any) -> Any:
        """Nothing is asked for before an item's `span`."""
        return Int32(0)

    # ---- what there is to copy -----------------------------------------------------------------------------------------
    def span(self, query: Any, part: Any) -> tuple[Any, ...]:
        """(CTAs that have the list; the first rows of its entries and of its tokens, the groups up to the end of either;
        entries of this CTA's query, the place of its first token, its tokens; blocks). By whole warps.
        """
        position, seq = self._where(query)
        entries, start = self._entries(position, seq), self._start(position)
        ctas, low, high, other = Int32(2), position, position, Int32(0)
        if cutlass.const_expr(self.work.plan.share == "queries"):
            near, of = self._where(cutlass.min(query ^ 1, Int32(self.work.positions.shape[0]) - 1))
            apart = cutlass.max(position - near, near - position)
            together = cutlass.select_(seq == of, apart, Int32(_NEAR + 1)) <= _NEAR
            ctas = cutlass.select_(together, ctas, Int32(1))
            low = cutlass.select_(together, cutlass.min(position, near), position)
            high = cutlass.select_(together, cutlass.max(position, near), position)
            other = sum(self._runs(of, near, near)[1])
        rows, (middle, size) = self._runs(seq, low, high)
        end = middle + size
        token = middle * GROUP + start - self._start(low)
        blocks = cute.ceil_div(cutlass.max(end, other), _GROUPS)  # the same in both CTAs
        return ctas, *rows, middle, end, entries, token, position + 1 - start, blocks

    def _where(self, query: Any) -> tuple[Any, Any]:
        """A query's position and sequence."""
        return Int32(self.work.positions[query]), Int32(self.work.seq_idx[query])

    def _start(self, position: Any) -> Any:
        """The first token of a position's window."""
        return cutlass.max(position + 1 - self.work.plan.window, 0)

    def _entries(self, position: Any, seq: Any) -> Any:
        """Entries that a position sees."""
        if self.work.plan.kind == "window":
            return Int32(0)
        return cutlass.min((position + 1) // self.work.ratio, self.work.table[seq, 3])

    def _runs(self, seq: Any, low: Any, high: Any) -> tuple[list[Any], list[Any]]:
        """Of a sequence's positions low to high: the first entry's row and the first token's, and how many groups they are."""
        table, start = self.work.table, self._start(low)
        rows = [table[seq, 2], table[seq, 0] + start - table[seq, 1]]
        return rows, [cute.ceil_div(self._entries(high, seq), GROUP), cute.ceil_div(high + 1 - start, GROUP)]

    # ---- copies --------------------------------------------------------------------------------------------------------
    @cute.jit
    def item(self, query: Any, span: Any, index: Any, warp: Any, phases: Any) -> Any:
        """All blocks of an item, by one warp. phases: as `gather.Gather` has them."""
        ctas, entry_row, token_row, middle, end, entries, token, tokens, blocks = span
        lane, rank = cute.arch.lane_idx(), self.work.rank
        begin = cutlass.select_(ctas == 2, rank, Int32(0))
        to = Int16(cutlass.select_(ctas == 2, Int32(_BOTH), 1 << rank))
        for j in cutlass.range(blocks, unroll=1):
            stage = j % 2
            free = (phases >> stage) & 1 ^ 1
            seen = []
            for i in cutlass.range_constexpr(_WORDS):
                place = j * KEYS + i * 32 + lane
                visible = place < entries or (place >= token and place < token + tokens)
                seen.append(cute.arch.vote_ballot_sync(visible))
            count = cutlass.max(cutlass.min(end - j * _GROUPS, _GROUPS), 0)
            count = cutlass.select_(j < STAGES, Int32(_GROUPS), count)
            for h in cutlass.range_constexpr(HALVES):
                full = self.full + 2 * stage + h
                cute.arch.mbarrier_wait(self.empty + 2 * stage + h, free)
                with cute.arch.elect_one():
                    if cutlass.const_expr(h == 0):
                        for i in cutlass.range_constexpr(_WORDS):
                            ptx.store_word(self.masks + stage * self.work.plan.mask_bytes + i * 4, seen[i])
                    cute.arch.mbarrier_arrive_and_expect_tx(full, count * GROUP_BYTES)
                for g in cutlass.range(begin, count, ctas, unroll=1):
                    at = j * _GROUPS + g
                    row = cutlass.select_(at < middle, entry_row + at * GROUP, token_row + (at - middle) * GROUP)
                    row = cutlass.select_(at < end, row, Int32(ZERO_ROWS))
                    source = cute.domain_offset((row, 0), self.keys)
                    source = cute.local_tile(source, (GROUP, _HALF), (0, None))
                    target, source = cpasync.tma_partition(
                        self.load,
                        0,
                        cute.make_layout(1),
                        cute.group_modes(self.stages, 0, 2),
                        cute.group_modes(source, 0, 2),
                    )
                    box = target[None, g, HALVES * stage + h]
                    cute.copy(self.load, source[None, h], box, tma_bar_ptr=full, mcast_mask=to)
            phases = phases ^ (1 << stage)
        return phases

    @cute.jit
    def leave(self, phases: Any) -> None:
        """After the last item, as `pair.PairGather`: until the other CTA has done all that it does here."""
        leave(self.empty, phases)
