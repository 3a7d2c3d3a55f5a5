"""Run a CuTeDSL script written for a GPU, unmodified, in the simulator: what `dsv4lab sim SCRIPT` does.

`run_script` runs it in this process, with torch's "cuda" redirected to the CPU until it ends. The command line starts a process
of its own for it (`restart`), whose allocator aligns tensors as cudaMalloc does: some scripts assert that.
"""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from dsv4lab.sim import api, exploration, session, shim
from dsv4lab.sim.errors import SimulatorError
from dsv4lab.sim.fake_gpu import fake_gpu
from dsv4lab.sim.machine import Checks
from dsv4lab.sim.program import Kernel, Launch
from dsv4lab.sim.races import RaceChecker
from dsv4lab.sim.schedule import Schedule
from dsv4lab.sim.wgmma_fences import WgmmaFences

ALWAYS_CHECKED = ("bounds", "alignment", "barrier rules", "deadlock")
_ALIGN_SOURCE = """
#include <malloc.h>
int posix_memalign(void **pointer, size_t alignment, size_t size) {
    if (alignment >= 64 && alignment < 512) alignment = 512; /* as cudaMalloc; torch asks for 64 */
    *pointer = memalign(alignment, size);
    return *pointer ? 0 : 12;
}
"""
_ALIGN_LIBRARY = "aligned.so"


@dataclass
class Outcome:
    """What a script did. findings: (kind, report) of every fault of a kernel. error: what ended the script, if it failed.

    kernels: what was launched; launches: how often each, by name. simulated_s: seconds in kernels; total_s: with compilation
    and the script's own work.
    """

    script: str
    arch: str
    schedules: list[str]
    checks: list[str]
    launches: dict[str, int] = field(default_factory=dict)
    instructions: int = 0
    simulated_s: float = 0.0
    total_s: float = 0.0
    findings: list[tuple[str, str]] = field(default_factory=list)
    error: str | None = None
    kernels: list[Kernel] = field(default_factory=list, repr=False)

    @property
    def ok(self) -> bool:
        return self.error is None and not self.findings

    def add(self, *findings: tuple[str, str]) -> None:
        """File findings, each once however many launches show it."""
        self.findings += [one for one in dict.fromkeys(findings) if one not in self.findings]

    def __str__(self) -> str:
        count = sum(self.launches.values())
        rate = f", {self.instructions / self.simulated_s:,.0f} a second" if self.simulated_s else ""
        lines = [
            f"{self.script} on {self.arch}: {count} kernel launch{'' if count == 1 else 'es'}, "
            f"{self.instructions:,} warp-instructions "
            f"in {self.simulated_s:.2f} s{rate}; {self.total_s:.1f} s in all",
            *(f"  {times} x {name}" for name, times in self.launches.items()),
            f"schedules: {', '.join(self.schedules)}",
            f"checked: {', '.join(self.checks)}",
        ]
        for kind, text in self.findings:
            lines.append(f"found: {kind}")
            lines += [f"  {line}" for line in text.splitlines()]
        if not self.findings:
            lines.append("found: nothing")
        if self.error is not None:
            lines.append(f"the script failed: {self.error}")
        return "\n".join(lines)


def run_script(
    script: str | Path,
    arguments: Sequence[str] = (),
    *,
    arch: str,
    schedule: str = "eager",
    explore: int | None = None,
    checks: Checks | None = None,
    multiprocessors: int | None = None,
) -> Outcome:
    """Run a script as `__main__` and its kernels in the simulator.

    arch: "sm_90a" or "sm_100a". schedule: "eager", "lazy" or "random:SEED". explore: instead, every launch under eager, lazy
        and that many random schedules, all findings collected. multiprocessors: what the script is told of the GPU, by default
        what the real one has.
    Raises ValueError on a schedule or a number that cannot be; an exception of the script ends in the outcome.
    """
    checks = checks or Checks()
    simulator = session.enable(arch, multiprocessors=multiprocessors)
    order = plan(schedule, explore)
    watched = [*ALWAYS_CHECKED, *(name.replace("_", " ") for name in _switches() if getattr(checks, name))]
    outcome = Outcome(str(script), arch, [str(one) for one in order], watched)

    def on_launch(launch: Launch) -> None:
        outcome.launches[launch.kernel.name] = outcome.launches.get(launch.kernel.name, 0) + 1
        if not any(launch.kernel is known for known in outcome.kernels):
            outcome.kernels.append(launch.kernel)
        if explore is None:
            _execute(launch, order[0], checks, outcome)
        else:
            found = exploration.explore(launch, seeds=explore, checks=checks, raising=False, first=False)
            outcome.add(*((finding.kind, str(finding)) for finding in found.findings))
            outcome.instructions += found.instructions
            outcome.simulated_s += found.seconds

    saved = sys.argv, list(sys.path)
    sys.argv = [str(script), *arguments]
    sys.path.insert(0, str(Path(script).resolve().parent))
    start = time.perf_counter()
    try:
        with fake_gpu(arch, multiprocessors=simulator.multiprocessors), session.handling(simulator, on_launch):
            outcome.error = _run(str(script), outcome)
    finally:
        sys.argv, sys.path[:] = saved
        outcome.total_s = time.perf_counter() - start
    return outcome


def _execute(launch: Launch, schedule: Schedule, checks: Checks, outcome: Outcome) -> None:
    """Run a launch once; races and missing fences are filed and do not stop it."""
    collectors: list[RaceChecker | WgmmaFences] = []
    if checks.races:
        collectors = [RaceChecker(collect=True), WgmmaFences(collect=True)]
    settings: dict[str, Any] = {"schedule": schedule.kind, "seed": schedule.seed, "checks": replace(checks, races=False)}
    try:
        done = api.execute(launch, observers=collectors, **settings)
        outcome.instructions += done.stats.instructions
        outcome.simulated_s += done.seconds
    finally:
        outcome.add(*((error.kind, str(error)) for collector in collectors for error in collector.findings))


def plan(schedule: str, explore: int | None) -> list[Schedule]:
    """The schedules of every launch. Raises ValueError on a name or number that cannot be."""
    if explore is None:
        return [Schedule.parse(schedule)]
    if schedule != "eager":
        raise ValueError(f"explore chooses the schedules: give it or a schedule, got {schedule!r} too")
    if explore < 0:
        raise ValueError(f"explore must be >= 0 random schedules, got {explore}")
    return exploration.schedules(explore)


def checks_without(names: Sequence[str], *, races: bool = False) -> Checks:
    """All checks but these; races and residency only where asked for. Raises ValueError naming the known ones."""
    unknown = [name for name in names if name not in _switches()]
    if unknown:
        raise ValueError(f"checks to skip must be among {', '.join(_switches())}, got {', '.join(unknown)}")
    return Checks(**{"races": races, "residency": races} | dict.fromkeys(names, False))


def _switches() -> list[str]:
    return [f.name for f in fields(Checks) if isinstance(f.default, bool)]


def _run(script: str, outcome: Outcome) -> str | None:
    """Run the file; what ended it, None where that was its last line."""
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as stop:
        return None if stop.code in (None, 0) else f"exit status {stop.code}"
    except SimulatorError as error:
        traceback.print_exc()
        outcome.add((error.kind, str(error)))
        return f"{type(error).__name__} in a kernel"
    except Exception as error:
        traceback.print_exc()
        return f"{type(error).__name__}: {error}"
    return None


def restart(argv: Sequence[str]) -> int | None:
    """Run the command `dsv4lab ARGV` in a process whose tensors begin at multiples of 512 bytes; its exit status.

    None, and nothing is run, where this process is such a one already.
    """
    library = str(aligned_allocator())
    preloaded = os.environ.get("LD_PRELOAD", "")
    if library in preloaded.split(":"):
        return None
    environment = {**os.environ, "LD_PRELOAD": f"{preloaded}:{library}" if preloaded else library}
    sys.stdout.flush()
    return subprocess.run([sys.executable, "-m", "dsv4lab.cli", *argv], env=environment, check=False).returncode


def aligned_allocator() -> Path:
    """The library to preload so that tensors begin at multiples of 512 bytes, built if it is not in the cache."""
    library = shim.cache_folder() / _ALIGN_LIBRARY
    if not library.exists():
        compiler = shim.find_compiler()
        if compiler is None:
            raise shim.ShimError(f"the aligning allocator needs a C compiler once: {shim.REMEDY}")
        library.parent.mkdir(parents=True, exist_ok=True)
        scratch = library.with_suffix(f".{os.getpid()}")
        command = [*compiler, "-O2", "-shared", "-fPIC", "-x", "c", "-", "-o", str(scratch)]
        subprocess.run(command, input=_ALIGN_SOURCE, text=True, check=True)
        scratch.replace(library)
    return library


def write(outcome: Outcome, *, summary: Path | None, ptx: Path | None) -> None:
    """The outcome as JSON, and the PTX of each kernel as SCRIPT.N.ptx in a folder; None: not written."""
    if summary is not None:
        facts = {f.name: getattr(outcome, f.name) for f in fields(outcome) if f.name != "kernels"}
        summary.write_text(json.dumps({**facts, "ok": outcome.ok}, indent=1) + "\n", encoding="utf-8")
    if ptx is not None:
        ptx.mkdir(parents=True, exist_ok=True)
        for number, kernel in enumerate(outcome.kernels):
            (ptx / f"{Path(outcome.script).stem}.{number}.ptx").write_text(kernel.source, encoding="utf-8")
