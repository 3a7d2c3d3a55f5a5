"""The router: z = x W^T, s = sqrt(softplus(z)), k experts a token and their weights; see `direct`, `tiled` and `select`.

Up to 16 tokens it is one launch: the CTA that comes last in a token tile routes its tokens. With more tokens that would leave
most of the GPU idle, so a second launch, of a warp a token, follows without a gap (PDL). sm_90a and sm_100a.

Without `from __future__ import annotations`: CuTeDSL reads the annotations themselves.
"""

from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Float32

from dsv4lab.kernels.moe.router.config import ROUTE_WARPS, WARP, RouterConfig
from dsv4lab.kernels.moe.router.direct import DirectLogits
from dsv4lab.kernels.moe.router.select import Select
from dsv4lab.kernels.moe.router.tiled import TiledLogits


class Router:
    """One configuration of the kernel, as CuTeDSL compiles it."""

    def __init__(self, config: RouterConfig) -> None:
        config.check()
        self.plan = config
        self.select = Select(config)
        self.logits = TiledLogits(config) if config.tiled else DirectLogits(config)

    @cute.jit
    def __call__(
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
        stream: Any,
    ) -> None:
        """x (M, D), weight (E, D) -> weights (M, k) f32, ids (M, k) i64. M > 0, D % 64 == 0.

        bias (E,) f32 is read by score; table (V, k) and token_ids (M,) by hash. partial (splits, M, padded) f32 is scratch,
        arrived (token tiles,) i32 zero before and after.
        """
        plan = self.plan
        tokens, splits = x.shape[0], partial.shape[0]
        how = dict(block=[plan.warps * WARP, 1, 1], min_blocks_per_mp=1, stream=stream, use_pdl=True)
        grid = [plan.expert_tiles, splits, cute.ceil_div(tokens, plan.tokens)]
        if cutlass.const_expr(plan.tiled):
            self.logits.kernel(x, weight, partial).launch(grid=grid, **how)
        else:
            self.logits.kernel(x, weight, bias, table, token_ids, weights, ids, partial, arrived, scale).launch(
                grid=grid, **how
            )
        if cutlass.const_expr(not plan.fused):
            self.select.kernel(partial, bias, table, token_ids, weights, ids, scale).launch(
                grid=[cute.ceil_div(tokens, ROUTE_WARPS), 1, 1],
                block=[ROUTE_WARPS * WARP, 1, 1],
                stream=stream,
                use_pdl=True,
            )
