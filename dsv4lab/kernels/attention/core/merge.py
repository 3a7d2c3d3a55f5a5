"""The parts of a query's keys put together by the cluster of CTAs that have them: what `combine` does, without its kernel.

When a CTA's products are done, its shared memory of queries, keys and probabilities is free, and it says so to the others. Each
of P sends every other its share of the dims, O / sum in float32, and log2(sum) + M, by `st.async`, whose bytes a barrier there
counts; sums what came and what is its own; and writes 512 / P dims of the output. Sums are `combine`'s, in its order: the same
bits.

A thread sends to the same thread of another CTA: group j of its products, of 8 dims, is 16 bytes of each of a warpgroup's
threads, next to each other. Groups go in pairs, which are 32 bytes of a row of the output, first to the next CTA, last to the
one before, so that none gets from all at once. A CTA sends (P - 1) / P of 128 KB; it costs 0.15 us a part (H200), where a
second kernel takes 2 to 10.

Without `from __future__ import annotations`: CuTeDSL reads the annotations themselves.
"""

from dataclasses import dataclass
from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64

from dsv4lab.kernels._common.ptx import exp2, load_words, log2, store_global, store_words
from dsv4lab.kernels.attention.core import ptx
from dsv4lab.kernels.attention.core.config import CLUSTER, DIM, HALVES, ROWS, WARPGROUP
from dsv4lab.kernels.quant.rows import encode as enc

LOG2_E = 1.4426950408889634
_HALF = DIM // HALVES
_PAIRS = _HALF // 16  # of groups, of a warpgroup
_GROUP_BYTES = WARPGROUP * 16
_CHUNK = 4  # pairs that are passed over together
_AHEAD = 2  # pairs, and parts of each, that are read together
_QUAD = 4  # lanes that have the same rows


@dataclass(frozen=True)
class Merge:
    """work, sinks, out: as the kernel has them. place: of 208 KB, an address. barriers: two, which say that what others send
    has come, and that all others may be sent to.
    """

    work: Any
    place: Any
    barriers: Any
    sinks: Any
    out: Any

    @cute.jit
    def run(self, me: cutlass.Constexpr, thread: Any, where: Any, output: Any, high: Any, whole: Any) -> None:
        """By both warpgroups, when all products of this CTA are done. high, whole: the part's maxima and sums, of two rows."""
        query, tile, part = where
        lane, warp = thread % 32, thread // 32
        parts, heads = self.work.parts, self.sinks.shape[0]
        first, end = self._share(part)
        came, free = self.barriers, self.barriers + 1
        if thread < parts and me == 0:
            if thread == part:
                size = (parts - 1) * ((end - first) * (HALVES * 2 * _GROUP_BYTES) + ROWS * 4)
                cute.arch.mbarrier_arrive_and_expect_tx(came, size)
            else:
                ptx.arrive_there(free.toint() + self._there(thread))
        row = warp * 16 + lane // 4
        head = tile * ROWS + row
        sinks = [self.sinks[cutlass.min(head + 8 * r, heads - 1)] * LOG2_E for r in range(2)]
        weights = [cutlass.select_(whole[r] > 0.0, 1.0 / whole[r], Float32(0.0)) for r in range(2)]
        for j in cutlass.range_constexpr(_HALF // 8):
            for i in cutlass.range_constexpr(4):
                output[4 * j + i] = output[4 * j + i] * weights[i // 2]
        logs = [high[r] + log2(whole[r]) for r in range(2)]
        notes = self._slot(0, parts, 0) + row * 4
        mine = self._slot(me, part, thread)
        cute.arch.mbarrier_wait(free, 0)

        for k in cutlass.range(1, parts, 1, unroll=1):
            other = part + k
            other = cutlass.select_(other >= parts, other - parts, other)
            there = self._there(other)
            barrier = came.toint() + there
            if lane % _QUAD == 0 and me == 0:
                for r in cutlass.range_constexpr(2):
                    ptx.send(notes + there + part * (ROWS * 4) + r * 32, [logs[r]], barrier)
            self._send(output, other, mine + there, barrier)
        self._send(output, part, mine, None)  # its own it needs no barrier for: who writes reads
        cute.arch.mbarrier_wait(came, 0)
        shares = notes + (1 + me) * (CLUSTER * ROWS * 4)
        begin = self._shares(lane, part, logs, notes, shares, sinks)
        column = me * _HALF + first * 16 + lane % 2 * 8 + lane % 4 // 2 * 4
        base = self.out.iterator.toint() + (Int64(query * heads + head) * DIM + column) * 2
        self._sum(me, thread, end - first, shares, begin, base, head)

    @cute.jit
    def _send(self, output: Any, part: Any, slot: Any, barrier: Any) -> None:
        """A thread's pairs of a part's share, from `slot` on: to another CTA, or where there is no barrier to its own."""
        first, end = self._share(part)
        share = cute.arch.make_warp_uniform((Int32(1) << end) - (Int32(1) << first))  # branches are the whole warp's
        start = slot - first * (2 * _GROUP_BYTES)
        for c in cutlass.range_constexpr(0, _PAIRS, _CHUNK):
            if share & ((1 << _CHUNK) - 1 << c) != 0:
                for q in cutlass.range_constexpr(c, c + _CHUNK):
                    if share & (1 << q) != 0:
                        for g in cutlass.range_constexpr(2):
                            words = [output[4 * (2 * q + g) + i] for i in range(4)]
                            at = start + (2 * q + g) * _GROUP_BYTES
                            if cutlass.const_expr(barrier is None):
                                store_words(at, words)
                            else:
                                ptx.send(at, words, barrier)

    def _there(self, part: Any) -> Any:
        """How far it is to the shared memory of the CTA that has a part; in pairs, that part for the same heads."""
        return ptx.to_peer(Int32(self.place), part * self.work.plan.ctas + self.work.rank)

    def _share(self, part: Any) -> tuple[Any, Any]:
        """Which of a warpgroup's pairs a part's CTA puts together."""
        return part * _PAIRS // self.work.parts, (part + 1) * _PAIRS // self.work.parts

    def _slot(self, me: Any, part: Any, thread: Any) -> Any:
        """Where a CTA has what comes of a part, by its warpgroups, for one of this CTA's threads; after all parts: notes."""
        most = cute.ceil_div(_PAIRS, self.work.parts)
        return self.place + (part * HALVES + me) * most * (2 * _GROUP_BYTES) + thread * 16

    @cute.jit
    def _shares(self, lane: Any, part: Any, logs: Any, notes: Any, shares: Any, sinks: Any) -> Any:
        """Weights of all parts, where `shares` says, and the sinks' as the first of their sum, of two rows.

        Of the four lanes of a row each has every fourth part.
        """
        rounds = -(-CLUSTER // _QUAD)
        parts = self.work.parts
        begin, held = cute.make_rmem_tensor((2,), Float32), cute.make_rmem_tensor((rounds,), Float32)
        for r in cutlass.range_constexpr(2):
            most = logs[r]
            for i in cutlass.range_constexpr(rounds):
                s = i * _QUAD + lane % _QUAD
                held[i] = logs[r]
                if s < parts and s != part:
                    held[i] = ptx.load_float(notes + s * (ROWS * 4) + r * 32)
                most = cute.arch.fmax(most, held[i])
            for offset in (1, 2):
                most = cute.arch.fmax(most, cute.arch.shuffle_sync_bfly(most, offset))
            for i in cutlass.range_constexpr(rounds):
                s = i * _QUAD + lane % _QUAD
                if s < parts:
                    ptx.store_word(shares + s * (ROWS * 4) + r * 32, exp2(held[i] - most))
            begin[r] = exp2(sinks[r] - most)
        cute.arch.sync_warp()
        return begin

    @cute.jit
    def _sum(self, me: cutlass.Constexpr, thread: Any, count: Any, shares: Any, begin: Any, base: Any, head: Any) -> None:
        """This CTA's pairs of all parts, to the output."""
        parts, heads = self.work.parts, self.sinks.shape[0]
        odd = thread % 2
        step = self._slot(me, 1, thread) - self._slot(me, 0, thread)  # from part to part
        total = cute.make_rmem_tensor((4, 2, _AHEAD), Float32)  # of a thread's group: of a pair's
        whole = cute.make_rmem_tensor((2,), Float32)
        for pair in cutlass.range(0, count, _AHEAD, unroll=1):
            total.fill(0.0)
            for r in cutlass.range_constexpr(2):
                whole[r] = begin[r]
            starts = [self._slot(me, 0, thread) + cutlass.min(pair + i, count - 1) * (2 * _GROUP_BYTES) for i in range(_AHEAD)]
            for s in cutlass.range(0, parts, _AHEAD, unroll=1):
                found, weight = [], []
                for a in cutlass.range_constexpr(_AHEAD):
                    at = cutlass.min(s + a, parts - 1)
                    for r in cutlass.range_constexpr(2):
                        share = ptx.load_float(shares + at * (ROWS * 4) + r * 32)
                        weight.append(cutlass.select_(s + a < parts, share, Float32(0.0)))
                    for i in cutlass.range_constexpr(_AHEAD):
                        for g in cutlass.range_constexpr(2):
                            found.append(load_words(starts[i] + at * step + g * _GROUP_BYTES))
                for a in cutlass.range_constexpr(_AHEAD):
                    for r in cutlass.range_constexpr(2):
                        whole[r] = whole[r] + weight[2 * a + r]
                    for i in cutlass.range_constexpr(_AHEAD):
                        for g in cutlass.range_constexpr(2):
                            for e in cutlass.range_constexpr(4):
                                value = found[(a * _AHEAD + i) * 2 + g][e].bitcast(Float32)
                                total[e, g, i] = total[e, g, i] + weight[2 * a + e // 2] * value
            for r in cutlass.range_constexpr(2):
                scale = 1.0 / whole[r]
                for i in cutlass.range_constexpr(_AHEAD):
                    halves = [enc.pack_bf16(total[2 * r, g, i] * scale, total[2 * r + 1, g, i] * scale) for g in range(2)]
                    words = exchange(odd == 1, halves)
                    if head + 8 * r < heads and pair + i < count:
                        store_global(base + (pair + i) * 32 + r * (8 * DIM * 2), words)


def exchange(odd: Any, words: list[Any]) -> list[Any]:
    """Two neighbouring lanes' columns of two groups of eight -> of the first lane's group four, or of the second's."""
    given = cute.arch.shuffle_sync_bfly(cutlass.select_(odd, words[0], words[1]), 1)
    return [cutlass.select_(odd, given, words[0]), cutlass.select_(odd, words[1], given)]
