"""Rings of mbarriers: one producer and one consumer role pass a few buffers round and round."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import cutlass.cute as cute
from cutlass import Int64, Uint32


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


def arrive_with(barrier: Any, lane: Any, values: list[Any]) -> None:
    """Lane 0's arrival at `empty`, behind loads of what it frees: with a 32-bit value of each. All lanes of a warp come here.

    ptxas moves an arrival in front of what uses the loaded values, and a bulk copy may then fill bytes that are still being
    read (docs/simulator-fidelity.md). So it takes them: their bits and the lane's number, in lane 0 zeros, go to its address.
    """
    words = [value if isinstance(value, Uint32) else value.bitcast(Uint32) for value in values]
    code = "{ .reg .pred first; .reg .b32 at; setp.eq.u32 first, {$r1}, 0; mov.b32 at, 0;"
    code += "".join(f" or.b32 at, at, {{$r{2 + i}}};" for i in range(len(words)))
    code += " and.b32 at, at, {$r1}; or.b32 at, at, {$r0}; @first mbarrier.arrive.shared.b64 _, [at]; }"
    cute.arch.sync_warp()
    cute.arch.inline_ptx(code, read_only_args=[barrier.toint(), lane, *words])
