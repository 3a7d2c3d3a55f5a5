"""From decoded instructions to the C code's records.

`assemble` sees every instruction that a numpy handler has accepted, with the same decoder, so slots are the same. It returns
None for any form that the C code does not have; such an instruction is executed by its handler.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass
from importlib import import_module

import numpy as np

from dsv4lab.sim.decode import Decoder, Form
from dsv4lab.sim.errors import UnknownInstruction
from dsv4lab.sim.native import library
from dsv4lab.sim.program import Instruction

PLAIN, BRANCH, STOP = range(3)
MEMORY, FENCE = 1, 2  # bits of `Step.traffic`, what observers may want to see
STEP = np.dtype(
    [
        ("run", "u8"),
        ("k", "i8"),
        *((name, "i4") for name in ("guard", "d", "a", "b", "c", "list")),
        *((name, "u2") for name in ("count", "size")),
        *((name, "u1") for name in ("kind", "negated", "ends", "variant", "convergent", "single", "move", "traffic")),
    ],
    align=True,
)


@dataclass
class Code:
    """One operation and its operands; see `Step` in core.h."""

    name: str
    d: int = -1
    a: int = -1
    b: int = -1
    c: int = -1
    _: KW_ONLY
    k: int = 0
    items: Sequence[int | None] = ()
    count: int = 0
    size: int = 0
    variant: int = 0
    list: int = -1
    traffic: int = 0


Assembler = Callable[[Decoder, Instruction, Form], "Code | None"]
ASSEMBLERS: dict[str, Assembler] = {}


def family(*names: str) -> Callable[[Assembler], Assembler]:
    def add(assembler: Assembler) -> Assembler:
        for name in names:
            ASSEMBLERS[name] = assembler
        return assembler

    return add


def assemble(decoder: Decoder, instruction: Instruction) -> Code | None:
    """The record of an instruction that its handler accepts, or None."""
    import_module("dsv4lab.sim.native.families")
    form = Form(instruction.opcode)
    assembler = ASSEMBLERS.get(form.family)
    if assembler is None:
        return None
    try:
        code = assembler(decoder, instruction, form)
    except (UnknownInstruction, IndexError, KeyError, ValueError, TypeError):
        return None
    if code is None or form.left or not library.find(code.name):
        return None
    return code
