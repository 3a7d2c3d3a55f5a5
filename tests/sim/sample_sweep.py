"""Run NVIDIA's CuTeDSL samples in the simulator: python sample_sweep.py EXAMPLES RESULTS.json [options].

EXAMPLES is the folder `examples/python/CuTeDSL` of a CUTLASS checkout; the samples, their arguments and what is known of
those that do not pass are in nvidia_samples.toml. A sample that RESULTS already holds for every schedule asked for is not run
again, unless --again names a part of its command line. Every sample has its own process group, killed when its time is over.
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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SCHEDULES = ("eager", "lazy", *(f"random:{seed}" for seed in range(5)))
RACES = "races"
KINDS = ("finding", "compiler", "environment", "tolerance", "simulator")  # whose fault it is that a sample does not pass
_HERE = Path(__file__).parent
_PREFIX = "RESULT "
_OUTPUT = 1500  # characters kept of the output of a process that reported nothing
Facts = dict[str, Any]  # error, launches, instructions, seconds, races
Results = dict[str, dict[str, Facts]]  # sample -> schedule -> facts


@dataclass(frozen=True)
class Note:
    """What is known of samples that do not pass, or that the race checker has something to say about.

    match: part of their command line. kind: one of KINDS. text: why. skip: checks without which the sample passes.
    races: the note is about the race checker alone, the schedules pass.
    """

    match: str
    kind: str
    text: str
    skip: tuple[str, ...] = ()
    races: bool = False


@dataclass(frozen=True)
class Sample:
    """One command line. required: it belongs to a family that the simulator must be able to run."""

    family: str
    arch: str
    path: str
    arguments: tuple[str, ...]
    required: bool = True
    skip: tuple[str, ...] = ()
    notes: tuple[Note, ...] = field(default=(), compare=False)

    @property
    def name(self) -> str:
        return " ".join((self.path, *self.arguments, *(f"[without {check}]" for check in self.skip)))

    @property
    def excused(self) -> bool:
        """Whether it is known that not every schedule passes, and why."""
        return not self.skip and any(not note.races for note in self.notes)


def load_samples(file: Path = _HERE / "nvidia_samples.toml") -> list[Sample]:
    """Every sample of the data file in its order; those that only a check's finding stops come once more without that check."""
    data = tomllib.loads(file.read_text())
    notes = [Note(**{**note, "skip": tuple(note.get("skip", ()))}) for note in data.get("note", ())]
    if wrong := [note.match for note in notes if note.kind not in KINDS]:
        raise ValueError(f"the kind of a note must be one of {', '.join(KINDS)}, which is not so for {', '.join(wrong)}")
    found = []
    for family in data["family"]:
        for line in (family.get("folder", "") + run for run in family["runs"]):
            path, *arguments = line.split()
            known = tuple(note for note in notes if note.match in line)
            sample = Sample(family["name"], family["arch"], path, tuple(arguments), family.get("required", True), (), known)
            found.append(sample)
            skip = tuple(check for note in known for check in note.skip)
            if skip:
                found.append(Sample(sample.family, sample.arch, path, sample.arguments, sample.required, skip, known))
    if unused := [note.match for note in notes if not any(note in sample.notes for sample in found)]:
        raise ValueError(f"notes about no sample: {', '.join(unused)}")
    return found


def run_sample(sample: Sample, examples: Path, schedules: Iterable[str], limit: float) -> dict[str, Facts]:
    """Run a sample in a process of its own; returns schedule -> {error, launches, instructions, seconds, races}.

    limit: seconds for each schedule; compiling before the first launch may take as long again.
    """
    schedules = list(schedules)
    command = [sys.executable, str(_HERE / "sample_run.py"), "--arch", sample.arch, "--schedules", ",".join(schedules)]
    command += ["--skip", ",".join(sample.skip), "--limit", str(limit), str(examples / sample.path), *sample.arguments]
    paths = os.pathsep.join(filter(None, (str(_HERE.parent.parent), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths, "CUDA_VISIBLE_DEVICES": ""}
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
    facts: dict[str, Facts] = {}
    for line in output.splitlines():
        if line.startswith(_PREFIX):
            record = json.loads(line[len(_PREFIX) :])
            facts[record.pop("schedule")] = record
    if "none" in facts:
        facts = dict.fromkeys(schedules, facts["none"])
    whole = round(time.monotonic() - start, 1)
    missing = {"error": complaint, "output": output[-_OUTPUT:]}
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


def passed(facts: Facts) -> bool:
    return facts["error"] is None


def _summary(found: dict[str, Facts]) -> str:
    bad = [f"{schedule}: {facts['error'].splitlines()[0][:150]}" for schedule, facts in found.items() if not passed(facts)]
    races = len(found.get(RACES, {}).get("races", ()))
    return f"{len(found) - len(bad)}/{len(found)}{f', {races} races' if races else ''}{' ' + bad[0] if bad else ''}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("examples", type=Path)
    parser.add_argument("results", type=Path)
    parser.add_argument("--schedules", default=",".join((*SCHEDULES, RACES)))
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
    failed = [s for s in samples if not all(passed(results[s.name][x]) for x in schedules)]
    print(f"{len(samples) - len(failed)} of {len(samples)} samples pass {', '.join(schedules)}")
    for sample in failed:
        if not sample.excused:
            print(f"not known to fail: {sample.name}")
    return 1 if any(not sample.excused for sample in failed) else 0


if __name__ == "__main__":
    sys.exit(main())
