"""Matrix operands: random numbers of every format, their exact product, and where tensor cores look for them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tests.sim.conformance.case import Bound
from tests.sim.conformance.values import FORMATS, bits, decode, uniform

BITS = {"f16": 16, "bf16": 16, "tf32": 32, "e4m3": 8, "e5m2": 8, "s8": 8, "u8": 8, "e2m1": 4, "e2m3": 6, "e3m2": 6, "f64": 64}
INTEGERS = ("s8", "u8")


def table(name: str) -> np.ndarray:
    """The value of every code of a format of at most 8 bits."""
    if name == "s8":
        return np.arange(256).astype(np.uint8).view(np.int8).astype(np.float64)
    if name == "u8":
        return np.arange(256).astype(np.float64)
    return np.array([float(decode(c, name)) for c in range(1 << FORMATS[name].bits)])


def values(codes: np.ndarray, name: str) -> np.ndarray:
    """Codes as float64, exactly."""
    if name == "f64":
        return codes.view(np.float64)
    if name == "f16":
        return codes.astype(np.uint16).view(np.float16).astype(np.float64)
    if name == "bf16":
        return (codes.astype(np.uint32) << np.uint32(16)).view(np.float32).astype(np.float64)
    if name == "tf32":  # the low 13 bits do not count
        return (codes & np.uint32(0xFFFFE000)).view(np.float32).astype(np.float64)
    return table(name)[codes]


def operand(label: str, name: str, rows: int, depth: int, kind: str = "whole") -> np.ndarray:
    """Codes of a (rows, depth) matrix.

    kind: "whole", small integers, whose products and sums are exact in every accumulator; "normal", numbers of one size;
    "wide", magnitudes over many powers of two; "spread", over few enough for sums in float16; "holes", half of them zero and
    the others wide; "tiny", subnormal numbers; "special", any codes at all, with infinities and NaN.
    """
    count = rows * depth
    if name in INTEGERS and kind != "whole":
        return bits(label, count, np.uint8).reshape(rows, depth)
    if kind in ("tiny", "special"):
        dtype = np.uint32 if name == "tf32" else np.uint16 if BITS[name] == 16 else np.uint8
        codes = bits(label, count, dtype)
        if kind == "special":  # any number, but infinities and NaN in few places
            top = {32: 0x7F800000, 16: 0x7F80 if name == "bf16" else 0x7C00, 8: 0x7C}[BITS[name]]
            rare = bits(label + "#", count, np.uint8) < 2
            return np.where((codes & top == top) & ~rare, codes >> dtype(3), codes).reshape(rows, depth)
        mantissa = 23 if name == "tf32" else FORMATS[name].mantissa
        sign = dtype(1 << (8 * codes.itemsize - 1))
        return (codes & (sign | dtype((1 << mantissa) - 1))).reshape(rows, depth)
    if kind == "whole":
        x = np.floor(uniform(label, count) * 4.99)
        x = np.abs(x) if name == "u8" else x
    elif kind == "normal":
        x = uniform(label, count) + uniform(label + "'", count)
    else:
        spread = 3 if kind == "spread" else 6 if name in ("e4m3", "e2m3", "e3m2", "e2m1") else 10
        x = uniform(label, count) * np.exp2(np.floor(uniform(label + "^", count) * spread))
        if kind == "holes":
            x = np.where(bits(label + "0", count, np.uint8) & 1 == 1, 0, x)
    if name in INTEGERS:
        return x.astype(np.int64).astype(np.uint8).reshape(rows, depth)
    dtype = {64: np.uint64, 32: np.uint32, 16: np.uint16}.get(BITS[name], np.uint8)
    if name == "f64":
        return x.view(np.uint64).reshape(rows, depth)
    if name == "tf32":  # with low bits that must not count
        low = bits(label + "low", count, np.uint32) & np.uint32(0x1FFF)
        return ((x.astype(np.float32).view(np.uint32) & np.uint32(0xFFFFE000)) | low).reshape(rows, depth)
    if name == "f16":
        return x.astype(np.float16).view(np.uint16).reshape(rows, depth)
    if name == "bf16":
        return (x.astype(np.float32).view(np.uint32) >> np.uint32(16)).astype(dtype).reshape(rows, depth)
    known = table(name)
    order = np.argsort(np.where(np.isfinite(known), known, 1e300), kind="stable")[: int(np.isfinite(known).sum())]
    at = np.searchsorted(known[order], x).clip(0, len(order) - 1)  # any code near the number will do
    return order[at].astype(dtype).reshape(rows, depth)


@dataclass(frozen=True)
class Product:
    """a (m, k) times b (n, k) transposed, plus c: exact in float64, and the size of what was added up."""

    exact: np.ndarray
    largest: np.ndarray  # per element, the largest |product| or |c|
    total: np.ndarray  # per element, the sum of |products| and |c|


def multiply(a: np.ndarray, b: np.ndarray, c: np.ndarray, name: str = "") -> Product:
    """Operands of a format as float64 (m, k) and (n, k), c (m, n). A subnormal factor is as large as its exponent."""
    least = 2.0 ** (1 - FORMATS[name].bias) if name in FORMATS else 0.0
    sizes = [np.where(x == 0, 0, np.maximum(np.abs(x), least)) for x in (a, b)]
    largest = np.abs(c)
    with np.errstate(all="ignore"):
        for k in range(a.shape[1]):
            largest = np.maximum(largest, np.outer(sizes[0][:, k], sizes[1][:, k]))
        return Product(a @ b.T + c, largest, np.abs(a) @ np.abs(b).T + np.abs(c))


def accumulation(product: Product, result: str, name: str, depth: int, steps: int = 1) -> Bound:
    """How far a tensor core's sum may be from the exact one.

    Addends are cut off below the largest one's leading bit by a fixed number of places: 23 or more for 16- and 32-bit
    operands, 13 for 8-bit ones on sm_90;
    each of the depth + 1 addends loses less than one unit there, and the result of each of
    the steps (instructions) is cut off or rounded once more.
    """
    places = 12 if name in ("e4m3", "e5m2") else 22
    with np.errstate(all="ignore"):
        limit = (depth + 1) * product.largest * 2.0**-places + steps * product.total * 2.0**-22
    if result == "f16":
        limit = limit + steps * product.total * 2.0**-10 + 2.0**-24
    return Bound("absolute", limit, "accumulation order and width: addends are aligned to the largest and cut off")


def swizzle(offset: np.ndarray, mode: str) -> np.ndarray:
    """The 16-byte chunk number (address bits 4 to 6) is changed by the line number (bits 7 to 9)."""
    keep = {"none": 0, "32B": 1, "64B": 3, "128B": 7}[mode]
    return offset ^ (((offset >> 7) & keep) << 4)


SPAN = {"none": 16, "32B": 32, "64B": 64, "128B": 128}


@dataclass(frozen=True)
class Image:
    """An operand tile in shared memory: its bytes and the descriptor fields that describe them.

    leading, stride: bytes. step: bytes from one instruction's K slice to the next.
    """

    data: np.ndarray
    leading: int
    stride: int
    step: int


def k_major(codes: np.ndarray, size: int, mode: str, depth: int) -> Image:
    """K contiguous. Groups of 8 rows follow each other; within a group, rows of the swizzle's span (or 8 x 16-byte blocks).

    size: bytes of an element; depth: bytes of K of one instruction (32).
    """
    rows, row_bytes = codes.shape[0], codes.shape[1] * size
    row, byte = np.arange(rows)[:, None], np.arange(row_bytes)[None, :]
    span = SPAN[mode]
    if mode == "none":
        leading = 128  # from one 16-byte column of a group to the next
        stride = row_bytes // 16 * 128
        at = row // 8 * stride + row % 8 * 16 + byte // 16 * leading + byte % 16
        step = depth // 16 * leading
    else:
        assert row_bytes == span
        leading, stride, step = 16, 8 * span, depth
        at = row // 8 * stride + row % 8 * span + byte
    return Image(_scatter(codes, at, mode), leading, stride, step)


def mn_major(codes: np.ndarray, size: int, mode: str, depth: int) -> Image:
    """M or N contiguous. Blocks of 8 steps of K, each a line of the span's elements; depth: K of one instruction."""
    rows, k_total = codes.shape
    per = SPAN[mode] // size  # elements of a line
    row, k = np.arange(rows)[:, None], np.arange(k_total)[None, :]
    block = 8 * SPAN[mode]
    columns = -(-rows // per)
    if mode == "none":
        across, down = block, columns * block  # stride between blocks along M or N, leading along K
        leading, stride = down, across
    else:
        across, down = block, columns * block
        leading, stride = across, down
    at = row % per * size + row // per * across + k % 8 * SPAN[mode] + k // 8 * down
    bytes_at = (at[:, :, None] + np.arange(size)).reshape(rows, k_total * size)
    return Image(_scatter(codes, bytes_at, mode), leading, stride, depth // 8 * down)


def _scatter(codes: np.ndarray, at: np.ndarray, mode: str) -> np.ndarray:
    where = swizzle(at.astype(np.int64), mode)
    out = np.zeros((int(where.max()) // 1024 + 1) * 1024, np.uint8)
    out[where] = np.ascontiguousarray(codes).view(np.uint8).reshape(at.shape)
    return out
