"""Attention of many neighbouring queries to few keys on Hopper: window, and entries that all have a place in shared memory.

    o[h] = sum_n exp(s[h, n] - M) k[n] / (sum_n exp(s[h, n] - M) + exp(sink[h] - M)),   s[h, n] = scale q[h] . k[n]

Queries that follow each other in a sequence see the same keys but for one token each. So a CTA has a run of units (query, tile
of 64 heads), keeps their keys in shared memory and copies 16 new tokens for every 16 queries. All scores of a unit fit into the
registers of a warpgroup: it multiplies, has an ordinary softmax, multiplies again, and stores, with nobody to wait for; two
warpgroups have every other unit, and one's products run beside the other's exponentials and stores.

    fill     (a warp)          keys and queries by TMA, see `fill`
    attend   (warpgroups 0, 1) scores, softmax, sums, output, see `attend`

    units     fill -> attend   full: a unit's facts are written, and what it is the first to need has arrived
    read      attend -> attend a unit's queries are in registers, so that the next one's are next in their ring
    done      attend -> fill   a unit needs keys no more
    queries   fill -> attend   slices of 64 dims, in the order of the units: full, empty

Keys are rows of BF16 in line (`cache.unpack`). Blocks of 16 tokens go round a ring, the entries have places of their own; all
places are multiplied, and what a query does not see is masked: window 128 and 64 entries are 208 rows for the 192 that are seen
at most. Cost of a unit: 27.3 MFLOP, 6656 cycles of the tensor cores; softmax 832 cycles of the exponential unit, which another
warpgroup hides; 64 KB of queries and 64 KB of output, 10 bytes a cycle each. 4,096 units: 537 MB, 128 us of an H200's
memory, and 138 us of products at the rate that its power allows them. Measured, with the unpacking: 192 us.

Without `from __future__ import annotations`: CuTeDSL reads the annotations themselves.
"""

from typing import Any

import cutlass
import cutlass.cute as cute
import cutlass.utils.hopper_helpers as hopper
from cutlass import BFloat16, Float32, Int32, Int64
from cutlass.cute.nvgpu import cpasync
from cutlass.memory import SmemAllocator
from cutlass.tensor_utils import LayoutEnum

from dsv4lab.kernels._common.rings import Ring
from dsv4lab.kernels.attention.core.attend import Attend
from dsv4lab.kernels.attention.core.config import DIM, ROWS, TILE, TILES, WARPGROUP, ResidentConfig
from dsv4lab.kernels.attention.core.fill import Fill
from dsv4lab.kernels.attention.core.units import FACTS, UNITS, Units
from dsv4lab.kernels.cache.unpack.config import GROUP

_THREADS = 3 * WARPGROUP
_ATTEND_WARPS = 8
_ATTEND_REGISTERS, _FILL_REGISTERS = 240, 24  # of a thread; it is launched with 168


class AttentionResidentSm90:
    """The kernel for one `ResidentConfig`; sizes are the call's."""

    def __init__(self, config: ResidentConfig) -> None:
        config.check()
        self.plan = config

    @cute.jit
    def __call__(
        self,
        q: Any,
        sinks: Any,
        keys: Any,
        places: Any,
        positions: Any,
        seq_idx: Any,
        out: Any,
        factor: Float32,
        ratio: Int32,
        head_tiles: Int32,
        ctas: Int32,
        stream: Any,
    ) -> None:
        """q (M H, 512) bf16; sinks (H,) f32; keys (rows, 512) bf16 and places (rings, 4) i32, see `cache.unpack`; positions,
        seq_idx (M,) i64 -> out (M H, 512) bf16. factor: scale times log2 e.
        """
        tile = hopper.make_smem_layout_b(LayoutEnum.ROW_MAJOR, (ROWS, ROWS, TILE), BFloat16, 1)
        box = cute.slice_(tile, (None, None, 0))
        load_q, tma_q = cpasync.make_tiled_tma_atom(cpasync.CopyBulkTensorTileG2SOp(), q, box, (ROWS, TILE))
        group = cute.make_layout((GROUP, (TILE, TILES)), stride=(TILE, (1, GROUP * TILE)))
        group = cute.make_composed_layout(tile.inner, 0, group)
        load_k, tma_k = cpasync.make_tiled_tma_atom(cpasync.CopyBulkTensorTileG2SOp(), keys, group, (GROUP, DIM))
        self.kernel(load_q, tma_q, load_k, tma_k, sinks, places, positions, seq_idx, out, factor, ratio, head_tiles).launch(
            grid=[ctas, 1, 1], block=[_THREADS, 1, 1], min_blocks_per_mp=1, stream=stream, use_pdl=True
        )

    @cute.kernel
    def kernel(
        self,
        load_q: Any,
        q: Any,
        load_k: Any,
        keys: Any,
        sinks: Any,
        places: Any,
        positions: Any,
        seq_idx: Any,
        out: Any,
        factor: Float32,
        ratio: Int32,
        head_tiles: Int32,
    ) -> None:
        plan = self.plan
        thread, _, _ = cute.arch.thread_idx()
        block, _, _ = cute.arch.block_idx()
        grid, _, _ = cute.arch.grid_dim()
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        memory = SmemAllocator()
        units = Units(
            memory.allocate_array(Int64, UNITS),
            memory.allocate_array(Int64, UNITS),
            memory.allocate_array(Int64, UNITS),
            memory.allocate_tensor(Int32, cute.make_layout((UNITS, FACTS), stride=(FACTS, 1))),
        )
        queries = Ring.allocate(memory, plan.query_stages)
        tile = hopper.make_smem_layout_b(LayoutEnum.ROW_MAJOR, (ROWS, ROWS, TILE), BFloat16, plan.query_stages)
        shared_q = memory.allocate_tensor(BFloat16, tile.outer, byte_alignment=1024, swizzle=tile.inner)
        # Keys by groups of eight, a group as eight tiles of 64 dims: (of a group, dims, group).
        by_group = cute.make_layout((GROUP, (TILE, TILES), plan.rows // GROUP), stride=(TILE, (1, GROUP * TILE), GROUP * DIM))
        shared_k = memory.allocate_tensor(BFloat16, by_group, byte_alignment=1024, swizzle=tile.inner)
        if warp == 0:
            with cute.arch.elect_one():
                for i in cutlass.range_constexpr(UNITS):
                    cute.arch.mbarrier_init(units.full + i, 1)
                    cute.arch.mbarrier_init(units.read + i, _ATTEND_WARPS // 2)
                    cute.arch.mbarrier_init(units.done + i, _ATTEND_WARPS // 2)
            queries.init(full=1, empty=_ATTEND_WARPS // 2)
            cute.arch.mbarrier_init_fence()
        fill = Fill(
            plan, load_q, q, shared_q, load_k, keys, shared_k, places, positions, seq_idx, ratio, head_tiles, units, queries
        )
        cute.arch.barrier(barrier_id=0, number_of_threads=_THREADS)
        cute.arch.griddepcontrol_launch_dependents()
        cute.arch.griddepcontrol_wait()
        total = positions.shape[0] * head_tiles
        first = Int32(Int64(block) * total // grid)
        count = Int32(Int64(block + 1) * total // grid) - first
        if warp >= _ATTEND_WARPS:
            cute.arch.setmaxregister_decrease(_FILL_REGISTERS)
            if warp == _ATTEND_WARPS:
                fill.run(sinks.shape[0], first, count)
        else:
            cute.arch.setmaxregister_increase(_ATTEND_REGISTERS)
            attend = Attend(plan, shared_q, shared_k, sinks, out, factor, head_tiles, units, queries)
            attend.run(warp // 4, thread % WARPGROUP, first, count)
