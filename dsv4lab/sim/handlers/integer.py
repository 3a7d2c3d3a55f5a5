"""The less common integer instructions: carries, saturation, 24-bit and packed arithmetic, bit searches."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from dsv4lab.sim.decode import Decoder, Form, Run, family
from dsv4lab.sim.errors import UnknownInstruction
from dsv4lab.sim.handlers.alu import assign, signed
from dsv4lab.sim.program import Instruction
from dsv4lab.sim.registers import Lanes

Array = NDArray
_LOW = np.uint64(0xFFFFFFFF)


def saturated(d: Decoder, i: Instruction, f: Form) -> Run:
    """add, sub and mad.hi of .s32 with .sat: the exact result clamped to the type's range."""
    high_product = f.has("hi")
    f.has("sat")
    if f.type() != "s32":
        raise UnknownInstruction(f"{i.opcode}: .sat exists for .s32 only")
    target = d.register(i.operands[0])
    sources = [d.source(o, "s32") for o in i.operands[1:]]

    def run(w: Lanes, m: Any) -> None:
        values = [w.s[s].astype(np.int64) for s in sources]
        if high_product:
            exact = ((values[0] * values[1]) >> 32) + values[2]
        else:
            exact = values[0] + values[1] if f.family == "add" else values[0] - values[1]
        assign(w, target, np.clip(exact, -(1 << 31), (1 << 31) - 1).astype(np.int32).view(np.uint32), m)

    return run


def _carry(d: Decoder) -> int:
    """Slot of the carry flag, one bit per thread."""
    return d._new("carry flag", 0)


@family("addc", "subc", "madc")
def with_carry(d: Decoder, i: Instruction, f: Form) -> Run:
    """add, sub and mad of 32 or 64 bits that read the carry flag (addc ...) or write it (.cc)."""
    reads, writes = f.family.endswith("c"), f.has("cc")
    part = f.take("lo", "hi")
    t = f.type()
    name = f.family.removesuffix("c")
    width = 64 if t.endswith("64") else 32
    target = d.register(i.operands[0])
    sources = [d.source(o, t) for o in i.operands[1:]]
    flag = _carry(d)
    modulus = 1 << width

    def product(a: int, b: int) -> int:
        if signed(t):
            a, b = (x - modulus if x >> (width - 1) else x for x in (a, b))
        return (a * b if part == "lo" else (a * b) >> width) % modulus

    def run(w: Lanes, m: Any) -> None:
        columns = [w.u[s].tolist() for s in sources]
        if name == "mad":
            columns = [[product(a, b) for a, b in zip(columns[0], columns[1], strict=True)], columns[2]]
        carry = w.u[flag].tolist() if reads else [False] * w.n
        if name == "sub":
            exact = [a - b - int(c) for a, b, c in zip(*columns, carry, strict=True)]
        else:
            exact = [a + b + int(c) for a, b, c in zip(*columns, carry, strict=True)]
        assign(w, target, np.array([x % modulus for x in exact], w.u[target].dtype), m)
        if writes:
            assign(w, flag, np.array([x < 0 or x >= modulus for x in exact], bool), m)

    return run


@family("mul24", "mad24")
def product24(d: Decoder, i: Instruction, f: Form) -> Run:
    """The product of the low 24 bits: its low 32 bits, or bits 16 to 47."""
    shift = np.int64(0 if f.take("lo", "hi") == "lo" else 16)
    t = f.type()
    target = d.register(i.operands[0])
    a, b = (d.source(o, t) for o in i.operands[1:3])
    c = d.source(i.operands[3], t) if f.family == "mad24" else None
    sign = np.int64(1 << 23 if signed(t) else 0)

    def low(w: Lanes, slot: int) -> Array:
        return ((w.u[slot].astype(np.int64) & np.int64(0xFFFFFF)) ^ sign) - sign

    def run(w: Lanes, m: Any) -> None:
        value = ((low(w, a) * low(w, b)) >> shift).astype(np.uint32)
        assign(w, target, value if c is None else value + w.u[c], m)

    return run


@family("dp2a")
def dp2a(d: Decoder, i: Instruction, f: Form) -> Run:
    """Two 16-bit numbers of a times two bytes of b (the low or the high two), plus c."""
    start = 0 if f.take("lo", "hi") == "lo" else 2
    bt, at = f.type(), f.type()
    target = d.register(i.operands[0])
    a, b, c = (d.source(o, "b32") for o in i.operands[1:4])

    def run(w: Lanes, m: Any) -> None:
        x = (w.w[a].view(np.int16) if at == "s32" else w.w[a]).astype(np.int64)
        y = (w.b[b].view(np.int8) if bt == "s32" else w.b[b])[:, start : start + 2].astype(np.int64)
        total = (x * y).sum(axis=1) + w.u[c].astype(np.int64)
        assign(w, target, (total & 0xFFFFFFFF).astype(np.uint32), m)

    return run


def packed_minmax(d: Decoder, i: Instruction, f: Form) -> Run:
    """min and max of .u16x2 and .s16x2."""
    relu = f.has("relu")
    t = f.type()
    kind = np.int16 if t == "s16x2" else np.uint16
    function = np.minimum if f.family == "min" else np.maximum
    target, a, b = d.register(i.operands[0]), d.source(i.operands[1], t), d.source(i.operands[2], t)

    def run(w: Lanes, m: Any) -> None:
        value = function(w.w[a].view(kind), w.w[b].view(kind))
        if relu:
            value = np.maximum(value, 0)
        np.copyto(w.w[target], value.view(np.uint16), where=True if m is None else m[:, None])

    return run


@family("szext")
def extend(d: Decoder, i: Instruction, f: Form) -> Run:
    """Sign- or zero-extend the low b bits of a; b is clamped to 32 or taken modulo 32."""
    clamp = f.take("clamp", "wrap") == "clamp"
    t = f.type()
    target, a, b = d.register(i.operands[0]), d.source(i.operands[1], t), d.source(i.operands[2], "b32")

    def run(w: Lanes, m: Any) -> None:
        count = (np.minimum(w.u[b], 32) if clamp else w.u[b] & np.uint32(31)).astype(np.uint64)
        value = w.u[a].astype(np.uint64) & ((np.uint64(1) << count) - np.uint64(1))
        if signed(t):
            top = np.where(count > 0, (np.uint64(1) << count) >> np.uint64(1), 0)
            value = (value ^ top) - top
        assign(w, target, (value & _LOW).astype(np.uint32), m)

    return run


@family("fns")
def nth_set(d: Decoder, i: Instruction, f: Form) -> Run:
    """The position of the n-th set bit from a base, upwards or downwards; all ones where there is none."""
    f.type()
    target = d.register(i.operands[0])
    a, base, n = (d.source(o, "b32") for o in i.operands[1:4])

    def search(mask: int, start: int, count: int) -> int:
        if count == 0:
            return start if mask >> start & 1 else 0xFFFFFFFF
        places = range(start, 32) if count > 0 else range(start, -1, -1)
        found = [p for p in places if mask >> p & 1]
        return found[abs(count) - 1] if len(found) >= abs(count) else 0xFFFFFFFF

    def run(w: Lanes, m: Any) -> None:
        columns = w.u[a].tolist(), (w.u[base] & np.uint32(31)).tolist(), w.s[n].tolist()
        assign(w, target, np.array([search(*v) for v in zip(*columns, strict=True)], np.uint32), m)

    return run
