"""Data paths of the asynchronous units in C. What C declines, and what observers want to see, goes to the numpy ones."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from dsv4lab.sim import numfmt, operands, tma
from dsv4lab.sim.layouts import SWIZZLE_BITS, MatrixDescriptor, operand_index
from dsv4lab.sim.movers import Movers, scale_table
from dsv4lab.sim.native import library
from dsv4lab.sim.native.core import at
from dsv4lab.sim.registers import Lanes
from dsv4lab.sim.state import Cta
from dsv4lab.sim.tmem import COLUMNS

if TYPE_CHECKING:
    from dsv4lab.sim.machine import Machine
    from dsv4lab.sim.native.core import NativeCore

Array = NDArray
_KINDS = {"f16": 0, "bf16": 1, "tf32": 2, "e4m3": 3, "e5m2": 3, "s8": 3, "u8": 3, "e2m1": 4}  # as in movers.c


@lru_cache(maxsize=64)
def _values(name: str) -> tuple[int, Array]:
    """Operand values by code: (address, array)."""
    codes = np.arange(256, dtype=np.uint8)
    table = operands.values(codes[None, :], name)[0] if name in ("s8", "u8") else numfmt.table(name)
    kept = np.ascontiguousarray(table, np.float32)
    return at(kept), kept


@lru_cache(maxsize=8)
def _factors(name: str) -> tuple[int, Array]:
    kept = np.ascontiguousarray(scale_table(name), np.float32)
    return at(kept), kept


@lru_cache(maxsize=1024)
def _slots(slots: tuple[int, ...]) -> tuple[int, Array]:
    kept = np.array(slots, np.int32)
    return at(kept), kept


@lru_cache(maxsize=1024)
def _index(descriptor: MatrixDescriptor, rows: int, row_bytes: int, element: int) -> tuple[int, Array]:
    kept = operand_index(descriptor, rows, row_bytes, element)
    return at(kept), kept


@lru_cache(maxsize=1024)
def _box(plan: tma.Plan) -> tuple[int, Array] | None:
    """`Box` of movers.c; None for descriptors that numpy must handle."""
    if plan.padded or plan.nan_fill or plan.im2col is not None or any(step != 1 for step in plan.steps):
        return None
    if plan.element in tma.CONVERTED:
        return None
    kept = np.zeros(19, np.int64)
    kept[:4] = plan.address, plan.rank, plan.element_bytes, SWIZZLE_BITS[plan.mode]
    for start, values in ((4, plan.extents), (9, plan.strides), (14, plan.box)):
        kept[start : start + plan.rank] = values
    return at(kept), kept


class NativeMovers(Movers):
    """The same in C."""

    def __init__(self, machine: Machine) -> None:
        super().__init__(machine)
        code = library.load()
        pointer, integer, flag = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
        self._tile = self._declare(code.native_tile, flag, pointer, flag, pointer, integer, integer, flag, pointer, pointer)
        self._scale = self._declare(code.native_scale, None, pointer, *[integer] * 3, pointer, *[integer] * 4, pointer, pointer)
        self._add = self._declare(code.native_accumulate, None, pointer, integer, pointer, integer, pointer, flag)
        self._fragment = self._declare(code.native_fragment, None, pointer, integer, pointer, integer, pointer, pointer, flag)
        self._copy = self._declare(code.native_box, flag, pointer, pointer, integer, pointer, pointer, flag)
        self._places: dict[tuple[int, int], tuple[int, Array, Any]] = {}

    @staticmethod
    def _declare(function: Any, result: Any, *arguments: Any) -> Any:
        function.restype, function.argtypes = result, arguments
        return function

    @property
    def _core(self) -> NativeCore:
        return self.machine.core  # type: ignore[return-value]

    def tile(
        self, cta: Cta, descriptor: MatrixDescriptor, rows: int, depth: int, name: str, mn_major: bool, what: str
    ) -> Array:
        kind = _KINDS.get(name)
        if kind is not None and not self.machine.observers.touches:
            size = operands.BITS[name]
            row_bytes = depth * size // 8
            index, _ = _index(descriptor, rows, row_bytes, size // 8 if mn_major else 0)
            out = np.empty((rows, depth), np.float32)
            table = _values(name)[0] if kind > 2 else None
            shared, count = self._core.shared(cta), rows * row_bytes
            if not self._tile(shared, cta.shared.check_reads, index, count, descriptor.start, kind, table, at(out)):
                return out
        return super().tile(cta, descriptor, rows, depth, name, mn_major, what)

    def scale(self, cta: Cta, tile: Array, block: int, lane: int, column: int, first: int, name: str, what: str) -> Array:
        rows, depth = tile.shape
        cta.tensor.read(slice(lane, lane + 32), column, (rows + 31) // 32, what)  # checks
        out = np.empty((rows, depth), np.float32)
        tile = np.ascontiguousarray(tile)
        cells, factors = at(cta.tensor.cells), _factors(name)[0]
        self._scale(at(tile), rows, depth, block, cells, COLUMNS, lane, column, first, factors, at(out))
        return out

    def accumulate(self, cta: Cta, warp: int, slots: tuple[int, ...], product: Array, add: bool) -> None:
        product = np.ascontiguousarray(product, np.float32)
        self._add(at(cta.registers.addresses), 32 * warp, _slots(slots)[0], product.shape[1], at(product), add)

    def _move(self, w: Lanes, first: int, registers: list[int], cells: Array, index: tuple[Array, Array], store: bool) -> None:
        known = self._places.get((id(index), cells.strides[0]))
        if known is None:
            place = np.ascontiguousarray(index[0] * (cells.strides[0] // 4) + index[1], np.int64)
            known = self._places[id(index), cells.strides[0]] = at(place), place, index
        rows, slots = at(w.cta.registers.addresses), _slots(tuple(registers))[0]
        self._fragment(rows, w.first + first, slots, len(registers), at(cells), known[0], store)

    def load_fragment(self, w: Lanes, first: int, registers: list[int], cells: Array, index: tuple[Array, Array]) -> None:
        self._move(w, first, registers, cells, index, False)

    def store_fragment(self, w: Lanes, first: int, registers: list[int], cells: Array, index: tuple[Array, Array]) -> None:
        self._move(w, first, registers, cells, index, True)

    def _box_in_c(self, plan: tma.Plan, place: list[int], cta: Cta, offset: int, store: bool) -> bool:
        if self.machine.observers or offset % tma.SHARED_ALIGNMENT or len(place) != plan.rank or not tma.aligned(plan, place):
            return False
        if store and (min(place) < 0 or not tma.whole(plan)):
            return False
        box = _box(plan)
        if box is None:
            return False
        start = np.array(plan.start(place), np.int64)
        core = self._core
        return not self._copy(core.cta(cta), core.shared(cta), offset, box[0], at(start), store)

    def load_box(self, plan: tma.Plan, at: list[int], cta: Cta, offset: int, shift: Sequence[int] = ()) -> int:
        if self._box_in_c(plan, at, cta, offset, False):
            return plan.counted_bytes
        return super().load_box(plan, at, cta, offset, shift)

    def store_box(self, plan: tma.Plan, at: list[int], cta: Cta, offset: int, reduction: str | None) -> None:
        if reduction is not None or not self._box_in_c(plan, at, cta, offset, True):
            super().store_box(plan, at, cta, offset, reduction)
