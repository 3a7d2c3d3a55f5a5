"""What the warps of `resident` tell each other of a unit: a query's tile of 64 heads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import cutlass.cute as cute

UNITS = 4  # that may be under way: two are attended, one filled, and a neighbour's barrier is still asked
FACTS = 3  # of a unit


@dataclass(frozen=True)
class Units:
    """full, read, done: barriers, one for each of the units under way; facts (UNITS, FACTS) i32 of shared memory: the query's
    place from its sequence's first token in line, the ring's place of its block, its entries.
    """

    full: Any
    read: Any
    done: Any
    facts: Any

    def wait_full(self, unit: Any) -> None:
        _wait(self.full, unit)

    def wait_read(self, unit: Any) -> None:
        _wait(self.read, unit)

    def wait_done(self, unit: Any) -> None:
        _wait(self.done, unit)


def _wait(barriers: Any, unit: Any) -> None:
    cute.arch.mbarrier_wait(barriers + unit % UNITS, unit // UNITS % 2)
