"""How a tensor core adds up products: not as float32 arithmetic would.

Measured on an H200 with the kernels of `tests/sim/conformance`, bit for bit, for wgmma and mma.sync:

* All products of one instruction's K, and C, are added in one step. Each is aligned to the largest exponent among them (a
  product's exponent is the sum of its factors'; a subnormal factor has its format's least exponent; zeros do not count) and cut
  off a fixed number of places below it: 25, or 13 where wgmma's operands have 8 bits. The sum of what is left is exact.
* A float32 result is cut off, not rounded: to 24 bits, or to 14 where wgmma's operands have 8 bits; from 2**128 on it is
  infinite. A float16 result is rounded to nearest even.
* mma.sync with 8-bit floats runs as two such steps in float16 arithmetic's precision (25 places): over the elements whose index
  modulo 4 is 0 or 1, then 2 or 3, without C, which is then added in the result's own format.

What Blackwell's tcgen05.mma does is not known here; its sums are float32 sums (`operands.multiply`).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dsv4lab.sim import numfmt
from dsv4lab.sim.native import library

Array = NDArray
PLACES, PLACES_OF_BYTES = 25, 13
LEAST = {"f16": -14, "bf16": -126, "tf32": -126, "e4m3": -6, "e5m2": -14}  # exponent of a format's subnormal numbers
_NOTHING = -1000000  # the exponent of zero
_COLUMNS = 8  # COLUMNS of matrix.c
_ROWS = 16  # of A at a time, which bounds the memory of the numpy version


def _exponents(x: Array, least: int) -> Array:
    return np.where(x == 0, _NOTHING, np.maximum(np.frexp(x)[1].astype(np.int64) - 1, least))


def aligned_sums(a: Array, b: Array, c: Array | None, places: int, least_a: int, least_b: int) -> Array:
    """c + a b^T for finite float32 (M, K), (N, K) and (M, N) or None, every addend cut off; exact float64 (M, N)."""
    wide, right, of_right = a.astype(np.float64), b.astype(np.float64), _exponents(b, least_b)
    of_left, of_c = _exponents(a, least_a), None if c is None else _exponents(c, LEAST["tf32"])
    out = np.empty((len(a), len(b)))
    for low in range(0, len(a), _ROWS):
        part = slice(low, low + _ROWS)
        addends = wide[part, None, :] * right[None, :, :]
        exponents = of_left[part, None, :] + of_right[None, :, :]
        if c is not None and of_c is not None:
            addends = np.concatenate([addends, c[part, :, None]], axis=2)
            exponents = np.concatenate([exponents, of_c[part, :, None]], axis=2)
        top = exponents.max(axis=2)
        scale = np.exp2(np.where(top < _NOTHING // 2, 0, places - top).astype(np.float64))
        out[part] = np.trunc(addends * scale[:, :, None]).sum(axis=2) / scale + 0.0
    return out


def cut(x: Array, bits: int = 24) -> Array:
    """float64 to float32 toward zero, keeping 24 or fewer bits of the significand; from 2**128 on infinite."""
    with np.errstate(over="ignore"):
        nearest = x.astype(np.float32)
    words = nearest.view(np.uint32)
    words = words - (np.abs(nearest.astype(np.float64)) > np.abs(x))
    kept = (words & np.uint32((0xFFFFFFFF << (24 - bits)) & 0xFFFFFFFF)).view(np.float32)
    over = np.abs(x) >= 2.0**128
    return np.where(over, np.copysign(np.float32(np.inf), kept), kept) if over.any() else kept


@dataclass(frozen=True)
class Adder:
    """One kind of addition: places kept below the largest addend, bits of a float32 result, the operands' least exponents."""

    places: int
    bits: int
    least_a: int
    least_b: int
    half: bool

    def __call__(self, a: Array, b: Array, c: Array | None) -> Array:
        """One step: a (..., M, K), b (..., N, K), c (..., M, N) or None -> (..., M, N) float32, of float16 values if half.

        Infinities and NaN as in ordinary arithmetic, NaN canonical. In the native core's C code where that is in use.
        """
        if b.shape[-2] % _COLUMNS == 0 and library.choose() == "native":
            result = self._native(a, b, c)
            if result is not None:
                return result
        if a.ndim > 2:
            return np.stack([self(a[i], b[i], None if c is None else c[i]) for i in range(len(a))])
        return self.numpy(a, b, c)

    def numpy(self, a: Array, b: Array, c: Array | None) -> Array:
        """One step for matrices, in numpy."""
        given = [x for x in (a, b, c) if x is not None]
        if all(np.isfinite(x).all() for x in given):
            return self._finite(a, b, c)
        known = [None if x is None else np.where(np.isfinite(x), x, np.float32(0)) for x in (a, b, c)]
        result = self._finite(*known)  # type: ignore[arg-type]
        with np.errstate(invalid="ignore"):
            left, right = (np.where(np.isfinite(x), np.sign(x), x) for x in (a, b))
            plain = left @ right.T if c is None else left @ right.T + np.where(np.isfinite(c), np.float32(0), c)
        return np.where(np.isfinite(plain), result, numfmt.canonical(plain))

    def _native(self, a: Array, b: Array, c: Array | None) -> Array | None:
        """None where an operand is not finite."""
        (*batch, m, k), n = a.shape, b.shape[-2]
        held = [None if x is None else np.ascontiguousarray(x, np.float32) for x in (a, b, c)]
        out = np.empty((*batch, m, n), np.float32)
        scratch = np.empty(m * k, np.int32), np.empty(n * k, np.int32), np.empty(n * k), np.empty(n)
        pointers = [None if x is None else x.ctypes.data for x in (*held, out, *scratch)]
        sizes = batch[0] if batch else 1, m, n, k
        rules = self.places, self.least_a, self.least_b, self.bits, self.half
        return None if library.load().native_tensor_sums(*pointers, *sizes, *rules) else out

    def _finite(self, a: Array, b: Array, c: Array | None) -> Array:
        exact = aligned_sums(a, b, c, self.places, self.least_a, self.least_b)
        if not self.half:
            return cut(exact, self.bits)
        with np.errstate(over="ignore"):
            return exact.astype(np.float16).astype(np.float32)


def wgmma(a: Array, b: Array, c: Array | None, types: tuple[str, str], half: bool) -> Array:
    """a (..., M, K), b (..., N, K), c (..., M, N) or None as float32. types: of a and b; half: float16 accumulators."""
    narrow = types[0] in ("e4m3", "e5m2")
    places, bits = (PLACES_OF_BYTES, 14) if narrow else (PLACES, 24)
    return Adder(places, bits, LEAST[types[0]], LEAST[types[1]], half)(a, b, c)


def mma(a: Array, b: Array, c: Array, types: tuple[str, str], half: bool) -> Array:
    """The same for mma.sync; formats of fewer than 8 bits, which Hopper does not have, are added in float32."""
    if not set(types) <= set(LEAST):
        return a @ b.swapaxes(-1, -2) + c
    if types[0] not in ("e4m3", "e5m2"):
        return Adder(PLACES, 24, LEAST[types[0]], LEAST[types[1]], half)(a, b, c)
    add = Adder(PLACES, 24, LEAST["f16"], LEAST["f16"], half)
    first = np.arange(a.shape[-1]) % 4 < 2
    total = add(a[..., ~first], b[..., ~first], add(a[..., first], b[..., first], None))
    with np.errstate(over="ignore", invalid="ignore"):
        return numfmt.canonical((total + c).astype(np.float16).astype(np.float32) if half else total + c)
