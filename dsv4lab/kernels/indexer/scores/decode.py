"""Index keys in shared memory -> the A operand of `wgmma` in registers; queries -> its B operand in the same order.

The 16 x 16 blocks of A give lane (g, q) = (lane // 4, lane % 4) of a warp the rows g, g + 8 and the columns 2q, 2q + 1, 2q + 8,
2q + 9. A sum does not mind which of a key's 128 values is called which column, so a lane reads 16 neighbouring bytes at a time
and queries are stored accordingly. Columns of block j and lane q, in the order of its four places:

    plain   32 (j / 2) + 8 q + 4 (j % 2) + (0, 1, 2, 3)
    fp8     32 q + 4 j + (0, 2, 1, 3)                        what a shift and two masks make of a word of four codes
    fp4     32 q + 8 (j / 2) + 2 (j % 2) + (0, 4, 1, 5)      likewise of eight; and 32 q + .. is one scale's group

Bits of a code, put where BF16 has its sign, exponent and mantissa, are 2^-120 (E4M3) or 2^-126 (E2M1) of its value, denormals
included. One multiplication mends that, exactly: by 2^120; of an E2M1 code by its scale times 2^60. What is then missing,
2^-66, is in the queries (2^40) and in the weights (2^26). An E4M3 code's scale, one a key, is applied to the score.
Exact for scales of fp4 groups from 2^-59 to 2^67 (a smaller one may lose bits of its codes, a larger one counts as infinite)
and queries below 2^87. Codes of NaN, which no quantiser here writes, count as 480.

Without `from __future__ import annotations`: CuTeDSL reads the annotations themselves.
"""

from typing import Any

import cutlass.cute as cute
from cutlass import Float32, Uint32

from dsv4lab.kernels._common.ptx import load_words, mul_bf16x2

BLOCKS = 8  # of 16 columns
WEIGHT_FACTOR = {"plain": 1.0, "fp8": 1.0, "fp4": 2.0**26}
_SIGNS = 0x80008000
_E4M3_BITS, _E2M1_BITS = 0x07F007F0, 0x01C001C0  # exponent and mantissa of two BF16
_TWO_120, _TWO_40 = 0x7B807B80, 0x53805380
_SCALE_SHIFT = 60


def decode_rows(record: str, data: Any, scales: Any, row: Any, q: Any, words: Any) -> list[Any]:
    """Rows `row` and `row + 8` of a tile -> words[4 j .. 4 j + 3] of block j; the factors of their scores, where there are.

    data, scales: addresses of the tile's parts.
    """
    factors = []
    for half in range(2):
        at = row + 8 * half
        if record == "plain":
            for i in range(4):
                _put(words, half, 4 * i, load_words(data + at * 256 + i * 64 + q * 16))
        elif record == "fp8":
            factors.append(_load_float(scales + at * 4))
            for i in range(2):
                for m, word in enumerate(load_words(data + at * 128 + q * 32 + i * 16)):
                    pair = [_mul_by(_place(x, 4, _E4M3_BITS), _TWO_120) for x in (word << 8, word)]
                    _put(words, half, 2 * (4 * i + m), pair)
        else:
            factor = _e8m0_pair(_load_byte(scales + at * 4 + q))
            for m, word in enumerate(load_words(data + at * 64 + q * 16)):
                shifted = [word << (12 - 4 * n) if n < 3 else word for n in range(4)]
                _put(words, half, 4 * m, [mul_bf16x2(_place(x, 6, _E2M1_BITS), factor) for x in shifted])
    return factors


def _put(words: Any, half: int, first: int, pairs: Any) -> None:
    """Pairs `first`, ... of a row's 16, two of a block, to their registers."""
    for i, pair in enumerate(pairs):
        index = first + i
        words[4 * (index // 2) + 2 * (index % 2) + half] = pair


def arrange_query(record: str, chunk: Any) -> list[Any]:
    """Four words, eight neighbouring values of a query, as the four pairs of two blocks of B."""
    if record == "plain":
        return list(chunk)
    first, second = ((0, 1), (2, 3)) if record == "fp8" else ((0, 2), (1, 3))
    pairs = [_pick(chunk[a], chunk[b], upper) for a, b in (first, second) for upper in (False, True)]
    return pairs if record == "fp8" else [_mul_by(pair, _TWO_40) for pair in pairs]


def query_offset(record: str, i: int, q: Any) -> Any:
    """Bytes before the chunk of a query's row that gives lane q blocks 2 i and 2 i + 1."""
    return i * 64 + q * 16 if record == "plain" else q * 64 + i * 16


def _pick(a: Any, b: Any, upper: bool) -> Any:
    """The lower, or the upper, halves of two words."""
    return cute.arch.prmt(a, b, Uint32(0x7632 if upper else 0x5410))


def _place(word: Any, shift: int, mask: int) -> Any:
    """Codes in the upper bits of both halves -> bits of two BF16."""
    return (word & Uint32(_SIGNS)) | ((word >> shift) & Uint32(mask))


def _e8m0_pair(byte: Any) -> Any:
    """An E8M0 scale times 2^60 as a pair of equal BF16."""
    shifted = byte + Uint32(_SCALE_SHIFT)
    code = "min.u32 {$w0}, {$r0}, 255;"
    field = cute.arch.inline_ptx(code, write_only_types=[Uint32], read_only_args=[shifted])
    return field * Uint32(0x00800080)


def _mul_by(a: Any, constant: int) -> Any:
    """Times a pair that the instruction does not take as a constant."""
    code = f"{{ .reg .b32 by; mov.b32 by, {constant}; mul.rn.bf16x2 {{$w0}}, {{$r0}}, by; }}"
    return cute.arch.inline_ptx(code, write_only_types=[Uint32], read_only_args=[a])


def _load_float(address: Any) -> Any:
    return cute.arch.inline_ptx("ld.shared.f32 {$w0}, [{$r0}];", write_only_types=[Float32], read_only_args=[address])


def _load_byte(address: Any) -> Any:
    return cute.arch.inline_ptx("ld.shared.u8 {$w0}, [{$r0}];", write_only_types=[Uint32], read_only_args=[address])
