"""What most warps of `together` do with a tile: sums, collapse, norm.

Without `from __future__ import annotations`: CuTeDSL reads the annotations themselves.
"""

from dataclasses import dataclass
from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Uint32

from dsv4lab.kernels._common.ptx import load_matrices, load_words, store_matrices, store_words
from dsv4lab.kernels._common.rings import Ring
from dsv4lab.kernels.mhc import values as val
from dsv4lab.kernels.mhc.coefficients import LOGITS
from dsv4lab.kernels.mhc.config import BLOCK, BOX, COEFFICIENTS, HALVES, RANKS, STREAMS, TILE, WARP, TogetherConfig
from dsv4lab.kernels.quant.rows import encode as enc

SUMS, GATES, SQUARES = range(3)  # what is sent
_TEAM, _COLLAPSED = 1, 6  # barriers of the warps that project, that collapse
_ROW = BOX * 2  # bytes of a row of a box
STREAM_BYTES = TILE * _ROW  # of a stream of a box


@dataclass(frozen=True)
class Place:
    """Where a CTA is: its rank in the cluster, which cluster of how many, and the number of the cluster's tiles."""

    rank: Any
    cluster: Any
    clusters: Any
    count: Any

    def tile(self, i: Any) -> Any:
        """The cluster's i-th."""
        return self.cluster + i * self.clusters


@dataclass(frozen=True)
class Mail:
    """What the CTAs send each other, each with room for `count` tiles and as many mbarriers: sums of this CTA's token
    (4 vectors, RANKS), coefficients of all tokens (STREAMS, TILE), sums of squares of all tokens (TILE, RANKS).
    """

    sums: Any
    gates: Any
    squares: Any
    barriers: Any
    bytes: tuple[int, int, int]  # of a tile
    count: int

    def barrier(self, kind: int, i: Any) -> Any:
        return self.barriers + kind * self.count + i % self.count

    def wait(self, kind: int, i: Any) -> None:
        cute.arch.mbarrier_wait(self.barrier(kind, i), i // self.count % 2)

    def turn(self, i: Any) -> Any:
        return i % self.count

    def expect(self, kind: int, i: Any) -> None:
        """By one thread, once for each use."""
        cute.arch.mbarrier_arrive_and_expect_tx(self.barrier(kind, i), self.bytes[kind])


@dataclass(frozen=True)
class Memory:
    """A CTA's shared memory: byte addresses of stages of streams, y and coefficients, of blocks of `fn`; and tensors."""

    streams: Any
    added: Any
    given: Any
    rest: Any
    sums: Any  # (pitch, TILE, warps)
    squares: Any  # (TILE, warps)
    totals: Any  # (TILE, 2)
    weight: Any  # (slice,)


class Warp:
    """One of `count` warps that do the same."""

    def __init__(
        self, plan: TogetherConfig, place: Place, mail: Mail, memory: Memory, ring: Ring, made: Any, warp: Any, count: int
    ) -> None:
        self.plan, self.place, self.mail, self.memory = plan, place, mail, memory
        self.ring, self.made, self.warp, self.count = ring, made, warp, count
        self.lane = cute.arch.lane_idx()

    def every(self, k: int, limit: int) -> bool:
        """Whether all warps have a k-th of so many blocks or tokens."""
        return (k + 1) * self.count <= limit


class Projecting(Warp):
    """`project`: from streams to sums."""

    @cute.jit
    def run(self, fn: Any, tokens: Any) -> None:
        """All tiles."""
        held = cute.make_rmem_tensor((self.plan.block_words, self.plan.held), Uint32)
        self.take(fn, held)
        for i in cutlass.range(self.place.count, unroll=1):
            self.ring.wait_full(i)
            self.project(held, i, tokens - self.place.tile(i) * TILE)
            self.send_sums(i)

    @cute.jit
    def take(self, fn: Any, held: Any) -> None:
        """A warp's blocks of `fn`, for good: every `warps`-th, as many as there is room for in registers, others where only it
        will read them.
        """
        plan, warp, lane = self.plan, self.warp, self.lane
        for k in cutlass.range_constexpr(plan.per_warp):
            block = cutlass.min(warp + k * plan.warps, plan.blocks - 1)
            for v in cutlass.range_constexpr(plan.block_words // 4):
                words = val.load_four(fn[self.place.rank * plan.blocks + block, v, lane, None].iterator)
                if cutlass.const_expr(k < plan.held):
                    for e in cutlass.range_constexpr(4):
                        held[4 * v + e, k] = words[e]
                elif warp + k * plan.warps < plan.blocks:
                    store_words(self.kept(block, v), words)
        cute.arch.sync_warp()

    def kept(self, block: Any, v: int) -> Any:
        """Address of a lane's words of a block in shared memory."""
        plan = self.plan
        return self.memory.rest + (block - plan.held * plan.warps) * (plan.block_words * WARP * 4) + (v * WARP + self.lane) * 16

    @cute.jit
    def project(self, held: Any, i: Any, tokens: Any) -> None:
        """A warp's part of a tile's sums, to shared memory. With `post` new streams take their places first."""
        plan, memory, warp, lane = self.plan, self.memory, self.warp, self.lane
        group, quad, stage = lane // 4, lane % 4, self.ring.stage(i)
        top = cute.make_rmem_tensor((2,), Uint32)
        top.fill(0)
        for k in cutlass.range_constexpr(plan.per_warp):
            block = warp + k * plan.warps
            if cutlass.const_expr(self.every(k, plan.blocks)) or block < plan.blocks:
                self.meet(top, stage, block, tokens)
        if cutlass.const_expr(plan.post):
            cute.arch.fence_view_async_shared()
            cute.arch.sync_warp()
            if lane == 0:
                cute.arch.mbarrier_arrive(self.made + stage)
        up, down = [], []
        for r in cutlass.range_constexpr(2):
            largest = enc.max_u32(top[r] & Uint32(0x7FFF), (top[r] >> 16) & Uint32(0x7FFF))
            largest = val.over_lanes(largest, (1, 2), enc.max_u32)
            # The exponent that brings the largest to 2^14 .. 2^15, which FP16 has
            exponent = enc.min_u32(Uint32(254 + 14) - (largest >> 7), Uint32(253))
            up.append((exponent << 23).bitcast(Float32))
            down.append(((Uint32(254) - exponent) << 23).bitcast(Float32))
        total = cute.make_rmem_tensor((4 * plan.tiles * plan.chains,), Float32)
        total.fill(0.0)
        square = cute.make_rmem_tensor((4,), Float32)
        square.fill(0.0)
        for k in cutlass.range_constexpr(plan.per_warp):
            block = warp + k * plan.warps
            if cutlass.const_expr(self.every(k, plan.blocks)) or block < plan.blocks:
                self.multiply(held, up, total, square, stage, k, block)
        if lane == 0:
            cute.arch.mbarrier_arrive(self.ring.empty(i))
        cute.arch.barrier(barrier_id=_TEAM, number_of_threads=plan.warps * WARP)  # the sums before are read
        for r in cutlass.range_constexpr(2):
            row = group + 8 * r
            whole = enc.mul(enc.mul(enc.add(square[2 * r], square[2 * r + 1]), down[r]), down[r])
            whole = val.over_lanes(whole, (1, 2), enc.add)
            for n in cutlass.range_constexpr(plan.tiles):
                at = [4 * n + 2 * r, 4 * n + 2 * r + 1]
                chains = [[total[e + 4 * c * plan.tiles] for c in range(plan.chains)] for e in at]
                pair = [enc.mul(enc.tree(enc.add, both), down[r]) for both in chains]
                val.store_two_shared(memory.sums[None, row, warp].iterator.toint() + (8 * n + 2 * quad) * 4, pair)
            if quad == 0:
                memory.squares[row, warp] = whole
        cute.arch.barrier(barrier_id=_TEAM, number_of_threads=plan.warps * WARP)

    def row(self, base: Any, block: Any) -> Any:
        """Address of the row of a block of the first stream that a lane gives to `ldmatrix`, in the swizzle of 128 bytes."""
        chunk = block % (BOX // BLOCK) * 2 + self.lane // 16
        return base + self.lane % 16 * _ROW + (chunk ^ (self.lane % 8)) * 16

    @cute.jit
    def meet(self, top: Any, stage: Any, block: Any, tokens: Any) -> None:
        """The largest magnitudes of a lane's two tokens in a block (two BF16 a word; signs mean nothing)."""
        plan, memory, lane = self.plan, self.memory, self.lane
        box = block // (BOX // BLOCK)
        place = self.row(memory.streams + stage * plan.tile_bytes + box * (STREAMS * STREAM_BYTES), block)
        a = [list(load_matrices(place + j * STREAM_BYTES)) for j in range(STREAMS)]
        if cutlass.const_expr(plan.post):
            added = load_matrices(self.row(memory.added + (stage * plan.boxes + box) * STREAM_BYTES, block))
            for r in cutlass.range_constexpr(2):
                first = memory.given + stage * (TILE * COEFFICIENTS * 4)
                row = cutlass.min(lane // 4 + 8 * r, tokens - 1)  # past the last token: streams are zeros there, and not stored
                post = [w.bitcast(Float32) for w in load_words(first + row * (STREAMS * 4))]
                spot = first + TILE * STREAMS * 4 + row * (LOGITS * 4)
                comb = [w.bitcast(Float32) for i in range(LOGITS // 4) for w in load_words(spot + 16 * i)]
                for i in cutlass.range_constexpr(r, 4, 2):  # words of a token: every other one
                    words = val.new_words(added[i], [a[j][i] for j in range(STREAMS)], post, comb)
                    for j in cutlass.range_constexpr(STREAMS):
                        a[j][i] = words[j]
            for j in cutlass.range_constexpr(STREAMS):
                store_matrices(place + j * STREAM_BYTES, a[j])
        for j in cutlass.range_constexpr(STREAMS):
            for i in cutlass.range_constexpr(4):
                top[i % 2] = val.larger_pair(top[i % 2], a[j][i])

    @cute.jit
    def multiply(self, held: Any, up: Any, total: Any, square: Any, stage: Any, k: cutlass.Constexpr, block: Any) -> None:
        """total += block of streams times block of `fn`; square += squares, both scaled."""
        plan, memory = self.plan, self.memory
        place = self.row(memory.streams + stage * plan.tile_bytes + block // (BOX // BLOCK) * (STREAMS * STREAM_BYTES), block)
        width = HALVES * plan.tiles * 2  # words of a stream
        for j in cutlass.range_constexpr(STREAMS):
            a = list(load_matrices(place + j * STREAM_BYTES))
            for i in cutlass.range_constexpr(4):
                low, high = (enc.mul(half, up[i % 2]) for half in val.halves(a[i]))
                at = i % 2 * 2
                square[at] = enc.fma(low, low, square[at])
                square[at + 1] = enc.fma(high, high, square[at + 1])
                a[i] = val.pack_f16(low, high)
            if cutlass.const_expr(k < plan.held):
                b = [held[j * width + i, k] for i in range(width)]
            else:
                b = [w for v in range(width // 4) for w in load_words(self.kept(block, j * width // 4 + v))]
            for part in cutlass.range_constexpr(HALVES - 1, -1, -1):  # the smaller first
                for n in cutlass.range_constexpr(plan.tiles):
                    first = (part * plan.tiles + n) * 2
                    val.mma(total, 4 * (part % plan.chains * plan.tiles + n), a, b[first : first + 2], "f16")

    @cute.jit
    def send_sums(self, i: Any) -> None:
        """A token's sums over the CTA's warps, to the CTA that makes its coefficients. A lane a number."""
        plan, memory, mail, warp, lane = self.plan, self.memory, self.mail, self.warp, self.lane
        for k in cutlass.range_constexpr(-(-TILE // self.count)):
            token = warp + k * plan.warps
            if cutlass.const_expr(self.every(k, TILE)) or token < TILE:
                place, step = memory.sums[None, token, 0].iterator.toint() + lane * 4, Int32(TILE * plan.pitch * 4)
                if lane >= plan.outputs:
                    place, step = memory.squares[token, None].iterator.toint(), Int32(TILE * 4)
                value = enc.tree(enc.add, [val.load_shared(place + w * step) for w in range(plan.warps)])
                four = [cute.arch.shuffle_sync(value, cutlass.min(4 * lane + e, WARP - 1)) for e in range(4)]
                if lane < plan.vectors:
                    target = mail.sums[None, self.place.rank, mail.turn(i)].iterator.toint() + lane * 16
                    val.send_four(target, mail.barrier(SUMS, i).toint(), token, four)


class Collapsing(Warp):
    """`collapse` and `norm`: from streams and coefficients to x."""

    @cute.jit
    def run(self, out: Any, eps: Any) -> None:
        """All tiles; with two turns a tile is normed after the next is collapsed."""
        plan, count = self.plan, self.place.count
        u = cute.make_rmem_tensor((4, plan.passes, plan.rounds, plan.turns), Uint32)
        if cutlass.const_expr(plan.turns == 1):
            for i in cutlass.range(count, unroll=1):
                self.collapse(u, i, 0)
                self.norm(u, out, i, 0, eps)
        else:
            for first in cutlass.range(0, count + 1, 2, unroll=1):
                for turn in cutlass.range_constexpr(2):
                    i = first + turn
                    if i < count:
                        self.collapse(u, i, turn)
                    if i > 0 and i <= count:
                        self.norm(u, out, i - 1, 1 - turn, eps)

    def _token(self, k: int) -> Any:
        return self.warp + k * self.count

    @cute.jit
    def collapse(self, u: Any, i: Any, turn: cutlass.Constexpr) -> None:
        """u = sum_j pre[j] X[j], rounded, of a warp's tokens; the sums of all tokens' squares to all CTAs."""
        plan, memory, mail, warp, lane = self.plan, self.memory, self.mail, self.warp, self.lane
        tile = memory.streams + self.ring.stage(i) * plan.tile_bytes
        if cutlass.const_expr(plan.post):
            cute.arch.mbarrier_wait(self.made + self.ring.stage(i), i // plan.stages % 2)
        else:
            self.ring.wait_full(i)
        mail.wait(GATES, i)
        if warp == 0 and lane == 0 and i + mail.count < self.place.count:
            mail.expect(GATES, i)
        square = cute.make_rmem_tensor((2, plan.rounds), Float32)
        square.fill(0.0)
        for k in cutlass.range_constexpr(plan.rounds):
            token = self._token(k)
            pre = [w.bitcast(Float32) for w in load_words(mail.gates[None, token, mail.turn(i)].iterator.toint())]
            for p in cutlass.range_constexpr(plan.passes):
                chunk = p * WARP + lane
                if cutlass.const_expr((p + 1) * WARP * 8 <= plan.slice) or chunk * 8 < plan.slice:
                    place = tile + chunk // 8 * (STREAMS * STREAM_BYTES) + token * _ROW + ((chunk % 8) ^ (token % 8)) * 16
                    x = [load_words(place + j * STREAM_BYTES) for j in range(STREAMS)]
                    for e in cutlass.range_constexpr(4):
                        word = val.collapsed([x[j][e] for j in range(STREAMS)], pre)
                        two = val.halves(word)
                        for h in cutlass.range_constexpr(2):
                            square[h, k] = enc.fma(two[h], two[h], square[h, k])
                        u[e, p, k, turn] = word
        cute.arch.sync_warp()
        if lane == 0:
            cute.arch.mbarrier_arrive(self.ring.empty(i))
        sums = [enc.add(square[0, k], square[1, k]) for k in range(plan.rounds)]
        for distance in (16, 8, 4, 2, 1):
            sums = [enc.add(mine, cute.arch.shuffle_sync_bfly(mine, distance)) for mine in sums]
        for k in cutlass.range_constexpr(plan.rounds):
            if lane == 0:
                memory.totals[self._token(k), i % 2] = sums[k]
        cute.arch.barrier(barrier_id=_COLLAPSED, number_of_threads=plan.collapse * WARP)
        if warp < TILE * RANKS // (4 * WARP):  # 16 bytes a lane, 64 for each CTA
            four = [w.bitcast(Float32) for w in load_words(memory.totals[None, i % 2].iterator.toint() + lane % 4 * 16)]
            target = mail.squares[None, self.place.rank, mail.turn(i)].iterator.toint() + lane % 4 * 16
            val.send_four(target, mail.barrier(SQUARES, i).toint(), warp * 8 + lane // 4, four)

    @cute.jit
    def norm(self, u: Any, out: Any, i: Any, turn: cutlass.Constexpr, eps: Any) -> None:
        """x = u / rms * weight of a warp's tokens, to memory. A lane has the sum of a token's squares."""
        plan, memory, mail, warp, lane = self.plan, self.memory, self.mail, self.warp, self.lane
        mail.wait(SQUARES, i)
        if warp == 0 and lane == 0 and i + mail.count < self.place.count:
            mail.expect(SQUARES, i)
        square = enc.tree(enc.add, [mail.squares[lane % TILE, r, mail.turn(i)] for r in range(RANKS)])
        inverses = val.inverse_rms(square, plan.columns, eps)
        for k in cutlass.range_constexpr(plan.rounds):
            token = self._token(k)
            inverse = cute.arch.shuffle_sync(inverses, token)
            row = self.place.tile(i) * TILE + token
            for p in cutlass.range_constexpr(plan.passes):
                chunk = p * WARP + lane
                if chunk * 8 < plan.slice and row < out.shape[0]:
                    w = cute.make_rmem_tensor((8,), memory.weight.element_type)
                    cute.autovec_copy(cute.local_tile(memory.weight, (8,), (chunk,)), w)
                    words = [val.normed(u[e, p, k, turn], inverse, w[2 * e], w[2 * e + 1]) for e in range(4)]
                    target = cute.local_tile(out[row, None], (4,), (self.place.rank * (plan.slice // 8) + chunk,))
                    val.store_four(target.iterator, words)
