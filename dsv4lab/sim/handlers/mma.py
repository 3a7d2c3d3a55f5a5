"""mma.sync: a warp's matrix product on register fragments, plain and block scaled."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dsv4lab.sim import accumulation, numfmt, operands
from dsv4lab.sim.decode import ALL_LANES, Action, Decoder, Form, family
from dsv4lab.sim.errors import UnknownInstruction
from dsv4lab.sim.handlers.floating import fused
from dsv4lab.sim.program import Instruction
from dsv4lab.sim.registers import WARP, Lanes

Array = NDArray
_SHAPE = re.compile(r"m(\d+)n(\d+)k(\d+)")
_LANE = np.arange(WARP)
_SIZES = {"f16": 16, "bf16": 16, "tf32": 32, "e4m3": 8, "e5m2": 8, "e2m1": 8, "e2m3": 8, "e3m2": 8, "s8": 8, "u8": 8}


def _index(count: int, per: int, rows_of_two: bool, k: int) -> Array:
    """Where `count` fragments of `per` numbers lie in a matrix of rows of k: A alternates row halves, B runs along K only.

    Returns indices (32 lanes * count * per,) into the flattened matrix.
    """
    item = np.arange(count)[None, :, None]
    row = _LANE[:, None, None] // 4 + (8 * (item % 2) if rows_of_two else 0)
    step = item // 2 if rows_of_two else item
    column = per * (_LANE[:, None, None] % 4) + 4 * per * step + np.arange(per)
    return (row * k + column).reshape(-1)


def _matrices(w: Lanes, slots: list[int], name: str, index: Array, rows: int, k: int) -> Array:
    """The fragments in the registers of every warp of the window as float32 matrices (warps, rows, k)."""
    registers = np.stack([w.u[slot] for slot in slots], axis=1)  # (lanes, fragments)
    out = np.zeros((w.warps, rows * k), np.float32)
    out[:, index] = operands.values(registers.view(np.uint8), name).reshape(w.warps, -1)
    return out.reshape(w.warps, rows, k)


@family("mma")
def mma(d: Decoder, i: Instruction, f: Form) -> Action:
    f.drop("sync", "aligned", "row", "col")
    saturate = f.has("satfinite")
    kind = f.prefix("kind::")
    shape = next((m for part in f.left if (m := _SHAPE.fullmatch(part))), None)
    if shape is None:
        raise UnknownInstruction(f"{i.opcode} is not simulated")
    f.left.remove(shape[0])
    m_rows, n, k = (int(x) for x in shape.groups())
    scaled = f.has("block_scale")
    vector = f.prefix("scale_vec::")
    scale_type = f.left.pop() if scaled else ""
    d_type, a_type, b_type, c_type = f.left[:4]
    del f.left[:4]
    packed4 = kind in ("mxf4", "mxf4nvf4")
    if d_type == a_type == b_type == c_type == "f64":
        return _double(d, i, m_rows, n, k)
    supported = (m_rows, n) == (16, 8) and a_type in _SIZES and b_type in _SIZES and d_type == c_type
    if not supported or d_type not in ("f32", "f16", "s32"):
        raise UnknownInstruction(f"{i.opcode} is not simulated")
    a_per = 8 if packed4 else 32 // _SIZES[a_type]
    targets, a, b, c = ([d.source(r, "b32") for r in d.items(o)] for o in i.operands[:4])
    count = {None: k // 32 if kind != "mxf4nvf4" else 4, "1X": 1, "2X": 2, "4X": 4}[vector] if scaled else 0
    scales: list[int] = []
    if scaled:
        scale_a, scale_b = i.operands[4], i.operands[7 - 1]
        if len(i.operands) == 8:
            scale_a, scale_b = i.operands[4], i.operands[6]
            id_a, id_b = d.items(i.operands[5]), d.items(i.operands[7])
        else:
            scale_a, id_a = i.operands[4], i.operands[5:7]
            scale_b, id_b = i.operands[7], i.operands[8:10]
        scales = [d.source(scale_a, "b32"), d.source(scale_b, "b32")]
        scales += [d.source(o, "b16") for o in (*id_a, *id_b)]

    def factors(w: Lanes, base: int) -> tuple[Array, Array]:
        """Scale factors of A (16, count) and of B (8, count): threads of a quad hold them, chosen by byte and thread ids."""
        table = numfmt.table("ue8m0" if scale_type == "ue8m0" else "e4m3")
        byte_a, thread_a, byte_b, thread_b = (int(w.u[s][base]) for s in scales[2:])
        out_a, out_b = np.empty((16, count), np.float32), np.empty((8, count), np.float32)
        bytes_a = w.b[scales[0]][base : base + WARP]
        bytes_b = w.b[scales[1]][base : base + WARP]
        for quad in range(8):
            for half in range(2):
                lane = 4 * quad + 2 * thread_a + half
                out_a[quad + 8 * half] = table[bytes_a[lane, byte_a : byte_a + count] & _magnitude]
            out_b[quad] = table[bytes_b[4 * quad + thread_b, byte_b : byte_b + count] & _magnitude]
        return out_a, out_b

    # ue4m3 has no sign: its top bit is ignored.
    _magnitude = np.uint8(0xFF if scale_type == "ue8m0" else 0x7F)

    def container(name: str) -> str:
        return f"{name}.8" if name in ("e2m1", "e2m3", "e3m2") and not packed4 else name

    index_a, index_b = _index(len(a), a_per, True, k), _index(len(b), a_per, False, k)
    half = d_type == "f16"

    def run(w: Lanes, m: Any) -> None:
        left = _matrices(w, a, container(a_type), index_a, 16, k)
        right = _matrices(w, b, container(b_type), index_b, 8, k)
        if d_type == "s32":
            _write_integers(w, targets, c, operands.multiply(left, right, True), saturate)
            return
        start = _accumulator(w, c, half)
        if scaled:
            for position in range(w.warps):
                by_row, by_column = factors(w, position * WARP)
                left[position] = (left[position].reshape(16, count, -1) * by_row[:, :, None]).reshape(16, k)
                right[position] = (right[position].reshape(8, count, -1) * by_column[:, :, None]).reshape(8, k)
            total = operands.multiply(left, right) + start
        else:
            total = accumulation.mma(left, right, start, (a_type, b_type), half)
        _write(w, targets, total, half)

    return Action(run, stop=True, members=ALL_LANES)


def _double(d: Decoder, i: Instruction, m_rows: int, n: int, k: int) -> Action:
    """float64: a chain of fused multiply-adds along K, one number a register.

    Register r of A holds row t / 4 + 8 (r mod M / 8), column t % 4 + 4 (r div M / 8).
    """
    if (m_rows, n) not in ((8, 8), (16, 8)):
        raise UnknownInstruction(f"{i.opcode} is not simulated")
    targets, a, b, c = ([d.source(r, "b64") for r in d.items(o)] for o in i.operands[:4])
    halves = m_rows // 8

    def run(w: Lanes, m: Any) -> None:
        for position in range(w.warps):
            part = slice(position * WARP, position * WARP + WARP)
            left, right = np.empty((m_rows, k)), np.empty((8, k))
            for item, slot in enumerate(a):
                left[_LANE // 4 + 8 * (item % halves), _LANE % 4 + 4 * (item // halves)] = w.f[slot][part]
            for item, slot in enumerate(b):
                right[_LANE // 4, _LANE % 4 + 4 * item] = w.f[slot][part]
            held = [w.f[source][part].copy() for source in c]
            for item, (target, total) in enumerate(zip(targets, held, strict=True)):
                row, column = _LANE // 4 + 8 * (item // 2), 2 * (_LANE % 4) + item % 2
                for step in range(k):
                    total = fused(left[row, step], right[column, step], total)
                w.f[target][part] = total

    return Action(run, stop=True, members=ALL_LANES)


def _parts(matrices: Array) -> Array:
    """A view of (warps, 16, 8) matrices as (warps, lane / 4, lane % 4, row half, column parity).

    Lane t holds rows t / 4 and t / 4 + 8, columns 2 * (t % 4) and the next.
    """
    return matrices.reshape(len(matrices), 2, 8, 4, 2).transpose(0, 2, 3, 1, 4)


def _accumulator(w: Lanes, sources: list[int], half: bool) -> Array:
    """C of every warp, (warps, 16, 8) float32."""
    out = np.empty((w.warps, 16, 8), np.float32)
    parts = _parts(out)
    for item, source in enumerate(sources):
        if half:
            parts[:, :, :, item] = w.h[source].reshape(w.warps, 8, 4, 2)
        else:
            parts[:, :, :, item // 2, item % 2] = w.f[source].reshape(w.warps, 8, 4)
    return out


def _write(w: Lanes, targets: list[int], total: Array, half: bool) -> None:
    """D of every warp, (warps, 16, 8) float32."""
    parts = _parts(total)
    for item, target in enumerate(targets):
        if half:
            w.h[target][...] = parts[:, :, :, item].reshape(w.n, 2).astype(np.float16)
        else:
            w.f[target][...] = parts[:, :, :, item // 2, item % 2].reshape(w.n)


def _write_integers(w: Lanes, targets: list[int], sources: list[int], product: Array, saturate: bool) -> None:
    """D = product + C, of 32 bits: modulo 2**32 or clamped."""
    parts = _parts(product)
    for item, (target, source) in enumerate(zip(targets, sources, strict=True)):
        total = w.s[source].astype(np.int64) + parts[:, :, :, item // 2, item % 2].reshape(w.n)
        if saturate:
            total = np.clip(total, -(1 << 31), (1 << 31) - 1)
        w.u[target][...] = (total & 0xFFFFFFFF).astype(np.uint32)
