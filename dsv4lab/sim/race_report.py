"""Words for races: which two accesses, of which bytes, and what would have ordered them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dsv4lab.sim.errors import BarrierMisuse, DataRace, HazardError, MissingFence
from dsv4lab.sim.memory import Allocation
from dsv4lab.sim.observe import Operation, Origin, Site
from dsv4lab.sim.report import instruction
from dsv4lab.sim.tmem import COLUMNS

if TYPE_CHECKING:
    from dsv4lab.sim.machine import Machine
    from dsv4lab.sim.parties import Record
    from dsv4lab.sim.state import Cta
    from dsv4lab.sim.sync import MBarrier

# What makes the end of an operation known to others.
_ENDS = {
    "TMA load": "a wait on the mbarrier that it completes bytes on",
    "bulk load": "a wait on the mbarrier that it completes bytes on",
    "st.async": "a wait on the mbarrier that it completes bytes on",
    "clusterlaunchcontrol": "a wait on the mbarrier that it completes bytes on",
    "TMA store": "cp.async.bulk.wait_group by the thread that issued it",
    "TMA reduce": "cp.async.bulk.wait_group by the thread that issued it",
    "bulk store": "cp.async.bulk.wait_group by the thread that issued it",
    "bulk reduce": "cp.async.bulk.wait_group by the thread that issued it",
    "cp.async": "cp.async.wait_group, or a wait on an mbarrier with cp.async.mbarrier.arrive, after it",
    "wgmma": "wgmma.wait_group",
    "tcgen05.mma": "a tcgen05.commit after it and a wait on that mbarrier",
    "tcgen05.cp": "a tcgen05.commit after it and a wait on that mbarrier",
    "tcgen05.shift": "a tcgen05.commit after it and a wait on that mbarrier",
    "tcgen05.ld": "tcgen05.wait::ld by the warp that issued it",
    "tcgen05.st": "tcgen05.wait::st by the warp that issued it",
}


def place(where: Any, offset: int) -> str:
    """A cell of shared memory, TMEM or a tensor in words."""
    if isinstance(where, Allocation):
        return where.describe(offset)
    if isinstance(where, tuple):
        lane, column = divmod(offset, COLUMNS)
        return f"TMEM of {where[1].describe()}, lane {lane}, column {column}"
    return str(where.shared.describe(offset))


def _who(site: Site, operation: Operation | None) -> str:
    lane = f" lane {site.lane}" if len(site.lanes) == 1 else ""
    who = f"{site.cta.describe()} warp {site.warp}{lane}"
    return who if operation is None else f"the {operation.kind}{f' {operation.note}' if operation.note else ''} of {who}"


def _line(machine: Machine, label: str, kind: str, site: Site, operation: Operation | None) -> str:
    return f"  {label}: {kind} by {_who(site, operation)}\n    at {instruction(machine, site.pc)}"


def _missing(first: Record, second: Site, operation: Operation | None) -> str:
    follower = "the issuer of the second" if operation is not None else f"warp {second.warp} of {second.cta.describe()}"
    if first.operation is None:
        return f"nothing that {follower} waited for comes after the first access"
    end = _ENDS.get(first.operation.kind, "its completion")
    over = "read its source" if first.kind == "read" else "completed"
    return (
        f"{follower} does not know that the {first.operation.kind} has {over}: that takes {end} "
        "(and a barrier from there, if that is another warp)"
    )


def _two(
    machine: Machine,
    what: str,
    first: tuple[str, Record],
    second: tuple[str, Site],
    operation: Operation | None,
    missing: str,
) -> str:
    """What is wrong, the two accesses by their kinds, and what would order them."""
    (one, record), (other, site) = first, second
    lines = [
        what,
        _line(machine, "one", one, record.site, record.operation),
        _line(machine, "other", other, site, operation),
        f"  missing: {missing}",
    ]
    return "\n".join(lines)


def race(
    machine: Machine, first: Record, second: Site, operation: Operation | None, kind: str, where: Any, offset: int
) -> DataRace:
    what = f"data race on {place(where, offset)}: {first.kind} and {kind} that nothing orders"
    missing = _missing(first, second, operation)
    return DataRace(_two(machine, what, (first.kind, first), (kind, second), operation, missing))


def missing_fence(
    machine: Machine, first: Record, second: Site, operation: Operation | None, kind: str, where: Any, offset: int
) -> MissingFence:
    what = (
        f"missing proxy fence on {place(where, offset)}: written by an ordinary store, then touched by the asynchronous proxy"
    )
    missing = "fence.proxy.async between the two; barriers order them, but not across proxies"
    return MissingFence(_two(machine, what, (first.kind, first), (kind, second), operation, missing))


def early_release(
    machine: Machine, first: Record, second: Site, operation: Operation | None, kind: str, where: Any, offset: int
) -> DataRace:
    what = (
        f"data race on {place(where, offset)}: released while a load of it was under way, then written by an asynchronous copy"
    )
    missing = (
        "an instruction that takes the loaded value before the arrival (a release does not wait for loads, and the "
        "copy does not queue behind them), or fence.proxy.async before it"
    )
    return DataRace(_two(machine, what, (first.kind, first), (kind, second), operation, missing))


def missing_tensormap_fence(
    machine: Machine, first: Record, second: Site, operation: Operation | None, kind: str, where: Any, offset: int
) -> MissingFence:
    what = f"missing tensormap fence on {place(where, offset)}: a TMA descriptor was changed, then used"
    missing = "fence.proxy.tensormap::generic.acquire by the warp that uses the descriptor"
    return MissingFence(_two(machine, what, (first.kind, first), ("descriptor read", second), operation, missing))


def uninitialised_barrier(
    machine: Machine, first: Record, second: Site, operation: Operation | None, barrier: MBarrier
) -> DataRace:
    what = f"data race on {barrier}: nothing orders its initialisation before its use"
    missing = _missing(first, second, operation)
    return DataRace(_two(machine, what, ("mbarrier.init", first), ("use", second), operation, missing))


def overwritten(machine: Machine, site: Site, operation: Operation | None, where: Any, offset: int) -> BarrierMisuse:
    return BarrierMisuse(
        f"the mbarrier at {place(where, offset)} is overwritten without mbarrier.inval\n"
        + _line(machine, "by", "write", site, operation)
    )


def older_phase(machine: Machine, site: Site, barrier: MBarrier, phase: int, by: Origin) -> BarrierMisuse:
    """A wait for a phase by one who does not know of the phase before it, whose last arrival is `by`."""
    who, operation = (by.site, by) if isinstance(by, Operation) else (by, None)
    lines = [
        f"a wait on {barrier} that an older phase may satisfy: it went on after phase {phase}, whose parity is that of "
        f"phase {phase - 2}",
        _line(machine, "wait", "try_wait", site, None),
        _line(machine, f"phase {phase - 1} completed", "last arrival", who, operation),
        f"  missing: warp {site.warp} of {site.cta.describe()} does not know that phase {phase - 1} has completed, by a wait "
        "for it or a barrier behind another's; had it been late, the wait would have ended before",
    ]
    return BarrierMisuse("\n".join(lines))


def exited(machine: Machine, site: Site, cta: Cta) -> HazardError:
    return HazardError(
        f"shared memory of {cta.describe()} accessed by {_who(site, None)} after all threads of that CTA exited\n"
        f"    at {instruction(machine, site.pc)}"
    )
