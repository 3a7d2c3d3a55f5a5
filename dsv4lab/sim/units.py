"""What executes: a warp, or neighbouring warps in step, and its groups of lanes."""

from __future__ import annotations

from dataclasses import dataclass

from numpy.typing import NDArray

from dsv4lab.sim.registers import Lanes
from dsv4lab.sim.sync import Wait

Array = NDArray


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
