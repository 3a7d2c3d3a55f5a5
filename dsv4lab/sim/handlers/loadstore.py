"""Loads, stores and atomics on every address space."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from dsv4lab.sim import numfmt
from dsv4lab.sim.decode import ORDER, TYPE_BYTES, Action, Decoder, Form, Run, family
from dsv4lab.sim.errors import MemoryFault, UnknownInstruction
from dsv4lab.sim.handlers.alu import assign, signed
from dsv4lab.sim.handlers.floating import extreme
from dsv4lab.sim.handlers.printing import store_argument
from dsv4lab.sim.memory import LOCAL_WINDOW, PARAM_WINDOW, RANK_SHIFT, SHARED_WINDOW, WINDOW_BYTES
from dsv4lab.sim.observe import Deed, Order, Site, accesses, site
from dsv4lab.sim.program import Address, Instruction, Symbol
from dsv4lab.sim.registers import Lanes

Array = NDArray
_SPACES = ("global", "shared", "shared::cta", "shared::cluster", "local", "param", "const", "param::entry", "param::func")
_CACHE: tuple[str, ...] = (
    "ca",
    "cg",
    "cs",
    "cv",
    "lu",
    "wb",
    "wt",
    "L1::no_allocate",
    "L1::evict_first",
    "L1::evict_last",
    "L1::evict_normal",
)
_CACHE += ("L1::evict_unchanged", "L2::64B", "L2::128B", "L2::256B", "L2::evict_first", "L2::evict_last", "L2::evict_normal")
_SHARED = np.uint64(SHARED_WINDOW)
_FIRST = np.zeros(1, np.int64)


class Access:
    """Addresses of one instruction and how its space is reached."""

    def __init__(self, d: Decoder, i: Instruction, operand: Any, space: str | None, size: int, count: int) -> None:
        self.index, self.order = i.index, memory_order(i.opcode)
        self.base, offset = d.address(operand)
        self.offset = np.uint64(offset & (2**64 - 1))
        self.wide = d.width(self.base) == 8
        self.space = "shared" if space is not None and space.startswith("shared") else space
        if self.space is not None and self.space.startswith("param"):
            self.space = "param"
        if space == "const":
            raise UnknownInstruction("constant memory is not simulated")
        self.size, self.count = size, count

    def addresses(self, w: Lanes, m: Any) -> Array:
        """Byte addresses of the active lanes, uint64."""
        base = w.u[self.base]
        if m is not None:
            base = base[m]
        return (base if self.wide else base.astype(np.uint64)) + self.offset

    def load(self, w: Lanes, m: Any) -> Array:
        """(active lanes,) or (active lanes, count) elements."""
        addresses = self.addresses(w, m)
        if w.cta.machine.observers.accesses:
            self.tell(w, m, "read", addresses)
        space = self.space
        if space == "global":
            return w.cta.machine.memory.load(addresses, self.size, self.count)
        if space == "shared":
            return self._load_shared(w, addresses)
        if space == "param":
            return w.cta.machine.params.load(addresses - np.uint64(PARAM_WINDOW), self.size, self.count)
        if space == "local":
            return self._local(w, m, addresses, None)
        window = _window(int(addresses[0]))
        if window == "global":
            return w.cta.machine.memory.load(addresses, self.size, self.count)
        if window == "shared":
            return self._load_shared(w, addresses - _SHARED)
        if window == "local":
            return self._local(w, m, addresses, None)
        return w.cta.machine.params.load(addresses - np.uint64(PARAM_WINDOW), self.size, self.count)

    def store(self, w: Lanes, m: Any, values: Array) -> None:
        addresses = self.addresses(w, m)
        if w.cta.machine.observers.accesses:
            self.tell(w, m, "write", addresses, values=values)
        space = self.space or _window(int(addresses[0]))
        if space == "global":
            w.cta.machine.memory.store(addresses, values, self.size, self.count)
        elif space == "shared":
            self._store_shared(w, addresses - _SHARED if self.space is None else addresses, values)
        elif space == "local":
            self._local(w, m, addresses, values)
        else:
            raise MemoryFault("the kernel's parameters cannot be written")

    def tell(
        self,
        w: Lanes,
        m: Any,
        kind: str,
        addresses: Array,
        lanes: Array | None = None,
        size: int = 0,
        values: Array | None = None,
    ) -> None:
        """Tell observers of the access; addresses as the instruction gives them, by default one for each active lane."""
        space = self.space or _window(int(addresses[0]))
        lanes = w.active(m) if lanes is None else lanes
        if space == "param":
            return
        if space == "shared" and self.space is None:
            addresses = addresses - _SHARED
        elif space == "local":
            threads = (lanes + w.first).astype(np.uint64)
            addresses = addresses - np.uint64(LOCAL_WINDOW) + threads * np.uint64(w.cta.local_stride)
        size = size or self.size * self.count
        for access in accesses(w, lanes, self.index, space, kind, addresses, size, self.order, values):
            w.cta.machine.observers.tell("access", access)

    def _load_shared(self, w: Lanes, addresses: Array) -> Array:
        shared = w.cta.shared
        offsets = addresses - shared.base_word
        if len(w.cta.cluster.ctas) == 1 or not (offsets >> np.uint64(RANK_SHIFT)).any():
            return shared.load(offsets, self.size, self.count)
        shape = (len(addresses),) if self.count == 1 else (len(addresses), self.count)
        out = np.empty(shape, f"u{self.size}")
        for rank in np.unique(addresses >> np.uint64(RANK_SHIFT)):
            other = w.cta.cluster.cta(int(rank)).shared
            here = (addresses >> np.uint64(RANK_SHIFT)) == rank
            out[here] = other.load(addresses[here] - other.base_word, self.size, self.count)
        return out

    def _store_shared(self, w: Lanes, addresses: Array, values: Array) -> None:
        shared = w.cta.shared
        offsets = addresses - shared.base_word
        if len(w.cta.cluster.ctas) == 1 or not (offsets >> np.uint64(RANK_SHIFT)).any():
            shared.store(offsets, values, self.size, self.count)
            return
        for rank in np.unique(addresses >> np.uint64(RANK_SHIFT)):
            other = w.cta.cluster.cta(int(rank)).shared
            here = (addresses >> np.uint64(RANK_SHIFT)) == rank
            other.store(addresses[here] - other.base_word, values[here], self.size, self.count)

    def _local(self, w: Lanes, m: Any, addresses: Array, values: Array | None) -> Array:
        cta = w.cta
        if cta.local is None:
            raise MemoryFault("the kernel declares no local memory")
        threads = np.arange(w.first, w.first + w.n, dtype=np.uint64)
        if m is not None:
            threads = threads[m]
        relative = addresses - np.uint64(LOCAL_WINDOW)
        if (relative >= np.uint64(cta.local_stride)).any():
            raise MemoryFault(
                f"out of bounds: local memory has {cta.local_stride} bytes a thread, access at {int(relative.max())}"
            )
        offsets = relative + threads * np.uint64(cta.local_stride)
        if values is None:
            return cta.local.load(offsets, self.size, self.count)
        cta.local.store(offsets, values, self.size, self.count)
        return values


def memory_order(opcode: str) -> Order:
    """Order and scope that a load, store or atomic spells out; atomics are relaxed at gpu scope by default."""
    parts = opcode.split(".")
    atomic = parts[0] in ("atom", "red")
    name = next((p for p in parts if p in ("relaxed", "acquire", "release", "acq_rel", "volatile", "mmio")), "")
    scope = next((p for p in parts if p in ("cta", "cluster", "gpu", "sys")), "")
    return Order(name or ("relaxed" if atomic else "weak"), scope or ("gpu" if atomic else ""))


def _window(address: int) -> str:
    if address < SHARED_WINDOW:
        return "global"
    if address < SHARED_WINDOW + WINDOW_BYTES:
        return "shared"
    if LOCAL_WINDOW <= address < LOCAL_WINDOW + WINDOW_BYTES:
        return "local"
    if PARAM_WINDOW <= address < PARAM_WINDOW + WINDOW_BYTES:
        return "param"
    raise MemoryFault(f"generic address 0x{address:x} lies in no address space")


def _vector(f: Form) -> int:
    part = f.take("v2", "v4", "v8")
    return int(part[1:]) if part else 1


def _element(f: Form) -> tuple[str, int]:
    t = f.type()
    return t, TYPE_BYTES[t]


@family("ld", "ldu")
def ld(d: Decoder, i: Instruction, f: Form) -> Run:
    f.drop(*ORDER, *_CACHE, "cluster")
    count = _vector(f)
    space = f.take(*_SPACES)
    t, size = _element(f)
    if size == 16:
        count, size = 2 * count, 8
    targets = [d.sink(o) for o in d.items(i.operands[0])]
    if t == "b128":
        return _load_b128(d, i, targets, space)
    if space is not None and space.startswith("param"):
        uniform = _load_param(d, i, targets, t, size)
        if uniform is not None:
            return uniform
    access = Access(d, i, i.operands[1], space, size, count)
    widen = f"i{size}" if signed(t) else None

    def write(w: Lanes, target: int, value: Array, m: Any) -> None:
        out = w.u[target]
        if widen is not None and out.dtype.itemsize != size:
            value = value.view(widen).astype(f"i{out.dtype.itemsize}").view(out.dtype)
        if m is None:
            out[...] = value
        else:
            out[m] = value

    if count == 1:
        target = targets[0]

        def run_one(w: Lanes, m: Any) -> None:
            value = access.load(w, m)
            if target is not None:
                write(w, target, value, m)

        return run_one

    def run(w: Lanes, m: Any) -> None:
        values = access.load(w, m)
        for column, target in enumerate(targets):
            if target is not None:
                write(w, target, np.ascontiguousarray(values[:, column]), m)

    return run


def _load_b128(d: Decoder, i: Instruction, targets: list[int | None], space: str | None) -> Run:
    access = Access(d, i, i.operands[1], space, 8, 2)

    def run(w: Lanes, m: Any) -> None:
        values = access.load(w, m)
        if targets[0] is not None:
            w.u[targets[0]][slice(None) if m is None else m] = values

    return run


def _load_param(d: Decoder, i: Instruction, targets: list[int | None], t: str, size: int) -> Run | None:
    """A parameter read by name has one value for every thread."""
    operand = i.operands[1]
    if not isinstance(operand, Address) or not isinstance(operand.base, Symbol):
        return None
    name = operand.base.name
    param = next((p for p in d.kernel.params if p.name == name), None)
    if param is None:
        return None
    start = param.offset + operand.offset
    if start % size or operand.offset + size * len(targets) > param.size:
        raise UnknownInstruction(f"{i.opcode} reads beyond parameter {name} of {param.size} bytes")
    kind = f"{'i' if signed(t) else 'u'}{size}"

    def run(w: Lanes, m: Any) -> None:
        data = w.cta.machine.params.data[start : start + size * len(targets)].view(kind)
        for target, value in zip(targets, data, strict=True):
            if target is not None:
                out = w.s[target] if kind[0] == "i" else w.u[target]
                if m is None:
                    out[...] = value
                else:
                    out[m] = value

    return run


@family("st")
def st(d: Decoder, i: Instruction, f: Form) -> Run:
    f.drop(*ORDER, *_CACHE, "cluster")
    if f.has("async"):
        return _async_store(d, i, f)
    count = _vector(f)
    space = f.take(*_SPACES)
    t, size = _element(f)
    if space is not None and space.startswith("param"):
        return store_argument(d, i, t)
    if t == "b128":
        wide = Access(d, i, i.operands[0], space, 8, 2)
        source = d.source(i.operands[1], t)
        return lambda w, m: wide.store(w, m, w.u[source] if m is None else w.u[source][m])
    access = Access(d, i, i.operands[0], space, size, count)
    sources = [d.source(o, t, wider=True) for o in d.items(i.operands[1])]
    dtype = f"u{size}"
    if count == 1:
        only = sources[0]

        def run_one(w: Lanes, m: Any) -> None:
            value = w.u[only]
            if m is not None:
                value = value[m]
            access.store(w, m, value.astype(dtype, copy=False))

        return run_one

    def run(w: Lanes, m: Any) -> None:
        values = np.stack([w.u[s] for s in sources], axis=1).astype(dtype, copy=False)
        access.store(w, m, values if m is None else values[m])

    return run


def _async_store(d: Decoder, i: Instruction, f: Form) -> Run:
    """`st.async`: a store to another CTA's shared memory that completes bytes on an mbarrier there."""
    f.drop("mbarrier::complete_tx::bytes", "shared::cluster")
    count = _vector(f)
    t, size = _element(f)
    access = Access(d, i, i.operands[0], "shared", size, count)
    sources = [d.source(o, t) for o in d.items(i.operands[1])]
    barrier = Access(d, i, i.operands[2], "shared", 8, 1)

    def run(w: Lanes, m: Any) -> None:
        values = np.stack([w.u[s] for s in sources], axis=1)
        values, active = values if m is None else values[m], w.active(m)
        addresses, targets = access.addresses(w, m), barrier.addresses(w, m)
        for lane, (address, target) in enumerate(zip(addresses, targets, strict=True)):
            one = np.array([address]), values[lane : lane + 1] if count > 1 else values[lane : lane + 1, 0]

            who = site(w, int(active[lane]), i.index)

            def effect(one: tuple[Array, Array] = one, target: int = int(target), who: Site = who) -> None:
                access._store_shared(w, *one)
                owner, place = w.cta.cluster.resolve(int(one[0][0]))
                w.cta.machine.observers.write("shared", owner, place, _FIRST, size * count)
                cta, offset = w.cta.cluster.resolve(target)
                cta.mbarrier(offset).complete(size * count, Deed("st.async", who))

            w.cta.machine.issue(None, effect, "st.async", w, i.index, (int(active[lane]),))

    return run


def _async_reduction(d: Decoder, i: Instruction, f: Form) -> Action:
    """`red.async`: a reduction on another CTA's shared memory that completes bytes on an mbarrier there."""
    f.drop("mbarrier::complete_tx::bytes", "shared::cluster")
    name = f.take("add", "min", "max", "and", "or", "xor", "inc", "dec")
    t, size = _element(f)
    if name is None:
        raise UnknownInstruction(f"{i.opcode}: unknown reduction")
    access = Access(d, i, i.operands[0], "shared", size, 1)
    source = d.source(i.operands[1], t)
    barrier = Access(d, i, i.operands[2], "shared", 8, 1)

    def run(w: Lanes, m: Any) -> None:
        values = w.u[source].copy()
        addresses, targets = access.addresses(w, m), barrier.addresses(w, m)
        for position, lane in enumerate(w.active(m)):
            address, target, who = addresses[position : position + 1], int(targets[position]), site(w, int(lane), i.index)
            new = values[lane : lane + 1]

            def effect(address: Array = address, target: int = target, new: Array = new, who: Site = who) -> None:
                old, put = _cell(w, access, address)
                put(_combine(name, t, old, new, None))
                owner, place = w.cta.cluster.resolve(int(address[0]))
                w.cta.machine.observers.write("shared", owner, place, _FIRST, size)
                cta, offset = w.cta.cluster.resolve(target)
                cta.mbarrier(offset).complete(size, Deed("red.async", who))

            w.cta.machine.issue(None, effect, "red.async", w, i.index, (int(lane),))

    return Action(run)


_PAIRS = ("f16x2", "bf16x2")
_FLOAT_ATOMS = ("f32", "f64", "f16", "bf16", *_PAIRS)


def _combine(name: str, t: str, old: Array, new: Array, third: Array | None) -> Array:
    """One element's new bits; arrays of length 1, or 2 for packed types."""
    if name == "exch":
        return new
    if name == "cas":
        assert third is not None
        return third if old[0] == new[0] else old
    bits = old.dtype
    if t in _FLOAT_ATOMS:
        if t.startswith("bf16"):
            a, b = (numfmt.bf16_to_f32(x.view(np.uint16)) for x in (old, new))
        else:
            kind = {"f32": "f4", "f64": "f8"}.get(t, "f2")
            a, b = old.view(kind), new.view(kind)
        value = numfmt.canonical(a + b) if name == "add" else extreme(a, b, name == "min")
        return (numfmt.f32_to_bf16(value) if t.startswith("bf16") else value).view(bits)
    kind = f"{'i' if signed(t) else 'u'}{bits.itemsize}"
    a, b = old.view(kind), new.view(kind)
    if name == "inc":
        value = np.where(a >= b, 0, a + 1).astype(kind)
    elif name == "dec":
        value = np.where((a == 0) | (a > b), b, a - 1).astype(kind)
    else:
        functions = {
            "add": np.add,
            "min": np.minimum,
            "max": np.maximum,
            "and": np.bitwise_and,
            "or": np.bitwise_or,
            "xor": np.bitwise_xor,
        }
        value = functions[name](a, b)
    return value.view(bits)


@family("atom", "red")
def atomic(d: Decoder, i: Instruction, f: Form) -> Action:
    """Lanes take effect one after another, in lane order."""
    f.drop(*ORDER, *_CACHE, "cluster", "noftz")
    if f.has("async"):
        return _async_reduction(d, i, f)
    count = _vector(f)
    space = f.take(*_SPACES)
    name = f.take("add", "min", "max", "and", "or", "xor", "exch", "cas", "inc", "dec")
    if name is None:
        raise UnknownInstruction(f"{i.opcode}: unknown atomic operation")
    t, size = _element(f)
    # SASS of sm_90a and sm_100a: a CAS loop for memory of the own CTA (QSPC.E.S), LD, the operation and ST for other addresses;
    # float32 and float64 sums have a second loop, for another CTA's memory (QSPC.E.D).
    torn = t in _PAIRS or (size == 8 and t[0] in "usb" and name in ("add", "min", "max", "and", "or", "xor"))
    torn = torn and space in (None, "shared::cluster")
    returns = f.family == "atom"
    operands = i.operands[1:] if returns else i.operands
    targets = [d.sink(o) for o in d.items(i.operands[0])] if returns else []
    access = Access(d, i, operands[0], space, size, 1)
    sources = [d.source(o, t) for o in d.items(operands[1])]
    third = d.source(operands[2], t) if name == "cas" else None

    def run(w: Lanes, m: Any) -> None:
        machine = w.cta.machine
        lanes = w.active(m)
        addresses = access.addresses(w, m)
        if torn:
            _own_memory(w, i, space, addresses)
        if machine.observers.accesses:
            access.tell(w, m, "atomic", addresses, size=size * count)
        for position, lane in enumerate(lanes):
            for part in range(count):
                address = addresses[position : position + 1] + np.uint64(part * size)
                old, put = _cell(w, access, address)
                new = w.u[sources[part]][lane : lane + 1]
                value = _combine(name, t, old, new, None if third is None else w.u[third][lane : lane + 1])
                put(value)
                machine.progress += int(value[0] != old[0])  # a lock that is polled in vain is no progress
                if returns and targets[part] is not None:
                    w.u[targets[part]][lane] = old[0]  # type: ignore[index]

    return Action(run)


def _own_memory(w: Lanes, i: Instruction, space: str | None, addresses: Array) -> None:
    """Refuse an atomic operation on another CTA's shared memory that the GPU's code does not make one."""
    if space is None:
        addresses = addresses[(addresses >= _SHARED) & (addresses < _SHARED + np.uint64(WINDOW_BYTES))] - _SHARED
    if ((addresses >> np.uint64(RANK_SHIFT)) & np.uint64(0xFF) != w.cta.rank).any():
        raise UnknownInstruction(
            f"{i.opcode}: on another CTA's shared memory ptxas makes it a load and a store, which are not atomic (updates by "
            "max.u64 were lost on an H200); give each CTA a slot of its own and read them all, or use 32-bit integers"
        )


def _cell(w: Lanes, access: Access, address: Array) -> tuple[Array, Any]:
    """One element's bits and the function that replaces them."""
    space = access.space or _window(int(address[0]))
    if space == "global":
        memory = w.cta.machine.memory
        return memory.load(address, access.size), lambda value: memory.store(address, value, access.size)
    if space != "shared":
        raise MemoryFault(f"atomic operation on {space} memory")
    local = address - _SHARED if access.space is None else address
    return access._load_shared(w, local), lambda value: access._store_shared(w, local, value)


__all__ = ["Access", "assign"]
