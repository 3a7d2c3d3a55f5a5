"""A multiplying warpgroup of `resident`: a unit's scores, softmax, sums and output, all in its own registers.

    Q   slices of 64 dims come from shared memory into registers before they are multiplied, so that their places are free
    S   64 heads x all keys: rows / 2 sums a thread
    P   BF16, half as many registers, which are the operand of the next product
    O   128 dims at a time: two places by turns would spill

A row's four lanes have eight dims each of every 32, next to each other: 16 bytes that are loaded, and stored, at once. `wgmma`
takes them for others, the four by four pairs of dims transposed; so the keys have their dims in that order, too
(`cache.unpack`, quads), and sums come out in it.

Without `from __future__ import annotations`: CuTeDSL reads the annotations themselves.
"""

from dataclasses import dataclass
from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int64, Uint32
from cutlass.cute.nvgpu import warpgroup

from dsv4lab.kernels._common.ptx import exp2, load_words, store_global
from dsv4lab.kernels._common.rings import arrive_with
from dsv4lab.kernels.attention.core.config import DIM, ROWS, STEP, TILE, TILES
from dsv4lab.kernels.attention.core.consume import LOWEST, WIDTH, score_product, sum_product
from dsv4lab.kernels.attention.core.merge import LOG2_E
from dsv4lab.kernels.attention.core.units import UNITS
from dsv4lab.kernels.cache.unpack.config import GROUP
from dsv4lab.kernels.quant.rows import encode as enc

_AHEAD = 2  # slices of queries in registers


@dataclass(frozen=True)
class Operands:
    """A thread's: slices of queries and probabilities, each as an operand and as words; keys and values; sums."""

    q: Any
    q_words: Any
    k: Any
    p: Any
    p_words: Any
    v: Any
    scores: Any
    output: Any


@dataclass(frozen=True)
class Attend:
    """slices (64, 64, stages), keys (of a group, dims, group): shared memory."""

    plan: cutlass.Constexpr
    slices: Any
    keys: Any
    sinks: Any
    out: Any
    factor: Any  # of scores, to base 2
    head_tiles: Any
    units: Any
    queries: Any

    def operands(self, thread: Any) -> Operands:
        groups = self.plan.rows // GROUP
        by_key = ((GROUP, groups), (TILE, 1), TILES)
        keys = cute.make_layout(by_key, stride=((TILE, GROUP * DIM), (1, 0), GROUP * TILE))
        by_dim = ((TILE, WIDTH // TILE), (GROUP, groups), DIM // WIDTH)
        values = cute.make_layout(by_dim, stride=((1, GROUP * TILE), (TILE, GROUP * DIM), WIDTH * GROUP))
        score, product = score_product(self.plan.rows, registers=True), sum_product(registers=True)
        part_s, part_o = score.get_slice(thread), product.get_slice(thread)
        q = [score.make_fragment_A(part_s.partition_shape_A((ROWS, TILE))) for _ in range(_AHEAD)]
        p = product.make_fragment_A(part_o.partition_shape_A((ROWS, self.plan.rows)))
        return Operands(
            q=q,
            q_words=[cute.recast_tensor(each, Uint32) for each in q],
            k=score.make_fragment_B(part_s.partition_B(cute.make_tensor(self.keys.iterator, keys))),
            p=p,
            p_words=cute.recast_tensor(p, Uint32),
            v=product.make_fragment_B(part_o.partition_B(cute.make_tensor(self.keys.iterator, values))),
            scores=cute.make_rmem_tensor(part_s.partition_shape_C((ROWS, self.plan.rows)), Float32),
            output=cute.make_rmem_tensor(part_o.partition_shape_C((ROWS, WIDTH)), Float32),
        )

    @cute.jit
    def run(self, me: Any, thread: Any, first: Any, count: Any) -> None:
        """Every other unit, from first + me on."""
        lane, warp = thread % 32, thread // 32
        f = self.operands(thread)
        heads = self.sinks.shape[0]
        for unit in cutlass.range(me, count, 2, unroll=1):
            query, tile = (first + unit) // self.head_tiles, (first + unit) % self.head_tiles
            head = tile * ROWS + warp * 16 + lane // 4  # the thread's first; the other is 8 on
            sinks = [self.sinks[cutlass.min(head + 8 * r, heads - 1)] * LOG2_E for r in range(2)]
            if unit > 0:
                self.units.wait_full(unit - 1)
                self.units.wait_read(unit - 1)
            self.units.wait_full(unit)
            place, turn, entries = (self.units.facts[unit % UNITS, i] for i in range(3))
            self._scores(f, unit, lane, warp)
            self._mask(f.scores, lane, place, turn, entries)
            weights = self._softmax(f, sinks)
            even = head - lane // 4 % 2
            base = self.out.iterator.toint() + (Int64(query * heads + even) * DIM + lane % 8 * 8) * 2
            product = sum_product(registers=True)
            for c in cutlass.range_constexpr(DIM // WIDTH):
                self._sums(f, product, c)
                if cutlass.const_expr(c == DIM // WIDTH - 1):
                    cute.arch.sync_warp()
                    if lane == 0:
                        cute.arch.mbarrier_arrive(self.units.done + unit % UNITS)
                self._store(f.output, c, lane, even, weights, base)

    # ---- products ------------------------------------------------------------------------------------------------------
    @cute.jit
    def _take(self, words: Any, turn: Any, lane: Any, warp: Any) -> None:
        """A slice of queries into registers; its place is free then."""
        self.queries.wait_full(turn)
        row = self.slices.iterator.toint() + self.queries.stage(turn) * (ROWS * TILE * 2) + (warp * 16 + lane // 4) * (TILE * 2)
        for r in cutlass.range_constexpr(2):
            for c in cutlass.range_constexpr(TILE // 32):
                found = load_words(row + r * (8 * TILE * 2) + ((4 * c + lane % 4) ^ (lane // 4)) * 16)
                for i in cutlass.range_constexpr(4):
                    words[4 * (2 * c + i // 2) + 2 * (i % 2) + r] = found[i]
        arrive_with(self.queries.empty(turn), lane, [words[i] for i in range(TILE // 4)])

    @cute.jit
    def _scores(self, f: cutlass.Constexpr, unit: Any, lane: Any, warp: Any) -> None:
        """S of a unit."""
        score = score_product(self.plan.rows, registers=True)
        score.set(warpgroup.Field.ACCUMULATE, False)
        for t in cutlass.range_constexpr(TILES):
            if cutlass.const_expr(t >= _AHEAD):
                warpgroup.wait_group(_AHEAD - 1)
            self._take(f.q_words[t % _AHEAD], unit * TILES + t, lane, warp)
            if t == TILES - 1 and lane == 0:
                cute.arch.mbarrier_arrive(self.units.read + unit % UNITS)
            warpgroup.fence()
            for j in cutlass.range_constexpr(TILE // STEP):
                cute.gemm(score, f.scores, f.q[t % _AHEAD][None, None, j], f.k[None, None, j, t], f.scores)
                score.set(warpgroup.Field.ACCUMULATE, True)
            warpgroup.commit_group()
        warpgroup.wait_group(0)

    @cute.jit
    def _sums(self, f: cutlass.Constexpr, product: Any, c: cutlass.Constexpr) -> None:
        """Dims 128 c and on of O = P V."""
        product.set(warpgroup.Field.ACCUMULATE, False)
        warpgroup.fence()
        for j in cutlass.range_constexpr(self.plan.rows // STEP):
            cute.gemm(product, f.output, f.p[None, None, j], f.v[None, None, j, c], f.output)
            product.set(warpgroup.Field.ACCUMULATE, True)
        warpgroup.commit_group()
        warpgroup.wait_group(0)

    # ---- softmax -------------------------------------------------------------------------------------------------------
    @cute.jit
    def _mask(self, scores: Any, lane: Any, place: Any, turn: Any, entries: Any) -> None:
        """Scores of keys that the query does not see are made the least there is.

        place: of the query among its sequence's tokens; turn: the ring's place of its block. The token at row e of the ring's
        place n is 16 (turn - n) + place % 16 - e tokens back, a ring more where n has yet to be overwritten.
        """
        ring = self.plan.ring
        column = lane % 4 * 2
        back = turn * STEP + place % STEP - column
        span = Uint32(cutlass.min(place, self.plan.window - 1))
        for n in cutlass.range_constexpr(self.plan.rows // GROUP):
            for e in cutlass.range_constexpr(2):
                if cutlass.const_expr(n * GROUP < ring * STEP):
                    far = back - (n * GROUP + e)
                    far = far if n * GROUP // STEP <= turn else far + ring * STEP
                    seen = Uint32(far) <= span
                else:
                    seen = column + (n * GROUP - ring * STEP + e) < entries
                for r in cutlass.range_constexpr(2):
                    at = 4 * n + 2 * r + e
                    scores[at] = scores[at] if seen else Float32(-Float32.inf)

    @cute.jit
    def _softmax(self, f: cutlass.Constexpr, sinks: Any) -> Any:
        """P of a unit, relative to its rows' maxima; the inverse sums of both rows."""
        scores, words = f.scores, f.p_words
        weights = []
        for r in cutlass.range_constexpr(2):
            high = Float32(LOWEST)
            for j in cutlass.range_constexpr(self.plan.rows // GROUP):
                high = cute.arch.fmax(high, cute.arch.fmax(scores[4 * j + 2 * r], scores[4 * j + 2 * r + 1]))
            for offset in (1, 2):
                high = cute.arch.fmax(high, cute.arch.shuffle_sync_bfly(high, offset))
            high = high * self.factor
            total = Float32(0.0)
            for j in cutlass.range_constexpr(self.plan.rows // GROUP):
                low = exp2(scores[4 * j + 2 * r] * self.factor - high)
                up = exp2(scores[4 * j + 2 * r + 1] * self.factor - high)
                total = total + (low + up)
                words[2 * j + r] = enc.pack_bf16(low, up)
            for offset in (1, 2):
                total = total + cute.arch.shuffle_sync_bfly(total, offset)
            weights.append(1.0 / (total + exp2(sinks[r] - high)))
        return weights

    # ---- output --------------------------------------------------------------------------------------------------------
    @cute.jit
    def _store(self, output: Any, c: cutlass.Constexpr, lane: Any, head: Any, weights: Any, base: Any) -> None:
        """Some dims of the thread's two heads in BF16. Of 64 the four lanes of a head have twice 64 bytes; those of the next
        head take half of it and give half of theirs, so that eight lanes store 128 bytes that are next to each other.

        head: the even one of the two; base: of the lane's first bytes of it.
        """
        odd = lane // 4 % 2 == 1
        for r in cutlass.range_constexpr(2):
            for n in cutlass.range_constexpr(WIDTH // TILE):
                halves = []
                for c32 in cutlass.range_constexpr(2):
                    words = []
                    for i in cutlass.range_constexpr(4):
                        at = 4 * (8 * n + 4 * c32 + i) + 2 * r
                        words.append(enc.pack_bf16(output[at] * weights[r], output[at + 1] * weights[r]))
                    halves.append(words)
                even, late = [], []
                for i in cutlass.range_constexpr(4):
                    got = cute.arch.shuffle_sync_bfly(cutlass.select_(odd, halves[0][i], halves[1][i]), 4)
                    even.append(cutlass.select_(odd, got, halves[0][i]))
                    late.append(cutlass.select_(odd, halves[1][i], got))
                at = base + (8 * r * DIM + c * WIDTH + n * TILE) * 2
                if head + 8 * r < self.sinks.shape[0]:
                    store_global(at, even)
                if head + 8 * r + 1 < self.sinks.shape[0]:
                    store_global(at + DIM * 2, late)
