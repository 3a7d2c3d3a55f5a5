"""The gathering warps of a pair of CTAs, for packed keys: each CTA has one of two tiles of a query's heads, and decodes half of
every block's keys for both.

A CTA has 32 keys of a block, a warp 4; eight lanes have a key, each 8 dims of every tile. Rows go to the same places of both
CTAs' stages: to the own one by ordinary stores, to the other by `st.async`, whose bytes are counted there by the barrier that
says that a half is full. A warp arrives at its own CTA's barrier when it has written, and expects what the warp of its number
sends from the other CTA; bytes may come before they are expected. A half is filled again when both CTAs have multiplied it:
consumers arrive at both CTAs' barriers.

A block is decoded before its stage is free, to 32 registers, so that nothing but stores stands between a stage that was read
and one that is full. Codes of the next block are on their way to shared memory meanwhile, by `cp.async`, with its scales, the
page of the block after it and the index of the one after that; rotary dims, which need no work, to registers. 375 instructions
a warp and block of FP8. A block takes 2.4 us on an H200 where each CTA's decoding for itself takes 3.2.

Without `from __future__ import annotations`: CuTeDSL reads the annotations themselves.
"""

from dataclasses import dataclass
from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Int32, Uint32

from dsv4lab.kernels._common.ptx import store_words
from dsv4lab.kernels.attention.core import ptx
from dsv4lab.kernels.attention.core.config import GATHER_WARPS, HALVES, KEYS, STAGES, TILES
from dsv4lab.kernels.attention.core.decode import CODE_WORDS, SCALE_WORDS, decode, factors
from dsv4lab.kernels.attention.core.gather import (
    HALF_BYTES,
    STAGE_BYTES,
    TILE_BYTES,
    copy_codes,
    load_words_into,
    read_scales,
    row_place,
)
from dsv4lab.kernels.cache.unpack.config import GROUP

_ROWS = KEYS // 2  # of a block that a CTA decodes
_KEYS = _ROWS // GATHER_WARPS  # of a warp: eight lanes have one
_CODED = TILES - 1  # tiles of codes; the last one is rotary, in BF16
_HALF_TILES = TILES // HALVES
_LANES = GATHER_WARPS * 32
_SENT = 512 * _HALF_TILES  # bytes of half a block that a warp sends


def packed_words(record: str) -> int:
    """Of shared memory for what comes of a block while the one before waits for its stage: codes, scales; and a page and an
    index a key, of later blocks.
    """
    return _LANES * _CODED * (CODE_WORDS[record] // 2) + _ROWS * _note_words(record)


def _note_words(record: str) -> int:
    """Of what comes of a key besides codes: scales, a page, an index; a multiple of 4."""
    return -(-(SCALE_WORDS[record] + 2) // 4) * 4


@dataclass(frozen=True)
class PairGather:
    """As `gather.Gather`. peer: how far it is from this CTA's shared memory to the other's."""

    work: Any
    stages: Any
    packed: Any
    masks: Any
    full: Any
    empty: Any
    peer: Any

    @property
    def arrivals(self) -> int:
        """That fill a half, but for bytes that are sent."""
        return GATHER_WARPS

    def span(self, query: Any, part: Any) -> tuple[Any, ...]:
        """What an item attends to."""
        return self.work.span(query, part)

    @cute.jit
    def ahead(self, query: Any, part: Any, warp: Any) -> Any:
        """The index of a lane's first key, asked for before anything else is known of the item."""
        return self.work.ahead(query, part, self._row(warp))

    def _row(self, warp: Any) -> Any:
        """A lane's key of a block."""
        return self.work.rank * _ROWS + warp * _KEYS + cute.arch.lane_idx() // 8

    @cute.jit
    def item(self, query: Any, span: Any, index: Any, warp: Any, phases: Any) -> Any:
        """All blocks of an item. index: `ahead`. phases: bit s is the phase of stage s; returned as after the last block."""
        work = self.work
        record = work.plan.record
        codes = CODE_WORDS[record] // 2
        _, seq, _, _, first, blocks = span
        lane = cute.arch.lane_idx()
        part, row = lane % 8, self._row(warp)
        place = first * KEYS + row
        rotary = cute.make_rmem_tensor((4,), Uint32)
        slot = self.packed + (warp * 32 + lane) * (codes * 4)  # of a lane's codes of the first tile
        notes = self.packed + (_CODED * _LANES * codes + (warp * _KEYS + lane // 8) * _note_words(record)) * 4
        finds = notes + SCALE_WORDS[record] * 4  # a page, then an index

        if cutlass.const_expr(work.plan.kind != "chosen"):
            index = work.index(query, place)
        page = work.page(seq, index)
        near = work.index(query, place + KEYS)  # of the next block
        data, scale, there = work.record(span, place, index, page)
        copy_codes(record, data, scale, there, part, slot, notes, codes, _CODED)
        if part == 0:
            work.copy_finds(query, seq, near, place + 2 * KEYS, finds, 4)
        cute.arch.cp_async_commit_group()
        self._load_rotary(data, there, part, rotary)
        target = self.stages + row_place(row) + (part ^ row % GROUP) * 16  # of this lane's dims in a swizzled row
        for j in cutlass.range(blocks, unroll=1):
            stage = j % 2
            free = (phases >> stage) & 1 ^ 1
            bits = Uint32(cute.arch.vote_ballot_sync(there))

            cute.arch.cp_async_wait_group(0)
            cute.arch.sync_warp()  # a lane has copied the codes that it reads, but others its scales and finds
            gains = factors(record, read_scales(record, notes), part // 2, range(_CODED))
            ready = [decode(record, _words(slot + t * (_LANES * codes * 4), codes), gains[t]) for t in range(_CODED)]
            place = place + KEYS
            page, far = work.finds(finds, place + KEYS, 4)
            cute.arch.sync_warp()  # the next ones go to the same place
            data, scale, there = work.record(span, place, near, page)
            there = there and j + 1 < blocks
            near = far
            if j + 1 < blocks:
                copy_codes(record, data, scale, there, part, slot, notes, codes, _CODED)
                if part == 0:
                    work.copy_finds(query, seq, near, place + 2 * KEYS, finds, 4)
            cute.arch.cp_async_commit_group()

            for h in cutlass.range_constexpr(HALVES):
                cute.arch.mbarrier_wait(self.empty + 2 * stage + h, free)
                full = self.full + 2 * stage + h
                for i in cutlass.range_constexpr(_HALF_TILES):
                    t = h * _HALF_TILES + i
                    words = ready[t] if t < _CODED else [rotary[i] for i in range(4)]
                    at = target + stage * STAGE_BYTES + h * HALF_BYTES + i * TILE_BYTES
                    ptx.send(at + self.peer, words, full.toint() + self.peer)
                    store_words(at, words)
                if cutlass.const_expr(h == 0):
                    self._tell(full, stage, warp, lane, bits)
                self._arrive(full, lane, _SENT + 4 if h == 0 else _SENT)
            phases = phases ^ (1 << stage)
            self._load_rotary(data, there, part, rotary)
        cute.arch.cp_async_wait_group(0)  # of an item without blocks, too: the next one copies to the same place
        return phases

    @cute.jit
    def leave(self, phases: Any) -> None:
        """After the last item."""
        leave(self.empty, phases)

    # ---- from memory ---------------------------------------------------------------------------------------------------
    def _load_rotary(self, data: Any, there: Any, part: Any, rotary: Any) -> None:
        address = data + _CODED * CODE_WORDS[self.work.plan.record] * 16 + part * 16
        load_words_into(address, Int32(there), rotary, 4)

    # ---- to both CTAs --------------------------------------------------------------------------------------------------
    @cute.jit
    def _tell(self, full: Any, stage: Any, warp: Any, lane: Any, there: Any) -> None:
        """Which of a warp's keys there are, a byte each: with the left half."""
        if lane == 0:
            at = self.masks + stage * self.work.plan.mask_bytes + (self.work.rank * GATHER_WARPS + warp) * 4
            ptx.send(at + self.peer, [there], full.toint() + self.peer)
            ptx.store_word(at, there)

    @cute.jit
    def _arrive(self, full: Any, lane: Any, size: cutlass.Constexpr) -> None:
        """This warp has written, and as much is to come from the other CTA's. Fences are with those who read: see `Gather`."""
        cute.arch.sync_warp()
        if lane == 0:
            cute.arch.mbarrier_arrive_and_expect_tx(full, size)


def _words(address: Any, codes: int) -> Any:
    """A lane's codes of a tile."""
    return [Uint32(ptx.load_word(address))] if codes == 1 else ptx.load_pair(address)


@cute.jit
def leave(empty: Any, phases: Any) -> None:
    """After the last item: wait until the other CTA has done all that it does here. Products of this one have waited for what
    it writes; so what is left is its arrivals.
    """
    for stage in cutlass.range_constexpr(STAGES):
        for h in cutlass.range_constexpr(HALVES):
            cute.arch.mbarrier_wait(empty + 2 * stage + h, (phases >> stage) & 1 ^ 1)
