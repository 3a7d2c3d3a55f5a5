"""Rows of the embedding, each copied into every stream: 16 bytes a lane read once, written once a stream.

Bytes: a row read, `streams` rows written; 8192 tokens of 4096 in BF16: 67 + 268 MB, 80 us at an H200's copy of 4.2 TB/s.
sm_90a and sm_100a.

Without `from __future__ import annotations`: CuTeDSL reads the annotations themselves.
"""

from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Int32, Int64

from dsv4lab.kernels._common.ptx import store_global
from dsv4lab.kernels.mhc import values as val
from dsv4lab.kernels.mhc.config import WARP, EmbedConfig


class Embed:
    """The kernel of one `EmbedConfig`; M and V are the call's."""

    def __init__(self, plan: EmbedConfig) -> None:
        plan.check()
        self.plan = plan

    @cute.jit
    def __call__(self, token_ids: Any, table: Any, out: Any, stream: Any) -> None:
        """token_ids (M,); table (V, 4 words) -> out (M, streams, 4 words), 32-bit words. M > 0."""
        plan = self.plan
        pieces = -(-plan.words // WARP)
        self.kernel(token_ids, table, out, Int32(pieces)).launch(
            grid=[cute.ceil_div(out.shape[0] * pieces, plan.warps), 1, 1],
            block=[plan.warps * WARP, 1, 1],
            stream=stream,
            use_pdl=True,
        )

    @cute.kernel
    def kernel(self, token_ids: Any, table: Any, out: Any, pieces: Int32) -> None:
        plan = self.plan
        thread, _, _ = cute.arch.thread_idx()
        block, _, _ = cute.arch.block_idx()
        task = block * plan.warps + thread // WARP
        token, word = task // pieces, task % pieces * WARP + thread % WARP
        cute.arch.griddepcontrol_launch_dependents()
        cute.arch.griddepcontrol_wait()
        if token < out.shape[0] and word < plan.words:
            rows = Int64(table.shape[0])
            row = Int64(token_ids[token])
            row = row + rows if row < Int64(0) else row  # as indices count from the end
            row = cutlass.min(cutlass.max(row, Int64(0)), rows - Int64(1))
            words = val.load_four(cute.local_tile(table[Int32(row), None], (4,), (word,)).iterator)
            for s in cutlass.range_constexpr(plan.streams):
                store_global(cute.local_tile(out[token, s, None], (4,), (word,)).iterator, words)
