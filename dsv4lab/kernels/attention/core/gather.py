"""The gathering warps: keys of every block, found by index, made BF16 and laid out for the tensor cores.

A stage holds a block by halves of the dims, each half by groups of eight keys, a group as four tiles of 64 dims: eight rows of
128 bytes in the 128-byte swizzle. So the same bytes are the K-major operand of Q K^T and the MN-major operand of P V.

Packed records, where no pair of CTAs decodes them (`pair`): a warp has 8 keys of a block; four lanes have a key, each 16 dims
of every tile. A whole block is in flight while the one before it is decoded: the left half and all scales by `cp.async` into
shared memory, where 17 KB are free, the right half into 20 registers a lane. Indices, three blocks ahead, and pages, two ahead,
come with the left half. So there are two kinds of loads, and neither waits for the other: loads into registers share six
scoreboards a warp, and ptxas gives the right half's also to indices and to spilled registers if there are any, whose turn then
takes a whole latency. 470 instructions a warp and block of FP8, 520 of NVFP4.

Plain records: `cp.async` of 16 bytes, eight lanes a key. Keys that are none are zeros, whatever memory holds, and cleared in
the block's mask.

Without `from __future__ import annotations`: CuTeDSL reads the annotations themselves.
"""

from dataclasses import dataclass
from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Int32, Uint32

from dsv4lab.kernels._common.ptx import copy_or_zeros, load_words, store_words
from dsv4lab.kernels.attention.core import ptx
from dsv4lab.kernels.attention.core.config import GATHER_WARPS, HALVES, KEYS, TILE, TILES
from dsv4lab.kernels.attention.core.decode import CODE_WORDS, SCALE_WORDS, decode, factors
from dsv4lab.kernels.cache.unpack.config import GROUP

ROW_BYTES = TILE * 2
TILE_BYTES = GROUP * ROW_BYTES
GROUP_BYTES = TILES // HALVES * TILE_BYTES  # of half the dims
HALF_BYTES = KEYS // GROUP * GROUP_BYTES
STAGE_BYTES = HALVES * HALF_BYTES
_KEYS = KEYS // GATHER_WARPS  # of a block that a warp has: four lanes have one
_HALF_TILES = TILES // HALVES
_EARLY = 1  # tiles that are decoded before there is a place for them: 1-2 % faster than none; two spill
_CODED = TILES - 1  # tiles of codes; the last one is rotary, in BF16
_LANES = GATHER_WARPS * 32


def row_place(row: Any) -> Any:
    """Where the row of a key begins in the first tile of a half."""
    return row // GROUP * GROUP_BYTES + row % GROUP * ROW_BYTES


def packed_words(record: str) -> int:
    """Of shared memory for what comes of a block while the one before is decoded: codes of the left half, scales; and a page
    and an index a key, of later blocks. 0 for plain records, which go to their stage at once.
    """
    if record == "plain":
        return 0
    return _LANES * _HALF_TILES * CODE_WORDS[record] + KEYS * (SCALE_WORDS[record] + 2)


@dataclass(frozen=True)
class Gather:
    """Where keys go. stages, packed, masks: addresses of shared memory, packed with `packed_words`. full, empty: barriers, one
    for each half of each stage.
    """

    work: Any
    stages: Any
    packed: Any
    masks: Any
    full: Any
    empty: Any

    @property
    def arrivals(self) -> int:
        """That fill a half: of every warp, and of every thread whose copies come to it on their own."""
        return GATHER_WARPS * 33 if self.work.plan.record == "plain" else GATHER_WARPS

    def span(self, query: Any, part: Any) -> tuple[Any, ...]:
        """What an item attends to."""
        return self.work.span(query, part)

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

    def leave(self, phases: Any) -> None:
        """After the last item: no other CTA does anything here."""

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
        right = cute.make_rmem_tensor((codes, _HALF_TILES - 1), Uint32)
        rotary = cute.make_rmem_tensor((4, 2), Uint32)
        slot = self.packed + (warp * 32 + lane) * (codes * 4)  # of a lane's codes of the first tile
        scales = self.packed + _HALF_TILES * _LANES * codes * 4 + row * (SCALE_WORDS[record] * 4)
        finds = self.packed + (packed_words(record) - 2 * KEYS + row) * 4  # a page; 64 words on, an index

        if cutlass.const_expr(work.plan.kind != "chosen"):
            index = work.index(query, place)
        page = work.page(seq, index)
        near = work.index(query, place + KEYS)  # of the next block
        data, scale, there = work.record(span, place, index, page)
        copy_codes(record, data, scale, there, part, slot, scales, codes, _HALF_TILES)
        self._load_right(data, there, part, right, rotary)
        if lane < _KEYS:
            work.copy_finds(query, seq, near, place + 2 * KEYS, finds, KEYS * 4)
        cute.arch.cp_async_commit_group()
        begin = row_place(row)
        chunk = (2 * part ^ token) * 16  # of this lane's dims in a swizzled row; the next one's is 16 bytes away, by bit 4
        for j in cutlass.range(blocks, unroll=1):
            stage = j % 2
            free = (phases >> stage) & 1 ^ 1
            target = self.stages + stage * STAGE_BYTES + begin
            bits = Uint32(cute.arch.vote_ballot_sync(there))

            cute.arch.cp_async_wait_group(0)
            cute.arch.sync_warp()  # a lane has copied the codes that it reads, but others its scales
            gains = factors(record, read_scales(record, scales), part, range(_CODED))
            # What registers hold is decoded before there is a place for it.
            early = [decode(record, _words(slot, t, codes), gains[t]) for t in range(_EARLY)]
            cute.arch.mbarrier_wait(self.empty + 2 * stage, free)
            for t in cutlass.range_constexpr(_HALF_TILES):
                pairs = early[t] if t < _EARLY else decode(record, _words(slot, t, codes), gains[t])
                _store(target + t * TILE_BYTES, chunk, pairs)
            if lane == 0:
                ptx.store_byte(self.masks + stage * 8 + warp, bits)
            self._arrive(self.full + 2 * stage, lane)

            place = place + KEYS
            page, far = work.finds(finds, place + KEYS, KEYS * 4)
            cute.arch.sync_warp()  # the next ones go to the same place
            data, scale, there = work.record(span, place, near, page)
            there = there and j + 1 < blocks
            near = far
            if j + 1 < blocks:  # as a branch, before which ptxas does not wait for the right half
                copy_codes(record, data, scale, there, part, slot, scales, codes, _HALF_TILES)
                if lane < _KEYS:
                    work.copy_finds(query, seq, near, place + 2 * KEYS, finds, KEYS * 4)
            cute.arch.cp_async_commit_group()

            cute.arch.mbarrier_wait(self.empty + 2 * stage + 1, free)
            target = target + HALF_BYTES
            for t in cutlass.range_constexpr(_HALF_TILES - 1):
                pairs = decode(record, [right[i, t] for i in range(codes)], gains[_HALF_TILES + t])
                _store(target + t * TILE_BYTES, chunk, pairs)
            _store(target + (_HALF_TILES - 1) * TILE_BYTES, chunk, [rotary[i % 4, i // 4] for i in range(8)])
            self._arrive(self.full + 2 * stage + 1, lane)
            phases = phases ^ (1 << stage)

            self._load_right(data, there, part, right, rotary)
        cute.arch.cp_async_wait_group(0)  # of an item without blocks, too: the next one copies to the same place
        return phases

    @cute.jit
    def _load_right(self, data: Any, there: Any, part: Any, right: Any, rotary: Any) -> None:
        """Codes and rotary dims of the right half."""
        codes = CODE_WORDS[self.work.plan.record]
        wanted = Int32(there)
        for t in cutlass.range_constexpr(_HALF_TILES - 1):
            load_words_into(data + part * (codes * 4) + (_HALF_TILES + t) * (codes * 16), wanted, right[None, t], codes)
        for i in cutlass.range_constexpr(2):
            load_words_into(data + _CODED * codes * 16 + part * 32 + i * 16, wanted, rotary[None, i], 4)

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
                target = self.stages + stage * STAGE_BYTES + h * HALF_BYTES
                for s in cutlass.range_constexpr(sets):
                    at = row + 4 * s
                    swizzled = row_place(at) + (chunk ^ at % GROUP) * 16
                    for t in cutlass.range_constexpr(_HALF_TILES):
                        source = data[s] + (h * _HALF_TILES + t) * ROW_BYTES + chunk * 16
                        copy_or_zeros(target + t * TILE_BYTES + swizzled, source, size[s], 16)
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


@cute.jit
def copy_codes(
    record: cutlass.Constexpr,
    data: Any,
    scale: Any,
    there: Any,
    part: Any,
    slot: Any,
    scales: Any,
    words: cutlass.Constexpr,
    tiles: cutlass.Constexpr,
) -> None:
    """Codes of a lane's part of a key, so many words of each of the first tiles, and all of the key's scales: on their way to
    shared memory, zeros if there is no such key.
    """
    count = words * 4
    size = cutlass.select_(there, Int32(count), Int32(0))
    for t in cutlass.range_constexpr(tiles):
        copy_or_zeros(slot + t * (_LANES * count), data + part * count + t * (CODE_WORDS[record] * 16), size, count)
    if part < SCALE_WORDS[record] // 2:
        copy_or_zeros(scales + part * 8, scale + part * 8, cutlass.select_(there, Int32(8), Int32(0)), 8)


def load_words_into(address: Any, wanted: Any, words: Any, count: int) -> None:
    """Words of global memory, zeros if they are not wanted."""
    for i, word in enumerate(ptx.load_or_zeros(address, wanted, count)):
        words[i] = word


def _words(slot: Any, t: int, codes: int) -> Any:
    """A lane's codes of a tile of the left half."""
    address = slot + t * (_LANES * codes * 4)
    return load_words(address) if codes == 4 else ptx.load_pair(address)


def read_scales(record: str, address: Any) -> list[Any]:
    """All scales of a key."""
    if SCALE_WORDS[record] == 2:
        return [*ptx.load_pair(address)]
    return [word for at in range(0, SCALE_WORDS[record], 4) for word in load_words(address + at * 4)]


def _store(row: Any, chunk: Any, pairs: list[Any]) -> None:
    """16 dims of a key: two chunks of its row, next to each other before the swizzle."""
    store_words(row + chunk, pairs[:4])
    store_words(row + (chunk ^ 16), pairs[4:])
