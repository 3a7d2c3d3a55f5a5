"""Clusters of one launch on all cores: forked processes each run a share of them and send back the bytes that they wrote.

Only launches whose clusters cannot see one another are spread: nothing cooperative, no atomics, reductions or ordered accesses
to global memory, no clocks, no observers, no random schedule (whose choices run on from cluster to cluster). Processes rather
than threads, as what takes time outside of the C code holds the interpreter's lock. The parent's memory stays as it was until
every process is done; if one of them fails, nothing is taken over and the caller runs the clusters one by one, which meets the
same error in the usual way. Bytes that changed are applied in the order of the clusters.
"""

from __future__ import annotations

import os
import pickle
import struct
import time
import warnings
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from dsv4lab.sim.startup import TIMERS

if TYPE_CHECKING:
    from dsv4lab.sim.machine import Machine
    from dsv4lab.sim.program import Kernel

PROCESSES = "DSV4LAB_SIM_PROCESSES"  # environment: how many; by default one for each core
WORTHWHILE = 0.5  # seconds of work below which processes are not started
_MOST_BYTES = 1 << 30  # of global memory that is compared for what was written
_ORDERED = ("volatile", "relaxed", "acquire", "release", "acq_rel", "mmio")
_LOCAL = ("shared", "shared::cta", "shared::cluster", "local", "param")
_TOGETHER = ("atom", "red", "clusterlaunchcontrol", "tensormap", "multimem")


def processes() -> int:
    """How many processes to use."""
    given = os.environ.get(PROCESSES)
    if given is not None:
        if not given.isdigit() or not int(given):
            raise ValueError(f"{PROCESSES} must be a positive number, got {given!r}")
        return int(given)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def independent(kernel: Kernel) -> bool:
    """Whether no instruction lets one cluster see or order what another does."""
    for instruction in kernel.instructions:
        parts = instruction.opcode.split(".")
        if parts[0] in ("atom", "red") and any(part in _LOCAL for part in parts):
            continue
        if parts[0] in _TOGETHER or "reduce" in parts[:2]:
            return False
        ordered = parts[0] in ("ld", "st") and any(part in _ORDERED for part in parts)
        if ordered and not any(part in _LOCAL for part in parts):
            return False
        if any(str(operand) in TIMERS for operand in instruction.operands):
            return False
    return not kernel.constants


def may_spread(machine: Machine) -> bool:
    """Whether the clusters of the machine's launch may run in processes of their own."""
    return (
        machine.resident == 1
        and not machine.observers
        and machine.schedule.kind != "random"
        and hasattr(os, "fork")
        and sum(allocation.size for allocation in machine.memory.allocations) <= _MOST_BYTES
        and independent(machine.launch.kernel)
    )


def spread(machine: Machine, workers: int) -> bool:
    """Run all waiting clusters in processes. False, and nothing has changed, if one of them failed."""
    waiting = list(machine.waiting_clusters)
    workers = min(workers, len(waiting))
    edges = [len(waiting) * n // workers for n in range(workers + 1)]
    children: list[tuple[int, int]] = []
    results: list[Any] = []
    try:
        for low, high in pairwise(edges):
            children.append(_start(machine, low, high))
    except OSError:
        pass  # no more processes: what was started is collected, and the caller runs everything
    for process, pipe in children:
        results.append(_collect(process, pipe))
    if len(results) < workers or any(result is None for result in results):
        return False
    for written, counts, printed in results:
        for allocation, (places, values) in zip(machine.memory.allocations, written, strict=True):
            allocation.data[allocation.lead :][places] = values
        machine.stats.instructions += counts[0]
        machine.stats.ctas += counts[1]
        machine.stats.async_operations += counts[2]
        machine.printed += printed
    machine.waiting_clusters.clear()
    return True


def _start(machine: Machine, low: int, high: int) -> tuple[int, int]:
    """Fork a process for the waiting clusters low .. high - 1: (its id, the pipe that its result comes through)."""
    reading, writing = os.pipe()
    with warnings.catch_warnings():  # other threads' locks may be held in the child, which takes none but its own
        warnings.simplefilter("ignore", DeprecationWarning)
        process = os.fork()
    if process:
        os.close(writing)
        return process, reading
    status = 1
    try:
        os.close(reading)
        _send(writing, pickle.dumps(_share(machine, low, high)))
        status = 0
    finally:
        os._exit(status)  # neither buffers nor exit handlers of the parent's are this process's to run


def _share(machine: Machine, low: int, high: int) -> Any:
    allocations, stats = machine.memory.allocations, machine.stats
    # What lies before a tensor in its view is malloc's bookkeeping, which the child's own allocations change.
    before = [allocation.data[allocation.lead :].copy() for allocation in allocations]
    machine.printed = []
    waiting = machine.waiting_clusters
    chosen = list(waiting)[low:high]
    ahead = stats.instructions, stats.ctas + low * int(np.prod(machine.launch.cluster)), stats.async_operations
    stats.ctas = ahead[1]
    waiting.clear()
    waiting.extend(chosen)
    machine.run_clusters()
    if len(machine.memory.allocations) != len(allocations):  # tensors found on the way: the parent does not know them
        raise RuntimeError("memory was found during the run")
    written = []
    for allocation, old in zip(allocations, before, strict=True):
        data = allocation.data[allocation.lead :]
        places = np.flatnonzero(data != old)
        written.append((places, data[places]))
    counts = stats.instructions - ahead[0], stats.ctas - ahead[1], stats.async_operations - ahead[2]
    return written, counts, machine.printed


def _send(pipe: int, data: bytes) -> None:
    view = memoryview(struct.pack("<Q", len(data)) + data)
    while view:
        view = view[os.write(pipe, view) :]


def _collect(process: int, pipe: int) -> Any:
    """A process's result; None if it ended without one."""
    with os.fdopen(pipe, "rb") as stream:
        data = stream.read()
    _, status = os.waitpid(process, 0)
    if status or len(data) < 8 or len(data) != 8 + struct.unpack("<Q", data[:8])[0]:
        return None
    return pickle.loads(data[8:])  # from our own fork


class Pace:
    """How long the clusters that ran have taken, to tell whether the others are worth processes."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.start = time.perf_counter()
        self.total = len(machine.waiting_clusters)
        self.count = processes() if self.total > 2 else 1

    def worthwhile(self) -> bool:
        machine = self.machine
        left = len(machine.waiting_clusters)
        done = self.total - left - len(machine.clusters)
        if self.count < 2 or left < 2 or done < 1 or machine.clusters:
            return False
        if (time.perf_counter() - self.start) / done * left <= WORTHWHILE:
            return False
        if not may_spread(machine):
            self.count = 1
        return self.count > 1
