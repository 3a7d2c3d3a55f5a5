"""E2M1 codes of BF16 by one multiplication a value, for Hopper, which has no instruction that gives them.

The code of a magnitude q below 7 is the integer nearest to twice a concave g: q up to 2, 1 + q / 2 to 4, 2 + q / 4 beyond. Bits
of a float16 are such a function where the normal numbers begin: those of q 2^-14 are g(q) 2^10. So a product by 2^-14 / step,
cut to a float16, has sign, code and the bit that rounds it in its upper byte.

Where the product is cut, or rounded, no tie is seen: the factor must put every BF16 clearly on its side of each midpoint m. Up
to powers of two midpoints are 1, 3, 5 and 7; a tie goes down at 1 and 5 (0.25, 1.25, 2.5, 5), up at 3 and 7 (0.75, 1.75, 3.5).
A tie is what the reference takes for one: a quotient that float32 rounds to m. For each m let x be the largest 8-bit number
that goes down, y the next one: the factor lies between m / y and m / x. Four such intervals have a common part at least 2^-11
wide, relative to it, or, where ties contradict each other, none. In its middle neither the factor's error (2^-15) nor the
product's (2^-24) matters. Enumerated: 43 of the 2^23 significands of a step have none, powers of two among them.

Powers of two, which round global scales have among their steps (6 / 2688 has one in eight), get a factor just below 1 / step:
1 and 5 go down. Before that x (1 + 1.5 2^-9) is rounded to BF16, which adds a unit to significands from 171 / 128 on: 3 and 7
go up, and their neighbours below, which become ties, do not. For other steps x stays x. The other 42 take the careful way.

A step is block scale times global scale, and block scales have eight significands: lane l prepares significand l % 8 against
midpoint 2 (l / 8) + 1, once for a global scale; a block asks the lane of its scale by a shuffle. Its last byte tells a power of
two.

Where the global scale is a power of two, eight pairs of BF16 do: x times one, rounded, times the other, rounded, is on its side
of every midpoint, ties as above; all x were tried.
"""

from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Uint32

from dsv4lab.kernels.quant.rows import encode as enc

_BELOW_ONE = 1.0 - 0.5 / 225  # within 224/225 and 1
_RAISES, _RAISE = 0x3B, 0x0040BF80  # BF16: 1.5 * 2^-9, the first its upper byte, raises significands from 171 / 128 on; -1
_ROUND = ((0xB0928BA1, 0xA9AC879F), (0xB7D3E1CB, 0xBEB9E5C9))  # by significand: bytes of the first factor, of the second
_ROUND_BITS = 0x9033F355  # what both words lack besides
_WIDE = 1.0 + 2.0**-16
_EIGHT = 0x181F  # of a shuffle: segments of 8 lanes


@cute.jit
def prepare(factor: Any, thread: Any) -> Any:
    """The lane's entry, bits of the factor for block scale 2^-7 (1 + l / 8), l = lane % 8, + l 2^20; all where is none."""
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
    middle = enc.mul(enc.mul(enc.add(high, low), Float32(0.5)), ((Uint32(270) - (bits >> 23)) << 23).bitcast(Float32))
    found = (middle.bitcast(Uint32) & Uint32(0xFFFFFF00)) + (significand << 20)
    if even:
        found += Uint32(_RAISES)
    return found if even or enc.mul(low, Float32(_WIDE)) < high else Uint32(0xFFFFFFFF)


def factor_bits(entry: Any, byte: Any) -> Any:
    """Bits of the factor of a block scale, a byte of E4M3; large where there is none."""
    return Uint32(cute.arch.shuffle_sync(entry, byte, mask_and_clamp=_EIGHT)) + byte * Uint32(0xFFF00000)


def nibbles(words: list[Any], factor: Any) -> Any:
    """Codes of eight BF16 as a word, the first in the lowest nibble. factor: bits."""
    raises, by = factor * Uint32(1 << 24) + Uint32(_RAISE), factor.bitcast(Float32)
    return _joined([[enc.mul(half, by) for half in _apart(word, raises)] for word in words])


def round_factors(byte: Any, inverse: Any) -> Any:
    """Both factors of a block scale from 2^-6 on, a byte of E4M3, in a word. inverse: bits of 1 / 6 of a power of two."""
    first, second = (enc.prmt(Uint32(low), Uint32(high), byte & Uint32(7)) for low, high in _ROUND)
    return second * Uint32(1 << 16) + first + byte * Uint32(0xFFF00000) + (inverse + Uint32(_ROUND_BITS))


def nibbles_of_round(words: list[Any], factors: Any) -> Any:
    """`nibbles` by `round_factors`; a lower half below an upper one is cut off."""
    for factor in _twice(factors):
        words = [enc.mul_bf16x2(word, factor) for word in words]
    return _joined([[half.bitcast(Float32) for half in (word << 16, word)] for word in words])


def _joined(pairs: list[list[Any]]) -> Any:
    even, odd = (enc.prmt(enc.cut_f16(pairs[0][i], pairs[1][i]), enc.cut_f16(pairs[2][i], pairs[3][i]), 0x7531) for i in (0, 1))
    even, odd = (_mixed(n * Uint32(8) + Uint32(0x08080808), n, 0x80808080) for n in (even, odd))
    return _mixed(even >> 4, odd, 0xF0F0F0F0)


def _apart(word: Any, raises: Any) -> list[Any]:
    """Two BF16 x as float32, raised: x - x in the lower half."""
    return [enc.fma_bf16x2(twice, raises, twice).bitcast(Float32) for twice in _twice(word)]


def _twice(word: Any) -> Any:
    """Each half, in both halves of a word."""
    code = "{ .reg .b16 low, high; mov.b32 {low, high}, {$r0}; mov.b32 {$w0}, {low, low}; mov.b32 {$w1}, {high, high}; }"
    return cute.arch.inline_ptx(code, write_only_types=[Uint32, Uint32], read_only_args=[word])


def _mixed(a: Any, b: Any, mask: int) -> Any:
    """Bits of b where the mask has some, of a elsewhere."""
    code = f"lop3.b32 {{$w0}}, {{$r0}}, {{$r1}}, {mask}, 0xD8;"
    return cute.arch.inline_ptx(code, write_only_types=[Uint32], read_only_args=[a, b])


def _leading_zeros(a: Any) -> Any:
    return cute.arch.inline_ptx("clz.b32 {$w0}, {$r0};", write_only_types=[Uint32], read_only_args=[a])
