"""mbarriers, named barriers, cluster barriers, warp barriers."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dsv4lab.sim.decode import ALL_LANES, ORDER, Action, Decoder, Form, Run, family
from dsv4lab.sim.errors import BarrierMisuse, UnknownInstruction
from dsv4lab.sim.handlers.alu import assign
from dsv4lab.sim.observe import site, sites
from dsv4lab.sim.program import Address, Instruction
from dsv4lab.sim.registers import WARP, Lanes
from dsv4lab.sim.sync import MBarrier, NamedBarrier, Wait

Array = NDArray
_SHARED = ("shared", "shared::cta", "shared::cluster")
_PENDING = np.uint64(1)  # a state token: the phase's parity in bit 0, the pending count before the arrival above it
_SPURIOUS = 0.05  # how often a random schedule lets try_wait give up at once, as the hardware may


def locate(w: Lanes, base: int, offset: int, lane: int) -> MBarrier:
    """The mbarrier at the address that a lane gives."""
    cta, place = w.cta.cluster.resolve(int(w.u[base][lane]) + offset)
    return cta.mbarrier(place)


@family("mbarrier")
def mbarrier(d: Decoder, i: Instruction, f: Form) -> Run | Action:
    what = f.left.pop(0)
    f.drop(*ORDER, "cluster", *_SHARED)
    f.drop("b64")
    if what == "init":
        return _init(d, i)
    if what == "inval":
        base, offset = d.address(i.operands[0])

        def invalidate(w: Lanes, m: Any) -> None:
            for lane in w.active(m):
                cta, place = w.cta.cluster.resolve(int(w.u[base][lane]) + offset)
                barrier = cta.mbarriers.pop(place, None)
                if barrier is None:
                    raise BarrierMisuse(f"mbarrier.inval: no mbarrier at {cta.shared.describe(place)}")
                _must_be_idle(w, barrier, "mbarrier.inval")
                cta.shared.phases[place >> 3] = 0
                if observers := w.cta.machine.observers:
                    observers.tell("mbarrier_inval", site(w, int(lane), i.index), barrier)

        return invalidate
    if what in ("try_wait", "test_wait"):
        return _wait(d, i, f, what)
    if what in ("arrive", "arrive_drop", "expect_tx", "complete_tx"):
        return _arrive(d, i, f, what)
    if what == "pending_count":
        count, token = d.register(i.operands[0]), d.source(i.operands[1], "b64")
        return lambda w, m: assign(w, count, (w.u[token] >> _PENDING).astype(np.uint32), m)
    raise UnknownInstruction(f"{i.opcode} is not simulated")


def _must_be_idle(w: Lanes, barrier: MBarrier, what: str) -> None:
    """Raise if an mbarrier that is to go is in the middle of a phase, or waited for."""
    waiting = [u for u in w.cta.machine.units for g in u.groups if g.wait is not None and g.wait.subject is barrier]
    if barrier.pending == barrier.count and not barrier.bytes and not waiting:
        return
    who = f"; {waiting[0].lanes.cta.describe()} warp {waiting[0].lanes.warp} waits for it" if waiting else ""
    raise BarrierMisuse(f"{what} of an mbarrier in use: {barrier}{who}; last events: {'; '.join(barrier.history)}")


def _init(d: Decoder, i: Instruction) -> Run:
    base, offset = d.address(i.operands[0])
    count = d.source(i.operands[1], "b32")

    def run(w: Lanes, m: Any) -> None:
        for lane in w.active(m):
            cta, place = w.cta.cluster.resolve(int(w.u[base][lane]) + offset)
            if cta is not w.cta:
                raise BarrierMisuse("mbarrier.init of another CTA's mbarrier")
            if place % 8:
                raise BarrierMisuse(f"mbarrier.init: {cta.shared.describe(place)} is not a multiple of 8")
            cta.shared.span(place, 8)
            cta.shared.mark(place, 8)
            if place in cta.mbarriers:
                _must_be_idle(w, cta.mbarriers[place], "mbarrier.init")
            who = site(w, int(lane), i.index)
            number, phases = int(w.u[count][lane]), cta.shared.phases
            barrier = MBarrier(cta.rank, place, number, who, cta.machine.observers, phases)
            cta.mbarriers[place] = barrier
            if cta.machine.observers:
                cta.machine.observers.tell("mbarrier_init", who, barrier)

    return run


def _arrive(d: Decoder, i: Instruction, f: Form, what: str) -> Run:
    """arrive (with .expect_tx, .noComplete), expect_tx and complete_tx."""
    expects = f.has("expect_tx") or what == "expect_tx"
    partial = f.has("noComplete")
    operands = i.operands
    state = None
    if not isinstance(operands[0], Address):
        state, operands = d.sink(operands[0]), operands[1:]
    base, offset = d.address(operands[0])
    amount = d.source(operands[1], "b32") if len(operands) > 1 else None
    plain = what == "arrive" and not expects and not partial

    def together(w: Lanes, m: Any, lanes: Array) -> bool:
        """Lanes that arrive on one barrier count at once, if at most the last of them ends the phase."""
        addresses = w.u[base][lanes]
        if (addresses != addresses[0]).any():
            return False
        barrier = locate(w, base, offset, int(lanes[0]))
        counts = np.ones(w.n, np.uint64) if amount is None else w.u[amount].astype(np.uint64)
        if not counts[lanes].all() or int(counts[lanes].sum()) > barrier.pending:
            return False
        if state is not None:
            assign(w, state, barrier.phase & 1, m)
        active = (counts if m is None else counts * m).reshape(w.warps, WARP)
        for who in sites(w, m, i.index):
            barrier.arrive(int(active[who.warp - w.warp].sum()), who)
        return True

    def run(w: Lanes, m: Any) -> None:
        w.cta.machine.progress += 1
        lanes = w.active(m)
        if plain and len(lanes) > 1 and not w.cta.machine.observers and together(w, m, lanes):
            return
        for lane in lanes:
            lane = int(lane)
            barrier = locate(w, base, offset, lane)
            value = 1 if amount is None else int(w.u[amount][lane])
            if partial and value >= barrier.pending:
                raise BarrierMisuse(f"{i.opcode} of {value} arrivals would complete the phase of {barrier}")
            if state is not None:
                w.u[state][lane] = barrier.phase & 1 | barrier.pending << int(_PENDING)
            who = site(w, lane, i.index)
            if what == "expect_tx":
                barrier.expect(value, who)
            elif what == "complete_tx":
                barrier.complete(value, who)
            elif expects:
                barrier.arrive(1, who, expect=value)
            else:
                if what == "arrive_drop":
                    barrier.count -= value
                barrier.arrive(value, who)

    return run


def _wait(d: Decoder, i: Instruction, f: Form, what: str) -> Action:
    """try_wait suspends until the phase ends, or until nothing else in the machine can happen; then it returns false."""
    f.drop("parity")
    target = d.register(i.operands[0])
    base, offset = d.address(i.operands[1])
    parity = d.source(i.operands[2], "b32" if "parity" in i.opcode else "b64")

    def run(w: Lanes, m: Any) -> Any:
        lanes = w.active(m)
        addresses, parities = w.u[base][lanes], w.u[parity][lanes] & w.u[parity].dtype.type(1)
        first = int(lanes[0])
        if (addresses == addresses[0]).all() and (parities == parities[0]).all():
            barriers = [locate(w, base, offset, first)]
            wanted = [int(parities[0])]
            passed: Any = barriers[0].passed(wanted[0])
            some = passed
        else:
            barriers = [locate(w, base, offset, int(lane)) for lane in lanes]
            wanted = [int(p) for p in parities]
            passed = np.zeros(w.n, bool)
            passed[lanes] = [b.passed(p) for b, p in zip(barriers, wanted, strict=True)]
            some = bool(passed.any())
        machine = w.cta.machine
        resumed = machine.resumed
        give_up = resumed is not None and resumed.expired
        if not some and not give_up and not (resumed is None and machine.schedule.chance(_SPURIOUS)):
            pairs = list(zip(barriers, wanted, strict=True))
            one = partial(barriers[0].passed, wanted[0])
            return Wait(
                what,
                f"waits for parity {wanted[0]} of {barriers[0]}",
                one if len(pairs) == 1 else lambda: any(b.passed(p) for b, p in pairs),
                subject=barriers[0],
                timed=True,
            )
        assign(w, target, passed, m)
        if machine.observers and some:
            _tell_passed(w, m, i.index, barriers, wanted)
        return None

    return Action(run, stop=True)


def _tell_passed(w: Lanes, m: Any, index: int, barriers: list[MBarrier], wanted: list[int]) -> None:
    observers = w.cta.machine.observers
    if len(barriers) == 1:
        observers.warps("mbarrier_pass", w, m, index, barriers[0], barriers[0].phase - 1)
        return
    for lane, barrier, parity in zip(w.active(m), barriers, wanted, strict=True):
        if barrier.passed(parity):
            observers.tell("mbarrier_pass", site(w, int(lane), index), barrier, barrier.phase - 1)


@family("bar", "barrier")
def bar(d: Decoder, i: Instruction, f: Form) -> Action:
    aligned = f.family == "bar" or f.has("aligned")
    f.drop("cta", "aligned")
    if f.has("warp"):
        f.drop("sync")
        members = d.source(i.operands[0], "b32")

        def warp(w: Lanes, m: Any) -> None:
            if w.cta.machine.observers:
                w.cta.machine.observers.warps("warp_sync", w, m, i.index)

        return Action(warp, stop=True, members=members)
    if f.has("cluster"):
        return _cluster(i, f, aligned)
    mode = f.take("sync", "arrive", "red")
    if mode is None:
        raise UnknownInstruction(f"{i.opcode} is not simulated")
    if mode == "red":
        return _named_reduce(d, i, f, aligned)
    number = d.source(i.operands[0], "b32")
    count = d.source(i.operands[1], "b32") if len(i.operands) > 1 else None

    def run(w: Lanes, m: Any) -> Any:
        barrier, generation = _arrive_named(w, m, i.index, number, count, aligned)
        if mode == "arrive":
            return None
        if barrier.generation != generation:
            if w.cta.machine.observers:
                w.cta.machine.observers.warps("barrier_pass", w, m, i.index, barrier, generation)
            return None
        return _named_wait(barrier, generation)

    return Action(run, stop=True, members=ALL_LANES if aligned else None, single=_varies(d, number, count))


def _varies(d: Decoder, *slots: int | None) -> bool:
    """Whether a named barrier's number or thread count comes from a register, so that warps in step may give different ones."""
    return any(slot is not None and slot not in d.constants for slot in slots)


def _arrive_named(w: Lanes, m: Any, index: int, number: int, count: int | None, aligned: bool) -> tuple[NamedBarrier, int]:
    """Count the active lanes (whole warps for aligned forms) on a named barrier."""
    lane = 0 if m is None else int(m.argmax())
    barrier = w.cta.barrier(int(w.u[number][lane]))
    expected = None if count is None else int(w.u[count][lane])
    if expected is not None and (expected == 0 or expected % WARP):
        raise BarrierMisuse(f"named barrier {barrier.number}: the thread count must be a multiple of {WARP}, got {expected}")
    w.cta.machine.progress += 1
    if w.cta.machine.observers:
        w.cta.machine.observers.warps("barrier_arrive", w, m, index, barrier, barrier.generation)
    arrived = w.n if m is None else int(np.count_nonzero(m))
    if expected is None:
        return barrier, barrier.arrive(arrived, None, w.cta.live_threads)
    # A warp counts as a whole once its live lanes have come; non-aligned forms may come in pieces.
    threads = WARP * len(w.warps_active(m)) if aligned else arrived
    return barrier, barrier.arrive(threads, expected, w.cta.live_threads)


def _named_wait(barrier: NamedBarrier, generation: int) -> Wait:
    return Wait(
        "bar",
        f"waits at {barrier}",
        lambda: barrier.generation != generation,
        repeat=False,
        subject=barrier,
        generation=generation,
    )


def _named_reduce(d: Decoder, i: Instruction, f: Form, aligned: bool) -> Action:
    operation = f.take("and", "or", "popc")
    if operation is None:
        raise UnknownInstruction(f"{i.opcode} is not simulated")
    f.drop("pred", "u32")
    target = d.register(i.operands[0])
    number = d.source(i.operands[1], "b32")
    count = d.source(i.operands[2], "b32") if len(i.operands) > 3 else None
    p, negated = d.predicate(i.operands[-1])

    def run(w: Lanes, m: Any) -> Any:
        resumed = w.cta.machine.resumed
        if resumed is not None:
            barrier = resumed.subject
            assert isinstance(barrier, NamedBarrier)
        else:
            lane = 0 if m is None else int(m.argmax())
            votes = (~w.u[p] if negated else w.u[p]) if m is None else (~w.u[p] if negated else w.u[p])[m]
            w.cta.barrier(int(w.u[number][lane])).vote([bool(v) for v in votes])
            barrier, generation = _arrive_named(w, m, i.index, number, count, aligned)
            if barrier.generation == generation:
                return Wait("bar", f"waits at {barrier}", lambda: barrier.generation != generation, subject=barrier)
        if w.cta.machine.observers:
            w.cta.machine.observers.warps("barrier_pass", w, m, i.index, barrier, barrier.generation - 1)
        every, some, total = barrier.result
        assign(w, target, {"and": every, "or": some, "popc": total}[operation], m)
        return None

    return Action(run, stop=True, members=ALL_LANES if aligned else None, single=_varies(d, number, count))


def _cluster(i: Instruction, f: Form, aligned: bool) -> Action:
    mode = f.take("arrive", "wait")
    f.drop("relaxed", "release", "acquire", "aligned")

    def arrive(w: Lanes, m: Any) -> None:
        cluster = w.cta.cluster
        w.cta.machine.progress += 1
        if w.cta.machine.observers:
            w.cta.machine.observers.warps("barrier_arrive", w, m, i.index, cluster.barrier, cluster.barrier.generation)
        threads = _threads(w, m)
        generation = cluster.barrier.arrive(threads, cluster.live_threads)
        for warp, _ in w.warps_active(m):
            w.cta.cluster_tickets[warp] = generation

    def wait(w: Lanes, m: Any) -> Any:
        cluster = w.cta.cluster
        warp = w.warps_active(m)[0][0]
        ticket = w.cta.cluster_tickets.get(warp)
        if ticket is None:
            raise BarrierMisuse("barrier.cluster.wait without an arrive before it")
        if cluster.barrier.generation != ticket:
            if w.cta.machine.observers:
                w.cta.machine.observers.warps("barrier_pass", w, m, i.index, cluster.barrier, ticket)
            return None
        what = f"waits for the cluster barrier: {cluster.barrier.arrived} of {cluster.live_threads} threads arrived"
        return Wait("cluster", what, lambda: cluster.barrier.generation != ticket, subject=cluster.barrier)

    return Action(arrive if mode == "arrive" else wait, stop=True, members=ALL_LANES if aligned else None)


def _threads(w: Lanes, m: Any) -> int:
    return w.n if m is None else int(np.count_nonzero(m))
