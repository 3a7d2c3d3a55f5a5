"""Exact BF16 operands for `mma.sync`, of BF16 and of float32 numbers.

A float32 is the sum of three BF16: hi is it rounded, mid what is left rounded, lo the rest; 8 bits each, of the 24 (numbers
within 2^-8 of float32's largest overflow; what is left of those below 2^-110 may be lost). Of products of parts i and j those
with i + j <= 2 are kept. What is dropped (mid lo, lo mid, lo lo) is below 2^-24 of the product. A BF16 is one part.

Without `from __future__ import annotations`: CuTeDSL reads the annotations themselves.
"""

from typing import Any

import cutlass.cute as cute
from cutlass import BFloat16, Float32, Uint32

PARTS = 3
RUN = 8  # neighbouring columns that a lane holds: 16 bytes of BF16


def load_run(matrix: Any, row: Any, column: Any, held: Any) -> None:
    """`RUN` elements at (row, RUN * column) -> held."""
    cute.autovec_copy(cute.local_tile(matrix[row, None], (RUN,), (column,)), held)


def parts_of(held: Any) -> list[list[Any]]:
    """Parts of `RUN` elements, the largest first, each four words of two BF16."""
    if held.element_type is BFloat16:
        words = cute.recast_tensor(held, Uint32)
        return [[words[i] for i in range(RUN // 2)]]
    rest = [held[i] for i in range(RUN)]
    found: list[list[Any]] = []
    for part in range(PARTS):
        words = [_pack(rest[2 * i], rest[2 * i + 1]) for i in range(RUN // 2)]
        found.append(words)
        if part < PARTS - 1:
            rest = [rest[i] - _unpack(words[i // 2], i % 2) for i in range(RUN)]
    return found


def pairs(a: list[Any], b: list[Any]) -> list[tuple[Any, Any]]:
    """The products of parts that matter, the smallest first."""
    kept = [(i, j) for i in range(len(a)) for j in range(len(b)) if i + j < PARTS]
    return [(a[i], b[j]) for i, j in sorted(kept, key=lambda ij: -sum(ij))]


def mma(total: Any, first: Any, a: list[Any], b: list[Any]) -> None:
    """total[first .. first + 3] += a b, a 16 x 8 x 16 product of BF16 in float32."""
    out = cute.arch.inline_ptx(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{{$w0}, {$w1}, {$w2}, {$w3}}, {{$r0}, {$r1}, {$r2}, {$r3}}, {{$r4}, {$r5}}, {{$r6}, {$r7}, {$r8}, {$r9}};",
        write_only_types=[Float32] * 4,
        read_only_args=[*a, *b, *(total[first + i] for i in range(4))],
    )
    for i in range(4):
        total[first + i] = out[i]


def _pack(low: Any, high: Any) -> Any:
    """Two float32, rounded to BF16, in one word."""
    return cute.arch.inline_ptx("cvt.rn.bf16x2.f32 {$w0}, {$r1}, {$r0};", write_only_types=[Uint32], read_only_args=[low, high])


def _unpack(word: Any, at: int) -> Any:
    """The float32 of one half of a word."""
    bits = (word << 16) if at == 0 else (word & Uint32(0xFFFF0000))
    return cute.arch.inline_ptx("mov.b32 {$w0}, {$r0};", write_only_types=[Float32], read_only_args=[bits])
