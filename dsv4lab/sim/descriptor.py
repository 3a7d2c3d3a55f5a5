"""TMA descriptors (CUtensorMap) as readable data: encode, decode, print.

Of the 128 bytes the first 64 carry the fields below, in 32-bit words; host code leaves the rest uninitialised.

    0-1    global address
    2      0-3: 2   4-6: rank - 1   7-10: element type   11-12: interleave   13-14: swizzle   15: NaN fill   17-18: L2 promotion
           21: tensor of at least 128 KiB
    3-6    strides of dimensions 1..4 in units of 16 bytes, low 32 bits;  7: their high 4 bits, a nibble each
    8-12   extents minus 1
    13     0-14: element strides minus 1, three bits each   24-31: box of dimension 0 minus 1
    14     boxes of dimensions 1..4 minus 1, a byte each

An im2col map has bit 0 of word 2 set, its channels for each pixel as the box of dimension 0, and

    14     corners of the box of pixels, lower ones in bits 0-15, upper ones in bits 16-31: 16 bits each for rank 3, 8 for
           rank 4, 5 for rank 5, signed, innermost first
    15     0-9: pixels of a column minus 1

Found by varying one property at a time of the descriptors that CuTeDSL's host code writes; interleave, fill, promotion and the
element strides of tiled maps are inferred.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

DESCRIPTOR_BYTES = 128
SWIZZLES = ("none", "32B", "64B", "128B")
# name -> (code in the descriptor, bits of an element); order is that of the driver's CUtensorMapDataType
_ELEMENTS = {
    "u8": (0, 8),
    "u16": (1, 16),
    "u32": (2, 32),
    "s32": (3, 32),
    "u64": (4, 64),
    "s64": (5, 64),
    "f16": (6, 16),
    "f32": (7, 32),
    "f64": (9, 64),
    "bf16": (10, 16),
    "f32_ftz": (8, 32),
    "tf32": (14, 32),
    "tf32_ftz": (15, 32),
    "b4x16": (11, 4),  # 16 packed 4-bit elements in 8 bytes
    "b4x16_p64": (12, 4),  # the same in global memory, padded to 16 bytes in shared memory
    "b6x16_p32": (13, 6),  # 16 packed 6-bit elements in 12 bytes, padded to 16 in shared memory
}
DRIVER_TYPES = tuple(_ELEMENTS)
_NAMES = {code: name for name, (code, _) in _ELEMENTS.items()}
_LARGE_BYTES = 128 * 1024  # from this size on, bit 21 of the control word is set
_MAX_BOX = 256
_MAX_STEP = 8  # the largest element stride
_MAX_PIXELS = 1024
_CORNER_BITS = {3: 16, 4: 8, 5: 5}  # by rank


@dataclass(frozen=True)
class Im2col:
    """The pixels that an im2col map walks through. Corners: of the spatial dimensions, innermost first.

    Base pixels lie between `lower` and the tensor's last pixel + `upper`, both included. channels, pixels: of one copy.
    """

    lower: tuple[int, ...]
    upper: tuple[int, ...]
    channels: int
    pixels: int


@dataclass(frozen=True)
class TensorMap:
    """What a descriptor says. extents, box: elements, innermost first. strides: bytes of dimensions 1.. (rank - 1 of them).

    steps: element strides, all 1 if left out. im2col: box is (channels, pixels) then.
    """

    address: int
    element: str
    extents: tuple[int, ...]
    strides: tuple[int, ...]
    box: tuple[int, ...]
    swizzle: str = "none"
    interleave: int = 0
    nan_fill: bool = False
    l2_promotion: int = 0
    steps: tuple[int, ...] = ()
    im2col: Im2col | None = None

    @property
    def rank(self) -> int:
        return len(self.extents)

    @property
    def element_bits(self) -> int:
        return _ELEMENTS[self.element][1]

    @property
    def box_bytes(self) -> int:
        """Bytes of shared memory that one box fills."""
        bits = 8 if self.element in ("b4x16_p64", "b6x16_p32") else self.element_bits
        return prod(self.box) * bits // 8

    @property
    def tensor_bytes(self) -> int:
        """Bytes of global memory from the first element to the end of the last."""
        row = -(-self.extents[0] * self.element_bits // 8)
        return row + sum((n - 1) * s for n, s in zip(self.extents[1:], self.strides, strict=True))

    def __str__(self) -> str:
        extra = [f"swizzle {self.swizzle}"]
        extra += [f"interleave {self.interleave}"] if self.interleave else []
        extra += ["NaN fill"] if self.nan_fill else []
        extra += [f"element strides {list(self.steps)}"] if any(step != 1 for step in self.steps) else []
        extra += [f"im2col, corners {list(self.im2col.lower)} and {list(self.im2col.upper)}"] if self.im2col else []
        return (
            f"{self.element} tensor {_times(self.extents)} at 0x{self.address:x}, strides {list(self.strides)} bytes, "
            f"box {_times(self.box)} = {self.box_bytes} bytes, {', '.join(extra)}"
        )

    def encode(self) -> bytes:
        """The descriptor's 128 bytes. Raises ValueError for what the hardware would not accept."""
        self._check()
        code = _ELEMENTS[self.element][0]
        words = [0] * (DESCRIPTOR_BYTES // 4)
        words[0], words[1] = self.address & 0xFFFFFFFF, self.address >> 32
        words[2] = 2 | (self.rank - 1) << 4 | code << 7 | self.interleave << 11 | SWIZZLES.index(self.swizzle) << 13
        words[2] |= int(self.nan_fill) << 15 | self.l2_promotion << 17 | int(self.tensor_bytes >= _LARGE_BYTES) << 21
        for i, stride in enumerate(self.strides):
            words[3 + i] = stride >> 4 & 0xFFFFFFFF
            words[7] |= (stride >> 36) << 4 * i
        for i, extent in enumerate(self.extents):
            words[8 + i] = extent - 1
        words[13] = (self.box[0] - 1) << 24
        for i, step in enumerate(self.steps):
            words[13] |= (step - 1) << 3 * i
        if self.im2col is not None:
            words[2] |= 1
            words[15] = self.im2col.pixels - 1
            bits = _CORNER_BITS[self.rank]
            for i, (low, high) in enumerate(zip(self.im2col.lower, self.im2col.upper, strict=True)):
                words[14] |= (low & (1 << bits) - 1) << bits * i | (high & (1 << bits) - 1) << 16 + bits * i
            return struct.pack("<32I", *words)
        for i, size in enumerate(self.box[1:]):
            words[14] |= (size - 1) << 8 * i
        return struct.pack("<32I", *words)

    def _check_im2col(self, im2col: Im2col) -> None:
        limit = 1 << _CORNER_BITS.get(self.rank, 1) - 1
        corners = (*im2col.lower, *im2col.upper)
        if self.rank not in _CORNER_BITS or len(self.strides) != self.rank - 1 or len(corners) != 2 * (self.rank - 2):
            raise ValueError(f"an im2col map has rank 3 to 5, two dimensions of which have no corners, got {self!r}")
        if not all(-limit <= corner < limit for corner in corners):
            raise ValueError(f"corners must lie in {-limit}..{limit - 1} for rank {self.rank}, got {corners}")
        if not 1 <= im2col.pixels <= _MAX_PIXELS or self.box != (im2col.channels, im2col.pixels):
            raise ValueError(f"an im2col map copies 1 to {_MAX_PIXELS} pixels, got {im2col.pixels} with box {self.box}")

    def _check(self) -> None:
        tiled = self.im2col is None
        if self.im2col is not None:
            self._check_im2col(self.im2col)
        elif not 1 <= self.rank <= 5 or len(self.box) != self.rank or len(self.strides) != self.rank - 1:
            raise ValueError(f"rank must be 1 to 5 with as many box sizes and one stride fewer, got {self!r}")
        if self.element not in _ELEMENTS or self.swizzle not in SWIZZLES:
            raise ValueError(f"element must be one of {DRIVER_TYPES} and swizzle one of {SWIZZLES}, got {self!r}")
        if self.address % 16:
            raise ValueError(f"address must be a multiple of 16, got 0x{self.address:x}")
        for name, values, limit in (("extents", self.extents, 1 << 32), ("box", self.box[: None if tiled else 1], _MAX_BOX)):
            if not all(1 <= value <= limit for value in values):
                raise ValueError(f"{name} must lie in 1..{limit}, got {values}")
        if self.steps and (len(self.steps) != self.rank or not all(1 <= step <= _MAX_STEP for step in self.steps)):
            raise ValueError(f"element strides must be {self.rank} numbers from 1 to {_MAX_STEP}, got {self.steps}")
        if any(stride % 16 or not 0 <= stride < 1 << 40 for stride in self.strides):
            raise ValueError(f"strides must be multiples of 16 below 2**40 bytes, got {self.strides}")
        if self.box[0] * self.element_bits % 128 and self.element not in ("b4x16_p64", "b6x16_p32") and not self.interleave:
            raise ValueError(
                f"the box's innermost dimension must be a multiple of 16 bytes, got {self.box[0]} x {self.element}"
            )


def code(element: str) -> int:
    """The number that stands for an element type in a descriptor."""
    return _ELEMENTS[element][0]


def decode(raw: bytes) -> TensorMap:
    """Read a descriptor. Raises ValueError where the bytes are none, or use a feature that is not known here."""
    if len(raw) != DESCRIPTOR_BYTES:
        raise ValueError(f"a descriptor has {DESCRIPTOR_BYTES} bytes, got {len(raw)}")
    words = struct.unpack("<32I", raw)
    control = words[2]
    rank = (control >> 4 & 7) + 1
    element = _NAMES.get(control >> 7 & 15)
    if control >> 16 & 1 and element in ("f32", "f32_ftz"):  # how the driver writes it on Hopper
        element = "t" + element
    if control & 12 or not words[0] | words[1] or rank > 5 or element is None:
        raise ValueError(f"not a TMA descriptor: control word 0x{control:08x}")
    if words[13] & 0xFF8000:
        raise ValueError(f"not a TMA descriptor: word 13 is 0x{words[13]:08x}")
    strides = [(words[3 + i] | (words[7] >> 4 * i & 15) << 32) << 4 for i in range(rank - 1)]
    box = tuple(size + 1 for size in (words[13] >> 24, *(words[14] >> 8 * i & 255 for i in range(4))))[:rank]
    steps = tuple((words[13] >> 3 * i & 7) + 1 for i in range(rank))
    im2col = None
    if control & 1:
        bits = _CORNER_BITS.get(rank)
        if bits is None:
            raise ValueError(f"not a TMA descriptor: im2col of rank {rank}")
        corners = [[_signed(words[14] >> first + bits * i, bits) for i in range(rank - 2)] for first in (0, 16)]
        im2col = Im2col(tuple(corners[0]), tuple(corners[1]), box[0], (words[15] & 0x3FF) + 1)
        box = (im2col.channels, im2col.pixels)
    return TensorMap(
        address=words[0] | words[1] << 32,
        element=element,
        extents=tuple(words[8 + i] + 1 for i in range(rank)),
        strides=tuple(strides),
        box=box,
        swizzle=SWIZZLES[control >> 13 & 3],
        interleave=control >> 11 & 3,
        nan_fill=bool(control >> 15 & 1),
        l2_promotion=control >> 17 & 3,
        steps=() if all(step == 1 for step in steps) else steps,
        im2col=im2col,
    )


def _signed(value: int, bits: int) -> int:
    value &= (1 << bits) - 1
    return value - (1 << bits) if value >> bits - 1 else value


def looks_like_descriptor(raw: bytes) -> bool:
    """Whether 128 bytes of kernel parameters are a descriptor; `decode` says why not."""
    try:
        decode(raw)
    except ValueError:
        return False
    return True


def _times(sizes: Sequence[int]) -> str:
    return " x ".join(map(str, sizes))
