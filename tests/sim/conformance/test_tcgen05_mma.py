"""tcgen05.mma: every kind and format, shapes, layouts of both operands, A from TMEM, pairs of CTAs, block scales, flags.

No Blackwell has run these; what they compare with is the PTX ISA's description, written down a second time in tcgen05_mma.py.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from dsv4lab.sim.errors import UnknownInstruction
from tests.sim.conformance import tcgen05_mma
from tests.sim.conformance.tcgen05_mma import Case, check

MODES = ("none", "32B", "64B", "128B")
MAJORS = ("KK", "MK", "KM", "MM")
EIGHT = ("e4m3", "e5m2", "e2m3", "e3m2", "e2m1")
PLAIN = {
    "f16": [("f16", "f16", "f32"), ("f16", "f16", "f16"), ("bf16", "bf16", "f32")],
    "tf32": [("tf32", "tf32", "f32")],
    "f8f6f4": [(a, b, d) for a in EIGHT for b in EIGHT for d in ("f32", "f16")],
    "i8": [(a, b, "s32") for a in ("s8", "u8") for b in ("s8", "u8")],
}
NVFP4 = Case("mxf4nvf4", "e2m1", "e2m1", block=16, scales="ue4m3", suffix=".block16", n=64)
SCALED = [Case("mxf8f6f4", a, b, block=32) for a in EIGHT for b in EIGHT]
SCALED += [
    Case("mxf4", "e2m1", "e2m1", block=32),
    Case("mxf4", "e2m1", "e2m1", block=32, suffix=".scale_vec::2X"),
    Case("mxf4nvf4", "e2m1", "e2m1", block=32, suffix=".block32"),
    Case("mxf4nvf4", "e2m1", "e2m1", block=32, suffix=".scale_vec::2X"),
    NVFP4,
    replace(NVFP4, suffix=".scale_vec::4X"),
    replace(NVFP4, scales="ue8m0"),
]
SHAPES = [(64, 8, False), (64, 136, False), (128, 16, False), (128, 256, False)]
SHAPES += [(128, 32, True), (128, 256, True), (256, 32, True), (256, 160, True), (256, 256, True)]


def formats() -> list[Case]:
    """Every pair of formats and every accumulator, with and without D."""
    return [Case(kind, a, b, d=d, accumulate=on) for kind, rows in PLAIN.items() for a, b, d in rows for on in (True, False)]


def shapes() -> list[Case]:
    """One format of each kind in every M and number of CTAs; every N that M = 64 knows."""
    plain = [rows[0] for rows in PLAIN.values()]
    cases = [
        Case(kind, a, b, m, n if kind != "i8" or n % 16 == 0 else 48, d, pair)
        for (kind, (a, b, d)) in zip(PLAIN, plain, strict=True)
        for m, n, pair in SHAPES
    ]
    return cases + [Case("f16", "bf16", "bf16", 64, n, modes=("32B", "32B")) for n in range(8, 257, 8)]


def layouts() -> list[Case]:
    """Every swizzle and major. 16-byte groups of padded elements and of 8-bit ones run along M or N too."""
    names = [("f16", "f16", "f32"), ("f16", "bf16", "f32"), *(("f8f6f4", a, "f32") for a in EIGHT), ("i8", "s8", "s32")]
    cases = [
        Case(kind, a, a, m, 128, d, m == 256, (mode, mode), majors)
        for kind, a, d in names
        for mode in MODES
        for majors in MAJORS
        for m in (128, 256)
        if m == 128 or kind == "f16"
    ]
    cases += [Case("f16", "f16", "f16", 64, 64, "f32", False, (mode, mode), "MM") for mode in MODES]
    cases += [Case("f16", "f16", "f16", 128, 64, "f32", True, (mode, mode), majors) for mode in MODES for majors in MAJORS[:3]]
    cases += [Case("tf32", "tf32", "tf32", 128, 64, "f32", pair, (mode, mode)) for mode in MODES for pair in (False, True)]
    cases += [Case("tf32", "tf32", "tf32", n=64, modes=(mode, mode), majors=m) for mode in MODES[:3] for m in MAJORS[1:]]
    return cases + [
        Case("f16", "f16", "f16", 128, 128, "f32", False, (left, right), "MM")
        for left in MODES
        for right in MODES
        if left != right
    ]


def from_tmem() -> list[Case]:
    """A in TMEM, of every format, M and number of CTAs, B of both majors."""
    cases = [Case(kind, a, b, d=d, tmem=True) for kind, rows in PLAIN.items() for a, b, d in rows if a == b]
    cases += [Case("f16", "f16", "f16", m, 64, pair=pair, tmem=True) for m, pair in ((64, False), (128, True), (256, True))]
    cases += [Case("f16", "f16", "f16", n=128, modes=(mode, mode), majors="KM", tmem=True) for mode in MODES]
    return cases + [replace(case, tmem=True) for case in SCALED if case.a == case.b]


def flags() -> list[Case]:
    """Negation, D scaled before it is added to, lanes that keep their cells, saturation of integers."""
    signs = [(1, -1), (-1, 1), (-1, -1)]
    plain = [("f16", "f16", "f32"), ("f16", "f16", "f16"), ("tf32", "tf32", "f32"), ("f8f6f4", "e4m3", "f32")]
    cases = [Case(kind, a, a, d=d, signs=s, accumulate=on) for kind, a, d in plain for s in signs for on in (True, False)]
    cases += [replace(case, signs=s) for case in (SCALED[0], SCALED[25], NVFP4) for s in signs]
    cases += [
        Case(kind, a, a, scale_d=s, accumulate=on) for kind, a, _ in plain[::2] for s in (1, 4, 15) for on in (True, False)
    ]
    cases += [Case("f16", "f16", "f16", d="f16", scale_d=1)]
    off = (0, 1, 31, 33, 64, 65, 66, 127)
    cases += [
        Case("f16", "f16", "f16", m, 32, pair=m == 256, off=off, accumulate=on) for m in (64, 128, 256) for on in (True, False)
    ]
    return cases + [Case("i8", a, a, d="s32", saturate=True) for a in ("s8", "u8")]


def scaled() -> list[Case]:
    """Block-scaled products: formats and scales; then N, pairs of CTAs, swizzles, and the majors of 8-bit elements."""
    some = (SCALED[0], SCALED[25], SCALED[27], NVFP4)
    cases = SCALED + [replace(case, accumulate=False) for case in some]
    cases += [replace(case, m=256, n=n, pair=True) for case in some for n in (32, 128, 256)]
    cases += [replace(case, n=n, pair=True) for case in some for n in (32, 128, 256)]
    cases += [replace(case, n=n) for case in some for n in (8, 40, 128, 200, 256)]
    cases += [replace(case, modes=(mode, mode)) for case in some for mode in MODES]
    return cases + [
        replace(SCALED[i], n=128, majors=majors, modes=(mode, mode)) for i in (0, 6, 12) for majors in MAJORS for mode in MODES
    ]


@pytest.mark.parametrize("family", [formats, shapes, layouts, from_tmem, flags, scaled], ids=lambda f: f.__name__)
def test_products(family):
    wrong = []
    for case in family():
        try:
            check(case)
        except AssertionError as error:
            wrong.append(str(error))
    assert not wrong, f"{len(wrong)} of {len(family())} cases: " + "\n".join(wrong[:20])


@pytest.mark.parametrize("schedule", ["lazy", "random:3"])
@pytest.mark.parametrize("case", [Case("f16", "f16", "f16", 256, 64, pair=True), replace(NVFP4, m=256, pair=True)], ids=str)
def test_products_under_other_schedules(case, schedule):
    check(case, schedule)


@pytest.mark.parametrize(
    ("case", "message"),
    [
        (Case("f16", "f16", "f16", 64, 32, pair=True), r"on 2 CTAs: M must be 128 or 256 .*, got 64 x 32"),
        (Case("f16", "f16", "f16", 32, 32), r"on 1 CTAs: M must be 64 or 128 .*, got 32 x 32"),
        (Case("f16", "f16", "f16", 256, 40, pair=True), r"N a multiple of 16 up to 256, got 256 x 40"),
        (replace(NVFP4, majors="MK"), r"4-bit operands must be K-major"),
        (Case("f8f6f4", "e4m3", "e4m3", scale_d=1), r"a scale of D is an immediate from 0 to 15, for kind::f16 and kind::tf32"),
        (Case("f16", "f16", "f16", scale_d=16, accumulate=False), r"a scale of D is an immediate from 0 to 15"),
        (Case("f16", "f16", "f16", saturate=True, accumulate=False), r"saturation .* is for kind::i8"),
    ],
    ids=lambda value: str(value) if isinstance(value, Case) else None,
)
def test_refused(case, message):
    with pytest.raises(UnknownInstruction, match=message):
        check(case)


def test_swizzle_with_atoms_of_32_bytes_is_refused(monkeypatch):
    monkeypatch.setitem(tcgen05_mma._SWIZZLE, "128B", 1)
    with pytest.raises(UnknownInstruction, match="swizzle code 1 is not simulated"):
        check(Case("tf32", "tf32", "tf32", n=64, majors="MM"))
