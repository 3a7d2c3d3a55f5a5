"""A peer for the benchmarks, no part of the library: y = x W^T for NVFP4 weights as checkpoints have them, in Triton.

A program takes a tile of W as the product's first operand, so that few tokens do not leave it empty: decoded codes stay in
registers, x goes through shared memory. A code's three magnitude bits are put on float32's exponent and mantissa, where they
mean code * 2^-126; one product with the block scale * 2^63 gives code * block_scale * 2^-63, exact in BF16; the epilogue brings
2^63 and the global scale. For few tokens K is split among programs, whose sums a second kernel adds.

`tune` times a handful of tile shapes and splits on the operands themselves, cold, and keeps the best for the shape.
"""

# No `from __future__ import annotations`: Triton reads tl.constexpr from the annotations themselves.
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl


class Choice(NamedTuple):
    """block_m tokens, block_n rows of W, block_k: of a step. split: programs that share K."""

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int
    split: int = 1


_FEW = ((64, 128, 4, 4), (64, 256, 4, 3), (128, 128, 8, 3))
_SOME = ((64, 128, 4, 3), (128, 64, 4, 4), (128, 128, 8, 3))
_MANY = ((128, 128, 64, 8, 3), (128, 128, 128, 8, 3), (256, 128, 64, 8, 3), (128, 64, 64, 4, 4))
_ENOUGH, _TOO_MANY = 64, 1100  # programs, for 132 multiprocessors
_best: dict[tuple[int, ...], Choice] = {}


def choices(m: int, n: int, k: int, groups: int) -> list[Choice]:
    """What is worth a try for a shape. n: rows of W of one group."""
    if m > 64:
        return [Choice(*tile) for tile in _MANY]
    block_m, tiles = (16, _FEW) if m <= 16 else (64, _SOME)
    found = []
    for block_n, block_k, warps, stages in tiles:
        for split in (1, 2, 4, 8):
            programs = -(-n // block_n) * groups * split
            if split == 1 or (programs <= _TOO_MANY and k // split >= 2 * block_k):
                found.append(Choice(block_m, block_n, block_k, warps, stages, split))
    enough = [c for c in found if -(-n // c.block_n) * groups * c.split >= _ENOUGH]
    return enough or found


@triton.jit(do_not_specialize=["m", "steps"])  # else one token, or one step, would be compiled for again
def _product(  # type: ignore[no-untyped-def]
    x,
    codes,
    scale,
    global_scale,
    y,
    m,
    n,
    k,
    steps,
    x_row,
    y_row,
    y_split,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
):
    """Tile of y: program (tile of W, tile of tokens, group and part of K)."""
    group = tl.program_id(2) % tl.cdiv(x_row, k)
    part = tl.program_id(2) // tl.cdiv(x_row, k)
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    tokens = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    weight_row = (group * n + rows).to(tl.int64)
    first = part * steps * BLOCK_K
    byte = tl.arange(0, BLOCK_K // 2)
    block = tl.arange(0, BLOCK_K // 16)
    column = tl.arange(0, BLOCK_K)
    code_at = codes + weight_row[:, None] * (k // 2) + (first // 2 + byte)[None, :]
    scale_at = scale + weight_row[:, None] * (k // 16) + (first // 16 + block)[None, :]
    x_at = x + tokens.to(tl.int64)[:, None] * x_row + group * k + (first + column)[None, :]
    in_rows, in_tokens = rows[:, None] < n, tokens[:, None] < m
    total = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    for step in range(steps):
        left = k - first - step * BLOCK_K
        if EVEN_K:
            packed = tl.load(code_at, mask=in_rows, other=0).to(tl.int32)
            block_scale = tl.load(scale_at, mask=in_rows, other=0)
            values = tl.load(x_at, mask=in_tokens, other=0.0)
        else:
            packed = tl.load(code_at, mask=in_rows & (byte[None, :] < left // 2), other=0).to(tl.int32)
            block_scale = tl.load(scale_at, mask=in_rows & (block[None, :] < left // 16), other=0)
            values = tl.load(x_at, mask=in_tokens & (column[None, :] < left), other=0.0)
        factor = block_scale.to(tl.float8e4nv, bitcast=True).to(tl.float32) * 9223372036854775808.0  # 2^63
        packed = tl.reshape(packed, (BLOCK_N, BLOCK_K // 16, 8))
        low = ((packed & 8) << 28) | ((packed & 7) << 22)
        high = ((packed & 128) << 24) | ((packed & 112) << 18)
        weight = tl.join(low.to(tl.float32, bitcast=True), high.to(tl.float32, bitcast=True)) * factor[:, :, None, None]
        weight = tl.reshape(weight, (BLOCK_N, BLOCK_K)).to(tl.bfloat16)
        total = tl.dot(weight, tl.trans(values), total)
        code_at += BLOCK_K // 2
        scale_at += BLOCK_K // 16
        x_at += BLOCK_K
    total *= tl.load(global_scale) * 9223372036854775808.0
    at = y + part.to(tl.int64) * y_split + tokens.to(tl.int64)[:, None] * y_row + group * n + rows[None, :]
    tl.store(at, tl.trans(total).to(y.dtype.element_ty), mask=in_tokens & (rows[None, :] < n))


@triton.jit
def _add(parts, y, count, SPLIT: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """y = the sum of SPLIT parts of `count` numbers."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for part in tl.static_range(SPLIT):
        total += tl.load(parts + part * count + at, mask=at < count, other=0.0)
    tl.store(y + at, total.to(y.dtype.element_ty), mask=at < count)


def linear_nvfp4(
    x: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    global_scale: torch.Tensor,
    choice: Choice | None = None,
) -> torch.Tensor:
    """x (M, K) or of groups (M, G, K) bf16, contiguous; codes (N, K/2) u8, scale (N, K/16) e4m3, global_scale () f32
    -> (M, N) or (M, G, N/G) bf16. choice: by default what `tune` found, else the first of `choices`.
    """
    m, k = x.shape[0], x.shape[-1]
    groups = x.shape[1] if x.dim() == 3 else 1
    n = codes.shape[0] // groups
    choice = choice or _best.get((m, n, k, groups)) or choices(m, n, k, groups)[0]
    y = torch.empty(*x.shape[:-1], n, dtype=torch.bfloat16, device=x.device)
    count = y.numel()
    target = y if choice.split == 1 else torch.empty(choice.split, count, dtype=torch.float32, device=x.device)
    steps = -(-k // (choice.block_k * choice.split))
    grid = (-(-n // choice.block_n), -(-m // choice.block_m), groups * choice.split)
    _product[grid](
        x,
        codes,
        scale.view(torch.uint8),
        global_scale,
        target,
        m,
        n,
        k,
        steps,
        groups * k,
        groups * n,
        count,
        BLOCK_M=choice.block_m,
        BLOCK_N=choice.block_n,
        BLOCK_K=choice.block_k,
        EVEN_K=k % (choice.block_k * choice.split) == 0,
        num_warps=choice.warps,
        num_stages=choice.stages,
    )
    if choice.split > 1:
        _add[(-(-count // 1024),)](target, y, count, SPLIT=choice.split, BLOCK=1024, num_warps=4)
    return y


def tune(x: torch.Tensor, weights: Sequence[tuple[torch.Tensor, torch.Tensor, torch.Tensor]], runs: int = 6) -> Choice:
    """The fastest choice for x and weights of one shape, gone through in turn so that they are cold; remembered.

    A choice that does not run (too much shared memory) is passed over. Raises RuntimeError where none runs.
    """
    groups = x.shape[1] if x.dim() == 3 else 1
    key = (x.shape[0], weights[0][0].shape[0] // groups, x.shape[-1], groups)
    times: dict[Choice, float] = {}
    reasons = []
    for choice in choices(*key):
        try:
            for run in range(2):
                linear_nvfp4(x, *weights[run % len(weights)], choice=choice)
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            for run in range(runs):
                linear_nvfp4(x, *weights[(run + 2) % len(weights)], choice=choice)
            end.record()
            end.synchronize()
            times[choice] = start.elapsed_time(end)
        except Exception as error:
            reasons.append(f"{choice}: {error}")
    if not times:
        raise RuntimeError(f"no choice runs: {'; '.join(reasons)[:300]}")
    _best[key] = min(times, key=times.__getitem__)
    return _best[key]
