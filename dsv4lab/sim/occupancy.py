"""When each piece of an on-chip memory holds something that is still needed: from a write to the last read before the next."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray
PIECE = np.dtype([("low", "i8"), ("high", "i8"), ("start", "i8"), ("end", "i8"), ("writer", "i4")])


class Lifetimes:
    """Follows a memory of `size` granules through writes and reads. A writer is a small number of the caller's choice."""

    def __init__(self, size: int) -> None:
        self._written = np.full(size, -1, np.int64)
        self._read = np.full(size, -1, np.int64)
        self._writer = np.zeros(size, np.int32)
        self._pieces: list[tuple[int, int, int, int, int]] = []

    def write(self, places: Array, step: int, writer: int) -> None:
        """places: granules, ascending. What was written there and read since is over; what was not read yet grows on."""
        old = places[self._read[places] >= 0]
        self._close(old)
        new = places[self._written[places] < 0]
        self._written[new] = step
        self._writer[places] = writer

    def read(self, places: Array, step: int) -> None:
        self._read[places[self._written[places] >= 0]] = step

    def pieces(self) -> Array:
        """All pieces so far as records of PIECE, low inclusive, high exclusive; an end equal to start means never read."""
        open_now = np.flatnonzero(self._written >= 0)
        rows = [*self._pieces, *self._runs(open_now)]
        return np.array(rows, PIECE)

    def end(self) -> None:
        """Nothing that is held now outlives this moment."""
        self._close(np.flatnonzero(self._written >= 0))

    def _close(self, places: Array) -> None:
        if len(places):
            self._pieces.extend(self._runs(places))
            self._written[places] = self._read[places] = -1

    def _runs(self, places: Array) -> Iterator[tuple[int, int, int, int, int]]:
        """Neighbouring granules with one history are one piece."""
        if not len(places):
            return
        facts = np.stack([places, self._written[places], np.maximum(self._read[places], self._written[places]),
                          self._writer[places]])  # fmt: skip
        breaks = np.flatnonzero((np.diff(facts[0]) != 1) | (np.diff(facts[1:], axis=1) != 0).any(axis=0)) + 1
        for first, last in zip([0, *breaks], [*(breaks - 1), len(places) - 1], strict=True):
            low, start, end, writer = (int(x) for x in facts[:, first])
            yield low, int(facts[0, last]) + 1, start, end, writer


@dataclass(frozen=True)
class Occupancy:
    """Pieces of one memory. unit: what low and high count; size: of the memory; writers: names by number."""

    pieces: Array
    unit: str
    size: int
    writers: tuple[str, ...]

    def at(self, step: int) -> Occupancy:
        """The pieces that hold something still needed after `step` warp-instructions."""
        chosen = self.pieces[(self.pieces["start"] <= step) & (step < self.pieces["end"])]
        return Occupancy(chosen, self.unit, self.size, self.writers)

    @property
    def held(self) -> int:
        """All pieces together, in `unit`."""
        return int((self.pieces["high"] - self.pieces["low"]).sum())

    def most(self) -> tuple[int, int]:
        """(step, held) of the moment at which most is held."""
        if not len(self.pieces):
            return 0, 0
        size = self.pieces["high"] - self.pieces["low"]
        steps, at = np.unique(np.concatenate([self.pieces["start"], self.pieces["end"]]), return_inverse=True)
        held = np.cumsum(np.bincount(at, weights=np.concatenate([size, -size])))
        best = int(np.argmax(held))
        return int(steps[best]), int(held[best])

    def figure(self) -> dict[str, Any]:
        """Arguments of viz.plot_memory_occupancy."""
        scale, unit = (1024, "KiB") if self.unit == "bytes" else (1, self.unit)
        p = self.pieces
        used = sorted(set(p["writer"].tolist()))
        return dict(
            low=p["low"] / scale,
            high=p["high"] / scale,
            start=p["start"],
            end=p["end"],
            kind=np.searchsorted(used, p["writer"]),
            kinds=[self.writers[w] for w in used],
            extent=self.size / scale,
            unit=unit,
        )
