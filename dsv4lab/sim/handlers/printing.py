"""Device printf: `call vprintf` with a format and a buffer of arguments packed as C packs them in a struct."""

from __future__ import annotations

import re
import struct
from typing import Any

import numpy as np

from dsv4lab.sim.decode import TYPE_BYTES, Decoder, Form, Run, family
from dsv4lab.sim.errors import UnknownInstruction
from dsv4lab.sim.handlers.copy import bytes_at
from dsv4lab.sim.memory import LOCAL_WINDOW, WINDOW_BYTES, GlobalMemory
from dsv4lab.sim.program import Address, Instruction, Symbol, Vector
from dsv4lab.sim.registers import Lanes

_DIRECTIVE = re.compile(
    r"%(?P<flags>[-+ #0]*)(?P<width>\*|\d+)?(?:\.(?P<precision>\*|\d+))?(?P<length>hh|h|ll|l|z|j|t)?(?P<kind>.)"
)
_LONG = ("l", "ll", "z", "j", "t")
_LINE_LIMIT = 4096  # characters of a string argument


def store_argument(d: Decoder, i: Instruction, type_name: str) -> Run:
    """`st.param`: the value of a call's parameter, kept per thread in a slot of its own."""
    place = i.operands[0]
    if not isinstance(place, Address) or not isinstance(place.base, Symbol) or place.base.name not in d.kernel.call_params:
        raise UnknownInstruction(f"{i.opcode}: expected a parameter of a call")
    size = d.kernel.call_params[place.base.name]
    if place.offset or size != TYPE_BYTES[type_name]:
        raise UnknownInstruction(f"{i.opcode}: parameters of calls are simulated as whole numbers only")
    target, source = d.call_parameter(place.base.name, size), d.source(i.operands[1], type_name)

    def run(w: Lanes, m: Any) -> None:
        np.copyto(w.u[target], w.u[source], where=True if m is None else m)

    return run


@family("call")
def call(d: Decoder, i: Instruction, f: Form) -> Run:
    """`vprintf`, the only function that kernels call: every thread's text goes to `Machine.printed`, lowest lane first."""
    f.drop("uni")
    if len(i.operands) != 3 or str(i.operands[1]) != str(Symbol("vprintf")) or not isinstance(i.operands[2], Vector):
        raise UnknownInstruction("calls of functions other than vprintf are not simulated")
    names = [operand.name for operand in i.operands[2].items if isinstance(operand, Symbol)]
    text, arguments = (d.call_parameter(name, 8) for name in names)

    def run(w: Lanes, m: Any) -> None:
        machine = w.cta.machine
        for lane in w.active(m):
            pattern = _string(machine.memory, int(w.u[text][lane]))
            buffer = _Arguments(w, int(lane), int(w.u[arguments][lane]))
            machine.printed.append(_format(pattern, buffer, machine.memory))

    return run


class _Arguments:
    """The packed arguments of one thread, read in order."""

    def __init__(self, w: Lanes, lane: int, address: int) -> None:
        self.w, self.thread, self.address = w, w.first + lane, address

    def take(self, kind: str) -> Any:
        """The next argument as a `struct` type, aligned to its size."""
        size = struct.calcsize(kind)
        self.address = -(-self.address // size) * size
        cta, offset = self.w.cta, self.address - LOCAL_WINDOW
        if 0 <= offset < WINDOW_BYTES and cta.local is not None:
            raw = cta.local.span(self.thread * cta.local_stride + offset, size)
        else:
            raw = bytes_at(cta, self.address, size)
        self.address += size
        return struct.unpack(f"<{kind}", raw.tobytes())[0]


def _string(memory: GlobalMemory, address: int) -> str:
    """A zero-terminated string in global memory, where module-level constants lie."""
    owner = memory.find(address)
    start = address - owner.base
    raw = owner.data[start : start + _LINE_LIMIT].tobytes()
    return raw.split(b"\0", 1)[0].decode(errors="replace")


def _format(pattern: str, arguments: _Arguments, memory: GlobalMemory) -> str:
    """C's printf formatting. Raises UnknownInstruction for a directive that it does not know."""

    def number(text: str | None) -> str:
        return str(arguments.take("i")) if text == "*" else text or ""

    def one(match: re.Match[str]) -> str:
        kind, flags = match["kind"], match["flags"]
        if kind == "%":
            return "%"
        width, precision = number(match["width"]), match["precision"]
        spec = f"%{flags}{width}" + ("" if precision is None else f".{number(precision)}")
        wide = match["length"] in _LONG
        if kind in "di":
            return (spec + "d") % arguments.take("q" if wide else "i")
        if kind in "uxXo":
            return (spec + ("d" if kind == "u" else kind)) % arguments.take("Q" if wide else "I")
        if kind in "feEgGF":
            return (spec + kind) % arguments.take("d")
        if kind in "aA":
            return float(arguments.take("d")).hex()
        if kind == "c":
            return (spec + "c") % chr(arguments.take("I") & 0xFF)
        if kind == "p":
            return (f"%{flags}{width}s") % f"0x{arguments.take('Q'):x}"
        if kind == "s":
            return (spec + "s") % _string(memory, arguments.take("Q"))
        raise UnknownInstruction(f"printf: %{kind} in {pattern!r} is not simulated")

    return _DIRECTIVE.sub(one, pattern)
