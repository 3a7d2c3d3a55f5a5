"""Keys that a call's queries may see -> BF16, once each, into plain pools with the places of the packed ones.

    sequence s, its queries at positions a .. b:   tokens (a - window, b] of its ring,   entries [0, (b + 1) / ratio)

Plain pools have the packed ones' pages in the same order, so block tables hold for both; what nobody sees is neither read nor
written. Or rows stand in `line`, sequence after sequence: its tokens in the order of their positions, at least 7 rows of zeros,
its entries, zeros; either part begins at a multiple of 8, and a table says where. So 8 rows from any token or from every eighth
entry on are numbers. Code times scale has at most 6 significant bits: BF16 keys are the reference's float32 ones.

1. Every CTA, 1024 threads, finds the sequences' least and greatest positions in shared memory: a warp's 32 queries are of one
   sequence as a rule, then one lane speaks for them.
2. A thread a sequence: how many tokens and entries; running sums of these number all rows of the call.
3. A row a warp, two in flight: its sequence by two votes over the sums, the page of an entry from the block table, the record
   as in `record`. A page that several sequences share is left to the first of them that sees the entry.

Bytes of a row of 512: 584 (fp8) or 384 (nvfp4) read, 1024 written. 4,096 queries at the end of 8,192 tokens see 6,272 rows:
10 MB, 2.6 us; about 280 instructions a row, 1.9 us of issue slots beside that; before it a launch, 16 bytes a query from L2 for
each CTA, 1.5 us with latencies, and four barriers: predicted 7 us on an H200. sm_90a.

Without `from __future__ import annotations`: CuTeDSL reads the annotations themselves.
"""

from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Int32, Int64, Uint32
from cutlass.memory import SmemAllocator

from dsv4lab.kernels._common.lanes import through
from dsv4lab.kernels.cache.memory import put_words
from dsv4lab.kernels.cache.plan import WARP
from dsv4lab.kernels.cache.record import FOUR, SPAN, StoredKey
from dsv4lab.kernels.cache.unpack.config import GROUP, MAX_SEQS, THREADS, WARPS, UnpackConfig
from dsv4lab.kernels.quant.rows import encode as enc

_SCAN = 4  # queries of a thread that are read at once
_AHEAD = 2  # rows of a warp in flight
_NOWHERE = 2**31 - 1  # a least position before the first


class UnpackKeys:
    """The kernel for one `UnpackConfig`; sizes are the call's."""

    def __init__(self, config: UnpackConfig) -> None:
        config.check()
        self.window = StoredKey(config.window)
        self.entries: Any = None if config.entries is None else StoredKey(config.entries)
        self.line, self.quads = config.line, config.quads
        self.row_bytes = 2 * config.window.dim

    @cute.jit
    def __call__(
        self,
        window_pages: Any,
        entry_pages: Any,
        table: Any,
        positions: Any,
        seq_idx: Any,
        window_out: Any,
        entry_out: Any,
        places: Any,
        window: Int32,
        ring_len: Int32,
        ratio: Int32,
        most: Int32,
        ctas: Int32,
        stream: Any,
    ) -> None:
        """Pages (P, page_bytes) u8, P > 0; table (sequences, pages) i32; positions, seq_idx (M,) i64, M > 0; most: entries of
        a sequence -> pools as (slots, dim) bf16; in line all rows in the first, and places (rings, 4) i32: the row of the first
        token, its position, the row of the first entry, the number of entries. What the configuration does not have may be
        anything.
        """
        self.kernel(
            window_pages, entry_pages, table, positions, seq_idx, window_out, entry_out, places, window, ring_len, ratio, most
        ).launch(grid=[ctas, 1, 1], block=[THREADS, 1, 1], stream=stream, use_pdl=True)

    @cute.kernel
    def kernel(
        self,
        window_pages: Any,
        entry_pages: Any,
        table: Any,
        positions: Any,
        seq_idx: Any,
        window_out: Any,
        entry_out: Any,
        places: Any,
        window: Int32,
        ring_len: Int32,
        ratio: Int32,
        most: Int32,
    ) -> None:
        thread, _, _ = cute.arch.thread_idx()
        block, _, _ = cute.arch.block_idx()
        grid, _, _ = cute.arch.grid_dim()
        warp, lane = cute.arch.make_warp_uniform(thread // WARP), thread % WARP
        memory = SmemAllocator()
        # Of a sequence: its least and greatest position; the first token's place in its ring, tokens, entries; rows up to its
        # last one.
        low, high, first, tokens, seen, ends = (memory.allocate_tensor(Int32, cute.make_layout(MAX_SEQS)) for _ in range(6))
        sums = memory.allocate_tensor(Int32, cute.make_layout(WARPS))
        tops = memory.allocate_tensor(Int32, cute.make_layout(WARPS))  # every 32nd of `ends`: read in its place, one bank
        cute.arch.griddepcontrol_launch_dependents()
        low[thread], high[thread] = Int32(_NOWHERE), Int32(-1)
        cute.arch.barrier()
        cute.arch.griddepcontrol_wait()
        self._reach(positions, seq_idx, low, high, thread, lane)
        cute.arch.barrier()

        count, visible = Int32(0), Int32(0)
        last = high[thread]
        if last >= 0:
            count = cutlass.min(cutlass.min(last + 1, last - low[thread] + window), ring_len)
            first[thread] = (last + 1 - count) % ring_len
            if cutlass.const_expr(self.entries is not None):
                visible = cutlass.min((last + 1) // ratio, most)
        tokens[thread], seen[thread] = count, visible
        through = self._through(sums, warp, lane, self._near(count) + self._far(visible))
        ends[thread] = through
        if cutlass.const_expr(self.line):
            entry = through - self._far(visible)
            self._tell(places, thread, block == 0 and last >= 0, entry - self._near(count), last + 1 - count, entry, visible)
        if lane == WARP - 1:
            tops[warp] = through
        cute.arch.barrier()

        rows, stride = tops[WARPS - 1], grid * WARPS
        pools = (window_pages, entry_pages, table, window_out, entry_out, first, tokens, seen, ends, tops, ring_len)
        for row in cutlass.range(block * WARPS + warp, rows, stride * _AHEAD, unroll=1):
            held = []
            for a in cutlass.range_constexpr(_AHEAD):
                at = row + a * stride
                data, scales, target, there = self._find(cutlass.min(at, rows - 1), lane, pools)
                held.append((self.window.load(data, scales, lane), target, there and at < rows))
            for a in cutlass.range_constexpr(_AHEAD):
                loaded, target, there = held[a]
                for step in cutlass.range_constexpr(self.window.steps):
                    words = enc.words_of(self.window.values(loaded, step, lane), "bf16")
                    here = there and self.window.has(step, lane)
                    if cutlass.const_expr(self.line):
                        words = [cutlass.select_(there, word, Uint32(0)) for word in words]
                        here = row + a * stride < rows and self.window.has(step, lane)
                    place = lane * FOUR
                    if cutlass.const_expr(self.quads):
                        words, place = _quads(words, lane)
                    put_words(words, target + Int64((step * SPAN + place) * 2), here)

    # ---- what there is to do ---------------------------------------------------------------------------------------------
    @cute.jit
    def _reach(self, positions: Any, seq_idx: Any, low: Any, high: Any, thread: Any, lane: Any) -> None:
        """Every sequence's least and greatest position."""
        queries = positions.shape[0]
        for start in cutlass.range(0, queries, THREADS * _SCAN, unroll=1):
            at = [cutlass.min(start + i * THREADS + thread, queries - 1) for i in range(_SCAN)]
            found = [(Int32(positions[m]), Int32(seq_idx[m])) for m in at]
            for i in cutlass.range_constexpr(_SCAN):
                position, seq = found[i]
                together = cute.arch.vote_all_sync(seq == Int32(cute.arch.shuffle_sync(seq, 0)))
                least = Int32(cute.arch.warp_redux_sync(position, "min"))
                most = Int32(cute.arch.warp_redux_sync(position, "max"))
                if lane == 0 or not together:
                    cute.arch.atomic_min(low.iterator + seq, least if together else position, sem="relaxed", scope="cta")
                    cute.arch.atomic_max(high.iterator + seq, most if together else position, sem="relaxed", scope="cta")

    @cute.jit
    def _through(self, sums: Any, warp: Any, lane: Any, value: Any) -> Any:
        """The sum over the threads up to this one."""
        upto = through(value, lane)
        if lane == WARP - 1:
            sums[warp] = upto
        cute.arch.barrier()
        return upto + Int32(cute.arch.warp_redux_sync(sums[lane] if lane < warp else Int32(0), "add"))

    @cute.jit
    def _tell(self, places: Any, seq: Any, there: Any, row: Any, position: Any, entry: Any, entries: Any) -> None:
        """Where a sequence's rows are."""
        if there:
            for i, value in enumerate((row, position, entry, entries)):
                places[seq, i] = value

    def _near(self, count: Any) -> Any:
        """Rows of so many tokens; a sequence without queries has none."""
        rows = (count + (2 * GROUP - 2)) // GROUP * GROUP
        return cutlass.select_(count > 0, rows, Int32(0)) if self.line else count

    def _far(self, count: Any) -> Any:
        """Rows of so many entries."""
        return (count + (GROUP - 1)) // GROUP * GROUP if self.line else count

    # ---- rows ------------------------------------------------------------------------------------------------------------
    @cute.jit
    def _find(self, row: Any, lane: Any, pools: Any) -> tuple[Any, Any, Any, Any]:
        """(address of the data of a row's record, of its scales, of its BF16 values, whether it is to be written)."""
        window_pages, entry_pages, table, window_out, entry_out, first, tokens, seen, ends, tops, ring_len = pools
        before = _count(tops[lane] <= row) * WARP
        seq = before + _count(ends[before + lane] <= row)
        count, visible = tokens[seq], seen[seq]
        far_first = self._near(count)
        place = row - (ends[seq] - far_first - self._far(visible))
        ring = first[seq] + cutlass.min(place, count - 1)
        ring = cutlass.select_(ring >= ring_len, ring - ring_len, ring) + seq * ring_len
        data, scales = self.window.place(window_pages, ring)
        at = row if cutlass.const_expr(self.line) else ring
        target = window_out.iterator.toint() + Int64(at) * self.row_bytes
        there = place < count
        if cutlass.const_expr(self.entries is not None):
            size = self.entries.key.page_size
            entry = Uint32(cutlass.min(cutlass.max(place - far_first, 0), cutlass.max(visible - 1, 0)))
            inside = place < far_first
            nth, width = Int32(entry // size), Int32(table.shape[1])
            page = table[seq, cutlass.min(nth, width - 1)]
            there = there or (not inside and page >= 0 and place - far_first < visible)
            if cutlass.const_expr(not self.line):
                others = cutlass.select_(inside, Int32(0), seq)
                if self._before(table, seen, others, Int32(entry), nth, page, lane):
                    there = cutlass.Boolean(False)
            slot = cutlass.select_(there, page * size + Int32(entry % size), Int32(0))
            far = self.entries.place(entry_pages, slot)
            data, scales = cutlass.select_(inside, data, far[0]), cutlass.select_(inside, scales, far[1])
            if cutlass.const_expr(not self.line):
                target = cutlass.select_(inside, target, entry_out.iterator.toint() + Int64(slot) * self.row_bytes)
        return data, scales, target, there

    @cute.jit
    def _before(self, table: Any, seen: Any, others: Any, entry: Any, nth: Any, page: Any, lane: Any) -> Any:
        """Whether one of the first `others` sequences has this page at the same place of the table, and sees the entry."""
        found = cutlass.Boolean(False)
        for start in cutlass.range(0, others, WARP, unroll=1):
            other = cutlass.min(start + lane, others - 1)
            same = cutlass.Boolean(False)
            if seen[other] > entry:
                same = table[other, nth] == page
            found = found or cute.arch.vote_any_sync(same)
        return found


@cute.jit
def _quads(words: Any, lane: Any) -> tuple[list[Any], Any]:
    """Of a lane's two pairs of dims and those of the lane two away, two that are next to each other in quads' order; their
    place in a span.
    """
    late = lane % 4 // 2
    mine, given = cutlass.select_(late == 1, words[1], words[0]), cutlass.select_(late == 1, words[0], words[1])
    got = Uint32(cute.arch.shuffle_sync_bfly(given, 2))
    row, column = lane % 2 * 2 + late, lane % 8 // 4 * 2  # of the four by four pairs
    pair = [cutlass.select_(late == 1, got, mine), cutlass.select_(late == 1, mine, got)]
    return pair, lane // 8 * 32 + row * 8 + column * 2


@cute.jit
def _count(condition: Any) -> Any:
    """Lanes of the warp for which something holds."""
    return Int32(cute.arch.popc(Uint32(cute.arch.vote_ballot_sync(condition))))
