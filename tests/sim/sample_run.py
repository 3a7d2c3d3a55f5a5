"""Run one unmodified CUDA-torch CuTeDSL script under several schedules: python sample_run.py [options] SCRIPT [its arguments].

A schedule is eager, lazy, random:SEED, or races: eager, with data races and missing fences looked for and collected.
The script is imported and compiled once. At its first launch the process forks, once for each schedule, so that every schedule
sees the same inputs and the script's own check decides about each. Prints one line of JSON for each schedule, after `RESULT `.
"""

from __future__ import annotations

import argparse
import json
import os
import runpy
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from dsv4lab.sim import execute, script, session
from dsv4lab.sim.fake_gpu import fake_gpu
from dsv4lab.sim.races import RaceChecker

PREFIX = "RESULT "


class Forks:
    """The launch handler: forks at the first launch, executes every launch in the children."""

    def __init__(self, schedules: list[str], limit: float, checks: script.Checks) -> None:
        self.schedules = schedules
        self.limit = limit
        self.checks = checks
        self.schedule: str | None = None  # set in a child
        self.launches = self.instructions = 0
        self.seconds = 0.0
        self.races: list[str] = []

    def __call__(self, launch: Any) -> None:
        if self.schedule is None:
            self._fork()
        assert self.schedule is not None
        self.launches += 1
        kind, _, seed = self.schedule.partition(":")
        start = time.perf_counter()
        checker = RaceChecker(collect=True) if kind == "races" else None
        observers = [] if checker is None else [checker]
        order = "eager" if kind == "races" else kind
        done = execute(launch, schedule=order, seed=int(seed or 0), checks=self.checks, observers=observers)
        if checker is not None:
            self.races += [str(finding) for finding in checker.findings]
        self.seconds += time.perf_counter() - start
        self.instructions += done.stats.instructions

    def _fork(self) -> None:
        """Returns in each child; the parent reports for children that die or outlast the limit, and ends."""
        for schedule in self.schedules:
            sys.stdout.flush()
            child = os.fork()
            if not child:
                self.schedule = schedule
                return
            complaint = _wait(child, self.limit)
            if complaint:
                report(schedule, error=complaint)
        os._exit(0)


def _wait(child: int, limit: float) -> str:
    """Wait for a child; returns what is wrong if it did not end by itself with status 0."""
    end = time.monotonic() + limit
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            code = os.waitstatus_to_exitcode(status)
            return "" if code == 0 else f"the process ended with status {code}"
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return f"timeout after {limit:.0f} s"


def report(schedule: str, **facts: Any) -> None:
    print(f"\n{PREFIX}{json.dumps({'schedule': schedule, **facts})}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--arch", default="sm_90a")
    parser.add_argument("--schedules", default="eager", help="comma-separated: eager, lazy, random:SEED, races")
    parser.add_argument("--skip", default="", help="comma-separated checks to leave out")
    parser.add_argument("--multiprocessors", type=int, default=1)
    parser.add_argument("--limit", type=float, default=600, help="seconds that one schedule may take")
    parser.add_argument("script")
    parser.add_argument("arguments", nargs=argparse.REMAINDER)
    options = parser.parse_args()
    library = str(script.aligned_allocator())
    if os.environ.get("LD_PRELOAD") != library:  # start again with an allocator that aligns as cudaMalloc does
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, "LD_PRELOAD": library})

    simulator = session.enable(options.arch, multiprocessors=options.multiprocessors)
    sys.argv = [options.script, *options.arguments]
    sys.path.insert(0, str(Path(options.script).resolve().parent))
    checks = script.checks_without([name for name in options.skip.split(",") if name])
    forks = Forks(options.schedules.split(","), options.limit, checks)
    with fake_gpu(options.arch, multiprocessors=options.multiprocessors), session.handling(simulator, forks):
        error = _run(options.script)
    if forks.schedule is None:
        report("none", error=error, launches=0)
    else:
        report(
            forks.schedule,
            error=error,
            launches=forks.launches,
            instructions=forks.instructions,
            seconds=round(forks.seconds, 3),
            races=forks.races,
        )
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _run(path: str) -> str | None:
    """Run the file; what ended it, None where that was its last line."""
    try:
        runpy.run_path(path, run_name="__main__")
    except SystemExit as stop:
        return f"SystemExit: {stop.code}" if stop.code not in (None, 0) else None
    except BaseException as failure:
        traceback.print_exc()
        return f"{type(failure).__name__}: {failure}"
    return None


if __name__ == "__main__":
    main()
