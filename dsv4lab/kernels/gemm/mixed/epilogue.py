"""Sums of a tile -> y, through shared memory, a slice of tokens at a time. Two ways:

Directly, where a warpgroup holds whole sums and y is BF16: results are finished in registers, transposed by `stmatrix` and
stored 16 bytes a thread. Warpgroups do not wait for each other, so that one multiplies while the other stores; each has two
buffers, which take turns.

By sums, where several hold a share of them: every warp writes its own in float32, then each thread adds up and finishes some.
The CTAs of a cluster have some of the tokens each. Few sums they send each other (`st.async`: a fence of the cluster takes
0.3 us); many they read in each other's memory, 16 bytes a thread:

    ready   what a CTA adds up is there         read   all CTAs have read: the buffers may be written again

Where out is argmax, results themselves are not written, but for every token and part of the tile's rows the largest one and its
row. They are those of a float32 y, to the bit; the lanes that have a token's compare theirs. Where out is sample, it is the
largest of y / T + noise, of which four columns share a call of the generator: what `head.sampler` draws from y, unfiltered.
Where out is peaks, y is written, and beside it what argmax leaves.

Where SwiGLU's results are quantised (requant), they are first rounded to BF16, as if written; then the lanes that have columns
of a block agree on its largest magnitude, and what leaves is the values of its codes, see `requantise`.

Without `from __future__ import annotations`: CuTeDSL reads the annotations themselves.
"""

from dataclasses import dataclass
from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64, Uint32, Uint64

from dsv4lab.kernels._common.order import image, largest_of, largest_of_lanes, pack
from dsv4lab.kernels._common.ptx import exp2, store_global
from dsv4lab.kernels.gemm.mixed import requantise
from dsv4lab.kernels.gemm.mixed.config import BLOCK, PITCH_PAD
from dsv4lab.kernels.head.sampler.draw import keys_of
from dsv4lab.kernels.quant.rows import encode as enc

_BARRIER = 1  # named barrier of the multiplying warps; the next ones are each warpgroup's own
_LOG2_E = 1.4426950408889634


@dataclass(frozen=True)
class Epilogue:
    """Where a CTA's results go, and what is done to them on the way: the kernel's arguments, buffer and barriers."""

    plan: cutlass.Constexpr
    y: Any
    second: Any
    peaks: Any
    alpha: Any
    factor: Any
    slots: Any
    slot_weight: Any
    given: Any
    draw: Any
    top_k: Any
    group_rows: Any
    limit: Any
    sums: Any
    ready: Any
    read: Any

    @property
    def _columns(self) -> Any:
        """Of all results."""
        return self.y.shape[1] + (self.second.shape[1] if self.plan.two else 0)

    def _sync(self) -> None:
        cute.arch.barrier(barrier_id=_BARRIER, number_of_threads=self.plan.warps * 32)

    @cute.jit
    def store(self, total: Any, matrix: Any, row_tile: Any, first: Any, last: Any, turn: Any) -> Any:
        """A tile's sums to rows `first` to `last` of y; `turn` counts the uses of the buffers."""
        plan = self.plan
        terms = None
        if cutlass.const_expr(plan.direct and (plan.slotted or plan.scaled not in ("no", "matrix"))):
            terms = self._tile_terms(row_tile, first, last)
        blocks = None
        if cutlass.const_expr(plan.requant):
            blocks = enc.global_terms(self.given[matrix])
        for s in cutlass.range_constexpr(plan.tokens // plan.slice):
            if first + s * plan.slice < last:
                if cutlass.const_expr(plan.direct):
                    turn = self._store_directly(total, terms, matrix, row_tile, first, last, turn, s)
                else:
                    turn = self._store_sums(total, blocks, matrix, row_tile, first, last, turn, s)
        return turn

    # ---- directly ------------------------------------------------------------------------------------------------------
    @cute.jit
    def _store_directly(
        self, total: Any, terms: Any, matrix: Any, row_tile: Any, first: Any, last: Any, turn: Any, s: cutlass.Constexpr
    ) -> Any:
        plan = self.plan
        thread, _, _ = cute.arch.thread_idx()
        gains = self._gains(matrix)
        group, mine = thread // 128, thread % 128
        lane, warp = mine % 32, mine // 32
        start = first + s * plan.slice
        columns = plan.rows_out // (plan.slabs // 4)  # of y that a warpgroup has
        buffer = self.sums.iterator.toint() + (group * 2 + turn % 2) * (plan.slice * plan.direct_pitch)
        # Matrices of eight tokens by eight columns: a warp has two for eight tokens, of a pair one. `stmatrix` takes four.
        across = 1 if plan.paired else 2
        which = lane // 8
        place = (which // across * 8 + lane % 8) * plan.direct_pitch + (warp * across + which % across) * 16
        words = []
        for i in cutlass.range_constexpr(plan.slice // 8):
            words.extend(self._finished(total, terms, gains, s * plan.slice + 8 * i))
            if cutlass.const_expr(len(words) == 4):
                at = buffer + place + (i + 1 - 4 // across) * 8 * plan.direct_pitch
                _store_matrices(at, words)
                words = []
        cute.arch.barrier(barrier_id=_BARRIER + 1 + group, number_of_threads=128)
        units = columns // 8
        for u in cutlass.range_constexpr(plan.slice * units // 128):
            token, unit = (u * 128 + mine) // units, (u * 128 + mine) % units
            row = start + token
            column = row_tile * plan.rows_out + group * columns + unit * 8
            if row < last and column < self._columns:
                source = buffer + token * plan.direct_pitch + unit * 16
                if cutlass.const_expr(plan.two) and column >= self.y.shape[1]:
                    _copy_16(self.second[row, None].iterator + (column - self.y.shape[1]), source)
                else:
                    _copy_16(self.y[row, None].iterator + column, source)
        return turn + 1

    @cute.jit
    def _tile_terms(self, row_tile: Any, first: Any, last: Any) -> Any:
        """Factors and weights of a tile's rows: lane l holds those of rows l, l + 32, .. (all loads at once)."""
        plan = self.plan
        lane = cute.arch.lane_idx()
        count = plan.tokens // 32
        terms = cute.make_rmem_tensor((2 * count,), Float32)
        for j in cutlass.range_constexpr(count):
            row = cutlass.min(first + 32 * j + lane, last - 1)
            terms[2 * j], terms[2 * j + 1] = self._terms(row, row_tile * plan.rows_out)  # a group's rows are whole tiles
        return terms

    def _finished(self, total: Any, terms: Any, gains: Any, token: int) -> list[Any]:
        """A thread's results for eight tokens of the tile: pairs of BF16 for columns g and g + 8, of a pair for g."""
        plan = self.plan
        at = token // 8 * 4
        values: list[list[Any]] = [[], []]
        for e in range(2):
            scale, weight = Float32(1.0), Float32(1.0)
            if terms is not None:
                lane = token % 32 + cute.arch.lane_idx() % 4 * 2 + e
                scale, weight = (cute.arch.shuffle_sync(terms[token // 32 * 2 + which], lane) for which in range(2))
            low, high = total[at + e] * (gains[0] * scale), total[at + 2 + e] * (gains[1] * scale)
            if plan.paired:
                values[0].append(self._swiglu(low, high) * weight)
            else:
                values[0].append(low * weight)
                values[1].append(high * weight)
        return [_pack(*pair) for pair in values if pair]

    # ---- by sums -------------------------------------------------------------------------------------------------------
    @cute.jit
    def _store_sums(
        self, total: Any, blocks: Any, matrix: Any, row_tile: Any, first: Any, last: Any, turn: Any, s: cutlass.Constexpr
    ) -> Any:
        plan = self.plan
        thread, _, _ = cute.arch.thread_idx()
        lane, warp = thread % 32, thread // 32
        pitch, count = plan.rows + PITCH_PAD, plan.slice // plan.cluster
        rank = Int32(0)
        if cutlass.const_expr(plan.cluster > 1):
            rank = cute.arch.block_idx_in_cluster()
            cute.arch.mbarrier_wait(self.read, turn % 2 ^ 1)
        teams = plan.slabs // plan.per_warp
        split = warp // teams + (rank * plan.splits if plan.sends else 0)
        for p in cutlass.range_constexpr(plan.per_warp):
            for i in cutlass.range_constexpr(plan.slice // 8):
                for e in cutlass.range_constexpr(4):
                    token = 8 * i + 2 * (lane % 4) + e % 2
                    column = (warp % teams + p * teams) * 16 + lane // 4 + 8 * (e // 2)
                    at = (split * plan.kept + token % plan.kept) * pitch + column
                    mine = total[p * (plan.tokens // 2) + (s * plan.slice // 8 + i) * 4 + e]
                    if cutlass.const_expr(plan.sends):
                        there = self.sums.iterator + at
                        cute.arch.store_async_dsmem(there, mine.bitcast(Int32), self.ready, token // count)
                    else:
                        self.sums[at] = mine
        quads = plan.rows_out // 4
        units = count * quads
        if cutlass.const_expr(plan.sends):
            if thread == 0:
                cute.arch.mbarrier_arrive_and_expect_tx(self.ready, 4 * plan.splits * plan.slice * plan.rows)
            cute.arch.mbarrier_wait(self.ready, turn % 2)
        else:
            self._sync()
            if cutlass.const_expr(plan.cluster > 1):
                if thread < plan.cluster:
                    cute.arch.fence_acq_rel_cluster()
                    cute.arch.mbarrier_arrive(self.ready, thread)
                cute.arch.mbarrier_wait(self.ready, turn % 2)
                cute.arch.fence_acq_rel_cluster()
        threads = plan.warps * 32
        shares = (units + threads - 1) // threads
        values = cute.make_rmem_tensor((4, shares), Float32)
        values.fill(0.0)
        places = []
        for u in cutlass.range_constexpr(shares):
            share = u * threads + thread
            token, quad = rank * count + share // quads, share % quads
            row = first + s * plan.slice + token
            column = row_tile * plan.rows_out + 4 * quad
            counts = share < units and row < last
            inside = counts and column < (self.group_rows if plan.picks else self._columns)
            places.append((counts, inside, row, column, quad))
            if inside:
                at = token % plan.kept * pitch
                if cutlass.const_expr(plan.picks):
                    value = self._added(at + 4 * quad, self.alpha[0, 0])
                else:
                    value = self._quad(matrix, row, column, quad, at)
                for e in cutlass.range_constexpr(4):
                    values[e, u] = value[e]
        self._sync()  # sums are read
        if cutlass.const_expr(plan.cluster > 1) and thread < plan.cluster:
            if cutlass.const_expr(not plan.sends):
                cute.arch.fence_acq_rel_cluster()
            cute.arch.mbarrier_arrive(self.read, thread)
        for u in cutlass.range_constexpr(shares):
            counts, inside, row, column, quad = places[u]
            value = values[None, u]
            if cutlass.const_expr(plan.picks):
                self._store_largest(counts, inside, value, row, column, quad)
            elif cutlass.const_expr(plan.requant):
                self._store_block(inside, value, blocks, row, column)
            elif inside:
                self._store_quad(value, row, column)
        return turn + 1

    @cute.jit
    def _store_quad(self, value: Any, row: Any, column: Any) -> None:
        """Four neighbouring columns of one row of y."""
        result = cute.make_rmem_tensor((4,), self.y.element_type)
        result.store(value.load().to(self.y.element_type))
        if cutlass.const_expr(self.plan.two) and column >= self.y.shape[1]:
            cute.autovec_copy(result, cute.local_tile(self.second[row, None], (4,), ((column - self.y.shape[1]) // 4,)))
        else:
            cute.autovec_copy(result, cute.local_tile(self.y[row, None], (4,), (column // 4,)))

    @cute.jit
    def _store_block(self, inside: Any, value: Any, blocks: Any, row: Any, column: Any) -> None:
        """The same, quantised with the neighbouring lanes' columns. All lanes come here; inside: whether there are columns."""
        words = cute.make_rmem_tensor((2,), Uint32)
        for i in cutlass.range_constexpr(2):
            words[i] = _pack(value[2 * i], value[2 * i + 1])
        out = cute.make_rmem_tensor((2,), Uint32)
        mine = [words[0], words[1]]
        requantise.nvfp4_values(out, mine, requantise.largest_bits(mine, BLOCK // 4), blocks)
        if inside:
            store_global(self.y[row, None].iterator + column, [out[0], out[1]])

    @cute.jit
    def _quad(self, matrix: Any, row: Any, column: Any, quad: Any, offset: Any) -> Any:
        """Four neighbouring results of a row, float32."""
        plan = self.plan
        scale, weight = self._terms(row, column)
        gains = self._gains(matrix)
        value = cute.make_rmem_tensor((4,), Float32)
        if cutlass.const_expr(plan.paired):
            at = offset + quad // 2 * 16 + quad % 2 * 4
            gate, up = self._added(at, gains[0] * scale), self._added(at + 8, gains[1] * scale)
            for e in cutlass.range_constexpr(4):
                value[e] = self._swiglu(gate[e], up[e]) * weight
        else:
            added = self._added(offset + 4 * quad, gains[0] * scale)
            for e in cutlass.range_constexpr(4):
                value[e] = added[e] * weight
        return value

    @cute.jit
    def _store_largest(self, counts: Any, inside: Any, value: Any, row: Any, column: Any, quad: Any) -> None:
        """Of four neighbouring columns, and of the other lanes' with the same row and part, the largest. All lanes come here.

        counts: whether the row is one. Columns past the last, group_rows, are none and leave 0, which is below every float.
        """
        plan = self.plan
        best = Uint64(0)
        if inside:
            keys = [value[e] for e in range(4)]
            if cutlass.const_expr(plan.out == "sample"):
                keys = keys_of(keys, column // 4, self.factor[row], *(t[row] for t in self.draw))
            best = largest_of([pack(image(keys[e]), column + e) for e in range(4)])
            if cutlass.const_expr(plan.out == "peaks"):
                cute.autovec_copy(value, cute.local_tile(self.y[row, None], (4,), (column // 4,)))
        lanes = plan.part_rows // 4  # a power of two: tokens begin at multiples of it
        best = largest_of_lanes(best, lanes)
        into, part = self.peaks if plan.out == "peaks" else self.y, column // plan.part_rows
        if counts and quad % lanes == 0 and part < into.shape[1]:
            into[row, part] = Int64(best)

    @cute.jit
    def _added(self, at: Any, gain: Any) -> Any:
        """Four neighbouring sums, over the splits of every CTA in turn, times the gain."""
        plan = self.plan
        plane, reads = plan.kept * (plan.rows + PITCH_PAD), plan.cluster > 1 and not plan.sends
        value = cute.make_rmem_tensor((4,), Float32)
        value.fill(0.0)
        for i in cutlass.range_constexpr(plan.cluster * plan.splits):
            address = (self.sums.iterator + at + (i % plan.splits if reads else i) * plane).toint()
            part = _load_cluster(address, i // plan.splits) if reads else _load(address)
            for e in cutlass.range_constexpr(4):
                value[e] = value[e] + part[e]
        for e in cutlass.range_constexpr(4):
            value[e] = value[e] * gain
        return value

    # ---- both ----------------------------------------------------------------------------------------------------------
    def _gains(self, matrix: Any) -> tuple[Any, Any]:
        """What products are multiplied by, of a pair gate's and up's."""
        gains = self.alpha[matrix, 0], self.alpha[matrix, 1]
        if self.plan.scaled == "matrix":
            factor = self.factor[matrix]
            return gains[0] * factor, gains[1] * factor
        return gains

    def _terms(self, row: Any, column: Any) -> tuple[Any, Any]:
        """Of a row of y: the factor of its products, the weight of its result."""
        plan = self.plan
        token, scale, weight = row, Float32(1.0), Float32(1.0)
        if plan.slotted:
            slot = row if plan.single else self.slots[row]
            token = Int32(0) if plan.beside else slot // self.top_k  # with a matrix beside, rows are one token's
            weight = self.slot_weight[slot]
        if plan.scaled == "token":
            scale = self.factor[token]
        elif plan.scaled == "row" and plan.grouped:
            scale = self.factor[row]
        elif plan.scaled == "row":
            groups = cute.ceil_div(self.y.shape[1], self.group_rows)
            scale = self.factor[row * groups + column // self.group_rows]
        return scale, weight

    @cute.jit
    def _swiglu(self, gate: Any, up: Any) -> Any:
        """silu(min(gate, limit)) * clamp(up, -limit, limit), both rounded like the output first; NaN stays."""
        g, u = Float32(self.y.element_type(gate)), Float32(self.y.element_type(up))
        g = self.limit if g > self.limit else g
        u = self.limit if u > self.limit else -self.limit if u < -self.limit else u
        return g * _reciprocal(1.0 + exp2(g * Float32(-_LOG2_E))) * u

    @cute.jit
    def leave(self, turn: Any) -> None:
        """Nobody leaves before the others have told it that they read."""
        cute.arch.mbarrier_wait(self.read, turn % 2 ^ 1)


def _load(address: Any) -> Any:
    code = "ld.shared.v4.f32 {{$w0}, {$w1}, {$w2}, {$w3}}, [{$r0}];"
    return cute.arch.inline_ptx(code, write_only_types=[Float32] * 4, read_only_args=[address])


def _load_cluster(address: Any, rank: int) -> Any:
    """Four floats of another CTA's shared memory."""
    code = "{ .reg .b32 there; mapa.shared::cluster.u32 there, {$r0}, {$r1}; "
    code += "ld.shared::cluster.v4.f32 {{$w0}, {$w1}, {$w2}, {$w3}}, [there]; }"
    return cute.arch.inline_ptx(code, write_only_types=[Float32] * 4, read_only_args=[address, Int32(rank)])


def _reciprocal(value: Any) -> Any:
    """Within 1 unit in the last place."""
    return cute.arch.inline_ptx("rcp.approx.ftz.f32 {$w0}, {$r0};", write_only_types=[Float32], read_only_args=[value])


def _pack(low: Any, high: Any) -> Any:
    """Two floats as a pair of BF16."""
    return cute.arch.inline_ptx("cvt.rn.bf16x2.f32 {$w0}, {$r1}, {$r0};", write_only_types=[Uint32], read_only_args=[low, high])


def _store_matrices(address: Any, words: list[Any]) -> None:
    """Four 8 x 8 matrices of BF16 to shared memory, transposed; a lane's address is that of a row of one of them."""
    code = "stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [{$r0}], {{$r1}, {$r2}, {$r3}, {$r4}};"
    cute.arch.inline_ptx(code, read_only_args=[address, *words])


def _copy_16(target: Any, source: Any) -> None:
    """16 bytes from shared to global memory."""
    code = "{ .reg .b32 a, b, c, d; ld.shared.v4.b32 {a, b, c, d}, [{$r1}]; st.global.v4.b32 [{$r0}], {a, b, c, d}; }"
    cute.arch.inline_ptx(code, read_only_args=[target, source])
