"""One tile's steps along K: records of a stage decoded in registers, multiplied with the stage's tokens.

Both functions take the kernel's ring (full barriers, empty barriers, steps) at a stage and phase, and return those that follow.

Without `from __future__ import annotations`: CuTeDSL reads the annotations themselves.
"""

from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Uint32
from cutlass.cute.nvgpu import warpgroup

from dsv4lab.kernels._common.ptx import load_words
from dsv4lab.kernels._common.rings import arrive_with
from dsv4lab.kernels.gemm.mixed.decode import decode_for_warp, decode_for_warpgroup
from dsv4lab.kernels.gemm.mixed.layout import BLOCKS, PLANES, SLAB, TILE

WARPGROUP = 128


@cute.jit
def advance(stages: cutlass.Constexpr, stage: Any, phase: Any) -> tuple[Any, Any]:
    """A ring's next stage, and the phase in which it is then."""
    stage += 1
    if stage == stages:
        stage, phase = Int32(0), phase ^ 1
    return stage, phase


@cute.jit
def multiply_by_warpgroup(
    kernel: cutlass.Constexpr,
    width: cutlass.Constexpr,
    shared_x: Any,
    shared_w: Any,
    ring: Any,
    total: Any,
    stage: Any,
    phase: Any,
) -> tuple[Any, Any]:
    """By `wgmma`, four slabs a warpgroup and `width` tokens; a tile is decoded while the tile before multiplies."""
    plan = kernel.plan
    chunks, record_bytes = plan.chunks, plan.record_bytes
    full, empty, count = ring
    stages = plan.stages
    thread, _, _ = cute.arch.thread_idx()
    lane = thread % 32
    slab = cute.arch.make_warp_uniform(thread // 32)
    mma = kernel.mma(width)
    part = mma.get_slice(thread % WARPGROUP)
    fragment_x = mma.make_fragment_B(part.partition_B(_first_tokens(shared_x, width, plan)))
    sums = cute.make_tensor(total.iterator, cute.make_layout(part.partition_shape_C((4 * SLAB, width))))
    a = [mma.make_fragment_A(part.partition_shape_A((4 * SLAB, TILE))) for _ in range(2)]
    words = [cute.recast_tensor(f, Uint32) for f in a]
    mma.set(warpgroup.Field.ACCUMULATE, True)
    base = shared_w[None, slab, 0].iterator.toint()
    stage_bytes = plan.weight_bytes
    rounds = 1 + plan.alternates  # two buffers of decoded weights take turns
    before = stage
    for k in cutlass.range(0, count, rounds, unroll=1):
        for r in cutlass.range_constexpr(rounds):
            cute.arch.mbarrier_wait(full + stage, phase)
            for c in cutlass.range_constexpr(chunks):
                turn = (r * chunks + c) % 2
                decode_for_warpgroup(plan.format, base + stage * stage_bytes + c * record_bytes, lane, words[turn])
                warpgroup.fence()
                for j in cutlass.range_constexpr(BLOCKS):
                    cute.gemm(mma, sums, a[turn][None, None, j], fragment_x[None, None, j, stage * chunks + c], sums)
                warpgroup.commit_group()
                warpgroup.wait_group(1)
                if cutlass.const_expr(c == 0):  # the stage before is read to its end
                    cute.arch.sync_warp()
                    used = (k > 0 or r > 0) and lane == 0
                    if used:
                        cute.arch.mbarrier_arrive(empty + before)
            before = stage
            stage, phase = advance(stages, stage, phase)
    warpgroup.wait_group(0)
    cute.arch.sync_warp()
    if lane == 0 and count > 0:
        cute.arch.mbarrier_arrive(empty + before)
    return stage, phase


def _first_tokens(shared_x: Any, width: int, plan: Any) -> Any:
    """The first `width` tokens of every tile: rows of 128 bytes in groups of eight, whatever the tile has beyond them."""
    shape = ((8, width // 8), (TILE, 1), (1, plan.stages * plan.chunks))
    stride = ((TILE, 8 * TILE), (1, 0), (0, plan.tokens * TILE))
    return cute.make_tensor(shared_x.iterator, cute.make_layout(shape, stride=stride))


@cute.jit
def multiply_by_warp(
    kernel: cutlass.Constexpr,
    num_tokens: Any,
    shared_x: Any,
    shared_w: Any,
    ring: Any,
    total: Any,
    stage: Any,
    phase: Any,
) -> tuple[Any, Any]:
    """By `mma.sync`, each warp for its slabs and every `splits`-th tile: for few tokens, where `wgmma` costs more."""
    plan = kernel.plan
    full, empty, count = ring
    stages = plan.stages
    thread, _, _ = cute.arch.thread_idx()
    lane = thread % 32
    warp = cute.arch.make_warp_uniform(thread // 32)
    teams = plan.slabs // plan.per_warp
    team, split = warp % teams, warp // teams
    words = cute.make_rmem_tensor((4 * BLOCKS,), Uint32)
    # Lane (g, q) reads token g's 16 columns of block q. Rows are 16 bytes more than a multiple of 128 apart, so that eight
    # lanes of two tokens use all banks.
    g, q = lane // 4, lane % 4
    records = shared_w[None, team, 0].iterator.toint() + split * plan.record_bytes
    base = shared_x.iterator.toint() + q * 32 + split * TILE * 2
    # past the tile's tokens the last one is read again: it is there, and its product is not stored
    rows = [base + cutlass.min(8 * n + g, num_tokens - 1) * plan.token_pitch for n in range(plan.tokens // 8)]
    slab_bytes = teams * plan.chunks * plan.record_bytes
    for _ in cutlass.range(count, unroll=1):
        cute.arch.mbarrier_wait(full + stage, phase)
        for c in cutlass.range_constexpr(0, plan.chunks, plan.splits):
            at = stage * plan.token_bytes + c * TILE * 2
            columns = [load_words(row + at + h * 16) for row in rows for h in range(2)]
            for s in cutlass.range_constexpr(plan.per_warp):
                record = records + stage * plan.weight_bytes + s * slab_bytes + c * plan.record_bytes
                decode_for_warp(plan.format, record, lane, words)
                for n in cutlass.range_constexpr(plan.tokens // 8):
                    first = s * (plan.tokens // 2) + 4 * n
                    # Columns of two neighbouring words of x, which are two neighbouring registers, as the product wants them:
                    # the same half of the codes of two words.
                    for half in cutlass.range_constexpr(2):
                        x = columns[2 * n + half]
                        for j in cutlass.range_constexpr(0, BLOCKS, 2):
                            w = [words[4 * (j + i // 2) + 2 * half + i % 2] for i in range(4)]
                            _mma_sync(total, first, w, x[j], x[j + 1])
        # something of all of the last loads, which end in order: a word of every plane has its scales in it, too
        planes = [words[j] for j in range(0, 4, 4 // PLANES[plan.format])]
        arrive_with(empty + stage, lane, planes + [column[0] for column in columns])
        stage, phase = advance(stages, stage, phase)
    return stage, phase


def _mma_sync(total: Any, first: Any, a: Any, b0: Any, b1: Any) -> None:
    """total[first .. first + 3] += a b, a 16 x 8 x 16 product of BF16."""
    out = cute.arch.inline_ptx(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{{$w0}, {$w1}, {$w2}, {$w3}}, {{$r0}, {$r1}, {$r2}, {$r3}}, {{$r4}, {$r5}}, {{$r6}, {$r7}, {$r8}, {$r9}};",
        write_only_types=[Float32] * 4,
        read_only_args=[*a, b0, b1, *(total[first + i] for i in range(4))],
    )
    for i in range(4):
        total[first + i] = out[i]
