"""Executing notebooks headless: each in its own processes, with a timeout, several at a time, none able to stop the others.

The executed notebook is the record: its metadata key `dsv4lab` says how the run ended, where, and how long it took.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

import nbformat
from tqdm import tqdm

from dsv4lab.lab.files import write_atomically
from dsv4lab.lab.machine import ROOT, commit, usable_cores
from dsv4lab.lab.notebooks import Notebook, NotebookError, choose_parameters, find_notebooks
from dsv4lab.lab.processes import MARK, kill_run

NOTEBOOKS = ROOT / "notebooks"
EXECUTED = ROOT / "executed" / "local"
PASSED, FAILED, TIMED_OUT, CRASHED, STOPPED = "passed", "failed", "timed out", "crashed", "stopped"

_POLL_S = 0.1
_LOG_TAIL_CHARS = 2000
_LOG_NOISE = ("[IPKernelApp]", "Kernel died while waiting")  # said at every start and every death
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")


@dataclass(frozen=True)
class Failure:
    """The cell that ended a run early: 1-based place among the source's cells, its first line, and what happened there."""

    cell: int | None
    line: str
    error: str

    def __str__(self) -> str:
        where = f"cell {self.cell} `{self.line}`: " if self.cell else ""
        return f"{where}{self.error}"


@dataclass(frozen=True)
class Outcome:
    """How one notebook's run ended."""

    name: str
    status: str  # PASSED, FAILED, TIMED_OUT, CRASHED or STOPPED
    seconds: float
    cells_started: int
    cells: int
    failure: Failure | None
    output: Path

    def __str__(self) -> str:
        text = f"{self.status:<9} {self.name:<24} {self.seconds:6.1f} s"
        return f"{text}  {self.failure}" if self.failure else text


@dataclass
class _Job:
    """A notebook being executed: its worker process and what that has told so far."""

    notebook: Notebook
    parameters: dict[str, Any]
    scratch: Path
    output: Path
    mark: str = field(default_factory=lambda: uuid.uuid4().hex)
    process: subprocess.Popen[bytes] | None = None
    log: IO[bytes] | None = None
    started: float = 0.0
    cell_id: str = ""
    seen: dict[str, None] = field(default_factory=dict)  # ids of source cells that were started
    ending: dict[str, Any] | None = None
    _read: int = 0

    @property
    def partial(self) -> Path:
        return self.scratch / "executed.ipynb"

    def start(self, environment: Mapping[str, str]) -> None:
        """Start the worker in a session of its own, with a pipe that tells it when this process is gone."""
        self.scratch.mkdir(parents=True)
        job = {
            "source": str(self.notebook.path),
            "output": str(self.partial),
            "parameters": self.parameters,
            "cwd": str(self.notebook.path.parent),
            "events": str(self.scratch / "events.jsonl"),
        }
        (self.scratch / "job.json").write_text(json.dumps(job), encoding="utf-8")
        self.output.unlink(missing_ok=True)  # a run that is cut short must not leave an older success behind
        self.log = open(self.scratch / "log", "wb")  # noqa: SIM115 - closed in `end`
        self.started = time.monotonic()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "dsv4lab.lab.worker", str(self.scratch / "job.json")],
            stdin=subprocess.PIPE,
            stdout=self.log,
            stderr=subprocess.STDOUT,
            env={**environment, MARK: self.mark, "IPYTHONDIR": str(self.scratch / "ipython")},
            start_new_session=True,
        )

    def listen(self) -> None:
        """Take in the events written since the last call; a line that is not whole yet waits."""
        path = self.scratch / "events.jsonl"
        if not path.exists():
            return
        with open(path, "rb") as stream:
            stream.seek(self._read)
            for line in stream:
                if not line.endswith(b"\n"):
                    break
                self._read += len(line)
                event = json.loads(line)
                if event["event"] == "cell":
                    self.cell_id = event["id"]
                    if self.notebook.position_of(self.cell_id):
                        self.seen[self.cell_id] = None
                else:
                    self.ending = event

    def end(self) -> None:
        """Kill whatever of this run still lives, and release its files."""
        if self.process is not None:
            kill_run(self.process.pid if self.process.poll() is None else None, self.mark)
            if self.process.stdin is not None:
                self.process.stdin.close()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(timeout=5)
        if self.log is not None:
            self.log.close()
            self.log = None

    def failure(self, error: str) -> Failure:
        """A failure at the cell that was running."""
        return Failure(self.notebook.position_of(self.cell_id), self.notebook.first_line(self.cell_id), error)

    def log_tail(self) -> str:
        """What the worker and its kernel last wrote to their own stdout and stderr."""
        text = (self.scratch / "log").read_bytes()[-_LOG_TAIL_CHARS:].decode("utf-8", errors="replace")
        return "\n".join(line for line in text.splitlines() if line.strip() and not line.startswith(_LOG_NOISE))


def run_notebooks(
    names: Sequence[str] = (),
    *,
    directory: Path = NOTEBOOKS,
    output: Path = EXECUTED,
    device: str = "auto",
    parameters: Mapping[str, Any] | None = None,
    jobs: int = 1,
    timeout_s: float = 900.0,
) -> list[Outcome]:
    """Execute notebooks (all of `directory`, or those named) and write each to `output` under its own name.

    device goes into the notebooks' `device` parameter. parameters: other values; a name that a notebook lacks is an error
    where notebooks were named or where no notebook has it. jobs: how many at a time, each with its share of the cores.
    timeout_s: seconds a notebook may take. Returns one Outcome a notebook, in order, whatever happened in them.
    Raises NotebookError before anything runs: unknown names, unknown or ill-typed parameters; ValueError for jobs, timeout_s.
    """
    if jobs < 1:
        raise ValueError(f"jobs must be >= 1, got {jobs}")
    if not timeout_s > 0:
        raise ValueError(f"timeout must be > 0 seconds, got {timeout_s}")
    notebooks = find_notebooks(directory.resolve(), names)
    given = dict(parameters or {})
    if "device" in given:
        raise NotebookError("the device is chosen with --device, not as a parameter")
    for name in given:
        if not any(name in notebook.parameters for notebook in notebooks):
            raise NotebookError(f"no notebook has a parameter {name!r}")
    chosen = [choose_parameters(notebook, given, strict=bool(names)) for notebook in notebooks]
    with tempfile.TemporaryDirectory(prefix="dsv4lab-run-") as scratch:
        waiting = []
        for notebook, values in zip(notebooks, chosen, strict=True):
            if "device" in notebook.parameters:
                values = {**values, "device": device}
            waiting.append(_Job(notebook, values, Path(scratch) / notebook.name, output.resolve() / f"{notebook.name}.ipynb"))
        return _run_all(waiting, jobs, timeout_s)


def worker_environment(jobs: int) -> dict[str, str]:
    """Environment of a worker: its share of the cores unless the user chose, inline figures, this very package."""
    environment = dict(os.environ)
    share = str(max(1, usable_cores() // jobs))
    for variable in _THREAD_VARIABLES:
        environment.setdefault(variable, share)
    environment["MPLBACKEND"] = "module://matplotlib_inline.backend_inline"  # a backend set outside would lose the figures
    environment["JUPYTER_PREFER_ENV_PATH"] = "1"  # this interpreter's kernel, before one of the same name in the home folder
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return environment


def _run_all(waiting: list[_Job], jobs: int, timeout_s: float) -> list[Outcome]:
    environment = worker_environment(jobs)
    order = [job.notebook.name for job in waiting]
    running: list[_Job] = []
    outcomes: dict[str, Outcome] = {}
    stamp = {"commit": commit(), "started": datetime.now(UTC).isoformat(timespec="seconds")}
    total = sum(len(job.notebook.cells) for job in waiting)
    with _progress(total) as bar:
        try:
            while waiting or running:
                while waiting and len(running) < jobs:
                    running.append(waiting.pop(0))
                    running[-1].start(environment)
                time.sleep(_POLL_S)
                for job in list(running):
                    before = len(job.seen)
                    alive = job.process is not None and job.process.poll() is None
                    job.listen()
                    bar.update(len(job.seen) - before)
                    status = _status(job, alive, timeout_s)
                    if status is None:
                        continue
                    running.remove(job)
                    outcome = _finish(job, status, timeout_s, stamp)
                    outcomes[outcome.name] = outcome
                    bar.update(len(job.notebook.cells) - len(job.seen))
                    bar.write(str(outcome), file=sys.stdout)
                    sys.stdout.flush()
                bar.set_postfix_str(
                    ", ".join(f"{job.notebook.name} {len(job.seen)}/{len(job.notebook.cells)}" for job in running)
                )
        finally:
            for job in running:  # only when this function is left early: Ctrl-C, SIGTERM, a fault of our own
                _finish(job, STOPPED, timeout_s, stamp)
    return [outcomes[name] for name in order]


@contextlib.contextmanager
def _progress(total: int) -> Iterator[tqdm]:
    # disable=None: a bar on a terminal, nothing in a log file, where the line a notebook is enough
    with tqdm(total=total, unit="cell", disable=None, leave=False) as bar:
        yield bar


def _status(job: _Job, alive: bool, timeout_s: float) -> str | None:
    """How a job ended, or None while it goes on."""
    if alive:
        return TIMED_OUT if time.monotonic() - job.started > timeout_s else None
    if job.ending is None:
        return CRASHED
    return {"passed": PASSED, "failed": FAILED}.get(job.ending["event"], CRASHED)


def _finish(job: _Job, status: str, timeout_s: float, stamp: Mapping[str, str]) -> Outcome:
    seconds = time.monotonic() - job.started
    code = job.process.returncode if job.process is not None else None
    job.end()
    job.listen()
    failure = None
    if status == FAILED and job.ending is not None:
        failure = job.failure(f"{job.ending['error']}: {job.ending['message']}")
    elif status == TIMED_OUT:
        failure = job.failure(f"still running after {timeout_s:g} s; killed with its child processes")
    elif status == STOPPED:
        failure = job.failure("stopped from outside before it ended")
    elif status == CRASHED:
        message = job.ending["message"] if job.ending else f"the notebook's process ended with status {code}"
        tail = job.log_tail()
        failure = job.failure(f"{message}; it last wrote:\n{tail}" if tail else message)
    outcome = Outcome(job.notebook.name, status, seconds, len(job.seen), len(job.notebook.cells), failure, job.output)
    write_atomically(job.output, _executed(job, outcome, stamp))
    return outcome


def _executed(job: _Job, outcome: Outcome, stamp: Mapping[str, str]) -> str:
    """The executed notebook as text: papermill's, without its machine's paths, with the outcome in the metadata."""
    try:
        stored = nbformat.read(job.partial, as_version=4)
    except (OSError, ValueError):  # ended before the first write
        stored = nbformat.read(job.notebook.path, as_version=4)
    stored.metadata.pop("papermill", None)
    for cell in stored.cells:
        timing = cell.metadata.pop("papermill", {})
        if timing.get("duration") is not None:
            cell.metadata["seconds"] = round(timing["duration"], 3)
        if outcome.failure and outcome.status != FAILED and cell.cell_type == "code" and cell.get("id") == job.cell_id:
            error = {
                "ename": outcome.status.capitalize(),
                "evalue": outcome.failure.error,
                "traceback": [outcome.failure.error],
            }
            cell.outputs.append(nbformat.v4.new_output("error", **error))
    failure = outcome.failure
    stored.metadata["dsv4lab"] = {
        **stamp,
        "status": outcome.status,
        "seconds": round(outcome.seconds, 2),
        "cells": outcome.cells,
        "cells_started": outcome.cells_started,
        "failure": {"cell": failure.cell, "line": failure.line, "error": failure.error} if failure else None,
        "parameters": job.parameters,
        "source_sha256": digest(job.notebook.path),
    }
    return nbformat.writes(stored) + "\n"


def digest(path: Path) -> str:
    """SHA-256 of a file, to tell whether an executed notebook came from the source as it is now."""
    return hashlib.sha256(path.read_bytes()).hexdigest()
