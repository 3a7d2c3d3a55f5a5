"""Tensor memory: 128 lanes x 512 columns of 32 bits, its allocator, and the register shapes of tcgen05.ld and st."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from dsv4lab.sim.errors import MemoryFault, ResourceError, UninitializedRead

if TYPE_CHECKING:
    from dsv4lab.sim.observe import Observers
    from dsv4lab.sim.state import Cta

LANES, COLUMNS = 128, 512
MINIMUM = 32  # columns of the smallest allocation
Array = NDArray


@lru_cache(maxsize=1024)
def cell_index(low: int, high: int, columns: int) -> Array:
    """Cells (lane * 512 + column) of lanes low .. high - 1 and the first columns."""
    return (np.arange(low, high)[:, None] * COLUMNS + np.arange(columns)).reshape(-1)


class TensorMemory:
    """One CTA's TMEM."""

    observers: Observers | None = None
    cta: Cta | None = None

    def __init__(self, check_reads: bool, check_columns: bool = True) -> None:
        self.check_reads = check_reads
        self.check_columns = check_columns
        self.owned: dict[int, int] = {}  # first column -> columns
        self.permit = True
        self._cells: Array | None = None
        self._written: Array | None = None

    @property
    def cells(self) -> Array:
        """(128, 512) uint32, made on first use."""
        if self._cells is None:
            self._cells = np.zeros((LANES, COLUMNS), np.uint32)
            self._written = np.zeros((LANES, COLUMNS), bool)
        return self._cells

    def fit(self, columns: int) -> int | None:
        """First column at which `columns` are free, or None while there is no room."""
        if columns < MINIMUM or columns > COLUMNS or columns & (columns - 1):
            raise ResourceError(f"tcgen05.alloc needs a power of two from {MINIMUM} to {COLUMNS} columns, got {columns}")
        start = 0
        for first, count in sorted(self.owned.items()):
            if start + columns <= first:
                break
            start = first + count
        return start if start + columns <= COLUMNS else None

    def allocate(self, start: int, columns: int) -> None:
        if not self.permit:
            raise ResourceError("tcgen05.alloc after relinquish_alloc_permit")
        self.owned[start] = columns
        if self._written is not None:
            self._written[:, start : start + columns] = False

    def free(self, start: int, columns: int) -> None:
        if self.owned.get(start) != columns:
            raise ResourceError(f"tcgen05.dealloc of {columns} columns at {start}, but allocated are {self.owned or 'none'}")
        del self.owned[start]

    def _inside(self, start: int, columns: int, what: str) -> None:
        for first, count in self.owned.items():
            if first <= start and start + columns <= first + count:
                return
        # A range may also span neighbouring allocations.
        held = np.zeros(COLUMNS, bool)
        for first, count in self.owned.items():
            held[first : first + count] = True
        if start < 0 or start + columns > COLUMNS or (self.check_columns and not held[start : start + columns].all()):
            raise MemoryFault(
                f"{what} touches TMEM columns {start} to {start + columns - 1}; allocated are {self.owned or 'none'}"
            )

    def read(self, lanes: slice, start: int, columns: int, what: str) -> Array:
        """A (lanes, columns) view."""
        self._inside(start, columns, what)
        if self.observers:
            self.observers.read("tmem", self.cta, start, cell_index(lanes.start or 0, lanes.stop, columns))
        cells = self.cells[lanes, start : start + columns]
        if self.check_reads and self._written is not None:
            seen = self._written[lanes, start : start + columns]
            if not seen.all():
                lane, column = (int(x) for x in np.argwhere(~seen)[0])
                raise UninitializedRead(
                    f"{what} reads TMEM lane {lane + (lanes.start or 0)}, column {column + start}, never written"
                )
        return cells

    def write(self, lanes: slice, start: int, values: Array, what: str) -> None:
        """Store (lanes, columns) words."""
        columns = values.shape[1]
        self._inside(start, columns, what)
        if self.observers:
            self.observers.write("tmem", self.cta, start, cell_index(lanes.start or 0, lanes.stop, columns))
        self.cells[lanes, start : start + columns] = values
        if self._written is not None:
            self._written[lanes, start : start + columns] = True

    def claim(self, lane: int, start: int, row: Array, column: Array, what: str) -> Array:
        """A writable view of the rectangle that a fragment fills, from `lane` and column `start` on; it counts as written."""
        height, width = int(row.max()) + 1, int(column.max()) + 1
        self._inside(start, width, what)
        if self.observers:
            self.observers.write("tmem", self.cta, lane * COLUMNS + start, _fragment_cells(row, column))
        cells = self.cells[lane : lane + height, start : start + width]
        if self._written is not None:
            self._written[lane : lane + height, start : start + width] = True
        return cells


def _fragment_cells(row: Array, column: Array) -> Array:
    return (row * COLUMNS + column).reshape(-1)


@lru_cache(maxsize=64)
def fragment(shape: str, repeat: int) -> tuple[Array, Array]:
    """TMEM lane and column, relative to the address, of register i of thread t: two (registers, 32) arrays.

    shape is one of 32x32b, 16x64b, 16x128b, 16x256b; the 16-lane shapes interleave threads as matrix fragments do.
    """
    thread = np.arange(32)[None, :]
    if shape == "32x32b":
        item = np.arange(repeat)[:, None]
        lane, column = thread + 0 * item, item + 0 * thread
    elif shape == "16x64b":
        item = np.arange(repeat)[:, None]
        lane, column = thread // 4 + 8 * (thread % 2) + 0 * item, thread % 4 // 2 + 2 * item
    elif shape == "16x128b":
        item = np.arange(2 * repeat)[:, None]
        lane, column = thread // 4 + 8 * (item % 2), thread % 4 + 4 * (item // 2)
    elif shape == "16x256b":
        item = np.arange(4 * repeat)[:, None]
        lane, column = thread // 4 + 8 * (item // 2 % 2), 2 * (thread % 4) + item % 2 + 8 * (item // 4)
    else:
        raise ValueError(f"shape must be 32x32b, 16x64b, 16x128b or 16x256b, got {shape}")
    return lane, column
