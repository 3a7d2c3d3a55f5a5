"""Rows of a projection, or pooled entries -> key records in the slots of a page pool; see `kernels.cache.key`.

A warp has a row, from its loads to the bytes of its record; nothing is shared. What a row needs of memory (x, its position, its
slot) is loaded at once; rows of slot -1 are computed like others and stored nowhere, so that no load waits for a slot. What all
rows need comes before, while the last kernel ends. 8192 rows are resident at once: 32 registers, 64 warps a multiprocessor.

Bytes of a row of 512 BF16: 1024 read, 584 (fp8) or 384 (nvfp4) written; 8192 rows are 13.2 or 11.5 MB, 3.1 or 2.7 us at an
H200's copy bandwidth of 4.2 TB/s. Instructions of a row in sm_90a's code: 297 (fp8), 330 (nvfp4), 249 (plain); 62 rows a
multiprocessor take 2.5 us (fp8) or 2.8 us (nvfp4) to issue. sm_90a and sm_100a.

Without `from __future__ import annotations`: CuTeDSL reads the annotations themselves.
"""

from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64

from dsv4lab.kernels.cache.key import KeyRow
from dsv4lab.kernels.cache.plan import WARP
from dsv4lab.kernels.cache.write.config import WriteConfig


class WriteKeys:
    """The kernel for one `WriteConfig`; the number of rows is the call's."""

    def __init__(self, config: WriteConfig) -> None:
        config.check()
        self.plan = config
        self.row = KeyRow(config.key)

    @cute.jit
    def __call__(
        self, x: Any, weight: Any, positions: Any, inv_freq: Any, pages: Any, slots: Any, eps: Float32, stream: Any
    ) -> None:
        """x (M, W) u32 and weight (W,) u32: words of their elements; positions, slots (M,) i64; inv_freq (32,) f32;
        pages (P, page_bytes) u8. M > 0.
        """
        warps, key = self.plan.warps, self.plan.key
        # Rare NVFP4 records would take more than 32 registers. With a bound there must be a carveout, or compiling asks for a
        # device; -1 is none.
        bound = warps > 1 and key.record == "nvfp4" and key.element == "bf16"
        self.kernel(x, weight, positions, inv_freq, pages, slots, eps).launch(
            grid=[cute.ceil_div(x.shape[0], warps), 1, 1],
            block=[warps * WARP, 1, 1],
            min_blocks_per_mp=64 // warps if bound else 0,
            preferred_smem_carveout=-1 if bound else None,
            stream=stream,
            use_pdl=True,
        )

    @cute.kernel
    def kernel(self, x: Any, weight: Any, positions: Any, inv_freq: Any, pages: Any, slots: Any, eps: Float32) -> None:
        key = self.plan.key
        thread, _, _ = cute.arch.thread_idx()
        block, _, _ = cute.arch.block_idx()
        lane = thread % WARP
        row = block * self.plan.warps + cute.arch.make_warp_uniform(thread // WARP)
        cute.arch.griddepcontrol_launch_dependents()
        if cutlass.const_expr(not self.plan.settled):
            cute.arch.griddepcontrol_wait()
        weights, freq = self.row.load(weight.iterator.toint(), lane, key.weight), inv_freq[lane]
        if cutlass.const_expr(self.plan.settled):
            cute.arch.griddepcontrol_wait()
        # Not behind a branch, where addresses would come after the wait, and positions' after x's loads: behind x itself.
        near = cutlass.min(row, x.shape[0] - 1)
        slot = Int32(slots[near])
        # A slot is needed last. With a use up here (-1 is as good a position for nobody) it is loaded with the rest, not a
        # memory latency after x has come.
        position = Int32(positions[near]) | (slot >> 31)
        values = self.row.load(x.iterator.toint() + Int64(near) * (4 * x.shape[1]), lane, key.element)
        words, pair = self.row.key(values, weights, position, freq, eps, lane)
        self.row.store(words, pair, pages, slot if row < x.shape[0] else Int32(-1), lane)
