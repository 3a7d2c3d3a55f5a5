"""`cvt` between integer, floating and packed narrow types, and `cvta` between address spaces."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dsv4lab.sim import numfmt
from dsv4lab.sim.decode import TYPE_BYTES, Decoder, Form, Run, family
from dsv4lab.sim.errors import UnknownInstruction
from dsv4lab.sim.handlers.alu import assign, signed
from dsv4lab.sim.handlers.floating import directed
from dsv4lab.sim.memory import SHARED_WINDOW
from dsv4lab.sim.program import Instruction, Vector
from dsv4lab.sim.registers import Lanes

Array = NDArray
_INTEGERS = ("u8", "s8", "u16", "s16", "u32", "s32", "u64", "s64")
_TO_INTEGER = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}
_NARROW = ("e4m3", "e5m2", "e2m1", "e2m3", "e3m2")


def _as_float(w: Lanes, slot: int, t: str) -> Array:
    """A register as an array of its own floating type; bf16 comes as float32."""
    return numfmt.bf16_to_f32(w.u[slot]) if t == "bf16" else w.f[slot]


def _encode(values: Array, t: str, rounding: str, saturate: bool, relu: bool) -> Array:
    if rounding == "rn" and not saturate and not relu and t in ("f16", "bf16"):
        return numfmt.f32_to_f16(values) if t == "f16" else numfmt.f32_to_bf16(values)
    return numfmt.encode(values, numfmt.FORMATS[t], rounding, saturate, relu)


def _packed_from_f32(d: Decoder, i: Instruction, f: Form, narrow: str, parts: int) -> Run:
    """Two (or four) float32 values to a packed narrow type: the first source is the upper half."""
    rounding = f.take("rn", "rz", "rna", "rp", "rs") or "rn"
    saturate, relu = f.has("satfinite"), f.has("relu")
    target = d.register(i.operands[0])
    if rounding == "rs":
        raise UnknownInstruction(f"{i.opcode}: stochastic rounding is not simulated")
    operands = i.operands[1].items if parts == 4 and isinstance(i.operands[1], Vector) else i.operands[1 : 1 + parts]
    sources = [d.source(o, "f32") for o in operands]
    shift = 8 if narrow == "ue8m0" else {"e2m1": 4}.get(narrow, 8 if narrow in _NARROW else 16)

    def code(values: Array) -> Array:
        if narrow == "ue8m0":
            return numfmt.f32_to_ue8m0(values, rounding)
        return _encode(values, narrow, rounding, saturate, relu).astype(np.uint32)

    def run(w: Lanes, m: Any) -> None:
        total = np.zeros(w.n, np.uint32)
        for source in sources:
            total = (total << np.uint32(shift)) | code(w.f[source])
        assign(w, target, total.astype(w.u[target].dtype), m)

    return run


def _ue8m0_from_bf16(d: Decoder, i: Instruction, f: Form) -> Run:
    rounding = f.take("rz", "rp") or "rz"
    f.drop("satfinite")
    target, a = d.register(i.operands[0]), d.source(i.operands[1], "bf16x2")

    def run(w: Lanes, m: Any) -> None:
        codes = numfmt.f32_to_ue8m0(numfmt.bf16_to_f32(w.w[a]), rounding)
        assign(w, target, (codes[:, 0] | (codes[:, 1] << np.uint32(8))).astype(w.u[target].dtype), m)

    return run


def _half_from_narrow(d: Decoder, i: Instruction, f: Form, narrow: str, wide: str) -> Run:
    """A packed pair of narrow floats to f16x2 or bf16x2, exactly."""
    f.take("rn")
    relu = f.has("relu")
    f.drop("satfinite")
    scaled = f.has("scaled::n2::ue8m0")
    target = d.register(i.operands[0])
    a = d.source(i.operands[1], f"{narrow}x2")
    scale = d.source(i.operands[2], "b16") if scaled else -1
    bits = 4 if narrow == "e2m1" else 8

    def decode(w: Lanes) -> Array:
        raw = w.u[a].astype(np.uint32)
        codes = np.stack([raw & np.uint32((1 << bits) - 1), (raw >> np.uint32(bits)) & np.uint32((1 << bits) - 1)], axis=1)
        if narrow == "s2f6":
            return codes.astype(np.uint8).view(np.int8).astype(np.float32) / np.float32(64)
        if narrow in ("e2m3", "e3m2"):
            codes = codes & np.uint32(63)
        return numfmt.table(narrow)[codes]

    def run(w: Lanes, m: Any) -> None:
        values = decode(w)
        if scaled:
            raw = w.u[scale].astype(np.uint32)
            values = values * numfmt.table("ue8m0")[np.stack([raw & 255, raw >> 8], axis=1)]
        if relu:
            values = np.where(np.signbit(values) & ~np.isnan(values), np.float32(0), values)
        words = numfmt.f32_to_f16(values) if wide == "f16" else numfmt.f32_to_bf16(values)
        np.copyto(w.w[target], words, where=True if m is None else m[:, None])

    return run


def _to_integer(d: Decoder, i: Instruction, f: Form, t: str, source: str) -> Run:
    rounding = _TO_INTEGER[f.take(*_TO_INTEGER) or "rzi"]
    ftz = f.has("ftz")
    f.drop("sat")
    target, a = d.register(i.operands[0]), d.source(i.operands[1], source)
    size = TYPE_BYTES[t]
    info = np.iinfo(f"{'i' if signed(t) else 'u'}{size}")
    # A NaN becomes 0, or where either type has 64 bits the integer with only its top bit set.
    top = np.array(1 << (8 * size - 1), f"u{size}").view(info.dtype)
    not_a_number = top if size == 8 or source == "f64" else info.dtype.type(0)

    def run(w: Lanes, m: Any) -> None:
        x = _as_float(w, a, source)
        if ftz and source == "f32":
            x = numfmt.flush(x)
        x = rounding(x.astype(np.float64))
        # The limits of 64-bit types are not representable in float64, so clipping is done by comparison.
        low, high = x <= float(info.min), x >= float(info.max)
        inside = np.where(low | high | np.isnan(x), 0, x).astype(info.dtype)
        value = np.where(low, info.dtype.type(info.min), np.where(high, info.dtype.type(info.max), inside))
        value = np.where(np.isnan(x), not_a_number, value)
        _assign_integer(w, target, value, m)

    return run


def _assign_integer(w: Lanes, target: int, value: Array, m: Any) -> None:
    """Write an integer, widened by its own sign if the register is wider."""
    out = w.u[target]
    if value.dtype.itemsize != out.dtype.itemsize:
        value = value.astype(f"{value.dtype.kind}{out.dtype.itemsize}")
    assign(w, target, value.view(out.dtype), m)


def _from_integer(d: Decoder, i: Instruction, f: Form, t: str, source: str) -> Run:
    rounding = f.take("rn", "rz", "rm", "rp") or "rn"
    f.drop("sat", "satfinite")
    target, read = d.register(i.operands[0]), _integer_reader(d, i, source)
    if t == "f64" and source == "u64" and rounding != "rn":
        raise UnknownInstruction(f"{i.opcode}: rounding .{rounding} from .u64 is not simulated")

    def run(w: Lanes, m: Any) -> None:
        x = read(w)
        if t == "f64":
            value = _narrowed(x, np.float64, rounding).view(np.uint64)
        elif t == "f32":
            value = _narrowed(numfmt.integer_f64(x), np.float32, rounding).view(np.uint32)
        else:
            value = _encode(numfmt.odd_f32(numfmt.integer_f64(x)), t, rounding, False, False).astype(np.uint16)
        assign(w, target, value, m)

    return run


def _narrowed(x: Array, dtype: type, rounding: str) -> Array:
    """astype with a rounding mode."""
    if rounding == "rn":
        return x.astype(dtype)
    return directed(lambda v: v.astype(dtype), rounding)(x)


def _integer_reader(d: Decoder, i: Instruction, source: str) -> Callable[[Lanes], Array]:
    """Reads a source as its integer type; registers may be wider than an 8-bit type."""
    size = TYPE_BYTES[source]
    operand = i.operands[1]
    try:
        slot = d.source(operand, source)
    except UnknownInstruction:
        slot = d.register(operand)
    if d.width(slot) < size:
        raise UnknownInstruction(f"{i.opcode}: source register is narrower than .{source}")
    kind = f"{'i' if signed(source) else 'u'}{size}"

    def read(w: Lanes) -> Array:
        raw = w.u[slot]
        return raw.view(kind) if raw.dtype.itemsize == size else raw.astype(f"u{size}").view(kind)

    return read


def _integer_to_integer(d: Decoder, i: Instruction, f: Form, t: str, source: str) -> Run:
    saturate = f.has("sat")
    target, read = d.register(i.operands[0]), _integer_reader(d, i, source)
    kind = f"{'i' if signed(t) else 'u'}{TYPE_BYTES[t]}"
    info = np.iinfo(kind)

    def run(w: Lanes, m: Any) -> None:
        value = read(w)
        if saturate:
            source_info = np.iinfo(value.dtype)
            value = np.clip(value, max(info.min, source_info.min), min(info.max, source_info.max))
        _assign_integer(w, target, value.astype(kind), m)

    return run


def _float_to_float(d: Decoder, i: Instruction, f: Form, t: str, source: str) -> Run:
    to_integral = f.take(*_TO_INTEGER)
    rounding = f.take("rn", "rz", "rm", "rp", "rna") or "rn"
    ftz, saturate, satfinite, relu = f.has("ftz"), f.has("sat"), f.has("satfinite"), f.has("relu")
    target, a = d.register(i.operands[0]), d.source(i.operands[1], source)

    def run(w: Lanes, m: Any) -> None:
        x = _as_float(w, a, source)
        if to_integral:
            x = _TO_INTEGER[to_integral](x)
        if saturate:
            x = np.where(x > 0, np.minimum(x, 1), 0).astype(x.dtype)  # NaN and -0 become +0
        if t == "f64":
            value = x.astype(np.float64).view(np.uint64)
        elif t == "f32":
            single = _narrowed(x, np.float32, rounding)
            if source in ("f16", "f32"):  # float64 and bf16 keep what fits of a NaN's payload
                single = numfmt.canonical(single)
            value = (numfmt.flush(single) if ftz else single).view(np.uint32)
        elif t == "tf32":
            if rounding == "rna":
                value = numfmt.tf32_away(x, satfinite)
            else:
                value = numfmt.encode(x, numfmt.TF32, rounding, satfinite, relu) << np.uint32(13)
        else:
            single = numfmt.odd_f32(x) if source == "f64" else x.astype(np.float32)
            value = _encode(single, t, rounding, satfinite, relu).astype(np.uint16)
        assign(w, target, value, m)

    return run


@family("cvt")
def cvt(d: Decoder, i: Instruction, f: Form) -> Run:
    if f.left[-1] == "s2f6x2":
        f.left.pop()
        source = "s2f6x2"
    else:
        source = f.type()
    if f.left and f.left[-1].endswith("x4"):
        return _packed_from_f32(d, i, f, f.left.pop()[:-2], 4)
    t = f.type()
    narrow, wide = t.removesuffix("x2"), source.removesuffix("x2")
    if t.endswith("x2") and source == "f32":
        return _packed_from_f32(d, i, f, narrow, 2)
    if t == "ue8m0x2" and source == "bf16x2":
        return _ue8m0_from_bf16(d, i, f)
    if t in ("f16x2", "bf16x2") and source.endswith("x2"):
        return _half_from_narrow(d, i, f, wide, narrow)
    if t.endswith("x2") and source in ("f16x2", "bf16x2"):
        return _narrow_from_half(d, i, f, narrow, source)
    if t in _INTEGERS:
        return _integer_to_integer(d, i, f, t, source) if source in _INTEGERS else _to_integer(d, i, f, t, source)
    if source in _INTEGERS:
        return _from_integer(d, i, f, t, source)
    if source == "tf32" or t.endswith("x2") or source.endswith("x2"):
        raise UnknownInstruction(f"{i.opcode} is not simulated")
    return _float_to_float(d, i, f, t, source)


def _narrow_from_half(d: Decoder, i: Instruction, f: Form, narrow: str, source: str) -> Run:
    f.take("rn")
    saturate, relu = f.has("satfinite"), f.has("relu")
    target, a = d.register(i.operands[0]), d.source(i.operands[1], source)
    shift = 4 if narrow == "e2m1" else 8

    def run(w: Lanes, m: Any) -> None:
        values = w.h[a].astype(np.float32) if source == "f16x2" else numfmt.bf16_to_f32(w.w[a])
        codes = _encode(values, narrow, "rn", saturate, relu)
        assign(w, target, (codes[:, 0] | (codes[:, 1] << np.uint32(shift))).astype(w.u[target].dtype), m)

    return run


@family("cvta")
def cvta(d: Decoder, i: Instruction, f: Form) -> Run:
    """Generic addresses of shared memory lie in a window of their own; the other spaces keep their addresses."""
    to = f.has("to")
    space = f.take("shared", "shared::cta", "shared::cluster", "global", "local", "param", "const")
    t = f.type()
    target, a = d.register(i.operands[0]), d.source(i.operands[1], t)
    shared = space is not None and space.startswith("shared")
    move = np.uint64(SHARED_WINDOW) if shared else np.uint64(0)

    def run(w: Lanes, m: Any) -> None:
        address = w.u[a].astype(np.uint64)
        value = address - move if to else address + move
        assign(w, target, value.astype(w.u[target].dtype), m)

    return run


@family("isspacep")
def isspacep(d: Decoder, i: Instruction, f: Form) -> Run:
    space = f.left.pop()
    target, a = d.register(i.operands[0]), d.source(i.operands[1], "b64")
    if space == "global":
        return lambda w, m: assign(w, target, w.u[a] < np.uint64(SHARED_WINDOW), m)
    if not space.startswith("shared"):
        raise UnknownInstruction(f"{i.opcode} is not simulated")
    return lambda w, m: assign(w, target, (w.u[a] >> np.uint64(32)) == np.uint64(SHARED_WINDOW >> 32), m)
