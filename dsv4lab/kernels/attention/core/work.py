"""What a CTA's items are and which keys each attends to, from data on the device.

A query's keys stand in a row of places: first its entries, in the order of `chosen` or of their numbers, then its window,
oldest token first. Places are cut into blocks of 64, and the blocks divided evenly among the query's parts: as many as there
are, where all visible entries are attended; as many as there may be, where k are chosen, so that the first index can be read
before the position is known.

Without `from __future__ import annotations`: CuTeDSL reads the annotations themselves.
"""

from dataclasses import dataclass
from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Int32, Int64, Uint32

from dsv4lab.kernels._common.ptx import copy_async
from dsv4lab.kernels.attention.core import ptx
from dsv4lab.kernels.attention.core.config import KEYS, block_range

_WARP = 32
_SCAN = 8  # indices of a lane that are read at once


@dataclass(frozen=True)
class Work:
    """Where keys are: pools, tables, and the call's sizes."""

    plan: cutlass.Constexpr
    window_pages: Any  # (P, bytes) u8
    entry_pages: Any  # (P, bytes) u8
    table: Any  # (sequences, pages) i32
    positions: Any  # (M,) i64
    seq_idx: Any  # (M,) i64
    chosen: Any  # (M, k) i32
    ring_len: Any
    ratio: Any
    parts: Any
    head_tiles: Any
    rank: Any  # of the CTA in its pair

    @cute.jit
    def item(self, item: Any) -> tuple[Any, Any, Any]:
        """(query, tile of heads, part): parts of a query are neighbours, as are its head tiles, which read the same keys.

        In pairs, an item has two tiles, or two queries, this CTA's and the other's; the last query of an odd number is both.
        """
        part, rest = item % self.parts, item // self.parts
        if cutlass.const_expr(self.plan.share == "queries"):
            query = cutlass.min(rest // self.head_tiles * 2 + self.rank, Int32(self.positions.shape[0]) - 1)
            return query, rest % self.head_tiles, part
        if cutlass.const_expr(self.plan.ctas == 2):
            tiles = self.head_tiles // 2
            return rest // tiles, rest % tiles * 2 + self.rank, part
        return rest // self.head_tiles, rest % self.head_tiles, part

    @cute.jit
    def span(self, query: Any, part: Any) -> tuple[Any, Any, Any, Any, Any, Any]:
        """What an item attends to: (place of the window's first token in its ring, sequence, entries, keys in all, first block,
        number of blocks). By whole warps.
        """
        plan = self.plan
        position, seq = Int32(self.positions[query]), Int32(self.seq_idx[query])
        entries = Int32(0)
        if cutlass.const_expr(plan.kind == "visible"):
            entries = (position + 1) // self.ratio
        elif cutlass.const_expr(plan.kind == "chosen"):
            entries = Int32(self.chosen.shape[1])
            if (position + 1) // self.ratio < entries:  # so some are empty, as a rule the last ones
                entries = self._last_chosen(query)
        tokens = cutlass.min(position + 1, plan.window)
        keys = entries + tokens
        total = cute.ceil_div(keys, KEYS)
        most = total if cutlass.const_expr(plan.kind == "visible") else self._capacity()
        first, end = block_range(most, self.parts, part)
        start = (position + 1 - tokens) % self.ring_len
        return start, seq, entries, keys, first, cutlass.max(cutlass.min(end, total) - first, 0)

    def _capacity(self) -> Any:
        """Most blocks of a query that has chosen entries or none."""
        width = self.chosen.shape[1] if self.plan.kind == "chosen" else 0
        return cute.ceil_div(Int32(width + self.plan.window), KEYS)

    @cute.jit
    def ahead(self, query: Any, part: Any, row: Any) -> Any:
        """`index` of a row of an item's first block, before its `span` is known; only where entries are chosen."""
        if cutlass.const_expr(self.plan.kind == "chosen"):
            return self.index(query, part * self._capacity() // self.parts * KEYS + row)
        return Int32(0)

    @cute.jit
    def _last_chosen(self, query: Any) -> Any:
        """One more than the last place that is not empty."""
        lane, width = cute.arch.lane_idx(), self.chosen.shape[1]
        last = Int32(0)
        for start in cutlass.range(lane, width, _WARP * _SCAN, unroll=1):
            for i in cutlass.range_constexpr(_SCAN):
                at = start + i * _WARP
                if self.chosen[query, cutlass.min(at, width - 1)] >= 0 and at < width:
                    last = Int32(at + 1)
        for offset in (16, 8, 4, 2, 1):
            last = cutlass.max(last, cute.arch.shuffle_sync_bfly(last, offset))
        return last

    # ---- addresses -----------------------------------------------------------------------------------------------------
    @cute.jit
    def index(self, query: Any, place: Any) -> Any:
        """The entry at a place, if there is one: negative where it is empty, anything past the entries."""
        if cutlass.const_expr(self.plan.kind == "chosen"):
            return _flat(self.chosen)[self._nth_index(query, place)]
        return place

    def index_address(self, query: Any, place: Any) -> Any:
        """Where `index` looks."""
        return self.chosen.iterator.toint() + Int64(self._nth_index(query, place)) * 4

    def _nth_index(self, query: Any, place: Any) -> Any:
        width = Int32(self.chosen.shape[1])
        return query * width + cutlass.min(place, width - 1)

    @cute.jit
    def page(self, seq: Any, index: Any) -> Any:
        """The page of an entry, that of any if there is no such entry."""
        if cutlass.const_expr(self.plan.kind == "window"):
            return Int32(0)
        return cutlass.max(_flat(self.table)[self._nth_page(seq, index)], 0)

    @cute.jit
    def copy_finds(self, query: Any, seq: Any, index: Any, place: Any, target: Any, step: cutlass.Constexpr) -> None:
        """The page of an index, and the index at a place, so many bytes on: on their way to shared memory, by one lane."""
        if cutlass.const_expr(self.plan.kind != "window"):
            copy_async(target, self.page_address(seq, index), 4)
        if cutlass.const_expr(self.plan.kind == "chosen"):
            copy_async(target + step, self.index_address(query, place), 4)

    @cute.jit
    def finds(self, source: Any, place: Any, step: cutlass.Constexpr) -> tuple[Any, Any]:
        """(page, index) that have come; place: of the index."""
        page, index = Int32(0), place
        if cutlass.const_expr(self.plan.kind != "window"):
            page = cutlass.max(ptx.load_word(source), 0)
        if cutlass.const_expr(self.plan.kind == "chosen"):
            index = ptx.load_word(source + step)
        return page, index

    def page_address(self, seq: Any, index: Any) -> Any:
        """Where `page` looks, for a number of which it takes 0 if it is negative."""
        return self.table.iterator.toint() + Int64(self._nth_page(seq, index)) * 4

    def _nth_page(self, seq: Any, index: Any) -> Any:
        width = Int32(self.table.shape[1])
        at = Int32(Uint32(cutlass.max(index, 0)) // self.plan.entry_page)
        return seq * width + cutlass.min(at, width - 1)

    @cute.jit
    def record(self, span: Any, place: Any, index: Any, page: Any) -> tuple[Any, Any, Any]:
        """(address of the data of the key at a place, of its scales, whether there is such a key)."""
        plan = self.plan
        start, seq, entries, keys, _, _ = span
        ring = cutlass.max(start + cutlass.min(place, keys - 1) - entries, 0)
        ring = cutlass.select_(ring >= self.ring_len, ring - self.ring_len, ring) + seq * self.ring_len
        data, scale = self._address(self.window_pages, Uint32(ring) // plan.window_page, Uint32(ring), plan.window_page)
        there = place < keys
        if cutlass.const_expr(plan.kind != "window"):
            at = self._address(self.entry_pages, page, Uint32(cutlass.max(index, 0)), plan.entry_page)
            inside = place < entries
            data, scale = cutlass.select_(inside, at[0], data), cutlass.select_(inside, at[1], scale)
            there = there and (index >= 0 or place >= entries)
        return data, scale, there

    def _address(self, pages: Any, page: Any, slot: Any, size: int) -> tuple[Any, Any]:
        """Where the two parts of a record lie, from its page and its slot in the page or in the pool."""
        plan = self.plan
        base = pages.iterator.toint() + Int64(page) * Int64(plan.page_bytes(size))
        place = Int32(slot % size)
        return base + place * plan.data_bytes, base + (size * plan.data_bytes + place * plan.scale_bytes)


def _flat(table: Any) -> Any:
    """A table as a row of numbers: 32 bits are enough to find one."""
    return cute.make_tensor(table.iterator, cute.make_layout(1 << 30))
