"""Defects seeded into a compiled kernel: edits of its parsed PTX, aimed by opcode and by the Python line it came from.

An `Edit` turns a `Kernel` into another one. `at` is text that the Python source line of the instruction must contain, `nth`
chooses among the matches (0: the first; None: all of them). An edit that matches nothing raises, so tables of edits cannot rot.
"""

from __future__ import annotations

import linecache
import re
from collections.abc import Callable
from dataclasses import replace

from dsv4lab.sim.program import Address, Immediate, Instruction, Kernel, Register, Vector

Edit = Callable[[Kernel], Kernel]
WAIT = r"mbarrier\.try_wait|bra"  # a wait is a loop around try_wait


def matching(kernel: Kernel, opcode: str, at: str, nth: int | None) -> set[int]:
    """Indices of the instructions whose opcode matches from its start and whose Python line contains `at`."""
    pattern = re.compile(opcode)
    found = [i.index for i in kernel.instructions if pattern.match(i.opcode) and at in source_line(i)]
    if nth is not None:
        found = found[nth : nth + 1]
    if not found:
        raise LookupError(f"no instruction {opcode!r} at a line with {at!r} in {kernel.name}")
    return set(found)


def source_line(instruction: Instruction) -> str:
    where = instruction.location
    return "" if where is None else linecache.getline(where.file, where.line)


def rewrite(kernel: Kernel, change: Callable[[Instruction], list[Instruction] | None], at: set[int]) -> Kernel:
    """The kernel with each instruction of `at` replaced by a list of others; labels stay before what followed them."""
    instructions: list[Instruction] = []
    starts: list[int] = []
    for instruction in kernel.instructions:
        starts.append(len(instructions))
        made = change(instruction) if instruction.index in at else [instruction]
        instructions += made or []
    starts.append(len(instructions))
    return replace(
        kernel,
        instructions=tuple(replace(i, index=n) for n, i in enumerate(instructions)),
        labels={name: starts[index] for name, index in kernel.labels.items()},
    )


def drop(opcode: str, at: str = "", nth: int | None = None) -> Edit:
    """Remove instructions."""
    return lambda kernel: rewrite(kernel, lambda _: [], matching(kernel, opcode, at, nth))


def drop_wait(at: str) -> Edit:
    """Remove an mbarrier wait, loop and all."""
    return drop(WAIT, at)


def operand(opcode: str, position: int, value: int, at: str = "", nth: int | None = None) -> Edit:
    """Give an operand another, constant value."""

    def change(i: Instruction) -> list[Instruction]:
        operands = (*i.operands[:position], Immediate(value), *i.operands[position + 1 :])
        return [replace(i, operands=operands, text=f"{i.text} [operand {position} = {value}]")]

    return lambda kernel: rewrite(kernel, change, matching(kernel, opcode, at, nth))


def launched_with(registers: int, edit: Edit) -> Edit:
    """Besides, fix the registers of a thread at launch, as `.maxnreg` does; setmaxnreg counts only where something does."""
    return lambda kernel: replace(edit(kernel), thread_registers=registers)


def offset(opcode: str, position: int, by: int, at: str = "", nth: int | None = None) -> Edit:
    """Move the address in an operand by some bytes."""

    def change(i: Instruction) -> list[Instruction]:
        address = i.operands[position]
        assert isinstance(address, Address), i
        moved = replace(address, offset=address.offset + by)
        operands = (*i.operands[:position], moved, *i.operands[position + 1 :])
        return [replace(i, operands=operands, text=f"{i.text} [{by:+d} bytes]")]

    return lambda kernel: rewrite(kernel, change, matching(kernel, opcode, at, nth))


def coordinate(opcode: str, axis: int, by: int, at: str = "", nth: int | None = None) -> Edit:
    """Move a tensor copy's box along an axis (0 is the innermost) by some elements."""

    def edit(kernel: Kernel) -> Kernel:
        chosen = matching(kernel, opcode, at, nth)

        def change(i: Instruction) -> list[Instruction]:
            place = next(n for n, o in enumerate(i.operands) if isinstance(o, Address) and o.coordinates is not None)
            address = i.operands[place]
            assert isinstance(address, Address) and address.coordinates is not None
            items = list(address.coordinates.items)
            extra, old = Register(f"%mutant{i.index}"), items[axis]
            items[axis] = extra
            operands = (*i.operands[:place], replace(address, coordinates=Vector(tuple(items))), *i.operands[place + 1 :])
            text = f"add.s32 {extra}, {old}, {by}"
            add = replace(i, opcode="add.s32", operands=(extra, old, Immediate(by)), guard=None, text=text)
            return [add, replace(i, operands=operands, text=f"{i.text} [{old} {by:+d}]")]

        extras = {f"%mutant{index}": "b32" for index in chosen}
        return rewrite(replace(kernel, registers=kernel.registers | extras), change, chosen)

    return edit
