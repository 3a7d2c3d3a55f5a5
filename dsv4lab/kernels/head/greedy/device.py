"""The largest packed number of a warp's lanes; see `head.sampler.device` for what is packed.

Without `from __future__ import annotations`: CuTeDSL reads the annotations themselves.
"""

from typing import Any

import cutlass.cute as cute
from cutlass import Uint32, Uint64

from dsv4lab.kernels.head.greedy.config import WARP
from dsv4lab.kernels.head.sampler.device import image_in, largest_of
from dsv4lab.kernels.head.sampler.noise import choose


def largest_of_lanes(packed: Any, lanes: int) -> Any:
    """Of every `lanes` neighbouring lanes, a power of two. All lanes of the warp come here, and all get it.

    A whole warp takes two reductions, of the images and then of the low words that have the largest one.
    """
    if lanes == WARP:
        code, low = image_in(packed), Uint32(packed & Uint64(0xFFFFFFFF))
        top = Uint32(cute.arch.warp_redux_sync(code, "umax"))
        low = Uint32(cute.arch.warp_redux_sync(choose(code == top, low, Uint32(0)), "umax"))
        return cute.arch.inline_ptx("mov.b64 {$w0}, {{$r0}, {$r1}};", write_only_types=[Uint64], read_only_args=[low, top])
    distance = 1
    while distance < lanes:
        packed = largest_of([packed, _exchanged(packed, distance)])
        distance *= 2
    return packed


def _exchanged(packed: Any, distance: int) -> Any:
    """What the lane has whose number differs in this bit."""
    code = "{ .reg .b32 low, high; mov.b64 {low, high}, {$r0}; "
    code += f"shfl.sync.bfly.b32 low, low, {distance}, 31, -1; shfl.sync.bfly.b32 high, high, {distance}, 31, -1; "
    code += "mov.b64 {$w0}, {low, high}; }"
    return cute.arch.inline_ptx(code, write_only_types=[Uint64], read_only_args=[packed])
