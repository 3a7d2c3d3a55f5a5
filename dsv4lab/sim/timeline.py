"""A modelled order in time of what a log holds. A model with a handful of parameters, NOT a measurement.

Every warp walks through its logged instructions again, on a virtual clock:

- an instruction takes one issue slot of the warp's sub-partition (warp mod 4), and slots are handed out first come, first
  served; dependences between arithmetic instructions and the latency of loads by threads are not modelled;
- a shared-memory access also holds its CTA's one port for as many cycles as it takes passes;
- an asynchronous operation starts when it is issued and its engine is free, holds the engine for its bytes or multiply-adds,
  and is done a latency later;
- a wait ends when the arrivals and operations that ended it in the log are done, plus the barrier's own latency.

Every CTA is given a multiprocessor of its own and starts at cycle 0. What it is good for: seeing who waits for whom, and which
engine idles. What it is not: a prediction of a kernel's time.
"""

from __future__ import annotations

import heapq
from collections import defaultdict
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from dsv4lab.sim.tracing import OperationInfo, Trace

Array = NDArray
KINDS = ("wait", "math", "memory", "sync", "copy", "mma", "load", "store")
_WAIT, _MATH, _MEMORY, _SYNC, _COPY, _MMA, _LOAD, _STORE = range(8)
SPAN = np.dtype([("row", "i4"), ("start", "f8"), ("end", "f8"), ("kind", "u1"), ("instruction", "i4"), ("subject", "i4")])
_PARTITIONS = 4  # of a multiprocessor; each issues for a quarter of the warps
_CHUNK = 8  # issue slots that a warp takes before others of its sub-partition get a turn
_FAMILIES = {
    **dict.fromkeys(("ld", "st", "ldu", "atom", "red", "ldmatrix", "stmatrix"), _MEMORY),
    **dict.fromkeys(("cp", "tensormap", "prefetch", "multimem"), _COPY),
    **dict.fromkeys(("wgmma", "mma", "tcgen05"), _MMA),
    **dict.fromkeys(("mbarrier", "bar", "barrier", "fence", "membar", "griddepcontrol", "nanosleep", "setmaxnreg"), _SYNC),
}
_TENSOR = ("wgmma", "tcgen05.mma", "tcgen05.cp", "tcgen05.shift", "tcgen05.commit")
_COPIES = ("TMA", "bulk")


@dataclass(frozen=True)
class Timing:
    """Parameters of the model, in cycles of a multiprocessor; round figures from published peak rates, not fitted to anything.

    copy_bytes: bytes a cycle of TMA. copy_latency, store_latency: from the engine to the effect. macs: multiply-adds a cycle of
    16-bit operands; narrower ones are faster in proportion down to `narrowest` bits. mma_latency: after the last of them.
    barrier_latency: from the last arrival to the waiter's next instruction. async_latency: of cp.async, st.async and the like.
    """

    copy_bytes: float
    copy_latency: float
    store_latency: float
    macs: float
    narrowest: int
    mma_latency: float
    barrier_latency: float = 20
    async_latency: float = 500
    tensor_copy_bytes: float = 128  # tcgen05.cp


# 989 TFLOP/s of dense BF16 at 1.83 GHz on 132 multiprocessors are 2048 multiply-adds a cycle; 2.25 PFLOP/s at 1.85 GHz on 148
# are 4096. TMA is given what one multiprocessor draws from L2.
TIMINGS = {
    "sm_90a": Timing(copy_bytes=64, copy_latency=600, store_latency=600, macs=2048, narrowest=8, mma_latency=32),
    "sm_100a": Timing(copy_bytes=64, copy_latency=700, store_latency=700, macs=4096, narrowest=4, mma_latency=64),
}


@dataclass(frozen=True)
class Timeline:
    """Spans on rows: the warps of every CTA, then its engines. spans: records of SPAN; kind: index into kinds.

    subject: of a wait, the barrier (-1: a group of operations); of an engine's span, the operation's serial. A row is empty
    where a warp waits for an issue slot or the shared-memory port, and after it has exited.
    """

    rows: tuple[str, ...]
    groups: tuple[str, ...]
    spans: Array
    timing: Timing
    kinds: tuple[str, ...] = KINDS

    @property
    def cycles(self) -> float:
        """Modelled cycles until the last span ends."""
        return float(self.spans["end"].max()) if len(self.spans) else 0.0

    def busy(self, row: str, group: str | None = None) -> float:
        """Share of all cycles that a row is not waiting. Raises KeyError naming the rows that there are."""
        return self._time(row, group, waiting=False) / self.cycles

    def waiting(self, row: str, group: str | None = None) -> float:
        """Cycles that a row spends in waits."""
        return self._time(row, group, waiting=True)

    def _time(self, row: str, group: str | None, *, waiting: bool) -> float:
        found = [i for i, (r, g) in enumerate(zip(self.rows, self.groups, strict=True)) if r == row and group in (None, g)]
        if not found:
            raise KeyError(f"no row {row!r}; there are {', '.join(dict.fromkeys(self.rows))}")
        mine = self.spans[self.spans["row"] == found[0]]
        mine = mine[(mine["kind"] == _WAIT) == waiting]
        return float((mine["end"] - mine["start"]).sum())

    def figure(self, groups: tuple[str, ...] | None = None) -> dict[str, Any]:
        """Arguments of viz.plot_warp_timeline; of the first CTA, or of those named."""
        chosen = groups or self.groups[:1]
        keep = [i for i, group in enumerate(self.groups) if group in chosen]
        place = np.full(len(self.rows), -1)
        place[keep] = np.arange(len(keep))
        spans = self.spans[np.isin(self.spans["row"], keep)]
        several = len(chosen) > 1
        return dict(
            row=place[spans["row"]],
            start=spans["start"],
            end=spans["end"],
            kind=spans["kind"],
            rows=[self.rows[i] for i in keep],
            kinds=self.kinds,
            groups=[self.groups[i] if several else "" for i in keep],
        )


@dataclass
class _Moment:
    """A point in time that others wait for: known once everything that leads to it is."""

    needed: int = 1
    time: float = 0.0
    waiting: list[_Warp] = field(default_factory=list)

    @property
    def known(self) -> bool:
        return self.needed <= 0


@dataclass
class _Operation:
    info: OperationInfo
    parts: int = 1  # warps that must hand in theirs
    ready: float = 0.0
    done: _Moment = field(default_factory=_Moment)
    read: _Moment = field(default_factory=_Moment)  # its source may be overwritten
    leads_to: list[_Moment] = field(default_factory=list)


@dataclass
class _Warp:
    row: int
    cta: int
    port: tuple[int, int]
    items: list[tuple[Any, ...]] = field(default_factory=list)
    at: int = 0
    time: float = 0.0
    open_range: tuple[int, int] = (0, 0)


# items of a warp: ("run", kind, count, instruction), ("port", passes, instruction), ("issue", operation),
# ("arrive", moment), ("wait", moment, instruction, barrier)


def categories(opcodes: list[str]) -> Array:
    """Kind of every instruction, by its opcode."""
    out = np.full(len(opcodes), _MATH, np.uint8)
    for index, opcode in enumerate(opcodes):
        parts = opcode.split(".")
        kind = _FAMILIES.get(parts[0], _MATH)
        if parts[0] == "tcgen05" and len(parts) > 1 and parts[1] in ("ld", "st"):
            kind = _MEMORY
        elif parts[0] == "tcgen05" and parts[1].startswith(("wait", "fence")):
            kind = _SYNC
        elif parts[0] == "ld" and parts[1].startswith("param"):
            kind = _MATH  # a constant operand in machine code
        out[index] = kind
    return out


class _Model:
    def __init__(self, trace: Trace, timing: Timing) -> None:
        self.trace, self.timing = trace, timing
        self.kinds = categories([i.opcode for i in trace.launch.kernel.instructions])
        self.spans: list[tuple[Any, ...]] = []
        self.last: dict[int, int] = {}  # row -> index of its last span
        self.ports: dict[tuple[int, int], float] = defaultdict(float)
        self.shared_port: dict[int, float] = defaultdict(float)
        self.engines: dict[tuple[int, str], float] = defaultdict(float)
        self.tensor_done: dict[int, float] = defaultdict(float)
        self.moments: dict[tuple[int, int], _Moment] = {}
        self.operations = {serial: _Operation(info) for serial, info in trace.operations.items()}
        self.rows: list[str] = []
        self.groups: list[str] = []
        self.warps: dict[tuple[int, int], _Warp] = {}
        self.engine_rows: dict[tuple[int, str], int] = {}
        self._runs: dict[tuple[int, int], list[tuple[int, int, int]]] = {}
        self.heap: list[tuple[float, int, _Warp]] = []
        self._layout()
        self._collect()

    # what each warp has to do

    def _layout(self) -> None:
        engines: dict[int, set[str]] = defaultdict(set)
        for operation in self.operations.values():
            name = _engine(operation.info.kind)
            if name:
                engines[operation.info.cta].add(name)
        for cta in self.trace.ctas:
            for warp in self.trace.warps:
                self.warps[cta, warp] = _Warp(len(self.rows), cta, (cta, warp % _PARTITIONS))
                self.rows.append(f"warp {warp} ({self.trace.roles[cta, warp]})")
                self.groups.append(f"CTA {cta}")
            for name in sorted(engines[cta]):
                self.engine_rows[cta, name] = len(self.rows)
                self.rows.append(name)
                self.groups.append(f"CTA {cta}")

    def _run_items(self, start: int, end: int) -> list[tuple[int, int, int]]:
        """(kind, count, instruction) of instructions of one kind in a row."""
        found = self._runs.get((start, end))
        if found is None:
            kinds = self.kinds[start:end]
            edges = [0, *(np.flatnonzero(np.diff(kinds)) + 1).tolist(), end - start]
            found = [(int(kinds[a]), b - a, start + a) for a, b in pairwise(edges) if b > a]
            self._runs[start, end] = found
        return found

    def _flush(self, warp: _Warp, until: int | None = None) -> None:
        """The part of the warp's current straight line before `until` is executed."""
        start, end = warp.open_range
        stop = end if until is None or not start <= until < end else until + 1
        if until is not None and not start <= until < end:
            return
        warp.items.extend(("run", *item) for item in self._run_items(start, stop))
        warp.open_range = (stop, end)

    def _moment(self, barrier: int, phase: int) -> _Moment:
        return self.moments.setdefault((barrier, phase), _Moment(0))

    def _collect(self) -> None:
        from dsv4lab.sim.tracing import KIND

        names = {number: name for name, number in KIND.items()}
        open_groups: dict[tuple[int, int, int], list[_Operation]] = defaultdict(list)
        groups: dict[tuple[int, int, int], list[list[_Operation]]] = defaultdict(list)
        collected: set[int] = set()
        for _, number, cta, w, instruction, subject, value, extra in self.trace.events.tolist():
            kind = names[number]
            if kind in ("flip", "perform", "expect", "wait begin", "wait end", "local"):
                continue
            operation = self.operations.get(extra if kind in ("arrive", "complete") else subject)
            if kind in ("arrive", "complete") and extra >= 0:
                moment = self._moment(subject, value)
                moment.needed += 1
                assert operation is not None
                operation.leads_to.append(moment)
                continue
            warp = self.warps[cta, w]
            if kind == "run":
                self._flush(warp)
                warp.open_range = (instruction, instruction + value)
                continue
            self._flush(warp, instruction)
            if kind == "arrive":
                moment = self._moment(subject, value)
                moment.needed += 1
                warp.items.append(("arrive", moment))
            elif kind == "pass":
                if value >= 0:
                    warp.items.append(("wait", self._moment(subject, value), instruction, subject))
            elif kind == "shared" and extra > 0:
                warp.items.append(("port", extra, instruction))
            elif kind == "contribute" or (kind == "issue" and subject not in collected):
                assert operation is not None
                if kind == "contribute":
                    operation.parts += subject in collected
                    collected.add(subject)
                warp.items.append(("issue", operation))
                group = _group(operation.info.kind)
                if group is not None:
                    open_groups[cta, w, group].append(operation)
            elif kind == "commit group":
                groups[cta, w, subject].append(open_groups.pop((cta, w, subject), []))
            elif kind == "wait group":
                mine = groups[cta, w, subject]
                for done in mine[: len(mine) - value]:
                    for member in done:
                        warp.items.append(("wait", member.read if extra == 1 else member.done, instruction, -1))
                if extra != 1:
                    del mine[: len(mine) - value]
        for warp in self.warps.values():
            self._flush(warp)

    # the clock

    def run(self) -> Timeline:
        for order, warp in enumerate(self.warps.values()):
            heapq.heappush(self.heap, (0.0, order, warp))
        order = len(self.warps)
        while self.heap:
            _, _, warp = heapq.heappop(self.heap)
            while warp.at < len(warp.items):
                if not self._step(warp):
                    break
                if self.heap and self.heap[0][0] < warp.time:
                    order += 1
                    heapq.heappush(self.heap, (warp.time, order, warp))
                    break
        spans = np.array(self.spans, SPAN) if self.spans else np.zeros(0, SPAN)
        return Timeline(tuple(self.rows), tuple(self.groups), spans, self.timing)

    def _step(self, warp: _Warp) -> bool:
        """One item, or a chunk of one; False if the warp waits."""
        item = warp.items[warp.at]
        what = item[0]
        if what == "run":
            _, kind, count, instruction = item
            now = min(count, _CHUNK)
            start = max(warp.time, self.ports[warp.port])
            warp.time = self.ports[warp.port] = start + now
            self._span(warp.row, start, warp.time, kind, instruction)
            if count > now:
                warp.items[warp.at] = ("run", kind, count - now, instruction + now)
                return True
        elif what == "port":
            start = max(warp.time, self.shared_port[warp.cta])
            warp.time = self.shared_port[warp.cta] = start + item[1]
            self._span(warp.row, start, warp.time, _MEMORY, item[2])
        elif what == "arrive":
            self._reach(item[1], warp.time)
        elif what == "issue":
            operation = item[1]
            operation.ready = max(operation.ready, warp.time)
            operation.parts -= 1
            if operation.parts == 0:
                self._start(operation)
        else:
            _, moment, instruction, barrier = item
            if not moment.known:
                moment.waiting.append(warp)
                return False
            latency = self.timing.barrier_latency if barrier >= 0 else 0.0
            if moment.time > warp.time:
                self._span(warp.row, warp.time, moment.time + latency, _WAIT, instruction, barrier)
                warp.time = moment.time + latency
        warp.at += 1
        return True

    def _reach(self, moment: _Moment, time: float) -> None:
        moment.time = max(moment.time, time)
        moment.needed -= 1
        if moment.known:
            for warp in moment.waiting:
                heapq.heappush(self.heap, (max(warp.time, moment.time), -warp.row - 1, warp))
            moment.waiting.clear()

    def _start(self, operation: _Operation) -> None:
        info, timing = operation.info, self.timing
        engine = _engine(info.kind)
        place = (info.cta, engine)
        begin = max(operation.ready, self.engines[place]) if engine else operation.ready
        kind = _LOAD
        if info.kind == "tcgen05.commit":
            free = read = done = max(operation.ready, self.tensor_done[info.cta])
            begin = free
        elif info.macs:
            rate = timing.macs * 16 / max(info.operand_bits, timing.narrowest)
            kind, free = _MMA, begin + info.macs / rate
            read, done = free, free + timing.mma_latency
        elif engine == "tensor core":
            kind, free = _MMA, begin + info.bytes / timing.tensor_copy_bytes
            read, done = free, free + timing.mma_latency
        elif engine:
            store = info.kind.endswith(("store", "reduce"))
            kind, free = (_STORE if store else _LOAD), begin + info.bytes / timing.copy_bytes
            read, done = free, free + (timing.store_latency if store else timing.copy_latency)
        else:
            free, read, done = begin, begin, begin + timing.async_latency
        if engine:
            if info.kind != "tcgen05.commit":
                self.engines[place] = free
                self._span(self.engine_rows[place], begin, free, kind, info.instruction, info.serial)
            if engine == "tensor core":
                self.tensor_done[info.cta] = max(self.tensor_done[info.cta], done)
        self._reach(operation.read, read)
        self._reach(operation.done, done)
        for moment in operation.leads_to:
            self._reach(moment, done)

    def _span(self, row: int, start: float, end: float, kind: int, instruction: int, subject: int = -1) -> None:
        if end <= start:
            return
        at = self.last.get(row)
        if at is not None:
            _, low, high, was, first, about = self.spans[at]
            if was == kind and high == start and (kind != _WAIT or instruction == first) and subject == about:
                self.spans[at] = (row, low, end, kind, first, about)
                return
        self.last[row] = len(self.spans)
        self.spans.append((row, start, end, kind, instruction, subject))


def _engine(kind: str) -> str:
    if kind.startswith(_COPIES):
        return "TMA"
    return "tensor core" if kind in _TENSOR else ""


def _group(kind: str) -> int | None:
    """Index into tracing.GROUPS of the groups that an operation is waited for with."""
    if kind in ("TMA store", "TMA reduce", "bulk store", "bulk reduce"):
        return 0
    return 1 if kind == "cp.async" else 2 if kind == "wgmma" else None


def model(trace: Trace, timing: Timing | None = None) -> Timeline:
    """The modelled timeline of a trace. timing: by default that of the architecture the kernel was compiled for."""
    target = trace.launch.kernel.target
    chosen = timing or TIMINGS.get(target) or TIMINGS["sm_100a" if target.startswith("sm_10") else "sm_90a"]
    return _Model(trace, chosen).run()
