"""Integer arithmetic, logic, shifts, bit fields, permutes and selection."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np

from tests.sim.conformance.case import Form, Group, lanes
from tests.sim.conformance.values import COUNT, bits, each

_SPECIAL = [0, 1, 2, 3, 7, 8, 31, 32, 33, 63, 64, 127, 128, 255]


def words(label: str, t: str) -> np.ndarray:
    """Random integers of a type, with its extremes and small ones."""
    size = int(t[1:]) // 8
    dtype = np.dtype(f"{'i' if t[0] == 's' else 'u'}{size}")
    out = bits(label, dtype=dtype.type).copy()
    info = np.iinfo(dtype)
    special = np.array([v for v in _SPECIAL if v <= info.max] + [info.min, info.max, info.max - 1, info.min + 1], dtype)
    chosen = special[bits(label + "/special") % np.uint32(len(special))]
    return np.where(np.arange(len(out)) % 3 == 0, chosen, out)


def form(opcode: str, t: str, function: Callable[..., int], types: str, result: str = "", code: str = "") -> Form:
    """opcode.t on operands of the given types ("s32 s32"), against a function of Python integers."""
    kinds = types.split()
    label = f"{opcode}.{t}" if t else opcode
    operands = [words(f"{label}/{k}", kind) for k, kind in enumerate(kinds)]
    size = int((result or t)[1:]) // 8
    expected = each(function, np.dtype(f"u{size}").type, *operands)
    text = code or f"{label} r, {', '.join('abcd'[: len(kinds)])};"
    return lanes(label, text, operands, expected)


def _clamp(value: int, low: int, high: int) -> int:
    return max(low, min(high, value))


def _truncated(a: int, b: int) -> int:
    quotient = abs(a) // abs(b)
    return quotient if (a < 0) == (b < 0) else -quotient


def _unsigned(a: int, width: int) -> int:
    return a & ((1 << width) - 1)


def arithmetic() -> list[Form]:
    out = []
    for t in ("s16", "u16", "s32", "u32", "s64", "u64"):
        width = int(t[1:])
        out += [
            form("add", t, lambda a, b: a + b, f"{t} {t}"),
            form("sub", t, lambda a, b: a - b, f"{t} {t}"),
            form("mul.lo", t, lambda a, b: a * b, f"{t} {t}"),
            form("mul.hi", t, lambda a, b, n=width: (a * b) >> n, f"{t} {t}"),
            form("mad.lo", t, lambda a, b, c: a * b + c, f"{t} {t} {t}"),
            form("min", t, min, f"{t} {t}"),
            form("max", t, max, f"{t} {t}"),
            form("sad", t, lambda a, b, c: abs(a - b) + c, f"{t} {t} {'u' + t[1:] if t[0] == 'u' else t}"),
        ]
        low = -(1 << (width - 1)) if t[0] == "s" else 0

        def divisor(b: int, low: int = low) -> int:
            return b if b > 0 else 5 if b == 0 else b  # a divisor of 0 has no defined result

        guard = f"setp.eq.{t} p0, b, 0; selp.b{width} b, 5, b, p0;"
        out += [
            form(
                "div",
                t,
                lambda a, b, f=divisor, n=width: _unsigned(_truncated(a, f(b)), n),
                f"{t} {t}",
                code=f"{guard} div.{t} r, a, b;",
            ),
            form(
                "rem",
                t,
                lambda a, b, f=divisor: a - f(b) * _truncated(a, f(b)),
                f"{t} {t}",
                code=f"{guard} rem.{t} r, a, b;",
            ),
        ]
        if width < 64:
            wide = f"{t[0]}{2 * width}"
            out += [
                form("mul.wide", t, lambda a, b: a * b, f"{t} {t}", wide),
                form("mad.wide", t, lambda a, b, c: a * b + c, f"{t} {t} {wide}", wide),
            ]
        out.append(form("mad.hi", t, lambda a, b, c, n=width: ((a * b) >> n) + c, f"{t} {t} {t}"))
        if t[0] == "s":
            out += [form("abs", t, abs, t), form("neg", t, lambda a: -a, t)]
    low, high = -(1 << 31), (1 << 31) - 1
    out += [
        form("add.sat", "s32", lambda a, b: _clamp(a + b, low, high), "s32 s32"),
        form("sub.sat", "s32", lambda a, b: _clamp(a - b, low, high), "s32 s32"),
        form("mad.hi.sat", "s32", lambda a, b, c: _clamp(((a * b) >> 32) + c, low, high), "s32 s32 s32"),
        form("min.relu", "s32", lambda a, b: max(min(a, b), 0), "s32 s32"),
        form("max.relu", "s32", lambda a, b: max(a, b, 0), "s32 s32"),
        form("mul24.lo", "s32", lambda a, b: _signed(a, 24) * _signed(b, 24), "s32 s32"),
        form("mul24.hi", "u32", lambda a, b: ((a & 0xFFFFFF) * (b & 0xFFFFFF)) >> 16, "u32 u32"),
        form("mad24.lo", "u32", lambda a, b, c: (a & 0xFFFFFF) * (b & 0xFFFFFF) + c, "u32 u32 u32"),
    ]
    return out


def _signed(a: int, width: int) -> int:
    a &= (1 << width) - 1
    return a - (1 << width) if a >> (width - 1) else a


def _halves(function: Callable[[int, int], int], signed: bool) -> Callable[[int, int], int]:
    def both(a: int, b: int) -> int:
        out = 0
        for shift in (0, 16):
            x, y = (a >> shift) & 0xFFFF, (b >> shift) & 0xFFFF
            if signed:
                x, y = _signed(x, 16), _signed(y, 16)
            out |= (function(x, y) & 0xFFFF) << shift
        return out

    return both


def packed() -> list[Form]:
    out = []
    for t in ("s16x2", "u16x2"):
        signed = t[0] == "s"
        for name, function in (("add", lambda a, b: a + b), ("min", min), ("max", max)):
            out.append(form(f"{name}.{t}", "", _halves(function, signed), "u32 u32", "u32"))
    out.append(form("min.relu.s16x2", "", _halves(lambda a, b: max(min(a, b), 0), True), "u32 u32", "u32"))
    out.append(form("max.relu.s16x2", "", _halves(lambda a, b: max(a, b, 0), True), "u32 u32", "u32"))

    def dot(a: int, b: int, c: int, sa: bool, sb: bool, step: int = 8, high: bool = False) -> int:
        total = c
        for k in range(4 if step == 8 else 2):
            x = (a >> (step * k)) & ((1 << step) - 1)
            y = (b >> (8 * (k + (2 if high else 0)))) & 255
            total += (_signed(x, step) if sa else x) * (_signed(y, 8) if sb else y)
        return total

    for at in ("s32", "u32"):
        for bt in ("s32", "u32"):
            signs = at == "s32", bt == "s32"
            code = f"{at}.{bt} r, a, b, c;"
            out.append(form(f"dp4a.{at}.{bt}", "", lambda a, b, c, s=signs: dot(a, b, c, *s), "u32 u32 u32", "u32"))
            for half in ("lo", "hi"):
                out.append(
                    form(
                        f"dp2a.{half}.{at}.{bt}",
                        "",
                        lambda a, b, c, s=signs, h=half: dot(a, b, c, *s, 16, h == "hi"),
                        "u32 u32 u32",
                        "u32",
                        code=f"dp2a.{half}.{code}",
                    )
                )
    return out


def carries() -> list[Form]:
    def add(a: int, b: int, c: int) -> int:
        return ((a + b) >> 32) + 2 * c

    def sub(a: int, b: int, c: int) -> int:
        return 2 * c - (1 if a < b else 0)

    def mad(a: int, b: int, c: int) -> int:
        total = (a * b & 0xFFFFFFFF) + c
        return ((a * b) >> 32) + (total >> 32) + a

    return [
        form("add.cc, addc", "u32", add, "u32 u32 u32", code="add.cc.u32 w0, a, b; addc.u32 r, c, c;"),
        form("sub.cc, subc", "u32", sub, "u32 u32 u32", code="sub.cc.u32 w0, a, b; add.u32 w1, c, c; subc.u32 r, w1, 0;"),
        form("mad.lo.cc, madc.hi", "u32", mad, "u32 u32 u32", code="mad.lo.cc.u32 w0, a, b, c; madc.hi.u32 r, a, b, a;"),
        form(
            "add.cc, addc.cc, addc (96 bits)",
            "u32",
            lambda a, b, c: (((a | (b << 32)) + (c | (a << 32))) >> 64) & 1,
            "u32 u32 u32",
            code="add.cc.u32 w0, a, c; addc.cc.u32 w1, b, a; addc.u32 r, 0, 0;",
        ),
    ]


def logic() -> list[Form]:
    out = []
    for t in ("b16", "b32", "b64"):
        u, width = "u" + t[1:], int(t[1:])
        out += [
            form("and", t, lambda a, b: a & b, f"{u} {u}", u),
            form("or", t, lambda a, b: a | b, f"{u} {u}", u),
            form("xor", t, lambda a, b: a ^ b, f"{u} {u}", u),
            form("not", t, lambda a: ~a, u, u),
            form("cnot", t, lambda a: int(a == 0), u, u),
            form("shl", t, lambda a, n, w=width: a << n if n < w else 0, f"{u} u32", u),
            form("shr", u, lambda a, n: a >> n if n < 64 else 0, f"{u} u32", u),
            form("shr", "s" + t[1:], lambda a, n: a >> min(n, 63), f"{'s' + t[1:]} u32", u),
            form(
                "selp",
                t,
                lambda a, b, c: a if c & 1 else b,
                f"{u} {u} u32",
                u,
                f"and.b32 w0, c, 1; setp.ne.u32 p0, w0, 0; selp.{t} r, a, b, p0;",
            ),
        ]
    for immediate in (0x80, 0xE8, 0x96, 0xCA, 0x01):

        def truth(a: int, b: int, c: int, table: int = immediate) -> int:
            value = 0
            for k in range(32):
                row = ((a >> k) & 1) << 2 | ((b >> k) & 1) << 1 | ((c >> k) & 1)
                value |= ((table >> row) & 1) << k
            return value

        out.append(form(f"lop3.b32 0x{immediate:02x}", "", truth, "u32 u32 u32", "u32", f"lop3.b32 r, a, b, c, {immediate};"))
    pair = "setp.ne.u32 p0, a, 3; setp.gt.u32 p1, b, 77; {} selp.u32 r, 1, 0, p2;"
    for name, function in (
        ("and", lambda x, y: x and y),
        ("or", lambda x, y: x or y),
        ("xor", lambda x, y: x != y),
    ):
        out.append(
            form(
                f"{name}.pred",
                "",
                lambda a, b, f=function: int(f(a != 3, b > 77)),
                "u32 u32",
                "u32",
                pair.format(f"{name}.pred p2, p0, p1;"),
            )
        )
    out.append(
        form(
            "not.pred", "", lambda a: int(a == 3), "u32", "u32", "setp.ne.u32 p0, a, 3; not.pred p1, p0; selp.u32 r, 1, 0, p1;"
        )
    )
    out.append(form("slct.u32.s32", "", lambda a, b, c: a if c >= 0 else b, "u32 u32 s32", "u32"))
    return out


def _field(a: int, position: int, length: int, width: int, signed: bool) -> int:
    position, length = position & 255, length & 255
    top = min(position + length - 1, width - 1)
    sign = (a >> top) & 1 if signed and length else 0
    return sum(((a >> (position + k)) & 1 if k < length and position + k < width else sign) << k for k in range(width))


def _insert(a: int, b: int, position: int, length: int, width: int) -> int:
    position, length = position & 255, length & 255
    for k in range(length):
        if position + k < width:
            b = b & ~(1 << (position + k)) | ((a >> k) & 1) << (position + k)
    return b


def _find(a: int, width: int, signed: bool, shift: bool) -> int:
    a &= (1 << width) - 1
    if signed and a >> (width - 1):
        a ^= (1 << width) - 1
    return -1 if not a else (width - a.bit_length() if shift else a.bit_length() - 1)


def _nth_set(mask: int, base: int, offset: int) -> int:
    base &= 31
    if offset == 0:
        return base if (mask >> base) & 1 else -1
    step, left, at = (1 if offset > 0 else -1), abs(offset), base
    while 0 <= at < 32:
        left -= (mask >> at) & 1
        if not left:
            return at
        at += step
    return -1


def bit_fields() -> list[Form]:
    out = []
    for width in (32, 64):
        u, s, b = f"u{width}", f"s{width}", f"b{width}"
        out += [
            form("popc", b, lambda a: a.bit_count(), u, "u32"),
            form("clz", b, lambda a, w=width: w - a.bit_length(), u, "u32"),
            form("brev", b, lambda a, w=width: int(f"{a:0{w}b}"[::-1], 2), u, u),
            # Positions and lengths are from 0 to 255; what larger ones do is open.
            form(
                "bfi",
                b,
                lambda a, b, c, d, w=width: _insert(a, b, c, d, w),
                f"{u} {u} u32 u32",
                u,
                f"and.b32 c, c, 255; and.b32 d, d, 255; bfi.{b} r, a, b, c, d;",
            ),
        ]
        for t in (u, s):
            signed = t[0] == "s"
            out += [
                form(
                    "bfe",
                    t,
                    lambda a, b, c, w=width, s=signed: _field(a, b, c, w, s),
                    f"{t} u32 u32",
                    "",
                    f"and.b32 b, b, 255; and.b32 c, c, 255; bfe.{t} r, a, b, c;",
                ),
                form("bfind", t, lambda a, w=width, s=signed: _find(a, w, s, False), t, "u32"),
                form("bfind.shiftamt", t, lambda a, w=width, s=signed: _find(a, w, s, True), t, "u32"),
            ]
    for mode in ("clamp", "wrap"):

        def mask(a: int, b: int, mode: str = mode) -> int:
            a, b = (min(a, 32), min(b, 32)) if mode == "clamp" else (a & 31, b & 31)
            return ((1 << b) - 1) << a

        def extend(a: int, b: int, signed: bool, mode: str = mode) -> int:
            n = min(b, 32) if mode == "clamp" else b & 31
            return 0 if not n else _signed(a, n) if signed else a & ((1 << n) - 1)

        out += [
            form(f"bmsk.{mode}", "b32", mask, "u32 u32", "u32"),
            form(f"szext.{mode}", "u32", lambda a, b, f=extend: f(a, b, False), "u32 u32"),
            form(f"szext.{mode}", "s32", lambda a, b, f=extend: f(a, b, True), "s32 u32"),
        ]
        for side in ("l", "r"):

            def funnel(a: int, b: int, c: int, side: str = side, mode: str = mode) -> int:
                n = min(c, 32) if mode == "clamp" else c & 31
                both = a | b << 32
                return (both << n) >> 32 if side == "l" else both >> n

            out.append(form(f"shf.{side}.{mode}", "b32", funnel, "u32 u32 u32", "u32"))
    out.append(
        form("fns", "b32", lambda a, b, c: _nth_set(a, b, _signed(c, 3)), "u32 u32 u32", "u32",
             "and.b32 b, b, 31; bfe.s32 w0, c, 0, 3; fns.b32 r, a, b, w0;")
    )  # fmt: skip
    return out


def _permute(a: int, b: int, c: int, mode: str) -> int:
    source = [(a >> 8 * k) & 255 for k in range(4)] + [(b >> 8 * k) & 255 for k in range(4)]
    n = c & 3
    choices = {
        "f4e": [n, n + 1, n + 2, n + 3],
        "b4e": [n, (n - 1) % 8, (n - 2) % 8, (n - 3) % 8],
        "rc8": [n] * 4,
        "ecl": [max(n, k) for k in range(4)],
        "ecr": [min(n, k) for k in range(4)],
        "rc16": [0 if not n & 1 else 2, 1 if not n & 1 else 3] * 2,
    }
    if mode:
        return sum(source[s] << 8 * k for k, s in enumerate(choices[mode]))
    value = 0
    for k in range(4):
        nibble = (c >> 4 * k) & 15
        byte = source[nibble & 7]
        value |= (255 * (byte >> 7) if nibble & 8 else byte) << 8 * k
    return value


def permutes() -> list[Form]:
    out = [form("prmt.b32", "", lambda a, b, c: _permute(a, b, c, ""), "u32 u32 u32", "u32")]
    for mode in ("f4e", "b4e", "rc8", "ecl", "ecr", "rc16"):
        out.append(form(f"prmt.b32.{mode}", "", lambda a, b, c, m=mode: _permute(a, b, c, m), "u32 u32 u32", "u32"))
    swap = "mov.b64 {w0, w1}, a; mov.b64 r, {w1, w0};"
    out += [
        form("prmt.b32 0x5410", "", lambda a, b: a & 0xFFFF | (b & 0xFFFF) << 16, "u32 u32", "u32",
             "prmt.b32 r, a, b, 0x5410;"),
        form("mov.b64 {b32, b32}", "", lambda a: (a >> 32) | (a & 0xFFFFFFFF) << 32, "u64", "u64", swap),
        form(
            "mov.b32 {b16, b16}", "", lambda a: (a >> 16) | (a & 0xFFFF) << 16, "u32", "u32",
            "mov.b32 {h0, h1}, a; mov.b32 r, {h1, h0};",
        ),
        form(
            "mov.b64 {b16, b16, b16, b16}", "", lambda a: sum(((a >> 16 * k) & 0xFFFF) << 16 * (3 - k) for k in range(4)),
            "u64", "u64", "mov.b64 {h0, h1, h2, h3}, a; mov.b64 r, {h3, h2, h1, h0};",
        ),
    ]  # fmt: skip
    return out


def comparisons() -> list[Form]:
    """Every relation of a type in one result: bit k is relation k."""
    tests: dict[str, Callable[[int, int], bool]] = {
        "eq": lambda a, b: a == b,
        "ne": lambda a, b: a != b,
        "lt": lambda a, b: a < b,
        "le": lambda a, b: a <= b,
        "gt": lambda a, b: a > b,
        "ge": lambda a, b: a >= b,
    }
    out = []
    for t in ("s16", "u16", "s32", "u32", "s64", "u64", "b32", "b64"):
        names = list(tests) if t[0] != "b" else ["eq", "ne"]
        if t[0] == "u":
            names += ["lo", "ls", "hi", "hs"]
        as_test = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}
        code = "mov.b32 r, 0; " + " ".join(
            f"setp.{n}.{t} p0, a, b; selp.b32 w0, {1 << k}, 0, p0; or.b32 r, r, w0;" for k, n in enumerate(names)
        )

        def all_of(a: int, b: int, names: tuple[str, ...] = tuple(as_test.get(n, n) for n in names)) -> int:
            return sum(int(tests[n](a, b)) << k for k, n in enumerate(names))

        kind = "u" + t[1:] if t[0] == "b" else t
        near = form(f"setp.{{{','.join(names)}}}.{t}", "", all_of, f"{kind} {kind}", "u32", code)
        out.append(near)
    for name, function in (("and", lambda x, y: x and y), ("or", lambda x, y: x or y), ("xor", lambda x, y: x != y)):
        code = f"setp.ne.u32 p0, c, 7; setp.lt.{name}.s32 p1|p2, a, b, !p0; "
        code += "selp.b32 w0, 1, 0, p1; selp.b32 w1, 2, 0, p2; or.b32 r, w0, w1;"
        out.append(
            form(
                f"setp.lt.{name}.s32 p|q, a, b, !c",
                "",
                lambda a, b, c, f=function: int(f(a < b, c == 7)) + 2 * int(f(a >= b, c == 7)),
                "s32 s32 u32",
                "u32",
                code,
            )
        )
    out += [
        form("set.le.u32.s32", "", lambda a, b: 0xFFFFFFFF if a <= b else 0, "s32 s32", "u32"),
        form("set.gt.f32.u32", "", lambda a, b: 0x3F800000 if a > b else 0, "u32 u32", "u32"),
    ]
    return out


@cache
def groups() -> tuple[Group, ...]:
    families = (arithmetic, packed, carries, logic, bit_fields, permutes, comparisons)
    return tuple(Group(f"integer {f.__name__.replace('_', ' ')}", tuple(f()), threads=COUNT) for f in families)
