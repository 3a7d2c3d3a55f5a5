"""Floats as unsigned integers in the same order, packed with the number of an element; the largest of several.

Without `from __future__ import annotations`: CuTeDSL reads the annotations themselves.
"""

from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Uint32, Uint64

WARP = 32
LOWEST = 0x007FFFFF  # image of -inf


def choose(condition: Any, yes: Any, no: Any) -> Any:
    """yes or no, of yes's type, without a branch."""
    yes = cutlass.as_numeric(yes)
    return type(yes)(cutlass.select_(cutlass.Boolean(condition), yes, type(yes)(no)))


def image(value: Any) -> Any:
    """Bits of a float that compare as unsigned integers; both zeros are one."""
    code = "{ .reg .b32 raw, flip; .reg .f32 sum; add.rn.f32 sum, {$r0}, 0f00000000; mov.b32 raw, sum;"
    code += " shr.s32 flip, raw, 31; or.b32 flip, flip, 0x80000000; xor.b32 {$w0}, raw, flip; }"
    return cute.arch.inline_ptx(code, write_only_types=[Uint32], read_only_args=[value])


def value_of(code: Any) -> Any:
    """The float that has this image."""
    text = "{ .reg .b32 flip; not.b32 flip, {$r0}; shr.s32 flip, flip, 31; or.b32 flip, flip, 0x80000000;"
    text += " xor.b32 {$w0}, {$r0}, flip; }"
    return cute.arch.inline_ptx(text, write_only_types=[Float32], read_only_args=[code])


def pack(code: Any, token: Any) -> Any:
    """One number whose largest is the largest image, and of equals the lowest id."""
    text = "{ .reg .b32 low; not.b32 low, {$r1}; mov.b64 {$w0}, {low, {$r0}}; }"
    return cute.arch.inline_ptx(text, write_only_types=[Uint64], read_only_args=[code, Uint32(token)])


def floor_of(code: Any) -> Any:
    """The same for an image that belongs to no element, only to something no larger than one."""
    return cute.arch.inline_ptx("mov.b64 {$w0}, {0, {$r0}};", write_only_types=[Uint64], read_only_args=[code])


def image_in(packed: Any) -> Any:
    return Uint32(packed >> Uint64(32))


def token_in(packed: Any) -> Any:
    """The id, int32."""
    return Int32(~Uint32(packed & Uint64(0xFFFFFFFF)))


# ---- the largest -------------------------------------------------------------------------------------------------------
def largest_of(numbers: list[Any]) -> Any:
    best = numbers[0]
    for other in numbers[1:]:
        best = choose(other > best, other, best)
    return best


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
