"""Asynchronous copies: cp.async, bulk copies, tensor copies (TMA), their groups, and tensormap instructions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from dsv4lab.sim import tma
from dsv4lab.sim.decode import Action, Decoder, Form, Run, family
from dsv4lab.sim.descriptor import DESCRIPTOR_BYTES
from dsv4lab.sim.errors import MemoryFault, UnknownInstruction
from dsv4lab.sim.handlers.barrier import locate
from dsv4lab.sim.memory import LOCAL_WINDOW, PARAM_WINDOW, SHARED_WINDOW, WINDOW_BYTES
from dsv4lab.sim.observe import Deed, Fence, Order, Site, accesses, site
from dsv4lab.sim.program import Address, Immediate, Instruction
from dsv4lab.sim.registers import Lanes
from dsv4lab.sim.state import Cta
from dsv4lab.sim.sync import Groups, MBarrier, Wait

_FIRST = np.zeros(1, np.int64)
_BULK_ALIGNMENT = 16  # bytes, of addresses and size


def bytes_at(cta: Cta, address: int, size: int) -> np.ndarray:
    """A writable view of global, shared or parameter bytes at a generic address."""
    if SHARED_WINDOW <= address < SHARED_WINDOW + WINDOW_BYTES:
        owner, offset = cta.cluster.resolve(address)
        owner.shared.mark(offset, size)
        return owner.shared.span(offset, size)
    if PARAM_WINDOW <= address < PARAM_WINDOW + WINDOW_BYTES:
        return cta.machine.params.span(address - PARAM_WINDOW, size)
    if address >= LOCAL_WINDOW:
        raise MemoryFault(f"address 0x{address:x} is neither global, shared nor a parameter")
    return cta.machine.memory.span(address, size)


def tell_bytes(w: Lanes, lane: int, index: int, kind: str, address: int, size: int, space: str = "") -> None:
    """One lane's access of `size` bytes at a generic address (or one of the given space), for observers."""
    if not space:
        space = "shared" if SHARED_WINDOW <= address < SHARED_WINDOW + WINDOW_BYTES else "global"
        address -= SHARED_WINDOW if space == "shared" else 0
    where = np.array([address], np.uint64)
    for access in accesses(w, np.array([lane]), index, space, kind, where, size, Order()):
        w.cta.machine.observers.tell("access", access)


@family("cp")
def cp(d: Decoder, i: Instruction, f: Form) -> Run | Action:
    reduction = f.has("reduce")
    if not f.has("async"):
        raise UnknownInstruction(f"{i.opcode} is not simulated")
    if not f.has("bulk"):
        return _element_copy(d, i, f)
    if f.has("commit_group"):
        return _commit(i, "bulk", lambda w, lane: w.cta.bulk_groups.get(w.first + lane))
    if f.has("wait_group"):
        return _wait_bulk(i, f.has("read"))
    if f.has("prefetch"):
        return _prefetch(d, i, f)
    if f.has("tensor"):
        return _tensor(d, i, f, reduction)
    return _bulk(d, i, f, reduction)


def _commit(i: Instruction, kind: str, groups_of: Callable[[Lanes, int], Groups | None]) -> Run:
    def run(w: Lanes, m: Any) -> None:
        if w.cta.machine.observers:
            w.cta.machine.observers.warps("commit_group", w, m, i.index, kind)
        for lane in w.active(m):
            groups = groups_of(w, int(lane))
            if groups is not None:
                groups.commit()

    return run


def _allowed(i: Instruction) -> int:
    operand = i.operands[0]
    if not isinstance(operand, Immediate):
        raise UnknownInstruction(f"{i.opcode} needs a constant")
    return operand.value


def _wait_bulk(i: Instruction, read: bool) -> Action:
    allowed = _allowed(i)

    def run(w: Lanes, m: Any) -> Any:
        if not w.cta.bulk_groups:
            return None
        mine = [g for lane in w.active(m) if (g := w.cta.bulk_groups.get(w.first + int(lane))) is not None]
        if all(groups.done(allowed) for groups in mine):
            if w.cta.machine.observers:
                w.cta.machine.observers.warps("wait_group", w, m, i.index, "bulk", allowed, read)
            return None
        return Wait("bulk group", f"waits for all but {allowed} of its bulk groups", lambda: all(g.done(allowed) for g in mine))

    return Action(run, stop=True)


# cp.async, element by element


def _element_copy(d: Decoder, i: Instruction, f: Form) -> Run | Action:
    if f.has("commit_group"):
        return _commit(i, "cp.async", lambda w, lane: w.cta.copy_groups.get(w.first + lane))
    if f.has("wait_group") or f.has("wait_all"):
        allowed = _allowed(i) if i.operands else 0

        def wait(w: Lanes, m: Any) -> Any:
            mine = [g for lane in w.active(m) if (g := w.cta.copy_groups.get(w.first + int(lane))) is not None]
            if not i.operands:
                for groups in mine:
                    groups.commit()
                if w.cta.machine.observers:
                    w.cta.machine.observers.warps("commit_group", w, m, i.index, "cp.async")
            if all(groups.done(allowed) for groups in mine):
                if w.cta.machine.observers:
                    w.cta.machine.observers.warps("wait_group", w, m, i.index, "cp.async", allowed, False)
                return None
            return Wait(
                "cp.async", f"waits for all but {allowed} of its cp.async groups", lambda: all(g.done(allowed) for g in mine)
            )

        return Action(wait, stop=True)
    if f.has("mbarrier"):
        return _arrive_after_copies(d, i, f)
    hinted = f.has("L2::cache_hint")
    f.drop("ca", "cg", "shared", "shared::cta", "global", "L2::64B", "L2::128B", "L2::256B")
    base, offset = d.address(i.operands[0])
    source, source_offset = d.address(i.operands[1])
    size_operand = i.operands[2]
    if not isinstance(size_operand, Immediate):
        raise UnknownInstruction(f"{i.opcode} needs a constant size")
    size = size_operand.value
    rest = i.operands[3:-1] if hinted else i.operands[3:]
    given = ignored = None
    if rest and d.is_predicate(rest[0]):
        ignored = d.predicate(rest[0])
    elif rest:
        given = d.source(rest[0], "b32")

    def run(w: Lanes, m: Any) -> None:
        cta, machine = w.cta, w.cta.machine
        lanes = w.active(m)
        to = w.u[base][lanes].astype(np.uint64) + np.uint64(offset & (2**64 - 1)) - cta.shared.base_word
        at = w.u[source][lanes].astype(np.uint64) + np.uint64(source_offset & (2**64 - 1))
        counts = None if given is None else w.u[given][lanes].copy()
        if ignored is not None:
            counts = np.where(w.u[ignored[0]][lanes] != ignored[1], 0, size)
        mine = [cta.copy_groups.setdefault(w.first + int(lane), Groups()).open for lane in lanes]
        for group in mine:
            group.outstanding += 1
        width, count = (size, 1) if size <= 8 else (8, size // 8)

        def effect() -> None:
            if counts is None or (counts == size).all():
                values = machine.memory.load(at, width, count)
            else:
                shape = (len(at),) if count == 1 else (len(at), count)
                values = np.zeros(shape, f"u{width}")
                flat = values.view(np.uint8).reshape(len(at), size)
                for row in np.flatnonzero(counts):
                    flat[row, : counts[row]] = machine.memory.span(int(at[row]), int(counts[row]))
            cta.shared.store(to, values, width, count)
            for read in (size,) if counts is None else np.unique(counts[counts > 0]).tolist():  # zeros are read nowhere
                chosen = at if counts is None else at[counts == read]
                machine.observers.read("global", None, 0, chosen.view(np.int64), read)
            machine.observers.write("shared", cta, 0, to.view(np.int64), size)
            for group in mine:
                group.outstanding -= 1

        machine.issue(("cp.async", id(cta)), effect, "cp.async", w, i.index, lanes)

    return run


def _arrive_after_copies(d: Decoder, i: Instruction, f: Form) -> Run:
    """Arrive on an mbarrier once the thread's earlier cp.async are done."""
    extra = not f.has("noinc")
    f.drop("arrive", "shared", "shared::cta", "b64")
    base, offset = d.address(i.operands[0])

    def run(w: Lanes, m: Any) -> None:
        machine = w.cta.machine
        for lane in w.active(m):
            barrier = locate(w, base, offset, int(lane))
            if extra:
                barrier.defer()

            def effect(barrier: MBarrier = barrier, lane: int = int(lane)) -> None:
                barrier.arrive(1, Deed("cp.async", site(w, lane, i.index)))

            machine.issue(("cp.async", id(w.cta)), effect, "cp.async arrival", w, i.index, (lane,))

    return run


# bulk copies

_PLACES = ("global", "shared::cta", "shared::cluster")


def _bulk(d: Decoder, i: Instruction, f: Form, reduction: bool) -> Run:
    """One run of bytes between global and shared memory, or from one CTA's shared memory to another's."""
    places = [part for part in f.left if part in _PLACES]
    f.drop(*_PLACES, "L2::cache_hint", "mbarrier::complete_tx::bytes", "bulk_group", "noftz")
    multicast = f.has("multicast::cluster")
    name = f.take("add", "min", "max", "and", "or", "xor", "inc", "dec") if reduction else None
    element = {"b32": "u32", "b64": "u64", "u32": "u32", "s32": "s32", "u64": "u64", "s64": "s64", "f16": "f16", "bf16": "bf16"}
    element |= {"f32": "f32", "f64": "f64"}
    kind = element[f.type()] if reduction else ""
    if f.has("cp_mask") or f.has("ignore_oob") or len(places) != 2:
        raise UnknownInstruction(f"{i.opcode} is not simulated")
    target, origin = places
    to, to_offset = d.address(i.operands[0])
    at, at_offset = d.address(i.operands[1])
    amount = d.source(i.operands[2], "b32")
    bar = d.address(i.operands[3]) if target != "global" else None
    mask = d.source(i.operands[4], "b16") if multicast else None

    def one(w: Lanes, lane: int) -> None:
        cta, machine = w.cta, w.cta.machine
        size = int(w.u[amount][lane])
        destination, start = int(w.u[to][lane]) + to_offset, int(w.u[at][lane]) + at_offset
        if destination % _BULK_ALIGNMENT or start % _BULK_ALIGNMENT or size % _BULK_ALIGNMENT:
            raise MemoryFault(
                f"misaligned: a bulk copy of {size} bytes from 0x{start:x} to 0x{destination:x} needs multiples of 16"
            )

        def read() -> np.ndarray:
            if origin == "global":
                machine.observers.read("global", None, start, _FIRST, size)
                return machine.memory.span(start, size)
            owner, offset = cta.cluster.resolve(start)
            return owner.shared.gather(np.arange(size), offset, "bulk copy")

        def write(view: np.ndarray, data: np.ndarray) -> None:
            view[...] = data if name is None else tma.reduce_elements(view.copy(), np.ascontiguousarray(data), kind, name)

        if target == "global":
            group = cta.bulk_groups.setdefault(w.first + lane, Groups()).open
            group.outstanding += 1

            def to_global() -> None:
                write(machine.memory.span(destination, size), read())
                machine.observers.write("global", None, destination, _FIRST, size)
                group.outstanding -= 1

            machine.issue(None, to_global, "bulk reduce" if name else "bulk store", w, i.index, (lane,))
            return
        assert bar is not None
        where, at_bar = cta.cluster.resolve(destination)
        bar_cta, bar_place = cta.cluster.resolve(int(w.u[bar[0]][lane]) + bar[1])
        targets = cta.cluster.masked(int(w.u[mask][lane])) if mask is not None else [where]

        def to_shared() -> None:
            data = read().copy()
            for other in targets:
                write(other.shared.span(at_bar, size), data)
                other.shared.mark(at_bar, size)
                machine.observers.write("shared", other, at_bar, _FIRST, size)
                owner = other if mask is not None else bar_cta
                owner.mbarrier(bar_place).complete(size, Deed("bulk copy", site(w, lane, i.index)))

        machine.issue(None, to_shared, "bulk load", w, i.index, (lane,))

    slots = [to, at, amount, *([bar[0]] if bar is not None else []), *([mask] if mask is not None else [])]

    def run(w: Lanes, m: Any) -> None:
        for lane in w.issuers(m, slots):
            one(w, lane)

    return run


# tensor copies


def _prefetch(d: Decoder, i: Instruction, f: Form) -> Run:
    """Into L2: no effect that a kernel can see. Of a plain run of bytes, all must be a tensor's."""
    plain = not f.has("tensor")
    f.left.clear()
    slots = []
    if plain:
        at, offset = d.address(i.operands[0])
        slots = [at, amount := d.source(i.operands[1], "b32")]

    def run(w: Lanes, m: Any) -> None:
        for lane in w.issuers(m, slots) if plain else ():
            start, size = int(w.u[at][lane]) + offset, int(w.u[amount][lane])
            if start % _BULK_ALIGNMENT or size % _BULK_ALIGNMENT:
                raise MemoryFault(f"misaligned: a bulk prefetch of {size} bytes from 0x{start:x} needs multiples of 16")
            if size:
                w.cta.machine.memory.span(start, size)
        if w.cta.machine.observers:
            w.cta.machine.issue(None, lambda: None, "prefetch", w, i.index, w.active(m))

    return run


def _tensor(d: Decoder, i: Instruction, f: Form, reduction: bool) -> Run:
    f.take("1d", "2d", "3d", "4d", "5d")
    f.drop("tile", "L2::cache_hint", "mbarrier::complete_tx::bytes", "bulk_group")
    places = [part for part in f.left if part in _PLACES]
    f.drop(*_PLACES)
    name = f.take("add", "min", "max", "inc", "dec", "and", "or", "xor") if reduction else None
    multicast, pair = f.has("multicast::cluster"), f.has("cta_group::2")
    f.drop("cta_group::1")
    rows = f.take("tile::gather4", "tile::scatter4") is not None
    if rows and reduction:
        raise UnknownInstruction(f"{i.opcode}: reductions have no scatter4")
    im2col = f.take("im2col", "im2col_no_offs")
    load = places[0] != "global"
    tensor_operand = i.operands[1] if load else i.operands[0]
    if not isinstance(tensor_operand, Address) or tensor_operand.coordinates is None:
        raise UnknownInstruction(f"{i.opcode} needs coordinates")
    tensor, tensor_offset = d.address(tensor_operand)
    coordinates = [d.source(c, "b32") for c in tensor_operand.coordinates.items]
    shared, shared_offset = d.address(i.operands[0] if load else i.operands[1])
    bar = d.address(i.operands[2]) if load else None
    offsets = [d.source(o, "b16") for o in d.items(i.operands[3])] if im2col == "im2col" else []
    mask = d.source(i.operands[4 if offsets else 3], "b16") if multicast else None

    def read_plan(w: Lanes, lane: int) -> tuple[tma.Plan, list[int]]:
        raw = bytes_at(w.cta, int(w.u[tensor][lane]) + tensor_offset, DESCRIPTOR_BYTES).tobytes()
        plan = tma.plan(raw)
        if (plan.im2col is not None) != (im2col is not None):
            raise MemoryFault(f"{i.opcode} with a descriptor of a {'tiled' if plan.im2col is None else 'im2col'} map")
        return plan, [int(w.s[c][lane]) for c in coordinates]

    def tell_descriptor(w: Lanes, address: int) -> None:
        if address < SHARED_WINDOW:
            w.cta.machine.observers.read("tensormap", None, address, _FIRST, DESCRIPTOR_BYTES)

    def store(w: Lanes, lane: int) -> None:
        cta, machine = w.cta, w.cta.machine
        plan, place = read_plan(w, lane)
        owner, offset = cta.cluster.resolve(int(w.u[shared][lane]) + shared_offset)
        group = cta.bulk_groups.setdefault(w.first + lane, Groups()).open
        group.outstanding += 1
        descriptor = int(w.u[tensor][lane]) + tensor_offset

        def effect() -> None:
            tell_descriptor(w, descriptor)
            if rows:
                tma.scatter(plan, place, machine.memory, owner.shared, offset)
            else:
                machine.movers.store_box(plan, place, owner, offset, name)
            group.outstanding -= 1

        machine.issue(None, effect, "TMA reduce" if name else "TMA store", w, i.index, (lane,), f"at {tuple(place)}")

    def fetch(w: Lanes, lane: int) -> None:
        cta, machine = w.cta, w.cta.machine
        assert bar is not None
        plan, place = read_plan(w, lane)
        cluster = cta.cluster
        owner, offset = cluster.resolve(int(w.u[shared][lane]) + shared_offset)
        bar_cta, bar_place = cluster.resolve(int(w.u[bar[0]][lane]) + bar[1])
        targets = [owner] if mask is None else cluster.masked(int(w.u[mask][lane]))
        shift = [int(w.u[o][lane]) for o in offsets]

        def barrier_of(target: Cta) -> Cta:
            if mask is None:
                return bar_cta
            # With cta_group::2 the barrier lies in the CTA of the target's pair that has the given one's parity.
            return cluster.cta((target.rank & ~1) | (bar_cta.rank & 1)) if pair else target

        descriptor = int(w.u[tensor][lane]) + tensor_offset

        who = site(w, lane, i.index)

        def effect() -> None:
            tell_descriptor(w, descriptor)
            size = plan.counted_bytes * (4 if rows else 1)
            for target in targets:
                if rows:
                    tma.gather(plan, place, machine.memory, target.shared, offset)
                else:
                    machine.movers.load_box(plan, place, target, offset, shift)
                barrier_of(target).mbarrier(bar_place).complete(size, Deed(f"TMA load at {tuple(place)}", who))

        machine.issue(None, effect, "TMA load", w, i.index, (lane,), f"at {tuple(place)}")

    each = fetch if load else store

    slots = [tensor, *coordinates, shared, *offsets, *(slot for slot in (bar and bar[0], mask) if slot is not None)]

    def run(w: Lanes, m: Any) -> None:
        for lane in w.issuers(m, slots):
            each(w, lane)

    return run


@family("tensormap")
def tensormap(d: Decoder, i: Instruction, f: Form) -> Run:
    if f.has("cp_fenceproxy"):
        f.left.clear()
        to, to_offset = d.address(i.operands[0])
        at, at_offset = d.address(i.operands[1])

        release = Fence("tensormap::generic", Order("release", "gpu"))

        def copy(w: Lanes, m: Any) -> None:
            for _, lane in w.warps_active(m):
                owner, offset = w.cta.cluster.resolve(int(w.u[at][lane]) + at_offset)
                source = owner.shared.span(offset, DESCRIPTOR_BYTES)
                target = int(w.u[to][lane]) + to_offset
                bytes_at(w.cta, target, DESCRIPTOR_BYTES)[...] = source
                if w.cta.machine.observers.accesses:
                    tell_bytes(w, lane, i.index, "read", owner.shared.base + offset, DESCRIPTOR_BYTES, "shared")
                    tell_bytes(w, lane, i.index, "write", target, DESCRIPTOR_BYTES)
            if w.cta.machine.observers:
                w.cta.machine.observers.warps("fence", w, m, i.index, release)

        return copy
    f.drop("replace", "tile", "b1024")
    field = f.left.pop(0)
    shared = f.take("shared::cta", "global") == "shared::cta"
    t = f.type()
    base, offset = d.address(i.operands[0])
    ordinal_operand = i.operands[1]
    ordinal = ordinal_operand.value if len(i.operands) == 3 and isinstance(ordinal_operand, Immediate) else 0
    value = d.source(i.operands[-1], t)

    def run(w: Lanes, m: Any) -> None:
        for lane in w.active(m):
            address = int(w.u[base][lane]) + offset
            if shared and address < SHARED_WINDOW:
                address += SHARED_WINDOW
            raw = bytes_at(w.cta, address, DESCRIPTOR_BYTES)
            before = raw.copy()
            tma.replace_field(raw, field, ordinal, int(w.u[value][lane]))
            changed = np.flatnonzero(before != raw)
            if w.cta.machine.observers.accesses and len(changed):  # what stays as it was is no conflict
                first = int(changed[0])
                tell_bytes(w, int(lane), i.index, "write", address + first, int(changed[-1]) + 1 - first)

    return run


@family("clusterlaunchcontrol")
def launch_control(d: Decoder, i: Instruction, f: Form) -> Run:
    """Work stealing: try_cancel hands the next waiting cluster's index to the caller, or says that none is left."""
    if f.has("try_cancel"):
        f.drop("async", "shared::cta", "shared::cluster", "mbarrier::complete_tx::bytes", "b128")
        multicast = f.has("multicast::cluster::all")
        to, to_offset = d.address(i.operands[0])
        bar, bar_offset = d.address(i.operands[1])

        def cancel(w: Lanes, m: Any) -> None:
            machine = w.cta.machine
            for lane in w.active(m):
                _, place = w.cta.cluster.resolve(int(w.u[to][lane]) + to_offset)
                _, bar_place = w.cta.cluster.resolve(int(w.u[bar][lane]) + bar_offset)
                targets = w.cta.cluster.ctas if multicast else [w.cta]
                answer = np.zeros(4, np.uint32)
                if machine.waiting_clusters:
                    index = machine.waiting_clusters.popleft()
                    answer[:3] = [n * c for n, c in zip(index, machine.launch.cluster, strict=True)]
                    answer[3] = 1

                def effect(
                    place: int = place,
                    bar_place: int = bar_place,
                    answer: np.ndarray = answer,
                    targets: list[Cta] = targets,
                    who: Site = site(w, int(lane), i.index),  # noqa: B008 - bound now
                ) -> None:
                    for target in targets:
                        target.shared.span(place, 16)[...] = answer.view(np.uint8)
                        target.shared.mark(place, 16)
                        machine.observers.write("shared", target, place, _FIRST, 16)
                        target.mbarrier(bar_place).complete(16, Deed("clusterlaunchcontrol", who))

                machine.issue(None, effect, "clusterlaunchcontrol", w, i.index, (lane,))

        return cancel
    f.drop("query_cancel", "b128")
    if f.has("is_canceled"):
        f.drop("pred")
        target, a = d.register(i.operands[0]), d.source(i.operands[1], "b128")

        def answered(w: Lanes, m: Any) -> None:
            valid = (w.u[a][:, 1] >> np.uint64(32)) != 0
            np.copyto(w.u[target], valid, where=True if m is None else m)

        return answered
    part = f.take("get_first_ctaid", "get_first_ctaid::x", "get_first_ctaid::y", "get_first_ctaid::z")
    if part is None:
        raise UnknownInstruction(f"{i.opcode} is not simulated")
    f.drop("v4", "b32")
    source = d.source(i.operands[1], "b128")
    wanted = range(4) if part == "get_first_ctaid" else ["xyz".index(part[-1])]
    targets = [d.sink(o) for o in d.items(i.operands[0])]

    def first(w: Lanes, m: Any) -> None:
        words = w.u[source].view(np.uint32).reshape(w.n, 4)
        for target, column in zip(targets, wanted, strict=True):
            if target is not None:
                np.copyto(w.u[target], words[:, column], where=True if m is None else m)

    return first
