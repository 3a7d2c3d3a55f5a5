"""Tensor copies: a TMA descriptor's boxes between global and shared memory.

Descriptors are the 128 bytes that the kernel receives, read anew for every copy, so `tensormap.replace` shows. Boxes may
hang over any edge: what lies outside reads as the fill value, is not written, and always counts as transferred bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from dsv4lab.sim import descriptor
from dsv4lab.sim.errors import MemoryFault, UnknownInstruction
from dsv4lab.sim.layouts import box_index
from dsv4lab.sim.memory import Allocation, GlobalMemory, SharedMemory
from dsv4lab.sim.numfmt import TF32, bf16_to_f32, encode, f32_to_bf16

Array = NDArray
PADDED = {"b4x16_p64": 8, "b6x16_p32": 12}  # bytes of data in each 16 bytes of shared memory
_NUMPY = {
    **dict(u8="u1", u16="u2", u32="u4", s32="i4", u64="u8", s64="i8", f16="f2", f32="f4", f64="f8"),
    **dict.fromkeys(("f32_ftz", "tf32", "tf32_ftz"), "f4"),
}
# what lies outside is filled with where NaN is asked for, as measured on an H200
_NAN = {
    "f16": 0x7FF7,
    "bf16": 0x7FF7,
    "f64": 0x7FF77FF77FF77FF7,
    **dict.fromkeys(("f32", "f32_ftz", "tf32", "tf32_ftz"), 0x7FF77FF7),
}
_FIRST = np.zeros(1, np.int64)
# element types as `tensormap.replace.elemtype` numbers them
_REPLACED: tuple[str, ...] = ("u8", "u16", "u32", "s32", "u64", "s64", "f16", "f32", "f32_ftz", "f64", "bf16")
_REPLACED += ("tf32", "tf32_ftz")
_REPLACED += ("b4x16", "b4x16_p64", "b6x16_p32")
CONVERTED = ("tf32", "tf32_ftz")  # element types that a load changes
SHARED_ALIGNMENT = 128  # bytes; a box's address in shared memory


@dataclass(frozen=True)
class Plan:
    """A descriptor as bytes. Extents, box and strides are innermost first; sub-byte types are counted in bytes of data."""

    address: int
    element: str
    element_bytes: int
    element_bits: int
    extents: tuple[int, ...]
    strides: tuple[int, ...]  # bytes; the innermost is element_bytes
    box: tuple[int, ...]
    mode: int  # swizzle: 0 none, 1 32B, 2 64B, 3 128B
    nan_fill: bool
    steps: tuple[int, ...]  # from one element of the box to the next; the innermost is 1
    im2col: descriptor.Im2col | None

    @property
    def rank(self) -> int:
        return len(self.extents)

    @property
    def padded(self) -> int:
        return PADDED.get(self.element, 0)

    @property
    def box_bytes(self) -> int:
        """Bytes of the box in shared memory."""
        return self.counted_bytes * 16 // self.padded if self.padded else self.counted_bytes

    @property
    def counted_bytes(self) -> int:
        """What a load of the box adds to its barrier: bytes of data, without the padding of sub-byte types."""
        return int(np.prod(self.box)) * self.element_bytes

    def start(self, coordinates: list[int]) -> list[int]:
        """Coordinates with the innermost one in units of `element_bytes`."""
        if self.element_bits >= 8:
            return list(coordinates)
        return [coordinates[0] * self.element_bits // 8, *coordinates[1:]]


@lru_cache(maxsize=1024)
def plan(raw: bytes) -> Plan:
    """Read a descriptor's 128 bytes as the copy engine does."""
    try:
        tensor = descriptor.decode(raw)
    except ValueError as error:
        raise MemoryFault(f"TMA descriptor: {error}") from None
    if tensor.interleave:
        raise UnknownInstruction(f"interleaved TMA descriptors are not simulated: {tensor}")
    bits = tensor.element_bits
    extents, box = list(tensor.extents), list(tensor.box)
    if bits < 8:
        extents[0], box[0] = -(-extents[0] * bits // 8), -(-box[0] * bits // 8)
    size = max(bits // 8, 1)
    steps = (1, *tensor.steps[1:]) if tensor.steps else (1,) * tensor.rank
    if tensor.im2col is None:
        box = [-(-length // step) for length, step in zip(box, steps, strict=True)]
    elif bits < 8:
        raise UnknownInstruction(f"im2col descriptors of elements below a byte are not simulated: {tensor}")
    return Plan(
        address=tensor.address,
        element=tensor.element,
        element_bytes=size,
        element_bits=bits,
        extents=tuple(extents),
        strides=(size, *tensor.strides),
        box=tuple(box),
        mode=descriptor.SWIZZLES.index(tensor.swizzle),
        nan_fill=tensor.nan_fill,
        steps=steps,
        im2col=tensor.im2col,
    )


def _clip(tensor: Plan, coordinates: list[int], memory: GlobalMemory) -> tuple[Array | None, tuple[slice, ...]]:
    """The in-bounds part of the box as a strided byte view (outermost first, then the element's bytes), and where it sits."""
    start = tensor.start(coordinates)
    low = [max(0, -(c // step)) for c, step in zip(start, tensor.steps, strict=True)]
    room = [-((c - e) // step) for c, e, step in zip(start, tensor.extents, tensor.steps, strict=True)]
    high = [min(b, r) for b, r in zip(tensor.box, room, strict=True)]
    if any(h <= lo for lo, h in zip(low, high, strict=True)):
        return None, ()
    strides = [s * step for s, step in zip(tensor.strides, tensor.steps, strict=True)]
    address = tensor.address + sum(c * s + lo * t for c, lo, s, t in zip(start, low, tensor.strides, strides, strict=True))
    shape = [h - lo for lo, h in zip(low, high, strict=True)]
    extent = sum((n - 1) * s for n, s in zip(shape, strides, strict=True)) + tensor.element_bytes
    owner: Allocation = memory.find(address)
    offset = address - owner.base
    if offset + extent > owner.size:
        raise MemoryFault(
            f"the TMA box at {tuple(coordinates)} ends {offset + extent - owner.size} bytes beyond {owner.name}: "
            f"the descriptor claims extents {tensor.extents} with byte strides {tensor.strides}"
        )
    flat = owner.data[offset : offset + extent]
    view = np.lib.stride_tricks.as_strided(flat, shape=[*shape[::-1], tensor.element_bytes], strides=[*strides[::-1], 1])
    return view, tuple(slice(lo, h) for lo, h in zip(low[::-1], high[::-1], strict=True))


def _columns(tensor: Plan, coordinates: list[int], memory: GlobalMemory, offsets: Sequence[int]) -> Iterator[tuple[int, Array]]:
    """The pixels of an im2col box that lie in the tensor: their number within the box, and their channels as bytes."""
    walk = tensor.im2col
    assert walk is not None
    spatial = tensor.rank - 2
    shift = [*(offsets or [0] * spatial), 0]
    last = [n - 1 + up for n, up in zip(tensor.extents[1:-1], walk.upper, strict=True)]
    channels = min(walk.channels, tensor.extents[0] - coordinates[0])
    pixel = list(coordinates[1:])
    for number in range(walk.pixels):
        place = [p + o for p, o in zip(pixel, shift, strict=True)]
        if channels > 0 and all(0 <= p < n for p, n in zip(place, tensor.extents[1:], strict=True)):
            address = tensor.address + sum(p * s for p, s in zip([coordinates[0], *place], tensor.strides, strict=True))
            yield number, memory.span(address, channels * tensor.element_bytes)
        for axis in range(spatial + 1):
            pixel[axis] += tensor.steps[1 + axis]
            if axis == spatial or pixel[axis] <= last[axis]:
                break
            pixel[axis] = walk.lower[axis]


def _runs(view: Array) -> tuple[int, Array, int]:
    """A strided byte view of global memory as contiguous runs: the first's address, their offsets, bytes of each."""
    index = np.zeros(1, np.int64)
    for count, stride in zip(view.shape[:-2], view.strides[:-2], strict=True):
        index = (index[:, None] + np.arange(count) * stride).reshape(-1)
    return view.ctypes.data, index, view.shape[-2] * view.shape[-1]


def aligned(tensor: Plan, coordinates: Sequence[int]) -> bool:
    """Whether the first coordinate names a multiple of 16 bytes; where not, the H200 reports an illegal instruction."""
    return coordinates[0] * tensor.element_bits % 128 == 0


def _check(tensor: Plan, coordinates: list[int], offset: int) -> None:
    if not aligned(tensor, coordinates):
        raise MemoryFault(
            f"misaligned: a TMA box must begin at a multiple of 16 bytes of its row, got {coordinates[0]} x {tensor.element}"
        )
    if len(coordinates) != tensor.rank:
        raise MemoryFault(f"{len(coordinates)} coordinates for a TMA descriptor of rank {tensor.rank}")
    if offset % SHARED_ALIGNMENT:
        raise MemoryFault(
            f"misaligned: a TMA box in shared memory needs {SHARED_ALIGNMENT} bytes alignment, got offset {offset}"
        )


def _check_inside(tensor: Plan, coordinates: list[int]) -> None:
    """What a store refuses."""
    if tensor.im2col is None and min(coordinates) < 0:
        raise MemoryFault(
            f"a TMA store has no negative coordinates (an illegal instruction on the H200), got {tuple(coordinates)}"
        )


def _locate(tensor: Plan, offset: int) -> Array:
    """Byte offsets, from `offset`, of the box's data in shared memory."""
    if not tensor.padded:
        return box_index(tensor.box_bytes, tensor.mode, offset % 1024)
    whole = box_index(tensor.box_bytes, tensor.mode, offset % 1024)
    return whole.reshape(-1, 16)[:, : tensor.padded].reshape(-1)


def read_box(tensor: Plan, coordinates: list[int], memory: GlobalMemory, offsets: Sequence[int] = ()) -> Array:
    """The box at `coordinates` (innermost first) as bytes in shared-memory order before the swizzle."""
    shape = [*tensor.box[::-1], tensor.element_bytes]
    out = np.zeros(shape, np.uint8)
    if tensor.nan_fill and tensor.element in _NAN:
        out[...] = np.frombuffer(_NAN[tensor.element].to_bytes(tensor.element_bytes, "little"), np.uint8)
    if tensor.im2col is not None:
        for row, column in _columns(tensor, coordinates, memory, offsets):
            if memory.observers:
                memory.observers.read("global", None, column.ctypes.data, _FIRST, len(column))
            out[row].reshape(-1)[: len(column)] = column
        return out.reshape(-1)
    view, where = _clip(tensor, coordinates, memory)
    if view is not None:
        if memory.observers:
            memory.observers.read("global", None, *_runs(view))
        out[where] = view
    return _converted(tensor.element, out.reshape(-1))


def _converted(element: str, data: Array) -> Array:
    """What a load makes of its words: tf32 is rounded to nearest; tf32_ftz loses its subnormal numbers, f32_ftz does not."""
    if element not in CONVERTED:
        return data
    words = data.view(np.uint32)
    if element == "tf32_ftz":
        words = np.where((words & np.uint32(0x7F800000)) == 0, words & np.uint32(0x80000000), words)
    return (encode(words.view(np.float32), TF32) << np.uint32(13)).view(np.uint8)


def load(
    tensor: Plan,
    coordinates: list[int],
    memory: GlobalMemory,
    shared: SharedMemory,
    offset: int,
    shift: Sequence[int] = (),
) -> int:
    """Copy a box to shared memory at `offset`; returns the bytes it counts for.

    shift: an im2col copy's offsets, innermost first.
    """
    _check(tensor, coordinates, offset)
    shared.scatter(_locate(tensor, offset), offset, read_box(tensor, coordinates, memory, shift), "TMA load")
    if tensor.padded:
        shared.mark(offset, tensor.box_bytes)
    return tensor.counted_bytes


def whole(tensor: Plan) -> bool:
    """Whether rows end at a multiple of 16 bytes."""
    return tensor.padded > 0 or tensor.extents[0] * tensor.element_bytes % 16 == 0


def _whole_rows(tensor: Plan) -> Plan:
    """The tensor with rows up to a multiple of 16 bytes."""
    if whole(tensor):
        return tensor
    columns = -(-tensor.extents[0] * tensor.element_bytes // 16) * 16 // tensor.element_bytes
    return replace(tensor, extents=(columns, *tensor.extents[1:]))


def store(
    tensor: Plan, coordinates: list[int], memory: GlobalMemory, shared: SharedMemory, offset: int, reduction: str | None = None
) -> None:
    """Copy, or reduce, a box from shared memory at `offset` into the tensor.

    As on the H200: rows are written up to a multiple of 16 bytes, and no coordinate of a tiled box may be negative.
    """
    _check(tensor, coordinates, offset)
    _check_inside(tensor, coordinates)
    if reduction == "add" and tensor.element == "s64":
        raise UnknownInstruction(
            "TMA reduction add of element type s64 is an illegal instruction on the H200; u64 does the same"
        )
    shape = [*tensor.box[::-1], tensor.element_bytes]
    _put(tensor, coordinates, memory, shared.gather(_locate(tensor, offset), offset, "TMA store").reshape(shape), reduction)


def _four(tensor: Plan, coordinates: list[int], offset: int) -> tuple[Array, list[list[int]]]:
    """Byte offsets of the four rows of a gather or scatter in shared memory, and the coordinates of each row's box."""
    if tensor.rank != 2 or tensor.box[1] != 1 or len(coordinates) != 5:
        raise MemoryFault(
            f"gather4 and scatter4 take a column and four rows of a matrix whose box is one row, "
            f"got {len(coordinates)} coordinates and a box of {tensor.box}"
        )
    places = [[coordinates[0], row] for row in coordinates[1:]]
    _check(tensor, places[0], offset)
    return _locate(replace(tensor, box=(tensor.box[0], 4)), offset), places


def gather(tensor: Plan, coordinates: list[int], memory: GlobalMemory, shared: SharedMemory, offset: int) -> int:
    """Copy four rows (coordinates: first column, then each row) to shared memory, one after the other; returns their bytes."""
    index, places = _four(tensor, coordinates, offset)
    shared.scatter(index, offset, np.concatenate([read_box(tensor, place, memory) for place in places]), "TMA load")
    if tensor.padded:
        shared.mark(offset, 4 * tensor.box_bytes)
    return 4 * tensor.counted_bytes


def scatter(tensor: Plan, coordinates: list[int], memory: GlobalMemory, shared: SharedMemory, offset: int) -> None:
    """The reverse; rows beyond the matrix are not written."""
    _check_inside(tensor, coordinates)
    index, places = _four(tensor, coordinates, offset)
    rows = shared.gather(index, offset, "TMA store").reshape(4, 1, tensor.box[0], tensor.element_bytes)
    for place, row in zip(places, rows, strict=True):
        _put(tensor, place, memory, row, None)


def _put(tensor: Plan, coordinates: list[int], memory: GlobalMemory, box: Array, reduction: str | None) -> None:
    """A box (outermost first, then the element's bytes) into the tensor."""
    if tensor.im2col is not None:
        for row, column in _columns(tensor, coordinates, memory, ()):
            if memory.observers:
                memory.observers.write("global", None, column.ctypes.data, _FIRST, len(column))
            new = np.ascontiguousarray(box[row].reshape(-1)[: len(column)])
            column[...] = new if reduction is None else reduce_elements(column.copy(), new, tensor.element, reduction)
        return
    view, where = _clip(_whole_rows(tensor), coordinates, memory)
    if view is None:
        return
    if memory.observers:
        memory.observers.write("global", None, *_runs(view))
    if reduction is None:
        view[...] = box[where]
        return
    old, new = np.ascontiguousarray(view), np.ascontiguousarray(box[where])
    view[...] = reduce_elements(old.reshape(-1), new.reshape(-1), tensor.element, reduction).reshape(view.shape)


def reduce_elements(old: Array, new: Array, element: str, reduction: str) -> Array:
    """Element-wise reduction of two byte arrays holding elements of a TMA element type; returns bytes."""
    floating = element.startswith(("f", "bf", "tf"))
    functions: dict[str, Callable[[Array, Array], Array]] = {
        "add": np.add,
        "min": np.fmin if floating else np.minimum,
        "max": np.fmax if floating else np.maximum,
        "and": np.bitwise_and,
        "or": np.bitwise_or,
        "xor": np.bitwise_xor,
    }
    if reduction == "inc":
        a, b = (x.view(_NUMPY[element]) for x in (old, new))
        return np.where(a >= b, 0, a + 1).astype(a.dtype).view(np.uint8)
    if reduction == "dec":
        a, b = (x.view(_NUMPY[element]) for x in (old, new))
        return np.where((a == 0) | (a > b), b, a - 1).astype(a.dtype).view(np.uint8)
    if reduction not in functions:
        raise UnknownInstruction(f"TMA reduction {reduction!r} is not simulated")
    if element == "bf16":
        return f32_to_bf16(functions[reduction](bf16_to_f32(old.view(np.uint16)), bf16_to_f32(new.view(np.uint16)))).view(
            np.uint8
        )
    if element not in _NUMPY:
        raise UnknownInstruction(f"TMA reduction of element type {element} is not simulated")
    return functions[reduction](old.view(_NUMPY[element]), new.view(_NUMPY[element])).view(np.uint8)


def replace_field(raw: Array, field: str, ordinal: int, value: int) -> None:
    """`tensormap.replace`: change one field of a descriptor given as 128 writable bytes."""
    word = raw.view(np.uint32)
    if field == "global_address":
        word[0], word[1] = value & 0xFFFFFFFF, value >> 32
    elif field == "rank":
        word[2] = (int(word[2]) & ~0x70) | ((value & 7) << 4)
    elif field == "global_dim":
        word[8 + ordinal] = (value - 1) & 0xFFFFFFFF
    elif field == "global_stride":
        units = value >> 4
        word[3 + ordinal] = units & 0xFFFFFFFF
        word[7] = (int(word[7]) & ~(15 << (4 * ordinal)) & 0xFFFFFFFF) | (((units >> 32) & 15) << (4 * ordinal))
    elif field == "box_dim":
        if ordinal == 0:
            word[13] = (int(word[13]) & 0x00FFFFFF) | (((value - 1) & 255) << 24)
        else:
            shift = 8 * (ordinal - 1)
            word[14] = (int(word[14]) & ~(255 << shift) & 0xFFFFFFFF) | (((value - 1) & 255) << shift)
    elif field == "swizzle_mode":
        if value > 3:
            raise UnknownInstruction(f"tensormap.replace: swizzle mode {value} is not simulated")
        word[2] = (int(word[2]) & ~(3 << 13)) | (value << 13)
    elif field == "elemtype":
        if value >= len(_REPLACED):
            raise UnknownInstruction(f"tensormap.replace: element type {value} is not simulated")
        word[2] = (int(word[2]) & ~(15 << 7)) | descriptor.code(_REPLACED[value]) << 7
    elif field == "fill_mode":
        word[2] = (int(word[2]) & ~(1 << 15)) | ((value & 1) << 15)
    else:
        raise UnknownInstruction(f"tensormap.replace of {field} is not simulated")
