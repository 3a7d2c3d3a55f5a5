"""y[p] = x[slots[p] // k]: rows of tokens in sorted order, copied word for word.

A warp copies one piece of one row: its lanes' 16-byte loads are all in flight before the first store. Rows of -1 become zeros.
All rows' first pieces come first, then all second ones: a token's rows are far apart in sorted order, and x as a whole (67 MB
for the 8192 tokens below) does not stay in an L2 of 50 MB until the next of them, but one piece of each of its rows does. What
is written is marked as the first to be evicted, since nothing here reads it.

Bytes: N rows written, M rows read from memory, N from cache. For 8192 tokens of 4096 BF16, 6 slots each: 403 + 67 MB. Row by
row an H100 took 255 us for them, the time of 806 MB at a copy's bandwidth: L2 kept nothing. Predicted in this order: at least
85 % of a copy's bandwidth, so 183 us on an H100 and 130 us on an H200; 2 us for one token (a launch and two dependent
latencies). sm_90a and sm_100a.

Without `from __future__ import annotations`: CuTeDSL reads the annotations themselves.
"""

from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Int32

from dsv4lab.kernels.moe.gather.config import UNIT_BYTES, WARP, GatherConfig

WORDS = UNIT_BYTES // 4


class GatherRows:
    """The kernel for one `GatherConfig`; sizes are the call's."""

    def __init__(self, config: GatherConfig) -> None:
        config.check()
        self.plan = config

    @cute.jit
    def __call__(self, x: Any, slots: Any, y: Any, top_k: Int32, stream: Any) -> None:
        """x (M, W) i32, slots (N,) i32 -> y (N, W) i32: words of rows, W % 4 == 0."""
        plan = self.plan
        pieces = cute.ceil_div(y.shape[1] // WORDS, plan.piece)
        self.kernel(x, slots, y, pieces, top_k).launch(
            grid=[cute.ceil_div(y.shape[0] * pieces, plan.warps), 1, 1],
            block=[plan.warps * WARP, 1, 1],
            stream=stream,
            use_pdl=True,
        )

    @cute.kernel
    def kernel(self, x: Any, slots: Any, y: Any, pieces: Int32, top_k: Int32) -> None:
        plan = self.plan
        thread, _, _ = cute.arch.thread_idx()
        block, _, _ = cute.arch.block_idx()
        task = block * plan.warps + cute.arch.make_warp_uniform(thread // WARP)
        rows = y.shape[0]
        row, first = task % rows, task // rows * plan.piece + thread % WARP
        cute.arch.griddepcontrol_launch_dependents()
        cute.arch.griddepcontrol_wait()
        if task < rows * pieces:
            slot = slots[row]
            source = cutlass.max(slot, 0) // top_k
            units = y.shape[1] // WORDS
            held = cute.make_rmem_tensor((WORDS, plan.units), Int32)
            for u in cutlass.range_constexpr(plan.units):
                unit = cutlass.min(first + u * WARP, units - 1)  # loads without a branch; nothing is stored past the end
                cute.autovec_copy(cute.local_tile(x[source, None], (WORDS,), (unit,)), held[None, u])
            if slot < 0:
                held.fill(0)
            for u in cutlass.range_constexpr(plan.units):
                unit = first + u * WARP
                if unit < units:
                    _store(cute.local_tile(y[row, None], (WORDS,), (unit,)), [held[w, u] for w in range(WORDS)])


def _store(target: Any, words: list[Any]) -> None:
    """16 bytes to memory, evicted from L2 before what other accesses left there."""
    code = "st.global.cs.v4.b32 [{$r0}], {{$r1}, {$r2}, {$r3}, {$r4}};"
    cute.arch.inline_ptx(code, read_only_args=[target.iterator.toint(), *words])
