"""What `sample_run.py` takes from the package's script runner, under the names it uses."""

from __future__ import annotations

import os
import runpy as runpy
import sys

from dsv4lab.sim import script
from dsv4lab.sim.fake_gpu import fake_gpu as _fake_gpu


def _with_aligned_allocations() -> None:
    library = str(script.aligned_allocator())
    if library not in os.environ.get("LD_PRELOAD", "").split(":"):
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, "LD_PRELOAD": library})


def fake_gpu(arch: str) -> None:
    """Redirect until the process ends."""
    _fake_gpu(arch, multiprocessors=1).__enter__()


def _replace_benchmarks() -> None:
    """`fake_gpu` has done it."""
