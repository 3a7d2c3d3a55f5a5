"""o = sum_p w_p O_p / (sum_p w_p + exp(sink - M)),  w_p = exp(L_p - M): the parts of a query's keys put together.

A warp has 128 dims of one head, a lane four; the CTA's four warps have the head. All parts' loads are independent. Bytes: parts
x 2 KB a head read, mostly from L2, 1 KB written; flops: nothing. A part without keys has L = -inf, and its O is not read.

Without `from __future__ import annotations`: CuTeDSL reads the annotations themselves.
"""

from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import BFloat16, Float32

from dsv4lab.kernels._common.ptx import exp2
from dsv4lab.kernels.attention.core.config import DIM, CombineConfig

LOG2_E = 1.4426950408889634
_VECTOR = 4  # dims of a lane
_WARPS = DIM // (32 * _VECTOR)
_AHEAD = 8  # parts whose loads are in flight together


class Combine:
    """The kernel; sizes are the call's."""

    def __init__(self, config: CombineConfig) -> None:
        self.plan = config

    @cute.jit
    def __call__(self, partial: Any, lse: Any, sinks: Any, out: Any, stream: Any) -> None:
        """partial (parts, M H, 512), lse (parts, M H), sinks (H,) f32 -> out (M H, 512) bf16."""
        self.kernel(partial, lse, sinks, out).launch(
            grid=[out.shape[0], 1, 1], block=[_WARPS * 32, 1, 1], stream=stream, use_pdl=True
        )

    @cute.kernel
    def kernel(self, partial: Any, lse: Any, sinks: Any, out: Any) -> None:
        thread, _, _ = cute.arch.thread_idx()
        row, _, _ = cute.arch.block_idx()
        parts = partial.shape[0]
        cute.arch.griddepcontrol_launch_dependents()
        cute.arch.griddepcontrol_wait()
        lane = cute.arch.lane_idx()
        sink = sinks[row % sinks.shape[0]] * LOG2_E
        high = Float32(-Float32.inf)
        for p in cutlass.range(lane, parts, 32, unroll=1):
            high = cute.arch.fmax(high, lse[p, row])
        for offset in (16, 8, 4, 2, 1):
            high = cute.arch.fmax(high, cute.arch.shuffle_sync_bfly(high, offset))
        whole = exp2(sink - high)
        total = cute.make_rmem_tensor((_VECTOR,), Float32)
        total.fill(0.0)
        held = cute.make_rmem_tensor((_VECTOR, _AHEAD), Float32)
        for first in cutlass.range(0, parts, _AHEAD, unroll=1):
            weights = []
            for a in cutlass.range_constexpr(_AHEAD):
                at = cutlass.min(first + a, parts - 1)
                weight = exp2(lse[at, row] - high)
                weight = weight if first + a < parts else Float32(0.0)
                weights.append(weight)
                held[None, a].fill(0.0)
                if weight > 0.0:
                    cute.autovec_copy(cute.local_tile(partial[at, row, None], (_VECTOR,), (thread,)), held[None, a])
            for a in cutlass.range_constexpr(_AHEAD):
                whole = whole + weights[a]
                for i in cutlass.range_constexpr(_VECTOR):
                    total[i] = total[i] + weights[a] * held[i, a]
        result = cute.make_rmem_tensor((_VECTOR,), BFloat16)
        result.store((total.load() * (1.0 / whole)).to(BFloat16))
        cute.autovec_copy(result, cute.local_tile(out[row, None], (_VECTOR,), (thread,)))
