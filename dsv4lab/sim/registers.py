"""Registers of a CTA, and windows of them over the lanes of one or more neighbouring warps.

A register is a numpy array over all threads of the CTA and never moves, so typed views of it stay valid. `Lanes` is the
window that instructions work on: one warp, or several that run in step. Handlers write in place, under a mask if given.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from dsv4lab.sim.machine import Cta

WARP = 32
Array = NDArray
WIDTHS = {"pred": 0, "b8": 1, "b16": 2, "b32": 4, "b64": 8, "b128": 16}
STORAGE = {0: np.bool_, 1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


class RegisterFile:
    """Storage of every register slot for `threads` threads; `widths[slot]` is its size in bytes (0: predicate)."""

    def __init__(self, widths: Sequence[int], threads: int) -> None:
        self.widths = tuple(widths)
        self.threads = threads
        counts = {width: self.widths.count(width) for width in set(self.widths)}
        self._blocks: dict[int, Array] = {}
        for width, count in counts.items():
            shape = (count, threads, 2) if width == 16 else (count, threads)
            self._blocks[width] = np.zeros(shape, np.uint64 if width == 16 else STORAGE[width])
        seen = dict.fromkeys(counts, 0)
        self._rows: list[int] = []
        for width in self.widths:
            self._rows.append(seen[width])
            seen[width] += 1
        self._windows: dict[tuple[int, int], dict[str, Views]] = {}

    def window(self, warp: int, warps: int) -> dict[str, Views]:
        """Views of the lanes of some warps, by kind."""
        key = (warp, warps)
        found = self._windows.get(key)
        if found is None:
            low, high = warp * WARP, (warp + warps) * WARP
            found = self._windows[key] = {kind: Views(self, low, high, kind) for kind in "uifhpwb"}
        return found

    def row(self, slot: int) -> Array:
        return self._blocks[self.widths[slot]][self._rows[slot]]

    @cached_property
    def addresses(self) -> Array:
        """Where each slot's row begins in memory."""
        return np.array([self.row(slot).ctypes.data for slot in range(len(self.widths))], np.uint64)

    def digest(self, low: int, high: int) -> int:
        """A number that tells states of the threads low .. high - 1 apart."""
        return hash(tuple(block[:, low:high].tobytes() for block in self._blocks.values()))

    def clear(self) -> None:
        for block in self._blocks.values():
            block.fill(0)


class Views(dict[int, Array]):
    """Slot -> the window's lanes of that register, made on first use."""

    def __init__(self, file: RegisterFile, low: int, high: int, kind: str) -> None:
        super().__init__()
        self._file, self._low, self._high, self._kind = file, low, high, kind

    def __missing__(self, slot: int) -> Array:
        row = self._file.row(slot)[self._low : self._high]
        width = self._file.widths[slot]
        if self._kind == "h":  # float16 values, (lanes, width / 2)
            row = row.view(np.float16).reshape(len(row), -1)
        elif self._kind == "p":  # float32 values, (lanes, width / 4)
            row = row.view(np.float32).reshape(len(row), -1)
        elif self._kind == "w":  # 16-bit words, (lanes, width / 2)
            row = row.view(np.uint16).reshape(len(row), -1)
        elif self._kind == "b":  # bytes, (lanes, width)
            row = row.view(np.uint8).reshape(len(row), -1)
        elif self._kind != "u" and width in (1, 2, 4, 8):
            row = row.view(f"{self._kind}{width}")
        self[slot] = row
        return row


class Lanes:
    """The registers of warps `warp .. warp + warps - 1` of a CTA.

    u, s, f are slot-indexed views of shape (lanes,) as unsigned, signed and float; h, p, w, b are (lanes, parts) views as
    float16, float32, 16-bit words and bytes.
    """

    def __init__(self, cta: Cta, file: RegisterFile, warp: int, warps: int) -> None:
        self.cta = cta
        self.warp = warp
        self.warps = warps
        self.n = warps * WARP
        self.first = warp * WARP
        views = file.window(warp, warps)
        self.u, self.s, self.f = views["u"], views["i"], views["f"]
        self.h, self.p, self.w, self.b = views["h"], views["p"], views["w"], views["b"]

    def active(self, mask: Array | None) -> Array:
        """Indices of the active lanes within this window."""
        return np.arange(self.n) if mask is None else np.flatnonzero(mask)

    def issuers(self, mask: Array | None, slots: Sequence[int]) -> list[int]:
        """The lanes for which an instruction of the copy engine or the tensor core takes effect.

        Such an instruction goes through the warp's uniform path: lanes of a warp that give equal operands issue it once.
        """
        lanes = self.active(mask)
        if len(lanes) == 1:
            return [int(lanes[0])]
        values = np.stack([lanes // WARP, *(self.u[slot][lanes].astype(np.uint64) for slot in slots)], axis=1)
        _, first = np.unique(values, axis=0, return_index=True)
        return [int(lanes[i]) for i in sorted(first)]

    def warps_active(self, mask: Array | None) -> list[tuple[int, int]]:
        """(warp of the CTA, its first active lane within this window) for every warp with an active lane."""
        if mask is None:
            return [(self.warp + i, i * WARP) for i in range(self.warps)]
        rows = mask.reshape(self.warps, WARP)
        return [(self.warp + i, i * WARP + int(row.argmax())) for i, row in enumerate(rows) if row.any()]
