"""X'[i] = post[i] y + sum_j comb[j, i] X[j], rounded once: a sub-layer's output back into the streams.

A warp has one piece of a token's columns, in all streams; a lane 8 neighbouring columns at a time. All its loads, 5 a chunk and
5 of coefficients, are in flight before the first product. The arithmetic is that of `post_pre`, in every bit.

Bytes: streams and y once, new streams once: 18 D a token. 8192 tokens of 4096: 604 MB, 144 us at an H200's copy of 4.2 TB/s.
Flops: 5 multiplications a value and its unpacking, some 60 us of issue slots. sm_90a and sm_100a.

Without `from __future__ import annotations`: CuTeDSL reads the annotations themselves.
"""

from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Float32

from dsv4lab.kernels._common.ptx import store_global
from dsv4lab.kernels.mhc import values as val
from dsv4lab.kernels.mhc.config import CHUNK, COEFFICIENTS, STREAMS, WARP, PostConfig


class Post:
    """The kernel of one `PostConfig`; sizes are the call's."""

    def __init__(self, plan: PostConfig) -> None:
        plan.check()
        self.plan = plan

    @cute.jit
    def __call__(self, streams: Any, y: Any, post: Any, comb: Any, new: Any, stream: Any) -> None:
        """streams (M, 4, D / 2), y (M, D / 2) words of two BF16, post (M, 4), comb (M, 16) f32 -> new like streams. M > 0."""
        plan = self.plan
        pieces = cute.ceil_div(y.shape[1] * 2, plan.piece)
        self.kernel(streams, y, post, comb, new, pieces).launch(
            grid=[cute.ceil_div(y.shape[0] * pieces, plan.warps), 1, 1],
            block=[plan.warps * WARP, 1, 1],
            stream=stream,
            use_pdl=True,
        )

    @cute.kernel
    def kernel(self, streams: Any, y: Any, post: Any, comb: Any, new: Any, pieces: Any) -> None:
        plan = self.plan
        thread, _, _ = cute.arch.thread_idx()
        block, _, _ = cute.arch.block_idx()
        task = block * plan.warps + cute.arch.make_warp_uniform(thread // WARP)
        token, first = task // pieces, task % pieces * plan.units * WARP + thread % WARP
        cute.arch.griddepcontrol_launch_dependents()
        cute.arch.griddepcontrol_wait()
        if token < y.shape[0]:
            self._piece(streams, y, post, comb, new, token, first)

    @cute.jit
    def _piece(self, streams: Any, y: Any, post: Any, comb: Any, new: Any, token: Any, first: Any) -> None:
        """Chunks first, first + 32, ... of a token."""
        plan = self.plan
        last = y.shape[1] * 2 // CHUNK - 1
        rows = [streams[token, j, None] for j in range(STREAMS)] + [y[token, None]]
        # loads without a branch; nothing is stored past the end
        chunks = [cutlass.min(first + u * WARP, last) for u in range(plan.units)]
        words = [[val.load_four(cute.local_tile(row, (4,), (chunk,)).iterator) for row in rows] for chunk in chunks]
        places = [post[token, None].iterator]
        places += [cute.local_tile(comb[token, None], (4,), (i,)).iterator for i in range(STREAMS)]
        given = [w.bitcast(Float32) for place in places for w in val.load_four(place)]
        assert len(given) == COEFFICIENTS
        for u in cutlass.range_constexpr(plan.units):
            x, added = words[u][:STREAMS], words[u][STREAMS]
            made = [val.new_words(added[i], [x[j][i] for j in range(STREAMS)], given[:4], given[4:]) for i in range(4)]
            if first + u * WARP <= last:
                for j in cutlass.range_constexpr(STREAMS):
                    target = cute.local_tile(new[token, j, None], (4,), (first + u * WARP,)).iterator
                    store_global(target, [made[i][j] for i in range(4)])
