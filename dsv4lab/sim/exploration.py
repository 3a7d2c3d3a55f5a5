"""The same launches under many legal schedules, with every check on: a correct kernel gives one, expected, result.

found = sim.explore(copy, source, target, seeds=5, expect={"target": source})        # raises the first finding
found = sim.explore(copy, source, target, raising=False, first=False)                # or collects all of them
print(found)
"""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dsv4lab.sim import session as _session
from dsv4lab.sim.api import Compiled
from dsv4lab.sim.api import compile as _compile
from dsv4lab.sim.errors import ScheduleDependence, SimulatorError, WrongResult
from dsv4lab.sim.machine import Checks, Machine
from dsv4lab.sim.memory import Allocation, GlobalMemory
from dsv4lab.sim.program import Launch
from dsv4lab.sim.races import RaceChecker
from dsv4lab.sim.schedule import Schedule
from dsv4lab.sim.wgmma_fences import WgmmaFences

Expected = Mapping[str, Any] | Callable[[], str | None]


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong with a kernel.

    kind: what the error class calls itself ("deadlock", "memory fault", "wrong result" ...). schedules: those that show it; any
    of them replays it (`sim.execute(launch, schedule="random", seed=3)` for "random:3"). error: what a run raises.
    """

    kind: str
    error: SimulatorError
    schedules: list[str]

    @property
    def text(self) -> str:
        """The report: what, in which kernel, CTA and warp, at which PTX instruction and Python line."""
        return str(self.error)

    def __str__(self) -> str:
        return f"{self.kind} (schedule {', '.join(self.schedules)})\n{self.text}"


@dataclass
class Exploration:
    """What `explore` found. True if nothing is wrong; printable.

    kernels: names of what was launched. schedules: those that were tried, in order. instructions: warp-instructions of the
    runs that ended. seconds: time of all of them.
    """

    kernels: list[str]
    schedules: list[str] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    instructions: int = 0
    seconds: float = 0.0

    @property
    def kinds(self) -> list[str]:
        """Kinds of the findings, each once, in order of appearance."""
        return list(dict.fromkeys(finding.kind for finding in self.findings))

    def __bool__(self) -> bool:
        return not self.findings

    def __str__(self) -> str:
        what = (
            f"{', '.join(self.kernels)}: {len(self.schedules)} schedules in {self.seconds:.2f} s ({', '.join(self.schedules)})"
        )
        return "\n".join([what, *(map(str, self.findings) if self.findings else ["nothing is wrong"])])

    def add(self, error: SimulatorError, schedule: str) -> None:
        """File an error, together with an earlier one of its kind at the same instruction if there is one."""
        for known in self.findings:
            if known.kind == error.kind and _place(known.error) == _place(error):
                known.schedules.append(schedule)
                return
        self.findings.append(Finding(error.kind, error, [schedule]))


def _place(error: SimulatorError) -> list[str]:
    """The first two instructions that an error's report names: both sides of a race."""
    return re.findall(r"\(instruction (\d+),", str(error))[:2]


def schedules(seeds: int | Iterable[int]) -> list[Schedule]:
    """Eager, lazy, and random ones: as many as `seeds` says, or those seeds."""
    numbers = range(seeds) if isinstance(seeds, int) else seeds
    return [Schedule("eager"), Schedule("lazy"), *(Schedule("random", seed) for seed in numbers)]


def explore(
    kernel: Launch | Sequence[Launch] | Compiled | Callable[..., Any],
    *tensors: Any,
    seeds: int | Iterable[int] = 5,
    checks: Checks | None = None,
    expect: Expected | None = None,
    rtol: float = 0.0,
    atol: float = 0.0,
    ignore: Sequence[str] = (),
    memory: GlobalMemory | None = None,
    raising: bool = True,
    first: bool = True,
) -> Exploration:
    """Run a kernel under every schedule from the same initial memory; report faults and results that differ or are wrong.

    kernel: a host function (compiled for the enabled architecture), what `sim.compile` returned, or captured launches, which
        run one after another. tensors: the host function's arguments; none for launches.
    seeds: how many random schedules besides eager and lazy, or which.
    checks: what is watched, by default everything, races and missing fences too.
    expect: the right result. Either tensors or arrays by name of the argument (of the allocation, for launches), compared with
        |got - expected| <= atol + rtol |expected|; or a function that is called after each run and returns what is wrong, if
        anything. Without it only differences between schedules show.
    ignore: names of tensors that may depend on the schedule (sums by floating-point atomics, say).
    memory: what launches may touch, by default every live tensor.
    raising: raise the first finding's error; else return it. first: stop at the first finding; else try every schedule, and let
        a run go on after a race or a missing fence.

    Memory is restored before every run and holds the last one's result afterwards. A result that is wrong under every schedule
    is a "wrong result"; one that two schedules disagree about is a "schedule-dependent result", right or not.
    """
    launches, memory, names = _launches(kernel, tensors, memory)
    check = _checker(expect, memory, names, rtol, atol)
    run = _Run(launches, memory, checks or Checks(races=True, residency=True), ignore, check, collect=not (first or raising))
    found = Exploration([launch.kernel.name for launch in launches])
    start = time.perf_counter()
    for schedule in schedules(seeds):
        found.schedules.append(str(schedule))
        try:
            run.once(schedule)
        except SimulatorError as error:
            run.errors.append(error)
        for each in run.errors:
            found.add(each, str(schedule))
        if found.findings and (first or raising):
            break
    else:
        if run.wrong is not None and not any(finding.kind == ScheduleDependence.kind for finding in found.findings):
            found.add(WrongResult(f"{', '.join(found.kernels)}: {run.wrong[1]}"), run.wrong[0])
    found.instructions, found.seconds = run.instructions, time.perf_counter() - start
    if raising and found.findings:
        raise found.findings[0].error
    return found


def _launches(
    kernel: Any, tensors: tuple[Any, ...], memory: GlobalMemory | None
) -> tuple[list[Launch], GlobalMemory, dict[str, Any]]:
    """The launches, the memory they may touch, and the host function's arguments by name."""
    names: dict[str, Any] = {}
    if isinstance(kernel, Launch):
        kernel = [kernel]
    if isinstance(kernel, Sequence):
        if tensors:
            raise TypeError(f"captured launches hold their arguments already, got {len(tensors)} more")
        launches = list(kernel)
    else:
        compiled = kernel if isinstance(kernel, Compiled) else _compile(kernel, *tensors, arch=_session.current().arch)
        names = compiled.names(tensors)
        launches = compiled.capture(*tensors)
    if not launches:
        raise ValueError("explore needs at least one kernel launch, got none")
    return launches, memory or _session.current().tensors.memory(names), names


class _Run:
    """Launches that are run again and again from the same memory, and how their results compare."""

    def __init__(
        self,
        launches: list[Launch],
        memory: GlobalMemory,
        checks: Checks,
        ignore: Sequence[str],
        check: Callable[[], str | None],
        *,
        collect: bool,
    ) -> None:
        self.launches, self.memory, self.ignore, self.check = launches, memory, ignore, check
        self.collect = collect and checks.races  # races are kept in `errors`, and do not end a run
        self.machine = Machine(memory, checks=replace(checks, races=checks.races and not collect))
        self.errors: list[SimulatorError] = []
        self.instructions = 0
        self.before: dict[int, NDArray[np.uint8]] = {}
        self.first: tuple[str, dict[int, NDArray[np.uint8]]] | None = None  # the first complete run and its result
        self.wrong: tuple[str, str] | None = None  # the first run whose result is not the expected one, and how it differs
        for allocation in memory.allocations:
            self._keep(allocation)
        memory.added = self._keep  # memory that is found only when a kernel reaches for it is still as it was

    def _keep(self, allocation: Allocation) -> None:
        data, start = allocation.own.copy(), allocation.start
        for other, old in self.before.items():
            if start <= other < start + len(data):
                data[other - start :][: len(old)] = old
        self.before[start] = data

    def once(self, schedule: Schedule) -> None:
        """One run. Raises what it runs into, or ScheduleDependence; `errors` holds what did not end the run."""
        self.errors = []
        for allocation in self.memory.allocations:
            allocation.own[...] = self.before[allocation.start]
        self.machine.schedule = schedule
        for launch in self.launches:
            self._launch(launch)
        if self.wrong is None and (why := self.check()) is not None:
            self.wrong = (str(schedule), why)
        if self.first is None:
            self.first = (str(schedule), {a.start: a.own.copy() for a in self.memory.allocations})
        else:
            self._compare(str(schedule), *self.first)

    def _launch(self, launch: Launch) -> None:
        collectors: list[RaceChecker | WgmmaFences] = []
        if self.collect:
            collectors = [RaceChecker(collect=True), WgmmaFences(collect=True)]
        self.machine.observers.extend(collectors)
        try:
            self.instructions += self.machine.run(launch).instructions
        finally:
            del self.machine.observers[len(self.machine.observers) - len(collectors) :]
            self.errors += [error for collector in collectors for error in collector.findings]

    def _compare(self, schedule: str, other: str, result: dict[int, NDArray[np.uint8]]) -> None:
        for allocation in self.memory.allocations:
            expected = result.get(allocation.start, self.before[allocation.start])
            differs = allocation.own != expected
            if allocation.name not in self.ignore and differs.any():
                where = allocation.describe(allocation.lead + int(np.flatnonzero(differs)[0]))
                raise ScheduleDependence(
                    f"{self.launches[-1].kernel.name}: {int(differs.sum())} bytes of {allocation.name} depend on the schedule: "
                    f"{where} differs between {other} and {schedule}"
                )


def _checker(
    expect: Expected | None, memory: GlobalMemory, names: Mapping[str, Any], rtol: float, atol: float
) -> Callable[[], str | None]:
    """A function that says what is wrong with the result now in memory."""
    if expect is None:
        return lambda: None
    if callable(expect):
        return expect
    known = {name: names[name] for name in expect if name in names}
    known |= {a.name: a for a in memory.allocations if a.name in expect and a.name not in known}
    missing = [name for name in expect if name not in known]
    if missing:
        there = list(names) or [allocation.name for allocation in memory.allocations]
        raise ValueError(f"expect names {', '.join(missing)}, but the tensors are {', '.join(there)}")

    def check() -> str | None:
        for name, expected in expect.items():
            got = known[name]
            wanted = _numbers(expected)
            why = _difference(_numbers(_tensor(got, expected) if isinstance(got, Allocation) else got), wanted, rtol, atol)
            if why is not None:
                return f"{name}{why}"
        return None

    return check


def _tensor(allocation: Allocation, expected: Any) -> NDArray[Any]:
    """An allocation read as elements of the expected array's type."""
    extent, dtype = allocation.extent, np.asarray(expected).dtype
    data = allocation.own
    if dtype.itemsize != extent.element_bytes:
        raise ValueError(
            f"{allocation.name} has elements of {extent.element_bytes} bytes, the expected array of {dtype.itemsize}"
        )
    return np.ndarray(extent.shape, dtype, data.data, strides=tuple(dtype.itemsize * s for s in extent.strides))


def _numbers(value: Any) -> NDArray[np.float64]:
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(value, torch.Tensor):
        value = value.detach().to(torch.float64).numpy()
    return np.asarray(value, np.float64)


def _difference(got: NDArray[np.float64], wanted: NDArray[np.float64], rtol: float, atol: float) -> str | None:
    """How two arrays differ, in words; None where they agree."""
    if got.shape != wanted.shape:
        raise ValueError(f"the expected result must have the tensor's shape {got.shape}, got {wanted.shape}")
    bad = ~np.isclose(got, wanted, rtol=rtol, atol=atol, equal_nan=True)
    if not bad.any():
        return None
    index = tuple(int(i) for i in np.argwhere(bad)[0])
    return (
        f"[{', '.join(map(str, index))}] is {got[index]:g}, expected {wanted[index]:g}; "
        f"{int(bad.sum())} of {bad.size} elements are wrong"
    )
