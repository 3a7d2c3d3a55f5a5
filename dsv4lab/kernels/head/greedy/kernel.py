"""ids[m] = the row that the largest of parts[m] names: the second half of a greedy head.

The product's epilogue has left, for each token and part of the vocabulary, the largest logit's order and ~id in one number (see
`gemm.mixed.epilogue`). A CTA takes a token: a thread the maximum of its numbers, a warp's lanes theirs, the first thread the
warps'. Maxima of integers are the same in any order.

Bytes: 8 for each part of 128 (or fewer) vocabulary rows, 8 kB a token of 129,280; a launch's latency, some 2 us. sm_90a and
sm_100a.

Without `from __future__ import annotations`: CuTeDSL reads the annotations themselves.
"""

from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Int64, Uint64
from cutlass.memory import SmemAllocator

from dsv4lab.kernels._common.order import largest_of, largest_of_lanes, token_in
from dsv4lab.kernels.head.greedy.config import WARP, PickConfig

_AT_ONCE = 4  # loads of a thread in flight


class Pick:
    """The kernel for one `PickConfig`; M and the number of parts are the call's."""

    def __init__(self, config: PickConfig) -> None:
        config.check()
        self.plan = config

    @cute.jit
    def __call__(self, parts: Any, ids: Any, stream: Any) -> None:
        """parts (M, P) -> ids (M,), both i64."""
        self.kernel(parts, ids).launch(
            grid=[ids.shape[0], 1, 1], block=[self.plan.warps * WARP, 1, 1], stream=stream, use_pdl=True
        )

    @cute.kernel
    def kernel(self, parts: Any, ids: Any) -> None:
        plan = self.plan
        thread, _, _ = cute.arch.thread_idx()
        token, _, _ = cute.arch.block_idx()
        found = SmemAllocator().allocate_tensor(Uint64, cute.make_layout(plan.warps), byte_alignment=16)
        cute.arch.griddepcontrol_launch_dependents()
        cute.arch.griddepcontrol_wait()
        threads, count = plan.warps * WARP, parts.shape[1]
        best = Uint64(0)
        for base in cutlass.range(thread, count, threads * _AT_ONCE, unroll=1):
            # past the end the last one is read again
            held = [Uint64(parts[token, cutlass.min(base + j * threads, count - 1)]) for j in range(_AT_ONCE)]
            best = largest_of([best, *held])
        best = largest_of_lanes(best, WARP)
        if thread % WARP == 0:
            found[thread // WARP] = best
        cute.arch.barrier()
        if thread == 0:
            ids[token] = Int64(token_in(largest_of([found[w] for w in range(plan.warps)])))
