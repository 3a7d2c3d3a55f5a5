"""Run one unmodified CUDA-torch CuTeDSL script under several schedules: python sample_run.py [options] SCRIPT [its arguments].

The script is imported and compiled once. At its first launch the process forks, once for each schedule, so that every schedule
sees the same inputs and the script's own check decides about each. Prints one line of JSON for each schedule, after `RESULT `.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import signal
import sys
import time
from pathlib import Path
from typing import Any

import run_script

PREFIX = "RESULT "


class Forks:
    """The launch handler: forks at the first launch, executes every launch in the children."""

    def __init__(self, schedules: list[str], limit: float) -> None:
        self.schedules = schedules
        self.limit = limit
        self.schedule: str | None = None  # set in a child
        self.launches = self.instructions = 0
        self.seconds = 0.0

    def __call__(self, launch: Any) -> None:
        from dsv4lab import sim

        if self.schedule is None:
            self._fork()
        assert self.schedule is not None
        self.launches += 1
        kind, _, seed = self.schedule.partition(":")
        start = time.perf_counter()
        done = sim.execute(launch, schedule=kind, seed=int(seed or 0))
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
    parser.add_argument("--schedules", default="eager", help="comma-separated: eager, lazy, random:SEED")
    parser.add_argument("--limit", type=float, default=600, help="seconds that one schedule may take")
    parser.add_argument("--memory", type=float, default=0, help="GiB of address space; 0: no limit")
    parser.add_argument("script")
    parser.add_argument("arguments", nargs=argparse.REMAINDER)
    options = parser.parse_args()
    run_script._with_aligned_allocations()
    if options.memory:
        resource.setrlimit(resource.RLIMIT_AS, (int(options.memory * 2**30),) * 2)
    run_script.fake_gpu(options.arch)

    from dsv4lab import sim
    from dsv4lab.sim.session import current, handling

    sim.enable(options.arch, multiprocessors=1)
    run_script._replace_benchmarks()
    sys.argv = [options.script, *options.arguments]
    sys.path.insert(0, str(Path(options.script).parent))
    forks = Forks(options.schedules.split(","), options.limit)
    error = None
    with handling(current(), forks):
        try:
            run_script.runpy.run_path(options.script, run_name="__main__")
        except SystemExit as stop:
            error = f"SystemExit: {stop.code}" if stop.code not in (None, 0) else None
        except BaseException as failure:
            import traceback

            traceback.print_exc()
            error = f"{type(failure).__name__}: {failure}"
    if forks.schedule is None:
        report("none", error=error, launches=0)
    else:
        report(
            forks.schedule,
            error=error,
            launches=forks.launches,
            instructions=forks.instructions,
            seconds=round(forks.seconds, 3),
        )
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
