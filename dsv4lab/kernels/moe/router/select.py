"""From logits to weights and expert ids: one warp a token.

    s = sqrt(softplus(z)),   ids = the k largest of s + bias, or the table's row,   w = s[ids] / sum(s[ids]) * route_scale

A lane holds experts 128 j + 4 lane .. + 3. Parts of a logit, one for each part of K, are added in order, so that the result
does not depend on timing. The largest is found k times: among the lane's own, then over the warp by `redux` of the bits, made
to compare as unsigned integers do; the lowest of the ids that have it wins, and is struck out.

softplus(z) = max(z, 0) + log1p(e^-|z|), log1p(u) = 2 atanh(u / (2 + u)) by eight terms of its series; below z = -15, where
log1p(u) is u (1 - u / 2), s = e^(z/2) (1 - e^z / 4), which does not underflow before e^(z/2) does. Each step is within a few
2^-23 of its value, s within 2^-20 of s(z) for the float32 z.

Without `from __future__ import annotations`: CuTeDSL reads the annotations themselves.
"""

from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64, Uint32

from dsv4lab.kernels.moe.router.config import PAD, WARP, RouterConfig

_LOG2E, _LOG2E_LOW = 1.44269502162933349609375, 1.9259629911266174681e-08  # their sum is log2(e) to 48 bits
_LN2 = 0.693147180559945309
_TINY_LOGIT = -15.0  # below, e^z is under 2^-21, and its square is nothing beside it
_ATANH = [1.0 / (2 * n + 1) for n in range(8)]  # (1/9)^8 / 17 is 2^-29


class Select:
    """Routing of single tokens, for one `RouterConfig`."""

    def __init__(self, config: RouterConfig) -> None:
        self.plan = config

    @cute.kernel
    def kernel(
        self,
        partial: Any,
        bias: Any,
        table: Any,
        token_ids: Any,
        weights: Any,
        ids: Any,
        scale: Float32,
    ) -> None:
        """A launch of its own: partial (splits, M, padded) f32 -> weights, ids (M, k)."""
        thread, _, _ = cute.arch.thread_idx()
        block, _, _ = cute.arch.block_idx()
        threads, _, _ = cute.arch.block_dim()
        token = block * (threads // WARP) + cute.arch.make_warp_uniform(thread // WARP)
        cute.arch.griddepcontrol_launch_dependents()
        cute.arch.griddepcontrol_wait()
        if token < ids.shape[0]:
            self.route(partial, bias, table, token_ids, weights, ids, scale, token)

    @cute.jit
    def route(
        self, partial: Any, bias: Any, table: Any, token_ids: Any, weights: Any, ids: Any, scale: Any, token: Any
    ) -> None:
        """One token, by a whole warp."""
        plan = self.plan
        lane = cute.arch.lane_idx()
        if cutlass.const_expr(plan.by == "score"):
            mine, score, total = self._top(partial, bias, token, lane)
        else:
            mine, score, total = self._look_up(partial, table, token_ids, token, lane)
        if lane < plan.top_k:
            weights[token, lane] = score / total * scale
            ids[token, lane] = mine

    @cute.jit
    def _top(self, partial: Any, bias: Any, token: Any, lane: Any) -> tuple[Any, Any, Any]:
        """(the lane's chosen id, its score, the sum of the k scores): lane r has the r-th of the k."""
        plan = self.plan
        count = 4 * (plan.padded // PAD)
        added = cute.make_rmem_tensor((count,), Float32)
        for n in cutlass.range_constexpr(count):  # ahead of the logits, whose latency then hides theirs
            added[n] = _load_word(bias.iterator + cutlass.min(_expert(n, lane), plan.experts - 1))
        score = self._logits(partial, token, lane, count)
        key = cute.make_rmem_tensor((count,), Uint32)
        for n in cutlass.range_constexpr(count):
            score[n] = sqrt_softplus(score[n])
            key[n] = _ordered(score[n] + added[n]) if _expert(n, lane) < plan.experts else Uint32(0)
        mine, held, total = Int64(0), Float32(0.0), Float32(0.0)
        for r in cutlass.range(plan.top_k, unroll=1):  # a loop: six copies of it would not be in the instruction cache
            best, at = key[0], _expert(0, lane)
            for n in cutlass.range_constexpr(1, count):
                better = key[n] > best  # a tie stays with the lower id
                best, at = (key[n] if better else best), (_expert(n, lane) if better else at)
            largest = cute.arch.warp_redux_sync(best, "umax")
            chosen = cute.arch.warp_redux_sync(at if best == largest else Int32(2**31 - 1), "min")
            value = Float32(0.0)
            for n in cutlass.range_constexpr(count):
                value = score[n] if _expert(n, lane) == chosen else value
                key[n] = Uint32(0) if _expert(n, lane) == chosen else key[n]
            value = cute.arch.shuffle_sync(value, chosen % PAD // 4)  # from the lane that holds it
            total = total + value
            mine, held = (Int64(chosen) if lane == r else mine), (value if lane == r else held)
        return mine, held, total

    @cute.jit
    def _logits(self, partial: Any, token: Any, lane: Any, count: Any) -> Any:
        """The lane's logits: sums over the parts of K."""
        total = cute.make_rmem_tensor((count,), Float32)
        total.fill(0.0)
        for first in cutlass.range(0, partial.shape[0], self.plan.batch, unroll=1):
            found = [self._part(partial, token, lane, count, first + b) for b in range(self.plan.batch)]
            for b in cutlass.range_constexpr(self.plan.batch):
                for n in cutlass.range_constexpr(count):
                    total[n] = total[n] + (found[b][n] if first + b < partial.shape[0] else Float32(0.0))
        return total

    def _part(self, partial: Any, token: Any, lane: Any, count: int, split: Any) -> list[Any]:
        """The lane's logits of one part of K; past the last part the last again."""
        row = partial[cutlass.min(split, partial.shape[0] - 1), token, None]
        quads = [_load_fresh(cute.local_tile(row, (4,), (j * WARP + lane,)).iterator) for j in range(count // 4)]
        return [value for quad in quads for value in quad]

    @cute.jit
    def _look_up(self, partial: Any, table: Any, token_ids: Any, token: Any, lane: Any) -> tuple[Any, Any, Any]:
        """The same by the table. Token ids are kept inside it, and ids that are no expert's weigh nothing."""
        plan = self.plan
        row = Int64(token_ids[token])
        row = cutlass.min(cutlass.max(row, Int64(0)), Int64(table.shape[0] - 1))
        mine = Int64(table[Int32(row), cutlass.min(lane, plan.top_k - 1)])
        known = mine >= 0 and mine < plan.experts
        expert = Int32(mine) if known else Int32(0)
        logit = Float32(0.0)
        parts = partial.shape[0]
        for first in cutlass.range(0, parts, self.plan.batch, unroll=1):
            places = [partial[cutlass.min(first + b, parts - 1), token, None].iterator + expert for b in range(self.plan.batch)]
            found = [_load_word(place) for place in places]
            for b in cutlass.range_constexpr(self.plan.batch):
                logit = logit + (found[b] if first + b < parts else Float32(0.0))
        score = sqrt_softplus(logit) if known else Float32(0.0)
        total = Float32(0.0)
        for r in cutlass.range_constexpr(plan.top_k):
            total = total + cute.arch.shuffle_sync(score, r)
        return mine, score, total


def sqrt_softplus(z: Any) -> Any:
    """sqrt(log(1 + e^z)) of a float32."""
    size = _unary("abs.f32", z)
    u = _exp(-size)
    v = u * _unary("rcp.approx.f32", u + Float32(2.0))
    square = v * v
    series = Float32(_ATANH[-1])
    for term in reversed(_ATANH[:-1]):
        series = series * square + Float32(term)
    large = _unary("sqrt.approx.f32", cutlass.max(z, Float32(0.0)) + Float32(2.0) * v * series)
    root = _exp(z * Float32(0.5))
    small = root * (Float32(1.0) - Float32(0.25) * root * root)
    return _select(z < Float32(_TINY_LOGIT), small, large)


def _exp(x: Any) -> Any:
    """e^x for x <= 0 or NaN, denormals included; of larger x anything but an error."""
    high = x * Float32(_LOG2E)
    low = _fma(x, Float32(_LOG2E), -high) + x * Float32(_LOG2E_LOW)
    power = _unary("ex2.approx.f32", high)
    # Where the power is 0 so is the answer: -inf would make the correction NaN.
    return _select(power > Float32(0.0), _fma(power, low * Float32(_LN2), power), power)


def _expert(n: int, lane: Any) -> Any:
    """The expert of a lane's n-th value."""
    return Int32(n // 4 * PAD + n % 4) + 4 * lane


def _ordered(value: Any) -> Any:
    """Bits of a float that compare as unsigned integers: both zeros are one, NaN is above all, only a negative NaN is 0."""
    code = "{ .reg .b32 bits, flip; .reg .f32 sum; add.rn.f32 sum, {$r0}, 0f00000000; mov.b32 bits, sum;"
    code += " shr.s32 flip, bits, 31; or.b32 flip, flip, 0x80000000; xor.b32 {$w0}, bits, flip; }"
    return cute.arch.inline_ptx(code, write_only_types=[Uint32], read_only_args=[value])


def _select(condition: Any, yes: Any, no: Any) -> Any:
    return cutlass.select_(condition, yes, no) if hasattr(cutlass, "select_") else cute.where(condition, yes, no)


def _unary(operation: str, value: Any) -> Any:
    code = operation + " {$w0}, {$r0};"
    return cute.arch.inline_ptx(code, write_only_types=[Float32], read_only_args=[value])


def _fma(a: Any, b: Any, c: Any) -> Any:
    return cute.arch.inline_ptx("fma.rn.f32 {$w0}, {$r0}, {$r1}, {$r2};", write_only_types=[Float32], read_only_args=[a, b, c])


def _load_fresh(address: Any) -> Any:
    """Four floats from L2, past this SM's cache."""
    return cute.arch.inline_ptx(
        "ld.global.cg.v4.f32 {{$w0}, {$w1}, {$w2}, {$w3}}, [{$r0}];", write_only_types=[Float32] * 4, read_only_args=[address]
    )


def _load_word(address: Any) -> Any:
    """One float, likewise. In assembly, since the compiler moves loads of its own down to where they are used."""
    return cute.arch.inline_ptx("ld.global.cg.f32 {$w0}, [{$r0}];", write_only_types=[Float32], read_only_args=[address])
