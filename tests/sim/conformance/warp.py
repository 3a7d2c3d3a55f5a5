"""Instructions of a whole warp: shuffles, votes, matches, reductions, election, fragments through shared memory."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np

from tests.sim.conformance.case import Form, Group, lanes
from tests.sim.conformance.values import bits, each, floats

THREADS = 128
_LANE = np.arange(THREADS) % 32
_WARP = np.arange(THREADS) // 32 * 32
_PART = 0x0FF0A5C3  # lanes that take part in the partial forms


def _source(mode: str, lane: int, b: int, c: int) -> tuple[int, bool]:
    """The lane that a shuffle reads and whether it is in range, by the definition of shfl.sync."""
    clamp, segment = c & 31, (c >> 8) & 31
    highest = (lane & segment) | (clamp & ~segment & 31)
    b &= 31
    if mode == "up":
        j = lane - b
        inside = j >= highest
    elif mode == "down":
        j = lane + b
        inside = j <= highest
    elif mode == "bfly":
        j = lane ^ b
        inside = j <= highest
    else:
        j = (lane & segment) | (b & ~segment & 31)
        inside = j <= highest
    return (j if inside else lane), inside


def shuffles() -> list[Form]:
    out = []
    controls = {"up": (0, 0x1800), "down": (0x1F, 0x181F, 0x100F), "bfly": (0x1F, 0x181F), "idx": (0x1F, 0x181F, 0x1C05)}
    for mode, choices in controls.items():
        for c in choices:
            for b in (1, 5, 31, None):
                label = f"shfl.sync.{mode}.b32 b={'lane' if b is None else b} c=0x{c:x}"
                a, steps = bits(label, THREADS), bits(label + "/b", THREADS) % np.uint32(32)
                if b is None and mode != "idx":
                    continue
                where = [_source(mode, int(n), int(s) if b is None else b, c) for n, s in zip(_LANE, steps, strict=True)]
                chosen = a[_WARP + np.array([j for j, _ in where])]
                inside = np.array([i for _, i in where], np.uint32)
                code = f"shfl.sync.{mode}.b32 r0|p0, a, {'b' if b is None else b}, {c}, -1; selp.b32 r1, 1, 0, p0;"
                out.append(lanes(label, code, [a, steps], [chosen, inside]))
    a = bits("partial", THREADS)
    member = (_PART >> _LANE) & 1 == 1
    rotated = np.zeros(THREADS, np.uint32)
    order = [k for k in range(32) if (_PART >> k) & 1]
    following = np.array([order[(order.index(k) + 1) % len(order)] if k in order else 0 for k in range(32)], np.uint32)
    rotated[member] = a[_WARP + following[_LANE]][member]
    code = f"""
    mov.b32 r, 0; and.b32 w0, thread, 31; shr.u32 w1, {_PART}, w0; and.b32 w1, w1, 1; setp.eq.u32 p0, w1, 0; @p0 bra SKIP;
    shfl.sync.idx.b32 r, a, b, 0x1f, {_PART};
    SKIP:
    """
    out.append(lanes("shfl.sync.idx.b32 of some lanes", code, [a, following[_LANE]], rotated))
    return out


def votes() -> list[Form]:
    out = []
    for name, rule in (("mixed", 3), ("all", 1), ("none", 1 << 30)):
        a = bits(f"vote {name}", THREADS)
        held = np.zeros(THREADS, bool) if name == "none" else a % rule == 0
        a = np.where(held, 0, 1).astype(np.uint32)
        rows = held.reshape(-1, 32)
        code = """
        setp.eq.u32 p0, a, 0; vote.sync.ballot.b32 r, p0, -1; vote.sync.all.pred p1, p0, -1; vote.sync.any.pred p2, p0, -1;
        vote.sync.uni.pred p3, p0, -1; vote.sync.ballot.b32 w3, !p0, -1; shr.u32 w3, w3, 20; selp.b32 w0, 3, 5, p1;
        selp.b32 w1, 7, 11, p2;
        selp.b32 w2, 13, 17, p3; mad.lo.u32 r, r, 31, w0; mad.lo.u32 r, r, 31, w1; mad.lo.u32 r, r, 31, w2; add.u32 r, r, w3;
        """
        result = []
        for row in rows:
            ballot = sum(1 << k for k in range(32) if row[k])
            value = ballot * 31 + (3 if row.all() else 5)
            value = value * 31 + (7 if row.any() else 11)
            value = value * 31 + (13 if row.all() or not row.any() else 17)
            result.append((value + ((~ballot & 0xFFFFFFFF) >> 20)) & 0xFFFFFFFF)
        out.append(lanes(f"vote.sync.{{ballot,all,any,uni}} {name}", code, [a], np.repeat(np.array(result, np.uint32), 32)))
    code = f"""
    mov.b32 r, 0; and.b32 w0, thread, 31; shr.u32 w1, {_PART}, w0; and.b32 w1, w1, 1; setp.eq.u32 p0, w1, 0; @p0 bra SKIP;
    setp.gt.u32 p1, a, 1000000000; vote.sync.ballot.b32 r, p1, {_PART}; activemask.b32 w2; add.u32 r, r, w2;
    SKIP:
    """
    a = bits("vote partial", THREADS)
    held = (a > 1000000000).reshape(-1, 32)
    ballots = [sum(1 << k for k in range(32) if row[k] and (_PART >> k) & 1) + _PART & 0xFFFFFFFF for row in held]
    expected = np.where((_PART >> _LANE) & 1, np.repeat(np.array(ballots, np.uint32), 32), 0).astype(np.uint32)
    out.append(lanes("vote.sync.ballot of some lanes, activemask", code, [a], expected))
    return out


def matches() -> list[Form]:
    out = []
    for t, dtype in (("b32", np.uint32), ("b64", np.uint64)):
        a = (bits(f"match {t}", THREADS, dtype) % dtype(5)) << dtype(8 * np.dtype(dtype).itemsize - 5)
        a[:32] = a[0]
        rows = a.reshape(-1, 32)
        same = [[sum(1 << k for k in range(32) if row[k] == row[n]) for n in range(32)] for row in rows]
        code = f"match.any.sync.{t} r, a, -1;"
        out.append(lanes(f"match.any.sync.{t}", code, [a], np.array(same, np.uint32).reshape(-1)))
        whole = [(0xFFFFFFFF, 1) if (row == row[0]).all() else (0, 0) for row in rows]
        code = f"match.all.sync.{t} r0|p0, a, -1; selp.b32 r1, 1, 0, p0;"
        results = [np.repeat(np.array([w[k] for w in whole], np.uint32), 32) for k in range(2)]
        out.append(lanes(f"match.all.sync.{t}", code, [a], results))
    return out


def reductions() -> list[Form]:
    out = []
    functions: dict[str, Callable[[np.ndarray], int]] = {
        "add": lambda v: int(v.astype(np.int64).sum()),
        "min": lambda v: int(v.min()),
        "max": lambda v: int(v.max()),
        "and": lambda v: int(np.bitwise_and.reduce(v)),
        "or": lambda v: int(np.bitwise_or.reduce(v)),
        "xor": lambda v: int(np.bitwise_xor.reduce(v)),
    }
    for name, function in functions.items():
        for t in ("b32",) if name in ("and", "or", "xor") else ("s32", "u32"):
            dtype = np.int32 if t == "s32" else np.uint32
            label = f"redux.sync.{name}.{t}"
            a = bits(label, THREADS, dtype)
            if name in ("and", "or"):
                a = a | dtype(0x1000F0) if name == "and" else a & dtype(0x0F00FF)
            whole = each(lambda v: v, np.uint32, np.repeat(np.array([function(r) for r in a.reshape(-1, 32)]), 32))
            out.append(lanes(label, f"{label} r, a, -1;", [a], whole))
            chosen = ((_PART >> np.arange(32)) & 1).astype(bool)
            part = np.repeat(np.array([function(r[chosen]) & 0xFFFFFFFF for r in a.reshape(-1, 32)], np.uint32), 32)
            code = f"""
            mov.b32 r, 0; and.b32 w0, thread, 31; shr.u32 w1, {_PART}, w0; and.b32 w1, w1, 1; setp.eq.u32 p0, w1, 0;
            @p0 bra SKIP; {label} r, a, {_PART}; SKIP:
            """
            out.append(lanes(f"{label} of some lanes", code, [a], np.where(chosen[_LANE], part, 0).astype(np.uint32)))
    return out


def election() -> list[Form]:
    """Which lane is elected is unspecified; that one is, and that all agree, is not."""
    code = """
    elect.sync w0|p0, -1; selp.b32 w1, 1, 0, p0; redux.sync.add.u32 w2, w1, -1; and.b32 w3, thread, 31;
    setp.eq.u32 p1, w3, w0; selp.b32 w4, 10, 0, p1; selp.b32 w5, 100, 0, p0; setp.ne.u32 p2, w4, 0; selp.b32 w4, 10, 0, p2;
    redux.sync.add.u32 w4, w4, -1; redux.sync.add.u32 w5, w5, -1; add.u32 r, w2, w4; add.u32 r, r, w5;
    """
    return [lanes("elect.sync", code, [], np.full(THREADS, 111, np.uint32))]


def floating() -> list[Form]:
    """sm_100a: redux of float32, with and without NaN, of magnitudes."""
    out = []
    a = floats("redux f32", "f32", THREADS)
    a[:32] = (a[:32] & np.uint32(0x807FFFFF)) | np.uint32(0x3F800000)  # one warp without NaN
    for name in ("min", "max"):
        for nan in (False, True):
            for absolute in (False, True):
                label = ".".join(["redux.sync", name, *["abs"] * absolute, *["NaN"] * nan, "f32"])
                values = (a & np.uint32(0x7FFFFFFF) if absolute else a).reshape(-1, 32)
                expected = []
                for row in values:
                    numbers = [int(c) for c in row if (int(c) & 0x7FFFFFFF) <= 0x7F800000]
                    keys = [(np.array([c], np.uint32).view(np.float32)[0], -(c >> 31)) for c in numbers]
                    best = (min if name == "min" else max)(range(len(keys)), key=lambda k: keys[k])
                    expected.append(0x7FFFFFFF if nan and len(numbers) < 32 else numbers[best])
                out.append(lanes(label, f"{label} r, a, -1;", [a], np.repeat(np.array(expected, np.uint32), 32)))
    return out


@cache
def groups() -> tuple[Group, ...]:
    families = (shuffles, votes, matches, reductions, election)
    made = [Group(f"warp {f.__name__}", tuple(f()), threads=THREADS) for f in families]
    return (*made, Group("warp sm_100a reductions", tuple(floating()), threads=THREADS, arch="sm_100a"))
