"""Integer arithmetic, logic, comparison and selection."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dsv4lab.sim.decode import TYPE_BYTES, Decoder, Form, Run, family
from dsv4lab.sim.errors import UnknownInstruction
from dsv4lab.sim.program import Instruction, Operand
from dsv4lab.sim.registers import Lanes

Array = NDArray
_INTEGER = ("u8", "s8", "b8", "u16", "s16", "b16", "u32", "s32", "b32", "u64", "s64", "b64")


def signed(type_name: str) -> bool:
    return type_name[0] == "s"


def assign(w: Lanes, target: int, value: Any, m: Any) -> None:
    """Write raw bits of the register's own width."""
    if m is None:
        w.u[target][...] = value
    else:
        np.copyto(w.u[target], value, where=m)


def binary(d: Decoder, operands: tuple[Operand, ...], type_name: str, function: Callable[..., Array]) -> Run:
    """target = ufunc(a, b) on integers of the register's width, signed if the type is."""
    if type_name not in _INTEGER and type_name != "pred":
        raise UnknownInstruction(f"integer operation on .{type_name}")
    target = d.register(operands[0])
    a, b = d.source(operands[1], type_name), d.source(operands[2], type_name)
    if signed(type_name):

        def run_signed(w: Lanes, m: Any) -> None:
            v = w.s
            if m is None:
                function(v[a], v[b], out=v[target])
            else:
                function(v[a], v[b], out=v[target], where=m)

        return run_signed

    def run(w: Lanes, m: Any) -> None:
        v = w.u
        if m is None:
            function(v[a], v[b], out=v[target])
        else:
            function(v[a], v[b], out=v[target], where=m)

    return run


@family("and", "or", "xor")
def logic(d: Decoder, i: Instruction, f: Form) -> Run:
    function = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}[f.family]
    return binary(d, i.operands, f.type(), function)


@family("not", "cnot")
def complement(d: Decoder, i: Instruction, f: Form) -> Run:
    t = f.type()
    target, a = d.register(i.operands[0]), d.source(i.operands[1], t)
    if f.family == "cnot":
        return lambda w, m: assign(w, target, w.u[a] == 0, m)
    return lambda w, m: assign(w, target, ~w.u[a], m)


@family("shl", "shr")
def shift(d: Decoder, i: Instruction, f: Form) -> Run:
    """Amounts of the width or more shift everything out."""
    t = f.type()
    bits = 8 * TYPE_BYTES[t]
    target, a, b = d.register(i.operands[0]), d.source(i.operands[1], t), d.source(i.operands[2], "b32")
    left, arithmetic = f.family == "shl", signed(t) and f.family == "shr"
    fixed = d.constants.get(b)
    if fixed is not None:
        if fixed >= bits and not arithmetic:
            return lambda w, m: assign(w, target, 0, m)
        amount = min(fixed, bits - 1)
        function = np.left_shift if left else np.right_shift

        def run_fixed(w: Lanes, m: Any) -> None:
            v = w.s if arithmetic else w.u
            if m is None:
                function(v[a], amount, v[target])
            else:
                function(v[a], amount, out=v[target], where=m)

        return run_fixed

    def run(w: Lanes, m: Any) -> None:
        v = w.s if arithmetic else w.u
        x, amounts = v[a], w.u[b]
        inside = np.minimum(amounts, bits - 1).astype(x.dtype)
        value = x << inside if left else x >> inside
        if not arithmetic:
            value = np.where(amounts >= bits, 0, value)
        assign(w, target, value.view(w.u[target].dtype) if arithmetic else value, m)

    return run


@family("shf")
def funnel(d: Decoder, i: Instruction, f: Form) -> Run:
    left, clamp = f.take("l", "r") == "l", f.take("clamp", "wrap") == "clamp"
    t = f.type()
    target = d.register(i.operands[0])
    low, high, amount = (d.source(o, t) for o in i.operands[1:4])

    def run(w: Lanes, m: Any) -> None:
        both = w.u[low].astype(np.uint64) | (w.u[high].astype(np.uint64) << np.uint64(32))
        n = (np.minimum(w.u[amount], 32) if clamp else w.u[amount] & np.uint32(31)).astype(np.uint64)
        value = (both << n) >> np.uint64(32) if left else both >> n
        assign(w, target, value.astype(np.uint32), m)

    return run


@family("lop3")
def lop3(d: Decoder, i: Instruction, f: Form) -> Run:
    t = f.type()
    target = d.register(i.operands[0])
    a, b, c, table = (d.source(o, t) for o in i.operands[1:5])
    truth = d.constants[table]

    def run(w: Lanes, m: Any) -> None:
        x, y, z = w.u[a], w.u[b], w.u[c]
        value = np.zeros_like(x)
        for term in range(8):
            if (truth >> term) & 1:
                value |= (x if term & 4 else ~x) & (y if term & 2 else ~y) & (z if term & 1 else ~z)
        assign(w, target, value, m)

    return run


# prmt's modes: the bytes of {b, a} chosen for each value of the selector's low two bits, lowest first
_PRMT_MODES = {
    "f4e": [[k, k + 1, k + 2, k + 3] for k in range(4)],
    "b4e": [[k, (k - 1) % 8, (k - 2) % 8, (k - 3) % 8] for k in range(4)],
    "rc8": [[k] * 4 for k in range(4)],
    "ecl": [[max(k, n) for n in range(4)] for k in range(4)],
    "ecr": [[min(k, n) for n in range(4)] for k in range(4)],
    "rc16": [[0, 1, 0, 1], [2, 3, 2, 3]] * 2,
}


@family("prmt")
def prmt(d: Decoder, i: Instruction, f: Form) -> Run:
    f.left.remove("b32")
    mode = f.take(*_PRMT_MODES)
    target = d.register(i.operands[0])
    a, b, c = (d.source(o, "b32") for o in i.operands[1:4])
    if mode is not None:
        table = np.array(_PRMT_MODES[mode], np.int64)

        def run_mode(w: Lanes, m: Any) -> None:
            both = np.concatenate([w.b[a], w.b[b]], axis=1)
            out = np.take_along_axis(both, table[w.u[c] & np.uint32(3)], axis=1)
            assign(w, target, np.ascontiguousarray(out).view(np.uint32)[:, 0], m)

        return run_mode
    fixed = d.constants.get(c)
    if fixed is not None and not fixed & 0x8888:
        columns = [(fixed >> (4 * k)) & 7 for k in range(4)]

        def run_fixed(w: Lanes, m: Any) -> None:
            both = np.concatenate([w.b[a], w.b[b]], axis=1)
            assign(w, target, np.ascontiguousarray(both[:, columns]).view(np.uint32)[:, 0], m)

        return run_fixed

    def run(w: Lanes, m: Any) -> None:
        both = np.concatenate([w.b[a], w.b[b]], axis=1)
        choice = w.u[c]
        out = np.empty((w.n, 4), np.uint8)
        rows = np.arange(w.n)
        for k in range(4):
            nibble = (choice >> np.uint32(4 * k)) & np.uint32(15)
            byte = both[rows, nibble & 7]
            out[:, k] = np.where(nibble & 8, np.where(byte & 0x80, 0xFF, 0), byte)
        assign(w, target, out.view(np.uint32)[:, 0], m)

    return run


@family("popc", "clz", "bfind", "brev", "ffs")
def count_bits(d: Decoder, i: Instruction, f: Form) -> Run:
    amount_form = f.has("shiftamt")
    t = f.type()
    bits = 8 * TYPE_BYTES[t]
    target, a = d.register(i.operands[0]), d.source(i.operands[1], t)

    def length(x: Array) -> Array:
        wide = x.astype(np.uint64)
        for step in (1, 2, 4, 8, 16, 32):
            wide |= wide >> np.uint64(step)
        return np.bitwise_count(wide).astype(np.uint32)

    def run(w: Lanes, m: Any) -> None:
        x = w.u[a]
        if f.family == "popc":
            value = np.bitwise_count(x).astype(np.uint32)
        elif f.family == "clz":
            value = np.uint32(bits) - length(x)
        elif f.family == "bfind":
            source = np.where(w.s[a] < 0, ~x, x) if signed(t) else x
            found = length(source)
            value = np.where(
                found == 0, np.uint32(0xFFFFFFFF), np.uint32(bits) - found if amount_form else found - np.uint32(1)
            )
        else:
            value = np.array([int(f"{int(v):0{bits}b}"[::-1], 2) for v in x], x.dtype)
        assign(w, target, value, m)

    return run


@family("bfe", "bfi")
def bit_field(d: Decoder, i: Instruction, f: Form) -> Run:
    t = f.type()
    bits = 8 * TYPE_BYTES[t]
    target = d.register(i.operands[0])
    if f.family == "bfe":
        a = d.source(i.operands[1], t)
        position, length = (d.source(o, "b32") for o in i.operands[2:4])
    else:
        a, b = d.source(i.operands[1], t), d.source(i.operands[2], t)
        position, length = (d.source(o, "b32") for o in i.operands[3:5])

    def extract(x: int, start: int, count: int) -> int:
        top = min(start + count - 1, bits - 1)
        fill = (x >> top) & 1 if signed(t) and count else 0
        value = (x >> start) & ((1 << count) - 1) if start < bits else 0
        have = max(min(count, bits - start), 0)
        return (value | (-fill << have if fill else 0)) & ((1 << bits) - 1)

    def run(w: Lanes, m: Any) -> None:
        starts, counts = w.u[position] & np.uint32(255), w.u[length] & np.uint32(255)
        if f.family == "bfe":
            value = [extract(int(x), int(s), int(c)) for x, s, c in zip(w.u[a], starts, counts, strict=True)]
        else:
            value = []
            for x, y, s, c in zip(w.u[a], w.u[b], starts, counts, strict=True):
                field = (((1 << int(c)) - 1) << int(s)) & ((1 << bits) - 1)
                value.append((int(y) & ~field) | ((int(x) << int(s)) & field))
        assign(w, target, np.array(value, w.u[target].dtype), m)

    return run


@family("bmsk")
def bit_mask(d: Decoder, i: Instruction, f: Form) -> Run:
    clamp = f.take("clamp", "wrap") == "clamp"
    f.type()
    target, a, b = d.register(i.operands[0]), d.source(i.operands[1], "b32"), d.source(i.operands[2], "b32")

    def run(w: Lanes, m: Any) -> None:
        start, count = w.u[a].astype(np.uint64), w.u[b].astype(np.uint64)
        start, count = (np.minimum(x, 32) if clamp else x & np.uint64(31) for x in (start, count))
        value = ((np.uint64(1) << count) - np.uint64(1)) << start
        assign(w, target, value.astype(np.uint32), m)

    return run


def _wide(type_name: str) -> type:
    return {"s16": np.int32, "u16": np.uint32, "s32": np.int64, "u32": np.uint64}[type_name]


def _high_product(a: Array, b: Array) -> Array:
    return np.array([((int(x) * int(y)) >> 64) & (2**64 - 1) for x, y in zip(a, b, strict=True)], np.uint64)


def integer_mul(d: Decoder, i: Instruction, f: Form) -> Run:
    """mul and mad with .lo, .hi or .wide."""
    part = f.take("lo", "hi", "wide")
    t = f.type()
    add = f.family == "mad"
    target = d.register(i.operands[0])
    a, b = d.source(i.operands[1], t), d.source(i.operands[2], t)
    kind = "s" if signed(t) else "u"
    if part == "lo":
        if not add:
            return binary(d, i.operands, t, np.multiply)
        c = d.source(i.operands[3], t)

        def mad(w: Lanes, m: Any) -> None:
            assign(w, target, w.u[a] * w.u[b] + w.u[c], m)

        return mad
    width = TYPE_BYTES[t]
    if part == "wide":
        wide, wide_type = _wide(t), {2: "b32", 4: "b64"}[width]
        c = d.source(i.operands[3], wide_type) if add else -1

        def run_wide(w: Lanes, m: Any) -> None:
            v = getattr(w, kind)
            product = (v[a].astype(wide) * v[b].astype(wide)).view(w.u[target].dtype)
            assign(w, target, product + w.u[c] if add else product, m)

        return run_wide
    if part != "hi":
        raise UnknownInstruction(f"{i.opcode} needs .lo, .hi or .wide")
    c = d.source(i.operands[3], t) if add else -1

    def run_high(w: Lanes, m: Any) -> None:
        v = getattr(w, kind)
        if width == 8:
            high = _high_product(v[a], v[b])
        else:
            wide = _wide(t)
            high = ((v[a].astype(wide) * v[b].astype(wide)) >> wide(8 * width)).astype(w.u[target].dtype)
        assign(w, target, high + w.u[c] if add else high, m)

    return run_high


def integer_divide(d: Decoder, i: Instruction, f: Form) -> Run:
    """Truncating division and remainder; a divisor of 0 gives all ones, or the dividend."""
    t = f.type()
    remainder = f.family == "rem"
    target, a, b = d.register(i.operands[0]), d.source(i.operands[1], t), d.source(i.operands[2], t)
    kind = "s" if signed(t) else "u"

    def run(w: Lanes, m: Any) -> None:
        v = getattr(w, kind)
        x, y = v[a], v[b]
        zero = y == 0
        safe = np.where(zero, y.dtype.type(1), y)
        if kind == "s":
            rest = np.fmod(x, safe)
            value = rest if remainder else (x - rest) // safe
        else:
            value = x % safe if remainder else x // safe
        value = np.where(zero, x if remainder else y.dtype.type(0) - y.dtype.type(1), value)
        assign(w, target, value.view(w.u[target].dtype), m)

    return run


def integer_minmax(d: Decoder, i: Instruction, f: Form) -> Run:
    t = f.type()
    relu = f.has("relu")
    run = binary(d, i.operands, t, np.minimum if f.family == "min" else np.maximum)
    if not relu:
        return run
    target = d.register(i.operands[0])

    def clipped(w: Lanes, m: Any) -> None:
        run(w, m)
        np.maximum(w.s[target], 0, out=w.s[target], where=True if m is None else m)

    return clipped


def integer_sign(d: Decoder, i: Instruction, f: Form) -> Run:
    t = f.type()
    target, a = d.register(i.operands[0]), d.source(i.operands[1], t)
    function = np.negative if f.family == "neg" else np.absolute

    def run(w: Lanes, m: Any) -> None:
        assign(w, target, function(w.s[a]).view(w.u[target].dtype), m)

    return run


@family("selp")
def selp(d: Decoder, i: Instruction, f: Form) -> Run:
    t = f.type()
    target, a, b = d.register(i.operands[0]), d.source(i.operands[1], t), d.source(i.operands[2], t)
    p, negated = d.predicate(i.operands[3])

    def run(w: Lanes, m: Any) -> None:
        chosen = ~w.u[p] if negated else w.u[p]
        assign(w, target, np.where(chosen, w.u[a], w.u[b]), m)

    return run


@family("slct")
def slct(d: Decoder, i: Instruction, f: Form) -> Run:
    f.drop("ftz")
    control = f.type()
    t = f.type()
    target, a, b, c = (
        d.register(i.operands[0]),
        d.source(i.operands[1], t),
        d.source(i.operands[2], t),
        d.source(i.operands[3], control),
    )

    def run(w: Lanes, m: Any) -> None:
        sign = (w.f if control == "f32" else w.s)[c] >= 0
        assign(w, target, np.where(sign, w.u[a], w.u[b]), m)

    return run


@family("sad")
def sad(d: Decoder, i: Instruction, f: Form) -> Run:
    t = f.type()
    target = d.register(i.operands[0])
    a, b, c = (d.source(o, t) for o in i.operands[1:4])
    kind = "s" if signed(t) else "u"

    def run(w: Lanes, m: Any) -> None:
        v = getattr(w, kind)
        difference = np.where(v[a] > v[b], v[a] - v[b], v[b] - v[a]).view(w.u[target].dtype)
        assign(w, target, difference + w.u[c], m)

    return run


@family("dp4a")
def dp4a(d: Decoder, i: Instruction, f: Form) -> Run:
    bt, at = f.type(), f.type()
    target = d.register(i.operands[0])
    a, b, c = (d.source(o, "b32") for o in i.operands[1:4])

    def run(w: Lanes, m: Any) -> None:
        x = (w.b[a].view(np.int8) if at == "s32" else w.b[a]).astype(np.int64)
        y = (w.b[b].view(np.int8) if bt == "s32" else w.b[b]).astype(np.int64)
        total = (x * y).sum(axis=1) + w.s[c]
        assign(w, target, (total & 0xFFFFFFFF).astype(np.uint32), m)

    return run
