"""The execution of a unit's groups of lanes: blocks of instructions, branches, and instructions that may wait.

This core runs the numpy handlers, one closure an instruction. `native.core` runs most instructions in C and comes here for
the others, a single instruction at a time.
"""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from dsv4lab.sim.decode import ALL_LANES, EXIT, Block
from dsv4lab.sim.errors import HazardError, SimulatorError
from dsv4lab.sim.registers import WARP, Lanes
from dsv4lab.sim.sync import Wait
from dsv4lab.sim.units import Fault, Group, Unit

if TYPE_CHECKING:
    from dsv4lab.sim.machine import Machine

Array = NDArray
_FAR = 1 << 60


class Core:
    """Executes instructions for a machine."""

    name = "numpy"

    def __init__(self, machine: Machine) -> None:
        self.machine = machine

    def begin(self) -> None:
        """A launch begins; its program and its memory are known."""

    def run_group(self, unit: Unit, group: Group, left: int) -> int:
        """Run one group to its next decision; returns what is left of the turn, negative when the unit must give way."""
        blocks, pc, limit = self.machine.compiled.blocks, group.pc, meeting(unit, group)
        while left > 0:
            pc, left = self.execute(unit, group, blocks[pc], left)
            if pc < 0:
                return left
            if pc >= limit:
                break
        group.pc, group.wait = pc, None
        return left

    def execute(self, unit: Unit, group: Group, block: Block, left: int) -> tuple[int, int]:
        """Execute one block. Returns (next instruction, what is left of the turn), (-1, ...) when the group must stop."""
        lanes, mask, stats = unit.lanes, group.mask, self.machine.stats
        if self.machine.observers.follows:
            last = block.end + 1 if block.kind == "branch" else block.end
            self.machine.observers.executed(lanes, block.start, last)
        if block.runs:
            stats.instructions += len(block.runs) * lanes.warps
            if lanes.cta.in_flight:
                self._check_in_flight(block.start, block.start + len(block.runs), lanes)
            steps = iter(block.runs)
            try:
                for step in steps:
                    step(lanes, mask)
            except SimulatorError:
                at = block.start + len(block.runs) - operator.length_hint(steps) - 1
                self.machine.current = Fault(lanes, at, mask)
                raise
        left -= block.whole
        if block.kind == "fall":
            return block.target, left
        if block.kind == "stop":
            done = self._stop(unit, group, block, mask)
            return (block.end + 1, left) if done is None else (-1, left if done else -1)
        stats.instructions += lanes.warps
        if block.guard is None:
            return block.target, left
        p = lanes.u[block.guard]
        if block.negated:
            p = ~p
        if mask is not None:
            p = p & mask
        taken = np.count_nonzero(p)
        if not taken:
            return block.end + 1, left
        if taken == (lanes.n if mask is None else np.count_nonzero(mask)):
            return block.target, left
        group.pc = block.end
        return -1, self._diverge(unit, group, block, p.copy(), left)

    def _diverge(self, unit: Unit, group: Group, block: Block, taken: Array, left: int) -> int:
        """A branch that some lanes take: warps that agree within themselves part ways, else lanes do."""
        lanes = unit.lanes
        if group.mask is None and lanes.warps > 1:
            rows = taken.reshape(lanes.warps, WARP)
            whole = np.asarray(rows.all(axis=1))
            if (whole == rows.any(axis=1)).all():
                parts = self.machine.split(unit, [i for i in range(1, lanes.warps) if whole[i] != whole[i - 1]])
                for part in parts:
                    agreed = bool(whole[part.lanes.warp - lanes.warp])
                    part.groups[0].pc = block.target if agreed else block.end + 1
                return -1
        rest = ~taken if group.mask is None else group.mask & ~taken
        group.pc, group.mask, group.wait = block.end + 1, rest, None
        unit.groups.append(Group(block.target, taken))
        return left

    def _stop(self, unit: Unit, group: Group, block: Block, mask: Array | None) -> bool | None:
        """Execute an instruction that may wait. None: passed; True: the unit goes on elsewhere; False: it gives way."""
        lanes, action, at = unit.lanes, block.action, block.end
        assert action is not None
        if block.guard is not None:
            p = lanes.u[block.guard]
            if block.negated:
                p = ~p
            if mask is not None:
                p = p & mask
            active = np.count_nonzero(p)
            if not active:
                self.machine.stats.instructions += lanes.warps
                if self.machine.observers.follows:
                    self.machine.observers.executed(lanes, at, at + 1)
                return None
            if active != (lanes.n if mask is None else np.count_nonzero(mask)):
                rest = ~p if mask is None else mask & ~p
                waiting = Group(at, p.copy(), group.wait)
                group.pc, group.mask, group.wait = at + 1, rest, None
                unit.groups.append(waiting)
                return True
        if lanes.warps > 1 and action.single:
            group.pc = at
            self.machine.split(unit, list(range(1, lanes.warps)))
            return False
        if mask is not None and action.members is not None and not self._converged(unit, action.members, mask):
            group.pc = at
            if lanes.warps > 1:
                self.machine.split(unit, list(range(1, lanes.warps)))
                return False
            members = action.members
            what = "waits for lanes of its warp that are elsewhere"
            group.wait = Wait("converge", what, lambda: self._joined(unit, group, members))
            return True
        if lanes.cta.in_flight and not action.owner:
            self._check_in_flight(at, at + 1, lanes)
        self.machine.resumed = group.wait if group.wait is not None and group.wait.kind != "converge" else None
        if self.machine.observers.follows:
            self.machine.observers.executed(lanes, at, at + 1)
        try:
            result = action.run(lanes, mask)
        except SimulatorError:
            self.machine.current = Fault(lanes, at, mask)
            raise
        self.machine.stats.instructions += lanes.warps
        if self.machine.observers:
            self.machine.observers.stopped(lanes, mask, at, self.machine.resumed, result)
        self.machine.resumed = None
        if result is None:
            group.wait = None
            return None
        group.pc = at
        if result is EXIT:
            self._exit(unit, group, mask)
            return True
        assert isinstance(result, Wait)
        group.wait = result
        return True

    def _members(self, unit: Unit, slot: int, mask: Array) -> Array:
        """Lanes that must be present, of the warps that have a lane in `mask`."""
        lanes = unit.lanes
        needed = np.ones(lanes.n, bool) if unit.live is None else unit.live
        if slot != ALL_LANES:
            bits = lanes.u[slot]
            first = int(bits[int(mask.argmax())])
            members = ((np.uint32(first) >> np.arange(WARP, dtype=np.uint32)) & np.uint32(1)).astype(bool)
            needed = needed & np.tile(members, lanes.warps)
        present = np.repeat(mask.reshape(lanes.warps, WARP).any(axis=1), WARP)
        return needed & present

    def _converged(self, unit: Unit, slot: int, mask: Array) -> bool:
        return not (self._members(unit, slot, mask) & ~mask).any()

    def _joined(self, unit: Unit, group: Group, slot: int) -> bool:
        """Whether the lanes a parked group waits for have come to its instruction."""
        arrived = np.zeros(unit.lanes.n, bool)
        for other in unit.groups:
            if other.pc == group.pc and other.mask is not None:
                arrived |= other.mask
        assert group.mask is not None
        return self._converged(unit, slot, arrived)

    def _exit(self, unit: Unit, group: Group, mask: Array | None) -> None:
        lanes, cta = unit.lanes, unit.lanes.cta
        gone = np.ones(lanes.n, bool) if mask is None else mask
        live = np.ones(lanes.n, bool) if unit.live is None else unit.live
        left = live & ~gone
        before = np.asarray(live.reshape(-1, WARP).any(axis=1))
        dead = int(np.count_nonzero(before & ~left.reshape(-1, WARP).any(axis=1)))
        unit.live = left
        if self.machine.observers and dead:
            self.machine.observers.warps("warp_exit", lanes, gone, group.pc)
        unit.groups = [g for g in unit.groups if g is not group]
        if not unit.groups:
            self.machine.units.remove(unit)
        cta.retire(int(np.count_nonzero(gone & live)), dead)
        self.machine.progress += 1

    def _check_in_flight(self, start: int, end: int, lanes: Lanes) -> None:
        """Report instructions start .. end - 1 if they touch accumulators of a wgmma that no wait has covered."""
        flying: set[int] = set()
        for warp in range(lanes.warp, lanes.warp + lanes.warps):
            flying |= lanes.cta.in_flight.get(warp, frozenset())
        if not flying:
            return
        for index in range(start, end):
            touched = self.machine.compiled.touches.get(index, frozenset()) & flying
            if not touched:
                continue
            if index in self.machine.compiled.moves:
                for warpgroup in range(lanes.warp // 4, (lanes.warp + lanes.warps + 3) // 4):
                    while ("wgmma", id(lanes.cta), warpgroup) in self.machine.queues:
                        self.machine.perform(("wgmma", id(lanes.cta), warpgroup))
            elif self.machine.checks.in_flight:
                self.machine.current = Fault(lanes, index)
                name = self.machine.compiled.names.get(min(touched), "?")
                raise HazardError(f"register {name} belongs to a wgmma in flight; wgmma.wait_group must come first")


def meeting(unit: Unit, group: Group) -> int:
    """The nearest instruction behind the group's at which another group of the unit stands: the two may meet there."""
    return min((g.pc for g in unit.groups if g is not group and g.pc > group.pc), default=_FAR)
