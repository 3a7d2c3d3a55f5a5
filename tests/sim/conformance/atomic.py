"""Atomic operations and reductions on global and shared memory: every operation, type and vector."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np

from tests.sim.conformance.case import ANY_NAN, EXACT, Form, Group
from tests.sim.conformance.values import arithmetic, bits, floats

THREADS = 128
_REGISTERS = ".reg .b32 w<16>; .reg .b64 x<16>; .reg .b16 h<16>; .reg .pred p<4>; .reg .b64 here, there; .reg .b32 at;\n"
_PREFIX = {2: "h", 4: "w", 8: "x"}
Function = Callable[[np.ndarray, np.ndarray], np.ndarray]


def _clip(function: Callable[[int, int], int]) -> Function:
    def apply(old: np.ndarray, new: np.ndarray) -> np.ndarray:
        mask = (1 << (8 * old.itemsize)) - 1
        pairs = zip(old.tolist(), new.tolist(), strict=True)
        return np.array([function(a, b) & mask for a, b in pairs], f"u{old.itemsize}").view(old.dtype)

    return apply


_INTEGER: dict[str, tuple[tuple[str, ...], Function]] = {
    "add": (("u32", "s32", "u64"), _clip(lambda a, b: a + b)),
    "min": (("u32", "s32", "u64", "s64"), _clip(min)),
    "max": (("u32", "s32", "u64", "s64"), _clip(max)),
    "and": (("b32", "b64"), _clip(lambda a, b: a & b)),
    "or": (("b32", "b64"), _clip(lambda a, b: a | b)),
    "xor": (("b32", "b64"), _clip(lambda a, b: a ^ b)),
    "inc": (("u32",), _clip(lambda a, b: 0 if a >= b else a + 1)),
    "dec": (("u32",), _clip(lambda a, b: b if a == 0 or a > b else a - 1)),
}


def _numbers(label: str, t: str, count: int = THREADS) -> tuple[np.ndarray, np.ndarray]:
    """Old and new values; a quarter of them near each other so that minimum, inc and dec go both ways."""
    size = int(t[1:].removesuffix("x2")) // 8
    dtype = np.dtype(f"{'i' if t[0] == 's' else 'u'}{size}").type
    old, new = bits(label + "/old", count, dtype), bits(label + "/new", count, dtype)
    near = np.arange(count) % 4 == 0
    return np.where(np.arange(count) % 7 == 0, dtype(0), old), np.where(near, old + dtype(1), new)


def _returned(
    opcode: str, old: np.ndarray, new: np.ndarray, result: np.ndarray, more: str = "", element: str = "", bound=EXACT
) -> list[Form]:  # type: ignore[no-untyped-def]
    """atom on a word of the thread's own, in global and in shared memory: the target holds the results, then the old values."""
    out = []
    size = old.itemsize
    name = _PREFIX[size]
    operand = f"{name}1{more}"
    for space in ("global", "shared"):
        label = opcode.replace("SPACE", space)
        place = "there" if space == "global" else "at"
        start = f"""
        mad.wide.u32 here, thread, {size}, source; mad.wide.u32 there, thread, {size}, target;
        mad.lo.u32 at, thread, {size}, smem;
        ld.global.b{8 * size} {name}1, [here]; ld.global.b{8 * size} {name}2, [here+{size * THREADS}];
        """
        if space == "shared":
            start += f"ld.global.b{8 * size} {name}0, [there]; st.shared.b{8 * size} [at], {name}0; bar.sync 0;\n"
        code = f"{label} {name}0, [{place}], {operand};\n"
        if space == "shared":
            code += f"bar.sync 0; ld.shared.b{8 * size} {name}3, [at]; st.global.b{8 * size} [there], {name}3;\n"
        code += f"st.global.b{8 * size} [there+{size * THREADS}], {name}0;"
        kind = result.dtype
        expected = np.concatenate([result, old.view(kind)])
        before = np.concatenate([old.view(kind), np.zeros_like(result)])
        source = np.concatenate([new.view(kind), np.zeros_like(result)]) if not more else _third(new, old)
        out.append(Form(label, _REGISTERS + start + code, source, expected, before, element=element, bound=bound))
    return out


def _third(new: np.ndarray, old: np.ndarray) -> np.ndarray:
    """Operands of cas: what is expected, for half of the threads what is there, and the replacement."""
    return np.concatenate([np.where(np.arange(len(new)) % 2 == 0, old, new), new[::-1]])


def integers() -> list[Form]:
    out = []
    for name, (types, function) in _INTEGER.items():
        for t in types:
            old, new = _numbers(f"atom {name} {t}", t)
            out += _returned(f"atom.SPACE.{name}.{t}", old, new, function(old, new))
    for t in ("b32", "b64"):
        old, new = _numbers(f"atom exch {t}", t)
        out += _returned(f"atom.SPACE.exch.{t}", old, new, new)
    for t in ("b16", "b32", "b64"):
        old, new = _numbers(f"atom cas {t}", t)
        expected = np.where(np.arange(THREADS) % 2 == 0, new[::-1], np.where(new == old, new[::-1], old))
        out += _returned(f"atom.SPACE.cas.{t}", old, new, expected, f", {_PREFIX[old.itemsize]}2")
    for order in ("relaxed.cta", "acquire.gpu", "release.sys", "acq_rel.gpu"):
        old, new = _numbers(f"atom {order}", "u32")
        out += _returned(f"atom.{order}.SPACE.add.u32", old, new, old + new)
    return out


def floating() -> list[Form]:
    out = []
    for t, opcode in (
        ("f32", "atom.SPACE.add.f32"),
        ("f64", "atom.SPACE.add.f64"),
        ("f16", "atom.SPACE.add.noftz.f16"),
        ("bf16", "atom.SPACE.add.noftz.bf16"),
        ("f16x2", "atom.SPACE.add.noftz.f16x2"),
        ("bf16x2", "atom.SPACE.add.noftz.bf16x2"),
    ):
        base = t.removesuffix("x2")
        count = 2 * THREADS if t.endswith("x2") else THREADS
        old, new = floats(opcode, base, count), floats(opcode + "/new", base, count)
        if base == "f32":  # float32 atomics flush subnormal numbers on shared and not on global memory: left out here
            old, new = (np.where((v & 0x7F800000) < 0x10000000, 0x3F000000, v).astype(np.uint32) for v in (old, new))
        result = arithmetic("add", base, "rn", False, False, old, new)
        kind = {"f32": np.float32, "f64": np.float64, "f16": np.float16, "bf16": np.uint16}[base]
        if t.endswith("x2"):
            old, new = old.view(np.uint32), new.view(np.uint32)
        made = _returned(opcode, old, new, result.view(old.dtype), element="bf16" if base == "bf16" else "", bound=ANY_NAN)
        for form in made:
            assert form.before is not None
            out.append(
                Form(
                    form.label, form.text, form.source, form.expected.view(kind), form.before.view(kind), ANY_NAN, form.element
                )
            )
    return out


def vectors() -> list[Form]:
    """red and atom of several floats at once, on global memory."""
    out = []
    for t, count in (("f32", 2), ("f32", 4), ("f16", 2), ("f16", 4), ("f16", 8), ("bf16", 2), ("bf16", 4), ("bf16", 8)):
        out += [_vector("red", "add", t, count), _vector("atom", "add", t, count)]
    for t, count in (("f16x2", 2), ("f16x2", 4), ("bf16x2", 2), ("bf16x2", 4)):
        out.append(_vector("red", "add", t, count))
    for name in ("min", "max"):
        out += [_vector("red", name, "f16", 8), _vector("red", name, "bf16x2", 4)]
    return out


def _vector(family: str, name: str, t: str, count: int) -> Form:
    base = t.removesuffix("x2")
    size = 4 if t.endswith("x2") or t == "f32" else 2
    prefix = _PREFIX[size]
    each = count * (2 if t.endswith("x2") else 1)
    noftz = "" if t == "f32" else "noftz."
    opcode = f"{family}.global.v{count}.{t}.{name}" if not noftz else f"{family}.global.{name}.noftz.v{count}.{t}"
    opcode = f"{family}.relaxed.gpu.global.{name}.{noftz}v{count}.{t}"
    old, new = (floats(opcode + k, base, THREADS * each) for k in ("/old", "/new"))
    finite = 0x7F00 if base == "bf16" else 0x7800 if base == "f16" else 0x7F000000
    old, new = (np.where((v & finite) == finite, 0, v).astype(v.dtype) for v in (old, new))
    if base == "f32":
        old, new = (np.where((v & 0x7F800000) < 0x10000000, 0x3F000000, v).astype(np.uint32) for v in (old, new))
    if name == "add":
        result = arithmetic("add", base, "rn", False, False, old, new)
    else:
        ordered = [
            np.where(v & 0x8000, 0x7FFF - (v & 0x7FFF).astype(np.int32), v.astype(np.int32) + 0x8000) for v in (old, new)
        ]
        smaller = ordered[0] <= ordered[1]
        result = np.where(smaller == (name == "min"), old, new)
    width = size * count
    loads = "\n".join(f"ld.global.b{8 * size} {prefix}{k}, [here+{size * k}];" for k in range(count))
    names = "{" + ", ".join(f"{prefix}{k}" for k in range(count)) + "}"
    back = "{" + ", ".join(f"{prefix}{8 + k}" for k in range(count)) + "}, " if family == "atom" else ""
    code = f"mad.wide.u32 here, thread, {width}, source; mad.wide.u32 there, thread, {width}, target;\n"
    code += f"{loads}\n{opcode} {back}[there], {names};"
    kind = {"f32": np.float32, "f16": np.float16, "bf16": np.uint16}[base]
    expected, before = result.view(kind), old.view(kind)
    if family == "atom":
        stores = "\n".join(
            f"st.global.b{8 * size} [there+{THREADS * width + size * k}], {prefix}{8 + k};" for k in range(count)
        )
        code += "\n" + stores
        expected, before = np.concatenate([expected, before]), np.concatenate([before, np.zeros_like(before)])
    return Form(opcode, _REGISTERS + code, new, expected, before, ANY_NAN, "bf16" if base == "bf16" else "")


def contended() -> list[Form]:
    """All threads on one word: the total is certain, the order is not."""
    out = []
    values = bits("contended", THREADS, np.uint32)
    for space, place in (("global", "there"), ("shared", "smem")):
        for family, name, result in (
            ("red", "add.u32", int(values.astype(np.int64).sum()) & 0xFFFFFFFF),
            ("red", "xor.b32", int(np.bitwise_xor.reduce(values))),
            ("red", "min.u32", int(values.min())),
            ("red", "max.s32", int(values.view(np.int32).max()) & 0xFFFFFFFF),
            ("red", "or.b32", int(np.bitwise_or.reduce(values))),
            ("red", "inc.u32", THREADS),
            ("atom", "add.u32", int(values.astype(np.int64).sum()) & 0xFFFFFFFF),
        ):
            start = 0xFFFFFFFF if name.startswith("min") else 0
            label = f"{family}.{space}.{name} of one word"
            target = "w2, " if family == "atom" else ""
            amount = "w1" if not name.startswith("inc") else "w3"
            code = f"""
            mov.b64 there, target; mad.wide.u32 here, thread, 4, source; ld.global.b32 w1, [here]; mov.b32 w3, 1000000;
            setp.eq.u32 p0, thread, 0; @p0 st.shared.b32 [smem], {start}; bar.sync 0;
            {family}.{space}.{name} {target}[{place}], {amount}; bar.sync 0;
            """
            if space == "shared":
                code += "@p0 ld.shared.b32 w5, [smem]; @p0 st.global.b32 [there], w5;"
            expected = np.array([result if result < 1 << 32 else 0], np.uint32)
            out.append(Form(label, _REGISTERS + code, values, expected, np.array([start], np.uint32)))
    ones = np.ones(THREADS, np.float32)
    code = "mad.wide.u32 here, thread, 4, source; ld.global.b32 w1, [here]; red.global.add.f32 [target], w1;"
    out.append(Form("red.global.add.f32 of one word", _REGISTERS + code, ones, np.array([THREADS], np.float32)))
    return out


@cache
def groups() -> tuple[Group, ...]:
    families = (integers, floating, vectors, contended)
    return tuple(Group(f"atomic {f.__name__}", tuple(f()), threads=THREADS, shared=2048) for f in families)
