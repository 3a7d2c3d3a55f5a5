"""Floating-point arithmetic, minimum and maximum, signs, comparisons, for every format and rounding."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from functools import cache

import numpy as np

from tests.sim.conformance.case import ANY_NAN, EXACT, Form, Group, lanes
from tests.sim.conformance.values import COUNT, FORMATS, Number, arithmetic, bits, decode, encode, floats

_UNSIGNED = {"f16": np.uint16, "bf16": np.uint16, "f32": np.uint32, "f64": np.uint64}
_NUMPY = {"f16": np.float16, "bf16": np.uint16, "f32": np.float32, "f64": np.float64}
_ARITY = {"add": 2, "sub": 2, "mul": 2, "div": 2, "fma": 3, "sqrt": 1, "rcp": 1}


def _halves(function: Callable[..., np.ndarray], *operands: np.ndarray) -> np.ndarray:
    """A function of 16-bit codes applied to both halves of 32-bit words."""
    parts = [o.view(np.uint16) for o in operands]
    return np.ascontiguousarray(function(*parts)).view(np.uint32)


def _at_the_edge(name: str, t: str, operands: list[np.ndarray]) -> None:
    """Numbers whose result is next to the smallest normal one, in the first lanes: does .ftz look before or after rounding?"""
    fmt = FORMATS[t.removesuffix("x2")]
    small = operands[0].view(_UNSIGNED[t.removesuffix("x2")])
    kind, one, least = small.dtype.type, fmt.bias << fmt.mantissa, 1 << fmt.mantissa
    rest = [o.view(small.dtype) for o in operands[1:]]
    for lane in range(32):
        sign = fmt.sign * (lane & 1)
        if name == "sqrt" or name == "rcp":
            small[lane] = kind((2 * fmt.bias - 1 << fmt.mantissa) + lane // 2 | sign)  # close to the reciprocal of the least
            continue
        small[lane] = kind(least + lane // 8 | sign)
        rest[0][lane] = kind(one - 1 - lane // 4 if name in ("mul", "fma") else one + 1 + lane // 4)
        if name == "fma":
            rest[1][lane] = kind([0, fmt.sign, 1, fmt.sign | 1][lane % 4])


def _operands(label: str, t: str, count: int) -> list[np.ndarray]:
    name = t.removesuffix("x2")
    if t.endswith("x2"):
        wide = np.uint64 if name == "f32" else np.uint32
        return [floats(f"{label}/{k}", name, 2 * COUNT).view(wide) for k in range(count)]
    return [floats(f"{label}/{k}", name) for k in range(count)]


def operation(name: str, t: str, mode: str = "rn", *, ftz: bool = False, sat: bool = False, relu: bool = False) -> Form:
    """name.mode.t against exact arithmetic rounded once."""
    opcode = ".".join([name, *([mode] if mode else []), *["ftz"] * ftz, *["sat"] * sat, *["relu"] * relu, t])
    count, base = _ARITY[name], t.removesuffix("x2")
    operands = _operands(opcode, t, count)
    if ftz:
        _at_the_edge(name, t, operands)

    def reference(*codes: np.ndarray) -> np.ndarray:
        if name == "rcp":
            one = np.full_like(codes[0], FORMATS[base].bias << FORMATS[base].mantissa)
            return arithmetic("div", base, mode, ftz, sat, one, *codes)
        out = arithmetic(name, base, mode or "rn", ftz, sat, *codes)
        if relu:
            nan = (out & ~out.dtype.type(FORMATS[base].sign)) > FORMATS[base].infinity
            out = np.where(((out & FORMATS[base].sign) != 0) & ~nan, 0, out).astype(out.dtype)
        return out

    # Every NaN of at most 32 bits is the canonical one; of float64 the payload is not certain.
    bound = ANY_NAN if t == "f64" else EXACT
    if t.endswith("x2"):
        small = _UNSIGNED[base]
        expected = reference(*(o.view(small) for o in operands)).view(_NUMPY[base])
        result = expected.view(np.uint64 if base == "f32" else np.uint32)
        made = lanes(opcode, f"{opcode} r, {', '.join('abc'[:count])};", operands, result, bound)
        return Form(made.label, made.text, made.source, expected, bound=bound, element=base if base == "bf16" else "")
    expected = reference(*operands).view(_NUMPY[t])
    code = f"{opcode} r, {', '.join('abc'[:count])};"
    return lanes(opcode, code, operands, expected, bound, "bf16" if t == "bf16" else "")


def single() -> list[Form]:
    out = [operation(n, "f32", mode) for n in ("add", "sub", "mul", "fma") for mode in ("rn", "rz", "rm", "rp")]
    out += [operation(n, "f32", "rn", ftz=True) for n in ("add", "sub", "mul", "fma")]
    out += [operation(n, "f32", "rn", sat=True) for n in ("add", "mul", "fma")]
    out += [operation("fma", "f32", mode, ftz=True) for mode in ("rz", "rm", "rp")]
    return out


def division() -> list[Form]:
    out = [operation(n, "f32", mode) for n in ("div", "sqrt", "rcp") for mode in ("rn", "rz", "rm", "rp")]
    out += [operation(n, "f32", "rn", ftz=True) for n in ("div", "sqrt", "rcp")]
    return out


def double() -> list[Form]:
    out = [operation(n, "f64", mode) for n in ("add", "sub", "mul", "fma") for mode in ("rn", "rz", "rm", "rp")]
    out += [operation(n, "f64", "rn") for n in ("div", "sqrt", "rcp")]
    return out


def half() -> list[Form]:
    out = []
    for t in ("f16", "bf16", "f16x2", "bf16x2"):
        out += [operation(n, t, "rn") for n in ("add", "sub", "mul", "fma")]
        out.append(operation("fma", t, "rn", relu=True))
    for t in ("f16", "f16x2"):
        out += [operation(n, t, "rn", ftz=True) for n in ("add", "mul", "fma")]
        out += [operation(n, t, "rn", sat=True) for n in ("add", "fma")]
    return out


def _order(v: Number) -> tuple[Fraction | float, int]:
    """Sorts numbers with -0 below +0."""
    return v, 0 if isinstance(v, float) and v == 0 and math.copysign(1, v) < 0 else 1


def _extreme(name: str, base: str, ftz: bool, keep_nan: bool, xorsign: bool, *codes: int) -> int:
    fmt = FORMATS[base]
    sign = 0
    if xorsign:
        for code in codes:
            sign ^= code & fmt.sign
        codes = tuple(c & (fmt.sign - 1) for c in codes)
    values = [decode(c, base) for c in codes]
    if ftz:
        small = [isinstance(v, Fraction) and v and abs(v) < Fraction(2) ** (1 - fmt.bias) for v in values]
        codes = tuple(c & fmt.sign if s else c for c, s in zip(codes, small, strict=True))
        values = [decode(c, base) for c in codes]
    numbers = [(v, c) for v, c in zip(values, codes, strict=True) if not (isinstance(v, float) and math.isnan(v))]
    if not numbers or (keep_nan and len(numbers) < len(codes)):
        return int(fmt.nan or 0)
    pick = min if name == "min" else max
    return pick(numbers, key=lambda pair: _order(pair[0]))[1] | sign


def extreme(name: str, t: str, *modifiers: str) -> Form:
    """min or max with .ftz, .NaN or .xorsign.abs."""
    opcode = ".".join([name, *modifiers, t])
    base = t.removesuffix("x2")
    operands = _operands(opcode, t, 2)
    flags = "ftz" in modifiers, "NaN" in modifiers, "xorsign" in modifiers
    small = _UNSIGNED[base]

    def reference(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        pairs = zip(a.tolist(), b.tolist(), strict=True)
        return np.array([_extreme(name, base, *flags, x, y) for x, y in pairs], small)

    expected = _halves(reference, *operands) if t.endswith("x2") else reference(*operands)
    if t == "f64":
        return lanes(opcode, f"{opcode} r, a, b;", operands, expected.view(np.float64), ANY_NAN)
    return lanes(opcode, f"{opcode} r, a, b;", operands, expected)


def extremes() -> list[Form]:
    out = []
    for name in ("min", "max"):
        for t in ("f16", "bf16", "f16x2", "bf16x2", "f32"):
            out += [extreme(name, t), extreme(name, t, "NaN"), extreme(name, t, "NaN", "xorsign", "abs")]
            if not t.startswith("bf"):
                out.append(extreme(name, t, "ftz"))
        out.append(extreme(name, "f64"))
    return out


def signs() -> list[Form]:
    out = []
    for t in ("f16", "bf16", "f16x2", "bf16x2", "f32", "f64"):
        base = t.removesuffix("x2")
        for name in ("neg", "abs"):
            (a,) = _operands(f"{name}.{t}", t, 1)
            codes = a.view(_UNSIGNED[base])
            sign = codes.dtype.type(FORMATS[base].sign)
            result = codes ^ sign if name == "neg" else codes & ~sign
            if t == "f64":
                made = lanes(f"{name}.{t}", f"{name}.{t} r, a;", [a], result.view(np.float64), ANY_NAN)
            else:  # a NaN becomes the canonical one
                result = np.where((result & ~sign) > FORMATS[base].infinity, FORMATS[base].nan, result).astype(codes.dtype)
                made = lanes(f"{name}.{t}", f"{name}.{t} r, a;", [a], result.view(a.dtype))
            out.append(made)
    a = floats("neg.ftz.f32", "f32")
    flushed = np.where((a & 0x7F800000) == 0, a & 0x80000000, a).astype(np.uint32)
    for name, value in (("neg", flushed ^ np.uint32(1 << 31)), ("abs", flushed & np.uint32(0x7FFFFFFF))):
        value = np.where((value & 0x7FFFFFFF) > 0x7F800000, 0x7FFFFFFF, value).astype(np.uint32)
        out.append(lanes(f"{name}.ftz.f32", f"{name}.ftz.f32 r, a;", [a], value))
    for t, top in (("f32", 1 << 31), ("f64", 1 << 63)):
        a, b = _operands(f"copysign.{t}", t, 2)
        kind = a.dtype.type
        value = (b & kind(top - 1)) | (a & kind(top))
        out.append(lanes(f"copysign.{t}", f"copysign.{t} r, a, b;", [a, b], value))
    return out


_RELATIONS: dict[str, Callable[[Number, Number], bool]] = {
    "eq": lambda a, b: a == b,
    "ne": lambda a, b: a != b,
    "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b,
    "gt": lambda a, b: a > b,
    "ge": lambda a, b: a >= b,
}


def _holds(relation: str, a: Number, b: Number) -> bool:
    nan = any(isinstance(v, float) and math.isnan(v) for v in (a, b))
    if relation in ("num", "nan"):
        return nan == (relation == "nan")
    if relation in _RELATIONS:
        return not nan and _RELATIONS[relation](a, b)
    return nan or _RELATIONS[relation[:-1]](a, b)


def comparisons() -> list[Form]:
    names = [*_RELATIONS, *(f"{n}u" for n in _RELATIONS), "num", "nan"]
    out = []
    for t in ("f16", "bf16", "f32", "f64"):
        a, b = _operands(f"setp.{t}", t, 2)
        same = np.arange(len(a)) % 5 == 0
        b = np.where(same, a, b)
        code = "mov.b32 r, 0; " + " ".join(
            f"setp.{n}.{t} p0, a, b; selp.b32 w0, {1 << k}, 0, p0; or.b32 r, r, w0;" for k, n in enumerate(names)
        )
        pairs = [(decode(x, t), decode(y, t)) for x, y in zip(a.tolist(), b.tolist(), strict=True)]
        expected = np.array([sum(int(_holds(n, *p)) << k for k, n in enumerate(names)) for p in pairs], np.uint32)
        out.append(lanes(f"setp.{{{','.join(names)}}}.{t}", code, [a, b], expected))
    for t in ("f16x2", "bf16x2"):
        a, b = _operands(f"setp.{t}", t, 2)
        base = t.removesuffix("x2")
        halves = zip(a.view(np.uint16).tolist(), b.view(np.uint16).tolist(), strict=True)
        held = np.array([_holds("ltu", decode(x, base), decode(y, base)) for x, y in halves]).reshape(-1, 2)
        code = f"setp.ltu.{t} p0|p1, a, b; selp.b32 w0, 1, 0, p0; selp.b32 w1, 2, 0, p1; or.b32 r, w0, w1;"
        out.append(lanes(f"setp.ltu.{t} p|q", code, [a, b], (held @ np.array([1, 2])).astype(np.uint32)))
        one = 0x3C00 if base == "f16" else 0x3F80
        expected = np.where(held, one, 0).astype(np.uint16).reshape(-1).view(np.uint32)
        out.append(lanes(f"set.ltu.{t}.{t}", f"set.ltu.{t}.{t} r, a, b;", [a, b], expected))
    a, b = _operands("set.f32", "f32", 2)
    held = np.array([_holds("ge", decode(x, "f32"), decode(y, "f32")) for x, y in zip(a.tolist(), b.tolist(), strict=True)])
    out.append(lanes("set.ge.u32.f32", "set.ge.u32.f32 r, a, b;", [a, b], np.where(held, 0xFFFFFFFF, 0).astype(np.uint32)))
    flag = bits("slct", dtype=np.uint32)
    chosen = np.where((a >> 31 == 0) | (a == 1 << 31), b, flag)
    chosen = np.where((a & 0x7FFFFFFF) > 0x7F800000, flag, chosen).astype(np.uint32)
    out.append(lanes("slct.b32.f32", "slct.b32.f32 r, b, c, a;", [a, b, flag], chosen))
    return out


def tests() -> list[Form]:
    out = []
    for t in ("f32", "f64"):
        fmt = FORMATS[t]
        (a,) = _operands(f"testp.{t}", t, 1)
        magnitude = a & a.dtype.type(fmt.sign - 1)
        smallest = 1 << fmt.mantissa
        held = [
            magnitude < fmt.infinity,
            magnitude == fmt.infinity,
            magnitude <= fmt.infinity,
            magnitude > fmt.infinity,
            ((magnitude >= smallest) | (magnitude == 0)) & (magnitude < fmt.infinity),  # a zero counts as normal
            (magnitude > 0) & (magnitude < smallest),
        ]
        names = ("finite", "infinite", "number", "notanumber", "normal", "subnormal")
        code = "mov.b32 r, 0; " + " ".join(
            f"testp.{n}.{t} p0, a; selp.b32 w0, {1 << k}, 0, p0; or.b32 r, r, w0;" for k, n in enumerate(names)
        )
        expected = sum(h.astype(np.uint32) << np.uint32(k) for k, h in enumerate(held))
        out.append(lanes(f"testp.{{{','.join(names)}}}.{t}", code, [a], expected.astype(np.uint32)))
    return out


def three_operands() -> list[Form]:
    """sm_100a: packed single precision, mixed precision, minimum and maximum of three."""
    out = [operation(n, "f32x2", mode) for n in ("add", "mul", "fma") for mode in ("rn", "rz")]
    out.append(operation("fma", "f32x2", "rn", ftz=True))
    for base in ("f16", "bf16"):
        a, b = floats(f"mixed {base}", base), floats(f"mixed {base} b", base)
        c = floats(f"mixed {base}/c", "f32")
        wide = [np.array([encode(decode(int(x), base), "f32") for x in v], np.uint32) for v in (a, b)]
        for name, code, operands, values in (
            ("add", "r, a, b", [a, c], [wide[0], c]),
            ("sub", "r, a, b", [a, c], [wide[0], c]),
            ("fma", "r, a, b, c", [a, b, c], [*wide, c]),
        ):
            opcode = f"{name}.rn.f32.{base}"
            expected = arithmetic(name, "f32", "rn", False, False, *values)
            out.append(lanes(opcode, f"{opcode} {code};", operands, expected))
    for name in ("min", "max"):
        for nan in (False, True):
            opcode = f"{name}.NaN.f32" if nan else f"{name}.f32"
            operands = _operands(f"{opcode}/3", "f32", 3)
            columns = zip(*(o.tolist() for o in operands), strict=True)
            expected = np.array([_extreme(name, "f32", False, nan, False, *v) for v in columns], np.uint32)
            out.append(lanes(f"{opcode} (three operands)", f"{opcode} r, a, b, c;", operands, expected))
    return out


@cache
def groups() -> tuple[Group, ...]:
    families = (single, division, double, half, extremes, signs, comparisons, tests)
    made = [Group(f"float {f.__name__}", tuple(f()), threads=COUNT) for f in families]
    return (*made, Group("float sm_100a", tuple(three_operands()), threads=COUNT, arch="sm_100a"))
