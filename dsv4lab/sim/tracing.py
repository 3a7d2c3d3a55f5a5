"""A log of everything a launch did, and questions to it.

    trace = sim.trace(compiled, a, b, c)
    trace.select(kind="pass", warp=0)       # records of the log
    trace.timeline()                        # a modelled order in time, see dsv4lab.sim.timeline
    trace.barriers(), trace.bank_conflicts(), trace.traffic(), trace.shared(), trace.tensor_memory()

Each answer has a `figure()`: the arguments of the function of `dsv4lab.viz` that draws it. An event is placed by `step`, the
warp-instructions that the launch had executed by then. That is the order in which the simulator took the warps, one of many
legal ones, and no measure of time.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dsv4lab.sim.memory import SHARED_RESERVED
from dsv4lab.sim.occupancy import Occupancy
from dsv4lab.sim.program import Launch
from dsv4lab.sim.timeline import Timeline, Timing, model

Array = NDArray
KINDS = (
    "run",  # a warp executed `value` instructions from `instruction` on
    "shared", "global", "local",  # an access: subject 0 read, 1 write, 2 atomic; value bytes; extra passes of shared memory
    "contribute", "issue", "perform",  # an asynchronous operation: subject
    "arrive", "expect", "complete",  # on barrier `subject` in phase `value`; extra: the operation that does it, or -1
    "flip", "pass",  # barrier `subject` completed, or a warp saw completed, phase `value`
    "commit group", "wait group",  # subject: index into GROUPS; value: groups that may be unfinished; extra: 1 if .read
    "fence", "wait begin", "wait end", "allocate", "free", "exit",
)  # fmt: skip
KIND = {name: number for number, name in enumerate(KINDS)}
GROUPS = ("bulk", "cp.async", "wgmma")
EVENT = np.dtype(
    [("step", "i8"), ("kind", "u1"), ("cta", "i4"), ("warp", "i2"), ("instruction", "i4"), ("subject", "i4"), ("value", "i8"),
     ("extra", "i8")]
)  # fmt: skip
WRITERS = ("TMA", "threads", "tensor core", "cp.async", "other CTA")
TMEM_COLUMNS = 512
_ROLES = {"TMA load": "load", "bulk load": "load", "cp.async": "load", "tcgen05.mma": "mma"}
_ROLES |= dict.fromkeys(("TMA store", "TMA reduce", "bulk store", "bulk reduce"), "store")
_IDLE = 0.05  # of the busiest warp's instructions
_SHAPE = re.compile(r"alloc|v\d|x\d|[bufs]\d+")


@dataclass(frozen=True)
class BarrierInfo:
    """A barrier of the launch. kind: "mbarrier", "named" or "cluster"; place: byte offset in shared memory, or its number."""

    kind: str
    cta: int
    place: int
    count: int
    instruction: int  # that initialised it, or first used it


@dataclass
class OperationInfo:
    """An asynchronous operation. bytes: moved, for copies. macs: multiply-adds; operand_bits: of one element of A."""

    serial: int
    kind: str
    cta: int
    warp: int
    instruction: int
    issued: int
    note: str = ""
    performed: int = -1
    bytes: int = 0
    macs: int = 0
    operand_bits: int = 16


@dataclass
class Conflicts:
    """Shared-memory accesses of one instruction: executions by warps, phases (fewest passes), passes, degree, words (32,)."""

    instruction: int
    executions: int = 0
    phases: int = 0
    passes: int = 0
    degree: int = 0
    words: Array = field(default_factory=lambda: np.zeros(32, np.int64))


@dataclass(frozen=True)
class Moved:
    """Bytes between a tensor and the multiprocessors. by: "TMA", "threads", "cp.async" -> bytes; once: different bytes.

    Lanes of a warp that access the same bytes by one instruction move them once. Tensors of one name are numbered.
    """

    tensor: str
    direction: str  # "read" or "written"
    by: dict[str, int]
    once: int

    @property
    def factor(self) -> float:
        """How often each touched byte moved, on average."""
        return sum(self.by.values()) / self.once if self.once else 0.0


@dataclass(frozen=True)
class BankConflicts:
    """Shared-memory accesses by instruction, the worst first; lines: their source."""

    rows: tuple[Conflicts, ...]
    lines: tuple[str, ...]

    @property
    def excess(self) -> int:
        """Passes beyond the fewest possible."""
        return sum(row.passes - row.phases for row in self.rows)

    def figure(self, most: int = 16) -> dict[str, Any]:
        """Arguments of viz.plot_bank_conflicts: the `most` worst instructions; those of a line without conflicts as one row."""
        chosen: dict[str, list[Conflicts]] = {}
        for row, line in zip(self.rows, self.lines, strict=True):
            alone = row.passes > row.phases
            chosen.setdefault(f"{line} #{row.instruction}" if alone else line, []).append(row)
        shown = list(chosen.items())[:most]
        return dict(
            words=np.array([sum(row.words for row in rows) for _, rows in shown]).reshape(-1, 32),
            passes=[sum(row.passes for row in rows) for _, rows in shown],
            phases=[sum(row.phases for row in rows) for _, rows in shown],
            labels=[f"{line} ({len(rows)} instructions)" if len(rows) > 1 else line for line, rows in shown],
        )


@dataclass(frozen=True)
class Traffic:
    """Global memory traffic by tensor and direction."""

    rows: tuple[Moved, ...]

    def of(self, tensor: str, direction: str = "read") -> Moved:
        """The row of a tensor. Raises KeyError naming those that there are."""
        for row in self.rows:
            if (row.tensor, row.direction) == (tensor, direction):
                return row
        known = ", ".join(f"{row.tensor} {row.direction}" for row in self.rows)
        raise KeyError(f"{tensor} was not {direction}; there are: {known}")

    def figure(self) -> dict[str, Any]:
        """Arguments of viz.plot_traffic."""
        engines = sorted({engine for row in self.rows for engine in row.by})
        return dict(
            moved={engine: [row.by.get(engine, 0) / 1024 for row in self.rows] for engine in engines},
            least=[row.once / 1024 for row in self.rows],
            labels=[f"{row.tensor}, {row.direction}" for row in self.rows],
        )


@dataclass(frozen=True)
class BarrierGraph:
    """arrivals: (who, line, barrier, times); waits: (barrier, who, line, times). Barriers by index in Trace.barrier_infos."""

    names: tuple[str, ...]
    arrivals: tuple[tuple[str, str, int, int], ...]
    waits: tuple[tuple[int, str, str, int], ...]

    def figure(self) -> dict[str, Any]:
        """Arguments of viz.plot_barrier_graph; barriers that the same lines use (the stages of a pipeline) become one."""
        uses: dict[int, set[tuple[str, ...]]] = {}
        for who, line, barrier, _ in self.arrivals:
            uses.setdefault(barrier, set()).add(("arrive", who, line))
        for barrier, who, line, _ in self.waits:
            uses.setdefault(barrier, set()).add(("wait", who, line))
        alike: dict[frozenset[tuple[str, ...]], list[int]] = {}
        for barrier in sorted(uses):
            alike.setdefault(frozenset(uses[barrier]), []).append(barrier)
        label = {}
        for members in alike.values():
            text = self.names[members[0]] + (f"\n{len(members)} alike" if len(members) > 1 else "")
            label.update(dict.fromkeys(members, text))
        left: dict[tuple[str, str], int] = {}
        right: dict[tuple[str, str], int] = {}
        for who, line, barrier, times in self.arrivals:
            key = (f"{who}\n{line}", label[barrier])
            left[key] = left.get(key, 0) + times
        for barrier, who, line, times in self.waits:
            key = (label[barrier], f"{who}\n{line}")
            right[key] = right.get(key, 0) + times
        return dict(arrivals=[(*key, n) for key, n in left.items()], waits=[(*key, n) for key, n in right.items()])


@dataclass(frozen=True)
class Trace:
    """The log of one launch. events: records of EVENT; kinds are numbers into KINDS, subjects indices into the tables."""

    launch: Launch
    events: Array
    barrier_infos: tuple[BarrierInfo, ...]
    operations: dict[int, OperationInfo]
    conflicts: dict[int, Conflicts]
    moved: tuple[Moved, ...]
    occupancy: dict[tuple[str, int], Array]  # (memory, CTA) -> pieces
    shared_bytes: int  # of a CTA: what the kernel declares and what the launch adds
    ctas: range  # that were recorded

    # the log

    def select(
        self, *, kind: str | None = None, cta: int | None = None, warp: int | None = None, instruction: int | None = None
    ) -> Array:
        """The events of a kind, a CTA (by its position in the launch), a warp, an instruction. Raises KeyError for a kind."""
        events = self.events
        chosen = np.ones(len(events), bool)
        for name, value in (("kind", None if kind is None else KIND[kind]), ("cta", cta), ("warp", warp)):
            if value is not None:
                chosen &= events[name] == value
        if instruction is not None:
            chosen &= events["instruction"] == instruction
        return events[chosen]

    def line(self, instruction: int) -> str:
        """Source line of an instruction, "file.py:12"; its PTX opcode where none is known."""
        found = self.launch.kernel.instructions[instruction]
        return f"{Path(found.location.file).name}:{found.location.line}" if found.location else found.opcode

    @property
    def warps(self) -> range:
        return range(-(-int(np.prod(self.launch.block)) // 32))

    @cached_property
    def roles(self) -> dict[tuple[int, int], str]:
        """(CTA, warp) -> what tells it from others: the asynchronous operations that it issues; else "exp" for one that
        takes exponentials, "idle" for one that executes next to nothing, "math".
        """
        seen: dict[tuple[int, int], set[str]] = {}
        for event in self.select(kind="contribute"):
            seen.setdefault((int(event["cta"]), int(event["warp"])), set()).add("wgmma")
        for operation in self.operations.values():
            if operation.kind in _ROLES:
                seen.setdefault((operation.cta, operation.warp), set()).add(_ROLES[operation.kind])
        runs = self.select(kind="run")
        place = runs["cta"].astype(np.int64) * len(self.warps) + runs["warp"]
        size = len(self.ctas) * len(self.warps)
        executed = np.bincount(place, weights=runs["value"], minlength=size)
        exponentials = np.cumsum([0, *(i.opcode.startswith("ex2") for i in self.launch.kernel.instructions)])
        taken = exponentials[runs["instruction"] + runs["value"]] - exponentials[runs["instruction"]]
        powers = np.bincount(place, weights=taken, minlength=size)
        out = {}
        for cta in self.ctas:
            for warp in self.warps:
                at = cta * len(self.warps) + warp
                rest = "exp" if powers[at] else "idle" if executed[at] < _IDLE * executed.max() else "math"
                out[cta, warp] = "+".join(sorted(seen.get((cta, warp), {rest})))
        return out

    # answers

    def timeline(self, timing: Timing | None = None) -> Timeline:
        """When things would happen on a machine with these parameters. A model, not a measurement; see dsv4lab.sim.timeline."""
        return model(self, timing)

    def barriers(self, cta: int = 0) -> BarrierGraph:
        """Who arrives at and who waits for the barriers of one CTA, with source lines."""
        arrivals: dict[tuple[str, str, int], int] = {}
        waits: dict[tuple[int, str, str], int] = {}
        mine = {i for i, barrier in enumerate(self.barrier_infos) if barrier.cta == cta}
        crowd = self._crowds()
        for event in self.events[np.isin(self.events["kind"], [KIND["arrive"], KIND["complete"]])]:
            if int(event["subject"]) not in mine:
                continue
            operation = self.operations.get(int(event["extra"]))
            who = operation.kind if operation else crowd[int(event["cta"]), int(event["warp"])]
            arrival = (who, self.line(int(event["instruction"])), int(event["subject"]))
            arrivals[arrival] = arrivals.get(arrival, 0) + 1
        passed = self.select(kind="pass")  # lanes that have parted ways pass one by one: once a warp and phase counts
        _, first = np.unique(passed[["cta", "warp", "instruction", "subject", "value"]], return_index=True)
        for event in passed[np.sort(first)]:
            if int(event["subject"]) in mine:
                who = crowd[int(event["cta"]), int(event["warp"])]
                wait = (int(event["subject"]), who, self.line(int(event["instruction"])))
                waits[wait] = waits.get(wait, 0) + 1
        names = tuple(self._barrier_name(barrier) for barrier in self.barrier_infos)
        return BarrierGraph(
            names, tuple((*key, n) for key, n in arrivals.items()), tuple((*key, n) for key, n in waits.items())
        )

    def bank_conflicts(self) -> BankConflicts:
        """Passes of every instruction that accesses shared memory from threads. PTX accesses; ptxas may merge or split them."""
        rows = sorted(self.conflicts.values(), key=lambda row: (row.phases - row.passes, row.instruction))
        names = []
        for row in rows:
            opcode, *parts = self.launch.kernel.instructions[row.instruction].opcode.split(".")
            names.append(f"{self.line(row.instruction)}  {'.'.join([opcode, *filter(_SHAPE.fullmatch, parts)])}")
        return BankConflicts(tuple(rows), tuple(names))

    def traffic(self) -> Traffic:
        """Bytes moved between global memory and the multiprocessors, against each touched byte once."""
        return Traffic(self.moved)

    def shared(self, step: int | None = None, cta: int = 0) -> Occupancy:
        """What a CTA's shared memory holds, in pieces of 16 bytes; at one step if given."""
        size = max(-(-self.shared_bytes // 16) * 16, 16)
        found = Occupancy(self._pieces("shared", cta), "bytes", size, WRITERS)
        return found if step is None else found.at(step)

    def tensor_memory(self, step: int | None = None, cta: int = 0) -> Occupancy:
        """What a CTA's TMEM holds, by columns; a column is held while any of its lanes is."""
        found = Occupancy(self._pieces("tmem", cta), "columns", TMEM_COLUMNS, WRITERS)
        return found if step is None else found.at(step)

    # export

    def to_json(self, path: str | Path) -> None:
        """The whole log as JSON: columns of the events, tables of barriers and operations, source lines."""
        used = sorted({int(i) for i in self.events["instruction"] if i >= 0})
        content = {
            "kernel": self.launch.kernel.name,
            "target": self.launch.kernel.target,
            "grid": self.launch.grid,
            "block": self.launch.block,
            "kinds": KINDS,
            "events": {name: self.events[name].tolist() for name in EVENT.names or ()},
            "barriers": [asdict(barrier) for barrier in self.barrier_infos],
            "operations": [asdict(operation) for operation in self.operations.values()],
            "instructions": {i: {"line": self.line(i), "text": self.launch.kernel.instructions[i].text} for i in used},
        }
        Path(path).write_text(json.dumps(content), encoding="utf-8")

    def to_perfetto(self, path: str | Path, timing: Timing | None = None) -> None:
        """The modelled timeline in Chrome's trace format, for ui.perfetto.dev; a microsecond there is a modelled cycle."""
        timeline = self.timeline(timing)
        records: list[dict[str, Any]] = []
        for row, (group, name) in enumerate(zip(timeline.groups, timeline.rows, strict=True)):
            process = sorted(set(timeline.groups)).index(group)
            records.append({"ph": "M", "pid": process, "tid": row, "name": "thread_name", "args": {"name": name}})
            records.append({"ph": "M", "pid": process, "name": "process_name", "args": {"name": group}})
        for span in timeline.spans:
            row = int(span["row"])
            instruction = int(span["instruction"])
            records.append({
                "ph": "X",
                "pid": sorted(set(timeline.groups)).index(timeline.groups[row]),
                "tid": row,
                "ts": float(span["start"]),
                "dur": float(span["end"] - span["start"]),
                "name": timeline.kinds[int(span["kind"])],
                "args": {"line": self.line(instruction)} if instruction >= 0 else {},
            })  # fmt: skip
        content = {"traceEvents": records, "otherData": {"kernel": self.launch.kernel.name, "model": str(timeline.timing)}}
        Path(path).write_text(json.dumps(content), encoding="utf-8")

    # helpers

    def _pieces(self, memory: str, cta: int) -> Array:
        found = self.occupancy.get((memory, cta))
        if found is None:
            raise KeyError(f"the trace has no {memory} of CTA {cta}; it has CTAs 0 to {len(self.ctas) - 1}")
        return found

    def _barrier_name(self, barrier: BarrierInfo) -> str:
        if barrier.kind == "mbarrier":
            return f"mbarrier +{barrier.place - SHARED_RESERVED}, count {barrier.count}"
        return f"barrier {barrier.place}" if barrier.kind == "named" else "cluster barrier"

    def _crowds(self) -> dict[tuple[int, int], str]:
        """(CTA, warp) -> the warps of its CTA with its role, as a text."""
        out = {}
        for cta in self.ctas:
            groups: dict[str, list[int]] = {}
            for warp in self.warps:
                groups.setdefault(self.roles[cta, warp], []).append(warp)
            for role, members in groups.items():
                text = f"{warp_list(members)} ({role})"
                out.update({(cta, warp): text for warp in members})
        return out


def warp_list(warps: Sequence[int]) -> str:
    """ "warp 3", "warps 0-3, 5"."""
    spans: list[list[int]] = []
    for warp in warps:
        if spans and warp == spans[-1][1] + 1:
            spans[-1][1] = warp
        else:
            spans.append([warp, warp])
    text = ", ".join(f"{low}-{high}" if high > low else str(low) for low, high in spans)
    return f"warp{'s' if len(warps) > 1 else ''} {text}"
