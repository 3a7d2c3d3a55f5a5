"""Where `wgmma.fence` is missing: a wgmma whose registers other instructions touched on a path without the fence.

A property of the code, found by following its control flow once. Register moves do not count: NVVM writes them for values that
ptxas keeps in place. Accumulators that only wgmma instructions touch need no fence between these.
"""

from __future__ import annotations

from collections.abc import Iterator

from dsv4lab.sim.program import Address, Instruction, Kernel, Label, Not, Operand, Pair, Register, Vector

Touched = dict[str, int]  # register -> an instruction that touched it since the last fence


def unfenced(kernel: Kernel) -> dict[int, tuple[str, int]]:
    """wgmma.mma_async instruction -> one of its registers, and an instruction that touched it, no wgmma.fence between."""
    instructions = kernel.instructions
    owned = {i.index: _own(i) for i in instructions if i.opcode.startswith("wgmma.mma_async")}
    tracked = frozenset().union(*owned.values())
    if not tracked:
        return {}
    before: dict[int, Touched] = {0: {}}
    pending = [0]
    while pending:
        index = pending.pop()
        after = _through(instructions[index], before[index], tracked)
        for following in _successors(kernel, instructions[index]):
            known = before.get(following)
            if known is None:
                before[following] = dict(after)
            elif after.keys() <= known.keys():
                continue
            else:
                known |= {name: at for name, at in after.items() if name not in known}
            pending.append(following)
    found = {}
    for index, registers in owned.items():
        bad = sorted(registers & before.get(index, {}).keys())
        if bad:
            found[index] = bad[0], before[index][bad[0]]
    return found


def _own(instruction: Instruction) -> frozenset[str]:
    """Accumulators, and the registers of A where it comes from there."""
    vectors = [o for o in instruction.operands[:2] if isinstance(o, Vector)]
    return frozenset(name for vector in vectors for name in _registers(vector))


def _through(instruction: Instruction, touched: Touched, tracked: frozenset[str]) -> Touched:
    """What is touched after an instruction."""
    if instruction.opcode.startswith("wgmma.fence"):
        return {}
    if instruction.opcode.startswith(("wgmma.", "mov.")):
        return touched
    new = {name: instruction.index for o in instruction.operands for name in _registers(o) if name in tracked}
    return touched | new if new else touched


def _successors(kernel: Kernel, instruction: Instruction) -> Iterator[int]:
    following = instruction.index + 1
    family = instruction.opcode.partition(".")[0]
    if family == "bra":
        yield from (kernel.labels[o.name] for o in instruction.operands if isinstance(o, Label))
    if family not in ("bra", "ret", "exit", "brx") or instruction.guard is not None:
        yield from [following] if following < len(kernel.instructions) else []


def _registers(operand: Operand) -> Iterator[str]:
    if isinstance(operand, Register):
        yield operand.name
    elif isinstance(operand, Not):
        yield operand.register.name
    elif isinstance(operand, Vector):
        for item in operand.items:
            yield from _registers(item)
    elif isinstance(operand, Pair):
        yield from (operand.first.name, operand.second.name)
    elif isinstance(operand, Address):
        yield from _registers(operand.base)
