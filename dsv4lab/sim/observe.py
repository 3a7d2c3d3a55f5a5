"""What an observer of a launch is told: every memory access, barrier event, fence and asynchronous operation, in order.

    class Counter(Observer):
        wants = frozenset({"access"})
        def access(self, access): ...

    machine.observers.append(Counter())

A machine without observers pays one test of an empty list for each event. Warps that run in step are told apart: every event
names one warp. `machine.step` (warp-instructions executed so far) places an event in time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dsv4lab.sim.registers import WARP

if TYPE_CHECKING:
    from dsv4lab.sim.machine import Machine
    from dsv4lab.sim.registers import Lanes
    from dsv4lab.sim.state import Cluster, Cta
    from dsv4lab.sim.sync import ClusterBarrier, MBarrier, NamedBarrier, Wait

Array = NDArray


class Site(NamedTuple):
    """An instruction that a warp executes. pc: its index; lanes: its active lanes (0 .. 31), ascending."""

    cta: Cta
    warp: int
    pc: int
    lanes: tuple[int, ...] = tuple(range(WARP))

    @property
    def lane(self) -> int:
        return self.lanes[0]

    def __str__(self) -> str:
        return f"CTA {self.cta.rank} warp {self.warp}" + (f" lane {self.lane}" if len(self.lanes) == 1 else "")


class Deed(NamedTuple):
    """What an asynchronous operation does to an mbarrier, for the barrier's history. site: the instruction that issued it."""

    kind: str
    site: Site

    def __str__(self) -> str:
        return f"{self.kind} of {self.site}"


class Order(NamedTuple):
    """Memory order and scope of an access or fence, as the opcode says; "weak" and "" where it says nothing."""

    name: str = "weak"
    scope: str = ""


class Access(NamedTuple):
    """Generic-proxy loads and stores of one warp by one instruction.

    space: "global", "shared" or "local". addresses: uint64, the first byte of each of the accesses: a global address,
    rank << 24 | offset of the shared byte, or an offset into the CTA's local memory. lanes: the lane of each. bytes: of each.
    kind: "read", "write" or "atomic". A write is told before memory changes.
    """

    site: Site
    space: str
    kind: str
    addresses: Array
    lanes: Array
    bytes: int
    order: Order
    values: Array | None = None  # of ordinary stores: (accesses,) or (accesses, n) unsigned elements


class Fence(NamedTuple):
    """fence and membar. proxy: "" for a memory fence, else what `fence.proxy` names ("async", "tensormap::generic", ...)."""

    proxy: str
    order: Order
    spaces: tuple[str, ...] = ()  # a proxy fence limited to "global", "shared::cta"


class Touch(NamedTuple):
    """Bytes that an asynchronous operation reads or writes: `width` of them from every base + offset.

    space: "shared" (offsets: bytes of owner's shared memory), "tmem" (lane * 512 + column, 32-bit cells) or "global".
    offsets of shared memory and TMEM mostly come from a cache, so that the array's identity may serve as a key. A TMA
    descriptor in global memory that an operation reads has the space "tensormap".
    """

    space: str
    owner: Cta | None
    base: int
    offsets: Array
    width: int = 1

    @property
    def bytes(self) -> int:
        return int(self.offsets.size) * self.width * (4 if self.space == "tmem" else 1)


@dataclass(eq=False, slots=True)
class Operation:
    """An asynchronous operation, from its issue to its effect.

    kind: "TMA load", "TMA store", "TMA reduce", "bulk load" (to shared memory), "bulk store", "bulk reduce", "prefetch",
    "cp.async", "cp.async arrival", "st.async", "wgmma", "tcgen05.mma", "tcgen05.cp", "tcgen05.shift", "tcgen05.ld",
    "tcgen05.st", "tcgen05.commit", "clusterlaunchcontrol". serial counts the launch's operations. site: who issued it
    (the last warp to hand in its part, for wgmma). note: coordinates and the like, for people. reads and writes are filled
    when it happens, those of shared memory, TMEM and global memory.
    """

    serial: int
    kind: str
    site: Site
    issued: int  # machine.step
    note: str = ""
    reads: list[Touch] = field(default_factory=list)
    writes: list[Touch] = field(default_factory=list)
    performed: int | None = None  # machine.step
    performer: object = None  # whose method carries it out, for kinds that have one: a tensor core's product

    def __str__(self) -> str:
        return f"{self.kind}{f' {self.note}' if self.note else ''} of {self.site}"


Origin = Site | Operation  # who acts on an mbarrier


class Observer:
    """Handlers of events; each does nothing here. `wants` says which costly events are needed.

    "access": `access`. "touch": the reads and writes of operations. "executed", "followed": `executed`. They are costly, so
    they are told only where wanted.
    """

    wants: frozenset[str] = frozenset()

    # a launch and its parts

    def launch_begin(self, machine: Machine) -> None: ...
    def launch_end(self, machine: Machine) -> None:
        """Not called when the launch fails."""

    def cluster_begin(self, cluster: Cluster) -> None:
        """All warps of its CTAs begin."""

    def cluster_end(self, cluster: Cluster) -> None: ...
    def warp_exit(self, site: Site) -> None:
        """The last lanes of a warp exited."""

    def executed(self, cta: Cta, warp: int, start: int, end: int) -> None:
        """A warp executes instructions start .. end - 1; one that may wait, each time it is tried.

        Told before their events; to those who want it "followed", maybe later than they are executed.
        """

    # memory

    def access(self, access: Access) -> None: ...
    def fence(self, site: Site, fence: Fence) -> None: ...

    # asynchronous operations

    def contributed(self, site: Site, operation: Operation) -> None:
        """A warp handed in its part of a wgmma; `issued` follows when all four have."""

    def issued(self, operation: Operation) -> None: ...
    def performed(self, operation: Operation) -> None: ...
    def commit_group(self, site: Site, kind: str) -> None:
        """kind: "bulk" or "cp.async" (groups of a thread), "wgmma" (groups of a warp)."""

    def wait_group(self, site: Site, kind: str, allowed: int, read: bool) -> None:
        """The wait is over: all but `allowed` groups are done, or (read) have read their sources."""

    def wgmma_fence(self, site: Site) -> None: ...
    def tcgen05_wait(self, site: Site, what: str) -> None:
        """tcgen05.wait::ld or ::st passed; what is "ld" or "st"."""

    def tcgen05_fence(self, site: Site, what: str) -> None:
        """what: "before_thread_sync" or "after_thread_sync"."""

    # barriers. A phase is the number of phases that completed before it.

    def mbarrier_init(self, site: Site, barrier: MBarrier) -> None: ...
    def mbarrier_inval(self, site: Site, barrier: MBarrier) -> None: ...
    def mbarrier_arrive(self, origin: Origin, barrier: MBarrier, count: int, expect: int) -> None:
        """Before it counts, so that `barrier.phase` is the phase it belongs to; likewise for expect and complete."""

    def mbarrier_expect(self, origin: Origin, barrier: MBarrier, size: int) -> None: ...
    def mbarrier_complete(self, origin: Origin, barrier: MBarrier, size: int) -> None: ...
    def mbarrier_flip(self, barrier: MBarrier, phase: int) -> None:
        """That phase completed."""

    def mbarrier_pass(self, site: Site, barrier: MBarrier, phase: int) -> None:
        """A try_wait or test_wait returned true: that phase is over. -1: the one before the first."""

    def barrier_arrive(self, site: Site, barrier: NamedBarrier | ClusterBarrier, generation: int) -> None: ...
    def barrier_pass(self, site: Site, barrier: NamedBarrier | ClusterBarrier, generation: int) -> None: ...
    def warp_sync(self, site: Site) -> None:
        """bar.warp.sync."""

    def griddepcontrol(self, site: Site, what: str) -> None:
        """what: "wait" or "launch_dependents"."""

    # waiting

    def wait_begin(self, site: Site, wait: Wait) -> None:
        """Told again if more lanes of the warp come to wait."""

    def wait_end(self, site: Site, wait: Wait) -> None: ...

    # resources

    def tmem_alloc(self, site: Site, start: int, columns: int) -> None: ...
    def tmem_free(self, site: Site, start: int, columns: int) -> None: ...
    def set_registers(self, site: Site, count: int) -> None:
        """setmaxnreg passed."""


class Observers(list[Observer]):
    """A machine's observers. operation: the asynchronous one that is happening, while there are observers."""

    operation: Operation | None = None
    accesses = False  # whether any wants Access events; so with the reads and writes of operations
    touches = False
    instructions = False  # as they are executed
    follows = False

    def begin(self, machine: Machine) -> None:
        """A launch begins: see what is wanted."""
        self.machine, self.operation, self._serial = machine, None, 0
        wanted = frozenset().union(*(observer.wants for observer in self))
        self.accesses, self.touches, self.instructions = (what in wanted for what in ("access", "touch", "executed"))
        self.follows = self.instructions or "followed" in wanted

    def executed(self, w: Lanes, start: int, end: int) -> None:
        """The warps of a window execute instructions start .. end - 1."""
        if end > start:
            for warp in range(w.warp, w.warp + w.warps):
                self.tell("executed", w.cta, warp, start, end)

    def origin(self, who: Site | Deed) -> Origin:
        """Who acts on an mbarrier: the operation that is happening, or the thread."""
        if self.operation is not None:
            return self.operation
        assert isinstance(who, Site), f"{who} acts on an mbarrier outside of an asynchronous operation"
        return who

    def record(
        self,
        kind: str,
        lanes: Lanes,
        index: int,
        by: Iterable[int] | None = None,
        note: str = "",
        operation: Operation | None = None,
    ) -> Operation:
        """A record of an operation that a warp (its lanes `by`) issues, or `operation` with this warp as its issuer."""
        chosen = range(WARP) if by is None else [int(lane) for lane in by]
        where = Site(lanes.cta, lanes.warp + chosen[0] // WARP, index, tuple(lane % WARP for lane in chosen))
        if operation is not None:
            operation.site = where
            return operation
        self._serial += 1
        return Operation(self._serial, kind, where, self.machine.step, note)

    def start(self, operation: Operation) -> Operation:
        """An operation is issued and happens at once, until `end`."""
        self.tell("issued", operation)
        self.operation = operation
        return operation

    def end(self, operation: Operation) -> None:
        self.operation = None
        operation.performed = self.machine.step
        self.tell("performed", operation)

    def watched(self, effect: Callable[[], None], operation: Operation) -> Callable[[], None]:
        """The effect of an operation that is issued now."""
        operation.performer = getattr(effect, "__self__", None)
        self.tell("issued", operation)

        def run() -> None:
            self.operation = operation
            effect()
            self.end(operation)

        return run

    def stopped(self, w: Lanes, mask: Array | None, index: int, before: Wait | None, result: object) -> None:
        """An instruction that may wait was executed; before: the wait it comes back from."""
        waits = getattr(result, "ready", None) is not None
        if before is not None and not waits:
            self.warps("wait_end", w, mask, index, before)
        elif before is None and waits:
            self.warps("wait_begin", w, mask, index, result)

    def resumed(self, w: Lanes, mask: Array | None, index: int, wait: Wait) -> None:
        """A wait that need not be repeated is over, and its instruction with it."""
        if wait.generation >= 0:
            self.warps("barrier_pass", w, mask, index, wait.subject, wait.generation)
        self.warps("wait_end", w, mask, index, wait)

    def read(self, space: str, owner: Cta | None, base: int, index: Array, width: int = 1) -> None:
        """The operation that is happening, if it is watched, reads these bytes (see Touch)."""
        if self.touches and self.operation is not None:
            self.operation.reads.append(Touch(space, owner, base, index, width))

    def write(self, space: str, owner: Cta | None, base: int, index: Array, width: int = 1) -> None:
        if self.touches and self.operation is not None:
            self.operation.writes.append(Touch(space, owner, base, index, width))

    def tell(self, event: str, *values: Any) -> None:
        for observer in self:
            getattr(observer, event)(*values)

    def warps(self, event: str, w: Lanes, mask: Array | None, index: int, *values: Any) -> None:
        """Tell an event once for each warp with an active lane."""
        for site in sites(w, mask, index):
            for observer in self:
                getattr(observer, event)(site, *values)


_WHOLE = tuple(range(WARP))


def sites(w: Lanes, mask: Array | None, index: int) -> Iterator[Site]:
    """The instruction at `index` as executed by each warp that has an active lane."""
    for position in range(w.warps):
        if mask is None:
            yield Site(w.cta, w.warp + position, index, _WHOLE)
            continue
        lanes = np.flatnonzero(mask[position * WARP : (position + 1) * WARP])
        if len(lanes):
            yield Site(w.cta, w.warp + position, index, tuple(lanes.tolist()))


def site(w: Lanes, lane: int, index: int) -> Site:
    """The instruction as executed by one lane, counted within the window."""
    return Site(w.cta, w.warp + lane // WARP, index, (lane % WARP,))


def accesses(
    w: Lanes,
    lanes: Array,
    index: int,
    space: str,
    kind: str,
    addresses: Array,
    size: int,
    order: Order,
    values: Array | None = None,
) -> Iterator[Access]:
    """One Access for each warp; lanes: the lane, counted within the window, of each address."""
    warps = lanes // WARP
    for position in range(w.warps):
        here = warps == position
        if here.any():
            mine = lanes[here] % WARP
            site = Site(w.cta, w.warp + position, index, tuple(np.unique(mine).tolist()))
            stored = None if values is None else values[here]
            yield Access(site, space, kind, addresses[here], mine, size, order, stored)
