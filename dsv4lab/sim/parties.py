"""Who accesses memory, for the race checker: warps, and asynchronous operations with a life of their own."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from dsv4lab.sim.knowledge import Known, Message
from dsv4lab.sim.observe import Operation, Site

PENDING = 1 << 62  # later than any clock
READ, DONE = 1, 3  # bits of an operation: has read its sources; is complete
_GENERIC = ("cp.async", "st.async")  # operations that access memory as ordinary loads and stores do
_TENSOR = ("tcgen05.ld", "tcgen05.st")


@dataclass(slots=True)
class Record:
    """An access of a warp (all those it makes by one instruction at one clock), or the reads or writes of an operation.

    clock: of the warp, or the number of the operation's bit in `Known.done`. strong: atomic, or with a memory order. ended: for
    loads of shared memory, the warp's clock when the value was known to be there, `PENDING` before; else 0. Only it changes.
    """

    cluster: int
    actor: int  # warp of the cluster, -1 for operations
    clock: int
    site: Site
    operation: Operation | None
    kind: str  # "read" or "write"
    proxy: str  # "generic", "async" or "tensor"
    strong: bool = False
    ended: int = 0

    def ended_before(self, known: Known) -> bool:
        """Whether a load's value was there by what is known, not only the load issued."""
        found = known.of(self.cluster)
        return found is not None and bool(found[0][self.actor] >= self.ended)

    def before(self, known: Known) -> bool:
        """Whether it is part of what is known."""
        found = known.of(self.cluster)
        if found is None:
            return False
        return bool(found[0][self.actor] >= self.clock) if self.actor >= 0 else bool((found[1] >> self.clock) & 1)


class _Entry(NamedTuple):
    """An operation in a group of its issuer."""

    bit: int
    lane: int  # the first that issued it
    ordinal: int  # groups committed before it


class Groups:
    """Open and committed groups of one kind, of one warp's threads."""

    def __init__(self) -> None:
        self.commits = [0] * 32
        self.entries: list[_Entry] = []

    def add(self, bit: int, lane: int) -> None:
        self.entries.append(_Entry(bit, lane, self.commits[lane]))

    def commit(self, lanes: tuple[int, ...]) -> None:
        for lane in lanes:
            self.commits[lane] += 1

    def wait(self, lanes: tuple[int, ...], allowed: int, read: bool) -> int:
        """Bits of the operations that a wait for all but `allowed` groups of these lanes covers."""
        bits, left = 0, []
        for entry in self.entries:
            covered = entry.lane in lanes and entry.ordinal < self.commits[entry.lane] - allowed
            if covered:
                bits |= (READ if read else DONE) << entry.bit
            if read or not covered:
                left.append(entry)
        self.entries = left
        return bits


@dataclass
class Actor:
    """A warp. causal: what happened before its present point; fenced: the part that a proxy fence followed; tensormap: the part
    that a tensormap proxy fence of its own followed."""

    cluster: int
    number: int  # in the cluster
    causal: Known
    fenced: Known
    tensormap: Known
    clock: int = 1
    released: Message = field(default_factory=Message)  # at the last fence, for relaxed stores and arrivals
    acquiring: Message = field(default_factory=Message)  # of relaxed loads, for the next fence
    pipe: int = 0  # bits of its tcgen05 products, copies and shifts, which happen in order
    transfers: dict[str, int] = field(default_factory=lambda: {"tcgen05.ld": 0, "tcgen05.st": 0})
    copies: int = 0  # bits of its cp.async
    loading: list[tuple[set[int], int]] = field(default_factory=list)  # registers with what a tcgen05.ld fills, and its bits
    groups: dict[str, Groups] = field(default_factory=lambda: {kind: Groups() for kind in ("bulk", "cp.async", "wgmma")})
    seen: set[int] = field(default_factory=set)  # records found to lie before
    records: dict[tuple[int, str, bool], int] = field(default_factory=dict)  # made at the present clock
    proxy: str = "generic"

    def __post_init__(self) -> None:
        self.causal = self.causal.at(self.number, self.clock)

    def advance(self) -> None:
        """What comes now is not part of the snapshots taken so far."""
        self.clock += 1
        self.causal = self.causal.at(self.number, self.clock)
        self.records.clear()

    def learn(self, message: Message) -> None:
        if message.causal is not None:
            self.causal = self.causal.join(message.causal)
        if message.fenced is not None:
            self.fenced = self.fenced.join(message.fenced)

    def finish(self, bits: int) -> None:
        """Operations are over."""
        self.causal = self.causal.complete(bits)


@dataclass
class Task:
    """An asynchronous operation. It knows what its issuer knew."""

    operation: Operation
    cluster: int
    bit: int
    causal: Known
    fenced: Known
    tensormap: Known
    reader: object = None  # whose later reads subsume this one's
    seen: set[int] = field(default_factory=set)
    records: dict[str, int] = field(default_factory=dict)
    proxy: str = "async"
    strong: bool = False

    def __post_init__(self) -> None:
        kind = self.operation.kind
        self.proxy = "generic" if kind in _GENERIC else "tensor" if kind in _TENSOR else "async"
        self.strong = kind.endswith("reduce")
        site = self.operation.site
        ordered = kind.startswith("tcgen05") or kind == "wgmma"
        self.reader = (kind, self.cluster, site.cta.rank, site.warp) if ordered else self.bit

    def carried(self) -> Message:
        """What its completion carries: its own end, and all that its issuer knew."""
        return Message(self.causal.complete(DONE << self.bit), self.fenced)
