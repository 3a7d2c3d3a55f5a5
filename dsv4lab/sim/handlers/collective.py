"""Instructions that a warp executes together: election, votes, shuffles, reductions, matrix fragments."""

from __future__ import annotations

from functools import reduce
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dsv4lab.sim.decode import ALL_LANES, Action, Decoder, Form, Run, family
from dsv4lab.sim.errors import UnknownInstruction
from dsv4lab.sim.handlers.alu import assign, signed
from dsv4lab.sim.handlers.bytematrix import load_bytes, store_bytes
from dsv4lab.sim.handlers.floating import extreme
from dsv4lab.sim.handlers.loadstore import Access
from dsv4lab.sim.program import Instruction
from dsv4lab.sim.registers import WARP, Lanes

Array = NDArray
_LANE = np.arange(WARP)
_BITS = np.uint64(1) << np.arange(WARP, dtype=np.uint64)


def rows(w: Lanes, value: Array) -> Array:
    """A lane array as (warps, 32)."""
    return value.reshape(w.warps, WARP)


def _active(w: Lanes, m: Any) -> Array:
    return np.ones((w.warps, WARP), bool) if m is None else m.reshape(w.warps, WARP)


@family("elect")
def elect(d: Decoder, i: Instruction, f: Form) -> Action:
    """The lowest active lane is elected (which one is unspecified)."""
    f.drop("sync")
    lane, elected = d.pair(i.operands[0])
    members = d.source(i.operands[1], "b32")

    def run(w: Lanes, m: Any) -> None:
        if m is None:
            chosen = np.zeros((w.warps, 1), np.int64)
        else:
            chosen = rows(w, m).argmax(axis=1)[:, None]
        if lane is not None:
            assign(w, lane, np.repeat(chosen[:, 0], WARP).astype(np.uint32), m)
        if elected is not None:
            assign(w, elected, (_LANE[None, :] == chosen).reshape(-1), m)

    return Action(run, stop=True, members=members)


@family("activemask")
def activemask(d: Decoder, i: Instruction, f: Form) -> Run:
    f.type()
    target = d.register(i.operands[0])

    def run(w: Lanes, m: Any) -> None:
        bits = (_active(w, m) * _BITS).sum(axis=1).astype(np.uint32)
        assign(w, target, np.repeat(bits, WARP), m)

    return run


@family("vote")
def vote(d: Decoder, i: Instruction, f: Form) -> Action:
    f.drop("sync")
    mode = f.take("all", "any", "uni", "ballot")
    f.type()
    target = d.register(i.operands[0])
    p, negated = d.predicate(i.operands[1])
    members = d.source(i.operands[2], "b32")

    def run(w: Lanes, m: Any) -> None:
        active = _active(w, m)
        value = rows(w, ~w.u[p] if negated else w.u[p])
        true = value & active
        if mode == "ballot":
            result: Array = (true * _BITS).sum(axis=1).astype(np.uint32)
        elif mode == "any":
            result = true.any(axis=1)
        else:
            every = (value | ~active).all(axis=1)
            result = every if mode == "all" else every | ~true.any(axis=1)
        assign(w, target, np.repeat(result, WARP), m)

    return Action(run, stop=True, members=members)


@family("match")
def match(d: Decoder, i: Instruction, f: Form) -> Action:
    f.drop("sync")
    mode = f.take("any", "all")
    t = f.type()
    target, agreed = d.pair(i.operands[0])
    a, members = d.source(i.operands[1], t), d.source(i.operands[2], "b32")

    def run(w: Lanes, m: Any) -> None:
        active, values = _active(w, m), rows(w, w.u[a])
        equal = (values[:, :, None] == values[:, None, :]) & active[:, None, :]
        masks = (equal * _BITS).sum(axis=2).astype(np.uint32)
        if mode == "all":
            whole = (active * _BITS).sum(axis=1).astype(np.uint32)[:, None]
            same = ((masks == whole) | ~active).all(axis=1, keepdims=True)
            masks = np.where(same, whole, 0).astype(np.uint32) + np.zeros_like(masks)
            if agreed is not None:
                assign(w, agreed, np.repeat(same[:, 0], WARP), m)
        if target is not None:
            assign(w, target, masks.reshape(-1), m)

    return Action(run, stop=True, members=members)


@family("shfl")
def shfl(d: Decoder, i: Instruction, f: Form) -> Action:
    f.drop("sync")
    mode = f.take("idx", "bfly", "up", "down")
    f.type()
    target, valid = d.pair(i.operands[0])
    a, b, c = (d.source(o, "b32") for o in i.operands[1:4])
    members = d.source(i.operands[4], "b32")
    fixed = d.constants.get(b), d.constants.get(c)

    def route(w: Lanes) -> tuple[Array, Array]:
        """Source lane within the warp and whether it is in range, for every lane."""
        lane = np.tile(_LANE, w.warps)
        step = (w.u[b] & np.uint32(31)).astype(np.int64)
        control = w.u[c].astype(np.int64)
        segment, clamp = (control >> 8) & 31, control & 31
        high, low = (lane & segment) | (clamp & ~segment), lane & segment
        if mode == "idx":
            source = low | (step & ~segment)
            inside = source <= high
        elif mode == "bfly":
            source = lane ^ step
            inside = source <= high
        elif mode == "up":
            source = lane - step
            inside = source >= high
        else:
            source = lane + step
            inside = source <= high
        source = np.where(inside, source, lane)
        return source + np.repeat(np.arange(w.warps) * WARP, WARP), inside

    cache: dict[int, tuple[Array, Array]] = {}

    def run(w: Lanes, m: Any) -> None:
        if fixed[0] is not None and fixed[1] is not None:
            found = cache.get(w.warps)
            if found is None:
                found = cache[w.warps] = route(w)
        else:
            found = route(w)
        source, inside = found
        if target is not None:
            assign(w, target, w.u[a][source], m)
        if valid is not None:
            assign(w, valid, inside, m)

    return Action(run, stop=True, members=members)


@family("redux")
def redux(d: Decoder, i: Instruction, f: Form) -> Action:
    f.drop("sync")
    name = f.take("add", "min", "max", "and", "or", "xor")
    keep_nan, absolute = f.has("NaN"), f.has("abs")
    t = f.type()
    target, a, members = d.register(i.operands[0]), d.source(i.operands[1], t), d.source(i.operands[2], "b32")
    floating = t == "f32"
    functions = {
        "add": np.add,
        "min": np.minimum,
        "max": np.maximum,
        "and": np.bitwise_and,
        "or": np.bitwise_or,
        "xor": np.bitwise_xor,
    }
    function = functions[name or ""]

    def run(w: Lanes, m: Any) -> None:
        values = rows(w, (w.f if floating else w.s if signed(t) else w.u)[a])
        if absolute:
            values = np.abs(values)
        active = _active(w, m)
        out = np.zeros(w.warps, values.dtype)
        for row in range(w.warps):
            chosen = values[row][active[row]]
            if floating and len(chosen):
                out[row] = reduce(lambda x, y: extreme(x, y, name == "min", keep_nan), chosen.reshape(-1, 1))[0]
            elif len(chosen):
                out[row] = function.reduce(chosen, dtype=values.dtype)
        assign(w, target, np.repeat(out, WARP).view(np.uint32), m)

    return Action(run, stop=True, members=members)


def _first_lanes(w: Lanes, count: int) -> Array:
    """The first `count` lanes of each warp: those that give addresses."""
    return (np.arange(w.warps)[:, None] * WARP + np.arange(count)).reshape(-1)


def _matrices(f: Form) -> int:
    part = f.take("x1", "x2", "x4")
    return int(part[1:]) if part else 1


@family("ldmatrix")
def ldmatrix(d: Decoder, i: Instruction, f: Form) -> Action:
    f.drop("sync", "aligned", "shared", "shared::cta")
    count = _matrices(f)
    if f.take("m8n8") is None:
        return load_bytes(d, i, f, count)
    transpose = f.has("trans")
    if f.type() != "b16":
        raise UnknownInstruction(f"{i.opcode}: .m8n8 is of .b16")
    targets = [d.register(o) for o in d.items(i.operands[0])]
    access = Access(d, i, i.operands[1], "shared", 8, 2)

    def run(w: Lanes, m: Any) -> None:
        addresses = access.addresses(w, None).reshape(w.warps, WARP)[:, : 8 * count].reshape(-1)
        if w.cta.machine.observers.accesses:
            access.tell(w, m, "read", addresses, _first_lanes(w, 8 * count))
        data = access._load_shared(w, addresses).view(np.uint16).reshape(w.warps, count, 8, 8)
        if transpose:
            data = data.swapaxes(2, 3)
        words = np.ascontiguousarray(data).view(np.uint32).reshape(w.warps, count, WARP)
        for k, target in enumerate(targets):
            w.u[target][...] = words[:, k].reshape(-1)

    return Action(run, stop=True, members=ALL_LANES)


@family("stmatrix")
def stmatrix(d: Decoder, i: Instruction, f: Form) -> Action:
    f.drop("sync", "aligned", "shared", "shared::cta")
    count = _matrices(f)
    if f.take("m8n8") is None:
        return store_bytes(d, i, f, count)
    transpose = f.has("trans")
    if f.type() != "b16":
        raise UnknownInstruction(f"{i.opcode}: .m8n8 is of .b16")
    sources = [d.register(o) for o in d.items(i.operands[1])]
    access = Access(d, i, i.operands[0], "shared", 8, 2)

    def run(w: Lanes, m: Any) -> None:
        words = np.stack([rows(w, w.u[s]) for s in sources], axis=1)  # (warps, count, 32)
        data = words.view(np.uint16).reshape(w.warps, count, 8, 8)
        if transpose:
            data = data.swapaxes(2, 3)
        lines = np.ascontiguousarray(data).view(np.uint64).reshape(-1, 2)
        addresses = access.addresses(w, None).reshape(w.warps, WARP)[:, : 8 * count].reshape(-1)
        if w.cta.machine.observers.accesses:
            access.tell(w, m, "write", addresses, _first_lanes(w, 8 * count))
        access._store_shared(w, addresses, lines)

    return Action(run, stop=True, members=ALL_LANES)


@family("movmatrix")
def movmatrix(d: Decoder, i: Instruction, f: Form) -> Action:
    f.drop("sync", "aligned", "m8n8", "trans")
    f.type()
    target, a = d.register(i.operands[0]), d.source(i.operands[1], "b32")

    def run(w: Lanes, m: Any) -> None:
        data = w.w[a].reshape(w.warps, 8, 8).swapaxes(1, 2)
        w.u[target][...] = np.ascontiguousarray(data).view(np.uint32).reshape(-1)

    return Action(run, stop=True, members=ALL_LANES)


@family("mapa")
def mapa(d: Decoder, i: Instruction, f: Form) -> Run:
    """The address of the same place in another CTA's shared memory; generic addresses stay generic."""
    shared = f.take("shared::cluster", "shared::cta", "shared") is not None
    t = f.type()
    target, a, rank = d.register(i.operands[0]), d.source(i.operands[1], t), d.source(i.operands[2], "b32")

    def run(w: Lanes, m: Any) -> None:
        address = w.u[a]
        kind = address.dtype.type
        keep = kind(0xFFFFFF) if shared else kind(0xFFFFFF | (0xFFFFFFFF << 32) if address.dtype.itemsize == 8 else 0xFFFFFF)
        assign(w, target, (address & keep) | (w.u[rank].astype(address.dtype) << kind(24)), m)

    return run


@family("getctarank")
def getctarank(d: Decoder, i: Instruction, f: Form) -> Run:
    f.take("shared::cluster")
    t = f.type()
    target, a = d.register(i.operands[0]), d.source(i.operands[1], t)
    return lambda w, m: assign(w, target, ((w.u[a] >> w.u[a].dtype.type(24)) & w.u[a].dtype.type(0xFF)).astype(np.uint32), m)
