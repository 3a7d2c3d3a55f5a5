"""What the simulator raises. Every error names the instruction, its Python source line and the lanes concerned."""

from __future__ import annotations


class SimulatorError(Exception):
    """Base of everything that goes wrong while a kernel is simulated.

    The machine adds `where` (kernel, CTA, warp, PTX line, Python line) as the error passes through it, so that the code
    that detects a fault need only say what the fault is. `kind` is what a report files the error under.
    """

    kind = "error"

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message
        self.where: str | None = None

    def __str__(self) -> str:
        return self.message if self.where is None else f"{self.message}\n{self.where}"


class UnknownInstruction(SimulatorError):
    """A PTX form that the simulator does not execute. Nothing is ever skipped silently."""

    kind = "unknown instruction"


class MemoryFault(SimulatorError):
    """An access out of bounds, misaligned, or outside every registered allocation."""

    kind = "memory fault"


class UninitializedRead(SimulatorError):
    """Shared memory or TMEM read before anything was written there."""

    kind = "uninitialised read"


class BarrierMisuse(SimulatorError):
    """An mbarrier or named barrier used against its rules: before init, too many arrivals, bytes left at exit."""

    kind = "barrier misuse"


class Deadlock(SimulatorError):
    """No warp can proceed and nothing asynchronous is left to happen."""

    kind = "deadlock"


class ResourceError(SimulatorError):
    """TMEM not freed or allocated against its rules, a register budget exceeded, a launch that does not fit."""

    kind = "resource misuse"


class ScheduleDependence(SimulatorError):
    """Two legal schedules of the same launch gave different results."""

    kind = "schedule-dependent result"


class HazardError(SimulatorError):
    """A register or memory touched while an asynchronous operation still owns it."""

    kind = "hazard"


class DataRace(HazardError):
    """Two accesses to the same bytes, one of them a write, that nothing orders."""

    kind = "race"


class MissingFence(HazardError):
    """Accesses that are ordered, but lack the proxy fence that makes the first visible to the second, or `wgmma.fence`."""

    kind = "missing fence"


class WrongResult(SimulatorError):
    """The kernel's output is not what the caller expects, whatever the schedule."""

    kind = "wrong result"
