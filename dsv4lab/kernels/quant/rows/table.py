"""E2M1 codes of BF16 by one multiplication a value, for Hopper, which has no instruction that gives them.

The code of a magnitude q below 7 is the integer nearest to twice a concave g: q up to 2, 1 + q / 2 to 4, 2 + q / 4 beyond. Bits
of a float32 are such a function where the normal numbers begin: those of q 2^-126 are g(q) 2^23. So codes are three bits of a
product by 2^-126 / step, of which the upper 16 bits are enough, two values in a word.

Where the product is cut, or rounded, no tie is seen: the factor must put every BF16 clearly on its side of each midpoint m. Up
to powers of two midpoints are 1, 3, 5 and 7; a tie goes down at 1 and 5 (0.25, 1.25, 2.5, 5), up at 3 and 7 (0.75, 1.75, 3.5).
A tie is what the reference takes for one: a quotient that float32 rounds to m. For each m let x be the largest 8-bit number
that goes down, y the next one: the factor lies between m / y and m / x. Four such intervals have a common part at least 2^-11
wide, relative to it, or, where ties contradict each other, none. In its middle neither the factor's error (2^-22) nor the
product's (2^-21) matters. Enumerated: 43 of the 2^23 significands of a step have none, powers of two among them.

Powers of two, which round global scales have among their steps (6 / 2688 has one in eight), get a factor just below 1 / step:
1 and 5 go down. Before that x (1 + 1.5 2^-9) is rounded to BF16, which adds a unit to significands from 171 / 128 on: 3 and 7
go up, and their neighbours below, which become ties, do not. For other steps x stays x. The other 42 take the careful way.

A step is block scale times global scale, and block scales have eight significands: lane l prepares significand l % 8 against
midpoint 2 (l / 8) + 1, once for a global scale; a block asks the lane of its scale by a shuffle. Its last bit tells a power of
two.

Factors are 2^-126 / step. Above steps of 1 they are no normal numbers, and good to 2^-13 at 1792, the largest: enough, by
enumeration of 60 thousand significands and of all that are or nearly are an 8-bit number over a midpoint.
"""

from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Uint32

from dsv4lab.kernels.quant.rows import encode as enc

LOW, HIGH = 2.0**-56, 4.0  # global scales that keep steps within 2^-62 and 1792, where factors are good to 2^-13
_BELOW_ONE = 1.0 - 0.5 / 225  # within 224/225 and 1
_LEAN = 0x3B403B40  # twice 1.5 * 2^-9: raises significands from 171 / 128 on by a unit
_PLACE = (126 - 62 - 7) << 23  # an exponent: the product's, without the values'; 7 is the bias of E4M3
_WIDE = 1.0 + 2.0**-16
_EIGHT = 0x181F  # of a shuffle: segments of 8 lanes
_SIGNS = 0x08080808


@cute.jit
def prepare(factor: Any, thread: Any) -> Any:
    """The lane's entry: bits of the factor for a block scale 2^-7 (1 + l / 8), l = lane % 8; 0 where there is none."""
    significand, which = Uint32(thread % 8), Int32(thread % 32 // 8)
    bits = enc.mul((Uint32(0x3F800000) + (significand << 20)).bitcast(Float32), factor).bitcast(Uint32)
    step = (bits & Uint32(0x7FFFFF)) | Uint32(0x800000)
    midpoint = Uint32(2 * which + 1)
    product = step * midpoint
    shift = Uint32(24) - _leading_zeros(product)
    grid = Uint32(1) << shift
    number = product >> shift  # 128 to 255: the 8-bit number at or below m step
    rest = product - (number << shift)
    near = step >> Uint32(24 - cutlass.min(which, 2))  # half a unit of m in the last place, times step
    upwards = which % 2 == 1
    below, above = 2 * number, 2 * number + 2
    if upwards and rest <= near:
        above = 2 * number
        below = Uint32(255) if number == 128 else 2 * number - 2
    if not upwards and grid - rest <= near:
        below = 2 * number + 2
        above = Uint32(516) if number == 255 else 2 * number + 4
    unit = ((shift + Uint32(126)) << 23).bitcast(Float32)
    high = enc.mul(midpoint.to(Float32), cute.arch.rcp_approx(enc.mul(below.to(Float32), unit)))
    low = enc.mul(midpoint.to(Float32), cute.arch.rcp_approx(enc.mul(above.to(Float32), unit)))
    for distance in (8, 16):
        high = cute.arch.fmin(high, cute.arch.shuffle_sync_bfly(high, distance))
        low = cute.arch.fmax(low, cute.arch.shuffle_sync_bfly(low, distance))
    even = step == Uint32(1 << 23)
    if even:
        high, low = Float32(_BELOW_ONE * 2.0**-23), Float32(_BELOW_ONE * 2.0**-23)
    middle = enc.mul(enc.mul(enc.add(high, low), Float32(0.5)), ((Uint32(277) - (bits >> 23)) << 23).bitcast(Float32))
    some = factor >= Float32(LOW) and factor <= Float32(HIGH) and (even or enc.mul(low, Float32(_WIDE)) < high)
    found = ((middle.bitcast(Uint32) - Uint32(_PLACE)) & Uint32(0xFFFFFFFE)) | Uint32(even)
    return found if some else Uint32(0)


def factor_bits(entry: Any, byte: Any) -> tuple[Any, Any]:
    """(the entry of a block scale, 0 where there is none; bits of the factor): the scale is a byte of E4M3, a normal one."""
    found = Uint32(cute.arch.shuffle_sync(entry, byte, mask_and_clamp=_EIGHT))
    return found, found - ((byte & Uint32(0x78)) << 20)


@cute.jit
def placed(magnitudes: list[Any], by_step: Any) -> tuple[list[Any], Any]:
    """Words of BF16 and their factor, such that products have codes in their bits."""
    lean = Uint32(_LEAN) if by_step & Uint32(1) != Uint32(0) else Uint32(0)
    return [enc.fma_bf16x2(word, lean, word) for word in magnitudes], enc.mul(by_step.bitcast(Float32), Float32(2.0**-62))


def nibbles(words: list[Any], small: list[Any], factor: Any) -> Any:
    """Codes of eight BF16 as a word, the first in the lowest nibble. small: their magnitudes, shrunk."""
    pairs = []
    for word in small:
        low = enc.mul((word << 16).bitcast(Float32), factor).bitcast(Uint32)
        high = enc.mul((word & Uint32(0xFFFF0000)).bitcast(Float32), factor).bitcast(Uint32)
        pairs.append(enc.prmt(low, high, 0x7632) * Uint32(4) + Uint32(0x00800080))  # codes in bytes 1 and 3
    mixed = []
    for i in (0, 2):
        codes = enc.prmt(pairs[i], pairs[i + 1], 0x7351)
        mixed.append(codes | (enc.prmt(words[i], words[i + 1], 0xFBD9) & Uint32(_SIGNS)))
    return enc.interleaved(mixed)


def _leading_zeros(a: Any) -> Any:
    return cute.arch.inline_ptx("clz.b32 {$w0}, {$r0};", write_only_types=[Uint32], read_only_args=[a])
