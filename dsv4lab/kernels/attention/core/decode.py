"""Codes of a key -> BF16, in registers: 16 neighbouring dims of a key at a time, exactly.

E4M3, 2.5 instructions a value: two codes in the upper bytes of two halves, their sign kept and the rest moved to a BF16's lower
exponent bits, are 2^-120 of the value; a product with 2^120 times the scale, a power of two, ends it. E2M1, 2.3 instructions a
value: magnitudes of four codes are looked up by two byte permutations, one for either byte of a BF16, and signs spread by a
third.

Scales beyond 2^7 are taken as 2^7: of a key, whose norm is one, none comes near.

Without `from __future__ import annotations`: CuTeDSL reads the annotations themselves.
"""

from typing import Any

from cutlass import Uint32

from dsv4lab.kernels._common.ptx import mul_bf16x2
from dsv4lab.kernels.attention.core.ptx import permute
from dsv4lab.kernels.quant.rows.encode import min_u32

CODE_WORDS = {"fp8": 4, "nvfp4": 2}  # of 16 dims
SCALE_WORDS = {"fp8": 2, "nvfp4": 8}  # of a record
_SIGNS, _BYTE_MASK = 0x80008000, 0x07F007F0  # sign; four exponent bits and three mantissa bits of two BF16
_LARGEST_SCALE = 127 + 7  # E8M0: 2^120 times it is still a BF16
_POWER = 0x3C003C00  # added to an exponent field in place, makes it that of 2^120 times the power
_LOW_BYTES, _HIGH_BYTES = (0xC0800000, 0xC0804000), (0x3F3F3F00, 0x40404040)  # of 0, 0.5, 1, 1.5 and 2, 3, 4, 6 in BF16


def factors(record: str, scales: Any, part: Any, tiles: range) -> list[Any]:
    """Pairs of equal BF16, one for each column tile: what the codes of its dims 16 part .. 16 part + 15 are multiplied with."""
    if record == "fp8":
        return [_power(_byte(scales[t // 4], t % 4)) for t in tiles]
    power = _power(_byte(scales[7], 0))
    return [mul_bf16x2(permute(scales[t], Uint32(0), Uint32(0x4440) | part) * Uint32(0x00100010), power) for t in tiles]


def decode(record: str, words: Any, factor: Any) -> list[Any]:
    """The codes of 16 dims -> eight pairs of BF16."""
    pairs = []
    if record == "fp8":
        for word in words:
            for selector in (0x1404, 0x3424):
                spread = permute(word, Uint32(0), selector)
                pairs.append((spread & Uint32(_SIGNS)) | ((spread >> 4) & Uint32(_BYTE_MASK)))
    else:
        for word in words:
            magnitudes, shifted = word & Uint32(0x77777777), word << 4
            for selector, signs in ((magnitudes, 0x9D8C), (magnitudes >> 16, 0xBFAE)):
                low = permute(Uint32(_LOW_BYTES[0]), Uint32(_LOW_BYTES[1]), selector)
                high = permute(Uint32(_HIGH_BYTES[0]), Uint32(_HIGH_BYTES[1]), selector)
                high = high | (permute(word, shifted, signs) & Uint32(0x80808080))
                pairs += [permute(low, high, 0x5140), permute(low, high, 0x7362)]
    return [mul_bf16x2(pair, factor) for pair in pairs]


def _byte(word: Any, at: int) -> Any:
    return permute(word, Uint32(0), 0x4440 | at)


def _power(byte: Any) -> Any:
    """2^120 times the power of two that a byte of E8M0 stands for, twice."""
    return min_u32(byte, Uint32(_LARGEST_SCALE)) * Uint32(0x00800080) + Uint32(_POWER)
