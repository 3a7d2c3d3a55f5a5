"""A peer for the benchmarks, no part of the library: attention over gathered keys with sinks, in Triton.

A program takes a query and a block of its heads, and walks the query's keys: rows of one matrix of decoded keys, whose numbers
were put together beforehand (window and entries in one list). Keys are values too, so a tile is loaded once for both products.
A list may be split among programs, whose parts a second kernel adds. `tune` keeps the fastest of a few tiles.
"""

# No `from __future__ import annotations`: Triton reads tl.constexpr from the annotations themselves.
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl

DIM = 512
_LOG2E = 1.4426950408889634
_LOW = -1.0e30  # below any score, and finite


class Choice(NamedTuple):
    """block_h heads and block_n keys of a tile; split: programs that share a list of keys."""

    block_h: int
    block_n: int
    warps: int
    stages: int
    split: int = 1


TILES = (Choice(64, 64, 8, 2), Choice(64, 32, 8, 2), Choice(32, 32, 4, 2))
_ENOUGH = 128  # programs, for 132 multiprocessors
_best: dict[tuple[int, ...], Choice] = {}


def choices(queries: int, heads: int, keys: int) -> list[Choice]:
    """Tiles that are worth a try for a shape, split where there are few programs."""
    found = []
    for tile in TILES:
        if heads % tile.block_h == 0:
            programs = queries * heads // tile.block_h
            most = max(1, keys // (2 * tile.block_n))
            found.append(tile._replace(split=min(max(1, -(-_ENOUGH // programs)), most)))
    return found


@triton.jit(do_not_specialize=["heads", "count", "each", "split"])  # else some counts would be compiled for again
def _attend(  # type: ignore[no-untyped-def]
    q,
    keys,
    rows,
    sinks,
    out,
    maxima,
    sums,
    heads,
    count,
    each,
    split,
    scale,
    BLOCK_H: tl.constexpr,
    BLOCK_N: tl.constexpr,
    D: tl.constexpr,
    WHOLE: tl.constexpr,
    LOW: tl.constexpr,
    LOG2E: tl.constexpr,
):
    """Program (query, block of heads, part of the keys). scale: of scores, times log2 e. each: keys of a part.
    WHOLE: there is one part, and its sums are the result."""
    query = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    part = tl.program_id(2)
    dim = tl.arange(0, D)
    row_of_q = query * heads + head
    queries = tl.load(q + row_of_q[:, None] * D + dim[None, :])
    highest = tl.full((BLOCK_H,), LOW, tl.float32)
    total = tl.zeros((BLOCK_H,), tl.float32)
    summed = tl.zeros((BLOCK_H, D), tl.float32)
    begin = part * each
    end = tl.minimum(begin + each, count)
    for first in range(begin, end, BLOCK_N):
        place = first + tl.arange(0, BLOCK_N)
        row = tl.load(rows + query * count + place, mask=place < end, other=-1)
        key = tl.load(keys + row.to(tl.int64)[:, None] * D + dim[None, :], mask=row[:, None] >= 0, other=0.0)
        score = tl.dot(queries, tl.trans(key)) * scale
        score = tl.where(row[None, :] >= 0, score, LOW)
        higher = tl.maximum(highest, tl.max(score, 1))
        weight = tl.where(row[None, :] >= 0, tl.exp2(score - higher[:, None]), 0.0)
        shrink = tl.exp2(highest - higher)
        total = total * shrink + tl.sum(weight, 1)
        summed = tl.dot(weight.to(key.dtype), key, summed * shrink[:, None])
        highest = higher
    if WHOLE:
        total += tl.exp2(tl.load(sinks + head) * LOG2E - highest)
        at = out + row_of_q[:, None] * D + dim[None, :]
        tl.store(at, (summed / total[:, None]).to(out.dtype.element_ty))
    else:
        row_of_part = row_of_q * split + part
        tl.store(out + row_of_part[:, None] * D + dim[None, :], summed)
        tl.store(maxima + row_of_part, highest)
        tl.store(sums + row_of_part, total)


@triton.jit(do_not_specialize=["heads"])
def _combine(  # type: ignore[no-untyped-def]
    parts,
    maxima,
    sums,
    sinks,
    out,
    heads,
    SPLIT: tl.constexpr,
    D: tl.constexpr,
    LOG2E: tl.constexpr,
):
    """The parts of one query's head, and its sink."""
    row = tl.program_id(0).to(tl.int64)
    dim = tl.arange(0, D)
    sink = tl.load(sinks + row % heads) * LOG2E
    highest = sink
    for part in tl.static_range(SPLIT):
        highest = tl.maximum(highest, tl.load(maxima + row * SPLIT + part))
    total = tl.exp2(sink - highest)
    summed = tl.zeros((D,), tl.float32)
    for part in tl.static_range(SPLIT):
        at = row * SPLIT + part
        factor = tl.exp2(tl.load(maxima + at) - highest)
        total += tl.load(sums + at) * factor
        summed += tl.load(parts + at * D + dim) * factor
    tl.store(out + row * D + dim, (summed / total).to(out.dtype.element_ty))


def attend(
    q: torch.Tensor, keys: torch.Tensor, rows: torch.Tensor, sinks: torch.Tensor, scale: float, choice: Choice | None = None
) -> torch.Tensor:
    """q (M, H, 512) bf16, keys (N, 512) bf16, rows (M, n) i32 (-1 = none), sinks (H,) f32 -> (M, H, 512) bf16.

    choice: by default what `tune` found, else the first of `choices`.
    """
    m, heads, _ = q.shape
    count = rows.shape[1]
    choice = choice or _best.get((m, heads, count)) or choices(m, heads, count)[0]
    out = torch.empty_like(q)
    split = choice.split
    parts, maxima, sums = out, sinks, sinks
    if split > 1:
        parts = torch.empty(m, heads, split, DIM, dtype=torch.float32, device=q.device)
        maxima, sums = (torch.empty(m, heads, split, dtype=torch.float32, device=q.device) for _ in range(2))
    _attend[(m, heads // choice.block_h, split)](
        q,
        keys,
        rows,
        sinks,
        parts,
        maxima,
        sums,
        heads,
        count,
        -(-count // (split * choice.block_n)) * choice.block_n,
        split,
        scale * _LOG2E,
        BLOCK_H=choice.block_h,
        BLOCK_N=choice.block_n,
        D=DIM,
        WHOLE=split == 1,
        LOW=_LOW,
        LOG2E=_LOG2E,
        num_warps=choice.warps,
        num_stages=choice.stages,
    )
    if split > 1:
        _combine[(m * heads,)](parts, maxima, sums, sinks, out, heads, SPLIT=split, D=DIM, LOG2E=_LOG2E, num_warps=4)
    return out


def tune(
    inputs: Sequence[tuple[torch.Tensor, torch.Tensor, torch.Tensor]], sinks: torch.Tensor, scale: float, runs: int = 4
) -> Choice:
    """The fastest choice for (q, keys, rows) of one shape, gone through in turn so that they are cold; remembered.

    A choice that does not run (too much shared memory) is passed over. Raises RuntimeError where none runs.
    """
    q, _, rows = inputs[0]
    key = (q.shape[0], q.shape[1], rows.shape[1])
    times: dict[Choice, float] = {}
    reasons = []
    for choice in choices(*key):
        try:
            attend(*inputs[0], sinks, scale, choice=choice)
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            for run in range(runs):
                attend(*inputs[(run + 1) % len(inputs)], sinks, scale, choice=choice)
            end.record()
            end.synchronize()
            times[choice] = start.elapsed_time(end)
        except Exception as error:
            reasons.append(f"{choice}: {error}")
    if not times:
        raise RuntimeError(f"no choice runs: {'; '.join(reasons)[:300]}")
    _best[key] = min(times, key=times.__getitem__)
    return _best[key]
