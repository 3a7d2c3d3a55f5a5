"""Floating-point arithmetic and comparison, and the families that share their names with integer arithmetic."""

from __future__ import annotations

import ctypes
import ctypes.util
from collections.abc import Callable
from platform import machine
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dsv4lab.sim import numfmt
from dsv4lab.sim.decode import Action, Decoder, Form, Run, family
from dsv4lab.sim.errors import UnknownInstruction
from dsv4lab.sim.handlers import alu
from dsv4lab.sim.handlers.alu import assign
from dsv4lab.sim.handlers.integer import packed_minmax, saturated, with_carry
from dsv4lab.sim.program import Instruction
from dsv4lab.sim.registers import Lanes

Array = NDArray
_FLOATS = ("f16", "bf16", "f16x2", "bf16x2", "f32", "f32x2", "f64")


class Values:
    """How one floating type is read from and written to registers; arithmetic is on the arrays `read` gives."""

    def __init__(self, d: Decoder, type_name: str) -> None:
        if type_name not in _FLOATS:
            raise UnknownInstruction(f"floating-point operation on .{type_name}")
        self.d = d
        self.type = type_name
        self.packed = type_name.endswith("x2")
        self.brain = type_name.startswith("bf16")
        self.views = {"f16": "f", "bf16": "u", "f16x2": "h", "bf16x2": "w", "f32": "f", "f32x2": "p", "f64": "f"}[type_name]

    def read(self, w: Lanes, slot: int) -> Array:
        value = getattr(w, self.views)[slot]
        return numfmt.bf16_to_f32(value) if self.brain else value

    def write(self, w: Lanes, slot: int, value: Array, m: Any) -> None:
        out = getattr(w, self.views)[slot]
        value = numfmt.f32_to_bf16(value) if self.brain else numfmt.canonical(value)
        if m is None:
            out[...] = value
        else:
            np.copyto(out, value, where=m[:, None] if self.packed else m)


_libm = ctypes.CDLL(ctypes.util.find_library("m"))
_libm.fma.restype, _libm.fma.argtypes = ctypes.c_double, [ctypes.c_double] * 3
_libm.fmaf.restype, _libm.fmaf.argtypes = ctypes.c_float, [ctypes.c_float] * 3
# fesetround's constants for rounding down, up and to zero
_X86 = machine() == "x86_64"
_MODES = {"rm": 0x400 if _X86 else 0x800000, "rp": 0x800 if _X86 else 0x400000, "rz": 0xC00 if _X86 else 0xC00000}


def directed(function: Callable[..., Array], mode: str) -> Callable[..., Array]:
    """An operation under another rounding mode of the processor, which numpy's arithmetic and libm's fma follow."""

    def operation(*values: Array) -> Array:
        _libm.fesetround(_MODES[mode])
        try:
            return function(*values)
        finally:
            _libm.fesetround(0)

    return operation


def _rounding(f: Form, function: Callable[..., Array], type_name: str) -> Callable[..., Array]:
    mode = f.take("rn", "rz", "rm", "rp")
    if mode in (None, "rn"):
        return function
    assert mode is not None
    if type_name not in ("f32", "f32x2", "f64"):
        raise UnknownInstruction(f"{f.opcode}: rounding .{mode} of .{type_name} is not simulated")
    return directed(fused if function is _multiply_add else function, mode)


def fused(a: Array, b: Array, c: Array) -> Array:
    """a*b + c by libm, one rounding, in the processor's rounding mode."""
    function = _libm.fma if a.dtype == np.float64 else _libm.fmaf
    columns = (v.reshape(-1).tolist() for v in np.broadcast_arrays(a, b, c))
    return np.array([function(*v) for v in zip(*columns, strict=True)], a.dtype).reshape(a.shape)


def _finish(f: Form, function: Callable[..., Array]) -> Callable[..., Array]:
    """Apply .ftz, .sat and .relu around an operation."""
    ftz, saturate, relu = f.has("ftz"), f.has("sat"), f.has("relu")
    early = ftz and f.family in ("mul", "fma")
    if not (ftz or saturate or relu):
        return function

    def operation(*values: Array) -> Array:
        if ftz:
            values = tuple(numfmt.flush(v) for v in values)
        result = function(*values)
        if early:  # the exact result counts: one that only rounding makes a normal number becomes zero
            product = values[0].astype(np.float64) * values[1].astype(np.float64)
            exact = product if len(values) == 2 else numfmt.odd_sum(product, values[2])
            tiny = np.abs(exact) < float(np.finfo(result.dtype).tiny)
            result = np.where(tiny, np.copysign(result.dtype.type(0), result), result)
        elif ftz:
            result = numfmt.flush(result)
        if saturate:
            result = np.where(result > 0, np.minimum(result, 1), 0).astype(result.dtype)  # NaN and -0 become +0
        if relu:
            result = np.where(np.signbit(result) & ~np.isnan(result), result.dtype.type(0), result)
        return result

    return operation


def _multiply_add(a: Array, b: Array, c: Array) -> Array:
    if a.dtype == np.float64:
        return fused(a, b, c)
    if a.dtype == np.float16:
        return (a.astype(np.float64) * b.astype(np.float64) + c.astype(np.float64)).astype(np.float16)
    return numfmt.fma_f32(a, b, c)


def _arithmetic(d: Decoder, i: Instruction, f: Form, function: Callable[..., Array], count: int) -> Run:
    t = f.type()
    if t in ("f16", "bf16") and f.take("f32"):
        raise UnknownInstruction("handled by _mixed")
    if function is _multiply_add and t.startswith("bf16"):
        function = numfmt.fma_bf16
    operation = _finish(f, _rounding(f, function, t))
    values = Values(d, t)
    target = d.register(i.operands[0])
    sources = [d.source(o, t) for o in i.operands[1 : 1 + count]]
    ufunc = operation if isinstance(operation, np.ufunc) and not values.brain and count == 2 else None
    if ufunc is not None and not values.packed:
        a, b = sources

        def direct(w: Lanes, m: Any) -> None:
            v = w.f
            if m is None:
                out = ufunc(v[a], v[b], out=v[target])
                if (out != out).any():
                    out[...] = numfmt.canonical(out)
            else:
                values.write(w, target, ufunc(v[a], v[b]), m)

        return direct

    def run(w: Lanes, m: Any) -> None:
        values.write(w, target, operation(*(values.read(w, s) for s in sources)), m)

    return run


def _mixed(d: Decoder, i: Instruction, f: Form, function: Callable[..., Array], count: int) -> Run:
    """`add.rn.f32.f16`, `fma.rn.f32.bf16`: half-precision first operands, float32 the last one and the result."""
    narrow = f.type()
    f.take("f32")
    operation = _finish(f, _rounding(f, function, "f32"))
    half, single = Values(d, narrow), Values(d, "f32")
    target = d.register(i.operands[0])
    sources = [d.source(o, narrow) for o in i.operands[1:count]]
    last = d.source(i.operands[count], "f32")

    def run(w: Lanes, m: Any) -> None:
        operands = [half.read(w, s).astype(np.float32) for s in sources]
        single.write(w, target, operation(*operands, single.read(w, last)), m)

    return run


def _either(
    name: str, function: Callable[..., Array], integer: Callable[[Decoder, Instruction, Form], Run], count: int
) -> None:
    @family(name)
    def build(d: Decoder, i: Instruction, f: Form) -> Run | Action:
        if f.left and f.left[-1] in _FLOATS:
            if len(f.left) > 1 and f.left[-2] == "f32" and f.left[-1] in ("f16", "bf16"):
                return _mixed(d, i, f, function, count)
            return _arithmetic(d, i, f, function, count)
        if "cc" in f.left:
            return with_carry(d, i, f)
        return saturated(d, i, f) if "sat" in f.left else integer(d, i, f)


def _integer(function: Callable[..., Array]) -> Callable[[Decoder, Instruction, Form], Run]:
    def build(d: Decoder, i: Instruction, f: Form) -> Run:
        t = f.type()
        if t in ("u16x2", "s16x2"):
            target, a, b = d.register(i.operands[0]), d.source(i.operands[1], t), d.source(i.operands[2], t)

            def run(w: Lanes, m: Any) -> None:
                value = function(w.w[a], w.w[b])
                np.copyto(w.w[target], value, where=True if m is None else m[:, None])

            return run
        return alu.binary(d, i.operands, t, function)

    return build


_either("add", np.add, _integer(np.add), 2)
_either("sub", np.subtract, _integer(np.subtract), 2)
_either("mul", np.multiply, alu.integer_mul, 2)
_either("mad", _multiply_add, alu.integer_mul, 3)


@family("fma")
def fma(d: Decoder, i: Instruction, f: Form) -> Run:
    if f.left[-2:] in (["f32", "f16"], ["f32", "bf16"]):
        return _mixed(d, i, f, _multiply_add, 3)
    return _arithmetic(d, i, f, _multiply_add, 3)


@family("div")
def div(d: Decoder, i: Instruction, f: Form) -> Run:
    if f.left[-1] not in _FLOATS:
        return alu.integer_divide(d, i, f)
    f.drop("approx", "full")
    return _arithmetic(d, i, f, np.divide, 2)


@family("rem")
def rem(d: Decoder, i: Instruction, f: Form) -> Run:
    return alu.integer_divide(d, i, f)


def extreme(a: Array, b: Array, smallest: bool, keep_nan: bool = False) -> Array:
    """Element-wise minimum or maximum: -0 is below +0; a NaN loses unless kept; a NaN result is the canonical one."""
    out = (np.minimum if smallest else np.maximum)(a, b)
    if not keep_nan and np.isnan(out).any():  # not fmin and fmax: a signalling NaN wins in libm's
        out = np.where(np.isnan(a), b, np.where(np.isnan(b), a, out))
    zero = out == 0
    if zero.any():
        first = np.signbit(a) == smallest
        out = np.where(zero & (a == b), np.where(first, a, b), out)
    return numfmt.canonical(out)


@family("min", "max")
def minmax(d: Decoder, i: Instruction, f: Form) -> Run:
    """Without .NaN a NaN operand loses against a number; .xorsign.abs takes magnitudes and multiplies the signs."""
    if f.left[-1] not in _FLOATS:
        return packed_minmax(d, i, f) if f.left[-1] in ("u16x2", "s16x2") else alu.integer_minmax(d, i, f)
    keep_nan, xorsign, absolute = f.has("NaN"), f.has("xorsign"), f.has("abs")
    smallest = f.family == "min"

    def function(*values: Array) -> Array:
        parts = [np.abs(v) for v in values] if absolute else list(values)
        out = parts[0]
        for part in parts[1:]:
            out = extreme(out, part, smallest, keep_nan)
        if xorsign:
            negative = np.signbit(values[0]) != np.signbit(values[1])
            out = np.where(negative & ~np.isnan(out), -out, out)
        return out

    return _arithmetic(d, i, f, function, len(i.operands) - 1)


@family("neg", "abs")
def sign(d: Decoder, i: Instruction, f: Form) -> Run:
    """Only the sign bit changes; but a NaN of at most 32 bits becomes the canonical one."""
    if f.left[-1] not in _FLOATS:
        return alu.integer_sign(d, i, f)
    ftz = f.has("ftz")
    t = f.type()
    bit = {"f16": 0x8000, "bf16": 0x8000, "f16x2": 0x80008000, "bf16x2": 0x80008000, "f32": 1 << 31, "f64": 1 << 63}.get(t)
    if bit is None:
        bit = 0x8000000080000000
    target, a = d.register(i.operands[0]), d.source(i.operands[1], t)
    values = Values(d, t)
    infinity = {"f16": 0x7C00, "f16x2": 0x7C00, "bf16": 0x7F80, "bf16x2": 0x7F80, "f32": 0x7F800000}.get(t)
    size, top = (4, 0x7FFFFFFF) if t == "f32" else (2, 0x7FFF)

    def run(w: Lanes, m: Any) -> None:
        x = w.u[a]
        kind = x.dtype.type
        value = x ^ kind(bit) if f.family == "neg" else x & ~kind(bit)
        if infinity is not None:
            parts = value.view(f"u{size}")
            parts[...] = np.where((parts & top) > infinity, top, parts)
        assign(w, target, value, m)
        if ftz and t == "f32":
            values.write(w, target, numfmt.flush(values.read(w, target)), m)

    return run


@family("copysign")
def copysign(d: Decoder, i: Instruction, f: Form) -> Run:
    """The magnitude of b with the sign of a."""
    t = f.type()
    target, a, b = d.register(i.operands[0]), d.source(i.operands[1], t), d.source(i.operands[2], t)

    def run(w: Lanes, m: Any) -> None:
        assign(w, target, np.copysign(w.f[b], w.f[a]).view(w.u[target].dtype), m)

    return run


@family("ex2", "lg2", "rcp", "rsqrt", "sqrt", "tanh", "sin", "cos")
def special(d: Decoder, i: Instruction, f: Form) -> Run:
    """Approximate and correctly rounded elementary functions; see `numfmt.APPROXIMATE` for what .approx means here."""
    mode = f.take("approx", "rn", "rz", "rm", "rp")
    ftz = f.has("ftz")
    name, t = f.family, f.type()
    values = Values(d, t)
    target, a = d.register(i.operands[0]), d.source(i.operands[1], t)
    if mode in _MODES:
        assert mode is not None and t in ("f32", "f64")
        operation = directed(np.sqrt if name == "sqrt" else np.reciprocal, mode)
        return lambda w, m: values.write(w, target, operation(values.read(w, a)), m)

    def run(w: Lanes, m: Any) -> None:
        x = values.read(w, a)
        if t == "f64":
            result = numfmt.APPROXIMATIONS[name](x)
        else:
            result = numfmt.approximate(name, x.astype(np.float32), ftz)
            if x.dtype == np.float16:
                result = result.astype(np.float16)
        values.write(w, target, result, m)

    return run


_COMPARE = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "lo": np.less,
    "ls": np.less_equal,
    "hi": np.greater,
    "hs": np.greater_equal,
}
_COMBINE = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}


def _comparison(name: str, floating: bool) -> Callable[[Array, Array], Array]:
    if not floating:
        return _COMPARE[name]
    if name == "num":
        return lambda x, y: ~(np.isnan(x) | np.isnan(y))
    if name == "nan":
        return lambda x, y: np.isnan(x) | np.isnan(y)
    if name == "ne":
        return lambda x, y: (x != y) & ~(np.isnan(x) | np.isnan(y))
    if name == "neu":
        return np.not_equal
    if name.endswith("u"):
        base = _COMPARE[name[:-1]]
        return lambda x, y: base(x, y) | np.isnan(x) | np.isnan(y)
    return _COMPARE[name]


@family("setp")
def setp(d: Decoder, i: Instruction, f: Form) -> Run:
    f.drop("ftz")
    t = f.type()
    name = f.left.pop(0)
    combine = f.take("and", "or", "xor")
    floating = t in _FLOATS
    compare = _comparison(name, floating)
    first, second = d.pair(i.operands[0])
    a, b = d.source(i.operands[1], t), d.source(i.operands[2], t)
    c, negated = d.predicate(i.operands[3]) if combine else (-1, False)
    values = Values(d, t) if floating else None
    kind = "s" if alu.signed(t) else "u"
    plain = compare if isinstance(compare, np.ufunc) and values is None and combine is None and second is None else None
    if plain is not None and first is not None:

        def direct(w: Lanes, m: Any) -> None:
            v = w.s if kind == "s" else w.u
            if m is None:
                plain(v[a], v[b], out=w.u[first])
            else:
                plain(v[a], v[b], out=w.u[first], where=m)

        return direct
    if t.endswith("x2"):
        if combine is not None or values is None or first is None:
            raise UnknownInstruction(f"{i.opcode}: this packed comparison is not simulated")
        packed = values

        def halves(w: Lanes, m: Any) -> None:
            result = compare(packed.read(w, a), packed.read(w, b))
            assign(w, first, result[:, 0], m)
            if second is not None:
                assign(w, second, result[:, 1], m)

        return halves

    def run(w: Lanes, m: Any) -> None:
        if values is not None:
            x, y = values.read(w, a), values.read(w, b)
        else:
            v = getattr(w, kind)
            x, y = v[a], v[b]
        result = compare(x, y)
        inverse = ~result
        if combine is not None:
            other = ~w.u[c] if negated else w.u[c].copy()
            result, inverse = _COMBINE[combine](result, other), _COMBINE[combine](inverse, other)
        if first is not None:
            assign(w, first, result, m)
        if second is not None:
            assign(w, second, inverse, m)

    return run


@family("set")
def set_value(d: Decoder, i: Instruction, f: Form) -> Run:
    f.drop("ftz")
    source = f.type()
    result = f.type()
    compare = _comparison(f.left.pop(0), source in _FLOATS)
    values = Values(d, source) if source in _FLOATS else None
    target, a, b = d.register(i.operands[0]), d.source(i.operands[1], source), d.source(i.operands[2], source)
    kind = "s" if alu.signed(source) else "u"

    def run(w: Lanes, m: Any) -> None:
        x, y = (values.read(w, s) if values is not None else getattr(w, kind)[s] for s in (a, b))
        holds = compare(x, y)
        if values is not None and values.packed:
            words = np.where(holds, 0x3F80 if result == "bf16x2" else 0x3C00, 0).astype(np.uint16)
            np.copyto(w.w[target], words, where=True if m is None else m[:, None])
        else:
            assign(w, target, np.where(holds, 0x3F800000 if result == "f32" else 0xFFFFFFFF, 0).astype(np.uint32), m)

    return run


@family("testp")
def testp(d: Decoder, i: Instruction, f: Form) -> Run:
    name = f.left.pop(0)
    t = f.type()
    target, a = d.register(i.operands[0]), d.source(i.operands[1], t)
    tests: dict[str, Callable[[Array], Array]] = {
        "finite": np.isfinite,
        "infinite": np.isinf,
        "number": lambda x: ~np.isnan(x),
        "notanumber": np.isnan,
        "normal": lambda x: np.isfinite(x) & ((np.abs(x) >= np.finfo(x.dtype).tiny) | (x == 0)),
        "subnormal": lambda x: (x != 0) & (np.abs(x) < np.finfo(x.dtype).tiny),
    }
    return lambda w, m: assign(w, target, tests[name](w.f[a]), m)
