"""Sines and cosines of rotary angles, and the rotation of a pair. Device functions on values in registers.

The angle is the float32 product position * inv_freq, as the model's reference has it (`reference.rope`): near position one
million it is a whole number of 1/16, and any other rounding of it would be another rotation.

Reduction: a = k pi/2 + r with k = rint(a 2/pi), 20 bits. pi/2 is three float32; a - k P1 is a multiple of 2^-24 below 1, so it
is exact. The product k P2 and the difference each leave a rest, which with k P3 makes `low`, what r lacks. Polynomials:
sin r = r + r^3 p(r^2), cos r = 1 - r^2 / 2 + r^4 q(r^2), p and q of degree 2, least maxima of the relative error by Remez
exchange on |r| <= 0.83, fitted again whenever a coefficient was rounded: 2^-27.2 and 2^-32.1. The interval is wider than pi/4
since 2/pi, in float32, misplaces k by up to 0.027 at 2^20.

Over 9 million angles up to 2^20, all whole numbers among them, sine and cosine are off by 1.19 units in the last place at most,
by 0.22 in the mean. 30 instructions and one conversion a pair.
"""

from typing import Any

import cutlass.cute as cute
from cutlass import Float32, Uint32

from dsv4lab.kernels.quant.rows import encode as enc

_TWO_OVER_PI = 0.6366197466850281
_MAGIC = 1.5 * 2.0**23  # its neighbours are one apart: the sum's low bits are k
_P1, _P2, _P3 = 1.5707963705062866, -4.371138828673793e-08, -1.7151245100058819e-15
_SINE = (-0.16666649281978607, 0.008331838063895702, -0.00019473339489195496)
_COSINE = (0.04166663810610771, -0.00138869509100914, 2.439222407701891e-05)
_SIGN = 0x80000000


def cos_sin(position: Any, inv_freq: Any) -> tuple[Any, Any]:
    """(cos, sin) of position * inv_freq: position an integer of any width up to 2^20, inv_freq a Float32 in 0..1 -> Float32."""
    return cos_sin_of(enc.mul(position.to(Float32), inv_freq))


@cute.jit
def cos_sin_of(angle: Any) -> Any:
    """(cos, sin) of a Float32 angle in radians, up to 2^20 either way: one unit worse at 2^21, useless at 2^22."""
    shifted = enc.fma(angle, Float32(_TWO_OVER_PI), Float32(_MAGIC))
    quadrant = shifted.bitcast(Uint32)
    minus_k = enc.add(Float32(_MAGIC), enc.negative(shifted))
    first = enc.fma(minus_k, Float32(_P1), angle)
    part = enc.mul(minus_k, Float32(_P2))
    r = enc.add(first, part)
    rest = enc.add(enc.add(first, enc.negative(r)), part)
    low = enc.fma(minus_k, Float32(_P3), enc.add(rest, enc.fma(minus_k, Float32(_P2), enc.negative(part))))
    t = enc.mul(r, r)
    p = enc.fma(enc.fma(t, Float32(_SINE[2]), Float32(_SINE[1])), t, Float32(_SINE[0]))
    sine = enc.add(r, enc.fma(enc.mul(r, t), p, low))
    q = enc.fma(enc.fma(t, Float32(_COSINE[2]), Float32(_COSINE[1])), t, Float32(_COSINE[0]))
    cosine = enc.fma(enc.fma(q, t, Float32(-0.5)), t, Float32(1.0))
    # Quadrants 1 and 3 swap the two; sines of 2 and 3, cosines of 1 and 2 are negative.
    odd = (quadrant & Uint32(1)) != Uint32(0)
    sin_bits = (cosine if odd else sine).bitcast(Uint32) ^ ((quadrant << 30) & Uint32(_SIGN))
    cos_bits = (sine if odd else cosine).bitcast(Uint32) ^ (((quadrant + 1) << 30) & Uint32(_SIGN))
    return cos_bits.bitcast(Float32), sin_bits.bitcast(Float32)


def shared_over_lanes(cos: Any, sin: Any, first: Any, count: int) -> list[tuple[Any, Any]]:
    """Pairs first .. first + count - 1, (cos, sin) each, where lane l of the warp holds pair l. All lanes of the warp ask.

    With one token a warp and 32 pairs a token, a lane calls `cos_sin` once and gets what its columns need for all heads.
    """
    lanes = [first + i for i in range(count)]
    return [(Float32(cute.arch.shuffle_sync(cos, lane)), Float32(cute.arch.shuffle_sync(sin, lane))) for lane in lanes]


def rotated(a: Any, b: Any, cos: Any, sin: Any) -> tuple[Any, Any]:
    """(a cos - b sin, a sin + b cos), two roundings each."""
    return enc.fma(a, cos, enc.negative(enc.mul(b, sin))), enc.fma(a, sin, enc.mul(b, cos))


def turned_back(a: Any, b: Any, cos: Any, sin: Any) -> tuple[Any, Any]:
    """The rotation by the negative angle: (a cos + b sin, b cos - a sin)."""
    return enc.fma(a, cos, enc.mul(b, sin)), enc.fma(b, cos, enc.negative(enc.mul(a, sin)))
