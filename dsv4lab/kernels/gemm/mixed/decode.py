"""Records in shared memory -> BF16 pairs in registers, the A operand of a tensor-core product: one decoder a format.

A decoder reads words and scales of `layout`'s records for one of its two readers, and gives the operand's four registers, pairs
of BF16 for rows g, g + 8, g, g + 8 of columns (2q, 2q + 1) twice and (2q + 8, 2q + 9) twice.

Without `from __future__ import annotations`: CuTeDSL reads the annotations themselves.
"""

from typing import Any

import cutlass.cute as cute
from cutlass import Uint16, Uint32

from dsv4lab.kernels._common.ptx import load_words, mul_bf16x2
from dsv4lab.kernels.gemm.mixed.layout import BLOCKS, PLANE_WORDS, PLANES

_NIBBLE_MASK = 0x81C081C0  # sign, two exponent bits, one mantissa bit of two BF16
# Bits of the fourth pair in a word turned by 6. Multiplied by three powers of two, that is moved by 2, 7 and 12 at once, each
# comes to its field; no two of them meet there, and no carry reaches one.
_LAST_BITS, _LAST_SPREAD = 0x001B001B, 1 << 2 | 1 << 7 | 1 << 12
_SIGNS, _BYTE_MASK = 0x80008000, 0x07F007F0  # sign; four exponent bits and three mantissa bits of two BF16
_NVFP4_SCALE = 0x70007000  # added to a 5-bit exponent and 3-bit mantissa in place, makes 2^107 times the scale


def decode_for_warpgroup(fmt: str, record: Any, lane: Any, out: Any) -> None:
    """A lane's part of a tile, block after block -> out[4 j .. 4 j + 3] for block j. record: address of its first byte."""
    g, q = lane // 4, lane % 4
    scales = record + PLANES[fmt] * PLANE_WORDS * 4
    factors = _row_scales(fmt, scales, g)
    for j in range(BLOCKS):
        at = record + ((j * 8 + (g ^ (2 * j))) * BLOCKS + q) * 4
        words = [_load_word(at + p * PLANE_WORDS * 4) for p in range(PLANES[fmt])]
        _decode(fmt, words, _block_scales(fmt, factors, j), out, 4 * j)


def decode_for_warp(fmt: str, record: Any, lane: Any, out: Any) -> None:
    """A lane's own block of 16 columns of a tile -> out[4 i .. 4 i + 3] for columns 2i, 2i + 1, 2i + 8, 2i + 9."""
    g, q = lane // 4, lane % 4
    scales = record + PLANES[fmt] * PLANE_WORDS * 4
    at = record + (q * 8 + (g ^ (2 * q))) * BLOCKS * 4
    planes = [load_words(at + p * PLANE_WORDS * 4) for p in range(PLANES[fmt])]
    factors = _own_scales(fmt, scales, g, q)
    for i in range(BLOCKS):
        _decode(fmt, [plane[i] for plane in planes], factors, out, 4 * i)


def _row_scales(fmt: str, scales: Any, g: Any) -> Any:
    """What a lane needs of a record's scales, all four blocks."""
    if fmt == "nvfp4":
        return _load_two_words(scales + g * 8)
    if fmt == "mxfp4":
        return (_load_word(scales + g * 4),)
    if fmt == "fp8_block":
        return _load_two_words(scales)
    return ()


def _block_scales(fmt: str, words: Any, j: int) -> Any:
    """The factors of rows g and g + 8 in block j: halves of a word or, of FP8, pairs of equal ones."""
    if fmt == "nvfp4":
        return _nvfp4_scales(words[j // 2], 2 * (j % 2))
    if fmt == "mxfp4":
        return _mxfp4_scales(words[0], 2 * (j // 2))
    return words


def _own_scales(fmt: str, scales: Any, g: Any, q: Any) -> Any:
    """The factors of rows g and g + 8 in block q, as `_block_scales` gives them."""
    if fmt == "nvfp4":
        return _nvfp4_scales(_load_half(scales + (g * BLOCKS + q) * 2), 0)
    if fmt == "mxfp4":
        return _mxfp4_scales(_load_half(scales + (g * 2 + q // 2) * 2), 0)
    if fmt == "fp8_block":
        return _load_two_words(scales)
    return ()


def _two_bytes(word: Any, at: int) -> Any:
    """Bytes `at` and `at` + 1 of a word, a half each."""
    return cute.arch.prmt(word, Uint32(0), Uint32(0x4040 | (at + 1) << 8 | at))


def _nvfp4_scales(word: Any, at: int) -> Any:
    """Two bytes of a word as two BF16."""
    return _two_bytes(word, at) * Uint32(0x10) + Uint32(_NVFP4_SCALE)


def _mxfp4_scales(word: Any, at: int) -> Any:
    """Two bytes, exponent fields, as two BF16."""
    return _two_bytes(word, at) * Uint32(0x80)


def _decode(fmt: str, words: Any, scales: Any, out: Any, at: int) -> None:
    """The words of one (block, g, q) -> out[at .. at + 3]."""
    if fmt == "bf16":
        for i in range(4):
            out[at + i] = words[i]
    elif fmt == "fp8_block":
        low, high = scales
        for p in range(2):
            out[at + 2 * p] = mul_bf16x2(_from_e4m3(words[p]), low)
            out[at + 2 * p + 1] = mul_bf16x2(_from_e4m3(words[p] << 8), high)
    else:  # 12 instructions, of which 6 are the shifts' and logic's unit's, which takes one every other cycle
        word, mask = words[0], Uint32(_NIBBLE_MASK)
        turned = (word << 6) | (word >> 26)
        spread = (turned & Uint32(_LAST_BITS)) * Uint32(_LAST_SPREAD)
        for i, pair in enumerate((word, word << 3, turned, spread)):
            out[at + i] = _mul_by_half(pair & mask, scales, i % 2)


def _from_e4m3(word: Any) -> Any:
    """The upper bytes of both halves, 2^-120 of their value."""
    return (word & Uint32(_SIGNS)) | ((word >> 4) & Uint32(_BYTE_MASK))


def _mul_by_half(pair: Any, factors: Any, which: int) -> Any:
    """Two products of BF16 with the same half of `factors`: an operand's modifier, not an instruction."""
    code = "{ .reg .b16 half0, half1; .reg .b32 both; mov.b32 {half0, half1}, {$r1}; "
    code += f"mov.b32 both, {{half{which}, half{which}}}; "
    code += "mul.rn.bf16x2 {$w0}, {$r0}, both; }"
    return cute.arch.inline_ptx(code, write_only_types=[Uint32], read_only_args=[pair, factors])


def _load_two_words(address: Any) -> Any:
    code = "ld.shared.v2.b32 {{$w0}, {$w1}}, [{$r0}];"
    return cute.arch.inline_ptx(code, write_only_types=[Uint32] * 2, read_only_args=[address])


def _load_word(address: Any) -> Any:
    return cute.arch.inline_ptx("ld.shared.b32 {$w0}, [{$r0}];", write_only_types=[Uint32], read_only_args=[address])


def _load_half(address: Any) -> Any:
    half = cute.arch.inline_ptx("ld.shared.u16 {$w0}, [{$r0}];", write_only_types=[Uint16], read_only_args=[address])
    return Uint32(half)
