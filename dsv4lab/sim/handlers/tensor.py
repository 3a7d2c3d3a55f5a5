"""tcgen05 except its matrix products: allocation, loads and stores of TMEM, copies into it, commits, fences.

Operations of a CTA (or CTA pair) enter one pipe in the order in which they are issued: products, copies and commits.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dsv4lab.sim import operands
from dsv4lab.sim.decode import ALL_LANES, Action, Decoder, Form, Run, family
from dsv4lab.sim.errors import BarrierMisuse, ResourceError, UnknownInstruction
from dsv4lab.sim.handlers.copy import tell_bytes
from dsv4lab.sim.handlers.tensor_mma import build_mma
from dsv4lab.sim.layouts import decode_descriptor, operand_index
from dsv4lab.sim.observe import Deed, site
from dsv4lab.sim.program import Immediate, Instruction
from dsv4lab.sim.registers import WARP, Lanes
from dsv4lab.sim.state import Cta
from dsv4lab.sim.sync import Meeting, Wait
from dsv4lab.sim.tmem import fragment

Array = NDArray


def pipe(cta: Cta, pair: bool) -> Hashable:
    """The queue of tensor operations of a CTA or of its pair."""
    owner = cta.cluster.pair(cta)[0] if pair else cta
    return ("tcgen05", id(owner))


@family("tcgen05")
def tcgen05(d: Decoder, i: Instruction, f: Form) -> Run | Action:
    what = f.left.pop(0)
    if what == "mma":
        return build_mma(d, i, f)
    pair = f.has("cta_group::2")
    f.drop("cta_group::1", "sync", "aligned")
    if what == "alloc":
        return _alloc(d, i, f, pair)
    if what == "dealloc":
        return _dealloc(d, i, f, pair)
    if what == "relinquish_alloc_permit":
        return Action(lambda w, m: _relinquish(w), stop=True, members=ALL_LANES)
    kind, _, rest = what.partition("::")
    if rest and kind in ("fence", "wait"):
        return lambda w, m: _order(w, m, i.index, kind, rest)
    if what == "commit":
        return _commit(d, i, f, pair)
    if what in ("ld", "st"):
        return _transfer(d, i, f, what)
    if what == "cp":
        return _copy(d, i, f, pair)
    if what == "shift":
        return _shift(d, i, f, pair)
    raise UnknownInstruction(f"{i.opcode} is not simulated")


def _order(w: Lanes, m: Any, index: int, kind: str, what: str) -> None:
    """tcgen05.fence and tcgen05.wait: TMEM is sequentially consistent here; only observers care."""
    if w.cta.machine.observers:
        w.cta.machine.observers.warps(f"tcgen05_{kind}", w, m, index, what)


def _alloc(d: Decoder, i: Instruction, f: Form, pair: bool) -> Action:
    """One warp of a CTA (of each CTA of a pair, together) allocates columns; it waits while there is no room."""
    f.drop("shared::cta", "b32")
    base, offset = d.address(i.operands[0])
    amount = d.source(i.operands[1], "b32")

    def run(w: Lanes, m: Any) -> Any:
        cta, columns = w.cta, int(w.u[amount][0])
        if cta.tensor.fit(columns) is None:
            what = f"waits for {columns} free TMEM columns; allocated are {cta.tensor.owned}"
            return Wait("TMEM room", what, lambda: cta.tensor.fit(columns) is not None)

        def allocate() -> None:
            start = cta.tensor.fit(columns)
            assert start is not None
            cta.tensor.allocate(start, columns)
            owner, place = cta.cluster.resolve(int(w.u[base][0]) + offset)
            owner.shared.store(np.array([place], np.uint64), np.array([start], np.uint32), 4)
            if cta.machine.observers:
                cta.machine.observers.warps("tmem_alloc", w, m, i.index, start, columns)
                tell_bytes(w, 0, i.index, "write", owner.shared.base + place, 4, "shared")

        return _together(cta, "tcgen05.alloc", allocate, pair)

    return Action(run, stop=True, members=ALL_LANES, single=True)


def _dealloc(d: Decoder, i: Instruction, f: Form, pair: bool) -> Action:
    f.drop("b32")
    where, amount = d.source(i.operands[0], "b32"), d.source(i.operands[1], "b32")

    def run(w: Lanes, m: Any) -> Any:
        start, columns = int(w.u[where][0]) & 0xFFFF, int(w.u[amount][0])

        def free() -> None:
            w.cta.tensor.free(start, columns)
            if w.cta.machine.observers:
                w.cta.machine.observers.warps("tmem_free", w, m, i.index, start, columns)

        return _together(w.cta, "tcgen05.dealloc", free, pair)

    return Action(run, stop=True, members=ALL_LANES, single=True)


def _together(cta: Cta, what: str, act: Callable[[], None], pair: bool) -> Wait | None:
    """Perform one CTA's part of an operation; with a pair, both parts once a warp of each CTA has come, the first one waits."""
    cta.machine.progress += 1
    if not pair:
        act()
        return None
    first, second = cta.cluster.pair(cta)
    meeting = cta.cluster.meetings.setdefault((what, first.rank), Meeting())
    number = meeting.arrive(cta.rank, act)
    if meeting.met(number):
        return None
    peer = second if cta is first else first
    what_for = f"waits for {peer.describe()} to perform {what} too"
    return Wait(what, what_for, lambda: meeting.met(number), repeat=False)


def _relinquish(w: Lanes) -> None:
    w.cta.tensor.permit = False


def _commit(d: Decoder, i: Instruction, f: Form, pair: bool) -> Run:
    """An arrival on an mbarrier once all earlier operations of the issuing thread's pipe are done."""
    f.drop("mbarrier::arrive::one", "shared::cluster", "b64")
    multicast = f.has("multicast::cluster")
    base, offset = d.address(i.operands[0])
    mask = d.source(i.operands[1], "b16") if multicast else None

    def run(w: Lanes, m: Any) -> None:
        cta = w.cta
        for lane in w.issuers(m, [base] if mask is None else [base, mask]):
            owner, place = cta.cluster.resolve(int(w.u[base][lane]) + offset)
            targets = [owner] if mask is None else cta.cluster.masked(int(w.u[mask][lane]))
            if not targets:
                raise BarrierMisuse("tcgen05.commit with an empty multicast mask")
            who = Deed("tcgen05.commit", site(w, lane, i.index))

            def effect(place: int = place, targets: list[Cta] = targets, who: Deed = who) -> None:
                for target in targets:
                    target.mbarrier(place).arrive(1, who)

            cta.machine.issue(pipe(cta, pair), effect, "tcgen05.commit", w, i.index, (lane,))

    return run


_SHAPE = re.compile(r"(32x32b|16x64b|16x128b|16x256b|16x32bx2)")
_MOST_REGISTERS = 128


def _transfer(d: Decoder, i: Instruction, f: Form, what: str) -> Action:
    """tcgen05.ld and st: a warp moves its own quarter of the lanes to or from registers.

    Packed, a register's two halves are the low halves of two neighbouring columns. 16x32bx2 is two accesses of the same 16
    lanes: threads 0 to 15 at the address, threads 16 to 31 as many columns further as a constant operand says.
    """
    shape = next((part for part in f.left if _SHAPE.fullmatch(part)), None)
    repeat = next((part for part in f.left if re.fullmatch(r"x\d+", part)), None)
    if shape is None or repeat is None:
        raise UnknownInstruction(f"{i.opcode} is not simulated")
    f.drop(shape, repeat, "b32")
    packed = f.has("pack::16b" if what == "ld" else "unpack::16b")
    load, split = what == "ld", shape == "16x32bx2"
    registers = [d.register(o) if load else d.source(o, "b32") for o in d.items(i.operands[0 if load else -1])]
    base, offset = d.address(i.operands[1 if load else 0])
    lanes, columns = fragment("32x32b" if split else shape, int(repeat[1:]))
    if len(registers) != len(lanes) or len(lanes) > _MOST_REGISTERS:
        raise UnknownInstruction(f"{i.opcode} needs {len(lanes)} registers (at most {_MOST_REGISTERS}), got {len(registers)}")
    apart = 0
    if split:
        second = i.operands[2 if load else 1]
        if not isinstance(second, Immediate):
            raise UnknownInstruction(f"{i.opcode} needs a constant distance between its two halves")
        apart = second.value
    # accesses: columns from the address, the warp's threads
    accesses = [(0, slice(0, 16)), (apart, slice(16, WARP))] if split else [(0, slice(0, WARP))]
    lanes = lanes % 16 if split else lanes
    width = (int(columns.max()) + 1) * (2 if packed else 1)
    height = int(lanes.max()) + 1
    plain = not packed and not split

    def move(w: Lanes, row: int, column: int, first: int, threads: slice) -> None:
        """One access of the given threads of the warp whose lanes begin at `first` in the window."""
        part = slice(first + threads.start, first + threads.stop)
        lane, place = lanes[:, threads], columns[:, threads]
        cells = [(lane, 2 * place), (lane, 2 * place + 1)] if packed else [(lane, place)]
        if load:
            block = w.cta.tensor.read(slice(row, row + height), column, width, i.opcode)
            values = block[cells[0]]
            if packed:
                values = values & np.uint32(0xFFFF) | block[cells[1]] << np.uint32(16)
            for register, value in zip(registers, values, strict=True):
                w.u[register][part] = value
            return
        values = np.stack([w.u[r][part] for r in registers])
        written_lanes, written_columns = (np.concatenate(part) for part in zip(*cells, strict=True))
        block = w.cta.tensor.claim(row, column, written_lanes, written_columns, i.opcode)
        block[cells[0]] = values & np.uint32(0xFFFF) if packed else values
        if packed:
            block[cells[1]] = values >> np.uint32(16)

    def run(w: Lanes, m: Any) -> None:
        for position in range(w.warps):
            first = position * WARP
            address = int(w.u[base][first]) + offset
            column, lane = address & 0xFFFF, address >> 16
            quarter = WARP * ((w.warp + position) % 4)
            # The hardware reaches only the warp's own quarter; examples pass 0 or the quarter itself.
            row = quarter + lane % WARP
            if row + height > quarter + WARP or lane // WARP not in (0, quarter // WARP):
                raise ResourceError(f"{i.opcode} at lane {lane} leaves the warp's quarter of TMEM")
            observers, movers = w.cta.machine.observers, w.cta.machine.movers
            operation = observers.start(observers.record(f"tcgen05.{what}", w, i.index)) if observers else None
            if not plain:
                for further, threads in accesses:
                    move(w, row, column + further, first, threads)
            elif load:
                cells = w.cta.tensor.read(slice(row, row + height), column, width, i.opcode)
                movers.load_fragment(w, first, registers, cells, (lanes, columns))
            else:
                cells = w.cta.tensor.claim(row, column, lanes, columns, i.opcode)
                movers.store_fragment(w, first, registers, cells, (lanes, columns))
            if operation is not None:
                observers.end(operation)

    return Action(run, stop=True, members=ALL_LANES)


_COPIES = {"128x256b": (128, 32), "4x256b": (4, 32), "128x128b": (128, 16), "64x128b": (64, 16), "32x128b": (32, 16)}
_SPREADS = {"64x128b": "warpx2", "32x128b": "warpx4"}  # the multicast that a shape needs


def _copy(d: Decoder, i: Instruction, f: Form, pair: bool) -> Run:
    """Shared memory into TMEM. .warpx4 repeats 32 rows on all quarters; .warpx2 puts 64 rows on both halves or alternates.

    4x256b puts one row on each quarter, at the lane that the address names.
    """
    shape = f.take(*_COPIES)
    if shape is None:
        raise UnknownInstruction(f"{i.opcode} is not simulated")
    spread = f.take("warpx4", "warpx2::02_13", "warpx2::01_23")
    unpack4, unpack6 = f.has("b4x16_p64"), f.has("b6x16_p32")
    f.drop("b8x16")
    rows, row_bytes = _COPIES[shape]
    if (spread or "").partition("::")[0] != _SPREADS.get(shape, ""):
        raise UnknownInstruction(f"{i.opcode}: {shape} goes with .{_SPREADS.get(shape, 'no multicast')}, got {spread}")
    base, offset = d.address(i.operands[0])
    source = d.source(i.operands[1], "b64")
    bits_each = 4 if unpack4 else 6 if unpack6 else 0

    def run(w: Lanes, m: Any) -> None:
        cta = w.cta
        for lane in w.issuers(m, [base, source]):
            address, bits = int(w.u[base][lane]) + offset, int(w.u[source][lane])
            targets = cta.cluster.pair(cta) if pair else (cta,)

            def effect(address: int = address, bits: int = bits, targets: tuple[Cta, ...] = targets) -> None:
                descriptor = decode_descriptor(bits, True)
                index = operand_index(descriptor, rows, row_bytes)
                for target in targets:
                    data = target.shared.gather(index, descriptor.start, "tcgen05.cp")
                    if bits_each:
                        data = operands.unpack(data, bits_each)
                    words = np.ascontiguousarray(data).view(np.uint32)
                    for span, part in _placement(words, spread, address >> 16):
                        target.tensor.write(span, address & 0xFFFF, part, "tcgen05.cp")

            cta.machine.issue(pipe(cta, pair), effect, "tcgen05.cp", w, i.index, (lane,))

    return run


def _placement(words: Array, spread: str | None, lane: int) -> list[tuple[slice, Array]]:
    if spread == "warpx4":
        return [(slice(32 * q, 32 * q + 32), words) for q in range(4)]
    if spread == "warpx2::02_13":
        return [(slice(32 * q, 32 * q + 32), words[32 * (q % 2) : 32 * (q % 2) + 32]) for q in range(4)]
    if spread == "warpx2::01_23":
        return [(slice(32 * q, 32 * q + 32), words[32 * (q // 2) : 32 * (q // 2) + 32]) for q in range(4)]
    if len(words) == 4:
        return [(slice(32 * q + lane % 32, 32 * q + lane % 32 + 1), words[q : q + 1]) for q in range(4)]
    return [(slice(0, len(words)), words)]


def _shift(d: Decoder, i: Instruction, f: Form, pair: bool) -> Run:
    """tcgen05.shift.down: of a quarter's 32 lanes, 8 columns wide, each gets its next one's row and the last keeps its own."""
    if not f.has("down"):
        raise UnknownInstruction(f"{i.opcode} is not simulated")
    base, offset = d.address(i.operands[0])

    def run(w: Lanes, m: Any) -> None:
        for lane in w.issuers(m, [base]):
            address = int(w.u[base][lane]) + offset
            if (address >> 16) % WARP:
                raise ResourceError(f"{i.opcode} needs a lane that is a multiple of {WARP}, got {address >> 16}")

            def effect(address: int = address) -> None:
                column, first = address & 0xFFFF, address >> 16
                for target in w.cta.cluster.pair(w.cta) if pair else (w.cta,):
                    rows = target.tensor.read(slice(first, first + WARP), column, 8, i.opcode).copy()
                    target.tensor.write(slice(first, first + WARP - 1), column, rows[1:], i.opcode)

            w.cta.machine.issue(pipe(w.cta, pair), effect, "tcgen05.shift", w, i.index, (lane,))

    return run
