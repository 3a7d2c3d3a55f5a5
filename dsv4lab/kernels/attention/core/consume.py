"""The two multiplying warpgroups: S = Q K^T, softmax, O += P V, for 64 query heads.

A warpgroup keeps half of O's dims, 64 x 256 sums in float32, 128 registers a thread. The scores of a block are computed once:
warpgroup 0 has those of even blocks, 1 of odd ones. Each multiplies its own probabilities from registers and the other's from
shared memory, so that every block is seen by both, in order:

    warpgroup 0    S0 | softmax 0 | P0 V0 | P1 V1 | S2 ..          warpgroup 1    S1 | P0 V0 while softmax 1 | P1 V1 | S3 ..

S2 and S3 are under way on the tensor cores while the other warpgroup is at its exponentials. Probabilities go with the row's
maximum up to their block; O is scaled only where that grew by more than 2^8 (probabilities then stay below 2^8, exact enough in
BF16, whose precision does not depend on size), which is rare after the first block.

    probable[s]   named barriers: probabilities and maxima of stage s are in shared memory
    scored        the item's first scores are done
    summed        both warpgroups' sums of probabilities are in shared memory
    empty         half h of a stage is free when warpgroup h has multiplied it: the other has needed it for scores before that.
                  So a stage that is filled again says, too, that its probabilities have been read.

Without `from __future__ import annotations`: CuTeDSL reads the annotations themselves.
"""

from dataclasses import dataclass
from typing import Any

import cutlass
import cutlass.cute as cute
import cutlass.utils.hopper_helpers as hopper
from cutlass import BFloat16, Boolean, Float32, Int32, Int64, Uint32
from cutlass.cute.nvgpu import OperandMajorMode, warpgroup

from dsv4lab.kernels._common.ptx import exp2, load_words, log2, store_global, store_matrices
from dsv4lab.kernels.attention.core import ptx
from dsv4lab.kernels.attention.core.config import DIM, HALVES, KEYS, ROWS, TILE, TILES, WARPGROUP
from dsv4lab.kernels.attention.core.merge import LOG2_E, Merge
from dsv4lab.kernels.quant.rows import encode as enc

_PROBABLE, _SUMMED, _SCORED = 1, 3, 4  # named barriers: 1 and 2, one a stage; an item's end; its first scores
LOWEST = -1e30  # a maximum before the first key: its distance to anything is a number
_SLACK = 8.0  # by which scores may exceed the maximum they are taken against, as a power of two
_HALF = DIM // HALVES
WIDTH = 128  # of a product of probabilities and values: with 256 ptxas asks for more registers than 512 threads start with
_HALF_TILES = TILES // HALVES
_GROUPS = KEYS // 8  # column groups of the scores, four values of a thread each
_STEPS = KEYS // 16  # of a `wgmma` along the keys


def score_product(keys: int = KEYS, *, registers: bool = False) -> Any:
    """Q K^T of so many keys: Q from registers or from shared memory."""
    source = warpgroup.OperandSource.RMEM if registers else warpgroup.OperandSource.SMEM
    k = OperandMajorMode.K
    return hopper.make_trivial_tiled_mma(BFloat16, BFloat16, k, k, Float32, (1, 1, 1), (ROWS, keys), source)


def sum_product(*, registers: bool) -> Any:
    """P V, `WIDTH` dims: P from registers or from shared memory."""
    source = warpgroup.OperandSource.RMEM if registers else warpgroup.OperandSource.SMEM
    k, mn = OperandMajorMode.K, OperandMajorMode.MN
    product = hopper.make_trivial_tiled_mma(BFloat16, BFloat16, k, mn, Float32, (1, 1, 1), (ROWS, WIDTH), source)
    product.set(warpgroup.Field.ACCUMULATE, True)
    return product


@dataclass(frozen=True)
class Fragments:
    """A thread's operands, and its sums. mine, words: probabilities as an operand and as words; high, total: maxima and sums of
    its two rows, g and g + 8; shrink: by what these have just shrunk.
    """

    q: Any
    k: Any
    p: Any
    v: Any
    scores: Any
    output: Any
    mine: Any
    words: Any
    high: Any
    total: Any
    shrink: Any


@dataclass(frozen=True)
class Consume:
    """Operands and barriers.

    tiles (of queries), keys, values, probabilities: tensors of shared memory; maxima (2, 64), sums (2, 2, 64) f32; masks: an
    address; queries: barriers full and empty, and `Merge`'s; counts (1,): blocks of the item whose queries are there.
    """

    work: Any
    tiles: Any
    keys: Any
    values: Any
    probabilities: Any
    maxima: Any
    sums: Any
    masks: Any
    full: Any
    empty: Any
    queries: Any
    counts: Any
    factor: Any  # of scores, to base 2
    sinks: Any
    out: Any
    partial: Any
    lse: Any
    peer: Any  # in a pair, how far it is to the other CTA's shared memory

    def fragments(self, thread: Any) -> Fragments:
        """A thread's parts of all operands; its sums are not set."""
        score, own, other = score_product(), sum_product(registers=True), sum_product(registers=False)
        part_s, part_o = score.get_slice(thread), own.get_slice(thread)
        mine = own.make_fragment_A(part_o.partition_shape_A((ROWS, KEYS)))
        return Fragments(
            q=score.make_fragment_A(part_s.partition_A(self.tiles)),
            k=score.make_fragment_B(part_s.partition_B(self.keys)),
            p=other.make_fragment_A(other.get_slice(thread).partition_A(self.probabilities)),
            v=own.make_fragment_B(part_o.partition_B(self.values)),
            scores=cute.make_rmem_tensor(part_s.partition_shape_C((ROWS, KEYS)), Float32),
            output=cute.make_rmem_tensor(part_o.partition_shape_C((ROWS, _HALF)), Float32),
            mine=mine,
            words=cute.recast_tensor(mine, Uint32),
            high=cute.make_rmem_tensor((2,), Float32),
            total=cute.make_rmem_tensor((2,), Float32),
            shrink=cute.make_rmem_tensor((2,), Float32),
        )

    @cute.jit
    def run(self, me: cutlass.Constexpr, thread: Any, first: Any, items: Any, stride: Any) -> None:
        """Items first, first + stride, .. by warpgroup `me`, which scores the blocks of its stage."""
        lane, warp = thread % 32, thread // 32
        f = self.fragments(thread)
        theirs = 1 - me
        phase, turn = Int32(0), Int32(0)  # of the stage; of the items
        for item in cutlass.range(first, items, stride, unroll=1):
            f.output.fill(0.0)
            f.high.fill(LOWEST)
            f.total.fill(0.0)
            blocks = self._blocks(turn)
            if blocks <= me and lane == 0:
                cute.arch.mbarrier_arrive(self.queries + 1)  # has no need of them
            # First and last blocks apart: products under way must be the same wherever a turn of a loop comes from, or ptxas
            # waits for every one of them.
            if cutlass.const_expr(me == 0):
                if blocks > 0:
                    self._score(f, me, phase)
                    phase = phase ^ 1
                    warpgroup.wait_group(0)
                    if blocks > 1:
                        cute.arch.barrier_arrive(barrier_id=_SCORED, number_of_threads=2 * WARPGROUP)
                    if blocks <= 2 and lane == 0:
                        cute.arch.mbarrier_arrive(self.queries + 1)
                    self._probabilities(f, me, lane, warp)
                    self._add(f, me, me)
                    warpgroup.wait_group(0)
                    self._release(lane, me, me)
                for i in cutlass.range((blocks - 1) // 2, unroll=1):
                    self._follow(f, theirs, lane, warp)
                    self._rescale(f)
                    self._add(f, me, theirs)
                    self._score(f, me, phase)
                    phase = phase ^ 1
                    warpgroup.wait_group(1)
                    self._release(lane, theirs, me)
                    warpgroup.wait_group(0)
                    if 2 * i + 4 >= blocks and lane == 0:
                        cute.arch.mbarrier_arrive(self.queries + 1)
                    self._probabilities(f, me, lane, warp)
                    self._rescale(f)
                    self._add(f, me, me)
                    warpgroup.wait_group(0)
                    self._release(lane, me, me)
                if blocks > 0 and blocks % 2 == 0:
                    self._last(f, me, lane, warp)
            else:
                if blocks > 1:  # not beside the other's first scores, which all wait for, but beside its softmax
                    cute.arch.barrier(barrier_id=_SCORED, number_of_threads=2 * WARPGROUP)
                for i in cutlass.range(blocks // 2, unroll=1):
                    self._score(f, me, phase)
                    phase = phase ^ 1
                    self._follow(f, theirs, lane, warp)
                    self._rescale(f)
                    self._add(f, me, theirs)
                    warpgroup.wait_group(1)
                    if 2 * i + 3 >= blocks and lane == 0:
                        cute.arch.mbarrier_arrive(self.queries + 1)
                    self._probabilities(f, me, lane, warp)
                    warpgroup.wait_group(0)
                    self._release(lane, theirs, me)
                    self._rescale(f)
                    self._add(f, me, me)
                    warpgroup.wait_group(0)
                    self._release(lane, me, me)
                if blocks % 2 == 1:
                    self._last(f, me, lane, warp)
            warpgroup.wait_group(0)  # of nothing, which ptxas does not know
            self._finish(f, me, lane, warp, self.work.item(item), turn)
            turn = turn ^ 1

    @cute.jit
    def _blocks(self, turn: Any) -> Any:
        """An item's number of blocks, when its queries are there."""
        cute.arch.mbarrier_wait(self.queries, turn)
        blocks = self.counts[0]
        cute.arch.sync_warp()  # a lane arrives for all: here all have read the count, in `_release` masks and maxima
        return blocks

    @cute.jit
    def _last(self, f: cutlass.Constexpr, me: cutlass.Constexpr, lane: Any, warp: Any) -> None:
        """The item's last block, which the other warpgroup scored."""
        self._follow(f, 1 - me, lane, warp)
        self._rescale(f)
        self._add(f, me, 1 - me)
        warpgroup.wait_group(0)
        self._release(lane, 1 - me, me)

    # ---- products ------------------------------------------------------------------------------------------------------
    @cute.jit
    def _score(self, f: cutlass.Constexpr, me: cutlass.Constexpr, phase: Any) -> None:
        """S of this warpgroup's stage, half by half as it comes; not waited for."""
        score = score_product()
        score.set(warpgroup.Field.ACCUMULATE, False)
        at = me * TILES
        for h in cutlass.range_constexpr(HALVES):
            cute.arch.mbarrier_wait(self.full + 2 * me + h, phase)
            self._see()
            warpgroup.fence()
            for t in cutlass.range_constexpr(_HALF_TILES * h, _HALF_TILES * (h + 1)):
                for j in cutlass.range_constexpr(4):
                    cute.gemm(score, f.scores, f.q[None, None, j, t], f.k[None, None, j, at + t], f.scores)
                    score.set(warpgroup.Field.ACCUMULATE, True)
        warpgroup.commit_group()

    def _see(self) -> None:
        """Keys were written by ordinary stores or `cp.async`; their writers leave the fence for the tensor cores to us."""
        cute.arch.fence_view_async_shared()

    @cute.jit
    def _add(self, f: cutlass.Constexpr, me: cutlass.Constexpr, whose: cutlass.Constexpr) -> None:
        """O += P V, of half the dims of the stage that a warpgroup scored; not waited for."""
        place = HALVES * whose + me
        product = sum_product(registers=whose == me)
        warpgroup.fence()
        for j in cutlass.range_constexpr(_STEPS):
            p = f.mine[None, None, j] if whose == me else f.p[None, None, j, whose]
            cute.gemm(product, f.output, p, f.v[None, None, j, place], f.output)
        warpgroup.commit_group()

    @cute.jit
    def _release(self, lane: Any, stage: cutlass.Constexpr, half: cutlass.Constexpr) -> None:
        """Half of a stage may be filled again; in a pair each CTA fills the other's, too."""
        cute.arch.sync_warp()
        if lane == 0:
            if cutlass.const_expr(self.work.plan.ctas == 2):
                ptx.arrive_there((self.empty + 2 * stage + half).toint() + self.peer)
            cute.arch.mbarrier_arrive(self.empty + 2 * stage + half)

    @cute.jit
    def _rescale(self, f: cutlass.Constexpr) -> None:
        """O to the new maxima, where they changed."""
        output, shrink = f.output, f.shrink
        if cute.arch.vote_any_sync(Boolean(shrink[0] != 1.0 or shrink[1] != 1.0)):
            for j in cutlass.range_constexpr(_HALF // 8):
                for i in cutlass.range_constexpr(4):
                    output[4 * j + i] = output[4 * j + i] * shrink[i // 2]

    # ---- softmax -------------------------------------------------------------------------------------------------------
    @cute.jit
    def _probabilities(self, f: cutlass.Constexpr, me: cutlass.Constexpr, lane: Any, warp: Any) -> None:
        """P of this warpgroup's block, in registers and in shared memory, with the rows' maxima."""
        scores, words, high, total, shrink = f.scores, f.words, f.high, f.total, f.shrink
        self._mask(me, lane, scores)
        for r in cutlass.range_constexpr(2):
            found = Float32(-Float32.inf)
            for j in cutlass.range_constexpr(_GROUPS):
                for e in cutlass.range_constexpr(2):
                    found = cute.arch.fmax(found, scores[4 * j + 2 * r + e])
            for offset in (1, 2):
                found = cute.arch.fmax(found, cute.arch.shuffle_sync_bfly(found, offset))
            found = found * self.factor
            now = high[r]
            now = found if found > now + _SLACK else now
            shrink[r] = exp2(high[r] - now)
            high[r] = now
            if lane % 4 == 0:
                self.maxima[me, warp * 16 + lane // 4 + 8 * r] = now
        for r in cutlass.range_constexpr(2):
            share = Float32(0.0)
            for j in cutlass.range_constexpr(_GROUPS):
                low = exp2(scores[4 * j + 2 * r] * self.factor - high[r])
                up = exp2(scores[4 * j + 2 * r + 1] * self.factor - high[r])
                share = share + (low + up)
                words[2 * j + r] = enc.pack_bf16(low, up)
            total[r] = total[r] * shrink[r] + share
        # Rows of 128 bytes in the 128-byte swizzle; lane l has row l % 16 of its warp's 16, and one of a step's two chunks.
        base = self.probabilities.iterator.toint() + me * (ROWS * TILE * 2) + (warp * 16 + lane % 16) * (TILE * 2)
        for j in cutlass.range_constexpr(_STEPS):
            store_matrices(base + ((2 * j + lane // 16) ^ (lane % 8)) * 16, [words[4 * j + i] for i in range(4)])
        cute.arch.fence_view_async_shared()
        cute.arch.barrier_arrive(barrier_id=_PROBABLE + me, number_of_threads=2 * WARPGROUP)

    @cute.jit
    def _mask(self, me: cutlass.Constexpr, lane: Any, scores: Any) -> None:
        """Scores of keys that are none are made the least there is; as a rule there are none of those."""
        if cutlass.const_expr(self.work.plan.pair):  # a word of four keys, as `Gather` has balloted
            word = ptx.load_word(self.masks + me * self.work.plan.mask_bytes + lane % 16 * 4)
            if cute.arch.vote_any_sync(word != -1):
                four = [Uint32(cute.arch.vote_ballot_sync((word & (1 << 8 * b)) != 0)) for b in range(4)]  # keys 4 i + b
                pair = [cutlass.select_(lane % 2 == 1, four[2 + e], four[e]) >> (lane % 4 // 2) for e in range(2)]
                for j in cutlass.range_constexpr(_GROUPS):
                    for e in cutlass.range_constexpr(2):
                        for r in cutlass.range_constexpr(2):
                            at = 4 * j + 2 * r + e
                            scores[at] = scores[at] if pair[e] & Uint32(1 << 2 * j) != 0 else Float32(-Float32.inf)
        else:
            mask = ptx.load_pair(self.masks + me * self.work.plan.mask_bytes)
            if (mask[0] & mask[1]) != Uint32(0xFFFFFFFF):
                for j in cutlass.range_constexpr(_GROUPS):
                    bits = mask[j // 4] >> (8 * (j % 4) + 2 * (lane % 4))
                    for e in cutlass.range_constexpr(2):
                        for r in cutlass.range_constexpr(2):
                            at = 4 * j + 2 * r + e
                            scores[at] = scores[at] if bits & Uint32(1 << e) != 0 else Float32(-Float32.inf)

    @cute.jit
    def _follow(self, f: cutlass.Constexpr, whose: cutlass.Constexpr, lane: Any, warp: Any) -> None:
        """Wait for the other warpgroup's block, and take its maxima."""
        cute.arch.barrier(barrier_id=_PROBABLE + whose, number_of_threads=2 * WARPGROUP)
        self._see()
        high, total, shrink = f.high, f.total, f.shrink
        for r in cutlass.range_constexpr(2):
            now = self.maxima[whose, warp * 16 + lane // 4 + 8 * r]
            shrink[r] = exp2(high[r] - now)
            total[r] = total[r] * shrink[r]
            high[r] = now

    # ---- results -------------------------------------------------------------------------------------------------------
    @cute.jit
    def _finish(self, f: cutlass.Constexpr, me: cutlass.Constexpr, lane: Any, warp: Any, where: Any, turn: Any) -> None:
        """O over the sum of both warpgroups' probabilities, and of the sink's, to memory."""
        output, high, total = f.output, f.high, f.total
        query, tile, part = where
        heads = self.sinks.shape[0]
        for r in cutlass.range_constexpr(2):
            for offset in (1, 2):
                total[r] = total[r] + cute.arch.shuffle_sync_bfly(total[r], offset)
            if lane % 4 == 0:
                self.sums[turn, me, warp * 16 + lane // 4 + 8 * r] = total[r]
        cute.arch.barrier(barrier_id=_SUMMED, number_of_threads=2 * WARPGROUP)
        rows = [warp * 16 + lane // 4 + 8 * r for r in range(2)]
        whole = [total[r] + self.sums[turn, 1 - me, rows[r]] for r in range(2)]
        if cutlass.const_expr(self.work.plan.merge):
            merge = Merge(self.work, self.tiles.iterator.toint(), self.queries + 2, self.sinks, self.out)
            merge.run(me, warp * 32 + lane, where, output, high, whole)
        else:
            heads_of = [tile * ROWS + row for row in rows]
            if self.work.parts > 1:
                for r in cutlass.range_constexpr(2):
                    head = heads_of[r]
                    self._store_part(me, lane, r, (part, query * heads + head), head < heads, output, high[r], whole[r])
            else:
                sinks = [self.sinks[cutlass.min(head, heads - 1)] * LOG2_E for head in heads_of]
                weights = [1.0 / (whole[r] + exp2(sinks[r] - high[r])) for r in range(2)]
                self._store(me, lane, warp, query * heads, tile * ROWS + warp * 16, output, weights)

    @cute.jit
    def _store(self, me: cutlass.Constexpr, lane: Any, warp: Any, first: Any, head: Any, output: Any, weights: Any) -> None:
        """A warp's 16 heads in BF16, 64 dims at a time: by way of its rows of the probabilities that it writes, so that eight
        lanes store 128 bytes that are next to each other.
        """
        place = self.probabilities.iterator.toint() + (me * ROWS + warp * 16) * (TILE * 2)
        written = place + lane % 16 * (TILE * 2)
        chunk, row = lane % 8, lane // 8
        base = self.out.iterator.toint() + (Int64(first + head + row) * DIM + (me * _HALF + chunk * 8)) * 2
        for c in cutlass.range_constexpr(_HALF_TILES):
            for j in cutlass.range_constexpr(TILE // 16):
                words = []
                for g in cutlass.range_constexpr(2):
                    at = 4 * (c * (TILE // 8) + 2 * j + g)
                    for r in cutlass.range_constexpr(2):
                        low, up = output[at + 2 * r] * weights[r], output[at + 2 * r + 1] * weights[r]
                        words.append(enc.pack_bf16(low, up))
                store_matrices(written + ((2 * j + lane // 16) ^ (lane % 8)) * 16, words)
            cute.arch.sync_warp()
            for i in cutlass.range_constexpr(4):
                words = load_words(place + (row + 4 * i) * (TILE * 2) + (chunk ^ (row + 4 * i) % 8) * 16)
                if head + row + 4 * i < self.sinks.shape[0]:
                    store_global(base + (i * 4 * DIM + c * TILE) * 2, words)
            cute.arch.sync_warp()

    @cute.jit
    def _store_part(
        self,
        me: cutlass.Constexpr,
        lane: Any,
        r: cutlass.Constexpr,
        where: Any,
        inside: Any,
        output: Any,
        high: Any,
        whole: Any,
    ) -> None:
        """A thread's dims of a head in float32, over the part's sum, and the logarithm of that; where: (part, row)."""
        part, row = where
        if inside and whole > 0.0:
            weight = 1.0 / whole
            place = Int64(part) * self.partial.shape[1] + row
            base = self.partial.iterator.toint() + (place * DIM + me * _HALF + lane % 4 * 2) * 4
            for j in cutlass.range_constexpr(_HALF // 8):
                at = 4 * j + 2 * r
                store_global(base + j * 32, [output[at] * weight, output[at + 1] * weight])
        if inside and lane % 4 == 0 and me == 0:
            self.lse[part, row] = high + log2(whole)
