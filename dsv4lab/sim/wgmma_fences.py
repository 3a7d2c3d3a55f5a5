"""Whether `wgmma.fence` stands where registers change hands: from ordinary instructions to `wgmma.mma_async`.

Accumulators, and fragments of A in registers, that other instructions read or wrote since the warp's last fence need one before
a `wgmma.mma_async` takes them; so does a warp's first one. Moves only rename: NVVM writes them for values that ptxas leaves in
place, so what they copy keeps its state.
"""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING

from dsv4lab.sim.errors import MissingFence, SimulatorError
from dsv4lab.sim.observe import Observer, Operation, Site
from dsv4lab.sim.program import Register, Vector
from dsv4lab.sim.report import instruction

if TYPE_CHECKING:
    from dsv4lab.sim.machine import Machine
    from dsv4lab.sim.state import Cta

_Effect = tuple[frozenset[int], int, int]  # slots that are accessed; or, if empty, a move's source and target


class WgmmaFences(Observer):
    """Raises MissingFence; with `collect`, goes on and appends each to `findings` once."""

    wants = frozenset({"followed"})

    def __init__(self, collect: bool = False) -> None:
        self.collect = collect
        self.findings: list[SimulatorError] = []
        self._reported: set[int] = set()

    def launch_begin(self, machine: Machine) -> None:
        self.machine = machine
        self._kernel, self._program = machine.launch.kernel, machine.compiled
        self._slots = {name: slot for slot, name in self._program.names.items()}
        self._used = any(i.opcode.startswith("wgmma.mma_async") for i in self._kernel.instructions)
        self._effects: dict[tuple[int, int], list[_Effect]] = {}
        self._accessed: dict[tuple[Cta, int], dict[int, int]] = defaultdict(dict)  # slot -> instruction, since the last fence
        self._fenced: set[tuple[Cta, int]] = set()

    def executed(self, cta: Cta, warp: int, start: int, end: int) -> None:
        if not self._used:
            return
        effects = self._effects.get((start, end))
        if effects is None:
            effects = self._effects[start, end] = [self._effect(pc) for pc in range(start, end)]
        accessed = self._accessed[cta, warp]
        for offset, (slots, source, target) in enumerate(effects):
            if slots:
                accessed.update(dict.fromkeys(slots, start + offset))
            elif source in accessed:
                accessed[target] = accessed[source]
            elif target >= 0:
                accessed.pop(target, None)

    def _effect(self, pc: int) -> _Effect:
        found = self._kernel.instructions[pc]
        nothing: frozenset[int] = frozenset()
        if found.opcode.startswith(("wgmma", "bra")):
            return nothing, -1, -1
        if pc in self._program.moves and found.guard is None and not any(isinstance(o, Vector) for o in found.operands):
            target, source = (self._slots.get(o.name, -1) if isinstance(o, Register) else -1 for o in found.operands)
            return nothing, source, target
        return self._program.touches.get(pc, nothing), -1, -1

    def wgmma_fence(self, site: Site) -> None:
        self._accessed[site.cta, site.warp].clear()
        self._fenced.add((site.cta, site.warp))

    def contributed(self, site: Site, operation: Operation) -> None:
        accessed = self._accessed[site.cta, site.warp]
        if (site.cta, site.warp) not in self._fenced:
            self._found(site, f"the first wgmma of {site} has no wgmma.fence before it")
            return
        for operand in self._kernel.instructions[site.pc].operands[:2]:
            if not isinstance(operand, Vector):
                continue
            for item in operand.items:
                slot = self._slots.get(getattr(item, "name", ""), -1)
                if slot in accessed:
                    before = instruction(self.machine, accessed[slot])
                    message = f"register {item} of a wgmma was touched before, and no wgmma.fence lies between"
                    self._found(site, f"{message}\n  touched at {before}")
                    return

    def _found(self, site: Site, message: str) -> None:
        error = MissingFence(f"{message}\n  missing: wgmma.fence by every warp of the warpgroup")
        if not self.collect:
            raise error
        if site.pc not in self._reported:
            self._reported.add(site.pc)
            error.where = f"  at {instruction(self.machine, site.pc)}"
            self.findings.append(error)
