"""The machine: clusters of CTAs whose warps run as coroutines under a schedule, and asynchronous operations beside them.

A `Unit` is one warp, or neighbouring warps of a CTA that happen to run in step. Within a unit, diverged lanes form groups; the
group at the lowest instruction runs first, so groups meet again where control flow joins. A group that must wait lets the
others go on; a unit none of whose groups can go on waits.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from itertools import islice, pairwise

import numpy as np
from numpy.typing import NDArray

from dsv4lab.sim.core import Core
from dsv4lab.sim.decode import Program, decode
from dsv4lab.sim.errors import BarrierMisuse, Deadlock, ResourceError, SimulatorError
from dsv4lab.sim.memory import PARAM_WINDOW, GlobalMemory, Region
from dsv4lab.sim.movers import Movers
from dsv4lab.sim.native import bytecode, library
from dsv4lab.sim.native.core import NativeCore
from dsv4lab.sim.native.movers import NativeMovers
from dsv4lab.sim.observe import Observer, Observers, Operation
from dsv4lab.sim.parallel import Pace, spread
from dsv4lab.sim.program import Kernel, Launch
from dsv4lab.sim.races import RaceChecker
from dsv4lab.sim.registers import WARP, Lanes, RegisterFile
from dsv4lab.sim.schedule import Schedule
from dsv4lab.sim.startup import capacity, check_launch, start_cta
from dsv4lab.sim.state import Cluster, Cta
from dsv4lab.sim.sync import Wait
from dsv4lab.sim.units import Fault, Group, Unit
from dsv4lab.sim.wgmma_fences import WgmmaFences

Array = NDArray
_PATIENCE = 64  # times that try_wait may give up all over the machine before nothing happening is a deadlock
_SPIN_LIMIT = 100_000_000  # blocks of instructions that may run without any barrier or asynchronous operation moving
_SUSPICIOUS = 2_000  # of those, how many make the machine look for warps that go round in circles
_ROUND = 512  # blocks of a turn while it looks
_LONELY = 60_000  # blocks that warps may run without progress before more clusters join those that are resident


@dataclass(frozen=True)
class Checks:
    """What is watched. Bounds, alignment and barrier rules are always checked."""

    uninitialized: bool = True  # shared memory and TMEM read before they were written
    in_flight: bool = True  # wgmma accumulators touched before the wait
    tmem_leaks: bool = True
    tmem_columns: bool = True  # TMEM touched before it was allocated, or after it was freed
    pending_bytes: bool = True  # mbarriers with bytes outstanding at exit
    races: bool = False  # data races and missing fences (`dsv4lab.sim.races`); several times slower
    residency: bool = False  # CTAs that wait for others which may never start beside them; a cooperative launch's do


@dataclass
class Stats:
    """Counts of one launch."""

    instructions: int = 0  # warp-instructions
    ctas: int = 0
    async_operations: int = 0


@dataclass
class Pending:
    """An asynchronous operation that was issued and has not happened."""

    effect: Callable[[], None]
    what: str


class Machine:
    """Runs launches against registered global memory. One launch at a time; not re-entrant."""

    def __init__(
        self,
        memory: GlobalMemory,
        schedule: Schedule | str = "eager",
        checks: Checks | None = None,
        core: str | None = None,
    ) -> None:
        """core: "native" or "numpy"; by default what DSV4LAB_SIM_CORE says, or native where there is a C compiler."""
        self.memory = memory
        self.schedule = Schedule.parse(schedule) if isinstance(schedule, str) else schedule
        self.checks = checks or Checks()
        self.stats = Stats()
        self.units: list[Unit] = []
        self.clusters: list[Cluster] = []
        self.queues: OrderedDict[Hashable, deque[Pending]] = OrderedDict()
        self.progress = 0  # barrier arrivals, completions, exits: what can end another warp's wait
        self.current: Fault | None = None
        self.resumed: Wait | None = None  # the wait that the instruction now executing comes back from
        self.printed: list[str] = []
        self.observers = Observers()
        native = library.choose(core) == "native"
        self.core = NativeCore(self) if native else Core(self)
        self.movers = NativeMovers(self) if native else Movers(self)
        self.spun = 0  # blocks of instructions run in whole turns since the last progress
        self._serial = 0
        self._constants: dict[int, list[Array]] = {}
        self._programs: dict[int, tuple[Kernel, Program]] = {}
        self._files: dict[tuple[int, int], list[RegisterFile]] = {}

    # launching

    def program(self, kernel: Kernel) -> Program:
        found = self._programs.get(id(kernel))
        if found is None:
            found = self._programs[id(kernel)] = (
                kernel,
                decode(kernel, bytecode.assemble if self.core.name == "native" else None),
            )
        return found[1]

    def run(self, launch: Launch, resident: int | None = None) -> Stats:
        """Execute a launch to its end.

        resident: clusters that run at the same time: all of a cooperative launch, else one at first. While warps spin, so that
        they may be waiting for other clusters, more join them, up to what a GPU holds.
        """
        self.stats = Stats()
        self.printed = []
        self.schedule.restart()
        check_launch(launch)
        self.launch = launch
        self.compiled = self.program(launch.kernel)
        padding = -len(launch.params) % 32 + 32
        self.params = Region(
            "the kernel parameters", PARAM_WINDOW, np.frombuffer(launch.params + bytes(padding), np.uint8).copy()
        )
        shape = tuple(g // c for g, c in zip(launch.grid, launch.cluster, strict=True))
        waiting = deque((x, y, z) for z in range(shape[2]) for y in range(shape[1]) for x in range(shape[0]))
        self.resident = resident or (len(waiting) if launch.attributes.get("cooperative") else 1)
        self.constants = self._variables(launch.kernel)
        self.waiting_clusters, self.spun = waiting, 0
        self.units, self.clusters, self.queues = [], [], OrderedDict()
        checkers: list[Observer] = [RaceChecker(), WgmmaFences()] if self.checks.races else []
        self.observers.extend(checkers)
        self.observers.begin(self)
        self.memory.observers = self.observers
        self.core.begin()
        if self.observers:
            self.observers.tell("launch_begin", self)
        try:
            pace = Pace(self)
            with np.errstate(all="ignore"):
                self.run_clusters(pace)
        except SimulatorError as error:
            if error.where is None:
                error.where = self._where(self.current)
            raise
        finally:
            del self.observers[len(self.observers) - len(checkers) :]
        if self.observers:
            self.observers.tell("launch_end", self)
        return self.stats

    def run_clusters(self, pace: Pace | None = None) -> None:
        """Run all clusters that wait; in several processes where `pace` finds them worth it."""
        while self.waiting_clusters or self.clusters:
            if pace is not None and pace.worthwhile():
                if spread(self, pace.count):
                    return
                pace = None
            self._fill()
            self._drive()

    @property
    def step(self) -> int:
        """Warp-instructions that the launch has executed so far; within a block of them the count is the block's last."""
        return self.stats.instructions

    def _variables(self, kernel: Kernel) -> list[int]:
        """Addresses of the kernel's module-level variables, in order; they keep their contents from launch to launch."""
        kept = self._constants.get(id(kernel))
        if kept is None:
            kept = self._constants[id(kernel)] = [np.frombuffer(data, np.uint8).copy() for data in kernel.constants.values()]
        for name, data in zip(kernel.constants, kept, strict=True):
            self.memory.add(name, data.ctypes.data, len(data))
        return [data.ctypes.data for data in kept]

    def _fill(self) -> None:
        """Start waiting clusters while fewer are resident than shall be."""
        while self.waiting_clusters and len(self.clusters) < self.resident:
            self._start_cluster(self.waiting_clusters.popleft())

    def _more(self) -> bool:
        """Let twice as many clusters be resident, as far as there are more and a GPU holds them; returns whether any joined."""
        before = len(self.clusters)
        self.resident = max(min(2 * before, capacity(self.launch)), self.resident)
        self._fill()
        return len(self.clusters) > before

    def _start_cluster(self, index: tuple[int, int, int]) -> None:
        cluster = Cluster(self, index)
        for rank in range(int(np.prod(self.launch.cluster))):
            cta = start_cta(self, cluster, rank, self._register_file())
            cluster.ctas.append(cta)
        for cta in cluster.ctas:
            for warp in range(cta.warps):
                self.units.append(self._unit(cta, warp, 1))
            self.stats.ctas += 1
        self.clusters.append(cluster)
        if self.observers:
            self.observers.tell("cluster_begin", cluster)

    def _unit(self, cta: Cta, warp: int, warps: int) -> Unit:
        lanes = cta.lanes(warp, warps)
        live = None
        if lanes.first + lanes.n > cta.threads:
            live = np.arange(lanes.first, lanes.first + lanes.n) < cta.threads
        return Unit(lanes, [Group(0, live)], live)

    def _register_file(self) -> RegisterFile:
        threads = (int(np.prod(self.launch.block)) + WARP - 1) // WARP * WARP
        key = (id(self.launch.kernel), threads)
        free = self._files.setdefault(key, [])
        return free.pop() if free else RegisterFile(self.compiled.widths, threads)

    # asynchronous operations

    def issue(
        self,
        queue: Hashable,
        effect: Callable[[], None],
        what: str,
        lanes: Lanes,
        index: int,
        by: Iterable[int] | None = None,
        note: str = "",
        operation: Operation | None = None,
    ) -> None:
        """Start an asynchronous operation. Operations of one queue happen in order; queue None stands alone.

        lanes and index name the instruction, for errors that come up when the operation happens. by: the lanes that issue it
        (None: all), note: words about it, operation: its record if it has one already; all three are for observers.
        """
        self.stats.async_operations += 1
        if self.observers:
            effect = self.observers.watched(effect, operation or self.observers.record(what, lanes, index, by, note))
        if queue is None:
            self._serial += 1
            queue = self._serial
        if self.schedule.kind == "eager":
            effect()
            self.progress += 1
            return

        def located() -> None:
            self.current = Fault(lanes, index)
            effect()

        self.queues.setdefault(queue, deque()).append(Pending(located, what))

    def perform(self, queue: Hashable | None = None) -> None:
        """Let the oldest operation of a queue (or of the oldest queue) happen."""
        key = next(iter(self.queues)) if queue is None else queue
        operations = self.queues[key]
        operation = operations.popleft()
        if not operations:
            del self.queues[key]
        operation.effect()
        self.progress += 1

    # scheduling

    def _drive(self) -> None:
        """Run until some cluster is finished."""
        stale, seen = 0, -1
        while not self._finish_clusters():
            before = self.progress
            if self._turn():
                if self.progress != before:
                    self.spun = 0
                elif self.spun > _SUSPICIOUS:
                    self._look()
                continue
            if self.queues:
                self.perform()
                continue
            timed = [g for unit in self.units for g in unit.groups if g.wait is not None and g.wait.timed]
            stale = stale + 1 if self.progress == seen else 0
            seen = self.progress
            if not timed or stale > _PATIENCE:
                raise Deadlock(self._report("no warp can go on"))
            for group in timed:
                assert group.wait is not None
                group.wait.expired = True

    def _look(self) -> None:
        """Nothing has happened for a while. If every warp only polls, let something happen that a poll may be waiting for."""
        running = [unit for unit in self.units if unit.poll()]
        for unit in running:
            unit.look(self.progress)
        polling = bool(running) and all(unit.circling for unit in running)
        if polling and self.queues:
            self.perform()
        elif polling and self.checks.residency and self.waiting_clusters and not self.launch.attributes.get("cooperative"):
            raise Deadlock(self._report("warps wait for CTAs that start later, and nothing promises that these find a place"))
        elif (polling or self.spun > _LONELY) and self._more():
            self.spun, self.progress = 0, self.progress + 1
        elif polling or self.spun > _SPIN_LIMIT:
            raise Deadlock(self._report("warps spin without any barrier or asynchronous operation making progress"))

    def _turn(self) -> bool:
        """Every unit that can go on gets a turn, in a random schedule one unit or operation; False where all units wait."""
        if self.schedule.kind == "random" and self._choose():
            return True
        ready = [unit for unit in self.units if unit.poll()]
        if self.schedule.kind == "random":
            ready = [ready[self.schedule.below(len(ready))]] if ready else []
        elif self.schedule.batch and len(ready) > 1 and not self.observers:
            ready = self._merge(ready)
        for unit in ready:
            self._run(unit)
        return bool(ready)

    def _choose(self) -> bool:
        """Choose again where a unit waits, which leaves the others equal chances, rather than ask all; False after a while."""
        units, operations = len(self.units), min(len(self.queues), 4)
        for _ in range(units // 4 + 1):
            choice = self.schedule.below(units + operations)
            if choice >= units:
                self.perform(next(islice(self.queues, choice - units, None)))
                return True
            if self.units[choice].poll():
                self._run(self.units[choice])
                return True
        return False

    def _finish_clusters(self) -> bool:
        finished = [c for c in self.clusters if not c.live_threads]
        for cluster in finished:
            while self.queues:
                self.perform()
            self.clusters.remove(cluster)
            self._end(cluster)
            if self.observers:
                self.observers.tell("cluster_end", cluster)
        return bool(finished)

    def _end(self, cluster: Cluster) -> None:
        for cta in cluster.ctas:
            if self.checks.tmem_leaks and cta.tensor.owned:
                raise ResourceError(
                    f"{cta.describe()} of {self.launch.kernel.name} exits with TMEM columns allocated: {cta.tensor.owned}"
                )
            for barrier in cta.mbarriers.values() if self.checks.pending_bytes else ():
                if barrier.bytes:
                    raise BarrierMisuse(
                        f"{cta.describe()} exits with bytes outstanding; {barrier}; {'; '.join(barrier.history)}"
                    )
            self._files[(id(self.launch.kernel), cta.registers.threads)].append(cta.registers)

    def _merge(self, ready: list[Unit]) -> list[Unit]:
        """Join neighbouring warps that stand at the same instruction with nothing diverged."""
        out: list[Unit] = []
        for unit in sorted(ready, key=lambda u: (u.lanes.cta.serial, u.lanes.warp)):
            last = out[-1] if out else None
            if last is not None and self._joinable(last, unit):
                joined = Unit(unit.lanes.cta.lanes(last.lanes.warp, last.lanes.warps + unit.lanes.warps), last.groups)
                self.units[self.units.index(last)] = joined
                self.units.remove(unit)
                out[-1] = joined
            else:
                out.append(unit)
        return out

    def _joinable(self, a: Unit, b: Unit) -> bool:
        if a.lanes.cta is not b.lanes.cta or a.lanes.warp + a.lanes.warps != b.lanes.warp:
            return False
        if len(a.groups) != 1 or len(b.groups) != 1 or a.live is not None or b.live is not None:
            return False
        first, second = a.groups[0], b.groups[0]
        for group in (first, second):
            if group.wait is not None:
                if group.wait.repeat or not group.wait.ready():
                    return False
                group.pc, group.wait = group.pc + 1, None
        if first.pc != second.pc or first.mask is not None or second.mask is not None:
            return False
        block = self.compiled.blocks[first.pc]  # warps about to do what one warp does at a time stay apart
        return block.action is None or not block.action.single or block.end != first.pc

    def split(self, unit: Unit, cuts: list[int]) -> list[Unit]:
        """Divide a unit before the given warps (counted within it); it is replaced in the machine's list."""
        edges = [0, *cuts, unit.lanes.warps]
        parts = []
        for low, high in pairwise(edges):
            span = slice(low * WARP, high * WARP)
            groups = []
            for group in unit.groups:
                mask = None if group.mask is None else group.mask[span]
                if mask is None or mask.any():
                    groups.append(Group(group.pc, None if mask is None or mask.all() else mask, group.wait))
            live = None if unit.live is None else unit.live[span]
            parts.append(Unit(unit.lanes.cta.lanes(unit.lanes.warp + low, high - low), groups, live))
        position = self.units.index(unit)
        self.units[position : position + 1] = [part for part in parts if part.groups]
        return parts

    # execution

    def _pick(self, unit: Unit) -> Group | None:
        """The group to run: the lowest instruction among those that can go on. Groups at one instruction merge."""
        groups = unit.groups
        for group in groups:
            wait = group.wait
            if wait is not None and not wait.repeat and wait.ready():
                self._resume(unit, group, wait)
        if len(groups) > 1:
            groups.sort(key=lambda g: g.pc)
            merged = [groups[0]]
            for group in groups[1:]:
                last = merged[-1]
                if group.pc == last.pc and all(g.wait is None or g.wait.repeat for g in (group, last)):
                    assert group.mask is not None and last.mask is not None
                    mask = last.mask | group.mask
                    merged[-1] = Group(last.pc, None if mask.all() else mask, last.wait if group.wait is not None else None)
                else:
                    merged.append(group)
            unit.groups = groups = merged
        able = [g for g in groups if g.wait is None or g.wait.expired or g.wait.ready()]
        if not able:
            return None
        # A group that only spins must not starve the others of its warp.
        return able[unit.turns % len(able)] if unit.turns else able[0]

    def _resume(self, unit: Unit, group: Group, wait: Wait) -> None:
        """A wait that need not be repeated is over."""
        if self.observers:
            self.observers.resumed(unit.lanes, group.mask, group.pc, wait)
        group.pc, group.wait = group.pc + 1, None

    def _run(self, unit: Unit) -> None:
        """Run a unit until it waits, exits, splits, or has had its turn."""
        left = turn = self.schedule.quantum() if self.spun <= _SUSPICIOUS else min(self.schedule.quantum(), _ROUND)
        while left > 0:
            group = self._pick(unit)
            if group is None:
                return
            left = self.core.run_group(unit, group, left)
            if left < 0 or not unit.groups:
                return
        unit.turns += 1
        self.spun += turn

    # reports

    def _where(self, fault: Fault | None) -> str | None:
        from dsv4lab.sim.report import where

        return None if fault is None else where(self, fault)

    def _report(self, headline: str) -> str:
        from dsv4lab.sim.report import deadlock

        return deadlock(self, headline)
