"""The gathering warps: keys of every block, found by index, made BF16 and laid out for the tensor cores.

A stage holds a block: eight column tiles of 64 keys by 64 dims, rows of 128 bytes in the 128-byte swizzle, so that one tile is
both the K-major operand of Q K^T and the MN-major operand of P V. It is filled by halves, four tiles each.

Packed records: a warp has 8 keys of a block; four lanes have a key, each 16 dims of every tile. The bytes of the next half are
in flight while those of this one are decoded (16 to 20 registers a lane, 18 kB a CTA); the index of a key is read two blocks
ahead and its page one. About 500 instructions a warp and block of FP8. Plain records: `cp.async` of 16 bytes, eight lanes a
key. Keys that are none are zeros, whatever memory holds, and cleared in the block's mask.

Without `from __future__ import annotations`: CuTeDSL reads the annotations themselves.
"""

from dataclasses import dataclass
from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Int32, Uint32

from dsv4lab.kernels._common.ptx import store_words
from dsv4lab.kernels.attention.core import ptx
from dsv4lab.kernels.attention.core.config import GATHER_WARPS, HALVES, KEYS, TILE, TILES
from dsv4lab.kernels.attention.core.decode import CODE_WORDS, SCALE_WORDS, decode, factors

TILE_BYTES = KEYS * TILE * 2
STAGE_BYTES = TILES * TILE_BYTES
_KEYS = KEYS // GATHER_WARPS  # of a block that a warp has: four lanes have one
_HALF_TILES = TILES // HALVES
_CODED = TILES - 1  # tiles of codes; the last one is rotary, in BF16


@dataclass(frozen=True)
class Gather:
    """Where keys go. stages, masks: addresses of shared memory. full, empty: barriers, one for each half of each stage."""

    work: Any
    stages: Any
    masks: Any
    full: Any
    empty: Any

    @property
    def arrivals(self) -> int:
        """That fill a half: of every warp, and of every thread whose copies come to it on their own."""
        return GATHER_WARPS * 33 if self.work.plan.record == "plain" else GATHER_WARPS

    @cute.jit
    def ahead(self, query: Any, part: Any, warp: Any) -> Any:
        """The index of a lane's first key, asked for before anything else is known of the item."""
        return self.work.ahead(query, part, warp * _KEYS + cute.arch.lane_idx() % 8)

    @cute.jit
    def item(self, query: Any, span: Any, index: Any, warp: Any, phases: Any) -> Any:
        """All blocks of an item. index: `ahead`. phases: bit s is the phase of stage s; returned as after the last block."""
        if cutlass.const_expr(self.work.plan.record == "plain"):
            phases = self._copy(query, span, warp, phases)
        else:
            phases = self._decode(query, span, index, warp, phases)
        return phases

    # ---- packed records ------------------------------------------------------------------------------------------------
    @cute.jit
    def _decode(self, query: Any, span: Any, index: Any, warp: Any, phases: Any) -> Any:
        work = self.work
        record = work.plan.record
        codes = CODE_WORDS[record]
        _, seq, _, _, first, blocks = span
        lane = cute.arch.lane_idx()
        token, part = lane % 8, lane // 8
        row = warp * _KEYS + token
        place = first * KEYS + row
        left = cute.make_rmem_tensor((codes, _HALF_TILES), Uint32)
        right = cute.make_rmem_tensor((codes, _HALF_TILES - 1), Uint32)
        rotary = cute.make_rmem_tensor((4, 2), Uint32)
        scales = cute.make_rmem_tensor((SCALE_WORDS[record],), Uint32)

        if cutlass.const_expr(work.plan.kind != "chosen"):
            index = work.index(query, place)
        page = work.page(seq, index)
        data, scale, there = work.record(span, place, index, page)
        index = work.index(query, place + KEYS)
        self._load_left(data, scale, there, part, left, scales)
        row_bytes = row * (TILE * 2)
        chunk = (2 * part ^ token) * 16  # of this lane's dims in a swizzled row; the next one's is 16 bytes away, by bit 4
        for j in cutlass.range(blocks, unroll=1):
            stage = j % 2
            free = (phases >> stage) & 1 ^ 1
            target = self.stages + stage * STAGE_BYTES + row_bytes
            self._load_right(data, there, part, right, rotary)
            bits = Uint32(cute.arch.vote_ballot_sync(there))
            place = place + KEYS
            page = work.page(seq, index)  # of the next block's key: asked for here and looked at after the left half

            cute.arch.mbarrier_wait(self.empty + 2 * stage, free)
            gains = factors(record, [scales[i] for i in range(SCALE_WORDS[record])], part, range(_CODED))
            for t in cutlass.range_constexpr(_HALF_TILES):
                _store(target + t * TILE_BYTES, chunk, decode(record, [left[i, t] for i in range(codes)], gains[t]))
            if lane == 0:
                ptx.store_byte(self.masks + stage * 8 + warp, bits)
            self._arrive(self.full + 2 * stage, lane)

            data, scale, there = work.record(span, place, index, page)
            there = there and j + 1 < blocks
            index = work.index(query, place + KEYS)
            self._load_left(data, scale, there, part, left, scales)

            cute.arch.mbarrier_wait(self.empty + 2 * stage + 1, free)
            target = target + _HALF_TILES * TILE_BYTES
            for t in cutlass.range_constexpr(_HALF_TILES - 1):
                pairs = decode(record, [right[i, t] for i in range(codes)], gains[_HALF_TILES + t])
                _store(target + t * TILE_BYTES, chunk, pairs)
            _store(target + (_HALF_TILES - 1) * TILE_BYTES, chunk, [rotary[i % 4, i // 4] for i in range(8)])
            self._arrive(self.full + 2 * stage + 1, lane)
            phases = phases ^ (1 << stage)
        return phases

    @cute.jit
    def _load_left(self, data: Any, scale: Any, there: Any, part: Any, left: Any, scales: Any) -> None:
        """Codes of the left half, and all scales, of a lane's key."""
        record = self.work.plan.record
        codes, words = CODE_WORDS[record], SCALE_WORDS[record]
        wanted = Int32(there)
        for at in cutlass.range_constexpr(0, words, min(words, 4)):
            _load(scale + at * 4, wanted, scales, at, min(words, 4))
        for t in cutlass.range_constexpr(_HALF_TILES):
            _load(data + part * (codes * 4) + t * (codes * 16), wanted, left[None, t], 0, codes)

    @cute.jit
    def _load_right(self, data: Any, there: Any, part: Any, right: Any, rotary: Any) -> None:
        """Codes and rotary dims of the right half."""
        codes = CODE_WORDS[self.work.plan.record]
        wanted = Int32(there)
        for t in cutlass.range_constexpr(_HALF_TILES - 1):
            _load(data + part * (codes * 4) + (_HALF_TILES + t) * (codes * 16), wanted, right[None, t], 0, codes)
        for i in cutlass.range_constexpr(2):
            _load(data + _CODED * codes * 16 + part * 32 + i * 16, wanted, rotary[None, i], 0, 4)

    @cute.jit
    def _arrive(self, barrier: Any, lane: Any) -> None:
        """This warp has written. Who reads fences: here that would be a MEMBAR, which waits for loads under way, too."""
        cute.arch.sync_warp()
        if lane == 0:
            cute.arch.mbarrier_arrive(barrier)

    # ---- plain records -------------------------------------------------------------------------------------------------
    @cute.jit
    def _copy(self, query: Any, span: Any, warp: Any, phases: Any) -> Any:
        work = self.work
        _, seq, _, _, first, blocks = span
        lane = cute.arch.lane_idx()
        sets = _KEYS // 4
        row, chunk = warp * _KEYS + lane // 8, lane % 8
        place = first * KEYS + row
        data = cute.make_rmem_tensor((sets,), cutlass.Int64)
        size, index = cute.make_rmem_tensor((sets,), Int32), cute.make_rmem_tensor((sets,), Int32)
        for s in cutlass.range_constexpr(sets):
            index[s] = work.index(query, place + 4 * s)
        for s in cutlass.range_constexpr(sets):
            page = work.page(seq, index[s])
            data[s], _, found = work.record(span, place + 4 * s, index[s], page)
            size[s] = cutlass.select_(found, Int32(16), Int32(0))
            index[s] = work.index(query, place + KEYS + 4 * s)
        for j in cutlass.range(blocks, unroll=1):
            stage = j % 2
            free = (phases >> stage) & 1 ^ 1
            pages = [work.page(seq, index[s]) for s in range(sets)]
            for h in cutlass.range_constexpr(HALVES):
                cute.arch.mbarrier_wait(self.empty + 2 * stage + h, free)
                target = self.stages + stage * STAGE_BYTES + h * _HALF_TILES * TILE_BYTES
                for s in cutlass.range_constexpr(sets):
                    at = row + 4 * s
                    swizzled = at * (TILE * 2) + (chunk ^ at % 8) * 16
                    for t in cutlass.range_constexpr(_HALF_TILES):
                        source = data[s] + (h * _HALF_TILES + t) * (TILE * 2) + chunk * 16
                        ptx.copy_or_zeros(target + t * TILE_BYTES + swizzled, source, size[s])
                cute.arch.cp_async_mbarrier_arrive_noinc(self.full + 2 * stage + h)
                if cutlass.const_expr(h == 0):
                    self._mask(stage, warp, lane, size)
                if lane == 0:
                    cute.arch.mbarrier_arrive(self.full + 2 * stage + h)
            place = place + KEYS
            for s in cutlass.range_constexpr(sets):
                data[s], _, found = work.record(span, place + 4 * s, index[s], pages[s])
                size[s] = cutlass.select_(found, Int32(16), Int32(0))
                index[s] = work.index(query, place + KEYS + 4 * s)
            phases = phases ^ (1 << stage)
        return phases

    @cute.jit
    def _mask(self, stage: Any, warp: Any, lane: Any, size: Any) -> None:
        """Bits of a warp's keys: lane 8 g has those of keys g and g + 4."""
        bits = Uint32(0)
        for s in cutlass.range_constexpr(_KEYS // 4):
            ballot = Uint32(cute.arch.vote_ballot_sync(size[s] != 0))
            for g in cutlass.range_constexpr(4):
                bits = bits | ((ballot >> (8 * g)) & 1) << (4 * s + g)
        if lane == 0:
            ptx.store_byte(self.masks + stage * 8 + warp, bits)


def _load(address: Any, wanted: Any, words: Any, at: int, count: int) -> None:
    for i, word in enumerate(ptx.load_or_zeros(address, wanted, count)):
        words[at + i] = word


def _store(row: Any, chunk: Any, pairs: list[Any]) -> None:
    """16 dims of a key: two chunks of its row, next to each other before the swizzle."""
    store_words(row + chunk, pairs[:4])
    store_words(row + (chunk ^ 16), pairs[4:])
