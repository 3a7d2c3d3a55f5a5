"""y[m, s] = e[m] + f[m, s] in float32, rounded once: what the prediction block starts from.

A thread has one access of a row of e, and adds it to all streams of the token: their loads are in flight together.

Bytes: e and f once, y once. For 8192 tokens of 4096 with 4 streams in BF16: 67 + 268 + 268 MB, 144 us at an H200's copy of
4.2 TB/s; a launch's latency, some 2 us, for one token. sm_90a and sm_100a.

Without `from __future__ import annotations`: CuTeDSL reads the annotations themselves.
"""

from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Float32

from dsv4lab.kernels.head.mtp.config import WARP, AddConfig


class AddStreams:
    """The kernel for one `AddConfig`; M and D are the call's."""

    def __init__(self, config: AddConfig) -> None:
        config.check()
        self.plan = config

    @cute.jit
    def __call__(self, e: Any, f: Any, out: Any, stream: Any) -> None:
        """e (M, D), f (M, S, D) -> out (M, S, D)."""
        plan = self.plan
        accesses = e.shape[0] * (e.shape[1] // plan.vector)
        self.kernel(e, f, out).launch(
            grid=[cute.ceil_div(accesses, plan.warps * WARP), 1, 1],
            block=[plan.warps * WARP, 1, 1],
            stream=stream,
            use_pdl=True,
        )

    @cute.kernel
    def kernel(self, e: Any, f: Any, out: Any) -> None:
        plan = self.plan
        thread, _, _ = cute.arch.thread_idx()
        block, _, _ = cute.arch.block_idx()
        index = block * (plan.warps * WARP) + thread
        row = e.shape[1] // plan.vector
        token, unit = index // row, index % row
        cute.arch.griddepcontrol_launch_dependents()
        cute.arch.griddepcontrol_wait()
        if token < e.shape[0]:
            first = cute.make_rmem_tensor((plan.vector,), e.element_type)
            held = cute.make_rmem_tensor((plan.vector, plan.streams), f.element_type)
            cute.autovec_copy(cute.local_tile(e[token, None], (plan.vector,), (unit,)), first)
            for s in cutlass.range_constexpr(plan.streams):
                cute.autovec_copy(cute.local_tile(f[token, s, None], (plan.vector,), (unit,)), held[None, s])
            for s in cutlass.range_constexpr(plan.streams):
                total = first.load().to(Float32) + held[None, s].load().to(Float32)
                result = cute.make_rmem_tensor((plan.vector,), out.element_type)
                result.store(total.to(out.element_type))
                cute.autovec_copy(result, cute.local_tile(out[token, s, None], (plan.vector,), (unit,)))
