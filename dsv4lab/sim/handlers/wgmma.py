"""wgmma: a warpgroup's asynchronous matrix product from shared memory (A also from registers) into registers.

Each warp hands in its part when it reaches the instruction; the fourth one starts the operation. Accumulators belong to the
operation until `wgmma.wait_group`; code that touches them earlier is reported. Register moves are let through, because NVVM
writes them for values that ptxas keeps in place; they force the operation to happen.
"""

from __future__ import annotations

import re
from collections import deque
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dsv4lab.sim import accumulation, operands
from dsv4lab.sim.decode import ALL_LANES, Action, Decoder, Form, family
from dsv4lab.sim.errors import HazardError, UnknownInstruction
from dsv4lab.sim.layouts import accumulator_fragment, decode_descriptor
from dsv4lab.sim.observe import Operation
from dsv4lab.sim.program import Immediate, Instruction, Vector
from dsv4lab.sim.registers import WARP, Lanes
from dsv4lab.sim.state import Cta
from dsv4lab.sim.sync import Group, Groups, Wait

Array = NDArray
_SHAPE = re.compile(r"m64n(\d+)k(\d+)")
_GROUP = 4  # warps of a warpgroup


@dataclass
class InFlight:
    """Accumulator registers of a warp's operations that no wait has covered, a set for each instruction."""

    open: set[frozenset[int]] = field(default_factory=set)
    committed: deque[set[frozenset[int]]] = field(default_factory=deque)

    def slots(self) -> frozenset[int]:
        return frozenset().union(*self.open, *(registers for group in self.committed for registers in group))


@dataclass
class Collected:
    """Parts of one warpgroup operation, by warp."""

    index: int
    descriptors: dict[int, tuple[int, int, bool]] = field(default_factory=dict)  # a, b, accumulate
    fragments: dict[int, Array] = field(default_factory=dict)  # (registers, 32) words
    groups: list[Group] = field(default_factory=list)
    operation: Operation | None = None


@dataclass(frozen=True)
class Shape:
    n: int
    k: int
    d: str
    a: str
    b: str
    a_slots: tuple[int, ...]  # empty: A from shared memory
    d_slots: tuple[int, ...]
    a_sign: int
    b_sign: int
    a_mn_major: bool
    b_mn_major: bool
    saturate: bool


@family("wgmma")
def wgmma(d: Decoder, i: Instruction, f: Form) -> Action:
    f.drop("sync", "aligned")
    if f.has("fence"):
        return Action(lambda w, m: _fence(w, m, i.index), stop=True, members=ALL_LANES, owner=True)
    if f.has("commit_group"):
        return Action(lambda w, m: _commit(w, m, i.index), stop=True, members=ALL_LANES, owner=True)
    if f.has("wait_group"):
        return _wait(i)
    if not f.has("mma_async"):
        raise UnknownInstruction(f"{i.opcode} is not simulated")
    return _multiply(d, i, f)


def _fence(w: Lanes, m: Any, index: int) -> None:
    if w.cta.machine.observers:
        w.cta.machine.observers.warps("wgmma_fence", w, m, index)


def _commit(w: Lanes, m: Any, index: int) -> None:
    if w.cta.machine.observers:
        w.cta.machine.observers.warps("commit_group", w, m, index, "wgmma")
    for warp in range(w.warp, w.warp + w.warps):
        w.cta.wgmma_groups[warp].commit()
        flight = _flight(w.cta, warp)
        flight.committed.append(flight.open)
        flight.open = set()


def _flight(cta: Cta, warp: int) -> InFlight:
    return cta.wgmma_flight.setdefault(warp, InFlight())


def _wait(i: Instruction) -> Action:
    operand = i.operands[0]
    if not isinstance(operand, Immediate):
        raise UnknownInstruction(f"{i.opcode} needs a constant")
    allowed = operand.value

    def run(w: Lanes, m: Any) -> Any:
        cta = w.cta
        mine: list[Groups] = [cta.wgmma_groups[warp] for warp in range(w.warp, w.warp + w.warps)]
        if not all(groups.done(allowed) for groups in mine):
            return Wait("wgmma", f"waits for all but {allowed} of its wgmma groups", lambda: all(g.done(allowed) for g in mine))
        for warp in range(w.warp, w.warp + w.warps):
            flight = _flight(cta, warp)
            while len(flight.committed) > allowed:
                flight.committed.popleft()
            slots = flight.slots()
            if slots:
                cta.in_flight[warp] = slots
            else:
                cta.in_flight.pop(warp, None)
        if cta.machine.observers:
            cta.machine.observers.warps("wait_group", w, m, i.index, "wgmma", allowed, False)
        return None

    return Action(run, stop=True, members=ALL_LANES, owner=True)


def _flag(i: Instruction, position: int, default: int) -> int:
    if position >= len(i.operands):
        return default
    operand = i.operands[position]
    if not isinstance(operand, Immediate):
        raise UnknownInstruction(f"{i.opcode}: operand {position} must be a constant")
    return operand.value


def _multiply(d: Decoder, i: Instruction, f: Form) -> Action:
    part = f.left.pop(0)
    match = _SHAPE.fullmatch(part)
    if match is None:
        raise UnknownInstruction(f"{i.opcode} is not simulated")
    n, k = int(match[1]), int(match[2])
    saturate = f.has("satfinite")
    d_type, a_type, b_type = f.left[-3:]
    del f.left[-3:]
    if d_type not in ("f32", "f16", "s32") or a_type not in operands.BITS or b_type not in operands.BITS:
        raise UnknownInstruction(f"{i.opcode} is not simulated")
    from_registers = isinstance(i.operands[1], Vector)
    a_slots = tuple(d.register(o) for o in d.items(i.operands[1])) if from_registers else ()
    a = -1 if from_registers else d.source(i.operands[1], "b64")
    b = d.source(i.operands[2], "b64")
    accumulate, negated = d.predicate(i.operands[3])
    shape = Shape(
        n=n,
        k=k,
        d=d_type,
        a=a_type,
        b=b_type,
        a_slots=a_slots,
        d_slots=tuple(d.register(o) for o in d.items(i.operands[0])),
        a_sign=_flag(i, 4, 1),
        b_sign=_flag(i, 5, 1),
        a_mn_major=not from_registers and bool(_flag(i, 6, 0)),
        b_mn_major=bool(_flag(i, 6 if from_registers else 7, 0)),
        saturate=saturate,
    )
    touched = frozenset(shape.d_slots)

    def run(w: Lanes, m: Any) -> None:
        cta = w.cta
        for position in range(w.warps):
            warp, lane = w.warp + position, position * WARP
            sequence = cta.wgmma_issued[warp]
            cta.wgmma_issued[warp] += 1
            pending = cta.wgmma_pending[warp // _GROUP]
            collected = pending.setdefault(sequence, Collected(i.index))
            assert isinstance(collected, Collected)
            if collected.index != i.index:
                raise HazardError(
                    f"warp {warp} executes instruction {i.index} where its warpgroup's others execute {collected.index}; "
                    "all four warps must execute the same wgmma"
                )
            value = bool(w.u[accumulate][lane]) != negated
            collected.descriptors[warp] = (0 if a < 0 else int(w.u[a][lane]), int(w.u[b][lane]), value)
            if a_slots:
                collected.fragments[warp] = np.stack([w.u[s][lane : lane + WARP] for s in a_slots])
            group = cta.wgmma_groups[warp].open
            group.outstanding += 1
            collected.groups.append(group)
            flight = _flight(cta, warp)
            if cta.machine.observers:
                collected.operation = cta.machine.observers.record("wgmma", w, i.index, None, operation=collected.operation)
                cta.machine.observers.tell("contributed", collected.operation.site, collected.operation)
            if touched not in flight.open:
                flight.open.add(touched)
                cta.in_flight[warp] = cta.in_flight.get(warp, frozenset()) | touched
            if len(collected.descriptors) == _GROUP:
                del pending[sequence]
                _start(w, i.index, warp // _GROUP, shape, collected)

    return Action(run, stop=True, members=ALL_LANES, owner=True)


def _start(w: Lanes, index: int, warpgroup: int, shape: Shape, collected: Collected) -> None:
    cta = w.cta
    first = warpgroup * _GROUP
    if len(set(collected.descriptors.values())) > 1:
        raise HazardError("the four warps of a warpgroup give different wgmma descriptors")

    def effect() -> None:
        a_bits, b_bits, accumulate = collected.descriptors[first]
        left, right = _operands(cta, shape, collected, first, a_bits, b_bits)
        _accumulate(cta, shape, first, left, right, accumulate)
        for group in collected.groups:
            group.outstanding -= 1

    cta.machine.issue(("wgmma", id(cta), warpgroup), effect, "wgmma", w, index, operation=collected.operation)


def _operands(cta: Cta, shape: Shape, collected: Collected, first: int, a_bits: int, b_bits: int) -> tuple[Array, Array]:
    """A (64, K) and B (N, K) as float32, signs applied."""

    def tile(bits: int, rows: int, name: str, mn_major: bool) -> Array:
        return cta.machine.movers.tile(cta, decode_descriptor(bits, False), rows, shape.k, name, mn_major, "wgmma")

    if shape.a_slots:
        left = _fragment(shape, [collected.fragments[first + q] for q in range(_GROUP)])
    else:
        left = tile(a_bits, 64, shape.a, shape.a_mn_major)
    return (-left if shape.a_sign * shape.b_sign < 0 else left), tile(b_bits, shape.n, shape.b, shape.b_mn_major)


def _fragment(shape: Shape, parts: list[Array]) -> Array:
    """The 64 x K operand that the warps hold in registers, (registers, 32) words each, as float32."""
    per = 32 // operands.BITS[shape.a]  # elements of a register
    words = np.stack(parts).reshape(-1, WARP)
    elements = operands.values(words.view(np.uint8), shape.a).reshape(_GROUP, -1, 2, 8, 4, per)
    # Thread 4 r + q of a warp holds in register 2 c + h: row 8 h + r, columns 4 per c + per q and following.
    return elements.transpose(0, 2, 3, 1, 4, 5).reshape(64, shape.k)


def _accumulate(cta: Cta, shape: Shape, first: int, left: Array, right: Array, accumulate: bool) -> None:
    """D = A B^T, plus D if accumulate."""
    row, column = accumulator_fragment(shape.n)
    w = cta.lanes(first, _GROUP)
    if shape.d == "s32":
        total = operands.multiply(left, right, True)[row, column]  # (128, N / 2)
        for item, slot in enumerate(shape.d_slots):
            value = total[:, item] + w.s[slot].astype(np.int64) if accumulate else total[:, item]
            if shape.saturate:
                value = np.clip(value, -(1 << 31), (1 << 31) - 1)
            w.u[slot][...] = (value & 0xFFFFFFFF).astype(np.uint32)
        return
    half = shape.d == "f16"
    held = None
    if accumulate:
        # Lane (warp, r, q) holds rows r and r + 8 (high), columns 8 block + 2 q and the next (parity).
        columns = [w.h[slot].T if half else w.f[slot][None] for slot in shape.d_slots]
        parts = np.concatenate(columns).reshape(shape.n // 8, 2, 2, _GROUP, 8, 4)  # (block, high, parity, warp, r, q)
        held = parts.transpose(3, 1, 4, 0, 5, 2).reshape(64, shape.n).astype(np.float32, copy=False)
    result = accumulation.wgmma(left, right, held, (shape.a, shape.b), half)
    if not half:
        cta.machine.movers.accumulate(cta, first, shape.d_slots, result, False)
        return
    fragments = result[row, column]
    for item, slot in enumerate(shape.d_slots):
        w.h[slot][...] = fragments[:, 2 * item : 2 * item + 2]
