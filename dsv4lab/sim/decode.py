"""From instructions to closures: operands become register slots, opcodes become handlers, straight lines become blocks.

Handlers register under an instruction family (`add`, `mbarrier`) and must account for every modifier of the dotted form;
what is left over makes the form unknown. An unknown form raises when it is reached, with its PTX and Python lines.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dsv4lab.sim.errors import UnknownInstruction
from dsv4lab.sim.program import Address, Immediate, Instruction, Kernel, Label, Not, Operand, Pair, Register, Symbol, Vector
from dsv4lab.sim.registers import WIDTHS, Lanes

Array = NDArray
Run = Callable[[Lanes, Any], Any]  # (lanes, mask or None) -> None, a Wait, or EXIT
SINK = "_"
EXIT = object()
TYPE_BYTES = {
    "pred": 0,
    **dict.fromkeys(("b8", "u8", "s8", "e4m3", "e5m2"), 1),
    **dict.fromkeys(("b16", "u16", "s16", "f16", "bf16", "e4m3x2", "e5m2x2", "ue8m0x2", "s2f6x2", "e2m3x2", "e3m2x2"), 2),
    **dict.fromkeys(("b32", "u32", "s32", "f32", "f16x2", "bf16x2", "tf32", "u16x2", "s16x2", "e4m3x4", "e5m2x4"), 4),
    **dict.fromkeys(("b64", "u64", "s64", "f64", "f32x2"), 8),
    "b128": 16,
    "e2m1x2": 1,
}


class Form:
    """The modifiers of a dotted opcode, consumed one by one."""

    def __init__(self, opcode: str) -> None:
        self.opcode = opcode
        parts = opcode.split(".")
        self.family = parts[0]
        self.left = parts[1:]

    def take(self, *names: str) -> str | None:
        """Consume and return the first modifier that is one of `names`, or None."""
        for index, part in enumerate(self.left):
            if part in names:
                return self.left.pop(index)
        return None

    def has(self, name: str) -> bool:
        return self.take(name) is not None

    def prefix(self, start: str) -> str | None:
        """Consume the first modifier that begins with `start`; returns what follows `start`."""
        for index, part in enumerate(self.left):
            if part.startswith(start):
                return self.left.pop(index)[len(start) :]
        return None

    def type(self) -> str:
        """Consume the last modifier, the operand type."""
        if not self.left or self.left[-1] not in TYPE_BYTES:
            raise UnknownInstruction(f"{self.opcode} has no operand type that the simulator knows")
        return self.left.pop()

    def drop(self, *names: str) -> None:
        """Consume modifiers that change nothing in a functional simulation (cache hints, memory order and scope)."""
        self.left = [part for part in self.left if part not in names]

    def done(self) -> None:
        if self.left:
            raise UnknownInstruction(f"{self.opcode}: {', '.join('.' + part for part in self.left)} is not simulated")


ORDER = ("relaxed", "acquire", "release", "acq_rel", "volatile", "weak", "cta", "gpu", "sys", "mmio", "nc", "L2::cache_hint")


@dataclass
class Action:
    """What a handler family makes of an instruction. stop: may wait or needs its warp converged, so it ends a block."""

    run: Run
    stop: bool = False
    members: int | None = None  # slot of the member mask for which a warp must be converged; ALL_LANES for .aligned forms
    single: bool = False  # executes for one warp at a time
    owner: bool = False  # a wgmma instruction, which may name accumulators in flight


ALL_LANES = -1
Builder = Callable[["Decoder", Instruction, Form], "Run | Action"]
FAMILIES: dict[str, Builder] = {}


def family(*names: str) -> Callable[[Builder], Builder]:
    """Register a handler for instruction families."""

    def add(builder: Builder) -> Builder:
        for name in names:
            FAMILIES[name] = builder
        return builder

    return add


@dataclass
class Block:
    """Straight-line instructions start .. end - 1, then how the block ends. whole: its end counts as a block's in a turn."""

    start: int
    end: int
    runs: list[Run]
    kind: str  # "fall", "branch", "stop"
    target: int = 0
    guard: int | None = None
    negated: bool = False
    action: Action | None = None
    whole: bool = True


@dataclass
class Program:
    """A kernel ready to run: blocks by the index of their first instruction, and the register slots they use.

    singles: every instruction as a block of its own. records: what `decode`'s `assemble` made of each instruction.
    """

    kernel: Kernel
    blocks: dict[int, Block]
    singles: list[Block]
    records: list[Any]
    widths: list[int]
    constants: dict[int, int]  # slot -> bits
    specials: dict[int, str]  # slot -> special register
    symbols: dict[int, tuple[str, int]]  # slot -> (space, offset)
    names: dict[int, str]  # slot -> register name, for reports
    touches: dict[int, frozenset[int]] = field(default_factory=dict)  # instruction -> slots it reads or writes
    moves: frozenset[int] = frozenset()  # instructions that only move registers
    unknown: dict[int, str] = field(default_factory=dict)  # instruction -> why it cannot be executed


class Decoder:
    """Operands to slots, for one kernel."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.widths: list[int] = []
        self.constants: dict[int, int] = {}
        self.specials: dict[int, str] = {}
        self.symbols: dict[int, tuple[str, int]] = {}
        self.names: dict[int, str] = {}
        self._slots: dict[object, int] = {}
        self._touched: set[int] = set()

    # operands

    def _new(self, key: object, width: int) -> int:
        slot = self._slots.get(key)
        if slot is None:
            slot = self._slots[key] = len(self.widths)
            self.widths.append(width)
        return slot

    def register(self, operand: Operand) -> int:
        """Slot of a general register."""
        if not isinstance(operand, Register) or operand.component is not None:
            raise UnknownInstruction(f"expected a register, got {operand}")
        kind = self.kernel.registers.get(operand.name)
        if kind is None:
            raise UnknownInstruction(f"register {operand.name} is not declared")
        width = TYPE_BYTES.get(kind)
        if width is None:
            raise UnknownInstruction(f"register {operand.name} has type .{kind}, which is not simulated")
        slot = self._new(operand.name, width)
        self.names[slot] = operand.name
        self._touched.add(slot)
        return slot

    def sink(self, operand: Operand) -> int | None:
        """Slot of a destination, or None for `_`."""
        return None if isinstance(operand, Register) and operand.name == SINK else self.register(operand)

    def call_parameter(self, name: str, width: int) -> int:
        """Slot of a parameter of a call."""
        return self._new(("call parameter", name), width)

    def width(self, slot: int) -> int:
        return self.widths[slot]

    def constant(self, value: int, width: int) -> int:
        bits = int(bool(value)) if width == 0 else value & ((1 << (8 * width)) - 1)
        slot = self._new(("constant", bits, width), width)
        self.constants[slot] = bits
        return slot

    def source(self, operand: Operand, type_name: str, *, wider: bool = False) -> int:
        """Slot of a value: register, special register, constant, or the address of a symbol.

        wider: the register may have more bytes than the type, as that of a store; the low ones count.
        """
        width = TYPE_BYTES[type_name]
        if isinstance(operand, Immediate):
            return self.constant(operand.value, width)
        if isinstance(operand, Symbol):
            return self.symbol(operand.name, width or 4)
        if isinstance(operand, Register):
            if operand.name in self.kernel.registers:
                slot = self.register(operand)
                actual = self.widths[slot]
                if actual != width and not (actual == 2 and width == 1) and not (wider and actual > width > 0):
                    raise UnknownInstruction(f"register {operand.name} has {actual} bytes, .{type_name} needs {width}")
                return slot
            slot = self._new(("special", str(operand)), width)
            self.specials[slot] = str(operand)
            return slot
        raise UnknownInstruction(f"operand {operand} is not a value")

    def predicate(self, operand: Operand) -> tuple[int, bool]:
        """(slot, negated) of a predicate operand."""
        if isinstance(operand, Not):
            return self.register(operand.register), True
        return self.source(operand, "pred"), False

    def is_predicate(self, operand: Operand) -> bool:
        """Whether an operand that may be a number or a predicate is a predicate."""
        register = operand.register if isinstance(operand, Not) else operand
        return isinstance(register, Register) and self.kernel.registers.get(register.name) == "pred"

    def symbol(self, name: str, width: int) -> int:
        """Slot that holds a symbol's address: generic for parameters, local and constant data, a shared address for shared."""
        kernel = self.kernel
        for space, table in (("param", kernel.params), ("shared", kernel.shared), ("local", kernel.local)):
            for variable in table:
                if variable.name == name:
                    slot = self._new(("symbol", name, width), width)
                    self.symbols[slot] = (space, variable.offset)
                    return slot
        if name in kernel.constants:
            slot = self._new(("symbol", name, width), width)
            self.symbols[slot] = ("constant", list(kernel.constants).index(name))
            return slot
        raise UnknownInstruction(f"symbol {name} is not declared")

    def address(self, operand: Operand) -> tuple[int, int]:
        """(slot of the base, byte offset) of an address operand."""
        if not isinstance(operand, Address):
            raise UnknownInstruction(f"expected an address, got {operand}")
        base = operand.base
        if isinstance(base, Register):
            return (self.register(base) if base.name in self.kernel.registers else self.source(base, "b64")), operand.offset
        if isinstance(base, Immediate):
            return self.constant(base.value, 8), operand.offset
        return self.symbol(base.name, 8), operand.offset

    @staticmethod
    def items(operand: Operand) -> tuple[Operand, ...]:
        return operand.items if isinstance(operand, Vector) else (operand,)

    def pair(self, operand: Operand) -> tuple[int | None, int | None]:
        """Slots of `a|b`, or of `a` alone."""
        if isinstance(operand, Pair):
            return self.sink(operand.first), self.sink(operand.second)
        return self.sink(operand), None

    # instructions

    def action(self, instruction: Instruction) -> Action:
        """The handler's action for one instruction; unknown forms get one that raises."""
        form = Form(instruction.opcode)
        builder = FAMILIES.get(form.family)
        if builder is None:
            raise UnknownInstruction(f"{instruction.opcode} is not simulated")
        built = builder(self, instruction, form)
        form.done()
        return built if isinstance(built, Action) else Action(built)


def _guarded(run: Run, slot: int, negated: bool) -> Run:
    count = np.count_nonzero

    def guarded(w: Lanes, m: Array | None) -> Any:
        p = w.u[slot]
        if negated:
            p = ~p
        if m is not None:
            p = p & m
        active = count(p)
        if active == w.n:
            return run(w, None)
        return run(w, p) if active else None

    return guarded


def _raiser(message: str) -> Run:
    def unknown(w: Lanes, m: Array | None) -> Any:
        raise UnknownInstruction(message)

    return unknown


def decode(kernel: Kernel, assemble: Callable[[Decoder, Instruction], Any] | None = None) -> Program:
    """Decode every instruction of a kernel and cut it into blocks. assemble: called for what a handler has accepted."""
    from dsv4lab.sim import handlers

    handlers.load()
    decoder = Decoder(kernel)
    unknown: dict[int, str] = {}
    touches: dict[int, frozenset[int]] = {}
    actions: list[Action] = []
    records: list[Any] = []
    branches: dict[int, int] = {}
    guards: list[tuple[int, bool] | None] = []
    for instruction in kernel.instructions:
        decoder._touched = set()
        guard = instruction.guard
        guards.append(None if guard is None else (decoder.register(guard.register), guard.negated))
        records.append(None)
        if instruction.opcode.split(".")[0] == "bra":
            target = instruction.operands[0]
            assert isinstance(target, Label)
            branches[instruction.index] = kernel.labels[target.name]
            actions.append(Action(_raiser("bra")))
            continue
        try:
            action = decoder.action(instruction)
            if assemble is not None:
                records[-1] = assemble(decoder, instruction)
        except (UnknownInstruction, NotImplementedError) as error:
            unknown[instruction.index] = str(error)
            action = Action(_raiser(str(error)))
        except (IndexError, KeyError, ValueError, TypeError) as error:
            message = f"{instruction.opcode}: its operands could not be decoded ({type(error).__name__}: {error})"
            unknown[instruction.index] = message
            action = Action(_raiser(message))
        actions.append(action)
        touches[instruction.index] = frozenset(decoder._touched)
    leaders = {0, *kernel.labels.values()}
    for index, action in enumerate(actions):
        if index in branches or action.stop:
            leaders.add(index + 1)
        if action.stop:
            leaders.add(index)
    singles: list[Block] = []
    for index, action in enumerate(actions):
        slot, negated = guards[index] or (None, False)
        if index in branches:
            singles.append(Block(index, index, [], "branch", branches[index], slot, negated))
        elif action.stop:
            singles.append(Block(index, index, [], "stop", index + 1, slot, negated, action))
        else:
            run = action.run if slot is None else _guarded(action.run, slot, negated)
            last = index + 1 in leaders or index + 1 == len(actions)
            singles.append(Block(index, index + 1, [run], "fall", index + 1, whole=last))
    blocks: dict[int, Block] = {}
    for start in sorted(leader for leader in leaders if leader < len(singles)):
        index, runs = start, []
        while not singles[index].whole:
            runs += singles[index].runs
            index += 1
        blocks[start] = replace(singles[index], start=start, runs=runs + singles[index].runs)
    return Program(
        kernel,
        blocks,
        singles,
        records,
        decoder.widths,
        decoder.constants,
        decoder.specials,
        decoder.symbols,
        decoder.names,
        touches,
        frozenset(i.index for i in kernel.instructions if i.opcode.startswith("mov.")),
        unknown,
    )


__all__ = [
    "ALL_LANES",
    "EXIT",
    "FAMILIES",
    "ORDER",
    "TYPE_BYTES",
    "WIDTHS",
    "Action",
    "Decoder",
    "Form",
    "Program",
    "Run",
    "decode",
    "family",
]
