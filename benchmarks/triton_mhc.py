"""A peer for hyper-connections: pre and post in Triton, written for the benchmark.

pre: one program has some tokens, goes through their streams in blocks of K with `tl.dot` in TF32 times three ("tf32x3") for the
24 products, sums the squares beside, does Sinkhorn in registers and leaves the coefficients; a second kernel collapses and
normalises a token. post: one program has a token's run of columns.
"""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.operations import EPS, FLASH

try:
    import triton
    import triton.language as tl
except ImportError:  # CPU machines may have none
    triton = None

_ROWS, _K = 16, 128

if triton is not None:

    @triton.jit
    def _coefficients(
        x, fn, base, scale, pre, post, comb, m, k, eps, hc_eps, ITERS: tl.constexpr, R: tl.constexpr, K: tl.constexpr
    ):
        row, lane = tl.program_id(0) * R + tl.arange(0, R), tl.arange(0, 32)
        total, square = tl.zeros((R, 32), tl.float32), tl.zeros((R,), tl.float32)
        for start in range(0, k, K):
            at = start + tl.arange(0, K)
            inside = (row[:, None] < m) & (at[None] < k)  # the last block may reach beyond a row
            a = tl.load(x + row[:, None].to(tl.int64) * k + at[None], mask=inside, other=0.0).to(tl.float32)
            b = tl.load(fn + lane[None] * k + at[:, None], mask=(lane[None] < 24) & (at[:, None] < k), other=0.0)
            total = tl.dot(a, b, total, input_precision="tf32x3")
            square += tl.sum(a * a, 1)
        mix = total * tl.rsqrt(square / k + eps)[:, None]
        which = tl.where(lane < 4, 0, tl.where(lane < 8, 1, 2))
        z = mix * tl.load(scale + which)[None] + tl.load(base + lane, mask=lane < 24, other=0.0)[None]
        s = tl.sigmoid(z)
        tl.store(pre + row[:, None] * 4 + lane[None], s + hc_eps, mask=(row[:, None] < m) & (lane[None] < 4))
        tl.store(
            post + row[:, None] * 4 + lane[None] - 4, 2 * s, mask=(row[:, None] < m) & (lane[None] >= 4) & (lane[None] < 8)
        )
        tl.store(comb + row[:, None] * 16 + lane[None] - 8, z, mask=(row[:, None] < m) & (lane[None] >= 8) & (lane[None] < 24))
        tl.debug_barrier()
        at = row[:, None, None] * 16 + tl.arange(0, 4)[None, :, None] * 4 + tl.arange(0, 4)[None, None, :]
        a = tl.load(comb + at, mask=row[:, None, None] < m, other=0.0)
        a = tl.exp(a - tl.max(a, 2)[:, :, None])
        a = a / tl.sum(a, 2)[:, :, None] + hc_eps
        a = a / (tl.sum(a, 1)[:, None, :] + hc_eps)
        for _ in range(ITERS - 1):
            a = a / (tl.sum(a, 2)[:, :, None] + hc_eps)
            a = a / (tl.sum(a, 1)[:, None, :] + hc_eps)
        tl.store(comb + at, a, mask=row[:, None, None] < m)

    @triton.jit
    def _collapse(x, pre, weight, out, d, eps, D: tl.constexpr):
        row, at = tl.program_id(0).to(tl.int64), tl.arange(0, D)
        u = tl.zeros((D,), tl.float32)
        for j in tl.static_range(4):
            u += tl.load(pre + row * 4 + j) * tl.load(x + (row * 4 + j) * d + at, mask=at < d, other=0.0).to(tl.float32)
        u = u.to(tl.bfloat16).to(tl.float32)
        y = u * tl.rsqrt(tl.sum(u * u, 0) / d + eps) * tl.load(weight + at, mask=at < d, other=0.0).to(tl.float32)
        tl.store(out + row * d + at, y.to(tl.bfloat16), mask=at < d)

    @triton.jit
    def _post(y, x, post, comb, out, d, B: tl.constexpr):
        row, at = tl.program_id(0).to(tl.int64), tl.program_id(1) * B + tl.arange(0, B)
        added = tl.load(y + row * d + at, mask=at < d, other=0.0).to(tl.float32)
        x0 = tl.load(x + row * 4 * d + at, mask=at < d, other=0.0).to(tl.float32)
        x1 = tl.load(x + (row * 4 + 1) * d + at, mask=at < d, other=0.0).to(tl.float32)
        x2 = tl.load(x + (row * 4 + 2) * d + at, mask=at < d, other=0.0).to(tl.float32)
        x3 = tl.load(x + (row * 4 + 3) * d + at, mask=at < d, other=0.0).to(tl.float32)
        for i in tl.static_range(4):
            c = comb + row * 16 + i
            new = tl.load(post + row * 4 + i) * added + tl.load(c) * x0 + tl.load(c + 4) * x1 + tl.load(c + 8) * x2
            new += tl.load(c + 12) * x3
            tl.store(out + (row * 4 + i) * d + at, new.to(tl.bfloat16), mask=at < d)


def mhc_pre(streams: Any, fn: Any, base: Any, scale: Any, weight: Any, **how: Any) -> tuple[torch.Tensor, ...]:
    """streams (M, 4, D) bf16, fn (24, 4 D), base (24,), scale (3,) f32, weight (D,) -> (M, D) bf16, (M, 4), (M, 4, 4) f32."""
    m, _, d = streams.shape
    out = torch.empty(m, d, dtype=streams.dtype, device=streams.device)
    pre, post, comb = (streams.new_empty((m, *shape), dtype=torch.float32) for shape in ((4,), (4,), (4, 4)))
    iters = FLASH.hc_sinkhorn_iters
    grid = (triton.cdiv(m, _ROWS),)
    _coefficients[grid](streams, fn, base, scale, pre, post, comb, m, 4 * d, EPS, FLASH.hc_eps, iters, _ROWS, _K, num_warps=4)
    _collapse[(m,)](streams, pre, weight, out, d, EPS, triton.next_power_of_2(d), num_warps=8)
    return out, post, comb


def mhc_post(y: Any, streams: Any, post: Any, comb: Any) -> torch.Tensor:
    """y (M, D), streams (M, 4, D) bf16, post (M, 4), comb (M, 4, 4) f32 -> (M, 4, D) bf16."""
    m, _, d = streams.shape
    out = torch.empty_like(streams)
    _post[(m, triton.cdiv(d, 1024))](y, streams, post, comb, out, d, 1024, num_warps=4)
    return out
