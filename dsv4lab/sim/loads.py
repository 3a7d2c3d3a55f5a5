"""Which of a warp's loads of shared memory have ended, for the race checker.

A load is issued where it stands and ends when its value is there. ptxas lets a release (`SYNCS.ARRIVE`) follow loads without
waiting for them: ordinary stores of others queue behind the loads, but a copy of the asynchronous proxy does not, so bytes that
it overwrites may still be read. A load has ended once

- an instruction that takes or overwrites one of its registers was executed (a `mov` only renames them), or
- one that does so with a later load's registers (loads of a warp end in order), or
- the warp executed `fence.proxy.async`, or arrived at a named or cluster barrier (taken to be safe; not proven).

Blocks of instructions are announced before they are executed, so what was executed is followed by a cursor.
"""

from __future__ import annotations

from dsv4lab.sim.decode import Program
from dsv4lab.sim.parties import PENDING, Actor, Record

_NONE: frozenset[int] = frozenset()


class Loads:
    """Of one warp."""

    def __init__(self, program: Program, actor: Actor) -> None:
        self._program, self._actor = program, actor
        self._pending: list[tuple[set[int], Record]] = []  # registers that hold or will hold the value; oldest first
        self._waited: set[int] = set()  # all of these registers
        self._at = self._until = 0  # the part of the block under way that was not looked at

    def begin(self, start: int, end: int) -> None:
        """The block before is over."""
        if self._pending:
            self._follow(self._until)
        self._at, self._until = start, end

    def issue(self, pc: int, targets: set[int], record: Record) -> None:
        """A load, or another part of the one that was issued last."""
        self.reach(pc)
        if not (self._pending and self._pending[-1][1] is record):
            self._pending.append((targets, record))
            self._waited |= targets
        record.ended = PENDING

    def reach(self, pc: int) -> None:
        """The warp is at `pc`, and has executed what lies before it."""
        if self._pending:
            self._follow(pc + 1)
        self._at = max(self._at, pc + 1)

    def end_all(self) -> None:
        if self._pending:
            self._end(len(self._pending))

    def _follow(self, until: int) -> None:
        touches, moves = self._program.touches, self._program.moves
        for pc in range(self._at, until):
            touched = touches.get(pc, _NONE)
            if self._waited.isdisjoint(touched):
                continue
            if pc in moves:
                self._waited |= touched
            for position in range(len(self._pending) - 1, -1, -1):
                slots = self._pending[position][0]
                if slots.isdisjoint(touched):
                    continue
                if pc in moves:
                    slots.update(touched)
                    continue
                self._end(position + 1)
                break
        self._at = max(self._at, until)

    def _end(self, count: int) -> None:
        for _, record in self._pending[:count]:
            record.ended = self._actor.clock
        del self._pending[:count]
        self._waited = set().union(*(slots for slots, _ in self._pending))
