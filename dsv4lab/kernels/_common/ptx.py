"""Single instructions that several rooms of kernels need and CuTeDSL has no name for. Shared memory has 32-bit addresses.

Without `from __future__ import annotations`: CuTeDSL reads the annotations themselves.
"""

from typing import Any

import cutlass.cute as cute
from cutlass import Float32, Int32, Uint32


# ---- memory ------------------------------------------------------------------------------------------------------------
def copy_bulk(target: Any, source: Any, size: Any, barrier: Any) -> None:
    """Neighbouring bytes from global to shared memory, asynchronously; size: a multiple of 16."""
    cute.arch.inline_ptx(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [{$r0}], [{$r1}], {$r2}, [{$r3}];",
        read_only_args=[target, source, Int32(size), barrier],
    )


def prefetch_bulk(source: Any, size: Any) -> None:
    """Neighbouring bytes of global memory into L2, ahead of who reads them; address and size: multiples of 16."""
    cute.arch.inline_ptx("cp.async.bulk.prefetch.L2.global [{$r0}], {$r1};", read_only_args=[source, Int32(size)])


def copy_async(target: Any, source: Any, count: int) -> None:
    """4, 8 or 16 bytes from global memory into shared memory, on their way."""
    code = f"cp.async.{'cg' if count == 16 else 'ca'}.shared.global [{{$r0}}], [{{$r1}}], {count};"
    cute.arch.inline_ptx(code, read_only_args=[target, source])


def copy_or_zeros(target: Any, source: Any, size: Any, count: int) -> None:
    """`count` bytes, 8 or 16, asynchronously, from global to shared memory; of these `size` are read and the rest are zeros."""
    code = f"cp.async.{'cg' if count == 16 else 'ca'}.shared.global [{{$r0}}], [{{$r1}}], {count}, {{$r2}};"
    cute.arch.inline_ptx(code, read_only_args=[target, source, size])


def load_words(address: Any) -> Any:
    """Four words of shared memory."""
    code = "ld.shared.v4.b32 {{$w0}, {$w1}, {$w2}, {$w3}}, [{$r0}];"
    return cute.arch.inline_ptx(code, write_only_types=[Uint32] * 4, read_only_args=[address])


def store_words(address: Any, words: Any) -> None:
    """Four words to shared memory."""
    code = "st.shared.v4.b32 [{$r0}], {{$r1}, {$r2}, {$r3}, {$r4}};"
    cute.arch.inline_ptx(code, read_only_args=[address, *words])


def store_global(address: Any, words: list[Any], distance: int = 0) -> None:
    """Two or four words to global memory, `distance` bytes from an address: a constant, of which no other address is made."""
    names = ", ".join(f"{{$r{1 + i}}}" for i in range(len(words)))
    place = f"{{$r0}} + {distance}" if distance else "{$r0}"
    cute.arch.inline_ptx(f"st.global.v{len(words)}.b32 [{place}], {{{names}}};", read_only_args=[address, *words])


def load_matrices(address: Any) -> Any:
    """Four 8 x 8 matrices of 16 bits from shared memory; lane l gives the address of row l % 8 of matrix l / 8."""
    code = "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {{$w0}, {$w1}, {$w2}, {$w3}}, [{$r0}];"
    return cute.arch.inline_ptx(code, write_only_types=[Uint32] * 4, read_only_args=[address])


def store_matrices(address: Any, words: Any) -> None:
    """The reverse."""
    code = "stmatrix.sync.aligned.m8n8.x4.shared.b16 [{$r0}], {{$r1}, {$r2}, {$r3}, {$r4}};"
    cute.arch.inline_ptx(code, read_only_args=[address, *words])


# ---- values ------------------------------------------------------------------------------------------------------------
def mul_bf16x2(a: Any, b: Any) -> Any:
    """Two products of BF16, rounded."""
    return cute.arch.inline_ptx("mul.rn.bf16x2 {$w0}, {$r0}, {$r1};", write_only_types=[Uint32], read_only_args=[a, b])


def exp2(value: Any) -> Any:
    """2^value within 2 units in the last place; results below the normal range are 0."""
    return cute.arch.inline_ptx("ex2.approx.ftz.f32 {$w0}, {$r0};", write_only_types=[Float32], read_only_args=[value])


def log2(value: Any) -> Any:
    return cute.arch.inline_ptx("lg2.approx.ftz.f32 {$w0}, {$r0};", write_only_types=[Float32], read_only_args=[value])
