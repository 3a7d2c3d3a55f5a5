"""The approximate functions, against float64, within the error that PTX documents for them."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np

from tests.sim.conformance.case import Bound, Form, Group, lanes
from tests.sim.conformance.values import COUNT, bits, decode, encode, floats

DOCUMENTED = "documented error of the instruction; the simulator rounds the exact result"
_FUNCTIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "ex2": np.exp2,
    "lg2": np.log2,
    "rcp": lambda x: 1 / x,
    "rsqrt": lambda x: 1 / np.sqrt(x),
    "sqrt": np.sqrt,
    "tanh": np.tanh,
    "sin": np.sin,
    "cos": np.cos,
}
_KINDS = {"f32": np.float32, "f16": np.float16, "f64": np.float64}


def _flush(x: np.ndarray) -> np.ndarray:
    return np.where(np.abs(x) < np.float32(2.0**-126), np.copysign(np.float32(0), x), x)


def inputs(name: str, label: str, count: int = COUNT) -> np.ndarray:
    """float32 inputs over the range in which a function's error is documented, with its special values."""
    random = bits(label, count, np.uint32).astype(np.float64) / 2.0**32
    if name == "ex2":
        x = random * 280 - 150
    elif name in ("sin", "cos"):
        x = (2 * random - 1) * np.pi
    elif name == "tanh":
        x = (2 * random - 1) * np.exp2(np.arange(count) % 24 - 18)
    else:
        x = np.exp2(random * 240 - 120)
        if name == "lg2":
            x = np.where(np.arange(count) % 2 == 0, 0.5 + 1.5 * random, x)
        if name == "rcp":
            x = np.where(np.arange(count) % 2 == 0, x, -x)
    out = x.astype(np.float32)
    special = [0.0, -0.0, 1.0, 2.0, 0.5, 4.0, np.inf, np.nan]
    if name not in ("sin", "cos"):
        special += [-np.inf, -1.0]
    out[: len(special)] = special
    return out


def single(name: str, ftz: bool, bound: Bound, extra: bool = False) -> Form:
    opcode = f"{name}.approx.ftz.f32" if ftz else f"{name}.approx.f32"
    x = inputs(name, opcode)
    if extra:
        x[16:32] = floats(opcode, "f32")[16:32].view(np.float32) * np.float32(2.0**-20)
        x[16:24] = (np.arange(8, dtype=np.uint32) * np.uint32(99991)).view(np.float32)  # subnormal numbers
    with np.errstate(all="ignore"):
        source = (_flush(x) if ftz else x).astype(np.float64)
        value = _FUNCTIONS[name](source).astype(np.float32)
    return lanes(opcode, f"{opcode} r, a;", [x.view(np.uint32)], _flush(value) if ftz else value, bound)


def _half(name: str, t: str, limit: float, kind: str = "relative") -> Form:
    base = t.removesuffix("x2")
    opcode = f"{name}.approx.ftz.{t}" if base == "bf16" and name == "ex2" else f"{name}.approx.{t}"
    count = 2 * COUNT if t.endswith("x2") else COUNT
    # Results stay clear of subnormal numbers, whose relative error is unbounded.
    span = 14.0 if base == "f16" and name == "ex2" else 60.0 if name == "ex2" else 4.0
    codes = np.array([encode(float(v), base) for v in (bits(opcode, count).astype(np.float64) / 2.0**31 - 1) * span], np.uint16)
    values = np.array([float(decode(int(c), base)) for c in codes])
    result = _FUNCTIONS[name](values)
    expected = np.array([encode(float(v), base) for v in result], np.uint16)
    operand = codes.view(np.uint32) if t.endswith("x2") else codes
    made = lanes(opcode, f"{opcode} r, a;", [operand], expected.view(np.uint32) if t.endswith("x2") else expected)
    if base == "f16":
        expected = expected.view(np.float16)
    bound = Bound(kind, limit, DOCUMENTED)
    return Form(made.label, made.text, made.source, expected, bound=bound, element=base if base == "bf16" else "")


def functions() -> list[Form]:
    def relative(power: float) -> Bound:
        return Bound("relative", 2.0**power, DOCUMENTED)

    out = []
    for ftz in (True, False):
        out += [
            single("ex2", ftz, Bound("ulp", 2, DOCUMENTED)),
            single("rcp", ftz, Bound("ulp", 1, DOCUMENTED), extra=ftz),
            single("rsqrt", ftz, relative(-22.4), extra=ftz),
            single("sqrt", ftz, relative(-22.4), extra=ftz),
            single("sin", ftz, Bound("absolute", 2.0**-20.5, DOCUMENTED)),
            single("cos", ftz, Bound("absolute", 2.0**-20.5, DOCUMENTED)),
        ]
        opcode = "lg2.approx.ftz.f32" if ftz else "lg2.approx.f32"
        made = single("lg2", ftz, Bound("absolute"))
        wanted = made.expected.astype(np.float64)
        with np.errstate(all="ignore"):
            limit = np.where(np.abs(wanted) <= 1, 2.0**-22, np.abs(wanted) * 2.0**-21.5)
        out.append(Form(opcode, made.text, made.source, made.expected, bound=Bound("absolute", limit, DOCUMENTED)))
    out.append(single("tanh", False, relative(-10.9)))
    return out


def halves() -> list[Form]:
    out = []
    for t in ("f16", "f16x2"):
        out += [_half("ex2", t, 2.0**-9.8), _half("tanh", t, 2.0**-9.9, "absolute")]
    for t in ("bf16", "bf16x2"):
        out.append(_half("ex2", t, 2.0**-6.9))
        if t == "bf16":
            out.append(_half("tanh", t, 2.0**-6.9))
    return out


def quotients() -> list[Form]:
    out = []
    a, b = inputs("rcp", "div a"), inputs("rcp", "div b")
    a, b = np.roll(a, 3), b.copy()
    with np.errstate(all="ignore"):
        mantissas = [np.ldexp(*np.broadcast_arrays(np.frexp(v)[0].astype(np.float64), k)) for v, k in ((a, 3), (b, 5))]
        x, y = (m.astype(np.float32) for m in mantissas)
        expected = (x.astype(np.float64) / y.astype(np.float64)).astype(np.float32)
    for name in ("div.approx.f32", "div.full.f32", "div.approx.ftz.f32", "div.full.ftz.f32"):
        out.append(
            lanes(name, f"{name} r, a, b;", [x.view(np.uint32), y.view(np.uint32)], expected, Bound("ulp", 2, DOCUMENTED))
        )
    for name, function in (("rcp", lambda v: 1 / v), ("rsqrt", lambda v: 1 / np.sqrt(v))):
        v = np.exp2(bits(name + "64", COUNT).astype(np.float64) / 2.0**26 - 32)
        opcode = f"{name}.approx.ftz.f64"
        why = "the instruction computes the upper 32 bits only; the simulator rounds the exact result"
        out.append(lanes(opcode, f"{opcode} r, a;", [v.view(np.uint64)], function(v), Bound("relative", 2.0**-19, why)))
    return out


TURNS = 32  # of every thread in a sweep


def sweeps() -> list[Form]:
    """Each float32 function at 32768 places, one result a turn."""
    out = []
    threads, count = 1024, 1024 * TURNS
    bounds = {
        "ex2": Bound("ulp", 2, DOCUMENTED),
        "rcp": Bound("ulp", 1, DOCUMENTED),
        "rsqrt": Bound("relative", 2.0**-22.4, DOCUMENTED),
        "sqrt": Bound("relative", 2.0**-22.4, DOCUMENTED),
        "lg2": Bound("absolute", 2.0**-15, DOCUMENTED),
        "sin": Bound("absolute", 2.0**-20.5, DOCUMENTED),
        "cos": Bound("absolute", 2.0**-20.5, DOCUMENTED),
        "tanh": Bound("relative", 2.0**-10.9, DOCUMENTED),
    }
    for name, bound in bounds.items():
        opcode = f"{name}.approx.f32" if name == "tanh" else f"{name}.approx.ftz.f32"
        x = inputs(name, f"{opcode} sweep", count)
        with np.errstate(all="ignore"):
            expected = _flush(_FUNCTIONS[name](_flush(x).astype(np.float64)).astype(np.float32))
        code = f"""
        .reg .b32 x, turn; .reg .b64 from, to; .reg .pred more; mov.b32 turn, 0;
        mad.wide.u32 from, thread, 4, source; mad.wide.u32 to, thread, 4, target;
        TURN: ld.global.b32 x, [from]; {opcode} x, x; st.global.b32 [to], x; add.s64 from, from, {4 * threads};
        add.s64 to, to, {4 * threads}; add.u32 turn, turn, 1; setp.lt.u32 more, turn, {TURNS}; @more bra TURN;
        """
        out.append(Form(f"{opcode}, {count} places", code, x, expected, bound=bound))
    return out


@cache
def groups() -> tuple[Group, ...]:
    forms = [*functions(), *halves(), *quotients()]
    sweep = Group("special functions, many places", tuple(sweeps()), threads=1024)
    return (Group("special functions", tuple(forms), threads=COUNT), sweep)
