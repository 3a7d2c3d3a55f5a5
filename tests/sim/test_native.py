"""The native core against the numpy core: every operation of the C code on random bits, and whole kernels."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

from dsv4lab.sim import accumulation, assembly, errors, shim
from dsv4lab.sim.machine import Machine
from dsv4lab.sim.native import library

CORES = ("numpy", "native")
THREADS = 64

pytestmark = pytest.mark.skipif(shim.find_compiler() is None, reason=f"no C compiler: {shim.REMEDY}")

# %h, %r and %d 10, 11, 12 hold the low bits of three random words, %p 1, 2, 3 random predicates; results go to 20 and 21.
BODY = """
ld.param.b64 %d1, [p0];
ld.param.b64 %d2, [p1];
mov.u32 %r0, %tid.x;
mul.wide.u32 %d3, %r0, 256;
add.s64 %d1, %d1, %d3;
add.s64 %d2, %d2, %d3;
ld.global.b64 %d10, [%d1];
ld.global.b64 %d11, [%d1+8];
ld.global.b64 %d12, [%d1+16];
ld.global.b32 %r1, [%d1+24];
cvt.u32.u64 %r10, %d10;
cvt.u32.u64 %r11, %d11;
cvt.u32.u64 %r12, %d12;
cvt.u16.u64 %h10, %d10;
cvt.u16.u64 %h11, %d11;
cvt.u16.u64 %h12, %d12;
and.b32 %r2, %r1, 1;
setp.ne.u32 %p1, %r2, 0;
and.b32 %r2, %r1, 2;
setp.ne.u32 %p2, %r2, 0;
and.b32 %r2, %r1, 4;
setp.ne.u32 %p3, %r2, 0;
mul.wide.u32 %d4, %r0, 64;
mov.b64 %d5, smem;
cvt.u32.u64 %r5, %d5;
cvt.u32.u64 %r4, %d4;
add.u32 %r5, %r5, %r4;
cvt.u64.u32 %d5, %r5;
st.shared.v2.b64 [%r5], {{%d10, %d11}};
st.shared.v2.b64 [%r5+16], {{%d12, %d10}};
st.shared.v2.b64 [%r5+32], {{%d11, %d10}};
st.shared.v2.b64 [%r5+48], {{%d12, %d11}};
add.s64 %d6, %d2, 128;
{body}
ret;
"""
CLEAR = "".join(
    f"mov.b16 %h{n}, 0x5A5A; mov.b32 %r{n}, 0x5A5A5A5A; mov.b64 %d{n}, 0x5A; mov.pred %p{n - 2}, %p2;" for n in (20, 21)
)


def _keep(part: int) -> str:
    """Statements that store the results, 32 bytes of them."""
    out = ""
    for at, n in ((32 * part, 20), (32 * part + 16, 21)):
        out += f"st.global.b64 [%d2+{at}], %d{n}; st.global.b32 [%d2+{at + 8}], %r{n}; st.global.b16 [%d2+{at + 12}], %h{n};"
        out += f"selp.u32 %r3, 1, 0, %p{n - 2}; st.global.b8 [%d2+{at + 14}], %r3;"
    return out


def _statements() -> list[str]:
    """One or more statements for every operation of the C code."""
    out: list[str] = []
    letters = {16: "h", 32: "r", 64: "d"}
    for bits, x in letters.items():
        d, a, b, c = (f"%{x}{n}" for n in (20, 10, 11, 12))
        out += [f"{op}.s{bits} {d}, {a}, {b};" for op in ("add", "sub", "mul.lo", "min", "max", "div", "rem")]
        out += [f"{op}.u{bits} {d}, {a}, {b};" for op in ("min", "max", "div", "rem")]
        out += [f"{op}.b{bits} {d}, {a}, {b};" for op in ("and", "or", "xor")]
        out += [f"{op}.b{bits} {d}, {a};" for op in ("not", "cnot", "mov")]
        out += [f"{op}.s{bits} {d}, {a};" for op in ("neg", "abs")]
        out += [
            f"mad.lo.s{bits} {d}, {a}, {b}, {c};",
            f"selp.b{bits} {d}, {a}, {b}, %p1;",
            f"selp.b{bits} {d}, {a}, {b}, !%p1;",
        ]
        out += [f"mul.hi.{s}{bits} {d}, {a}, {b};" for s in "us"] + [f"mad.hi.{s}{bits} {d}, {a}, {b}, {c};" for s in "us"]
        for amount in ("%r6", "7", "200"):
            out += [
                f"and.b32 %r6, %r11, 127; {op} {d}, {a}, {amount};" for op in (f"shl.b{bits}", f"shr.u{bits}", f"shr.s{bits}")
            ]
        for compare in ("eq", "ne", "lt", "le", "gt", "ge"):
            out += [f"setp.{compare}.{s}{bits} %p18, {a}, {b};" for s in "us"]
        out += [f"setp.lt.and.s{bits} %p18|%p19, {a}, {b}, !%p1;", f"setp.hs.u{bits} %p18|%p19, {a}, {b};"]
        out += [f"setp.gt.or.u{bits} %p1|%p18, {a}, {b}, %p1;", f"setp.ne.xor.s{bits} %p18, {a}, {b}, %p1;"]
    for bits, x in ((32, "r"), (64, "d")):
        a, b = f"%{x}10", f"%{x}11"
        out += [f"popc.b{bits} %r20, {a};", f"clz.b{bits} %r20, {a};", f"brev.b{bits} %{x}20, {a};"]
        for s in "us":
            out += [f"bfind.{s}{bits} %r20, {a};"]
            out += [f"and.b32 %r6, %r11, 95; and.b32 %r7, %r12, 95; bfe.{s}{bits} %{x}20, {a}, %r6, %r7;"]
        out += [f"and.b32 %r6, %r11, 95; and.b32 %r7, %r12, 95; bfi.b{bits} %{x}20, {a}, {b}, %r6, %r7;"]
        out += [f"mapa.shared::cluster.u{bits} %{x}20, {a}, %r11;", f"mapa.u{bits} %{x}20, {a}, %r11;"]
        out += [
            f"cvta.to.shared.u{bits} %{x}20, {a};",
            f"cvta.shared.u{bits} %{x}20, {a};",
            f"cvta.to.global.u{bits} %{x}20, {a};",
        ]
    for s in "us":
        out += [f"mul.wide.{s}16 %r20, %h10, %h11;", f"mul.wide.{s}32 %d20, %r10, %r11;"]
        out += [f"mad.wide.{s}16 %r20, %h10, %h11, %r12;", f"mad.wide.{s}32 %d20, %r10, %r11, %d12;"]
    out += [f"{op}.pred %p18, %p1, %p3;" for op in ("and", "or", "xor")] + ["not.pred %p18, %p1;", "mov.pred %p18, %p1;"]
    out += [f"shf.{side}.{mode}.b32 %r20, %r10, %r11, %r12;" for side in "lr" for mode in ("wrap", "clamp")]
    out += ["lop3.b32 %r20, %r10, %r11, %r12, 0x6A;", "prmt.b32 %r20, %r10, %r11, %r12;", "prmt.b32 %r20, %r10, %r11, 0x5410;"]
    out += ["mov.b64 %d20, {%r10, %r11};", "mov.b32 %r20, {%h10, %h11};", "mov.b64 {%r20, %r21}, %d10;"]
    out += ["mov.b32 {%h20, _}, %r10;", "mov.b64 %d20, {%h10, %h11, %h12, %h10};", "mov.b64 {_, %h20, %h21, _}, %d10;"]
    out += ["mov.b32 {%c1, %c2, %c3, %c4}, %r10; mov.b32 %r20, {%c4, %c1, %c3, %c2};", "mov.b8 %c1, %c1; fence.proxy.async;"]
    return out + _floating() + _conversions() + _memory() + _collectives()


def _floating() -> list[str]:
    out: list[str] = []
    for t, x in (("f32", "r"), ("f32x2", "d"), ("f16", "h"), ("f16x2", "r"), ("bf16", "h"), ("bf16x2", "r")):
        d, a, b, c = (f"%{x}{n}" for n in (20, 10, 11, 12))
        half = t.startswith(("f16", "bf16"))
        out += [f"{op}.rn.{t} {d}, {a}, {b};" for op in ("add", "sub", "mul", *(() if half else ("div",)))]
        out += [f"fma.rn.{t} {d}, {a}, {b}, {c};", f"neg.{t} {d}, {a};", f"abs.{t} {d}, {a};"]
        out += [f"{op}{nan}.{t} {d}, {a}, {b};" for op in ("min", "max") for nan in ("", ".NaN")]
        out += [f"{op}{nan}.{t} {d}, {a}, {b}, {c};" for op in ("min", "max") for nan in ("", ".NaN")]
        out += [f"max{nan}.xorsign.abs.{t} {d}, {a}, {b};" for nan in ("", ".NaN")]
        if half:
            out += [f"fma.rn.relu.{t} {d}, {a}, {b}, {c};", f"fma.rn.sat.{t} {d}, {a}, {b}, {c};"]
        else:
            out += [f"add.rn.ftz.{t} {d}, {a}, {b};", f"fma.rn.ftz.{t} {d}, {a}, {b}, {c};", f"mul.rn.ftz.{t} {d}, {a}, {b};"]
    out += ["add.sat.f32 %r20, %r10, %r11;", "fma.rn.ftz.sat.f32 %r20, %r10, %r11, %r12;", "div.full.ftz.f32 %r20, %r10, %r11;"]
    out += [f"{op}.approx.ftz.f32 %r20, %r10;" for op in ("rcp", "sqrt", "rsqrt", "ex2")]
    out += [
        "rcp.rn.f32 %r20, %r10;",
        "ex2.approx.f32 %r20, %r10;",
    ]
    out += [f"{op}.rn.f64 %d20, %d10, %d11;" for op in ("add", "sub", "mul", "div")] + ["copysign.f32 %r20, %r10, %r11;"]
    out += ["neg.f64 %d20, %d10;", "abs.f64 %d20, %d10;", "fma.rn.f64 %d20, %d10, %d11, %d12;"]
    for t in ("f16", "bf16"):
        out += [f"{op}.rn.f32.{t} %r20, %h10, %r11;" for op in ("add", "sub")] + [f"fma.rn.f32.{t} %r20, %h10, %h11, %r12;"]
    names = ("eq", "ne", "lt", "le", "gt", "ge", "equ", "neu", "ltu", "leu", "gtu", "geu", "num", "nan")
    for t, x in (("f32", "r"), ("f64", "d"), ("f16", "h"), ("bf16", "h")):
        out += [f"setp.{name}.{t} %p18, %{x}10, %{x}11;" for name in names]
        out += [f"setp.lt.and.{t} %p18|%p19, %{x}10, %{x}11, %p1;"]
    return out


def _conversions() -> list[str]:
    out: list[str] = []
    letters = {"8": "r", "16": "h", "32": "r", "64": "d"}
    for source in ("u8", "s8", "u16", "s16", "u32", "s32", "u64", "s64"):
        a = f"%{letters[source[1:]]}10"
        for target in ("u8", "s8", "u16", "s16", "u32", "s32", "u64", "s64"):
            if "8" not in (source[1:], target[1:]) or source[1:] != target[1:]:
                out += [f"cvt.{target}.{source} %{letters[target[1:]]}20, {a};"]
        out += [f"cvt.rn.f32.{source} %r20, {a};"]
        if source[1:] == "8":
            out += [f"cvt.{target}.{source} %{x}20, %h10;" for target, x in (("u16", "h"), ("s32", "r"), ("s64", "d"))]
            out += [f"cvt.rn.f32.{source} %r20, %h10;", f"cvt.s16.{source} %h20, {a};"]
            out += [
                f"cvt.{source}.{other} %h20, %{x}10;" for other, x in (("u16", "h"), ("s32", "r"), ("u64", "d"), ("s64", "d"))
            ]
            out += [f"cvt.{source}.{other} %h20, %{x}10;" for other, x in (("s16", "h"), ("u32", "r"))]
        else:
            out += [f"cvt.{s}16.{source} %r20, {a};" for s in "us"]  # a register may be wider than the type
            out += [f"cvt.rn.f64.{source} %d20, {a};", f"cvt.rn.f16.{source} %h20, {a};", f"cvt.rn.bf16.{source} %h20, {a};"]
        if source[1:] != "8":
            for t, x in (("f32", "r"), ("f64", "d"), ("f16", "h"), ("bf16", "h")):
                out += [f"cvt.{r}.{source}.{t} {a.replace('10', '20')}, %{x}10;" for r in ("rni", "rzi", "rmi", "rpi")]
    out += ["cvt.rzi.ftz.s32.f32 %r20, %r10;", "cvt.rni.f32.f32 %r20, %r10;", "cvt.rmi.f32.f32 %r20, %r10;"]
    out += [
        "cvt.f32.f16 %r20, %h10;",
        "cvt.f32.bf16 %r20, %h10;",
        "cvt.f64.f32 %d20, %r10;",
        "cvt.f64.bf16 %d20, %h10;",
        "cvt.rn.f32.f64 %r20, %d10;",
    ]
    out += [
        "cvt.rn.f16.f32 %h20, %r10;",
        "cvt.rn.bf16.f32 %h20, %r10;",
        "cvt.rn.bf16.f16 %h20, %h10;",
        "cvt.rn.f16.bf16 %h20, %h10;",
    ]
    for t in ("f16", "bf16"):
        out += [f"cvt.{m}.{t}.f32 %h20, %r10;" for m in ("rz", "rn.satfinite", "rn.relu", "rm", "rp")]
        out += [f"cvt.{m}.{t}x2.f32 %r20, %r10, %r11;" for m in ("rn", "rz", "rn.relu", "rn.satfinite")]
    out += [f"cvt.rn.satfinite{m}.{t}x2.f32 %h20, %r10, %r11;" for t in ("e4m3", "e5m2", "e2m3", "e3m2") for m in ("", ".relu")]
    out += ["cvt.rn.satfinite.e2m1x2.f32 %c1, %r10, %r11; mov.b32 %r20, {%c1, %c1, %c1, %c1};"]
    out += ["cvt.rna.tf32.f32 %r20, %r10;", "cvt.rn.satfinite.tf32.f32 %r20, %r10;"]
    out += [f"cvt.rn{m}.f16x2.{t}x2 %r20, %h10;" for t in ("e4m3", "e5m2", "e2m3", "e3m2") for m in ("", ".relu")]
    out += ["mov.b32 {%c1, %c2, %c3, %c4}, %r10; cvt.rn.f16x2.e2m1x2 %r20, %c2;"]
    return out


def _memory() -> list[str]:
    out: list[str] = []
    for space, base in (("global", "%d6"), ("shared", "%r5"), ("shared", "%d5"), ("", "%d6")):
        prefix = f".{space}" if space else ""
        for t, x in (
            ("u8", "r"),
            ("s8", "r"),
            ("u16", "r"),
            ("s16", "r"),
            ("u32", "d"),
            ("s32", "d"),
            ("u8", "h"),
            ("s8", "h"),
        ):
            out += [f"st{prefix}.b64 [{base}], %d10; ld{prefix}.{t} %{x}20, [{base}+{2 * (t[1:] == '16')}];"]
        out += [f"st{prefix}.b64 [{base}], %d10; ld{prefix}.{t} %d20, [{base}];" for t in ("u8", "s8", "u16", "s16", "b64")]
        out += [f"st{prefix}.b16 [{base}], %h10; ld{prefix}.b16 %h20, [{base}];", f"ld{prefix}.b32 %r20, [{base}+4];"]
        out += [f"st{prefix}.v4.b32 [{base}], {{%r10, %r11, %r12, %r10}}; ld{prefix}.v2.b64 {{%d20, _}}, [{base}];"]
        out += [f"st{prefix}.v2.b16 [{base}+8], {{%h10, %h11}}; ld{prefix}.v4.b32 {{%r6, %r7, %r20, %r21}}, [{base}];"]
        out += [f"st{prefix}.b8 [{base}+3], %r10; ld{prefix}.b32 %r20, [{base}];"]
    out += [
        "ld.param.b64 %d20, [p2];",
        "ld.param.s32 %d20, [p2+4];",
        "ld.param.v2.b32 {%r20, %r21}, [p2];",
        "ld.param.b16 %r20, [p2+2];",
    ]
    out += ["ld.shared.b64 %d20, [smem+128];", "@%p1 st.shared.b32 [%r5], %r10; @!%p1 ld.shared.b32 %r20, [%r5];"]
    out += [
        "mov.b64 %d7, smem; cvt.u32.u64 %r7, %d7; st.shared.b32 [%r7], %r0; ld.shared.b32 %r20, [%r7];"
    ]  # the last lane wins
    return out


def _collectives() -> list[str]:
    out = ["elect.sync %r20|%p18, -1;", "elect.sync _|%p18, -1;", "bar.warp.sync -1;", "nanosleep.u32 20;"]
    out += [f"vote.sync.{mode}.pred %p18, {n}%p1, -1;" for mode in ("all", "any", "uni") for n in ("", "!")]
    out += ["vote.sync.ballot.b32 %r20, %p1, -1;", "vote.sync.ballot.b32 %r20, !%p1, -1;"]
    out += [f"redux.sync.{name}.{t}32 %r20, %r10, -1;" for name in ("add", "min", "max") for t in "us"]
    out += [f"redux.sync.{name}.b32 %r20, %r10, -1;" for name in ("and", "or", "xor")]
    for mode, control in (
        ("idx", 31),
        ("bfly", 31),
        ("up", 0),
        ("down", 31),
        ("bfly", 0x1C1F),
        ("idx", 0x181F),
        ("down", 0x181F),
    ):
        out += [f"shfl.sync.{mode}.b32 %r20|%p18, %r10, {step}, {control}, -1;" for step in (1, 5, "%r11")]
    out += ["shfl.sync.bfly.b32 %r20, %r10, 16, 31, -1;"]
    barrier = "shl.b32 %r7, %r0, 3; mov.b64 %d7, smem; cvt.u32.u64 %r6, %d7; add.u32 %r7, %r7, %r6; cvt.u64.u32 %d7, %r7;"
    barrier += "mbarrier.init.shared.b64 [%r7+4096], 1;"
    out += [f"{barrier} mbarrier.try_wait.parity.shared.b64 %p18, [{base}+4096], 1;" for base in ("%r7", "%d7")]
    arrive = "mbarrier.arrive.shared.b64 %d8, [%r7+4096];"
    out += [f"{barrier} {arrive} mbarrier.test_wait.shared.b64 %p18, [%r7+4096], %d8;"]
    for many, registers in (("x1", "%r20"), ("x2", "%r20, %r21"), ("x4", "%r20, %r21, %r6, %r7")):
        for trans in ("", ".trans"):
            out += [f"ldmatrix.sync.aligned.m8n8.{many}{trans}.shared.b16 {{{registers}}}, [%r5+16];"]
            stored = registers.replace("%r20", "%r10").replace("%r21", "%r11").replace("%r6", "%r12").replace("%r7", "%r10")
            out += [
                f"stmatrix.sync.aligned.m8n8.{many}{trans}.shared.b16 [%r5+16], {{{stored}}};"
                "bar.sync 0; ld.shared.v2.b64 {%d20, %d21}, [%r5+16];"
            ]
    return out


STATEMENTS = _statements()
_SPECIAL = (0, 1, 0x80000000, 0x7F800000, 0xFF800000, 0x7FC00000, 0x3F800000, 0xBF800000, 0x7F7FFFFF, 0x00000001, 0x80000001)
_SPECIAL += (
    0x00800000,
    0x7FFFFFFF,
    0xFFFFFFFF,
    0x477FF000,
    0x33000000,
    0x38800000,
    0x4B000001,
    0xCF000000,
    0x4F000000,
    0x43FF0000,
)


def _inputs(seed: int) -> np.ndarray:
    """(threads, 32) words: random bits, numbers near one another, and the corners of every format."""
    random = np.random.default_rng(seed)
    words = random.integers(0, 1 << 64, (THREADS, 32), dtype=np.uint64)
    near = random.normal(size=(THREADS, 8)).astype(np.float32).view(np.uint64)
    words[: THREADS // 2, :4] = near[: THREADS // 2]
    for column in range(3):
        special = random.choice(np.array(_SPECIAL, np.uint64), 2 * THREADS)
        rows = random.choice(THREADS, THREADS // 4, replace=False)
        words[rows, column] = (special[:THREADS] | special[THREADS:] << np.uint64(32))[rows]
    equal = random.choice(THREADS, 6, replace=False)
    words[equal, 1] = words[equal, 0]
    words[random.choice(THREADS, 4, replace=False), 1] = 0
    words[:, 3] = random.integers(0, 8, THREADS)
    return words


def _execute(core: str, body: str, words: np.ndarray) -> tuple[np.ndarray, int, set[str], list[str]]:
    """(what the statement left, warp-instructions, operations of the C code in the program, declined opcodes)"""
    out = np.zeros((THREADS, 32), np.uint64)
    made = assembly.kernel(BODY.format(body=body), 3)
    machine = Machine(assembly.memory_of(words=words, out=out), core=core)
    declined: dict[int, int] = {}
    machine.core.declined = declined
    stats = machine.run(assembly.launch_of(made, words, out, 0x8123456789ABCDEF, block=THREADS, shared=8192))
    known = {record.name for record in machine.program(made).records if record is not None}
    return out, stats.instructions, known, [made.instructions[index].opcode for index in declined]


def _same(a: np.ndarray, b: np.ndarray, statement: str) -> bool:
    """Equal bits; for floating-point results any two NaNs are equal."""
    kind = re.findall(r"\.(f16|bf16|f32|f64)(?:x2)?\b", statement)
    if not kind or (a == b).all():
        return bool((a == b).all())
    size, exponent, mantissa = {"f16": (2, 5, 10), "bf16": (2, 8, 7), "f32": (4, 8, 23), "f64": (8, 11, 52)}[kind[0]]
    x, y = (array.view(f"u{size}").astype(np.uint64) & np.uint64((1 << (exponent + mantissa)) - 1) for array in (a, b))
    limit = np.uint64(((1 << exponent) - 1) << mantissa)
    raw = a.view(f"u{size}") == b.view(f"u{size}")
    return bool((raw | ((x > limit) & (y > limit))).all())


_PYTHONS = {"ret", "bar.sync", "mbarrier.init.shared.b64", "mbarrier.arrive.shared.b64"}  # never executed in C
_WHOLE_WARPS = ("elect", "vote", "redux", "shfl", "ldmatrix", "stmatrix", "bar", "nanosleep", "fence", "mbarrier")


@pytest.mark.parametrize("family", sorted({statement.split(";")[-2].split()[-0].split(".")[0] for statement in STATEMENTS}))
def test_operations_agree(family):
    """Unmasked, under a random guard, and under a guard that holds for nobody."""
    for number, statement in enumerate(s for s in STATEMENTS if s.split(";")[-2].split()[0].split(".")[0] == family):
        *before, last = (part.strip() for part in statement.split(";") if part.strip())
        setup = "".join(part + ";" for part in before)
        guards = [""] if family in _WHOLE_WARPS or last.startswith("@") else ["", "@%p3 ", "@!%p3 ", "@%p4 "]
        body = "setp.ne.u32 %p4, %r0, %r0;"
        for part, guard in enumerate(guards):
            body += f"{CLEAR} {setup} {guard}{last}; {_keep(part)}"
        words = _inputs(number)
        reference, count, _, _ = _execute("numpy", body, words)
        out, native_count, _, declined = _execute("native", body, words)
        assert _same(out, reference, last), f"{statement}: {np.argwhere(out != reference)[:4]}"
        assert count == native_count
        assert set(declined) <= _PYTHONS, f"{statement}: the C code declines {declined}"


def test_every_operation_is_compared():
    made = assembly.kernel(BODY.format(body="".join(STATEMENTS)), 3)
    machine = Machine(assembly.memory_of(), core="native")
    known = {record.name for record in machine.program(made).records if record is not None}
    assert not set(library.names()) - known


IRREGULAR = {
    "out of bounds": ("ld.global.b32 %r20, [%d2+1048576];", errors.MemoryFault, "belongs to no tensor|out of bounds"),
    "misaligned": ("ld.global.b32 %r20, [%d2+2];", errors.MemoryFault, "misaligned"),
    "one lane out of bounds": (
        "@%p1 add.s64 %d6, %d6, 1048576; st.global.b32 [%d6], %r10;",
        errors.MemoryFault,
        "tensor|bounds",
    ),
    "shared memory out of bounds": ("st.shared.b32 [%r5+65536], %r10;", errors.MemoryFault, "out of bounds"),
    "shared memory of no CTA": ("or.b32 %r6, %r5, 0x2000000; ld.shared.b32 %r20, [%r6];", errors.MemoryFault, "bounds|rank"),
    "uninitialised": ("ld.shared.b32 %r20, [%r5+4096];", errors.UninitializedRead, "never-written"),
    "local memory": ("ld.local.b32 %r20, [%d6];", errors.MemoryFault, "local memory"),
    "unknown": ("sin.approx.f17 %r20, %r10;", errors.UnknownInstruction, "type"),
}


@pytest.mark.parametrize("case", IRREGULAR)
def test_irregular_instructions_are_the_handlers(case):
    """The same error from both cores, and nothing of the instruction executed."""
    body, kind, message = IRREGULAR[case]
    texts = []
    for core in CORES:
        with pytest.raises(kind, match=message) as caught:
            _execute(core, body, _inputs(1))
        texts.append(re.sub("; nearest.*|0x[0-9a-f]+", "", str(caught.value)))  # addresses differ
    assert texts[0] == texts[1]


def _machine(core: str, launch, memory, schedule: str) -> tuple[Machine, int]:
    machine = Machine(memory, schedule, core=core)
    return machine, machine.run(launch).instructions


@pytest.mark.parametrize("schedule", ["eager", "lazy", "random:3"])
@pytest.mark.parametrize("name", ["add", "tile_copy", "wgmma_tile", "tcgen05_tile"])
def test_kernels_agree(compiled, name, schedule):
    """Memory, registers of the last CTA and instruction counts are the same."""
    random = torch.Generator().manual_seed(2)
    shapes = {"add": [(300,)] * 3, "tile_copy": [(128, 128)] * 2}.get(name)
    if shapes is None:
        rows = 128 if name == "tcgen05_tile" else 64
        shapes = [(rows, 128), (64, 128), (rows, 64)]
    half = torch.float32 if name == "add" else torch.float16
    tensors = [torch.randn(shape, generator=random).to(half) for shape in shapes]
    if name.endswith("_tile"):
        tensors[-1] = torch.zeros(shapes[-1])
    function = compiled(name, *tensors, arch="sm_100a" if name == "tcgen05_tile" else "sm_90a")
    (launch,) = function.capture(*tensors)
    memory = function.session.tensors.memory(function.names(tuple(tensors)))
    results = []
    for core in CORES:
        tensors[-1].zero_()
        machine, count = _machine(core, launch, memory, schedule)
        ((file, *_),) = machine._files.values()
        results.append((count, tensors[-1].clone(), [block.copy() for block in file._blocks.values()]))
    assert results[0][0] == results[1][0]
    assert torch.equal(results[0][1].view(torch.uint8), results[1][1].view(torch.uint8))
    assert all((a == b).all() for a, b in zip(results[0][2], results[1][2], strict=True))


def test_choice(monkeypatch):
    monkeypatch.setenv(library.CHOICE, "numpy")
    assert library.choose() == "numpy" and library.choose("native") == "native"
    monkeypatch.setenv(library.CHOICE, "gpu")
    with pytest.raises(ValueError, match="must be native or numpy"):
        library.choose()
    monkeypatch.delenv(library.CHOICE)
    assert library.choose() == "native"


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize(("m", "n", "k"), [(64, 256, 16), (64, 8, 16), (16, 8, 16), (5, 24, 32)])
def test_tensor_core_sums_agree(m, n, k, half):
    """C and numpy, bit for bit: wide ranges of exponents, zeros, subnormals, overflow, infinities and NaN, batches."""
    rng = np.random.default_rng(m + n + k)

    def bf16(*shape):
        x = rng.standard_normal(shape) * 2.0 ** rng.integers(-20, 20, shape)
        return (x.astype(np.float32).view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)

    add = accumulation.Adder(accumulation.PLACES, 24, -126, -126, half)
    a, b, c = bf16(2, m, k), bf16(2, n, k), rng.standard_normal((2, m, n)).astype(np.float32)
    a[:, 0], b[:, 1], a[:, 1, 0] = 0, 0, 2.0**-130
    a[:, 2] *= np.float32(2.0**60)
    b[:, 2] *= np.float32(2.0**67)
    for held in (c, None):
        in_c = add._native(a, b, held)
        assert in_c is not None
        expected = [add.numpy(a[i], b[i], None if held is None else held[i]) for i in range(2)]
        assert (in_c.view(np.uint32) == np.stack(expected).view(np.uint32)).all()
    for odd in (np.inf, np.nan):
        a[0, 3, 0] = odd
        assert add._native(a, b, c) is None
        assert np.isnan(add(a, b, c)[0, 3]).any() or np.isinf(add(a, b, c)[0, 3]).any()
