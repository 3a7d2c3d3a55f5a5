"""mma.sync: every shape and type of sm_90a, on fragments taken from matrices by the layouts that PTX defines."""

from __future__ import annotations

from functools import cache

import numpy as np

from tests.sim.conformance import matrix
from tests.sim.conformance.case import EXACT, Bound, Form, Group
from tests.sim.conformance.values import bits, uniform

_LANE = np.arange(32)


def fragment_a(codes: np.ndarray, width: int) -> np.ndarray:
    """(16, K) codes to (32, registers) words: register i holds rows t / 4 (+ 8 for odd i)."""
    per = 32 // width
    count = codes.shape[1] // (4 * per) * 2
    return _words(codes, count, per, width, lambda i: _LANE // 4 + 8 * (i % 2), lambda i: i // 2)


def fragment_b(codes: np.ndarray, width: int) -> np.ndarray:
    """(8, K) codes to (32, registers) words."""
    per = 32 // width
    return _words(codes, codes.shape[1] // (4 * per), per, width, lambda i: _LANE // 4, lambda i: i)


def _words(codes: np.ndarray, count: int, per: int, width: int, row, step) -> np.ndarray:  # type: ignore[no-untyped-def]
    out = np.zeros((32, count), np.uint32)
    for i in range(count):
        for j in range(per):
            column = per * (_LANE % 4) + j + 4 * per * step(i)
            out[:, i] |= codes[row(i), column].astype(np.uint32) << np.uint32(width * j)
    return out


def fragment_d(result: np.ndarray) -> np.ndarray:
    """(16, 8) numbers to (32, 4): rows t / 4 and t / 4 + 8, columns 2 (t % 4) and the next."""
    item = np.arange(4)[None, :]
    return result[(_LANE // 4)[:, None] + 8 * (item // 2), (2 * (_LANE % 4))[:, None] + item % 2]


def product(d: str, a: str, b: str, k: int, kind: str, satfinite: bool = False) -> Form:
    shape = f"m16n8k{k}"
    opcode = f"mma.sync.aligned.{shape}.row.col.{'satfinite.' if satfinite else ''}{d}.{a}.{b}.{d}"
    kind = "spread" if kind == "wide" and d == "f16" else kind
    label = f"{opcode} ({kind})"
    left, right = matrix.operand(label + "a", a, 16, k, kind), matrix.operand(label + "b", b, 8, k, kind)
    x, y = matrix.values(left, a), matrix.values(right, b)
    width = matrix.BITS[a]
    words = [fragment_a(left, width), fragment_b(right, width)]
    if d == "s32":
        c = bits(label + "c", 128, np.int32).reshape(16, 8)
        if satfinite:  # so near the limits that many results saturate
            c = np.where(c & 1 == 1, (c | 0x7FFFF000) & 0x7FFFFFFF, c & 0xFFF | -0x80000000).astype(np.int32)
        exact = np.rint(x @ y.T).astype(np.int64) + c
        exact = np.clip(exact, -(1 << 31), (1 << 31) - 1) if satfinite else exact
        result = (exact & 0xFFFFFFFF).astype(np.uint32)
        words.append(fragment_d(c.view(np.uint32)))
        expected, bound = fragment_d(result), EXACT
    else:
        start = np.floor(uniform(label + "c", 128) * 20) if kind == "whole" else uniform(label + "c", 128)
        dtype = np.float16 if d == "f16" else np.float32
        c = start.astype(dtype).reshape(16, 8)
        made = matrix.multiply(x, y, c.astype(np.float64), a)
        with np.errstate(over="ignore"):
            values = fragment_d(made.exact).astype(dtype)
        laid = fragment_d(c)
        words.append(np.ascontiguousarray(laid).view(np.uint32))
        expected = values
        limit = matrix.accumulation(made, d, a, k)
        bound = EXACT if kind == "whole" else Bound("absolute", fragment_d(limit.limit), limit.reason)
    counts = [w.shape[1] for w in words]
    names = [[f"{p}{i}" for i in range(n)] for p, n in zip("abc", counts, strict=True)]
    outs = [f"d{i}" for i in range(counts[2])]
    declare = " ".join(f".reg .b32 {', '.join(n)};" for n in [*names, outs]) + " .reg .b64 here, there;\n"
    total = sum(counts)
    load = f"mad.wide.u32 here, thread, {4 * total}, source; mad.wide.u32 there, thread, {4 * counts[2]}, target;\n"
    load += "\n".join(f"ld.global.b32 {n}, [here+{4 * i}];" for i, n in enumerate([*names[0], *names[1], *names[2]]))
    code = (
        f"\n{opcode} {{{', '.join(outs)}}}, {{{', '.join(names[0])}}}, {{{', '.join(names[1])}}}, {{{', '.join(names[2])}}};\n"
    )
    save = "\n".join(f"st.global.b32 [there+{4 * i}], {n};" for i, n in enumerate(outs))
    return Form(label, declare + load + code + save, np.concatenate(words, axis=1), expected, bound=bound)


def floating() -> list[Form]:
    out = []
    for kind in ("whole", "normal", "wide"):
        for k in (8, 16):
            out += [
                product("f32", "f16", "f16", k, kind),
                product("f16", "f16", "f16", k, kind),
                product("f32", "bf16", "bf16", k, kind),
            ]
        out += [product("f32", "tf32", "tf32", k, kind) for k in (4, 8)]
        for a in ("e4m3", "e5m2"):
            for b in ("e4m3", "e5m2"):
                out.append(product("f32", a, b, 32, kind))
        out.append(product("f16", "e4m3", "e4m3", 32, kind))
        out.append(product("f32", "e4m3", "e4m3", 16, kind))
    for kind in ("holes", "special"):
        out += [product("f32", a, a, k, kind) for a, k in (("f16", 16), ("bf16", 16), ("tf32", 8), ("e4m3", 32), ("e5m2", 32))]
        out.append(product("f16", "f16", "f16", 16, kind))
    return out


def integers() -> list[Form]:
    out = []
    for k in (16, 32):
        for a in ("s8", "u8"):
            for b in ("s8", "u8"):
                out.append(product("s32", a, b, k, "normal"))
        out.append(product("s32", "s8", "s8", k, "normal", satfinite=True))
    return out


def double() -> list[Form]:
    """m8n8k4 and the larger shapes of sm_90 in float64: A and B one number a register, whole numbers and others."""
    out = []
    for m, k in ((8, 4), (16, 4), (16, 8), (16, 16)):
        for kind in ("whole", "normal"):
            opcode = f"mma.sync.aligned.m{m}n8k{k}.row.col.f64.f64.f64.f64"
            label = f"{opcode} ({kind})"
            a, b = matrix.operand(label + "a", "f64", m, k, kind), matrix.operand(label + "b", "f64", 8, k, kind)
            c = np.floor(uniform(label + "c", m * 8) * 9).reshape(m, 8)
            x, y = a.view(np.float64), b.view(np.float64)
            halves = m // 8
            left = [x[_LANE // 4 + 8 * (i % halves), _LANE % 4 + 4 * (i // halves)] for i in range(halves * k // 4)]
            right = [y[_LANE // 4, _LANE % 4 + 4 * i] for i in range(k // 4)]
            place = [(_LANE // 4 + 8 * (i // 2), 2 * (_LANE % 4) + i % 2) for i in range(2 * halves)]
            made = matrix.multiply(x, y, c)
            source = np.stack([*left, *right, *[c[p] for p in place]], axis=1)
            expected = np.stack([made.exact[p] for p in place], axis=1)
            largest = np.stack([made.largest[p] for p in place], axis=1)
            bound = (
                EXACT
                if kind == "whole"
                else Bound("absolute", (k + 1) * 2.0**-51 * largest, "order of the additions, each rounded")
            )
            counts = [len(left), len(right), len(place)]
            names = [[f"{p}{i}" for i in range(n)] for p, n in zip("abc", counts, strict=True)]
            outs = [f"d{i}" for i in range(len(place))]
            text = " ".join(f".reg .b64 {', '.join(n)};" for n in [*names, outs]) + " .reg .b64 here, there;\n"
            text += (
                f"mad.wide.u32 here, thread, {8 * sum(counts)}, source; mad.wide.u32 there, thread, {8 * len(place)}, target;\n"
            )
            text += "\n".join(f"ld.global.b64 {n}, [here+{8 * i}];" for i, n in enumerate([*names[0], *names[1], *names[2]]))
            vectors = ", ".join("{" + ", ".join(n) + "}" for n in [outs, *names])
            text += f"\n{opcode} {vectors};\n"
            text += "\n".join(f"st.global.b64 [there+{8 * i}], {n};" for i, n in enumerate(outs))
            out.append(Form(label, text, source, expected, bound=bound))
    return out


@cache
def groups() -> tuple[Group, ...]:
    return tuple(Group(f"mma.sync {f.__name__}", tuple(f()), threads=32) for f in (floating, integers, double))
