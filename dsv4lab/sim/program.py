"""What the simulator executes: PTX kernels as data, and a launch of one. No behaviour, no dependency on CuTeDSL or torch.

Names of registers and labels are unique within a kernel: those declared inside a `{ }` block of inline assembly carry the
block's number ("done$7"), so that no scope is left to resolve.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Register:
    """A register: general (`%r12`), special (`%tid` with component "x"; `%laneid`), or the sink `_` (written, never read)."""

    name: str
    component: str | None = None

    def __str__(self) -> str:
        return self.name if self.component is None else f"{self.name}.{self.component}"


@dataclass(frozen=True, slots=True)
class Not:
    """A predicate operand that is read negated: `!%p3`."""

    register: Register

    def __str__(self) -> str:
        return f"!{self.register}"


@dataclass(frozen=True, slots=True)
class Immediate:
    """A constant. type "int": value is the signed number as written; "f32" and "f64": value holds the bits (`0f3F800000`)."""

    value: int
    type: str = "int"

    def __str__(self) -> str:
        return {"f32": f"0f{self.value:08X}", "f64": f"0d{self.value:016X}"}.get(self.type, str(self.value))


@dataclass(frozen=True, slots=True)
class Symbol:
    """The name of a parameter, a variable or a function."""

    name: str

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True, slots=True)
class Label:
    """The target of a branch; `Kernel.labels` has the instruction it stands before."""

    name: str

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True, slots=True)
class Vector:
    """`{a, b, ...}`, and the parenthesised argument lists of `call`."""

    items: tuple[Operand, ...]

    def __str__(self) -> str:
        return "{" + ", ".join(map(str, self.items)) + "}"


@dataclass(frozen=True, slots=True)
class Pair:
    """Two destinations joined by a bar: `%p1|%p2` of setp, `%r1|%p1` of shfl.sync."""

    first: Register
    second: Register

    def __str__(self) -> str:
        return f"{self.first}|{self.second}"


@dataclass(frozen=True, slots=True)
class Address:
    """`[base + offset]`, offset in bytes; `coordinates` are those of a tensor copy: `[%rd4, {%r1, %r2}]`."""

    base: Register | Symbol | Immediate
    offset: int = 0
    coordinates: Vector | None = None

    def __str__(self) -> str:
        offset = f"{self.offset:+d}" if self.offset else ""
        coordinates = f", {self.coordinates}" if self.coordinates else ""
        return f"[{self.base}{offset}{coordinates}]"


Operand = Register | Not | Immediate | Symbol | Label | Vector | Pair | Address


@dataclass(frozen=True, slots=True)
class Location:
    """A line of source, from the PTX `.loc` in force."""

    file: str
    line: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


@dataclass(frozen=True, slots=True)
class Guard:
    """`@%p1` or `@!%p1`: lanes whose predicate is false (true if negated) skip the instruction."""

    register: Register
    negated: bool = False


@dataclass(frozen=True, slots=True)
class Instruction:
    """One instruction; `opcode` is the full dotted form and `text` the statement as written."""

    index: int
    opcode: str
    operands: tuple[Operand, ...]
    guard: Guard | None
    location: Location | None
    text: str

    def __str__(self) -> str:
        return f"{self.text}  ({self.location})" if self.location else self.text


@dataclass(frozen=True, slots=True)
class Param:
    """A kernel parameter: `offset` and `size` in `Launch.params`, in bytes."""

    name: str
    offset: int
    size: int
    align: int


@dataclass(frozen=True, slots=True)
class SharedVariable:
    """A variable in shared memory; `offset` counts from the kernel's first. Size 0: the dynamic array, after all others."""

    name: str
    offset: int
    size: int
    align: int


@dataclass(frozen=True, slots=True)
class LocalVariable:
    """A variable of which every thread has its own copy; `offset` counts from the start of the thread's local memory."""

    name: str
    offset: int
    size: int
    align: int


@dataclass(frozen=True)
class Kernel:
    """A parsed entry point.

    labels: name -> index of the instruction that follows. registers: every general register that is used -> type ("b32",
    "pred"). max_threads: block shape demanded by `.reqntid`, or None. cluster: shape demanded by `.reqnctapercluster`, or None.
    constants: module-level variables (printf formats) -> their bytes. call_params: parameters of calls, made unique -> bytes.
    source: the PTX text.
    """

    name: str
    target: str
    params: tuple[Param, ...]
    instructions: tuple[Instruction, ...]
    labels: dict[str, int]
    registers: dict[str, str]
    shared: tuple[SharedVariable, ...] = ()
    local: tuple[LocalVariable, ...] = ()
    max_threads: tuple[int, int, int] | None = None
    thread_registers: int = 0  # of a thread at launch; 0: nothing fixes them, so that setmaxnreg has no effect
    compiled_registers: int = 0  # of a thread, which ptxas chose; 0 of a kernel that is PTX alone
    cluster: tuple[int, int, int] | None = None
    constants: dict[str, bytes] = field(default_factory=dict)
    call_params: dict[str, int] = field(default_factory=dict)
    source: str = field(default="", repr=False)


@dataclass(frozen=True)
class Launch:
    """One kernel launch as the host code made it.

    grid, block, cluster: in CTAs, threads, CTAs, as (x, y, z). shared_bytes: dynamic shared memory. params: the parameters laid
    out by `Kernel.params`. attributes: launch attribute name (or number, where unknown) -> value.
    """

    kernel: Kernel
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    cluster: tuple[int, int, int]
    shared_bytes: int
    params: bytes
    attributes: dict[str, Any] = field(default_factory=dict)
