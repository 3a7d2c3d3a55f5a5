"""wgmma: every type, N, major and swizzle, A from registers, negation, both values of scale-d."""

from __future__ import annotations

from functools import cache

import numpy as np

from tests.sim.conformance import matrix
from tests.sim.conformance.case import EXACT, Bound, Form, Group
from tests.sim.conformance.mma import fragment_a
from tests.sim.conformance.values import bits, uniform

THREADS = 128
_DEPTH = {"f16": 16, "bf16": 16, "tf32": 8, "e4m3": 32, "e5m2": 32, "s8": 32, "u8": 32}
_CODE = {"none": 0, "128B": 1, "64B": 2, "32B": 3}
_THREAD = np.arange(THREADS)


def fragment(result: np.ndarray) -> np.ndarray:
    """(64, N) numbers to (128, N / 2): thread t of warp w holds rows 16 w + t / 4 (+ 8), columns 2 (t % 4) (+ 1)."""
    item = np.arange(result.shape[1] // 2)[None, :]
    row = 16 * (_THREAD // 32) + _THREAD % 32 // 4
    return result[row[:, None] + 8 * (item // 2 % 2), 8 * (item // 4) + 2 * (_THREAD % 4)[:, None] + item % 2]


def descriptor(image: matrix.Image, mode: str) -> int:
    """All fields but the start address."""
    return (image.leading >> 4) << 16 | (image.stride >> 4) << 32 | _CODE[mode] << 62


def product(
    d: str,
    a: str,
    b: str,
    n: int,
    *,
    kind: str = "whole",
    mode: str = "128B",
    majors: str = "KK",
    registers: bool = False,
    signs: tuple[int, int] = (1, 1),
    accumulate: bool = True,
    satfinite: bool = False,
) -> Form:
    """One tile: as many instructions along K as its swizzle's span holds, all in one group."""
    k = _DEPTH[a]
    size = matrix.BITS[a] // 8
    steps = 2 if majors == "MM" else max(matrix.SPAN[mode] // 32, 1)
    depth = k * steps
    opcode = f"wgmma.mma_async.sync.aligned.m64n{n}k{k}.{d}.{a}.{b}{'.satfinite' if satfinite else ''}"
    kind = "spread" if kind == "wide" and d == "f16" else kind
    notes = [f"K {depth}", f"{mode} swizzle", f"{majors} major", kind]
    notes += ["A in registers"] if registers else []
    notes += [f"scales {signs}"] if signs != (1, 1) else []
    notes += [] if accumulate else ["scale-d 0"]
    label = f"{opcode} ({', '.join(notes)})"
    left = matrix.operand(label + "a", a, 64, depth, kind)
    right = matrix.operand(label + "b", b, n, depth, "wide" if kind == "tiny" else kind)
    x, y = matrix.values(left, a) * signs[0], matrix.values(right, b) * signs[1]
    images = []
    for codes, major in ((left, majors[0]), (right, majors[1])):
        images.append(matrix.k_major(codes, size, mode, 32) if major == "K" else matrix.mn_major(codes, size, mode, k))
    if d == "s32":
        c = bits(label + "c", 64 * n, np.int32).reshape(64, n)
        near = np.where(
            c & 1 == 1, (c | 0x7FFFF000) & 0x7FFFFFFF, c & 0xFFF | -0x80000000
        )  # so near the limits that many results saturate
        c = near.astype(np.int32) if satfinite else c >> 8
        exact = c.astype(np.int64) if accumulate else np.zeros((64, n), np.int64)
        for first in range(0, depth, k):  # every instruction saturates
            exact = exact + np.rint(x[:, first : first + k] @ y[:, first : first + k].T).astype(np.int64)
            exact = np.clip(exact, -(1 << 31), (1 << 31) - 1) if satfinite else exact
        expected, bound = fragment((exact & 0xFFFFFFFF).astype(np.uint32)), EXACT
    else:
        dtype = np.float16 if d == "f16" else np.float32
        start = uniform(label + "c", 64 * n) * (9 if kind == "whole" else 1)
        c = (np.floor(start) if kind == "whole" else start).astype(dtype).reshape(64, n)
        made = matrix.multiply(x, y, c.astype(np.float64) if accumulate else np.zeros((64, n)), a)
        with np.errstate(over="ignore"):
            expected = fragment(made.exact).astype(dtype)
        limit = matrix.accumulation(made, d, a, depth, steps)
        bound = EXACT if kind == "whole" else Bound("absolute", fragment(limit.limit), limit.reason)
    held = np.ascontiguousarray(fragment(c)).view(np.uint32)  # (128, registers)
    count = held.shape[1]
    parts = [held.view(np.uint8).reshape(-1)]
    words = 0
    if registers:
        slices = [
            np.concatenate([fragment_a(left[16 * w : 16 * w + 16, k * s : k * s + k], matrix.BITS[a]) for w in range(4)])
            for s in range(steps)
        ]
        own = np.concatenate(slices, axis=1)
        words = own.shape[1]
        parts.append(np.ascontiguousarray(own).view(np.uint8).reshape(-1))
    else:
        parts.append(images[0].data)
    parts.append(images[1].data)
    at = np.cumsum([0, *(len(p) for p in parts)])
    shared_b = 0 if registers else len(images[0].data)
    names = [f"d{i}" for i in range(count)]
    text = f".reg .b32 {', '.join(names)}; .reg .b64 here, there, base; .reg .b64 da, db; .reg .b32 w<8>; .reg .pred p<4>;\n"
    text += _fill(int(at[1 if not registers else 2]), int(at[3]) - int(at[1 if not registers else 2]))
    text += f"mad.wide.u32 here, thread, {4 * count}, source; mad.wide.u32 there, thread, {4 * count}, target;\n"
    text += "\n".join(f"ld.global.b32 {name}, [here+{4 * i}];" for i, name in enumerate(names))
    if words:
        text += f"\n.reg .b32 a<{words}>; mad.wide.u32 here, thread, {4 * words}, source;\n"
        text += "\n".join(f"ld.global.b32 a{i}, [here+{int(at[1]) + 4 * i}];" for i in range(words))
    text += f"\nshr.u32 w0, smem, 4; cvt.u64.u32 base, w0; setp.ne.u32 p0, w0, {0 if accumulate else 'w0'};\n"
    text += "wgmma.fence.sync.aligned;\n"
    for step in range(steps):
        d_list = "{" + ", ".join(names) + "}"
        text += f"add.s64 db, base, {(shared_b + step * images[1].step) >> 4};\n"
        text += f"or.b64 db, db, {_signed(descriptor(images[1], mode))};\n"
        if registers:
            per = words // steps
            left_text = "{" + ", ".join(f"a{i}" for i in range(step * per, step * per + per)) + "}"
            flags = [] if majors[1] == "K" else [1]
        else:
            text += (
                f"add.s64 da, base, {(step * images[0].step) >> 4}; or.b64 da, da, {_signed(descriptor(images[0], mode))};\n"
            )
            left_text = "da"
            flags = [int(m == "M") for m in majors]
        tail = [*signs] if d != "s32" else []
        if matrix.BITS[a] == 16:
            tail += flags if not registers else [int(majors[1] == "M")]
        if step == 1 and not accumulate:
            text += "setp.eq.u32 p0, w0, w0;\n"
        text += f"{opcode} {d_list}, {left_text}, db, p0{''.join(f', {t}' for t in tail)};\n"
    text += "wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0;\n"
    text += "\n".join(f"st.global.b32 [there+{4 * i}], {name};" for i, name in enumerate(names))
    return Form(label, text, np.concatenate(parts), expected, bound=bound)


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value


def _fill(start: int, size: int) -> str:
    """Copy part of the source to the start of shared memory and make it visible to the tensor core."""
    return f"""
    mov.u32 w1, thread; mad.wide.u32 here, thread, 16, source;
    FILL: setp.ge.u32 p1, w1, {size // 16}; @p1 bra FILLED; mad.lo.u32 w2, w1, 16, smem;
    ld.global.v4.b32 {{w3, w4, w5, w6}}, [here+{start}]; st.shared.v4.b32 [w2], {{w3, w4, w5, w6}};
    add.u32 w1, w1, {THREADS}; add.s64 here, here, {16 * THREADS}; bra FILL;
    FILLED: fence.proxy.async.shared::cta; bar.sync 0;
    """


def widths() -> list[Form]:
    """Every N, in the plainest layout."""
    return [product("f32", "f16", "f16", n) for n in range(8, 257, 8)]


def layouts() -> list[Form]:
    """Every swizzle and major, with whole numbers: a wrong address cannot hide in rounding."""
    out = []
    for a in ("f16", "bf16"):
        for mode in ("none", "32B", "64B", "128B"):
            for majors in ("KK", "MK", "KM", "MM"):
                out.append(product("f32", a, a, 64 if mode != "128B" else 128, mode=mode, majors=majors))
    for a in ("tf32", "e4m3", "s8"):
        for mode in ("none", "32B", "64B", "128B"):
            out.append(product("s32" if a == "s8" else "f32", a, a, 48 if a != "s8" else 64, mode=mode))
    for a in ("f16", "tf32", "e4m3", "u8"):
        for mode in ("none", "64B", "128B"):
            out.append(product("s32" if a == "u8" else "f32", a, a, 32, mode=mode, registers=True))
    out.append(product("f32", "f16", "f16", 32, majors="KM", registers=True))
    return out


def types() -> list[Form]:
    """Every type, with numbers of ordinary and of very different size; negation; scale-d."""
    out = []
    for kind in ("whole", "normal", "wide"):
        out += [product("f32", a, a, 40, kind=kind) for a in ("f16", "bf16", "tf32")]
        out.append(product("f16", "f16", "f16", 40, kind=kind))
        for a in ("e4m3", "e5m2"):
            for b in ("e4m3", "e5m2"):
                out += [product("f32", a, b, 24, kind=kind), product("f16", a, b, 24, kind=kind)]
        # One instruction alone: no rounding between instructions.
        out += [
            product(d, a, a, 16, kind=kind, mode="32B")
            for d, a in (("f32", "f16"), ("f32", "bf16"), ("f32", "tf32"), ("f32", "e4m3"), ("f32", "e5m2"), ("f16", "f16"))
        ]
        out += [product("f32", a, a, 16, kind=kind, mode="32B", accumulate=False) for a in ("f16", "bf16", "tf32", "e4m3")]
    for kind in ("holes", "tiny", "special"):
        for a in ("f16", "bf16", "tf32", "e4m3", "e5m2"):
            out += [
                product("f32", a, a, 16, kind=kind, mode="32B"),
                product("f32", a, a, 16, kind=kind, mode="32B", accumulate=False),
            ]
        out.append(product("f16", "f16", "f16", 16, kind=kind, mode="32B", accumulate=False))
    for a in ("s8", "u8"):
        for b in ("s8", "u8"):
            out += [product("s32", a, b, 16, kind="normal"), product("s32", a, b, 32, kind="normal", satfinite=True)]
    for signs in ((-1, 1), (1, -1), (-1, -1)):
        out += [
            product("f32", "f16", "f16", 16, signs=signs),
            product("f16", "f16", "f16", 16, signs=signs),
            product("f32", "tf32", "tf32", 16, signs=signs),
        ]
    out += [
        product("f32", "f16", "f16", 16, accumulate=False),
        product("s32", "s8", "s8", 16, accumulate=False),
        product("f16", "f16", "f16", 16, accumulate=False),
    ]
    return out


@cache
def groups() -> tuple[Group, ...]:
    return tuple(Group(f"wgmma {f.__name__}", tuple(f()), threads=THREADS, shared=65536) for f in (widths, layouts, types))
