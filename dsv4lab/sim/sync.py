"""Synchronisation objects: mbarriers, named barriers, the cluster barrier, and groups of asynchronous operations."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field

from numpy.typing import NDArray

from dsv4lab.sim.errors import BarrierMisuse
from dsv4lab.sim.observe import Deed, Observers, Site

Array = NDArray
HISTORY = 8  # events kept for a barrier's report
TX_LIMIT = (1 << 20) - 1  # bytes an mbarrier can hold outstanding in one phase


class MBarrier:
    """An mbarrier object: a phase completes when no arrival and no byte is outstanding.

    who acts on it is a thread's Site, or the Deed of an asynchronous operation. arrived: how often each instruction of each
    warp arrived or completed bytes here, by (CTA rank, warp, instruction). phases: 1 + the phase's parity, by offset / 8, of
    every mbarrier in the CTA's shared memory; the native core reads it.
    """

    def __init__(self, rank: int, offset: int, count: int, who: Site, observers: Observers, phases: Array) -> None:
        if not 0 < count <= TX_LIMIT:
            raise BarrierMisuse(f"mbarrier.init needs a count from 1 to {TX_LIMIT}, got {count}")
        self.rank = rank
        self.offset = offset
        self.count = count
        self.pending = count
        self.bytes = 0  # may go negative while complete_tx runs ahead of expect_tx
        self.phase = 0  # phases completed so far
        self._phases = phases
        phases[offset >> 3] = 1
        self.observers = observers
        self.arrived: Counter[tuple[int, int, int]] = Counter()
        self._events: deque[tuple[str, int, int, Site | Deed]] = deque([("init({})", count, 0, who)], maxlen=HISTORY)

    @property
    def history(self) -> list[str]:
        """The last events, in words."""
        return [f"{what.format(count, size)} by {who}" for what, count, size, who in self._events]

    def arrive(self, count: int, who: Site | Deed, expect: int = 0) -> None:
        self._count(who)
        self._events.append(("arrive({}, expect {} bytes)" if expect else "arrive({})", count, expect, who))
        if self.observers:
            self.observers.tell("mbarrier_arrive", self.observers.origin(who), self, count, expect)
        self.bytes += expect
        self.pending -= count
        if self.pending < 0:
            raise BarrierMisuse(f"{self}: {-self.pending} more arrivals in one phase than its count")
        self._settle()

    def expect(self, size: int, who: Site | Deed) -> None:
        self._events.append(("expect {1} bytes", 0, size, who))
        if self.observers:
            self.observers.tell("mbarrier_expect", self.observers.origin(who), self, size)
        self.bytes += size
        self._settle()

    def complete(self, size: int, who: Site | Deed) -> None:
        self._count(who)
        self._events.append(("complete {1} bytes", 0, size, who))
        if self.observers:
            self.observers.tell("mbarrier_complete", self.observers.origin(who), self, size)
        self.bytes -= size
        self._settle()

    def _count(self, who: Site | Deed) -> None:
        site = who.site if isinstance(who, Deed) else who
        self.arrived[site.cta.rank, site.warp, site.pc] += 1 if isinstance(who, Deed) else len(who.lanes)

    def defer(self) -> None:
        """One more arrival is owed in this phase (`cp.async.mbarrier.arrive` without `.noinc`)."""
        self.pending += 1

    def passed(self, parity: int) -> bool:
        """Whether the phase with this parity has completed (`try_wait.parity`)."""
        return (self.phase & 1) != (parity & 1)

    def _settle(self) -> None:
        if abs(self.bytes) > TX_LIMIT:
            raise BarrierMisuse(f"{self}: outstanding bytes exceed {TX_LIMIT}")
        if self.pending == 0 and self.bytes == 0:
            self.phase += 1
            self._phases[self.offset >> 3] = 1 + (self.phase & 1)
            self.pending = self.count
            if self.observers:
                self.observers.tell("mbarrier_flip", self, self.phase - 1)

    def __str__(self) -> str:
        return (
            f"mbarrier at CTA {self.rank} +{self.offset}: phase {self.phase} (parity {self.phase & 1}), "
            f"{self.pending} of {self.count} arrivals pending, {self.bytes} bytes outstanding"
        )


@dataclass
class NamedBarrier:
    """State of one of a CTA's 16 named barriers. Threads are counted; a generation ends when all expected have come."""

    number: int
    arrived: int = 0
    expected: int | None = None  # None: every thread of the CTA that has not exited
    generation: int = 0
    votes: list[bool] = field(default_factory=list)
    count: int = 0
    result: tuple[bool, bool, int] = (True, False, 0)  # and, or, popc of the generation that ended last

    def arrive(self, threads: int, expected: int | None, live: int) -> int:
        """Add arrivals; returns the generation they belong to."""
        if self.arrived and expected != self.expected:
            raise BarrierMisuse(
                f"named barrier {self.number}: one warp gives {self.expected or 'all'} threads, another {expected or 'all'}"
            )
        self.expected = expected
        self.arrived += threads
        generation = self.generation
        if expected is not None and self.arrived > expected:
            raise BarrierMisuse(f"named barrier {self.number}: {self.arrived} threads arrived, {expected} expected")
        self.settle(live)
        return generation

    def vote(self, values: list[bool]) -> None:
        self.votes.extend(values)

    def settle(self, live: int) -> None:
        """End the generation if everyone has come; called again when threads exit."""
        needed = live if self.expected is None else self.expected
        if self.arrived and self.arrived >= needed:
            self.result = (all(self.votes), any(self.votes), sum(self.votes))
            self.votes = []
            self.arrived = 0
            self.generation += 1

    def __str__(self) -> str:
        return f"named barrier {self.number}: {self.arrived} of {self.expected or 'all live'} threads arrived"


@dataclass
class ClusterBarrier:
    """`barrier.cluster`: every thread of the cluster that has not exited arrives, then waits."""

    arrived: int = 0
    generation: int = 0

    def arrive(self, threads: int, live: int) -> int:
        generation = self.generation
        self.arrived += threads
        self.settle(live)
        return generation

    def settle(self, live: int) -> None:
        if self.arrived and self.arrived >= live:
            self.arrived = 0
            self.generation += 1

    def __str__(self) -> str:
        return f"cluster barrier: {self.arrived} threads arrived"


@dataclass
class Meeting:
    """An operation that both CTAs of a pair perform together, any number of times."""

    parts: dict[int, deque[Callable[[], None]]] = field(default_factory=dict)  # CTA rank -> its parts that wait for the peer
    arrived: dict[int, int] = field(default_factory=dict)  # CTA rank -> times that it came
    held: int = 0  # times that both had come

    def arrive(self, rank: int, part: Callable[[], None]) -> int:
        """Add a CTA's part; both parts are performed once the peer's is there. Returns which time this is for that CTA."""
        self.parts.setdefault(rank, deque()).append(part)
        self.arrived[rank] = self.arrived.get(rank, 0) + 1
        if len(self.parts) == 2 and all(self.parts.values()):
            for waiting in self.parts.values():
                waiting.popleft()()
            self.held += 1
        return self.arrived[rank]

    def met(self, number: int) -> bool:
        """Whether both CTAs have come that many times."""
        return self.held >= number


@dataclass
class Group:
    """A committed or still open group of asynchronous operations of one thread or warp."""

    outstanding: int = 0


class Groups:
    """`commit_group` and `wait_group` of one issuer."""

    def __init__(self) -> None:
        self.open = Group()
        self.committed: deque[Group] = deque()

    def commit(self) -> None:
        self.committed.append(self.open)
        self.open = Group()

    def done(self, allowed: int) -> bool:
        """Whether at most the `allowed` most recent groups are unfinished."""
        while self.committed and not self.committed[0].outstanding:
            self.committed.popleft()
        return not any(group.outstanding for group in list(self.committed)[: max(len(self.committed) - allowed, 0)])


@dataclass
class Wait:
    """Why lanes cannot go on. `ready` is asked until it holds; then the instruction is repeated, or passed if not `repeat`."""

    kind: str
    what: str
    ready: Callable[[], bool]
    repeat: bool = True
    subject: object = None
    generation: int = -1  # of the named barrier waited for
    timed: bool = False  # try_wait may give up when nothing else in the machine can happen
    expired: bool = False
