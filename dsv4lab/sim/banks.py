"""Bank conflicts of shared-memory accesses.

Shared memory has 32 banks of 4 bytes; word w lies in bank w mod 32. A bank serves one word at a time, to every lane that asks
for that word. A warp's access is served in phases, so that a phase needs at most 128 bytes: all 32 lanes for elements of up to
4 bytes, half warps for 8 bytes, quarter warps for 16 bytes and for the eight rows of an ldmatrix or stmatrix matrix. A phase
takes as many passes ("wavefronts") as the busiest bank has different words to serve.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dsv4lab.sim.registers import WARP

BANKS = 32
WORD = 4  # bytes
Array = NDArray


@dataclass(frozen=True)
class Passes:
    """What one access of one or more warps costs.

    phases: phases that have an active lane, the least number of passes. passes: what the banks make of it. degree: passes of
    the worst phase; 1 is conflict-free. words: (32,) different words that each bank serves, over all phases.
    """

    phases: int
    passes: int
    degree: int
    words: Array

    @property
    def excess(self) -> int:
        return self.passes - self.phases


def passes(addresses: Array, width: int, lanes: Array | None = None) -> Passes:
    """Passes of an access of `width` bytes a lane at byte `addresses` (n,).

    lanes: (n,) number of each address' lane, counted through several warps if there are several; default 0 .. n - 1.
    For ldmatrix and stmatrix give the row addresses, width 16. Raises ValueError for other widths than 1, 2, 4, 8, 16.
    """
    if width not in (1, 2, 4, 8, 16):
        raise ValueError(f"width must be 1, 2, 4, 8 or 16 bytes, got {width}")
    place = np.asarray(addresses).astype(np.int64)
    lane = np.arange(len(place)) if lanes is None else np.asarray(lanes).astype(np.int64)
    if not len(place):
        return Passes(0, 0, 0, np.zeros(BANKS, np.int64))
    together = WARP * WORD // max(width, WORD)  # lanes of a phase
    phase = lane // together
    word = place // WORD
    if width > WORD:
        extra = np.arange(width // WORD)
        word, phase = (word[:, None] + extra).ravel(), np.repeat(phase, len(extra))
    base = word.min()
    span = int(word.max() - base) + 1
    keys = np.unique(phase * span + (word - base))
    phases, row = np.unique(keys // span, return_inverse=True)
    bank = (keys % span + base) % BANKS
    load = np.bincount(row * BANKS + bank, minlength=len(phases) * BANKS).reshape(-1, BANKS)
    busiest = load.max(axis=1)
    return Passes(len(phases), int(busiest.sum()), int(busiest.max()), load.sum(axis=0))
