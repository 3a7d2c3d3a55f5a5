"""The noise of `reference.sampling` bit for bit: Philox words, uniform numbers, their exponentials and logarithms.

Every float32 step is one PTX instruction rounded to nearest; written out, since the compiler would fuse a product with the sum
that follows it. A group is four vocabulary elements, whose words one Philox call gives.

Without `from __future__ import annotations`: CuTeDSL reads the annotations themselves.
"""

import struct
from typing import Any

import cutlass.cute as cute
from cutlass import Float32, Int32, Uint32

from dsv4lab.kernels._common.order import choose

SAMPLE, ACCEPT, RESIDUAL = 0, 1, 2  # streams
GROUP = 4  # words of a call
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_LN2_HIGH, _LN2_LOW = 0.693359375, -2.12194440054690583e-4
_SQRT_HALF_BITS = 0x3F3504F3
_LARGEST = 1.0 - 2.0**-24


def mul(a: Any, b: Any) -> Any:
    return _two("mul.rn.f32", a, b)


def add(a: Any, b: Any) -> Any:
    return _two("add.rn.f32", a, b)


def sub(a: Any, b: Any) -> Any:
    return _two("sub.rn.f32", a, b)


def div(a: Any, b: Any) -> Any:
    """IEEE division."""
    return _two("div.rn.f32", a, b)


def larger(a: Any, b: Any) -> Any:
    """Of numbers that are not NaN, which costs less to exclude."""
    return _two("max.f32", a, b)


def smaller(a: Any, b: Any) -> Any:
    return _two("min.f32", a, b)


def bits(value: Any) -> Any:
    return cute.arch.inline_ptx("mov.b32 {$w0}, {$r0};", write_only_types=[Uint32], read_only_args=[value])


def from_bits(value: Any) -> Any:
    return cute.arch.inline_ptx("mov.b32 {$w0}, {$r0};", write_only_types=[Float32], read_only_args=[value])


def words(group: Any, position: tuple[Any, Any], seed: tuple[Any, Any], stream: int) -> list[Any]:
    """Philox4x32-10 of (group, position, stream) under the seed: four uint32. position, seed: (low, high) words."""
    lines = [".reg .b32 a, b, c, d, h, l, m, n, j, k;", ".reg .b64 p, q;"]
    lines += ["mov.b32 a, {$r0};", "mov.b32 b, {$r1};", "mov.b32 c, {$r2};", f"mov.b32 d, {stream};"]
    lines += ["mov.b32 j, {$r3};", "mov.b32 k, {$r4};"]
    for step in range(_ROUNDS):
        lines += [f"mul.wide.u32 p, a, {_MULTIPLIERS[0]};", f"mul.wide.u32 q, c, {_MULTIPLIERS[1]};"]
        lines += ["mov.b64 {l, h}, p;", "mov.b64 {n, m}, q;"]
        lines += ["lop3.b32 a, m, b, j, 0x96;", "lop3.b32 c, h, d, k, 0x96;", "mov.b32 b, n;", "mov.b32 d, l;"]
        if step + 1 < _ROUNDS:
            lines += [f"add.u32 j, j, {_WEYL[0]};", f"add.u32 k, k, {_WEYL[1]};"]
    lines += [f"mov.b32 {{$w{n}}}, {name};" for n, name in enumerate("abcd")]
    text = "{ " + " ".join(lines) + " }"
    return list(cute.arch.inline_ptx(text, write_only_types=[Uint32] * GROUP, read_only_args=[group, *position, *seed]))


def uniform(word: Any) -> Any:
    """float32(2 word + 1) 2^-33, at most 1 - 2^-24.

    Both halves of the word become floats by placing them under the exponent of 2^23; one rounding, in the last step.
    """
    one = f"0f{struct.unpack('<I', struct.pack('<f', _LARGEST))[0]:08X}"
    code = "{ .reg .b32 a, b; .reg .f32 high, low, sum; "
    code += "prmt.b32 a, {$r0}, 0x4B000000, 0x7432; prmt.b32 b, {$r0}, 0x4B000000, 0x7410; "
    code += "mov.b32 high, a; mov.b32 low, b; "
    code += f"add.rn.f32 low, low, {_hex(-8388607.5)}; "  # the low half, and a half more
    code += f"fma.rn.f32 high, high, {_hex(2.0**-16)}, {_hex(-128.0)}; "
    code += f"fma.rn.f32 sum, low, {_hex(2.0**-32)}, high; "
    code += f"min.f32 {{$w0}}, sum, {one}; }}"
    return cute.arch.inline_ptx(code, write_only_types=[Float32], read_only_args=[word])


def exponential(w: Any) -> Any:
    """-log(1 - w) of a uniform number; below 1/4 from w itself."""
    near = w < Float32(0.25)
    m, e = _split(sub(Float32(1.0), w))
    top = choose(near, -w, sub(m, Float32(1.0)))
    bottom = choose(near, sub(Float32(2.0), w), add(m, Float32(1.0)))
    e = choose(near, Float32(0.0), e)  # which adds nothing, exactly
    return -_sum(e, _log_of_fraction(div(top, bottom)))


def log(x: Any) -> Any:
    """Natural logarithm of a positive normal float32, as the reference takes it."""
    m, e = _split(x)
    return _sum(e, _log_of_fraction(div(sub(m, Float32(1.0)), add(m, Float32(1.0)))))


def gumbel(word: Any) -> Any:
    """-log of the exponential."""
    return -log(exponential(uniform(word)))


def _split(x: Any) -> tuple[Any, Any]:
    """x = m 2^e with m in [sqrt(1/2), sqrt(2)): (m, e), both float32."""
    raw = bits(x)
    exponent = Int32(raw - Uint32(_SQRT_HALF_BITS)) >> 23
    return from_bits(raw - Uint32(exponent << 23)), Float32(exponent)


def _sum(e: Any, small: Any) -> Any:
    return add(mul(e, Float32(_LN2_HIGH)), add(mul(e, Float32(_LN2_LOW)), small))


def _log_of_fraction(s: Any) -> Any:
    """log((1 + s) / (1 - s)), |s| <= 0.172."""
    z = mul(s, s)
    tail = add(mul(z, Float32(2 / 9)), Float32(2 / 7))
    tail = add(mul(z, tail), Float32(2 / 5))
    tail = add(mul(z, tail), Float32(2 / 3))
    return add(mul(Float32(2.0), s), mul(s, mul(z, tail)))


def _two(operation: str, a: Any, b: Any) -> Any:
    return cute.arch.inline_ptx(
        operation + " {$w0}, {$r0}, {$r1};", write_only_types=[Float32], read_only_args=[Float32(a), Float32(b)]
    )


def _hex(value: float) -> str:
    return f"0f{struct.unpack('<I', struct.pack('<f', value))[0]:08X}"
