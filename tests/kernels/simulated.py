"""Kernels in the simulator, as every test of them wants it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from dsv4lab import sim
from dsv4lab.kernels._common.launch import running_on


@contextmanager
def simulating(
    arch: str = "sm_90a", *, multiprocessors: int | None = None, checks: sim.Checks | None = None, **how: Any
) -> Iterator[None]:
    """Kernels run in the simulator, and none may wait for a CTA that starts later.

    multiprocessors: what it says that it has, by default what it said before. checks, how: as `sim.simulating` has them.
    """
    if multiprocessors is not None:
        sim.enable(arch, multiprocessors=multiprocessors)
    watched = replace(checks or sim.Checks(), residency=True)
    with sim.simulating(arch, checks=watched, **how), running_on(sim.Host(arch)):
        yield
