"""Slots of a page pool -> keys as float32: gather and dequantise, every bit the reference's.

A warp has a row, whose record it decodes as `record` says: a store of the warp is 512 bytes in a row, all loads of a row are
in flight before the first value is decoded. A slot outside the pool reads slot 0, which is there as in any pool, and gives
zeros.

Bytes of a row of 512: 584 (fp8), 384 (nvfp4) or 1024 (plain BF16) read, 2048 written. sm_90a and sm_100a.

Without `from __future__ import annotations`: CuTeDSL reads the annotations themselves.
"""

from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32

from dsv4lab.kernels.cache.plan import WARP
from dsv4lab.kernels.cache.read.config import ReadConfig
from dsv4lab.kernels.cache.record import FOUR, StoredKey


class ReadKeys:
    """The kernel for one `ReadConfig`; the number of rows is the call's."""

    def __init__(self, config: ReadConfig) -> None:
        config.check()
        self.plan = config
        self.stored = StoredKey(config.key)

    @cute.jit
    def __call__(self, pages: Any, slots: Any, out: Any, stream: Any) -> None:
        """pages (P, page_bytes) u8, P > 0; slots (N,) i64 -> out (N, dim) f32. N > 0."""
        warps = self.plan.warps
        self.kernel(pages, slots, out).launch(
            grid=[cute.ceil_div(out.shape[0], warps), 1, 1], block=[warps * WARP, 1, 1], stream=stream, use_pdl=True
        )

    @cute.kernel
    def kernel(self, pages: Any, slots: Any, out: Any) -> None:
        thread, _, _ = cute.arch.thread_idx()
        block, _, _ = cute.arch.block_idx()
        row = block * self.plan.warps + cute.arch.make_warp_uniform(thread // WARP)
        cute.arch.griddepcontrol_launch_dependents()
        cute.arch.griddepcontrol_wait()
        if row < out.shape[0]:
            slot = Int32(slots[row])
            inside = slot <= Int32(pages.shape[0]) * self.plan.key.page_size - 1
            self._read(pages, cutlass.select_(inside, slot, Int32(-1)), out, row, thread % WARP)

    @cute.jit
    def _read(self, pages: Any, slot: Any, out: Any, row: Any, lane: Any) -> None:
        data, scales = self.stored.place(pages, slot)
        loaded = self.stored.load(data, scales, lane)
        for step in cutlass.range_constexpr(self.stored.steps):
            values = self.stored.values(loaded, step, lane)
            held = cute.make_rmem_tensor((FOUR,), Float32)
            for i in cutlass.range_constexpr(FOUR):
                held[i] = values[i] if slot >= 0 else Float32(0.0)
            if self.stored.has(step, lane):
                cute.autovec_copy(held, cute.local_tile(out[row, None], (FOUR,), (step * WARP + lane,)))
