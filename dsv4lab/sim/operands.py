"""Tensor-core operands: bytes of a tile to numbers, and the product of two tiles."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from dsv4lab.sim import numfmt

Array = NDArray
# name -> bits of an element in an operand tile; "e2m1.8" and the like are sub-byte values in 8-bit containers
BITS = {
    "f16": 16,
    "bf16": 16,
    "tf32": 32,
    "e4m3": 8,
    "e5m2": 8,
    "s8": 8,
    "u8": 8,
    "e2m1": 4,
    "e2m1.8": 8,
    "e2m3.8": 8,
    "e3m2.8": 8,
}
INTEGERS = ("s8", "u8")


def values(data: Array, name: str) -> Array:
    """Decode a (rows, row bytes) tile to float32 (rows, K); exact for every format."""
    if name == "f16":
        return np.ascontiguousarray(data).view(np.float16).astype(np.float32)
    if name == "bf16":
        return numfmt.bf16_to_f32(np.ascontiguousarray(data).view(np.uint16))
    if name == "tf32":
        return numfmt.tf32_operand(np.ascontiguousarray(data).view(np.uint32))
    if name in ("e4m3", "e5m2"):
        return numfmt.table(name).take(data)
    if name == "s8":
        return np.ascontiguousarray(data).view(np.int8).astype(np.float32)
    if name == "u8":
        return data.astype(np.float32)
    table = numfmt.table(name.removesuffix(".8"))
    if name == "e2m1":
        out = np.empty((data.shape[0], 2 * data.shape[1]), np.float32)
        out[:, 0::2] = table.take(data & 15)
        out[:, 1::2] = table.take(data >> 4)
        return out
    if name == "e2m1.8":
        return table.take((data >> 2) & 15)
    return table.take((data >> 1) & 63)


def unpack(data: Array, size: int) -> Array:
    """Every 16 bytes hold 16 packed values of 4 or 6 bits, then padding; returns them in the middle of 16 bytes.

    That is the container that kind::f8f6f4 reads: 4-bit values in bits 2 to 5, 6-bit values in bits 1 to 6.
    """
    packed = np.ascontiguousarray(data).reshape(data.shape[0], -1, 16)[:, :, : 2 * size]
    bits = np.unpackbits(packed, axis=-1, bitorder="little").reshape(*packed.shape[:2], 16, size)
    values = (bits << np.arange(size, dtype=np.uint8)).sum(axis=-1, dtype=np.uint8)
    return (values << np.uint8((8 - size) // 2)).reshape(data.shape)


def multiply(a: Array, b: Array, integer: bool = False) -> Array:
    """(..., M, K) x (..., N, K) -> (..., M, N): float32 sums in an order of the library's choosing; integers are exact."""
    if integer:
        return np.rint(a.astype(np.float64) @ b.astype(np.float64).swapaxes(-1, -2)).astype(np.int64)
    return a @ b.swapaxes(-1, -2)
