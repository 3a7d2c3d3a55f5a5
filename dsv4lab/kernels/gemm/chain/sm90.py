"""One token's experts on Hopper: both products in one launch, h = SwiGLU(W13 x), y = W2 h for each expert that the token has.

Between two launches memory idles: the first one's last weights are decoded, multiplied and stored before the second one's first
may come into shared memory. Here CTAs go on from tiles of the first product to tiles of the second. Weights arrive without a
break; only h is waited for, expert by expert:

    weights (a warp)     takes tiles from a counter, tells the others, records into the ring (`gemm.mixed.sm90`)
    tokens  (a warp)     the columns of x or h for the same tiles; of h, once all its expert's tiles are there
    multiply (16 warps)  decode, multiply, store; of h, count the tile

    turns     weights -> tokens, multiply    full: which tile is next    empty: every warp has read it
    stages    as in `gemm.mixed.sm90`
    counters  tiles taken; CTAs done; tiles of h stored, for each expert. The last CTA to be done leaves zeros.

Tiles are taken in order, all of the first product before any of the second: who waits for h waits for CTAs that run, and these
wait for nobody. So it does not matter how many CTAs run at once. The first tile of a CTA is its own number: that of the matrix
beside is on its way while the router runs, and counters belong to the launch before until then.

Bytes: the matrices of all experts once. Flash, one token with the shared expert: 97 MB, 23 us at 4.2 TB/s, and the router's 2.

Without `from __future__ import annotations`: CuTeDSL reads the annotations themselves.
"""

from dataclasses import dataclass, replace
from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64, Uint32
from cutlass.memory import SmemAllocator

from dsv4lab.kernels._common.lanes import came_before
from dsv4lab.kernels._common.rings import Ring, arrive_with
from dsv4lab.kernels.gemm.chain.config import ChainConfig
from dsv4lab.kernels.gemm.mixed.epilogue import Epilogue
from dsv4lab.kernels.gemm.mixed.sm90 import MixedLinearSm90, Operands, Stages

_TURNS = 4  # tiles that are told of ahead
_TAKEN, _DONE, _STORED = range(3)  # counters; of the last as many as there are rows


@dataclass(frozen=True)
class Both:
    """What the products read and write, and their tiles in all."""

    first: Operands
    second: Operands
    tiles_first: Any
    tiles: Any


@dataclass(frozen=True)
class Turns:
    """Which tile is next: the loading warp tells, -1 after the last."""

    ring: Ring
    tiles: Any

    @cute.jit
    def tell(self, turn: Any, tile: Any) -> None:
        self.ring.wait_empty(turn)
        if cute.arch.lane_idx() == 0:
            self.tiles[self.ring.stage(turn)] = tile
            cute.arch.mbarrier_arrive(self.ring.full(turn))

    @cute.jit
    def hear(self, turn: Any) -> Any:
        self.ring.wait_full(turn)
        tile = Int32(self.tiles[self.ring.stage(turn)])
        arrive_with(self.ring.empty(turn), cute.arch.lane_idx(), [Uint32(tile)])
        return tile


class ChainSm90:
    """One configuration of the kernel, as CuTeDSL compiles it."""

    def __init__(self, config: ChainConfig) -> None:
        config.check()
        self.first, self.second = MixedLinearSm90(config.first), MixedLinearSm90(config.second)
        self.plan = config.first

    @cute.jit
    def __call__(
        self,
        x: cute.Tensor,
        pair: cute.Tensor,
        pair_alpha: cute.Tensor,
        pair_beside: cute.Tensor,
        pair_beside_alpha: cute.Tensor,
        h: cute.Tensor,
        down: cute.Tensor,
        down_alpha: cute.Tensor,
        down_beside: cute.Tensor,
        down_beside_alpha: cute.Tensor,
        y: cute.Tensor,
        weights: cute.Tensor,
        matrices: cute.Tensor,
        counters: cute.Tensor,
        limit: Float32,
        ctas: Int32,
        stream: Any,
    ) -> None:
        """x (1, D); pair (E * slabs, D tiles, words), down (E * slabs, I tiles, words): records i32, those beside of one
        matrix; alphas (E, 2) f32, those beside (1, 2); h (rows, I), y (rows, D): a row for each choice, and one for the matrix
        beside, the last; weights (choices,) f32; matrices (choices, 2) i32: (matrix, -); counters (2 + rows,) i32, zeros
        before and after. limit: of SwiGLU.
        """
        self.kernel(
            x,
            pair,
            pair_alpha,
            pair_beside,
            pair_beside_alpha,
            h,
            down,
            down_alpha,
            down_beside,
            down_beside_alpha,
            y,
            weights,
            matrices,
            counters,
            limit,
        ).launch(grid=[ctas, 1, 1], block=[self.plan.threads, 1, 1], min_blocks_per_mp=1, stream=stream, use_pdl=True)

    @cute.kernel
    def kernel(
        self,
        x: cute.Tensor,
        pair: cute.Tensor,
        pair_alpha: cute.Tensor,
        pair_beside: cute.Tensor,
        pair_beside_alpha: cute.Tensor,
        h: cute.Tensor,
        down: cute.Tensor,
        down_alpha: cute.Tensor,
        down_beside: cute.Tensor,
        down_beside_alpha: cute.Tensor,
        y: cute.Tensor,
        weights: cute.Tensor,
        matrices: cute.Tensor,
        counters: cute.Tensor,
        limit: Float32,
    ) -> None:
        plan = self.plan
        stages = plan.stages
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        memory = SmemAllocator()
        full = memory.allocate_array(Int64, stages)
        empty = memory.allocate_array(Int64, stages)
        turns = Turns(Ring.allocate(memory, _TURNS), memory.allocate_tensor(Int32, cute.make_layout(_TURNS)))
        words = cute.make_layout((self.first.words * plan.chunks, plan.slabs, stages))
        tokens = cute.make_layout((plan.token_pitch // 4, plan.room, stages))
        shared_w = memory.allocate_tensor(Uint32, words, byte_alignment=128)
        shared_x = memory.allocate_tensor(Uint32, tokens, byte_alignment=128)
        sums = memory.allocate_tensor(Float32, cute.make_layout(plan.sum_floats), byte_alignment=128)
        if warp == plan.warps:
            with cute.arch.elect_one():
                for i in cutlass.range_constexpr(stages):
                    cute.arch.mbarrier_init(full + i, 2)
                    cute.arch.mbarrier_init(empty + i, plan.warps)
            turns.ring.init(full=1, empty=plan.warps + 1)
            cute.arch.mbarrier_init_fence()
            cute.arch.sync_warp()
            cute.arch.barrier_arrive(barrier_id=0, number_of_threads=plan.threads)
        else:
            cute.arch.barrier(barrier_id=0, number_of_threads=plan.threads)
        # The matrices' numbers come from the kernel before; weights of the one beside are known.
        if cutlass.const_expr(plan.beside):
            if warp != plan.warps:
                cute.arch.griddepcontrol_wait()
                cute.arch.griddepcontrol_launch_dependents()
        else:
            cute.arch.griddepcontrol_wait()
            cute.arch.griddepcontrol_launch_dependents()

        shared = (weights, matrices, matrices)
        first = self._operands(self.first, x, pair, pair_alpha, pair_beside, pair_beside_alpha, h, *shared)
        second = self._operands(self.second, h, down, down_alpha, down_beside, down_beside_alpha, y, *shared)
        tiles_first = self.first.share(first).end
        both = Both(first, second, tiles_first, tiles_first + self.second.share(second).end)
        ring = Stages(shared_w, shared_x, full, empty)
        if warp == plan.warps:
            self._load_weights(both, ring, turns, counters)
        elif warp == plan.warps + 1:
            self._load_rows(both, ring, turns, counters)
        else:
            out = [
                Epilogue(
                    p, of.y, None, of.alpha, None, None, weights, None, None, of.top_k, of.group_rows, limit, sums, None, None
                )
                for p, of in ((self.first.plan, first), (self.second.plan, second))
            ]
            self._multiply(*out, both, ring, turns, counters)

    def _operands(
        self,
        kernel: MixedLinearSm90,
        x: Any,
        records: Any,
        alpha: Any,
        beside: Any,
        beside_alpha: Any,
        y: Any,
        weights: Any,
        matrices: Any,
        unread: Any,
    ) -> Operands:
        rows = records.shape[0] // alpha.shape[0] * (kernel.plan.rows // kernel.plan.slabs)
        top_k = matrices.shape[0]
        return Operands(x, records, alpha, beside, beside_alpha, y, unread, weights, matrices, unread, top_k, rows)

    # ---- loads ---------------------------------------------------------------------------------------------------------
    @cute.jit
    def _load_weights(self, both: Both, ring: Stages, turns: Turns, counters: Any) -> None:
        block, _, _ = cute.arch.block_idx()
        grid, _, _ = cute.arch.grid_dim()
        first, second = self.first.share(both.first), self.second.share(both.second)
        tile, turn, stage, phase = block, Int32(0), Int32(0), Int32(1)
        while tile < both.tiles:
            turns.tell(turn, tile)
            if tile < both.tiles_first:
                stage, phase = self.first.load_weights(both.first, ring, first, tile, stage, phase)
            else:
                at = tile - both.tiles_first
                stage, phase = self.second.load_weights(both.second, ring, second, at, stage, phase)
            cute.arch.griddepcontrol_wait()  # counters are the last launch's until then
            tile = grid + came_before(counters.iterator + _TAKEN)
            turn += 1
        turns.tell(turn, Int32(-1))

    @cute.jit
    def _load_rows(self, both: Both, ring: Stages, turns: Turns, counters: Any) -> None:
        grid, _, _ = cute.arch.grid_dim()
        first, second = self.first.share(both.first), self.second.share(both.second)
        turn, stage, phase = Int32(0), Int32(0), Int32(1)
        tile = turns.hear(turn)
        while tile >= 0:
            if tile < both.tiles_first:
                stage, phase = self.first.load_rows(both.first, ring, first, tile, stage, phase)
            else:
                at = tile - both.tiles_first
                _wait_for(counters.iterator + (_STORED + at // second.inner), first.inner)
                stage, phase = self.second.load_rows(both.second, ring, second, at, stage, phase)
            turn += 1
            tile = turns.hear(turn)
        before = came_before(counters.iterator + _DONE)
        if before == grid - 1:  # nobody asks any more
            for i in cutlass.range(cute.arch.lane_idx(), counters.shape[0], 32, unroll=1):
                counters[i] = Int32(0)

    # ---- products ------------------------------------------------------------------------------------------------------
    @cute.jit
    def _multiply(self, out_first: Any, out_second: Any, both: Both, ring: Stages, turns: Turns, counters: Any) -> None:
        thread, _, _ = cute.arch.thread_idx()
        first, second = self.first.share(both.first), self.second.share(both.second)
        out_first, terms = self.first.ahead(out_first, both.first)
        out_second = replace(out_second, alpha=terms.gains)
        turn, stage, phase, uses = Int32(0), Int32(0), Int32(0), Int32(0)
        tile = turns.hear(turn)
        while tile >= 0:
            if tile < both.tiles_first:
                stage, phase, uses = self.first.multiply(out_first, terms, both.first, ring, first, tile, stage, phase, uses)
                if thread == 0:  # all warps have stored: a barrier ends that
                    stored = counters.iterator + (_STORED + tile // first.inner)
                    cute.arch.atomic_add(stored, Int32(1), sem="release", scope="gpu")
            else:
                at = tile - both.tiles_first
                stage, phase, uses = self.second.multiply(out_second, terms, both.second, ring, second, at, stage, phase, uses)
            turn += 1
            tile = turns.hear(turn)


@cute.jit
def _wait_for(counter: Any, count: Any) -> None:
    """Until a counter has come so far, and for bulk copies to see what was counted."""
    if cute.arch.lane_idx() == 0:
        seen = Int32(0)
        while seen < count:
            seen = cute.arch.inline_ptx(
                "ld.acquire.gpu.global.b32 {$w0}, [{$r0}];", write_only_types=[Int32], read_only_args=[counter.toint()]
            )
        cute.arch.fence_proxy("async.global")
    cute.arch.sync_warp()
