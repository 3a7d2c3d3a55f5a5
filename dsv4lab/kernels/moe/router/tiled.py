"""Logits of many tokens: tiles of BF16 through shared memory to `mma.sync`.

A CTA has 128 tokens, 64 to 192 experts and a part of K. `cp.async` brings stages of 64 columns, 16 bytes a thread and copy; a
row of a stage is 128 bytes, its eight 16-byte chunks XORed with the row's number so that `ldmatrix` meets no bank twice. A warp
multiplies 64 experts by 32 tokens. Its sums of a stage, four products of 16 columns, are kept apart and added in float32: the
tensor core cuts sums off, which over all of K would not be float32's grade.

Bytes: x once for each tile of experts, the weights once for each 128 tokens, from L2. 8192 tokens, Flash (256 x 4096): 134 +
134 MB, 17 GFLOP; Pro (384 x 7168): 235 + 352 MB, 45 GFLOP. x alone is 14 and 24 us at 4.8 TB/s; `mma.sync` at some 500 TFLOP/s
is 35 and 90 us, so this is bound by the tensor core, not by memory: `wgmma` would halve it, on Hopper only. Predicted on an
H200: 45 us and 105 us, routing included.

Without `from __future__ import annotations`: CuTeDSL reads the annotations themselves.
"""

from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import BFloat16, Float32
from cutlass.memory import SmemAllocator

from dsv4lab.kernels._common.ptx import load_matrices
from dsv4lab.kernels.moe.router.config import STEP, WARP, WARP_ROWS, WARP_TOKENS, RouterConfig
from dsv4lab.kernels.moe.router.parts import mma

CHUNK = 8  # BF16 of a copy
CHUNKS = STEP // CHUNK  # of a row of a stage
ROW_BYTES = STEP * 2
BLOCKS = STEP // 16  # products along a stage


class TiledLogits:
    """The kernel for one `RouterConfig`."""

    def __init__(self, config: RouterConfig) -> None:
        self.plan = config

    @cute.kernel
    def kernel(self, x: Any, weight: Any, partial: Any) -> None:
        plan = self.plan
        thread, _, _ = cute.arch.thread_idx()
        expert_tile, split, token_tile = cute.arch.block_idx()
        _, splits, _ = cute.arch.grid_dim()
        warp, lane = cute.arch.make_warp_uniform(thread // WARP), thread % WARP
        cute.arch.griddepcontrol_launch_dependents()
        memory = SmemAllocator()
        stages = memory.allocate_tensor(BFloat16, cute.make_layout(plan.depth * plan.stage_bytes // 2), byte_alignment=128)
        base = stages.iterator.toint()
        steps = weight.shape[1] // STEP
        first, last = split * steps // splits, (split + 1) * steps // splits
        expert, token = expert_tile * plan.rows, token_tile * plan.tokens
        tokens_at = plan.rows * ROW_BYTES  # in a stage, behind the experts

        for s in cutlass.range_constexpr(plan.depth - 1):
            if first + s < last:
                self._copy(weight, base + s * plan.stage_bytes, plan.rows, expert, plan.experts, first + s, thread)
        cute.arch.griddepcontrol_wait()
        for s in cutlass.range_constexpr(plan.depth - 1):
            if first + s < last:
                self._copy(x, base + s * plan.stage_bytes + tokens_at, plan.tokens, token, x.shape[0], first + s, thread)
            cute.arch.cp_async_commit_group()

        rows_at = warp % (plan.rows // WARP_ROWS) * WARP_ROWS
        columns_at = warp // (plan.rows // WARP_ROWS) * WARP_TOKENS
        total = cute.make_rmem_tensor((WARP_ROWS * WARP_TOKENS // WARP,), Float32)
        total.fill(0.0)
        for step in cutlass.range(first, last, 1, unroll=1):
            cute.arch.cp_async_wait_group(plan.depth - 2)
            cute.arch.barrier()  # the stage is there for all, and the one before it read by all
            ahead = step + plan.depth - 1
            if ahead < last:
                to = base + (ahead - first) % plan.depth * plan.stage_bytes
                self._copy(weight, to, plan.rows, expert, plan.experts, ahead, thread)
                self._copy(x, to + tokens_at, plan.tokens, token, x.shape[0], ahead, thread)
            cute.arch.cp_async_commit_group()
            stage = base + (step - first) % plan.depth * plan.stage_bytes
            self._multiply(stage + rows_at * ROW_BYTES, stage + tokens_at + columns_at * ROW_BYTES, total, lane)
        cute.arch.cp_async_wait_group(0)
        self._store(partial, total, split, expert + rows_at, token + columns_at, lane)

    @cute.jit
    def _copy(self, source: Any, to: Any, rows: Any, first: Any, end: Any, step: Any, thread: Any) -> None:
        """One stage's rows of a matrix; past its end the last row again, whose products are not stored."""
        threads = self.plan.warps * WARP
        for i in cutlass.range_constexpr(-(-rows * CHUNKS // threads)):
            index = i * threads + thread
            row, chunk = index // CHUNKS, index % CHUNKS
            if cutlass.const_expr(rows * CHUNKS % threads == 0) or index < rows * CHUNKS:
                spot = cute.local_tile(source[cutlass.min(first + row, end - 1), None], (CHUNK,), (step * CHUNKS + chunk,))
                cute.arch.inline_ptx(
                    "cp.async.cg.shared.global [{$r0}], [{$r1}], 16;",
                    read_only_args=[to + row * ROW_BYTES + (chunk ^ (row % CHUNKS)) * 16, spot.iterator],
                )

    @cute.jit
    def _multiply(self, rows: Any, columns: Any, total: Any, lane: Any) -> None:
        """total += 64 experts by 32 tokens of one stage."""
        part = cute.make_rmem_tensor((WARP_ROWS * WARP_TOKENS // WARP,), Float32)
        part.fill(0.0)
        # The row whose address a lane gives to `ldmatrix`: experts in the order of the A operand, tokens in that of two Bs.
        a_row, a_chunk = lane % 8 + lane // 8 % 2 * 8, lane // 16
        b_row, b_chunk = lane % 8 + lane // 16 * 8, lane // 8 % 2
        for k in cutlass.range_constexpr(BLOCKS):
            b = [
                load_matrices(columns + (16 * n + b_row) * ROW_BYTES + ((2 * k + b_chunk) ^ (lane % 8)) * 16)
                for n in range(WARP_TOKENS // 16)
            ]
            for m in cutlass.range_constexpr(WARP_ROWS // 16):
                a = load_matrices(rows + (16 * m + a_row) * ROW_BYTES + ((2 * k + a_chunk) ^ (lane % 8)) * 16)
                for n in cutlass.range_constexpr(WARP_TOKENS // 8):
                    two = b[n // 2]
                    mma(part, 4 * (m * (WARP_TOKENS // 8) + n), list(a), [two[n % 2 * 2], two[n % 2 * 2 + 1]])
        total.store(total.load() + part.load())

    @cute.jit
    def _store(self, partial: Any, total: Any, split: Any, expert: Any, token: Any, lane: Any) -> None:
        """A warp's sums: eight lanes write 32 bytes of a token's row."""
        for m in cutlass.range_constexpr(WARP_ROWS // 16):
            for n in cutlass.range_constexpr(WARP_TOKENS // 8):
                for e in cutlass.range_constexpr(4):
                    row = expert + 16 * m + lane // 4 + 8 * (e // 2)
                    column = token + 8 * n + 2 * (lane % 4) + e % 2
                    if row < self.plan.experts and column < partial.shape[1]:
                        partial[split, column, row] = total[4 * (m * (WARP_TOKENS // 8) + n) + e]
