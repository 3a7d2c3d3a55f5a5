"""Hopper's kernels in a notebook: on the GPU where there is one, in the simulator elsewhere; and what launches use.

`running` and `launching` let one cell do both. On a GPU no launches are collected; `schedules` says what there is to run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from dsv4lab import sim
from dsv4lab.dispatch import Backend, backend
from dsv4lab.lab.roofline import Ceilings, Work
from dsv4lab.lab.timing import time_interleaved

ARCH = "sm_90a"
REGISTERS, SHARED_KIB = 255, 227  # the most that a thread, and a CTA, may have


class Compiled(Protocol):
    """A compiled kernel as the cache keeps it."""

    @property
    def ptx(self) -> str: ...

    @property
    def cubin(self) -> bytes: ...


@dataclass
class Launches:
    """What was launched inside `launching`; stays empty on a GPU."""

    executed: list[sim.Executed] = field(default_factory=list)


def schedules(device: torch.device) -> tuple[str, ...]:
    """Ways to run a kernel once each: the simulator's two extreme schedules, or the GPU's own."""
    return ("native",) if device.type == "cuda" else ("eager", "lazy")


@contextmanager
def running(device: torch.device, schedule: str = "eager", **options: Any) -> Iterator[Backend]:
    """`dsv4lab.backend("kernel")` on a GPU, else `backend("sim")` for sm_90a. options: the simulator's, without a GPU."""
    how: dict[str, Any] = dict(arch=ARCH, schedule=schedule, **options)
    with backend("kernel") if device.type == "cuda" else backend("sim", **how) as chosen:
        yield chosen


@contextmanager
def launching(device: torch.device, schedule: str = "eager", **options: Any) -> Iterator[Launches]:
    """The same for kernels that are called directly, inside `running_on(host(device))`."""
    if device.type == "cuda":
        yield Launches()
        return
    with sim.simulating(ARCH, schedule=schedule, **options) as runs:
        yield Launches(runs.executed)


def traces(device: torch.device, call: Callable[[], object]) -> list[Any]:
    """Logs of the launches that a call makes on CPU tensors, simulated wherever the notebook runs."""
    recorder = sim.Recorder()
    with backend("sim", arch=ARCH, observers=[recorder]):
        call()
    return list(recorder.traces)


# ---- what launches use -------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Use:
    """One kernel of one launch. shared_kib: dynamic, of a CTA. spill_bytes: stored and loaded, over all instructions once."""

    name: str
    grid: tuple[int, int, int]
    threads: int
    registers: int
    spill_bytes: int
    shared_kib: float
    instructions: int

    def row(self) -> dict[str, Any]:
        """For `table`."""
        return {
            "kernel": self.name,
            "CTAs": self.grid[0] * self.grid[1] * self.grid[2],
            "threads": self.threads,
            "registers": self.registers,
            "spilled": self.spill_bytes,
            "shared KiB": f"{self.shared_kib:.1f}",
            "warp-instr.": self.instructions,
        }


def uses(launches: Sequence[sim.Executed], entries: Iterable[Compiled], names: Sequence[str]) -> list[Use]:
    """Registers, spills and shared memory of simulated launches, in their order.

    entries: compiled kernels among which theirs are, as `map(cache.read, paths)` gives them, newest first to find them soon.
    names: one for each launch. Raises ValueError where there are not as many, LookupError where a kernel is not found.
    """
    if len(names) != len(launches):
        raise ValueError(f"names must be one for each of {len(launches)} launches, got {len(names)}")
    wanted = {one.launch.kernel.source for one in launches}
    cubins: dict[str, bytes] = {}
    for entry in entries:
        if entry.ptx in wanted:
            cubins.setdefault(entry.ptx, entry.cubin)
        if len(cubins) == len(wanted):
            break
    missing = [name for name, one in zip(names, launches, strict=True) if one.launch.kernel.source not in cubins]
    if missing:
        raise LookupError(f"entries must hold every kernel that was launched, got none of {', '.join(missing)}")
    return [_use(name, one, cubins[one.launch.kernel.source]) for name, one in zip(names, launches, strict=True)]


def _use(name: str, one: sim.Executed, cubin: bytes) -> Use:
    launch = one.launch
    static = sim.resources(cubin)[launch.kernel.name]
    threads = launch.block[0] * launch.block[1] * launch.block[2]
    spilled = static.spill_store_bytes + static.spill_load_bytes
    shared = (static.shared_bytes + launch.shared_bytes) / 1024
    return Use(name, launch.grid, threads, static.registers, spilled, shared, one.stats.instructions)


# ---- tables and times --------------------------------------------------------------------------------------------------
def table(rows: Sequence[dict[str, Any]]) -> str:
    """Rows of one set of keys as aligned text: words left, numbers right."""
    if not rows:
        return "(no rows)"
    keys = list(rows[0])
    cells = [[_cell(row[key]) for key in keys] for row in rows]
    width = [max(len(key), *(len(line[i]) for line in cells)) for i, key in enumerate(keys)]
    left = [isinstance(rows[0][key], str) and not rows[0][key][:1].isdigit() for key in keys]
    return "\n".join(_line(line, width, left) for line in (keys, *cells))


def _line(cells: Sequence[str], width: Sequence[int], left: Sequence[bool]) -> str:
    parts = (f"{c:<{w}}" if flag else f"{c:>{w}}" for c, w, flag in zip(cells, width, left, strict=True))
    return "  ".join(parts).rstrip()


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def profile(
    device: torch.device, calls: dict[str, Callable[[], object]], work: dict[str, Work], ceilings: Ceilings, *, rounds: int = 20
) -> list[dict[str, Any]]:
    """Time calls against each other on the GPU, cold, from CUDA graphs -> rows of microseconds and percent of the bound.

    Raises KeyError.
    """
    taken = time_interleaved(calls, device=device, rounds=rounds, graphs=True)
    rows = []
    for name, timing in taken.items():
        low, high = timing.quartiles_s
        rows.append({
            "call": name,
            "us": round(1e6 * timing.median_s, 2),
            "quartiles": f"{1e6 * low:.2f} to {1e6 * high:.2f}",
            "bound us": round(1e6 * work[name].floor_s(ceilings), 2),
            "bound by": work[name].bound(ceilings),
            "% of bound": round(work[name].percent_of_bound(timing.median_s, ceilings), 1),
        })  # fmt: skip
    return rows
