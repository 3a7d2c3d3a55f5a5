"""Rings of mbarriers: one producer and one consumer role pass a few buffers round and round."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import cutlass.cute as cute
from cutlass import Int64


@dataclass(frozen=True)
class Ring:
    """`count` buffers with two mbarriers each: full (what the consumer waits for) and empty (what the producer waits for).

    Both roles count their own steps from 0; step s uses buffer s % count. The producer's first round finds every buffer empty.
    """

    barriers: Any
    count: int

    @classmethod
    def allocate(cls, memory: Any, count: int) -> Ring:
        """Room for the barriers, from a shared-memory allocator."""
        return cls(memory.allocate_array(Int64, 2 * count), count)

    def init(self, *, full: int, empty: int) -> None:
        """Arrivals that complete a phase. By one warp; a fence and a barrier of the CTA must follow."""
        with cute.arch.elect_one():
            for index in range(self.count):
                cute.arch.mbarrier_init(self.barriers + index, full)
                cute.arch.mbarrier_init(self.barriers + self.count + index, empty)

    def stage(self, step: Any) -> Any:
        return step % self.count

    def full(self, step: Any) -> Any:
        return self.barriers + step % self.count

    def empty(self, step: Any) -> Any:
        return self.barriers + self.count + step % self.count

    def wait_full(self, step: Any) -> None:
        cute.arch.mbarrier_wait(self.full(step), (step // self.count) % 2)

    def wait_empty(self, step: Any) -> None:
        cute.arch.mbarrier_wait(self.empty(step), (step // self.count) % 2 ^ 1)
