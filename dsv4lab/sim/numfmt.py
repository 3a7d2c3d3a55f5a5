"""Number formats and conversions, exact to the bit, in numpy integer arithmetic.

Encoders take float32 and round once. The functions that PTX calls `.approx` are evaluated in float64 and rounded to
float32 (`APPROXIMATE` states how far the hardware may be from that).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

U16, U32, U64, I64 = np.uint16, np.uint32, np.uint64, np.int64
F16, F32, F64 = np.float16, np.float32, np.float64
Array = NDArray


@dataclass(frozen=True)
class FloatFormat:
    """A binary floating-point format of at most 19 significant encoded bits."""

    name: str
    exponent_bits: int
    mantissa_bits: int
    max_code: int  # largest finite magnitude
    nan_code: int | None  # None: NaN becomes +max_code
    inf_code: int | None  # None: the format has no infinity

    @property
    def bias(self) -> int:
        return (1 << (self.exponent_bits - 1)) - 1

    @property
    def bits(self) -> int:
        """Storage bits, sign included."""
        return 1 + self.exponent_bits + self.mantissa_bits

    @property
    def sign_code(self) -> int:
        return 1 << (self.exponent_bits + self.mantissa_bits)


E2M1 = FloatFormat("e2m1", 2, 1, 0x7, None, None)
E2M3 = FloatFormat("e2m3", 2, 3, 0x1F, None, None)
E3M2 = FloatFormat("e3m2", 3, 2, 0x1F, None, None)
E4M3 = FloatFormat("e4m3", 4, 3, 0x7E, 0x7F, None)
E5M2 = FloatFormat("e5m2", 5, 2, 0x7B, 0x7F, 0x7C)
HALF = FloatFormat("f16", 5, 10, 0x7BFF, 0x7FFF, 0x7C00)
BFLOAT = FloatFormat("bf16", 8, 7, 0x7F7F, 0x7FFF, 0x7F80)
TF32 = FloatFormat("tf32", 8, 10, 0x3FBFF, 0x3FFFF, 0x3FC00)  # held in the top 19 bits of a 32-bit register
FORMATS = {f.name: f for f in (E2M1, E2M3, E3M2, E4M3, E5M2, HALF, BFLOAT, TF32)}

# Relative error that PTX documents for the approximate functions; ours are the correctly rounded value, or within one
# unit in the last place of it, so a kernel's result may differ from the hardware's by about this much.
APPROXIMATE = {
    "ex2": 2.0**-22,
    "lg2": 2.0**-22,
    "rcp": 2.0**-23,
    "rsqrt": 2.0**-22.9,
    "sqrt": 2.0**-23,
    "tanh": 2.0**-11,
    "sin": 2.0**-20.5,
    "cos": 2.0**-20.5,
    "div": 2.0**-22,
}


def encode(x: Array, fmt: FloatFormat, rounding: str = "rn", saturate: bool = False, relu: bool = False) -> Array:
    """Encode float32 `x` as `fmt`; returns the codes as uint32.

    rounding: "rn" (ties to even), "rna" (ties away), "rz", "rp" (up) or "rm" (down). saturate: values beyond the largest
    finite one become it (always so in formats without infinity or NaN). relu: negative values become +0.
    """
    bits = np.ascontiguousarray(x, dtype=F32).view(U32)
    magnitude = (bits & U32(0x7FFFFFFF)).astype(I64)
    negative = (bits >> U32(31)) != 0
    nan = magnitude > 0x7F800000
    exponent = magnitude >> 23
    significand = np.where(exponent > 0, (magnitude & 0x7FFFFF) | 0x800000, magnitude & 0x7FFFFF)
    unbiased = np.maximum(exponent, 1) - 127
    target = unbiased + fmt.bias  # biased exponent in the target, <= 0 for its subnormals
    shift = np.minimum(23 - fmt.mantissa_bits + np.maximum(1 - target, 0), 40)
    quotient = significand >> shift
    remainder = significand - (quotient << shift)
    half = I64(1) << np.maximum(shift - 1, 0)
    exact = shift == 0
    if rounding == "rn":
        up = (remainder > half) | ((remainder == half) & ((quotient & 1) == 1))
    elif rounding == "rna":
        up = remainder >= half
    elif rounding == "rz":
        up = np.zeros(bits.shape, bool)
    elif rounding == "rp":
        up = (remainder != 0) & ~negative
    elif rounding == "rm":
        up = (remainder != 0) & negative
    else:
        raise ValueError(f"rounding must be one of rn, rna, rz, rp, rm, got {rounding!r}")
    code = ((np.maximum(target, 1) - 1) << fmt.mantissa_bits) + quotient + (up & ~exact)
    over = code > fmt.max_code
    infinite = magnitude == 0x7F800000
    if saturate or (fmt.inf_code is None and fmt.nan_code is None):
        code = np.where(over, fmt.max_code, code)
    else:
        beyond = int((fmt.nan_code or 0) if fmt.inf_code is None else fmt.inf_code)
        toward_zero = np.zeros(bits.shape, bool)
        if rounding == "rz":
            toward_zero = ~infinite
        elif rounding in ("rp", "rm"):
            toward_zero = (negative == (rounding == "rp")) & ~infinite
        code = np.where(over, np.where(toward_zero, fmt.max_code, beyond), code)
    code = np.where(negative, code | fmt.sign_code, code)
    if relu:
        code = np.where(negative, 0, code)
    return np.where(nan, fmt.max_code if fmt.nan_code is None else int(fmt.nan_code), code).astype(U32)


@cache
def table(name: str) -> Array:
    """Every code of an at most 16-bit format as float32; unused high bits of the index are ignored by the caller."""
    if name == "ue8m0":
        codes = np.arange(256, dtype=I64)
        out = np.exp2(np.minimum(codes - 127, 127).astype(F64)).astype(F32)
        out[255] = np.nan
    else:
        fmt = FORMATS[name]
        codes = np.arange(1 << fmt.bits, dtype=I64)
        magnitude = codes & (fmt.sign_code - 1)
        exponent = magnitude >> fmt.mantissa_bits
        fraction = magnitude & ((1 << fmt.mantissa_bits) - 1)
        significand = np.where(exponent > 0, fraction + (1 << fmt.mantissa_bits), fraction).astype(F64)
        scale = np.maximum(exponent, 1) - fmt.bias - fmt.mantissa_bits
        value = significand * np.exp2(scale.astype(F64))
        if fmt.inf_code is not None:
            value = np.where(magnitude == fmt.inf_code, np.inf, value)
            value = np.where(magnitude > fmt.inf_code, np.nan, value)
        elif fmt.nan_code is not None:
            value = np.where(magnitude == fmt.nan_code, np.nan, value)
        out = np.where(codes >= fmt.sign_code, -value, value).astype(F32)
    out.flags.writeable = False
    return out


def bf16_to_f32(codes: Array) -> Array:
    return (codes.astype(U32) << U32(16)).view(F32)


def f32_to_bf16(x: Array) -> Array:
    """Round to nearest even; NaN becomes the canonical 0x7fff. Returns uint16."""
    bits = np.ascontiguousarray(x, dtype=F32).view(U32)
    rounded = (bits + (((bits >> U32(16)) & U32(1)) + U32(0x7FFF))) >> U32(16)
    nan = (bits & U32(0x7FFFFFFF)) > U32(0x7F800000)
    if nan.any():
        rounded = np.where(nan, U32(0x7FFF), rounded)
    return rounded.astype(U16)


def f32_to_f16(x: Array) -> Array:
    """Round to nearest even; NaN becomes the canonical 0x7fff. Returns uint16."""
    with np.errstate(over="ignore"):
        codes = np.ascontiguousarray(x, dtype=F32).astype(F16).view(U16)
    nan = (codes & U16(0x7FFF)) > U16(0x7C00)
    return np.where(nan, U16(0x7FFF), codes) if nan.any() else codes


def f32_to_ue8m0(x: Array, rounding: str) -> Array:
    """Power-of-two scale of |x|: "rz" takes the exponent, "rp" the next power of two up. Saturates at 2**127; NaN is 255."""
    magnitude = np.ascontiguousarray(x, dtype=F32).view(U32) & U32(0x7FFFFFFF)
    exponent = magnitude >> U32(23)
    if rounding == "rp":
        fraction = magnitude & U32(0x7FFFFF)
        # The subnormal 2**-127 is code 0 exactly; below it rounding up also gives code 0.
        exponent = exponent + np.where(exponent > 0, fraction > 0, fraction > 0x400000)
    elif rounding != "rz":
        raise ValueError(f"rounding must be rz or rp for ue8m0, got {rounding!r}")
    code = np.minimum(exponent, 254)
    return np.where(magnitude > 0x7F800000, 255, code).astype(U32)


def tf32_operand(bits: Array) -> Array:
    """What a tensor core reads from a 32-bit register or word as tf32: the low 13 bits are ignored. Returns float32."""
    return (bits & U32(0xFFFFE000)).view(F32)


_SMALLEST = {F32: F32(2.0**-126), F16: F16(2.0**-14)}


def flush(x: Array) -> Array:
    """Subnormal float32 or float16 values become zero of the same sign (.ftz)."""
    small = np.abs(x) < _SMALLEST[x.dtype.type]
    return np.where(small, np.copysign(x.dtype.type(0), x), x) if small.any() else x


_NAN: dict[type, Array] = {F16: np.array(0x7FFF, U16), F32: np.array(0x7FFFFFFF, U32)}


def canonical(x: Array) -> Array:
    """Every float16 or float32 NaN becomes the one that arithmetic gives; float64 keeps its payloads."""
    known = _NAN.get(x.dtype.type)
    nan = x != x
    return x if known is None or not nan.any() else np.where(nan, known.view(x.dtype), x)


def tf32_away(x: Array, saturate: bool) -> Array:
    """cvt.rna.tf32 as float32 bits. A NaN keeps its upper bits; saturated, it loses one unit as infinity does."""
    bits = np.ascontiguousarray(x, dtype=F32).view(U32)
    kept = (bits & U32(0xFFFFE000)) - U32(0x2000 if saturate else 0)
    return np.where(np.isnan(x), kept, encode(x, TF32, "rna", saturate) << U32(13))


def odd_sum(product: Array, c: Array) -> Array:
    """product + c in float64, "rounded to odd": a narrower rounding of the result is that of the exact sum."""
    total = product + c
    bits = total.view(U64)
    addend = c.astype(F64)
    other = total - product
    error = (product - (total - other)) + (addend - other)
    odd = (bits & U64(1)) == U64(1)
    away = np.where((error > 0) == (total > 0), U64(1), U64(0xFFFFFFFFFFFFFFFF))
    return np.where((error != 0) & ~odd & np.isfinite(total), bits + away, bits).view(F64)


def fma_f32(a: Array, b: Array, c: Array) -> Array:
    """a*b + c in float32 with one rounding.

    The product of two float32 values is exact in float64. The float64 sum is rounded; where that could disturb the second
    rounding, it is redone with "round to odd", whose result rounds to float32 as the exact sum would.
    """
    product = a.astype(F64) * b.astype(F64)
    total = product + c
    result = total.astype(F32)
    halfway = (total.view(U64) & U64(0x1FFFFFFF)) == U64(0x10000000)
    tiny = np.abs(total) < 2.0**-125
    if (halfway | tiny).any():
        result = odd_sum(product, c).astype(F32)
    return result


def odd_f32(exact: Array) -> Array:
    """float64 to float32, "rounded to odd": encoding the result in a narrower format rounds as encoding the input would."""
    nearest = exact.astype(F32)
    bits = nearest.view(U32)
    inward = np.where(np.abs(nearest.astype(F64)) > np.abs(exact), bits - U32(1), bits)
    keep = (nearest == exact) | ~np.isfinite(exact)
    return np.where(keep, bits, inward | U32(1)).view(F32)


def fma_bf16(a: Array, b: Array, c: Array) -> Array:
    """a*b + c of bf16 values held in float32, so rounded that encoding the result as bf16 rounds once."""
    return odd_f32(odd_sum(a.astype(F64) * b.astype(F64), c))


def integer_f64(x: Array) -> Array:
    """Integers as float64; bits beyond 53 are folded into the last one, which no rounding to 24 bits or fewer can tell."""
    if x.dtype.itemsize < 8:
        return x.astype(F64)
    low = x.dtype.type(0x7FF)
    large = (x > x.dtype.type(1 << 53)) | (x < x.dtype.type(-(1 << 53) if x.dtype.kind == "i" else 0))
    sticky = np.where((x & low) != 0, x.dtype.type(0x800), x.dtype.type(0))
    return np.where(large, (x & ~low) | sticky, x).astype(F64)


# ln(2)^k / k!
_EXP2 = (
    1.0,
    0.6931471805599453,
    0.24022650695910072,
    0.05550410866482158,
    0.009618129107628477,
    0.0013333558146428443,
    0.0001540353039338161,
    1.5252733804059841e-05,
    1.321548679014431e-06,
    1.01780860092397e-07,
    7.054911620801123e-09,
    4.4455382718708116e-10,
    2.5678435993488206e-11,
)


def exp2(x: Array) -> Array:
    """2**x in float64 for float32 values x, by sums and products in a fixed order: every machine and the native core agree.

    The relative error is below 2**-51, so rounding to float32 gives the nearest value in all but some 10^-7 of all cases.
    """
    whole = np.rint(np.clip(x, -1100.0, 1100.0))
    rest = np.clip(x, -1100.0, 1100.0) - whole
    out = np.full_like(rest, _EXP2[-1])
    for coefficient in _EXP2[-2::-1]:
        out = out * rest + coefficient
    return np.ldexp(out, np.where(np.isnan(whole), 0, whole).astype(np.int32))


APPROXIMATIONS: dict[str, Callable[[Array], Array]] = {
    "ex2": exp2,
    "lg2": np.log2,
    "rcp": np.reciprocal,
    "rsqrt": lambda x: 1.0 / np.sqrt(x),
    "sqrt": np.sqrt,
    "tanh": np.tanh,
    "sin": np.sin,
    "cos": np.cos,
}


def approximate(name: str, x: Array, ftz: bool) -> Array:
    """One of `APPROXIMATIONS` of float32 `x`, evaluated in float64; with ftz, subnormal inputs and results are zero."""
    source = flush(x) if ftz else x
    result = APPROXIMATIONS[name](source.astype(F64)).astype(F32)
    return flush(result) if ftz else result
