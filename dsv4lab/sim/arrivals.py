"""Who could still arrive on a barrier that nobody passes: warps with an instruction ahead of them that arrives there."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dsv4lab.sim.program import Instruction
from dsv4lab.sim.sync import ClusterBarrier, MBarrier, NamedBarrier

if TYPE_CHECKING:
    from dsv4lab.sim.decode import Program
    from dsv4lab.sim.machine import Machine
    from dsv4lab.sim.units import Unit

_SHOWN = 6  # instructions and warps that a report lists


def arrives(found: Instruction, barrier: object) -> bool:
    """Whether an instruction is of a kind that arrives, now or when it is done, on such a barrier."""
    parts = found.opcode.split(".")
    if isinstance(barrier, MBarrier):
        return (
            (parts[0] == "mbarrier" and parts[1] in ("arrive", "arrive_drop", "complete_tx"))
            or (parts[0] == "tcgen05" and parts[1] == "commit")
            or found.opcode.startswith("cp.async.mbarrier.arrive")
            or "mbarrier::complete_tx::bytes" in parts
        )
    if parts[0] not in ("bar", "barrier") or "warp" in parts:
        return False
    return ("cluster" in parts and "arrive" in parts) if isinstance(barrier, ClusterBarrier) else "cluster" not in parts


def reachable(program: Program, pc: int) -> list[tuple[int, int]]:
    """Instructions that control flow can lead to from `pc`, itself included, as ranges first .. last."""
    starts = sorted(program.blocks)
    out: list[tuple[int, int]] = []
    seen: set[int] = set()
    todo = [pc]
    while todo:
        at = todo.pop()
        if at in seen:
            continue
        seen.add(at)
        block = program.blocks.get(at)
        if block is None:  # within a block
            inside = [start for start in starts if start < at]
            block = program.blocks[inside[-1]] if inside and program.blocks[inside[-1]].end >= at else None
            if block is None:
                continue
        out.append((at, min(block.end, len(program.kernel.instructions) - 1)))
        if block.kind == "branch":
            todo.append(block.target)
            if block.guard is not None:
                todo.append(block.end + 1)
        elif block.kind == "fall":
            todo.append(block.target)
        elif program.kernel.instructions[block.end].opcode not in ("ret", "exit", "trap") or block.guard is not None:
            todo.append(block.end + 1)
    return out


def candidates(machine: Machine, barrier: object) -> list[str]:
    """Lines for a report: each kind of arrival that a warp which has not exited still has ahead of it.

    For mbarriers that somebody arrived on before, only the instructions that did so count; which barrier others name is not
    known before they run.
    """
    instructions = machine.launch.kernel.instructions
    known = {pc for _, _, pc in barrier.arrived} if isinstance(barrier, MBarrier) else set()
    wanted = sorted(known or {i.index for i in instructions if arrives(i, barrier)})
    lines = []
    for unit in machine.units:
        waits = [group for group in unit.groups if group.wait is not None and group.wait.subject is barrier]
        if waits and isinstance(barrier, NamedBarrier | ClusterBarrier):
            continue  # has arrived
        ahead = sorted(_ahead(machine, unit, wanted, barrier))
        if ahead:
            shown = [f"{instructions[pc].opcode} ({instructions[pc].location or f'instruction {pc}'})" for pc in ahead[:_SHOWN]]
            more = f" and {len(ahead) - _SHOWN} more" if len(ahead) > _SHOWN else ""
            lines.append(f"{_name(unit)}: {'; '.join(shown)}{more}")
    return lines


def _ahead(machine: Machine, unit: Unit, wanted: list[int], barrier: object) -> set[int]:
    found: set[int] = set()
    for group in unit.groups:
        ranges = reachable(machine.compiled, group.pc)
        found |= {pc for pc in wanted if any(first <= pc <= last for first, last in ranges)}
    return found


def _name(unit: Unit) -> str:
    first, count = unit.lanes.warp, unit.lanes.warps
    return f"{unit.lanes.cta.describe()} warp{f's {first}-{first + count - 1}' if count > 1 else f' {first}'}"


def past(machine: Machine, barrier: MBarrier) -> str:
    """Who arrived on an mbarrier so far, whether directly or through operations, and which of them are gone."""
    running = {(u.lanes.cta.rank, w) for u in machine.units for w in range(u.lanes.warp, u.lanes.warp + u.lanes.warps)}
    parts = []
    for rank, warp, pc in sorted(barrier.arrived):
        found = machine.launch.kernel.instructions[pc]
        gone = "" if (rank, warp) in running else ", exited"
        times = barrier.arrived[rank, warp, pc]
        parts.append(f"CTA {rank} warp {warp} {times}x by {found.opcode} ({found.location or f'instruction {pc}'}{gone})")
    return "; ".join(parts[:_SHOWN]) + (f"; and {len(parts) - _SHOWN} more" if len(parts) > _SHOWN else "")
