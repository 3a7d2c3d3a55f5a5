"""What a thread does with its 16 values: magnitudes, block scales, codes. Device functions on values in registers.

Values travel as `words`, as they lie in memory: 8 words of two BF16, the first in the low half, or 16 float32.

Division without a division a value: with r = the correctly rounded 1 / step and the rest of 1 / step as a second float32, the
quotient is fma(x, r, x rest). For every 24-bit step, and all x whose quotient lies next to a midpoint of E2M1 (or of E4M3, for
the block scale), it falls on the same side of it as the correctly rounded quotient: enumerated, two billion cases. That needs
a step between 2^-100 and 2^100; blocks beyond that are scaled by a power of two first.

E2M1 without a conversion: the code of a magnitude q up to 7 is the integer nearest to min(2 q, 2 + q, 4 + q / 2), ties to
even, three chords of the grid 0 0.5 1 1.5 2 3 4 6; a sum with 1.5 * 2^23 rounds to the integer, in its low bits.
"""

from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Float64, Uint32

from dsv4lab.formats import E2M1_MAX

INFINITY_BITS, NAN_BITS = 0x7F800000, 0x7FC00000
E2M1_MAX_BITS, E4M3_MAX_BITS = 0x40C00000, 0x43E00000  # 6, 448
FP8_FLOOR_BITS, MXFP4_FLOOR_BITS = 0x38D1B717, 0x01C00000  # 1e-4, 6 * 2^-126
LARGEST = 6.5  # a magnitude that is surely code 7
_E4M3_MIN = 2.0**-9
_LOW, _HIGH = 2.0**-60, 2.0**60  # scales between which nothing under- or overflows
_LEAST_BITS, MOST_BITS = (127 - 6) << 23, (127 + 9) << 23  # 2^-6 and 512: block scales with three exact bits
_MOST_FACTOR = 6 * 2.0**-14 * 2.0**6 / 1.06
_NO_BITS = 0xFFFFFFFF  # of no magnitude
_F32_MAX_BITS = 0x7F7FFFFF
SIGNS = 0x80008000
_MAGIC = 1.5 * 2.0**23  # its neighbours are one apart
_MAGIC_BITS = 0x4B400000
_MAGIC_NIBBLES = (_MAGIC_BITS * 0x11111111) & 0xFFFFFFFF  # what eight of them leave in a sum of shifted codes
_MAGIC_PAIR = 0x43404340  # twice 192
_EXPONENTS = 0x00800080  # one more in both halves' exponents
_BF16_2_126 = 0x7E807E80  # twice 2^126


def fma(a: Any, b: Any, c: Any) -> Any:
    return cute.arch.inline_ptx("fma.rn.f32 {$w0}, {$r0}, {$r1}, {$r2};", write_only_types=[Float32], read_only_args=[a, b, c])


def mul(a: Any, b: Any) -> Any:
    return cute.arch.inline_ptx("mul.rn.f32 {$w0}, {$r0}, {$r1};", write_only_types=[Float32], read_only_args=[a, b])


def add(a: Any, b: Any) -> Any:
    return cute.arch.inline_ptx("add.rn.f32 {$w0}, {$r0}, {$r1};", write_only_types=[Float32], read_only_args=[a, b])


def negative(a: Any) -> Any:
    return cute.arch.inline_ptx("neg.f32 {$w0}, {$r0};", write_only_types=[Float32], read_only_args=[a])


def magnitude(a: Any) -> Any:
    return cute.arch.inline_ptx("abs.f32 {$w0}, {$r0};", write_only_types=[Float32], read_only_args=[a])


def max_u32(a: Any, b: Any) -> Any:
    return cute.arch.inline_ptx("max.u32 {$w0}, {$r0}, {$r1};", write_only_types=[Uint32], read_only_args=[a, b])


def min_u32(a: Any, b: Any) -> Any:
    return cute.arch.inline_ptx("min.u32 {$w0}, {$r0}, {$r1};", write_only_types=[Uint32], read_only_args=[a, b])


def _packed(operation: str, a: Any, b: Any) -> Any:
    """An operation on two halves; these take no immediate operands."""
    code = f"{{ .reg .b32 second; mov.b32 second, {{$r1}}; {operation} {{$w0}}, {{$r0}}, second; }}"
    return cute.arch.inline_ptx(code, write_only_types=[Uint32], read_only_args=[a, b])


def _max_u16x2(a: Any, b: Any) -> Any:
    return _packed("max.u16x2", a, b)


def _max_magnitudes(a: Any, b: Any) -> Any:
    """Of BF16 in pairs, under signs of no meaning; a NaN where one is."""
    return _packed("max.NaN.xorsign.abs.bf16x2", a, b)


def _max_bf16x2(a: Any, b: Any) -> Any:
    return _packed("max.bf16x2", a, b)


def _min_u16x2(a: Any, b: Any) -> Any:
    return _packed("min.u16x2", a, b)


def fma_bf16x2(a: Any, b: Any, c: Any) -> Any:
    code = "{ .reg .b32 second, third; mov.b32 second, {$r1}; mov.b32 third, {$r2};"
    code += " fma.rn.bf16x2 {$w0}, {$r0}, second, third; }"
    return cute.arch.inline_ptx(code, write_only_types=[Uint32], read_only_args=[a, b, c])


def mul_bf16x2(a: Any, b: Any) -> Any:
    return _packed("mul.rn.bf16x2", a, b)


def prmt(a: Any, b: Any, selector: int) -> Any:
    """Four bytes of the eight of a (0..3) and b (4..7); selector + 8: the sign of the byte, eight times."""
    return Uint32(cute.arch.prmt(a, b, Uint32(selector)))


def pack_bf16(low: Any, high: Any) -> Any:
    """Two float32, rounded, in a word."""
    return cute.arch.inline_ptx("cvt.rn.bf16x2.f32 {$w0}, {$r0}, {$r1};", write_only_types=[Uint32], read_only_args=[high, low])


def tree(combine: Any, values: list[Any]) -> Any:
    """All values combined, in pairs."""
    while len(values) > 1:
        pairs = [combine(values[i], values[i + 1]) for i in range(0, len(values) - 1, 2)]
        values = pairs + values[len(values) - len(values) % 2 :]
    return values[0]


def reciprocal(x: Any) -> Any:
    """1 / x, correctly rounded: the steps of rcp.rn for an x whose reciprocal is a normal number."""
    r = cute.arch.rcp_approx(x)
    return fma(fma(negative(x), r, Float32(1.0)), r, r)


def divisor(step: Any) -> tuple[Any, Any]:
    """1 / step as two float32: correctly rounded, and the rest."""
    r = reciprocal(step)
    e = fma(negative(step), r, Float32(1.0))
    return r, mul(fma(e, e, e), r)


def quotient(x: Any, by: tuple[Any, Any]) -> Any:
    """x / step, for `divisor(step)`."""
    return fma(x, by[0], mul(x, by[1]))


# ---- memory ------------------------------------------------------------------------------------------------------------
# By addresses and constant distances in bytes: the compiler makes addresses of tensors anew for every chunk.
def load_chunk(address: Any, distance: int) -> list[Any]:
    """16 BF16, 8 words, from an address that is a multiple of 16."""
    words: list[Any] = []
    for place in (distance, distance + 16):
        code = f"ld.global.v4.b32 {{{{$w0}}, {{$w1}}, {{$w2}}, {{$w3}}}}, [{{$r0}} + {place}];"
        words += cute.arch.inline_ptx(code, write_only_types=[Uint32] * 4, read_only_args=[address])
    return words


def store_byte(address: Any, distance: int, byte: Any) -> None:
    cute.arch.inline_ptx(f"st.global.u8 [{{$r0}} + {distance}], {{$r1}};", read_only_args=[address, byte])


# ---- words -------------------------------------------------------------------------------------------------------------
def floats(words: list[Any], element: str) -> list[Any]:
    """The 16 values as float32."""
    if element == "f32":
        return [w.bitcast(Float32) for w in words]
    return [half.bitcast(Float32) for w in words for half in (w << 16, w & Uint32(0xFFFF0000))]


def words_of(values: list[Any], element: str) -> list[Any]:
    """Float32 values as words, rounded."""
    if element == "f32":
        return [v.bitcast(Uint32) for v in values]
    return [pack_bf16(values[i], values[i + 1]) for i in range(0, len(values), 2)]


def absolute(words: list[Any], element: str) -> list[Any]:
    mask = Uint32(0x7FFF7FFF if element == "bf16" else 0x7FFFFFFF)
    return [w & mask for w in words]


def amax_bits(magnitudes: list[Any], element: str) -> Any:
    """The largest magnitude as bits of a float32; that of a NaN is above infinity's."""
    if element == "f32":
        return tree(max_u32, magnitudes)
    pair = tree(_max_u16x2, magnitudes)
    return max_u32(pair << 16, pair & Uint32(0xFFFF0000))


def amax_bits_of_bf16(words: list[Any]) -> Any:
    """The same of words with signs."""
    low, high = floats([tree(_max_magnitudes, words)], "bf16")
    return cute.arch.fmax(magnitude(low), magnitude(high), nan=True).bitcast(Uint32)


def number_amax_bits(magnitudes: list[Any], element: str) -> Any:
    """The largest magnitude among numbers, which maxima of floats prefer to NaNs, as bits of a float32; a NaN's if all are."""
    if element == "bf16":
        pair = tree(_max_bf16x2, magnitudes)
        magnitudes = [pair << 16, pair & Uint32(0xFFFF0000)]
    return tree(cute.arch.fmax, [m.bitcast(Float32) for m in magnitudes]).bitcast(Uint32)


# ---- block scales ------------------------------------------------------------------------------------------------------
def finite(bits: Any) -> Any:
    """The largest finite float32 in place of infinity or NaN."""
    return min_u32(bits, Uint32(_F32_MAX_BITS)).bitcast(Float32)


def to_e4m3(value: Any) -> Any:
    """The byte of one value, rounded to the nearest, ties to even, saturating."""
    code = "{ .reg .b16 pair; .reg .f32 zero; mov.f32 zero, 0f00000000; cvt.rn.satfinite.e4m3x2.f32 pair, zero, {$r0};"
    return cute.arch.inline_ptx(code + " cvt.u32.u16 {$w0}, pair; }", write_only_types=[Uint32], read_only_args=[value])


def cut_f16(low: Any, high: Any) -> Any:
    """Two float32, rounded towards zero, in a word."""
    code = "cvt.rz.f16x2.f32 {$w0}, {$r0}, {$r1};"
    return cute.arch.inline_ptx(code, write_only_types=[Uint32], read_only_args=[high, low])


def wide_of_bf16(words: list[Any]) -> list[Any]:
    """The values as float64."""
    code = "{ .reg .b16 low, high; mov.b32 {low, high}, {$r0}; cvt.f64.bf16 {$w0}, low; cvt.f64.bf16 {$w1}, high; }"
    how = dict(write_only_types=[Float64, Float64])
    return [value for word in words for value in cute.arch.inline_ptx(code, read_only_args=[word], **how)]


def from_e4m3(pair: Any) -> tuple[Any, Any]:
    """The values of two bytes, exact."""
    code = "{ .reg .b16 both, low, high; .reg .b32 halves; cvt.u16.u32 both, {$r0}; cvt.rn.f16x2.e4m3x2 halves, both;"
    code += " mov.b32 {low, high}, halves; cvt.f32.f16 {$w0}, low; cvt.f32.f16 {$w1}, high; }"
    return cute.arch.inline_ptx(code, write_only_types=[Float32, Float32], read_only_args=[pair])


@cute.jit
def e8m0_ceil(bits: Any, max_code_bits: cutlass.Constexpr, floor_bits: cutlass.Constexpr) -> Any:
    """(byte, 2^-exponent) of the smallest power of two s with amax / s <= max_code; a NaN gives 255 and NaN."""
    byte, inverse = e8m0_of_number(min_u32(bits, Uint32(_F32_MAX_BITS)), max_code_bits, floor_bits)
    if bits > Uint32(INFINITY_BITS):
        byte, inverse = Uint32(255), Uint32(NAN_BITS).bitcast(Float32)
    return byte, inverse


def e8m0_of_number(bits: Any, max_code_bits: int, floor_bits: int) -> tuple[Any, Any]:
    """The same of an amax that is finite."""
    byte = e8m0_byte(max_u32(bits, Uint32(floor_bits)), max_code_bits)
    return byte, ((Uint32(254) - byte) << 23).bitcast(Float32)


def e8m0_byte(bits: Any, max_code_bits: int) -> Any:
    """The byte alone, of an amax that is large enough: a significand above the code's carries into the exponent."""
    return (bits + Uint32((0x3FFFFFFF - max_code_bits) & 0xFFFFFFFF)) >> 23


# ---- blocks of NVFP4 ---------------------------------------------------------------------------------------------------
def block_ratio(bits: Any, terms: Any) -> Any:
    """A block's largest magnitude over 6 scale, good from 2^-6 to 512. terms: `global_terms`."""
    return quotient(bits.bitcast(Float32), terms[2])


@cute.jit
def global_terms(scale: Any) -> Any:
    """What blocks of a global scale share: it, 6 times it, `divisor` of that, bits of an amax that never makes one rare and of
    a factor of `table`, between those of block scales 2^-6 and 9/8 of it.
    """
    sixfold = mul(scale, Float32(E2M1_MAX))
    by_six = divisor(sixfold)
    plain = scale >= Float32(_LOW) and scale <= Float32(_HIGH)
    by_six = (by_six[0] if plain else Uint32(NAN_BITS).bitcast(Float32), by_six[1])  # makes every block a rare one,
    usual = Uint32(0) if plain else Uint32(_NO_BITS)  # blocks of zeros, too, which otherwise are not
    return scale, sixfold, by_six, usual, mul(by_six[0], Float32(_MOST_FACTOR)).bitcast(Uint32)


@cute.jit
def block_quotients(values: Any, signs: Any, element: cutlass.Constexpr, bits: Any, ratio: Any, terms: Any) -> Any:
    """Magnitudes of a block of any kind over its step, in place, for `e2m1_counts`; returns the block scale, and its byte.

    block_scale = E4M3(bits / (6 scale)), at least 2^-9, 1 for zeros; step = block_scale scale. A NaN makes the scale one, too,
    and the magnitudes the largest; signs, words of `element` or None, then keep those of NaNs. ratio: of `block_ratio`.
    """
    scale, sixfold, _, usual, _ = terms
    unusual = ratio.bitcast(Uint32) - Uint32(_LEAST_BITS) > Uint32(MOST_BITS - _LEAST_BITS)
    rare = (unusual and bits != usual) or bits >= Uint32(INFINITY_BITS)  # needs more than its ratio
    count = cutlass.const_expr(cute.size(values))
    nan = bits > Uint32(INFINITY_BITS)
    if rare:
        ratio = finite(bits) / sixfold
        if nan:
            ratio = Uint32(NAN_BITS).bitcast(Float32)
            if cutlass.const_expr(signs is not None):
                for i in cutlass.range_constexpr(cute.size(signs)):
                    signs[i] = signs_of_nan(signs[i], element)
    ratio = Float32(1.0) if ratio == 0.0 else cute.arch.fmax(ratio, Float32(_E4M3_MIN), nan=True)
    byte = to_e4m3(ratio)
    block_scale, _ = from_e4m3(byte)
    step = mul(block_scale, scale)
    if rare:
        gain = Float32(1.0)
        if step < Float32(_LOW):
            gain = Float32(2.0**64)
        if step > Float32(_HIGH):
            gain = Float32(2.0**-64)
        step = Float32(1.0) if nan else mul(step, gain)
        largest = mul(step, Float32(LARGEST))
        for i in cutlass.range_constexpr(count):
            values[i] = largest if nan else cute.arch.fmin(mul(values[i], gain), largest)
    by_step = divisor(step)
    for i in cutlass.range_constexpr(count):
        values[i] = quotient(values[i], by_step)
    return block_scale, byte


# ---- codes -------------------------------------------------------------------------------------------------------------
def e2m1_counts(magnitudes: list[Any]) -> list[Any]:
    """E2M1 codes of magnitudes up to 7, in the low bits of words; the other bits are those of 1.5 * 2^23."""
    found = []
    for q in magnitudes:
        steep = fma(q, Float32(2.0), Float32(_MAGIC))
        middle = add(q, Float32(_MAGIC + 2))
        flat = fma(q, Float32(0.5), Float32(_MAGIC + 4))
        least = cute.arch.fmin(cute.arch.fmin(steep, middle), flat)
        found.append(least.bitcast(Uint32))
    return found


def e2m1_nibbles(magnitudes: list[Any], arch: str) -> Any:
    """Eight E2M1 codes without signs in a word, the first in the lowest nibble."""
    if arch != "sm_90a":
        pairs = " ".join(f"cvt.rn.satfinite.e2m1x2.f32 byte{i}, {{$r{2 * i + 1}}}, {{$r{2 * i}}};" for i in range(4))
        code = "{ .reg .b8 byte0, byte1, byte2, byte3; " + pairs + " mov.b32 {$w0}, {byte0, byte1, byte2, byte3}; }"
        return cute.arch.inline_ptx(code, write_only_types=[Uint32], read_only_args=magnitudes)
    counts = e2m1_counts(magnitudes)
    word = counts[7]
    for count in reversed(counts[:7]):
        word = word * Uint32(16) + count
    return word - Uint32(_MAGIC_NIBBLES)


def e2m1_count_pairs(magnitudes: list[Any], inverse: Any) -> list[Any]:
    """E2M1 codes of words of BF16 times a power of two, above 192 in the low bits of both halves.

    One rounding each, since a power of two is a BF16: BF16 from 128 to 256 are one apart.
    """
    once = prmt(inverse.bitcast(Uint32), Uint32(0), 0x3232)
    twice, half = once + Uint32(_EXPONENTS), once - Uint32(_EXPONENTS)
    found = []
    for pair in magnitudes:
        steep, middle, flat = (
            fma_bf16x2(pair, factor, Uint32(_MAGIC_PAIR + more * 0x10001))
            for factor, more in ((twice, 0), (once, 2), (half, 4))
        )
        found.append(_min_u16x2(_min_u16x2(steep, middle), flat))
    return found


def nibbles_of_pairs(counts: list[Any], words: list[Any]) -> Any:
    """Eight codes and the signs of four words of BF16 as a word, the first in the lowest nibble."""
    mixed = []  # values 0, 2, 1, 3 in the bytes of a word, then 4, 6, 5, 7
    for i in (0, 2):
        codes = counts[i] + counts[i + 1] * Uint32(256) - Uint32((_MAGIC_PAIR * 0x101) & 0xFFFFFFFF)
        mixed.append(codes + (prmt(words[i], words[i + 1], 0xFBD9) & Uint32(0x08080808)))
    return prmt(mixed[0], mixed[1], 0x5410) + prmt(mixed[0], mixed[1], 0x7632) * Uint32(16)


def sign_nibbles(words: list[Any], element: str) -> Any:
    """The signs of eight values (4 words of BF16, 8 of float32) in the top bits of a word's nibbles."""
    if element == "bf16":
        low, high = (prmt(words[i], words[i + 1], 0xFDB9) for i in (0, 2))  # bytes: signs of four values each
        even, odd = prmt(low, high, 0x6420), prmt(low, high, 0x7531)
    else:
        even, odd = (
            prmt(prmt(words[i], words[i + 2], 0x00FB), prmt(words[i + 4], words[i + 6], 0x00FB), 0x5410) for i in (0, 1)
        )
    return (even & Uint32(0x08080808)) | (odd & Uint32(0x80808080))


def signs_of_nan(word: Any, element: str) -> Any:
    """A word whose sign bits are those of its NaNs, 0 for numbers; other bits are arbitrary."""
    if element == "f32":
        return word & ((word & Uint32(0x7FFFFFFF)) + Uint32(0x7FFFFFFF - INFINITY_BITS))
    over = _max_u16x2(word & Uint32(0x7FFF7FFF), Uint32(0x7F807F80)) + Uint32(0x007F007F)  # bit 15: above infinity
    return word & over


def e4m3_word(values: list[Any]) -> Any:
    """Four values as E4M3 bytes, the first in the lowest."""
    code = "{ .reg .b16 low, high; cvt.rn.satfinite.e4m3x2.f32 low, {$r1}, {$r0};"
    code += " cvt.rn.satfinite.e4m3x2.f32 high, {$r3}, {$r2}; mov.b32 {$w0}, {low, high}; }"
    return cute.arch.inline_ptx(code, write_only_types=[Uint32], read_only_args=values)


# ---- values of codes ---------------------------------------------------------------------------------------------------
def e2m1_pair_times(low: Any, high: Any, signs: Any, scale: Any) -> Any:
    """Two counts with the signs of a word of BF16, times two equal BF16 -> two BF16, exact."""
    fields = low * Uint32(64) + high * Uint32(1 << 22) - Uint32((_MAGIC_BITS << 6) & 0xFFFFFFFF)  # 2^-126 of the codes' values
    return mul_bf16x2(mul_bf16x2(fields | (signs & Uint32(SIGNS)), Uint32(_BF16_2_126)), scale)


def bf16_signs(words: list[Any], element: str) -> list[Any]:
    """Words whose halves have the signs of the 16 values."""
    if element == "bf16":
        return words
    return [prmt(words[i], words[i + 1], 0x7531) for i in range(0, len(words), 2)]


def e4m3_values(word: Any, scale: Any) -> list[Any]:
    """Four E4M3 bytes times a power of two -> two words of BF16."""
    values = [*from_e4m3(word & Uint32(0xFFFF)), *from_e4m3(word >> 16)]
    scaled = [mul(v, scale) for v in values]
    return [pack_bf16(scaled[0], scaled[1]), pack_bf16(scaled[2], scaled[3])]
