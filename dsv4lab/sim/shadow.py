"""Shadow memory: who wrote each cell last, and who has read it since.

A cell is 4 bytes until something narrower is accessed, then the whole space is kept by the byte: neighbours that share a word
never count as one. TMEM is kept by its 32-bit cells.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dsv4lab.sim.observe import Touch
from dsv4lab.sim.tmem import COLUMNS, LANES

Array = NDArray
_WORD = 4
_SMALL = 128  # cells that are faster to go through in Python
MAX_READERS = 48  # of a cell; older ones are forgotten, which can hide a race but not invent one


def distinct(values: Array) -> Iterable[int]:
    """The different values of an array of cell entries."""
    if values.size <= _SMALL:
        return set(values.ravel().tolist())
    first = values.item(0)
    if (values == first).all():
        return (first,)
    return np.unique(values).tolist()


class Shadow:
    """The cells of one space. writers and readers hold numbers of records and of sets of records (0: none)."""

    def __init__(self, size: int, cell: int = _WORD, shape: tuple[int, int] | None = None) -> None:
        self.cell = cell  # bytes
        self.writers = np.zeros(-(-size // cell) if shape is None else shape, np.int32)
        self.readers = np.zeros_like(self.writers)
        self.guarded: Array | None = None  # whether a cell is part of an mbarrier, once there is one

    def guard(self, offset: int, size: int, live: bool) -> None:
        """Bytes of shared memory become an mbarrier, or are none any more."""
        if self.guarded is None:
            self.guarded = np.zeros(len(self.writers), bool)
        self.guarded[offset // self.cell : (offset + size) // self.cell] = live

    def refine(self) -> None:
        """Go on by the byte."""
        self.writers, self.readers = np.repeat(self.writers, self.cell), np.repeat(self.readers, self.cell)
        self.guarded = None if self.guarded is None else np.repeat(self.guarded, self.cell)
        self.cell = 1

    def lanes(self, offsets: Array, width: int) -> Array:
        """Cells of accesses of `width` bytes at byte offsets (int64), one a lane."""
        if self.cell > 1 and (width % _WORD or int(np.bitwise_or.reduce(offsets)) % _WORD):
            self.refine()
        first, count = (offsets, width) if self.cell == 1 else (offsets >> 2, width >> 2)
        if count == 1:
            return first
        return (first[:, None] + np.arange(count)).reshape(-1)

    def runs(self, offsets: Array, width: int) -> Any:
        """Cells of runs of bytes that do not overlap: a slice where they lie together."""
        if (
            len(offsets) > 1
            and int(offsets[-1]) - int(offsets[0]) == (len(offsets) - 1) * width
            and (np.diff(offsets) == width).all()
        ):
            offsets, width = offsets[:1], width * len(offsets)
        if len(offsets) > 1:
            return self.lanes(offsets, width)
        start = int(offsets[0])
        if self.cell > 1 and (start % _WORD or width % _WORD):
            self.refine()
        return slice(start // self.cell, (start + width) // self.cell)

    def first(self, place: Any, values: Array, entry: int) -> int:
        """The byte offset (TMEM: cell) of the first cell of `place` that holds an entry."""
        numbers = np.arange(self.writers.size).reshape(self.writers.shape)[place]
        return int(numbers[values == entry].min()) * self.cell


class Places:
    """Cells that operations of shared memory and TMEM touch, kept by the identity of the offsets they give."""

    def __init__(self) -> None:
        self._known: dict[tuple[int, int, int], tuple[Array, Any]] = {}

    def shared(self, shadow: Shadow, touch: Touch) -> Any:
        if touch.width > 1 or touch.offsets.size == 1:
            return shadow.runs(touch.offsets + touch.base, touch.width)
        found = self._place(touch, shadow.cell, touch.base % _WORD)
        if found is None:
            shadow.refine()
            found = self._place(touch, 1, 0)
        base = touch.base // shadow.cell
        return slice(found.start + base, found.stop + base) if isinstance(found, slice) else found + base

    def _place(self, touch: Touch, cell: int, misaligned: int) -> Any:
        """Cells relative to the base; None if they need narrower ones."""
        key = (id(touch.offsets), cell, misaligned)
        known = self._known.get(key)
        if known is None:
            whole = np.unique(touch.offsets)
            cells = whole if cell == 1 else np.unique(whole >> 2)
            place: Any = cells
            if cell > 1 and (misaligned or len(whole) != _WORD * len(cells)):
                place = None
            elif int(cells[-1]) - int(cells[0]) + 1 == len(cells):
                place = slice(int(cells[0]), int(cells[-1]) + 1)
            known = self._known[key] = (touch.offsets, place)
        return known[1]

    def tmem(self, touch: Touch) -> tuple[slice, slice] | tuple[Array, Array]:
        """Lanes and columns: a rectangle where they form one."""
        key = (id(touch.offsets), 0, 0)
        known = self._known.get(key)
        if known is None:
            lanes, columns = np.divmod(np.unique(touch.offsets), COLUMNS)
            low, high, left, right = int(lanes.min()), int(lanes.max()) + 1, int(columns.min()), int(columns.max()) + 1
            full = (high - low) * (right - left) == len(lanes)
            place: Any = (low, high, left, right) if full else (lanes, columns)
            known = self._known[key] = (touch.offsets, place)
        lane, column = divmod(touch.base, COLUMNS)
        cells = known[1]
        if len(cells) == 4:
            return slice(cells[0] + lane, cells[1] + lane), slice(cells[2] + column, cells[3] + column)
        return cells[0] + lane, cells[1] + column


def tmem_shadow() -> Shadow:
    return Shadow(LANES * COLUMNS, 1, (LANES, COLUMNS))


class ReaderSets:
    """Sets of readers by number. A reader's later read replaces its earlier one: whoever knows the later one knows both."""

    def __init__(self) -> None:
        self._sets: list[tuple[tuple[object, int], ...]] = [()]  # (reader, record) each
        self._numbers: dict[tuple[tuple[object, int], ...], int] = {(): 0}
        self._added: dict[tuple[int, int], int] = {}

    def __getitem__(self, number: int) -> Iterator[int]:
        return (record for _, record in self._sets[number])

    def add(self, number: int, reader: object, record: int) -> int:
        """The set with one more read."""
        found = self._added.get((number, record))
        if found is None:
            members = tuple(pair for pair in self._sets[number] if pair[0] != reader)[-MAX_READERS + 1 :]
            members += ((reader, record),)
            found = self._numbers.get(members)
            if found is None:
                found = self._numbers[members] = len(self._sets)
                self._sets.append(members)
            self._added[number, record] = found
        return found
