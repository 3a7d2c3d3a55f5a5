"""Runs groups in C as far as that goes, and single instructions by their handlers where it does not."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from dsv4lab.sim.core import Core, meeting
from dsv4lab.sim.decode import Program
from dsv4lab.sim.native import bytecode, library
from dsv4lab.sim.registers import Lanes
from dsv4lab.sim.state import Cta
from dsv4lab.sim.units import Group, Unit

if TYPE_CHECKING:
    from dsv4lab.sim.machine import Machine

Array = NDArray
_LANES = 1024
_DONE, _FULL = 0, 2  # of core.h
_RUNS = 256  # of instructions, until observers are told


def at(array: Array) -> int:
    """Where an array lies in memory."""
    return int(array.__array_interface__["data"][0])


class _Program(ctypes.Structure):
    """Program of core.h."""

    _fields_ = (
        ("steps", ctypes.c_void_p),
        ("total", ctypes.c_int64),
        ("lists", ctypes.c_void_p),
        ("widths", ctypes.c_void_p),
        ("touch_start", ctypes.c_void_p),
        ("touched", ctypes.c_void_p),
    )


class _Cta(ctypes.Structure):
    """Cta of core.h."""

    _fields_ = (
        ("program", ctypes.c_void_p),
        ("rows", ctypes.c_void_p),
        ("globals", ctypes.c_void_p),
        ("global_count", ctypes.c_int64),
        ("shared", ctypes.c_void_p),
        ("ranks", ctypes.c_int64),
        ("rank", ctypes.c_int64),
        ("params", ctypes.c_void_p),
        ("params_size", ctypes.c_uint64),
        ("local", ctypes.c_void_p),
        ("local_stride", ctypes.c_uint64),
        ("check_reads", ctypes.c_int64),
    )


class _Progress(ctypes.Structure):
    """Progress of core.h."""

    _fields_ = (
        ("pc", ctypes.c_int64),
        ("left", ctypes.c_int64),
        ("count", ctypes.c_int64),
        ("runs", ctypes.c_void_p),
        ("room", ctypes.c_int64),
        ("used", ctypes.c_int64),
    )


class NativeProgram:
    """A program's records, with the memory that they lie in."""

    def __init__(self, program: Program) -> None:
        total = len(program.singles)
        steps = np.zeros(total, bytecode.STEP)
        if steps.itemsize != library.load().native_step_bytes():
            raise AssertionError("the C code's Step has another size than bytecode.STEP")
        steps["guard"] = steps["d"] = steps["a"] = steps["b"] = steps["c"] = steps["list"] = -1
        lists: list[int] = []
        kinds = {"fall": bytecode.PLAIN, "branch": bytecode.BRANCH, "stop": bytecode.STOP}
        guards = [instruction.guard for instruction in program.kernel.instructions]
        slots = {name: slot for slot, name in program.names.items()}
        for index, (single, code) in enumerate(zip(program.singles, program.records, strict=True)):
            step, guard = steps[index], guards[index]
            step["kind"], step["ends"], step["move"] = kinds[single.kind], single.whole, index in program.moves
            if guard is not None:
                step["guard"], step["negated"] = slots[guard.register.name], guard.negated
            if single.action is not None:
                step["convergent"], step["single"] = single.action.members is not None, single.action.single
            if single.kind == "branch":
                step["k"] = single.target
            elif code is not None:
                step["run"], step["k"] = library.find(code.name), code.k
                step["d"], step["a"], step["b"], step["c"], step["list"] = code.d, code.a, code.b, code.c, code.list
                step["count"], step["size"], step["variant"] = code.count or len(code.items), code.size, code.variant
                step["traffic"] = code.traffic
                if code.items:
                    step["list"] = len(lists)
                    lists += [-1 if slot is None else slot for slot in code.items]
        touches = [sorted(program.touches.get(index, ())) for index in range(total)]
        self.steps = steps
        self.lists = np.array(lists or [0], np.int32)
        self.widths = np.array(program.widths, np.uint8)
        self.touch_start = np.cumsum([0, *map(len, touches)]).astype(np.int32)
        self.touched = np.array([slot for slots in touches for slot in slots] or [0], np.int32)
        self.struct = _Program(
            at(self.steps),
            total,
            at(self.lists),
            at(self.widths),
            at(self.touch_start),
            at(self.touched),
        )
        self.address = ctypes.addressof(self.struct)


class NativeCore(Core):
    """The C code's loop, with the numpy handlers for what it declines."""

    name = "native"

    def __init__(self, machine: Machine) -> None:
        super().__init__(machine)
        self._run = library.load().native_run
        self._progress = _Progress()
        self._where = ctypes.addressof(self._progress)
        self._mask = np.zeros(_LANES, bool)
        self._mask_at = at(self._mask)
        self._programs: dict[int, tuple[Program, NativeProgram]] = {}
        self.declined: dict[int, int] | None = None  # instruction -> times, if someone wants to know

    def begin(self) -> None:
        """A launch begins."""
        machine = self.machine
        known = self._programs.get(id(machine.compiled))
        if known is None:
            known = self._programs[id(machine.compiled)] = machine.compiled, NativeProgram(machine.compiled)
        self._program = known[1]
        ranges = [(a.base + a.lead, a.base + a.size) for a in machine.memory.allocations]
        self._ranges = np.array(ranges or [(0, 0)], np.uint64)
        self._see = (bytecode.FENCE if machine.observers else 0) | (bytecode.MEMORY if machine.observers.accesses else 0)
        self._runs = np.zeros((_RUNS, 2), np.int64)
        self._progress.runs, self._progress.room = (at(self._runs) if machine.observers.follows else None), _RUNS
        self._watch = np.zeros(len(machine.compiled.widths), np.uint8)
        self._watch_at = at(self._watch)
        self._watched: set[frozenset[int]] = set()

    def cta(self, cta: Cta) -> int:
        """The address of a CTA's description, made when it first executes."""
        if cta.native is None:
            ctas = cta.cluster.ctas
            memories = [other.shared for other in ctas]
            shared = np.array(
                [(at(m.data), at(m.written), m.size, at(m.phases)) for m in memories], np.uint64
            )  # Shared of core.h
            rows, params, local = cta.registers.addresses, self.machine.params, cta.local
            made = _Cta(
                self._program.address,
                at(rows),
                at(self._ranges),
                len(self.machine.memory.allocations),
                at(shared),
                len(ctas),
                cta.rank,
                at(params.data),
                params.size,
                None if local is None else at(local.data),
                cta.local_stride,
                int(cta.shared.check_reads),
            )
            cta.native = ctypes.addressof(made), made, shared, at(shared) + cta.rank * shared.strides[0]
        return int(cta.native[0])

    def shared(self, cta: Cta) -> int:
        """The address of the description of a CTA's shared memory."""
        self.cta(cta)
        return int(cta.native[3])

    def run_group(self, unit: Unit, group: Group, left: int) -> int:
        if self.machine.observers.instructions:
            return super().run_group(unit, group, left)
        lanes, mask, progress, machine = unit.lanes, group.mask, self._progress, self.machine
        singles, limit = machine.compiled.singles, meeting(unit, group)
        cta, mask_at = self.cta(lanes.cta), None
        if mask is not None:
            self._mask[: lanes.n] = mask
            mask_at = self._mask_at
        pc = group.pc
        if group.wait is not None:  # coming back to an instruction that waited, which its handler knows about
            pc, left = self.execute(unit, group, singles[pc], left)
            if pc < 0:
                return left
        while left > 0 and pc < limit:
            watch, moves = (self._flying(lanes) if lanes.cta.in_flight else None), 0
            if watch is not None:
                moves = any(key[0] == "wgmma" for key in machine.queues if isinstance(key, tuple))
            progress.pc, progress.left = pc, left
            ended = self._run(cta, lanes.first, lanes.n, limit, mask_at, watch, moves, self._see, self._where)
            pc, left = progress.pc, progress.left
            machine.stats.instructions += progress.count
            if progress.used:
                for start, end in self._runs[: progress.used].tolist():
                    machine.observers.executed(lanes, start, end)
            if ended == _DONE:
                break
            if ended == _FULL:
                continue
            if self.declined is not None:
                self.declined[pc] = self.declined.get(pc, 0) + 1
            pc, left = self.execute(unit, group, singles[pc], left)
            if pc < 0:
                return left
        group.pc, group.wait = pc, None
        return left

    def _flying(self, lanes: Lanes) -> int | None:
        """Flags of the slots that belong to a wgmma of these warps; None if there are none."""
        flights = lanes.cta.in_flight
        flying = {slots for warp in range(lanes.warp, lanes.warp + lanes.warps) if (slots := flights.get(warp))}
        if not flying:
            return None
        if flying != self._watched:  # frozensets keep their hash, so this is quick
            self._watched = flying
            self._watch[:] = 0
            self._watch[list(frozenset().union(*flying))] = 1
        return self._watch_at
