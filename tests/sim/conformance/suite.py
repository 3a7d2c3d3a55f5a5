"""All groups of the conformance suite, in the order of the table."""

from __future__ import annotations

from functools import cache
from importlib import import_module

from tests.sim.conformance.case import Group

FAMILIES = ("integer", "floating", "convert", "special", "warp", "memory", "atomic", "sync", "bulk", "mma", "wgmma")


@cache
def groups(family: str) -> tuple[Group, ...]:
    """The groups of one family's module."""
    made: tuple[Group, ...] = import_module(f"tests.sim.conformance.{family}").groups()
    return made


def every(arch: str | None = None) -> list[Group]:
    """Every group, or those for one architecture."""
    return [g for family in FAMILIES for g in groups(family) if arch in (None, g.arch)]
