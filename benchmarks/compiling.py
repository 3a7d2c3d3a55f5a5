"""Compiles the kernels that a benchmark will ask for, in several processes, before the GPU is used; works without one.

Every case is called on tensors without memory (device "meta") and a runtime that launches nothing. The first pass only asks
which kernels there are; then each is compiled by one process, which calls the first case that needs it.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import (
    attention,
    attention_layer,
    common,
    experts,
    head,
    indexer,
    layers,
    linear,
    mhc,
    quantizers,
    rope_and_cache,
)
from dsv4lab.kernels._common import cache, launch

SUITES: dict[str, Any] = {
    "linear": linear,
    "quantizers": quantizers,
    "experts": experts,
    "rope_and_cache": rope_and_cache,
    "indexer": indexer,
    "attention": attention,
    "attention_layer": attention_layer,
    "mhc": mhc,
    "head": head,
    "layers": layers,
}
ARCH, MULTIPROCESSORS = "sm_90a", 132  # of an H100 SXM or H200


@dataclass
class Nowhere:
    """A runtime that launches nothing. libraries: none, so that kernels loaded for it are not taken for the GPU's."""

    arch: str = ARCH
    multiprocessors: int = MULTIPROCESSORS
    libraries: tuple[str, ...] = ()

    def bind(self, host_code: bytes) -> bytes:
        return host_code

    def know(self, ptx: str, cubin: bytes) -> None:
        pass

    def clusters(self, size: int) -> int:
        return self.multiprocessors // size

    def call(self, function: Callable[..., Any], *args: Any) -> None:
        pass


@dataclass(frozen=True)
class Job:
    """A kernel, and the case of a suite that asks for it."""

    suite: str
    quick: bool
    case: int
    name: launch.Name


@contextmanager
def asking(compiles: Callable[[launch.Name], bool]) -> Iterator[list[launch.Name]]:
    """Kernels asked for inside are compiled, but not loaded, where `compiles` says so. Their names are collected."""
    asked: list[launch.Name] = []
    kernel, link = cache.kernel, cache._link

    def ask(module: str, config: Any, build: cache.Build, runtime: launch.Runtime) -> Callable[..., Any]:
        name = launch.Name(module, repr(config))
        asked.append(name)
        return kernel(module, config, build, runtime) if compiles(name) else _nothing

    cache.kernel, cache._link = ask, lambda code, libraries: _nothing  # type: ignore[assignment]
    try:
        with launch.running_on(Nowhere()):
            yield asked
    finally:
        cache.kernel, cache._link = kernel, link


def _nothing(*_: Any) -> None:
    """Stands for host code."""


def _every(suite: str, case: Sequence[Any]) -> bool:
    return True


def plan(
    suites: Sequence[str], *, quick: bool, match: str = "", wanted: Callable[[str, Sequence[Any]], bool] = _every
) -> tuple[list[Job], list[str]]:
    """Every kernel once, and cases that fail already without a GPU. match: part of the cases' labels; wanted: which cases."""
    jobs: dict[launch.Name, Job] = {}
    failures = []
    for suite in suites:
        for number, case in enumerate(SUITES[suite].cases(quick=quick)):
            if match not in SUITES[suite].label(*case) or not wanted(suite, case):
                continue
            with asking(lambda name: False) as asked:
                try:
                    SUITES[suite].touch(*case)
                except Exception as error:
                    failures.append(f"{suite} {SUITES[suite].label(*case)}: {common.reason_of(error)}")
            for name in asked:
                jobs.setdefault(name, Job(suite, quick, number, name))
    return list(jobs.values()), failures


def compile_all(
    suites: Sequence[str],
    *,
    quick: bool,
    match: str = "",
    wanted: Callable[[str, Sequence[Any]], bool] = _every,
    processes: int | None = None,
) -> list[str]:
    """Compile into `cache.folder()`; returns what failed, which does not stop the rest."""
    start = time.monotonic()
    jobs, failures = plan(suites, quick=quick, match=match, wanted=wanted)
    print(f"{len(jobs)} kernels to compile or to find in {cache.folder()}", flush=True)
    workers = min(processes or len(os.sched_getaffinity(0)), len(jobs)) or 1
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, spawn, _keep_in, (cache.folder(),)) as pool:
        for job, failure in zip(jobs, pool.map(compile_one, jobs), strict=True):
            if failure:
                failures.append(f"{job.name}: {failure}")
    for failure in failures:
        print(f"  {failure}", flush=True)
    print(f"{len(jobs)} kernels, {len(failures)} failures, {time.monotonic() - start:.0f} s", flush=True)
    return failures


def _keep_in(folder: Path) -> None:
    """Another process finds and leaves kernels where this one does."""
    cache.folder = lambda: folder


def compile_one(job: Job) -> str:
    """Why a kernel could not be compiled; empty where it could, or was already."""
    case = list(SUITES[job.suite].cases(quick=job.quick))[job.case]
    with asking(lambda name: name == job.name):
        try:
            SUITES[job.suite].touch(*case)
        except Exception as error:
            return common.reason_of(error)
    return ""
