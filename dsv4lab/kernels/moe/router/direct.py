"""Logits of few tokens: fragments of `mma.sync` straight from memory to registers.

A CTA has 16 experts, the fixed side of the product, 8 to 64 tokens and a part of K; its warps take turns along K. A lane reads
16 bytes, 8 neighbouring columns, of a row where the instruction's own layout would have it read 4 bytes here and there: both
operands are permuted along K alike, which a sum does not mind. `depth` steps of 64 columns of weights are on their way before
the kernel before this one is waited for, and x only after it. Sums of the warps meet in shared memory; parts of K in `partial`.

Bytes: the weights once, x once for each 16 experts (from L2), 4 bytes a logit and part. Flash (256 x 4096): 2.1 MB of weights
by 128 CTAs, one round of loads each. Pro (384 x 7168): 5.5 MB by 120 CTAs, three steps deep. Predicted on an H200 for 1 to 16
tokens: 3 us (launch, one memory latency, arrival, one L2 latency, k rounds of selection) and 4 us.

Sums are float32: in one turn of the loop 4 `depth` products of 16 columns, for every pair of parts, on the tensor core, which
cuts off up to 2^-22 of the sum each time; then additions, of 2^-24 each. With 24 and fewer of the former, and fewer than 120 of
the latter, a logit's error is below 2^-16 of sum |w x|; as they do not all point one way it is 2^-18 on random numbers.

Without `from __future__ import annotations`: CuTeDSL reads the annotations themselves.
"""

from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32
from cutlass.memory import SmemAllocator

from dsv4lab.kernels.moe.router.config import DIRECT_ROWS, STEP, WARP, RouterConfig
from dsv4lab.kernels.moe.router.parts import RUN, load_run, mma, pairs, parts_of
from dsv4lab.kernels.moe.router.select import Select

PITCH = DIRECT_ROWS + 4  # floats of a token's sums in shared memory, so that a warp's stores hit every bank once
HALVES = STEP // (4 * RUN)  # runs of a lane along a step; four lanes side by side


class DirectLogits:
    """The kernel for one `RouterConfig`."""

    def __init__(self, config: RouterConfig) -> None:
        self.plan = config
        self.select = Select(config)

    @cute.kernel
    def kernel(
        self,
        x: Any,
        weight: Any,
        bias: Any,
        table: Any,
        token_ids: Any,
        weights: Any,
        ids: Any,
        partial: Any,
        arrived: Any,
        scale: Float32,
    ) -> None:
        plan = self.plan
        thread, _, _ = cute.arch.thread_idx()
        expert_tile, split, token_tile = cute.arch.block_idx()
        expert_tiles, splits, _ = cute.arch.grid_dim()
        warp, lane = cute.arch.make_warp_uniform(thread // WARP), thread % WARP
        cute.arch.griddepcontrol_launch_dependents()
        memory = SmemAllocator()
        sums = memory.allocate_tensor(
            Float32, cute.make_layout((DIRECT_ROWS, plan.tokens, plan.warps), stride=(1, PITCH, PITCH * plan.tokens))
        )
        flag = memory.allocate_array(Int32, 1)
        steps = weight.shape[1] // STEP
        last = (split + 1) * steps // splits
        first = split * steps // splits + warp
        held = cute.make_rmem_tensor((RUN, HALVES, 2, plan.depth), weight.element_type)
        total = cute.make_rmem_tensor((plan.tokens // 2,), Float32)
        total.fill(0.0)
        row = expert_tile * DIRECT_ROWS + lane // 4
        self._load(weight, held, row, first, last, lane)
        cute.arch.griddepcontrol_wait()
        token = token_tile * plan.tokens + lane // 4
        for step in cutlass.range(first, last, plan.warps * plan.depth, unroll=1):
            self._multiply(x, held, total, token, step, last, lane)
            following = step + plan.warps * plan.depth
            if following < last:
                self._load(weight, held, row, following, last, lane)

        for n in cutlass.range_constexpr(plan.tokens // 8):
            for e in cutlass.range_constexpr(4):
                sums[lane // 4 + 8 * (e // 2), 8 * n + 2 * (lane % 4) + e % 2, warp] = total[4 * n + e]
        cute.arch.barrier()
        for i in cutlass.range(thread, DIRECT_ROWS * plan.tokens, WARP * plan.warps, unroll=1):
            at, expert = token_tile * plan.tokens + i // DIRECT_ROWS, expert_tile * DIRECT_ROWS + i % DIRECT_ROWS
            logit = Float32(0.0)
            for w in cutlass.range_constexpr(plan.warps):
                logit = logit + sums[i % DIRECT_ROWS, i // DIRECT_ROWS, w]
            if at < x.shape[0] and expert < plan.experts:
                partial[split, at, expert] = logit
        if cutlass.const_expr(plan.fused):
            last_cta = self._came_last(flag, arrived.iterator + token_tile, expert_tiles * splits, thread)
            if last_cta:
                for t in cutlass.range(warp, plan.tokens, plan.warps, unroll=1):
                    at = token_tile * plan.tokens + t
                    if at < x.shape[0]:
                        self.select.route(partial, bias, table, token_ids, weights, ids, scale, at)

    @cute.jit
    def _load(self, weight: Any, held: Any, row: Any, step: Any, last: Any, lane: Any) -> None:
        """Weights of the lane's two rows for `depth` steps; past the last the last again, which is not multiplied."""
        plan = self.plan
        for d in cutlass.range_constexpr(plan.depth):
            at = cutlass.max(cutlass.min(step + d * plan.warps, last - 1), 0)
            for r in cutlass.range_constexpr(2):
                expert = cutlass.min(row + 8 * r, plan.experts - 1)
                for h in cutlass.range_constexpr(HALVES):
                    load_run(weight, expert, (at * HALVES + h) * 4 + lane % 4, held[None, h, r, d])

    @cute.jit
    def _multiply(self, x: Any, held: Any, total: Any, token: Any, step: Any, last: Any, lane: Any) -> None:
        """`depth` steps for all tokens of the tile. No branches, so that loads of x run ahead of the products."""
        plan = self.plan
        tokens = plan.tokens // 8
        part = cute.make_rmem_tensor((4 * tokens,), Float32)
        part.fill(0.0)
        for d in cutlass.range_constexpr(plan.depth):
            at = cutlass.min(step + d * plan.warps, last - 1)
            runs = cute.make_rmem_tensor((RUN, HALVES, tokens), x.element_type)
            for n in cutlass.range_constexpr(tokens):
                for h in cutlass.range_constexpr(HALVES):
                    source = cutlass.min(token + 8 * n, x.shape[0] - 1)
                    load_run(x, source, (at * HALVES + h) * 4 + lane % 4, runs[None, h, n])
            inside = step + d * plan.warps < last
            for h in cutlass.range_constexpr(HALVES):
                low, high = (_kept(parts_of(held[None, h, r, d]), inside) for r in range(2))
                rows = list(zip(low, high, strict=True))
                for n in cutlass.range_constexpr(tokens):
                    for (upper, lower), b in pairs(rows, parts_of(runs[None, h, n])):
                        for j in (0, 2):
                            mma(part, 4 * n, [upper[j], lower[j], upper[j + 1], lower[j + 1]], [b[j], b[j + 1]])
        total.store(total.load() + part.load())

    @cute.jit
    def _came_last(self, flag: Any, counter: Any, arrivals: Any, thread: Any) -> Any:
        """Whether this CTA is the last of its token tile: then all parts are there. The counter is zero again afterwards."""
        cute.arch.barrier()  # all have written: one thread's release and acquire, between two barriers, are everyone's
        if thread == 0:
            before = cute.arch.atomic_add(counter, Int32(1), sem="acq_rel", scope="gpu")
            flag[0] = before
            if before == arrivals - 1:
                cute.make_tensor(counter, cute.make_layout(1))[0] = Int32(0)
        cute.arch.barrier()
        return flag[0] == arrivals - 1


def _kept(parts: list[list[Any]], inside: Any) -> list[list[Any]]:
    """The parts, or zeros where the step lies behind the last."""
    return [[cutlass.select_(inside, word, cutlass.Uint32(0)) for word in words] for words in parts]
