"""Shared-memory layouts of tensor-core operands: swizzles, matrix descriptors and where each byte of a tile lies."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from dsv4lab.sim.errors import UnknownInstruction

Array = NDArray
SPAN = {0: 16, 1: 32, 2: 64, 3: 128}  # bytes of a row in swizzle mode none, 32B, 64B, 128B
SWIZZLE_BITS = {0: 0, 1: 0x10, 2: 0x30, 3: 0x70}
_PATTERN = 1024  # every swizzle repeats after this many bytes
_WGMMA_SWIZZLE = {0: 0, 1: 3, 2: 2, 3: 1}
_TCGEN05_SWIZZLE = {0: 0, 2: 3, 4: 2, 6: 1}


def swizzle(offset: Array, mode: int) -> Array:
    """Exchange the 16-byte chunks of a row by the row's number: address bits 4-6 are XORed with bits 7-9."""
    return offset ^ ((offset >> 3) & SWIZZLE_BITS[mode])


@dataclass(frozen=True)
class MatrixDescriptor:
    """The fields of a 64-bit shared-memory matrix descriptor, in bytes."""

    start: int
    leading: int
    stride: int
    mode: int  # swizzle: 0 none, 1 32B, 2 64B, 3 128B


@lru_cache(maxsize=4096)
def decode_descriptor(bits: int, tcgen05: bool) -> MatrixDescriptor:
    """Decode a matrix descriptor of wgmma or of tcgen05. Raises UnknownInstruction for modes that are not simulated."""
    code = (bits >> 61) & 7 if tcgen05 else (bits >> 62) & 3
    modes = _TCGEN05_SWIZZLE if tcgen05 else _WGMMA_SWIZZLE
    if code not in modes:
        raise UnknownInstruction(f"matrix descriptor 0x{bits:016x}: swizzle code {code} is not simulated")
    if (bits >> 49) & 7:
        raise UnknownInstruction(f"matrix descriptor 0x{bits:016x}: a base offset is not simulated")
    if tcgen05 and (bits >> 52) & 1:
        raise UnknownInstruction(f"matrix descriptor 0x{bits:016x}: absolute leading-dimension addresses are not simulated")
    return MatrixDescriptor((bits & 0x3FFF) << 4, ((bits >> 16) & 0x3FFF) << 4, ((bits >> 32) & 0x3FFF) << 4, modes[code])


@lru_cache(maxsize=4096)
def _tile_index(start: int, leading: int, stride: int, mode: int, rows: int, row_bytes: int, element: int) -> Array:
    """Byte offsets from the start, (rows, row_bytes); element is 0 for K-major, else the bytes of an MN-major element."""
    span = SPAN[mode]
    if not element:
        row = np.arange(rows, dtype=np.int64)[:, None]
        byte = np.arange(row_bytes, dtype=np.int64)[None, :]
        if mode == 0:
            linear = row // 8 * stride + row % 8 * 16 + byte // 16 * leading + byte % 16
        else:
            linear = row // 8 * stride + row % 8 * span + byte
    else:
        row = np.arange(rows, dtype=np.int64)[:, None, None]
        k = np.arange(row_bytes // element, dtype=np.int64)[None, :, None]
        byte = np.arange(element, dtype=np.int64)[None, None, :]
        per = span // element
        across, down = (stride, leading) if mode == 0 else (leading, stride)
        linear = row % per * element + row // per * across + k % 8 * span + k // 8 * down + byte
    out = (swizzle(linear + start, mode) - start).reshape(rows, row_bytes)
    out.flags.writeable = False
    return out


def operand_index(descriptor: MatrixDescriptor, rows: int, row_bytes: int, mn_major_element: int = 0) -> Array:
    """Where a (rows, row_bytes) operand tile lies, as byte offsets from the descriptor's start address.

    rows run along M or N, row_bytes along K. mn_major_element: bytes of an element when M or N is contiguous, 0 when K is.
    """
    return _tile_index(
        descriptor.start % _PATTERN,
        descriptor.leading,
        descriptor.stride,
        descriptor.mode,
        rows,
        row_bytes,
        mn_major_element,
    )


@lru_cache(maxsize=4096)
def box_index(size: int, mode: int, start: int) -> Array:
    """Byte offsets from the start at which a TMA box of `size` bytes lies, for a start taken modulo 1024."""
    out = swizzle(np.arange(size, dtype=np.int64) + start, mode) - start
    out.flags.writeable = False
    return out


@lru_cache(maxsize=64)
def accumulator_fragment(columns: int) -> tuple[Array, Array]:
    """Rows and columns of the 64 x N accumulator that thread t's register i of a warpgroup holds: (128, N / 2) each."""
    thread = np.arange(128)[:, None]
    item = np.arange(columns // 2)[None, :]
    row = 16 * (thread // 32) + thread % 32 // 4 + 8 * (item // 2 % 2)
    column = 8 * (item // 4) + 2 * (thread % 4) + item % 2
    return row, column
