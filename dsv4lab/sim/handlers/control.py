"""Control flow, moves, and instructions without a functional effect."""

from __future__ import annotations

from typing import Any

import numpy as np

from dsv4lab.sim.decode import ALL_LANES, EXIT, TYPE_BYTES, Action, Decoder, Form, Run, family
from dsv4lab.sim.errors import ResourceError, SimulatorError, UnknownInstruction
from dsv4lab.sim.observe import Fence, Order
from dsv4lab.sim.program import Immediate, Instruction, Register, Vector
from dsv4lab.sim.registers import WARP, Lanes
from dsv4lab.sim.startup import TIMERS
from dsv4lab.sim.sync import Wait

_REGISTER_POOL = 65536  # 32-bit registers of a multiprocessor


class Trap(SimulatorError):
    """The kernel executed `trap`: a device-side assertion failed."""


def nothing(w: Lanes, m: Any) -> None:
    return None


@family("ret", "exit")
def leave(d: Decoder, i: Instruction, f: Form) -> Action:
    f.drop("uni")
    return Action(lambda w, m: EXIT, stop=True)


@family("trap", "brkpt")
def trap(d: Decoder, i: Instruction, f: Form) -> Action:
    def run(w: Lanes, m: Any) -> None:
        raise Trap(f"the kernel executed {i.opcode}")

    return Action(run, stop=True)


@family(
    "nop",
    "pragma",
    "nanosleep",
    "prefetch",
    "prefetchu",
    "discard",
    "applypriority",
    "createpolicy",
)
def no_effect(d: Decoder, i: Instruction, f: Form) -> Run:
    """Cache and timing hints."""
    f.left.clear()
    if f.family == "createpolicy":
        target = d.register(i.operands[0])

        def run(w: Lanes, m: Any) -> None:
            w.u[target][...] = 0

        return run
    return nothing


@family("griddepcontrol")
def dependent_grids(d: Decoder, i: Instruction, f: Form) -> Run:
    """Dependent launches run one by one, so there is nothing to wait for."""
    what = f.take("wait", "launch_dependents")

    def run(w: Lanes, m: Any) -> None:
        if w.cta.machine.observers:
            w.cta.machine.observers.warps("griddepcontrol", w, m, i.index, what)

    return run


@family("fence", "membar")
def fence(d: Decoder, i: Instruction, f: Form) -> Run:
    """Memory is sequentially consistent here and has no proxies; only observers care."""
    proxy = f.take("async", "async::generic", "alias", "tensormap::generic", "generic::tensormap") if f.has("proxy") else None
    order = f.take("sc", "acq_rel", "acquire", "release") or "sc"
    scope = f.take("cta", "cluster", "gpu", "gl", "sys") or ("" if proxy is None else "cta")
    f.drop("mbarrier_init", "sync_restrict::shared::cta", "sync_restrict::shared::cluster")
    spaces = tuple(s for s in ("global", "shared::cta", "shared::cluster") if f.has(s))
    told = Fence(proxy or "", Order(order, "gpu" if scope == "gl" else scope), spaces)

    def run(w: Lanes, m: Any) -> None:
        if w.cta.machine.observers:
            w.cta.machine.observers.warps("fence", w, m, i.index, told)

    return run


@family("setmaxnreg")
def setmaxnreg(d: Decoder, i: Instruction, f: Form) -> Action:
    """A CTA's warps share the registers it was launched with: `.dec` gives some back, `.inc` waits until there are enough."""
    up = f.take("inc", "dec") == "inc"
    f.drop("sync", "aligned", "u32")
    operand = i.operands[0]
    if not isinstance(operand, Immediate):
        raise UnknownInstruction("setmaxnreg needs a constant")
    count = operand.value
    if not 24 <= count <= 256 or count % 8:
        raise UnknownInstruction(f"setmaxnreg needs a multiple of 8 from 24 to 256, got {count}")

    def run(w: Lanes, m: Any) -> Any:
        cta = w.cta
        initial = -(-d.kernel.thread_registers // 8) * 8
        have = cta.register_budget.get(w.warp, initial)
        if initial:
            if (count < have) if up else (count > have):
                raise ResourceError(f"{i.opcode} to {count} registers a thread, but warp {w.warp} has {have}")
            needed = WARP * (count - have)
            if needed > cta.free_registers:
                what = f"waits for {needed} registers, {cta.free_registers} of the CTA's are free"
                return Wait("setmaxnreg", what, lambda: needed <= cta.free_registers)
            cta.free_registers -= needed
        cta.register_budget[w.warp] = count
        total = WARP * sum(cta.register_budget.values())
        if total > _REGISTER_POOL:
            raise ResourceError(f"setmaxnreg: warps claim {total} registers, the multiprocessor has {_REGISTER_POOL}")
        cta.machine.progress += 1
        if cta.machine.observers:
            cta.machine.observers.warps("set_registers", w, m, i.index, count)
        return None

    return Action(run, stop=True, members=ALL_LANES, single=True)


@family("mov")
def mov(d: Decoder, i: Instruction, f: Form) -> Run:
    t = f.type()
    to, value = i.operands[0], i.operands[1]
    if isinstance(value, Vector):
        return _pack(d, d.register(to), value, TYPE_BYTES[t])
    if isinstance(to, Vector):
        return _unpack(d, to, d.source(value, t), TYPE_BYTES[t])
    if isinstance(value, Register) and str(value) in TIMERS:
        target = d.register(to)

        def clock(w: Lanes, m: Any) -> None:
            w.u[target][...] = w.cta.machine.stats.instructions & ((1 << (8 * d.width(target))) - 1)

        return clock
    target, source = d.register(to), d.source(value, t)

    def run(w: Lanes, m: Any) -> None:
        if m is None:
            w.u[target][...] = w.u[source]
        else:
            w.u[target][m] = w.u[source][m]

    return run


def _parts(width: int, count: int) -> tuple[str, int]:
    size = width // count
    if size * count != width or size not in (1, 2, 4, 8):
        raise UnknownInstruction(f"a {width}-byte value in {count} parts")
    return {1: "b8", 2: "b16", 4: "b32", 8: "b64"}[size], size


def _view(w: Lanes, slot: int, size: int) -> np.ndarray:
    return {1: w.b, 2: w.w}[size][slot] if size < 4 else w.u[slot].view(f"u{size}").reshape(w.n, -1)


def _pack(d: Decoder, target: int, value: Vector, width: int) -> Run:
    type_name, size = _parts(width, len(value.items))
    sources = [d.source(item, type_name) for item in value.items]

    def run(w: Lanes, m: Any) -> None:
        out = _view(w, target, size)
        parts = [w.u[s].copy() if s == target else w.u[s] for s in sources]
        for column, part in enumerate(parts):
            if m is None:
                out[:, column] = part
            else:
                out[m, column] = part[m]

    return run


def _unpack(d: Decoder, to: Vector, source: int, width: int) -> Run:
    _, size = _parts(width, len(to.items))
    targets = [d.sink(item) for item in to.items]

    def run(w: Lanes, m: Any) -> None:
        value = _view(w, source, size)
        for column, target in enumerate(targets):
            if target is None:
                continue
            if m is None:
                w.u[target][...] = value[:, column]
            else:
                w.u[target][m] = value[m, column]

    return run
