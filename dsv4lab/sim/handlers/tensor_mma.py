"""tcgen05.mma: products of shared-memory (or TMEM) operands into TMEM, one or two CTAs, plain and block scaled.

A block-scaled product multiplies every element by its block's scale factor before the float32 sum, as the kinds define it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dsv4lab.sim import operands
from dsv4lab.sim.decode import Decoder, Form, Run
from dsv4lab.sim.errors import UnknownInstruction
from dsv4lab.sim.layouts import decode_descriptor
from dsv4lab.sim.program import Address, Immediate, Instruction, Vector
from dsv4lab.sim.registers import Lanes
from dsv4lab.sim.state import Cta

Array = NDArray
# kind -> K of one instruction
_DEPTH = {"f16": 16, "tf32": 8, "f8f6f4": 32, "i8": 32, "mxf8f6f4": 32, "mxf4": 64, "mxf4nvf4": 64}
_EIGHT = {0: "e4m3", 1: "e5m2", 3: "e2m3.8", 4: "e3m2.8", 5: "e2m1.8"}
_SOURCES = {"f16": {0: "f16", 1: "bf16"}, "tf32": {2: "tf32"}, "f8f6f4": _EIGHT, "mxf8f6f4": _EIGHT, "i8": {0: "u8", 1: "s8"}}
_SOURCES |= {"mxf4": {1: "e2m1"}, "mxf4nvf4": {1: "e2m1"}}


@dataclass(frozen=True)
class Descriptor:
    """The instruction descriptor's fields."""

    m: int
    n: int
    k: int
    a: str
    b: str
    half: bool  # float16 accumulators
    saturate: bool  # of integers, at the ends of s32
    negate_a: bool
    negate_b: bool
    a_mn_major: bool
    b_mn_major: bool
    scales: str  # "e4m3" or "ue8m0"
    a_scale: int  # byte of a scale word at which A's factors begin
    b_scale: int


@lru_cache(maxsize=512)
def decode_instruction(bits: int, kind: str, pair: bool) -> Descriptor:
    """Decode a 32-bit instruction descriptor for a kind. Raises UnknownInstruction for formats that are not simulated, and for
    shapes that there are not."""
    scaled = kind.startswith("mx")
    formats = _SOURCES[kind]
    a, b = (bits >> 7) & 7, (bits >> 10) & (3 if kind.startswith("mxf4") else 7)
    if a not in formats or b not in formats:
        raise UnknownInstruction(f"tcgen05.mma kind::{kind}: operand formats {a} and {b} are not simulated")
    if bits & 4:
        raise UnknownInstruction("tcgen05.mma: sparse operands are not simulated")
    if bits & 8 and kind != "i8":
        raise UnknownInstruction(f"tcgen05.mma kind::{kind}: saturation (bit 3 of the instruction descriptor) is for kind::i8")
    m, n = ((bits >> 24) & 31) * 16, ((bits >> 17) & 63) * 8
    known, step = ((128, 256), 16) if pair else ((128,) if scaled else (64, 128), 8)
    if m not in known or n % step or not 0 < n <= 256:
        raise UnknownInstruction(
            f"tcgen05.mma kind::{kind} on {2 if pair else 1} CTAs: M must be {' or '.join(map(str, known))} and N "
            f"a multiple of {step} up to 256, got {m} x {n}"
        )
    return Descriptor(
        m=m,
        n=n,
        k=_DEPTH[kind],
        a=formats[a],
        b=formats[b],
        half=not scaled and kind in ("f16", "f8f6f4") and (bits >> 4) & 3 == 0,
        saturate=bool((bits >> 3) & 1),
        negate_a=bool((bits >> 13) & 1),
        negate_b=bool((bits >> 14) & 1),
        a_mn_major=bool((bits >> 15) & 1),
        b_mn_major=bool((bits >> 16) & 1),
        scales="ue8m0" if (bits >> 23) & 1 else "e4m3",
        a_scale=(bits >> 29) & 3,
        b_scale=(bits >> 4) & 3,
    )


def build_mma(d: Decoder, i: Instruction, f: Form) -> Run:
    """The handler of one tcgen05.mma form."""
    pair = f.has("cta_group::2")
    f.drop("cta_group::1")
    kind = f.prefix("kind::")
    if kind not in _DEPTH or f.has("sp"):
        raise UnknownInstruction(f"{i.opcode} is not simulated")
    scaled = f.has("block_scale")
    block = f.take("block16", "block32", "scale_vec::1X", "scale_vec::2X", "scale_vec::4X")
    for collector in ("collector::a::discard", "collector::a::fill", "collector::a::use", "collector::a::lastuse"):
        f.drop(collector)
    vector = 16 if block in ("block16", "scale_vec::4X") or (block is None and kind == "mxf4nvf4") else 32
    to, to_offset = d.address(i.operands[0])
    left = i.operands[1]
    in_tmem = isinstance(left, Address)
    a, a_offset = d.address(left) if in_tmem else (d.source(left, "b64"), 0)
    b, descriptor = d.source(i.operands[2], "b64"), d.source(i.operands[3], "b32")
    rest = [o for o in i.operands[4:] if not isinstance(o, Vector)]
    scale_a, scale_b = (d.address(rest[0]), d.address(rest[1])) if scaled else ((0, 0), (0, 0))
    enable, negated = d.predicate(rest[2 if scaled else 0])
    masks = [o for o in i.operands[4:] if isinstance(o, Vector)]
    if any(not isinstance(lane, Immediate) or lane.value for mask in masks for lane in mask.items):
        disabled = [d.source(lane, "b32") for mask in masks for lane in mask.items]
    else:
        disabled = []
    rest = rest[3 if scaled else 1 :]
    shift = rest[0].value if rest and isinstance(rest[0], Immediate) else -1 if rest else 0
    if rest and (kind not in ("f16", "tf32") or not 0 <= shift <= 15):
        raise UnknownInstruction(f"{i.opcode}: a scale of D is an immediate from 0 to 15, for kind::f16 and kind::tf32")
    if disabled and len(disabled) != (8 if pair else 4):
        raise UnknownInstruction(f"{i.opcode} needs {8 if pair else 4} words of disabled output lanes, got {len(disabled)}")

    slots = [to, a, b, descriptor, enable, *disabled, *((scale_a[0], scale_b[0]) if scaled else ())]

    def run(w: Lanes, m: Any) -> None:
        for lane in w.issuers(m, slots):
            product = Product(
                cta=w.cta,
                pair=pair,
                form=decode_instruction(int(w.u[descriptor][lane]), kind, pair),
                vector=vector if scaled else 0,
                to=int(w.u[to][lane]) + to_offset,
                a=int(w.u[a][lane]) + a_offset,
                a_in_tmem=in_tmem,
                b=int(w.u[b][lane]),
                scale_a=int(w.u[scale_a[0]][lane]) + scale_a[1] if scaled else 0,
                scale_b=int(w.u[scale_b[0]][lane]) + scale_b[1] if scaled else 0,
                accumulate=bool(w.u[enable][lane]) != negated,
                shift=shift,
                disabled=tuple(int(w.u[s][lane]) for s in disabled),
            )
            owner = w.cta.cluster.pair(w.cta)[0] if pair else w.cta
            w.cta.machine.issue(("tcgen05", id(owner)), product.perform, "tcgen05.mma", w, i.index, (lane,))

    return run


@dataclass(frozen=True)
class Product:
    """One issued tcgen05.mma."""

    cta: Cta
    pair: bool
    form: Descriptor
    vector: int  # elements that share a scale factor; 0: unscaled
    to: int
    a: int
    a_in_tmem: bool
    b: int
    scale_a: int
    scale_b: int
    accumulate: bool
    shift: int  # D is divided by two to this power before it is added to
    disabled: tuple[int, ...]  # one bit for each lane that keeps its cells, 32 lanes a word; the second CTA's after the first's

    def perform(self) -> None:
        form = self.form
        ctas = self.cta.cluster.pair(self.cta) if self.pair else (self.cta,)
        rows, columns = form.m // len(ctas), form.n // len(ctas)
        right = np.concatenate([self._shared(c, self.b, columns, form.b, form.b_mn_major) for c in ctas])
        for number, cta in enumerate(ctas):
            left = self._left(cta, rows)
            if form.negate_a != form.negate_b:
                left = -left
            other = right
            if self.vector:
                left = self._scaled(cta, left, self.scale_a, form.a_scale)
                if self.pair and rows == 64:
                    # As the accumulator's, the factors of N's two halves lie above one another.
                    halves = np.split(right, 2)
                    parts = [self._scaled(cta, half, self.scale_b, form.b_scale, 64 * k) for k, half in enumerate(halves)]
                    other = np.concatenate(parts)
                else:
                    other = self._scaled(cta, right, self.scale_b, form.b_scale)
            product = operands.multiply(left, other, form.a in operands.INTEGERS)
            self._write(cta, product, rows, self.disabled[4 * number : 4 * number + 4])

    def _left(self, cta: Cta, rows: int) -> Array:
        form = self.form
        if not self.a_in_tmem:
            return self._shared(cta, self.a, rows, form.a, form.a_mn_major)
        words = form.k * operands.BITS[form.a] // 32
        cells = [cta.tensor.read(span, self.a & 0xFFFF, words, "tcgen05.mma (A)") for span, _ in self._lanes(rows)]
        if self.pair and rows == 64:
            cells = cells[:1]
        return operands.values(np.ascontiguousarray(np.concatenate(cells)).view(np.uint8), form.a)

    def _shared(self, cta: Cta, bits: int, rows: int, name: str, mn_major: bool) -> Array:
        if mn_major and operands.BITS[name] < 8:
            raise UnknownInstruction("tcgen05.mma: 4-bit operands must be K-major")
        descriptor = decode_descriptor(bits, True)
        return cta.machine.movers.tile(cta, descriptor, rows, self.form.k, name, mn_major, "tcgen05.mma")

    def _scaled(self, cta: Cta, tile: Array, address: int, first: int, lane: int = 0) -> Array:
        """A (rows, K) tile times its factors, which begin at byte `first` of a word if they do not fill it."""
        start = first if tile.shape[1] // self.vector < 4 else 0
        what = "tcgen05.mma (scale factors)"
        return cta.machine.movers.scale(cta, tile, self.vector, lane, address & 0xFFFF, start, self.form.scales, what)

    def _lanes(self, rows: int) -> list[tuple[slice, slice]]:
        """TMEM lanes and the product's rows that they hold."""
        if rows == 128:
            return [(slice(0, 128), slice(0, 128))]
        if rows == 64 and self.pair:
            return [(slice(0, 64), slice(0, 64)), (slice(64, 128), slice(0, 64))]
        return [(slice(32 * q, 32 * q + 16), slice(16 * q, 16 * q + 16)) for q in range(4)]

    def _write(self, cta: Cta, product: Array, rows: int, disabled: tuple[int, ...]) -> None:
        column = self.to & 0xFFFF
        parts = self._lanes(rows)
        if self.pair and rows == 64:
            # M = 128 over two CTAs: each holds 64 rows, the two halves of N above one another.
            half = self.form.n // 2
            pieces = [(parts[0][0], product[:, :half]), (parts[1][0], product[:, half:])]
        else:
            pieces = [(span, product[chosen]) for span, chosen in parts]
        if any(disabled):
            pieces = [part for span, values in pieces for part in _enabled(span, values, disabled)]
        for span, values in pieces:
            if self.accumulate:
                old = cta.tensor.read(span, column, values.shape[1], "tcgen05.mma (D)")
                values = (self._decode(old) * np.float32(0.5**self.shift) if self.shift else self._decode(old)) + values
            cta.tensor.write(span, column, self._encode(values), "tcgen05.mma (D)")

    def _decode(self, cells: Array) -> Array:
        if self.form.a in operands.INTEGERS:
            return np.ascontiguousarray(cells).view(np.int32).astype(np.int64)
        if self.form.half:
            return (np.ascontiguousarray(cells) & np.uint32(0xFFFF)).astype(np.uint16).view(np.float16).astype(np.float32)
        return np.ascontiguousarray(cells).view(np.float32)

    def _encode(self, values: Array) -> Array:
        if self.form.a in operands.INTEGERS:
            if self.form.saturate:
                values = values.clip(-(1 << 31), (1 << 31) - 1)
            return (values & 0xFFFFFFFF).astype(np.uint32)
        if self.form.half:
            return np.ascontiguousarray(values).astype(np.float16).view(np.uint16).astype(np.uint32)
        return np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)


def _enabled(span: slice, values: Array, disabled: tuple[int, ...]) -> list[tuple[slice, Array]]:
    """The runs of lanes of a span that are not disabled, with their rows of values."""
    lanes = [lane for lane in range(span.start, span.stop) if not disabled[lane // 32] >> lane % 32 & 1]
    runs = np.split(np.array(lanes, np.int64), np.flatnonzero(np.diff(lanes) > 1) + 1)
    return [(slice(int(r[0]), int(r[-1]) + 1), values[r - span.start]) for r in runs if len(r)]
