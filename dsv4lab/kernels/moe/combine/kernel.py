"""out[m] = sum of y[position[m k + s]] over the token's k slots, in ascending order of position, + shared[m], rounded once.

Rows are sorted by expert, so ascending positions are ascending expert ids: the order in which the model's reference adds. A
warp sums one piece of a row. Every lane reads the k positions, sorts them in registers (k (k - 1) / 2 exchanges), and has k
times `units` loads in flight before the first addition, in float32. Positions of -1, read as unsigned, come last and add
nothing. With `experts`, rows are in the order of slots, and a lane makes numbers that sort alike of expert ids. Without
`indexed` the one row is token m's own: `moe_combine` of two matrices.

Bytes: every row of y once, shared once, out once. For 8192 tokens of 4096, k = 6, all BF16: 403 + 67 + 67 MB. Predicted on an
H200: at least 85 % of a copy's bandwidth; 2 us for one token. Flops: one addition an element read, nothing. sm_90a and sm_100a.

Without `from __future__ import annotations`: CuTeDSL reads the annotations themselves.
"""

from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Uint32

from dsv4lab.kernels.moe.combine.config import WARP, CombineConfig


class Combine:
    """The kernel for one `CombineConfig`; sizes are the call's."""

    def __init__(self, config: CombineConfig) -> None:
        config.check()
        self.plan = config

    @cute.jit
    def __call__(self, y: Any, position: Any, shared: Any, out: Any, stream: Any) -> None:
        """y (N, D), position (M k,) i32, of expert ids i64, shared (M, D), read if the config says so -> out (M, D)."""
        plan = self.plan
        pieces = cute.ceil_div(out.shape[1], plan.piece)
        self.kernel(y, position, shared, out, pieces).launch(
            grid=[cute.ceil_div(out.shape[0] * pieces, plan.warps), 1, 1],
            block=[plan.warps * WARP, 1, 1],
            stream=stream,
            use_pdl=True,
        )

    @cute.kernel
    def kernel(self, y: Any, position: Any, shared: Any, out: Any, pieces: Int32) -> None:
        plan = self.plan
        thread, _, _ = cute.arch.thread_idx()
        block, _, _ = cute.arch.block_idx()
        task = block * plan.warps + cute.arch.make_warp_uniform(thread // WARP)
        token, first = task // pieces, task % pieces * (plan.piece // plan.vector) + thread % WARP
        cute.arch.griddepcontrol_launch_dependents()
        cute.arch.griddepcontrol_wait()
        if token < out.shape[0]:
            self._sum(y, position, shared, out, token, first)

    def _rows(self, position: Any, token: Any) -> list[Any]:
        """The token's rows of y in the order of their experts, those that are none last."""
        plan = self.plan
        found = [position[token * plan.top_k + s] for s in range(plan.top_k)]
        if not plan.experts:
            return _sorted([Uint32(p) for p in found])
        none = Uint32(0xFFFFFFFF)
        known = [cutlass.and_(p >= 0, p < plan.experts) for p in found]
        keys = [cutlass.select_(k, Uint32(p) * plan.top_k + s, none) for s, (p, k) in enumerate(zip(found, known, strict=True))]
        first = Uint32(token * plan.top_k)
        return [cutlass.select_(key == none, none, first + key % plan.top_k) for key in _sorted(keys)]

    @cute.jit
    def _sum(self, y: Any, position: Any, shared: Any, out: Any, token: Any, first: Any) -> None:
        """One piece of a token: accesses first, first + 32, ... of its row."""
        plan = self.plan
        vector, last = plan.vector, out.shape[1] // plan.vector - 1
        rows = [Uint32(token)]
        if cutlass.const_expr(plan.indexed):
            rows = self._rows(position, token)
        held = cute.make_rmem_tensor((vector, plan.top_k, plan.units), y.element_type)
        added = cute.make_rmem_tensor((vector, plan.units), shared.element_type)
        for u in cutlass.range_constexpr(plan.units):
            unit = cutlass.min(first + u * WARP, last)  # loads without a branch; nothing is stored past the end
            for s in cutlass.range_constexpr(plan.top_k):
                row = cutlass.max(Int32(rows[s]), 0)
                cute.autovec_copy(cute.local_tile(y[row, None], (vector,), (unit,)), held[None, s, u])
            if cutlass.const_expr(plan.shared is not None):
                cute.autovec_copy(cute.local_tile(shared[token, None], (vector,), (unit,)), added[None, u])
        for u in cutlass.range_constexpr(plan.units):
            total = cute.make_rmem_tensor((vector,), Float32)
            total.fill(0.0)
            for s in cutlass.range_constexpr(plan.top_k):
                # Selected, not branched around: loads would sink into a branch, one after another.
                words = cute.recast_tensor(held[None, s, u], Int32)
                for w in cutlass.range_constexpr(cute.size(words)):
                    words[w] = words[w] if Int32(rows[s]) >= 0 else Int32(0)
                total.store(total.load() + held[None, s, u].load().to(Float32))
            if cutlass.const_expr(plan.shared is not None):
                total.store(total.load() + added[None, u].load().to(Float32))
            result = cute.make_rmem_tensor((vector,), out.element_type)
            result.store(total.load().to(out.element_type))
            if first + u * WARP <= last:
                cute.autovec_copy(result, cute.local_tile(out[token, None], (vector,), (first + u * WARP,)))


def _sorted(values: list[Any]) -> list[Any]:
    """Ascending, by exchanges that do not depend on the values."""
    for end in range(len(values) - 1, 0, -1):
        for i in range(end):
            low, high = values[i], values[i + 1]
            values[i], values[i + 1] = cutlass.min(low, high), cutlass.max(low, high)
    return values
