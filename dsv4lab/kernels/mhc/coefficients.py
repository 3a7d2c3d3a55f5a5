"""From a token's sums to coefficients: logits, sigmoids, and Sinkhorn's iterations by a warp of their own.

Sinkhorn is serial, 39 divisions of rows or columns after each other, and nothing in these kernels needs its result: a warp of
its own has it and the softmax before, for up to 8 tokens at once, a lane each (of the softmax a row each). Divisors of rows and
columns are kept, not quotients: a division is a product, a reciprocal and two products more after each other.
Arithmetic: logits in float64, from there on float32 with divisions within 2^-22; comb is some 2e-6 from the exact one,
relative.

Without `from __future__ import annotations`: CuTeDSL reads the annotations themselves.
"""

from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Float64

from dsv4lab.kernels.mhc import values as val
from dsv4lab.kernels.mhc.config import BATCH, STREAMS, WARP
from dsv4lab.kernels.quant.rows import encode as enc

LOGITS = STREAMS * STREAMS
_READY, _FREE = 2, 4  # barriers of two batches of logits each
_FIRST_LOGIT = 2 * STREAMS  # output with the first entry of comb


class Coefficients:
    """Of streams of `columns`; by `mixers` warps that take turns."""

    def __init__(self, columns: int, mixers: int = 1) -> None:
        self.columns, self.mixers = columns, mixers
        self.threads = (mixers + 1) * WARP  # that pass batches

    @cute.jit
    def logit(self, total: Any, square: Any, factor: Any, offset: Any, eps: Any) -> Any:
        """A lane's sum over the root of the mean of the squares, scaled and moved; all float64."""
        mean = square * Float64(1.0 / (STREAMS * self.columns)) + eps.to(Float64)
        return total * val.rsqrt64(mean) * factor + offset

    @cute.jit
    def hand_over(self, z: Any, logits: Any, i: Any, count: Any, lane: Any) -> None:
        """The logits of comb to the warp that makes comb of them. By one warp; lanes 8 to 23 have comb."""
        batch, at = i // BATCH % 2, i % BATCH
        if at < self.mixers and i >= 2 * BATCH:
            cute.arch.barrier(barrier_id=_FREE + batch, number_of_threads=self.threads)
        if lane >= _FIRST_LOGIT and lane < _FIRST_LOGIT + LOGITS:
            logits[lane - _FIRST_LOGIT, at, batch] = z
        if at + self.mixers >= BATCH or i + self.mixers >= count:
            cute.arch.barrier_arrive(barrier_id=_READY + batch, number_of_threads=self.threads)

    @cute.jit
    def store_post(self, gate: Any, new_post: Any, token: Any, lane: Any) -> None:
        """By one warp; lanes 4 to 7 have it."""
        if lane >= STREAMS and lane < _FIRST_LOGIT:
            new_post[token, lane - STREAMS] = gate + gate

    @cute.jit
    def leave(self, mixer: Any, count: Any) -> None:
        """After its last token, by a mixer's number; it may have none in the last batch, which waits for all mixers."""
        last = (count - 1) // BATCH
        if count > 0 and mixer >= count - last * BATCH:
            if last >= 2:
                cute.arch.barrier(barrier_id=_FREE + last % 2, number_of_threads=self.threads)
            cute.arch.barrier_arrive(barrier_id=_READY + last % 2, number_of_threads=self.threads)

    @cute.jit
    def sinkhorn(self, logits: Any, new_comb: Any, first_token: Any, step: Any, count: Any, hc_eps: Any, iters: Any) -> None:
        """comb of `count` tokens from `first_token` in steps, in batches, by one warp, a token a lane: softmax of rows, then
        columns and rows in turn.
        """
        lane = cute.arch.lane_idx()
        for first in cutlass.range(0, count, BATCH, unroll=1):
            batch = first // BATCH % 2
            cute.arch.barrier(barrier_id=_READY + batch, number_of_threads=self.threads)
            last = cutlass.min(count - first, BATCH) - 1
            # a row a lane, then a token a lane
            mine, token = cutlass.min(lane, last), cutlass.min(lane // STREAMS, last)
            row = [logits[lane % STREAMS * STREAMS + i, token, batch] for i in range(STREAMS)]
            largest = _larger(_larger(row[0], row[1]), _larger(row[2], row[3]))
            power = [val.exponential((row[i] - largest).to(Float32)) for i in range(STREAMS)]
            by = cute.arch.rcp_approx(enc.add(enc.add(power[0], power[1]), enc.add(power[2], power[3])))
            a = cute.make_rmem_tensor((LOGITS,), Float32)
            for i in cutlass.range_constexpr(STREAMS):
                part = enc.fma(power[i], by, hc_eps)
                for j in cutlass.range_constexpr(STREAMS):
                    a[STREAMS * j + i] = cute.arch.shuffle_sync(part, mine * STREAMS + j)
            if first + 2 * BATCH < count:
                cute.arch.barrier_arrive(barrier_id=_FREE + batch, number_of_threads=self.threads)
            _divide(a, hc_eps)
            # entries are then a[j, i] over (rows[j] columns[i])
            rows, columns = (cute.make_rmem_tensor((STREAMS,), Float32) for _ in range(2))
            rows.fill(1.0)
            columns.fill(1.0)
            for _ in cutlass.range(iters - 1, unroll=1):
                _scale(a, rows, columns, hc_eps, 1, STREAMS)
                _scale(a, columns, rows, hc_eps, STREAMS, 1)
            for n in cutlass.range_constexpr(STREAMS):
                rows[n], columns[n] = cute.arch.rcp_approx(rows[n]), cute.arch.rcp_approx(columns[n])
            for n in cutlass.range_constexpr(LOGITS):
                a[n] = enc.mul(a[n], enc.mul(rows[n // STREAMS], columns[n % STREAMS]))
            if lane == mine:
                cute.autovec_copy(a, new_comb[first_token + (first + lane) * step, None])


def sigmoid(z: Any) -> Any:
    """1 / (1 + e^-z) of a float64, within 2^-20; e^-88 and less are as good as 0."""
    high = z.to(Float32)
    low = (z - high.to(Float64)).to(Float32)
    power = val.exponential(enc.negative(high))
    # e^-(high + low); of the largest z the rest is no correction any more, and must not become infinite
    low = cute.arch.fmax(cute.arch.fmin(low, Float32(0.5)), Float32(-0.5))
    return cute.arch.rcp_approx(enc.add(Float32(1.0), enc.fma(power, enc.negative(low), power)))


def _larger(a: Any, b: Any) -> Any:
    return cutlass.select_(b > a, b, a)


def _divide(a: Any, eps: Any) -> None:
    """Entries by the sums of their columns, plus eps."""
    for i in range(STREAMS):
        places = [i + STREAMS * j for j in range(STREAMS)]
        low, high = enc.add(a[places[0]], a[places[1]]), enc.add(a[places[2]], a[places[3]])
        by = cute.arch.rcp_approx(enc.add(enc.add(low, high), eps))
        for place in places:
            a[place] = enc.mul(a[place], by)


def _scale(a: Any, found: Any, given: Any, eps: Any, line: int, other: int) -> None:
    """Rows' divisors from columns' (line 1, other 4) or columns' from rows' (line 4, other 1).

    The sum of a line is that of a over the given divisors, over the line's own before; plus eps and times that divisor it is
    the new one. Two of a sum's four share a reciprocal; all else is made meanwhile. Divisors are near to 1: after the first
    division of columns a line's sum is at least a quarter, and eps is below 1, from where on they would grow without end.
    """
    low, high = enc.mul(given[0], given[1]), enc.mul(given[2], given[3])
    sums = []
    for n in range(STREAMS):
        at = [a[n * other + k * line] for k in range(STREAMS)]
        sums.append([enc.fma(at[k], given[k + 1], enc.mul(at[k + 1], given[k])) for k in (0, 2)])
    by = [cute.arch.rcp_approx(low), cute.arch.rcp_approx(high)]
    for n in range(STREAMS):
        found[n] = enc.fma(by[1], sums[n][1], enc.fma(by[0], sums[n][0], enc.mul(eps, found[n])))
