"""ldmatrix and stmatrix of 8-bit elements, and of 4- and 6-bit elements that ldmatrix widens to bytes.

A row is 16 bytes of shared memory. Thread t of a warp and byte b of its register hold, with g = t / 4 and q = t % 4:

    ldmatrix m16n16 .trans  register r: row 4q + b, column g + 8r       two registers for each matrix of 16 rows
    ldmatrix m8n16          row g, column 4q + b                        one register for each matrix of 8 rows
    stmatrix m16n8 .trans   row 2q + b % 2, column g + 8 (b / 2)        one register for each matrix of 8 rows

Rows and columns are those in shared memory; the instructions count theirs transposed where they say `.trans`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from dsv4lab.sim.decode import ALL_LANES, Action, Decoder, Form
from dsv4lab.sim.errors import UnknownInstruction
from dsv4lab.sim.handlers.loadstore import Access
from dsv4lab.sim.program import Instruction
from dsv4lab.sim.registers import WARP

Array = NDArray
_GROUP, _QUAD, _BYTE = np.arange(WARP)[:, None] // 4, np.arange(WARP)[:, None] % 4, np.arange(4)[None, :]
_PADDED = {"b4x16_p64": 4, "b6x16_p32": 6}


def load_bytes(d: Decoder, i: Instruction, f: Form, count: int) -> Action:
    """`ldmatrix.m16n16.trans` of .b8 or a padded narrower type, `ldmatrix.m8n16` of a padded narrower type."""
    shape, transpose = f.take("m16n16", "m8n16"), f.has("trans")
    width = next((size for name, size in _PADDED.items() if f.has(name)), 8)
    f.drop("b8", "b8x16")
    if shape is None or transpose != (shape == "m16n16") or (width == 8) != (i.opcode.endswith(".b8")):
        raise UnknownInstruction(f"{i.opcode} is not simulated")
    rows = int(shape[1:].split("n")[0])
    targets = [d.register(o) for o in d.items(i.operands[0])]
    if transpose:
        where = [(4 * _QUAD + _BYTE, _GROUP + 8 * r) for r in range(2)]
    else:
        where = [(_GROUP + 0 * _BYTE, 4 * _QUAD + _BYTE)]
    if len(targets) != count * len(where) or rows * count > WARP:
        raise UnknownInstruction(f"{i.opcode} with {len(targets)} registers is not simulated")
    access = Access(d, i, i.operands[1], "shared", 8, 2)

    def run(w: Any, m: Any) -> None:
        addresses = access.addresses(w, None).reshape(w.warps, WARP)[:, : rows * count].reshape(-1)
        data = access._load_shared(w, addresses).view(np.uint8).reshape(-1, 16)
        matrices = (data if width == 8 else _widen(data, width)).reshape(w.warps, count, rows, 16)
        for k, target in enumerate(targets):
            row, column = where[k % len(where)]
            w.b[target][...] = matrices[:, k // len(where), row, column].reshape(-1, 4)

    return Action(run, stop=True, members=ALL_LANES)


def _widen(data: Array, size: int) -> Array:
    """(rows, 16) bytes that begin with 16 packed values of `size` bits to a value in the low bits of each byte."""
    bits = np.unpackbits(np.ascontiguousarray(data[:, : 2 * size]), axis=-1, bitorder="little")
    return (bits.reshape(len(data), 16, size) << np.arange(size, dtype=np.uint8)).sum(axis=-1, dtype=np.uint8)


def store_bytes(d: Decoder, i: Instruction, f: Form, count: int) -> Action:
    """`stmatrix.m16n8.trans.b8`."""
    if not (f.has("m16n8") and f.has("trans") and f.has("b8")):
        raise UnknownInstruction(f"{i.opcode} is not simulated")
    sources = [d.register(o) for o in d.items(i.operands[1])]
    access = Access(d, i, i.operands[0], "shared", 8, 2)
    row, column = 2 * _QUAD + _BYTE % 2, _GROUP + 8 * (_BYTE // 2)

    def run(w: Any, m: Any) -> None:
        lines = np.empty((w.warps, count, 8, 16), np.uint8)
        for k, source in enumerate(sources):
            lines[:, k, row, column] = w.b[source].reshape(w.warps, WARP, 4)
        addresses = access.addresses(w, None).reshape(w.warps, WARP)[:, : 8 * count].reshape(-1)
        access._store_shared(w, addresses, lines.view(np.uint64).reshape(-1, 2))

    return Action(run, stop=True, members=ALL_LANES)
