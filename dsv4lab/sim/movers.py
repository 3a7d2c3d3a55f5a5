"""Data paths of the asynchronous units, in numpy: operand tiles, accumulators, tensor boxes, fragments of TMEM.

`native.movers` does the same in C where that is possible, bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from dsv4lab.sim import numfmt, operands, tma
from dsv4lab.sim.layouts import MatrixDescriptor, accumulator_fragment, operand_index
from dsv4lab.sim.registers import WARP, Lanes
from dsv4lab.sim.state import Cta

if TYPE_CHECKING:
    from dsv4lab.sim.machine import Machine

Array = NDArray


class Movers:
    """The reference. what: who moves, for errors."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine

    def tile(
        self, cta: Cta, descriptor: MatrixDescriptor, rows: int, depth: int, name: str, mn_major: bool, what: str
    ) -> Array:
        """A (rows, depth) operand in shared memory as float32. name: its format, as in `operands.BITS`."""
        size = operands.BITS[name]
        padded = name.endswith(".8")  # in shared memory as TMA pads it; the 8-bit containers exist in TMEM only
        whole = -(-rows // 16) * 16 if padded and mn_major else rows  # padding follows 16 elements of the contiguous dimension
        index = operand_index(descriptor, whole, depth * size // 8, size // 8 if mn_major else 0)
        data = cta.shared.gather(index, descriptor.start, what)
        if padded:
            bits = 4 if name == "e2m1.8" else 6
            data = operands.unpack(data.T, bits).T[:rows] if mn_major else operands.unpack(data, bits)
        return operands.values(data, name)

    def scale(self, cta: Cta, tile: Array, block: int, lane: int, column: int, first: int, name: str, what: str) -> Array:
        """A (rows, depth) tile times its block factors: row i's word lies at lane i % 32, column i / 32, one byte a block."""
        rows, depth = tile.shape
        words = cta.tensor.read(slice(lane, lane + 32), column, (rows + 31) // 32, what)
        codes = np.ascontiguousarray(words.T).reshape(-1)[:rows].view(np.uint8).reshape(rows, 4)
        factors = scale_table(name)[codes[:, first : first + depth // block]]
        return (tile.reshape(rows, -1, block) * factors[:, :, None]).reshape(rows, depth)

    def accumulate(self, cta: Cta, warp: int, slots: tuple[int, ...], product: Array, add: bool) -> None:
        """A (64, N) float32 product into the registers of the warpgroup that begins at `warp`."""
        row, column = accumulator_fragment(product.shape[1])
        values = product[row, column]  # (128, N / 2)
        w = cta.lanes(warp, 4)
        for item, slot in enumerate(slots):
            out = w.f[slot]
            out[...] = out + values[:, item] if add else values[:, item]

    def load_fragment(self, w: Lanes, first: int, registers: list[int], cells: Array, index: tuple[Array, Array]) -> None:
        """Cells of TMEM into a warp's registers. first: its first lane in the window; index: row and column in `cells` of
        register j of thread t, (registers, 32) each."""
        part = slice(first, first + WARP)
        for register, value in zip(registers, cells[index], strict=True):
            w.u[register][part] = value

    def store_fragment(self, w: Lanes, first: int, registers: list[int], cells: Array, index: tuple[Array, Array]) -> None:
        """The reverse."""
        cells[index] = np.stack([w.u[r][first : first + WARP] for r in registers])

    def load_box(self, plan: tma.Plan, at: list[int], cta: Cta, offset: int, shift: Sequence[int] = ()) -> int:
        """A tensor's box at coordinates `at` into shared memory at `offset`; returns the bytes it counts for.

        shift: an im2col copy's offsets.
        """
        return tma.load(plan, at, self.machine.memory, cta.shared, offset, shift)

    def store_box(self, plan: tma.Plan, at: list[int], cta: Cta, offset: int, reduction: str | None) -> None:
        tma.store(plan, at, self.machine.memory, cta.shared, offset, reduction)


def scale_table(name: str) -> Array:
    """Scale factors by code; those in E4M3 have no sign."""
    table = numfmt.table(name)
    return np.concatenate([table[:128], table[:128]]) if name == "e4m3" else table
