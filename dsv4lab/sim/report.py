"""Words for what went wrong: the place of a fault, and who waits for what in a deadlock."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from dsv4lab.sim import arrivals
from dsv4lab.sim.registers import WARP
from dsv4lab.sim.startup import capacity
from dsv4lab.sim.sync import ClusterBarrier, MBarrier, NamedBarrier

if TYPE_CHECKING:
    from dsv4lab.sim.machine import Machine
    from dsv4lab.sim.units import Fault, Unit

_TEXT = 160  # characters of a PTX statement that a report shows


def _warps(first: int, count: int) -> str:
    return f"warp {first}" if count == 1 else f"warps {first}-{first + count - 1}"


def instruction(machine: Machine, index: int) -> str:
    """The PTX statement and the Python line it came from."""
    found = machine.launch.kernel.instructions[index]
    text = found.text if len(found.text) <= _TEXT else found.text[: _TEXT - 3] + "..."
    return f"{text}  (instruction {index}, {found.location or 'no source line'})"


def where(machine: Machine, fault: Fault) -> str:
    lanes = fault.lanes
    active = "" if fault.mask is None else f", lanes {_lanes(fault.mask)}"
    return (
        f"  in {machine.launch.kernel.name}, {lanes.cta.describe()}, {_warps(lanes.warp, lanes.warps)}{active}\n"
        f"  at {instruction(machine, fault.index)}\n"
        f"  schedule {machine.schedule}"
    )


def _lanes(mask: np.ndarray) -> str:
    numbers = np.flatnonzero(mask)
    if len(numbers) > 4:
        return f"{numbers[0] % WARP}..{numbers[-1] % WARP} ({len(numbers)} of them)"
    return ", ".join(str(int(n) % WARP) for n in numbers)


def deadlock(machine: Machine, headline: str) -> str:
    """Which warps wait, where and for what; the state of every barrier waited for; and who could still arrive."""
    lines = [f"deadlock in {machine.launch.kernel.name} under schedule {machine.schedule}: {headline}"]
    awaited: dict[int, tuple[object, str]] = {}
    for unit in machine.units:
        for group in unit.groups:
            lanes = "" if group.mask is None else f" lanes {_lanes(group.mask)}"
            reason = group.wait.what if group.wait is not None else "spins"
            lines.append(f"  {unit.lanes.cta.describe()} {_warps(unit.lanes.warp, unit.lanes.warps)}{lanes}: {reason}")
            lines.append(f"    at {instruction(machine, group.pc)}")
            if group.wait is not None and group.wait.subject is not None:
                awaited.setdefault(id(group.wait.subject), (group.wait.subject, unit.lanes.cta.describe()))
    for subject, owner in awaited.values():
        if isinstance(subject, MBarrier):
            lines.append(f"  {subject}")
            lines.append(f"    last events: {'; '.join(subject.history)}")
            lines.append(f"    arrived so far: {arrivals.past(machine, subject) or 'nobody'}")
        elif isinstance(subject, NamedBarrier | ClusterBarrier):
            lines.append(f"  {owner} {subject}")
        able = arrivals.candidates(machine, subject)
        lines.append(f"    could still arrive: {'nobody has such an instruction ahead' if not able else ''}".rstrip())
        lines += [f"      {line}" for line in able]
    if machine.waiting_clusters:
        room = capacity(machine.launch)
        lines.append(f"  not started: {len(machine.waiting_clusters)} clusters of CTAs; a GPU holds {room} of these at once")
    lines.append(f"  {_rest(machine)}")
    return "\n".join(lines)


def _rest(machine: Machine) -> str:
    """Operations in flight, and the warps that are gone."""
    exited = []
    for cluster in machine.clusters:
        for cta in cluster.ctas:
            running = {w for u in machine.units if u.lanes.cta is cta for w in _span(u)}
            gone = sorted(set(range(cta.warps)) - running)
            if gone:
                exited.append(f"{cta.describe()} warps {', '.join(map(str, gone))}")
    pending = sum(len(q) for q in machine.queues.values())
    parts = [f"asynchronous operations in flight: {pending}"]
    if exited:
        parts.append(f"exited already: {'; '.join(exited)}")
    return "; ".join(parts)


def _span(unit: Unit) -> range:
    return range(unit.lanes.warp, unit.lanes.warp + unit.lanes.warps)
