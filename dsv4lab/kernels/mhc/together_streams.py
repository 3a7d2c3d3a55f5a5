"""What most warps of `together` do with a tile: sums, collapse.

Without `from __future__ import annotations`: CuTeDSL reads the annotations themselves.
"""

from dataclasses import dataclass
from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Uint32
from cutlass.cute.nvgpu import cpasync

from dsv4lab.kernels._common.ptx import load_matrices, load_words, store_matrices, store_words
from dsv4lab.kernels._common.rings import Ring, arrive_with
from dsv4lab.kernels.mhc import values as val
from dsv4lab.kernels.mhc.coefficients import LOGITS
from dsv4lab.kernels.mhc.config import BLOCK, BOX, CHUNK, COEFFICIENTS, MIXERS, STREAMS, TILE, WARP, TogetherConfig
from dsv4lab.kernels.quant.rows import encode as enc

SUMS, GATES = range(2)  # what is sent
_ROW = BOX * 2  # bytes of a row of a box
AHEAD = 3  # fragments of streams loaded before their products
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

    def barrier(self, kind: int, at: Any) -> Any:
        return self.barriers + kind * self.count + at

    def wait(self, kind: int, at: Any, phase: Any) -> None:
        cute.arch.mbarrier_wait(self.barrier(kind, at), phase)

    def expect(self, kind: int, at: Any) -> None:
        """By one thread, once for each use."""
        cute.arch.mbarrier_arrive_and_expect_tx(self.barrier(kind, at), self.bytes[kind])


def following_turn(at: Any, phase: Any, count: int, by: int = 1) -> tuple[Any, Any]:
    """A ring's place and its phase, `by` steps later, at most `count`."""
    at = at + by
    return cutlass.select_(at >= count, at - count, at), cutlass.select_(at >= count, phase ^ 1, phase)


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
    """`project`: from streams to sums. `mine`: how many blocks this warp has, every `warps`-th from its number on.

    Addresses, stages and phases are kept from tile to tile, fragments come some products before they are multiplied, and
    mbarriers are asked long before their answers are needed: nothing else of these warps' time is as short of instructions.
    """

    def __init__(self, *args: Any, mine: int) -> None:
        super().__init__(*args)
        self.mine = mine
        self.group, self.quad = self.lane // 4, self.lane % 4

    @cute.jit
    def run(self, fn: Any, summed: Ring, tokens: Any) -> None:
        """All tiles."""
        plan = self.plan
        held = cute.make_rmem_tensor((plan.held,), Uint32)
        self.take(fn, held)
        rows = [self.row(self.lane % 16, j) for j in range(STREAMS)]
        pairs = [self.row(4 * half + self.lane % 16 // STREAMS, self.lane % STREAMS) for half in range(2)]
        sums = self.memory.sums.iterator.toint() + self.warp * (TILE * plan.pitch * 4)
        of_square = sums + self.group // STREAMS * (plan.pitch * 4) + plan.tiles * 32
        of_square += (self.group % STREAMS * STREAMS + self.quad % 2 * 2) * 4
        of_total = sums + self.group * (plan.pitch * 4) + self.quad * 8
        # a register each, which the compiler would else make anew from the lane's number in every tile
        sums = [cute.arch.shuffle_sync(address, self.lane) for address in (of_total, of_square)]
        stage, phase, seen = Int32(0), Int32(0), Uint32(0)
        for i in cutlass.range(self.place.count, unroll=1):
            self.until(seen, self.ring.barriers + stage, phase)
            following = following_turn(stage, phase, plan.stages)
            turn = (i & (plan.buffers - 1)) * (plan.warps * TILE * plan.pitch * 4)
            places = ([address + turn for address in sums], summed, i)
            seen = self.project(held, rows, pairs, places, stage, following, tokens - self.place.tile(i) * TILE)
            stage, phase = following

    @cute.jit
    def until(self, seen: Any, barrier: Any, phase: Any) -> None:
        """Waits for a phase that had not been seen to be over."""
        if seen == 0:
            cute.arch.mbarrier_wait(barrier, phase)

    @cute.jit
    def take(self, fn: Any, held: Any) -> None:
        """A warp's blocks of `fn`, for good: as many words as there is room for in registers, others where only it will read
        them.
        """
        plan, warp, lane = self.plan, self.warp, self.lane
        for k in cutlass.range_constexpr(self.mine):
            for v in cutlass.range_constexpr(plan.block_words // 4):
                block = self.place.rank * plan.blocks + warp + k * plan.warps
                words = val.load_four(fn[block, v, lane, None].iterator)
                first = k * plan.block_words + 4 * v
                if cutlass.const_expr(first < plan.held):
                    for e in cutlass.range_constexpr(4):
                        held[first + e] = words[e]
                else:
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

    def project(self, held: Any, rows: Any, pairs: Any, places: Any, stage: Any, following: Any, tokens: Any) -> Any:
        """A warp's part of a tile's sums, to shared memory. With `post` new streams take their places first. -> whether the
        following stage was full.

        places: of a lane's sums, of both kinds; their ring, and the tile's number. following: stage, phase.
        """
        plan, memory = self.plan, self.memory
        sums, summed, i = places
        tile = memory.streams + stage * plan.tile_bytes
        turn = i + (MIXERS - plan.buffers)  # of the sums that were in this place
        taken, phase = summed.barriers + MIXERS + (turn & 1), (turn >> 1 & 1) ^ 1
        free = val.over(taken, phase)
        total = [Float32(0.0)] * (4 * plan.tiles)
        squares = Squares(self, tile, pairs, sums[1], lambda: self.until(free, taken, phase))
        exponents: list[Any] = []
        up: list[Any] = []
        if plan.post:
            tops = []
            for k in range(self.mine):
                a = self.renew(tile, rows, stage, tokens, k)
                tops.append([self.top(a, r) for r in range(2)])
            cute.arch.fence_view_async_shared()
            cute.arch.sync_warp()
            self.report(self.made + stage)
            if plan.scaled and self.mine:
                largest = [enc.tree(val.larger_pair, list(top)) for top in zip(*tops, strict=True)]
                exponents, up = self.scale(largest, [], total)
        squares.prefetch(0 if plan.scaled else 1)  # as far as registers go
        steps = [(k, j) for k in range(self.mine) for j in range(STREAMS)]
        ahead = (2 if plan.post else STREAMS) if plan.scaled else AHEAD
        found = [self.load(tile, rows, *at) for at in steps[:ahead]]
        for s, (k, j) in enumerate(steps):
            if plan.scaled and not plan.post and j == 0:
                exponents, up = self.scale([self.top(found[s:], r) for r in range(2)], exponents, total)
            a = self.scaled(found[s], up) if plan.scaled else found[s]
            found += [self.load(tile, rows, *at) for at in steps[s + ahead : s + ahead + 1]]
            self.multiply(held, total, a, k, j, squares.next(1))
        seen = val.over(self.ring.barriers + following[0], following[1])
        squares.finish()
        for r in range(2):
            for n in range(plan.tiles):
                pair = total[4 * n + 2 * r : 4 * n + 2 * r + 2]
                if exponents:
                    pair = [enc.mul(value, ((Uint32(254) - exponents[r]) << 23).bitcast(Float32)) for value in pair]
                val.store_two_shared(sums[0] + (8 * r * plan.pitch + 8 * n) * 4, pair)
        # of all loads of streams something is in these, or has been stored
        arrive_with(self.ring.barriers + plan.stages + stage, self.lane, [total[0], *squares.last])
        self.report(summed.barriers + (i & 1))
        return seen

    @cute.jit
    def report(self, barrier: Any) -> None:
        """The warp's arrival, once it has come here."""
        if self.lane == 0:
            cute.arch.mbarrier_arrive(barrier)

    @cute.jit
    def keep(self, to: Any, gram: Any) -> None:
        """Two products of streams, in the lanes where both are of the same token."""
        if self.group // STREAMS == self.quad // 2:
            for r in cutlass.range_constexpr(2):
                pair = [gram[r][2 * r], gram[r][2 * r + 1]]
                val.store_two_shared(to + 2 * r * (self.plan.pitch * 4), pair)

    def multiply(self, held: Any, total: Any, a: Any, k: int, stream: int, between: Any) -> None:
        """total += a stream of a warp's k-th block, scaled, times block of `fn`; products of other kinds in between, for those
        of one sum wait for each other.
        """
        plan = self.plan
        width = plan.parts * plan.tiles * 2
        b = self.words(held, (k * STREAMS + stream) * width, width)
        for part in range(plan.parts - 1, -1, -1):  # the smaller first
            for n in range(plan.tiles):
                at = (part * plan.tiles + n) * 2
                val.mma(total, 4 * n, a, b[at : at + 2], "f16" if plan.scaled else "bf16")
            if between:
                between.pop(0)()
        for other in between:
            other()

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

    def load(self, tile: Any, rows: Any, k: int, stream: int) -> list[Any]:
        """A stream of a warp's k-th block."""
        return list(load_matrices(tile + rows[stream] + k * self.step))

    def renew(self, tile: Any, rows: Any, stage: Any, tokens: Any, k: int) -> list[list[Any]]:
        """A block's new streams, which take the places of the old."""
        a = [self.load(tile, rows, k, j) for j in range(STREAMS)]
        added = load_matrices(self.memory.added + stage * (self.plan.boxes * BOX_BYTES) + rows[0] + k * self.step)
        first = self.memory.given + stage * (TILE * COEFFICIENTS * 4)
        for r in range(2):
            row = cutlass.min(self.group + 8 * r, tokens - 1)  # past the last token: streams are zeros there, and not stored
            post = [w.bitcast(Float32) for w in load_words(first + row * (STREAMS * 4))]
            spot = first + TILE * STREAMS * 4 + row * (LOGITS * 4)
            comb = [w.bitcast(Float32) for i in range(LOGITS // 4) for w in load_words(spot + 16 * i)]
            for i in range(r, 4, 2):  # words of a token: every other one
                words = val.new_words(added[i], [a[j][i] for j in range(STREAMS)], post, comb)
                for j in range(STREAMS):
                    a[j][i] = words[j]
        for j in range(STREAMS):
            store_matrices(tile + rows[j] + k * self.step, a[j])
        return a

    def top(self, a: list[list[Any]], r: int) -> Any:
        """The largest magnitudes of a lane's r-th token in a block (two BF16 a word; signs mean nothing)."""
        return enc.tree(val.larger_pair, [a[j][i] for j in range(STREAMS) for i in (r, r + 2)])

    def scale(self, tops: list[Any], before: list[Any], total: list[Any]) -> tuple[list[Any], list[Any]]:
        """Exponents of what streams are multiplied by to be FP16, for each of a lane's two tokens, and the powers of two
        themselves. No exponent is larger than `before`; `total`, of products with those, is scaled down likewise.
        """
        exponents, up = [], []
        # the larger of each word's halves, of both tokens in one word
        low, high = enc.prmt(tops[0], tops[1], 0x5410), enc.prmt(tops[0], tops[1], 0x7632)
        both = val.over_lanes(val.larger_pair(low, high), (1, 2), val.larger_pair)
        for r in range(2):
            largest = both >> (7 + 16 * r) & Uint32(0xFF)
            # The exponent that brings the largest to 2^14 .. 2^15, which FP16 has
            exponent = enc.min_u32(Uint32(254 + 14) - largest, Uint32(253))
            if before:
                exponent = enc.min_u32(exponent, before[r])
                ratio = (enc.max_u32(exponent + Uint32(127), before[r]) - before[r] << 23).bitcast(Float32)
                for n in range(self.plan.tiles):
                    for e in range(2):
                        total[4 * n + 2 * r + e] = enc.mul(total[4 * n + 2 * r + e], ratio)
            exponents.append(exponent)
            up.append((exponent << 23).bitcast(Float32))
        return exponents, up

    def scaled(self, words: list[Any], up: list[Any]) -> list[Any]:
        """A fragment's BF16 times powers of two, as FP16."""
        return [val.pack_f16(*(enc.mul(half, up[i % 2]) for half in val.halves(words[i]))) for i in range(4)]


class Squares:
    """Products of a tile's streams with each other in a warp's blocks, four tokens after each other, to shared memory.

    Rows of both operands are (token, stream), two tokens in eight; of a product's 16 x 8 results those count where the
    tokens are the same: of the first product the first two tokens', of the second the others'.
    """

    def __init__(self, warp: Projecting, tile: Any, pairs: Any, to: Any, until: Any) -> None:
        self.warp, self.tile, self.pairs, self.to, self.until = warp, tile, pairs, to, until
        self.steps = [(four, k) for four in range(TILE // STREAMS) for k in range(warp.mine)]
        self.found: list[Any] = []  # loaded, not yet multiplied
        self.waiting: list[Any] = []  # multiplied, not yet stored
        self.gram: list[list[Any]] = []
        self.last: list[Any] = []
        self.loaded = self.made = 0

    def prefetch(self, count: int) -> None:
        for four, k in self.steps[self.loaded : self.loaded + count]:
            base = self.tile + four // 2 * (8 * _ROW) + k * self.warp.step
            self.found.append(load_matrices(base + self.pairs[four % 2]))
            self.loaded += 1

    def next(self, count: int) -> list[Any]:
        """The next two products, as functions; what will be multiplied after them is loaded now."""
        self.prefetch(count)
        if not self.found:
            return []
        self.store()
        four, k = self.steps[self.made]
        self.made += 1
        if k == 0:
            self.gram = [[Float32(0.0)] * 4 for _ in range(2)]
        a, gram = self.found.pop(0), self.gram
        if k == self.warp.mine - 1:
            self.waiting.append((four, gram))
        return [lambda: val.mma(gram[0], 0, a, [a[0], a[2]]), lambda: val.mma(gram[1], 0, a, [a[1], a[3]])]

    def store(self) -> None:
        """What was multiplied before."""
        for four, gram in self.waiting:
            if four == 0:
                self.until()
            self.warp.keep(self.to + 4 * four * (self.warp.plan.pitch * 4), gram)
            self.last = [gram[0][0], gram[1][2]]
        self.waiting = []

    def finish(self) -> None:
        if not self.steps:
            self.waiting = [(four, [[Float32(0.0)] * 4] * 2) for four in range(TILE // STREAMS)]
        self.store()


class Collapsing(Warp):
    """`collapse`: from streams and coefficients to x."""

    @cute.jit
    def run(self, out: Any, store_x: Any, x: Any, new: Any) -> None:
        """All tiles. A lane's columns are the same in all of them, and so are their weights."""
        plan, mail = self.plan, self.mail
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
            stage, phase = i % plan.stages, i // plan.stages % 2
            if cutlass.const_expr(plan.post):
                cute.arch.mbarrier_wait(self.made + stage, phase)
                self.store(store_x, made, to_new, i, stage)
            else:
                cute.arch.mbarrier_wait(self.ring.barriers + stage, phase)
            mail.wait(GATES, stage, phase)
            if self.warp == 0 and self.lane == 0 and i + mail.count < self.place.count:
                mail.expect(GATES, stage)
            self.collapse(weight, loaded, out, self.place.tile(i) * TILE, stage)
            if cutlass.const_expr(plan.post) and self.lane == 0:
                cute.arch.cp_async_bulk_wait_group(0, read=True)
            arrive_with(self.ring.barriers + plan.stages + stage, self.lane, [loaded[0]])
        if cutlass.const_expr(plan.post) and self.lane == 0:
            cute.arch.cp_async_bulk_wait_group(0, read=False)

    @cute.jit
    def store(self, store_x: Any, made: Any, to_new: Any, i: Any, stage: Any) -> None:
        """New streams to memory, a stream a warp. One lane issues it, and later waits for what it has issued."""
        plan = self.plan
        if self.warp < STREAMS and self.lane == 0:
            for b in cutlass.range_constexpr(plan.boxes):
                column = self.place.rank * plan.boxes + b
                place = to_new[None, self.place.tile(i), self.warp, column]
                cute.copy(store_x, made[None, self.warp, b, stage], place)
            cute.arch.cp_async_bulk_commit_group()

    @cute.jit
    def collapse(self, weight: Any, loaded: Any, out: Any, first: Any, stage: Any) -> None:
        """u = sum_j pre[j] X[j], rounded; x = u / rms * weight. Tokens of a warp one by one, 8 columns a lane."""
        plan, memory, mail, lane = self.plan, self.memory, self.mail, self.lane
        tile = memory.streams + stage * plan.tile_bytes
        loaded[0] = Uint32(0)
        for k in cutlass.range_constexpr(TILE // plan.collapse):
            token = self.warp + k * plan.collapse
            row = first + token
            pre = [w.bitcast(Float32) for w in load_words(mail.gates[None, token, stage].iterator.toint())]
            inverse = mail.inverses[token, stage]
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
                        val.store_four(target.iterator, words)


@dataclass(frozen=True)
class Sending:
    """`send`: sums over the warps that project, to the CTAs that make coefficients of them. By one warp."""

    plan: TogetherConfig
    place: Place
    mail: Mail
    memory: Memory
    summed: Ring

    def items(self) -> list[Any]:
        """What a lane sends: of the n-th 32 messages the token and the vector, four bits each; four of them a word."""
        vectors, lane = self.plan.vectors, Uint32(cute.arch.lane_idx())
        words: list[Any] = []
        for n in range(-(-TILE * vectors // WARP)):
            item = lane + n * WARP
            byte = (item // vectors & 15 | item % vectors << 4) << n % 4 * 8
            words[n // 4 :] = [words[-1] | byte if n % 4 else byte]
        return words

    @cute.jit
    def send(self, items: Any, i: Any, at: Any, mixer: Any) -> None:
        """Of every token, four numbers a lane at a time. `mixer`: this warp's number, the place of the tile's sums if there are
        several; at: of the message.
        """
        plan, mail, lane = self.plan, self.mail, cute.arch.lane_idx()
        size = plan.warps * TILE * plan.pitch * 4
        sums = self.memory.sums.iterator.toint() + (mixer * size if plan.buffers > 1 else 0)
        target, barrier = mail.sums[None, self.place.rank, at].iterator.toint(), mail.barrier(SUMS, at).toint()
        cute.arch.mbarrier_wait(self.summed.barriers + mixer, i >> 1 & 1)
        for n in cutlass.range_constexpr(-(-TILE * plan.vectors // WARP)):
            if cutlass.const_expr((n + 1) * WARP <= TILE * plan.vectors) or n * WARP + lane < TILE * plan.vectors:
                item = items[n // 4] >> (n % 4 * 8)
                token, v = Int32(item & 15), Int32(item >> 4 & 15)
                place = sums + (n * WARP + lane) * 16
                if cutlass.const_expr(plan.pitch != 4 * plan.vectors):  # the outputs are half of a product's
                    at = cutlass.select_(v < plan.vectors - STREAMS, v, v + plan.pitch // 4 - plan.vectors)
                    place = sums + token * (plan.pitch * 4) + at * 16
                parts = [
                    [w.bitcast(Float32) for w in load_words(place + w * (TILE * plan.pitch * 4))] for w in range(plan.warps)
                ]
                four = [enc.tree(enc.add, [part[e] for part in parts]) for e in range(4)]
                val.send_four(target + v * 16, barrier, token, four)
        cute.arch.sync_warp()
        if lane == 0:
            cute.arch.mbarrier_arrive(self.summed.barriers + MIXERS + mixer)
