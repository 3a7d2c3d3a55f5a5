"""Codes from a thread's words of a block and the largest magnitude of all of it, which may lie in several threads.

Without `from __future__ import annotations`: CuTeDSL reads the annotations themselves.
"""

from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Uint32

from dsv4lab.formats import ATOM_COLUMNS, ATOM_ROWS
from dsv4lab.kernels.quant.rows import encode as enc
from dsv4lab.kernels.quant.rows import table


@cute.jit
def nvfp4(
    out: Any,
    words: Any,
    bits: Any,
    terms: Any,
    entry: Any,
    element: cutlass.Constexpr,
    arch: cutlass.Constexpr,
    decoded: cutlass.Constexpr = False,
) -> Any:
    """Codes, or decoded values, to `out`; returns the byte of the block's scale.

    bits: of the largest magnitude; terms: `enc.global_terms`; entry: this lane's of `table`, None for the careful way alone.
    """
    ratio = enc.block_ratio(bits, terms)
    if cutlass.const_expr(entry is not None):
        byte, factor, usual = looked_up(ratio, terms, entry)
        if usual:
            for i in cutlass.range_constexpr(len(words) // 4):
                out[i] = table.nibbles(words[4 * i : 4 * i + 4], factor)
        else:
            byte = _careful(out, words, bits, ratio, terms, element, arch, decoded)
    else:
        byte = _careful(out, words, bits, ratio, terms, element, arch, decoded)
    return byte


def looked_up(ratio: Any, terms: Any, entry: Any) -> tuple[Any, Any, Any]:
    """Byte of a block's scale, bits of its factor, and whether it has one."""
    byte = enc.to_e4m3(ratio)
    factor = table.factor_bits(entry, byte)
    return byte, factor, (factor < terms[4]) & (ratio.bitcast(Uint32) <= Uint32(enc.MOST_BITS))


@cute.jit
def _careful(
    out: Any,
    words: Any,
    bits: Any,
    ratio: Any,
    terms: Any,
    element: cutlass.Constexpr,
    arch: cutlass.Constexpr,
    decoded: cutlass.Constexpr,
) -> Any:
    """The same for a block of any kind, by quotients."""
    wide = enc.floats(enc.absolute(words, element), element)
    count = cutlass.const_expr(len(wide))
    values = cute.make_rmem_tensor((count,), Float32)
    signs = cute.make_rmem_tensor((len(words),), Uint32)
    for i in cutlass.range_constexpr(count):
        values[i] = wide[i]
    for i in cutlass.range_constexpr(len(words)):
        signs[i] = words[i]
    block_scale, byte = enc.block_quotients(values, signs, element, bits, ratio, terms)
    quotients = [values[i] for i in range(count)]
    if cutlass.const_expr(decoded):
        pair = enc.pack_bf16(block_scale, block_scale)
        counts = enc.e2m1_counts(quotients)
        sides = enc.bf16_signs([signs[i] for i in range(len(words))], element)
        for i in cutlass.range_constexpr(count // 2):
            out[i] = enc.e2m1_pair_times(counts[2 * i], counts[2 * i + 1], sides[i], pair)
    else:
        found = nibbles(quotients, signs, element, arch)
        for i in cutlass.range_constexpr(count // 8):
            out[i] = found[i]
    return byte


def nibbles(magnitudes: list[Any], signs: Any, element: str, arch: str) -> list[Any]:
    """Codes of magnitudes up to 7, with signs, eight in a word."""
    each = 4 if element == "bf16" else 8
    return [
        enc.e2m1_nibbles(magnitudes[8 * i : 8 * i + 8], arch)
        | enc.sign_nibbles([signs[i * each + j] for j in range(each)], element)
        for i in range(len(magnitudes) // 8)
    ]


@cute.jit
def e4m3(out: Any, words: Any, bits: Any, inverse: Any, element: cutlass.Constexpr) -> None:
    """E4M3 codes of words, to `out`, four in a word. bits, inverse: the group's largest magnitude, 1 / scale."""
    found = e4m3_of_numbers(words, inverse, element)
    for i in cutlass.range_constexpr(len(found)):
        out[i] = found[i]
    if bits > Uint32(enc.INFINITY_BITS):
        sides = enc.bf16_signs([enc.signs_of_nan(word, element) for word in words], element)
        for i in cutlass.range_constexpr(len(sides) // 2):
            out[i] = out[i] | (enc.prmt(sides[2 * i], sides[2 * i + 1], 0x7531) & Uint32(0x80808080))


def e4m3_of_numbers(words: list[Any], inverse: Any, element: str) -> list[Any]:
    """The same where a NaN may lose its sign."""
    if element == "bf16":  # in pairs; exact, but for what is 0 as E4M3
        pair = enc.prmt(inverse.bitcast(Uint32), Uint32(0), 0x3232)
        scaled = enc.floats([enc.mul_bf16x2(word, pair) for word in words], "bf16")
    else:
        scaled = [enc.mul(v, inverse) for v in enc.floats(words, "f32")]
    return [enc.e4m3_word(scaled[i : i + 4]) for i in range(0, len(scaled), 4)]


def atom(row: Any, column: Any) -> tuple[Any, Any, Any]:
    """Where scale (row, column) is among tiles of atom128x4: tile row, tile column, byte."""
    inner = row % ATOM_ROWS
    offset = (inner % 32) * 16 + inner // 32 * ATOM_COLUMNS + column % ATOM_COLUMNS
    return row // ATOM_ROWS, column // ATOM_COLUMNS, offset
