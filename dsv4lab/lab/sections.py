"""What the last sections of a kernel's notebook print: what its launches use, the least time of its bytes, measured rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from dsv4lab import sim
from dsv4lab.lab import baselines, hopper
from dsv4lab.lab.baselines import Baseline
from dsv4lab.lab.checks import check_that
from dsv4lab.lab.roofline import Ceilings, Work

DATA_SHEET = Ceilings(4.8e12, 989e12, "data sheet of an H200")
FIELDS = ("shape", "m", "format", "equal", "registers", "spill_bytes", "percent_of_bar")  # of a measured row
PEERS = ("torch", "torch.compile")


class Store(Protocol):
    """The compile cache, `dsv4lab.kernels._common.cache`."""

    def folder(self) -> Path: ...

    def read(self, path: Path) -> Any: ...


def ceilings_of(base: Baseline) -> Ceilings:
    """What measured rows are held against; where there are none yet, the data sheet of an H200."""
    return base.ceilings if base else DATA_SHEET


def print_uses(
    launches: Sequence[sim.Executed], store: Store, names: Sequence[str], *, most_spilled: int = 0
) -> dict[str, list[Any]]:
    """A table of what simulated launches use, and a check of spilled bytes -> registers for `viz.plot_resources`.

    names: one for each launch. Raises CheckFailed; ValueError and LookupError as `hopper.uses` does.
    """
    newest = sorted(store.folder().glob("*.kernel"), key=lambda path: -path.stat().st_mtime)
    used = hopper.uses(launches, map(store.read, newest), names)
    print(hopper.table([one.row() for one in used]))
    check_that("most spilled bytes", max(one.spill_bytes for one in used), "<=", most_spilled)
    labels = [f"registers: {one.name}" for one in used]
    return dict(used=[one.registers for one in used], limits=[hopper.REGISTERS] * len(used), labels=labels)


def print_floors(work: Mapping[str, Work], base: Baseline, tokens: int) -> tuple[dict[str, float], dict[str, float]]:
    """Bytes and least time of calls of `tokens` tokens, then all measured rows whose shape is named after one of them.

    -> microseconds of the bound and measured, of the rows with so many tokens, for `viz.plot_predicted`; empty without any.
    """
    ceilings = ceilings_of(base)
    floors = [
        {f"{tokens} tokens": name, "MB": 1e-6 * one.num_bytes, "at least us": 1e6 * one.floor_s(ceilings)}
        for name, one in work.items()
    ]
    print(hopper.table(floors), f"ceilings: {ceilings.source}", base, sep="\n")
    rows = [row for name in work for row in base.where(shape=name)]
    print(hopper.table(baselines.summary(rows, FIELDS, PEERS)))
    drawn = [row for row in rows if row["m"] == tokens]
    twice = len({row["shape"] for row in drawn}) < len(drawn)  # then formats tell them apart
    return baselines.bound_and_time(drawn, "{shape}, {format}" if twice else "{shape}")
