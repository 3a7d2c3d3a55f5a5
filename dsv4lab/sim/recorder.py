"""Writes the log of a launch while it runs."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from dsv4lab.sim.banks import passes
from dsv4lab.sim.memory import OFFSET_MASK, RANK_SHIFT, SHARED_RESERVED
from dsv4lab.sim.observe import Access, Fence, Observer, Operation, Origin, Site, Touch
from dsv4lab.sim.occupancy import PIECE, Lifetimes
from dsv4lab.sim.sync import ClusterBarrier, MBarrier, NamedBarrier
from dsv4lab.sim.tmem import COLUMNS
from dsv4lab.sim.tracing import EVENT, GROUPS, KIND, WRITERS, BarrierInfo, Conflicts, Moved, OperationInfo, Trace

if TYPE_CHECKING:
    from dsv4lab.sim.machine import Machine
    from dsv4lab.sim.state import Cluster, Cta
    from dsv4lab.sim.sync import Wait

Array = NDArray
_GRANULE = 16  # bytes of shared memory that live and die together
_ACCESS = {"read": 0, "write": 1, "atomic": 2}
_WIDTHS = (1, 2, 4, 8, 16)
_WGMMA = re.compile(r"m64n(\d+)k(\d+)\.\w+\.(\w+)")
_KIND = re.compile(r"kind::(\w+)")
_DEPTH = {"f16": (16, 16), "tf32": (8, 32), "f8f6f4": (32, 8), "i8": (32, 8), "mxf8f6f4": (32, 8)}  # K, bits of an element
_DEPTH |= {"mxf4": (64, 4), "mxf4nvf4": (64, 4)}
_BITS = {"tf32": 32, "e4m3": 8, "e5m2": 8, "s8": 8, "u8": 8}
_TENSOR_CORE = ("wgmma", "tcgen05.mma", "tcgen05.cp", "tcgen05.shift")


class Recorder(Observer):
    """An observer that keeps everything; `traces` has one Trace for each launch that ended.

    ctas: keep only this many of a launch's CTAs, the first ones (a cluster's CTAs should be kept together); None: all.
    After a launch that failed, `trace()` gives what was recorded until then.
    """

    wants = frozenset({"access", "touch", "executed"})

    def __init__(self, ctas: int | None = None) -> None:
        if ctas is not None and ctas < 1:
            raise ValueError(f"ctas must be at least 1, got {ctas}")
        self.limit = 1 << 31 if ctas is None else ctas
        self.traces: list[Trace] = []

    # the launch

    def launch_begin(self, machine: Machine) -> None:
        self.machine = machine
        self._rows: list[tuple[int, ...]] = []
        self._barriers: dict[int, int] = {}
        self._kept: list[object] = []  # barriers and index arrays whose identity is a key
        self._infos: list[BarrierInfo] = []
        self._operations: dict[int, OperationInfo] = {}
        self._conflicts: dict[int, Conflicts] = {}
        self._lives: dict[tuple[str, int], Lifetimes] = {}
        self._shared_bytes = 0
        self._granules: dict[tuple[int, int, int, str], Array] = {}
        self._moved: dict[tuple[int, str], tuple[str, dict[str, int], Array]] = {}  # by the tensor's address and the direction

    def launch_end(self, machine: Machine) -> None:
        self.traces.append(self.trace())

    def trace(self) -> Trace:
        """What was recorded so far: the whole launch, or what came before it failed."""
        events = np.array(self._rows, EVENT) if self._rows else np.zeros(0, EVENT)
        moved = [Moved(name, way, dict(by), int(seen.sum())) for (_, way), (name, by, seen) in self._moved.items()]
        pieces = {key: lives.pieces() for key, lives in self._lives.items()}
        for (memory, cta), rows in pieces.items():
            if memory == "shared" and len(rows):
                rows["low"] = rows["low"] * _GRANULE - SHARED_RESERVED
                rows["high"] = rows["high"] * _GRANULE - SHARED_RESERVED
            pieces[memory, cta] = rows.astype(PIECE)
        return Trace(
            launch=self.machine.launch,
            events=events,
            barrier_infos=tuple(self._infos),
            operations=self._operations,
            conflicts=self._conflicts,
            moved=tuple(moved),
            occupancy=pieces,
            shared_bytes=self._shared_bytes,
            ctas=range(min(int(np.prod(self.machine.launch.grid)), self.limit)),
        )

    def cluster_begin(self, cluster: Cluster) -> None:
        for cta in cluster.ctas:
            if cta.serial >= self.limit:
                continue
            self._shared_bytes = cta.shared.limit - SHARED_RESERVED
            self._lives["shared", cta.serial] = Lifetimes(cta.shared.size // _GRANULE)
            self._lives["tmem", cta.serial] = Lifetimes(COLUMNS)

    def cluster_end(self, cluster: Cluster) -> None:
        for cta in cluster.ctas:
            for memory in ("shared", "tmem"):
                if cta.serial < self.limit:
                    self._lives[memory, cta.serial].end()

    def _log(self, kind: str, site: Site, subject: int = -1, value: int = 0, extra: int = -1) -> None:
        if site.cta.serial >= self.limit:
            return
        self._rows.append((self.machine.step, KIND[kind], site.cta.serial, site.warp, site.pc, subject, value, extra))

    # instructions and accesses

    def executed(self, cta: Cta, warp: int, start: int, end: int) -> None:
        if cta.serial >= self.limit:
            return
        self._rows.append((self.machine.step, KIND["run"], cta.serial, warp, start, -1, end - start, -1))

    def warp_exit(self, site: Site) -> None:
        self._log("exit", site)

    def access(self, access: Access) -> None:
        if access.site.cta.serial >= self.limit:
            return
        size = len(access.addresses) * access.bytes
        extra = -1
        if access.space == "shared":
            extra = self._shared_access(access)
        elif access.space == "global":
            for way in ("read", "written"):
                if access.kind == "atomic" or access.kind[:4] == way[:4]:
                    self._move(np.unique(access.addresses.view(np.int64)), access.bytes, way, "threads")
        self._log(access.space, access.site, _ACCESS[access.kind], size, extra)

    def _shared_access(self, access: Access) -> int:
        offsets = (access.addresses & np.uint64(OFFSET_MASK)).astype(np.int64)
        width = next((w for w in _WIDTHS if w >= access.bytes), 16)
        cost = passes(offsets, width, access.lanes)
        row = self._conflicts.setdefault(access.site.pc, Conflicts(access.site.pc))
        row.executions += 1
        row.phases += cost.phases
        row.passes += cost.passes
        row.degree = max(row.degree, cost.degree)
        row.words += cost.words
        ranks = access.addresses >> np.uint64(RANK_SHIFT)
        for rank in np.unique(ranks):
            cta = access.site.cta.cluster.cta(int(rank))
            mine = offsets[ranks == rank]
            places = np.unique(np.concatenate([mine, mine + access.bytes - 1]) // _GRANULE)
            lives = self._lives.get(("shared", cta.serial))
            if lives is None:
                continue
            if access.kind != "write":
                lives.read(places, self.machine.step)
            if access.kind != "read":
                lives.write(places, self.machine.step, 1 if cta is access.site.cta else 4)
        return cost.passes

    def fence(self, site: Site, fence: Fence) -> None:
        self._log("fence", site)

    # asynchronous operations

    def contributed(self, site: Site, operation: Operation) -> None:
        self._log("contribute", site, operation.serial)

    def issued(self, operation: Operation) -> None:
        site = operation.site
        if site.cta.serial >= self.limit:
            return
        self._operations[operation.serial] = OperationInfo(
            operation.serial, operation.kind, site.cta.serial, site.warp, site.pc, operation.issued, operation.note
        )
        self._log("issue", site, operation.serial)

    def performed(self, operation: Operation) -> None:
        info = self._operations.get(operation.serial)
        if info is None:
            return
        info.performed = self.machine.step
        self._log("perform", operation.site, operation.serial)
        if operation.kind in ("wgmma", "tcgen05.mma"):
            info.macs, info.operand_bits = self._work(operation)
        else:
            info.bytes = _bytes(operation)
        kind = operation.kind
        writer = 2 if kind in _TENSOR_CORE else 3 if kind == "cp.async" else 1 if kind.startswith(("tcgen05", "st")) else 0
        engine = "cp.async" if kind == "cp.async" else "threads" if kind == "st.async" else "TMA"
        seen: set[tuple[int, int]] = set()
        for touches, way in ((operation.reads, "read"), (operation.writes, "written")):
            for touch in touches:
                if touch.space == "global" and (touch.base, len(touch.offsets)) not in seen:  # a multicast reads once
                    seen.add((touch.base, len(touch.offsets)))
                    self._move(touch.offsets.reshape(-1) + touch.base, touch.width, way, engine)
        for touch in operation.reads:
            if self._kept_life(touch):
                self._life(touch).read(self._places(touch), self.machine.step)
        cells = [(touch.owner, self._places(touch)) for touch in operation.reads if touch.space == "tmem"]
        for touch in operation.writes:
            if self._kept_life(touch):
                own = touch.owner is operation.site.cta or kind in _TENSOR_CORE or kind.startswith(("TMA", "bulk"))
                places = self._places(touch)
                if kind == "tcgen05.mma" and any(o is touch.owner and np.array_equal(p, places) for o, p in cells):
                    continue  # an accumulation goes on with what is there
                self._life(touch).write(places, self.machine.step, writer if own else 4)

    def _kept_life(self, touch: Touch) -> bool:
        return touch.space in ("shared", "tmem") and touch.owner is not None and touch.owner.serial < self.limit

    def _life(self, touch: Touch) -> Lifetimes:
        assert touch.owner is not None
        return self._lives[touch.space, touch.owner.serial]

    def _places(self, touch: Touch) -> Array:
        """Granules that a touch covers, ascending; arrays of offsets repeat, so the answer is kept."""
        key = (id(touch.offsets), touch.base, touch.width, touch.space)
        found = self._granules.get(key)
        if found is None:
            at = touch.offsets.reshape(-1) + touch.base
            if touch.space == "tmem":
                found = np.unique(at % COLUMNS)
            else:
                ends = (at, at + touch.width - 1) if touch.width <= _GRANULE else _spread(at, touch.width)
                found = np.unique(np.concatenate(ends) // _GRANULE)
            self._kept.append(touch.offsets)
            self._granules[key] = found
        return found

    def _work(self, operation: Operation) -> tuple[int, int]:
        """Multiply-adds of a matrix product in one CTA, and the bits of an operand's element."""
        opcode = self.machine.launch.kernel.instructions[operation.site.pc].opcode
        if match := _WGMMA.search(opcode):
            return 64 * int(match[1]) * int(match[2]), _BITS.get(match[3], 16)
        kind = _KIND.search(opcode)
        depth, bits = _DEPTH[kind[1]] if kind else (16, 16)
        cells = sum(t.offsets.size for t in operation.writes if t.space == "tmem" and t.owner is operation.site.cta)
        return cells * depth, bits

    def _move(self, addresses: Array, width: int, way: str, engine: str) -> None:
        """Count bytes of global memory: `width` at each address."""
        if not len(addresses):
            return
        owner = self.machine.memory.find(int(addresses[0]))
        inside = (addresses >= owner.base) & (addresses + width <= owner.base + owner.size)
        if not inside.all():
            self._move(addresses[~inside], width, way, engine)
            addresses = addresses[inside]
        found = self._moved.get((owner.base, way))
        if found is None:
            same = sum(name.split(" #")[0] == owner.name and w == way for (_, w), (name, _, _) in self._moved.items())
            name = f"{owner.name} #{same + 1}" if same else owner.name
            found = self._moved[owner.base, way] = (name, {}, np.zeros(owner.size, bool))
        _, by, seen = found
        by[engine] = by.get(engine, 0) + len(addresses) * width
        start = addresses - owner.base
        seen[(start[:, None] + np.arange(width)).reshape(-1) if width > 1 else start] = True

    # groups and barriers

    def commit_group(self, site: Site, kind: str) -> None:
        self._log("commit group", site, GROUPS.index(kind))

    def wait_group(self, site: Site, kind: str, allowed: int, read: bool) -> None:
        self._log("wait group", site, GROUPS.index(kind), allowed, int(read))

    def _barrier(self, barrier: object, site: Site) -> int:
        found = self._barriers.get(id(barrier))
        if found is None:
            found = self._barriers[id(barrier)] = len(self._infos)
            self._kept.append(barrier)
            cta = site.cta.serial
            if isinstance(barrier, MBarrier):
                cta = site.cta.cluster.ctas[barrier.rank].serial
                info = BarrierInfo("mbarrier", cta, barrier.offset, barrier.count, site.pc)
            elif isinstance(barrier, NamedBarrier):
                info = BarrierInfo("named", cta, barrier.number, 0, site.pc)
            else:
                info = BarrierInfo("cluster", site.cta.cluster.ctas[0].serial, 0, 0, site.pc)
            self._infos.append(info)
        return found

    def _act(self, kind: str, origin: Origin, barrier: MBarrier) -> None:
        site = origin.site if isinstance(origin, Operation) else origin
        serial = origin.serial if isinstance(origin, Operation) else -1
        self._log(kind, site, self._barrier(barrier, site), barrier.phase, serial)

    def mbarrier_init(self, site: Site, barrier: MBarrier) -> None:
        self._barrier(barrier, site)

    def mbarrier_arrive(self, origin: Origin, barrier: MBarrier, count: int, expect: int) -> None:
        self._act("arrive", origin, barrier)

    def mbarrier_expect(self, origin: Origin, barrier: MBarrier, size: int) -> None:
        self._act("expect", origin, barrier)

    def mbarrier_complete(self, origin: Origin, barrier: MBarrier, size: int) -> None:
        self._act("complete", origin, barrier)

    def mbarrier_flip(self, barrier: MBarrier, phase: int) -> None:
        number = self._barriers[id(barrier)]
        info = self._infos[number]
        if info.cta < self.limit:
            self._rows.append((self.machine.step, KIND["flip"], info.cta, -1, -1, number, phase, -1))

    def mbarrier_pass(self, site: Site, barrier: MBarrier, phase: int) -> None:
        self._log("pass", site, self._barrier(barrier, site), phase)

    def barrier_arrive(self, site: Site, barrier: NamedBarrier | ClusterBarrier, generation: int) -> None:
        self._log("arrive", site, self._barrier(barrier, site), generation)

    def barrier_pass(self, site: Site, barrier: NamedBarrier | ClusterBarrier, generation: int) -> None:
        self._log("pass", site, self._barrier(barrier, site), generation)

    # waits and resources

    def wait_begin(self, site: Site, wait: Wait) -> None:
        self._log("wait begin", site, self._barriers.get(id(wait.subject), -1))

    def wait_end(self, site: Site, wait: Wait) -> None:
        self._log("wait end", site, self._barriers.get(id(wait.subject), -1))

    def tmem_alloc(self, site: Site, start: int, columns: int) -> None:
        self._log("allocate", site, value=columns, extra=start)

    def tmem_free(self, site: Site, start: int, columns: int) -> None:
        self._log("free", site, value=columns, extra=start)


def _bytes(operation: Operation) -> int:
    """Bytes that a copy moves through its engine: those of one CTA's shared memory, or of global memory."""
    touches = [t for t in (*operation.writes, *operation.reads) if t.space in ("shared", "tmem")]
    if not touches:
        return sum(t.bytes for t in operation.reads)
    first = touches[0]
    return sum(t.bytes for t in touches if t.owner is first.owner and t.space == first.space)


def _spread(at: Array, width: int) -> list[Any]:
    """Byte offsets of runs at steps of a granule, their last byte included."""
    steps = np.minimum(np.arange(0, width + _GRANULE, _GRANULE), width - 1)
    return [(at[:, None] + steps).reshape(-1)]


__all__ = ["WRITERS", "Recorder"]
