"""Conversions between integers, floating-point formats and packed narrow formats, with every rounding."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from functools import cache

import numpy as np

from tests.sim.conformance.case import ANY_NAN, EXACT, Form, Group, lanes
from tests.sim.conformance.integer import words
from tests.sim.conformance.values import COUNT, FORMATS, Number, convert, decode, encode, floats

_UNSIGNED = {"f16": np.uint16, "bf16": np.uint16, "f32": np.uint32, "f64": np.uint64, "tf32": np.uint32}
_INTEGRAL: dict[str, Callable[[Fraction], int]] = {"rni": round, "rzi": math.trunc, "rmi": math.floor, "rpi": math.ceil}


def _limits(t: str) -> tuple[int, int]:
    width = int(t[1:])
    return (-(1 << (width - 1)), (1 << (width - 1)) - 1) if t[0] == "s" else (0, (1 << width) - 1)


def _register(t: str) -> type:
    """Results of 8 and 16 bits are looked at in a 32-bit register, which shows how they are extended."""
    return np.uint64 if t.endswith("64") else np.uint32


def _opcode(*parts: str) -> str:
    return ".".join(["cvt", *filter(None, parts)])


def to_integers() -> list[Form]:
    out = []
    rounds = [("f32", t, m) for t in ("s32", "u32", "s64", "u64") for m in _INTEGRAL]
    rounds += [("f32", t, "rzi") for t in ("s8", "u8", "s16", "u16")]
    rounds += [("f64", t, "rzi") for t in ("s16", "u16")]
    rounds += [("f64", t, m) for t in ("s32", "u32", "s64", "u64") for m in ("rni", "rzi")]
    rounds += [("f16", t, "rni") for t in ("s8", "u8", "s16", "u16", "s32", "u32", "s64", "u64")]
    rounds += [("bf16", t, "rzi") for t in ("s8", "u8", "s16", "u16", "s32", "u32", "s64", "u64")]
    for source, t, mode in rounds:
        label = _opcode(mode, t, source)
        a = floats(label, source)
        low, high = _limits(t)
        nan = (low or 1 << (int(t[1:]) - 1)) if "64" in (source[1:], t[1:]) else 0

        def value(code: int, source: str = source, mode: str = mode, low: int = low, high: int = high, nan: int = nan) -> int:
            x = decode(code, source)
            if isinstance(x, float):
                return nan if math.isnan(x) else 0 if x == 0 else (high if x > 0 else low)
            return max(low, min(high, _INTEGRAL[mode](x)))

        kind = _register(t)
        mask = (1 << (8 * np.dtype(kind).itemsize)) - 1
        expected = np.array([value(c) & mask for c in a.tolist()], kind)
        code = f"{label} r, a;"
        if source == "bf16" and int(t[1:]) < 32:  # takes a register of the type's own size
            code = f"{{ .reg .b{t[1:]} t; {label} t, a; cvt.{t[0]}32.{t} r, t; }}"
        out.append(lanes(label, code, [a], expected))
    return out


def from_integers() -> list[Form]:
    out = []
    plans = [("f32", t, m) for t in ("s32", "u32", "s64", "u64") for m in ("rn", "rz", "rm", "rp")]
    plans += [("f32", t, "rn") for t in ("s8", "u8", "s16", "u16")]
    plans += [("f64", t, "rn") for t in ("s32", "u32", "s64", "u64")] + [("f64", "s64", m) for m in ("rz", "rm", "rp")]
    plans += [(t, s, "rn") for t in ("f16", "bf16") for s in ("s8", "u8", "s16", "u16", "s32", "u32", "s64", "u64")]
    plans += [("f16", "s32", m) for m in ("rz", "rm", "rp")]
    for target, t, mode in plans:
        label = _opcode(mode, target, t)
        a = words(label, t)
        expected = np.array([encode(Fraction(v), target, mode) for v in a.tolist()], _UNSIGNED[target])
        own = target == "bf16" and int(t[1:]) < 32  # takes a register of the type's own size
        wide = a.astype(f"{'i' if t[0] == 's' else 'u'}{8 if '64' in t else 4}")
        code = f"{{ .reg .b{t[1:]} t; cvt.{t}.{t[0]}32 t, a; {label} r, t; }}" if own else f"{label} r, a;"
        out.append(lanes(label, code, [wide], expected))
    return out


def between_integers() -> list[Form]:
    out = []
    for t in ("s8", "u8", "s16", "u16", "s32", "u32", "s64", "u64"):
        for source in ("s32", "u32", "s64"):
            for saturate in (False, True):
                if saturate and _limits(t)[0] <= _limits(source)[0] and _limits(t)[1] >= _limits(source)[1]:
                    continue  # nothing to saturate: not a valid form
                label = _opcode("sat" if saturate else "", t, source)
                a = words(label, source)
                low, high = _limits(t)
                width = int(t[1:])
                kind = _register(t)
                mask = (1 << (8 * np.dtype(kind).itemsize)) - 1

                def value(
                    v: int, low: int = low, high: int = high, width: int = width, saturate: bool = saturate, t: str = t
                ) -> int:
                    if saturate:
                        return max(low, min(high, v))
                    v &= (1 << width) - 1
                    return v - (1 << width) if t[0] == "s" and v >> (width - 1) else v

                expected = np.array([value(v) & mask for v in a.tolist()], kind)
                out.append(lanes(label, f"{label} r, a;", [a], expected))
    return out


def between_floats() -> list[Form]:
    out = []
    for source, target, modes in (
        ("f16", "f32", [""]),
        ("bf16", "f32", [""]),
        ("f16", "f64", [""]),
        ("f32", "f64", [""]),
        ("f64", "f32", ["rn", "rz", "rm", "rp"]),
        ("f64", "f16", ["rn", "rz"]),
        ("f32", "f16", ["rn", "rz", "rm", "rp"]),
        ("f32", "bf16", ["rn", "rz", "rm", "rp"]),
        ("f16", "bf16", ["rn", "rz"]),
        ("bf16", "f16", ["rn", "rz"]),
        ("bf16", "f64", [""]),
    ):
        for mode in modes:
            label = _opcode(mode, target, source)
            out.append(_float(label, source, target, mode or "rn"))
    out += [
        _float("cvt.rn.relu.f16.f32", "f32", "f16", relu=True),
        _float("cvt.rz.relu.bf16.f32", "f32", "bf16", "rz", relu=True),
    ]
    out += [_float("cvt.rn.tf32.f32", "f32", "tf32"), _float("cvt.rz.tf32.f32", "f32", "tf32", "rz")]
    out += [_float("cvt.rna.tf32.f32", "f32", "tf32", "rna"), _float("cvt.rn.relu.tf32.f32", "f32", "tf32", relu=True)]
    out += [_float("cvt.rna.satfinite.tf32.f32", "f32", "tf32", "rna", saturate=True)]
    for t in ("f16", "f32", "f64"):
        for mode in _INTEGRAL:
            out.append(_integral(t, mode))
    for t in ("f32", "f16"):
        a = floats(f"cvt.sat.{t}", t)

        def clamp(code: int, t: str = t) -> int:
            x = decode(code, t)
            return 0 if not x > 0 else encode(Fraction(1) if x > 1 else x, t)

        expected = np.array([clamp(c) for c in a.tolist()], _UNSIGNED[t])
        out.append(lanes(f"cvt.sat.{t}.{t}", f"cvt.sat.{t}.{t} r, a;", [a], expected))
    a = floats("cvt.ftz.f32.f16", "f16")
    exact = np.array([encode(decode(c, "f16"), "f32") for c in a.tolist()], np.uint32)
    out.append(lanes("cvt.ftz.f32.f16", "cvt.ftz.f32.f16 r, a;", [a], exact))
    a = floats("cvt.rn.ftz.f32.f64", "f64")
    tiny = np.isin(np.arange(len(a)) % 4, [1])
    a = np.where(tiny, (a & np.uint64(0x800FFFFFFFFFFFFF)) | np.uint64((1023 - 127) << 52), a)
    value = np.array([encode(decode(c, "f64"), "f32") for c in a.tolist()], np.uint32)
    value = np.where((value & 0x7F800000) == 0, value & 0x80000000, value).astype(np.uint32)
    out.append(lanes("cvt.rn.ftz.f32.f64", "cvt.rn.ftz.f32.f64 r, a;", [a], value.view(np.float32), ANY_NAN))
    return out


def _float(label: str, source: str, target: str, mode: str = "rn", *, saturate: bool = False, relu: bool = False) -> Form:
    a = floats(label, source)
    codes = np.array(convert(a.tolist(), source, target, mode, saturate, relu), _UNSIGNED[target])
    if target == "tf32":
        codes = codes << np.uint32(13)
    # To and from float64, and from bf16 to float32, a NaN keeps what fits of its payload; else it is the canonical one.
    bound = ANY_NAN if "f64" in (source, target) or (source, target) == ("bf16", "f32") else EXACT
    element = "bf16" if target == "bf16" else ""
    kind = {"f32": np.float32, "f64": np.float64, "f16": np.float16}.get(target)
    if target == "tf32":  # only 19 bits are the result
        nan = (a & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
        kept = np.full(len(a), 0x7FFFE000, np.uint32)
        if (
            mode == "rna"
        ):  # a NaN keeps its upper bits, as the H200 shows; .satfinite takes a unit off whatever has its exponent
            kept = (a & np.uint32(0xFFFFE000)) - np.uint32(0x2000 if saturate else 0)
        return lanes(label, f"{label} r, a; and.b32 r, r, 0xFFFFE000;", [a], np.where(nan, kept, codes))
    return lanes(label, f"{label} r, a;", [a], codes if kind is None or bound is EXACT else codes.view(kind), bound, element)


def _integral(t: str, mode: str) -> Form:
    label = f"cvt.{mode}.{t}.{t}"
    a = floats(label, t)

    def value(code: int) -> int:
        x = decode(code, t)
        if isinstance(x, float):
            return encode(x, t)
        whole = _INTEGRAL[mode](x)
        return encode(Fraction(whole) if whole or x >= 0 else -0.0, t)

    expected = np.array([value(c) for c in a.tolist()], _UNSIGNED[t])
    kind = {"f16": np.float16, "f32": np.float32, "f64": np.float64}[t]
    return lanes(label, f"{label} r, a;", [a], expected.view(kind), ANY_NAN if t == "f64" else EXACT)


def _pair(high: np.ndarray, low: np.ndarray, width: int, dtype: type) -> np.ndarray:
    return ((high.astype(np.uint32) << np.uint32(width)) | low.astype(np.uint32)).astype(dtype)


def _packed(t: str, source: str, *modifiers: str) -> Form:
    """Two float32 values (the first is the upper half), or the halves of a packed register, to a packed pair."""
    label = _opcode(*modifiers, t, source)
    narrow = t.removesuffix("x2")
    mode = next((m for m in modifiers if m in ("rn", "rz", "rp", "rna")), "rn")
    saturate, relu = "satfinite" in modifiers, "relu" in modifiers
    base = source.removesuffix("x2")
    if source == "f32":
        operands = [_near(f"{label}/{k}", narrow) for k in range(2)]
        parts = operands
    else:
        halves = floats(label, base, 2 * COUNT)
        operands = [halves.view(np.uint32)]
        parts = [halves[1::2], halves[0::2]]

    def code(values: np.ndarray) -> np.ndarray:
        if narrow == "ue8m0":
            return np.array([_scale(decode(c, base), mode) for c in values.tolist()], np.uint32)
        return np.array(convert(values.tolist(), base, narrow, mode, saturate, relu), np.uint32)

    width = 8 if narrow == "ue8m0" else FORMATS[narrow].bits
    slot = {4: 4, 6: 8}.get(width, width)
    expected = _pair(code(parts[0]), code(parts[1]), slot, np.uint32 if width == 16 else np.uint16)
    names = ", ".join("ab"[: len(operands)])
    text = f"{label} r, {names};"
    if width == 4:
        text = f"{{ .reg .b8 t; {label} t, {names}; mov.b16 r, {{t, t}}; and.b16 r, r, 255; }}"
    return lanes(label, text, operands, expected)


def _near(label: str, narrow: str) -> np.ndarray:
    """float32 codes of which most lie in the narrow format's range, many at or beside the middle of two values."""
    raw = floats(label, "f32")
    if narrow in ("f16", "bf16", "ue8m0"):
        return raw
    fmt = FORMATS[narrow]
    picks = floats(label + "/pick", "f32") >> np.uint32(3)
    codes = picks % np.uint32(fmt.largest)
    middle = [(decode(int(c), narrow) + decode(int(c) + 1, narrow)) / 2 for c in codes]
    near = np.array([encode(m, "f32") for m in middle], np.uint32) + (picks >> np.uint32(9)) % np.uint32(3) - np.uint32(1)
    near |= (picks << np.uint32(10)) & np.uint32(1 << 31)
    return np.where(np.arange(len(raw)) % 3 == 0, near, raw).astype(np.uint32)


def _scale(x: Number, mode: str) -> int:
    """Exponent code of the power of two at or below (rz), or at or above (rp), a magnitude."""
    if isinstance(x, float) and math.isnan(x):
        return 255
    if isinstance(x, float) and math.isinf(x):
        return 254
    magnitude = abs(Fraction(x))
    if magnitude <= Fraction(2) ** -127:
        return 0
    power = magnitude.numerator.bit_length() - magnitude.denominator.bit_length()
    if Fraction(2) ** power > magnitude:
        power -= 1
    if mode == "rp" and Fraction(2) ** power != magnitude:
        power += 1
    return min(power + 127, 254)


def _unpacked(target: str, source: str, *modifiers: str) -> Form:
    """A packed pair of a narrow format to f16x2 or bf16x2, all codes."""
    label = _opcode(*modifiers, target, source)
    narrow, wide = source.removesuffix("x2"), target.removesuffix("x2")
    width = 8 if narrow == "ue8m0" else FORMATS[narrow].bits
    slot = {4: 4, 6: 8}.get(width, width)
    low = np.arange(COUNT) % (1 << width)
    high = (np.arange(COUNT) * 7 + 3) % (1 << width)

    def value(code: int) -> int:
        if narrow == "ue8m0":
            x: Number = math.nan if code == 255 else Fraction(2) ** (code - 127)
        else:
            x = decode(code, narrow)
        return encode(x, wide, relu="relu" in modifiers)

    made = [np.array([value(int(c)) for c in codes], np.uint32) for codes in (high, low)]
    a = _pair(high, low, slot, np.uint16)
    text = f"{label} r, a;"
    if width == 4:
        text = f"{{ .reg .b8 t, u; mov.b16 {{t, u}}, a; {label} r, t; }}"
    return lanes(label, text, [a], _pair(*made, 16, np.uint32))


def packed() -> list[Form]:
    out = []
    for t in ("f16x2", "bf16x2"):
        out += [
            _packed(t, "f32", "rn"),
            _packed(t, "f32", "rz"),
            _packed(t, "f32", "rn", "relu"),
            _packed(t, "f32", "rz", "relu"),
        ]
    for t in ("e4m3x2", "e5m2x2"):
        for source in ("f32", "f16x2"):
            out += [_packed(t, source, "rn", "satfinite"), _packed(t, source, "rn", "satfinite", "relu")]
        out += [_unpacked("f16x2", t, "rn"), _unpacked("f16x2", t, "rn", "relu")]
    return out


def packed_blackwell() -> list[Form]:
    out = []
    for t in ("e2m1x2", "e2m3x2", "e3m2x2"):
        out += [_packed(t, "f32", "rn", "satfinite"), _packed(t, "f32", "rn", "satfinite", "relu")]
        out += [_unpacked("f16x2", t, "rn"), _unpacked("f16x2", t, "rn", "relu")]
    for mode in ("rz", "rp"):
        out += [_packed("ue8m0x2", "f32", mode, "satfinite"), _packed("ue8m0x2", "bf16x2", mode, "satfinite")]
        out.append(_packed("ue8m0x2", "f32", mode))
    out.append(_unpacked("bf16x2", "ue8m0x2", "rn"))
    out += [_packed(t, "f32", "rn", "satfinite") for t in ("f16x2", "bf16x2")]
    return out


@cache
def groups() -> tuple[Group, ...]:
    families = (to_integers, from_integers, between_integers, between_floats, packed)
    made = [Group(f"convert {f.__name__.replace('_', ' ')}", tuple(f()), threads=COUNT) for f in families]
    return (*made, Group("convert packed sm_100a", tuple(packed_blackwell()), threads=COUNT, arch="sm_100a"))
