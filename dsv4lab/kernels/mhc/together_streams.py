"""What most warps of `together` do with a tile: sums, collapse.

Without `from __future__ import annotations`: CuTeDSL reads the annotations themselves.
"""

from dataclasses import dataclass
from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Uint32
from cutlass.cute.nvgpu import cpasync

from dsv4lab.kernels._common.ptx import load_matrices, load_words, store_global, store_matrices, store_words
from dsv4lab.kernels._common.rings import Ring, arrive_with
from dsv4lab.kernels.mhc import values as val
from dsv4lab.kernels.mhc.coefficients import LOGITS
from dsv4lab.kernels.mhc.config import BLOCK, BOX, CHUNK, COEFFICIENTS, MIXERS, STREAMS, TILE, WARP, TogetherConfig
from dsv4lab.kernels.quant.rows import encode as enc

SUMS, GATES = range(2)  # what is sent
_ROW = BOX * 2  # bytes of a row of a box
BOX_BYTES = TILE * _ROW


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
    (4 vectors, RANKS); of all tokens `pre` (STREAMS, TILE) and 1 / rms of what it makes of the streams (TILE).
    """

    sums: Any
    gates: Any
    inverses: Any
    barriers: Any
    bytes: tuple[int, int]  # of a tile
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
    sums: Any  # (pitch, TILE, warps, buffers)
    weight: Any  # (slice,)


class Warp:
    """One of those that do the same. `made`: mbarriers of stages whose new streams are in their places."""

    def __init__(
        self, plan: TogetherConfig, place: Place, mail: Mail, memory: Memory, ring: Ring, made: Any, warp: Any
    ) -> None:
        self.plan, self.place, self.mail, self.memory = plan, place, mail, memory
        self.ring, self.made, self.warp, self.lane = ring, made, warp, cute.arch.lane_idx()


class Projecting(Warp):
    """`project`: from streams to sums."""

    def every(self, k: int) -> bool:
        """Whether all warps have a k-th block."""
        return (k + 1) * self.plan.warps <= self.plan.blocks

    @cute.jit
    def run(self, fn: Any, summed: Ring, tokens: Any) -> None:
        """All tiles."""
        held = cute.make_rmem_tensor((self.plan.held,), Uint32)
        self.take(fn, held)
        cute.arch.cluster_wait()
        rows = cute.make_rmem_tensor((STREAMS,), Int32)
        for j in cutlass.range_constexpr(STREAMS):
            rows[j] = self.row(self.lane % 16, j)
        pairs = cute.make_rmem_tensor((2,), Int32)
        for half in cutlass.range_constexpr(2):
            pairs[half] = self.row(4 * half + self.lane % 16 // STREAMS, self.lane % STREAMS)
        for i in cutlass.range(self.place.count, unroll=1):
            self.ring.wait_full(i)
            self.project(held, rows, pairs, summed, i, tokens - self.place.tile(i) * TILE)

    @cute.jit
    def take(self, fn: Any, held: Any) -> None:
        """A warp's blocks of `fn`, for good: every `warps`-th, as many words as there is room for in registers, others where
        only it will read them.
        """
        plan, warp, lane = self.plan, self.warp, self.lane
        for k in cutlass.range_constexpr(plan.per_warp):
            block = cutlass.min(warp + k * plan.warps, plan.blocks - 1)
            for v in cutlass.range_constexpr(plan.block_words // 4):
                words = val.load_four(fn[self.place.rank * plan.blocks + block, v, lane, None].iterator)
                first = k * plan.block_words + 4 * v
                if cutlass.const_expr(first < plan.held):
                    for e in cutlass.range_constexpr(4):
                        held[first + e] = words[e]
                elif warp + k * plan.warps < plan.blocks:
                    store_words(self.kept(first), words)
        cute.arch.sync_warp()

    def kept(self, first: int) -> Any:
        """Address of four of a lane's words in shared memory, from the first of them on."""
        plan, vector = self.plan, (first - self.plan.held) // 4
        whole = min(vector, plan.shared_vectors[0])  # of the last block not all warps have words
        at = whole * plan.warps + (vector - whole) * plan.last_warps + self.warp
        return self.memory.rest + at * (WARP * 16) + self.lane * 16

    def words(self, held: Any, first: int, count: int) -> list[Any]:
        """`count` of a lane's words of `fn`, from registers or shared memory."""
        vectors = range(first // 4, -(-(first + count) // 4))
        found = [
            [held[4 * v + e] for e in range(4)] if 4 * v < self.plan.held else list(load_words(self.kept(4 * v)))
            for v in vectors
        ]
        return [word for four in found for word in four][first % 4 :][:count]

    @cute.jit
    def project(self, held: Any, rows: Any, pairs: Any, summed: Ring, i: Any, tokens: Any) -> None:
        """A warp's part of a tile's sums, to shared memory. With `post` new streams take their places first."""
        plan, memory, warp, lane = self.plan, self.memory, self.warp, self.lane
        group, quad, stage = lane // 4, lane % 4, self.ring.stage(i)
        up, down = [Float32(1.0)] * 2, [Float32(1.0)] * 2
        if cutlass.const_expr(plan.post or plan.scaled):
            top = cute.make_rmem_tensor((2,), Uint32)
            top.fill(0)
            for k in cutlass.range_constexpr(plan.per_warp):
                block = warp + k * plan.warps
                if cutlass.const_expr(self.every(k)) or block < plan.blocks:
                    self.meet(top, rows, stage, k, tokens)
            if cutlass.const_expr(plan.post):
                cute.arch.fence_view_async_shared()
                cute.arch.sync_warp()
                if lane == 0:
                    cute.arch.mbarrier_arrive(self.made + stage)
            if cutlass.const_expr(plan.scaled):
                for r in cutlass.range_constexpr(2):
                    largest = enc.max_u32(top[r] & Uint32(0x7FFF), (top[r] >> 16) & Uint32(0x7FFF))
                    largest = val.over_lanes(largest, (1, 2), enc.max_u32)
                    # The exponent that brings the largest to 2^14 .. 2^15, which FP16 has
                    exponent = enc.min_u32(Uint32(254 + 14) - (largest >> 7), Uint32(253))
                    up[r] = (exponent << 23).bitcast(Float32)
                    down[r] = ((Uint32(254) - exponent) << 23).bitcast(Float32)
        summed.wait_empty(i + MIXERS - plan.buffers)  # of the sums that were in this place
        turn = i % plan.buffers
        total = cute.make_rmem_tensor((4 * plan.tiles,), Float32)
        total.fill(0.0)
        gram = cute.make_rmem_tensor((4, 2), Float32)
        # Both kinds of products in turn, for those of one kind wait for each other
        for step in cutlass.range_constexpr(STREAMS * plan.per_warp):
            self.multiply(held, rows, up, total, stage, step // STREAMS, step % STREAMS)
            self.square(pairs, gram, stage, turn, step // plan.per_warp, step % plan.per_warp)
        for at in cutlass.range_constexpr(4 * plan.tiles - 4, 4 * plan.tiles):  # parts of the last rows
            total[at] = enc.add(total[at], cute.arch.shuffle_sync_bfly(total[at], 2))
        for r in cutlass.range_constexpr(2):
            for n in cutlass.range_constexpr(plan.tiles):
                pair = [
                    enc.mul(total[4 * n + 2 * r + e], down[r]) if plan.scaled else total[4 * n + 2 * r + e] for e in range(2)
                ]
                place = memory.sums[None, group + 8 * r, warp, turn].iterator.toint() + (8 * n + 2 * quad) * 4
                val.store_two_shared(place, pair)
        # of all loads of streams something is in these, or has been stored
        arrive_with(self.ring.empty(i), lane, [total[0], gram[0, 0], gram[2, 1]])
        if lane == 0:
            cute.arch.mbarrier_arrive(summed.full(i))

    @cute.jit
    def multiply(
        self,
        held: Any,
        rows: Any,
        up: Any,
        total: Any,
        stage: Any,
        k: cutlass.Constexpr,
        stream: cutlass.Constexpr,
    ) -> None:
        """total += a stream of a warp's k-th block, scaled, times block of `fn`."""
        plan = self.plan
        block = self.warp + k * plan.warps
        if cutlass.const_expr(self.every(k)) or block < plan.blocks:
            a = list(load_matrices(self.at(rows, stage, k, stream)))
            if cutlass.const_expr(plan.scaled):
                for i in cutlass.range_constexpr(4):
                    a[i] = val.pack_f16(*(enc.mul(half, up[i % 2]) for half in val.halves(a[i])))
            width = len(plan.order) * 2
            b = self.words(held, (k * STREAMS + stream) * width, width)
            for at, n in enumerate(plan.order):
                val.mma(total, 4 * n, a, b[2 * at : 2 * at + 2], "f16" if plan.scaled else "bf16")

    @cute.jit
    def square(self, pairs: Any, gram: Any, stage: Any, turn: Any, four: cutlass.Constexpr, k: cutlass.Constexpr) -> None:
        """Products of the streams of four tokens with each other in a warp's k-th block; after the last, sums to shared memory.

        Rows of both operands are (token, stream), two tokens in eight; of a product's 16 x 8 results those count where the
        tokens are the same: of the first product the first two tokens', of the second the others'.
        """
        plan, lane = self.plan, self.lane
        if cutlass.const_expr(k == 0):
            gram.fill(0.0)
        if cutlass.const_expr(self.every(k)) or self.warp + k * plan.warps < plan.blocks:
            base = self.memory.streams + stage * plan.tile_bytes + four // 2 * (8 * _ROW) + k * self.step
            a = load_matrices(base + pairs[four % 2])
            val.mma(gram[None, 0], 0, a, [a[0], a[2]])
            val.mma(gram[None, 1], 0, a, [a[1], a[3]])
        if cutlass.const_expr(k == plan.per_warp - 1):
            group, quad = lane // 4, lane % 4
            if group // STREAMS == quad // 2:
                for r in cutlass.range_constexpr(2):
                    token = 4 * four + 2 * r + group // STREAMS
                    to = self.memory.sums[None, token, self.warp, turn].iterator.toint() + plan.tiles * (8 * 4)
                    to += (group % STREAMS * STREAMS + quad % 2 * 2) * 4
                    val.store_two_shared(to, [gram[2 * r, r], gram[2 * r + 1, r]])

    def row(self, token: Any, stream: Any) -> Any:
        """Where in a tile the row of a warp's first block is that a lane gives to `ldmatrix`, in the swizzle of 128 bytes. The
        warp's next block is `step` farther: warps are as many as blocks of a box, or several times as many.
        """
        chunk = self.warp % (BOX // BLOCK) * 2 + self.lane // 16
        base = self.warp // (BOX // BLOCK) * BOX_BYTES + stream * self.plan.stream_bytes + token * _ROW
        return base + (chunk ^ ((token + 2 * stream) % 8)) * 16

    @property
    def step(self) -> int:
        return self.plan.warps // (BOX // BLOCK) * BOX_BYTES

    def at(self, rows: Any, stage: Any, k: int, stream: int) -> Any:
        """The row's address in a stream of a warp's k-th block."""
        return self.memory.streams + stage * self.plan.tile_bytes + rows[stream] + k * self.step

    @cute.jit
    def meet(self, top: Any, rows: Any, stage: Any, k: cutlass.Constexpr, tokens: Any) -> None:
        """With `post` a block's new streams, in their places. Scaled, the largest magnitudes of a lane's two tokens in it (two
        BF16 a word; signs mean nothing).
        """
        plan, memory, lane = self.plan, self.memory, self.lane
        places = [self.at(rows, stage, k, j) for j in range(STREAMS)]
        a = [list(load_matrices(place)) for place in places]
        if cutlass.const_expr(plan.post):
            added = load_matrices(memory.added + stage * (plan.boxes * BOX_BYTES) + rows[0] + k * self.step)
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
                store_matrices(places[j], a[j])
        if cutlass.const_expr(plan.scaled):
            for j in cutlass.range_constexpr(STREAMS):
                for i in cutlass.range_constexpr(4):
                    top[i % 2] = val.larger_pair(top[i % 2], a[j][i])


class Collapsing(Warp):
    """`collapse`: from streams and coefficients to x."""

    @cute.jit
    def run(self, out: Any, store_x: Any, x: Any, new: Any) -> None:
        """All tiles. A lane's columns are the same in all of them, and so are their weights."""
        plan = self.plan
        weight = cute.make_rmem_tensor((CHUNK, plan.passes), Float32)
        for p in cutlass.range_constexpr(plan.passes):
            for e in cutlass.range_constexpr(CHUNK):
                column = cutlass.min((p * WARP + self.lane) * CHUNK + e, plan.slice - 1)
                weight[e, p] = self.memory.weight[column].to(Float32)
        loaded = cute.make_rmem_tensor((1,), Uint32)  # something of all loads of streams
        made, to_new = x, new
        if cutlass.const_expr(plan.post):
            target = cute.local_tile(new, (TILE, 1, BOX // 2), (None, None, None))
            shared = cute.group_modes(x, 0, 3)
            made, to_new = cpasync.tma_partition(store_x, 0, cute.make_layout(1), shared, cute.group_modes(target, 0, 3))
        for i in cutlass.range(self.place.count, unroll=1):
            if cutlass.const_expr(plan.post):
                cute.arch.mbarrier_wait(self.made + self.ring.stage(i), i // plan.stages % 2)
                self.store(store_x, made, to_new, i)
            else:
                self.ring.wait_full(i)
            self.collapse(weight, loaded, out, i)
            if cutlass.const_expr(plan.post) and self.lane == 0:
                cute.arch.cp_async_bulk_wait_group(0, read=True)
            arrive_with(self.ring.empty(i), self.lane, [loaded[0]])
        if cutlass.const_expr(plan.post) and self.lane == 0:
            cute.arch.cp_async_bulk_wait_group(0, read=False)

    @cute.jit
    def store(self, store_x: Any, made: Any, to_new: Any, i: Any) -> None:
        """New streams to memory, a stream a warp. One lane issues it, and later waits for what it has issued."""
        plan = self.plan
        if self.warp < STREAMS and self.lane == 0:
            for b in cutlass.range_constexpr(plan.boxes):
                column = self.place.rank * plan.boxes + b
                place = to_new[None, self.place.tile(i), self.warp, column]
                cute.copy(store_x, made[None, self.warp, b, self.ring.stage(i)], place)
            cute.arch.cp_async_bulk_commit_group()

    @cute.jit
    def collapse(self, weight: Any, loaded: Any, out: Any, i: Any) -> None:
        """u = sum_j pre[j] X[j], rounded; x = u / rms * weight. Tokens of a warp one by one, 8 columns a lane."""
        plan, memory, mail, lane = self.plan, self.memory, self.mail, self.lane
        tile = memory.streams + self.ring.stage(i) * plan.tile_bytes
        mail.wait(GATES, i)
        if self.warp == 0 and lane == 0 and i + mail.count < self.place.count:
            mail.expect(GATES, i)
        loaded[0] = Uint32(0)
        for k in cutlass.range_constexpr(TILE // plan.collapse):
            token = self.warp + k * plan.collapse
            row = self.place.tile(i) * TILE + token
            pre = [w.bitcast(Float32) for w in load_words(mail.gates[None, token, mail.turn(i)].iterator.toint())]
            inverse = mail.inverses[token, mail.turn(i)]
            for p in cutlass.range_constexpr(plan.passes):
                chunk = p * WARP + lane
                if cutlass.const_expr((p + 1) * WARP * CHUNK <= plan.slice) or chunk * CHUNK < plan.slice:
                    place = tile + chunk // 8 * BOX_BYTES + token * _ROW
                    x = []
                    for j in cutlass.range_constexpr(STREAMS):
                        x.append(load_words(place + j * plan.stream_bytes + (chunk % 8 ^ ((token + 2 * j) % 8)) * 16))
                    words = [
                        val.normed(
                            val.collapsed([x[j][e] for j in range(STREAMS)], pre),
                            inverse,
                            weight[2 * e, p],
                            weight[2 * e + 1, p],
                        )
                        for e in range(4)
                    ]
                    loaded[0] |= words[0]
                    if row < out.shape[0]:
                        target = cute.local_tile(out[row, None], (4,), (self.place.rank * (plan.slice // CHUNK) + chunk,))
                        store_global(target.iterator, words)


@dataclass(frozen=True)
class Sending:
    """`send`: sums over the warps that project, to the CTAs that make coefficients of them. By one warp."""

    plan: TogetherConfig
    place: Place
    mail: Mail
    memory: Memory
    summed: Ring

    @cute.jit
    def send(self, i: Any) -> None:
        """Of every token, four numbers a lane at a time."""
        plan, mail, lane = self.plan, self.mail, cute.arch.lane_idx()
        sums = self.memory.sums[None, 0, 0, i % plan.buffers].iterator.toint()
        target, barrier = mail.sums[None, self.place.rank, mail.turn(i)].iterator.toint(), mail.barrier(SUMS, i).toint()
        self.summed.wait_full(i)
        chunks = [(k, w) for k in range(-(-TILE * plan.vectors // WARP)) for w in range(0, plan.warps, 4)]
        four: list[Any] = []
        ahead = self.load(sums, lane, *chunks[0])
        for n in cutlass.range_constexpr(len(chunks)):
            (k, w), parts = chunks[n], ahead
            if cutlass.const_expr(n + 1 < len(chunks)):  # on its way while these are added
                ahead = self.load(sums, lane, *chunks[n + 1])
            found = [enc.tree(enc.add, [part[e].bitcast(Float32) for part in parts]) for e in range(4)]
            four = found if w == 0 else [enc.add(four[e], found[e]) for e in range(4)]
            item = k * WARP + lane
            if cutlass.const_expr(w + 4 == plan.warps) and item < TILE * plan.vectors:
                val.send_four(target + item % plan.vectors * 16, barrier, item // plan.vectors, four)
        cute.arch.sync_warp()
        if lane == 0:
            cute.arch.mbarrier_arrive(self.summed.empty(i))

    def load(self, sums: Any, lane: Any, k: int, w: int) -> list[Any]:
        """A lane's k-th four numbers, of four warps from the w-th on."""
        plan, item = self.plan, cutlass.min(k * WARP + lane, TILE * self.plan.vectors - 1)
        token, v = item // plan.vectors, item % plan.vectors
        at = cutlass.select_(v < plan.vectors - STREAMS, v, v + 1)  # behind the last tile's second half
        place = sums + token * (plan.pitch * 4) + at * 16
        return [load_words(place + n * (TILE * plan.pitch * 4)) for n in range(w, w + 4)]
