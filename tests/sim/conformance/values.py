"""Inputs and exact references: reproducible bits, number formats by their definition, arithmetic in fractions."""

from __future__ import annotations

import ctypes
import ctypes.util
import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

import numpy as np

COUNT = 512  # lanes of an elementwise form


def bits(label: str, count: int = COUNT, dtype: type = np.uint32) -> np.ndarray:
    """Random bits that depend on the label alone (the generator's raw stream, which is the same in every numpy)."""
    raw = np.random.PCG64(zlib.crc32(label.encode())).random_raw(count)
    return (raw >> np.uint64(64 - 8 * np.dtype(dtype).itemsize)).astype(f"u{np.dtype(dtype).itemsize}").view(dtype)


def uniform(label: str, count: int) -> np.ndarray:
    """float64 in [-1, 1)."""
    return bits(label, count, np.uint64).astype(np.float64) / 2.0**63 - 1


@dataclass(frozen=True)
class Format:
    """A binary floating-point format; largest: code of the largest finite magnitude; nan, infinity: codes, None if absent."""

    exponent: int
    mantissa: int
    largest: int
    nan: int | None
    infinity: int | None

    @property
    def bias(self) -> int:
        return (1 << (self.exponent - 1)) - 1

    @property
    def bits(self) -> int:
        return 1 + self.exponent + self.mantissa

    @property
    def sign(self) -> int:
        return 1 << (self.exponent + self.mantissa)


FORMATS = {
    "f64": Format(11, 52, 0x7FEFFFFFFFFFFFFF, 0x7FFFFFFFFFFFFFFF, 0x7FF0000000000000),
    "f32": Format(8, 23, 0x7F7FFFFF, 0x7FFFFFFF, 0x7F800000),
    "tf32": Format(8, 10, 0x3FBFF, 0x3FFFF, 0x3FC00),
    "f16": Format(5, 10, 0x7BFF, 0x7FFF, 0x7C00),
    "bf16": Format(8, 7, 0x7F7F, 0x7FFF, 0x7F80),
    "e5m2": Format(5, 2, 0x7B, 0x7F, 0x7C),
    "e4m3": Format(4, 3, 0x7E, 0x7F, None),
    "e3m2": Format(3, 2, 0x1F, None, None),
    "e2m3": Format(2, 3, 0x1F, None, None),
    "e2m1": Format(2, 1, 0x7, None, None),
}


@lru_cache(maxsize=1 << 17)
def decode(code: int, name: str) -> Fraction | float:
    """A code's value: a Fraction, or an infinity, a NaN or a negative zero as float."""
    fmt = FORMATS[name]
    negative, magnitude = bool(code & fmt.sign), code & (fmt.sign - 1)
    if fmt.infinity is not None and magnitude >= fmt.infinity:
        return math.nan if magnitude > fmt.infinity else (-math.inf if negative else math.inf)
    if fmt.infinity is None and magnitude == fmt.nan:
        return math.nan
    exponent, fraction = magnitude >> fmt.mantissa, magnitude & ((1 << fmt.mantissa) - 1)
    if exponent:
        fraction |= 1 << fmt.mantissa
    if not fraction:
        return -0.0 if negative else Fraction(0)
    value = Fraction(fraction) * Fraction(2) ** (max(exponent, 1) - fmt.bias - fmt.mantissa)
    return -value if negative else value


def encode(value: Fraction | float, name: str, mode: str = "rn", saturate: bool = False, relu: bool = False) -> int:
    """Round a value to a format. mode: rn (ties to even), rna (ties away), rz, rp or rm. saturate: `.satfinite`."""
    fmt = FORMATS[name]
    if isinstance(value, float) and math.isnan(value):
        return fmt.largest if fmt.nan is None else fmt.nan
    negative = value < 0 or (value == 0 and isinstance(value, float) and math.copysign(1, value) < 0)
    sign = 0 if relu or not negative else fmt.sign
    if relu and negative:
        return 0
    top = fmt.largest if saturate or (fmt.nan is None and fmt.infinity is None) else -1
    if isinstance(value, float) and math.isinf(value):
        beyond = fmt.infinity if fmt.infinity is not None else fmt.nan
        return sign | (top if top >= 0 else int(beyond or 0))
    magnitude = abs(Fraction(value))
    if not magnitude:
        return sign
    power = magnitude.numerator.bit_length() - magnitude.denominator.bit_length()
    if magnitude < Fraction(2) ** power:
        power -= 1
    quantum = max(power, 1 - fmt.bias) - fmt.mantissa
    scaled = magnitude / Fraction(2) ** quantum
    whole, rest = divmod(scaled, 1)
    if mode == "rn":
        up = rest > Fraction(1, 2) or (rest == Fraction(1, 2) and whole % 2 == 1)
    elif mode == "rna":
        up = rest >= Fraction(1, 2)
    else:
        up = bool(rest) and ((mode == "rp" and not negative) or (mode == "rm" and negative))
    code = int(whole) + int(up)
    if quantum > 1 - fmt.bias - fmt.mantissa:  # normal: the exponent field counts quanta
        code += (quantum - (1 - fmt.bias - fmt.mantissa)) << fmt.mantissa
    if code <= fmt.largest:
        return sign | code
    if top >= 0:
        return sign | top
    if fmt.infinity is None:
        return sign | int(fmt.nan or 0)
    inward = mode == "rz" or (mode == "rp" and negative) or (mode == "rm" and not negative)
    return sign | (fmt.largest if inward else fmt.infinity)


def convert(codes: np.ndarray, source: str, target: str, mode: str = "rn", saturate: bool = False, relu: bool = False) -> list:
    """Codes of one format as codes of another."""
    return [encode(decode(int(c), source), target, mode, saturate, relu) for c in codes]


_libm = ctypes.CDLL(ctypes.util.find_library("m") or "libm.so.6")
_libm.fma.restype, _libm.fma.argtypes = ctypes.c_double, [ctypes.c_double] * 3


def _flush(value: Fraction | float, name: str) -> Fraction | float:
    """Subnormal numbers become zero of the same sign."""
    fmt = FORMATS[name]
    if isinstance(value, Fraction) and value and abs(value) < Fraction(2) ** (1 - fmt.bias):
        return -0.0 if value < 0 else Fraction(0)
    return value


def arithmetic(operation: str, name: str, mode: str, ftz: bool, saturate: bool, *operands: np.ndarray) -> np.ndarray:
    """add, sub, mul, div, fma or sqrt on codes of a format, exact and rounded once. NaN is the format's canonical one."""
    fmt = FORMATS[name]
    function = {"add": _add, "sub": _sub, "mul": _mul, "div": _div, "fma": _fma, "sqrt": _sqrt}[operation]
    out = []
    for codes in zip(*(o.tolist() for o in operands), strict=True):
        values = [decode(code, name) for code in codes]
        if ftz:
            values = [_flush(v, name) for v in values]
        result = function(values, mode)
        if ftz and operation in ("mul", "fma"):  # the exact result counts, not the rounded one
            result = _flush(result, name)
        code = encode(result, name, mode)
        if ftz and fmt.mantissa and not code & (fmt.infinity or 0) and code & ((1 << fmt.mantissa) - 1):
            code &= fmt.sign
        if saturate:
            value = decode(code, name)
            code = 0 if not value > 0 else encode(min(value, Fraction(1)), name)
        out.append(code)
    return np.array(out, f"u{max(fmt.bits // 8, 1)}")


Number = Fraction | float


def _special(*values: Number) -> bool:
    return any(isinstance(v, float) for v in values)


def _zero(negative: bool) -> Number:
    return -0.0 if negative else Fraction(0)


def _negative(v: Number) -> bool:
    return math.copysign(1, v) < 0 if isinstance(v, float) else v < 0


def _is_zero(v: Number) -> bool:
    return v == 0


def _sum(a: Number, b: Number, mode: str) -> Number:
    if any(isinstance(v, float) and not math.isfinite(v) for v in (a, b)):
        finite = [v if isinstance(v, float) else (1.0 if v > 0 else -1.0 if v < 0 else 0.0) for v in (a, b)]
        return finite[0] + finite[1]
    if _is_zero(a) and _is_zero(b):
        return _zero(_negative(a) and _negative(b) if mode != "rm" else _negative(a) or _negative(b))
    total = Fraction(a) + Fraction(b)
    return total if total else _zero(mode == "rm")


def _product(a: Number, b: Number) -> Number:
    negative = _negative(a) != _negative(b)
    if any(isinstance(v, float) and not math.isfinite(v) for v in (a, b)):
        if any(isinstance(v, float) and math.isnan(v) for v in (a, b)) or _is_zero(a) or _is_zero(b):
            return math.nan
        return -math.inf if negative else math.inf
    total = Fraction(a) * Fraction(b)
    return total if total else _zero(negative)


def _add(v: list[Number], mode: str) -> Number:
    return _sum(v[0], v[1], mode)


def _minus(v: Number) -> Number:
    return -v if isinstance(v, float) or v else -0.0


def _sub(v: list[Number], mode: str) -> Number:
    return _sum(v[0], _minus(v[1]), mode)


def _mul(v: list[Number], mode: str) -> Number:
    return _product(v[0], v[1])


def _fma(v: list[Number], mode: str) -> Number:
    return _sum(_product(v[0], v[1]), v[2], mode)


def _div(v: list[Number], mode: str) -> Number:
    a, b = v
    negative = _negative(a) != _negative(b)
    if any(isinstance(x, float) and math.isnan(x) for x in v):
        return math.nan
    infinite = [isinstance(x, float) and math.isinf(x) for x in v]
    if all(infinite) or (_is_zero(a) and _is_zero(b)):
        return math.nan
    if infinite[0] or _is_zero(b):
        return -math.inf if negative else math.inf
    if infinite[1] or _is_zero(a):
        return _zero(negative)
    return Fraction(a) / Fraction(b)


def _sqrt(v: list[Number], mode: str) -> Number:
    """Square root with enough digits that rounding it to at most 53 bits is rounding the exact one."""
    (a,) = v
    if isinstance(a, float):
        return math.nan if math.isnan(a) or a == -math.inf else a
    if a < 0:
        return math.nan
    shift = 1200
    scaled = (a.numerator << (2 * shift)) // a.denominator
    root = math.isqrt(scaled)
    exact = root * root == scaled and (a.numerator << (2 * shift)) % a.denominator == 0
    return Fraction(root, 1 << shift) if exact else Fraction(2 * root + 1, 1 << (shift + 1))


def floats(label: str, name: str, count: int = COUNT) -> np.ndarray:
    """Codes of a format: special values, subnormal numbers, any bits, and numbers of ordinary size."""
    fmt = FORMATS[name]
    dtype = {8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}[fmt.bits]
    raw = bits(label, count, dtype)
    out = raw.copy()
    ordinary = np.arange(count) % 4 >= 2
    exponents = (fmt.bias - 6 + (raw >> dtype(max(fmt.bits - 8, 0))).astype(np.uint64) % 12) << np.uint64(fmt.mantissa)
    keep = dtype(fmt.sign | ((1 << fmt.mantissa) - 1))
    out[ordinary] = ((raw & keep) | exponents.astype(dtype))[ordinary]
    one = fmt.bias << fmt.mantissa
    magnitudes = [0, 1, (1 << fmt.mantissa) - 1, 1 << fmt.mantissa, one - 1, one, one + 1, fmt.largest]
    magnitudes += [] if fmt.infinity is None else [fmt.infinity, fmt.infinity + (1 << (fmt.mantissa - 1)), fmt.infinity + 1]
    special = np.array([m | s for m in magnitudes for s in (0, fmt.sign)], dtype)
    chosen = special[bits(label + "/special", count, np.uint32) % np.uint32(len(special))]
    return np.where(np.arange(count) % 8 == 0, chosen, out)


def each(function: Callable[..., int], dtype: type, *operands: np.ndarray) -> np.ndarray:
    """A Python function of integers applied lane by lane, its result's low bits as unsigned `dtype`."""
    mask = (1 << (8 * np.dtype(dtype).itemsize)) - 1
    return np.array([int(function(*v)) & mask for v in zip(*(o.tolist() for o in operands), strict=True)], dtype)
