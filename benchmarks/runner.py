"""The benchmarks' command line: compile, then measure each suite in a process of its own, and write one JSON object a line.

The file of rows changes when a suite has ended, all at once; until then the suite's rows lie beside it, in NAME.SUITE.part.
Those of a run that was stopped are taken by the suite's next run, or by `--merge NAME.SUITE.part`.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import common, compiling, counters, rows
from benchmarks.common import Bench, Broken, Ceilings, Stopwatch
from dsv4lab.lab.baselines import Row, rows_of

BASELINES = common.ROOT / "benchmarks" / "baselines"
_SCRIPT = common.ROOT / "benchmarks" / "run.py"


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser().parse_args(arguments)
    suites = options.only.split(",") if options.only else list(compiling.SUITES)
    unknown = [suite for suite in suites if suite not in compiling.SUITES]
    if unknown:
        raise SystemExit(f"--only must name some of {', '.join(compiling.SUITES)}, got {', '.join(unknown)}")
    if options.list:
        list_cases(suites, options)
        return
    if options.merge:
        merge(options)
        return
    if options.child:
        measure(suites[0], options)
        return
    if not (options.compile_only or torch.cuda.is_available()):
        raise SystemExit("a GPU must be there to measure, but torch sees no CUDA device; --compile-only needs none")
    if options.counters and (whole := [suite for suite in suites if suite in counters.WHOLE]):
        raise SystemExit(f"--counters is for single calls, got {', '.join(whole)}; --only names other suites")
    if not options.no_compile:
        failures = compiling.compile_all(suites, quick=options.quick, match=options.match, processes=options.jobs)
        if options.compile_only:
            raise SystemExit(1 if failures else 0)
    if options.counters:
        raise SystemExit(max(alone(counters.report, suite, command(suite, os.devnull, options)) for suite in suites))
    out = Path(options.out) if options.out else default_path(torch.cuda.get_device_name())
    out.parent.mkdir(parents=True, exist_ok=True)
    ended = {suite: run(suite, out, options) for suite in suites}
    bad = {suite: status for suite, status in ended.items() if status}
    print(f"{out}: {len(rows_of(out))} rows", flush=True)
    if bad:
        raise SystemExit(f"suites that ended badly: {', '.join(f'{suite} (status {status})' for suite, status in bad.items())}")


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(prog="benchmarks/run.py", description=__doc__)
    found.add_argument("out", nargs="?", help="file for the rows, .jsonl or .jsonl.xz; by default baselines/<device>.jsonl.xz")
    found.add_argument("--only", default="", help=f"suites, comma between: {','.join(compiling.SUITES)}")
    found.add_argument("--quick", action="store_true", help="a few token counts and shapes only")
    found.add_argument("--match", default="", help='measure only what has this in its name, such as "flash" or "wq_b"')
    found.add_argument("--minutes", type=float, default=0.0, help="of a suite: past them no further shape is begun")
    found.add_argument(
        "--append", action="store_true", help="replace what is measured again alone; without it the suites' old rows go"
    )
    found.add_argument(
        "--merge", nargs="+", metavar="FILE", help="measure nothing: put rows of these files into OUT, the newest of each case"
    )
    found.add_argument("--jobs", type=int, help="processes that compile; by default one a core")
    found.add_argument("--compile-only", action="store_true", help="compile the kernels and end; needs no GPU")
    found.add_argument("--no-compile", action="store_true", help="leave compilation to the first calls")
    found.add_argument("--counters", action="store_true", help="no rows: say where kernels' time goes, by `ncu` (counters.py)")
    found.add_argument("--list", action="store_true", help="print what would be measured and end")
    found.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    return found


def list_cases(suites: Sequence[str], options: argparse.Namespace) -> None:
    for suite in suites:
        for case in compiling.SUITES[suite].cases(quick=options.quick):
            print(suite, *(getattr(part, "name", part) for part in case))


def default_path(device: str) -> Path:
    """baselines/h200.jsonl.xz for an "NVIDIA H200"."""
    words = [word for word in device.lower().split() if word != "nvidia"]
    return BASELINES / f"{words[0] if words else 'device'}.jsonl.xz"


def merge(options: argparse.Namespace) -> None:
    """Rows of files into one, which is the baseline of their device unless it is named."""
    absent = [name for name in options.merge if not Path(name).is_file()]
    if absent:
        raise SystemExit(f"--merge must name files, got {', '.join(absent)}")
    new = [row for name in options.merge for row in rows_of(Path(name)) if row.get("benchmark") in compiling.SUITES]
    devices = sorted({str(row.get("device")) for row in new})
    if not new or (len(devices) > 1 and not options.out):
        raise SystemExit(f"--merge needs files with rows of one device, or OUT, got rows of {', '.join(devices) or 'none'}")
    out = Path(options.out) if options.out else default_path(devices[0])
    print(f"{out}: {take(out, new)} rows", flush=True)


def take(out: Path, new: Sequence[Row], *, replaced: str = "") -> int:
    """Put new rows into a file; how many it has then. replaced: a suite whose old rows go; those of no suite go, too."""
    kept = set(compiling.SUITES) - {replaced}
    found = rows.merged([row for row in rows_of(out) if row.get("benchmark") in kept], new)
    rows.write(out, found)
    return len(found)


def run(suite: str, out: Path, options: argparse.Namespace) -> int:
    """Measure a suite and put its rows into a file, in place of its old ones unless it ended badly or found none.

    Returns the exit status.
    """
    part = out.with_name(f"{out.name.split('.jsonl')[0]}.{suite}.part")
    if part.exists():
        rows.write(part, rows_of(part))  # its last line may be half a row
    status = start(suite, part, options)
    if new := rows_of(part):
        take(out, new, replaced="" if options.append or status else suite)
    part.unlink(missing_ok=True)
    return status


def start(suite: str, part: Path, options: argparse.Namespace) -> int:
    """Measure a suite in a process of its own, which an error of the GPU may take with it; its exit status."""
    # a process that is gone hangs nobody: launches outside of graphs are watched
    environment = {"DSV4LAB_WATCHDOG": "60"} | os.environ
    return alone(subprocess.run, command(suite, str(part), options), env=environment, check=False).returncode


def alone(function: Callable[..., Any], *args: Any, **how: Any) -> Any:
    """Call what waits for a process: `subprocess.run` ends the child where an exception ends it, so a signal is one."""
    before = signal.signal(signal.SIGTERM, _stopped)
    try:
        return function(*args, **how)
    finally:
        signal.signal(signal.SIGTERM, before)


def command(suite: str, part: str, options: argparse.Namespace) -> list[str]:
    """What measures a suite, and leaves its rows in a file."""
    found = [sys.executable, str(_SCRIPT), part, "--only", suite, "--child"]
    found += ["--quick"] * options.quick + ["--counters"] * options.counters
    found += ["--match", options.match] if options.match else []
    return found + (["--minutes", str(options.minutes)] if options.minutes else [])


def _stopped(number: int, _: object) -> None:
    """A signal that stops this process, so that it takes its child along, which would go on with the GPU."""
    raise SystemExit(128 + number)


def measure(suite: str, options: argparse.Namespace) -> None:
    """All rows of one suite, in this process."""
    began = time.monotonic()
    torch.manual_seed(0)
    stopwatch = Stopwatch()
    ceilings = Ceilings(1.0, 1.0) if options.counters else common.measure_ceilings(stopwatch)
    torch.cuda.empty_cache()
    limit = began + 60 * options.minutes if options.minutes else float("inf")
    kind = counters.Counting if options.counters else Bench
    bench = kind(stopwatch, ceilings, Path(options.out), suite, options.quick, options.match, limit)
    print(f"{suite} on {bench.head['device']}: {common.ceiling_fields(ceilings)}", flush=True)
    try:
        compiling.SUITES[suite].run(bench)
    except Broken as error:
        print(f"{suite}: the GPU's context is gone, the rest is not measured: {error}", flush=True)
        sys.stdout.flush()
        os._exit(71)
    if bench.skipped:
        print(f"{suite}: out of time, not measured: {', '.join(bench.skipped)}", flush=True)
    print(f"{suite}: {bench.rows} rows in {time.monotonic() - began:.0f} s", flush=True)
