"""What the lanes of a warp have together, and the bits that stand for them.

Without `from __future__ import annotations`: CuTeDSL reads the annotations themselves.
"""

from typing import Any

import cutlass.cute as cute
from cutlass import Int32


@cute.jit
def through(value: Any, lane: Any) -> Any:
    """Sum over the lanes up to this one, of int32."""
    for step in (1, 2, 4, 8, 16):
        other = cute.arch.shuffle_sync_up(value, step, mask_and_clamp=0)
        value = value + (other if lane >= step else Int32(0))
    return value


def lowest(mask: Any) -> Any:
    """The number of the lowest bit that is set, int32; 32 where there is none."""
    code = "{ .reg .b32 turned; brev.b32 turned, {$r0}; clz.b32 {$w0}, turned; }"
    return cute.arch.inline_ptx(code, write_only_types=[Int32], read_only_args=[mask])


@cute.jit
def came_before(counter: Any) -> Any:
    """How many warps had come to a counter in global memory, for every lane of the next one, which counts itself."""
    before = Int32(0)
    if cute.arch.lane_idx() == 0:
        before = Int32(cute.arch.atomic_add(counter, Int32(1), sem="acq_rel", scope="gpu"))
    return cute.arch.shuffle_sync(before, 0)
