"""Address spaces: registered global allocations, a CTA's shared memory, local memory and kernel parameters.

Nothing is reachable that was not registered, so a wrong address is an error with a name and an index, never a crash.
Generic addresses tell the spaces apart by window; a shared address is `rank << 24 | offset` with the CTA's rank in its
cluster, which is what `mapa` gives and what two-CTA code masks to reach the leader's barriers.
"""

from __future__ import annotations

import ctypes
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from dsv4lab.sim.errors import MemoryFault, UninitializedRead

if TYPE_CHECKING:
    from dsv4lab.sim.observe import Observers
    from dsv4lab.sim.state import Cta

SHARED_WINDOW = 1 << 48
LOCAL_WINDOW = 1 << 49
PARAM_WINDOW = 1 << 50
WINDOW_BYTES = 1 << 32
RANK_SHIFT = 24  # position of the CTA's rank in a shared address
OFFSET_MASK = (1 << RANK_SHIFT) - 1
SHARED_RESERVED = 1024  # the system's share at the start of the window, as on sm_90 and later

UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
Array = NDArray


class Region:
    """Bytes with a base address, accessed by lanes at once through typed views.

    The base must be a multiple of 32 so that an aligned address is an aligned index.
    """

    def __init__(self, name: str, base: int, data: Array) -> None:
        self.name = name
        self.base = base
        self.data = data
        self.size = len(data)
        self.base_word = np.uint64(base)
        self._views: dict[tuple[int, int], Array] = {}

    def view(self, size: int, count: int) -> Array:
        """The region as elements of `size` bytes, or as rows of `count` of them."""
        key = (size, count)
        found = self._views.get(key)
        if found is None:
            usable = self.size - self.size % (size * count)
            found = self.data[:usable].view(UNSIGNED[size])
            if count > 1:
                found = found.reshape(-1, count)
            self._views[key] = found
        return found

    def describe(self, offset: int) -> str:
        return f"{self.name} + {offset} (of {self.size} bytes)"

    def check(self, offsets: Array, width: int) -> None:
        """Raise for the first lane that is misaligned or out of bounds; offsets are uint64 and may have wrapped."""
        misaligned = np.flatnonzero(offsets & np.uint64(width - 1))
        if len(misaligned):
            offset = int(offsets[misaligned[0]])
            raise MemoryFault(f"misaligned: {width}-byte access at {self.describe(offset)}, address 0x{self.base + offset:x}")
        outside = np.flatnonzero(offsets > np.uint64(max(self.size - width, 0)))
        if len(outside) or self.size < width:
            offset = int(offsets[outside[0]].astype(np.int64)) if len(outside) else 0
            raise MemoryFault(f"out of bounds: {width}-byte access at {self.describe(offset)}")

    def load(self, offsets: Array, size: int, count: int = 1) -> Array:
        """Elements at byte `offsets` (uint64, one a lane): (lanes,) or (lanes, count)."""
        width = size * count
        if int(np.bitwise_or.reduce(offsets)) & (width - 1):
            self.check(offsets, width)
        try:
            # A wrapped (negative) offset stays huge after the shift, so numpy's own bounds check refuses it.
            return self.view(size, count).take((offsets >> np.uint64(width.bit_length() - 1)).view(np.int64), axis=0)
        except IndexError:
            self.check(offsets, width)
            raise

    def store(self, offsets: Array, values: Array, size: int, count: int = 1) -> None:
        width = size * count
        if int(np.bitwise_or.reduce(offsets)) & (width - 1):
            self.check(offsets, width)
        index = (offsets >> np.uint64(width.bit_length() - 1)).view(np.int64)
        if width == 1:
            self.check(offsets, width)
        try:
            self.view(size, count)[index] = values
        except IndexError:
            self.check(offsets, width)
            raise

    def span(self, offset: int, size: int) -> Array:
        """A writable view of `size` bytes."""
        if offset < 0 or offset + size > self.size:
            raise MemoryFault(f"out of bounds: {size} bytes at {self.describe(offset)}")
        return self.data[offset : offset + size]


@dataclass(frozen=True)
class Extent:
    """What an allocation looks like to its owner, for naming an element in an error."""

    shape: tuple[int, ...] = ()
    strides: tuple[int, ...] = ()  # in elements
    element_bytes: int = 1


class Allocation(Region):
    """Global memory owned by the caller (a tensor's storage), named."""

    def __init__(self, name: str, address: int, size: int, extent: Extent | None = None) -> None:
        self.lead = address % 32  # the view starts at an aligned address; these bytes before the tensor are not its own
        raw = (ctypes.c_uint8 * (size + self.lead)).from_address(address - self.lead)
        super().__init__(name, address - self.lead, np.ctypeslib.as_array(raw))
        self.extent: Extent = extent or Extent()

    @property
    def start(self) -> int:
        """The tensor's address."""
        return self.base + self.lead

    @property
    def own(self) -> Array:
        """The tensor's bytes alone. What lies before them is somebody else's, malloc's bookkeeping perhaps."""
        return self.data[self.lead :]

    def describe(self, offset: int) -> str:
        offset -= self.lead
        where = f"{self.name} + {offset} bytes (of {self.size - self.lead})"
        extent = self.extent
        if not extent.shape or len(extent.strides) != len(extent.shape):
            return where
        element = offset // extent.element_bytes
        strides = list(extent.strides)
        index = [0] * len(strides)
        for axis in sorted(range(len(strides)), key=lambda a: -strides[a]):
            if strides[axis] > 0:
                index[axis], element = divmod(element, strides[axis])
        return f"{self.name}[{', '.join(map(str, index))}] of shape {extent.shape}, {where}"

    def check(self, offsets: Array, width: int) -> None:
        before = np.flatnonzero(offsets < np.uint64(self.lead))
        if len(before):
            raise MemoryFault(f"out of bounds: {width}-byte access at {self.describe(int(offsets[before[0]]))}")
        super().check(offsets, width)


class GlobalMemory:
    """The allocations a kernel may touch. Overlapping registrations are allowed when one contains the other."""

    observers: Observers | None = None  # of the machine that runs on it

    def __init__(self) -> None:
        self.allocations: list[Allocation] = []
        self.added: Callable[[Allocation], None] | None = None  # told about allocations registered from now on
        self._starts: list[int] = []

    def add(self, name: str, address: int, size: int, extent: Extent | None = None) -> None:
        """Register `size` bytes of process memory at `address`. The caller keeps them alive."""
        if size <= 0:
            return
        end = address + size
        for known in self.allocations:
            low, high = known.base + known.lead, known.base + known.size
            if low <= address and end <= high:
                return
        self.allocations = [a for a in self.allocations if not (address <= a.base + a.lead and a.base + a.size <= end)]
        self.allocations.append(made := Allocation(name, address, size, extent))
        self.allocations.sort(key=lambda a: a.base + a.lead)
        self._starts = [a.base + a.lead for a in self.allocations]
        if self.added is not None:
            self.added(made)

    def find(self, address: int) -> Allocation:
        """The allocation that holds `address`, or the error that says what lies nearest."""
        position = bisect_right(self._starts, address) - 1
        if position >= 0:
            found = self.allocations[position]
            if address < found.base + found.size:
                return found
        raise MemoryFault(f"address 0x{address:x} belongs to no tensor{self._nearest(address)}")

    def _nearest(self, address: int) -> str:
        if not self.allocations:
            return "; no global memory was registered"
        nearest = min(self.allocations, key=lambda a: min(abs(address - a.base), abs(address - a.base - a.size)))
        return f"; nearest is {nearest.describe(address - nearest.base)}"

    def load(self, addresses: Array, size: int, count: int = 1) -> Array:
        found = self.find(int(addresses[0]))
        offsets = addresses - found.base_word
        try:
            if not found.lead or int(offsets.min()) >= found.lead:
                return found.load(offsets, size, count)
        except MemoryFault:
            if len(addresses) == 1:
                raise
        out = [
            self._one(int(a)).load(addresses[i : i + 1] - self._one(int(a)).base_word, size, count)
            for i, a in enumerate(addresses)
        ]
        return np.concatenate(out)

    def _one(self, address: int) -> Allocation:
        return self.find(address)

    def store(self, addresses: Array, values: Array, size: int, count: int = 1) -> None:
        found = self.find(int(addresses[0]))
        offsets = addresses - found.base_word
        if int(offsets.max()) + size * count <= found.size and (not found.lead or int(offsets.min()) >= found.lead):
            found.store(offsets, values, size, count)
            return
        for lane, address in enumerate(addresses):
            owner = self.find(int(address))
            owner.store(addresses[lane : lane + 1] - owner.base_word, values[lane : lane + 1], size, count)

    def span(self, address: int, size: int) -> Array:
        found = self.find(address)
        return found.span(address - found.base, size)


class SharedMemory(Region):
    """One CTA's shared memory: bytes, and for every 4-byte word whether anything was ever written there."""

    observers: Observers | None = None
    cta: Cta | None = None

    def __init__(self, rank: int, size: int, check_reads: bool) -> None:
        total = SHARED_RESERVED + (size + 127) // 128 * 128
        super().__init__(f"shared memory of CTA {rank} in its cluster", rank << RANK_SHIFT, np.zeros(total, np.uint8))
        self.rank = rank
        self.limit = SHARED_RESERVED + size
        self.check_reads = check_reads
        self.written = np.zeros(total // 4, bool)
        self.phases = np.zeros(total // 8, np.uint8)  # of mbarriers, see MBarrier
        self._written_views = {4: self.written, 8: self.written.view(np.uint16), 16: self.written.view(np.uint32)}
        self._complete = {4: True, 8: 0x0101, 16: 0x01010101}

    def describe(self, offset: int) -> str:
        return f"{self.name} + {offset - SHARED_RESERVED} (of {self.limit - SHARED_RESERVED} bytes)"

    def load(self, offsets: Array, size: int, count: int = 1) -> Array:
        values = super().load(offsets, size, count)
        if self.check_reads:
            width = max(size * count, 4)
            if width <= 16:
                seen = self._written_views[width].take((offsets >> np.uint64(width.bit_length() - 1)).view(np.int64))
                complete = np.bitwise_and.reduce(seen) == self._complete[width]
            else:
                complete = self.written[self._words(offsets, width)].all()
            if not complete:
                self.report_unwritten(offsets, width)
        return values

    def store(self, offsets: Array, values: Array, size: int, count: int = 1) -> None:
        super().store(offsets, values, size, count)
        width = max(size * count, 4)
        if width <= 16:
            self._written_views[width][(offsets >> np.uint64(width.bit_length() - 1)).view(np.int64)] = self._complete[width]
        else:
            self.written[self._words(offsets, width)] = True

    @staticmethod
    def _words(offsets: Array, width: int) -> Array:
        return (offsets.astype(np.int64)[:, None] // 4 + np.arange(width // 4)[None, :]).reshape(-1)

    def report_unwritten(self, offsets: Array, width: int) -> None:
        words = offsets.astype(np.int64)[:, None] // 4 + np.arange(max(width // 4, 1))[None, :]
        lane = int(np.flatnonzero(~self.written[words].all(axis=1))[0])
        raise UninitializedRead(f"{width}-byte read of never-written {self.describe(int(offsets[lane]))}")

    def gather(self, index: Array, start: int, what: str) -> Array:
        """Bytes at `start + index` for an asynchronous reader (TMA, tensor core)."""
        if self.observers:
            self.observers.read("shared", self.cta, start, index)
        place = index + start  # swizzled offsets may be negative, so they count only from the start of shared memory
        try:
            if start < 0 or place.min() < 0:
                raise IndexError
            out = self.data.take(place)
        except IndexError:
            last = start + int(index.max())
            raise MemoryFault(f"out of bounds: {what} reads {self.describe(last)}") from None
        if self.check_reads and not self.written[(index.reshape(-1)[::4] + start) >> 2].all():
            word = index.reshape(-1)[::4] + start
            first = int(word[~self.written[word >> 2]][0])
            raise UninitializedRead(f"{what} reads never-written {self.describe(first)}")
        return out

    def scatter(self, index: Array, start: int, values: Array, what: str) -> None:
        """Bytes written at `start + index` by an asynchronous writer."""
        if self.observers:
            self.observers.write("shared", self.cta, start, index)
        last = start + int(index.max()) if index.size else start
        if start < 0 or last >= self.size:
            raise MemoryFault(f"out of bounds: {what} writes {self.describe(last)}")
        self.data[index + start] = values
        self.written[(index.reshape(-1) + start) >> 2] = True

    def mark(self, offset: int, size: int) -> None:
        self.written[offset // 4 : (offset + size + 3) // 4] = True
