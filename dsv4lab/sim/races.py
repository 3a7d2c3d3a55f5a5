"""Data races and missing fences: accesses to the same bytes that nothing orders.

Warps have vector clocks; every asynchronous operation stands alone, and is known to be over only to those who waited for it.
Whatever synchronises (mbarriers, named and cluster barriers, groups, atomics, fences) carries knowledge from one to another.
An access that conflicts with an earlier one that its maker does not know of is a race, whether or not the schedule at hand
makes it visible. CTAs of one launch are ordered by nothing but atomics and cluster barriers.

What a proxy fence followed is tracked separately: an operation of the asynchronous proxy (TMA, tensor cores) must not touch
bytes that ordinary stores wrote without `fence.proxy.async` in between. Bytes that were only read need no such fence before an
operation overwrites them, which pipelines rely on; but the reads must have ended (`loads`): a release that follows a load in
the program does not wait for its value, and what the asynchronous proxy writes does not queue behind it.

A `tcgen05.ld` is over once `tcgen05.wait::ld` or an instruction that takes one of its registers was executed. Stores of one
and the same value may cross, as kernels let several warps write one result.

Not checked: the order of lanes within a warp, and scopes of fences and atomics.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from dsv4lab.sim import race_report
from dsv4lab.sim.errors import SimulatorError
from dsv4lab.sim.knowledge import Barrier, Known, Message
from dsv4lab.sim.loads import Loads
from dsv4lab.sim.memory import OFFSET_MASK, RANK_SHIFT, Allocation
from dsv4lab.sim.observe import Access, Fence, Observer, Operation, Origin, Site, Touch
from dsv4lab.sim.parties import DONE, Actor, Record, Task
from dsv4lab.sim.program import Register
from dsv4lab.sim.shadow import Places, ReaderSets, Shadow, distinct, tmem_shadow

if TYPE_CHECKING:
    from dsv4lab.sim.machine import Machine
    from dsv4lab.sim.state import Cluster, Cta
    from dsv4lab.sim.sync import MBarrier


_MBARRIER_BYTES = 8
_KEPT = 64  # generations of a named barrier after which no warp can still be about to leave one


class RaceChecker(Observer):
    """Raises DataRace or MissingFence at the first race; with `collect`, goes on and appends each to `findings` once."""

    wants = frozenset({"access", "touch", "followed"})

    def __init__(self, collect: bool = False) -> None:
        self.collect = collect
        self.findings: list[SimulatorError] = []
        self._reported: set[tuple[object, ...]] = set()

    # a launch and its parts

    def launch_begin(self, machine: Machine) -> None:
        self.machine = machine
        self._opcodes = [instruction.opcode for instruction in machine.launch.kernel.instructions]
        self._loading = {at for at, opcode in enumerate(self._opcodes) if opcode.startswith(("ld.", "ldmatrix."))}
        self._filled: dict[int, frozenset[int]] = {}  # registers of loads, by instruction
        self._records: list[Record | None] = [None]
        self._readers = ReaderSets()
        self._places = Places()
        self._operations: dict[int, int] = {}  # cluster -> operations so far
        self._actors: dict[tuple[Cta, int], Actor] = {}
        self._loads: dict[tuple[Cta, int], Loads] = {}
        self._tasks: dict[int, Task] = {}  # by serial, until performed
        self._shared: dict[Cta, Shadow] = {}
        self._tmem: dict[Cta, Shadow] = {}
        self._global: dict[int, Shadow] = {}  # by the allocation's address
        self._flags: dict[tuple[object, int], Message] = {}  # what atomics and ordered stores at an address carry
        self._mbarriers: dict[MBarrier, Barrier] = {}
        self._barriers: dict[tuple[int, int], Message] = {}  # named and cluster barriers: (identity, generation)

    def launch_end(self, machine: Machine) -> None:
        self._actors, self._shared, self._tmem, self._global, self._flags, self._loads = {}, {}, {}, {}, {}, {}

    def cluster_begin(self, cluster: Cluster) -> None:
        number = len(self._operations)
        self._operations[number] = 0
        warps = [(cta, warp) for cta in cluster.ctas for warp in range(cta.warps)]
        nothing = Known.nothing(number, len(warps))
        for position, key in enumerate(warps):
            self._actors[key] = Actor(number, position, nothing, nothing, nothing)
            self._loads[key] = Loads(self.machine.compiled, self._actors[key])
        for cta in cluster.ctas:
            self._shared[cta] = Shadow(cta.shared.size)

    def cluster_end(self, cluster: Cluster) -> None:
        for cta in cluster.ctas:
            del self._shared[cta]
            self._tmem.pop(cta, None)
            for warp in range(cta.warps):
                del self._actors[cta, warp], self._loads[cta, warp]
        self._mbarriers = {b: s for b, s in self._mbarriers.items() if s.cta.cluster is not cluster}
        mine = {id(cluster.barrier), *(id(barrier) for cta in cluster.ctas for barrier in cta.named.values())}
        self._barriers = {key: message for key, message in self._barriers.items() if key[0] not in mine}

    # accesses of warps

    def access(self, access: Access) -> None:
        if access.space == "local":
            return
        site, kind = access.site, access.kind
        actor = self._actors[site.cta, site.warp]
        strong = kind == "atomic" or access.order.name != "weak"
        if strong:
            self._acquire(actor, access)
        for shadow, base, addresses, where in self._parts(access):
            place = shadow.lanes((addresses - base).astype(np.int64), access.bytes)
            self._visit(actor, shadow, place, site, kind, strong, where, access)
        if kind == "read" and access.space == "shared" and site.pc in self._loading:
            record = self._records[self._record(actor, site, kind, strong)]
            assert record is not None
            self._loads[site.cta, site.warp].issue(site.pc, self._targets(site.pc), record)
        if strong and kind != "read":
            self._loads[site.cta, site.warp].reach(site.pc)
            self._release(actor, access)

    def _parts(self, access: Access) -> list[tuple[Shadow, np.uint64, Any, Any]]:
        """The spaces that an access reaches: shadow, address of its start, the addresses there, and whose it is."""
        addresses = access.addresses
        out: list[tuple[Shadow, np.uint64, Any, Any]] = []
        if access.space == "shared":
            ranks = addresses >> np.uint64(RANK_SHIFT)
            for rank in distinct(ranks):
                cta = access.site.cta.cluster.cta(int(rank) & 0xFF)
                here = addresses[ranks == rank] & np.uint64(OFFSET_MASK)
                self._alive(access.site, cta)
                here = here[here + np.uint64(access.bytes) <= np.uint64(cta.shared.size)]  # memory itself reports the others
                if len(here):
                    out.append((self._shared[cta], np.uint64(0), here, cta))
            return out
        while len(addresses):
            owner = self.machine.memory.find(int(addresses[0]))
            inside = (addresses >= owner.base_word) & (addresses < np.uint64(owner.base + owner.size))
            out.append((self._shadow_of(owner), owner.base_word, addresses if inside.all() else addresses[inside], owner))
            addresses = addresses[~inside]
        return out

    def _alive(self, site: Site, cta: Cta) -> None:
        if cta is not site.cta and not cta.live_threads:
            self._found(race_report.exited(self.machine, site, cta), (site.pc, "exited"))

    def _shadow_of(self, owner: Allocation) -> Shadow:
        found = self._global.get(owner.base)
        if found is None:
            found = self._global[owner.base] = Shadow(owner.size)
        return found

    def _acquire(self, actor: Actor, access: Access) -> None:
        if access.kind == "write" or not self._flags:
            return
        for address in distinct(access.addresses):
            message = self._flags.get(self._flag(access, address))
            if message is None:
                continue
            if "acq" in access.order.name:
                actor.learn(message)
            else:
                actor.acquiring.merge(message)

    def _release(self, actor: Actor, access: Access) -> None:
        ordered = access.order.name in ("release", "acq_rel")
        message = Message(actor.causal, actor.fenced) if ordered else actor.released
        if message.causal is None:
            return
        for address in distinct(access.addresses):
            self._flags.setdefault(self._flag(access, address), Message()).merge(message)
        if ordered:
            actor.advance()

    @staticmethod
    def _flag(access: Access, address: int) -> tuple[object, int]:
        return (access.site.cta.cluster if access.space == "shared" else None, address)

    def _visit(
        self,
        who: Actor | Task,
        shadow: Shadow,
        place: Any,
        site: Site,
        kind: str,
        strong: bool,
        where: Any,
        access: Access | None = None,
    ) -> None:
        """Check an access against the ones recorded, and record it."""
        if kind == "write" and shadow.guarded is not None and shadow.guarded[place].any():
            operation = who.operation if isinstance(who, Task) else None
            error = race_report.overwritten(
                self.machine, site, operation, where, shadow.first(place, shadow.guarded[place], True)
            )
            self._found(error, (site.pc, "mbarrier"))
        writers = shadow.writers[place]
        seen = who.seen
        for entry in distinct(writers):
            if entry and entry not in seen:
                self._compare(who, entry, site, kind, strong, where, shadow, place, writers == entry, access)
        if kind == "read":
            self._add_reader(who, shadow, place, self._record(who, site, "read", strong), strong)
            return
        readers = shadow.readers[place]
        numbers = [number for number in distinct(readers) if number]
        for number in numbers:
            for entry in self._readers[number]:
                if entry not in seen:
                    self._compare(who, entry, site, kind, strong, where, shadow, place, readers == number, access)
        if numbers:
            shadow.readers[place] = 0
        shadow.writers[place] = self._record(who, site, "write", strong)

    def _add_reader(self, who: Actor | Task, shadow: Shadow, place: Any, record: int, strong: bool) -> None:
        reader = (who.cluster, who.number, strong) if isinstance(who, Actor) else who.reader
        readers = shadow.readers[place]
        numbers = list(distinct(readers))
        if len(numbers) == 1:
            more = self._readers.add(numbers[0], reader, record)
            if more != numbers[0]:
                shadow.readers[place] = more
            return
        changed = readers.copy()
        for number in numbers:
            changed[readers == number] = self._readers.add(number, reader, record)
        shadow.readers[place] = changed

    def _record(self, who: Actor | Task, site: Site, kind: str, strong: bool) -> int:
        if isinstance(who, Actor):
            key = (site.pc, kind, strong)
            found = who.records.get(key)
            if found is None:
                found = who.records[key] = self._new(
                    Record(who.cluster, who.number, who.clock, site, None, kind, "generic", strong)
                )
                who.seen.add(found)
            return found
        made = who.records.get(kind)
        if made is None:
            bit = who.bit + (1 if kind == "write" else 0)
            made = self._new(Record(who.cluster, -1, bit, site, who.operation, kind, who.proxy, strong))
            who.records[kind] = made
            who.seen.add(made)
        return made

    def _new(self, record: Record) -> int:
        self._records.append(record)
        return len(self._records) - 1

    def _compare(
        self,
        who: Actor | Task,
        entry: int,
        site: Site,
        kind: str,
        strong: bool,
        where: Any,
        shadow: Shadow,
        place: Any,
        at: Any,
        access: Access | None,
    ) -> None:
        """Whether a recorded access lies before the one that `who` makes now, as it must."""
        first = self._records[entry]
        assert first is not None
        if first.strong and strong:
            return
        ordered = first.before(who.causal)
        fenced = ended = ordered
        if ordered and first.proxy == "generic" and who.proxy == "async":
            if first.kind == "write":
                fenced = first.before(who.fenced)
            else:
                ended = first.ended_before(who.causal)
        if ordered and fenced and ended:
            who.seen.add(entry)
            return
        if first.kind == "write" and first.operation is None and access is not None and self._changes_nothing(access):
            return
        operation = who.operation if isinstance(who, Task) else None
        offset = shadow.first(place, at, True)
        make = race_report.race if not ordered else race_report.missing_fence if not fenced else race_report.early_release
        self._found(
            make(self.machine, first, site, operation, kind, where, offset), (first.site.pc, site.pc, first.kind, kind, ordered)
        )

    def _changes_nothing(self, access: Access) -> bool:
        """Whether a store writes what is there already, as warps do that all store one uniform value."""
        if access.values is None:
            return False
        stored = np.ascontiguousarray(access.values).view(np.uint8).reshape(len(access.addresses), access.bytes)
        for address, value in zip(access.addresses.tolist(), stored, strict=True):
            if access.space == "shared":
                owner, offset = access.site.cta.cluster.resolve(address)
                there = owner.shared.span(offset, access.bytes)
            else:
                there = self.machine.memory.span(address, access.bytes)
            if not np.array_equal(there, value):
                return False
        return True

    def _found(self, error: SimulatorError, key: tuple[object, ...]) -> None:
        if not self.collect:
            raise error
        if key not in self._reported:
            self._reported.add(key)
            error.where = f"  schedule {self.machine.schedule}"
            self.findings.append(error)

    # asynchronous operations

    def contributed(self, site: Site, operation: Operation) -> None:
        task = self._tasks.get(operation.serial)
        actor = self._actors[site.cta, site.warp]
        self._loads[site.cta, site.warp].reach(site.pc)
        if task is None:
            task = self._start(operation, actor)
        else:
            task.causal, task.fenced = task.causal.join(actor.causal), task.fenced.join(actor.fenced)
        actor.groups["wgmma"].add(task.bit, 0)
        actor.advance()

    def _start(self, operation: Operation, actor: Actor) -> Task:
        bit = 2 * self._operations[actor.cluster]
        self._operations[actor.cluster] += 1
        task = Task(operation, actor.cluster, bit, actor.causal, actor.fenced, actor.tensormap)
        self._tasks[operation.serial] = task
        return task

    def issued(self, operation: Operation) -> None:
        kind, site = operation.kind, operation.site
        if kind in ("wgmma", "prefetch"):
            return
        actor = self._actors[site.cta, site.warp]
        self._loads[site.cta, site.warp].reach(site.pc)
        task = self._start(operation, actor)
        bits = DONE << task.bit
        if kind in actor.transfers:
            if kind == "tcgen05.ld":
                actor.loading.append((self._targets(site.pc), bits))
            task.causal = task.causal.complete(actor.transfers["tcgen05.ld"] | actor.transfers["tcgen05.st"])
            actor.transfers[kind] |= bits
        elif kind.startswith("tcgen05"):
            task.causal = task.causal.complete(actor.pipe)
            actor.pipe |= bits
        elif kind == "cp.async":
            actor.copies |= bits
            actor.groups["cp.async"].add(task.bit, site.lane)
        elif kind == "cp.async arrival":
            task.causal = task.causal.complete(actor.copies)
        elif kind in ("TMA store", "TMA reduce", "bulk store", "bulk reduce"):
            actor.groups["bulk"].add(task.bit, site.lane)
        actor.advance()

    def _targets(self, pc: int) -> set[int]:
        """Slots of the registers that an instruction's first operand names."""
        found = self._filled.get(pc)
        if found is None:
            found = self._filled[pc] = self._named(pc)
        return set(found)

    def _named(self, pc: int) -> frozenset[int]:
        operand = self.machine.launch.kernel.instructions[pc].operands[0]
        names = {item.name for item in getattr(operand, "items", (operand,)) if isinstance(item, Register)}
        program = self.machine.compiled
        return frozenset(slot for slot in program.touches.get(pc, ()) if program.names.get(slot) in names)

    def executed(self, cta: Cta, warp: int, start: int, end: int) -> None:
        """An instruction that takes a register which a tcgen05.ld fills waits for it, even without tcgen05.wait::ld."""
        self._loads[cta, warp].begin(start, end)
        actor = self._actors[cta, warp]
        if not actor.loading:
            return
        program = self.machine.compiled
        for pc in range(start, end):
            touched = program.touches.get(pc, frozenset())
            for load in [load for load in actor.loading if load[0] & touched]:
                if pc in program.moves:  # only renames: the value may still be on its way
                    load[0].update(touched)
                    continue
                actor.loading.remove(load)
                actor.finish(load[1])

    def performed(self, operation: Operation) -> None:
        task = self._tasks.pop(operation.serial, None)
        if task is None:
            return
        for kind, touches in (("read", operation.reads), ("write", operation.writes)):
            for touch in touches:
                self._touch(task, touch, kind)

    def _touch(self, task: Task, touch: Touch, kind: str) -> None:
        site, owner = task.operation.site, touch.owner
        if touch.space == "tensormap":
            self._descriptor(task, touch)
            return
        where: Any = owner
        place: Any
        if touch.space == "global":
            self._touch_global(task, touch, kind)
            return
        if touch.space == "shared":
            assert owner is not None
            self._alive(site, owner)
            shadow = self._shared[owner]
            place = self._places.shared(shadow, touch)
        else:
            assert owner is not None
            shadow = self._tmem.setdefault(owner, tmem_shadow()) if owner not in self._tmem else self._tmem[owner]
            place = self._places.tmem(touch)
            where = ("tmem", owner)
        self._visit(task, shadow, place, site, kind, task.strong, where)

    def _touch_global(self, task: Task, touch: Touch, kind: str) -> None:
        """The lanes of one cp.async may be in several tensors."""
        starts = touch.base + touch.offsets
        while len(starts):
            where = self.machine.memory.find(int(starts[0]))
            inside = (starts >= where.base) & (starts < where.base + where.size)
            shadow = self._shadow_of(where)
            place = shadow.runs((starts if inside.all() else starts[inside]) - where.base, touch.width)
            self._visit(task, shadow, place, task.operation.site, kind, task.strong, where)
            starts = starts[~inside]

    def _descriptor(self, task: Task, touch: Touch) -> None:
        """A TMA descriptor in global memory that this launch wrote needs a fence of the tensormap proxy."""
        owner = self.machine.memory.find(touch.base)
        shadow = self._global.get(owner.base)
        if shadow is None:
            return
        place = shadow.runs(np.array([touch.base - owner.base]), touch.width)
        writers = shadow.writers[place]
        for entry in distinct(writers):
            first = self._records[entry]
            if first is None or first.before(task.tensormap):
                continue
            site, offset = task.operation.site, shadow.first(place, writers, entry)
            make = race_report.missing_tensormap_fence if first.before(task.causal) else race_report.race
            error = make(self.machine, first, site, task.operation, "read", owner, offset)
            self._found(error, (first.site.pc, site.pc, "tensormap"))

    def commit_group(self, site: Site, kind: str) -> None:
        self._actors[site.cta, site.warp].groups[kind].commit(site.lanes)

    def wait_group(self, site: Site, kind: str, allowed: int, read: bool) -> None:
        actor = self._actors[site.cta, site.warp]
        actor.finish(actor.groups[kind].wait(site.lanes, allowed, read))

    def tcgen05_wait(self, site: Site, what: str) -> None:
        actor = self._actors[site.cta, site.warp]
        actor.finish(actor.transfers[f"tcgen05.{what}"])
        if what == "ld":
            actor.loading.clear()

    # barriers and fences

    def tcgen05_fence(self, site: Site, what: str) -> None:
        """Orders tensor operations around a relaxed arrival or wait as other fences do."""
        actor = self._actors[site.cta, site.warp]
        if what == "after_thread_sync":
            actor.learn(actor.acquiring)
        else:
            self._loads[site.cta, site.warp].reach(site.pc)
            actor.released = Message(actor.causal, actor.fenced)
            actor.advance()

    def fence(self, site: Site, fence: Fence) -> None:
        actor = self._actors[site.cta, site.warp]
        if fence.proxy.startswith("async"):
            self._loads[site.cta, site.warp].end_all()
            actor.fenced = actor.fenced.join(actor.causal)
        elif fence.proxy.startswith("tensormap") and fence.order.name != "release":
            actor.tensormap = actor.tensormap.join(actor.causal)
        elif not fence.proxy:
            self._loads[site.cta, site.warp].reach(site.pc)
            if fence.order.name != "release":
                actor.learn(actor.acquiring)
            if fence.order.name != "acquire":
                actor.released = Message(actor.causal, actor.fenced)
        actor.advance()

    def _relaxed(self, site: Site) -> bool:
        return ".relaxed" in self._opcodes[site.pc]

    def mbarrier_init(self, site: Site, barrier: MBarrier) -> None:
        actor = self._actors[site.cta, site.warp]
        place = slice(barrier.offset // 4, barrier.offset // 4 + 2)
        shadow = self._shared[site.cta]
        if shadow.cell == 1:
            place = slice(barrier.offset, barrier.offset + 8)
        shadow.guard(barrier.offset, _MBARRIER_BYTES, False)
        self._visit(actor, shadow, place, site, "write", False, site.cta)
        shadow.guard(barrier.offset, _MBARRIER_BYTES, True)
        self._mbarriers[barrier] = Barrier(site.cta, self._record(actor, site, "write", False))

    def mbarrier_inval(self, site: Site, barrier: MBarrier) -> None:
        cta = self._use(self._actors[site.cta, site.warp], barrier, site).cta
        self._shared[cta].guard(barrier.offset, _MBARRIER_BYTES, False)
        del self._mbarriers[barrier]

    def _use(self, who: Actor | Task, barrier: MBarrier, site: Site) -> Barrier:
        """An mbarrier's state; its init must lie before every use."""
        state = self._mbarriers[barrier]
        if state.init not in who.seen:
            first = self._records[state.init]
            assert first is not None
            if first.before(who.causal):
                who.seen.add(state.init)
            else:
                operation = who.operation if isinstance(who, Task) else None
                error = race_report.uninitialised_barrier(self.machine, first, site, operation, barrier)
                self._found(error, (first.site.pc, site.pc, "init"))
        return state

    def _arrival(self, origin: Origin, barrier: MBarrier) -> None:
        state = self._mbarriers[barrier]
        self._alive(origin.site if isinstance(origin, Operation) else origin, state.cta)
        state.by = origin
        if isinstance(origin, Operation):
            task = self._tasks[origin.serial]
            self._use(task, barrier, origin.site)
            state.pending.merge(task.carried())
            return
        actor = self._actors[origin.cta, origin.warp]
        self._loads[origin.cta, origin.warp].reach(origin.pc)
        self._use(actor, barrier, origin)
        state.pending.merge(actor.released if self._relaxed(origin) else Message(actor.causal, actor.fenced))
        actor.advance()

    def mbarrier_arrive(self, origin: Origin, barrier: MBarrier, count: int, expect: int) -> None:
        self._arrival(origin, barrier)

    def mbarrier_complete(self, origin: Origin, barrier: MBarrier, size: int) -> None:
        self._arrival(origin, barrier)

    def mbarrier_expect(self, origin: Origin, barrier: MBarrier, size: int) -> None:
        if isinstance(origin, Site):
            self._use(self._actors[origin.cta, origin.warp], barrier, origin)

    def mbarrier_flip(self, barrier: MBarrier, phase: int) -> None:
        self._mbarriers[barrier].flip()

    def mbarrier_pass(self, site: Site, barrier: MBarrier, phase: int) -> None:
        actor = self._actors[site.cta, site.warp]
        state = self._use(actor, barrier, site)
        # A parity is that of every second phase. Who does not know that the phase between has completed may go on too early.
        if state.earlier is not None and state.passed.get((site.cta, site.warp), -1) < phase - 1:
            message, by = state.earlier
            if message.causal is not None and not actor.causal.covers(message.causal):
                self._found(race_report.older_phase(self.machine, site, barrier, phase, by), (site.pc, "phase"))
        state.passed[site.cta, site.warp] = phase
        if self._relaxed(site):
            actor.acquiring.merge(state.done)
        else:
            actor.learn(state.done)

    def barrier_arrive(self, site: Site, barrier: Any, generation: int) -> None:
        actor = self._actors[site.cta, site.warp]
        self._loads[site.cta, site.warp].end_all()
        message = self._barriers.setdefault((id(barrier), generation), Message())
        message.merge(actor.released if self._relaxed(site) else Message(actor.causal, actor.fenced))
        self._barriers.pop((id(barrier), generation - _KEPT), None)
        actor.advance()

    def barrier_pass(self, site: Site, barrier: Any, generation: int) -> None:
        self._actors[site.cta, site.warp].learn(self._barriers[id(barrier), generation])

    # tensor memory

    def tmem_alloc(self, site: Site, start: int, columns: int) -> None:
        shadow = self._tmem.setdefault(site.cta, tmem_shadow())
        shadow.writers[:, start : start + columns] = 0
        shadow.readers[:, start : start + columns] = 0

    def tmem_free(self, site: Site, start: int, columns: int) -> None:
        """Whatever touched the columns must be over."""
        actor = self._actors[site.cta, site.warp]
        shadow = self._tmem.setdefault(site.cta, tmem_shadow())
        place = (slice(0, shadow.writers.shape[0]), slice(start, start + columns))
        self._visit(actor, shadow, place, site, "write", False, ("tmem", site.cta))
