"""tcgen05.mma on one CTA or a pair: a kernel in PTX around a few products, its inputs and what TMEM holds afterwards.

Shared memory and TMEM are laid out here, from the PTX ISA's description. Numbers are small and sums exact: results are equal.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dsv4lab.sim.assembly import run
from tests.sim.conformance import matrix
from tests.sim.conformance.values import bits, uniform

LANES = 128
_PADDED = {"e2m3": 6, "e3m2": 6, "e2m1": 4}  # bits of elements that kind::f8f6f4 and mxf8f6f4 keep in 16-byte groups of 16
_EIGHT = {"e4m3": 0, "e5m2": 1, "e2m3": 3, "e3m2": 4, "e2m1": 5}
_TYPES = {
    "f16": {"f16": 0, "bf16": 1},
    "tf32": {"tf32": 2},
    "f8f6f4": _EIGHT,
    "mxf8f6f4": _EIGHT,
    "i8": {"u8": 0, "s8": 1},
    "mxf4": {"e2m1": 1},
    "mxf4nvf4": {"e2m1": 1},
}
_DEPTH = {"f16": 16, "tf32": 8, "f8f6f4": 32, "i8": 32, "mxf8f6f4": 32, "mxf4": 64, "mxf4nvf4": 64}
_SWIZZLE = {"none": 0, "128B": 2, "64B": 4, "32B": 6}
_FIRST = 1024  # byte of shared memory at which operands begin; below are two mbarriers and the TMEM address
_COLUMNS = 512  # allocated
_BEGIN = 32  # column of D


@dataclass(frozen=True)
class Case:
    """One product of a (m, K) and b (n, K). majors: "K" or "M" for each operand. block: elements per scale factor, 0 for none.

    modes: swizzle of A and of B. signs: of A and of B. scales: "ue8m0" or "ue4m3". scale_d: D is divided by two to this power.
    off: output lanes that stay as they are; of the second CTA, those as far from the last lane.
    """

    kind: str
    a: str
    b: str
    m: int = 128
    n: int = 32
    d: str = "f32"
    pair: bool = False
    modes: tuple[str, str] = ("128B", "128B")
    majors: str = "KK"
    tmem: bool = False
    accumulate: bool = True
    signs: tuple[int, int] = (1, 1)
    block: int = 0
    scales: str = "ue8m0"
    suffix: str = ""
    scale_d: int = 0
    off: tuple[int, ...] = ()
    saturate: bool = False

    def __str__(self) -> str:
        notes = [self.kind, self.a, self.b, self.d, f"{self.m}x{self.n}", "pair" if self.pair else "", *self.modes, self.majors]
        notes += [
            "A in TMEM" if self.tmem else "",
            "" if self.accumulate else "no D",
            "" if self.signs == (1, 1) else "negated",
        ]
        notes += [
            f"{self.scales} {self.block} {self.suffix}" if self.block else "",
            f"scale-d {self.scale_d}" * (self.scale_d > 0),
        ]
        notes += ["lanes off" if self.off else "", "saturate" if self.saturate else ""]
        return "-".join(note.replace(" ", "_") for note in notes if note)

    @property
    def depth(self) -> int:
        return _DEPTH[self.kind]

    @property
    def steps(self) -> int:
        """Instructions along K: as many as a K-major line holds, else two."""
        spans = {matrix.SPAN[mode] // 32 for mode, major in zip(self.modes, self.majors, strict=True) if major == "K"}
        assert len(spans) <= 1 or self.modes[0] == self.modes[1]
        return max(max(spans, default=2), 1)

    def kept(self, cta: int) -> list[int]:
        """A CTA's lanes that stay as they are."""
        return [LANES - 1 - lane if cta else lane for lane in self.off]

    @property
    def ahead(self) -> int:
        """Bytes of B's first scale word that hold no factor, so that A's and B's begin at different ones; 0 if they fill it."""
        count = self.depth // self.block if self.block else 4
        return count if count < 4 else 0

    def instruction(self, first_a: int = 0, first_b: int = 0) -> int:
        """The instruction descriptor. first_a, first_b: bytes of the scale words at which the factors begin."""
        types = _TYPES[self.kind]
        out = types[self.a] << 7 | types[self.b] << 10 | (self.n >> 3) << 17
        out |= (
            (self.signs[0] < 0) << 13
            | (self.signs[1] < 0) << 14
            | (self.majors[0] == "M") << 15
            | (self.majors[1] == "M") << 16
        )
        if self.block:
            return out | (self.scales == "ue8m0") << 23 | (self.m >> 7) << 27 | first_b << 4 | first_a << 29
        return out | {"f16": 0, "f32": 1, "s32": 2}[self.d] << 4 | (self.m >> 4) << 24 | self.saturate << 3


def _bytes(case: Case, codes: np.ndarray, name: str, major: str) -> tuple[np.ndarray, int]:
    """Codes as they lie along the contiguous dimension, and bytes of an element there."""
    if name in _PADDED and case.kind.startswith("mxf4"):
        return (codes[:, 0::2] | codes[:, 1::2] << 4).astype(np.uint8), 1
    if name in _PADDED:
        along = codes if major == "K" else codes.T
        groups = along.reshape(along.shape[0], -1, 16)
        places = (groups[..., None] >> np.arange(_PADDED[name])) & 1
        packed = np.packbits(places.reshape(*groups.shape[:2], -1).astype(np.uint8), axis=-1, bitorder="little")
        padded = np.full(groups.shape, 0xA5, np.uint8)  # what lies in the padding does not count
        padded[..., : packed.shape[-1]] = packed
        laid = padded.reshape(along.shape)
        return np.ascontiguousarray(laid if major == "K" else laid.T), 1
    return codes, matrix.BITS[name] // 8


def _image(case: Case, codes: np.ndarray, name: str, which: int) -> matrix.Image:
    laid, size = _bytes(case, codes, name, case.majors[which])
    if case.majors[which] == "K":
        return matrix.k_major(laid, size, case.modes[which], 32)
    return matrix.mn_major(laid, size, case.modes[which], case.depth)


def _descriptor(image: matrix.Image, mode: str) -> int:
    """All fields but the start address; bits 46 to 48 are 001."""
    return (image.leading >> 4) << 16 | (image.stride >> 4) << 32 | 1 << 46 | _SWIZZLE[mode] << 61


def _lanes(case: Case) -> np.ndarray:
    """TMEM lane of each of a CTA's rows of the product (of the first half of N for M = 128 on a pair)."""
    row = np.arange(case.m // (2 if case.pair else 1))
    return row // 16 * 32 + row % 16 if case.m == 64 else row


def _factors(case: Case, label: str, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Random scale factors: codes (rows, K / block) and numbers."""
    shape = rows, case.depth * case.steps // case.block
    draw = bits(label, shape[0] * shape[1], np.uint8).reshape(shape)
    if case.scales == "ue8m0":
        codes = 125 + draw % 5
        return codes.astype(np.uint8), np.exp2(codes.astype(np.float64) - 127)
    codes = 0x30 + draw % 20  # 0.5 to 3
    return codes.astype(np.uint8), matrix.values(codes.astype(np.uint8), "e4m3")


def _scale_columns_b(case: Case, codes: np.ndarray, label: str) -> np.ndarray:
    """As `_scale_columns`; for M = 128 on a pair, where D has N's halves one above the other, so have the factors."""
    codes = np.concatenate([np.full((len(codes), case.ahead), 0x55, np.uint8), codes], axis=1)
    if not (case.pair and case.m == 128):
        return _scale_columns(codes, label)
    low, high = (_scale_columns(half, label + part) for half, part in zip(np.split(codes, 2), "lh", strict=True))
    return np.concatenate([low[:64], high[64:]])


def _scale_columns(codes: np.ndarray, label: str) -> np.ndarray:
    """(128, columns) words. Four factors of row i are a word at lane i % 32 of each quarter, column i / 32."""
    rows, count = codes.shape
    words, wide = -(-count // 4), -(-rows // 32)
    out = bits(label, 128 * words * wide * 4, np.uint8).reshape(words * wide, 128, 4)  # bytes that hold no factor: anything
    for row in range(rows):
        for k in range(count):
            out[k // 4 * wide + row // 32, row % 32 :: 32, k % 4] = codes[row, k]
    return np.ascontiguousarray(out.transpose(1, 0, 2)).view(np.uint32)[:, :, 0]


def _tmem_operand(case: Case, codes: np.ndarray) -> np.ndarray:
    """(128, columns) words of A: a row's elements packed into its lane's columns."""
    if case.a in _PADDED and not case.kind.startswith("mxf4"):  # 8-bit containers, the value in the middle
        rows = (codes << (8 - _PADDED[case.a]) // 2).astype(np.uint8)
    else:
        rows = _bytes(case, codes, case.a, "K")[0]
    words = np.ascontiguousarray(rows).view(np.uint32)
    out = bits(f"{case} elsewhere", LANES * words.shape[1]).reshape(LANES, -1).copy()
    out[_lanes(case)] = words
    if case.pair and case.m == 128:
        out[64:] = words
    return out


def check(case: Case, schedule: str = "eager") -> None:
    """Run a case; raises AssertionError unless all of D's columns of TMEM hold exactly what they should."""
    operands, before, wanted, places = _inputs(case)
    shared, width = len(operands[0]), before[0].shape[1]
    ctas = len(operands)
    packed = np.concatenate([np.concatenate([o, b.reshape(-1).view(np.uint8)]) for o, b in zip(operands, before, strict=True)])
    out = np.zeros((ctas, LANES, case.n), np.uint32)
    body = _kernel(case, shared, width, places)
    run(body, block=128, grid=ctas, cluster=ctas, shared=_FIRST + shared, schedule=schedule, packed=packed, out=out)
    wrong = np.argwhere(out != wanted)
    assert not len(wrong), (
        f"{case}: {len(wrong)} of {out.size} cells differ, first (CTA, lane, column) {wrong[:6].tolist()}: "
        + str([(hex(out[tuple(at)]), hex(wanted[tuple(at)])) for at in wrong[:4]])
    )


@dataclass(frozen=True)
class Places:
    """Columns of TMEM after D's first one, byte of shared memory at which B begins, both operands' images."""

    a: int
    scale_a: int
    scale_b: int
    shared_b: int
    left: matrix.Image
    right: matrix.Image


def _inputs(case: Case) -> tuple[list[np.ndarray], list[np.ndarray], np.ndarray, Places]:
    """For each CTA operands' bytes and TMEM before, (128, columns) words; D's words afterwards (CTAs, 128, n); the places."""
    label, k = str(case), case.depth * case.steps
    a, b = matrix.operand(label + "a", case.a, case.m, k), matrix.operand(label + "b", case.b, case.n, k)
    x, y = matrix.values(a, case.a) * case.signs[0], matrix.values(b, case.b) * case.signs[1]
    ctas = 2 if case.pair else 1
    rows, columns = case.m // ctas, case.n // ctas
    if case.block:
        (codes_a, by_a), (codes_b, by_b) = _factors(case, label + "sa", case.m), _factors(case, label + "sb", case.n)
        x, y = x * np.repeat(by_a, case.block, axis=1), y * np.repeat(by_b, case.block, axis=1)
    start = np.floor(uniform(label + "c", case.m * case.n) * 50).reshape(case.m, case.n)
    if case.saturate:
        start = np.where(start > 0, 2.0**31 - 1 - start, -(2.0**31) - start)
    exact = start / 2.0**case.scale_d if case.accumulate else np.zeros_like(start)
    for first in range(0, k, case.depth):
        exact = exact + x[:, first : first + case.depth] @ y[:, first : first + case.depth].T
        exact = exact.clip(-(2.0**31), 2.0**31 - 1) if case.saturate else exact  # every instruction saturates
    held, wanted_cells = _cells(case, start if case.accumulate else 0 * start), _cells(case, exact)
    before, operands, wanted = [], [], []
    for cta in range(ctas):
        mine = slice(cta * rows, cta * rows + rows)
        left, right = _image(case, a[mine], case.a, 0), _image(case, b[cta * columns : cta * columns + columns], case.b, 1)
        d = np.full((LANES, case.n), 0x7FC00ABC, np.uint32)
        after = d.copy()
        for grid, cells in ((d, held[mine] if case.accumulate else None), (after, wanted_cells[mine])):
            if cells is not None:
                half = case.n // 2
                if case.pair and case.m == 128:
                    grid[:64, :half], grid[64:, :half] = cells[:, :half], cells[:, half:]
                else:
                    grid[_lanes(case)] = cells
        off = case.kept(cta)
        after[off] = d[off]
        parts = [d]
        parts += [_tmem_operand(case, a[mine])] if case.tmem else []
        parts += (
            [_scale_columns(codes_a[mine], label + "fa"), _scale_columns_b(case, codes_b, label + "fb")] if case.block else []
        )
        at = np.cumsum([0, *(p.shape[1] for p in parts)])
        spare = np.zeros((LANES, -int(at[-1]) % 8), np.uint32)
        before.append(np.ascontiguousarray(np.concatenate([*parts, spare], axis=1)))
        operands.append(np.concatenate([left.data, right.data]))
        wanted.append(after)
    first_scale = 2 if case.tmem else 1
    at = [*at.tolist(), 0, 0]
    places = Places(at[1], at[first_scale], at[first_scale + 1], len(left.data), left, right)
    return operands, before, np.array(wanted), places


def _cells(case: Case, numbers: np.ndarray) -> np.ndarray:
    """Accumulators as TMEM's 32-bit cells."""
    if case.d == "s32":
        return (numbers.astype(np.int64) & 0xFFFFFFFF).astype(np.uint32)
    if case.d == "f16":
        return numbers.astype(np.float16).view(np.uint16).astype(np.uint32)
    assert (numbers.astype(np.float32) == numbers).all(), f"{case}: the expected sums are no float32 numbers"
    return numbers.astype(np.float32).view(np.uint32)


def _loop(name: str, width: int, code: str) -> str:
    """Code for the columns of TMEM from %r12 on, of the words at %d5 on, a chunk at a time; {regs} are a chunk's registers."""
    chunk = 32 if width % 32 == 0 else 8
    for text, step in (
        ("{load}", "ld.global.v4.b32 {{{regs}}}, [%d5+{at}];"),
        ("{store}", "st.global.v4.b32 [%d5+{at}], {{{regs}}};"),
    ):
        vectors = [step.format(regs=_registers(i, 4), at=4 * i) for i in range(0, chunk, 4)]
        code = code.replace(text, "\n".join(vectors))
    code = code.replace("{regs}", _registers(0, chunk)).replace("{chunk}", str(chunk))
    return f"""
    mov.b32 %r12, %r5; add.u32 %r13, %r5, {width}; {name}: {code}
    add.u32 %r12, %r12, {chunk}; add.s64 %d5, %d5, {4 * chunk}; setp.lt.u32 %p6, %r12, %r13; @%p6 bra {name};
    """


def _registers(first: int, count: int) -> str:
    return ", ".join(f"%r{100 + i}" for i in range(first, first + count))


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value


def _kernel(case: Case, shared: int, width: int, at: Places) -> str:
    """Fill shared memory and TMEM, issue the products from one thread, wait for their commit, write D out."""
    group = f"cta_group::{2 if case.pair else 1}"
    together = "barrier.cluster.arrive; barrier.cluster.wait;" if case.pair else "bar.sync 0;"
    text = f"""
    ld.param.b64 %d1, [p0]; ld.param.b64 %d2, [p1]; mov.u32 %r0, %tid.x; mov.u32 %r1, smem; mov.u32 %r2, %cluster_ctarank;
    mad.wide.u32 %d1, %r2, {shared + 4 * LANES * width}, %d1; mad.wide.u32 %d2, %r2, {4 * LANES * case.n}, %d2;
    setp.ne.u32 %p1, %r0, 0; setp.ge.u32 %p2, %r0, 32; @%p2 bra ALLOCATED;
    tcgen05.alloc.{group}.sync.aligned.shared::cta.b32 [%r1+16], {_COLUMNS};
    ALLOCATED: @%p1 bra READY;
    mbarrier.init.shared::cta.b64 [%r1], 1; mbarrier.init.shared::cta.b64 [%r1+8], 1; fence.mbarrier_init.release.cluster;
    mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r1], {shared}; add.u32 %r3, %r1, {_FIRST};
    cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r3], [%d1], {shared}, [%r1];
    READY: bar.sync 0; ld.shared.b32 %r4, [%r1+16]; add.u32 %r4, %r4, {_BEGIN}; and.b32 %r5, %r0, 96; shl.b32 %r5, %r5, 16;
    add.u32 %r5, %r5, %r4; mad.wide.u32 %d3, %r0, {4 * width}, %d1; mad.wide.u32 %d4, %r0, {4 * case.n}, %d2;
    FILL: mbarrier.try_wait.parity.shared::cta.b64 %p3, [%r1], 0; @!%p3 bra FILL;
    """
    text += f"add.s64 %d5, %d3, {shared};\n"
    text += _loop("LOAD", width, "{load} tcgen05.st.sync.aligned.32x32b.x{chunk}.b32 [%r12], {{regs}};")
    text += f"tcgen05.wait::st.sync.aligned; tcgen05.fence::before_thread_sync; {together} tcgen05.fence::after_thread_sync;\n"
    text += "or.b32 %r6, %r0, %r2; setp.ne.u32 %p4, %r6, 0; @%p4 bra ISSUED;\n"
    text += "".join(_issue(case, step, group, at) for step in range(case.steps))
    commit = f"tcgen05.commit.{group}.mbarrier::arrive::one.shared::cluster"
    text += "add.u32 %r7, %r1, 8;\n"
    text += f"mov.b16 %h1, 3; {commit}.multicast::cluster.b64 [%r7], %h1;\n" if case.pair else f"{commit}.b64 [%r7];\n"
    text += "ISSUED: mbarrier.try_wait.parity.shared::cta.b64 %p3, [%r1+8], 0; @!%p3 bra ISSUED;\n"
    text += "tcgen05.fence::after_thread_sync;\n"
    load = "tcgen05.ld.sync.aligned.32x32b.x{chunk}.b32 {{regs}}, [%r12]; tcgen05.wait::ld.sync.aligned; {store}"
    text += "mov.b64 %d5, %d4;\n" + _loop("STORE", case.n, load)
    text += f"tcgen05.fence::before_thread_sync; {together} @%p2 bra DONE; sub.u32 %r4, %r4, {_BEGIN};\n"
    return text + f"tcgen05.dealloc.{group}.sync.aligned.b32 %r4, {_COLUMNS}; DONE: ret;"


def _issue(case: Case, step: int, group: str, at: Places) -> str:
    """One tcgen05.mma."""
    text, scales, mask, tail = "", "", "", ""
    first_a = first_b = 0
    if case.block:
        word_a, first_a = divmod(case.depth // case.block * step, 4)
        word_b, first_b = divmod(case.depth // case.block * step + case.ahead, 4)
        rows = case.m // (2 if case.pair else 1)
        wide = -(-case.n // (64 if case.pair and case.m == 128 else 32))
        scales = f" [%r4+{at.scale_a + word_a * -(-rows // 32)}], [%r4+{at.scale_b + word_b * wide}],"
    text += f"mov.b32 %r10, {case.instruction(first_a, first_b)}; shr.u32 %r11, %r1, 4; cvt.u64.u32 %d10, %r11;\n"
    for register, image, mode, place in (
        ("%d11", at.left, case.modes[0], 0),
        ("%d12", at.right, case.modes[1], at.shared_b),
    ):
        text += f"add.s64 {register}, %d10, {(_FIRST + place + step * image.step) >> 4};\n"
        text += f"or.b64 {register}, {register}, {_signed(_descriptor(image, mode))};\n"
    left = "%d11"
    if case.tmem:
        padded = case.a in _PADDED and not case.kind.startswith("mxf4")
        left = f"[%r4+{at.a + step * case.depth * (8 if padded else matrix.BITS[case.a]) // 32}]"
    if case.off:
        kept = [case.kept(cta) for cta in range(2 if case.pair else 1)]
        words = [sum(1 << lane % 32 for lane in lanes if lane // 32 == w) for lanes in kept for w in range(4)]
        text += "".join(f"mov.b32 %r{20 + w}, {word};\n" for w, word in enumerate(words))
        mask = " {" + ", ".join(f"%r{20 + w}" for w in range(len(words))) + "},"
    if case.scale_d and step == 0:
        tail = f", {case.scale_d}"
    text += f"setp.ne.u32 %p5, %r1, {0 if case.accumulate or step else '%r1'};\n"
    scaled = f".block_scale{case.suffix}" if case.block else ""
    opcode = f"tcgen05.mma.{group}.kind::{case.kind}{scaled}"
    return text + f"{opcode} [%r4], {left}, %d12, %r10,{scales}{mask} %p5{tail};\n"
