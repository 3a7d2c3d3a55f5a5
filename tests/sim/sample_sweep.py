"""Run NVIDIA's CuTeDSL samples in the simulator: python sample_sweep.py EXAMPLES RESULTS.json [--table PAGE.md] [options].

EXAMPLES is the folder `examples/python/CuTeDSL` of a CUTLASS checkout; the samples and their arguments are in
nvidia_samples.toml. A sample that RESULTS already holds for every schedule asked for is not run again, unless --again names
a part of its command line. Every sample has its own process group, which is killed when its time is over.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import threading
import time
import tomllib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SCHEDULES = ("eager", "lazy", *(f"random:{seed}" for seed in range(5)))
_HERE = Path(__file__).parent
_PREFIX = "RESULT "
Results = dict[str, dict[str, dict[str, Any]]]  # sample -> schedule -> facts


@dataclass(frozen=True)
class Sample:
    """One command line. required: part of what the simulator promises; the others are extra."""

    family: str
    arch: str
    path: str
    arguments: tuple[str, ...]
    required: bool = True
    note: str = ""

    @property
    def name(self) -> str:
        return " ".join((self.path, *self.arguments))


def load_samples(file: Path = _HERE / "nvidia_samples.toml") -> list[Sample]:
    """Every sample of the data file, in its order."""
    found = []
    for family in tomllib.loads(file.read_text())["family"]:
        notes = family.get("notes", {})
        for line in family["runs"]:
            path, *arguments = line.split()
            note = next((text for part, text in notes.items() if part in line), "")
            found.append(Sample(family["name"], family["arch"], path, tuple(arguments), family.get("required", True), note))
    return found


def run_sample(sample: Sample, examples: Path, schedules: Iterable[str], limit: float) -> dict[str, dict[str, Any]]:
    """Run a sample in a process of its own; returns schedule -> {error, launches, instructions, seconds}.

    limit: seconds for each schedule; compiling before the first launch may take as long again.
    """
    schedules = list(schedules)
    command = [sys.executable, str(_HERE / "sample_run.py"), "--arch", sample.arch, "--schedules", ",".join(schedules)]
    command += ["--limit", str(limit), str(examples / sample.path), *sample.arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(_HERE.parent.parent), "CUDA_VISIBLE_DEVICES": ""}
    start = time.monotonic()
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
        start_new_session=True,
        cwd=examples,
    )
    try:
        output, _ = process.communicate(timeout=limit * (len(schedules) + 1))
        complaint = f"the process ended with status {process.returncode} before any launch"
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        complaint = f"timeout: no launch after {limit:.0f} s"
    facts = {}
    for line in output.splitlines():
        if line.startswith(_PREFIX):
            record = json.loads(line[len(_PREFIX) :])
            facts[record.pop("schedule")] = record
    if "none" in facts:
        facts = dict.fromkeys(schedules, facts["none"])
    whole = round(time.monotonic() - start, 1)
    missing = {"error": complaint, "output": output[-2000:]}
    return {schedule: {**facts.get(schedule, missing), "process_s": whole} for schedule in schedules}


def sweep(
    samples: Iterable[Sample],
    examples: Path,
    file: Path,
    schedules: Iterable[str],
    *,
    limit: float,
    jobs: int,
    again: str | None,
) -> Results:
    """Run what is missing and write `file` after every sample."""
    results: Results = json.loads(file.read_text()) if file.exists() else {}
    schedules, lock = list(schedules), threading.Lock()

    def one(sample: Sample) -> None:
        known = results.get(sample.name, {})
        stale = again is not None and again in sample.name
        wanted = [s for s in schedules if stale or s not in known]
        if not wanted:
            return
        found = run_sample(sample, examples, wanted, limit)
        with lock:
            results.setdefault(sample.name, {}).update(found)
            scratch = file.with_suffix(".new")
            scratch.write_text(json.dumps(results, indent=1))
            scratch.replace(file)
            print(f"{_summary(found)}  {sample.name}", flush=True)

    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(one, samples))
    return results


def _summary(found: dict[str, dict[str, Any]]) -> str:
    bad = [f"{schedule}: {facts['error'].splitlines()[0][:150]}" for schedule, facts in found.items() if facts["error"]]
    return f"{len(found) - len(bad)}/{len(found)}{' ' + bad[0] if bad else ''}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("examples", type=Path)
    parser.add_argument("results", type=Path)
    parser.add_argument("--schedules", default=",".join(SCHEDULES))
    parser.add_argument("--only", default="", help="samples whose family or command line contains this")
    parser.add_argument("--again", help="run samples whose command line contains this even if their results are known")
    parser.add_argument("--limit", type=float, default=300, help="seconds for one schedule of one sample")
    parser.add_argument("--jobs", type=int, default=1)
    options = parser.parse_args()
    samples = [s for s in load_samples() if options.only in f"{s.family} {s.name}"]
    schedules = options.schedules.split(",")
    results = sweep(
        samples, options.examples, options.results, schedules, limit=options.limit, jobs=options.jobs, again=options.again
    )
    failed = [s.name for s in samples if any(results[s.name][x]["error"] for x in schedules)]
    print(f"{len(samples) - len(failed)} of {len(samples)} samples pass every schedule")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
