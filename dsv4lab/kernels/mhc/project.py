"""Sums of products: every token's streams times `fn`, and their squares, in parts that `finish` adds up.

    partial[m, s, n] = sum over slice s of D and all streams of fn[n, j D + d] X[m, j, d];  partial[m, s, N] = sum of X^2

`fn` stays where it is and the tokens pass by: a warp holds `fn` of 16 columns of D in all streams in registers, as three BF16
(72 words a lane for 24 outputs), for the whole launch, and takes 16 tokens at a time straight from memory to `mma.sync`. So
`fn` is read once for each group of CTAs, not once for each tile of tokens, and no operand passes through shared memory. Two
or three tiles are in flight. A product's sum runs over 64 of K; the warps' sums are added in float32 through shared memory,
slices in float64 by `finish`: the tensor core's own rounding over a long K never comes in.

With `post` the streams are those of `mhc_post` (`values.new_words`); they are not stored here.
A sum is a message of its own: 32 bits that are not `UNSET`. No fences and no flags, so `finish` may run beside this kernel.

Bytes: streams (and y) once; of sums 100 a token and slice, written here, read and cleared by `finish`.

Without `from __future__ import annotations`: CuTeDSL reads the annotations themselves.
"""

from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Uint32
from cutlass.memory import SmemAllocator

from dsv4lab.kernels._common.ptx import copy_async, load_words
from dsv4lab.kernels.mhc import values as val
from dsv4lab.kernels.mhc.config import BLOCK, COEFFICIENTS, PARTS, STREAMS, TILE, WARP, MixConfig
from dsv4lab.kernels.quant.rows import encode as enc

_TEAM = 1  # barrier of the warps that project
_WORDS = 2  # of a lane's four columns
_ROWS = 2  # of a tile that a lane has: g and g + 8


class Project:
    """The kernel of one `MixConfig`."""

    def __init__(self, plan: MixConfig) -> None:
        self.plan = plan
        self.pitch = plan.tiles * 8 + 2  # floats of a token's sums; even, and a warp's stores hit every bank as often

    @cute.kernel
    def kernel(self, streams: Any, y: Any, post: Any, comb: Any, fn: Any, partial: Any) -> None:
        self.run(SmemAllocator(), streams, y, post, comb, fn, partial)

    @cute.jit
    def run(self, memory: Any, streams: Any, y: Any, post: Any, comb: Any, fn: Any, partial: Any) -> None:
        plan = self.plan
        ahead = plan.ahead
        thread, _, _ = cute.arch.thread_idx()
        piece, group, _ = cute.arch.block_idx()
        _, groups, _ = cute.arch.grid_dim()
        warp, lane = cute.arch.make_warp_uniform(thread // WARP), thread % WARP
        sums = memory.allocate_tensor(
            Float32,
            cute.make_layout((self.pitch, TILE, plan.warps, 2)),
            byte_alignment=16,
        )
        coefficients = memory.allocate_tensor(
            Float32, cute.make_layout((COEFFICIENTS, TILE, ahead if plan.post else 1)), byte_alignment=16
        )
        block = piece * plan.warps + warp
        held = cute.make_rmem_tensor((plan.fragment_words,), Uint32)
        for v in cutlass.range_constexpr(plan.fragment_words // 4):
            words = val.load_four(fn[block, v, lane, None].iterator)
            for i in cutlass.range_constexpr(4):
                held[4 * v + i] = words[i]
        cute.arch.griddepcontrol_wait()
        if cutlass.const_expr(plan.split == 1):
            # Only now: what this lets start may then read what this kernel reads.
            cute.arch.griddepcontrol_launch_dependents()

        tiles = cute.ceil_div(streams.shape[0], TILE)
        x = cute.make_rmem_tensor((_WORDS, STREAMS, _ROWS, ahead), Uint32)
        added = cute.make_rmem_tensor((_WORDS, _ROWS, ahead), Uint32)
        for b in cutlass.range_constexpr(ahead):
            self._load(streams, y, x, added, b, group + b * groups, block, lane)
            if cutlass.const_expr(plan.post):
                self._load_coefficients(post, comb, coefficients, b, group + b * groups, thread)
        if cutlass.const_expr(plan.post):
            cute.arch.cp_async_wait_group(ahead - 1)
            self._meet()
        if cutlass.const_expr(plan.split > 1):  # a tile is all
            self._tile(coefficients, held, x, added, sums, partial, 0, Int32(0), piece, warp, lane, thread)
        else:
            for tile in cutlass.range(group, tiles, groups * ahead, unroll=1):
                for b in cutlass.range_constexpr(ahead):
                    current = tile + b * groups
                    if current < tiles:
                        self._tile(coefficients, held, x, added, sums, partial, b, current, piece, warp, lane, thread)
                        self._load(streams, y, x, added, b, current + ahead * groups, block, lane)
                        if cutlass.const_expr(plan.post):
                            self._load_coefficients(post, comb, coefficients, b, current + ahead * groups, thread)

    def _meet(self) -> None:
        cute.arch.barrier(barrier_id=_TEAM, number_of_threads=self.plan.warps * WARP)

    @cute.jit
    def _load(self, streams: Any, y: Any, x: Any, added: Any, b: cutlass.Constexpr, tile: Any, block: Any, lane: Any) -> None:
        """A lane's four columns of the tile's rows g and g + 8; past the last token the last again, which is not stored."""
        column = block * (BLOCK // 4) + lane % 4
        for r in cutlass.range_constexpr(_ROWS):
            row = cutlass.min(tile * TILE + lane // 4 + 8 * r, streams.shape[0] - 1)
            for j in cutlass.range_constexpr(STREAMS):
                words = val.load_two(cute.local_tile(streams[row, j, None], (_WORDS,), (column,)).iterator)
                for i in cutlass.range_constexpr(_WORDS):
                    x[i, j, r, b] = words[i]
            if cutlass.const_expr(self.plan.post):
                words = val.load_two(cute.local_tile(y[row, None], (_WORDS,), (column,)).iterator)
                for i in cutlass.range_constexpr(_WORDS):
                    added[i, r, b] = words[i]

    @cute.jit
    def _load_coefficients(self, post: Any, comb: Any, to: Any, b: cutlass.Constexpr, tile: Any, thread: Any) -> None:
        """A tile's post and comb to shared memory, 16 bytes a copy, five a token."""
        runs = COEFFICIENTS // 4
        threads = self.plan.warps * WARP
        for i in cutlass.range_constexpr(-(-TILE * runs // threads)):
            index = i * threads + thread
            if index < TILE * runs:
                token, run = index // runs, index % runs
                row = cutlass.min(tile * TILE + token, post.shape[0] - 1)
                target = to.iterator.toint() + ((b * TILE + token) * COEFFICIENTS + run * 4) * 4
                if run == 0:
                    copy_async(target, post[row, None].iterator, 16)
                else:
                    copy_async(target, cute.local_tile(comb[row, None], (4,), (run - 1,)).iterator, 16)
        cute.arch.cp_async_commit_group()

    def _turn(self, b: int, tile: Any) -> Any:
        """Which of two buffers a tile's sums take: the other than the tile before."""
        _, groups, _ = cute.arch.grid_dim()
        return b % 2 if self.plan.ahead % 2 == 0 else tile // groups % 2

    @cute.jit
    def _tile(
        self,
        coefficients: Any,
        held: Any,
        x: Any,
        added: Any,
        sums: Any,
        partial: Any,
        b: cutlass.Constexpr,
        tile: Any,
        piece: Any,
        warp: Any,
        lane: Any,
        thread: Any,
    ) -> None:
        plan = self.plan
        group, quad = lane // 4, lane % 4
        turn = self._turn(b, tile)
        if cutlass.const_expr(plan.post):
            for r in cutlass.range_constexpr(_ROWS):
                base = coefficients.iterator.toint() + (b * TILE + group + 8 * r) * COEFFICIENTS * 4
                found = [w.bitcast(Float32) for i in range(COEFFICIENTS // 4) for w in load_words(base + 16 * i)]
                for i in cutlass.range_constexpr(_WORDS):
                    new = val.new_words(added[i, r, b], [x[i, j, r, b] for j in range(STREAMS)], found[:4], found[4:])
                    for j in cutlass.range_constexpr(STREAMS):
                        x[i, j, r, b] = new[j]
        total = cute.make_rmem_tensor((4 * plan.tiles,), Float32)
        total.fill(0.0)
        for j in cutlass.range_constexpr(STREAMS):
            a = [x[0, j, 0, b], x[0, j, 1, b], x[1, j, 0, b], x[1, j, 1, b]]
            for part in cutlass.range_constexpr(PARTS - 1, -1, -1):  # the smallest first
                for n in cutlass.range_constexpr(plan.tiles):
                    at = ((j * PARTS + part) * plan.tiles + n) * 2
                    val.mma(total, 4 * n, a, [held[at], held[at + 1]])
        for r in cutlass.range_constexpr(_ROWS):
            square = [Float32(0.0), Float32(0.0)]
            for j in cutlass.range_constexpr(STREAMS):
                for i in cutlass.range_constexpr(_WORDS):
                    two = val.halves(x[i, j, r, b])
                    square = [enc.fma(two[h], two[h], square[h]) for h in range(2)]
            whole = val.over_lanes(enc.add(square[0], square[1]), (1, 2), enc.add)
            row = group + 8 * r
            for n in cutlass.range_constexpr(plan.tiles):
                for e in cutlass.range_constexpr(2):
                    sums[8 * n + 2 * quad + e, row, warp, turn] = total[4 * n + 2 * r + e]
            if quad == 0:
                sums[plan.tiles * 8, row, warp, turn] = whole
        if cutlass.const_expr(plan.post and plan.ahead > 1):  # the next tile's coefficients are there for all after the barrier
            cute.arch.cp_async_wait_group(plan.ahead - 2)
        self._meet()
        kept = plan.outputs + 1
        tokens = cutlass.min(partial.shape[0] - tile * TILE, TILE)
        for index in cutlass.range(thread, tokens * kept, plan.warps * WARP, unroll=1):
            token, n = index // kept, index % kept
            source = n if n < plan.outputs else Int32(plan.tiles * 8)
            value = Float32(0.0)
            for w in cutlass.range_constexpr(plan.warps):
                value = enc.add(value, sums[source, token, w, turn])
            val.store_relaxed(partial[tile * TILE + token, piece, None].iterator + n, val.finite_mark(value))
