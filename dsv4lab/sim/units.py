"""What executes: a warp, or neighbouring warps in step, and its groups of lanes."""

from __future__ import annotations

from dataclasses import dataclass, field

from numpy.typing import NDArray

from dsv4lab.sim.registers import Lanes
from dsv4lab.sim.sync import Wait

Array = NDArray
_CIRCLE = 64  # turns after which a warp that circles is back in a state it was in before


@dataclass
class Group:
    """Lanes of a unit at one instruction. mask None: all of them."""

    pc: int
    mask: Array | None
    wait: Wait | None = None


@dataclass
class Unit:
    """Warps of a CTA that run in step, as one or more groups of lanes."""

    lanes: Lanes
    groups: list[Group]
    live: Array | None = None  # lanes that have not exited; None: all
    turns: int = 0
    states: set[int] = field(default_factory=set)  # digests of its state at the ends of turns since `since`
    since: int = -1  # the machine's progress when `states` began
    looked: int = 0  # turns at the last look
    circling: bool = False

    def look(self, progress: int) -> None:
        """Note the state at the end of a turn; the same state twice, and nothing happened meanwhile: it waits by polling."""
        if self.turns == self.looked and self.since == progress:
            return
        self.looked = self.turns
        if self.since != progress or len(self.states) > _CIRCLE:
            self.states, self.since, self.circling = set(), progress, False
        places = tuple((group.pc, None if group.mask is None else group.mask.tobytes()) for group in self.groups)
        state = hash((places, self.lanes.cta.registers.digest(self.lanes.first, self.lanes.first + self.lanes.n)))
        self.circling = self.circling or state in self.states
        self.states.add(state)

    def poll(self) -> bool:
        """Whether any group can go on; waits that are over are cleared."""
        for group in self.groups:
            wait = group.wait
            if wait is None or wait.expired or wait.ready():
                return True
        return False


@dataclass
class Fault:
    """Where an error happened, collected for its report."""

    lanes: Lanes
    index: int
    mask: Array | None = None
